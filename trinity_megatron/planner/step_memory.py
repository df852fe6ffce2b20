"""Bytes of the fullest rank of each pipeline stage, by term."""

from collections.abc import Mapping
from dataclasses import dataclass

from trinity_megatron.planner.activations import (
    full_activations,
    layer_activations,
    logits_bytes,
    working_bytes,
)
from trinity_megatron.planner.hardware import Gpu
from trinity_megatron.planner.layout import Layout, divide_layers, merge_chunks
from trinity_megatron.planner.model_description import ModelDescription
from trinity_megatron.planner.rank_shapes import count_elements, list_shapes
from trinity_megatron.planner.shapes import Shape

_BF16, _FP32 = 2, 4
# NCCL's buffers of a node of 8 (aiconfigurator-core, systems/*.yaml, misc.nccl_mem) for each of the
# groups that a rank talks in at once (data, expert, tensor or pipeline), and CUDA's context.
NCCL_BYTES = 411041792
CONTEXT_BYTES = 600 * 2**20


@dataclass(frozen=True)
class StageMemory:
    """Bytes of one rank.

    Attributes:
        terms: By what they are for; what the allocator hands out.
        outside: NCCL and CUDA's context, which the allocator knows nothing of.
        reserved: The allocator's total, [low, high].
        host: What an asynchronous save holds in the memory of the host.
    """

    terms: Mapping[str, float]
    outside: float
    reserved: tuple[float, float]
    host: float

    @property
    def peak(self) -> float:
        """Allocated at the worst moment of a step."""
        return sum(self.terms.values())

    @property
    def needed(self) -> tuple[float, float]:
        """Of the GPU, [low, high]."""
        return self.reserved[0] + self.outside, self.reserved[1] + self.outside


def stage_memory(
    model: ModelDescription, layout: Layout, gpu: Gpu, optimizer: str, stage: int
) -> StageMemory:
    """What a rank of a stage holds.

    Args:
        model: Sizes.
        layout: Parallel sizes, batch and policy.
        gpu: Whose allocator reserves.
        optimizer: ``muon`` or ``adam``.
        stage: Pipeline rank.
    """
    chunks = divide_layers(model, layout)
    layers = merge_chunks(chunks[stage])
    is_last = stage == len(chunks) - 1
    shapes = list_shapes(model, layout, stage)
    terms = parameter_memory(model, layout, optimizer, shapes, layers)
    terms["activations"] = _activations(model, layout, chunks[stage], stage)
    terms |= _worst_moment(model, layout, layers, is_last)
    peak = sum(terms.values())
    groups = 1 + sum(
        size > 1
        for size in (
            layout.expert_model_parallel_size,
            layout.tensor_model_parallel_size * layout.context_parallel_size,
            layout.pipeline_model_parallel_size,
        )
    )
    outside = CONTEXT_BYTES + (groups * NCCL_BYTES if layout.world_size > 1 else 0)
    low, high = gpu.reserved
    host = terms["optimizer state"] + terms["weights"] / min(layout.state_ranks)
    return StageMemory(terms, outside, (low * peak, high * peak), host)


def _worst_moment(
    model: ModelDescription, layout: Layout, layers: list[int], is_last: bool
) -> dict[str, float]:
    """What lives beside the activations kept: at the loss, or in the backward pass of a layer."""
    at_loss = {"logits": logits_bytes(model, layout) if is_last else 0.0}
    in_layer = {}
    if layout.recompute == "full" and layers:
        in_layer["recomputed layer"] = max(
            sum(full_activations(model, layout, layer).values()) for layer in layers
        )
    if any(layer >= model.num_dense_layers for layer in layers):
        in_layer["dispatch buffers"] = working_bytes(model, layout)
    return max(at_loss, in_layer, key=lambda terms: sum(terms.values()))


def parameter_memory(
    model: ModelDescription,
    layout: Layout,
    optimizer: str,
    shapes: tuple[Shape, ...],
    layers: list[int],
) -> dict[str, float]:
    """Weights, gradients and state: of these shapes, sharded as the layout says."""
    experts, dense = count_elements(shapes)
    moe_layers = sum(layer >= model.num_dense_layers for layer in layers)
    buffers = moe_layers * model.num_moe_experts * model.expert_buffer_bytes
    expert_ranks, dense_ranks = layout.state_ranks
    state = sum(
        shape.numel
        / (expert_ranks if shape.is_expert else dense_ranks)
        * state_bytes(shape, optimizer, layout)
        for shape in shapes
    )
    held: float = experts + dense
    gathered = 0.0
    if layout.sharding == "hsdp":
        held = experts * layout.expert_model_parallel_size / layout.shard_size
        held += dense / layout.shard_size
        gathered = _gathered(shapes, layout)
    terms = {
        "weights": _BF16 * held + buffers,
        "gradients": layout.grad_reduce_bytes * held,
        "optimizer state": state,
    }
    if layout.fp8_recipe:  # by rows and by columns
        linear = sum(shape.numel for shape in shapes if not shape.is_vector_or_vocabulary)
        terms["FP8 weights"] = 2.0 * linear * held / (experts + dense)
    if gathered:
        terms["gathered layers"] = gathered
    return terms


def state_bytes(shape: Shape, optimizer: str, layout: Layout) -> int:
    """Bytes of an element: the master in fp32, and one momentum or two moments."""
    if optimizer == "muon" and not shape.is_vector_or_vocabulary:
        return _FP32 + _FP32
    return _FP32 + 2 * layout.moment_bytes


def _gathered(shapes: tuple[Shape, ...], layout: Layout) -> float:
    """HSDP: weights and gradients of two layers, the present and the next, and of what is in none.

    Embedding and LM head stay gathered, and their gradients are among the last to be reduced.
    """
    layers: dict[str, int] = {}
    others = 0
    for shape in shapes:
        if shape.name.startswith("decoder.layers."):
            unit = ".".join(shape.name.split(".")[:3])
            layers[unit] = layers.get(unit, 0) + shape.numel
        else:
            others += shape.numel
    elements = 2 * max(layers.values()) + others
    return elements * (_BF16 + layout.grad_reduce_bytes)


def _activations(
    model: ModelDescription, layout: Layout, chunks: list[list[int]], stage: int
) -> float:
    """Of all micro-batches that are between their forward and backward pass at the worst moment."""
    sizes = [
        sum(sum(layer_activations(model, layout, layer).values()) for layer in chunk)
        for chunk in chunks
    ]
    return sum(size * count for size, count in zip(sizes, in_flight(layout, stage), strict=True))


def in_flight(layout: Layout, stage: int) -> list[float]:
    """Micro-batches that each chunk of a pipeline rank holds at the worst moment.

    One forward, one backward: rank r of p warms up with p - r - 1 micro-batches.  Interleaved: with
    2 (p - r - 1) + (v - 1) p, which go to the chunks in turns of p.

    Source: Megatron-Core ``pipeline_parallel/schedules.py``, ``get_pp_rank_microbatches``.
    """
    pp, chunks = layout.pipeline_model_parallel_size, layout.num_virtual_stages
    if chunks == 1:
        return [min(pp - stage, layout.num_microbatches)]
    warm_up = 2 * (pp - stage - 1) + (chunks - 1) * pp + 1
    total = min(warm_up, layout.num_microbatches * chunks)
    counts = [0] * chunks
    for number in range(total):
        counts[number // pp % chunks] += 1
    return [float(count) for count in counts]
