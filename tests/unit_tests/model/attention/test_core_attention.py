"""Core attention of the local implementation against a dense float64 oracle."""

import multiprocessing
import os
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from megatron.core.packed_seq_params import PackedSeqParams
from megatron.core.transformer.enums import AttnMaskType
from megatron.core.transformer.transformer_config import TransformerConfig
from torch.utils.flop_counter import FlopCounterMode, sdpa_backward_flop, sdpa_flop

from tests.reference import attention as oracle
from trinity_megatron.cpu_host import cuda_stand_ins
from trinity_megatron.model.attention.blocked import band_mask, blocked_attention, query_blocks
from trinity_megatron.model.attention.checks import check_causal_mask
from trinity_megatron.model.attention.context_parallel import zigzag_segments
from trinity_megatron.model.attention.core_attention import (
    TrinityDotProductAttention,
    causal_attention,
)
from trinity_megatron.model.attention.segments import Segment, document_segments

# fp32 sums of some hundred products of unit normals: the errors seen are below 3e-6.
TOLERANCE = 1e-5
LOCAL, GLOBAL = 1, 4


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    # The tensors are small: on busy cores, threads that wait for each other cost most of the time.
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def make_attention(
    window: int | None, *, layer_number: int = LOCAL, cp_group: Any = None, **options: Any
) -> TrinityDotProductAttention:
    fields = {
        "num_layers": 4,
        "hidden_size": 32,
        "num_attention_heads": 4,
        "attention_dropout": 0.0,
        "window_size": None if window is None else (window - 1, 0),
        "window_attn_skip_freq": 4,
        **options.pop("config", {}),
    }
    mask_type = options.pop("attn_mask_type", AttnMaskType.causal)
    return TrinityDotProductAttention(
        config=TransformerConfig(**fields),
        layer_number=layer_number,
        attn_mask_type=mask_type,
        attention_type="self",
        pg_collection=SimpleNamespace(cp=cp_group, tp=None),
        **options,
    )


def make_inputs(
    num_queries: int, batch: int, heads: int, groups: int, size: int, num_keys: int | None = None
) -> tuple[torch.Tensor, ...]:
    """Query, key, value and the gradient of the output."""
    generator = torch.Generator().manual_seed(num_queries + heads)
    num_keys = num_queries if num_keys is None else num_keys
    shapes = (
        (num_queries, batch, heads, size),
        (num_keys, batch, groups, size),
        (num_keys, batch, groups, size),
        (num_queries, batch, heads * size),
    )
    return tuple(torch.randn(shape, generator=generator) for shape in shapes)


def with_gradients(function: Any, *tensors: torch.Tensor) -> list[torch.Tensor]:
    """Output and gradients of the first three tensors; the last is the gradient of the output."""
    inputs = [tensor.detach().clone().requires_grad_() for tensor in tensors[:3]]
    output = function(*inputs)
    output.backward(tensors[3].to(output.dtype))
    return [output.detach(), *(tensor.grad for tensor in inputs)]  # type: ignore[misc]


def assert_same(actual: list[torch.Tensor], expected: list[torch.Tensor]) -> None:
    for one, other in zip(actual, expected, strict=True):
        torch.testing.assert_close(one.double(), other.double(), atol=TOLERANCE, rtol=TOLERANCE)


@pytest.mark.parametrize("layer_number", [LOCAL, GLOBAL])
@pytest.mark.parametrize(
    ("length", "window", "batch", "heads", "groups", "size"),
    [
        (1, 1, 1, 1, 1, 8),
        (2, 1, 2, 2, 1, 8),
        (63, 1, 1, 4, 2, 8),
        (64, 16, 2, 4, 4, 16),
        (65, 17, 1, 4, 1, 16),
        (129, 64, 2, 6, 3, 8),
        (200, 199, 1, 4, 2, 8),
        (200, 200, 1, 4, 2, 8),
        (200, 1000, 1, 4, 2, 8),
        (257, 33, 1, 8, 2, 32),
        (383, 128, 2, 4, 2, 12),
    ],
)
def test_matches_dense_oracle(
    layer_number: int, length: int, window: int, batch: int, heads: int, groups: int, size: int
) -> None:
    inputs = make_inputs(length, batch, heads, groups, size)
    attention = make_attention(window, layer_number=layer_number)
    actual = with_gradients(lambda *qkv: attention(*qkv, None), *inputs)
    seen = window if layer_number == LOCAL else None
    expected = with_gradients(lambda *qkv: oracle.attention(*qkv, window=seen), *inputs)
    assert_same(actual, expected)


@pytest.mark.parametrize("block_rows", [7, 64, 100, 512])
@pytest.mark.parametrize("window", [None, 1, 50])
def test_block_size_changes_nothing(block_rows: int, window: int | None) -> None:
    inputs = make_inputs(150, 1, 4, 2, 8)
    actual = with_gradients(
        lambda *qkv: blocked_attention(
            *qkv, [Segment(0, 150)], window=window, scale=0.3, block_rows=block_rows
        ),
        *inputs,
    )
    expected = with_gradients(
        lambda *qkv: oracle.attention(*qkv, window=window, scale=0.3), *inputs
    )
    assert_same(actual, expected)


def test_causal_call_equals_blocks() -> None:
    inputs = make_inputs(150, 2, 4, 2, 8)
    actual = with_gradients(lambda *qkv: causal_attention(*qkv, scale=0.3), *inputs)
    expected = with_gradients(lambda *qkv: oracle.attention(*qkv, scale=0.3), *inputs)
    assert_same(actual, expected)


def test_inputs_may_be_strided() -> None:
    # Megatron splits q, k and v from one tensor; global layers pass them on without a copy (NoPE).
    query, key, value, grad = make_inputs(70, 2, 4, 2, 8)
    mixed = torch.cat((query, key, value), dim=2)
    attention = make_attention(20)
    strided = attention(*mixed.split([4, 2, 2], dim=2), None)
    assert torch.equal(strided, attention(query, key, value, None))


@pytest.mark.parametrize("frequency", [4, [1, 1, 1, 0] * 2 + [1]])
def test_every_fourth_layer_is_global(frequency: int | list[int]) -> None:
    fields = {"num_layers": 9, "window_attn_skip_freq": frequency}
    windows = [make_attention(8, layer_number=n, config=fields).window for n in range(1, 10)]
    assert windows == [8, 8, 8, None, 8, 8, 8, None, 8]


@pytest.mark.parametrize(("num_queries", "num_keys"), [(1, 1), (1, 300), (3, 77), (130, 201)])
@pytest.mark.parametrize("window", [None, 1, 40])
def test_fewer_queries_are_the_last_positions(
    num_queries: int, num_keys: int, window: int | None
) -> None:
    inputs = make_inputs(num_queries, 2, 4, 2, 8, num_keys)
    attention = make_attention(window)
    actual = with_gradients(
        lambda *qkv: attention(*qkv, None, attn_mask_type=AttnMaskType.no_mask), *inputs
    )
    expected = with_gradients(lambda *qkv: oracle.attention(*qkv, window=window), *inputs)
    assert_same(actual, expected)


@pytest.mark.parametrize("window", [None, 1, 40])
@pytest.mark.parametrize(
    "documents", [[200], [1] * 12, [64, 64, 72], [3, 90, 1, 106], [130, 69, 1]]
)
def test_documents_do_not_see_each_other(documents: list[int], window: int | None) -> None:
    inputs = make_inputs(sum(documents), 1, 4, 2, 8)
    attention = make_attention(window)
    packed = pack(documents)

    def attend(*qkv: torch.Tensor) -> torch.Tensor:
        return attention(*(x.squeeze(1) for x in qkv), None, packed_seq_params=packed).unsqueeze(1)

    actual = with_gradients(attend, *inputs)
    expected = with_gradients(
        lambda *qkv: oracle.attention(*qkv, window=window, documents=documents), *inputs
    )
    assert_same(actual, expected)


def pack(documents: list[int]) -> PackedSeqParams:
    boundaries = torch.tensor([0, *documents], dtype=torch.int32).cumsum(0, dtype=torch.int32)
    return PackedSeqParams(qkv_format="thd", cu_seqlens_q=boundaries, cu_seqlens_kv=boundaries)


def test_document_segments() -> None:
    packed = pack([3, 0, 4])
    segments = document_segments(packed, 9)
    assert segments == [Segment(0, 3, 0), Segment(3, 4, 3), Segment(7, 2, 7)]
    assert document_segments(packed, 9) is segments  # read once
    packed.cu_seqlens_q_padded = torch.tensor([0, 4, 9], dtype=torch.int32)
    assert document_segments(packed, 9) == [Segment(0, 4, 0), Segment(4, 5, 4)]


@pytest.mark.parametrize("boundaries", [[1, 9], [0, 5, 4, 9], [0, 10]])
def test_boundaries_that_are_none(boundaries: list[int]) -> None:
    packed = PackedSeqParams(qkv_format="thd", cu_seqlens_q=torch.tensor(boundaries))
    with pytest.raises(ValueError, match="cu_seqlens_q"):
        document_segments(packed, 9)


@pytest.mark.parametrize("segment", [Segment(0, 500), Segment(37, 300), Segment(200, 130, 150)])
@pytest.mark.parametrize("window", [None, 1, 16, 100])
def test_blocks_cover_what_is_visible_and_little_more(segment: Segment, window: int | None) -> None:
    rows, position = 64, segment.position
    for block in query_blocks(segment, num_keys=500, window=window, block_rows=rows):
        assert block.position == position
        first = max(segment.first_key, position - (window or 500) + 1)
        last = position + block.num_rows
        assert segment.first_key <= block.key_start <= first < last <= block.key_end <= 500
        assert block.key_end - block.key_start <= last - first + 30
        position += block.num_rows
    assert position == segment.position + segment.num_queries


@pytest.mark.parametrize("window", [None, 1, 5, 48])
def test_band_mask_is_the_oracles_mask(window: int | None) -> None:
    rows, reach, repeats = 20, 48, 3
    mask = band_mask(rows, reach, window, repeats, torch.float32, torch.device("cpu"))
    expected = oracle.visible(rows, reach + rows, window).repeat_interleave(repeats, 0)
    assert torch.equal(mask[:, : reach + rows] == 0, expected)
    assert (mask[:, reach + rows :] == float("-inf")).all()


def attention_flops(attention: TrinityDotProductAttention, length: int) -> int:
    aten = torch.ops.aten
    counted = {
        aten._scaled_dot_product_flash_attention_for_cpu: lambda q, k, v, *_, **__: sdpa_flop(
            q, k, v
        ),
        aten._scaled_dot_product_flash_attention_for_cpu_backward: (
            lambda grad, q, k, v, *_, **__: sdpa_backward_flop(grad, q, k, v)
        ),
    }
    counter = FlopCounterMode(display=False, custom_mapping=counted)
    with counter:
        with_gradients(lambda *qkv: attention(*qkv, None), *make_inputs(length, 1, 4, 2, 8))
    return counter.get_total_flops()


def test_work_of_a_local_layer_is_linear_in_the_sequence() -> None:
    attention = make_attention(64)
    flops = [attention_flops(attention, length) for length in (512, 1024, 2048)]
    assert flops[0] > 0
    # Only the first window of a sequence is cheaper than the others.
    assert flops[2] - flops[1] == 2 * (flops[1] - flops[0])
    assert flops[1] / flops[0] == pytest.approx(2, rel=0.1)
    quadratic = attention_flops(make_attention(None), 2048)
    assert quadratic > 5 * flops[2]


def test_a_step_builds_no_mask_of_its_own() -> None:
    attention = make_attention(40)
    inputs = make_inputs(200, 1, 4, 2, 8)
    attention(*inputs[:3], None)
    built = band_mask.cache_info().misses
    attention(*inputs[:3], None)
    assert band_mask.cache_info().misses == built


def test_gradients_after_inference() -> None:
    attention = make_attention(11)
    inputs = make_inputs(90, 1, 4, 2, 8)
    band_mask.cache_clear()
    with torch.inference_mode():
        first = attention(*inputs[:3], None)
    assert torch.equal(with_gradients(lambda *qkv: attention(*qkv, None), *inputs)[0], first)


def test_bf16_is_as_exact_as_one_causal_call() -> None:
    # A key gets gradients from many blocks; rounding each sum to bf16 would lose digits.
    inputs = make_inputs(1024, 1, 2, 1, 16)
    low = [tensor.bfloat16() for tensor in inputs]
    exact = with_gradients(oracle.attention, *(tensor.double() for tensor in low))
    attention = make_attention(None)
    ours = with_gradients(lambda *qkv: attention(*qkv, None), *low)
    plain = with_gradients(lambda *qkv: causal_attention(*qkv, scale=0.25), *low)
    for mine, other, true in zip(ours, plain, exact, strict=True):
        assert mine.dtype == torch.bfloat16
        assert (mine - true).norm() <= 1.05 * (other - true).norm()


def test_causal_mask_is_accepted_and_checked_once() -> None:
    attention = make_attention(8)
    inputs = make_inputs(20, 2, 4, 2, 8)[:3]
    mask = torch.ones(20, 20).tril().expand(2, 1, 20, 20) < 0.5
    assert torch.equal(attention(*inputs, mask), attention(*inputs, None))
    mask.zero_()  # the object is known: no second comparison, which would be a synchronisation
    check_causal_mask(mask, [Segment(0, 20)], 20)


@pytest.mark.parametrize("shape", [(1, 1, 20, 20), (2, 1, 20, 20), (1, 1, 20, 21)])
def test_other_masks_are_refused(shape: tuple[int, ...]) -> None:
    attention = make_attention(8)
    mask = torch.ones(shape[-2:]).tril() < 0.5
    mask[10:, :10] = True  # a document boundary
    inputs = make_inputs(20, 2, 4, 2, 8)[:3]
    with pytest.raises(ValueError, match="--dataloader-inter-document-masking"):
        attention(*inputs, mask.expand(shape))


@pytest.mark.parametrize(
    ("options", "field"),
    [
        ({"config": {"attention_dropout": 0.1}}, "attention_dropout=0.1"),
        ({"config": {"softmax_type": "learnable"}}, "softmax_type='learnable'"),
        ({"config": {"log_max_attention_logit": True}}, "log_max_attention_logit=True"),
        ({"config": {"window_size": (7, 1)}}, "window_size=.7, 1."),
        ({"attn_mask_type": AttnMaskType.padding}, "attn_mask_type="),
    ],
)
def test_unsupported_requests_are_named(options: dict[str, Any], field: str) -> None:
    with pytest.raises(ValueError, match=field):
        make_attention(8, **options)


def test_unsupported_calls_are_named() -> None:
    attention = make_attention(8)
    inputs = make_inputs(9, 1, 4, 2, 8)[:3]
    packed = pack([4, 5])
    flat = [tensor.squeeze(1) for tensor in inputs]
    with pytest.raises(ValueError, match="attention_bias"):
        attention(*inputs, None, attention_bias=torch.zeros(1))
    with pytest.raises(ValueError, match="attention_mask"):
        attention(*flat, torch.zeros(1, 1, 9, 9), packed_seq_params=packed)
    with pytest.raises(ValueError, match="KV cache"):
        attention(flat[0][-1:], *flat[1:], None, packed_seq_params=packed)
    with pytest.raises(ValueError, match="qkv_format='sbhd'"):
        attention(*inputs, None, packed_seq_params=PackedSeqParams(qkv_format="sbhd"))


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
