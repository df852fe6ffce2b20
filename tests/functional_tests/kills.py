"""Kill all ranks of a world at a moment of its saves, and look at what is left."""

import functools
import json
import os
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch


@contextmanager
def killed(kill: dict[str, Any] | None) -> Iterator[None]:
    """Let this rank end by SIGKILL a while after one of its saves has begun.

    Args:
        kill: ``folder`` for the notes of rank 0 (``begun`` and ``reported``: steps, one a line),
            ``save``: number of the save (0-based) that starts the clock, and ``seconds``.
    """
    if kill is None:
        yield
        return
    from megatron.training import get_args, training

    from trinity_megatron.process.helpers import own_helpers
    from trinity_megatron.training.damage import latest_step

    own_helpers()  # what writes in the background ends with this rank
    save, finalize = training.save_checkpoint, training.maybe_finalize_async_save
    begun: list[int] = []
    named: list[int | None] = [None]

    def note(name: str, step: int) -> None:
        if torch.distributed.get_rank() == 0:
            with (Path(kill["folder"]) / name).open("a") as file:
                print(step, file=file)

    @functools.wraps(save)  # the registry knows what it wraps
    def save_until_killed(iteration: int, *args: Any, **kwargs: Any) -> None:
        if len(begun) == kill["save"]:
            timer = threading.Timer(kill["seconds"], os.kill, (os.getpid(), signal.SIGKILL))
            timer.daemon = True
            timer.start()
        note("begun", iteration)
        save(iteration, *args, **kwargs)
        begun.append(iteration)
        if not get_args().async_save:
            note("reported", iteration)

    @functools.wraps(finalize)
    def finalize_and_note(*args: Any, **kwargs: Any) -> None:
        finalize(*args, **kwargs)
        if get_args().async_save and torch.distributed.get_rank() == 0:
            step = latest_step(Path(get_args().save))
            if step is not None and step in begun and step != named[-1]:
                named.append(step)
                note("reported", step)

    training.save_checkpoint = save_until_killed
    training.maybe_finalize_async_save = finalize_and_note
    yield


def look(kill: dict[str, Any], checkpoints: Path) -> None:
    """Write down what a start has left: what the tracker names, and whether it is whole."""
    from trinity_megatron.checkpoint.torch_dist.tracker import iteration_name
    from trinity_megatron.training.damage import find_damage, latest_step

    folder, step = Path(kill["folder"]), latest_step(checkpoints)
    damage = find_damage(checkpoints / iteration_name(step), ranks=1) if step else None
    (folder / "left.json").write_text(json.dumps({"step": step, "damage": damage}))
