"""Stand-ins for CUDA on a host without a GPU.

Megatron-Core addresses the current CUDA device in more than a hundred places.  All of that code
runs on gloo ranks without a GPU if a few functions of ``torch`` are replaced by CPU versions.
:func:`enter_host` makes every such replacement:

* An entry point calls it explicitly, before it imports Megatron.
* It changes nothing of ``torch`` if CUDA is available.
* It never replaces ``torch.cuda.is_available()``, or torch.compile would look for a device.

Importing this module has no effect.
"""

import functools
import importlib.util
import os
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import torch
import torch.utils._device

from trinity_megatron.cpu_host.collectives import stand_in_for_collectives
from trinity_megatron.cpu_host.malloc import keep_freed_memory
from trinity_megatron.cpu_host.matmul import choose_fp32_matmul
from trinity_megatron.cpu_host.numerics import multi_tensor_l2_norm, multi_tensor_scale
from trinity_megatron.cpu_host.streams import stand_in_for_streams
from trinity_megatron.upstream.registry import replace

CPU = torch.device("cpu")
_FACTORIES = (
    "tensor",
    "as_tensor",
    "empty",
    "zeros",
    "ones",
    "full",
    "arange",
    "linspace",
    "rand",
    "randn",
    "randint",
    "randperm",
    "eye",
    "empty_like",
    "zeros_like",
    "ones_like",
    "full_like",
    "rand_like",
    "randn_like",
)


def enter_host() -> bool:
    """Replace CUDA functions of torch and Megatron by CPU versions if CUDA is not available.

    Idempotent.  An entry point calls it before it imports Megatron.

    Returns:
        True on a CPU host, False if CUDA is available.
    """
    has_cuda = torch.cuda.is_available()
    if not has_cuda:
        _stand_in_for_cuda()
    _skip_helper_build()  # imports Megatron
    return not has_cuda


def is_cpu_host() -> bool:
    """Whether the stand-ins are in place in this process."""
    return _stand_in_for_cuda.cache_info().currsize > 0


@functools.cache
def _stand_in_for_cuda() -> None:
    """Make all replacements; the cache keeps a second call from making them again."""
    _set_environment()
    _stand_in_for_compile()
    _stand_in_for_devices()
    stand_in_for_streams()
    _stand_in_for_random_state()
    _stand_in_for_memory_and_properties()
    stand_in_for_collectives()
    _stand_in_for_megatron_paths()
    choose_fp32_matmul()
    keep_freed_memory()


def _set_environment() -> None:
    # torch.compile of Megatron's small fused functions takes 18 s in the first step on a CPU.
    os.environ.setdefault("TORCHDYNAMO_DISABLE", "1")
    # Megatron's argument check for tensor parallelism requires it; it has no effect on a CPU.
    os.environ.setdefault("CUDA_DEVICE_MAX_CONNECTIONS", "1")


def _stand_in_for_compile() -> None:
    """Where nothing is compiled, ``torch.compile`` need not import the compiler: 3 s a process.

    Megatron decorates its small fused functions with it when it is imported.
    """
    if os.environ["TORCHDYNAMO_DISABLE"] != "1":
        return

    def compile_nothing(model: Any = None, **_: Any) -> Any:
        return (lambda function: function) if model is None else model

    torch.compile = compile_nothing  # type: ignore[assignment]


def _names_cuda(device: Any) -> bool:
    if isinstance(device, str):
        return device.startswith("cuda")
    return isinstance(device, torch.device) and device.type == "cuda"


def _on_cpu(function: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(function)
    def wrapper(*args: Any, **kwargs: Any) -> Any:
        if _names_cuda(kwargs.get("device")):
            kwargs["device"] = CPU
        # Pinned memory needs a device.
        kwargs.pop("pin_memory", None)
        return function(*args, **kwargs)

    return wrapper


def _stand_in_for_devices() -> None:
    # `with torch.device("meta")` recognizes factories by identity and caches them at its first use.
    # Fill that cache now, with the original factories, which the stand-ins call.
    torch.utils._device._device_constructors()
    # The optimizer, clip_grads, moe_logging and training pass a literal device="cuda".
    for name in _FACTORIES:
        setattr(torch, name, _on_cpu(getattr(torch, name)))
    # Megatron uses the result as a device, for which torch.device("cpu") is valid too.
    torch.cuda.current_device = lambda: CPU  # type: ignore[assignment, return-value]
    torch.cuda.set_device = lambda device: None  # type: ignore[assignment]
    # initialize_megatron sets up model parallelism only if this is positive.
    torch.cuda.device_count = lambda: int(os.environ.get("LOCAL_WORLD_SIZE", "1"))  # type: ignore[assignment]

    tensor_to, tensor_type = torch.Tensor.to, torch.Tensor.type

    def to(self: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        if args and _names_cuda(args[0]):
            args = (CPU, *args[1:])
        if _names_cuda(kwargs.get("device")):
            kwargs["device"] = CPU
        return tensor_to(self, *args, **kwargs)

    def type_(self: torch.Tensor, dtype: Any = None, *args: Any, **kwargs: Any) -> Any:
        # The optimizers group parameters by type names such as "torch.cuda.FloatTensor".
        if dtype is None:
            return tensor_type(self).replace("torch.", "torch.cuda.", 1)
        return tensor_type(self, dtype, *args, **kwargs)

    torch.Tensor.to = to  # type: ignore[assignment]
    torch.Tensor.type = type_  # type: ignore[assignment]
    torch.Tensor.cuda = lambda self, *args, **kwargs: self  # type: ignore[assignment]
    torch.Tensor.record_stream = lambda self, stream: None  # type: ignore[assignment]


def _stand_in_for_random_state() -> None:
    # Megatron keeps named CUDA generator states (dropout, initialization); use the CPU generator's.
    torch.cuda.get_rng_state = lambda device="cuda": torch.get_rng_state()  # type: ignore[assignment]
    torch.cuda.set_rng_state = lambda state, device="cuda": torch.set_rng_state(state)  # type: ignore[assignment]
    torch.cuda.random.get_rng_state = torch.cuda.get_rng_state  # type: ignore[assignment]
    torch.cuda.manual_seed = lambda seed: torch.default_generator.manual_seed(seed)  # type: ignore[assignment]
    torch.cuda.manual_seed_all = torch.cuda.manual_seed  # type: ignore[assignment]


def _stand_in_for_memory_and_properties() -> None:
    # The training loop logs the memory; argument checks read the compute capability.
    for name in (
        "memory_allocated",
        "max_memory_allocated",
        "memory_reserved",
        "max_memory_reserved",
        "mem_get_info",
        "reset_peak_memory_stats",
    ):
        setattr(torch.cuda, name, lambda *args, **kwargs: 0)
    torch.cuda.memory_stats = lambda *args, **kwargs: _Zeros()  # type: ignore[assignment]
    torch.cuda.empty_cache = lambda: None  # type: ignore[assignment]
    torch.cuda.get_device_properties = lambda device=None: SimpleNamespace(  # type: ignore[assignment, return-value]
        name="cpu", major=0, minor=0, multi_processor_count=1, total_memory=0
    )
    torch.cuda.get_device_capability = lambda device=None: (0, 0)  # type: ignore[assignment]
    torch.cuda.get_device_name = lambda device=None: "cpu"  # type: ignore[assignment]


class _Zeros(dict):
    def __missing__(self, key: str) -> int:
        return 0


def _stand_in_for_megatron_paths() -> None:
    # It calls torch._C._cuda_setRNGState, which some builds have even if there is no device.
    def set_rng_state(new_state: Any, device: int = -1, graph_safe: bool = False) -> None:
        torch.set_rng_state(new_state)

    replace("megatron.core.tensor_parallel.random:_set_cuda_rng_state", set_rng_state)

    # Its default argument is the original torch.empty; --ckpt-fully-parallel-load passes "cuda".
    init_data = "megatron.core.dist_checkpointing.mapping:ShardedTensor.init_data"
    replace(f"{init_data}.__defaults__", (torch.empty,))

    # Megatron's version leaves CPU tensors unchanged; its callers need numpy arrays as split sizes.
    def move_to_host(tensor: Any, as_numpy: bool = False, record_stream: bool = False) -> Any:
        return tensor.numpy() if as_numpy and torch.is_tensor(tensor) else tensor

    dispatcher = "megatron.core.transformer.moe.token_dispatcher"
    replace(f"{dispatcher}:maybe_move_tensor_to_cpu", move_to_host)
    # Megatron's fallbacks use torch.norm, inaccurate for large tensors on a CPU, and copy to scale.
    replace("megatron.core.optimizer.clip_grads:l2_norm_impl", multi_tensor_l2_norm)
    replace("megatron.core.optimizer.clip_grads:multi_tensor_scale_impl", multi_tensor_scale)


def _skip_helper_build() -> None:
    """Make ``compile_helpers()`` do nothing if the compiled dataset helper is installed.

    Megatron runs ``make`` inside site-packages and exits the process if that fails.  The wheel
    contains the compiled helper but no Makefile, so this affects GPU hosts too.
    """
    if importlib.util.find_spec("megatron.core.datasets.helpers_cpp") is None:
        return
    replace("megatron.core.datasets.utils:compile_helpers", lambda: None)
