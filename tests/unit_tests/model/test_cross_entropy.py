"""Vocabulary-parallel cross entropy on one rank, against its definition in float64.

With TRITON_INTERPRET=1 the kernels are tested, see test_logit_kernels.py; without, the chunks.
"""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from megatron.core.tensor_parallel.cross_entropy import (
    vocab_parallel_cross_entropy as megatron_cross_entropy,
)

from tests.functional_tests.launch import TAKES_ALL
from tests.unit_tests.model.loss_cases import COEFF, INTERPRETED, TOLERANCE, assert_near
from trinity_megatron.model import chunked_cross_entropy
from trinity_megatron.model.cross_entropy import vocab_parallel_cross_entropy
from trinity_megatron.model.lm_head_loss import (
    add_z_loss,
    z_loss,
)


def reference(logits: torch.Tensor, target: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """The definition in float64."""
    logits = logits.double()
    logsumexp = logits.logsumexp(dim=-1)
    return logsumexp - logits.gather(-1, target.unsqueeze(-1)).squeeze(-1), logsumexp


def make_case(name: str) -> tuple[torch.Tensor, torch.Tensor]:
    """fp32 logits ``[s, b, v]`` and targets ``[s, b]``."""
    generator = torch.Generator().manual_seed(7)
    s, b, v = {"one token": (1, 1, 50), "one column": (3, 2, 1)}.get(name, (7, 2, 101))
    logits = 3 * torch.randn(s, b, v, generator=generator)
    target = torch.randint(v, (s, b), generator=generator)
    if name == "large logits":
        logits *= 3e3  # up to 1e4 and down to -1e4
    if name == "one outlier":
        logits[2, 0, 5] = 1e4
        logits[3, 1, target[3, 1]] = 1e4
        logits[4, 0, target[4, 0]] = -1e4
    if name == "all equal":
        logits.fill_(-1e4)
    if name == "columns that are ruled out":
        logits[..., 90:] = float("-inf")
        target.clamp_(max=89)
    return logits, target


CASES = (
    "ordinary",
    "one token",
    "one column",
    "large logits",
    "one outlier",
    "all equal",
    "columns that are ruled out",
)
# Of the gradient; a sample where the interpreter takes half a second for one.
PARTS = [(part, overwrite) for part in ("loss", "z-loss", "both") for overwrite in (False, True)]
if INTERPRETED and not TAKES_ALL:
    PARTS = [("loss", False), ("both", True)]


def non_leaf(logits: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """A leaf, and logits that nobody else keeps, as an output layer makes them."""
    leaf = logits.clone().requires_grad_()
    return leaf, leaf.clone()


@pytest.fixture
def small_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Four or five of the 14 rows of a case in a chunk: the last chunk has fewer.

    And 64 of its 101 columns in a block of the kernels, and 8 of the rows of a summary.
    """
    monkeypatch.setitem(chunked_cross_entropy._CHUNK_BYTES, "cpu", 5 * 101 * 4 + 1)
    if INTERPRETED:
        from trinity_megatron.model import logit_kernels

        monkeypatch.setattr(logit_kernels, "BLOCK", 64)
        monkeypatch.setattr(logit_kernels, "TOKENS", 8)


def test_implementation() -> None:
    values, target = make_case("ordinary")
    loss = vocab_parallel_cross_entropy(values.requires_grad_(), target).loss
    kind = "Fused" if INTERPRETED else "Chunked"
    assert loss.grad_fn.name() == f"{kind}CrossEntropyBackward"


@pytest.mark.parametrize(("part", "overwrite_logits"), PARTS)
@pytest.mark.parametrize("name", CASES)
def test_values_and_gradients(
    name: str, part: str, overwrite_logits: bool, small_chunks: None
) -> None:
    values, target = make_case(name)
    weights = torch.rand(target.shape, generator=torch.Generator().manual_seed(1))
    weights[0, -1] = 0.0  # a masked token
    leaf, logits = non_leaf(values)
    exact = values.double().requires_grad_()
    sums = []
    loss, logsumexp, statistics = vocab_parallel_cross_entropy(
        logits, target, overwrite_logits=overwrite_logits
    )
    for ce, lse in ((loss, logsumexp), reference(exact, target)):
        total = torch.zeros_like(ce)
        if part != "z-loss":
            total = total + ce
        if part != "loss":
            total = total + z_loss(lse, COEFF)
        sums.append((total * weights).sum())
        sums[-1].backward()
    assert statistics is None
    assert loss.dtype == logsumexp.dtype == torch.float32
    expected_loss, expected_logsumexp = reference(values, target)
    assert_near(loss, expected_loss)
    assert_near(logsumexp, expected_logsumexp)
    assert_near(leaf.grad, exact.grad)
    assert not leaf.grad[0, -1].any()


def test_gradcheck() -> None:
    generator = torch.Generator().manual_seed(4)
    exact = torch.randn(3, 2, 13, dtype=torch.float64, generator=generator, requires_grad=True)
    target = torch.randint(13, (3, 2), generator=generator)
    torch.autograd.gradcheck(lambda x: vocab_parallel_cross_entropy(x, target)[:2], exact)


def test_long_rows_are_summed_exactly() -> None:
    # The vocabulary of Trinity Large.  Adding up such a row one after the other in fp32, as torch's
    # softmax does, is wrong by 5e-6.
    generator = torch.Generator().manual_seed(0)
    values = 3 * torch.randn(4, 1, 200192, generator=generator)
    target = torch.randint(200192, (4, 1), generator=generator)
    leaf, exact = values.clone().requires_grad_(), values.double().requires_grad_()
    vocab_parallel_cross_entropy(leaf, target).logsumexp.sum().backward()
    reference(exact, target)[1].sum().backward()
    assert_near(leaf.grad, exact.grad, 5e-7)


@pytest.mark.parametrize("name", CASES)
def test_bfloat16_logits_are_rounded_once(name: str, small_chunks: None) -> None:
    values, target = make_case(name)
    values = values.bfloat16()
    leaf, logits = non_leaf(values)
    exact = values.double().requires_grad_()
    loss, logsumexp, _ = vocab_parallel_cross_entropy(logits, target, overwrite_logits=True)
    (loss + z_loss(logsumexp, COEFF)).sum().backward()
    expected_loss, expected_logsumexp = reference(exact, target)
    (expected_loss + z_loss(expected_logsumexp, COEFF)).sum().backward()
    # Everything but the stored gradient is fp32.
    assert loss.dtype == logsumexp.dtype == torch.float32
    assert_near(loss, expected_loss)
    assert_near(logsumexp, expected_logsumexp)
    # bf16 has 8 significant bits: rounding to the nearest is wrong by at most 2^-8 of an entry.
    # Triton's interpreter, unlike a GPU, rounds towards zero.
    assert leaf.grad.dtype == torch.bfloat16
    rounding = 2**-7 if INTERPRETED else 2**-8
    bound = rounding * exact.grad.abs() + TOLERANCE * exact.grad.abs().max()
    assert ((leaf.grad.double() - exact.grad).abs() <= bound).all()


def test_constant_added_to_all_logits_moves_only_logsumexp() -> None:
    values, target = make_case("ordinary")
    values = (values * 64).round() / 64  # so that the sum with 16 is exact
    loss, logsumexp, _ = vocab_parallel_cross_entropy(values, target)
    moved_loss, moved_logsumexp, _ = vocab_parallel_cross_entropy(values + 16, target)
    assert torch.equal(loss, moved_loss)
    torch.testing.assert_close(moved_logsumexp, logsumexp + 16, rtol=1e-6, atol=0)


def test_gradient_of_the_z_loss() -> None:
    values, target = make_case("ordinary")
    leaf = values.double().requires_grad_()
    logsumexp = vocab_parallel_cross_entropy(leaf, target).logsumexp
    z_loss(logsumexp, COEFF).sum().backward()
    expected = 2 * COEFF * logsumexp.detach().unsqueeze(-1) * values.double().softmax(dim=-1)
    torch.testing.assert_close(leaf.grad, expected)


def test_z_loss_is_in_the_gradient_only() -> None:
    values, target = make_case("ordinary")
    leaf = values.double().requires_grad_()
    loss, logsumexp, _ = vocab_parallel_cross_entropy(leaf, target)
    combined = add_z_loss(loss, logsumexp, COEFF)
    assert torch.equal(combined, loss)
    (gradient,) = torch.autograd.grad(combined.sum(), leaf, retain_graph=True)
    (expected,) = torch.autograd.grad((loss + z_loss(logsumexp, COEFF)).sum(), leaf)
    torch.testing.assert_close(gradient, expected, rtol=1e-12, atol=1e-15)


def test_gradient_takes_the_storage_of_the_logits() -> None:
    values, target = make_case("ordinary")
    _, logits = non_leaf(values)
    where: list[int] = []
    logits.register_hook(lambda grad: where.append(grad.data_ptr()))
    vocab_parallel_cross_entropy(logits, target, overwrite_logits=True).loss.sum().backward()
    assert where == [logits.data_ptr()]


@pytest.mark.parametrize("view", [False, True])
def test_leaf_keeps_its_values(view: bool) -> None:
    values, target = make_case("ordinary")
    leaf = values.clone().requires_grad_()
    logits = leaf.view(leaf.shape) if view else leaf
    vocab_parallel_cross_entropy(logits, target, overwrite_logits=True).loss.sum().backward()
    assert torch.equal(leaf, values)


def test_second_backward_pass() -> None:
    values, target = make_case("ordinary")
    leaf, logits = non_leaf(values)
    loss, logsumexp, _ = vocab_parallel_cross_entropy(logits, target, overwrite_logits=True)
    loss.sum().backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="overwrite_logits=False"):
        logsumexp.sum().backward()

    leaf, logits = non_leaf(values)
    loss = vocab_parallel_cross_entropy(logits, target).loss
    loss.sum().backward(retain_graph=True)
    once = leaf.grad.clone()
    loss.sum().backward()
    assert torch.equal(leaf.grad, 2 * once)


def test_logits_that_somebody_else_saved() -> None:
    values, target = make_case("ordinary")
    _, logits = non_leaf(values)
    somebody = logits.square()  # needs the values in its backward pass
    vocab_parallel_cross_entropy(logits, target, overwrite_logits=True).loss.sum().backward()
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        somebody.sum().backward()


def test_logits_changed_before_the_backward_pass() -> None:
    values, target = make_case("ordinary")
    _, logits = non_leaf(values)
    loss = vocab_parallel_cross_entropy(logits, target).loss
    logits.detach().add_(1.0)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.sum().backward()


def test_logits_that_are_not_contiguous() -> None:
    values, target = make_case("ordinary")
    stored = values.transpose(0, 1).contiguous().requires_grad_()
    loss = vocab_parallel_cross_entropy(stored.transpose(0, 1), target, overwrite_logits=True).loss
    loss.sum().backward()
    exact = values.double().requires_grad_()
    reference(exact, target)[0].sum().backward()
    assert_near(stored.grad.transpose(0, 1), exact.grad)
    assert torch.equal(stored.transpose(0, 1), values)


@pytest.mark.parametrize("kind", ["none", "bool", "float"])
def test_statistics(kind: str, small_chunks: None) -> None:
    values, target = make_case("ordinary")
    keep = torch.ones(target.shape, dtype=torch.bool)
    if kind != "none":
        keep[1] = False
        values[1, 0, 3], values[1, 1, 4] = float("inf"), float("nan")
    mask = {"none": None, "bool": keep, "float": 0.5 * keep.float()}[kind]
    statistics = vocab_parallel_cross_entropy(
        values, target, collect_statistics=True, loss_mask=mask
    ).statistics
    assert statistics is not None
    kept = values.double()[keep]
    logsumexp = kept.logsumexp(dim=-1)
    expected = {"logit": kept, "logsumexp": logsumexp, "logsumexp_square": logsumexp.square()}
    for name, everything in expected.items():
        found = getattr(statistics, name)
        assert found.count == everything.numel()
        # Sums of terms of either sign: relative to the sum of their sizes.
        assert abs(found.total - everything.sum()) <= TOLERANCE * everything.abs().sum()
        torch.testing.assert_close(found.maximum.double(), everything.max(), rtol=1e-6, atol=0)


def test_statistics_without_a_token() -> None:
    values, target = make_case("ordinary")
    statistics = vocab_parallel_cross_entropy(
        values, target, collect_statistics=True, loss_mask=torch.zeros(target.shape)
    ).statistics
    assert statistics is not None
    for found in statistics:
        assert (found.count, found.total, found.maximum) == (0, 0, float("-inf"))


@pytest.mark.parametrize("name", ["target", "loss_mask"])
def test_shape_that_does_not_fit(name: str) -> None:
    values, target = make_case("ordinary")
    arguments: dict[str, Any] = {"target": target, "loss_mask": torch.ones(target.shape)}
    arguments[name] = arguments[name].T
    with pytest.raises(ValueError, match=rf"{name} of shape \[2, 7\].*Remedy"):
        vocab_parallel_cross_entropy(values, **arguments)


def peak_of_step(dtype: torch.dtype, loss_of: Callable[..., torch.Tensor]) -> int:
    """Most bytes that torch held at once in output layer, loss and backward pass."""
    num_tokens, vocab_size, width = 1024, 8192 * 3, 8
    hidden, weight = (
        torch.randn(n, width, dtype=dtype).requires_grad_() for n in (num_tokens, vocab_size)
    )
    target = torch.randint(vocab_size, (num_tokens, 1))
    with torch.profiler.profile(
        activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True
    ) as profile:
        # Nobody holds the logits here, as in GPTModel.
        loss_of((hidden @ weight.T).unsqueeze(1), target).mean().backward()
    events = [e for e in profile.profiler.kineto_results.events() if e.name() == "[memory]"]
    assert events
    held = torch.tensor([e.nbytes() for e in sorted(events, key=lambda e: e.start_ns())]).cumsum(0)
    assert held.max() >= num_tokens * vocab_size * dtype.itemsize  # the logits themselves
    return int(held.max())


@pytest.mark.skipif(INTERPRETED, reason="the interpreter copies the tensors")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_memory_is_that_of_megatrons_loss(dtype: torch.dtype, one_rank: None) -> None:
    def ours(logits: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
        loss, logsumexp, _ = vocab_parallel_cross_entropy(
            logits, target, overwrite_logits=True, collect_statistics=True
        )
        return add_z_loss(loss, logsumexp, COEFF)

    allowed = 1.05 * peak_of_step(dtype, megatron_cross_entropy)
    if dtype == torch.bfloat16:
        # Megatron holds an fp32 copy and later the gradient; here are only the logits.
        allowed /= 2
    assert peak_of_step(dtype, ours) <= allowed
