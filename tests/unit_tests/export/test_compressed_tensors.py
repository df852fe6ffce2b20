"""The layout and the config of a block FP8 export against compressed-tensors' own code.

Runs where ``compressed-tensors`` is installed; it is not a requirement.
"""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AfmoeForCausalLM

from tests.reference.hf_random import read_tensors
from tests.unit_tests.export.export_cases import make_run
from trinity_megatron.checkpoint.convert import export_hf, open_run
from trinity_megatron.export.fp8_encoding import Fp8BlockEncoding

pytest.importorskip("compressed_tensors", reason="compressed-tensors is not installed")


class Expert(torch.nn.Module):
    """A routed expert as the hub stores it, with linear layers of its own."""

    def __init__(self, gate_up: torch.Tensor, down: torch.Tensor) -> None:
        super().__init__()
        for name, weight in zip(("gate", "up", "down"), (*gate_up.chunk(2), down), strict=True):
            linear = torch.nn.Linear(weight.shape[1], weight.shape[0], bias=False, device="meta")
            linear.weight = torch.nn.Parameter(weight.clone())
            setattr(self, f"{name}_proj", linear)


def load_with_linear_experts(folder: Path) -> Any:
    model = AfmoeForCausalLM.from_pretrained(folder, dtype=torch.bfloat16)
    for layer in model.model.layers:
        if hasattr(layer.mlp, "experts"):
            stacked = layer.mlp.experts
            pairs = zip(stacked.gate_up_proj, stacked.down_proj, strict=True)
            layer.mlp.experts = torch.nn.ModuleList(Expert(*pair) for pair in pairs)
    return model


def quantise(model: Any, folder: Path) -> dict[str, torch.Tensor]:
    """What compressed-tensors makes of a model; writes its fields into ``config.json``."""
    from compressed_tensors.compressors import ModelCompressor
    from compressed_tensors.quantization import (
        QuantizationConfig,
        apply_quantization_config,
        preset_name_to_scheme,
    )
    from compressed_tensors.quantization.utils import calculate_qparams

    scheme = preset_name_to_scheme("FP8_BLOCK", ["Linear"])
    ignore = ["lm_head", r"re:.*\.router$", r"re:.*\.router\.gate$"]
    apply_quantization_config(
        model, QuantizationConfig(config_groups={"group_0": scheme}, ignore=ignore)
    )
    for module in model.modules():
        if getattr(module, "quantization_scheme", None) is not None:
            weight = module.weight.data
            rows, columns = (-size % 128 for size in weight.shape)
            padded = torch.nn.functional.pad(weight, (0, columns, 0, rows))
            blocks = padded.unflatten(1, (-1, 128)).unflatten(0, (-1, 128))
            low, high = blocks.amin((1, 3)), blocks.amax((1, 3))
            module.weight_scale.data, _ = calculate_qparams(low, high, scheme.weights)
    compressor = ModelCompressor.from_pretrained_model(model)
    compressor.compress_model(model)
    folder.mkdir()
    compressor.update_config(str(folder))
    return model.state_dict()


@pytest.mark.parametrize("sizes", [{}, {"hidden_size": 256, "moe_intermediate_size": 128}])
def test_same_fields_scales_and_numbers(sizes: dict[str, int], tmp_path: Path) -> None:
    run = make_run(tmp_path, **sizes)
    export_hf(open_run(run), tmp_path / "fp8", encoding=Fp8BlockEncoding())
    found = read_tensors(tmp_path / "fp8")
    expected = quantise(load_with_linear_experts(tmp_path / "hf"), tmp_path / "theirs")
    assert found.keys() == expected.keys()
    for name, values in expected.items():
        ours = found[name]
        if name.endswith("expert_bias"):
            continue  # rounded to bf16 where transformers loads it
        assert ours.dtype == values.dtype and ours.shape == values.shape, name
        if ours.dtype != torch.float8_e4m3fn:
            assert torch.equal(ours, values), name
            continue
        # On a CPU they divide in bf16 and so round twice; their kernel and ours divide in fp32.
        # One quotient in 16 of bf16 lies half-way between two numbers of E4M3.
        steps = ours.view(torch.uint8).int() - values.view(torch.uint8).int()
        assert steps.abs().max() <= 1 and (steps != 0).double().mean() < 1 / 16, name
    config = json.loads((tmp_path / "fp8" / "config.json").read_text())["quantization_config"]
    theirs = json.loads((tmp_path / "theirs" / "config.json").read_text())["quantization_config"]
    assert config == theirs
