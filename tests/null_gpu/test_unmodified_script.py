"""Megatron's own ``pretrain_gpt.py``, started directly, with nothing of ours but the spec."""

import re
import sys
from pathlib import Path

import pytest

from tests.functional_tests.launch import ROOT
from tests.functional_tests.megatron_script import (
    PLAIN_GPU,
    SCRIPT,
    flags,
    patched_copy,
    run,
)

pytestmark = [pytest.mark.null_gpu, pytest.mark.slow]


def test_it_trains_with_the_patch_alone(
    variables: dict[str, str], data: Path, tmp_path: Path
) -> None:
    path = f"{patched_copy(tmp_path)}:{ROOT}"
    rank = {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1", "LOCAL_WORLD_SIZE": "1"}
    rank |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "0", "CUDA_DEVICE_MAX_CONNECTIONS": "1"}
    command = [sys.executable, str(SCRIPT), *flags(data, tmp_path), *PLAIN_GPU]
    output = run(
        [*command, "--train-iters", "3"],
        # Nothing is compiled: that is others' test, and takes a minute.
        {**variables, **rank, "PYTHONPATH": path, "TORCHDYNAMO_DISABLE": "1"},
    )
    # The device computes nothing, and Megatron prints no loss of no tokens.
    assert re.findall(r"iteration +(\d)/ +3 ", output) == ["1", "2", "3"]
    assert "make:" not in output
