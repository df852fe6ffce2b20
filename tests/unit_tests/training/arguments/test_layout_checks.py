"""Layouts that the ranks or the model do not allow are refused by flag, before anything starts."""

from argparse import Namespace
from typing import Any

import pytest

from trinity_megatron.errors import UserError
from trinity_megatron.training.arguments.layout_checks import check_layout


def make_args(**given: Any) -> Namespace:
    """Arguments of the tiny preset on one rank."""
    values: dict[str, Any] = {
        "world_size": 1,
        "num_layers": 4,
        "num_dense_layers": 1,
        "num_attention_heads": 8,
        "num_query_groups": 2,
        "num_experts": 32,
        "moe_router_topk": 4,
        "global_attn_every_n_layers": 4,
        "tensor_model_parallel_size": 1,
        "pipeline_model_parallel_size": 1,
        "context_parallel_size": 1,
        "expert_model_parallel_size": 1,
        "expert_tensor_parallel_size": None,
        "decoder_first_pipeline_num_layers": None,
        "sequence_parallel": False,
        "seq_length": 1000,
        "transformer_impl": "local",
        "micro_batch_size": 8,
        "eval_micro_batch_size": None,  # that of the training
        "dataloader_inter_document_masking": False,
        "moe_router_load_balancing_type": "seq_aux_loss",
    }
    return Namespace(**{**values, **given})


TP2 = {"world_size": 2, "tensor_model_parallel_size": 2, "sequence_parallel": True}
PP2 = {"world_size": 2, "pipeline_model_parallel_size": 2}


@pytest.mark.parametrize(
    ("given", "words"),
    [
        ({"num_dense_layers": 9}, ("--num-dense-layers 9", "--num-layers 4")),
        (
            {"num_experts": 30, "expert_model_parallel_size": 4, "world_size": 4},
            ("--num-experts 30", "--expert-model-parallel-size 4"),
        ),
        ({"moe_router_topk": 64}, ("--moe-router-topk 64", "--num-experts 32")),
        (
            {**TP2, "tensor_model_parallel_size": 3},
            ("--tensor-model-parallel-size 3", "--num-attention-heads 8"),
        ),
        ({**TP2, "sequence_parallel": False}, ("--tensor-model-parallel-size 2", "add --seq")),
        ({"pipeline_model_parallel_size": 2}, ("1 ranks", "--pipeline-model", "--nproc 2")),
        ({"expert_model_parallel_size": 2}, ("1 ranks", "--expert-model-parallel-size 2")),
        ({**TP2, "world_size": 3}, ("3 ranks", "--tensor-model-parallel-size 2", "--nproc 2")),
        (
            {
                "context_parallel_size": 2,
                "world_size": 2,
                "dataloader_inter_document_masking": True,
            },
            ("--context-parallel-size 2", "--micro-batch-size 8", "--micro-batch-size 1"),
        ),
        (
            {
                "context_parallel_size": 2,
                "world_size": 2,
                "micro_batch_size": 1,
                "dataloader_inter_document_masking": True,
                "transformer_impl": "transformer_engine",
            },
            ("--context-parallel-size 2", "--transformer-impl local"),
        ),
        (
            {"context_parallel_size": 4, "world_size": 4, "seq_length": 1001},
            ("--seq-length 1001", "--context-parallel-size 4", "1000 or 1008"),
        ),
        (
            {**TP2, "dataloader_inter_document_masking": True},
            ("--micro-batch-size 8", "mix sequences", "--micro-batch-size 1"),
        ),
        (
            {**PP2, "dataloader_inter_document_masking": True},
            ("--micro-batch-size 8", "--pipeline-model-parallel-size 2", "--micro-batch-size 1"),
        ),
    ],
)
def test_refused(given: dict[str, Any], words: tuple[str, ...]) -> None:
    with pytest.raises(UserError) as error:
        check_layout(make_args(**given))
    assert all(word in str(error.value) for word in (*words, "Remedy: ")), error.value


@pytest.mark.parametrize(
    "given",
    [
        {},
        TP2,
        {**TP2, "world_size": 8, "expert_model_parallel_size": 4},
        {"world_size": 4, "expert_model_parallel_size": 4},
        {
            "world_size": 3,
            "pipeline_model_parallel_size": 3,
            "decoder_first_pipeline_num_layers": 2,  # the field has another name
        },
        {**PP2, "micro_batch_size": 1, "dataloader_inter_document_masking": True},
        {**TP2, "micro_batch_size": 1, "dataloader_inter_document_masking": True},
        {
            "context_parallel_size": 4,
            "world_size": 4,
            "micro_batch_size": 1,
            "dataloader_inter_document_masking": True,
        },
        {"micro_batch_size": 8, "dataloader_inter_document_masking": True},
    ],
)
def test_accepted(given: dict[str, Any]) -> None:
    check_layout(make_args(**given))
