"""``kill -9`` at random moments of saves: what was reported is there, and the next start goes on.

TRINITY_TESTS=all kills 200 times (half an hour on two cores), ``make test`` 20 times.
"""

import itertools
import json
import random
from pathlib import Path

import pytest

from tests.functional_tests.launch import TAKES_ALL, Job, train

pytestmark = [pytest.mark.distributed, pytest.mark.slow]

FLAGS = (
    "--train-iters 4000 --save-interval 1 --keep-last 2 --lr-warmup-fraction 0.01 "
    "--no-one-logger --num-layers 4"
)
# Number of ranks, further flags, how many kills in `make test` and in all, and within how many
# seconds after the save that starts the clock: the process of an asynchronous save starts slowly.
WORLDS = {
    "1": (1, "", 12, 50, 3.0),
    "4": (4, "--expert-model-parallel-size 2", 3, 50, 6.0),
    "1-async": (1, "--async-save", 4, 50, 2.0),
    "4-async": (4, "--async-save --expert-model-parallel-size 2", 1, 50, 4.0),
}


def steps(path: Path) -> list[int]:
    return [int(word) for word in path.read_text().split()] if path.exists() else []


@pytest.mark.parametrize("world", WORLDS)
def test_nothing_reported_is_lost(world: str, data: Path, tmp_path: Path) -> None:
    ranks, flags, sample, number, seconds = WORLDS[world]
    draw = random.Random(world)
    checkpoints, worlds, folders = tmp_path / "checkpoints", [], []
    for start in range(number if TAKES_ALL else sample):
        folder = tmp_path / f"start_{start:03d}"
        folder.mkdir()
        kill = {
            "folder": str(folder),
            "save": 1 if "async" in flags else 0,
            "seconds": draw.uniform(0, seconds),
        }
        folders.append(folder)
        given = f"{FLAGS} {flags}"
        worlds.append((ranks, [Job("run", given, checkpoints=checkpoints, probe={"kill": kill})]))
    for few in itertools.batched(worlds, 5):  # a plan has its time limit
        train(data, tmp_path, list(few))
    reported, before = 0, None
    for folder in folders:
        left = json.loads((folder / "left.json").read_text())
        begun = steps(folder / "begun")
        assert left["damage"] is None
        # Each start goes on from what the one before has left.
        assert begun and begun[0] == (before or 0) + 1
        reported = max([reported, *steps(folder / "reported")])
        assert (left["step"] or 0) >= reported
        before = left["step"]
    assert reported > 0 or len(folders) < 3
