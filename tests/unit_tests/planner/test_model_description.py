"""Models as the planner describes them, against their published sizes."""

import json
from pathlib import Path

import pytest

from trinity_megatron.errors import UserError
from trinity_megatron.planner import published
from trinity_megatron.planner.model_description import (
    ModelDescription,
    describe_hf_config,
    describe_model,
)
from trinity_megatron.planner.model_flops import flops_per_token
from trinity_megatron.planner.shapes import stage_shapes

CONFIGS = json.loads(Path(published.__file__).with_name("published.json").read_text())["models"]
# Without the sinks of gpt-oss and the biases that routers keep.
PARAMETERS = {
    "Qwen3-30B-A3B": 30_532_122_624,
    "Qwen3-235B-A22B": 235_093_634_560,
    "Mixtral-8x22B": 140_620_634_112,
    "gpt-oss-120B": 116_829_156_672 - 36 * 64,
    "large": 398_635_286_016,
}


def describe(name: str) -> ModelDescription:
    return describe_hf_config(CONFIGS[name], name) if name in CONFIGS else describe_model(name)


@pytest.mark.parametrize("name", PARAMETERS)
def test_parameters_are_the_published_ones(name: str) -> None:
    model = describe(name)
    shapes = stage_shapes(model, model.vocab_size, range(model.num_layers), True, True, 1)
    buffers = model.num_moe_layers * model.num_moe_experts if model.is_trinity else 0
    assert sum(shape.numel for shape in shapes) + buffers == PARAMETERS[name]


def test_flops_are_those_of_the_published_pages() -> None:
    """Megatron-Bridge's pages: TFLOP/s over tokens/s, GFLOP a token; Large by our own counter."""
    for name, length, gflop in (
        ("Qwen3-235B-A22B", 4096, 148.0),
        ("Qwen3-30B-A3B", 4096, 23.0),
        ("gpt-oss-120B", 4096, 32.6),
        ("large", 8192, 91.3),
    ):
        assert flops_per_token(describe(name), length) / 1e9 == pytest.approx(gflop, rel=0.005)


def test_windows_alternate() -> None:
    assert [describe("gpt-oss-120B").window_of(layer) for layer in range(4)] == [128, None] * 2
    assert [describe("large").window_of(layer) for layer in range(4)] == [4096, 4096, 4096, None]
    assert describe("Qwen3-30B-A3B").window_of(0) is None


def test_file_and_folder_are_the_same_model(tmp_path: Path) -> None:
    path = tmp_path / "config.json"
    path.write_text(json.dumps(CONFIGS["Qwen3-30B-A3B"]))
    assert describe_model(str(path)).num_moe_experts == 128
    assert describe_model(str(tmp_path)).num_layers == 48


def test_config_of_a_released_checkpoint_is_the_preset(tmp_path: Path) -> None:
    from trinity_megatron.model.hf_config import hf_config_from_trinity
    from trinity_megatron.model.presets import trinity_preset

    hf = hf_config_from_trinity(trinity_preset("nano"))
    (tmp_path / "config.json").write_text(json.dumps(hf))
    read = describe_model(str(tmp_path))
    preset = describe_model("nano")
    differing = {name for name, value in vars(preset).items() if getattr(read, name) != value}
    assert differing == {"name", "training"}


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("{", "not valid JSON"),
        ("[]", "no JSON object"),
        ('{"model_type": "llama"}', "'llama' is not known"),
        ('{"model_type": "qwen3_moe"}', "is missing"),
    ],
)
def test_wrong_files_are_refused(content: str, message: str, tmp_path: Path) -> None:
    path = tmp_path / "config.json"
    path.write_text(content)
    with pytest.raises(UserError, match=message):
        describe_model(str(path))
    with pytest.raises(UserError, match="neither a preset"):
        describe_model(str(tmp_path / "missing"))
