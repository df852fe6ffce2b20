"""Does FP8 learn what bf16 learns?  The loss curves of the same run, side by side."""

from collections.abc import Mapping

import numpy as np

from trinity_megatron.doctor.environment import missing_for_te, recipes
from trinity_megatron.doctor.result import Deadline, PartResult, Settings, SuiteError, Table
from trinity_megatron.doctor.runs import Run, log_of, train

NAME = "fp8_loss"
# Nats.  Two seeds of the tiny preset differ by about as much after 100 steps; an FP8 run that loses
# gradients (scales of zero, unpadded experts) is off by tenths.
LOSS_BOUND = 0.05
# All widths are multiples of 128, the block of the blockwise recipe; the preset's experts are not.
_WIDTHS = (
    "--moe-ffn-hidden-size",
    "128",
    "--moe-shared-expert-intermediate-size",
    "128",
)
_SHORT = (
    "--num-layers",
    "2",
    "--seq-length",
    "64",
    "--max-position-embeddings",
    "64",
    "--window-size",
    "15,0",
    "--global-batch-size",
    "4",
)


def check(settings: Settings, deadline: Deadline) -> PartResult:
    """Train the tiny preset in the reference precision and in every other, with the same seed."""
    result = PartResult(NAME)
    steps, last, title, runs = _plan(settings, result)
    if len(runs) < 2:
        result.status, result.reason = "skipped", "; ".join(result.skipped)
        result.skipped = []
        return result
    losses: dict[str, dict[int, float]] = {}
    rows = []
    for name, flags in runs.items():
        if not deadline.has_time():
            result.skipped.append(
                f"{name}: too little was left of the part's {deadline.seconds:.0f} s"
            )
            continue
        options = ["--preset", "tiny", "--train-iters", str(steps), *_WIDTHS, *flags]
        try:
            folder = train(Run(f"{NAME}/{name}", options), settings, deadline)
        except SuiteError as error:
            result.fail(str(error))
            continue
        losses[name] = log_of(folder).scalars("lm loss")
        rows.append(_compare(name, losses, next(iter(runs)), last, result))
    columns = ("run", "final loss", "difference", f"mean of the last {last}", "bound")
    result.tables.append(Table(title, columns, rows))
    return result


def _plan(settings: Settings, result: PartResult) -> tuple[int, int, str, Mapping[str, list[str]]]:
    """Steps, steps to compare, title, and the flags of each run, the reference first."""
    if not settings.on_gpu:
        result.skipped.append(f"bf16 against FP8: {missing_for_te(settings)}")
        title = "bf16 against fp32, `local` (in place of FP8, which needs a GPU): nats, 6 steps"
        return 6, 3, title, {"fp32": [*_SHORT], "bf16": [*_SHORT, "--bf16"]}
    title = "FP8 against bf16, Transformer Engine: nats per token, 100 steps"
    if missing := missing_for_te(settings):
        result.skipped.append(f"bf16 against FP8: {missing}")
        return 100, 20, title, {}
    te = ["--bf16", "--transformer-impl", "transformer_engine"]
    runs = {"bf16": te} | {f"fp8 {name}": [*te, *fp8_flags(name)] for name in recipes(settings)}
    if len(runs) == 1:
        result.skipped.append("FP8: this GPU supports no recipe")
    return 100, 20, title, runs


def fp8_flags(recipe: str) -> list[str]:
    """Megatron's flags for FP8 by a recipe."""
    return ["--fp8-format", "hybrid", "--fp8-recipe", recipe]


def _compare(
    name: str,
    losses: Mapping[str, Mapping[int, float]],
    reference: str,
    last: int,
    result: PartResult,
) -> tuple[str, ...]:
    curve = np.array(list(losses[name].values()))
    final = f"{curve[-1]:.4f}"
    if not np.isfinite(curve).all():
        result.fail(f"{name}: the loss is not finite")
    if name == reference:
        return name, final, "reference", "", ""
    if reference not in losses:
        return name, final, "no reference", "", ""
    difference = curve - np.array(list(losses[reference].values()))
    mean = float(np.abs(difference[-last:]).mean())
    if not mean <= LOSS_BOUND:
        result.fail(f"{name}: {mean:.4f} nats from {reference}, bound {LOSS_BOUND}")
    return name, final, f"{difference[-1]:+.4f}", f"{mean:.4f}", f"{LOSS_BOUND}"
