"""Flags of ``trinity-megatron plan``."""

import argparse

PARALLEL_SIZES = (
    "tensor_model_parallel_size",
    "pipeline_model_parallel_size",
    "context_parallel_size",
    "expert_model_parallel_size",
)


def add_plan_flags(parser: argparse.ArgumentParser) -> None:
    """Add them to a parser."""
    parser.add_argument(
        "--preset",
        required=True,
        metavar="NAME|FILE",
        help="tiny, nano, mini or large, or the config.json of a Hugging Face model (afmoe, "
        "qwen3_moe, gpt_oss, mixtral, deepseek_v3)",
    )
    parser.add_argument("--gpus", type=int, required=True, metavar="N", help="GPUs of the cluster")
    parser.add_argument(
        "--gpu", required=True, metavar="NAME", help="h100, h200, b200, b300, gb200 or gb300"
    )
    parser.add_argument("--tokens", metavar="N", help="of the run, for example 17T")
    parser.add_argument("--gpu-hour-usd", type=float, metavar="USD", help="price of a GPU hour")
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    parser.add_argument(
        "--verify",
        action="store_true",
        help="build the first, a middle and the last rank of every pipeline stage, without memory, "
        "and compare (Trinity's presets; a minute)",
    )
    _add_layout_flags(parser)


def _add_layout_flags(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("layout", "Megatron's flags; none of the sizes: a search")
    for name in (*PARALLEL_SIZES, "expert_tensor_parallel_size"):
        group.add_argument(f"--{name.replace('_', '-')}", type=int, metavar="N")
    group.add_argument(
        "--num-virtual-stages-per-pipeline-rank",
        "--virtual-pipeline-model-parallel-size",
        dest="num_virtual_stages",
        type=int,
        metavar="N",
    )
    group.add_argument("--num-layers-per-virtual-pipeline-stage", type=int, metavar="N")
    for name in ("micro_batch_size", "global_batch_size", "seq_length"):
        group.add_argument(f"--{name.replace('_', '-')}", type=int, metavar="N")
    group.add_argument("--recompute-granularity", choices=("full", "selective"))
    group.add_argument("--recompute-modules", nargs="*", metavar="NAME")
    group.add_argument(
        "--transformer-impl",
        choices=("local", "transformer_engine"),
        help="default: local for Trinity in bf16, as in a training",
    )
    group.add_argument("--optimizer", choices=("muon", "adam"))
    group.add_argument("--use-megatron-fsdp", action="store_true")
    group.add_argument("--num-distributed-optimizer-instances", type=int, metavar="N")
    group.add_argument("--outer-dp-sharding-strategy", choices=("no_shard", "optim"))
    group.add_argument("--grad-reduce-in-bf16", action="store_true")
    group.add_argument("--exp-avg-dtype", choices=("fp32", "bf16"), default="fp32")
    group.add_argument("--fp8-format", choices=("hybrid", "e4m3"))
    group.add_argument("--fp8-recipe", metavar="NAME")
    newest = "default: as the newest published recipe of the system; off for Trinity"
    group.add_argument(
        "--fp8-dot-product-attention", action=argparse.BooleanOptionalAction, help=newest
    )
    group.add_argument("--cuda-graph-impl", choices=("none", "full_iteration"), help=newest)
    group.add_argument("--dataloader-inter-document-masking", action="store_true")
    group.add_argument(
        "--overlap-moe-expert-parallel-comm",
        action=argparse.BooleanOptionalAction,
        help="default: off for Trinity, whose layers refuse it, on for other models",
    )
    # Without effect on a plan, so that the flags of a training can be given as they are.
    for name in ("sequence-parallel", "use-distributed-optimizer", "overlap-grad-reduce",
                 "overlap-param-gather", "bf16", "use-precision-aware-optimizer"):  # fmt: skip
        group.add_argument(f"--{name}", action="store_true", help=argparse.SUPPRESS)
    for name in ("recompute-method", "recompute-num-layers", "data-parallel-sharding-strategy",
                 "exp-avg-sq-dtype"):  # fmt: skip
        group.add_argument(f"--{name}", help=argparse.SUPPRESS)
