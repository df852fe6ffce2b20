"""What the sweep of all flags tries, what it expects, and the table that it documents."""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tomllib
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

from tests.functional_tests.launch import environment
from trinity_megatron.training.arguments.unsupported import Reason, load_reasons

HERE = Path(__file__).parent
DOCUMENT = HERE.parents[1] / "docs" / "flags.md"
# A model that trains 4 steps in a second; no --out, so that a run saves nothing unless it is asked.
BASE = (
    "--preset tiny --seq-length 64 --micro-batch-size 4 --num-layers 2 "
    "--hidden-size 64 --ffn-hidden-size 96 --moe-ffn-hidden-size 32 --num-experts 8 "
    "--moe-router-topk 2 --moe-shared-expert-intermediate-size 32 --global-attn-every-n-layers 2 "
    "--train-iters 4 --eval-iters 0 --log-interval 1 --data {data} --tensorboard-dir {run}/log "
    "--data-cache-path {run}/cache"
)
_SAVED = f"{BASE} --save {{saved}} --save-interval 4 --data-cache-path {{saved}}_cache"
_TRACE = "Traceback (most recent call last)"


@dataclass(frozen=True)
class Trial:
    """A flag, its value with what that needs beside it, and the number of ranks."""

    flag: str
    rest: str
    ranks: int


@dataclass(frozen=True)
class Outcome:
    """What a run with a flag came to: ``works``, ``no effect``, ``refused`` or ``fails``."""

    kind: str
    message: str


@cache
def _trials() -> dict[str, Any]:
    return tomllib.loads((HERE / "flag_trials.toml").read_text())


def load_trials() -> list[Trial]:
    """One trial for each flag."""
    tables = (("one_rank", 1), ("two_ranks", 2))
    return [Trial(*item, ranks) for name, ranks in tables for item in _trials()[name].items()]


def refused_elsewhere() -> dict[str, str]:
    """Flags that other checks than the table of reasons refuse, and a part of what those say."""
    return _trials()["refused"]


@cache
def reasons() -> dict[str, Reason]:
    """The table of reasons by flag."""
    return {flag: reason for reason in load_reasons() for flag in reason.flags}


# What they ask for holds without them: a switch that is on, or one that is on with a GPU only.
ALREADY_SO = (
    "--disable-bias-linear",
    "--qk-layernorm",
    "--attention-output-gate",
    "--calculate-per-token-loss",
    "--moe-router-enable-expert-bias",
    "--group-query-attention",
    "--yarn-correction-range-round-to-int",
    "--swiglu",
    "--untie-embeddings-and-output-weights",
    "--no-masked-softmax-fusion",
    "--no-rope-fusion",
    "--no-persist-layer-norm",
    "--no-gradient-accumulation-fusion",
    "--override-opt_param-scheduler",
    "--dist-ckpt-optim-fully-reshardable",
    "--no-create-attention-mask-in-dataloader",
)


def run_trials(
    trials: Iterable[Trial], data: Path, folder: Path, *, timeout: float
) -> Iterator[tuple[Trial, Outcome]]:
    """Run all trials in children of one process; see ``flag_server.py``.

    Args:
        trials: What to try.
        data: Prepared data.
        folder: For the checkpoint that some runs start from, and the results.
        timeout: Seconds for all of them.
    """
    by_flag = {trial.flag: trial for trial in trials}
    plan = [{"name": "", "flags": _SAVED, "ranks": 1, "first": True}] + [
        {"name": t.flag, "flags": f"{BASE} {t.flag} {t.rest}", "ranks": t.ranks}
        for t in by_flag.values()
    ]
    for job in plan:
        flags = job["flags"].replace("{data}", str(data)).replace("{saved}", str(folder / "saved"))
        job["flags"] = flags.split()
    (folder / "plan.json").write_text(json.dumps(plan))
    command = ["nice", "-n", "5", sys.executable, str(HERE / "flag_server.py")]
    command += ["plan.json", "results.jsonl"]
    env = {**environment(), "GLOO_SOCKET_IFNAME": "lo"}
    result = subprocess.run(command, cwd=folder, env=env, timeout=timeout, capture_output=True)
    assert result.returncode == 0, result.stderr.decode()[-4000:]
    for line in (folder / "results.jsonl").read_text().splitlines():
        run = json.loads(line)
        outcome = judge(run["name"], run["code"], run["output"])
        if run["name"]:
            yield by_flag[run["name"]], outcome
        else:
            assert outcome.kind == "works", outcome


def judge(flag: str, code: int, output: str) -> Outcome:
    """What a run with the flag came to.

    Args:
        flag: That was tried.
        code: Exit code.
        output: All that the ranks printed.
    """
    lines = output.splitlines()
    tail = "\n".join(lines[-15:])
    if _TRACE in output or code not in (0, 2):
        return Outcome("fails", f"exit code {code}: {tail}")
    said = [line for line in lines if line.startswith(f"> {flag}") and "has no effect" in line]
    if code == 0:
        return Outcome("no effect" if said else "works", "".join(said[:1]))
    errors = [line for line in lines if line.startswith("error: ")]
    if not errors or "Remedy: " not in errors[0]:
        return Outcome("fails", f"exit code {code} without a remedy: {tail}")
    return Outcome("refused", errors[0])


def is_expected(flag: str, outcome: Outcome) -> bool:
    """Whether a flag came to what the tables say."""
    if text := refused_elsewhere().get(flag):
        return outcome.kind == "refused" and text in outcome.message
    reason = reasons().get(flag)
    if reason is None or flag in ALREADY_SO:
        return outcome.kind == "works"
    unfollowed = "refused" if reason.refused else "no effect"
    if outcome.kind == unfollowed:
        return flag in outcome.message and str(reason.refused or reason.ignored) in outcome.message
    return outcome.kind == "works" and bool(reason.unless)


def describe(flag: str) -> str:
    """The cell of a flag in the table of the documentation."""
    if text := refused_elsewhere().get(flag):
        return f"refused: {text}"
    reason = reasons().get(flag)
    if flag in ALREADY_SO:
        return "holds already"
    if reason is None:
        return "works"
    if reason.unless == ("cuda",):
        return "needs a GPU" if reason.refused else "no effect without a GPU"
    why = f"{reason.refused}; {reason.remedy}" if reason.refused else reason.ignored
    kind = "refused" if reason.refused else "no effect"
    if not reason.unless:
        return f"{kind}: {why}"
    condition = " or ".join(map(_condition, reason.unless))
    return f"works with {condition}; else {kind}" + (f": {why}" if reason.refused else "")


def _condition(text: str) -> str:
    return " and ".join(_part(part) for part in text.split("+"))


def _part(text: str) -> str:
    if text.startswith("package:"):
        return f"the package `{text.removeprefix('package:')}`"
    words = {"data=None": "no `--data`", "cuda": "a GPU", "raw_text": "raw text in `--data`"}
    words["world_size>1"] = "more than one rank"
    if text in words:
        return words[text]
    name, equal, value = text.partition("=")
    name, more, _ = name.partition(">")
    names = {"fp8": "fp8_format", "nccl_ub": "use_nccl_ub"}
    flag = f"--{names.get(name, name).replace('_', '-')}"
    return f"`{flag} {value.replace('|', '/')}`" if equal else f"`{flag}{' N' if more else ''}`"


def render(parser: argparse.ArgumentParser) -> str:
    """The document of all flags: one table for each group of the parser."""
    lines = [_HEAD]
    for group in parser._action_groups:
        flags = [flag for action in group._group_actions for flag in _names(action)]
        if flags:
            lines += [f"## {group.title}", "", "| flag | in a Trinity run |", "|---|---|"]
            lines += [f"| `{flag}` | {describe(flag)} |" for flag in flags] + [""]
    return "\n".join(lines)


def flags_of(parser: argparse.ArgumentParser) -> list[str]:
    """The flags that the tables have to know: the first name of each action."""
    return [flag for action in parser._actions for flag in _names(action)]


def _names(action: argparse.Action) -> list[str]:
    return [] if action.dest == "help" else action.option_strings[:1]


_HEAD = """# Megatron's flags in a Trinity run

Every flag of Megatron-Core 0.19.2 is one of these: it *works* (the run follows it), it has *no
effect* here and the run says so at its start, or it is *refused* with the reason and a remedy.
None is ignored in silence.  A flag counts as given where its value is not the default; a switch
that *holds already* asks for what Trinity's defaults are.

This file is generated: `python -m tests.functional_tests.test_all_flags --all` trains four steps
with each flag on a CPU, compares what happens with the tables
(`trinity_megatron/training/arguments/unsupported_flags.toml`,
`tests/functional_tests/flag_trials.toml`), and writes it.  What *needs a GPU* was not run.
"""
