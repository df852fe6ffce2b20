"""Megatron's rotary embedding without Transformer Engine: fused, and without a host sync."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch

from trinity_megatron.model.attention.zigzag import ZigzagCut
from trinity_megatron.model.fusion import fused
from trinity_megatron.upstream.registry import replaced

_MODULE = "megatron.core.models.common.embeddings.rope_utils"


@contextmanager
def rope_on_device() -> Iterator[None]:
    """Replace Megatron's unfused functions while the block runs.

    Theirs take some 20 launches a tensor, and for packed documents a loop over the documents and
    two waits for the device.
    """
    with (
        replaced(f"{_MODULE}:_apply_rotary_pos_emb_bshd", _compiled_on_gpu),
        replaced(f"{_MODULE}:_apply_rotary_pos_emb_thd", lambda _: rotate_documents),
    ):
        yield


def _compiled_on_gpu(apply: Callable[..., torch.Tensor]) -> Callable[..., torch.Tensor]:
    def rotate(t: torch.Tensor, freqs: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        return fused(apply, t)(t, freqs, *args, **kwargs)

    return rotate


def rotate_documents(
    t: torch.Tensor,
    cu_seqlens: torch.Tensor,
    freqs: torch.Tensor,
    *args: Any,
    cp_group: torch.distributed.ProcessGroup | None = None,
    **kwargs: Any,
) -> torch.Tensor:
    """Rotate packed documents, each from position 0 on.

    Args:
        t: Queries or keys, ``[num_tokens / cp, heads, d]``, cut as :class:`.zigzag.ZigzagCut` says.
        cu_seqlens: Boundaries of the documents, int32 ``[num_documents + 1]``.
        freqs: Angles, fp32 ``[positions, 1, 1, d]``, at least as many as the longest document has.
        *args: Of Megatron's function for ``[s, b, heads, d]``.
        cp_group: Context-parallel group.
        **kwargs: Of Megatron's function.

    Returns:
        As ``t``.
    """
    from megatron.core.models.common.embeddings import rope_utils

    size = 1 if cp_group is None else cp_group.size()
    positions = document_positions(cu_seqlens, size * t.shape[0])
    if cp_group is not None and size > 1:
        spans = ZigzagCut(len(positions), size).spans_of(cp_group.rank())
        positions = torch.cat([positions[span.start : span.end] for span in spans])
    angles = freqs.index_select(0, positions)
    apply = rope_utils._apply_rotary_pos_emb_bshd  # as it is replaced above
    return apply(t.unsqueeze(1), angles, *args, **kwargs).squeeze(1)


def document_positions(cu_seqlens: torch.Tensor, num_tokens: int) -> torch.Tensor:
    """The position of each token in its document, int64 ``[num_tokens]``.

    Args:
        cu_seqlens: Boundaries, rising from 0, integer ``[num_documents + 1]``.  Tokens after the
            last one are one more document.
        num_tokens: Length of the sequence.
    """
    tokens = torch.arange(num_tokens, device=cu_seqlens.device)
    document = torch.searchsorted(cu_seqlens.long(), tokens, right=True) - 1
    return tokens - cu_seqlens.long()[document]
