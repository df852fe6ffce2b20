"""The counters of all layers meet in one all-reduce.

In a module of its own: the ranks are forked, and must not inherit a process group.
"""

from pathlib import Path
from typing import Any

import pytest
import torch

from trinity_megatron.model.moe import bias_update
from trinity_megatron.model.moe.router import TrinityRouter


def run_rank(rank: int, store: str) -> None:
    torch.set_num_threads(1)
    torch.distributed.init_process_group(
        "gloo", init_method=f"file://{store}", rank=rank, world_size=2
    )
    routers = []
    for layer in range(3):
        # Only what the finalizer reads: building a model needs Megatron's parallel state.
        router = TrinityRouter.__new__(TrinityRouter)
        torch.nn.Module.__init__(router)
        router.enable_expert_bias = True
        counts = torch.full((4,), 10 * layer + rank + 2**53, dtype=torch.int64)
        router.register_buffer("local_tokens_per_expert", counts)
        routers.append(router)
    calls = []
    all_reduce = torch.distributed.all_reduce

    def counted(tensor: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        calls.append(tensor.shape)
        return all_reduce(tensor, *args, **kwargs)

    torch.distributed.all_reduce = counted
    model = [torch.nn.ModuleList(routers)]
    updater = bias_update.get_expert_bias_updater(model)
    updater.collect(model, torch.distributed.group.WORLD)
    assert calls == [(3, 4)]
    # Summed as integers: exact above 2**53.
    sums = [[20 * layer + 1 + 2**54] * 4 for layer in range(3)]
    assert updater._tokens_per_expert.tolist() == sums
    assert all(not router.local_tokens_per_expert.any() for router in routers)
    torch.distributed.destroy_process_group()


@pytest.mark.distributed
def test_one_all_reduce_for_all_layers(tmp_path: Path) -> None:
    torch.multiprocessing.start_processes(
        run_rank, (str(tmp_path / "store"),), nprocs=2, start_method="fork"
    )
