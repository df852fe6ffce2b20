"""Tensors and parts that the tests of ``torch_dist`` checkpoints share."""

import argparse
from collections.abc import Sequence
from pathlib import Path

import torch

from trinity_megatron.checkpoint.torch_dist.parts import Part
from trinity_megatron.checkpoint.torch_dist.reader import TorchDistReader
from trinity_megatron.checkpoint.torch_dist.writer import TorchDistWriter
from trinity_megatron.checkpoint.transforms import cut

COMMON = {"args": argparse.Namespace(num_layers=3, window_size=(7, 0)), "iteration": 12}
EXTRA_STATE = ["decoder.layers.0.a._extra_state", "decoder.layers.1.a._extra_state"]


def make_tensors() -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    return {
        "matrix": torch.randn(12, 10, generator=generator),
        "bf16": torch.randn(7, 6, generator=generator).bfloat16(),
        "fp16": torch.randn(5, generator=generator).half(),
        "experts": torch.randn(4, 6, 8, generator=generator),
        "optimizer.state": torch.randn(3, generator=generator),
    }


def columns(key: str, shape: tuple[int, ...], at: Sequence[int], rows: int) -> list[Part]:
    """As tensor parallelism cuts the second matrix of an MLP, and pipelining the experts."""
    bounds = [0, *at, shape[-1]]
    parts = []
    for start, size in cut(shape, rows * shape[-1]):
        for low, high in zip(bounds, bounds[1:], strict=False):
            parts.append(Part(key, (*start[:-1], low), (*size[:-1], high - low)))
    return parts


def make_parts(tensors: dict[str, torch.Tensor]) -> list[Part]:
    """Some whole, some in runs of rows, some in columns of different widths."""
    parts = columns("matrix", (12, 10), at=[3, 4], rows=6)
    parts += columns("experts", (4, 6, 8), at=[4], rows=6)
    parts += [Part("bf16", *box) for box in cut((7, 6), 12)]
    return parts + [
        Part(key, (0,), tuple(tensors[key].shape)) for key in ("fp16", "optimizer.state")
    ]


def slice_of(part: Part, tensors: dict[str, torch.Tensor]) -> torch.Tensor:
    box = zip(part.start, part.shape, strict=True)
    return tensors[part.key][tuple(slice(a, a + n) for a, n in box)].contiguous()


def write(
    folder: Path, tensors: dict[str, torch.Tensor], files: Sequence[Sequence[Part]]
) -> list[Part]:
    """Write a checkpoint, the files in another order than they are named in."""
    folder.mkdir(parents=True, exist_ok=True)
    asked: list[Part] = []

    def read(part: Part) -> torch.Tensor:
        asked.append(part)
        return slice_of(part, tensors)

    shapes = {key: (tensor.dtype, tuple(tensor.shape)) for key, tensor in tensors.items()}
    writer = TorchDistWriter(folder, shapes, files, common=COMMON, extra_state=EXTRA_STATE)
    results = {index: writer.write(index, read) for index in reversed(range(len(files)))}
    writer.finish([results[index] for index in range(len(files))])
    return asked


def join(reader: TorchDistReader, key: str) -> torch.Tensor:
    """A whole tensor; NaN where nothing was read."""
    dtype, shape = reader.model_tensors()[key]
    whole = torch.full(shape, torch.nan, dtype=dtype)
    for parts in reader.parts(key):
        rows = reader.read(parts)
        start = parts[0].start
        box = zip(start, rows.shape, strict=True)
        whole[tuple(slice(a, a + n) for a, n in box)] = rows
        assert start[-1] == 0 and rows.shape[-1] == shape[-1]
    return whole
