"""Context parallelism of the local attention: ranks against one rank."""

import multiprocessing
import os
from typing import Any

import pytest
import torch

from tests.unit_tests.model.attention.attention_cases import (
    assert_same,
    make_attention,
    make_inputs,
    pack,
    with_gradients,
)
from trinity_megatron.cpu_host import cuda_stand_ins
from trinity_megatron.model.attention.checks import check_causal_mask
from trinity_megatron.model.attention.context_parallel import zigzag_segments


def test_zigzag_segments_share_the_sequence() -> None:
    segments = [s for r in range(4) for s in zigzag_segments(6, cp_size=4, cp_rank=r)]
    assert sorted(segment.position for segment in segments) == list(range(0, 24, 3))


def zigzag(tensor: torch.Tensor, group: Any) -> torch.Tensor:
    """The two chunks of the sequence (dimension 0) that Megatron gives this rank."""
    chunks = tensor.chunk(2 * group.size())
    return torch.cat((chunks[group.rank()], chunks[-1 - group.rank()]))


def check_context_parallel(group: Any, window: int | None, length: int) -> None:
    inputs = make_inputs(length, 2, 4, 2, 8)
    serial = make_attention(window)
    parallel = make_attention(window, cp_group=group, cp_comm_type="p2p")
    whole = with_gradients(lambda *qkv: serial(*qkv, None), *inputs)
    mine = with_gradients(lambda *qkv: parallel(*qkv, None), *(zigzag(x, group) for x in inputs))
    assert_same(mine, [zigzag(tensor, group) for tensor in whole])
    mask = (torch.ones(length, length).tril() < 0.5)[None, None]
    local_mask = zigzag(mask.transpose(0, 2), group).transpose(0, 2)
    check_causal_mask(
        local_mask,
        zigzag_segments(length // group.size(), cp_size=group.size(), cp_rank=group.rank()),
        length,
    )


def check_context_parallel_refusals(group: Any) -> None:
    with pytest.raises(ValueError, match="cp_comm_type='a2a'"):
        make_attention(8, cp_group=group, cp_comm_type="a2a")
    flat = [tensor.squeeze(1) for tensor in make_inputs(8, 1, 4, 2, 8)[:3]]
    with pytest.raises(ValueError, match="context_parallel_size"):
        make_attention(8, cp_group=group)(*flat, None, packed_seq_params=pack([4, 4]))


def run_rank(rank: int, store: str) -> None:
    os.environ["GLOO_SOCKET_IFNAME"] = "lo"
    torch.set_num_threads(1)
    cuda_stand_ins.enter_host()
    torch.distributed.init_process_group(
        "gloo", init_method=f"file://{store}", rank=rank, world_size=4
    )
    pairs = [torch.distributed.new_group(ranks) for ranks in ([0, 1], [2, 3])]
    for group in (pairs[rank // 2], torch.distributed.group.WORLD):
        for window in (None, 1, 20, 100):
            check_context_parallel(group, window, 8 * 21)
        check_context_parallel_refusals(group)
    torch.distributed.destroy_process_group()


@pytest.mark.distributed
def test_context_parallel_equals_serial(tmp_path: Any) -> None:
    # One world of four ranks: context parallelism over pairs of ranks, then over all four.  The
    # ranks are forked from one server that has Megatron (12 s of imports) already.
    multiprocessing.set_forkserver_preload(
        [
            "trinity_megatron.model.attention.core_attention",
            "trinity_megatron.cpu_host.cuda_stand_ins",
        ]
    )
    torch.multiprocessing.start_processes(
        run_rank, (str(tmp_path / "store"),), nprocs=4, start_method="forkserver"
    )
