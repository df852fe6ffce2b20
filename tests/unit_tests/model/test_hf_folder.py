"""What a user names instead of a Hugging Face checkpoint to train on."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from tests.reference.hf_random import random_config, random_model
from trinity_megatron.checkpoint.hf_weights import HFWeights
from trinity_megatron.model.hf_config import read_hf_config, refuse_other_models
from trinity_megatron.model.hf_folder import refuse_quantised_weights


def put(*names: str) -> Callable[[Path], None]:
    """Write empty JSON objects."""

    def make(folder: Path) -> None:
        for name in names:
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            (folder / name).write_text("{}")

    return make


def put_adapter(folder: Path) -> None:
    fields = {"base_model_name_or_path": "arcee-ai/Trinity-Nano-Base"}
    (folder / "adapter_config.json").write_text(json.dumps(fields))


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (put(), "has no config.json"),
        (put("model-Q4_K_M.gguf"), "GGUF"),
        (put_adapter, "into arcee-ai/Trinity-Nano-Base"),
        (put("adapter_config.json"), "into its base model"),
        (put("latest_checkpointed_iteration.txt"), "--from-megatron"),
        (put(".metadata"), "--from-megatron"),
        (put("nano/config.json"), "nano."),
        (put("snapshots/0a1b/config.json"), "snapshots/0a1b"),
        (put("pytorch_model.bin"), "save_pretrained"),
        (put("consolidated.00.pth"), "save_pretrained"),
        (put("tf_model.h5"), "another framework"),
    ],
)
def test_folders_without_a_config(make: Callable[[Path], None], words: str, tmp_path: Path) -> None:
    make(tmp_path)
    with pytest.raises(ValueError) as error:
        read_hf_config(tmp_path)
    message = str(error.value)
    assert words in message and "Remedy: " in message and "\n" not in message


@pytest.mark.parametrize("weights", ["pytorch_model.bin", "x.gguf", "tf_model.h5", "notes.txt"])
def test_folders_without_safetensors(weights: str, tmp_path: Path) -> None:
    put("config.json", weights)(tmp_path)
    with pytest.raises(ValueError, match="Remedy: ") as error:
        HFWeights(tmp_path)
    assert "\n" not in str(error.value)


def test_what_is_no_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    Path("model.gguf").write_text("")
    Path("model.safetensors").write_text("")
    Path("link").symlink_to("nowhere")
    for name, words in (
        ("arcee-ai/Trinity-Nano-Base", "hf download arcee-ai/Trinity-Nano-Base"),
        ("/here/is/nothing", "does not exist"),
        ("model.gguf", "GGUF"),
        ("model.safetensors", "is a file"),
        ("link", "link to nowhere"),
    ):
        with pytest.raises(ValueError, match="Remedy: ") as error:
            read_hf_config(Path(name))
        assert words in str(error.value)


@pytest.mark.parametrize(
    ("fields", "method"),
    [
        ({"quantization_config": {"quant_method": "fp8", "weight_block_size": [128, 128]}}, "fp8"),
        ({"quantization_config": {"quant_method": "compressed-tensors"}}, "compressed-tensors"),
        ({"quantization_config": {"quant_method": "gptq", "bits": 4}}, "gptq"),
        ({"quantization_config": {"quant_method": "mxfp4"}}, "mxfp4"),
        ({"quantization_config": {"quant_algo": "NVFP4"}}, "NVFP4"),
        ({"quantization_config": "awq"}, "awq"),
        ({"compression_config": {"format": "pack-quantized"}}, "pack-quantized"),
    ],
)
def test_quantised_configs(fields: dict, method: str) -> None:
    with pytest.raises(ValueError, match="bf16 release") as error:
        refuse_other_models({"model_type": "afmoe", **fields})
    assert method in str(error.value) and "\n" not in str(error.value)


@pytest.mark.parametrize("nothing", [None, {}])
def test_configs_that_are_not_quantised(nothing: object) -> None:
    refuse_other_models({"model_type": "afmoe", "quantization_config": nothing})


GATE = "model.layers.1.mlp.experts.0.gate_proj"


@pytest.mark.parametrize(
    ("name", "dtype"),
    [
        (f"{GATE}.weight", "F8_E4M3"),
        (f"{GATE}.weight", "F8_E5M2"),
        (f"{GATE}.weight", "I8"),
        (f"{GATE}.weight", "U8"),
        (f"{GATE}.weight_packed", "I32"),
        (f"{GATE}.qweight", "I32"),
        (f"{GATE}.scales", "F16"),
        (f"{GATE}.weight_scale", "BF16"),
        (f"{GATE}.weight_scale_inv", "F32"),
        (f"{GATE}.weight_scale_2", "F32"),
        (f"{GATE}.input_scale", "F32"),
        (f"{GATE}.weight.absmax", "F32"),
        (f"{GATE}.weight.quant_state.bitsandbytes__nf4", "U8"),
        ("model.layers.1.mlp.experts.gate_up_proj_blocks", "U8"),
        ("model.layers.1.mlp.experts.gate_up_proj_scales", "BF16"),
    ],
)
def test_quantised_weights(name: str, dtype: str, tmp_path: Path) -> None:
    header = json.dumps({"__metadata__": {}, name: {"dtype": dtype, "shape": [2]}})
    with pytest.raises(ValueError, match="bf16 release") as error:
        refuse_quantised_weights(tmp_path, [header])
    assert name in str(error.value) and "\n" not in str(error.value)


@pytest.fixture(scope="module")
def released(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("released") / "hf"
    random_model(random_config(2), 2).save_pretrained(folder)
    return folder


def test_every_tensor_of_a_trinity_model_passes(released: Path) -> None:
    weights = HFWeights(released)
    assert any(name.endswith("expert_bias") for name in weights.tensors)


def test_one_quantised_tensor_is_enough(released: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(released, tmp_path / "hf")
    tensors = load_file(folder / "model.safetensors")
    tensors["lm_head.weight"] = tensors["lm_head.weight"].to(torch.float8_e4m3fn)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ValueError, match=r"lm_head.weight \(F8_E4M3\)"):
        HFWeights(folder)
