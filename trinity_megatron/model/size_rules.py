"""Rules between the sizes of a model and of its parallel layout.

They hold for a ``TrinityConfig`` and, before anything is built, for the arguments of a run: a
reader gives the values, and a way of writing them makes the messages.
"""

from collections.abc import Callable
from typing import Any

from trinity_megatron.errors import UserError

Read = Callable[[str], Any]
"""Returns the value of a field of ``TrinityConfig``."""

Write = Callable[[str], str]
"""Returns a field with its value, for example ``num_layers=4`` or ``--num-layers 4``."""


def check_sizes(read: Read, write: Write) -> None:
    """Check all rules.

    Raises:
        UserError: Names field or flag, its value and the remedy.
    """
    for rule in (
        check_dense_layers,
        check_experts,
        check_topk,
        check_pipeline,
        check_heads,
        check_key_heads,
        check_global_layers,
    ):
        rule(read, write)


def check_dense_layers(read: Read, write: Write) -> None:
    """The dense layers are the first ones; where there are others, there are experts."""
    dense, layers = read("num_dense_layers"), read("num_layers")
    if not 0 <= dense <= layers:
        raise UserError(
            f"{write('num_dense_layers')} is not within 0..{write('num_layers')}. Remedy: set "
            "--num-dense-layers accordingly."
        )
    if dense < layers and not read("num_moe_experts"):
        raise UserError(
            f"{write('num_moe_experts')}, but {layers - dense} layers are MoE layers. Remedy: set "
            "--num-experts, or --num-dense-layers to the number of layers."
        )


def check_experts(read: Read, write: Write) -> None:
    """Expert parallel ranks have equally many experts."""
    experts = read("num_moe_experts")
    if experts and experts % read("expert_model_parallel_size"):
        raise UserError(
            f"{write('num_moe_experts')} is not divisible by {write('expert_model_parallel_size')}."
            f" Remedy: choose --expert-model-parallel-size among the divisors of {experts}."
        )


def check_topk(read: Read, write: Write) -> None:
    """A token cannot go to more experts than there are."""
    experts, topk = read("num_moe_experts"), read("moe_router_topk")
    if experts and not 1 <= topk <= experts:
        raise UserError(
            f"{write('moe_router_topk')} is not within 1..{write('num_moe_experts')}. Remedy: "
            "lower --moe-router-topk or raise --num-experts."
        )


def check_pipeline(read: Read, write: Write) -> None:
    """Pipeline stages have equally many layers, unless the cut is given."""
    layers, stages = read("num_layers"), read("pipeline_model_parallel_size")
    if layers % stages and not any(map(read, _UNEVEN_STAGES)):
        raise UserError(
            f"{write('num_layers')} is not divisible by {write('pipeline_model_parallel_size')}. "
            f"Remedy: choose --pipeline-model-parallel-size among the divisors of {layers}, or cut "
            "the layers with --pipeline-model-parallel-layout."
        )


_UNEVEN_STAGES = (
    "pipeline_model_parallel_layout",
    "num_layers_in_first_pipeline_stage",
    "num_layers_in_last_pipeline_stage",
    "account_for_embedding_in_pipeline_split",
    "account_for_loss_in_pipeline_split",
)


def check_heads(read: Read, write: Write) -> None:
    """Tensor parallel ranks have equally many heads."""
    heads = read("num_attention_heads")
    if heads % read("tensor_model_parallel_size"):
        raise UserError(
            f"{write('tensor_model_parallel_size')} does not divide {write('num_attention_heads')}."
            f" Remedy: choose --tensor-model-parallel-size among the divisors of {heads}."
        )


def check_key_heads(read: Read, write: Write) -> None:
    """Query heads share key heads evenly, and no key head is split over ranks."""
    heads, groups = read("num_attention_heads"), read("num_query_groups")
    if groups and heads % groups:
        raise UserError(
            f"{write('num_query_groups')} does not divide {write('num_attention_heads')}. Remedy: "
            f"choose --num-query-groups among the divisors of {heads}."
        )
    if groups and read("tensor_model_parallel_size") > groups:
        raise UserError(
            f"{write('tensor_model_parallel_size')} is larger than {write('num_query_groups')}: a "
            f"key head would be split. Remedy: --tensor-model-parallel-size at most {groups}."
        )


def check_global_layers(read: Read, write: Write) -> None:
    """Every n-th layer is global."""
    if read("global_attn_every_n_layers") < 1:
        raise UserError(
            f"{write('global_attn_every_n_layers')} must be positive. Remedy: 4 is the released "
            "pattern."
        )
