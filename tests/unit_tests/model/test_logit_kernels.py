"""The Triton kernels of the loss: the tests of the loss once more, in Triton's interpreter."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.functional_tests.launch import TAKES_ALL

pytest.importorskip("triton", reason="torch has no Triton on this platform")

HERE = Path(__file__).parent
ROOT = HERE.parents[2]
FILES = ("test_cross_entropy.py", "test_lm_head_loss.py")
if TAKES_ALL:
    FILES += ("test_cross_entropy_ranks.py",)


@pytest.mark.slow
@pytest.mark.distributed
def test_kernels_in_the_interpreter() -> None:
    """In a process of its own: Triton looks at TRITON_INTERPRET when it is imported.

    Values, gradients and statistics against float64, fp32 and bf16; in test-all two ranks too.
    """
    environment = {**os.environ, "TRITON_INTERPRET": "1", "PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider"]
    result = subprocess.run(
        [*command, *(str(HERE / name) for name in FILES)],
        env={**environment, "OMP_NUM_THREADS": "1"},
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=600,
    )
    assert result.returncode == 0, result.stdout[-4000:] + result.stderr[-2000:]
