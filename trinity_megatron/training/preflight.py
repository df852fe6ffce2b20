"""What a save, an evaluation and the end of a run need is looked at before the first step."""

from __future__ import annotations

import argparse
import os
import shutil
import tempfile
from pathlib import Path

from trinity_megatron.errors import UserError
from trinity_megatron.model.architecture import flag_of
from trinity_megatron.planner.memory import training_memory
from trinity_megatron.process.screen import tell_once
from trinity_megatron.training.arguments.trinity_config import trinity_config_from_args

_PROBE_BYTES = 1 << 16


def check_folders(args: argparse.Namespace) -> None:
    """Refuse folders that the run cannot write.

    Args:
        args: Of the run, as parsed.

    Raises:
        UserError: Names the flag, the folder and the remedy.
    """
    if args.rank == 0:
        for name in ("out", "save", "data_cache_path"):
            check_writable(flag_of(name), getattr(args, name))
    if args.rank == args.world_size - 1:
        check_writable("--tensorboard-dir", args.tensorboard_dir)


def check_writable(flag: str, name: str | None) -> None:
    """Make a folder, and write to it.

    Raises:
        UserError: That fails; names the flag, the folder and the remedy.
    """
    if not name or "://" in name:
        return
    folder = Path(name)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder) as file:
            file.write(bytes(_PROBE_BYTES))
            file.flush()
            os.fsync(file.fileno())
    except OSError as error:
        raise UserError(
            f"{flag} {folder} cannot be written: {error.strerror}. Remedy: mend that, or name "
            "another folder (for all of them: --out)."
        ) from error


def check_space(args: argparse.Namespace) -> None:
    """Say that the disk has no space for a checkpoint; refuse one that is too small for it.

    Args:
        args: Of the run, after Megatron's checks.

    Raises:
        UserError: The disk is smaller than a checkpoint.
    """
    if not args.save or "://" in args.save or args.rank != 0:
        return
    disk, needed = shutil.disk_usage(args.save), checkpoint_bytes(args)
    if not disk.total or disk.free >= needed:  # some network filesystems say 0
        return
    what = (
        f"--save {args.save}: a checkpoint takes about {format_bytes(needed)}, and "
        f"{format_bytes(disk.free)} of {format_bytes(disk.total)} are free"
    )
    if disk.total < needed:
        raise UserError(f"{what}. Remedy: another --out (or --save), on a larger disk.")
    tell_once(f"> WARNING: {what}; the first save will fail unless space is made there")


def checkpoint_bytes(args: argparse.Namespace) -> int:
    """Bytes of a checkpoint, by arithmetic: weights and the state of the optimizer.

    Args:
        args: Of the run, after Megatron's checks.
    """
    held = training_memory(
        trinity_config_from_args(args),
        seq_length=args.seq_length,
        weight_bytes=2 if args.bf16 or args.fp16 else 4,
        optimizer="muon" if args.optimizer == "muon" else "adam",
    )
    return held.weights + (0 if args.no_save_optim else held.optimizer)


def format_bytes(number: int) -> str:
    """A number of bytes in the unit that fits it."""
    units = ("bytes", "kB", "MB", "GB", "TB")
    power = min((len(str(number)) - 1) // 3, len(units) - 1)
    return f"{number / 1000**power:.3g} {units[power]}"
