"""Core attention of the local implementation against a dense float64 oracle."""

from collections.abc import Iterator

import pytest
import torch
from megatron.core.transformer.enums import AttnMaskType

from tests.reference import attention as oracle
from tests.unit_tests.model.attention.attention_cases import (
    GLOBAL,
    LOCAL,
    assert_same,
    make_attention,
    make_inputs,
    pack,
    with_gradients,
)
from trinity_megatron.model.attention.core_attention import (
    causal_attention,
)


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    # The tensors are small: on busy cores, threads that wait for each other cost most of the time.
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


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
