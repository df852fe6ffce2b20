"""Checks of ``--evaluate-every``, at the start of a run."""

from __future__ import annotations

import argparse
from pathlib import Path

from trinity_megatron.errors import UserError
from trinity_megatron.evaluation.task_choice import (
    check_folder,
    check_numbers,
    check_package,
    split_names,
)
from trinity_megatron.model.architecture import flag_of
from trinity_megatron.training.resume import get_tokenizer_folder

_FLAG = "--evaluate-every"
# What a run does not evaluate with: (dest, value that is fine) -> reason.
_REFUSED: tuple[tuple[str, tuple[object, ...], str], ...] = (
    ("pipeline_model_parallel_size", (1, None), "no rank has all layers"),
    ("context_parallel_size", (1, None), "no rank reads a whole sequence"),
    ("use_megatron_fsdp", (False,), "no rank has the weights whole"),
    ("use_torch_fsdp2", (False,), "no rank has the weights whole"),
    ("fp8", (None,), "the length of a question is no multiple of FP8's blocks"),
)


def check_evaluation(args: argparse.Namespace) -> None:
    """Refuse an evaluation that this run cannot make.

    Raises:
        UserError: Names the flag, its value and the remedy.
    """
    if args.evaluate_every is None:
        for name in ("evaluate_tasks", "evaluate_data", "evaluate_limit"):
            if (value := getattr(args, name)) is not None:
                raise UserError(
                    f"{flag_of(name)} {value} without {_FLAG}: nothing is evaluated. Remedy: "
                    f"{_FLAG} N."
                )
        return
    check_numbers(evaluate_every=args.evaluate_every, evaluate_limit=args.evaluate_limit)
    given = f"{_FLAG} {args.evaluate_every}"
    if args.evaluate_tasks is None:
        raise UserError(f"{given} names no task. Remedy: --evaluate-tasks NAME,NAME.")
    split_names(args.evaluate_tasks)
    if not args.out:
        raise UserError(f"{given} has no place for its results. Remedy: --out DIR.")
    for name, fine, reason in _REFUSED:
        if (value := getattr(args, name)) not in fine:
            said = flag_of(name) if value is True else f"{flag_of(name)} {value}"
            raise UserError(
                f"{given} with {said}: {reason}. Remedy: trinity-megatron evaluate on the "
                "checkpoints, in another layout."
            )
    if get_tokenizer_folder(args) is None:
        raise UserError(f"{given}: the run has no tokenizer of Hugging Face. Remedy: --data DIR.")
    check_folder(Path(args.evaluate_data) if args.evaluate_data else None, "--evaluate-data")
    check_package()
