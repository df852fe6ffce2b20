"""Bytes that a training step holds on one rank, by arithmetic: nothing is built.

Weights, gradients and optimizer state are exact.  Activations are an estimate of what the backward
pass of the ``local`` layers in bf16 keeps without recomputation; what lives only within a function
(workspaces, Newton-Schulz) is not in it.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from trinity_megatron.model.config import TrinityConfig
from trinity_megatron.optimizer.param_groups import is_adam_parameter
from trinity_megatron.planner.muon_work import stage_parameters

_FP32, _INT64 = 4, 8


@dataclass(frozen=True)
class TrainingMemory:
    """Bytes on one rank.

    Attributes:
        weights: Parameters, expert biases with momentum and counters included.
        gradients: The buffer of gradients.
        optimizer: fp32 masters, momentum, both moments.
        activations: Estimate by kind of module, kept from the forward to the backward pass.
    """

    weights: int
    gradients: int
    optimizer: int
    activations: dict[str, int]

    @property
    def total(self) -> int:
        """Sum of all terms."""
        return self.weights + self.gradients + self.optimizer + sum(self.activations.values())


def training_memory(
    config: TrinityConfig,
    *,
    seq_length: int,
    micro_batch_size: int = 1,
    weight_bytes: Literal[2, 4] = 2,
    optimizer: Literal["muon", "adam"] = "muon",
    layers: Sequence[int] | None = None,
    expert_parallel: int = 1,
) -> TrainingMemory:
    """Add up what one rank holds, with the optimizer's state not sharded.

    For state that the distributed optimizer shards see :mod:`trinity_megatron.planner.muon_work`.

    Args:
        config: The model.
        seq_length: Tokens of a sequence.
        micro_batch_size: Sequences of a micro-batch.
        weight_bytes: 2 for bf16 weights with fp32 masters, 4 for fp32.
        optimizer: Muon with AdamW for embedding, head and norms, or AdamW for all.
        layers: Layers (from 0) of this pipeline stage; default: all.
        expert_parallel: Expert-parallel size.
    """
    layers = range(config.num_layers) if layers is None else layers
    is_first, is_last = 0 in layers, config.num_layers - 1 in layers
    numel = state = 0
    for name, param in stage_parameters(
        config, config.vocab_size, layers, is_first, is_last, expert_parallel
    ):
        numel += param.numel()
        is_muon = optimizer == "muon" and not is_adam_parameter(param, name)
        state += param.numel() * _state_bytes(is_muon, has_master=weight_bytes < _FP32)
    moe_layers = sum(layer >= config.num_dense_layers for layer in layers)
    # Bias and its momentum in fp32, the counter in int64; on every rank for all experts.
    balance = moe_layers * (config.num_moe_experts or 0) * (2 * _FP32 + _INT64)
    return TrainingMemory(
        weights=numel * weight_bytes + balance,
        gradients=numel * _FP32,
        optimizer=state,
        activations=activation_memory(
            config, seq_length * micro_batch_size, weight_bytes, layers, is_last
        ),
    )


def _state_bytes(is_muon: bool, *, has_master: bool) -> int:
    """Bytes of state for an element: Muon has one momentum, AdamW two moments."""
    return _FP32 * (has_master + (1 if is_muon else 2))


def activation_memory(
    config: TrinityConfig,
    num_tokens: int,
    itemsize: int,
    layers: Sequence[int],
    is_last: bool,
) -> dict[str, int]:
    """Estimate what autograd keeps of one micro-batch, by kind of module.

    A tensor counts where it is kept first.  With expert parallelism a rank has as many rows as
    without if the experts are balanced.

    Args:
        config: The model; ``bias_activation_fusion`` is read.
        num_tokens: Tokens of the micro-batch.
        itemsize: Bytes of an activation, 2 or 4.
        layers: Layers of this stage.
        is_last: Whether the stage has the head.
    """
    hidden = config.hidden_size
    num_moe = sum(layer >= config.num_dense_layers for layer in layers)
    num_dense = len(layers) - num_moe
    query, key = _head_sizes(config)
    # The fused kernels keep their input as it is; so do those of queries and keys.
    norms = itemsize * (len(layers) * (4 * hidden + query + key) + is_last * hidden)
    dense = _swiglu(config, config.ffn_hidden_size or 0)
    shared = _swiglu(config, config.moe_shared_expert_intermediate_size or 0)
    values = {
        "norms": norms,
        "attention": len(layers) * _attention(config, itemsize),
        "dense MLP": num_dense * itemsize * (hidden + dense),
        "shared experts": num_moe * itemsize * (hidden + shared),
        "routed experts": num_moe * _routed(config, itemsize),
        "LM head": is_last * itemsize * hidden,
        # The gradient is written into their storage, see model/cross_entropy.py; beside them are
        # a few values for each token.
        "logits": is_last * itemsize * config.vocab_size,
    }
    return {name: value * num_tokens for name, value in values.items()}


def _head_sizes(config: TrinityConfig) -> tuple[int, int]:
    """Channels of all queries and of all keys."""
    head = config.kv_channels or 0
    groups = config.num_query_groups or config.num_attention_heads
    return config.num_attention_heads * head, groups * head


def _attention(config: TrinityConfig, itemsize: int) -> int:
    """Bytes for a token: from the input of the first projection to that of the last."""
    query, key = _head_sizes(config)
    projected = 2 * query + 2 * key  # whole: the values are a view of it
    # The rotated queries and keys, the output of the kernel and in the order of the tokens, and
    # that output gated.
    kept = config.hidden_size + projected + (query + key) + 3 * query
    gate = _FP32 * query
    logsumexp = _FP32 * config.num_attention_heads
    return itemsize * kept + gate + logsumexp


def _swiglu(config: TrinityConfig, width: int) -> int:
    """Numbers for a token: gate and up, and what the second matrix gets.

    Without the fused kernel also the activated gate and a copy of up.
    """
    return width * (3 if config.bias_activation_fusion else 5)


def _routed(config: TrinityConfig, itemsize: int) -> int:
    """Bytes for a token: router, sorted rows, experts."""
    # Scores and weights in fp32 and the selection; the input is kept by the shared experts.
    router = (2 * _FP32 + 2) * (config.num_moe_experts or 0)
    # A row, and what the first product, the activation, its product with up and that with the
    # routing weight make of it.
    row = config.hidden_size + 5 * (config.moe_ffn_hidden_size or 0)
    return router + config.moe_router_topk * row * itemsize
