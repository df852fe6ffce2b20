"""Which rank is named: the one that the others wait for."""

import json
import time
import traceback
from dataclasses import asdict, replace
from pathlib import Path
from traceback import FrameSummary

from trinity_megatron.process.stall import (
    Stall,
    describe_hang,
    find_place,
    read_stalls,
    record_path,
    write_stall,
)

SITE = "/env/lib/python3.12/site-packages"
LATE = Stall(2, 0.0, 180.0, "in step 3", "read_batch, /home/me/data.py:7", None)
SUM = "finalize_model_grads, /env/megatron/finalize.py:9"


def waiting(*ranks: int, collective: str = "all_reduce", place: str = SUM) -> list[Stall]:
    return [Stall(rank, 0.0, 180.0, "in step 3", place, collective) for rank in ranks]


def frame(file: str, name: str, line: int = 1, text: str = "pass") -> FrameSummary:
    return FrameSummary(file, line, name, line=text)


def test_a_rank_outside_of_collectives_is_the_one() -> None:
    assert describe_hang(sorted([*waiting(0, 1, 3), LATE], key=lambda s: s.rank), 4) == (
        "rank 2 hangs: nothing has happened for 180 s in step 3; it is in read_batch, "
        f"/home/me/data.py:7; ranks 0, 1, 3 wait in all_reduce, {SUM}"
    )


def test_several_outside_of_collectives() -> None:
    text = describe_hang([LATE, replace(LATE, rank=3)], 4)
    assert text.startswith("ranks 0, 1 hang: no stacks from them after 180 s in step 3: ")
    assert "; rank 2 is in read_batch, /home/me/data.py:7; rank 3 is in read_batch" in text
    everyone = describe_hang([replace(LATE, rank=rank) for rank in range(20)], 20)
    assert everyone.startswith("ranks 0, 1, 2, 3, 4, 5, 6, 7 and 12 more hang: nothing has")


def test_a_silent_rank_is_the_one() -> None:
    text = describe_hang(waiting(0, 1, 3), 4)
    assert text.startswith("rank 2 hangs: no stacks from it after 180 s in step 3: ")
    assert text.endswith(f"; ranks 0, 1, 3 wait in all_reduce, {SUM}")


def test_the_rank_in_another_collective_than_the_most_is_the_one() -> None:
    stalls = [
        *waiting(0, 1),
        *waiting(2, collective="recv", place="mine, /home/me/x.py:5"),
        *waiting(3),
    ]
    assert describe_hang(stalls, 4) == (
        "rank 2 hangs: nothing has happened for 180 s in step 3; it is in recv, mine, "
        f"/home/me/x.py:5; ranks 0, 1, 3 wait in all_reduce, {SUM}"
    )


def test_nobody_is_named_alone_where_nothing_tells_them_apart() -> None:
    for stalls in (waiting(0, 1), [*waiting(0), *waiting(1, collective="recv")]):
        text = describe_hang(stalls, 2)
        assert text.startswith("ranks 0, 1 hang: nothing has happened for 180 s in step 3; all ")


def test_the_place_is_outside_of_torch_and_of_the_standard_library() -> None:
    ours = frame("/home/me/data.py", "read_batch", 7)
    stdlib = str(Path(traceback.__file__).parent)
    assert find_place([ours, frame(f"{stdlib}/selectors.py", "select")]) == (
        "read_batch, /home/me/data.py:7 (in select of selectors.py)",
        None,
    )
    c10d = f"{SITE}/torch/distributed/distributed_c10d.py"
    wrapper = frame(f"{SITE}/torch/distributed/c10d_logger.py", "wrapper")
    barrier = [ours, wrapper, frame(c10d, "barrier"), wrapper, frame(c10d, "all_reduce")]
    assert find_place(barrier) == ("read_batch, /home/me/data.py:7", "barrier")
    handle = frame(f"{SITE}/megatron/core/p2p.py", "recv_forward", 9, "req.wait()")
    assert find_place([ours, handle])[1] == "wait"
    # A save that writes is in torch's folder for distributed checkpoints, and waits for no rank.
    writer = frame(f"{SITE}/torch/distributed/checkpoint/filesystem.py", "write_data")
    assert find_place([ours, writer])[1] is None


def test_records_of_an_earlier_start_and_damaged_ones_do_not_count(tmp_path: Path) -> None:
    now = time.time()
    for rank, age in ((0, 0), (1, 100), (2, 0), (7, 0)):
        write_stall(tmp_path, replace(LATE, rank=rank, time=now - age))
    record_path(tmp_path, 2).write_text(json.dumps(asdict(LATE))[:-9])
    assert [stall.rank for stall in read_stalls(tmp_path, 4, now - 50)] == [0]
