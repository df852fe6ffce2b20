"""The rotary embedding of packed documents, against Megatron's loop over them."""

from types import SimpleNamespace

import pytest
import torch

from trinity_megatron.cpu_host.cuda_stand_ins import enter_host

enter_host()

from megatron.core.models.common.embeddings import rope_utils  # noqa: E402

from trinity_megatron.model.attention.rope import (  # noqa: E402
    document_positions,
    rope_on_device,
    rotate_documents,
)

DOCUMENTS = [[7], [1, 6], [3, 0, 2, 2], [1] * 7]
GROUP = SimpleNamespace(size=lambda: 1, rank=lambda: 0)


def boundaries(lengths: list[int]) -> torch.Tensor:
    return torch.tensor([0, *lengths], dtype=torch.int32).cumsum(0, dtype=torch.int32)


@pytest.mark.parametrize("lengths", DOCUMENTS)
def test_positions(lengths: list[int]) -> None:
    expected = [position for length in lengths for position in range(length)]
    assert document_positions(boundaries(lengths), 7).tolist() == expected


def test_tokens_after_the_last_boundary_are_a_document() -> None:
    assert document_positions(boundaries([3]), 5).tolist() == [0, 1, 2, 0, 1]


@pytest.mark.parametrize("lengths", DOCUMENTS)
def test_equals_megatrons_loop(lengths: list[int]) -> None:
    generator = torch.Generator().manual_seed(3)
    t = torch.randn(7, 2, 8, generator=generator)
    freqs = torch.randn(max(lengths), 1, 1, 8, generator=generator)
    given = (t, boundaries(lengths), freqs)
    expected = rope_utils._apply_rotary_pos_emb_thd(*given, cp_group=GROUP)
    assert torch.equal(rotate_documents(*given, cp_group=GROUP), expected)
    longer = torch.cat([freqs, torch.ones(5, 1, 1, 8)])  # more angles than the documents need
    assert torch.equal(rotate_documents(t, given[1], longer, cp_group=GROUP), expected)


def test_it_is_megatrons_while_the_block_runs() -> None:
    before = rope_utils._apply_rotary_pos_emb_thd
    with rope_on_device():
        assert rope_utils._apply_rotary_pos_emb_thd is rotate_documents
        t, freqs = torch.randn(5, 1, 2, 8), torch.randn(5, 1, 1, 8)
        rotated = rope_utils._apply_rotary_pos_emb_bshd(t, freqs)
    assert torch.equal(rotated, rope_utils._apply_rotary_pos_emb_bshd(t, freqs))
    assert rope_utils._apply_rotary_pos_emb_thd is before


def test_context_parallel_ranks_rotate_their_part() -> None:
    t, freqs, cu_seqlens = torch.randn(12, 2, 8), torch.randn(9, 1, 1, 8), boundaries([2, 9, 1])
    whole = rotate_documents(t, cu_seqlens, freqs, cp_group=GROUP).chunk(6)
    for rank in range(3):
        group = SimpleNamespace(size=lambda: 3, rank=lambda rank=rank: rank)
        mine = torch.cat([t.chunk(6)[rank], t.chunk(6)[5 - rank]])
        expected = torch.cat([whole[rank], whole[5 - rank]])
        assert torch.equal(rotate_documents(mine, cu_seqlens, freqs, cp_group=group), expected)
