"""Token dispatch within one rank: sort by expert, and back, without communication or sync."""

from typing import Any

import torch
import torch.nn.functional as F
from megatron.core.transformer.moe.token_dispatcher import MoETokenDispatcher


class _Permute(torch.autograd.Function):
    """Copy each token to the rows of its experts; the gradient is the sum over those rows."""

    @staticmethod
    def forward(
        ctx: Any, tokens: torch.Tensor, token_of_row: torch.Tensor, rows_of_token: torch.Tensor
    ) -> torch.Tensor:
        ctx.save_for_backward(rows_of_token)
        return tokens.index_select(0, token_of_row)

    @staticmethod
    def backward(ctx: Any, grad_rows: torch.Tensor) -> tuple[torch.Tensor, None, None]:
        (rows_of_token,) = ctx.saved_tensors
        return F.embedding_bag(rows_of_token, grad_rows, mode="sum"), None, None


class _Unpermute(torch.autograd.Function):
    """Sum the rows of each token; the transpose of :class:`_Permute`."""

    @staticmethod
    def forward(
        ctx: Any, rows: torch.Tensor, token_of_row: torch.Tensor, rows_of_token: torch.Tensor
    ) -> torch.Tensor:
        ctx.save_for_backward(token_of_row)
        return F.embedding_bag(rows_of_token, rows, mode="sum")

    @staticmethod
    def backward(ctx: Any, grad_tokens: torch.Tensor) -> tuple[torch.Tensor, None, None]:
        (token_of_row,) = ctx.saved_tensors
        return grad_tokens.index_select(0, token_of_row), None, None


class LocalTokenDispatcher(MoETokenDispatcher):
    """Dispatcher for a rank that holds every expert (expert and expert-tensor parallel size 1).

    Every token has exactly ``topk`` experts, so that all sizes are known on the host.
    """

    def dispatch_preprocess(
        self, hidden_states: torch.Tensor, routing_map: torch.Tensor, probs: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Sort copies of the tokens by expert.

        Args:
            hidden_states: ``[..., d]``, flattened to ``[num_tokens, d]``.
            routing_map: Bool ``[num_tokens, num_experts]`` with ``topk`` True per row.
            probs: ``[num_tokens, num_experts]``.

        Returns:
            Rows ``[num_tokens * topk, d]`` and their weights ``[num_tokens * topk]``.
        """
        self.hidden_shape = hidden_states.shape
        num_tokens, topk = routing_map.shape[0], self.config.moe_router_topk
        pairs = torch.nonzero_static(routing_map.t(), size=num_tokens * topk)
        expert_of_row, token_of_row = pairs.unbind(dim=1)
        # A stable sort of the rows by token is the inverse permutation, [num_tokens, topk].
        rows_of_token = torch.argsort(token_of_row, stable=True).view(num_tokens, topk)
        self.token_of_row, self.rows_of_token = token_of_row, rows_of_token
        self.tokens_per_expert = routing_map.sum(dim=0)
        flat = hidden_states.reshape(num_tokens, -1)
        rows = _Permute.apply(flat, token_of_row, rows_of_token)
        return rows, probs[token_of_row, expert_of_row]

    def token_dispatch(self, hidden_states: torch.Tensor, probs: torch.Tensor) -> tuple:
        """No communication."""
        return hidden_states, probs

    def dispatch_postprocess(self, hidden_states: torch.Tensor, probs: torch.Tensor) -> tuple:
        """Rows are sorted already: add their number per expert."""
        return hidden_states, self.tokens_per_expert, probs

    def combine_preprocess(self, hidden_states: torch.Tensor) -> torch.Tensor:
        """Nothing to do before the combination."""
        return hidden_states

    def token_combine(self, hidden_states: torch.Tensor) -> torch.Tensor:
        """No communication."""
        return hidden_states

    def combine_postprocess(self, hidden_states: torch.Tensor) -> torch.Tensor:
        """Sum the weighted rows of each token, in the shape of the input."""
        output = _Unpermute.apply(hidden_states, self.token_of_row, self.rows_of_token)
        return output.view(self.hidden_shape)
