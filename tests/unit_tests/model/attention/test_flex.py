"""Ranges of keys, the blocks made of them, and FlexAttention on them, against a mask in full."""

from typing import Any

import pytest
import torch

from trinity_megatron.model.attention.flex import (
    BLOCK,
    KeyRanges,
    fused_attention,
    key_ranges,
    range_block_mask,
)

CPU = torch.device("cpu")
# Segments (position of the first query, queries, first key of the document), keys, window.
CASES: dict[str, tuple[list[tuple[int, int, int]], int, int | None]] = {
    "global": ([(0, 300, 0)], 300, None),
    "whole_blocks": ([(0, 384, 0)], 384, None),
    "window_below_a_block": ([(0, 300, 0)], 300, 40),
    "window_of_one": ([(0, 300, 0)], 300, 1),
    "window_of_blocks": ([(0, 640, 0)], 640, 256),
    "window_beyond_the_sequence": ([(0, 300, 0)], 300, 999),
    "documents": ([(0, 5, 0), (5, 200, 5), (205, 1, 205), (206, 330, 206)], 536, None),
    "documents_and_window": ([(0, 130, 0), (130, 400, 130)], 530, 70),
    "zigzag_of_rank_1": ([(160, 160, 0), (960, 160, 0)], 1280, None),
    "zigzag_and_window": ([(0, 256, 0), (1792, 256, 0)], 2048, 300),
    "kv_cache": ([(299, 1, 0)], 300, 128),
}


def visible(name: str) -> torch.Tensor:
    """The mask in full, one element after the other: bool ``[sq, sk]``."""
    segments, num_keys, window = CASES[name]
    rows = []
    for position, num_queries, document in segments:
        for query in range(position, position + num_queries):
            first = document if window is None else max(document, query - window + 1)
            rows.append([first <= key <= query for key in range(num_keys)])
    return torch.tensor(rows)


@pytest.mark.parametrize("name", CASES)
def test_key_ranges(name: str) -> None:
    segments, num_keys, window = CASES[name]
    ranges = key_ranges(segments, window=window, device=CPU)
    keys = torch.arange(num_keys)
    seen = (keys >= ranges.first[:, None]) & (keys <= ranges.last[:, None])
    assert torch.equal(seen, visible(name))


@pytest.mark.parametrize("name", CASES)
def test_blocks_cover_what_is_visible_and_skip_what_can_be_skipped(name: str) -> None:
    segments, num_keys, window = CASES[name]
    mask = visible(name)
    block_mask = range_block_mask(key_ranges(segments, window=window, device=CPU), num_keys)
    dense = block_mask.to_dense()[0, 0].bool()
    full = torch.zeros_like(dense)
    assert block_mask.full_kv_num_blocks is not None and block_mask.full_kv_indices is not None
    for row, count in enumerate(block_mask.full_kv_num_blocks[0, 0].tolist()):
        full[row, block_mask.full_kv_indices[0, 0, row, :count].long()] = True
    for row in range(dense.shape[0]):
        for column in range(dense.shape[1]):
            part = mask[row * BLOCK : (row + 1) * BLOCK, column * BLOCK : (column + 1) * BLOCK]
            assert dense[row, column] or not part.any()
            assert not full[row, column] or (part.all() and part.shape == (BLOCK, BLOCK))
            # Only a block of queries of two segments has keys between them that none sees.
            if len(segments) == 1:
                assert bool(dense[row, column]) == bool(part.any())
                assert bool(full[row, column]) == bool(part.all() and part.numel() == BLOCK**2)


def both_attentions(name: str, device: torch.device, dtype: torch.dtype) -> list[Any]:
    """Inputs, the fused output and that of ``blocked_attention``."""
    from trinity_megatron.model.attention.blocked import blocked_attention
    from trinity_megatron.model.attention.segments import Segment

    segments, num_keys, window = CASES[name]
    generator = torch.Generator(device).manual_seed(0)
    num_queries = sum(segment[1] for segment in segments)
    inputs = [
        torch.randn(size, 2, heads, 16, generator=generator, device=device, dtype=dtype)
        for size, heads in ((num_queries, 4), (num_keys, 2), (num_keys, 2))
    ]
    for tensor in inputs:
        tensor.requires_grad_(device.type == "cuda")  # FlexAttention has no gradients on a CPU
    block_mask = range_block_mask(key_ranges(segments, window=window, device=device), num_keys)
    blocks = [Segment(*segment) for segment in segments]
    fused = fused_attention(*inputs, block_mask, scale=0.3)
    blocked = blocked_attention(*inputs, blocks, window=window, scale=0.3, block_rows=64)
    return [inputs, fused, blocked]


@pytest.mark.parametrize("name", CASES)
def test_equals_the_blocks_of_attention(name: str) -> None:
    _, fused, blocked = both_attentions(name, CPU, torch.float64)
    torch.testing.assert_close(fused, blocked, rtol=1e-10, atol=1e-12)


@pytest.mark.gpu
@pytest.mark.parametrize("name", CASES)
def test_compiled_kernel_and_its_gradients(name: str) -> None:
    inputs, fused, blocked = both_attentions(name, torch.device("cuda"), torch.float32)
    # Triton's products take tf32 in places: 10 bits.
    torch.testing.assert_close(fused, blocked, rtol=2e-2, atol=2e-2)
    weight = torch.randn_like(fused)
    gradients = [torch.autograd.grad((out * weight).sum(), inputs) for out in (fused, blocked)]
    for one, other in zip(*gradients, strict=True):
        torch.testing.assert_close(one, other, rtol=5e-2, atol=5e-2)


def test_a_range_is_two_numbers() -> None:
    ranges = key_ranges([(3, 2, 0)], window=2, device=CPU)
    assert ranges.first.tolist() == [2, 3] and ranges.last.tolist() == [3, 4]
    assert ranges.first.dtype == torch.int32
    assert isinstance(ranges, KeyRanges)
