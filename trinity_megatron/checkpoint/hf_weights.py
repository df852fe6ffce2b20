"""Reading a folder of safetensors files, block by block; `hf_writer` writes one."""

import json
import struct
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open

from trinity_megatron.checkpoint.transforms import Block, Shape
from trinity_megatron.errors import UserError
from trinity_megatron.model.hf_folder import explain_folder, refuse_quantised_weights
from trinity_megatron.untrusted.json_file import read_json

INDEX_NAME = "model.safetensors.index.json"
SINGLE_NAME = "model.safetensors"
# The dtypes of weights that can be trained on.
DTYPES = {"F32": torch.float32, "BF16": torch.bfloat16, "F16": torch.float16}
# A file stays mapped while it is read, and what was read counts as memory: it is opened anew.
_REOPEN_BYTES = 64 * 2**20


@dataclass(frozen=True)
class TensorInfo:
    """Where a tensor lies.

    Attributes:
        file: Name of the file.
        dtype: Its dtype.
        shape: Its shape.
        start: First byte after the header.
    """

    file: str
    dtype: torch.dtype
    shape: Shape
    start: int

    @property
    def num_bytes(self) -> int:
        """Size on disk."""
        return prod(self.shape) * self.dtype.itemsize


def read_header(path: Path) -> str:
    """The JSON header of a safetensors file, after the library has checked file and header.

    Raises:
        UserError: The file is truncated or damaged.
    """
    with path.open("rb") as file:
        try:
            with safe_open(path, framework="pt"):
                pass
        except SafetensorError as error:
            raise UserError(
                f"{path} is truncated or damaged ({error}). Remedy: download it again."
            ) from error
        (length,) = struct.unpack("<Q", file.read(8))
        return file.read(length).decode("utf-8")


def check_file_names(files: Iterable[object], source: Path) -> None:
    """Refuse names of weight files that lead out of their folder, or are those of other files.

    The file itself may be a symbolic link, as in the cache of the Hugging Face Hub.

    Args:
        files: The names.
        source: The file that holds them.

    Raises:
        UserError: Names the first one.
    """
    for name in files:
        is_weights = isinstance(name, str) and name.endswith(".safetensors")
        if not is_weights or set(str(name)) & set("/\\\0"):
            raise UserError(
                f"{source} names the weight file {name!r}, which is not the plain name of a "
                ".safetensors file in its folder. Remedy: take the checkpoint from a source that "
                "you trust."
            )


def parse_header(
    file: str, header: str, dtypes: Mapping[str, torch.dtype] = DTYPES
) -> dict[str, TensorInfo]:
    """The tensors of a file.

    Args:
        file: Name of the file.
        header: Its JSON header.
        dtypes: The dtypes that are accepted, by their names in the format.

    Raises:
        UserError: A dtype that Trinity checkpoints do not have, e.g. FP8.
    """
    tensors = {}
    for name, entry in json.loads(header).items():
        if name == "__metadata__":
            continue
        if entry["dtype"] not in dtypes:
            raise UserError(
                f"{file}: {name} has dtype {entry['dtype']}, which cannot be trained on. Remedy: "
                f"use the checkpoint in one of {', '.join(dtypes)}."
            )
        dtype, shape = dtypes[entry["dtype"]], tuple(entry["shape"])
        tensors[name] = TensorInfo(file, dtype, shape, entry["data_offsets"][0])
    return tensors


class HFWeights:
    """The tensors of a Hugging Face checkpoint on disk.

    Attributes:
        headers: JSON header of each file.
        tensors: All tensors by name.

    Raises:
        UserError: A file is missing, truncated or damaged, or a tensor lies in two files.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.headers = {name: read_header(folder / name) for name in self._find_files()}
        refuse_quantised_weights(folder, self.headers.values())
        self.tensors: dict[str, TensorInfo] = {}
        for file, header in self.headers.items():
            for name, info in parse_header(file, header).items():
                if name in self.tensors:
                    raise UserError(
                        f"{folder}: {name} lies in {self.tensors[name].file} and in {file}. "
                        "Remedy: remove the file that does not belong to the checkpoint."
                    )
                self.tensors[name] = info

    def _find_files(self) -> list[str]:
        index = self.folder / INDEX_NAME
        if index.is_file():
            try:
                weight_map = read_json(index)["weight_map"]
                files = sorted({str(name) for name in weight_map.values()})
            except (ValueError, KeyError, TypeError, AttributeError) as error:
                raise UserError(f"{index} is damaged. Remedy: download it again.") from error
            check_file_names(files, index)
        else:
            files = sorted(path.name for path in self.folder.glob("*.safetensors"))
        if missing := [name for name in files if not (self.folder / name).is_file()]:
            raise UserError(
                f"{self.folder}: {', '.join(missing)} is named in {INDEX_NAME} but missing. "
                "Remedy: download it."
            )
        if not files:
            raise UserError(explain_folder(self.folder, ".safetensors file"))
        return files

    @property
    def has_stacked_experts(self) -> bool:
        """Whether the experts are stored stacked instead of one by one."""
        return any(name.endswith("mlp.experts.gate_up_proj") for name in self.tensors)

    def reader(self) -> "HFReader":
        """A reader for one thread."""
        return HFReader(self)


class HFReader:
    """Reads blocks of tensors; memory holds what was read of a file since it was opened."""

    def __init__(self, weights: HFWeights) -> None:
        self._weights = weights
        self._file, self._read = "", 0
        self._opened: Any = None

    def read(self, block: Block) -> torch.Tensor:
        """The block, in the dtype of the file; valid until the next call."""
        info = self._weights.tensors[block.hf_name]
        if info.file != self._file or self._read > _REOPEN_BYTES:
            self._file, self._read = info.file, 0
            self._opened = safe_open(self._weights.folder / info.file, framework="pt")
        self._read += prod(block.hf_shape) * info.dtype.itemsize
        return block.hf_view(self._opened.get_tensor(block.hf_name))
