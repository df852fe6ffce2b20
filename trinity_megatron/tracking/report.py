"""Pictures of a run."""

from pathlib import Path

import matplotlib

matplotlib.use("Agg")  # no display is needed; set before pyplot is imported
import matplotlib.pyplot as plt  # noqa: E402
import numpy as np  # noqa: E402
import torch  # noqa: E402

from trinity_megatron.tracking.moe_metrics import load_share, max_violation  # noqa: E402
from trinity_megatron.tracking.run_log import TOKENS_TAG, RunLog  # noqa: E402

_INK, _MUTED, _BLUE, _ORANGE = "#1f2430", "#6b7280", "#2563eb", "#d97706"


def draw_loss(log: RunLog, path: Path, *, unigram_entropy: float | None = None) -> None:
    """Draw training and validation loss and the learning rate over the steps.

    Args:
        log: The run.
        path: PNG to write.
        unigram_entropy: Entropy in nats per token to draw as a line.
    """
    train, valid = log.scalars("lm loss"), log.scalars("lm loss validation")
    rates = log.scalars("learning-rate")
    figure, (axis, rate_axis) = plt.subplots(
        2, 1, figsize=(8, 6), sharex=True, height_ratios=(4, 1), layout="constrained"
    )
    smoothed = len(train) > 20
    axis.plot(
        list(train),
        list(train.values()),
        color=_BLUE,
        alpha=0.3 if smoothed else 1.0,
        linewidth=0.8,
        label=None if smoothed else "training",
    )
    if smoothed:
        window = max(2, len(train) // 40)
        smooth = np.convolve(list(train.values()), np.ones(window) / window, mode="valid")
        axis.plot(list(train)[window - 1 :], smooth, color=_BLUE, label="training (smoothed)")
    if valid:
        axis.plot(list(valid), list(valid.values()), "o-", color=_ORANGE, label="validation")
    if unigram_entropy is not None:
        axis.axhline(unigram_entropy, color=_MUTED, linestyle="--", label="unigram entropy")
    axis.set_ylabel("loss (nats per token)")
    axis.set_title("Loss", loc="left", color=_INK)
    axis.legend(frameon=False)
    rate_axis.plot(list(rates), list(rates.values()), color=_INK)
    rate_axis.set_ylabel("learning rate")
    rate_axis.set_xlabel("step")
    _finish(figure, path)


def draw_expert_load(log: RunLog, path: Path) -> None:
    """Draw the load of every expert over the steps, one heat map a layer, and MaxVio below.

    Args:
        log: The run; must hold token counts.
        path: PNG to write.

    Raises:
        ValueError: The run has no token counts.
    """
    counts = log.tensors(TOKENS_TAG)
    if not counts:
        raise ValueError(f"The run has no {TOKENS_TAG!r}: it trained no MoE layer.")
    steps = np.array(list(counts))
    tokens = torch.from_numpy(np.stack(list(counts.values())))  # [steps, layers, experts]
    loads, violation = load_share(tokens).numpy(), max_violation(tokens).numpy()
    num_layers = loads.shape[1]
    figure, axes = plt.subplots(
        num_layers + 1, 1, figsize=(8, 1.5 * num_layers + 2.5), sharex=True, layout="constrained"
    )
    for layer, axis in enumerate(axes[:-1]):
        image = axis.pcolormesh(
            steps,
            np.arange(loads.shape[2]),
            loads[:, layer].T,
            cmap="RdBu_r",
            vmin=0.0,
            vmax=2.0,
            shading="nearest",
            rasterized=True,
        )
        axis.set_ylabel(f"MoE layer {layer + 1}\nexpert")
    axes[0].set_title("Load of each expert relative to the mean (1 = balanced)", loc="left")
    figure.colorbar(image, ax=axes[:-1], label="load / mean load", extend="max")
    for layer in range(num_layers):
        axes[-1].plot(steps, violation[:, layer], linewidth=1, label=f"layer {layer + 1}")
    axes[-1].set_ylabel("MaxVio")
    axes[-1].set_xlabel("step")
    axes[-1].set_ylim(bottom=0)
    if num_layers <= 8:
        axes[-1].legend(frameon=False, ncols=4, fontsize="small")
    _finish(figure, path)


def _finish(figure: plt.Figure, path: Path) -> None:
    for axis in figure.axes:
        axis.spines[["top", "right"]].set_visible(False)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=150)
    plt.close(figure)
