"""Seconds of a training step by term, from layers, pipeline, data parallelism and optimizer."""

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property

from trinity_megatron.optimizer.sharded.ownership import newton_schulz_flops
from trinity_megatron.planner.constants import CONSTANTS, Constants
from trinity_megatron.planner.kernels.rates import KernelRates
from trinity_megatron.planner.layer_time import LayerModel, Seconds, dense_layer, moe_layer
from trinity_megatron.planner.layout import Layout, divide_layers, merge_chunks
from trinity_megatron.planner.links import collective_seconds
from trinity_megatron.planner.model_description import ModelDescription
from trinity_megatron.planner.rank_shapes import count_elements, list_shapes

_BF16 = 2


@dataclass(frozen=True)
class StepTime:
    """Seconds of a step.

    Attributes:
        terms: Seconds by term; they add up to the step.
        tokens: Tokens of a step.
        world_size: GPUs.
    """

    terms: Mapping[str, float]
    tokens: int
    world_size: int

    @property
    def seconds(self) -> float:
        """Of the whole step."""
        return sum(self.terms.values())

    @property
    def tokens_per_second_per_gpu(self) -> float:
        """Throughput of a GPU."""
        return self.tokens / self.seconds / self.world_size


@dataclass(frozen=True)
class StepModel:
    """What the time of a step follows from.

    Attributes:
        model: Sizes.
        layout: Parallel sizes and batch.
        rates: Of the GPU's kernels.
        optimizer: ``muon`` or ``adam``.
        constants: Of the step model.
    """

    model: ModelDescription
    layout: Layout
    rates: KernelRates
    optimizer: str
    constants: Constants = CONSTANTS

    @cached_property
    def parts(self) -> LayerModel:
        """What the time of a layer follows from."""
        return LayerModel(self.model, self.layout, self.rates, self.constants)

    @cached_property
    def stages(self) -> list[list[int]]:
        """Layers of each pipeline rank."""
        return [merge_chunks(chunks) for chunks in divide_layers(self.model, self.layout)]


def step_time(step: StepModel, imbalance: float = 1.0) -> StepTime:
    """Add up a step.

    Args:
        step: What it follows from.
        imbalance: Rows of the busiest expert-parallel rank over the mean.
    """
    layout = step.layout
    stages = [_stage_seconds(step, number, imbalance) for number in range(len(step.stages))]
    slowest = max(stages, key=lambda seconds: seconds.total)
    terms = {term: layout.num_microbatches * seconds for term, seconds in slowest.by_term().items()}
    pp = layout.pipeline_model_parallel_size
    mean = sum(seconds.total for seconds in stages) / pp
    terms["pipeline_bubble"] = (pp - 1) / layout.num_virtual_stages * mean
    terms["pipeline_exchange"] = _pipeline_exchange(step)
    terms.update(_data_parallel(step, slowest))
    terms.update(_optimizer(step))
    tokens = layout.global_batch_size * layout.seq_length
    return StepTime(terms, tokens, layout.world_size)


def _stage_seconds(step: StepModel, number: int, imbalance: float) -> Seconds:
    """One micro-batch on a rank of a stage."""
    seconds = Seconds()
    kinds: dict[tuple[bool, bool], tuple[int, int]] = {}
    for layer in step.stages[number]:
        key = (layer < step.model.num_dense_layers, step.model.is_global_layer(layer + 1))
        kinds[key] = (layer, kinds.get(key, (0, 0))[1] + 1)
    for (is_dense, _), (layer, count) in kinds.items():
        one = (
            dense_layer(step.parts, layer) if is_dense else moe_layer(step.parts, layer, imbalance)
        )
        _recompute(step.layout, one)
        _host(step, one, is_dense)
        seconds.merge(one, count)
    if number == len(step.stages) - 1:
        _head(step, seconds)
    return seconds


def _recompute(layout: Layout, seconds: Seconds) -> None:
    """Full: the forward pass once more.  Selective: norms and activations, or the MoE layer."""
    if layout.recompute == "full":
        forward = sum(seconds.forward.values())
        seconds.add("recomputation", 0.0, forward)
    elif layout.recompute == "selective":
        again = 0.6 * seconds.forward["elementwise"]
        if layout.transformer_impl == "local":
            again += sum(
                seconds.forward.get(term, 0.0) for term in ("experts", "expert_all_to_all")
            )
        seconds.add("recomputation", 0.0, again)


def _host(step: StepModel, seconds: Seconds, is_dense: bool) -> None:
    """Add the time for which the device waits for launches."""
    constants, layout, model = step.constants, step.layout, step.model
    if layout.graph_of_iteration:
        return
    launches = constants.layer_launches
    is_one_stack = model.is_trinity and layout.fp8_recipe is None  # one grouped product for all
    if not is_dense and not is_one_stack:
        each = constants.expert_launches
        each += constants.bias_launches * model.add_bias_linear
        each += constants.fp8_launches * bool(layout.fp8_recipe)
        launches += each * model.num_moe_experts // layout.expert_model_parallel_size
    waiting = launches * constants.launch - seconds.total
    if waiting > 0:
        seconds.add("host", waiting / 3, 2 * waiting / 3)


def _head(step: StepModel, seconds: Seconds) -> None:
    """LM head and loss, in bf16."""
    parts, model = step.parts, step.model
    rows = model.vocab_size / step.layout.tensor_model_parallel_size
    forward, backward = parts.product(rows, model.hidden_size, "bf16")
    traffic = parts.moved(parts.tokens * rows * (2 + 4))
    seconds.add("lm_head", forward + traffic, backward + traffic)


def _pipeline_exchange(step: StepModel) -> float:
    """Hidden states between stages, as far as they are not hidden."""
    layout = step.layout
    pp = layout.pipeline_model_parallel_size
    if pp == 1:
        return 0.0
    size = step.parts.own_tokens * step.model.hidden_size * _BF16
    once = size / (step.constants.network * step.rates.gpu.network)
    passes = 2 * layout.num_microbatches * layout.num_virtual_stages
    return (1 - step.constants.hidden) * once * passes


def _elements(step: StepModel) -> tuple[int, int]:
    """Of the first stage, which has the embedding."""
    return count_elements(list_shapes(step.model, step.layout, 0))


def _data_parallel(step: StepModel, slowest: Seconds) -> dict[str, float]:
    """Gradients are reduced beside the backward pass, parameters gathered beside the forward."""
    layout = step.layout
    if layout.sharding == "hsdp":
        return _sharded(step, slowest)
    experts, dense = _elements(step)
    reduce = _over_replicas(step, "reduce_scatter", experts, dense, layout.grad_reduce_bytes)
    gather = _over_replicas(step, "all_gather", experts, dense, _BF16)
    hidden = step.constants.hidden
    forward, backward = sum(slowest.forward.values()), sum(slowest.backward.values())
    return {
        "gradient_reduction": reduce - hidden * min(reduce, backward),
        "parameter_gathering": gather - hidden * min(gather, forward),
    }


def _over_replicas(
    step: StepModel, collective: str, experts: float, dense: float, itemsize: int
) -> float:
    """One collective over all replicas of the experts and one over those of the rest."""
    layout = step.layout
    expert_stride = layout.expert_model_parallel_size * layout.expert_tensor_parallel_size
    return collective_seconds(
        step.rates,
        step.constants,
        collective,
        experts * itemsize,
        layout.expert_ranks,
        expert_stride,
    ) + collective_seconds(
        step.rates,
        step.constants,
        collective,
        dense * itemsize,
        layout.dense_ranks,
        layout.tensor_model_parallel_size,
    )


def _sharded(step: StepModel, slowest: Seconds) -> dict[str, float]:
    """HSDP: parameters are gathered for both passes of each micro-batch, gradients reduced in each.

    Over the replicas of a sharding group the gradients are reduced and the updates gathered once a
    step.
    """
    layout = step.layout
    ep, shard = layout.expert_model_parallel_size, layout.shard_size
    experts, dense = _elements(step)

    def inside(collective: str, itemsize: int) -> float:
        return collective_seconds(
            step.rates, step.constants, collective, experts * itemsize, shard // ep, ep
        ) + collective_seconds(step.rates, step.constants, collective, dense * itemsize, shard, 1)

    gather, reduce = inside("all_gather", _BF16), inside("reduce_scatter", layout.grad_reduce_bytes)
    forward, backward = sum(slowest.forward.values()), sum(slowest.backward.values())
    hidden, batches = step.constants.hidden, layout.num_microbatches
    before = gather - hidden * min(gather, forward)
    both = gather + reduce
    beside = both - hidden * min(both, backward)
    across = _over_groups(step, experts * ep / shard + dense / shard)
    across -= hidden * min(across, backward)
    return {
        "parameter_gathering": batches * (before + beside * gather / both) if both else 0.0,
        "gradient_reduction": (batches * beside * reduce / both if both else 0.0) + across,
    }


def _over_groups(step: StepModel, held: float) -> float:
    """Once a step over the replicas of a sharding group, of what a rank of it holds.

    Gradients are added up and, with ``outer_shard``, the updated weights gathered from the ranks
    that made them; else every replica makes them all, and needs all of the sum.
    """
    layout = step.layout
    replicas = layout.dense_ranks // layout.shard_size

    def once(collective: str, itemsize: int) -> float:
        size = held * itemsize
        return collective_seconds(
            step.rates, step.constants, collective, size, replicas, layout.shard_size
        )

    itemsize = _BF16 if layout.outer_shard else layout.grad_reduce_bytes
    return once("reduce_scatter", layout.grad_reduce_bytes) + once("all_gather", itemsize)


def _optimizer(step: StepModel) -> dict[str, float]:
    """The state is read and written once; Muon orthogonalizes its share of the matrices."""
    layout = step.layout
    experts, dense = _elements(step)
    expert_ranks, dense_ranks = layout.state_ranks
    held = experts / expert_ranks + dense / dense_ranks
    # Master, both moments and gradient are read, all but the gradient written, and the weight.
    terms = {"optimizer": step.parts.moved(held * (4 * 4 + 3 * 4 + 2))}
    if step.optimizer == "muon":
        terms["muon"] = _muon(step)
    return terms


def _muon(step: StepModel) -> float:
    """Newton-Schulz is shared over the ranks that share the state.

    Those are all of a stage (see ``optimizer/sharded/ownership.py``), or one sharding group of HSDP
    where each of its replicas repeats the work.
    """
    layout = step.layout
    seconds = 0.0
    for shape in list_shapes(step.model, step.layout, 0):
        if shape.is_vector_or_vocabulary:
            continue
        count, (rows, columns) = 1, shape.shape[-2:]
        if shape.is_expert:
            count = shape.shape[0] * layout.expert_model_parallel_size
        blocks = 2 if "linear_fc1" in shape.name else 1  # gate and up apart
        rows = rows // blocks
        rate = step.constants.muon * step.rates.gemm(min(rows, columns), columns, rows)
        seconds += blocks * count * newton_schulz_flops(rows, columns) / rate
    if layout.sharding == "hsdp" and not layout.outer_shard:
        return seconds / layout.shard_size
    return seconds / (layout.world_size // layout.pipeline_model_parallel_size)
