"""Parameters of a rank under a layout."""

from functools import cache

from trinity_megatron.planner.layout import Layout, divide_layers, merge_chunks
from trinity_megatron.planner.model_description import ModelDescription
from trinity_megatron.planner.shapes import Shape, stage_shapes


def list_shapes(model: ModelDescription, layout: Layout, stage: int) -> tuple[Shape, ...]:
    """Parameters of a rank of a pipeline stage, whole: before HSDP shards them."""
    chunks = divide_layers(model, layout)
    return _list_shapes(
        model,
        tuple(merge_chunks(chunks[stage])),
        stage == 0,
        stage == len(chunks) - 1,
        layout.expert_model_parallel_size,
        layout.tensor_model_parallel_size,
        layout.expert_tensor_parallel_size,
    )


@cache
def _list_shapes(
    model: ModelDescription,
    layers: tuple[int, ...],
    is_first: bool,
    is_last: bool,
    expert_parallel: int,
    tensor_parallel: int,
    expert_tensor_parallel: int,
) -> tuple[Shape, ...]:
    return tuple(
        stage_shapes(
            model,
            model.vocab_size,
            layers,
            is_first,
            is_last,
            expert_parallel,
            tensor_parallel=tensor_parallel,
            expert_tensor_parallel=expert_tensor_parallel,
        )
    )


@cache
def count_elements(shapes: tuple[Shape, ...]) -> tuple[int, int]:
    """Elements of the experts and of all else."""
    experts = sum(shape.numel for shape in shapes if shape.is_expert)
    return experts, sum(shape.numel for shape in shapes) - experts
