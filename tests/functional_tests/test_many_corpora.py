"""How often each rank of a run opens the files of a mixture of many corpora."""

import json
import os
import shutil
from pathlib import Path

import pytest

from tests.functional_tests.launch import Job, Logs, train

pytestmark = [pytest.mark.distributed, pytest.mark.slow]

CORPORA, RANKS = 40, 2
NAMES = [f"corpus{number}" for number in range(CORPORA)]
# 80 sequences: two of each corpus; and an evaluation has a sequence of each.
FLAGS = "--train-iters 10 --exit-interval 1 --eval-iters 5"


@pytest.fixture(scope="module")
def folder(data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("many")
    for name in NAMES:
        shutil.copytree(data, folder / name, copy_function=os.link)
    corpora = ", ".join(f"{name}: {{path: {name}}}" for name in NAMES)
    weights = ", ".join(f"{name}: 1" for name in NAMES)
    text = f"corpora: {{{corpora}}}\nphases: [{{weights: {{{weights}}}}}]\n"
    for order in ("shuffled", "rsdb"):
        (folder / f"{order}.yaml").write_text(f"{text}order: {order}")
    return folder


@pytest.fixture(scope="module")
def logs(data: Path, folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Logs:
    """A step of a run in each order."""

    def job(order: str) -> Job:
        opened = {"below": str(folder), "prefix": str(folder / f"{order}.opened")}
        return Job(order, f"{FLAGS} --data {folder / order}.yaml", probe={"opened": opened})

    apart = tmp_path_factory.mktemp("runs")
    return train(data, apart, [(RANKS, [job("shuffled"), job("rsdb")])])


@pytest.mark.parametrize("order", ["shuffled", "rsdb"])
def test_a_file_is_read_once_for_all_ranks(order: str, logs: Logs, folder: Path) -> None:
    assert logs
    for rank in range(RANKS):
        counts = json.loads((folder / f"{order}.opened.{rank}").read_text())
        for name in [name for name in counts if "/tokenizer/" in name]:
            assert name.startswith("corpus0/")  # the tokenizer of the run
            del counts[name]
        assert counts == budget(order, rank)


def budget(order: str, rank: int) -> dict[str, int]:
    """Megatron's reader opens an index twice and its tokens once; the first rank reads the heads
    of the indices, and hashes both files.  The first manifest names the tokenizer of all ranks."""
    is_first = rank == 0
    found = {f"{order}.yaml": 1}
    for number, name in enumerate(NAMES):
        for split in ("train", "validation"):
            found[f"{name}/{split}.idx"] = 2 + 2 * is_first
            found[f"{name}/{split}.bin"] = 1 + is_first
        if is_first or number == 0:
            found[f"{name}/manifest.json"] = is_first + (number == 0)
    return found
