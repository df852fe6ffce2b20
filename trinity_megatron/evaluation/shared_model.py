"""One model for whoever asks: rank 0 gives tokens, the other ranks take part in its passes.

Only rank 0 needs tasks and their data, and what it does with logits cannot part the ranks: each
pass begins with a message from it.  The rows of a batch are divided among the data-parallel ranks
(with expert parallelism these hold different experts), and the logits gathered on rank 0.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from megatron.core import parallel_state
from megatron.core.tensor_parallel import gather_from_tensor_model_parallel_region
from megatron.core.utils import unwrap_model

from trinity_megatron.model.generation import (
    CachedModel,
    Sampling,
    continue_prompts,
)

# The first rank of the world, which is the first of its data- and tensor-parallel groups too.
_ASKING = 0


class SharedModel:
    """A model, perhaps sharded by tensor, sequence and expert parallelism.

    Rank 0 calls :meth:`logits` and :meth:`generate` inside of :meth:`asking`; every other rank
    calls :meth:`serve`, which returns when rank 0 has left the block.

    Args:
        model: Megatron's model, wrapped or not, in evaluation mode; not cut by pipeline or context
            parallelism.
        vocab_size: Tokens of the tokenizer; the model may have more rows.
        beat: Called on every rank when a pass begins.

    Attributes:
        has_failed: Whether a pass has failed on this rank; the others still wait in it.
    """

    def __init__(
        self,
        model: torch.nn.Module,
        vocab_size: int,
        *,
        beat: Callable[[], None] = lambda: None,
    ) -> None:
        self._beat = beat
        self.vocab_size = vocab_size
        self._module: Any = unwrap_model(model)
        config = self._module.config
        self._multiple = config.tensor_model_parallel_size if config.sequence_parallel else 1
        self._data_group = parallel_state.get_data_parallel_group()
        self._is_alone = torch.distributed.get_world_size() == 1
        self._cached: CachedModel | None = None
        self.has_failed = False

    @property
    def device(self) -> torch.device:
        """Where the weights are."""
        return next(self._module.parameters()).device

    @property
    def dtype(self) -> torch.dtype:
        """Of the weights."""
        return next(self._module.parameters()).dtype

    @contextmanager
    def asking(self) -> Iterator[None]:
        """On rank 0: let the other ranks serve until the block ends, however it does."""
        try:
            yield
        finally:
            self._cached = None
            if not self.has_failed:
                self._announce(None)

    def serve(self) -> None:
        """On the other ranks: take part in each pass until rank 0 is done."""
        while (call := self._receive()) is not None:
            name, values = call
            self._beat()
            getattr(self, name)(*values)
        self._cached = None

    def logits(self, tokens: torch.Tensor) -> torch.Tensor:
        """Logits of every place; on rank 0.

        Args:
            tokens: int64 ``[b, s]``.

        Returns:
            fp32 ``[b, s, vocab_size]``.
        """
        return self._call("_all_logits", tokens.cpu())

    def generate(
        self,
        prompts: Sequence[Sequence[int]],
        *,
        max_new_tokens: int,
        stop: Sequence[int] = (),
        sampling: Sampling,
    ) -> Iterator[list[int | None]]:
        """Continue prompts; on rank 0.  As :func:`.generation.generate_tokens`."""
        longest = max(len(prompt) for prompt in prompts) + max_new_tokens
        self._call("_open", len(prompts), longest)
        return continue_prompts(
            self,
            prompts,
            max_new_tokens=max_new_tokens,
            vocab_size=self.vocab_size,
            stop=stop,
            sampling=sampling,
        )

    def read(self, tokens: torch.Tensor, start: int) -> torch.Tensor:
        """As :meth:`.generation.CachedModel.read`, of all rows; on rank 0."""
        return self._call("_read", tokens, start)

    def _call(self, name: str, *values: Any) -> Any:
        self._beat()
        try:
            self._announce((name, values))
            return getattr(self, name)(*values)
        except BaseException:
            self.has_failed = True
            raise

    def _announce(self, call: tuple[str, tuple] | None) -> None:
        if not self._is_alone:
            torch.distributed.broadcast_object_list([call], _ASKING)

    def _receive(self) -> tuple[str, tuple] | None:
        message: list[Any] = [None]
        torch.distributed.broadcast_object_list(message, _ASKING)
        return message[0]

    # What every rank does for a call.

    @torch.no_grad()
    def _all_logits(self, tokens: torch.Tensor) -> torch.Tensor:
        length = tokens.shape[1]
        mine = self._own_rows(tokens).to(self.device)
        # Nothing looks at what is behind it.
        mine = torch.nn.functional.pad(mine, (0, -length % self._multiple))
        positions = torch.arange(mine.shape[1], device=self.device).expand_as(mine)
        logits = self._module(mine, positions, None)
        whole = gather_from_tensor_model_parallel_region(logits)[:, :length, : self.vocab_size]
        return self._gather(whole.float(), len(tokens))

    def _open(self, batch_size: int, max_length: int) -> None:
        rows = -(-batch_size // self._data_group.size())
        self._cached = CachedModel(self._module, batch_size=rows, max_length=max_length)

    def _read(self, tokens: torch.Tensor, start: int) -> torch.Tensor:
        assert self._cached is not None
        return self._gather(self._cached.read(self._own_rows(tokens), start), len(tokens))

    def _own_rows(self, tokens: torch.Tensor) -> torch.Tensor:
        """This data-parallel rank's rows, as many on each: the last ones are read again."""
        ranks = self._data_group.size()
        rows = -(-len(tokens) // ranks)
        first = self._data_group.rank() * rows
        return tokens[torch.arange(first, first + rows).clamp(max=len(tokens) - 1)]

    def _gather(self, mine: torch.Tensor, num_rows: int) -> torch.Tensor:
        """The rows of all data-parallel ranks, on the first one; elsewhere this rank's."""
        ranks = self._data_group.size()
        # Tensor-parallel ranks have the same logits; rank 0 is the first of them.
        if ranks == 1 or parallel_state.get_tensor_model_parallel_rank() > 0:
            return mine
        is_first = self._data_group.rank() == 0
        parts = [torch.empty_like(mine) for _ in range(ranks)] if is_first else None
        first = torch.distributed.get_global_rank(self._data_group, 0)
        torch.distributed.gather(mine.contiguous(), parts, dst=first, group=self._data_group)
        return torch.cat(parts)[:num_rows] if parts is not None else mine
