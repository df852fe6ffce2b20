"""A rank that hangs is named with its stacks, all ranks end, and the run is started again.

python -m pytest tests/functional_tests/test_hang_watchdog.py with TRINITY_TESTS=all; six minutes.
"""

import json
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest

from tests.functional_tests.launch import SMALL, environment, only_in_all

pytestmark = [pytest.mark.distributed, pytest.mark.slow, only_in_all]

STEPS, INTERVAL = 8, 4
# Once each, one in each start: where, rank, its step.
HANGS = (("start", 1, 0), ("data", 2, 2), ("save", 1, 4), ("collective", 3, 6))
# One process imports Megatron and forks the ranks: on a busy machine they begin together.
PROGRAM = """
import functools, json, multiprocessing, os, socket, sys, time
from pathlib import Path

FOLDER = Path(__file__).parent
RANKS = 4

def is_due(kind, step):
    for where, rank, when in json.loads((FOLDER / "hangs.json").read_text()):
        done = FOLDER / f"{where}.done"
        if not done.exists():  # the first of the list that has not been
            if (kind, int(os.environ["RANK"]), step) == (where, rank, when):
                done.touch()
                return True
            return False

def install():
    import torch
    from megatron.training import get_args, training
    from trinity_megatron.training import forward_step

    setup, get_batch, fsync = (
        training.setup_model_and_optimizer, forward_step.get_batch, os.fsync
    )

    @functools.wraps(setup)
    def hang_in_start(*args, **kwargs):
        if is_due("start", 0):
            time.sleep(600)
        return setup(*args, **kwargs)

    def hang_in_data(*args, **kwargs):
        step = get_args().curr_iteration + 1
        if is_due("data", step):
            time.sleep(600)
        if is_due("collective", step):
            hang_in_collective()
        return get_batch(*args, **kwargs)

    def hang_in_collective():
        torch.distributed.recv(torch.ones(1), src=0)

    def hang_in_save(file):
        if is_due("save", get_args().curr_iteration + 1):
            time.sleep(600)
        return fsync(file)

    training.setup_model_and_optimizer = hang_in_start
    forward_step.get_batch = hang_in_data
    os.fsync = hang_in_save

def run_rank(rank, port, pretrain):
    values = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": RANKS, "LOCAL_WORLD_SIZE": RANKS}
    values |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    os.environ.update({name: str(value) for name, value in values.items()})
    pretrain.run()

def main():
    from trinity_megatron.training import pretrain
    import torch._dynamo, transformers
    install()
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    fork = multiprocessing.get_context("fork")
    ranks = [fork.Process(target=run_rank, args=(r, port, pretrain)) for r in range(RANKS)]
    for rank in ranks:
        rank.start()
    while all(rank.exitcode in (None, 0) for rank in ranks) and any(r.is_alive() for r in ranks):
        time.sleep(0.2)
    codes = [rank.exitcode for rank in ranks]
    for rank in ranks:  # as a launcher does where one has failed
        rank.kill()
    sys.exit(next((code for code in codes if code), 0))

if __name__ == "__main__":
    main()
"""


@pytest.fixture(scope="module")
def supervised(data: Path, tmp_path_factory: pytest.TempPathFactory) -> SimpleNamespace:
    folder = tmp_path_factory.mktemp("hangs")
    (folder / "ranks.py").write_text(PROGRAM)
    (folder / "hangs.json").write_text(json.dumps(HANGS))
    command = [sys.executable, "-m", "trinity_megatron.cli", "supervise", "--wait", "0.1", "--"]
    command += [sys.executable, str(folder / "ranks.py"), *SMALL]
    command += ["--data", str(data), "--out", str(folder / "run")]
    command += ["--train-iters", str(STEPS), "--save-interval", str(INTERVAL)]
    command += ["--num-layers", "3", "--micro-batch-size", "2", "--expert-model-parallel-size", "2"]
    command += ["--use-distributed-optimizer", "--hang-seconds", "10"]
    command += ["--distributed-timeout-minutes", "1"]
    command += ["--distributed-timeout-seconds-after-init", "45"]
    result = subprocess.run(
        command, env=environment(), capture_output=True, text=True, timeout=1500
    )
    return SimpleNamespace(run=folder / "run", result=result)


def test_it_ends_by_itself_and_says_which_rank_hung(supervised: SimpleNamespace) -> None:
    assert supervised.result.returncode == 0, supervised.result.stderr[-4000:]
    log = (supervised.run / "supervise.log").read_text().splitlines()
    print("\n".join(log))
    assert len(log) == len(HANGS) + 1
    for line, (where, rank, step) in zip(log, HANGS, strict=False):
        assert f"rank {rank} hangs: nothing has happened for " in line, line
        assert f"hang_in_{where}, " in line, line
        assert ("before its first step" if where == "start" else f"in step {step} ") in line
    assert "in the save after step 4; " in log[2] and "it is in recv, " in log[3]
    assert "from step 4 has completed the run" in log[-1]
    assert json.loads((supervised.run / "heartbeat.json").read_text())["saved"] == STEPS


def test_all_stacks_are_there(supervised: SimpleNamespace) -> None:
    stacks = [(supervised.run / "stacks" / f"rank_0000{rank}.txt").read_text() for rank in range(4)]
    for where, rank, _ in HANGS:
        assert [f"in hang_in_{where}" in text for text in stacks] == [r == rank for r in range(4)]
    assert all("distributed_c10d.py" in text for text in stacks)


def test_no_other_rank_is_named(supervised: SimpleNamespace) -> None:
    """A busy machine may be slow too; what is said of a hang is said of its rank."""
    lines = [line for line in supervised.result.stderr.splitlines() if "hang_in_" in line]
    named = [line for line in lines if line.startswith("rank")]
    assert len(named) >= len(HANGS)
    for line in named:
        (where, rank, _), *more = (h for h in HANGS if f"hang_in_{h[0]}" in line)
        assert not more and line.startswith(f"rank {rank} hangs"), line
