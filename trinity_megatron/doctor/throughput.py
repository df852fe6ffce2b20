"""Tokens/s, MFU and peak memory of layers as wide as the released models'."""

import statistics
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from trinity_megatron.doctor.environment import missing_for_te, recipes
from trinity_megatron.doctor.fp8_loss import fp8_flags
from trinity_megatron.doctor.result import Deadline, PartResult, Settings, SuiteError, Table
from trinity_megatron.doctor.runs import Run, log_of, train

NAME = "throughput"
BF16_MFU_GOAL, FP8_SPEEDUP_GOAL = 0.40, 1.25
# Dest of a field's flag where Megatron has another name.
_FLAGS = {"num_moe_experts": "num-experts"}
_STEPS, _WARM_UP = 16, 4
_FORCED = ("--moe-router-force-load-balancing",)
# In training the first and the last layer stay in bf16; of four layers that would be half.
_ALL_LAYERS = (
    "--num-layers-at-start-in-bf16",
    "0",
    "--num-layers-at-end-in-bf16",
    "0",
)


@dataclass(frozen=True)
class Model:
    """A few layers of a preset on one device.

    Attributes:
        preset: Whose widths.
        fields: Of ``TrinityConfig``, what differs from the preset.
        seq_length: Tokens of a sequence.
        micro_batch_size: Sequences of a micro-batch.
        micro_batches: Micro-batches of a step.
        vocab_size: Rows of the embedding.
        flags: Further flags.
    """

    preset: str
    fields: Mapping[str, int]
    seq_length: int
    micro_batch_size: int
    micro_batches: int
    vocab_size: int = 200192
    flags: tuple[str, ...] = ()

    @property
    def tokens(self) -> int:
        """Tokens of a step."""
        return self.seq_length * self.micro_batch_size * self.micro_batches

    def config(self) -> Any:
        """Its ``TrinityConfig``."""
        from trinity_megatron.model.presets import trinity_preset

        fields = {**self.fields, "bias_activation_fusion": True}  # as Megatron's arguments have it
        return trinity_preset(self.preset, vocab_size=self.vocab_size, **fields)

    def command_line(self, steps: int) -> list[str]:
        """Flags of a training: its shape, the batch and the number of steps."""
        values = {_FLAGS.get(name, name.replace("_", "-")): v for name, v in self.fields.items()}
        values |= {
            "seq-length": self.seq_length,
            "micro-batch-size": self.micro_batch_size,
            "global-batch-size": self.micro_batch_size * self.micro_batches,
            # The text has a small vocabulary; embedding and head get the model's number of rows.
            "make-vocab-size-divisible-by": self.vocab_size,
            "train-iters": steps,
            "tensorboard-log-interval": _WARM_UP,
        }
        named = [word for name, value in values.items() for word in (f"--{name}", str(value))]
        return ["--preset", self.preset, *named, *self.flags]


# What fits 78 GiB by the arithmetic of memory.py, Muon's state included: a test adds it up.
GPU_MODELS = {
    "Large-width": Model(
        preset="large",
        fields={"num_layers": 4, "num_dense_layers": 1, "num_moe_experts": 16},
        seq_length=8192,
        micro_batch_size=1,
        micro_batches=4,
    ),
    "Nano-width": Model(
        preset="nano",
        fields={"num_layers": 4, "num_dense_layers": 1},
        seq_length=4096,
        micro_batch_size=4,
        micro_batches=4,
    ),
}
CPU_MODELS = {
    "tiny": Model(
        preset="tiny",
        fields={"num_layers": 2, "num_dense_layers": 1},
        seq_length=64,
        micro_batch_size=4,
        micro_batches=1,
        vocab_size=1024,
    )
}


@dataclass
class _Measured:
    """Figures of one run; ``peak_bytes`` is None where the device has no counter."""

    seconds: float
    muon_share: float | None
    peak_bytes: float | None


@dataclass(frozen=True)
class _Row:
    """One training of the table."""

    model: str
    precision: str
    forced: bool
    flags: tuple[str, ...]

    @property
    def balance(self) -> str:
        return "forced" if self.forced else "learned"

    @property
    def run(self) -> str:
        return f"{NAME}/{self.model} {self.precision} {self.balance}"


def check(settings: Settings, deadline: Deadline) -> PartResult:
    """Train each model in each precision with learned routing and with forced balance."""
    result = PartResult(NAME)
    models = GPU_MODELS if settings.on_gpu else CPU_MODELS
    measured: dict[_Row, _Measured] = {}
    for row in _plan(settings, result):
        if not deadline.has_time():
            result.skipped.append(
                f"{row.run}: too little was left of the part's {deadline.seconds:.0f} s"
            )
            continue
        steps = _STEPS if settings.on_gpu else 6
        flags = [*models[row.model].command_line(steps), *row.flags]
        try:
            folder = train(Run(row.run.replace(" ", "_"), flags), settings, deadline)
        except SuiteError as error:
            result.fail(str(error))
            continue
        measured[row] = _read(folder)
    if measured:
        result.tables.append(_speed_table(measured, models, settings))
        if settings.on_gpu:
            result.tables.append(_memory_table(measured, models))
    _add_notes(result, settings)
    return result


def _plan(settings: Settings, result: PartResult) -> list[_Row]:
    """Trainings, the most telling first: the last ones are left out when time is over."""
    if not settings.on_gpu:
        result.skipped += [
            f"Large-width, Nano-width and peak memory: {missing_for_te(settings)}",
            f"Transformer Engine in bf16 and FP8: {missing_for_te(settings)}",
        ]
        return [_Row("tiny", "fp32 local", forced, _FORCED * forced) for forced in (False, True)]
    precisions: dict[str, tuple[str, ...]] = {
        "bf16 local": ("--bf16", "--transformer-impl", "local")
    }
    if missing := missing_for_te(settings):
        result.skipped.append(f"Transformer Engine in bf16 and FP8: {missing}")
    else:
        te = ("--bf16", "--transformer-impl", "transformer_engine")
        precisions["bf16 TE"] = te
        for recipe in recipes(settings):
            precisions[f"FP8 {recipe}"] = (*te, *fp8_flags(recipe), *_ALL_LAYERS)
    first = list(precisions)[:3]  # both of bf16 and the best recipe
    order = [("Large-width", False, first), ("Large-width", True, first)]
    order += [("Nano-width", False, first)]
    order += [("Large-width", False, list(precisions)[3:]), ("Nano-width", True, first)]
    return [
        _Row(model, name, forced, precisions[name] + _FORCED * forced)
        for model, forced, names in order
        for name in names
    ]


def _read(folder: Path) -> _Measured:
    log = log_of(folder)
    seconds = [s for step, s in log.scalars("iteration-time").items() if step > _WARM_UP]
    shares = list(log.scalars("muon/step_share").values())
    peak = max(log.scalars("mem-max-allocated-bytes").values(), default=0.0)
    return _Measured(
        statistics.median(seconds), shares[-1] if shares else None, peak if peak > 0 else None
    )


def _speed_table(
    measured: Mapping[_Row, _Measured], models: Mapping[str, Model], settings: Settings
) -> Table:
    import torch

    from trinity_megatron.planner.flops import peak_flops, training_flops_per_token

    peak = peak_flops(torch.device(settings.device))
    rows = []
    for row, figures in measured.items():
        model = models[row.model]
        rate = model.tokens / figures.seconds
        flops = training_flops_per_token(model.config(), model.seq_length) * rate
        share = "" if figures.muon_share is None else f"{figures.muon_share:.1%}"
        goal = _goal(row, rate, flops / peak, measured, models) if settings.on_gpu else "no goal"
        rows.append(
            (
                *(row.model, row.precision, row.balance, f"{figures.seconds * 1e3:,.0f}"),
                *(f"{rate:,.0f}", f"{flops / 1e12:,.2f}", f"{flops / peak:.1%}", share, goal),
            )
        )
    columns = (
        *("model", "precision", "routing", "ms per step", "tokens/s", "TFLOP/s"),
        *(f"MFU of {peak / 1e12:,.2f} TFLOP/s", "Muon's share", "goal"),
    )
    steps = "the first 4 steps left out, median of the others"
    return Table(f"Throughput of one device; {steps}", columns, rows)


def _goal(
    row: _Row,
    rate: float,
    mfu: float,
    measured: Mapping[_Row, _Measured],
    models: Mapping[str, Model],
) -> str:
    """The goal of a row beside what it reached; not reaching one is no failure."""
    if row.precision.startswith("bf16"):
        return f"MFU >= {BF16_MFU_GOAL:.0%}: {_reached(mfu >= BF16_MFU_GOAL)}"
    same = [
        other
        for other in measured
        if (other.model, other.precision, other.forced) == (row.model, "bf16 TE", row.forced)
    ]
    if not same:
        return "no bf16 run to compare with"
    ratio = rate * measured[same[0]].seconds / models[row.model].tokens
    if row.model != "Large-width" or row.forced:
        return f"no goal; {ratio:.2f} x bf16 TE"
    reached = _reached(ratio >= FP8_SPEEDUP_GOAL)
    return f">= {FP8_SPEEDUP_GOAL} x bf16 TE: {ratio:.2f}, {reached}"


def _reached(is_reached: bool) -> str:
    return "reached" if is_reached else "NOT REACHED"


def _memory_table(measured: Mapping[_Row, _Measured], models: Mapping[str, Model]) -> Table:
    from trinity_megatron.planner.memory import training_memory

    rows = []
    for row, figures in measured.items():
        model = models[row.model]
        terms = training_memory(
            model.config(), seq_length=model.seq_length, micro_batch_size=model.micro_batch_size
        )
        parts = (terms.weights, terms.gradients, terms.optimizer, sum(terms.activations.values()))
        peak = figures.peak_bytes
        measured_words = ("", "") if peak is None else (_gib(peak), f"{peak / terms.total:.2f}")
        rows.append(
            (
                *(row.model, row.precision, row.balance),
                *map(_gib, (*parts, terms.total)),
                *measured_words,
            )
        )
    columns = (
        *("model", "precision", "routing", "weights", "gradients", "optimizer"),
        *("activations (estimate)", "sum", "measured peak", "measured / sum"),
    )
    return Table("Peak memory in GiB against trinity_megatron.planner.memory", columns, rows)


def _gib(size: float) -> str:
    return f"{size / 2**30:.2f}"


def _add_notes(result: PartResult, settings: Settings) -> None:
    result.notes.append(
        "MFU counts the whole step, the optimizer included.  One device orthogonalises every "
        "matrix here; in a data-parallel run the ranks share that work (docs/muon.md)."
    )
    if settings.on_gpu:
        result.notes.append(
            "FP8 runs have all four layers in FP8 (in training the first and the last stay in "
            "bf16).  The arithmetic has no term for FP8 copies of weights."
        )
