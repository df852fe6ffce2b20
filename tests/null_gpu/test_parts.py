"""Parts of Trinity Large on a device that computes nothing: launches, memory and roundings."""

import json
import subprocess
import sys
from typing import Any

import pytest

from tests.functional_tests.launch import ROOT

pytestmark = [pytest.mark.null_gpu, pytest.mark.slow]


@pytest.fixture(scope="module")
def parts(variables: dict[str, str]) -> dict[str, Any]:
    """What ``parts.py`` has counted, by part."""
    command = [sys.executable, "-m", "tests.null_gpu.parts"]
    done = subprocess.run(
        command, env=variables, cwd=ROOT, capture_output=True, text=True, timeout=600
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return json.loads(done.stdout.splitlines()[-1])


@pytest.mark.parametrize("kind", ["plain", "logged"])
def test_loss_reads_the_logits_once_in_each_direction(parts: dict[str, Any], kind: str) -> None:
    """8192 tokens, 200,192 columns: each pass over the logits is one kernel."""
    part = parts[f"{kind} loss"]
    counts, kernels = part["counts"], part["kernels"]
    work = sum(counts[name] for name in ("launches", "copies_on_device", "memsets"))
    # Three products of the output layer are among them.
    assert counts["library_calls"] == 3, kernels
    assert work + counts["library_calls"] <= 30, kernels
    assert kernels["triton:_reduce_kernel"] == kernels["triton:_gradient_kernel"] == 1
    assert kernels.get("triton:_summary_kernel", 0) == (kind == "logged")
    assert counts["stream_syncs"] == counts["device_syncs"] == counts["copies_to_device"] == 0
    # A few values for each token; logits are 3.3 GB.
    assert part["beside"] <= 2 << 20


@pytest.mark.parametrize(
    ("name", "num_rows", "num_launches"),
    [("hidden states", 8192, 3), ("queries", 48 * 8192, 5), ("keys", 8 * 8192, 7)],
)
def test_norms_keep_nothing_wide_and_round_once(
    parts: dict[str, Any], name: str, num_rows: int, num_launches: int
) -> None:
    part = parts[f"norm of {name}"]
    counts, kernels = part["counts"], part["kernels"]
    work = sum(counts[key] for key in ("launches", "copies_on_device", "memsets"))
    # Those of the view of the keys fill the gradient of the whole.
    assert work <= num_launches, kernels
    # A number for each row.
    assert part["kept"] <= 4 * num_rows + 4096
    # torch's kernel of two steps (blocks of 32 x 1 threads) would round partial sums to bf16.
    assert not [name for name in kernels if "KernelTemplateIN3c108BFloat16EfLj32ELj1E" in name]


def test_weight_gradients_are_added_by_their_product(parts: dict[str, Any]) -> None:
    """One call of the library, nothing copied, and no memory for a gradient in between."""
    part = parts["weight gradient"]
    counts = part["counts"]
    work = sum(counts[key] for key in ("launches", "copies_on_device", "memsets"))
    assert counts["library_calls"] == 1 and work == 0, part["kernels"]
    assert part["made"] == 0
