"""The cache of a layer against keeping everything."""

import pytest
import torch

from trinity_megatron.model.attention.kv_cache import KeyValueCache

# Tokens that are read at once, from which position: a prompt in pieces, single tokens, and pieces
# of four of which sequence parallelism reads some again.
READS = {
    "prompt_and_tokens": [(0, 16), (16, 7), *((n, 1) for n in range(23, 60))],
    "four_at_once": [(0, 12), (12, 12), (24, 4), *((n, 4) for n in range(25, 57))],
    "tokens_only": [(n, 1) for n in range(60)],
}


@pytest.mark.parametrize("reads", READS)
@pytest.mark.parametrize("window", [1, 2, 7, 16, 59, 60, 200, None])
def test_returns_what_the_window_shows(reads: str, window: int | None) -> None:
    generator = torch.Generator().manual_seed(2)
    cache = KeyValueCache(2, 60, max_read=16)
    everything = torch.zeros(2, 60, 2, 3, 4)  # keys and values
    for start, count in READS[reads]:
        new = torch.randn(2, count, 2, 3, 4, generator=generator)
        everything[:, start : start + count] = new
        cache.sequence_len_offset = start
        found = cache.append(5, *new, window=window)
        first = 0 if window is None else max(0, start - window + 1)
        assert torch.equal(torch.stack(found), everything[:, first : start + count])


def test_a_local_layer_keeps_little() -> None:
    cache = KeyValueCache(1, 4096, max_read=64)
    sizes = {}
    for start in range(0, 4096, 64):
        cache.sequence_len_offset = start
        for layer, window in ((1, 32), (4, None)):
            key, _ = cache.append(layer, *torch.zeros(2, 64, 1, 1, 8), window=window)
            sizes[layer] = key.untyped_storage().nbytes() // (4 * 8)
    assert sizes == {1: 31 + 64, 4: 4096}
