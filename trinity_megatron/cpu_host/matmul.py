"""Choice of the library for matrix products on a CPU, and the multiple of rows it prefers.

PyTorch's builds for x86 hand them to Intel's MKL, which takes its AVX2 kernels on every CPU that is
not Intel's: half of what an AMD CPU with AVX-512 can do, or less.  oneDNN, in the same builds,
takes AVX-512 on both, and PyTorch hands it fp32 products where products in bf16 are *allowed*.
oneDNN makes no use of that permission but where the CPU has AMX, which AMD's have not; as this
would round silently, exactness is tried before the choice stands.

oneDNN compiles a kernel for every shape it has not met lately.  That takes twice as long as the
products of an expert of the tiny preset, whose rows are never as many as before; so the rows of
experts are filled up to one of few numbers (:func:`row_multiple`).
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from typing import Any

import torch

_CPU_INFO = Path("/proc/cpuinfo")
# Products as small and as large as those of training: oneDNN chooses its kernel by the shape.
_TRIED_SIZES = (32, 256, 512)
_ROW_MULTIPLE = 32


def choose_fp32_matmul() -> bool:
    """Let oneDNN multiply fp32 matrices where it is faster and as exact.

    Idempotent; changes nothing elsewhere, and nothing of bf16 products.

    Returns:
        Whether oneDNN multiplies them now.
    """
    cpu_info = _CPU_INFO.read_text() if _CPU_INFO.is_file() else ""
    capability = torch.backends.cpu.get_cpu_capability()
    if not torch.backends.mkldnn.is_available() or not is_slow_in_mkl(cpu_info, capability):
        return False
    # Not torch.backends.mkldnn.matmul: get_float32_matmul_precision, which torch.compile asks,
    # raises an error where that was set.
    before, is_exact = torch.get_float32_matmul_precision(), False
    torch.set_float32_matmul_precision("medium")
    try:
        # A pool of threads would not be there in a process that is forked later: none is started.
        with one_thread():
            is_exact = multiplies_exactly()
    finally:
        if not is_exact:
            torch.set_float32_matmul_precision(before)
    return is_exact


@contextmanager
def one_thread() -> Iterator[None]:
    """Have torch compute on the calling thread alone, and after it on as many as before."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


def is_slow_in_mkl(cpu_info: str, capability: str) -> bool:
    """Whether MKL leaves vector units of a CPU unused.

    Args:
        cpu_info: Content of ``/proc/cpuinfo``; empty where there is none.
        capability: ``torch.backends.cpu.get_cpu_capability()``.
    """
    return "AuthenticAMD" in cpu_info and capability == "AVX512"


def multiplies_exactly(
    multiply: Callable[[torch.Tensor, torch.Tensor], torch.Tensor] = torch.matmul,
) -> bool:
    """Whether products of fp32 matrices keep all 24 bits of a factor.

    Each element of a product with the identity is one factor times 1, so it must come out as it is.

    Args:
        multiply: Product of ``[..., m, k]`` and ``[..., k, n]``.
    """
    last_bit = 1 + torch.finfo(torch.float32).eps
    kind: dict[str, Any] = {"dtype": torch.float32, "device": "cpu"}
    for size in _TRIED_SIZES:
        factor, identity = torch.full((size, size), last_bit, **kind), torch.eye(size, **kind)
        stacks = factor.expand(2, size, size), identity.expand(2, size, size)
        for left, right in ((factor, identity), (identity, factor), stacks):
            if not (multiply(left, right) == last_bit).all():
                return False
    return True


def row_multiple(matrix: torch.Tensor, mean_rows: int) -> int:
    """Of what the rows of each expert are to be a multiple.

    Args:
        matrix: Has the device and the dtype of the rows.
        mean_rows: Rows of an expert, on average.

    Returns:
        1 where it does not matter: on a GPU, where MKL multiplies, and where the rows are so few
        that filling them up would cost more than a sixteenth of the work.
    """
    if matrix.device.type != "cpu" or mean_rows < 8 * _ROW_MULTIPLE:
        return 1
    if matrix.dtype == torch.float32:
        in_onednn = torch.get_float32_matmul_precision() == "medium"
    else:
        in_onednn = matrix.dtype == torch.bfloat16 and _multiplies_bf16()
    return _ROW_MULTIPLE if in_onednn else 1


@cache
def _multiplies_bf16() -> bool:
    return torch.backends.mkldnn.is_available() and torch.ops.mkldnn._is_mkldnn_bf16_supported()
