"""A Hugging Face folder of anybody: it is read as numbers, from its own files, or refused."""

import json
import pickle
import struct
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from trinity_megatron.checkpoint.hf_weights import HFWeights, read_header
from trinity_megatron.errors import UserError
from trinity_megatron.model.hf_config import read_hf_config

ENTRY = '{"dtype": "F32", "shape": [4], "data_offsets": [0, 16]}'


def header(text: str, length: int | None = None) -> bytes:
    content = text.encode()
    return struct.pack("<Q", len(content) if length is None else length) + content + bytes(16)


HOSTILE = {
    "a length beyond the file": header("{}", 2**63),
    "a length of all": header("{}", 2**64 - 1),
    "nested": header("[" * 100_000),
    "nested metadata": header('{"__metadata__": ' + '{"a":' * 5000),
    "offsets beyond the file": header('{"w": ' + ENTRY.replace("16", "1600") + "}"),
    "negative offsets": header('{"w": ' + ENTRY.replace("[0,", "[-16,") + "}"),
    "two on one place": header('{"w": ' + ENTRY + ', "v": ' + ENTRY + "}"),
    "a shape of another size": header('{"w": ' + ENTRY.replace("[4]", "[400]") + "}"),
    "a shape that overflows": header(
        '{"w": ' + ENTRY.replace("[4]", "[4294967296, 4294967296, 4294967296]") + "}"
    ),
    "no dtype": header('{"w": ' + ENTRY.replace("F32", "PICKLE") + "}"),
    "a pickle": pickle.dumps({"w": 1}),
    "nothing": b"",
}


@pytest.mark.parametrize("name", HOSTILE)
def test_hostile_header(tmp_path: Path, name: str) -> None:
    path = tmp_path / "model.safetensors"
    path.write_bytes(HOSTILE[name])
    with pytest.raises(UserError, match=r"model\.safetensors is truncated or damaged"):
        read_header(path)
    with pytest.raises(UserError):
        HFWeights(tmp_path)


@pytest.mark.parametrize("file", ["../x.safetensors", "/x.safetensors", "a/../../x.safetensors"])
def test_an_index_that_leads_out(tmp_path: Path, file: str) -> None:
    folder = tmp_path / "model"
    folder.mkdir()
    save_file({"w": torch.zeros(4)}, tmp_path / "x.safetensors")
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {"w": file}}))
    with pytest.raises(UserError, match="is not the plain name of a .safetensors file"):
        HFWeights(folder)


@pytest.mark.parametrize(
    "text", ["[" * 100_000, '{"weight_map": [1]}', '{"weight_map": {"w": {}}}']
)
def test_a_hostile_index(tmp_path: Path, text: str) -> None:
    (tmp_path / "model.safetensors.index.json").write_text(text)
    with pytest.raises(UserError, match=r"index\.json (is damaged|names the weight file)"):
        HFWeights(tmp_path)


def test_pickled_weights_are_not_read(tmp_path: Path) -> None:
    (tmp_path / "pytorch_model.bin").write_bytes(b"\x80\x04cposix\nsystem\n.")
    with pytest.raises(UserError, match="holds PyTorch's pickled weights"):
        HFWeights(tmp_path)


@pytest.mark.parametrize("text", ["[" * 100_000, '{"a":' * 100_000, "[]", "", "\x00"])
def test_a_hostile_config(tmp_path: Path, text: str) -> None:
    (tmp_path / "config.json").write_text(text)
    with pytest.raises(UserError, match=r"config\.json is not valid JSON"):
        read_hf_config(tmp_path)


@pytest.mark.parametrize("word", ["²", "٣" * 40, "9" * 5000, "9" * 300, "../x", "-1", "\x00"])
def test_a_tracker_that_names_no_step(tmp_path: Path, word: str) -> None:
    from trinity_megatron.checkpoint.torch_dist.tracker import TRACKER_NAME, find_checkpoint
    from trinity_megatron.training.resume import mend_tracker

    (tmp_path / TRACKER_NAME).write_text(word)
    for read in (find_checkpoint, mend_tracker):
        with pytest.raises(UserError, match=f"{TRACKER_NAME} says"):
            read(tmp_path)
