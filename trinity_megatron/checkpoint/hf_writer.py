"""Writing a folder of safetensors files, block by block.

The library can only write a file whose tensors are all in memory.  The format is a little-endian
64-bit length, a JSON header, and the tensors one after the other.  Source: the specification in the
safetensors repository.
"""

import json
import os
import struct
from collections.abc import Iterable, Mapping
from math import prod
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import split_state_dict_into_shards_factory

from trinity_megatron.checkpoint.hf_weights import DTYPES, TensorInfo, parse_header
from trinity_megatron.checkpoint.page_cache import WriteBehind
from trinity_megatron.checkpoint.transforms import Block, Shape
from trinity_megatron.errors import UserError

# What an export may hold beyond the dtypes that can be trained on.
WRITTEN_DTYPES = {**DTYPES, "F8_E4M3": torch.float8_e4m3fn}
_NAMES = {dtype: name for name, dtype in WRITTEN_DTYPES.items()}


def split_into_files(
    tensors: Mapping[str, tuple[torch.dtype, Shape]], *, max_shard_size: str
) -> dict[str, list[str]]:
    """Which tensor goes to which file: in order, by the rule of ``save_pretrained``."""
    try:
        split = split_state_dict_into_shards_factory(
            dict(tensors),
            get_storage_size=lambda item: prod(item[1]) * item[0].itemsize,
            filename_pattern="model{suffix}.safetensors",
            max_shard_size=max_shard_size,
        )
    except ValueError as error:
        raise UserError(
            f"--max-shard-size {max_shard_size!r} is no size ({error}). Remedy: a number and a "
            "unit, as in 5GB."
        ) from error
    return dict(split.filename_to_tensors)


def build_header(tensors: Mapping[str, tuple[torch.dtype, Shape]]) -> str:
    """The header that the library would write: widest dtype first, then by name."""
    order = sorted(
        tensors, key=lambda name: (-tensors[name][0].itemsize, _NAMES[tensors[name][0]], name)
    )
    entries: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    at = 0
    for name in order:
        dtype, shape = tensors[name]
        end = at + prod(shape) * dtype.itemsize
        entries[name] = {
            "dtype": _NAMES[dtype],
            "shape": list(shape),
            "data_offsets": [at, end],
        }
        at = end
    text = json.dumps(entries, separators=(",", ":"), ensure_ascii=False)
    # The tensors begin at a multiple of eight.
    return text + " " * (-len(text.encode()) % 8)


def build_index(headers: Mapping[str, str]) -> str:
    """``model.safetensors.index.json`` as transformers writes it."""
    tensors = {
        n: t
        for file, header in headers.items()
        for n, t in parse_header(file, header, WRITTEN_DTYPES).items()
    }
    metadata = {
        "total_parameters": sum(prod(info.shape) for info in tensors.values()),
        "total_size": sum(info.num_bytes for info in tensors.values()),
    }
    weight_map = {name: info.file for name, info in tensors.items()}
    return (
        json.dumps({"metadata": metadata, "weight_map": weight_map}, indent=2, sort_keys=True)
        + "\n"
    )


class HFWriter:
    """Writes blocks of tensors to their places, in any order and from several threads.

    The files have their full size from the start.

    Args:
        folder: Where the files go.
        headers: JSON header of each file.
    """

    def __init__(self, folder: Path, headers: Mapping[str, str]) -> None:
        self._files: dict[str, int] = {}
        self._behind: dict[str, WriteBehind] = {}
        self._first_byte: dict[str, int] = {}
        self.tensors: dict[str, TensorInfo] = {}
        for name, header in headers.items():
            content = header.encode()
            self._first_byte[name] = 8 + len(content)
            infos = parse_header(name, header, WRITTEN_DTYPES)
            self.tensors.update(infos)
            size = self._first_byte[name] + sum(info.num_bytes for info in infos.values())
            file = os.open(folder / name, os.O_WRONLY | os.O_CREAT, 0o644)
            self._files[name], self._behind[name] = file, WriteBehind(file)
            os.ftruncate(file, size)
            os.pwrite(file, struct.pack("<Q", len(content)) + content, 0)

    def write(self, block: Block, values: torch.Tensor) -> None:
        """Write a block given in Hugging Face's shape; it must be whole rows of its tensor."""
        info = self.tensors[block.hf_name]
        leading = next((i for i, n in enumerate(block.hf_shape) if n != 1), 0)
        assert block.hf_shape[leading + 1 :] == info.shape[leading + 1 :], block
        at = 0
        for position, size in zip(block.hf_start, info.shape, strict=True):
            at = at * size + position
        data = values.to(info.dtype).contiguous().view(torch.uint8).numpy().reshape(-1)
        file = self._files[info.file]
        offset = self._first_byte[info.file] + info.start + at * info.dtype.itemsize
        written = 0
        while written < len(data):
            written += os.pwrite(file, data[written:].data, offset + written)
        self._behind[info.file].wrote(written)

    def sync(self, names: Iterable[str]) -> None:
        """Wait until what was written to the files of these tensors is on the disk."""
        for file in {self.tensors[name].file for name in names}:
            self._behind[file].flush()

    def close(self) -> None:
        """Close the files."""
        for file in self._files.values():
            os.close(file)
        self._files.clear()
