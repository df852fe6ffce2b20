"""Context parallelism of the local attention: ranks against one rank, and what they send."""

import multiprocessing
import os
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from tests.functional_tests.launch import TAKES_ALL
from tests.unit_tests.model.attention.attention_cases import (
    GLOBAL,
    LOCAL,
    assert_same,
    make_attention,
    make_inputs,
    pack,
    with_gradients,
)
from trinity_megatron.cpu_host import cuda_stand_ins
from trinity_megatron.model.attention.checks import check_causal_mask
from trinity_megatron.model.attention.context_parallel import rank_segments
from trinity_megatron.model.attention.segments import Segment
from trinity_megatron.model.attention.zigzag import ZigzagCut, plan_exchange

HEADS, GROUPS, SIZE, BATCH = 4, 2, 8, 2
ROW = 2 * GROUPS * SIZE * 4  # bytes of a key and a value, fp32


@pytest.mark.parametrize("cp", [2, 3, 4])
@pytest.mark.parametrize("window", [1, 2, 7, 8, 30, 1000])
def test_keys_are_the_chunks_and_the_windows_before_them(cp: int, window: int) -> None:
    cut = ZigzagCut(2 * cp * 7, cp)
    for rank in range(cp):
        chunks = cut.spans_of(rank)
        queries = {p for span in chunks for p in range(span.start, span.end)}
        seen = {k for q in queries for k in range(max(0, q - window + 1), q + 1)}
        spans = cut.keys_of(rank, window)
        assert [p for span in spans for p in range(span.start, span.end)] == sorted(seen)
        # The parts are the same positions, through the rows of their owners.
        rows = [[p for span in cut.spans_of(r) for p in range(*span)] for r in range(cp)]
        parts = [rows[r][i] for r, span in cut.parts_of(rank, window) for i in range(*span)]
        assert parts == sorted(seen)


@pytest.mark.parametrize("window", [1, 5, 16, 33])
def test_what_is_sent_is_received(window: int) -> None:
    plans = [plan_exchange(ZigzagCut(8 * 9, 4), rank, window) for rank in range(4)]
    for sender, plan in enumerate(plans):
        assert plan.num_sent == [other.num_received[sender] for other in plans]
    if window <= 10:  # of a chunk of 9: from each chunk to the next one on another rank
        assert [sum(plan.num_sent) for plan in plans] == [
            (window - 1) * chunks for chunks in (1, 2, 2, 1)
        ]


def test_segments_of_documents() -> None:
    # Chunks of 4: rank 1 has 4..8 and 8..12, one stretch with the window of 3 before it.
    documents = (Segment(0, 5, 0), Segment(5, 11, 5))
    cut = ZigzagCut(16, 2)
    assert rank_segments(documents, cut, 1, None) == (
        *(Segment(4, 1, 0), Segment(5, 3, 5)),
        Segment(8, 4, 5),
    )
    assert rank_segments(documents, cut, 1, 3) == (
        *(Segment(2, 1, 0), Segment(3, 3, 3)),
        Segment(6, 4, 3),
    )
    # Rank 0 has 0..4 and 12..16 with 10 and 11 before it.
    assert rank_segments(documents, cut, 0, 3) == (Segment(0, 4, 0), Segment(6, 4, 4))


def zigzag(tensor: torch.Tensor, group: Any) -> torch.Tensor:
    """The two chunks of the sequence (dimension 0) that Megatron gives this rank."""
    chunks = tensor.chunk(2 * group.size())
    return torch.cat((chunks[group.rank()], chunks[-1 - group.rank()]))


def check_context_parallel(group: Any, window: int | None, length: int) -> None:
    inputs = make_inputs(length, BATCH, HEADS, GROUPS, SIZE)
    serial = make_attention(window)
    parallel = make_attention(window, cp_group=group, cp_comm_type="p2p")
    whole = with_gradients(lambda *qkv: serial(*qkv, None), *inputs)
    mine = with_gradients(lambda *qkv: parallel(*qkv, None), *(zigzag(x, group) for x in inputs))
    assert_same(mine, [zigzag(tensor, group) for tensor in whole])
    mask = (torch.ones(length, length).tril() < 0.5)[None, None]
    local_mask = zigzag(mask.transpose(0, 2), group).transpose(0, 2)
    cut = ZigzagCut(length, group.size())
    segments = rank_segments((Segment(0, length),), cut, group.rank(), None)
    check_causal_mask(local_mask, segments, length)


def check_documents(group: Any, window: int | None, documents: list[int]) -> None:
    inputs = [x.squeeze(1) for x in make_inputs(sum(documents), 1, HEADS, GROUPS, SIZE)]
    packed = pack(documents)
    serial = make_attention(window)
    parallel = make_attention(window, cp_group=group)
    whole = with_gradients(lambda *qkv: serial(*qkv, None, packed_seq_params=packed), *inputs)
    mine = with_gradients(
        lambda *qkv: parallel(*qkv, None, packed_seq_params=packed),
        *(zigzag(x, group) for x in inputs),
    )
    assert_same(mine, [zigzag(tensor, group) for tensor in whole])


@contextmanager
def recorded_sends() -> Iterator[list[tuple[str, int]]]:
    """Every collective of torch: its name, and the bytes that this rank sends to others."""
    names = ("all_to_all_single", "all_gather_into_tensor", "reduce_scatter_tensor", "all_reduce")
    others = ("all_gather", "all_to_all", "send", "isend", "batch_isend_irecv", "broadcast")
    originals = {name: getattr(torch.distributed, name) for name in (*names, *others)}
    calls: list[tuple[str, int]] = []

    def record(name: str) -> Any:
        def wrapper(*args: Any, **kwargs: Any) -> Any:
            sent = 0
            if name == "all_to_all_single":
                rows = args[1][:1].nbytes if len(args[1]) else 0
                sent = rows * sum(args[3])
                assert args[3][kwargs["group"].rank()] == 0, "nothing goes to oneself"
            calls.append((name, sent))
            return originals[name](*args, **kwargs)

        return wrapper

    for name in originals:
        setattr(torch.distributed, name, record(name))
    try:
        yield calls
    finally:
        for name, original in originals.items():
            setattr(torch.distributed, name, original)


def check_bytes_of_a_local_layer(group: Any) -> None:
    """In either direction one exchange, whose bytes follow from the window alone."""
    rank, size, window = group.rank(), group.size(), 20
    at_ends = rank in (0, size - 1)
    for length in (16 * 21, 64 * 21):
        layer = make_attention(window, cp_group=group)
        inputs = make_inputs(length, BATCH, HEADS, GROUPS, SIZE)
        with recorded_sends() as calls:
            parts = (zigzag(x, group) for x in inputs)
            with_gradients(lambda *qkv, layer=layer: layer(*qkv, None), *parts)
        chunks_to_others = 1 if at_ends else 2
        expected = chunks_to_others * (window - 1) * BATCH * ROW
        assert calls == [("all_to_all_single", expected)] * 2, (rank, size, calls)


class LargestTensor(TorchDispatchMode):
    """Bytes of the largest tensor that any operation makes."""

    largest = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        for tensor in out if isinstance(out, (tuple, list)) else [out]:
            if isinstance(tensor, torch.Tensor):
                self.largest = max(self.largest, tensor.untyped_storage().nbytes())
        return out


def check_memory_of_a_local_layer(group: Any) -> None:
    """A tensor of a local layer is as large as the rank's part, whatever the others have."""
    window, part = 9, 16 * 21
    length = part * group.size()
    inputs = [zigzag(x, group) for x in make_inputs(length, BATCH, HEADS, GROUPS, SIZE)]
    bound = (part + 2 * (window - 1)) * BATCH * ROW
    found = {}
    for number in (LOCAL, GLOBAL):
        layer = make_attention(window, layer_number=number, cp_group=group)
        with LargestTensor() as mode:
            with_gradients(lambda *qkv, layer=layer: layer(*qkv, None), *inputs)
        found[number] = mode.largest
    assert found[LOCAL] <= bound, (found, bound)
    assert found[GLOBAL] >= length * BATCH * ROW  # the same measure sees a gathered sequence


def run_rank(rank: int, store: str) -> None:
    os.environ["GLOO_SOCKET_IFNAME"] = "lo"
    torch.set_num_threads(1)
    cuda_stand_ins.enter_host()
    torch.distributed.init_process_group(
        "gloo", init_method=f"file://{store}", rank=rank, world_size=4
    )
    pairs = [torch.distributed.new_group(ranks) for ranks in ([0, 1], [2, 3])]
    windows = (None, 1, 2, 20, 60, 100, 1000) if TAKES_ALL else (None, 1, 20, 100)
    for group in (pairs[rank // 2], torch.distributed.group.WORLD):
        for window in windows:
            check_context_parallel(group, window, 8 * 21)
            check_documents(group, window, [5, 77, 1, 30, 55])
        check_bytes_of_a_local_layer(group)
        check_memory_of_a_local_layer(group)
        with pytest.raises(ValueError, match="cp_comm_type='a2a'"):
            make_attention(8, cp_group=group, cp_comm_type="a2a")
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
