"""Sigmoid top-k router with an expert bias that only selects."""

from typing import Any, NamedTuple

import torch
from megatron.core.transformer.moe.router import TopKRouter

from trinity_megatron.config import TrinityConfig


class Routing(NamedTuple):
    """Result of :func:`route`.

    Attributes:
        probs: Weight of each expert's output, zero where not selected, fp32
            ``[num_tokens, num_experts]``.
        routing_map: Selection, bool ``[num_tokens, num_experts]``.
        scores: Sigmoid scores, fp32 ``[num_tokens, num_experts]``.
    """

    probs: torch.Tensor
    routing_map: torch.Tensor
    scores: torch.Tensor


def route(
    logits: torch.Tensor, expert_bias: torch.Tensor | None, *, topk: int, route_scale: float
) -> Routing:
    """Select on score + bias, weigh by the score alone.

    ``s = sigmoid(z)``; selected = TopK(s + b); ``g = route_scale * s / (sum of selected s)``.

    Args:
        logits: z, ``[num_tokens, num_experts]``, any floating dtype.
        expert_bias: b, fp32 ``[num_experts]``, or None; gets no gradient.
        topk: Experts per token.
        route_scale: Factor on the normalised weights.

    Source: report eq 15-18; transformers ``AfmoeTokenChoiceRouter`` (1e-20 in the quotient).
    """
    scores = torch.sigmoid(logits.float() if logits.dtype != torch.float64 else logits)
    with torch.no_grad():
        biased = scores if expert_bias is None else scores + expert_bias
        indices = torch.topk(biased, topk, dim=-1, sorted=False).indices
        routing_map = torch.zeros_like(scores, dtype=torch.bool).scatter_(-1, indices, True)
    selected = scores * routing_map
    probs = selected * (route_scale / (selected.sum(dim=-1, keepdim=True) + 1e-20))
    return Routing(probs, routing_map, scores)


class TrinityRouter(TopKRouter):
    """Megatron's router with the report's selection, counters and balance loss.

    ``expert_bias`` (fp32, a parameter without gradient, as in the released checkpoints),
    ``expert_bias_momentum`` (fp32 buffer, in the checkpoint) and ``local_tokens_per_expert``
    (int64 buffer, this rank's tokens since the last optimizer step).  Casting the model to bf16
    leaves them as they are: bf16 sums over 2048 ranks saturate at 262,144.
    """

    config: TrinityConfig

    def __init__(self, config: TrinityConfig, **kwargs: Any) -> None:
        super().__init__(config, **kwargs)
        if not self.enable_expert_bias:
            return
        # Megatron's own sign rule must not touch the bias: trinity_megatron.moe.finalize does.
        self.frozen_expert_bias = True
        bias = self._buffers.pop("expert_bias")
        assert bias is not None
        self.expert_bias = torch.nn.Parameter(bias, requires_grad=False)
        self.register_buffer("expert_bias_momentum", torch.zeros_like(bias))
        self.register_buffer(
            "local_tokens_per_expert",
            torch.zeros_like(bias, dtype=torch.int64),
            persistent=False,
        )

    def _apply(self, fn: Any, recurse: bool = True) -> Any:
        # Module.to(), .bfloat16(), .cuda(): the bias and its momentum move but keep fp32.
        if not self.enable_expert_bias:
            return super()._apply(fn, recurse)
        kept = (self.expert_bias.data, self.expert_bias_momentum)
        super()._apply(fn, recurse)
        for tensor, before in zip((self.expert_bias, self.expert_bias_momentum), kept, strict=True):
            if tensor.dtype != before.dtype:
                tensor.data = before.to(device=tensor.device)
        return self

    def routing(
        self, logits: torch.Tensor, padding_mask: torch.Tensor | None = None
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Route ``[s, b, num_experts]`` logits.

        Args:
            logits: Router logits.
            padding_mask: Bool ``[s, b]``, True for padding: routed, but neither counted nor
                balanced.

        Returns:
            ``probs`` and ``routing_map``, both ``[s * b, num_experts]``.
        """
        seq_length, batch_size = logits.shape[:2]
        logits = logits.view(-1, self.config.num_moe_experts)
        if padding_mask is not None:
            padding_mask = padding_mask.reshape(-1)
        logits = self.apply_z_loss(logits, padding_mask=padding_mask)
        probs, routing_map, scores = route(
            logits,
            self.expert_bias,
            topk=self.topk,
            route_scale=self.config.moe_router_topk_scaling_factor or 1.0,
        )
        if self.training and torch.is_grad_enabled():
            # Neither in evaluation nor in the first pass of a recomputed layer (no gradients).
            counted = routing_map if padding_mask is None else routing_map & ~padding_mask[:, None]
            if self.is_aux_loss_enabled():
                probs = self._balance(probs, scores, counted, seq_length, batch_size, padding_mask)
            if self.enable_expert_bias:
                self.local_tokens_per_expert += counted.sum(dim=0)
        return probs, routing_map

    def _balance(
        self,
        probs: torch.Tensor,
        scores: torch.Tensor,
        routing_map: torch.Tensor,
        seq_length: int,
        batch_size: int,
        padding_mask: torch.Tensor | None,
    ) -> torch.Tensor:
        """Attach the balance losses, with the biased selection in f_i (report eq 29-32).

        Megatron would select without the bias here.
        """
        scores = scores / (scores.sum(dim=-1, keepdim=True) + 1e-20)
        if padding_mask is not None:
            scores = scores * ~padding_mask[:, None]
        masked = padding_mask is not None
        probs = self._apply_aux_loss(probs, scores, routing_map, with_padding_mask=masked)
        probs = self._apply_seq_aux_loss(
            probs, scores, routing_map, seq_length, batch_size, with_padding_mask=masked
        )
        return self._apply_global_aux_loss(probs, scores, routing_map, with_padding_mask=masked)
