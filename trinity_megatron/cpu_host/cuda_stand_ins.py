"""The CPU host: what stands in for CUDA where there is none.

Megatron-Core addresses the current CUDA device in more than a hundred places.  A machine without a
GPU can run all of that code on gloo ranks once a few names of ``torch`` answer for the CPU.  This
module holds every such answer with its reason, in one place:

* entry points call :func:`enter_host` explicitly, before anything of Megatron is imported;
* where CUDA is available it changes nothing of ``torch``;
* ``torch.cuda.is_available()`` is never faked (torch.compile would then look for a device).

Importing this module has no effect.
"""

import contextlib
import functools
import importlib.util
import os
from collections.abc import Callable, Iterator
from types import SimpleNamespace
from typing import Any

import torch

from trinity_megatron.cpu_host.malloc import keep_freed_memory
from trinity_megatron.cpu_host.matmul import choose_fp32_matmul
from trinity_megatron.upstream.registry import replace

CPU = torch.device("cpu")
_FACTORIES = (
    "tensor as_tensor empty zeros ones full arange linspace rand randn randint randperm eye "
    "empty_like zeros_like ones_like full_like rand_like randn_like"
).split()


def enter_host() -> bool:
    """Stand in for CUDA on a machine without one; on a machine with CUDA change nothing of torch.

    Idempotent.  Call it first in an entry point.

    Returns:
        True if the stand-ins are in place (a CPU host), False on a CUDA machine.
    """
    _skip_needless_helper_build()
    if torch.cuda.is_available():
        return False
    _stand_in_for_cuda()
    return True


@functools.cache  # once a process
def _stand_in_for_cuda() -> None:
    _set_environment()
    _stand_in_for_devices()
    _stand_in_for_streams()
    _stand_in_for_random_state()
    _stand_in_for_memory_and_properties()
    _stand_in_for_collectives()
    _stand_in_for_megatron_paths()
    choose_fp32_matmul()
    keep_freed_memory()


def is_cpu_host() -> bool:
    """Whether the CPU stand-ins are in place in this process."""
    return _stand_in_for_cuda.cache_info().currsize > 0


def _set_environment() -> None:
    # torch.compile of Megatron's small fused functions costs 18 s at the first step on a CPU.
    os.environ.setdefault("TORCHDYNAMO_DISABLE", "1")
    # Demanded by Megatron's argument check for tensor parallelism; without meaning on a CPU.
    os.environ.setdefault("CUDA_DEVICE_MAX_CONNECTIONS", "1")


def _names_cuda(device: Any) -> bool:
    if isinstance(device, str):
        return device.startswith("cuda")
    return isinstance(device, torch.device) and device.type == "cuda"


def _on_cpu(function: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(function)
    def wrapper(*args: Any, **kwargs: Any) -> Any:
        if _names_cuda(kwargs.get("device")):
            kwargs["device"] = CPU
        # Page-locked memory exists only for copies to a device.
        kwargs.pop("pin_memory", None)
        return function(*args, **kwargs)

    return wrapper


def _stand_in_for_devices() -> None:
    # `with torch.device("meta")` knows the factories by identity, as it finds them at its first
    # use: now, or it would miss the real ones that the stand-ins call.
    torch.utils._device._device_constructors()
    # A literal device="cuda" stands in the optimizer, clip_grads, moe_logging and training.
    for name in _FACTORIES:
        setattr(torch, name, _on_cpu(getattr(torch, name)))
    # torch.device("cpu") is valid wherever Megatron uses the result as a device.
    torch.cuda.current_device = lambda: CPU  # type: ignore[assignment, return-value]
    torch.cuda.set_device = lambda device: None  # type: ignore[assignment]
    # initialize_megatron sets up model parallelism only when this is positive.
    torch.cuda.device_count = lambda: int(os.environ.get("LOCAL_WORLD_SIZE", "1"))  # type: ignore[assignment]

    tensor_to, tensor_type = torch.Tensor.to, torch.Tensor.type

    def to(self: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        if args and _names_cuda(args[0]):
            args = (CPU, *args[1:])
        if _names_cuda(kwargs.get("device")):
            kwargs["device"] = CPU
        return tensor_to(self, *args, **kwargs)

    def type_(self: torch.Tensor, dtype: Any = None, *args: Any, **kwargs: Any) -> Any:
        # The optimizers sort parameters by names such as "torch.cuda.FloatTensor".
        if dtype is None:
            return tensor_type(self).replace("torch.", "torch.cuda.", 1)
        return tensor_type(self, dtype, *args, **kwargs)

    torch.Tensor.to = to  # type: ignore[assignment]
    torch.Tensor.type = type_  # type: ignore[assignment]
    torch.Tensor.cuda = lambda self, *args, **kwargs: self  # type: ignore[assignment]
    torch.Tensor.record_stream = lambda self, stream: None  # type: ignore[assignment]


class _Stream:
    """A stream of a device that runs everything in order: waiting is always over."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        pass

    def record_event(self, event: Any = None) -> "_Event":
        return event or _Event()

    def wait_stream(self, stream: Any) -> None:
        pass

    def wait_event(self, event: Any) -> None:
        pass

    def synchronize(self) -> None:
        pass

    def query(self) -> bool:
        return True


class _Event:
    """An event on such a stream: it has always happened."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        pass

    def record(self, stream: Any = None) -> None:
        pass

    def wait(self, stream: Any = None) -> None:
        pass

    def synchronize(self) -> None:
        pass

    def query(self) -> bool:
        return True

    def elapsed_time(self, other: "_Event") -> float:
        return 0.0


@contextlib.contextmanager
def _stream_context(stream: Any) -> Iterator[None]:
    yield


def _stand_in_for_streams() -> None:
    # Dispatchers, DDP and the pipeline schedules order their work with streams and events.
    the_stream = _Stream()
    torch.cuda.Stream = _Stream  # type: ignore[assignment, misc]
    torch.cuda.Event = _Event  # type: ignore[assignment, misc]
    torch.cuda.stream = _stream_context  # type: ignore[assignment]
    torch.cuda.current_stream = lambda device=None: the_stream  # type: ignore[assignment, return-value]
    torch.cuda.default_stream = lambda device=None: the_stream  # type: ignore[assignment, return-value]
    torch.cuda.set_stream = lambda stream: None  # type: ignore[assignment]
    torch.cuda.synchronize = lambda device=None: None  # type: ignore[assignment]
    torch.cuda.is_current_stream_capturing = lambda: False  # type: ignore[assignment]
    for name in ("range_push", "range_pop", "mark"):
        setattr(torch.cuda.nvtx, name, lambda *args, **kwargs: None)


def _stand_in_for_random_state() -> None:
    # Megatron keeps named CUDA generator states (dropout, initialisation): here the CPU's.
    torch.cuda.get_rng_state = lambda device="cuda": torch.get_rng_state()  # type: ignore[assignment]
    torch.cuda.set_rng_state = lambda state, device="cuda": torch.set_rng_state(state)  # type: ignore[assignment]
    torch.cuda.random.get_rng_state = torch.cuda.get_rng_state  # type: ignore[assignment]
    torch.cuda.manual_seed = lambda seed: torch.default_generator.manual_seed(seed)  # type: ignore[assignment]
    torch.cuda.manual_seed_all = torch.cuda.manual_seed  # type: ignore[assignment]


def _stand_in_for_memory_and_properties() -> None:
    # Logged by the training loop and read by argument checks for an architecture number.
    for name in (
        "memory_allocated max_memory_allocated memory_reserved max_memory_reserved "
        "mem_get_info reset_peak_memory_stats"
    ).split():
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


def _stand_in_for_collectives() -> None:
    # gloo has no uneven all-gather and no uneven reduce-scatter; tensor with expert parallelism
    # (expert tensor parallel size > 1) asks for both.
    distributed = torch.distributed
    even_all_gather, even_reduce_scatter = distributed.all_gather, distributed.reduce_scatter

    @functools.wraps(even_all_gather)
    def all_gather(outputs: list, tensor: Any, group: Any = None, async_op: bool = False) -> Any:
        sizes = [output.shape[0] if output.dim() else 1 for output in outputs]
        if len(set(sizes)) <= 1:
            return even_all_gather(outputs, tensor, group=group, async_op=async_op)
        padded = tensor.new_zeros((max(sizes), *tensor.shape[1:]))
        padded[: tensor.shape[0]] = tensor
        parts = [torch.empty_like(padded) for _ in sizes]
        work = even_all_gather(parts, padded, group=group)
        for output, part in zip(outputs, parts, strict=True):
            output.copy_(part[: output.shape[0]])
        return work

    @functools.wraps(even_reduce_scatter)
    def reduce_scatter(
        output: Any, inputs: list, op: Any = None, group: Any = None, async_op: bool = False
    ) -> Any:
        total = torch.cat([tensor.contiguous() for tensor in inputs])
        work = distributed.all_reduce(total, op=op or distributed.ReduceOp.SUM, group=group)
        rank = distributed.get_rank(group)
        start = sum(tensor.shape[0] for tensor in inputs[:rank])
        output.copy_(total[start : start + inputs[rank].shape[0]])
        return work

    distributed.all_gather = all_gather  # type: ignore[assignment]
    distributed.reduce_scatter = reduce_scatter  # type: ignore[assignment]


def _stand_in_for_megatron_paths() -> None:
    # It ends in torch._C._cuda_setRNGState, which a build may have although no device exists.
    def set_rng_state(new_state: Any, device: int = -1, graph_safe: bool = False) -> None:
        torch.set_rng_state(new_state)

    replace("megatron.core.tensor_parallel.random:_set_cuda_rng_state", set_rng_state)

    # Its default is the factory of before; --ckpt-fully-parallel-load calls it with "cuda".
    init_data = "megatron.core.dist_checkpointing.mapping:ShardedTensor.init_data"
    replace(f"{init_data}.__defaults__", (torch.empty,))

    # Returns a CPU tensor as it is; its callers need host numbers (split sizes, list lengths).
    def move_to_host(tensor: Any, as_numpy: bool = False, record_stream: bool = False) -> Any:
        return tensor.numpy() if as_numpy and torch.is_tensor(tensor) else tensor

    dispatcher = "megatron.core.transformer.moe.token_dispatcher"
    replace(f"{dispatcher}:maybe_move_tensor_to_cpu", move_to_host)
    # On a CPU one running fp32 sum over a large tensor (torch.norm) is wrong in the fifth digit,
    # so that the gradient norm depended on how tensors are cut; scaling made a copy of each.
    replace("megatron.core.optimizer.clip_grads:l2_norm_impl", _multi_tensor_l2_norm)
    replace("megatron.core.optimizer.clip_grads:multi_tensor_scale_impl", _multi_tensor_scale)


def _multi_tensor_l2_norm(
    chunk_size: int, noop_flag: Any, tensor_lists: list, per_tensor: bool, *args: Any
) -> tuple[torch.Tensor, None]:
    norms = torch.cat([norm for tensor in tensor_lists[0] for norm in norms_of_rows(tensor)])
    return torch.linalg.vector_norm(norms.double()).float().view(1), None


def norms_of_rows(tensor: torch.Tensor) -> list[torch.Tensor]:
    """Norms of pieces of a tensor so short that one running fp32 sum is exact enough.

    Args:
        tensor: Any shape, floating.

    Returns:
        fp32 tensors; all their elements are norms of pieces.
    """
    flat = tensor.reshape(-1)
    whole = flat.numel() // _ROW * _ROW
    rows = [flat[:whole].view(-1, _ROW), flat[whole:].view(1, -1)]
    return [torch.linalg.vector_norm(row, dim=-1, dtype=torch.float32) for row in rows]


def sum_of_squares(tensor: torch.Tensor) -> torch.Tensor:
    """Sum of squares, fp64 ``[]``, of a floating tensor of any shape."""
    return torch.cat(norms_of_rows(tensor)).double().square().sum()


_ROW = 1024


def _multi_tensor_scale(chunk_size: int, noop_flag: Any, tensor_lists: list, scale: float) -> None:
    sources, destinations = tensor_lists
    if any(a.data_ptr() != b.data_ptr() for a, b in zip(sources, destinations, strict=True)):
        torch._foreach_copy_(destinations, sources)
    torch._foreach_mul_(destinations, scale)


def _skip_needless_helper_build() -> None:
    """Answer ``compile_helpers()`` when the compiled dataset helper is there already.

    Megatron runs ``make`` inside site-packages and exits the process if that fails; the wheel
    brings the compiled helper but no Makefile.  This hits every user of the wheel, with or without
    a GPU, and touches nothing of torch.
    """
    if importlib.util.find_spec("megatron.core.datasets.helpers_cpp") is None:
        return
    replace("megatron.core.datasets.utils:compile_helpers", lambda: None)
