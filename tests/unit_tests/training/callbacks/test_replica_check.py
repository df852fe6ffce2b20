"""A flipped bit on one rank is found, and the rank is named."""

from argparse import Namespace
from pathlib import Path

import pytest
import torch

from trinity_megatron.cpu_host.cuda_stand_ins import enter_host

enter_host()

from megatron.core import parallel_state  # noqa: E402
from megatron.training import global_vars  # noqa: E402

from trinity_megatron.errors import MachineError, UserError  # noqa: E402
from trinity_megatron.training.arguments.checks import check_replica_flag  # noqa: E402
from trinity_megatron.training.callbacks.replica_check import (  # noqa: E402
    ReplicaCheck,
    check_replicas,
    checksum,
    find_odd,
)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64, torch.int64])
def test_any_single_bit_changes_the_checksum(dtype: torch.dtype) -> None:
    tensor = torch.randn(3, 5).mul(100).to(dtype)
    before = checksum(tensor)
    assert before == checksum(tensor.t().contiguous().t())  # whatever its strides
    numbers = tensor.view(-1).view(torch.uint8)
    for bit in range(8 * len(numbers)):
        numbers[bit // 8] ^= 1 << bit % 8
        assert checksum(tensor) != before, bit
        numbers[bit // 8] ^= 1 << bit % 8
    assert checksum(tensor) == before


@pytest.mark.parametrize(
    ("values", "odd"),
    [
        ([5, 5, 6, 5], [2]),
        ([1, 2], [0, 1]),
        ([1, 1, 2, 2], [0, 1, 2, 3]),
        ([3, 3, 3, 1, 2], [3, 4]),
    ],
)
def test_the_minority_is_odd(values: list[int], odd: list[int]) -> None:
    assert find_odd(values) == odd


class Chunk(torch.nn.Module):
    """A dense parameter, one of experts, and a router's buffers."""

    def __init__(self) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(1)
        self.dense = torch.nn.Parameter(torch.randn(7, 9, generator=generator))
        self.expert = torch.nn.Parameter(torch.randn(4, 5, generator=generator).bfloat16())
        self.expert.allreduce = False
        self.expert_bias = torch.nn.Parameter(torch.ones(6), requires_grad=False)
        self.register_buffer("expert_bias_momentum", torch.randn(6, generator=generator))
        self.register_buffer("local_tokens_per_expert", torch.zeros(6, dtype=torch.int64))


def flip_lowest_bit(tensor: torch.Tensor) -> None:
    bits = tensor.detach().view(torch.int16 if tensor.element_size() == 2 else torch.int32)
    bits.view(-1)[3] ^= 1


def run_rank(rank: int, store: str) -> None:
    """Four ranks, of which two and two hold the same experts."""
    torch.set_num_threads(1)
    torch.distributed.init_process_group(
        "gloo", init_method=f"file://{store}", rank=rank, world_size=4
    )
    parallel_state.initialize_model_parallel(expert_model_parallel_size=2)
    args = Namespace(consumed_train_samples=64, save=None, skip_train=False, perform_rl_step=False)
    args.use_megatron_fsdp = args.use_distributed_optimizer = args.overlap_param_gather = False
    global_vars._GLOBAL_ARGS = args
    chunk = Chunk()
    chunk.local_tokens_per_expert += rank  # counted on each rank for itself
    experts = rank % 2
    with torch.no_grad():
        chunk.expert += experts
    check_replicas(5, [chunk])

    def expect(words: str, everywhere: bool = True) -> None:
        if not everywhere:
            check_replicas(5, [chunk])
            return
        with pytest.raises(MachineError, match=words):
            ReplicaCheck(5).on_checkpoint_save_start(5, [chunk], None, non_persistent=False)

    for name in ("dense", "expert_bias", "expert_bias_momentum"):
        tensor = getattr(chunk, name)
        if rank == 2:
            flip_lowest_bit(tensor)
        expect(f"step 5: .*: {name} on rank 2. A device")
        if rank == 2:
            flip_lowest_bit(tensor)
    if rank == 3:
        flip_lowest_bit(chunk.expert)
    expect("expert on ranks 1, 3", everywhere=experts == 1)  # of two, nobody knows which
    if rank == 3:
        flip_lowest_bit(chunk.expert)
    args.consumed_train_samples += 8 * (rank == 0)
    expect("consumed samples on rank 0. ")
    every_fifth = ReplicaCheck(5)
    for step in range(1, 5):
        every_fifth.on_train_step_end(step, [chunk], None, None)
    with pytest.raises(MachineError):
        every_fifth.on_train_step_end(5, [chunk], None, None)
    torch.distributed.destroy_process_group()


@pytest.mark.distributed
def test_ranks_are_named(tmp_path: Path) -> None:
    torch.multiprocessing.start_processes(
        run_rank, (str(tmp_path / "store"),), nprocs=4, start_method="fork"
    )


def test_what_does_not_go_together() -> None:
    good = {"check_replicas": 1, "use_megatron_fsdp": False, "use_torch_fsdp2": False}
    check_replica_flag(Namespace(**good))
    for changes, words in (
        ({"check_replicas": 0}, "at least 1 step"),
        ({"use_megatron_fsdp": True}, "--use-megatron-fsdp"),
    ):
        with pytest.raises(UserError, match=words):
            check_replica_flag(Namespace(**good | changes))
