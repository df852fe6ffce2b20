"""The loss of Trinity Large on a device that computes nothing: launches and memory."""

import json
import subprocess
import sys

import pytest

from tests.functional_tests.launch import ROOT

pytestmark = [pytest.mark.null_gpu, pytest.mark.slow]


def test_launches_and_memory_of_the_loss(variables: dict[str, str]) -> None:
    """8192 tokens, 200,192 columns: each pass over the logits is one kernel."""
    command = [sys.executable, "-m", "tests.null_gpu.loss"]
    done = subprocess.run(
        command, env=variables, cwd=ROOT, capture_output=True, text=True, timeout=600
    )
    assert done.returncode == 0, done.stdout + done.stderr
    results = json.loads(done.stdout.splitlines()[-1])
    for kind, step in results.items():
        counts, kernels = step["counts"], step["kernels"]
        work = sum(counts[name] for name in ("launches", "copies_on_device", "memsets"))
        # Three products of the output layer are among them.
        assert counts["library_calls"] == 3, kernels
        assert work + counts["library_calls"] <= 30, kernels
        assert kernels["triton:_reduce_kernel"] == kernels["triton:_gradient_kernel"] == 1
        assert kernels.get("triton:_summary_kernel", 0) == (kind == "logged")
        assert counts["stream_syncs"] == counts["device_syncs"] == counts["copies_to_device"] == 0
        # A few values for each token; logits are 3.3 GB.
        assert step["beside"] <= 2 << 20
