"""A plan: memory, time, throughput and cost of one model under one layout."""

from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

from trinity_megatron.errors import UserError
from trinity_megatron.planner.hardware import Gpu
from trinity_megatron.planner.kernels.rates import KernelRates
from trinity_megatron.planner.layout import Layout, check_layout
from trinity_megatron.planner.model_description import ModelDescription
from trinity_megatron.planner.routing import rank_imbalance
from trinity_megatron.planner.step_memory import StageMemory, stage_memory
from trinity_megatron.planner.step_time import StepModel, StepTime, step_time

GIB = 2**30
_DAY = 86400


@dataclass(frozen=True)
class Budget:
    """What is to be trained, and what a GPU costs.

    Attributes:
        tokens: Of the run; None where they are not given.
        gpu_hour_usd: Price of an hour of one GPU; None where it is not given.
    """

    tokens: float | None = None
    gpu_hour_usd: float | None = None


@dataclass(frozen=True)
class Plan:
    """One model under one layout.

    Attributes:
        model: Sizes.
        layout: Parallel sizes, batch and policy.
        rates: Of the GPU's kernels.
        optimizer: ``muon`` or ``adam``.
        budget: Tokens and price.
    """

    model: ModelDescription
    layout: Layout
    rates: KernelRates
    optimizer: str
    budget: Budget = Budget()

    @property
    def gpu(self) -> Gpu:
        """The GPU."""
        return self.rates.gpu

    @cached_property
    def memory(self) -> list[StageMemory]:
        """Of the fullest rank of each pipeline stage."""
        return [
            stage_memory(self.model, self.layout, self.gpu, self.optimizer, stage)
            for stage in range(self.layout.pipeline_model_parallel_size)
        ]

    @cached_property
    def fullest(self) -> StageMemory:
        """Of the stage that needs most."""
        return max(self.memory, key=lambda stage: stage.needed[0])

    @property
    def fits(self) -> bool:
        """Whether the fullest rank fits, in the middle of the band."""
        return sum(self.fullest.needed) / 2 <= self.gpu.memory_bytes

    @cached_property
    def step(self) -> StepModel:
        """What the time of a step follows from."""
        return StepModel(self.model, self.layout, self.rates, self.optimizer)

    @cached_property
    def time(self) -> StepTime:
        """Of a step with balanced experts."""
        return step_time(self.step)

    @cached_property
    def learned(self) -> tuple[float, float]:
        """Tokens/s of a GPU under learned routing, [low, high]."""
        low, high = (
            step_time(self.step, rank_imbalance(self.model, self.layout, spread))
            for spread in reversed(self.step.constants.learned_spread)
        )
        return low.tokens_per_second_per_gpu, high.tokens_per_second_per_gpu

    @property
    def days(self) -> float | None:
        """Of the token budget with balanced experts."""
        if self.budget.tokens is None:
            return None
        rate = self.time.tokens_per_second_per_gpu * self.layout.world_size
        return self.budget.tokens / rate / _DAY

    @property
    def gpu_hours(self) -> float | None:
        """Of the token budget."""
        return None if self.days is None else self.days * 24 * self.layout.world_size

    def as_json(self) -> dict[str, Any]:
        """What ``--json`` prints."""
        low, high = self.fullest.reserved
        result: dict[str, Any] = {
            "layout": self.layout.as_flags(),
            "memory_gib": {
                "peak": round(self.fullest.peak / GIB, 3),
                "reserved": round((low + high) / 2 / GIB, 3),
            },
            "tokens_per_second_per_gpu": {
                "balanced": round(self.time.tokens_per_second_per_gpu, 1),
                "learned": [round(rate, 1) for rate in self.learned],
            },
            "step_seconds": {name: round(value, 6) for name, value in self.time.terms.items()},
        }
        if self.days is not None:
            result["days"] = round(self.days, 2)
        return result

    def with_layout(self, **changes: Any) -> "Plan":
        """The same with another layout.

        Raises:
            UserError: The layout breaks a rule.
        """
        layout = replace(self.layout, **changes)
        check_layout(self.model, layout)
        return replace(self, layout=layout)


@dataclass(frozen=True)
class Change:
    """One flag that would make a step faster.

    Attributes:
        flags: What to give.
        gain: Tokens/s over those of the plan.
    """

    flags: str
    gain: float


def best_changes(plan: Plan, count: int = 3) -> list[Change]:
    """Single flags that speed the plan up and still fit, the best first."""
    changes = []
    for flags, fields in _neighbours(plan):
        try:
            other = plan.with_layout(**fields)
        except UserError:
            continue
        if other.fits or not plan.fits:
            rate = other.time.tokens_per_second_per_gpu
            changes.append(Change(flags, rate / plan.time.tokens_per_second_per_gpu))
    changes = [change for change in changes if change.gain > 1.01]
    return sorted(changes, key=lambda change: -change.gain)[:count]


def _neighbours(plan: Plan) -> list[tuple[str, dict[str, Any]]]:
    """Flags and the fields that they set, each one step away from the plan."""
    layout = plan.layout
    batch, ep = layout.micro_batch_size, layout.expert_model_parallel_size
    chunks, tp = layout.num_virtual_stages, layout.tensor_model_parallel_size
    found: list[tuple[str, dict[str, Any]]] = [
        (f"--micro-batch-size {2 * batch}", {"micro_batch_size": 2 * batch}),
        (f"--expert-model-parallel-size {2 * ep}", {"expert_model_parallel_size": 2 * ep}),
    ]
    if ep > 1:
        found.append(
            (f"--expert-model-parallel-size {ep // 2}", {"expert_model_parallel_size": ep // 2})
        )
    if tp > 1:
        found.append(
            (f"--tensor-model-parallel-size {tp // 2}", {"tensor_model_parallel_size": tp // 2})
        )
    if layout.pipeline_model_parallel_size > 1:
        flag = f"--num-virtual-stages-per-pipeline-rank {chunks + 1}"
        found.append((flag, {"num_virtual_stages": chunks + 1}))
        size = 2 * layout.global_batch_size
        found.append((f"--global-batch-size {size}", {"global_batch_size": size}))
    if layout.recompute == "full":
        found.append(("--recompute-granularity selective", {"recompute": "selective"}))
    if layout.recompute != "none":
        found.append(("no recomputation", {"recompute": "none"}))
    if layout.fp8_recipe is None:
        recipe = "mxfp8" if plan.gpu.capability >= (10, 0) else "tensorwise"
        fields = {"fp8_recipe": recipe, "transformer_impl": "transformer_engine"}
        flags = f"--fp8-format hybrid --fp8-recipe {recipe}"
        if layout.transformer_impl == "local":
            flags += " --transformer-impl transformer_engine"
        found.append((flags, fields))
    else:
        found.append(("no FP8 (bf16)", {"fp8_recipe": None}))
    return found


def fp8_gain(plan: Plan) -> float:
    """Tokens/s of an FP8 plan over those of the same in bf16."""
    other = plan.with_layout(fp8_recipe=None)
    return plan.time.tokens_per_second_per_gpu / other.time.tokens_per_second_per_gpu
