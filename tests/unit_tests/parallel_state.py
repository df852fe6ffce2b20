"""A gloo world of one rank with Megatron's parallel state, left without a trace."""

import gc
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch


@contextmanager
def one_rank_world(store: Path) -> Iterator[None]:
    """Enter the host and initialise; take everything down at the end.

    Args:
        store: File for the rendezvous, not there yet.
    """
    from trinity_megatron.cpu_host.cuda_stand_ins import enter_host

    enter_host()
    from megatron.core import parallel_state
    from megatron.core.tensor_parallel.random import model_parallel_cuda_manual_seed

    torch.distributed.init_process_group(
        "gloo", init_method=f"file://{store}", rank=0, world_size=1
    )
    try:
        parallel_state.initialize_model_parallel()
        model_parallel_cuda_manual_seed(1)
        yield
    finally:
        parallel_state.destroy_model_parallel()
        torch.distributed.destroy_process_group()
        # Megatron forgets some of its groups here.  A rank that another test forks later would
        # free them, and wait for ever for gloo threads that only this process has.
        for name, value in list(vars(parallel_state).items()):
            if isinstance(value, torch.distributed.ProcessGroup):
                setattr(parallel_state, name, None)
        gc.collect()
