"""``trinity-megatron supervise``."""

import argparse
import os
import sys
from collections.abc import Sequence
from pathlib import Path

from trinity_megatron.errors import UserError


def add_parser(commands: argparse._SubParsersAction) -> None:
    """Add the command to the parser of ``trinity-megatron``."""
    parser = commands.add_parser(
        "supervise",
        help="start a training again after a failure",
        description="Run a training; after a failure start it again from the newest whole "
        "checkpoint, with a pause.  Not after an error that has to be mended (exit code 2), and "
        "not without end.  OUT/supervise.log tells the story.",
        epilog="Example: trinity-megatron supervise -- train --preset tiny --data D --out O.  Any "
        "other command with --out can follow too, for example srun over "
        "examples/pretrain_trinity.py (give that --on-damage previous).  See docs/recovery.md.",
        allow_abbrev=False,
    )
    parser.add_argument(
        "--max-failures",
        type=int,
        default=3,
        metavar="N",
        help="give up after N failures in a row in the same step, or 3 N without a new checkpoint "
        "(default: 3)",
    )
    parser.add_argument(
        "--wait",
        type=float,
        default=10.0,
        metavar="SECONDS",
        help="before the next start; doubled with each failure without a new checkpoint, up to 5 "
        "minutes (default: 10)",
    )
    parser.add_argument("run", nargs=argparse.REMAINDER, metavar="-- train FLAGS")
    parser.set_defaults(command=run, takes_further_flags=False)


def run(args: argparse.Namespace, others: Sequence[str]) -> int:
    """Supervise the command behind the flags; return the exit code of its last start.

    Raises:
        UserError: There is no command, or no folder of its run.
    """
    from trinity_megatron.launch.supervise import Patience, supervise

    if args.max_failures < 1 or not 0 <= args.wait <= 3600:
        raise UserError(
            f"--max-failures {args.max_failures} --wait {args.wait:g} is out of range. Remedy: at "
            "least 1 failure, and 0 to 3600 seconds."
        )
    command, out = make_command(args.run[args.run[:1] == ["--"] :])
    patience = Patience(args.max_failures, 3 * args.max_failures, args.wait)
    return supervise(command, Path(out), patience)


def make_command(given: Sequence[str]) -> tuple[list[str], str]:
    """The program to start, and the folder of its run.

    Args:
        given: ``train`` with its flags, or a program with its arguments.

    Raises:
        UserError: There is no command, or no ``--out``.
    """
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    for name in ("--out", "--load", "--save", "--ckpt-step", "--on-damage"):
        parser.add_argument(name)
    parser.add_argument("--non-persistent-ckpt-type")
    parser.add_argument("--ckpt-format", default="torch_dist")
    for name in ("--finetune", "--no-verify-checksums"):
        parser.add_argument(name, action="store_true")
    found, _ = parser.parse_known_args(list(given))
    if not given or not found.out:
        raise UserError(
            "supervise needs a command with the folder of its run. Remedy: trinity-megatron "
            "supervise -- train --data D --out O."
        )
    _refuse_same_start(found)
    if given[0] != "train":
        return list(given), found.out
    command = [sys.executable, "-m", "trinity_megatron.cli", *given]
    if not found.on_damage and (flag := _needs_fail(found)):
        print(f"supervise: with {flag} a damaged checkpoint ends the run", file=sys.stderr)
    elif not found.on_damage:
        command += ["--on-damage", "previous"]
    return command, found.out


def _needs_fail(found: argparse.Namespace) -> str | None:
    """The flag that ``--on-damage previous`` is refused with; see `training/damage.py`."""
    if found.non_persistent_ckpt_type:
        return f"--non-persistent-ckpt-type {found.non_persistent_ckpt_type}"
    if found.ckpt_format != "torch_dist":
        return f"--ckpt-format {found.ckpt_format}"
    return "--no-verify-checksums" if found.no_verify_checksums else None


def _refuse_same_start(found: argparse.Namespace) -> None:
    """Refuse what would let every start begin at the same step."""
    own = os.path.join(found.out, "checkpoints")  # as the training has it
    load, save = (Path(given or own).resolve() for given in (found.load, found.save))
    elsewhere = f"--load {found.load}" if found.load else f"--save {found.save} without --load"
    same = {
        elsewhere: load != save,
        f"--ckpt-step {found.ckpt_step}": found.ckpt_step,
        "--finetune": found.finetune,
    }
    for flag in (flag for flag, is_given in same.items() if is_given):
        raise UserError(
            f"supervise with {flag}: each start would begin there again, and lose the steps since. "
            "Remedy: leave it out to go on with the run in --out, or give --load and --save the "
            "same folder; to begin a run from another checkpoint, --branch-from or "
            "--pretrained-checkpoint."
        )
