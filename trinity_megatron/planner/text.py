"""A plan in words and numbers for a terminal."""

from collections.abc import Iterable

from trinity_megatron.planner.layout import SELECTIVE_MODULES, Layout
from trinity_megatron.planner.plan import GIB, Plan, best_changes, fp8_gain
from trinity_megatron.planner.search import Search

_TERM_NAMES = {
    "matrices": "linear layers",
    "attention": "attention",
    "elementwise": "norms, activations, permutation",
    "quantization": "FP8 quantization",
    "tensor_parallel": "tensor-parallel exchange",
    "context_parallel": "context-parallel exchange",
    "experts": "experts (grouped products)",
    "expert_all_to_all": "expert all-to-all",
    "host": "waiting for launches",
    "lm_head": "LM head and loss",
    "recomputation": "recomputation",
    "pipeline_bubble": "pipeline bubble",
    "pipeline_exchange": "pipeline exchange",
    "gradient_reduction": "gradient reduction",
    "parameter_gathering": "parameter gathering",
    "optimizer": "optimizer state",
    "muon": "Newton-Schulz",
}


def describe_plan(plan: Plan) -> str:
    """All about one plan."""
    lines = [
        f"{plan.model.name} on {plan.layout.world_size} x {plan.gpu.title}: {plan.layout.label}, "
        f"{plan.layout.fp8_recipe or 'bf16'}, sequences of {plan.layout.seq_length:,}, batches of "
        f"{plan.layout.global_batch_size:,}",
        f"flags: {layout_flags(plan.layout)}",
        "",
        *_memory_lines(plan),
        "",
        *_time_lines(plan),
        "",
        *_rate_lines(plan),
    ]
    lines += _warnings(plan)
    lines.append(f"kernel rates: {plan.rates.source}")
    return "\n".join(lines)


def describe_search(search: Search, beside: Plan | None) -> str:
    """The best layouts, why the others lose, and all about the first.

    Args:
        search: What was found.
        beside: A layout to show beside them; None for none.
    """
    best = search.best[0]
    lines = [describe_plan(best), "", f"best of {search.examined} layouts:"]
    shown = [*search.best, *([beside] if beside else [])]
    for number, plan in enumerate(shown, 1):
        name = "the report's layout" if plan is beside else str(number)
        lines.append(f"  {name}. {summarize(plan)}")
    if beside is not None:
        ratio = beside.time.seconds / best.time.seconds
        lines.append(f"     which takes {ratio:.2f} times as long as the best")
    losers = [family for family in search.families if family.reason]
    if losers:
        lines += ["", "why other kinds of layouts lose:"]
    for family in losers:
        lines.append(f"  {family.name} ({family.best.layout.label}): {family.reason}")
    return "\n".join(lines)


def summarize(plan: Plan) -> str:
    """A plan in one line."""
    rate = plan.time.tokens_per_second_per_gpu
    low, high = plan.learned
    words = [
        plan.layout.label,
        f"{plan.fullest.peak / GIB:.0f} GiB",
        f"{rate:,.0f} tokens/s/GPU ({low:,.0f} to {high:,.0f} learned)",
        f"step {plan.time.seconds:.2f} s",
    ]
    if plan.days is not None:
        words.append(f"{plan.days:.1f} days")
    if not plan.fits:
        words.append("DOES NOT FIT")
    return ", ".join(words)


def layout_flags(layout: Layout) -> str:
    """The flags of a training with this layout."""
    flags = []
    for name in (
        "tensor_model_parallel_size",
        "pipeline_model_parallel_size",
        "context_parallel_size",
        "expert_model_parallel_size",
    ):
        if (size := getattr(layout, name)) > 1:
            flags.append(f"--{name.replace('_', '-')} {size}")
    if layout.tensor_model_parallel_size > 1:
        size = layout.expert_tensor_parallel_size
        flags.append(f"--sequence-parallel --expert-tensor-parallel-size {size}")
    if layout.num_virtual_stages > 1:
        flags.append(f"--num-virtual-stages-per-pipeline-rank {layout.num_virtual_stages}")
    flags.append(f"--micro-batch-size {layout.micro_batch_size}")
    flags.append(f"--global-batch-size {layout.global_batch_size}")
    flags.append(f"--seq-length {layout.seq_length}")
    if layout.recompute == "full":
        flags.append("--recompute-granularity full --recompute-method uniform")
        flags.append("--recompute-num-layers 1")
    elif layout.recompute == "selective":
        modules = " ".join(SELECTIVE_MODULES[layout.transformer_impl])
        flags.append(f"--recompute-granularity selective --recompute-modules {modules}")
    if layout.sharding == "hsdp":
        instances = layout.dense_ranks // layout.shard_size
        flags.append(f"--use-megatron-fsdp --num-distributed-optimizer-instances {instances}")
        flags.append("--data-parallel-sharding-strategy optim_grads_params")
        if layout.outer_shard:
            flags.append("--outer-dp-sharding-strategy optim")
    else:
        flags.append("--use-distributed-optimizer --overlap-grad-reduce --overlap-param-gather")
    if layout.transformer_impl == "transformer_engine":
        flags.append("--transformer-impl transformer_engine")
    if layout.grad_reduce_bytes == 2:
        flags.append("--grad-reduce-in-bf16")
    if layout.moment_bytes == 2:
        flags.append("--use-precision-aware-optimizer")
        flags.append("--exp-avg-dtype bf16 --exp-avg-sq-dtype bf16")
    if layout.fp8_recipe:
        flags.append(f"--fp8-format hybrid --fp8-recipe {layout.fp8_recipe}")
    return " ".join(flags)


def _memory_lines(plan: Plan) -> Iterable[str]:
    yield "memory of the fullest rank of each pipeline stage, GiB:"
    for number, stage in enumerate(plan.memory):
        terms = ", ".join(
            f"{name} {size / GIB:.1f}" for name, size in stage.terms.items() if size >= GIB / 20
        )
        yield f"  {number}: {stage.peak / GIB:.1f} = {terms}"
    stage = plan.fullest
    low, high = stage.needed
    verdict = "fits" if plan.fits else "DOES NOT FIT"
    yield (
        f"  reserved, with fragmentation, NCCL and CUDA: {low / GIB:.0f} to {high / GIB:.0f} of "
        f"{plan.gpu.memory_bytes / GIB:.1f} GiB: {verdict}"
    )
    if low <= plan.gpu.memory_bytes < high:
        yield "  the upper end of that band does not fit: leave more room for a long run"
    yield f"  an asynchronous save holds {stage.host / GIB:.1f} GiB a rank in the host's memory"


def _time_lines(plan: Plan) -> Iterable[str]:
    total = plan.time.seconds
    yield f"a step takes {total:.3f} s with balanced experts:"
    terms = sorted(plan.time.terms.items(), key=lambda item: -item[1])
    for name, seconds in terms:
        if seconds >= 0.001 * total:
            yield f"  {_TERM_NAMES[name]:32} {seconds:8.3f} s {100 * seconds / total:5.1f}%"
    yield f"  what binds: {_TERM_NAMES[terms[0][0]]}"
    changes = best_changes(plan)
    for change in changes:
        yield f"  {change.flags} would make it {100 * (change.gain - 1):.0f}% faster"
    if not changes:
        yield "  no single flag would make it faster and fit"


def _rate_lines(plan: Plan) -> Iterable[str]:
    low, high = plan.learned
    yield (
        f"{plan.time.tokens_per_second_per_gpu:,.0f} tokens/s/GPU balanced, {low:,.0f} to "
        f"{high:,.0f} under learned routing"
    )
    if plan.days is None or plan.gpu_hours is None or plan.budget.tokens is None:
        return
    slow = plan.days * plan.time.tokens_per_second_per_gpu
    yield (
        f"{plan.budget.tokens / 1e12:g}T tokens: {plan.days:.1f} days balanced, {slow / high:.1f} "
        f"to {slow / low:.1f} learned, without interruptions; {plan.gpu_hours:,.0f} GPU hours"
        + (
            ""
            if plan.budget.gpu_hour_usd is None
            else f", {plan.gpu_hours * plan.budget.gpu_hour_usd / 1e6:,.2f} million USD"
        )
    )


def _warnings(plan: Plan) -> Iterable[str]:
    if plan.layout.fp8_recipe is None:
        return
    gain = fp8_gain(plan)
    if gain < 1.05:
        model = plan.model
        yield (
            f"WARNING: FP8 runs at {gain:.2f} times the speed of bf16 here: matrices of "
            f"{model.hidden_size} x {model.moe_ffn_hidden_size} and their rows are too small for "
            "it. Train in bf16."
        )
    else:
        yield f"FP8 runs at {gain:.2f} times the speed of bf16"
