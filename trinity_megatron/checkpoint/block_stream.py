"""Streaming Megatron's tensors, block by block, into a folder that appears when it is complete."""

from collections.abc import Callable, Iterable, Sequence
from math import prod
from pathlib import Path
from typing import Any, Protocol

import torch

from trinity_megatron.checkpoint.param_mapping import Entry
from trinity_megatron.checkpoint.source import MegatronSource
from trinity_megatron.checkpoint.staging import Staging, group_into_jobs
from trinity_megatron.checkpoint.tensor_checks import check_finite
from trinity_megatron.checkpoint.torch_dist.parts import Part
from trinity_megatron.checkpoint.transforms import Block, Shape

# Parts that are columns of the same rows, which are read as one.
Unit = Sequence[Part]


class BlockWriter(Protocol):
    """Takes blocks of Hugging Face tensors, from several threads."""

    def write(self, block: Block, values: torch.Tensor) -> None:
        """Write a block, which is whole rows of its tensor, given in Hugging Face's shape."""

    def sync(self, names: Iterable[str]) -> None:
        """Wait until these tensors, all of whose blocks have come, are on the disk."""

    def close(self) -> None:
        """Close the files."""


def write_blocks(
    source: MegatronSource,
    entries: Sequence[Entry],
    target: Path,
    *,
    name: str,
    state: Any,
    prepare: Callable[[Path], BlockWriter],
    description: str,
    num_bytes: int | None = None,
) -> int:
    """Write tensors into a new folder, in two threads; an interrupted attempt is taken up again.

    Args:
        source: Source of the tensors.
        entries: The tensors.
        target: Folder to create.
        name: Name of the source in messages.
        state: Identifies what is written; finished parts of another state are thrown away.
        prepare: Gets the folder under construction, writes every file but the weights, and returns
            the writer of these.
        description: Words in front of the progress bar.
        num_bytes: What will be written; the size in the source if None.

    Returns:
        Bytes of weights read.

    Raises:
        UserError: A tensor contains NaN or infinity.
        OSError: The folder cannot be written.
    """
    found = source.model_tensors()
    by_key = {entry.megatron: entry for entry in entries}

    def unit_bytes(unit: Unit) -> int:
        return sum(prod(part.shape) for part in unit) * found[unit[0].key][0].itemsize

    units = [unit for entry in entries for unit in source.parts(entry.megatron)]
    groups = group_whole_tensors(units, by_key)
    jobs = group_into_jobs(groups, lambda group: sum(map(unit_bytes, group)))
    batches = [[unit for group in job for unit in group] for job in jobs]
    sizes = [sum(map(unit_bytes, batch)) for batch in batches]
    room = sum(sizes) if num_bytes is None else num_bytes
    with Staging(target, [state, sizes], num_bytes=room) as staging:
        writer = prepare(staging.folder)

        def write(index: int, advance: Callable[[int], None]) -> None:
            touched = set()
            for unit in batches[index]:
                whole, start = source.read(unit), unit[0].start
                blocks = by_key[unit[0].key].clip(start, tuple(whole.shape))
                check_finite(whole, blocks, start, f"{name}: {unit[0].key}, to be")
                for block in blocks:
                    writer.write(block, block.megatron_view(whole, start))
                    touched.add(block.hf_name)
                advance(unit_bytes(unit))
            writer.sync(touched)

        try:
            staging.run(write, sizes, description=description)
        finally:
            writer.close()
    return sum(sizes)


def group_whole_tensors(units: Iterable[Unit], entries: dict[str, Entry]) -> list[list[Unit]]:
    """Group consecutive units so that every Hugging Face tensor ends in the group it begins in.

    What computes on a tensor as a whole, such as the scale of a block of rows, can then resume
    after any group.

    Args:
        units: In the order in which they are read.
        entries: By Megatron name.
    """
    groups: list[list[Unit]] = []
    missing: dict[str, int] = {}
    for unit in units:
        if not missing:
            groups.append([])
        groups[-1].append(unit)
        entry = entries[unit[0].key]
        for block in entry.clip(unit[0].start, _joined_shape(unit)):
            left = missing.pop(block.hf_name, prod(entry.hf[block.hf_name]))
            left -= prod(block.hf_shape)
            if left:
                missing[block.hf_name] = left
    assert not missing, missing
    return groups


def _joined_shape(unit: Unit) -> Shape:
    return (*unit[0].shape[:-1], sum(part.shape[-1] for part in unit))
