"""The training entry on the null device; what each step did is written down.

python -m tests.null_gpu.train STEPS.jsonl FLAGS ...        # a JSON object a line and step
"""

import functools
import json
import sys
import traceback
import warnings
from collections import Counter
from pathlib import Path
from typing import Any

import torch

from tests.null_gpu.collective_counts import CollectiveCounts
from tests.null_gpu.device import NullDevice
from trinity_megatron.training import pretrain

# Where a wait for the device is not asked for by the code that is looked for.
_NOT_THE_CALLER = ("/torch/", "/warnings.py", "/contextlib.py", "/functools.py", __file__)


class StepRecord:
    """What the device counts from the start of a step to that of the next, and who waits for it."""

    def __init__(self, path: Path) -> None:
        self._path, self._device = path, NullDevice()
        self._waits: Counter[str] = Counter()
        self._has_begun = False
        self._startup_peak = 0
        self._collectives = CollectiveCounts(find_caller)
        self._startup: list[dict[str, Any]] = []

    def around(self, train_step: Any) -> Any:
        """Megatron's ``train_step``, recorded."""

        @functools.wraps(train_step)  # the registry of replacements knows what it wraps
        def wrapper(*args: Any, **kwargs: Any) -> Any:
            if not self._has_begun:
                self._startup_peak = torch.cuda.max_memory_allocated()
                self._startup = self._collectives.take()
            self.write()
            self._begin()
            return train_step(*args, **kwargs)

        return wrapper

    def _begin(self) -> None:
        self._has_begun = True
        self._waits.clear()
        torch.cuda.reset_peak_memory_stats()
        self._device.reset()
        torch.cuda.set_sync_debug_mode("warn")
        warnings.simplefilter("always")
        warnings.showwarning = self._note

    def _note(self, message: Warning | str, *_: Any, **__: Any) -> None:
        if "synchronizing CUDA operation" in str(message):
            self._waits[find_caller()] += 1

    def write(self) -> None:
        """Write down the step so far, if there is one."""
        if not self._has_begun:
            return
        step = {
            "counts": self._device.read(),
            "waits": dict(self._waits),
            "allocated": torch.cuda.memory_allocated(),
            "peak": torch.cuda.max_memory_allocated(),
            "reserved": torch.cuda.memory_reserved(),
            "startup_peak": self._startup_peak,
            "startup_collectives": self._startup,
            "collectives": self._collectives.take(),
            "graphs": torch._dynamo.utils.counters["stats"]["unique_graphs"],
            "kernels": self._device.kernels(self._path.with_suffix(".kernels")),
        }
        with self._path.open("a") as file:
            file.write(json.dumps(step) + "\n")


def find_caller() -> str:
    """The innermost three frames outside of torch: ``file:line function < ...``."""
    frames = [
        frame
        for frame in reversed(traceback.extract_stack())
        if not any(part in frame.filename for part in _NOT_THE_CALLER)
    ]
    return " < ".join(f"{Path(f.filename).name}:{f.lineno} {f.name}" for f in frames[:3])


def main() -> None:
    """Train with the flags that follow the file."""
    from megatron.training import training

    record = StepRecord(Path(sys.argv.pop(1)).absolute())
    training.train_step = record.around(training.train_step)
    try:
        pretrain.run()
    finally:
        record.write()


if __name__ == "__main__":
    main()
