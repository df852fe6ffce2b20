"""A Hugging Face checkpoint in block FP8, as compressed-tensors lays it out."""

import logging
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch

from trinity_megatron.checkpoint.hf_writer import HFWriter
from trinity_megatron.checkpoint.source import Tensors
from trinity_megatron.checkpoint.transforms import Block, Shape
from trinity_megatron.export.fp8_block import (
    BLOCK,
    FP8,
    is_quantised,
    quantise_blocks,
    scale_shape,
)

logger = logging.getLogger(__name__)

SCALE_SUFFIX = "_scale"
# The release of compressed-tensors whose layout and fields these are.
_LAYOUT_VERSION = "0.20.0"
_MODULE_SUFFIX = ".weight"
_ROUTER_GATE = ".mlp.router.gate"


class Fp8BlockEncoding:
    """Stores every projection as E4M3 numbers and one scale per block (``X.weight_scale``)."""

    name = "fp8-block"

    def stored(self, tensors: Tensors) -> Tensors:
        """See :class:`Encoding`; the scales follow their weights."""
        stored: Tensors = {}
        for name, (dtype, shape) in tensors.items():
            if is_quantised(name):
                stored[name] = (FP8, shape)
                stored[name + SCALE_SUFFIX] = (dtype, scale_shape(shape))
            else:
                stored[name] = (dtype, shape)
        return stored

    def config_fields(self, tensors: Tensors) -> dict[str, Any]:
        """See :class:`Encoding`; says once which sizes a server refuses."""
        odd = {
            size
            for name, (_, shape) in tensors.items()
            if is_quantised(name)
            for size in shape
            if size % BLOCK
        }
        if odd:
            logger.warning(
                "Sizes of %s are not multiples of %d: the blocks at the edge are cut off, which "
                "compressed-tensors reads, and vLLM may refuse.",
                ", ".join(map(str, sorted(odd))),
                BLOCK,
            )
        return {"quantization_config": quantization_config(tensors)}

    def wrap(self, writer: HFWriter) -> "Fp8BlockWriter":
        """See :class:`Encoding`."""
        return Fp8BlockWriter(writer)


def quantization_config(names: Iterable[str]) -> dict[str, Any]:
    """``quantization_config`` of ``config.json``.

    Args:
        names: Of the tensors of the model, in the order of its layers.

    Source: compressed-tensors, ``ModelCompressor.update_config`` for the scheme ``FP8_BLOCK``.
    """
    common = {"num_bits": 8, "symmetric": True, "type": "float"}
    weights = {
        **common,
        "strategy": "block",
        "block_structure": [BLOCK, BLOCK],
        "dynamic": False,
        "group_size": None,
    }
    inputs = {**common, "strategy": "group", "dynamic": True, "group_size": BLOCK}
    return {
        "quant_method": "compressed-tensors",
        "format": "float-quantized",
        "quantization_status": "compressed",
        "version": _LAYOUT_VERSION,
        "config_groups": {
            "group_0": {
                "targets": ["Linear"],
                "weights": weights,
                "input_activations": inputs,
                "output_activations": None,
                "format": "float-quantized",
            }
        },
        "ignore": _ignored_modules(names),
        "kv_cache_scheme": None,
        "global_compression_ratio": None,
        "moe_sparsity_config": None,
        "sparsity_config": {},
        "transform_config": {},
    }


def _ignored_modules(names: Iterable[str]) -> list[str]:
    """The linear layers that stay as they are: routers (each with its gate) and the head."""
    ignored = []
    for name in names:
        module = name.removesuffix(_MODULE_SUFFIX)
        if module.endswith(_ROUTER_GATE):
            ignored += [module.removesuffix(".gate"), module]
    return [*ignored, "lm_head"]


@dataclass
class _Band:
    """Rows of a tensor that share their scales, as far as they have come."""

    values: torch.Tensor
    missing: int


class Fp8BlockWriter:
    """Quantises what it is given, one band of 128 rows at a time.

    Memory holds the bands of which only some rows have come.

    Args:
        writer: Of the files, with the tensors of :meth:`Fp8BlockEncoding.stored`.
    """

    def __init__(self, writer: HFWriter) -> None:
        self._writer = writer
        # Two threads write, never the same tensor.
        self._open: dict[str, dict[int, _Band]] = {}

    def write(self, block: Block, values: torch.Tensor) -> None:
        """See :class:`BlockWriter`."""
        if not is_quantised(block.hf_name):
            self._writer.write(block, values)
            return
        first, end = block.hf_start[0], block.hf_start[0] + block.hf_shape[0]
        shape = self._writer.tensors[block.hf_name].shape
        at = first
        while at < end:
            begin = at // BLOCK * BLOCK
            stop = min(begin + BLOCK, shape[0])
            if at == begin and stop <= end:
                # All whole bands of the block at once.
                stop = end if end == shape[0] else end // BLOCK * BLOCK
                self._write_rows(block.hf_name, at, values[at - first : stop - first])
            else:
                stop = min(stop, end)
                self._collect(block.hf_name, shape, at, values[at - first : stop - first])
            at = stop

    def _collect(self, name: str, shape: Shape, row: int, values: torch.Tensor) -> None:
        """Keep some rows of a band until the others have come."""
        begin = row // BLOCK * BLOCK
        bands = self._open.setdefault(name, {})
        if begin not in bands:
            height = min(BLOCK, shape[0] - begin)
            bands[begin] = _Band(values.new_empty(height, shape[1]), height)
        band = bands[begin]
        band.values[row - begin : row - begin + len(values)] = values
        band.missing -= len(values)
        if not band.missing:
            self._write_rows(name, begin, band.values)
            del bands[begin]
            if not bands:
                del self._open[name]

    def _write_rows(self, name: str, row: int, values: torch.Tensor) -> None:
        numbers, scale = quantise_blocks(values)
        for stored, first, part in (
            (name, row, numbers),
            (name + SCALE_SUFFIX, row // BLOCK, scale),
        ):
            start, shape = (first, 0), tuple(part.shape)
            self._writer.write(Block(stored, start, shape, start, shape), part)

    def sync(self, names: Iterable[str]) -> None:
        """See :class:`BlockWriter`."""
        stored = list(names)
        unfinished = [name for name in stored if name in self._open]
        assert not unfinished, unfinished
        scales = [name + SCALE_SUFFIX for name in stored if is_quantised(name)]
        self._writer.sync([*stored, *scales])

    def close(self) -> None:
        """See :class:`BlockWriter`."""
        self._writer.close()
