"""Seconds of one layer for one micro-batch on one rank, by term."""

from collections.abc import Iterable
from dataclasses import dataclass, field

from trinity_megatron.planner.constants import Constants
from trinity_megatron.planner.context_exchange import exchange_seconds
from trinity_megatron.planner.kernels.rates import KernelRates
from trinity_megatron.planner.layout import Layout
from trinity_megatron.planner.links import collective_seconds
from trinity_megatron.planner.model_description import ModelDescription

_BF16 = 2


@dataclass
class Seconds:
    """Forward and backward seconds by term."""

    forward: dict[str, float] = field(default_factory=dict)
    backward: dict[str, float] = field(default_factory=dict)

    def add(self, term: str, forward: float, backward: float) -> None:
        """Add to a term."""
        self.forward[term] = self.forward.get(term, 0.0) + forward
        self.backward[term] = self.backward.get(term, 0.0) + backward

    def merge(self, other: "Seconds", times: float = 1.0) -> None:
        """Add another's terms, several times."""
        for term, seconds in other.forward.items():
            self.add(term, times * seconds, times * other.backward[term])

    @property
    def total(self) -> float:
        """Of all terms, both passes."""
        return sum(self.forward.values()) + sum(self.backward.values())

    def by_term(self) -> dict[str, float]:
        """Both passes together."""
        return {term: self.forward[term] + self.backward[term] for term in self.forward}


@dataclass(frozen=True)
class LayerModel:
    """What the time of a layer follows from.

    Attributes:
        model: Sizes.
        layout: Parallel sizes.
        rates: Of the GPU's kernels.
        constants: Of the step model.
    """

    model: ModelDescription
    layout: Layout
    rates: KernelRates
    constants: Constants

    @property
    def tokens(self) -> float:
        """Of a micro-batch where the sequence is whole within the tensor-parallel group."""
        return self.layout.tokens_of_microbatch

    @property
    def own_tokens(self) -> float:
        """Of a micro-batch on this rank, where tensor-parallel ranks have different ones."""
        return self.tokens / self.layout.tensor_model_parallel_size

    @property
    def dtype(self) -> str:
        """Of the tables."""
        return "fp8" if self.layout.fp8_recipe else "bf16"

    def moved(self, size: float) -> float:
        """Seconds to move bytes through the memory."""
        return size / (self.constants.memory * self.rates.gpu.memory_bandwidth)

    def product(
        self, outputs: float, inputs: float, dtype: str | None = None
    ) -> tuple[float, float]:
        """Seconds forward and backward of a linear layer."""
        flops = 2 * self.tokens * outputs * inputs
        dtype = dtype or self.dtype
        sustained = self.constants.sustained
        shapes = (
            (self.tokens, outputs, inputs),
            (self.tokens, inputs, outputs),
            (outputs, inputs, self.tokens),
        )
        first, *rest = (flops / (sustained * self.rates.gemm(*shape, dtype)) for shape in shapes)
        return first, sum(rest)


def dense_layer(parts: LayerModel, layer: int) -> Seconds:
    """A layer with a dense MLP."""
    seconds = _attention_block(parts, layer)
    _mlp(parts, seconds, parts.model.ffn_hidden_size)
    return seconds


def moe_layer(parts: LayerModel, layer: int, imbalance: float = 1.0) -> Seconds:
    """A layer with routed experts.

    Args:
        parts: What it follows from.
        layer: From 0.
        imbalance: Rows of the busiest rank over the mean.
    """
    seconds = _attention_block(parts, layer)
    if shared := parts.model.moe_shared_expert_intermediate_size:
        _mlp(parts, seconds, shared)
    _router(parts, seconds)
    _experts(parts, seconds, imbalance)
    _expert_exchange(parts, seconds, imbalance)
    return seconds


def _attention_block(parts: LayerModel, layer: int) -> Seconds:
    model, layout = parts.model, parts.layout
    tp = layout.tensor_model_parallel_size
    seconds = Seconds()
    query = model.num_attention_heads * model.kv_channels / tp
    keys = model.num_query_groups * model.kv_channels / tp
    gates = 2 if model.attention_output_gate else 1
    for outputs, inputs in _projections(model, tp):
        seconds.add("matrices", *parts.product(outputs, inputs))
    _core_attention(parts, seconds, layer)
    norms = 2 * (2 if model.post_norms else 1)
    # Norms read and write, residuals read two and write one; rotation and QK-norm read and write.
    own = parts.own_tokens * model.hidden_size * (2 * norms + 3 * 2)
    heads = parts.tokens * (query + keys) * (2 + 2 * model.qk_layernorm)
    heads += parts.tokens * 4 * query * (gates - 1)
    biases = parts.tokens * (query + 2 * keys) * 2 * model.add_bias_linear
    traffic = parts.moved(_BF16 * (own + heads + biases))
    seconds.add("elementwise", traffic, 2 * traffic)
    _quantization(parts, seconds, [parts.tokens * model.hidden_size, parts.tokens * query])
    _tensor_parallel_exchange(parts, seconds)
    return seconds


def _projections(model: ModelDescription, tp: int) -> Iterable[tuple[float, float]]:
    """[outputs, inputs] of the linear layers around attention on a rank."""
    heads = model.num_attention_heads / tp
    if latent := model.latent_attention:
        query = heads * (latent.qk_head_dim + latent.qk_pos_emb_head_dim)
        yield query, latent.q_lora_rank or model.hidden_size
        if latent.q_lora_rank:
            yield latent.q_lora_rank, model.hidden_size
        yield latent.kv_lora_rank + latent.qk_pos_emb_head_dim, model.hidden_size
        yield heads * (latent.qk_head_dim + latent.v_head_dim), latent.kv_lora_rank
        yield model.hidden_size, heads * latent.v_head_dim
        return
    query = heads * model.kv_channels
    keys = model.num_query_groups * model.kv_channels / tp
    yield (2 if model.attention_output_gate else 1) * query + 2 * keys, model.hidden_size
    yield model.hidden_size, query


def attention_pairs(seq_length: int, window: int | None) -> float:
    """Pairs of a query and a key that it sees, of one sequence."""
    width = seq_length if window is None else min(window, seq_length)
    return width * (width + 1) / 2 + (seq_length - width) * width


def _core_attention(parts: LayerModel, seconds: Seconds, layer: int) -> None:
    model, layout = parts.model, parts.layout
    window = model.window_of(layer)
    pairs = attention_pairs(layout.seq_length, window) / layout.seq_length * parts.tokens
    size: float = model.kv_channels
    if latent := model.latent_attention:
        size = (latent.qk_head_dim + latent.qk_pos_emb_head_dim + latent.v_head_dim) / 2
    flops = 4 * pairs * model.num_attention_heads * size / layout.tensor_model_parallel_size
    dtype = "fp8" if layout.fp8_attention else "bf16"
    rate = parts.rates.attention(layout.seq_length, window, int(size), dtype)
    forward = flops / (parts.constants.sustained * rate)
    if model.attention_sinks and not layout.fp8_attention:
        forward *= parts.constants.sink_attention
    seconds.add("attention", forward, parts.constants.backward_attention * forward)
    if layout.context_parallel_size > 1:
        exchange = exchange_seconds(model, layout, layer, parts.rates, parts.constants)
        hidden = parts.constants.hidden
        exposed = [once - hidden * min(once, forward) for once in exchange]
        seconds.add("context_parallel", *exposed)


def _mlp(parts: LayerModel, seconds: Seconds, width: int) -> None:
    hidden, tp = parts.model.hidden_size, parts.layout.tensor_model_parallel_size
    for outputs, inputs in ((2 * width / tp, hidden), (hidden, width / tp)):
        seconds.add("matrices", *parts.product(outputs, inputs))
    traffic = parts.moved(_BF16 * parts.tokens * 3 * width / tp)
    seconds.add("elementwise", traffic, 2 * traffic)
    _quantization(parts, seconds, [parts.tokens * hidden, parts.tokens * width / tp])


def _router(parts: LayerModel, seconds: Seconds) -> None:
    model = parts.model
    flops = 2 * parts.own_tokens * model.num_moe_experts * model.hidden_size
    rate = parts.constants.sustained * parts.rates.gemm(
        parts.own_tokens, model.num_moe_experts, model.hidden_size
    )
    seconds.add("matrices", flops / rate, 2 * flops / rate)
    # Scores, weights and the map of tokens to experts, in fp32, several passes.
    traffic = parts.moved(parts.own_tokens * model.num_moe_experts * 4 * 6)
    seconds.add("elementwise", traffic, traffic)


def expert_rows(parts: LayerModel, imbalance: float = 1.0) -> float:
    """Rows that the experts of a rank get for one micro-batch."""
    layout = parts.layout
    rows = parts.own_tokens * parts.model.moe_router_topk * imbalance
    return rows * layout.expert_tensor_parallel_size


def _experts(parts: LayerModel, seconds: Seconds, imbalance: float) -> None:
    model, layout = parts.model, parts.layout
    hidden = model.hidden_size
    width = model.moe_ffn_hidden_size / layout.expert_tensor_parallel_size
    rows = expert_rows(parts, imbalance)
    each = rows / (model.num_moe_experts / layout.expert_model_parallel_size)
    for outputs, inputs in ((2 * width, hidden), (hidden, width)):
        flops = 2 * rows * outputs * inputs
        shapes = ((each, outputs, inputs), (each, inputs, outputs), (outputs, inputs, each))
        times = [
            flops / (parts.constants.sustained * parts.rates.grouped(*shape, parts.dtype))
            for shape in shapes[:2]
        ]
        weights = parts.rates.gemm(*shapes[2], parts.dtype)
        times.append(flops / (parts.constants.sustained * weights))
        seconds.add("experts", times[0], sum(times[1:]))
    # Permuting and its reverse move each row twice on either side of the exchange; the activation
    # reads gate and up and writes their product.
    traffic = parts.moved(_BF16 * (rows * (4 * hidden + 3 * width) + 2 * parts.own_tokens * hidden))
    seconds.add("elementwise", traffic, 2 * traffic)
    _quantization(parts, seconds, [rows * hidden, rows * width])
    if model.add_bias_linear:
        _expert_biases(parts, seconds, rows, width)


def _expert_biases(parts: LayerModel, seconds: Seconds, rows: float, width: float) -> None:
    """Biases of experts, and the clamps beside them, run unfused and in fp32.

    Source: ``TEGroupedMLP._apply_bias`` and ``weighted_bias_quick_geglu_impl``: bytes of an element
    of an output, counted pass by pass.
    """
    hidden = parts.model.hidden_size
    forward = parts.moved(rows * (28 * hidden + 8 * 2 * width))
    backward = parts.moved(rows * (36 * hidden + 10 * 2 * width))
    seconds.add("elementwise", forward, backward)


def _quantization(parts: LayerModel, seconds: Seconds, elements: list[float]) -> None:
    """FP8: inputs, and gradients of outputs, are read and written in both orientations.

    A scale for a whole tensor of its present values reads it once before.
    """
    if recipe := parts.layout.fp8_recipe:
        traffic = parts.moved((6 if recipe == "tensorwise" else 4) * sum(elements))
        seconds.add("quantization", traffic, traffic)


def _tensor_parallel_exchange(parts: LayerModel, seconds: Seconds) -> None:
    """Attention gathers its input and scatters its output; backward gathers the input once more."""
    tp = parts.layout.tensor_model_parallel_size
    if tp == 1:
        return
    message = parts.tokens * parts.model.hidden_size * _BF16
    gather, scatter = (
        collective_seconds(parts.rates, parts.constants, name, message, tp, 1)
        for name in ("all_gather", "reduce_scatter")
    )
    seconds.add("tensor_parallel", gather + scatter, 2 * gather + scatter)


def _expert_exchange(parts: LayerModel, seconds: Seconds, imbalance: float) -> None:
    """Rows travel to their experts and back, and so do their gradients."""
    layout = parts.layout
    ep, etp = layout.expert_model_parallel_size, layout.expert_tensor_parallel_size
    if ep * etp == 1:
        return
    message = parts.own_tokens * parts.model.moe_router_topk * parts.model.hidden_size * _BF16
    once = imbalance * collective_seconds(
        parts.rates, parts.constants, "all_to_all", message * etp, ep * etp, 1
    )
    if layout.overlap_expert_all_to_all:
        computing = seconds.total / 4
        once -= parts.constants.hidden * min(once, computing)
    seconds.add("expert_all_to_all", 2 * once, 2 * once)
