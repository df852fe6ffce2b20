"""Loss of the LM head in a model."""

from collections.abc import Callable
from typing import Any

import pytest
import torch

from tests.unit_tests.model.loss_cases import COEFF, TOLERANCE, assert_near
from trinity_megatron.model.lm_head_loss import (
    LanguageModelLoss,
    attach_language_model_loss,
    z_loss,
)
from trinity_megatron.telemetry.step_statistics import STATISTIC_NAMES, statistics_of


def observe(model: Any) -> Any:
    """Let the collector of the model collect."""
    statistics = statistics_of(model.config)
    statistics.is_collecting = True
    return statistics


def take_statistics(model: Any) -> dict[str, list[float]]:
    """Count, total and maximum by name."""
    taken = statistics_of(model.config).take(0, torch.device("cpu"))[:, 0].tolist()
    return dict(zip(STATISTIC_NAMES, taken, strict=True))


def run(model: Any, **kwargs: Any) -> torch.Tensor:
    """Token losses ``[b, s]`` of a fixed batch."""
    generator = torch.Generator().manual_seed(2)
    tokens = torch.randint(model.config.vocab_size, (2, 8), generator=generator)
    return model(tokens, torch.arange(8).expand(2, -1), None, labels=tokens.roll(-1, 1), **kwargs)


def gradients(model: Any, loss: torch.Tensor) -> list[torch.Tensor]:
    parameters = [p for p in model.parameters() if p.requires_grad]
    return list(torch.autograd.grad(loss.mean(), parameters))


def test_model_with_our_loss_equals_megatrons(build: Callable[..., Any]) -> None:
    model = build()
    expected = run(model)
    expected_gradients = gradients(model, expected)
    assert attach_language_model_loss([model]) == [model]
    loss = run(model)
    assert loss.is_contiguous() and loss.dtype == torch.float32
    torch.testing.assert_close(loss, expected, rtol=1e-6, atol=1e-6)
    for ours, theirs in zip(gradients(model, loss), expected_gradients, strict=True):
        # Different roundings of the logits' gradient, 1e-7 of it, go through four layers.
        assert_near(ours, theirs, 1e-5)


def test_z_loss_of_the_model(build: Callable[..., Any]) -> None:
    model = build()
    without = gradients(model, run(model))
    attach_language_model_loss([model])
    plain = run(model)
    model.config.lm_head_z_loss_coeff = COEFF
    loss = run(model)
    assert torch.equal(loss, plain)
    logsumexp = run_logits(model).logsumexp(dim=-1)
    z = gradients(model, z_loss(logsumexp, COEFF))
    for combined, ce, extra in zip(gradients(model, loss), without, z, strict=True):
        assert_near(combined, ce + extra, 1e-5)
    assert any(
        extra.abs().max() > 1e-2 * ce.abs().max() for ce, extra in zip(without, z, strict=True)
    )
    model.eval()
    for in_evaluation, ce in zip(gradients(model, run(model)), without, strict=True):
        assert_near(in_evaluation, ce, 1e-5)


def run_logits(model: Any) -> torch.Tensor:
    """Logits ``[b, s, v]`` of the batch of :func:`run`."""
    generator = torch.Generator().manual_seed(2)
    tokens = torch.randint(model.config.vocab_size, (2, 8), generator=generator)
    return model(tokens, torch.arange(8).expand(2, -1), None)


def test_model_observes_tokens_whose_loss_counts(build: Callable[..., Any]) -> None:
    model = build()
    statistics = observe(model)
    attach_language_model_loss([model])
    logits = run_logits(model).detach().double()
    loss_mask = torch.ones(2, 8)
    loss_mask[0, :3] = 0.0
    statistics.clear()
    run(model, loss_mask=loss_mask)
    seen = take_statistics(model)
    kept = logits[loss_mask.bool()]
    logsumexp = kept.logsumexp(dim=-1)
    for name, values in (
        ("logit", kept),
        ("logsumexp", logsumexp),
        ("logsumexp_square", logsumexp.square()),
    ):
        count, total, maximum = seen[f"lm_head/{name}"]
        assert count == values.numel()
        assert abs(total - values.sum()) <= TOLERANCE * values.abs().sum()
        assert maximum == pytest.approx(values.max().item(), rel=1e-6)
    # The mask was of one micro-batch.
    assert model.compute_language_model_loss.loss_mask is None
    run(model)
    assert take_statistics(model)["lm_head/logsumexp"][0] == 16


def test_model_observes_training_only(build: Callable[..., Any]) -> None:
    model = build()
    statistics = observe(model)
    attach_language_model_loss([model])
    with torch.no_grad():
        run(model)
    model.eval()
    run(model)
    statistics.is_collecting = False
    model.train()
    run(model)
    assert all(
        take_statistics(model)[name][0] == 0 for name in STATISTIC_NAMES if "lm_head" in name
    )


def test_chunk_without_output_layer_is_left_alone(build: Callable[..., Any]) -> None:
    model = build()
    model.post_process = False
    attach_language_model_loss([model])
    assert not isinstance(model.compute_language_model_loss, LanguageModelLoss)
