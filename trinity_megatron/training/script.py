"""A script of Megatron, unmodified, on this host: ``python -m trinity_megatron.training.script``.

``trinity-megatron run`` starts it on every rank.  The script is what Python would make of it, with
the modules beside it; around it is what a training of ours has too: without a GPU the stand-ins for
CUDA, Megatron's dataset helper as the wheel has compiled it, and the optimizers.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import runpy
import sys
from collections.abc import Callable, Iterator, Sequence
from functools import partial, wraps
from pathlib import Path
from typing import Any

from trinity_megatron.errors import UserError
from trinity_megatron.process.rank import (
    USER_ERROR,
    describe_error,
    is_user_error,
    quiet_import_warnings,
)
from trinity_megatron.process.screen import tell, tell_once

_TRAINING = "megatron.training.training"
# What Megatron's defaults need a GPU, or NVIDIA's extensions, for.
CPU_FLAGS = (
    "--distributed-backend=gloo",
    "--transformer-impl=local",
    "--no-masked-softmax-fusion",
    "--no-persist-layer-norm",
    "--no-gradient-accumulation-fusion",
    "--no-rope-fusion",
)


def run_script(script: str, flags: Sequence[str], *, allow_upstream_changes: bool = False) -> None:
    """Run a script as ``__main__`` with the modules beside it.

    Args:
        script: Path of the script, such as Megatron's ``pretrain_gpt.py``.
        flags: Of the script; without a GPU :data:`CPU_FLAGS` come before them.
        allow_upstream_changes: Run although the installed Megatron-Core differs in what this
            package replaces.

    Raises:
        UserError: The script is not there, or Megatron-Core differs.
    """
    path = check_script(script)
    sys.path.insert(0, str(path.parent))  # as Python does; before anything of Megatron is imported
    from trinity_megatron.cpu_host.cuda_stand_ins import enter_host

    on_cpu = enter_host()
    from trinity_megatron.upstream.entries import REGISTRY
    from trinity_megatron.upstream.registry import check_upstream

    for line in check_upstream(REGISTRY.values(), allow_changes=allow_upstream_changes):
        tell_once(f"> Megatron-Core differs from the one this was written for: {line}")
    from trinity_megatron.optimizer.register import registered_muon

    # Also what lets torch's AdamW be loaded without Transformer Engine and apex.
    with registered_muon(), training_without_cuda() if on_cpu else contextlib.nullcontext():
        if on_cpu:
            tell_once(f"> without a GPU: {' '.join(CPU_FLAGS)}")
        sys.argv = [script, *(CPU_FLAGS if on_cpu else ()), *flags]
        runpy.run_path(str(path), run_name="__main__")


def check_script(script: str) -> Path:
    """The script, as an absolute path.

    Raises:
        UserError: It is not there, or is a folder.
    """
    path = Path(script).absolute()
    if not path.is_file():
        raise UserError(
            f"{script} is no file. Remedy: name a script of Megatron-LM, for example the "
            "pretrain_gpt.py of a clone of the tag core_v0.19.0."
        )
    return path


@contextlib.contextmanager
def training_without_cuda() -> Iterator[None]:
    """Let ``pretrain()`` and the process that saves begin without CUDA."""
    from trinity_megatron.checkpoint.save_worker import copies_for_async_saves
    from trinity_megatron.training.checkpoint_worker import host_in_worker
    from trinity_megatron.upstream.registry import replaced

    # pretrain() never passes allow_no_cuda on.
    initialize = f"{_TRAINING}:initialize_megatron"
    iterators = f"{_TRAINING}:build_train_valid_test_data_iterators"
    with (
        replaced(initialize, lambda before: partial(before, allow_no_cuda=True)),
        replaced(iterators, _leave_generator_as_loaded),
        host_in_worker(),
        copies_for_async_saves(_saves_async),
    ):
        yield


def _saves_async() -> bool:
    from megatron.training import get_args

    return bool(get_args().async_save)


def _leave_generator_as_loaded(build: Callable[..., Any]) -> Callable[..., Any]:
    """Build data iterators without moving the host's generator.

    Each of torch's data loaders draws a seed for its workers from it.  On a CPU it is the generator
    of dropout too, which has just been loaded: a resumed run would drop other activations.
    """

    @wraps(build)
    def wrapper(*args: Any, **kwargs: Any) -> Any:
        import torch

        state = torch.get_rng_state()
        try:
            return build(*args, **kwargs)
        finally:
            torch.set_rng_state(state)

    return wrapper


def main(arguments: Sequence[str]) -> None:
    """Run a script; say what is wrong with the input in one paragraph instead of a trace.

    Args:
        arguments: ``[--allow-upstream-changes] SCRIPT FLAGS ...``
    """
    parser = argparse.ArgumentParser(allow_abbrev=False)
    parser.add_argument("--allow-upstream-changes", action="store_true")
    parser.add_argument("script")
    parser.add_argument("flags", nargs=argparse.REMAINDER)
    args = parser.parse_args(arguments)
    quiet_import_warnings()
    try:
        run_script(args.script, args.flags, allow_upstream_changes=args.allow_upstream_changes)
        _leave_world()
    except (UserError, OSError) as error:
        if not is_user_error(error) or os.environ.get("TRINITY_DEBUG") == "1":
            raise
        tell(f"error: {describe_error(error)}", is_error=True)
        sys.exit(USER_ERROR)


def _leave_world() -> None:
    """NCCL wants it, once all ranks are done; Megatron leaves it to the entry."""
    import torch

    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()


if __name__ == "__main__":
    # Inside the guard: the helper processes of a checkpoint save import this module again.
    from trinity_megatron.process.rank import enter_rank

    enter_rank()
    main(sys.argv[1:])
