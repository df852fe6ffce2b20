"""Token dispatch within one rank: sort by expert, and back, without communication or sync."""

from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from megatron.core.transformer.moe.token_dispatcher import MoETokenDispatcher

from trinity_megatron.cpu_host.matmul import row_multiple


class SortedRows(NamedTuple):
    """Copies of tokens, those of the first expert first.

    Attributes:
        token_of_row: Int64 ``[num_rows]``.
        rows_of_token: Int64 ``[num_tokens, topk]``.
        weights: Routing weight of each row, ``[num_rows]``.
        tokens_per_expert: Rows of each expert, int64 ``[num_experts]``.
    """

    token_of_row: torch.Tensor
    rows_of_token: torch.Tensor
    weights: torch.Tensor
    tokens_per_expert: torch.Tensor


def sort_by_expert(routing_map: torch.Tensor, probs: torch.Tensor, *, topk: int) -> SortedRows:
    """One row for each expert of each token.

    Args:
        routing_map: Bool ``[num_tokens, num_experts]`` with ``topk`` True per row.
        probs: ``[num_tokens, num_experts]``.
        topk: Experts of each token.
    """
    num_tokens = routing_map.shape[0]
    if num_tokens == 1:  # sorted as it is: a step of generation
        experts = torch.nonzero_static(routing_map[0], size=topk).squeeze(1)
        rows = torch.arange(topk, device=experts.device).unsqueeze(0)
        weights = probs[0].gather(0, experts)
        return SortedRows(torch.zeros_like(experts), rows, weights, routing_map[0].long())
    pairs = torch.nonzero_static(routing_map.t(), size=num_tokens * topk)
    expert_of_row, token_of_row = pairs.unbind(dim=1)
    # A stable sort of the rows by token is the inverse permutation.
    keys = _narrow(token_of_row, num_tokens) if token_of_row.is_cuda else token_of_row
    rows_of_token = torch.argsort(keys, stable=True).view(num_tokens, topk)
    # Not probs[token_of_row, expert_of_row]: its gradient is 23 launches, this one's is 2.
    flat = torch.add(expert_of_row, token_of_row, alpha=probs.shape[1])
    weights = probs.flatten().gather(0, flat)
    return SortedRows(token_of_row, rows_of_token, weights, routing_map.sum(dim=0))


def _narrow(values: torch.Tensor, end: int) -> torch.Tensor:
    """The same integers below ``end`` in fewer bytes: a GPU sorts by one byte in a launch."""
    return values.to(torch.int16 if end <= 2**15 else torch.int32)


def pad_rows(rows: SortedRows, multiple: int) -> SortedRows:
    """Fill up each expert's rows to a multiple, with copies of a token that have weight 0.

    What experts make of them is 0, and so is every gradient: the weight is a factor of the
    activation.  The number of rows is read on the host, so this is for a CPU.

    Args:
        rows: Of :func:`sort_by_expert`.
        multiple: What each number of rows is to be a multiple of.
    """
    token_of_row, rows_of_token, weights, counts = rows
    padding = -counts % multiple
    before = torch.repeat_interleave(
        padding.cumsum(0) - padding, counts, output_size=len(token_of_row)
    )
    place = torch.arange(len(token_of_row), device=before.device) + before
    size = len(token_of_row) + int(padding.sum())
    return SortedRows(
        token_of_row.new_zeros(size).index_copy(0, place, token_of_row),
        place[rows_of_token],
        weights.new_zeros(size).index_copy(0, place, weights),
        counts + padding,
    )


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
            Rows ``[num_rows, d]`` and their weights ``[num_rows]``: ``num_tokens * topk`` rows, and
            on some CPUs more, of weight 0 (:func:`pad_rows`).
        """
        self.hidden_shape = hidden_states.shape
        rows = sort_by_expert(routing_map, probs, topk=self.config.moe_router_topk)
        multiple = row_multiple(hidden_states, len(rows.token_of_row) // routing_map.shape[1])
        if multiple > 1:
            rows = pad_rows(rows, multiple)
        # Not the weights: they would keep the graph of the layers before until the next forward.
        self.token_of_row, self.rows_of_token = rows.token_of_row, rows.rows_of_token
        self.tokens_per_expert = rows.tokens_per_expert
        flat = hidden_states.reshape(routing_map.shape[0], -1)
        if (
            not torch.is_grad_enabled()
        ):  # a function of autograd takes longer than the copy of a row
            return flat.index_select(0, rows.token_of_row), rows.weights
        return _Permute.apply(flat, rows.token_of_row, rows.rows_of_token), rows.weights

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
        if torch.is_grad_enabled():
            output = _Unpermute.apply(hidden_states, self.token_of_row, self.rows_of_token)
        else:
            output = F.embedding_bag(self.rows_of_token, hidden_states, mode="sum")
        return output.view(self.hidden_shape)
