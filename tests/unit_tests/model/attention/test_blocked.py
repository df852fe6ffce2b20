"""Blocks of queries and their mask against a dense oracle."""

from collections.abc import Iterator

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode, sdpa_backward_flop, sdpa_flop

from tests.reference import attention as oracle
from tests.unit_tests.model.attention.attention_cases import (
    assert_same,
    make_attention,
    make_inputs,
    with_gradients,
)
from trinity_megatron.model.attention.blocked import band_mask, blocked_attention, query_blocks
from trinity_megatron.model.attention.core_attention import (
    TrinityDotProductAttention,
    causal_attention,
)
from trinity_megatron.model.attention.segments import Segment


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    # The tensors are small: on busy cores, threads that wait for each other cost most of the time.
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


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
