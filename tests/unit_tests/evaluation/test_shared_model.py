"""A model that is asked from one place: the model's own logits and tokens."""

from collections.abc import Callable
from typing import Any

import pytest
import torch

from tests.unit_tests.model.test_model import perturb
from trinity_megatron.evaluation.shared_model import SharedModel
from trinity_megatron.model.generation import Sampling, generate_tokens


def test_logits_are_those_of_the_model(build: Callable[..., Any]) -> None:
    model = build().eval()
    perturb(model)
    vocab_size = model.config.vocab_size - 3
    tokens = torch.randint(vocab_size, (3, 21), generator=torch.Generator().manual_seed(1))
    shared = SharedModel(model, vocab_size)
    with shared.asking():
        found = shared.logits(tokens)
    with torch.no_grad():
        expected = model(tokens, torch.arange(21).expand(3, -1), None)
    assert found.dtype == torch.float32
    torch.testing.assert_close(found, expected[..., :vocab_size].float(), rtol=0, atol=0)


def test_generates_as_the_loop_of_generate(build: Callable[..., Any]) -> None:
    model = build().eval()
    perturb(model)
    vocab_size = model.config.vocab_size
    prompts, sampling = [[3, 1, 4, 1, 5], [9, 2, 6]], Sampling(0.9, seed=4)
    shared = SharedModel(model, vocab_size)
    with shared.asking():
        steps = shared.generate(prompts, max_new_tokens=6, stop=[], sampling=sampling)
        found = list(steps)
    expected = generate_tokens(
        model, prompts, max_new_tokens=6, vocab_size=vocab_size, sampling=sampling
    )
    assert found == list(expected)


def test_a_failed_pass_is_noted(build: Callable[..., Any]) -> None:
    model = build().eval()
    shared = SharedModel(model, model.config.vocab_size)
    with pytest.raises((IndexError, RuntimeError)), shared.asking():
        shared.logits(torch.full((1, 4), 10**6))
    assert shared.has_failed
