"""The CPU host: inert where CUDA is; what gloo lacks equals what NCCL would give."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).resolve().parents[3]

SNAPSHOT = """
import os, torch
import torch.cuda.nvtx, torch.distributed
if {cuda}:
    torch.cuda.is_available = lambda: True

def snapshot():
    spaces = dict(torch=torch, cuda=torch.cuda, random=torch.cuda.random, nvtx=torch.cuda.nvtx,
                  tensor=torch.Tensor, distributed=torch.distributed)
    return {{(space, name): id(value)
            for space, owner in spaces.items() for name, value in list(vars(owner).items())}}

from trinity_megatron.cpu_host import cuda_stand_ins as host
# Importing Megatron may load parts of torch lazily: before the first snapshot.
import megatron.core.optimizer, megatron.core.datasets.utils
import megatron.core.transformer.moe.token_dispatcher
before, environment = snapshot(), dict(os.environ)
entered = host.enter_host()
changed = [key for key, value in snapshot().items() if before.get(key) != value]
twice = snapshot()
assert host.enter_host() == entered and host.is_cpu_host() == entered
assert snapshot() == twice, "not idempotent"
print("RESULT", entered, len(changed), environment == dict(os.environ), changed[:5])
"""


@pytest.mark.slow
@pytest.mark.parametrize("cuda", [True, False])
def test_inert_where_cuda_is(cuda: bool) -> None:
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    environment.pop("TORCHDYNAMO_DISABLE", None)
    result = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", SNAPSHOT.format(cuda=cuda)],
        env=environment,
        capture_output=True,
        text=True,
    )
    assert result.returncode == 0, result.stderr
    (line,) = (text for text in result.stdout.splitlines() if text.startswith("RESULT"))
    entered, changed, same_environment = line.split()[1:4]
    if cuda:
        assert (entered, changed, same_environment) == ("False", "0", "True"), line
    else:
        # The same look at torch does see the stand-ins of a CPU host.
        assert entered == "True" and int(changed) > 30, line


def run_rank(rank: int, store: str) -> None:
    torch.set_num_threads(1)
    from trinity_megatron.cpu_host.cuda_stand_ins import enter_host

    enter_host()
    torch.distributed.init_process_group(
        "gloo", init_method=f"file://{store}", rank=rank, world_size=2
    )
    for sizes in ((3, 5), (0, 4), (2, 2)):
        mine = torch.arange(sizes[rank] * 2.0).view(-1, 2) + 100 * rank
        outputs = [torch.full((size, 2), -1.0) for size in sizes]
        torch.distributed.all_gather(outputs, mine)
        for other, (output, size) in enumerate(zip(outputs, sizes, strict=True)):
            assert torch.equal(output, torch.arange(size * 2.0).view(-1, 2) + 100 * other)
        inputs = [
            torch.arange(size * 2.0).view(-1, 2) * (rank + 1) + other
            for other, size in enumerate(sizes)
        ]
        scattered = torch.empty(sizes[rank], 2)
        torch.distributed.reduce_scatter(scattered, inputs)
        expected = torch.arange(sizes[rank] * 2.0).view(-1, 2) * 3 + 2 * rank
        assert torch.equal(scattered, expected)
    assert torch.cuda.is_available() is False
    assert torch.empty(2, device="cuda").device.type == "cpu"
    assert torch.ones(2).cuda().to("cuda:0").device.type == "cpu"
    torch.distributed.destroy_process_group()


@pytest.mark.distributed
def test_uneven_collectives(tmp_path: Path) -> None:
    torch.multiprocessing.start_processes(
        run_rank, (str(tmp_path / "store"),), nprocs=2, start_method="fork"
    )


@pytest.mark.slow
def test_a_training_does_not_import_the_compiler() -> None:
    code = (
        "import sys, torch; from trinity_megatron.training import pretrain; "
        "assert torch.compile(len) is len and torch.compile(dynamic=False)(len) is len; "
        "print([name for name in ('torch._dynamo', 'torch._inductor') if name in sys.modules])"
    )
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "CUDA_VISIBLE_DEVICES": ""}
    environment.pop("TORCHDYNAMO_DISABLE", None)
    command = [sys.executable, "-W", "ignore", "-c", code]
    result = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert result.stdout.splitlines()[-1:] == ["[]"], result.stderr
