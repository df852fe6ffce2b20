"""Generation with a cache against reading everything again; the choice of a token."""

from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch

from tests.unit_tests.model.test_model import perturb
from trinity_megatron.errors import UserError
from trinity_megatron.model.generation import (
    CachedModel,
    Sampling,
    draw,
    generate_tokens,
    plan_reading,
)

NEW = 12


def random_prompts(vocab_size: int, *lengths: int) -> list[list[int]]:
    generator = torch.Generator().manual_seed(7)
    return [torch.randint(vocab_size, (n,), generator=generator).tolist() for n in lengths]


@torch.no_grad()
def continue_without_cache(model: Any, prompt: Sequence[int], vocab_size: int) -> list[int]:
    """The likeliest token of the whole sequence so far, again and again."""
    tokens = list(prompt)
    for _ in range(NEW):
        row = torch.tensor([tokens])
        logits = model(row, torch.arange(len(tokens)).unsqueeze(0), None)
        tokens.append(int(logits[0, -1, :vocab_size].argmax()))
    return tokens[len(prompt) :]


def collect(steps: Sequence[Sequence[int | None]], row: int) -> list[int]:
    return [step[row] for step in steps if step[row] is not None]  # type: ignore[misc]


@pytest.mark.parametrize(
    "given",
    [
        {},  # a window shorter than the prompts, and a global layer
        {"window_size": (0, 0), "num_layers": 5},
        {"window_size": (200, 0)},
        {"num_query_groups": 1, "global_attn_every_n_layers": 2},
    ],
)
def test_greedy_with_a_cache_equals_without(given: dict, build: Callable[..., Any]) -> None:
    model = build(**given).eval()
    perturb(model)
    vocab_size = model.config.vocab_size - 3
    prompts = random_prompts(vocab_size, 41, 17, 64, 1)
    steps = list(generate_tokens(model, prompts, max_new_tokens=NEW, vocab_size=vocab_size))
    for row, prompt in enumerate(prompts):
        expected = continue_without_cache(model, prompt, vocab_size)
        assert collect(steps, row) == expected
        assert max(expected) < vocab_size


def test_a_long_prompt_is_read_in_pieces(
    build: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Pieces, and pieces of a multiple as sequence parallelism reads them: the same logits."""
    from trinity_megatron.model import generation

    model = build().eval()
    perturb(model)
    prompt = torch.tensor(random_prompts(model.config.vocab_size, 50, 50))
    whole = CachedModel(model, batch_size=2, max_length=50).read(prompt, 0)
    monkeypatch.setattr(generation, "_CHUNK", 12)
    cached = CachedModel(model, batch_size=2, max_length=51)
    cached._multiple = 4
    cached.read(prompt[:, :37], 0)
    pieces = cached.read(prompt[:, 37:], 37)
    torch.testing.assert_close(pieces, whole, rtol=1e-4, atol=2e-5)


def test_training_goes_on_after_generation(build: Callable[..., Any]) -> None:
    """What generation caches, angles and masks, is no obstacle to a backward pass."""
    model = build()
    size = model.config.vocab_size
    tokens = torch.tensor(random_prompts(size, 24))
    positions = torch.arange(24).unsqueeze(0)

    def gradients() -> list[torch.Tensor]:
        model.zero_grad()
        model(tokens, positions, None, labels=tokens).mean().backward()
        return [p.grad.clone() for p in model.parameters() if p.grad is not None]

    model.eval()
    list(generate_tokens(model, tokens.tolist(), max_new_tokens=NEW, vocab_size=size))
    model.train()
    after = gradients()
    fresh = build()
    fresh.load_state_dict(model.state_dict())
    model = fresh
    assert all(torch.equal(*pair) for pair in zip(after, gradients(), strict=True))


def test_a_stop_token_ends_its_row_only(build: Callable[..., Any]) -> None:
    model = build().eval()
    perturb(model)
    size = model.config.vocab_size
    prompts = random_prompts(size, 20, 20)
    free = list(generate_tokens(model, prompts, max_new_tokens=NEW, vocab_size=size))
    first = collect(free, 0)
    stop = next(token for token in first if token not in collect(free, 1))
    steps = list(generate_tokens(model, prompts, max_new_tokens=NEW, vocab_size=size, stop={stop}))
    assert collect(steps, 0) == first[: first.index(stop) + 1]
    assert collect(steps, 1) == collect(free, 1)


def test_a_row_draws_the_same_in_every_batch(build: Callable[..., Any]) -> None:
    model = build().eval()
    size = model.config.vocab_size
    prompts = random_prompts(size, 20, 9)
    warm = Sampling(temperature=1.5, top_p=0.9, seed=3)
    options = {"max_new_tokens": NEW, "vocab_size": size}
    both = list(generate_tokens(model, prompts, sampling=warm, **options))
    alone = list(generate_tokens(model, prompts[:1], sampling=warm, **options))
    second = Sampling(temperature=1.5, top_p=0.9, seed=4)
    other = list(generate_tokens(model, prompts[1:], sampling=second, **options))
    assert collect(both, 0) == collect(alone, 0)
    assert collect(both, 1) == collect(other, 0)
    assert collect(both, 0) != collect(
        list(generate_tokens(model, prompts[:1], sampling=Sampling(1.5, 0.9, 8), **options)), 0
    )


def test_frequencies_follow_temperature_and_top_p() -> None:
    logits = torch.tensor([3.0, 1.0, 2.0, -1.0])
    rows = 20_000
    generators = [torch.Generator().manual_seed(row) for row in range(rows)]
    sampling = Sampling(temperature=2.0, top_p=0.8)
    drawn = draw(logits.expand(rows, -1), sampling, generators)
    probs = (logits / 2.0).softmax(0)  # .46, .17, .28, .06: the first three reach 0.8
    assert probs[0] + probs[2] < 0.8 < probs[:3].sum()
    expected = torch.cat([probs[:3] / probs[:3].sum(), torch.zeros(1)])
    found = torch.bincount(drawn, minlength=4) / rows
    assert found[3] == 0
    assert (found - expected).abs().max() < 4 * 0.5 / rows**0.5  # four standard deviations


@pytest.mark.parametrize("given", [{"top_p": 0.0}, {"top_p": 1.1}, {"temperature": -1.0}])
def test_values_out_of_range_are_refused(given: dict) -> None:
    with pytest.raises(UserError, match="Remedy: "):
        Sampling(**given)


@pytest.mark.parametrize("temperature", [1e-38, 1e-300, 5e-324])
def test_the_smallest_temperature_takes_the_likeliest(temperature: float) -> None:
    generators = [torch.Generator().manual_seed(row) for row in range(8)]
    logits = torch.tensor([1.0, 20.0, 3.0]).expand(8, -1)
    assert draw(logits, Sampling(temperature), generators).tolist() == [1] * 8


def test_transformer_engine_reads_nothing_behind_other_tokens() -> None:
    """There Megatron masks nothing once the cache holds tokens."""
    chunk, is_cached = plan_reading("local", 2)
    assert chunk is not None and is_cached
    assert plan_reading("transformer_engine", 1) == (None, True)
    assert plan_reading("transformer_engine", 2) == (None, False)
