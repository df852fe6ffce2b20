"""Floating-point operations: how many training takes, how many a device can do."""

import functools
import time

import torch

from trinity_megatron.model.config import TrinityConfig


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
    a lookup) and the two attention products, with windows.  Recomputation is not counted, and
    documents that share a sequence count as one.

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


# Dense bf16 peak of a GPU in FLOP/s, by a part of its name.  Source: NVIDIA's data sheets.
_BF16_PEAKS = {
    "B300": 2.25e15,
    "B200": 2.25e15,
    "H200": 989.4e12,
    "H100 PCIe": 756e12,
    "H100": 989.4e12,
    "A100": 312e12,
}


def peak_flops(device: torch.device) -> float:
    """FLOP/s to which MFU relates.

    The data sheet's dense bf16 rate for a GPU of the table; elsewhere, a CPU included, the measured
    rate of a large matrix product.
    """
    if device.type == "cuda":
        name = torch.cuda.get_device_name(device)
        for part, rate in _BF16_PEAKS.items():
            if part in name:
                return rate
    return measured_matmul_rate(device)


@functools.cache  # 0.7 s of a core
def measured_matmul_rate(device: torch.device) -> float:
    """FLOP/s of a large matrix product: bf16 on a GPU, fp32 on a CPU (best of a few).

    Measured once in a process.
    """
    on_gpu = device.type == "cuda"
    size, rounds = (8192, 20) if on_gpu else (1024, 5)
    generator = torch.Generator(device).manual_seed(0)  # the training's own must not move
    dtype = torch.bfloat16 if on_gpu else torch.float32
    a = torch.randn(size, size, generator=generator, device=device, dtype=dtype)
    a @ a
    best = float("inf")
    for _ in range(rounds):
        if on_gpu:
            torch.cuda.synchronize()
        start = time.perf_counter()
        a @ a
        if on_gpu:
            torch.cuda.synchronize()
        best = min(best, time.perf_counter() - start)
    return 2 * size**3 / best
