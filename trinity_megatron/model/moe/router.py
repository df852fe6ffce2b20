"""Sigmoid top-k router; the expert bias changes the selection, not the gates."""

from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from megatron.core.transformer.moe.router import TopKRouter

from trinity_megatron.model.config import TrinityConfig
from trinity_megatron.model.fusion import fused
from trinity_megatron.model.moe.balance_loss import mean_balance_loss, normalized_scores
from trinity_megatron.telemetry.step_statistics import statistics_of

_ROUTER_DTYPES = {"fp32": torch.float32, "fp64": torch.float64}


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
        # Megatron's own sign rule must not touch the bias: bias_update.py does.
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

    def gating(self, input: torch.Tensor) -> torch.Tensor:
        """Router logits of ``[s, b, d]``, in the router's dtype ``[s, b, num_experts]``."""
        is_product = not torch.is_grad_enabled() and input.device.type == "cpu"
        if not is_product or self.bias is not None:
            return super().gating(input)
        # The same product; of one token, Megatron's function of autograd takes longer.
        dtype = _ROUTER_DTYPES.get(self.config.moe_router_dtype or "", input.dtype)
        return F.linear(input.to(dtype), self.weight.to(dtype))

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
        seq_length, batch_size, num_experts = logits.shape
        logits = logits.view(-1, num_experts)
        if padding_mask is not None:
            padding_mask = self._own_rows(padding_mask, seq_length).reshape(-1)
        logits = self.apply_z_loss(logits, padding_mask=padding_mask)
        probs, routing_map, scores = fused(route, logits)(
            logits,
            self.expert_bias,
            topk=self.topk,
            route_scale=self.config.moe_router_topk_scaling_factor or 1.0,
        )
        if self.training and torch.is_grad_enabled():
            # Neither in evaluation nor in the first pass of a recomputed layer (no gradients).
            counted = routing_map if padding_mask is None else routing_map & ~padding_mask[:, None]
            counts = counted.view(seq_length, batch_size, num_experts).sum(dim=0)
            if self.is_aux_loss_enabled():
                probs = self._balance(probs, scores, counted, counts, padding_mask)
            if self.enable_expert_bias:
                self.local_tokens_per_expert += counts.sum(dim=0)
            if statistics_of(self.config).is_collecting:
                self._observe(logits.detach(), padding_mask)
        return probs, routing_map

    def _own_rows(self, padding_mask: torch.Tensor, seq_length: int) -> torch.Tensor:
        """This rank's rows of the mask: Megatron cuts it for sequence parallelism in some stages.

        Only the first pipeline stage scatters it (``GPTModel._preprocess``); the others hand the
        whole mask on, which would be broadcast against the wrong tokens.
        """
        ranks = self.tp_group.size()
        if padding_mask.shape[0] == seq_length * ranks and ranks > 1:
            return padding_mask.narrow(0, self.tp_group.rank() * seq_length, seq_length)
        assert padding_mask.shape[0] == seq_length, (padding_mask.shape, seq_length)
        return padding_mask

    def _balance(
        self,
        probs: torch.Tensor,
        scores: torch.Tensor,
        routing_map: torch.Tensor,
        counts: torch.Tensor,
        padding_mask: torch.Tensor | None,
    ) -> torch.Tensor:
        """Attach the balance losses, with the biased selection in f_i (report eq 29-32).

        Megatron would select without the bias here.
        """
        masked = padding_mask is not None
        probs = self._apply_sequence_balance_loss(probs, scores, counts, padding_mask)
        if self.get_aux_loss_coeff("aux_loss") or self.get_aux_loss_coeff("global_aux_loss"):
            scores = normalized_scores(scores, padding_mask)
            probs = self._apply_aux_loss(probs, scores, routing_map, with_padding_mask=masked)
            probs = self._apply_global_aux_loss(
                probs, scores, routing_map, with_padding_mask=masked
            )
        return probs

    def _apply_sequence_balance_loss(
        self,
        probs: torch.Tensor,
        scores: torch.Tensor,
        counts: torch.Tensor,
        padding_mask: torch.Tensor | None,
    ) -> torch.Tensor:
        """Attach :func:`.balance_loss.mean_balance_loss`.

        Args:
            probs: ``[num_tokens, num_experts]``.
            scores: Sigmoid scores, ``[num_tokens, num_experts]``.
            counts: Tokens of each of this rank's (parts of) sequences that selected each expert,
                int64 ``[b, num_experts]``.
            padding_mask: Bool ``[num_tokens]`` or None.
        """
        coeff = self.get_aux_loss_coeff("seq_aux_loss")
        if coeff == 0:
            return probs
        if self.tp_cp_group.size() > 1:
            counts = counts.clone()
            torch.distributed.all_reduce(counts, group=self.tp_cp_group)
        compute = fused(mean_balance_loss, scores)
        loss, total = compute(scores, counts, padding_mask, topk=self.topk, coeff=coeff)
        return self.attach_and_log_load_balancing_loss(
            probs,
            coeff,
            loss,
            "seq_load_balancing_loss",
            self.tp_cp_group,
            # Megatron multiplies with this and the size of the group, and divides the gradient by
            # the tokens of the global batch.
            valid_token_count=total / self.tp_cp_group.size(),
        )

    def _observe(self, logits: torch.Tensor, padding_mask: torch.Tensor | None) -> None:
        """Hand the logits' statistics to the collector of the step."""
        num_tokens: torch.Tensor | int = logits.shape[0]
        maximum = logits
        if padding_mask is not None:
            num_tokens = (~padding_mask).sum()
            maximum = logits.masked_fill(padding_mask[:, None], float("-inf"))
            logits = logits * ~padding_mask[:, None]
        highest, count = maximum.max(), num_tokens * logits.shape[1]
        for name, values in (("router/logit", logits), ("router/logit_square", logits.square())):
            statistics_of(self.config).observe(
                name,
                layer=self.layer_number or 0,
                count=count,
                total=values.sum(dtype=torch.float64),
                maximum=highest,
            )
