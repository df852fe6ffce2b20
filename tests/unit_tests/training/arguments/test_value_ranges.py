"""Numbers outside of their range are refused by name."""

from argparse import Namespace

import pytest

from trinity_megatron.training.arguments.value_ranges import check_values

NAN, INF = float("nan"), float("inf")


@pytest.mark.parametrize(
    ("name", "value", "wanted"),
    [
        ("lr", -1.0, "at least 0"),
        ("lr", NAN, "at least 0"),
        ("lr", INF, "at least 0"),
        ("decoupled_lr", -1e-3, "at least 0"),
        ("min_lr", -1e-5, "at least 0"),
        ("min_lr", NAN, "at least 0"),
        ("lr_warmup_init", -1.0, "at least 0"),
        ("lr_warmup_fraction", 1.0, "less than 1"),
        ("lr_warmup_fraction", NAN, "less than 1"),
        ("lr_warmup_iters", -1, "at least 0"),
        ("lr_decay_iters", 0, "at least 1"),
        ("weight_decay", -0.1, "at least 0"),
        ("weight_decay", NAN, "at least 0"),
        ("end_weight_decay", INF, "at least 0"),
        ("clip_grad", -1.0, "0: no clipping"),
        ("clip_grad", NAN, "0: no clipping"),
        ("adam_beta1", 1.5, "less than 1"),
        ("adam_beta1", 1.0, "less than 1"),
        ("adam_beta2", -0.1, "less than 1"),
        ("adam_beta2", NAN, "less than 1"),
        ("adam_eps", 0.0, "more than 0"),
        ("muon_momentum", 1.0, "less than 1"),
        ("muon_num_ns_steps", 0, "at least 1"),
        ("hidden_dropout", 1.0, "less than 1"),
        ("attention_dropout", -0.1, "less than 1"),
        ("seed", -1, "1 to 2147483647"),
        ("seed", 0, "1 to 2147483647"),
        ("seed", 2**31, "1 to 2147483647"),
        ("eval_iters", -1, "at least 0"),
        ("exit_interval", 0, "at least 1"),
        ("tensorboard_log_interval", 0, "at least 1"),
        ("eval_global_batch_size", 0, "at least 1"),
        ("num_workers", -1, "at least 0"),
        ("loss_scale", 0.0, "more than 0"),
        ("rotary_base", 0, "more than 0"),
        ("rotary_percent", 1.5, "at most 1"),
        ("moe_z_loss_coeff", -1e-3, "at least 0"),
    ],
)
def test_refused(name: str, value: float, wanted: str) -> None:
    flag = f"--{name.replace('_', '-')}"
    with pytest.raises(ValueError, match=f"^{flag} .* is out of range. Remedy: give .*{wanted}"):
        check_values(Namespace(**{name: value}))


def test_an_element_of_a_list_is_refused() -> None:
    with pytest.raises(ValueError, match="--moe-aux-loss-coeff -0.1 "):
        check_values(Namespace(moe_aux_loss_coeff=[1e-3, -0.1]))


@pytest.mark.parametrize(
    ("low", "high"),
    [
        ("min_lr", "lr"),
        ("decoupled_min_lr", "decoupled_lr"),
        ("min_lr", "decoupled_lr"),  # where there is no decoupled_min_lr
        ("lr_warmup_init", "lr"),
    ],
)
def test_the_wrong_order_is_refused(low: str, high: str) -> None:
    first, second = (f"--{name.replace('_', '-')}" for name in (low, high))
    with pytest.raises(ValueError, match=f"{first} 0.1 is above {second} 0.01. Remedy: {first}"):
        check_values(Namespace(**{low: 0.1, high: 0.01}))
    check_values(Namespace(**{low: 0.01, high: 0.01}))
    check_values(Namespace(min_lr=0.1, decoupled_min_lr=0.001, decoupled_lr=0.01))


def test_what_is_common_is_accepted() -> None:
    check_values(
        Namespace(
            lr=3e-4,
            min_lr=0.0,
            decoupled_lr=None,
            weight_decay=0.0,
            clip_grad=0.0,
            adam_beta1=0.0,
            adam_beta2=0.999,
            seed=1,
            lr_warmup_fraction=0.0,
            eval_iters=0,
            hidden_dropout=0.0,
            moe_aux_loss_coeff=0.0,
            layernorm_epsilon=1e-6,
        )
    )


@pytest.mark.parametrize("size", [(5,), (5, 5), (-3, 0), (1, 2, 3)])
def test_a_window_that_is_not_causal_is_refused(size: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match="--window-size .*Remedy: --window-size N,0"):
        check_values(Namespace(window_size=size))


@pytest.mark.parametrize("size", [None, (127, 0), (0, 0), (-1, 0)])
def test_a_causal_window_is_accepted(size: tuple[int, ...] | None) -> None:
    check_values(Namespace(window_size=size))


@pytest.mark.parametrize(
    ("style", "start", "end", "wanted"),
    [
        ("constant", 0.1, None, "--weight-decay alone"),
        ("constant", 0.1, 0.2, "--weight-decay alone"),
        ("linear", None, None, "--start-weight-decay A"),
        ("cosine", 0.1, None, "--start-weight-decay A"),
    ],
)
def test_the_ends_of_the_weight_decay(
    style: str, start: float | None, end: float | None, wanted: str
) -> None:
    args = Namespace(weight_decay_incr_style=style, start_weight_decay=start, end_weight_decay=end)
    with pytest.raises(ValueError, match=wanted):
        check_values(args)


def test_an_odd_head_size_is_refused() -> None:
    with pytest.raises(ValueError, match="--kv-channels 7 .*Remedy: an even number"):
        check_values(Namespace(kv_channels=7))
    check_values(Namespace(kv_channels=None))
