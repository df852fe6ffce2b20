"""Search over layouts: the best, and why each other family of layouts loses."""

from collections.abc import Iterator
from dataclasses import dataclass, replace

from trinity_megatron.errors import UserError
from trinity_megatron.planner.layout import Layout, Recompute, check_layout
from trinity_megatron.planner.plan import GIB, Plan

_MICRO_BATCHES = (1, 2, 3, 4, 6, 8)
_RECOMPUTE: tuple[Recompute, ...] = ("none", "selective", "full")  # in the order of their cost


@dataclass(frozen=True)
class Family:
    """Layouts of one kind.

    Attributes:
        name: The kind.
        best: The fastest that fits; where none fits, the one that needs least.
        reason: Why it is not the best of all; empty for the best.
    """

    name: str
    best: Plan
    reason: str


@dataclass(frozen=True)
class Search:
    """What a search found.

    Attributes:
        best: The fastest layouts, at most five, each with its own parallel sizes.
        families: Every kind of layout, the best first.
        examined: Layouts that were looked at.
    """

    best: list[Plan]
    families: list[Family]
    examined: int


def search_layouts(
    start: Plan,
    *,
    micro_batches: tuple[int, ...] | None = None,
    recompute: tuple[Recompute, ...] | None = None,
) -> Search:
    """Look at all layouts of a model on some GPUs.

    Args:
        start: Model, GPUs, batch and precision; its parallel sizes do not matter.
        micro_batches: Those to look at; default: up to 8 sequences.
        recompute: Policies to look at, the cheapest first; default: all.

    Raises:
        UserError: No layout keeps the rules, or none fits; says which comes nearest.
    """
    fitting: dict[str, list[Plan]] = {}
    smallest: dict[str, Plan] = {}
    examined = 0
    for layouts in _candidates(start, micro_batches or _MICRO_BATCHES, recompute or _RECOMPUTE):
        for layout in layouts:
            examined += 1
            plan = replace(start, layout=layout)
            name = family_name(plan)
            if plan.fits:
                fitting.setdefault(name, []).append(plan)
                break  # what recomputes more is slower
            if name not in smallest or plan.fullest.peak < smallest[name].fullest.peak:
                smallest[name] = plan
    ranked = sorted((plan for plans in fitting.values() for plan in plans), key=_seconds)
    if not ranked:
        raise UserError(_no_layout(start, smallest))
    families = [
        _describe(name, fitting.get(name, []), smallest.get(name), ranked[0])
        for name in sorted({*fitting, *smallest})
    ]
    families.sort(key=lambda family: (not family.best.fits, _seconds(family.best)))
    return Search(_distinct(ranked, 5), families, examined)


def family_name(plan: Plan) -> str:
    """The kind of a plan's layout, in words."""
    layout = plan.layout
    where = "in a node"
    reach = layout.expert_model_parallel_size * layout.expert_tensor_parallel_size
    if reach == 1:
        where = "none"
    elif reach > plan.gpu.nvlink_domain:
        where = "across nodes"
    words = ["HSDP"] if layout.sharding == "hsdp" else ["DDP"]
    words += ["TP"] if layout.tensor_model_parallel_size > 1 else []
    words += ["PP"] if layout.pipeline_model_parallel_size > 1 else []
    return f"{' + '.join(words)}, EP {where}"


def _seconds(plan: Plan) -> float:
    return plan.time.seconds


def _candidates(
    start: Plan, micro_batches: tuple[int, ...], policies: tuple[Recompute, ...]
) -> Iterator[list[Layout]]:
    """Groups of layouts that differ in recomputation only, less of it first."""
    for base in _parallel_sizes(start):
        for batch in micro_batches:
            group = []
            for recompute in policies:
                layout = replace(base, micro_batch_size=batch, recompute=recompute)
                try:
                    check_layout(start.model, layout)
                except UserError:
                    break
                group.append(layout)
            if group:
                yield group


def _parallel_sizes(start: Plan) -> Iterator[Layout]:
    world, model = start.layout.world_size, start.model
    experts = _divisors(model.num_moe_experts, min(world, 128))
    neutral = replace(
        start.layout,
        tensor_model_parallel_size=1,
        pipeline_model_parallel_size=1,
        expert_tensor_parallel_size=1,
        num_virtual_stages=1,
        sharding="ddp",
        shard_size=1,
        account_for_ends=False,
    )
    for ep in experts:
        base = replace(neutral, expert_model_parallel_size=ep)
        for shard in (64, 128, 256):
            if base.dense_ranks % shard == 0:
                yield replace(base, sharding="hsdp", shard_size=shard)
        for tp in (1, 2, 4, 8):
            for pp in (1, 2, 3, 4, 5, 6, 8, 10, 12, 15, 16, 20):
                if world % (tp * pp * ep) == 0:
                    yield from _with_chunks(start, base, tp, pp)


def _with_chunks(start: Plan, base: Layout, tp: int, pp: int) -> Iterator[Layout]:
    layers = start.model.num_layers
    ends = bool(layers % pp) and not start.model.is_trinity
    total = layers + 2 * ends
    if total % pp:
        return
    for chunks in {1, 2, 3, total // pp} if pp > 1 else {1}:
        if total // pp % chunks == 0:
            yield replace(
                base,
                tensor_model_parallel_size=tp,
                pipeline_model_parallel_size=pp,
                num_virtual_stages=chunks,
                account_for_ends=ends,
            )


def _divisors(number: int, most: int) -> list[int]:
    return [size for size in range(1, min(number, most) + 1) if number % size == 0]


def _distinct(ranked: list[Plan], count: int) -> list[Plan]:
    """The fastest of each set of parallel sizes."""
    found: dict[tuple, Plan] = {}
    for plan in ranked:
        layout = plan.layout
        key = (
            layout.sharding,
            layout.tensor_model_parallel_size,
            layout.pipeline_model_parallel_size,
            layout.expert_model_parallel_size,
        )
        found.setdefault(key, plan)
        if len(found) == count:
            break
    return list(found.values())


def _describe(name: str, fitting: list[Plan], smallest: Plan | None, winner: Plan) -> Family:
    """The best of a family, and the reason why it lost."""
    if fitting:
        best = min(fitting, key=_seconds)
        return Family(name, best, "" if best is winner else _why_slower(best, winner))
    assert smallest is not None
    memory = smallest.fullest
    term = max(memory.terms, key=lambda key: memory.terms[key])
    reason = (
        f"does not fit: {sum(memory.needed) / 2 / GIB:.0f} GiB at least of "
        f"{smallest.gpu.memory_bytes / GIB:.0f}, {memory.terms[term] / GIB:.0f} of them {term}"
    )
    return Family(name, smallest, reason)


def _why_slower(plan: Plan, winner: Plan) -> str:
    """The term in which a plan loses most of its time to the winner."""
    ours, theirs = plan.time, winner.time
    terms = {*ours.terms, *theirs.terms}
    lost = {term: ours.terms.get(term, 0.0) - theirs.terms.get(term, 0.0) for term in terms}
    worst = max(sorted(lost), key=lambda term: lost[term])
    percent = 100 * (ours.seconds / theirs.seconds - 1)
    return f"{percent:.0f}% slower, most of it {worst} (+{lost[worst]:.2f} s)"


def _no_layout(start: Plan, smallest: dict[str, Plan]) -> str:
    what = f"--gpus {start.layout.world_size} --gpu {start.gpu.name}"
    if not smallest:
        return (
            f"{what}: no layout keeps the rules with --global-batch-size "
            f"{start.layout.global_batch_size}. Remedy: a batch that is a multiple of the GPUs."
        )
    nearest = min(smallest.values(), key=lambda plan: plan.fullest.peak)
    needed = sum(nearest.fullest.needed) / 2 / GIB
    return (
        f"{what}: {start.model.name} fits under no layout; {nearest.layout.label} comes nearest "
        f"with {needed:.0f} GiB of {start.gpu.memory_bytes / GIB:.0f}. Remedy: more GPUs, or GPUs "
        "with more memory."
    )
