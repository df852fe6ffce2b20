"""What a needle study measured: read from the evaluations of its runs, judged and tabulated."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

from trinity_megatron.errors import UserError


class Arm(NamedTuple):
    """A checkpoint that is asked.

    Attributes:
        label: In tables and pictures.
        short_label: Below an axis.
        is_long: Whether it is trained with sequences of the long length.
    """

    label: str
    short_label: str
    is_long: bool


ARMS = {
    "short": Arm("before", "before", False),
    "continued": Arm("went on at the short length", "went on", False),
    "extended": Arm("extended", "extended", True),
}
SHORT_LENGTH, LONG_LENGTH = 512, 4096
# Longest question of a group, in tokens.  The needle lies more than the length before it away.
GROUPS = (512, 1024, 2048, 4096)
# What the extended model must reach beyond the short length, and may lose on short text (nats).
GOAL, MAX_LOSS = 0.9, 0.01
SIZES_NAME = "sizes.json"
PERPLEXITY = "perplexity_text"


@dataclass(frozen=True)
class Run:
    """A checkpoint and its answers.

    Attributes:
        arm: A key of :data:`ARMS`.
        seed: Its seed.
        right: Questions that were answered with the right number, by group.
        asked: All questions, by group.
        loss: On short texts that were held out, in nats per token.
    """

    arm: str
    seed: int
    right: Mapping[int, int]
    asked: Mapping[int, int]
    loss: float

    def rate(self, *groups: int) -> float:
        """Share of right answers in these groups together."""
        return sum(self.right[g] for g in groups) / sum(self.asked[g] for g in groups)


def task_name(group: int) -> str:
    """Name of the task of a group."""
    return f"needle_{group}"


def describe_group(group: int) -> str:
    """Distances of the needles of a group."""
    number = GROUPS.index(group)
    return f"{GROUPS[number - 1]} to {group}" if number else f"up to {group}"


def beyond() -> tuple[int, ...]:
    """Groups whose needles are further away than the short length."""
    return tuple(group for group in GROUPS if group > SHORT_LENGTH)


def run_folder(out: Path, arm: str, seed: int) -> Path:
    """Where a run of the study lies."""
    return out / arm / f"seed_{seed}"


def find_evaluation(folder: Path) -> Path | None:
    """The file with all scores of a run; None if it has to be evaluated.

    Args:
        folder: Of the run.
    """
    wanted = {PERPLEXITY, *map(task_name, GROUPS)}
    for path in sorted((folder / "evaluation").glob("*.json")):
        if wanted <= set(json.loads(path.read_text())["results"]):
            return path
    return None


def read_run(out: Path, arm: str, seed: int) -> Run:
    """Read what a run has scored.

    Raises:
        UserError: It was not evaluated.
    """
    folder = run_folder(out, arm, seed)
    path = find_evaluation(folder)
    if path is None:
        raise UserError(f"{folder} has no scores. Remedy: start the study again.")
    content = json.loads(path.read_text())
    asked = {group: content["n-samples"][task_name(group)]["effective"] for group in GROUPS}
    right = {
        group: round(asked[group] * content["results"][task_name(group)]["exact_match,number"])
        for group in GROUPS
    }
    sizes = json.loads((out / "questions" / SIZES_NAME).read_text())
    bits = content["results"][PERPLEXITY]["bits_per_byte,none"]
    return Run(arm, seed, right, asked, nats_per_token(bits, **sizes))


def nats_per_token(bits_per_byte: float, *, num_bytes: int, num_tokens: int) -> float:
    """The loss of a text, from the bits that the harness counts for a byte."""
    return bits_per_byte * math.log(2) * num_bytes / num_tokens


def statements(runs: Sequence[Run]) -> list[str]:
    """What the numbers say of the claim, seed by seed."""
    by_arm = {arm: {run.seed: run for run in runs if run.arm == arm} for arm in ARMS}
    lines = []
    for seed, extended in by_arm["extended"].items():
        for name in ("short", "continued"):
            if seed in by_arm[name]:
                lines += compare(by_arm[name][seed], extended)
    return lines


def compare(base: Run, extended: Run) -> list[str]:
    """Judge an extended model against one that is not: retrieval, and the loss on short text."""
    label = f"seed {extended.seed}, against {ARMS[base.arm].label!r}"
    return [
        f"{label}: {judge_retrieval(base, extended)}.",
        f"{label}: {judge_loss(base, extended)}.",
    ]


def judge_retrieval(base: Run, extended: Run) -> str:
    """Whether the extended model answers beyond the short length, and the other does not.

    It *holds* if the extended model reaches :data:`GOAL` in every group beyond the short length,
    and the other one in none.
    """
    rates = {group: (base.rate(group), extended.rate(group)) for group in beyond()}
    numbers = ", ".join(
        f"{describe_group(group)} tokens {mine:.2f} against {other:.2f}"
        for group, (other, mine) in rates.items()
    )
    missed = [group for group, (_, mine) in rates.items() if mine < GOAL]
    known = [group for group, (other, _) in rates.items() if other >= GOAL]
    if missed:
        verdict = f"does not hold, below {GOAL:g} at {_join(missed)}"
    elif known:
        verdict = f"holds in part: the other one retrieves too at {_join(known)}"
    else:
        verdict = "holds"
    return f"retrieval, {numbers}: {verdict}"


def judge_loss(base: Run, extended: Run) -> str:
    """Whether short text is predicted as well as before, to :data:`MAX_LOSS`."""
    difference = extended.loss - base.loss
    verdict = "holds" if difference <= MAX_LOSS else f"does not hold, more than {MAX_LOSS:g} worse"
    return (
        f"loss on short text, {extended.loss:.4f} against {base.loss:.4f} nats a token "
        f"({difference:+.4f}): {verdict}"
    )


def _join(groups: Sequence[int]) -> str:
    return " and ".join(f"{describe_group(group)} tokens" for group in groups)


def write_results(runs: Sequence[Run], out: Path, *, settings: Mapping[str, object]) -> str:
    """Write ``results.json`` and ``results.md``.

    Args:
        runs: All runs of the study.
        out: Folder.
        settings: What the study was started with.

    Returns:
        The content of ``results.md``.
    """
    lines = statements(runs)
    content = {
        "settings": dict(settings),
        "statements": lines,
        "runs": [vars(run) for run in runs],
    }
    (out / "results.json").write_text(json.dumps(content, indent=1) + "\n")
    text = "\n".join([*_table(runs), "", *(f"- {line}" for line in lines)])
    (out / "results.md").write_text(text + "\n")
    return text


def load_results(out: Path) -> list[Run]:
    """The runs of ``results.json``.

    Raises:
        UserError: It is not there.
    """
    path = out / "results.json"
    if not path.is_file():
        raise UserError(f"{path} is not there. Remedy: name the folder of a study.")
    return [
        Run(
            row["arm"],
            row["seed"],
            {int(group): value for group, value in row["right"].items()},
            {int(group): value for group, value in row["asked"].items()},
            row["loss"],
        )
        for row in json.loads(path.read_text())["runs"]
    ]


def _table(runs: Sequence[Run]) -> list[str]:
    """Lines of a markdown table: a row for each run."""
    headings = [f"needle {describe_group(group)} tokens away" for group in GROUPS]
    lines = [
        "| checkpoint | seed | " + " | ".join([*headings, "loss on short text"]) + " |",
        "|---|" + "---|" * (len(GROUPS) + 2),
    ]
    for run in runs:
        cells = [f"{run.right[g]} of {run.asked[g]}" for g in GROUPS]
        cells = [ARMS[run.arm].label, str(run.seed), *cells, f"{run.loss:.4f}"]
        lines.append("| " + " | ".join(cells) + " |")
    return lines
