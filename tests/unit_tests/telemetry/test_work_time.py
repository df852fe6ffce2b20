"""The work of a step is what is left of it without the waits, once the device has come there."""

import inspect
import re

import pytest
import torch

from trinity_megatron.telemetry.work_time import WorkClock
from trinity_megatron.upstream.entries import WAITS


class Timeline:
    """Marks of a device that runs behind the host: those up to ``reached`` are past."""

    def __init__(self) -> None:
        self.time = 0.0
        self.reached = float("inf")

    def now(self) -> float:
        return self.time

    def is_past(self, mark: float) -> bool:
        return mark <= self.reached

    def seconds(self, start: float, end: float) -> float:
        return end - start

    def pass_by(self, seconds: float) -> float:
        self.time += seconds
        return seconds


def step(clock: WorkClock, timeline: Timeline, work: float, wait: float) -> None:
    clock.start()
    timeline.pass_by(work / 2)
    assert clock.without(timeline.pass_by)(wait) == wait
    timeline.pass_by(work / 2)
    clock.stop()


def test_waits_are_no_work() -> None:
    timeline = Timeline()
    clock = WorkClock(timeline, window=3)
    for work, wait in ((1.0, 5.0), (2.0, 0.0), (4.0, 1.0), (8.0, 2.0)):
        step(clock, timeline, work, wait)
        clock.without(timeline.pass_by)(100.0)  # between two steps
    assert clock.work() == (2.0, 4.0, 8.0)
    clock.clear()
    assert clock.work() == ()


def test_a_step_that_the_device_has_not_ended_comes_later() -> None:
    timeline = Timeline()
    clock = WorkClock(timeline, window=8)
    timeline.reached = 4.5
    for _ in range(3):  # they end at 3, 6 and 9
        step(clock, timeline, 2.0, 1.0)
    assert clock.work() == (2.0,)
    timeline.reached = 9.0
    assert clock.work() == (2.0, 2.0, 2.0)


def test_a_wait_that_fails_counts_and_its_error_is_seen() -> None:
    timeline = Timeline()
    clock = WorkClock(timeline, window=8)

    def fail() -> None:
        timeline.pass_by(7.0)
        raise RuntimeError("the connection is closed")

    clock.start()
    timeline.pass_by(1.0)
    with pytest.raises(RuntimeError, match="closed"):
        clock.without(fail)()
    clock.stop()
    assert clock.work() == (1.0,)


def test_all_collectives_of_torch_are_known() -> None:
    source = inspect.getsource(torch.distributed.distributed_c10d)
    called = set(re.findall(r"\bgroup\.(\w+)\(", source))
    called -= {"rank", "size", "_get_backend", "_start_coalescing"}  # nobody waits in them
    known = {target.rpartition(".")[2] for target in WAITS}
    assert len(called) > 10 and called <= known, called - known
