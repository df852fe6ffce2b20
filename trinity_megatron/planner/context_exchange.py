"""Keys and values that context parallelism exchanges and keeps in a layer, on one rank."""

from trinity_megatron.model.attention.zigzag import ZigzagCut, plan_exchange
from trinity_megatron.planner.constants import Constants
from trinity_megatron.planner.kernels.rates import KernelRates
from trinity_megatron.planner.layout import Layout
from trinity_megatron.planner.links import collective_seconds
from trinity_megatron.planner.model_description import ModelDescription

_BF16 = 2


def key_bytes(model: ModelDescription, layout: Layout) -> float:
    """Bytes of the keys and values of one position of a micro-batch, on a rank."""
    heads = model.num_query_groups / layout.tensor_model_parallel_size
    return _BF16 * layout.micro_batch_size * 2 * heads * model.kv_channels


def exchanges_window(model: ModelDescription, layout: Layout, layer: int) -> bool:
    """Whether a layer (0-based) exchanges its window alone; Transformer Engine's does not."""
    return layout.transformer_impl == "local" and model.window_of(layer) is not None


def sent_bytes(model: ModelDescription, layout: Layout, layer: int) -> float:
    """Bytes that the busiest rank sends for the windows of a local layer, in one pass."""
    window, cut = model.window_of(layer), _cut(layout)
    assert window is not None
    rows = (sum(plan_exchange(cut, rank, window).num_sent) for rank in range(cut.size))
    return max(rows) * key_bytes(model, layout)


def gathered_bytes(model: ModelDescription, layout: Layout, layer: int) -> float:
    """Bytes of the keys and values that a layer keeps beside those of the rank's own tokens."""
    if layout.context_parallel_size == 1 or layout.transformer_impl != "local":
        return 0.0
    window, cut = model.window_of(layer), _cut(layout)
    rows = max(sum(span.length for span in cut.keys_of(rank, window)) for rank in range(cut.size))
    return rows * key_bytes(model, layout)


def exchange_seconds(
    model: ModelDescription,
    layout: Layout,
    layer: int,
    rates: KernelRates,
    constants: Constants,
) -> tuple[float, float]:
    """Seconds of the exchange of a layer, forward and backward; 0 without context parallelism."""
    size, span = layout.context_parallel_size, layout.tensor_model_parallel_size

    def seconds(collective: str, message: float) -> float:
        return collective_seconds(rates, constants, collective, message, size, span)

    if size == 1:
        return 0.0, 0.0
    if exchanges_window(model, layout, layer):
        # The model of an all-to-all leaves a share of the message where it is.
        message = sent_bytes(model, layout, layer) * size / (size - 1)
        once = seconds("all_to_all", message)
        return once, once
    message = layout.seq_length * key_bytes(model, layout)
    once = seconds("all_gather", message)
    if layout.transformer_impl == "local":
        return once, seconds("reduce_scatter", message)
    return once, 2 * once


def _cut(layout: Layout) -> ZigzagCut:
    return ZigzagCut(layout.seq_length, layout.context_parallel_size)
