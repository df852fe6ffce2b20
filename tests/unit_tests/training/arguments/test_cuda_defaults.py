"""The defaults on a CUDA host: nothing that is optional is taken for granted."""

import importlib.util
import subprocess
import sys
from pathlib import Path

import pytest

from tests.functional_tests.launch import only_in_all

# In a process of its own: the host is chosen once, when torch says whether there is a GPU.
SCRIPT = """
import sys
import torch

torch.cuda.is_available = lambda: True
from trinity_megatron.cpu_host.cuda_stand_ins import enter_host

assert not enter_host()
from trinity_megatron.training.arguments.parser import add_trinity_args
from trinity_megatron.training.arguments.trinity_config import trinity_config_from_args
from megatron.training.arguments import parse_args

args = parse_args(extra_args_provider=add_trinity_args)
args.params_dtype, args.padded_vocab_size = torch.bfloat16, 512
config = trinity_config_from_args(args)
print("rope", config.apply_rope_fusion, "gradients", config.gradient_accumulation_fusion)
print("permutation", config.moe_permute_fusion)
print("layers", config.transformer_impl, "persist", config.persist_layer_norm)
"""
OPTIONAL = ("transformer_engine", "apex")


@pytest.mark.skipif(
    any(importlib.util.find_spec(name) for name in OPTIONAL), reason="an optional package is there"
)
@pytest.mark.parametrize(
    "preset",
    [
        "tiny",
        "large",
        pytest.param("nano", marks=only_in_all),
        pytest.param("mini", marks=only_in_all),
    ],
)
def test_presets_need_no_optional_package_on_a_gpu(preset: str, tmp_path: Path) -> None:
    command = [sys.executable, "-c", SCRIPT, "--preset", preset, "--out", str(tmp_path / "run")]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr[-2000:]
    assert (
        "rope False gradients True\npermutation False\nlayers local persist False\n" in done.stdout
    )
