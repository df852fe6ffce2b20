"""Runs whose state is known because it is put in: balanced, settling, drifting, collapsing, ..."""

from pathlib import Path

import numpy as np
import torch
from torch.utils.tensorboard import SummaryWriter

from trinity_megatron.telemetry.metrics import load_share, max_violation
from trinity_megatron.telemetry.tensorboard_log import BIAS_TAG, LAYER_NUMBERS_TAG, TOKENS_TAG

GRADIENT_GROUPS = (
    "embedding attention dense_mlp shared_experts experts router norms lm_head"
).split()


def expected_load(
    kind: str, num_steps: int, num_layers: int, num_experts: int, *, seed: int = 0
) -> np.ndarray:
    """Loads without chance, ``[num_steps, num_layers, num_experts]``, in each layer of mean 1."""
    generator = np.random.default_rng(seed)
    time = np.linspace(0, 1, num_steps)[:, None, None]
    taste = generator.normal(size=(1, num_layers, num_experts))
    spread = 0.05 + 0.8 * np.exp(-time / 0.06)  # uneven at first, balanced soon
    if kind == "settling":
        spread = 0.05 + 0.8 * np.exp(-time / 0.8)
    if kind == "unbalanced":
        spread = np.full_like(time, 0.5)
    load = np.exp(spread * taste)
    affected = range(num_layers // 2, num_layers // 2 + max(1, num_layers // 8))
    late = np.clip(time[:, 0, 0] - 0.6, 0, None) / 0.4
    for layer in affected if kind in ("drifting", "collapsing") else ():
        if kind == "drifting":
            load[:, layer, layer % num_experts] *= 1 + 1.5 * late
        else:
            load[:, layer, layer % num_experts] *= np.exp(late * np.log(num_experts / 3))
            load[:, layer, -num_experts // 5 :] *= np.exp(-30 * late)[:, None]
    return load / load.mean(axis=-1, keepdims=True)


def counts_of(load: np.ndarray, tokens: float, *, seed: int = 0) -> np.ndarray:
    """Draw token counts, int64, with ``tokens`` per expert in the mean."""
    return np.random.default_rng(seed).poisson(load * tokens)


def bias_of(load: np.ndarray) -> np.ndarray:
    """A bias that levels off as the load does, fp32."""
    corrected = np.log(load) - np.log(load[:1])
    return (0.05 * corrected.clip(-5, 5)).astype(np.float32)


def write_run(
    folder: Path,
    kind: str,
    *,
    num_steps: int = 60,
    num_layers: int = 3,
    num_experts: int = 32,
    topk: int = 4,
    tokens: float = 1000.0,
    every: int = 1,
) -> None:
    """Write event files with every tag that a training writes."""
    load = expected_load(kind, num_steps, num_layers, num_experts)
    counts = torch.from_numpy(counts_of(load, tokens))
    bias = torch.from_numpy(bias_of(load))
    generator = np.random.default_rng(1)
    with SummaryWriter(folder) as writer:
        for name, value in (("moe_router_topk", topk), ("train_iters", num_steps * every)):
            writer.add_text(name, str(value), 1)
        writer.add_tensor(LAYER_NUMBERS_TAG, torch.arange(num_layers) + 3, every)
        for index in range(num_steps):
            step = (index + 1) * every
            writer.add_tensor(TOKENS_TAG, counts[index], step)
            writer.add_tensor(BIAS_TAG, bias[index], step)
            scalars = routing_scalars(counts[index], bias[index])
            scalars |= other_scalars(index / num_steps, generator)
            scalars["train/tokens_seen"] = float(step) * tokens * num_experts / topk
            for name, value in scalars.items():
                writer.add_scalar(name, value, step)
            if index % 10 == 9:
                writer.add_scalar("lm loss validation", scalars["lm loss"] + 0.05, step)


def routing_scalars(counts: torch.Tensor, bias: torch.Tensor) -> dict[str, float]:
    """The scalars of a step about load and bias."""
    load, violation = load_share(counts), max_violation(counts)
    quantiles = torch.quantile(load, torch.tensor([0.1, 0.5, 0.9]).double(), dim=-1).mean(-1)
    share = load / load.shape[-1]
    entropy = -torch.xlogy(share, share).sum(-1) / np.log(load.shape[-1])
    dead = float((counts == 0).sum())
    return {
        "moe/max_violation": float(violation.max()),
        "moe/mean_max_violation": float(violation.mean()),
        "moe/load_min": float(load.min()),
        "moe/load_q10": float(quantiles[0]),
        "moe/load_median": float(quantiles[1]),
        "moe/load_q90": float(quantiles[2]),
        "moe/load_max": float(load.max()),
        "moe/load_entropy": float(entropy.mean()),
        "moe/load_entropy_min": float(entropy.min()),
        "moe/dead_experts": dead,
        "moe/dead_experts_window": 0.5 * dead,
        "moe/bias_max_abs": float(bias.abs().max()),
        "moe/bias_range": float((bias.amax(-1) - bias.amin(-1)).max()),
        "moe/bias_norm": float(bias.square().mean().sqrt()),
        "moe/bias_momentum_norm": 1e-4,
    }


def other_scalars(time: float, generator: np.random.Generator) -> dict[str, float]:
    """Loss, logits, gradients, speed; ``time`` runs from 0 to 1."""
    noise = generator.normal(size=16)
    loss = 2.0 + 7.0 * np.exp(-time / 0.15) + 0.05 * noise[0]
    values = {
        "lm loss": loss,
        "learning-rate": 1e-3 * min(1, time / 0.1) * (1 - max(0, time - 0.8) / 0.2),
        "batch-size": 512.0 if time < 0.5 else 768.0,
        "grad-norm": 0.5 + 3 * np.exp(-time / 0.1) + 0.05 * abs(noise[1]),
        "iteration-time": 1.0 + 0.01 * noise[2],
        "seq_load_balancing_loss": 1.02 + 0.3 * np.exp(-time / 0.1) + 0.003 * noise[3],
        "router/max_logit": 2 + 6 * time + 0.3 * noise[4],
        "router/mean_logit": -0.5 * time + 0.02 * noise[5],
        "router/logit_std": 1 + time,
        "lm_head/max_logit": 5 + 15 * time + noise[6],
        "lm_head/mean_logit": -2 * time,
        "lm_head/mean_logsumexp": 12 - 2 * time + 0.1 * noise[7],
        "lm_head/z_loss": 1e-6 * (12 - 2 * time) ** 2,
        "attention/max_logit_bound": 40 + 30 * time + noise[8],
        "data/batch_het": 0.2 + 0.4 * np.exp(-time / 0.2) + 0.02 * noise[9],
        "lr/muon": 8e-4 * min(1, time / 0.1),
        "lr/adamw": 2e-4 * min(1, time / 0.1),
        "speed/tokens_per_second": 5.2e6 * (1 + 0.01 * noise[10]),
        "speed/mfu": 0.41 * (1 + 0.01 * noise[10]),
    }
    for index, name in enumerate(GRADIENT_GROUPS):
        values[f"grad_norm/{name}"] = values["grad-norm"] * 2.0 ** (-index / 2)
    return {name: float(value) for name, value in values.items()}
