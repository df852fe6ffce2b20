"""How many floating-point operations training takes, by arithmetic."""

from trinity_megatron.config import TrinityConfig


def mean_attended_keys(seq_length: int, window: int | None) -> float:
    """Mean number of keys that a position attends to, itself included.

    Args:
        seq_length: Tokens of a sequence.
        window: Keys of a local layer, itself included; None for a global layer.
    """
    width = seq_length if window is None else min(window, seq_length)
    return (width * (width + 1) / 2 + (seq_length - width) * width) / seq_length


def training_flops_per_token(config: TrinityConfig, seq_length: int) -> float:
    """FLOPs of one token's forward and backward pass (a multiply-add is 2, backward twice forward).

    Counted: every matrix a token meets (gate, shared expert and LM head included; the embedding is
    a lookup) and the two attention products, with windows.  Recomputation is not counted.

    Source: Large at 8192 is 91.3 GFLOP, 76.5 in matrices and 14.7 in attention.
    """
    vectors = config.num_layers * (4 * config.hidden_size + 2 * (config.kv_channels or 0))
    vectors += config.hidden_size + config.num_moe_layers * (config.num_moe_experts or 0)
    embedding = config.vocab_size * config.hidden_size
    matrices = config.num_active_parameters() - embedding - vectors
    window = config.window_size[0] + 1 if config.window_size else None
    keys = sum(
        mean_attended_keys(seq_length, None if config.is_global_layer(layer) else window)
        for layer in range(1, config.num_layers + 1)
    )
    attention = 2 * config.num_attention_heads * (config.kv_channels or 0) * keys
    return 6.0 * (matrices + attention)
