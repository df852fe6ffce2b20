"""What a run comes from: in its checkpoints, in W&B's config and on the model card of an export."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from trinity_megatron.errors import UserError

Lineage = dict[str, Any]
"""Plain values, ``args.lineage`` of a run that began at the checkpoint of another one:

``parent``, ``step`` (None for a converted checkpoint), ``consumed_tokens`` there, and ``before``,
the lineage of the parent or None.  A run that started anew has ``seq_length``; a branch has
``consumed_samples``, ``anneal_tokens``, ``anneal_style``, ``num_samples`` (its own) and
``annealing``, the fields of :class:`.annealing.Annealing`.
"""


def check_lineage(saved: object, args: argparse.Namespace) -> None:
    """Refuse to go on with a branch without its flags: it would leave its schedule.

    Args:
        saved: Arguments of the run that saved the checkpoint.
        args: Of the run that resumes.

    Raises:
        UserError: Names the flags.
    """
    lineage = getattr(saved, "lineage", None)
    if lineage is None or "annealing" not in lineage or args.lineage is not None:
        return
    raise UserError(
        f"--load {args.load} is a branch of {lineage['parent']}, which this run would go on with "
        f"as if it were none. Remedy: the same command again, with --branch-from "
        f"{lineage['parent']} --branch-step {lineage['step']} --anneal-tokens "
        f"{lineage['anneal_tokens']} --anneal-style {lineage['anneal_style']}; or --finetune, or "
        "--pretrained-checkpoint with another --out."
    )


def describe_start(
    saved: object, step: int | None, folder: Path, args: argparse.Namespace
) -> Lineage:
    """The lineage of a run that starts anew from a checkpoint.

    Args:
        saved: Arguments of the run that saved the checkpoint.
        step: Its iteration; None for a converted one.
        folder: Where it lies.
        args: Of the run that starts.
    """
    samples = getattr(saved, "consumed_train_samples", 0) or 0
    return {
        "parent": str(folder.resolve()),
        "step": step,
        "consumed_tokens": samples * (getattr(saved, "seq_length", 0) or 0),
        "seq_length": args.seq_length,
        "before": getattr(saved, "lineage", None),
    }
