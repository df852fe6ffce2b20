"""What a balance study measured: read from the logs of its runs, condensed into a table."""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from trinity_megatron.errors import UserError
from trinity_megatron.telemetry.metrics import max_violation
from trinity_megatron.telemetry.tensorboard_log import BIAS_TAG, TOKENS_TAG, RunLog

LABELS = {
    "none": "none",
    "sign": "sign",
    "smebu": "SMEBU",
    "sign_momentum": "sign with momentum 0.5",
    "linear": "SMEBU without tanh",
}
# The numbers of a run: heading and format in the table.
COLUMNS = {
    "steady_violation": ("MaxVio, last quarter", ".3f"),
    "summed_violation": ("MaxVio of its summed load", ".3f"),
    "early_violation": ("MaxVio, first quarter", ".3f"),
    "validation_loss": ("validation loss", ".3f"),
    "bias_range": ("bias range", ".3f"),
    "bias_step": ("bias step", ".5f"),
    "dead_experts": ("dead experts", ".1f"),
}
# Part of the run that counts as its steady state: the last so many steps of all.
STEADY_SHARE = 0.25
# Validation losses closer than this, in nats per token, count as equal in any case.
EQUAL_LOSS = 0.02
_STANDARD_ERRORS = 2.0
_CHUNK_TOKENS = 4096


@dataclass(frozen=True)
class Run:
    """One training run.

    Attributes:
        rule: Its rule, a key of :data:`LABELS`.
        seed: Its seed.
        steps: Training steps, from 1, ``[num_steps]``.
        violation: MaxVio of each step, mean over the MoE layers, ``[num_steps]``.
        loss: Training loss of each step in nats per token, ``[num_steps]``.
        load_shape: Choices a layer makes in a step (tokens times experts per token), and experts.
        numbers: One value for each of :data:`COLUMNS`.
    """

    rule: str
    seed: int
    steps: np.ndarray
    violation: np.ndarray
    loss: np.ndarray
    load_shape: tuple[int, int]
    numbers: Mapping[str, float]


def run_folder(out: Path, rule: str, seed: int) -> Path:
    """Where a run of the study lies."""
    return out / rule / f"seed_{seed}"


def read_run(out: Path, rule: str, seed: int) -> Run:
    """Read a complete run from its log.

    Raises:
        FileNotFoundError: There is no log.
        UserError: It lacks token counts, biases or a validation loss.
    """
    folder = run_folder(out, rule, seed)
    log = RunLog(folder / "tensorboard")
    counts, biases = log.tensors(TOKENS_TAG), log.tensors(BIAS_TAG)
    validation, losses = log.scalars("lm loss validation"), log.scalars("lm loss")
    if not counts or not biases or not validation or list(losses) != list(counts):
        raise UserError(
            f"{folder} lacks token counts, biases or losses of a step, or the validation loss. "
            "Remedy: remove it and start the study again."
        )
    loads = np.stack(list(counts.values()))
    violation = _violation(loads).mean(axis=-1)
    numbers = {
        **_load_numbers(loads, violation),
        **_bias_numbers(np.stack(list(biases.values()))),
        "validation_loss": list(validation.values())[-1],
    }
    return Run(
        rule,
        seed,
        steps=np.array(list(counts)),
        violation=violation,
        loss=np.array(list(losses.values())),
        load_shape=(int(loads[0, 0].sum()), loads.shape[-1]),
        numbers={name: float(numbers[name]) for name in COLUMNS},
    )


def num_steady(num_steps: int) -> int:
    """Steps that count as the steady state; at least one."""
    return max(1, round(STEADY_SHARE * num_steps))


def noise_floor(
    num_tokens: int, num_experts: int, topk: int, *, repeats: int = 50, seed: int = 0
) -> float:
    """Expected MaxVio if every token chose its experts by chance, all equally likely.

    Args:
        num_tokens: Tokens that are counted together.
        num_experts: Experts of the layer.
        topk: Distinct experts per token.
        repeats: Draws to average over.
        seed: Of the draws.
    """
    rng = np.random.default_rng(seed)
    loads = np.zeros((repeats, num_experts), dtype=np.int64)
    for load in loads:
        for start in range(0, num_tokens, _CHUNK_TOKENS):
            size = (min(_CHUNK_TOKENS, num_tokens - start), num_experts)
            chosen = rng.random(size, dtype=np.float32).argpartition(topk, axis=1)[:, :topk]
            load += np.bincount(chosen.ravel(), minlength=num_experts)
    return float(_violation(loads).mean())


def mean_and_std(values: Sequence[float]) -> tuple[float, float]:
    """Mean and sample standard deviation; NaN for that of a single value."""
    spread = float(np.std(values, ddof=1)) if len(values) > 1 else math.nan
    return float(np.mean(values)), spread


def compare(runs: Iterable[Run], first: str, second: str) -> str:
    """Say whether the first rule balances at least as well as the second at equal loss.

    Runs of the same seed have the same initial weights and data and are compared with each other.
    ``holds``: the mean MaxVio of the last quarter is not higher, and the mean validation loss is
    not higher by more than :data:`EQUAL_LOSS` or two standard errors of the paired differences.
    A difference of MaxVio below two standard errors is called undecided.
    """
    values: dict[str, dict[int, Mapping[str, float]]] = {first: {}, second: {}}
    for run in runs:
        if run.rule in values:
            values[run.rule][run.seed] = run.numbers
    seeds = sorted(values[first].keys() & values[second].keys())
    if not seeds:
        return f"{LABELS[first]} against {LABELS[second]}: no seed in common."
    pairs = {
        name: [[values[rule][seed][name] for seed in seeds] for rule in (first, second)]
        for name in ("steady_violation", "validation_loss")
    }
    (mine, other), (my_loss, other_loss) = pairs["steady_violation"], pairs["validation_loss"]
    return (
        f"{LABELS[first]} {_with_error(mine)} against {LABELS[second]} {_with_error(other)} at "
        f"validation loss {_with_error(my_loss)} against {_with_error(other_loss)}, lower MaxVio "
        f"in {int(np.sum(np.less(mine, other)))} of {len(seeds)} seeds: "
        f"{_judge(np.subtract(mine, other), np.subtract(my_loss, other_loss))}."
    )


def _judge(violation: np.ndarray, loss: np.ndarray) -> str:
    """In words, from the differences of each seed, ``[seeds]``."""
    change, error = _mean_and_error(violation)
    loss_change, loss_error = _mean_and_error(loss)
    if loss_change > max(EQUAL_LOSS, _STANDARD_ERRORS * loss_error):
        return "does not hold, its loss is higher"
    if len(violation) < 2:
        return ("holds" if change <= 0 else "does not hold") + " for this one seed"
    if abs(change) < _STANDARD_ERRORS * error:
        return "undecided, the difference is within the noise of the seeds"
    return "holds" if change <= 0 else "does not hold"


def write_results(
    runs: Sequence[Run], out: Path, *, settings: Mapping[str, object], topk: int
) -> str:
    """Write ``results.json`` and ``results.md``.

    Args:
        runs: All runs of the study.
        out: Folder.
        settings: What the study was started with.
        topk: Experts per token.

    Returns:
        The content of ``results.md``.
    """
    floors = _noise_floors(runs[0], topk)
    rules = list(dict.fromkeys(run.rule for run in runs))
    others = [rule for rule in rules if rule != "smebu"] if "smebu" in rules else []
    statements = [compare(runs, "smebu", rule) for rule in others]
    content = {
        "settings": dict(settings),
        "noise_floor": floors,
        "statements": statements,
        "rules": {rule: _rule_content([r for r in runs if r.rule == rule]) for rule in rules},
    }
    (out / "results.json").write_text(json.dumps(content, indent=1) + "\n")
    text = "\n".join([*_table(runs, rules, floors), "", *(f"- {line}" for line in statements)])
    (out / "results.md").write_text(text + "\n")
    return text


def _rule_content(runs: Sequence[Run]) -> dict[str, object]:
    content: dict[str, object] = {"seeds": [run.seed for run in runs]}
    for name in COLUMNS:
        values = [run.numbers[name] for run in runs]
        mean, spread = mean_and_std(values)
        content[name] = {
            "mean": mean,
            "std": None if math.isnan(spread) else spread,
            "values": values,
        }
    return content


def _table(runs: Sequence[Run], rules: Sequence[str], floors: Mapping[str, float]) -> list[str]:
    """Lines of a markdown table: a row for each rule, and one for chance alone."""
    lines = [
        "| rule | " + " | ".join(heading for heading, _ in COLUMNS.values()) + " |",
        "|---|" + "---|" * len(COLUMNS),
    ]
    for rule in rules:
        cells = [
            _with_error([run.numbers[name] for run in runs if run.rule == rule], form)
            for name, (_, form) in COLUMNS.items()
        ]
        lines.append(f"| {LABELS[rule]} | " + " | ".join(cells) + " |")
    cells = [
        format(floors[name], form) if name in floors else "" for name, (_, form) in COLUMNS.items()
    ]
    return [*lines, "| (chance alone) | " + " | ".join(cells) + " |"]


def _noise_floors(run: Run, topk: int) -> dict[str, float]:
    """MaxVio of chance alone, for a step and for the summed last quarter."""
    choices, experts = run.load_shape
    tokens, window = choices // topk, num_steady(len(run.steps))
    step = noise_floor(tokens, experts, topk)
    summed = noise_floor(tokens * window, experts, topk, repeats=10)
    return {"steady_violation": step, "summed_violation": summed, "early_violation": step}


def _load_numbers(loads: np.ndarray, violation: np.ndarray) -> dict[str, float]:
    """From counts ``[num_steps, num_layers, num_experts]`` and MaxVio ``[num_steps]``."""
    window = num_steady(len(loads))
    summed = loads[-window:].sum(axis=0)
    return {
        "steady_violation": violation[-window:].mean(),
        "early_violation": violation[:window].mean(),
        "summed_violation": _violation(summed).mean(),
        "dead_experts": (summed == 0).sum(),
    }


def _bias_numbers(bias: np.ndarray) -> dict[str, float]:
    """From biases ``[num_steps, num_layers, num_experts]``."""
    steps = np.diff(bias[-num_steady(len(bias)) - 1 :].astype(np.float64), axis=0)
    return {
        "bias_range": np.ptp(bias[-1], axis=-1).max(),
        "bias_step": np.sqrt(np.square(steps).mean()) if steps.size else math.nan,
    }


def _violation(loads: np.ndarray) -> np.ndarray:
    """MaxVio of counts, ``[..., num_experts]`` -> ``[...]``."""
    return max_violation(torch.from_numpy(loads)).numpy()


def _mean_and_error(values: np.ndarray) -> tuple[float, float]:
    """Mean and its standard error; 0 for that of a single value."""
    mean, spread = mean_and_std(values.tolist())
    return mean, 0.0 if math.isnan(spread) else spread / math.sqrt(len(values))


def _with_error(values: Sequence[float], form: str = ".3f") -> str:
    mean, spread = mean_and_std(values)
    return f"{mean:{form}}" if math.isnan(spread) else f"{mean:{form}} +- {spread:{form}}"
