"""Triton's kernels, compiled for the GPUs that Trinity is trained on, as a run launches them.

Triton brings its own assembler; the null device says which GPU it is, and loads anything.
"""

import json
import re
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import pytest

from tests.functional_tests.launch import ROOT

pytestmark = [pytest.mark.null_gpu, pytest.mark.slow]

# Compute capability -> its instruction for a product on the tensor cores.
GPUS = {90: "wgmma.mma_async", 100: "tcgen05.mma", 103: "tcgen05.mma"}
ATTENTION = {
    "triton_tem_fused_flex_attention_0",
    "triton_tem_fused_flex_attention_backward_1",
}


@dataclass(frozen=True)
class Kernel:
    """What Triton has left of one compilation.

    Attributes:
        name: Of the function.
        capability: Of the GPU.
        has_product: Whether it multiplies matrices of bf16.
        ptx: The assembler's input.
        resources: What it said of the output, by name; bytes or registers.
    """

    name: str
    capability: int
    has_product: bool
    ptx: str
    resources: dict[str, int]

    @property
    def arrays(self) -> int:
        """Bytes of the arrays of a thread, filled up to words of 8."""
        sizes = re.findall(r"\.local .*\[(\d+)\];", self.ptx)
        return sum(-(-int(size) // 8) * 8 for size in sizes)

    @classmethod
    def read(cls, path: Path) -> "Kernel":
        """The kernel beside this ``.cubin``."""
        import triton

        metadata = json.loads(path.with_suffix(".json").read_text())
        command = [triton.knobs.nvidia.cuobjdump.path, "-res-usage", str(path)]
        usage = subprocess.run(command, check=True, capture_output=True, text=True).stdout
        return cls(
            path.stem,
            metadata["target"]["arch"],
            re.search(r"tt\.dot .*xbf16>", path.with_suffix(".ttir").read_text()) is not None,
            path.with_suffix(".ptx").read_text(),
            {name: int(number) for name, number in re.findall(r"(\w+):(\d+)", usage)},
        )


@pytest.fixture(scope="module")
def kernels(variables: dict[str, str], tmp_path_factory: pytest.TempPathFactory) -> list[Kernel]:
    """Everything that the run compiles, inductor's kernels included."""
    pytest.importorskip("triton", reason="torch has no Triton on this platform")
    folder = tmp_path_factory.mktemp("compiled")
    command = [sys.executable, "-m", "tests.null_gpu.kernels", *map(str, GPUS)]
    # Fresh: what inductor or Triton find compiled they do not compile.
    caches = {"TRITON_CACHE_DIR": folder / "triton", "TORCHINDUCTOR_CACHE_DIR": folder / "inductor"}
    done = subprocess.run(
        command,
        env={**variables, **{name: str(path) for name, path in caches.items()}},
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=600,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return [Kernel.read(path) for path in (folder / "triton").rglob("*.cubin")]


@pytest.mark.parametrize("capability", GPUS)
def test_every_kernel_is_compiled(kernels: list[Kernel], capability: int) -> None:
    sources = (path.read_text() for path in (ROOT / "trinity_megatron").rglob("*.py"))
    ours = {name for text in sources for name in re.findall(r"@triton\.jit\s+def (\w+)\(", text)}
    called = {"_store_statistic"}  # by another kernel
    own = [kernel for kernel in kernels if kernel.capability == capability]
    assert {kernel.name for kernel in own} >= ours - called | ATTENTION
    assert all(f".target sm_{capability}a" in kernel.ptx for kernel in own)


def test_no_kernel_spills_registers(kernels: list[Kernel]) -> None:
    """On the stack are registers that there was no room for, and arrays: those of sin and cos."""
    spilt = {
        (kernel.name, kernel.capability): kernel.resources
        for kernel in kernels
        if kernel.resources["STACK"] > kernel.arrays or kernel.resources["LOCAL"]
    }
    assert not spilt


def test_products_are_made_on_tensor_cores(kernels: list[Kernel]) -> None:
    products = [kernel for kernel in kernels if kernel.has_product]
    assert {kernel.name for kernel in products} == {"_syrk_kernel", *ATTENTION}
    for kernel in products:
        assert GPUS[kernel.capability] in kernel.ptx, (kernel.name, kernel.capability)
