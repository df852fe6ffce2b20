"""Safetensors files, block by block, against the library that writes them whole."""

import json
import random
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from itertools import product
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AfmoeForCausalLM
from transformers.core_model_loading import revert_weight_conversion

from tests.reference.hf_afmoe import hf_config
from trinity_megatron.checkpoint.hf_weights import HFWeights
from trinity_megatron.checkpoint.hf_writer import (
    HFWriter,
    build_header,
    build_index,
    split_into_files,
)
from trinity_megatron.checkpoint.param_mapping import resolve
from trinity_megatron.checkpoint.transforms import Block, Shape
from trinity_megatron.model.config import TrinityConfig
from trinity_megatron.model.presets import trinity_preset

Tensors = dict[str, torch.Tensor]
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
INDEX = "model.safetensors.index.json"


def random_tensors(seed: int, dtypes: tuple[torch.dtype, ...] = DTYPES) -> Tensors:
    """Tensors of one to three dimensions; names whose order is not that of their numbers."""
    draw, generator = random.Random(seed), torch.Generator().manual_seed(seed)
    tensors = {}
    for number in draw.sample(range(200), 23):
        # Odd sizes: tensors begin at offsets that no wider dtype could begin at.
        shape = [
            *(draw.choice([1, 3, 5, 8]) for _ in range(draw.randrange(3))),
            draw.choice([3, 5]),
        ]
        values = torch.randn(shape, generator=generator)
        tensors[f"model.layers.{number}.w\u00e9ight"] = values.to(draw.choice(dtypes))
    return tensors


def describe(tensors: Tensors) -> dict[str, tuple[torch.dtype, Shape]]:
    return {name: (tensor.dtype, tuple(tensor.shape)) for name, tensor in tensors.items()}


def blocks_of(name: str, shape: Shape, draw: random.Random) -> Iterator[Block]:
    """Whole rows, as the conversion cuts them: runs of the last axis but one."""
    *outer, last = [(size,) for size in shape] if len(shape) < 2 else [*shape[:-2], shape[-2:]]
    rows = last[0]
    for place in product(*(range(size) for size in outer)):
        at = 0
        while at < rows:
            count = draw.randint(1, rows - at)
            start = (*place, at, *(0,) * (len(last) - 1))
            size = (*(1,) * len(outer), count, *last[1:])
            yield Block(name, start, size, start, size)
            at += count


def write_in_pieces(folder: Path, headers: dict[str, str], tensors: Tensors, seed: int) -> None:
    """Write every tensor in blocks, in a random order, from two threads."""
    draw = random.Random(seed)
    blocks = [b for name, t in tensors.items() for b in blocks_of(name, tuple(t.shape), draw)]
    draw.shuffle(blocks)
    writer = HFWriter(folder, headers)
    with ThreadPoolExecutor(2) as pool:
        list(pool.map(lambda b: writer.write(b, b.hf_view(tensors[b.hf_name])), blocks))
    writer.sync(tensors)
    writer.close()


@pytest.mark.parametrize("seed", range(6))
def test_file_is_that_of_the_library(seed: int, tmp_path: Path) -> None:
    tensors = random_tensors(seed)
    (tmp_path / "ours").mkdir()
    headers = {"model.safetensors": build_header(describe(tensors))}
    write_in_pieces(tmp_path / "ours", headers, tensors, seed)
    save_file(tensors, tmp_path / "theirs", metadata={"format": "pt"})
    ours = (tmp_path / "ours" / "model.safetensors").read_bytes()
    assert ours == (tmp_path / "theirs").read_bytes()


def test_values_are_cast_to_the_file(tmp_path: Path) -> None:
    values = torch.randn(6, 4)
    header = build_header({"w": (torch.bfloat16, (6, 4))})
    write_in_pieces(tmp_path, {"w.safetensors": header}, {"w": values}, 0)
    assert torch.equal(load_file(tmp_path / "w.safetensors")["w"], values.bfloat16())


def test_a_view_of_strange_strides_is_written_as_seen(tmp_path: Path) -> None:
    values = torch.randn(4, 6).T
    header = build_header({"w": (torch.float32, (6, 4))})
    write_in_pieces(tmp_path, {"w.safetensors": header}, {"w": values}, 0)
    assert torch.equal(load_file(tmp_path / "w.safetensors")["w"], values)


def test_a_block_that_is_no_run_of_bytes_is_refused(tmp_path: Path) -> None:
    writer = HFWriter(tmp_path, {"w.safetensors": build_header({"w": (torch.float32, (6, 4))})})
    with pytest.raises(AssertionError):
        writer.write(Block("w", (0, 0), (6, 2), (0, 0), (6, 2)), torch.zeros(6, 2))
    writer.close()


def test_interrupted_files_are_taken_up_again(tmp_path: Path) -> None:
    tensors = random_tensors(0)
    headers = {"model.safetensors": build_header(describe(tensors))}
    first, second = (dict(list(tensors.items())[half::2]) for half in (0, 1))
    write_in_pieces(tmp_path, headers, first, 0)
    write_in_pieces(tmp_path, headers, second, 1)
    found = load_file(tmp_path / "model.safetensors")
    assert all(torch.equal(found[name], tensor) for name, tensor in tensors.items())


def small_config(num_dense_layers: int) -> TrinityConfig:
    return trinity_preset(
        "tiny",
        num_layers=3,
        num_dense_layers=num_dense_layers,
        hidden_size=32,
        ffn_hidden_size=48,
        num_attention_heads=4,
        kv_channels=8,
        num_moe_experts=12,
        moe_ffn_hidden_size=16,
        moe_shared_expert_intermediate_size=16,
        vocab_size=64,
    )


def save_twin(
    config: TrinityConfig, folder: Path, *, max_shard_size: str
) -> tuple[AfmoeForCausalLM, Tensors]:
    """A model that transformers has saved, and its tensors in the order it saves them in."""
    twin = AfmoeForCausalLM(hf_config(config))
    twin.to(torch.bfloat16)  # with the tensors that transformers keeps in fp32, a mixture
    for name, parameter in twin.named_parameters():
        if "norm" in name or "expert_bias" in name:
            parameter.data = parameter.data.float()
    twin.save_pretrained(folder, max_shard_size=max_shard_size)
    return twin, revert_weight_conversion(twin, twin.state_dict())


@pytest.mark.parametrize("max_shard_size", ["20KB", "1GB"])
def test_folder_is_that_of_transformers(max_shard_size: str, tmp_path: Path) -> None:
    config, folder = small_config(num_dense_layers=1), tmp_path / "theirs"
    _, tensors = save_twin(config, folder, max_shard_size=max_shard_size)
    weights = HFWeights(folder)
    expected = {name: shape for entry in resolve(config) for name, shape in entry.hf.items()}
    assert {name: info.shape for name, info in weights.tensors.items()} == expected
    names = {
        file: [n for n, i in weights.tensors.items() if i.file == file] for file in weights.headers
    }
    headers = {
        file: build_header({name: describe(tensors)[name] for name in inside})
        for file, inside in names.items()
    }
    (tmp_path / "ours").mkdir()
    write_in_pieces(tmp_path / "ours", headers, tensors, 0)
    for file in headers:
        assert (tmp_path / "ours" / file).read_bytes() == (folder / file).read_bytes()
    assert (folder / INDEX).is_file() == (len(headers) > 1)
    if (folder / INDEX).is_file():
        assert build_index(headers) == (folder / INDEX).read_text()


@pytest.mark.parametrize("max_shard_size", ["5KB", "20KB", "60KB", "1GB"])
def test_split_is_that_of_transformers(max_shard_size: str, tmp_path: Path) -> None:
    # Without experts, which lie in one storage in transformers' memory: it keeps all of a layer's
    # in one file, whatever their size.
    config = small_config(num_dense_layers=3)
    _, tensors = save_twin(config, tmp_path, max_shard_size=max_shard_size)
    ours = split_into_files(describe(tensors), max_shard_size=max_shard_size)
    theirs: dict[str, set[str]] = {}
    for name, info in HFWeights(tmp_path).tensors.items():
        theirs.setdefault(info.file, set()).add(name)
    assert {file: set(names) for file, names in ours.items()} == theirs


def save_two_files(folder: Path) -> Tensors:
    """A checkpoint of two files with an index."""
    tensors = random_tensors(1)
    halves = [dict(list(tensors.items())[half::2]) for half in (0, 1)]
    weight_map = {}
    for number, half in enumerate(halves, start=1):
        save_file(half, folder / f"model-{number}.safetensors", metadata={"format": "pt"})
        weight_map.update(dict.fromkeys(half, f"model-{number}.safetensors"))
    (folder / INDEX).write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    return tensors


@pytest.mark.parametrize("with_index", [True, False])
def test_reader_reads_every_block(with_index: bool, tmp_path: Path) -> None:
    tensors = save_two_files(tmp_path)
    if not with_index:
        (tmp_path / INDEX).unlink()
    weights, draw = HFWeights(tmp_path), random.Random(0)
    assert {name: (i.dtype, i.shape) for name, i in weights.tensors.items()} == describe(tensors)
    reader = weights.reader()
    blocks = [b for name, t in tensors.items() for b in blocks_of(name, tuple(t.shape), draw)]
    draw.shuffle(blocks)
    for block in blocks:
        assert torch.equal(reader.read(block), block.hf_view(tensors[block.hf_name]))


def test_files_that_the_index_does_not_name_are_left_alone(tmp_path: Path) -> None:
    tensors = save_two_files(tmp_path)
    save_file({"consolidated": torch.ones(1)}, tmp_path / "consolidated.safetensors")
    assert HFWeights(tmp_path).tensors.keys() == tensors.keys()


@pytest.mark.parametrize("layout", ["stacked", "one by one"])
def test_layout_of_the_experts_is_seen(layout: str, tmp_path: Path) -> None:
    twin = AfmoeForCausalLM(hf_config(small_config(1)))
    stacked = layout == "stacked"
    twin.save_pretrained(tmp_path, save_original_format=not stacked)
    assert HFWeights(tmp_path).has_stacked_experts == stacked
    entries = resolve(small_config(1), stacked_experts=stacked)
    assert HFWeights(tmp_path).tensors.keys() == {n for entry in entries for n in entry.hf}


@pytest.mark.parametrize("keep", [0, 5, 100, -1])
def test_truncated_file(keep: int, tmp_path: Path) -> None:
    save_two_files(tmp_path)
    path = tmp_path / "model-2.safetensors"
    path.write_bytes(path.read_bytes()[:keep])
    with pytest.raises(ValueError, match="model-2.safetensors is truncated or damaged"):
        HFWeights(tmp_path)


@pytest.mark.parametrize("damage", [b"\xff" * 8, b"\x07" + b"\0" * 7, b"\x10" + b"\0" * 7])
def test_damaged_header(damage: bytes, tmp_path: Path) -> None:
    save_two_files(tmp_path)
    path = tmp_path / "model-1.safetensors"
    path.write_bytes(damage + path.read_bytes()[8:])
    with pytest.raises(ValueError, match="model-1.safetensors is truncated or damaged"):
        HFWeights(tmp_path)


def test_missing_file(tmp_path: Path) -> None:
    save_two_files(tmp_path)
    (tmp_path / "model-2.safetensors").unlink()
    with pytest.raises(ValueError, match="model-2.safetensors is named in .*index.json but miss"):
        HFWeights(tmp_path)


@pytest.mark.parametrize("text", ["{", "{}", '{"metadata": {}}', "[]", '{"weight_map": []}'])
def test_damaged_index(text: str, tmp_path: Path) -> None:
    save_two_files(tmp_path)
    (tmp_path / INDEX).write_text(text)
    with pytest.raises(ValueError, match="index.json is damaged"):
        HFWeights(tmp_path)


def test_tensor_in_two_files(tmp_path: Path) -> None:
    tensors = save_two_files(tmp_path)
    name = next(iter(tensors))
    save_file({name: tensors[name]}, tmp_path / "model-3.safetensors")
    (tmp_path / INDEX).unlink()
    with pytest.raises(ValueError) as error:
        HFWeights(tmp_path)
    assert f"{name} lies in model-1.safetensors and in model-3.safetensors" in str(error.value)


@pytest.mark.parametrize(
    ("dtype", "words"),
    [
        (torch.float8_e4m3fn, r"lm_head \(F8_E4M3\) belongs to quantised weights"),
        (torch.int64, "w.safetensors: lm_head has dtype I64"),
    ],
)
def test_other_dtypes(dtype: torch.dtype, words: str, tmp_path: Path) -> None:
    save_file({"a": torch.ones(2), "lm_head": torch.ones(2).to(dtype)}, tmp_path / "w.safetensors")
    with pytest.raises(ValueError, match=words):
        HFWeights(tmp_path)


def test_no_weights(tmp_path: Path) -> None:
    (tmp_path / "pytorch_model.bin").touch()
    with pytest.raises(ValueError) as error:
        HFWeights(tmp_path)
    assert f"{tmp_path} holds PyTorch's pickled weights" in str(error.value)
    assert "save_pretrained" in str(error.value)


OUTSIDE = ("../x.safetensors", "/x.safetensors", "a/x.safetensors", "config.json", "..", 7, "")


@pytest.mark.parametrize("name", OUTSIDE)
def test_names_that_lead_out_of_the_folder(name: object, tmp_path: Path) -> None:
    folder = tmp_path / "hf"
    folder.mkdir()
    for place in (tmp_path, folder):
        save_file({"w": torch.zeros(3)}, place / "x.safetensors")
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {"w": name}}))
    with pytest.raises(ValueError, match="not the plain name of a .safetensors file"):
        HFWeights(folder)


def test_links_of_the_hub_cache_are_followed(tmp_path: Path) -> None:
    folder = tmp_path / "snapshots" / "1a2b"
    folder.mkdir(parents=True)
    (tmp_path / "blobs").mkdir()
    save_file({"w": torch.arange(3.0)}, tmp_path / "blobs" / "c3d4")
    (folder / "model.safetensors").symlink_to("../../blobs/c3d4")
    assert HFWeights(folder).tensors["w"].shape == (3,)
