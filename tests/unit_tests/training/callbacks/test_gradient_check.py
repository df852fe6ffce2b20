"""A gradient that is no number ends the run after its step."""

import math
from argparse import Namespace
from typing import Any

import pytest

from trinity_megatron.cpu_host.cuda_stand_ins import enter_host

enter_host()

from megatron.training import global_vars  # noqa: E402

from trinity_megatron.errors import UserError  # noqa: E402
from trinity_megatron.training.arguments.checks import finish_nan_check  # noqa: E402
from trinity_megatron.training.callbacks.gradient_check import GradientCheck  # noqa: E402


def result_of_step(norm: float | None) -> tuple[Any, ...]:
    """As Megatron's ``train_step`` returns it."""
    return {}, 0, False, False, 0, norm, None, 0


@pytest.mark.parametrize("norm", [math.nan, math.inf])
@pytest.mark.parametrize("save", ["runs/a/checkpoints", None])
def test_it_names_the_step(norm: float, save: str | None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(global_vars, "_GLOBAL_ARGS", Namespace(save=save))
    folder = "The latest checkpoint in runs/a/checkpoints stands" if save else "No checkpoint"
    with pytest.raises(
        UserError, match=f"step 7: the gradient norm is {norm}. {folder}.* Remedy: "
    ):
        GradientCheck().on_train_step_end(7, None, None, result_of_step(norm))


@pytest.mark.parametrize("norm", [None, 0.0, 1e30])
def test_other_steps_go_on(norm: float | None) -> None:
    GradientCheck().on_train_step_end(7, None, None, result_of_step(norm))


@pytest.mark.parametrize(
    ("mode", "is_asked_for", "is_megatrons", "is_ours"),
    [
        ("validate_results", True, True, False),
        ("validate_results", False, False, False),
        ("disabled", True, False, True),
        ("disabled", False, False, False),
    ],
)
def test_one_of_the_two_checks(
    mode: str, is_asked_for: bool, is_megatrons: bool, is_ours: bool
) -> None:
    for sigma in (None, 6.0):  # a spike is skipped, a NaN too
        args = Namespace(
            rerun_mode=mode, check_for_nan_in_loss_and_grad=is_asked_for, skip_spikes=sigma
        )
        finish_nan_check(args)
        assert args.check_for_nan_in_loss_and_grad is is_megatrons
        assert args.check_gradient_norm is (is_ours and sigma is None)
