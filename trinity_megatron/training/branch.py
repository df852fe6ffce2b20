"""Branches: a run that begins at a checkpoint of another one, and anneals its learning rate to 0.

The parent is only read and may go on meanwhile.
"""

from __future__ import annotations

import argparse
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from trinity_megatron.checkpoint.torch_dist.tracker import RELEASE, TRACKER_NAME, read_tracker
from trinity_megatron.data.mixture.quantities import parse_tokens
from trinity_megatron.errors import UserError
from trinity_megatron.model.architecture import flag_of
from trinity_megatron.process.screen import tell_once
from trinity_megatron.training.annealing import Annealing
from trinity_megatron.training.arguments.schedule import BatchSizes
from trinity_megatron.training.damage import find_readable_before
from trinity_megatron.training.lineage import Lineage
from trinity_megatron.training.resume import check_step, find_newest, read_saved_state

_RATES = ("lr", "min_lr", "decoupled_lr", "decoupled_min_lr", "optimizer")


def prepare_branch(args: argparse.Namespace) -> None:
    """Let a branch start from its parent, or go on from its own checkpoints.

    Sets ``args.lineage``; of a branch also its length, and at its first start what it loads.  Every
    rank reads the small part of the checkpoint that says so.

    Args:
        args: Of the run; changed.

    Raises:
        UserError: Names the flag, its value and the remedy.
    """
    args.lineage = None
    if args.branch_from is None:
        for name in ("branch_step", "anneal_tokens"):
            if getattr(args, name) is not None:
                raise UserError(
                    f"{flag_of(name)} {getattr(args, name)} without --branch-from. Remedy: "
                    "--branch-from DIR, the folder of the run to branch from."
                )
        return
    tokens = _check_flags(args)
    own = Path(args.save)
    step = read_tracker(own)
    begun = int(step) if step and step.isdigit() else find_newest(own)
    if begun is not None and args.on_damage == "previous":
        begun = find_readable_before(own, begun + 1) or begun
    if begun is None:
        args.lineage = _begin(args, tokens)
    else:
        saved, _ = read_saved_state(own, begun, verify_checksums=args.verify_checksums)
        args.lineage = getattr(saved.get("args"), "lineage", None)
        _check_is_same(args, tokens)
    args.train_iters = None
    args.train_samples = args.lineage["consumed_samples"] + args.lineage["num_samples"]


def annealing_of(lineage: Lineage | None) -> Annealing | None:
    """The schedule of a branch; None for other runs."""
    if lineage is None or "annealing" not in lineage:
        return None
    return Annealing(**lineage["annealing"])


def _check_flags(args: argparse.Namespace) -> int:
    """Check the flags of a branch; return its tokens."""
    if args.anneal_tokens is None:
        raise UserError(
            f"--branch-from {args.branch_from} without --anneal-tokens. Remedy: --anneal-tokens "
            "with the length of the branch, e.g. 100B."
        )
    try:
        tokens = parse_tokens(args.anneal_tokens)
    except ValueError as error:
        raise UserError(f"--anneal-tokens: {error}. Remedy: e.g. 100B or 2.5M.") from error
    if args.save is None:
        raise UserError(
            f"--branch-from {args.branch_from} without a folder of its own. Remedy: --out DIR."
        )
    for name in ("finetune", "pretrained_checkpoint", "ckpt_step", "skip_train"):
        if getattr(args, name):
            raise UserError(
                f"{flag_of(name)} with --branch-from {args.branch_from}: a branch starts from that "
                "run and goes on from its own checkpoints. Remedy: drop one of the two "
                "(--branch-step names the step)."
            )
    return tokens


def _begin(args: argparse.Namespace, tokens: int) -> Lineage:
    """The first start: load the parent."""
    parent = _find_checkpoints(Path(args.branch_from))
    if parent.resolve() == Path(args.save).resolve():
        raise UserError(
            f"--branch-from {args.branch_from} is the folder of this run. Remedy: another --out."
        )
    word = read_tracker(parent) or ""
    if word == RELEASE:
        raise UserError(
            f"--branch-from {args.branch_from} is a converted checkpoint, without optimizer and "
            f"position in the data. Remedy: --pretrained-checkpoint {args.branch_from} with a "
            "schedule of your own."
        )
    step = args.branch_step or (int(word) if word.isdigit() else find_newest(parent))
    if step is None:
        raise UserError(f"--branch-from {args.branch_from} holds no checkpoint yet. Remedy: wait.")
    if args.branch_step is None and args.world_size > 1:
        raise UserError(
            f"--branch-from {args.branch_from} without --branch-step: the run may save while the "
            f"ranks of this one start, and each would take another checkpoint. Remedy: "
            f"--branch-step {step}, the newest one now."
        )
    check_step(step, parent)
    common, step = read_saved_state(
        parent, step, "--branch-from", verify_checksums=args.verify_checksums
    )
    saved = common["args"]
    _check_rates(saved, args)
    args.load, args.ckpt_step = str(parent), step
    args.allow_data_change = True  # check_data says what has changed
    consumed = saved.consumed_train_samples
    batches = BatchSizes.of(args)
    wanted = consumed + -(-tokens // args.seq_length)
    num_samples = batches.samples_after(batches.steps_of(wanted)) - consumed
    lineage: Lineage = {
        "parent": str(parent.resolve()),
        "step": step,
        "consumed_samples": consumed,
        "consumed_tokens": consumed * saved.seq_length,
        "anneal_tokens": tokens,
        "anneal_style": args.anneal_style,
        "num_samples": num_samples,
        "annealing": _anneal(common, num_samples, args.anneal_style),
        "before": getattr(saved, "lineage", None),
    }
    rate = Annealing(**lineage["annealing"]).rate_at(
        common["opt_param_scheduler"]["num_steps"], saved.lr, saved.min_lr
    )
    if rate <= 0:
        raise UserError(
            f"--branch-from {args.branch_from}: its learning rate is 0 at step {step}, which "
            "leaves nothing to anneal. Remedy: an earlier --branch-step."
        )
    tell_once(
        f"> branch of {parent} at step {step} ({consumed} samples): the learning rate goes from "
        f"{rate:.4g} to 0 ({args.anneal_style}) over {num_samples} samples"
    )
    return lineage


def _find_checkpoints(folder: Path) -> Path:
    """The checkpoints of a run, from its ``--out`` or its ``--save``."""
    for path in (folder / "checkpoints", folder):
        if (path / TRACKER_NAME).is_file() or find_newest(path) is not None:
            return path
    raise UserError(
        f"--branch-from {folder} holds no checkpoint (no {TRACKER_NAME}). Remedy: the --out of a "
        "run that has saved, or what its --save was."
    )


def _check_rates(saved: Any, args: argparse.Namespace) -> None:
    for name in _RATES:
        before, now = getattr(saved, name, None), getattr(args, name)
        if before != now:
            raise UserError(
                f"{flag_of(name)} {now}: --branch-from {args.branch_from} was trained with "
                f"{before}, from which the branch anneals. Remedy: {flag_of(name)} {before} (the "
                "flags of that run)."
            )


def _anneal(common: Mapping[str, Any], num_samples: int, style: str) -> dict[str, Any]:
    """Fields of :class:`.Annealing`."""
    saved, state = common["args"], common["opt_param_scheduler"]
    start = state["num_steps"]
    if parent := annealing_of(getattr(saved, "lineage", None)):
        kept = {"schedule": parent.schedule, "held_at": parent.held_at}
        kept["factor"] = parent.share(start)
    else:
        decay = saved.lr_wsd_decay_samples
        if decay is None and saved.lr_wsd_decay_iters is not None:
            decay = saved.lr_wsd_decay_iters * saved.global_batch_size
        schedule = {name: state[name] for name in _SCHEDULE_FIELDS}
        schedule["init_lr"] = saved.lr_warmup_init
        schedule["wsd_decay_steps"] = decay
        schedule["lr_wsd_decay_style"] = saved.lr_wsd_decay_style
        kept = {"schedule": schedule, "held_at": start, "factor": 1.0}
    return {**kept, "start": start, "length": num_samples, "style": style}


# Of the state of Megatron's scheduler.
_SCHEDULE_FIELDS = ("lr_warmup_steps", "lr_decay_steps", "lr_decay_style")


def _check_is_same(args: argparse.Namespace, tokens: int) -> None:
    """A branch goes on as it has begun; its parent may be gone or moved."""
    lineage = args.lineage
    if annealing_of(lineage) is None:
        raise UserError(
            f"--branch-from {args.branch_from}: {args.save} holds a run that is no branch. "
            "Remedy: another --out."
        )
    asked = {
        "branch_step": (args.branch_step, lineage["step"]),
        "anneal_tokens": (tokens, lineage["anneal_tokens"]),
        "anneal_style": (args.anneal_style, lineage["anneal_style"]),
    }
    for name, (now, before) in asked.items():
        if now is not None and now != before:
            raise UserError(
                f"{flag_of(name)} {now}: the branch in {args.save} was begun with {before}. "
                f"Remedy: {flag_of(name)} {before}, or another --out for another branch."
            )
