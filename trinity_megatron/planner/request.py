"""From flags to a plan."""

from argparse import Namespace
from dataclasses import replace
from typing import Any

from trinity_megatron.errors import UserError
from trinity_megatron.model.fp8 import check_fp8, fp8_defaults
from trinity_megatron.planner.hardware import Gpu, get_gpu
from trinity_megatron.planner.kernels.tables import load_rates
from trinity_megatron.planner.layout import SELECTIVE_MODULES, Layout, TransformerImpl
from trinity_megatron.planner.model_description import ModelDescription, describe_model
from trinity_megatron.planner.plan import Budget, Plan
from trinity_megatron.planner.units import parse_count

_SHARD_SIZE = 128  # of the report's run
# Micro-batches of a replica where neither a preset nor a flag gives a batch.
_DEFAULT_MICROBATCHES = 16


def make_plan(
    args: Namespace, model: ModelDescription | None = None, *, own_rates: bool = False
) -> Plan:
    """The plan of the flags of ``trinity-megatron plan``; its sizes are not checked.

    Args:
        args: As parsed.
        model: Instead of ``--preset``.
        own_rates: Take the kernel rates that come with this package in any case.

    Raises:
        UserError: Names the flag, its value and the remedy.
    """
    if args.gpus < 1:
        raise UserError(f"--gpus {args.gpus} is no number of GPUs. Remedy: 1 or more.")
    gpu, model = get_gpu(args.gpu), model or describe_model(args.preset)
    layout = make_layout(args, model, gpu)
    tokens = None if args.tokens is None else parse_count("--tokens", args.tokens)
    if args.gpu_hour_usd is not None and not args.gpu_hour_usd > 0:
        raise UserError(f"--gpu-hour-usd {args.gpu_hour_usd} is no price. Remedy: above 0.")
    return Plan(
        model,
        layout,
        load_rates(gpu, own=own_rates),
        args.optimizer or model.optimizer,
        Budget(tokens, args.gpu_hour_usd),
    )


def make_layout(args: Namespace, model: ModelDescription, gpu: Gpu) -> Layout:
    """The layout of the flags, with defaults; not checked.

    Raises:
        UserError: A flag contradicts another one, or the GPU does not run the FP8 recipe.
    """
    for name, value in vars(args).items():
        if isinstance(value, int) and not isinstance(value, bool) and value < 1:
            raise UserError(
                f"--{name.replace('_', '-')} {value} must be positive. Remedy: 1 or more."
            )
    _check_recomputed_modules(args, model)
    tp = args.tensor_model_parallel_size or 1
    pp = args.pipeline_model_parallel_size or 1
    ends = not model.is_trinity and model.num_layers % pp > 0 and (model.num_layers + 2) % pp == 0
    sizes = Layout(
        world_size=args.gpus,
        tensor_model_parallel_size=tp,
        pipeline_model_parallel_size=pp,
        context_parallel_size=args.context_parallel_size or 1,
        expert_model_parallel_size=args.expert_model_parallel_size or 1,
        expert_tensor_parallel_size=_expert_tensor_parallel(args, model, tp),
        account_for_ends=ends,
        micro_batch_size=args.micro_batch_size or model.training.get("micro_batch_size", 1),
        seq_length=args.seq_length or model.training.get("seq_length", 4096),
        transformer_impl=_transformer_impl(args, model),
        recompute=args.recompute_granularity or "none",
        grad_reduce_bytes=2 if args.grad_reduce_in_bf16 else 4,
        moment_bytes=2 if args.exp_avg_dtype == "bf16" else 4,
        overlap_expert_all_to_all=_overlap(args, model),
    )
    replicas = max(1, sizes.data_parallel_size)
    batch = args.global_batch_size or model.training.get("global_batch_size")
    batch = batch or sizes.micro_batch_size * replicas * max(_DEFAULT_MICROBATCHES, 4 * pp)
    layout = replace(
        sizes,
        global_batch_size=batch,
        num_virtual_stages=_virtual_stages(args, model, sizes),
        **_sharding(args, sizes),
    )
    recipe = _fp8_recipe(args, model, layout, gpu)
    return replace(layout, fp8_recipe=recipe, **_newest_recipe(args, model, gpu, recipe))


def _newest_recipe(
    args: Namespace, model: ModelDescription, gpu: Gpu, fp8_recipe: str | None
) -> dict[str, Any]:
    """What no table of published runs has a column for: graphs of an iteration, FP8 attention.

    Source: Megatron-Bridge 26.08, ``perf_recipes``: MXFP8 on GB200 and GB300 has both.
    """
    is_newest = not model.is_trinity and fp8_recipe == "mxfp8" and gpu.nvlink_domain > 8
    attention, graph = args.fp8_dot_product_attention, args.cuda_graph_impl
    return {
        "fp8_attention": is_newest if attention is None else attention,
        "graph_of_iteration": is_newest if graph is None else graph == "full_iteration",
    }


def _expert_tensor_parallel(args: Namespace, model: ModelDescription, tp: int) -> int:
    """Megatron's default is that of the rest; recipes of other models keep experts whole."""
    if args.expert_tensor_parallel_size:
        return args.expert_tensor_parallel_size
    return tp if model.is_trinity or (args.expert_model_parallel_size or 1) == 1 else 1


def _transformer_impl(args: Namespace, model: ModelDescription) -> TransformerImpl:
    """Of a training: local for Trinity; FP8 is Transformer Engine's alone."""
    if args.transformer_impl:
        return args.transformer_impl
    is_fp8 = args.fp8_format or args.fp8_recipe
    return "local" if model.is_trinity and not is_fp8 else "transformer_engine"


def _check_recomputed_modules(args: Namespace, model: ModelDescription) -> None:
    """Other modules than those that are planned for are not counted as if they were."""
    planned = SELECTIVE_MODULES[_transformer_impl(args, model)]
    if args.recompute_modules is not None and set(args.recompute_modules) != set(planned):
        raise UserError(
            f"--recompute-modules {' '.join(args.recompute_modules)} is not planned for. Remedy: "
            f"{' '.join(planned)}, or drop the flag."
        )


def _overlap(args: Namespace, model: ModelDescription) -> bool:
    overlap = args.overlap_moe_expert_parallel_comm
    for flag, value in (
        ("--overlap-moe-expert-parallel-comm", overlap),
        ("--fp8-dot-product-attention", args.fp8_dot_product_attention),
        ("--cuda-graph-impl full_iteration", args.cuda_graph_impl == "full_iteration"),
    ):
        if value and model.is_trinity:
            raise UserError(
                f"{flag} is not supported by the Trinity layers. Remedy: drop the flag."
            )
    return not model.is_trinity if overlap is None else overlap


def _virtual_stages(args: Namespace, model: ModelDescription, layout: Layout) -> int:
    size = args.num_layers_per_virtual_pipeline_stage
    if size is None:
        return args.num_virtual_stages or 1
    layers = model.num_layers + 2 * layout.account_for_ends
    pp = layout.pipeline_model_parallel_size
    if args.num_virtual_stages or layers % (pp * size):
        raise UserError(
            f"--num-layers-per-virtual-pipeline-stage {size} does not divide the {layers} layers of"
            f" {pp} pipeline stages, or comes beside --num-virtual-stages-per-pipeline-rank. "
            "Remedy: one of the two flags, with a divisor."
        )
    return layers // (pp * size)


def _sharding(args: Namespace, layout: Layout) -> dict[str, Any]:
    if not args.use_megatron_fsdp:
        return {}
    instances = args.num_distributed_optimizer_instances
    ranks = max(1, layout.dense_ranks)
    if instances is None:
        instances = max(1, ranks // _SHARD_SIZE)
    if ranks % instances:
        raise UserError(
            f"--num-distributed-optimizer-instances {instances} does not divide {ranks} "
            "data-parallel ranks. Remedy: a divisor."
        )
    return {
        "sharding": "hsdp",
        "shard_size": ranks // instances,
        "outer_shard": args.outer_dp_sharding_strategy == "optim",
    }


def _fp8_recipe(args: Namespace, model: ModelDescription, layout: Layout, gpu: Gpu) -> str | None:
    """The recipe, by the rules of a training on this GPU."""
    if not (args.fp8_format or args.fp8_recipe):
        return None
    flags = Namespace(
        fp4=None,
        fp8=args.fp8_format or "hybrid",
        fp8_recipe=args.fp8_recipe,
        fp8_wgrad=True,
        transformer_impl=layout.transformer_impl,
        first_last_layers_bf16=False,
        num_layers_at_start_in_bf16=1,
        num_layers_at_end_in_bf16=1,
        num_layers=model.num_layers,
        num_experts=model.num_moe_experts,
        kv_channels=model.kv_channels,
        hidden_size=model.hidden_size,
        ffn_hidden_size=model.ffn_hidden_size,
        num_attention_heads=model.num_attention_heads,
        num_query_groups=model.num_query_groups,
        moe_ffn_hidden_size=model.moe_ffn_hidden_size,
        moe_shared_expert_intermediate_size=model.moe_shared_expert_intermediate_size,
        tensor_model_parallel_size=layout.tensor_model_parallel_size,
        expert_tensor_parallel_size=layout.expert_tensor_parallel_size,
        context_parallel_size=layout.context_parallel_size,
        micro_batch_size=layout.micro_batch_size,
        seq_length=layout.seq_length,
    )
    fp8_defaults(flags, gpu.capability)
    check_fp8(flags, gpu.capability)
    return flags.fp8_recipe


def report_layout(plan: Plan) -> Plan | None:
    """The report's HSDP x EP8 (128 ranks a group) for Trinity Large beside other layouts.

    Of its micro-batches and policies of recomputation the fastest that fits.

    Returns:
        The plan; None for other models and other numbers of GPUs.
    """
    if plan.model.name != "large" or plan.layout.world_size % _SHARD_SIZE:
        return None
    found = []
    for batch in (1, 2, 3, 4, 6, 8):
        for recompute in ("none", "selective", "full"):
            try:
                other = plan.with_layout(
                    tensor_model_parallel_size=1,
                    pipeline_model_parallel_size=1,
                    expert_tensor_parallel_size=1,
                    num_virtual_stages=1,
                    expert_model_parallel_size=8,
                    sharding="hsdp",
                    shard_size=_SHARD_SIZE,
                    micro_batch_size=batch,
                    recompute=recompute,
                )
            except UserError:
                continue
            if other.fits:
                found.append(other)
    return min(found, key=lambda other: other.time.seconds, default=None)
