"""The Triton kernels of symmetric products: interpreted on a CPU, compiled, and on a GPU."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import Tensor

from tests.functional_tests.launch import TAKES_ALL

pytest.importorskip("triton", reason="torch has no Triton on this platform")

ROOT = Path(__file__).resolve().parents[3]
# Sizes on and off the blocks of the small tilings, one row, one column; batch 1, 3 and 2 x 2.
SHAPES = [(33, 70), (1, 32, 32), (3, 17, 5), (2, 2, 20, 33), (1, 1), (3, 1, 50)]
UNIT = {torch.float32: 2**-24, torch.bfloat16: 2**-8}


def random(*shape: int, dtype: torch.dtype, device: str) -> Tensor:
    return torch.randn(*shape, generator=torch.manual_seed(0)).to(device, dtype)


def check_products(device: str, dtype: torch.dtype, shape: tuple[int, ...]) -> None:
    """Both kernels against float64, exact symmetry, views; small and odd tilings."""
    from trinity_megatron.optimizer.syrk import Tiling, symmetric_product, symmetric_square

    tiling = Tiling(16, 32, 4, 2) if device == "cpu" else None
    wide = random(*shape, dtype=dtype, device=device)
    views = [wide, wide.mT, torch.cat([wide, wide], -1)[..., ::2]]
    if wide.dim() == 3:
        views.append(wide.transpose(0, 1))
    for x in views:
        before = x.clone()
        gram = symmetric_product(x, tiling=tiling)
        square = symmetric_square(gram, alpha=2.0315, beta=-4.775, tiling=tiling)
        for result, expected, terms in (
            (gram, x.double() @ x.double().mT, x.double().abs() @ x.double().abs().mT),
            (
                square,
                2.0315 * gram.double() @ gram.double() - 4.775 * gram.double(),
                2.0315 * gram.double().abs() @ gram.double().abs() + 4.775 * gram.double().abs(),
            ),
        ):
            assert result.dtype == dtype and result.is_contiguous()
            assert torch.equal(result, result.mT)
            # The interpreter rounds to bfloat16 towards zero: a whole unit.  The sums themselves
            # are of float32: at most as many roundings as there are terms.
            bound = UNIT[dtype] * expected.abs() + 2**-24 * (x.shape[-1] + 60) * terms
            assert ((result.double() - expected).abs() <= 2 * bound).all()
        assert torch.equal(x, before)


def check_orthogonalize(device: str, shape: tuple[int, ...]) -> None:
    from trinity_megatron.optimizer.newton_schulz import orthogonalize

    matrices = random(*shape, dtype=torch.float32, device=device)
    matrices[0] = 0.0
    matrices[1, 0, 0] = float("nan")
    results = [orthogonalize(matrices, dtype=torch.bfloat16, syrk=syrk) for syrk in (True, False)]
    exact = orthogonalize(matrices.double()).float()
    for result in results:
        assert result.shape == matrices.shape and result[0].count_nonzero() == 0
        assert result[1].isnan().all()
        # The error of bfloat16, see docs/muon.md; not larger than without the kernels.
        assert torch.linalg.matrix_norm(result[2:].float() - exact[2:], 2).max() < 0.1


def check_refusals(device: str) -> None:
    from trinity_megatron.optimizer.syrk import symmetric_product, symmetric_square

    for call, message in (
        (lambda: symmetric_product(torch.ones(3, device=device)), "not a batch of matrices"),
        (lambda: symmetric_product(torch.ones(3, 3, device=device).double()), "take bfloat16 or"),
        (lambda: symmetric_square(torch.ones(2, 3), alpha=1.0, beta=1.0), "is square"),
    ):
        with pytest.raises(ValueError, match=message):
            call()
    assert symmetric_product(torch.ones(0, 3, 4, device=device)).shape == (0, 3, 3)
    assert symmetric_product(torch.ones(3, 0, device=device)).count_nonzero() == 0


def check_in_interpreter() -> None:
    """Everything above on the CPU; run by the test below in a process of its own."""
    for dtype in (torch.float32, torch.bfloat16):
        for shape in SHAPES if TAKES_ALL else SHAPES[2:5]:
            check_products("cpu", dtype, shape)
    for shape in ((4, 20, 36), (4, 36, 20), (4, 33, 33)) if TAKES_ALL else ((4, 20, 36),):
        check_orthogonalize("cpu", shape)
    check_refusals("cpu")


@pytest.mark.slow
def test_kernels_in_the_interpreter() -> None:
    """In a process of its own: Triton looks at TRITON_INTERPRET when it is imported."""
    code = (
        "import runpy; "
        f"runpy.run_path({__file__!r}, run_name='interpreter')['check_in_interpreter']()"
    )
    environment = {**os.environ, "TRITON_INTERPRET": "1", "PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-c", code]
    result = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr[-4000:]


def test_newton_schulz_is_imported_without_triton() -> None:
    code = (
        "import sys; sys.modules['triton'] = None; import torch; "
        "from trinity_megatron.optimizer.newton_schulz import orthogonalize; "
        "assert orthogonalize(torch.eye(3), dtype=torch.bfloat16).isfinite().all()"
    )
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-c", code]
    result = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr[-4000:]


def test_kernel_compiles_for_an_a100(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Tensor cores are used, and shared memory suffices; newer ones: null_gpu/test_kernels.py."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    from trinity_megatron.optimizer.syrk import TILINGS, _syrk_kernel

    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    tiling = TILINGS[torch.bfloat16][0]
    names = _syrk_kernel.arg_names
    constants = {
        "HAS_ADDEND": True,
        "ROWS": tiling.rows,
        "DEPTH": tiling.depth,
        "INTERPRETED": False,
        "stride_xk": 1,  # as the launcher specializes contiguous matrices
        "stride_cn": 1,
    }
    types = {name: "*bf16" for name in ("x", "addend", "out")} | {"alpha": "fp32", "beta": "fp32"}
    signature = {n: "constexpr" if n in constants else types.get(n, "i32") for n in names}
    aligned = [n for n in names if signature[n] in ("*bf16", "i32")]
    attributes = {(names.index(n),): [["tt.divisibility", 16]] for n in aligned}
    source = ASTSource(_syrk_kernel, signature, constants, attributes)
    options = {"num_warps": tiling.num_warps, "num_stages": tiling.num_stages}
    kernel = triton.compile(source, target=GPUTarget("cuda", 80, 32), options=options)
    assert "mma.sync" in kernel.asm["ptx"]
    assert kernel.metadata.shared <= 160 * 1024  # of an A100


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_kernels_on_a_gpu(dtype: torch.dtype) -> None:
    for shape in [*SHAPES, (3, 300, 200), (2, 256, 1024)]:
        check_products("cuda", dtype, shape)
    check_refusals("cuda")


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_orthogonalize_with_the_kernels_on_a_gpu() -> None:
    for shape in ((4, 200, 300), (4, 300, 200), (4, 257, 257)):
        check_orthogonalize("cuda", shape)
