"""Loss of the LM head: vocabulary-parallel cross entropy, z-loss and statistics of the logits."""

from typing import Any

import torch
from megatron.core.models.common.language_module.language_module import LanguageModule

from trinity_megatron.model.cross_entropy import vocab_parallel_cross_entropy
from trinity_megatron.telemetry.step_statistics import statistics_of


def z_loss(logsumexp: torch.Tensor, coeff: float) -> torch.Tensor:
    """``coeff * logsumexp^2`` of each token; the mean over the unmasked tokens is the z-loss.

    It keeps the softmax denominator near 1.  Cross entropy alone does not determine it.

    Args:
        logsumexp: Any shape.
        coeff: Weight of the z-loss, 1e-6 in Trinity Large.

    Source: report section 3.3 and section 6 item 3 name the z-loss.  The form is that of the kernel
    they used: ``lse_square_scale`` in ops/cross_entropy.py of github.com/linkedin/Liger-Kernel.
    """
    return coeff * logsumexp.square()


def add_z_loss(loss: torch.Tensor, logsumexp: torch.Tensor, coeff: float) -> torch.Tensor:
    """Add the gradient of the z-loss to ``loss`` but not its value, so logs show the cross entropy.

    The gradient of the result carries the loss mask and the normalization to the z-loss.

    Args:
        loss: Cross entropy of each token.
        logsumexp: Same shape as ``loss``.
        coeff: Weight of the z-loss.
    """
    z = z_loss(logsumexp, coeff)
    return loss + (z - z.detach())


class LanguageModelLoss:
    """Replaces ``compute_language_model_loss`` of a Megatron ``LanguageModule``.

    ``cross_entropy_loss_fusion`` has no effect: neither of Megatron's implementations returns the
    logsumexp, which z-loss and statistics need.  In training, the z-loss is added if
    ``config.lm_head_z_loss_coeff``, read at each call, is not zero.  The collector
    of the model observes training steps that are logged.

    Args:
        model: Pipeline chunk with an output layer.  Nothing else may use its logits afterwards.

    Attributes:
        loss_mask: Loss mask of the next micro-batch, for the statistics, ``[b, s]``; None for all
            tokens.  :meth:`take_loss_mask` sets it; the next call resets it.
    """

    def __init__(self, model: LanguageModule) -> None:
        self.model = model
        self.loss_mask: torch.Tensor | None = None

    def take_loss_mask(self, module: Any, args: Any, kwargs: dict[str, Any]) -> None:
        """Forward pre-hook that keeps the mask, which the loss function does not receive."""
        self.loss_mask = kwargs.get("loss_mask")

    def __call__(self, labels: torch.Tensor, logits: torch.Tensor) -> torch.Tensor:
        """Cross entropy of each token in nats, fp32 ``[b, s]``.

        Args:
            labels: int64 ``[b, s]``.
            logits: ``[s, b, v / tp]``; the backward pass overwrites them with their gradient.
        """
        loss_mask, self.loss_mask = self.loss_mask, None
        is_training = self.model.training and torch.is_grad_enabled()
        collector = statistics_of(self.model.config)
        loss, logsumexp, statistics = vocab_parallel_cross_entropy(
            logits,
            labels.transpose(0, 1),
            tp_group=self.model.tp_group,
            overwrite_logits=True,
            collect_statistics=is_training and collector.is_collecting,
            loss_mask=None if loss_mask is None else loss_mask.transpose(0, 1),
        )
        if statistics is not None:
            for name, values in statistics._asdict().items():
                collector.observe(f"lm_head/{name}", **vars(values))
        coeff = self.model.config.lm_head_z_loss_coeff
        if coeff and is_training:
            loss = add_z_loss(loss, logsumexp, coeff)
        return loss.transpose(0, 1).contiguous()


def attach_language_model_loss(model: list[LanguageModule]) -> list[LanguageModule]:
    """Replace the loss of the chunks with an output layer; a pre-wrap hook of model builders.

    Args:
        model: Unwrapped pipeline chunks of this rank; changed in place.

    Returns:
        ``model``.
    """
    for chunk in model:
        if chunk.post_process:
            loss = LanguageModelLoss(chunk)
            chunk.compute_language_model_loss = loss  # type: ignore[method-assign]
            chunk.register_forward_pre_hook(loss.take_loss_mask, with_kwargs=True)
    return model
