"""Writing a Hugging Face checkpoint as a Megatron ``torch_dist`` checkpoint."""

import logging
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from math import prod
from pathlib import Path
from typing import Any

import torch

from trinity_megatron import __version__
from trinity_megatron.checkpoint.hf_assets import ASSETS_NAME, save_assets
from trinity_megatron.checkpoint.hf_weights import HFReader, HFWeights
from trinity_megatron.checkpoint.model_args import common_state
from trinity_megatron.checkpoint.param_mapping import (
    Entry,
    resolve,
    resolve_extra_state,
    resolve_momentum,
)
from trinity_megatron.checkpoint.source import Tensors
from trinity_megatron.checkpoint.staging import Staging, fingerprint_folder, group_into_jobs
from trinity_megatron.checkpoint.tensor_checks import check_finite, check_hf_tensors
from trinity_megatron.checkpoint.torch_dist.parts import Part
from trinity_megatron.checkpoint.torch_dist.tracker import RELEASE, TRACKER_NAME
from trinity_megatron.checkpoint.torch_dist.writer import TorchDistWriter
from trinity_megatron.checkpoint.transforms import cut
from trinity_megatron.errors import UserError
from trinity_megatron.model.config import TrinityConfig

logger = logging.getLogger(__name__)

# Largest part of a tensor that a thread holds in memory.
_MAX_PART_BYTES = 8 * 2**20


@dataclass(frozen=True)
class _Plan:
    """The content of the checkpoint to write.

    Attributes:
        tensors: Dtype and unsharded shape of every tensor.
        entries: Mapping of every tensor, by Megatron name; without blocks for the momentum.
        files: Parts of tensors, by file.
    """

    tensors: Tensors
    entries: dict[str, Entry]
    files: list[list[Part]]

    def num_bytes(self, part: Part) -> int:
        """Size of a part."""
        return _num_bytes(self.tensors, part)

    def file_sizes(self) -> list[int]:
        """Bytes of tensors in each file."""
        return [sum(map(self.num_bytes, file)) for file in self.files]


def write_megatron(hf: Path, weights: HFWeights, config: TrinityConfig, megatron: Path) -> int:
    """Write the weights of a Hugging Face checkpoint as a ``torch_dist`` checkpoint.

    Args:
        hf: Folder of the Hugging Face checkpoint.
        weights: Its weights.
        config: Its model.
        megatron: Folder to create.

    Returns:
        Bytes of weights written.

    Raises:
        UserError: The tensors do not match the config, or a tensor contains NaN or infinity.
        OSError: The folder cannot be written.
    """
    plan = _make_plan(weights, config)
    sizes = plan.file_sizes()
    source = ["hf", __version__, fingerprint_folder(hf), sizes]
    with Staging(megatron, source, num_bytes=sum(sizes)) as staging, _without_torch_checksums():
        folder = staging.folder / RELEASE
        folder.mkdir(exist_ok=True)
        writer = TorchDistWriter(
            folder,
            plan.tensors,
            plan.files,
            common=common_state(config),
            extra_state=resolve_extra_state(config),
        )

        def write(index: int, advance: Callable[[int], None]) -> Any:
            return writer.write(index, _PartReader(plan, weights.reader(), str(hf), advance).read)

        writer.finish(staging.run(write, sizes, description="to Megatron"))
        save_assets(hf, staging.folder / ASSETS_NAME, weights.headers)
        (staging.folder / TRACKER_NAME).write_text(RELEASE)
    return sum(sizes)


def _make_plan(weights: HFWeights, config: TrinityConfig) -> _Plan:
    entries = resolve(config, stacked_experts=weights.has_stacked_experts)
    check_hf_tensors(weights, entries)
    tensors = {entry.megatron: (_get_dtype(entry, weights), entry.shape) for entry in entries}
    momentum = resolve_momentum(config)
    for entry in momentum:
        tensors[entry.megatron] = (torch.float32, entry.shape)
    by_key = {entry.megatron: entry for entry in (*entries, *momentum)}
    parts = [
        Part(key, start, shape)
        for key, entry in by_key.items()
        for start, shape in cut(entry.shape, _MAX_PART_BYTES // tensors[key][0].itemsize)
    ]
    return _Plan(tensors, by_key, group_into_jobs(parts, partial(_num_bytes, tensors)))


def _num_bytes(tensors: Tensors, part: Part) -> int:
    return prod(part.shape) * tensors[part.key][0].itemsize


class _PartReader:
    """Reads parts of Megatron tensors from Hugging Face weights, into buffers that it reuses."""

    def __init__(
        self, plan: _Plan, reader: HFReader, name: str, advance: Callable[[int], None]
    ) -> None:
        self._plan, self._reader, self._name, self._advance = plan, reader, name, advance
        self._buffers: dict[int, torch.Tensor] = {}

    def read(self, part: Part) -> torch.Tensor:
        """The values of a part, valid until the next part of the same size is read."""
        # The writer writes a part at once, so the next part can have its buffer: the first touch of
        # newly allocated memory takes as long as writing the memory to disk.
        size = self._plan.num_bytes(part)
        if size not in self._buffers:
            self._buffers[size] = torch.empty(size, dtype=torch.uint8)
        values = self._buffers[size].view(self._plan.tensors[part.key][0]).view(part.shape)
        blocks = self._plan.entries[part.key].clip(part.start, part.shape)
        if not blocks:  # the momentum
            values.zero_()
        for block in blocks:
            block.megatron_view(values, part.start).copy_(self._reader.read(block))
        check_finite(values, blocks, part.start, self._name)
        self._advance(size)
        return values


def _get_dtype(entry: Entry, weights: HFWeights) -> torch.dtype:
    found = {weights.tensors[name].dtype for name in entry.hf}
    if len(found) > 1:
        raise UserError(
            f"{weights.folder}: {', '.join(entry.hf)} are of several dtypes ("
            f"{', '.join(sorted(map(str, found)))}) but one tensor in Megatron. Remedy: store them "
            "in one."
        )
    (dtype,) = found
    if entry.keep_fp32 and dtype != torch.float32:
        logger.warning("%s is %s; widened to float32", ", ".join(entry.hf), dtype)
        return torch.float32
    return dtype


@contextmanager
def _without_torch_checksums() -> Iterator[None]:
    """Turn off the CRC-32 that torch computes for each record.

    `TorchDistWriter` computes a CRC-32 of each whole item, two and a half times as fast.
    """
    before = torch.serialization.get_crc32_options()
    torch.serialization.set_crc32_options(False)
    try:
        yield
    finally:
        torch.serialization.set_crc32_options(before)
