"""Where a training step's time goes: the trace of Megatron's profiler, by kind of kernel."""

import gzip
import json
import re
from collections import defaultdict
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from trinity_megatron.doctor.environment import missing_for_te
from trinity_megatron.doctor.result import Deadline, PartResult, Settings, SuiteError, Table
from trinity_megatron.doctor.runs import Run, train
from trinity_megatron.doctor.throughput import CPU_MODELS, GPU_MODELS

NAME = "profile"
_TOP = 12
# No metrics in the profiled step: they would take device time of their own.
_STEPS = (
    "--profile",
    "--use-pytorch-profiler",
    "--profile-step-start",
    "4",
    "--profile-step-end",
    "5",
    "--tensorboard-log-interval",
    "100",
)
# The first pattern that is found in a kernel's name decides.
_KINDS = (
    ("communication", r"nccl|gloo|c10d|all_?reduce|all_?gather|reduce_?scatter"),
    ("attention", r"flash|fmha|attention|attn|sdpa"),
    ("grouped gemm", r"grouped|group_?gemm|groupproblem"),
    ("gemm", r"gemm|nvjet|cutlass|xmma|cublas|matmul|addmm|baddbmm|::(mm|bmm|linear)\b"),
    ("norm", r"norm"),
    ("optimizer", r"adam|muon|multi_?tensor"),
    ("copies", r"memcpy|memset|copy|_to_copy|fill_|zero_|::cat\b|contiguous|catarray|fillfunctor"),
)


class TimedEvent(NamedTuple):
    """An event of a trace, in microseconds; ``track`` is its thread or stream."""

    name: str
    track: tuple[Any, Any]
    start: float
    duration: float


def check(settings: Settings, deadline: Deadline) -> PartResult:
    """Profile one step of the Large-width model (CPU: tiny)."""
    result = PartResult(NAME)
    implementation = [] if settings.on_gpu else ["local"]
    if settings.on_gpu:
        missing = missing_for_te(settings)
        implementation = ["local"] if missing else ["transformer_engine"]
        if missing:
            result.skipped.append(f"Transformer Engine: {missing}; `local` was profiled")
    else:
        result.skipped.append(f"CUDA kernels: {missing_for_te(settings)}; operators were timed")
    name, model = next(iter((GPU_MODELS if settings.on_gpu else CPU_MODELS).items()))
    flags = model.command_line(steps=6) + ["--transformer-impl", *implementation, *_STEPS]
    try:
        trace = read_trace(train(Run(NAME, flags), settings, deadline) / "torch_profile")
    except SuiteError as error:
        result.fail(str(error))
        return result
    times = self_times(trace, on_gpu=settings.on_gpu)
    if not times:
        result.fail("the trace has no kernel")
        return result
    title = f"{name}, {implementation[0]}, one step of {model.tokens:,} tokens"
    result.tables += tables(times, title)
    return result


def read_trace(folder: Path) -> list[dict[str, Any]]:
    """Events of the trace that Megatron's profiler wrote.

    Raises:
        SuiteError: There is none.
    """
    file = next(folder.glob("*.json.gz"), None)
    if file is None:
        raise SuiteError(f"{NAME}: the profiler wrote no trace to {folder}")
    with gzip.open(file, "rt") as content:
        return json.load(content)["traceEvents"]


def self_times(events: Iterable[dict[str, Any]], *, on_gpu: bool) -> dict[tuple[str, str], float]:
    """Microseconds by (kind, name): of kernels on a GPU, of operators without what they call else.

    What runs within an optimizer's step is the optimizer's, whatever its kernels are.
    """
    # torch marks the step of every optimizer, on the host and, as a second event, on the device.
    mark = "gpu_user_annotation" if on_gpu else "user_annotation"
    kinds = ("kernel", "gpu_memcpy", "gpu_memset") if on_gpu else ("cpu_op",)
    spans: dict[Any, list[TimedEvent]] = defaultdict(list)
    tracks: dict[tuple[Any, Any], list[TimedEvent]] = defaultdict(list)
    for raw in events:
        category = raw.get("cat")
        if category not in (mark, *kinds):
            continue
        event = TimedEvent(raw["name"], (raw["pid"], raw["tid"]), raw["ts"], raw.get("dur", 0.0))
        if category in kinds:
            tracks[event.track].append(event)
        elif event.name.startswith("Optimizer.step"):
            spans[_place(event.track, on_gpu)].append(event)
    times: dict[tuple[str, str], float] = defaultdict(float)
    for track, found in tracks.items():
        steps = spans[_place(track, on_gpu)]
        for event, own in without_children(found):
            is_optimizer = any(
                step.start <= event.start < step.start + step.duration for step in steps
            )
            kind = "optimizer" if is_optimizer else kind_of(event.name)
            times[kind, event.name] += own
    return dict(times)


def _place(track: tuple[Any, Any], on_gpu: bool) -> Any:
    """Where a step of an optimizer runs: on one thread, or on all streams of a GPU."""
    return track[0] if on_gpu else track


def without_children(events: Sequence[TimedEvent]) -> Iterable[tuple[TimedEvent, float]]:
    """Each event of a track with its time less that of the events inside it."""
    stack: list[list[Any]] = []  # event, time of its own
    for event in sorted(events, key=lambda e: (e.start, -e.duration)):
        while stack and stack[-1][0].start + stack[-1][0].duration <= event.start:
            done, own = stack.pop()
            yield done, own
        if stack:
            stack[-1][1] -= event.duration
        stack.append([event, event.duration])
    while stack:
        done, own = stack.pop()
        yield done, own


def kind_of(name: str) -> str:
    """Kind of a kernel or operator by its name."""
    lower = name.lower()
    return next((kind for kind, pattern in _KINDS if re.search(pattern, lower)), "other")


def tables(times: dict[tuple[str, str], float], title: str) -> list[Table]:
    """Time by kind, and the kernels that take most."""
    total = sum(times.values())
    by_kind: dict[str, float] = defaultdict(float)
    for (kind, _), value in times.items():
        by_kind[kind] += value
    kinds = [
        (kind, f"{by_kind[kind] / 1e3:.2f}", f"{by_kind[kind] / total:.1%}")
        for kind in sorted(by_kind, key=lambda k: -by_kind[k])
    ]
    top = sorted(times.items(), key=lambda item: -item[1])[:_TOP]
    kernels = [
        (kind, _short(name), f"{value / 1e3:.2f}", f"{value / total:.1%}")
        for (kind, name), value in top
    ]
    return [
        Table(f"Time by kind: {title}", ("kind", "ms", "share"), kinds),
        Table(f"The {_TOP} longest: {title}", ("kind", "name", "ms", "share"), kernels),
    ]


def _short(name: str) -> str:
    return name if len(name) <= 80 else f"{name[:77]}..."
