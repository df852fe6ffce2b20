"""Checks of the tensors of a model: names, shapes and finite values."""

import math
from collections.abc import Mapping, Sequence

import torch

from trinity_megatron.checkpoint.hf_assets import Assets
from trinity_megatron.checkpoint.hf_weights import HFWeights
from trinity_megatron.checkpoint.param_mapping import Entry, resolve, resolve_momentum
from trinity_megatron.checkpoint.source import Tensors
from trinity_megatron.checkpoint.transforms import Block, Shape
from trinity_megatron.checkpoint.vocabulary import set_vocabulary
from trinity_megatron.errors import UserError
from trinity_megatron.model.config import TrinityConfig
from trinity_megatron.model.hf_config import CONFIG_NAME


def match_tensors(
    found: Tensors,
    config: TrinityConfig,
    *,
    assets: Assets | None,
    name: str,
    stacked_experts: bool = False,
) -> list[Entry]:
    """Map Megatron's tensors to Hugging Face names, and check that they are exactly the model's.

    Args:
        found: Dtype and unsharded shape of every tensor.
        config: Config of the model.  Its ``vocab_size`` is set to the vocabulary without padding.
        assets: Files of the Hugging Face checkpoint that training started from.
        name: Name of the source in messages.
        stacked_experts: See :func:`resolve`.

    Raises:
        UserError: The model differs from that of the assets, or a tensor is missing, unexpected or
            of another shape.
    """
    set_vocabulary(config, found, assets, name)
    entries = resolve(config, stacked_experts=stacked_experts)
    check_megatron_tensors(found, entries, resolve_momentum(config), name)
    return entries


def check_hf_tensors(weights: HFWeights, entries: Sequence[Entry]) -> None:
    """Check that a Hugging Face checkpoint contains exactly the tensors of the model.

    Raises:
        UserError: Lists the tensors that are missing, unexpected or of another shape.
    """
    expected = {name: shape for entry in entries for name, shape in entry.hf.items()}
    found = {name: info.shape for name, info in weights.tensors.items()}
    _compare_tensors(expected, found, f"{weights.folder} does not fit its {CONFIG_NAME}")


def check_megatron_tensors(
    found: Tensors, entries: Sequence[Entry], momentum: Sequence[Entry], name: str
) -> None:
    """Check that a Megatron checkpoint contains exactly the tensors of the model.

    Raises:
        UserError: Lists the tensors that are missing, unexpected or of another shape.
    """
    left_out = {entry.megatron for entry in momentum}
    shapes = {key: shape for key, (_, shape) in found.items() if key not in left_out}
    expected = {}
    for entry in entries:
        expected[entry.megatron] = entry.shape
        rows = shapes.get(entry.megatron, entry.shape)
        if _is_padded(entry) and rows[0] >= entry.shape[0]:
            shapes[entry.megatron] = (entry.shape[0], *rows[1:])
    _compare_tensors(expected, shapes, f"{name} does not fit its arguments")


def _compare_tensors(expected: Mapping[str, Shape], found: Mapping[str, Shape], what: str) -> None:
    problems = [
        *(f"missing: {name}" for name in expected if name not in found),
        *(f"not of this model: {name}" for name in found if name not in expected),
        *(
            f"{name} has shape {list(found[name])} instead of {list(shape)}"
            for name, shape in expected.items()
            if name in found and found[name] != shape
        ),
    ]
    if problems:
        shown = "\n  ".join(problems[:20])
        more = f"\n  ... and {len(problems) - 20} more" if len(problems) > 20 else ""
        raise UserError(f"{what}:\n  {shown}{more}\nNothing was converted.")


def _is_padded(entry: Entry) -> bool:
    return "word_embeddings" in entry.megatron or "output_layer" in entry.megatron


def check_finite(values: torch.Tensor, blocks: Sequence[Block], start: Shape, name: str) -> None:
    """Refuse a tensor that contains NaN or infinity.

    Args:
        values: Part of a Megatron tensor.
        blocks: Blocks of Hugging Face tensors that make up the part.
        start: Offset of the part in the whole tensor.
        name: Name of the checkpoint in the message.

    Raises:
        UserError: A block contains NaN or infinity; names its Hugging Face tensor.
    """
    if _is_finite(values):
        return
    parts = ((block, block.megatron_view(values, start)) for block in blocks)
    bad = sorted({block.hf_name for block, part in parts if not _is_finite(part)})
    if bad:  # otherwise it is in padding rows of the embedding
        raise UserError(
            f"{name} {', '.join(bad)} holds NaN or infinite numbers. Nothing was converted."
        )


def _is_finite(values: torch.Tensor) -> bool:
    # aminmax propagates NaN, so both results are finite only if every value is.  Unlike isfinite(),
    # it allocates no tensor.
    return all(math.isfinite(end) for end in torch.aminmax(values))
