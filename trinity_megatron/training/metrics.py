"""Routing metrics of a committed bias update, written by Megatron's own writers."""

import torch
from megatron.core import mpu
from megatron.training import get_args, get_tensorboard_writer, get_wandb_writer

from trinity_megatron.moe.finalize import BiasUpdate
from trinity_megatron.tracking.moe_metrics import max_violation, num_dead_experts
from trinity_megatron.tracking.run_log import BIAS_TAG, TOKENS_TAG


def log_bias_update(update: BiasUpdate) -> None:
    """Write load and bias of all layers on logging steps; in other steps do nothing.

    The layers of all pipeline stages are gathered, because only the last rank has writers.
    """
    args = get_args()
    iteration = args.curr_iteration + 1
    if iteration % args.tensorboard_log_interval:
        return
    layers = {
        number: (update.tokens_per_expert[row].cpu(), update.expert_bias[row].cpu())
        for row, number in enumerate(update.layer_numbers)
    }
    group = mpu.get_pipeline_model_parallel_group()
    if group.size() > 1:
        stages: list[dict] = [{} for _ in range(group.size())]
        torch.distributed.all_gather_object(stages, layers, group=group)
        layers = {number: values for stage in stages for number, values in stage.items()}
    writer = get_tensorboard_writer()
    if writer is None or not layers:
        return
    counts = torch.stack([layers[number][0] for number in sorted(layers)])
    bias = torch.stack([layers[number][1] for number in sorted(layers)])
    writer.add_tensor(TOKENS_TAG, counts, iteration)
    writer.add_tensor(BIAS_TAG, bias, iteration)
    violation = max_violation(counts)
    scalars = {
        "moe/max_violation": violation.max().item(),
        "moe/mean_max_violation": violation.mean().item(),
        "moe/dead_experts": num_dead_experts(counts).sum().item(),
        "moe/max_abs_expert_bias": bias.abs().max().item(),
    }
    for name, value in scalars.items():
        writer.add_scalar(name, value, iteration)
    if wandb_writer := get_wandb_writer():
        wandb_writer.log(scalars, iteration)
