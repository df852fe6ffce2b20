"""Ranks of any world, built in one process without a network and without memory.

A rank's model, its buffers of gradients and its optimizer are those of a training, made of tensors
without data.  So what a plan says of weights, gradients and state can be held against the objects
themselves, for worlds of any size.
"""

from collections.abc import Sequence
from dataclasses import dataclass

from megatron.core import parallel_state
from megatron.core.models.gpt import GPTModel

from trinity_megatron.cpu_host.cuda_stand_ins import enter_host
from trinity_megatron.errors import UserError
from trinity_megatron.model.presets import PRESETS
from trinity_megatron.planner.dry_memory import HeldBytes, count_replicated, count_sharded
from trinity_megatron.planner.dry_rank import build_chunks, dry_rank
from trinity_megatron.planner.layout import Layout
from trinity_megatron.planner.model_description import ModelDescription
from trinity_megatron.planner.plan import GIB, Plan
from trinity_megatron.planner.rank_shapes import count_elements, list_shapes
from trinity_megatron.planner.step_memory import StageMemory

# A plan whose weights, gradients or state are further off is wrong.
TOLERANCE = 0.05


@dataclass(frozen=True)
class DryRank:
    """What one rank holds, counted on its objects.

    Attributes:
        rank: In the world.
        stage: Pipeline rank.
        dense: Elements of its parameters that are no experts', expert biases included; whole where
            Megatron-FSDP shards them.
        experts: Elements of its experts.
        of_stage: Elements of all parameters of its stage, on whatever ranks they are.
        held: Bytes.
    """

    rank: int
    stage: int
    dense: int
    experts: int
    of_stage: int
    held: HeldBytes


def sample_ranks(layout: Layout) -> list[int]:
    """The first, a middle and the last rank of each pipeline stage."""
    size = layout.world_size // layout.pipeline_model_parallel_size
    return [
        stage * size + place
        for stage in range(layout.pipeline_model_parallel_size)
        for place in sorted({0, size // 2, size - 1})
    ]


def build_rank(plan: Plan, rank: int) -> DryRank:
    """Build one rank of a plan and count what it holds.

    Args:
        plan: Of a Trinity preset in bf16.
        rank: In the world.

    Raises:
        UserError: The plan is of another kind.
    """
    check_buildable(plan)
    enter_host()
    with dry_rank(plan.layout, rank):
        chunks = build_chunks(plan)
        stage = parallel_state.get_pipeline_model_parallel_rank()
        sizes = _count_parameters(chunks, plan.layout)
        count = count_sharded if plan.layout.sharding == "hsdp" else count_replicated
        return DryRank(rank, stage, *sizes, held=count(chunks, plan))


def check_buildable(plan: Plan) -> None:
    """Refuse plans that this cannot build.

    Raises:
        UserError: Says why.
    """
    if plan.model.name not in PRESETS:
        raise UserError(
            f"--verify builds Trinity's presets, and --preset {plan.model.name} is none. Remedy: "
            "drop --verify."
        )
    if plan.layout.fp8_recipe or plan.layout.moment_bytes != 4:
        raise UserError(
            "--verify builds bf16 weights and fp32 state only: FP8 weights and the bf16 moments of "
            "--exp-avg-dtype are Transformer Engine's. Remedy: drop --verify, or --fp8-format, "
            "--fp8-recipe and --exp-avg-dtype."
        )


def _count_parameters(chunks: list[GPTModel], layout: Layout) -> tuple[int, int, int]:
    """Elements of the rank that are no experts', of its experts, and of its stage."""
    named = [item for chunk in chunks for item in chunk.named_parameters()]
    experts = sum(param.numel() for name, param in named if ".mlp.experts." in name)
    others = [param for name, param in named if ".mlp.experts." not in name]
    divided = sum(p.numel() for p in others if getattr(p, "tensor_model_parallel", False))
    dense = sum(param.numel() for param in others)
    expert_ranks = layout.expert_model_parallel_size * layout.expert_tensor_parallel_size
    of_stage = dense + (layout.tensor_model_parallel_size - 1) * divided + expert_ranks * experts
    return dense, experts, of_stage


def count_model(layout: Layout, ranks: Sequence[DryRank]) -> int:
    """Elements of the whole model, from one rank of each stage.

    Args:
        layout: Of the world.
        ranks: At least one of each stage; those of a stage must be alike.
    """
    sizes = {rank.stage: rank.of_stage for rank in ranks}
    assert all(sizes[rank.stage] == rank.of_stage for rank in ranks)
    assert len(sizes) == layout.pipeline_model_parallel_size
    return sum(sizes.values())


def planned_parameters(model: ModelDescription) -> int:
    """Elements of a Trinity model by the planner's arithmetic, with a bias for each expert."""
    shapes = list_shapes(model, Layout(world_size=1), 0)
    return sum(count_elements(shapes)) + model.num_moe_layers * model.num_moe_experts


def planned_terms(memory: StageMemory) -> dict[str, float]:
    """Of a plan, what a dry rank counts, by the names of `HeldBytes`."""
    terms = memory.terms
    return {
        "weights": terms["weights"],
        "gradients": terms["gradients"],
        "optimizer": terms["optimizer state"],
    }


@dataclass(frozen=True)
class Verification:
    """Ranks that were built beside what a plan says of them.

    Attributes:
        lines: For a terminal.
        worst: Largest difference of a term, relative to what was counted.
        holds: Whether it is small, and the ranks add up to the model.
    """

    lines: list[str]
    worst: float
    holds: bool


def verify_plan(plan: Plan) -> Verification:
    """Build the first, a middle and the last rank of every stage and compare.

    Raises:
        UserError: The plan cannot be built.
    """
    check_buildable(plan)
    ranks = [build_rank(plan, number) for number in sample_ranks(plan.layout)]
    lines, differences = [], []
    for rank in ranks:
        words = []
        for name, planned in planned_terms(plan.memory[rank.stage]).items():
            counted = getattr(rank.held, name)
            differences.append(planned / counted - 1)
            words.append(f"{name} {counted / GIB:.3f} GiB (plan {100 * differences[-1]:+.2f}%)")
        whole = " before they are sharded" if plan.layout.sharding == "hsdp" else ""
        lines.append(
            f"  rank {rank.rank:,}, stage {rank.stage}: {rank.dense + rank.experts:,} parameters"
            f"{whole}, {', '.join(words)}"
        )
    worst = max(map(abs, differences))
    counted, planned = count_model(plan.layout, ranks), planned_parameters(plan.model)
    holds = worst <= TOLERANCE and counted == planned
    lines = [
        f"{len(ranks)} of {plan.layout.world_size:,} ranks, built without memory:",
        *lines,
        f"  the model: {counted:,} parameters (plan {planned:,})",
        f"  {'as planned' if holds else 'NOT as planned'}: the largest difference of a term is "
        f"{100 * worst:.2f}%",
    ]
    return Verification(lines, worst, holds)
