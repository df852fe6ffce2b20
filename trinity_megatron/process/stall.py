"""Stall reports: what each rank was doing, and which rank the others wait for.

Each rank writes a record into a folder that all share: no collective and no store can be relied on
while one of them hangs.
"""

from __future__ import annotations

import json
import os
import sysconfig
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from traceback import FrameSummary

_STANDARD_LIBRARY = sysconfig.get_path("stdlib")
# Where a rank waits for others: a collective or a rendezvous.
_COLLECTIVES = tuple(
    f"/torch/distributed/{name}"
    for name in ("distributed_c10d.py", "_functional_collectives.py", "rendezvous.py")
)
_WRAPPERS = ("/torch/distributed/c10d_logger.py", "/torch/utils/_contextlib.py")
_LIBRARIES = ("/torch/", "/megatron/", "/trinity_megatron/")
_MOST_RANKS = 8


@dataclass(frozen=True)
class Stall:
    """Where a rank is.

    Attributes:
        rank: Its number.
        time: Unix time of the record.
        seconds: Since something has happened.
        where: In the run, e.g. ``in step 3``.
        place: Function, file and line.
        collective: What it waits in for other ranks; None where it does not wait for them.
    """

    rank: int
    time: float
    seconds: float
    where: str
    place: str
    collective: str | None


def find_place(stack: Sequence[FrameSummary]) -> tuple[str, str | None]:
    """Where a thread is, and the collective that it waits in, if any.

    Args:
        stack: Of the thread, the innermost frame last.

    Returns:
        Function, file and line outside of the standard library and of torch's collectives; the
        name of the collective or None.
    """
    frames = [frame for frame in stack if not frame.filename.endswith(_WRAPPERS)]
    collective = None
    while frames and frames[-1].filename.endswith(_COLLECTIVES):
        collective = frames.pop().name  # the outermost one is what was called
    if not frames:
        return "?", collective
    last = frames[-1]
    is_handle = any(part in last.filename for part in _LIBRARIES) and ".wait(" in (last.line or "")
    if collective is None and is_handle:
        collective = "wait"
    own = (frame for frame in reversed(frames) if not _is_standard(frame.filename))
    frame = next(own, last)
    place = f"{frame.name}, {frame.filename}:{frame.lineno}"
    if frame is not last:
        place += f" (in {last.name} of {Path(last.filename).name})"
    return place, collective


def _is_standard(filename: str) -> bool:
    return filename.startswith("<frozen") or (
        filename.startswith(_STANDARD_LIBRARY) and "site-packages" not in filename
    )


def write_stall(folder: Path, stall: Stall) -> None:
    """Write the record of a rank; no reader sees half of it."""
    path = record_path(folder, stall.rank)
    path.parent.mkdir(parents=True, exist_ok=True)
    half = path.with_suffix(".half")
    half.write_text(json.dumps(asdict(stall)))
    os.replace(half, path)


def record_path(folder: Path, rank: int) -> Path:
    """The file of a rank's record."""
    return folder / f"rank_{rank:05d}.json"


def read_stalls(folder: Path, world_size: int, since: float) -> list[Stall]:
    """The records of the ranks, in their order.

    Args:
        folder: That they are in.
        world_size: Number of ranks.
        since: Unix time; older ones are of another start.
    """
    stalls = []
    for rank in range(world_size):
        try:
            stall = Stall(**json.loads(record_path(folder, rank).read_text()))
        except (OSError, ValueError, TypeError):
            continue
        if stall.time >= since:
            stalls.append(stall)
    return stalls


def describe_stall(stall: Stall) -> str:
    """Where one rank is."""
    collective = f"{stall.collective}, " if stall.collective else ""
    return (
        f"rank {stall.rank}: nothing has happened for {stall.seconds:.0f} s {stall.where}; it is "
        f"in {collective}{stall.place}"
    )


def describe_hang(stalls: Sequence[Stall], world_size: int) -> str:
    """Which ranks the others wait for, and where these are.

    Args:
        stalls: Records of all ranks that have written one; at least one.
        world_size: Number of ranks.
    """
    first = stalls[0]
    silent = sorted(set(range(world_size)) - {stall.rank for stall in stalls})
    late = [stall for stall in stalls if stall.collective is None]
    if silent:
        head = (
            f"{_name(silent)}: no stacks from {'it' if len(silent) == 1 else 'them'} after "
            f"{first.seconds:.0f} s {first.where}: the process is stopped, its interpreter is "
            "blocked, or it has not begun"
        )
        if late:
            head += "".join(f"; rank {stall.rank} is in {stall.place}" for stall in late[:2])
        return head + _others([stall for stall in stalls if stall.collective is not None])
    if not late:
        return _describe_collectives(stalls)
    head = f"{_name([s.rank for s in late])}: nothing has happened for {late[0].seconds:.0f} s "
    waiting = [stall for stall in stalls if stall.collective is not None]
    return f"{head}{late[0].where}; {_where_late(late)}{_others(waiting)}"


def _describe_collectives(stalls: Sequence[Stall]) -> str:
    """All ranks are in collectives: the few that are in another one than the most are named."""
    (most, count), *_ = Counter((s.collective, s.place) for s in stalls).most_common(1)
    few = [stall for stall in stalls if (stall.collective, stall.place) != most]
    if not few or len(few) >= count:
        listing = "; ".join(f"rank {s.rank} in {s.collective}, {s.place}" for s in stalls[:4])
        who = "all ranks wait in the same collective" if not few else "all ranks wait"
        return (
            f"{_name([s.rank for s in stalls])}: nothing has happened for "
            f"{stalls[0].seconds:.0f} s {stalls[0].where}; {who}, as for a network or a device: "
            f"{listing}"
        )
    where = f"nothing has happened for {few[0].seconds:.0f} s {few[0].where}"
    at = f"in {few[0].collective}, {few[0].place}"
    others = [stall for stall in stalls if (stall.collective, stall.place) == most]
    it = "it is" if len(few) == 1 else f"rank {few[0].rank} is"
    return f"{_name([s.rank for s in few])}: {where}; {it} {at}{_others(others)}"


def _where_late(late: Sequence[Stall]) -> str:
    if len(late) == 1:
        return f"it is in {late[0].place}"
    return f"rank {late[0].rank} is in {late[0].place}"


def _others(waiting: Sequence[Stall]) -> str:
    if not waiting:
        return ""
    places = Counter((stall.collective, stall.place) for stall in waiting)
    (collective, place), _ = places.most_common(1)[0]
    verb = "waits" if len(waiting) == 1 else "wait"
    return f"; {_name_only([s.rank for s in waiting])} {verb} in {collective}, {place}"


def _name(ranks: Sequence[int]) -> str:
    return f"{_name_only(ranks)} {'hangs' if len(ranks) == 1 else 'hang'}"


def _name_only(ranks: Sequence[int]) -> str:
    shown = ", ".join(map(str, ranks[:_MOST_RANKS]))
    more = f" and {len(ranks) - _MOST_RANKS} more" if len(ranks) > _MOST_RANKS else ""
    return f"rank{'s' if len(ranks) > 1 else ''} {shown}{more}"
