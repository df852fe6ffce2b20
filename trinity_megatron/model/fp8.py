"""FP8 through Transformer Engine: which GPU runs which recipe, and what Trinity keeps out of FP8.

In FP8 are the matrix products of the linear layers: attention projections, dense MLP, shared and
routed experts.  The router, the LM head, the embedding, the norms and the products inside attention
are not, and the first and the last layer are not (configurable).
"""

from argparse import Namespace
from dataclasses import dataclass

from trinity_megatron.errors import UserError

Capability = tuple[int, int]


@dataclass(frozen=True)
class Fp8Recipe:
    """Where a recipe runs and what it asks of shapes.

    Attributes:
        since: Lowest compute capability that runs it.
        before: First compute capability that no longer does; None if there is none.
        cuda: Lowest CUDA version that torch has to be built with.
        multiple: What both sides of each matrix, and the tokens of a micro-batch on a rank, must be
            a multiple of.  Rows of an expert are padded to it.
        what: In one line.
    """

    since: Capability
    before: Capability | None
    cuda: tuple[int, int]
    multiple: int
    what: str

    def runs_on(self, capability: Capability, cuda: tuple[int, int]) -> bool:
        """Whether a GPU of this compute capability runs the recipe under this CUDA version."""
        is_too_new = self.before is not None and capability >= self.before
        return capability >= self.since and not is_too_new and cuda >= self.cuda


# By Megatron's --fp8-recipe, best first.  Source: Transformer Engine 2.20.2, common/recipe and
# pytorch/quantization.py (check_*_support, get_align_size_for_quantization).
FP8_RECIPES: dict[str, Fp8Recipe] = {
    "mxfp8": Fp8Recipe((10, 0), (12, 0), (12, 8), 32, "one power-of-two scale for 32 values"),
    "blockwise": Fp8Recipe((9, 0), None, (12, 9), 16, "one scale for 1x128 or 128x128 values"),
    "tensorwise": Fp8Recipe((8, 9), None, (12, 1), 16, "one scale a tensor, of its present values"),
    "delayed": Fp8Recipe((8, 9), None, (12, 1), 16, "one scale a tensor, of its past values"),
}


def supported_recipes(
    capability: Capability, *, cuda: tuple[int, int] = (13, 0)
) -> tuple[str, ...]:
    """Names of the recipes that a GPU runs, best first.

    Args:
        capability: Compute capability: (9, 0) is Hopper, (10, 0) B200, (10, 3) B300.
        cuda: Version of CUDA that torch was built with.
    """
    return tuple(name for name, recipe in FP8_RECIPES.items() if recipe.runs_on(capability, cuda))


# Argument (dest) -> (its flag, why the Trinity layers do not take it).
_NOT_IN_FP8 = {
    "fp8_output_proj": ("--fp8-output-proj", "the LM head stays in bf16"),
    "fp8_param_gather": (
        "--fp8-param-gather",
        "Muon and the stacked experts update bf16 and fp32 weights, FP8 ones would never change",
    ),
    "reuse_grad_buf_for_mxfp8_param_ag": (
        "--reuse-grad-buf-for-mxfp8-param-ag",
        "it belongs to --fp8-param-gather, which is not supported",
    ),
    "moe_router_padding_for_quantization": (
        "--moe-router-padding-for-quantization",
        "it changes which experts a token goes to; the experts pad their rows themselves",
    ),
    "moe_router_padding_for_fp8": (
        "--moe-router-padding-for-fp8",
        "it changes which experts a token goes to; the experts pad their rows themselves",
    ),
}


def check_fp8(
    args: Namespace, capability: Capability | None, *, cuda: tuple[int, int] = (13, 0)
) -> None:
    """Refuse FP8 flags that this GPU or the Trinity layers cannot meet; nothing is downgraded.

    Args:
        args: Megatron's arguments, complete but not validated.
        capability: Of the GPU; None without one.
        cuda: Version of CUDA that torch was built with.

    Raises:
        UserError: Names the flag, its value and the recipes that this GPU runs.
    """
    recipes = supported_recipes(capability, cuda=cuda) if capability else ()
    remedy = _remedy(recipes)
    where = f"on compute capability {capability[0]}.{capability[1]}" if capability else "on a CPU"
    if args.fp4:
        raise UserError(
            f"--fp4-format {args.fp4} is not supported by the Trinity layers. Remedy: {remedy}."
        )
    for dest, (flag, why) in _NOT_IN_FP8.items():
        if getattr(args, dest, False):
            raise UserError(f"{flag} is not supported: {why}. Remedy: drop {flag}.")
    if not args.fp8:
        return
    if not recipes:
        raise UserError(f"--fp8-format {args.fp8}: no FP8 recipe runs {where}. Remedy: {remedy}.")
    if args.transformer_impl != "transformer_engine":
        raise UserError(
            f"--fp8-format {args.fp8} with --transformer-impl {args.transformer_impl}: only "
            "Transformer Engine computes in FP8, the other layers would go on in bf16 without a "
            "word. Remedy: --transformer-impl transformer_engine, or drop --fp8-format."
        )
    if args.fp8_recipe not in recipes:
        version = f"{cuda[0]}.{cuda[1]}"
        raise UserError(
            f"--fp8-recipe {args.fp8_recipe} does not run {where} with CUDA {version}. "
            f"Remedy: {remedy}."
        )
    if not args.fp8_wgrad:
        raise UserError(
            "--no-fp8-wgrad is not supported: Transformer Engine does not read it any more, weight "
            "gradients would be in FP8 all the same. Remedy: drop --no-fp8-wgrad."
        )
    if args.fp8_recipe == "delayed" and args.first_last_layers_bf16:
        raise UserError(
            "--first-last-layers-bf16 with --fp8-recipe delayed: its scales belong to all layers. "
            f"Remedy: drop --first-last-layers-bf16, or {_remedy(recipes, without='delayed')}."
        )
    first, last = args.num_layers_at_start_in_bf16, args.num_layers_at_end_in_bf16
    if args.first_last_layers_bf16 and first + last >= args.num_layers:
        raise UserError(
            f"--num-layers-at-start-in-bf16 {first} and --num-layers-at-end-in-bf16 {last} leave "
            f"none of --num-layers {args.num_layers} in FP8. Remedy: lower them, or drop "
            "--fp8-format."
        )
    _check_shapes(args, FP8_RECIPES[args.fp8_recipe].multiple)


def fp8_defaults(
    args: Namespace, capability: Capability, *, cuda: tuple[int, int] = (13, 0)
) -> str | None:
    """Trinity's choices on top of ``--fp8-format``: the recipe, and bf16 at both ends.

    Args:
        args: Megatron's arguments; ``fp8_recipe`` is None if none was asked for.  Changed.
        capability: Of the GPU.
        cuda: Version of CUDA that torch was built with.

    Returns:
        A line that says what is in FP8; None without FP8.

    Raises:
        UserError: A recipe was asked for without FP8.
    """
    if not args.fp8:
        if args.fp8_recipe is not None:
            raise UserError(
                f"--fp8-recipe {args.fp8_recipe} without --fp8-format would train in bf16. "
                "Remedy: add --fp8-format hybrid or e4m3, or drop --fp8-recipe."
            )
        args.fp8_recipe = "delayed"  # Megatron's own default, which it reads without FP8 too
        return None
    if args.fp8_recipe is None:
        args.fp8_recipe = next(iter(supported_recipes(capability, cuda=cuda)), "delayed")
    line = f"FP8 ({args.fp8_recipe}, {args.fp8}) in the linear layers and the experts"
    if args.fp8_recipe == "delayed":
        return f"{line} of all layers"  # Megatron refuses bf16 layers with delayed scales
    args.first_last_layers_bf16 = True
    first, last = args.num_layers_at_start_in_bf16, args.num_layers_at_end_in_bf16
    return (
        f"{line}; the first {first} and the last {last} layers stay in bf16 "
        "(--num-layers-at-start-in-bf16, --num-layers-at-end-in-bf16)"
    )


def _remedy(recipes: tuple[str, ...], *, without: str | None = None) -> str:
    names = [name for name in recipes if name != without]
    if not names:
        return "drop the flag and train in bf16"
    return f"--fp8-recipe {' or '.join(names)}, with --fp8-format hybrid or e4m3"


def _check_shapes(args: Namespace, multiple: int) -> None:
    """Both sides of each matrix on a rank, and its tokens, must fit the recipe's blocks."""
    tp = args.tensor_model_parallel_size
    etp = args.expert_tensor_parallel_size or tp
    head = args.kv_channels or args.hidden_size // args.num_attention_heads
    rows = 2 * head * (args.num_attention_heads + (args.num_query_groups or 0))
    sizes = {
        "--hidden-size": args.hidden_size,
        "--num-attention-heads x --kv-channels": args.num_attention_heads * head // tp,
        "the number of rows of the fused query, gate, key and value": rows // tp,
        "--ffn-hidden-size": (args.ffn_hidden_size or 0) // tp,
        "--micro-batch-size x --seq-length": args.micro_batch_size
        * args.seq_length
        // (tp * args.context_parallel_size),
    }
    if args.num_experts:
        sizes["--moe-ffn-hidden-size"] = (args.moe_ffn_hidden_size or 0) // etp
        shared = args.moe_shared_expert_intermediate_size or 0
        sizes["--moe-shared-expert-intermediate-size"] = shared // tp
    for what, size in sizes.items():
        if size % multiple:
            raise UserError(
                f"{what} is {size} on a rank, but --fp8-recipe {args.fp8_recipe} wants a multiple "
                f"of {multiple}. Remedy: change it, or train in bf16 (drop --fp8-format)."
            )
