"""``--rewind-on-spike``: go back a checkpoint and pass over the batches that a run broke down on.

Where one step after the other is a spike the weights are at fault, and skipping more does not help.
The run ends, and its next start goes on from a checkpoint before the series, without the batches
from there to the end of it.  ``OUT/rewinds.json`` keeps what was decided.  Source of the remedy:
PaLM, section 5.1 (Chowdhery et al., 2022).
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from trinity_megatron.checkpoint.torch_dist.tracker import write_tracker
from trinity_megatron.errors import UserError
from trinity_megatron.process.screen import tell, tell_once
from trinity_megatron.training.damage import find_readable_before
from trinity_megatron.untrusted.json_file import read_json

FILE_NAME = "rewinds.json"
# Of one place; a run that breaks down there a fourth time needs a person.
_MOST_AT_A_PLACE = 3
# A series that begins within so many steps after passed-over ones is of the same place.
_SAME_PLACE = 128


@dataclass(frozen=True)
class Rewind:
    """A decision.

    Attributes:
        back_to: Step of the checkpoint that the run goes on from.
        last: Last step whose batch is passed over; the first is the one after ``back_to``.
    """

    back_to: int
    last: int


def check_rewind(args: argparse.Namespace) -> None:
    """Refuse ``--rewind-on-spike`` where it cannot work; pass over what was decided before.

    Args:
        args: Of the run; ``iterations_to_skip`` is extended.

    Raises:
        UserError: Names the flags and the remedy.
    """
    if not args.rewind_on_spike:
        return
    own = args.out and args.save and args.load and Path(args.save) == Path(args.load)
    reasons = {
        "needs --skip-spikes, which finds the spikes": args.skip_spikes is None,
        "needs --out, in which it keeps what was decided": not args.out,
        "goes back in the run's own folder, not in that of --load": args.out and not own,
        f"with --ckpt-step {args.ckpt_step}, which was asked for": args.ckpt_step is not None,
        "knows the lasting checkpoints of --ckpt-format torch_dist only": (
            args.ckpt_format != "torch_dist" or args.non_persistent_ckpt_type
        ),
    }
    for reason in (words for words, holds in reasons.items() if holds):
        raise UserError(f"--rewind-on-spike {reason}. Remedy: change that, or drop the flag.")
    rewinds = read_rewinds(Path(args.out))
    steps = {step for rewind in rewinds for step in range(rewind.back_to + 1, rewind.last + 1)}
    args.iterations_to_skip = sorted({*args.iterations_to_skip, *steps})
    for rewind in rewinds[-1:]:
        tell_once(
            f"> the batches of steps {rewind.back_to + 1} to {rewind.last} are passed over "
            f"({Path(args.out) / FILE_NAME})"
        )


def rewind(args: argparse.Namespace, first: int, last: int) -> str | None:
    """Decide where to go back to, and let the next start do so; on rank 0.

    Args:
        args: Of the run.
        first: First step of the series of spikes.
        last: Its last step, the present one.

    Returns:
        What is decided, in words; None where there is nothing to go back to.
    """
    folder, past = Path(args.save), read_rewinds(Path(args.out))
    before = first
    here = [each for each in past if each.back_to < first <= each.last + _SAME_PLACE]
    if here:  # going back so far did not help
        before = min(each.back_to for each in here)
    step = find_readable_before(folder, before) if len(here) < _MOST_AT_A_PLACE else None
    if step is None:
        return None
    made = [*past, Rewind(step, last)]
    target = Path(args.out) / FILE_NAME
    fresh = target.with_suffix(".new")
    fresh.write_text(json.dumps([asdict(each) for each in made], indent=1))
    fresh.replace(target)  # first: what is passed over is known before the run goes back
    write_tracker(folder, step)
    tell(f"> --rewind-on-spike: {target} and the tracker file are written", is_error=True)
    return f"the next start goes back to step {step} and passes over the batches up to step {last}"


def read_rewinds(out: Path) -> list[Rewind]:
    """What was decided so far, the oldest first.

    Raises:
        UserError: The file is damaged.
    """
    path = out / FILE_NAME
    if not path.exists():
        return []
    try:
        found = [Rewind(int(each["back_to"]), int(each["last"])) for each in _load(path)]
    except (ValueError, KeyError, TypeError) as error:
        raise UserError(
            f"{path} is damaged ({error}). Remedy: delete it to pass over no batches."
        ) from error
    return found


def _load(path: Path) -> Sequence[dict[str, int]]:
    content = read_json(path)
    if not isinstance(content, list):
        raise TypeError("no list")
    return content
