"""Read a run's TensorBoard files: the one record from which tests, reports and pictures draw."""

from collections.abc import Iterable
from datetime import UTC, datetime
from math import prod
from pathlib import Path
from typing import Any

import numpy as np
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tensorboard.util import tensor_util

from trinity_megatron.errors import MissingInputError, UserError

EVENT_FILES = "events.out.tfevents.*"  # as TensorBoard names them
# Tags under which training/metrics.py writes; ``[num_moe_layers, num_experts]`` each.
TOKENS_TAG = "moe/tokens_per_expert"
BIAS_TAG = "moe/expert_bias"
# 1-based numbers of the MoE layers, int64 ``[num_moe_layers]``, once a start.
LAYER_NUMBERS_TAG = "moe/layer_numbers"
# What was said of a straggler (training/callbacks/straggler.py), a text.
STRAGGLER_TAG = "speed/straggler"
_MAX_VALUES = 2**24
_REMEDY = "Remedy: the folder of a run that trinity-megatron has logged, or remove the file."


class RunLog:
    """All scalars and tensors of a run, resumed parts included; the last value of a step counts.

    Args:
        tensorboard_dir: The folder given as ``--tensorboard-dir``.

    Raises:
        MissingInputError: The folder has no event file.
    """

    def __init__(self, tensorboard_dir: Path | str) -> None:
        directory = Path(tensorboard_dir)
        files = sorted(directory.glob(EVENT_FILES), key=_start_time)
        if not files:
            raise MissingInputError(
                f"{directory} has no TensorBoard event file. Remedy: give the folder of a run that "
                "was started with --out (or --tensorboard-dir)."
            )
        self._parts = [
            EventAccumulator(str(f), size_guidance={"scalars": 0, "tensors": 0}) for f in files
        ]
        for part in self._parts:
            part.Reload()

    def scalars(self, tag: str) -> dict[int, float]:
        """Values of a scalar by step, in the order of the steps; empty if it was never written."""
        return _join(
            {event.step: event.value for event in part.Scalars(tag)}
            for part in self._having("scalars", tag)
        )

    def scalar_tags(self) -> list[str]:
        """Names of all scalars, sorted."""
        return sorted({tag for part in self._parts for tag in part.Tags()["scalars"]})

    def tensors(self, tag: str) -> dict[int, np.ndarray]:
        """Values of a tensor by step, in the order of the steps; empty if it was never written."""
        return _join(
            {e.step: _to_array(e.tensor_proto, tag) for e in part.Tensors(tag)}
            for part in self._having("tensors", tag)
        )

    def period(self) -> tuple[datetime, datetime] | None:
        """When the first and the last scalar were written, in UTC; None without scalars."""
        events = [part.Scalars(tag) for part in self._parts for tag in part.Tags()["scalars"]]
        times = [event.wall_time for of_tag in events for event in of_tag]
        if not times:
            return None
        return datetime.fromtimestamp(min(times), UTC), datetime.fromtimestamp(max(times), UTC)

    def _having(self, kind: str, tag: str) -> Iterable[EventAccumulator]:
        return (part for part in self._parts if tag in part.Tags()[kind])


def _to_array(tensor: Any, tag: str) -> np.ndarray:
    """The values of a tensor; one value may stand for all of them, so that its shape is looked at.

    Raises:
        UserError: It is damaged, or larger than anything that a run logs.
    """
    sizes = [dim.size for dim in tensor.tensor_shape.dim]
    if min(sizes, default=1) < 0 or prod(sizes) > _MAX_VALUES:
        raise UserError(f"{tag} has the shape {sizes!s:.80} in the run's log. {_REMEDY}")
    try:
        return tensor_util.make_ndarray(tensor)
    except (ValueError, TypeError) as error:
        raise UserError(f"{tag} cannot be read in the run's log ({error}). {_REMEDY}") from error


def _start_time(file: Path) -> tuple[float, float]:
    """When a file was begun, from its name: copies may have been made in any order."""
    modified = file.stat().st_mtime
    seconds = file.name.split(".")[3:4]
    return (float(seconds[0]) if seconds and seconds[0].isdigit() else modified), modified


def _join[Value](parts: Iterable[dict[int, Value]]) -> dict[int, Value]:
    """One course of the run: what a start continues stands, what it does again does not."""
    course: dict[int, Value] = {}
    for part in parts:
        if part:
            first = min(part)
            course = {step: value for step, value in course.items() if step < first} | part
    return dict(sorted(course.items()))
