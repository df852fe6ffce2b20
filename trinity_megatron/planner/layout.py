"""How a model is laid out on GPUs, and the rules that a layout keeps."""

from collections.abc import Sequence
from dataclasses import dataclass, fields
from functools import cached_property
from typing import Any, Literal

from trinity_megatron.errors import UserError
from trinity_megatron.model.size_rules import check_sizes
from trinity_megatron.planner.model_description import ModelDescription

Sharding = Literal["ddp", "hsdp"]
TransformerImpl = Literal["local", "transformer_engine"]
Recompute = Literal["none", "selective", "full"]
# Megatron's --recompute-modules that "selective" stands for.  The local experts have no activation
# of their own to recompute: their layer is recomputed as a whole.
SELECTIVE_MODULES: dict[TransformerImpl, tuple[str, ...]] = {
    "transformer_engine": ("layernorm", "moe_act"),
    "local": ("moe",),
}


@dataclass(frozen=True, kw_only=True)
class Layout:
    """Parallel sizes, batch and what a rank keeps.

    Attributes:
        world_size: GPUs.
        num_virtual_stages: Chunks of layers that a pipeline rank holds (interleaved schedule).
        sharding: ``ddp``: the distributed optimizer shards the state over data-parallel ranks.
            ``hsdp``: Megatron-FSDP shards weights, gradients and state over ``shard_size`` ranks.
        shard_size: Ranks of a sharding group of ``hsdp``.
        outer_shard: The state of ``hsdp`` is sharded over the replicas of a group too.
        fp8_recipe: None for bf16.
        grad_reduce_bytes: 4 for gradients in fp32, 2 for bf16.
        moment_bytes: Of AdamW's moments: 4, or 2 with the precision-aware optimizer in bf16.
        transformer_impl: ``local`` or ``transformer_engine``.
        recompute: ``selective``: norms and the experts' activation, or whole MoE layers where
            ``transformer_impl`` is ``local``; ``full``: whole layers.
        overlap_expert_all_to_all: Computation of another micro-batch runs during the exchange.
        fp8_attention: The products inside attention are in FP8 too.
        graph_of_iteration: A CUDA graph launches the whole iteration.
        account_for_ends: Embedding and LM head count as a layer each where layers are divided.
    """

    world_size: int
    tensor_model_parallel_size: int = 1
    pipeline_model_parallel_size: int = 1
    context_parallel_size: int = 1
    expert_model_parallel_size: int = 1
    expert_tensor_parallel_size: int = 1
    num_virtual_stages: int = 1
    micro_batch_size: int = 1
    global_batch_size: int = 1
    seq_length: int = 4096
    sharding: Sharding = "ddp"
    shard_size: int = 1
    outer_shard: bool = False
    fp8_recipe: str | None = None
    grad_reduce_bytes: int = 4
    moment_bytes: int = 4
    transformer_impl: TransformerImpl = "transformer_engine"
    recompute: Recompute = "none"
    overlap_expert_all_to_all: bool = False
    fp8_attention: bool = False
    graph_of_iteration: bool = False
    account_for_ends: bool = False

    @property
    def data_parallel_size(self) -> int:
        """Replicas of the dense layers."""
        dense = self.tensor_model_parallel_size * self.context_parallel_size
        return self.world_size // (dense * self.pipeline_model_parallel_size)

    @property
    def dense_ranks(self) -> int:
        """Ranks of a stage with the same dense weights (data and context parallel)."""
        return self.data_parallel_size * self.context_parallel_size

    @property
    def expert_ranks(self) -> int:
        """Ranks of a stage with the same experts."""
        size = self.expert_model_parallel_size * self.expert_tensor_parallel_size
        return self.world_size // (size * self.pipeline_model_parallel_size)

    @property
    def num_microbatches(self) -> int:
        """Micro-batches of a rank in a step."""
        return self.global_batch_size // (self.micro_batch_size * self.data_parallel_size)

    @property
    def tokens_of_microbatch(self) -> int:
        """Tokens of a micro-batch on a rank, before tensor parallelism divides them."""
        return self.micro_batch_size * self.seq_length // self.context_parallel_size

    @property
    def num_replicas(self) -> int:
        """Groups of ranks that each hold all shards of HSDP; 1 without it."""
        return self.dense_ranks // self.shard_size if self.sharding == "hsdp" else 1

    @property
    def state_ranks(self) -> tuple[int, int]:
        """Ranks that share the optimizer's state of the experts, and of the rest."""
        if self.sharding == "ddp" or self.outer_shard:
            return self.expert_ranks, self.dense_ranks
        return self.shard_size // self.expert_model_parallel_size, self.shard_size

    @cached_property
    def label(self) -> str:
        """In one line, as tables write it."""
        words = [f"TP{self.tensor_model_parallel_size}", f"PP{self.pipeline_model_parallel_size}"]
        if self.num_virtual_stages > 1:
            words.append(f"VP{self.num_virtual_stages}")
        if self.context_parallel_size > 1:
            words.append(f"CP{self.context_parallel_size}")
        words.append(f"EP{self.expert_model_parallel_size}")
        if self.expert_tensor_parallel_size > 1:
            words.append(f"ETP{self.expert_tensor_parallel_size}")
        if self.sharding == "hsdp":
            words = [f"HSDP {self.shard_size} x {self.num_replicas}", *words[2:]]
        words.append(f"MBS{self.micro_batch_size}")
        if self.recompute != "none":
            words.append(f"{self.recompute} recompute")
        return " ".join(words)

    def as_flags(self) -> dict[str, Any]:
        """Fields, for ``--json``."""
        return {item.name: getattr(self, item.name) for item in fields(self)}


def check_layout(model: ModelDescription, layout: Layout) -> None:
    """Check a layout by the rules of a training, before anything is counted.

    Raises:
        UserError: Names the flag, its value and the remedy.
    """
    values = {**vars(model), **vars(layout)}
    values["pipeline_model_parallel_layout"] = layout.account_for_ends
    names = {
        "num_moe_experts": "--num-experts",
        "expert_model_parallel_size": "--expert-model-parallel-size",
    }

    def write(field: str) -> str:
        return f"{names.get(field, '--' + field.replace('_', '-'))} {values.get(field)}"

    check_sizes(values.get, write)
    check_ranks(layout)
    check_batch(layout)
    check_virtual_stages(model, layout)
    check_sharding(layout)


def check_ranks(layout: Layout) -> None:
    """The ranks are a multiple of one replica, of the dense layers and of the experts."""
    pp = layout.pipeline_model_parallel_size
    dense = {
        "--tensor-model-parallel-size": layout.tensor_model_parallel_size,
        "--pipeline-model-parallel-size": pp,
        "--context-parallel-size": layout.context_parallel_size,
    }
    experts = {
        "--expert-model-parallel-size": layout.expert_model_parallel_size,
        "--expert-tensor-parallel-size": layout.expert_tensor_parallel_size,
        "--pipeline-model-parallel-size": pp,
    }
    for sizes in (dense, experts):
        product = 1
        for size in sizes.values():
            product *= size
        if product < 1 or layout.world_size % product:
            what = " x ".join(f"{flag} {size}" for flag, size in sizes.items())
            raise UserError(
                f"--gpus {layout.world_size} cannot be divided into {what} = {product}. Remedy: a "
                f"multiple of {product} GPUs, or smaller sizes."
            )


def check_batch(layout: Layout) -> None:
    """The batch divides into micro-batches of all replicas, and sequences into their parts."""
    size = layout.micro_batch_size * layout.data_parallel_size
    if layout.global_batch_size % size or layout.global_batch_size < size:
        near = max(size, round(layout.global_batch_size / size) * size)
        raise UserError(
            f"--global-batch-size {layout.global_batch_size} is no multiple of "
            f"--micro-batch-size {layout.micro_batch_size} x {layout.data_parallel_size} "
            f"data-parallel ranks = {size}. Remedy: --global-batch-size {near}, or other sizes."
        )
    parts = layout.tensor_model_parallel_size * layout.context_parallel_size
    parts *= 2 if layout.context_parallel_size > 1 else 1  # two chunks a rank balance the causality
    if layout.seq_length % parts:
        raise UserError(
            f"--seq-length {layout.seq_length} is no multiple of {parts}, into which tensor and "
            f"context parallelism cut it. Remedy: a multiple of {parts}."
        )


def check_virtual_stages(model: ModelDescription, layout: Layout) -> None:
    """Chunks have equally many layers, and their schedule goes round in whole turns."""
    pp, chunks = layout.pipeline_model_parallel_size, layout.num_virtual_stages
    if chunks == 1:
        return
    layers = model.num_layers + 2 * layout.account_for_ends
    if pp == 1 or layers % (pp * chunks):
        raise UserError(
            f"--num-virtual-stages-per-pipeline-rank {chunks} with --pipeline-model-parallel-size "
            f"{pp} does not divide {layers} layers. Remedy: a divisor of {layers // max(pp, 1)}, "
            "or none."
        )
    if layout.num_microbatches % pp:
        raise UserError(
            f"--num-virtual-stages-per-pipeline-rank {chunks} needs a number of micro-batches "
            f"({layout.num_microbatches}) that --pipeline-model-parallel-size {pp} divides. Remedy:"
            " another --global-batch-size or --micro-batch-size, or no virtual stages."
        )


def check_sharding(layout: Layout) -> None:
    """HSDP divides the data-parallel ranks into groups, and goes without TP and PP."""
    if layout.sharding != "hsdp":
        return
    sizes = (layout.tensor_model_parallel_size, layout.pipeline_model_parallel_size)
    if max(sizes) > 1:
        raise UserError(
            f"--use-megatron-fsdp with --tensor-model-parallel-size {sizes[0]} and "
            f"--pipeline-model-parallel-size {sizes[1]} is not planned for. Remedy: 1 for both, or "
            "drop --use-megatron-fsdp."
        )
    ep = layout.expert_model_parallel_size
    if layout.dense_ranks % layout.shard_size or layout.shard_size % ep:
        raise UserError(
            f"sharding groups of {layout.shard_size} ranks neither divide {layout.dense_ranks} "
            f"data-parallel ranks nor hold whole groups of --expert-model-parallel-size {ep}. "
            "Remedy: another --num-distributed-optimizer-instances."
        )


def divide_layers(model: ModelDescription, layout: Layout) -> list[list[list[int]]]:
    """Layers (from 0) of each chunk of each pipeline rank, ``[rank][chunk]``.

    Source: Megatron's ``get_transformer_layer_offset``: chunk c of rank r is the (c * pp + r)-th.
    """
    pp, chunks = layout.pipeline_model_parallel_size, layout.num_virtual_stages
    ends = int(layout.account_for_ends)
    total = model.num_layers + 2 * ends
    size = total // (pp * chunks)
    ranks: list[list[list[int]]] = [[] for _ in range(pp)]
    for number in range(pp * chunks):
        first = number * size - ends
        layers = range(max(0, first), min(model.num_layers, first + size))
        ranks[number % pp].append(list(layers))
    return ranks


def merge_chunks(chunks: Sequence[Sequence[int]]) -> list[int]:
    """Layers of all chunks of a rank."""
    return [layer for chunk in chunks for layer in chunk]
