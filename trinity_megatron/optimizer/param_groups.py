"""Which optimizer owns each parameter, and how fused parameters split: the one table of it.

Muon takes the matrices of the hidden layers, AdamW the embedding, the output layer and everything
with one dimension.  Source: Trinity report section 3.4.2; the router under Muon as in prime-rl.
"""

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import Any, Literal

import torch
from torch import Tensor
from torch.nn import Module

from trinity_megatron.cpu_host.numerics import sum_of_squares
from trinity_megatron.errors import UserError
from trinity_megatron.optimizer.matrix_split import MatrixSplit
from trinity_megatron.telemetry.step_statistics import GRADIENT_GROUPS


@dataclass(frozen=True)
class ParamRow:
    """A row of the table.

    Attributes:
        name: Glob on the last components of the parameter's name; wrappers, layer numbers and
            whatever else comes before do not matter.
        optimizer: Who updates it.
        group: Part of the model, one of ``GRADIENT_GROUPS``.
        split: How its rows divide into matrices: per query group into query, gate, key and value,
            or into gate and up projection.
    """

    name: str
    optimizer: Literal["muon", "adam"]
    group: str
    split: Literal["query_groups", "gate_up"] | None = None


PARAM_TABLE: tuple[ParamRow, ...] = (
    ParamRow("embedding.word_embeddings.weight", "adam", "embedding"),
    ParamRow("output_layer.weight", "adam", "lm_head"),
    # Every norm, those of queries and keys included; inside a Transformer Engine linear the norm
    # has the second name.
    ParamRow("*layernorm.weight", "adam", "norms"),
    ParamRow("layer_norm_weight", "adam", "norms"),
    ParamRow("self_attention.linear_qkv.weight", "muon", "attention", "query_groups"),
    ParamRow("self_attention.linear_proj.weight", "muon", "attention"),
    ParamRow("mlp.linear_fc1.weight", "muon", "dense_mlp", "gate_up"),
    ParamRow("mlp.linear_fc2.weight", "muon", "dense_mlp"),
    ParamRow("mlp.shared_experts.linear_fc1.weight", "muon", "shared_experts", "gate_up"),
    ParamRow("mlp.shared_experts.linear_fc2.weight", "muon", "shared_experts"),
    # Stacked [E, out, in] or, in Transformer Engine, one parameter weight0, weight1, ... an expert.
    ParamRow("mlp.experts.linear_fc1.weight*", "muon", "experts", "gate_up"),
    ParamRow("mlp.experts.linear_fc2.weight*", "muon", "experts"),
    ParamRow("mlp.experts.local_experts.*.linear_fc1.weight", "muon", "experts", "gate_up"),
    ParamRow("mlp.experts.local_experts.*.linear_fc2.weight", "muon", "experts"),
    ParamRow("mlp.router.weight", "muon", "router"),
)


def find_row(name: str) -> ParamRow:
    """Return the row of a parameter.

    Args:
        name: Name from ``named_parameters()``, with any prefix.

    Raises:
        ValueError: No row matches.
    """
    rows = [row for row in PARAM_TABLE if fnmatchcase(f".{name}", f"*.{row.name}")]
    if not rows:
        raise ValueError(
            f"parameter {name!r} is in no row of PARAM_TABLE, so no optimizer would own it; add a "
            "row in trinity_megatron/optimizer/param_groups.py"
        )
    assert len(rows) == 1, f"{name} is in several rows of PARAM_TABLE: {rows}"
    return rows[0]


def is_adam_parameter(param: Tensor, name: str) -> bool:
    """Whether AdamW owns a parameter, as a predicate for Megatron's ``ParamKey``.

    Args:
        param: The parameter, ``[n]``, ``[out, in]`` or ``[E, out, in]``.
        name: Its name, with any prefix.

    Raises:
        ValueError: No row matches, or the row gives Muon something that is not a matrix.
    """
    row = find_row(name)
    if row.optimizer == "muon" and param.dim() not in (2, 3):
        raise ValueError(
            f"parameter {name!r} of shape {tuple(param.shape)} is Muon's by the row {row.name!r} "
            "of PARAM_TABLE (trinity_megatron/optimizer/param_groups.py), but Muon takes matrices "
            "[out, in] and stacks [E, out, in] only"
        )
    return row.optimizer == "adam"


def attach_muon_splits(
    named_parameters: Iterable[tuple[str, Tensor]], config: Any, *, split_qkv: bool = True
) -> None:
    """Set ``muon_split`` on every fused parameter.

    Args:
        named_parameters: Names and parameters of this rank's part of the model.
        config: Megatron's ``TransformerConfig``.
        split_qkv: Whether query, gate, key and value are separate matrices.

    Raises:
        ValueError: A parameter is in no row of the table, the model interleaves gate and up rows,
            a query group is divided over tensor-parallel ranks, or weights are sharded further.
    """
    for field in ("moe_mlp_glu_interleave_size", "moe_shared_expert_glu_interleave_size"):
        if getattr(config, field, None) is not None:
            raise UserError(
                f"{field}={getattr(config, field)}: Muon splits gate and up as two blocks of rows "
                "and has no split for interleaved ones; leave it unset"
            )
    for name, param in named_parameters:
        if getattr(param, "is_gtp_weight_remat", False):
            raise UserError(
                f"parameter {name!r} is divided beyond tensor parallelism, and Muon would take its "
                "shards for whole matrices; drop --tensor-parallel-num-weight-shards and "
                "--expert-tensor-parallel-num-weight-shards"
            )
        split = find_row(name).split
        if split == "gate_up" and config.gated_linear_unit:
            half = param.shape[-2] // 2
            param.muon_split = MatrixSplit((half, half))  # type: ignore[attr-defined]
        elif split == "query_groups" and split_qkv:
            sizes = _query_group_rows(config)
            if param.shape[-2] % sum(sizes):
                raise UserError(
                    f"parameter {name!r} has {param.shape[-2]} rows, which is no multiple of the "
                    f"{sum(sizes)} rows of a query group: num_query_groups="
                    f"{config.num_query_groups} must be a multiple of the tensor-parallel size for "
                    "Muon to split it; lower --tensor-model-parallel-size"
                )
            param.muon_split = MatrixSplit(sizes)  # type: ignore[attr-defined]


def _query_group_rows(config: Any) -> tuple[int, ...]:
    """Rows of one query group: queries, gates (with an output gate), key, value.

    Source: Megatron-Core, attention.py, SelfAttention.get_query_key_value_tensors.
    """
    head = config.kv_channels
    queries = config.num_attention_heads // config.num_query_groups * head
    gates = (queries,) if config.attention_output_gate else ()
    return (queries, *gates, head, head)


def label_gradient_groups(model: list[Module]) -> list[Module]:
    """Set ``gradient_group`` on every trained parameter: a Megatron ``pre_wrap_hook``.

    Megatron copies the attribute to the optimizer's own copies and shards of the parameter
    (`registered_muon` adds the name to Megatron's table of such attributes).

    Raises:
        ValueError: A parameter is in no row of the table.
    """
    for chunk in model:
        for name, param in chunk.named_parameters():
            if param.requires_grad:
                param.gradient_group = find_row(name).group  # type: ignore[attr-defined]
    return model


def local_gradient_squares(optimizer: Any, replicas: Callable[[Tensor], int]) -> Tensor:
    """This rank's share of the squared gradient norm of each group.

    The sum over all ranks of the world is the squared norm: what several ranks hold counts in
    parts, tensor-parallel duplicates count once.

    Args:
        optimizer: Megatron's optimizer after its step; its gradients are clipped.
        replicas: Number of data-parallel ranks that hold a whole parameter's gradient, for dense
            parameters and for experts.

    Returns:
        fp64 ``[len(GRADIENT_GROUPS)]`` on the device of the gradients.
    """
    squares = torch.zeros(
        len(GRADIENT_GROUPS), dtype=torch.float64, device=torch.cuda.current_device()
    )
    for part in getattr(optimizer, "chained_optimizers", [optimizer]):
        copies = None
        if hasattr(part, "shard_fp32_groups"):  # DistributedOptimizer: every instance has it all
            copies = part.ddp_config.num_distributed_optimizer_instances
        for param in part.get_parameters():
            group = getattr(param, "gradient_group", None)
            if group is None:  # FSDP makes parameters of its own, without our attribute
                continue
            for grad in part._filter_grads_for_norm([param]):
                share = sum_of_squares(grad) / (copies or replicas(param))
                squares[GRADIENT_GROUPS.index(group)] += share
    return squares
