"""``--on-damage previous``: go back to the newest whole checkpoint where a run cannot be resumed.

Rank 0 looks whether the files of the latest checkpoint are there and can be read, before anything
is built.  Before the load all ranks compare the checksums, each those of its share of the bytes.
What is damaged is set aside under another name, and the tracker file names the newest one before.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import torch

from trinity_megatron.checkpoint.integrity.checks import Checks
from trinity_megatron.checkpoint.integrity.guarded_load import first_message
from trinity_megatron.checkpoint.integrity.safe_pickle import check_named_file
from trinity_megatron.checkpoint.torch_dist.reader import TorchDistReader
from trinity_megatron.checkpoint.torch_dist.tracker import (
    iteration_name,
    read_tracker,
    write_tracker,
)
from trinity_megatron.errors import UserError
from trinity_megatron.process.screen import tell, tell_once
from trinity_megatron.training.first_rank import from_first_rank
from trinity_megatron.upstream.registry import replaced

# No reader of checkpoints looks at such a name.
ASIDE = "damaged_"


def check_on_damage(args: argparse.Namespace) -> None:
    """Refuse ``--on-damage previous`` where no checkpoint can be set aside.

    Raises:
        UserError: Names the flags and the remedy.
    """
    if args.on_damage == "fail":
        return
    flag = f"--on-damage {args.on_damage}"
    reason = ""
    if not (args.load and args.save) or Path(args.load).resolve() != Path(args.save).resolve():
        reason = f"goes back in the run's own folder; --load is {args.load}, --save {args.save}"
    elif args.ckpt_format != "torch_dist" or args.non_persistent_ckpt_type:
        reason = "knows the lasting checkpoints of --ckpt-format torch_dist only"
    elif args.ckpt_step is not None:
        reason = f"would go back from --ckpt-step {args.ckpt_step}, which was asked for"
    elif not args.verify_checksums:
        reason = "needs the checksums that --no-verify-checksums leaves out"
    if reason:
        raise UserError(f"{flag} {reason}. Remedy: drop one of the flags.")


def set_unreadable_aside(folder: Path) -> None:
    """Go back to a checkpoint whose files are all there, without reading the tensors; on rank 0.

    Args:
        folder: Of the run's checkpoints.

    Raises:
        UserError: None is left.
    """
    while (step := latest_step(folder)) is not None:
        if (message := find_damage(folder / iteration_name(step))) is None:
            return
        set_aside(folder, step, message)


def find_damage(folder: Path, rank: int = 0, ranks: int = 0) -> str | None:
    """What is wrong with a checkpoint.

    Args:
        folder: Of an iteration.
        rank: Of this process.
        ranks: That share the tensors; 0: look at what describes them only.

    Returns:
        The message; None if nothing is.

    Raises:
        OSError: This machine cannot read the folder, which says nothing about the checkpoint.
    """
    if not (folder / ".metadata").is_file():
        return f"{folder / '.metadata'} is missing. Remedy: copy the whole checkpoint."
    try:
        reader = TorchDistReader(folder, Checks(quiet=rank != 0))
        if ranks:
            reader.check_all(rank=rank, ranks=ranks)
            others = sorted(folder.glob("mp_rank_*/*.pt"))
            for path in others[rank::ranks]:
                check_named_file(path)
    except (ValueError, FileNotFoundError) as error:
        return str(error)
    return None


def _find_on_rank(folder: Path, rank: int, ranks: int) -> tuple[str | None, str | None]:
    """What is wrong with a checkpoint, and what is wrong with this rank's view of it.

    A file that rank 0 has and another rank does not see is no damage: its disk is not mounted.
    """
    try:
        message = find_damage(folder, rank, ranks)
    except OSError as error:
        return None, f"rank {rank} cannot read {folder} ({error.strerror or error})"
    if message is not None and rank and not (folder / ".metadata").is_file():
        return None, f"rank {rank} does not see {folder / '.metadata'}"
    return message, None


def set_aside(folder: Path, step: int, message: str) -> None:
    """Rename a damaged checkpoint; the tracker file names the newest readable one before it.

    Args:
        folder: Of the run's checkpoints.
        step: The damaged iteration.
        message: What is wrong with it.

    Raises:
        UserError: There is none before it; nothing is renamed.
    """
    before = find_readable_before(folder, step)
    if before is None:
        raise UserError(
            f"--on-damage previous: {message} No whole checkpoint of an earlier step lies beside "
            "it. Remedy: copy it again, or another --out to begin anew."
        )
    damaged = folder / iteration_name(step)
    target = folder / f"{ASIDE}{damaged.name}"
    number = 1
    while target.exists():
        number += 1
        target = folder / f"{ASIDE}{damaged.name}_{number}"
    write_tracker(folder, before)  # first: a kill between the two leaves a named one
    if damaged.exists():
        damaged.rename(target)
    tell(
        f"> {message}\n> --on-damage previous: {target.name} is set aside (it may be deleted), and "
        f"the run goes on from step {before}",
        is_error=True,
    )


def find_readable_before(folder: Path, step: int) -> int | None:
    """The newest iteration below a step whose files are all there; None without one."""
    names = (path.name[5:] for path in folder.glob("iter_*"))
    steps = sorted((int(name) for name in names if name.isdigit()), reverse=True)
    earlier = (number for number in steps if number < step)
    return next((n for n in earlier if find_damage(folder / iteration_name(n)) is None), None)


def latest_step(folder: Path) -> int | None:
    """What the tracker file names; None without one, and for a release."""
    word = read_tracker(folder) or ""
    return int(word) if word.isdigit() else None


@contextmanager
def damage_left_behind(args: argparse.Namespace) -> Iterator[None]:
    """Verify the checkpoint of a resume over all ranks before Megatron loads it.

    Args:
        args: Of the run.
    """
    if args.on_damage == "fail":  # each rank verifies what it loads
        yield
        return

    def make(load: Callable[..., Any]) -> Callable[..., Any]:
        def wrapper(*given: Any, **settings: Any) -> Any:
            leave_damage_behind(Path(args.save), has_schedule=bool(args.step_batch_size_schedule))
            return load(*given, **settings)

        return wrapper

    with replaced("megatron.training.training:load_checkpoint", make):
        yield


def leave_damage_behind(folder: Path, *, has_schedule: bool = False) -> None:
    """Go back until a checkpoint is whole; every rank calls it.

    Args:
        folder: Of the run's checkpoints.
        has_schedule: The batch size follows from the step, and was chosen for the latest one.

    Raises:
        UserError: None is left.
        OSError: A rank cannot read what the others can; nothing is renamed.
        SystemExit: The run has to start anew because its batch size may be another one.
    """
    rank, ranks = torch.distributed.get_rank(), torch.distributed.get_world_size()
    has_gone_back = False
    while (step := from_first_rank(lambda: latest_step(folder))) is not None:
        found, unseen = _find_on_rank(folder / iteration_name(step), rank, ranks)
        message, unseen = first_message(found, lambda: ""), first_message(unseen, lambda: "")
        if unseen is not None:
            raise OSError(f"--on-damage previous: {unseen}. Nothing was set aside.")
        if message is None:
            break
        refusal = from_first_rank(partial(_refusal, folder, step, message))
        if refusal is not None:
            raise UserError(refusal)
        has_gone_back = True
    if has_gone_back and has_schedule:
        tell_once("> --step-batch-size-schedule: the batch may be another one; start again")
        raise SystemExit(1)


def _refusal(folder: Path, step: int, message: str) -> str | None:
    """Why a checkpoint cannot be set aside; None when it is."""
    try:
        set_aside(folder, step, message)
    except (UserError, OSError) as error:
        return str(error)
    return None
