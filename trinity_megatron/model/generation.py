"""Continuing token sequences with a Megatron model in memory, with a KV cache.

One loop for ``trinity-megatron generate`` and the end of a training.  The cache is Megatron's
static one; the model may be sharded by tensor, sequence and expert parallelism.
"""

import math
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from megatron.core.tensor_parallel import gather_from_tensor_model_parallel_region
from megatron.core.utils import unwrap_model

from trinity_megatron.errors import UserError
from trinity_megatron.model.attention.kv_cache import KeyValueCache

# Tokens of a prompt that are read at once: their logits are all computed.
_CHUNK = 512


@dataclass(frozen=True)
class Sampling:
    """How the next token is chosen.

    Attributes:
        temperature: Divides the logits; 0 takes the likeliest token.
        top_p: Samples among the likeliest tokens that have this probability together.
        seed: Of the first sequence; each further one has the next number, so that what is drawn
            for a sequence does not depend on how many there are.

    Raises:
        UserError: A value is out of its range.
    """

    temperature: float = 0.0
    top_p: float = 1.0
    seed: int = 0

    def __post_init__(self) -> None:
        if not 0 <= self.temperature < math.inf:
            raise UserError(
                f"--temperature {self.temperature} is no temperature. Remedy: 0 or more."
            )
        if not 0 < self.top_p <= 1:
            raise UserError(f"--top-p {self.top_p} is no probability. Remedy: above 0, at most 1.")


_GREEDY = Sampling()


def plan_reading(transformer_impl: str, multiple: int) -> tuple[int | None, bool]:
    """How a model reads a sequence.

    Behind the first tokens Megatron masks nothing when it has a cache.  Our attention knows the
    positions all the same; Transformer Engine's would look at tokens behind the one that is read.

    Args:
        transformer_impl: ``local`` or ``transformer_engine``.
        multiple: Tokens are read in multiples of it.

    Returns:
        The most tokens to read at once, None for all; and whether there is a cache.
    """
    if transformer_impl == "transformer_engine":
        return None, multiple == 1
    return _CHUNK, True


class Reader(Protocol):
    """What reads tokens and keeps their keys and values."""

    def read(self, tokens: torch.Tensor, start: int) -> torch.Tensor:
        """As :meth:`CachedModel.read`."""


class CachedModel:
    """A model with the keys and values of the tokens that it has read.

    Args:
        model: Megatron's model, wrapped or not, in evaluation mode; call it on every rank.
        batch_size: Number of sequences.
        max_length: Most tokens of a sequence.
    """

    def __init__(self, model: torch.nn.Module, *, batch_size: int, max_length: int) -> None:
        self.module: Any = unwrap_model(model)
        config = self.module.config
        # Sequence parallelism cuts what is read into equal parts, so a few tokens are read again.
        self._multiple = config.tensor_model_parallel_size if config.sequence_parallel else 1
        self._chunk, self._is_cached = plan_reading(config.transformer_impl, self._multiple)
        size = -(-max_length // self._multiple) * self._multiple
        self._context = KeyValueCache(batch_size, size, max_read=self._chunk or size)
        self._tokens = torch.zeros(batch_size, size, dtype=torch.int64)

    @torch.inference_mode()
    def read(self, tokens: torch.Tensor, start: int) -> torch.Tensor:
        """Read tokens after those before ``start``.

        Args:
            tokens: int64 ``[b, n]``.
            start: Their position.

        Returns:
            Logits after the last one, fp32 ``[b, padded vocabulary size]``.
        """
        end = start + tokens.shape[1]
        self._tokens[:, start:end] = tokens
        if not self._is_cached:
            return self._read_chunk(0, end)
        step = self._chunk or end - start
        for first in range(start, end, step):
            logits = self._read_chunk(first, min(first + step, end))
        return logits

    def _read_chunk(self, start: int, end: int) -> torch.Tensor:
        # What lies behind the end is overwritten later; until then nothing looks at it.
        length = -(-(end - start) // self._multiple) * self._multiple
        begin = max(0, min(start, self._context.max_sequence_length - length))
        device = torch.cuda.current_device()
        tokens = self._tokens[:, begin : begin + length].to(device)
        positions = torch.arange(begin, begin + length, device=device).expand_as(tokens)
        self._context.sequence_len_offset = begin
        context = self._context if self._is_cached else None
        logits = self.module(tokens, positions, None, inference_context=context)
        last = logits[:, end - 1 - begin]
        return gather_from_tensor_model_parallel_region(last).float()


def generate_tokens(
    model: torch.nn.Module,
    prompts: Sequence[Sequence[int]],
    *,
    max_new_tokens: int,
    vocab_size: int | None,
    stop: Collection[int] = (),
    sampling: Sampling = _GREEDY,
) -> Iterator[list[int | None]]:
    """Continue several prompts at once; call it on every rank.

    Args:
        model: Megatron's model in evaluation mode; not cut by pipeline or context parallelism.
        prompts: Token ids, at least one in each.
        max_new_tokens: Length of a continuation; it ends before at a stop token.
        vocab_size: Tokens of the tokenizer; the logits may have more.  None for all of them.
        stop: Tokens that end a continuation.
        sampling: How the next token is chosen.

    Yields:
        The next token of every sequence, stop tokens included; None for one that waits for longer
        prompts, or has ended.
    """
    longest = max(len(prompt) for prompt in prompts) + max_new_tokens
    cached = CachedModel(model, batch_size=len(prompts), max_length=longest)
    yield from continue_prompts(
        cached,
        prompts,
        max_new_tokens=max_new_tokens,
        vocab_size=vocab_size,
        stop=stop,
        sampling=sampling,
    )


def continue_prompts(
    reader: Reader,
    prompts: Sequence[Sequence[int]],
    *,
    max_new_tokens: int,
    vocab_size: int | None,
    stop: Collection[int] = (),
    sampling: Sampling = _GREEDY,
) -> Iterator[list[int | None]]:
    """:func:`generate_tokens` with what reads the tokens in the place of the model."""
    lengths = [len(prompt) for prompt in prompts]
    ends = [length + max_new_tokens for length in lengths]
    generators = [torch.Generator().manual_seed(sampling.seed + row) for row in range(len(prompts))]
    position = min(lengths)
    tokens = torch.tensor([list(prompt[:position]) for prompt in prompts])
    start, has_ended = 0, [False] * len(prompts)
    while not all(has_ended):
        logits = reader.read(tokens, start)[:, :vocab_size].cpu()
        rows = [row for row, end in enumerate(has_ended) if not end and position >= lengths[row]]
        chosen = [generators[row] for row in rows]
        drawn = draw(logits[rows], sampling, chosen).tolist() if rows else []
        made: list[int | None] = [None] * len(prompts)
        for row, token in zip(rows, drawn, strict=True):
            made[row] = token
            has_ended[row] = token in stop or position + 1 >= ends[row]
        yield made
        # A row that has ended reads anything: its tokens are no longer looked at.
        read = [
            prompt[position] if position < len(prompt) else made[row] or 0
            for row, prompt in enumerate(prompts)
        ]
        tokens, start, position = torch.tensor(read).unsqueeze(1), position, position + 1


def draw(
    logits: torch.Tensor, sampling: Sampling, generators: Sequence[torch.Generator]
) -> torch.Tensor:
    """Choose the next token of each sequence.

    Args:
        logits: fp32 ``[b, vocabulary size]``.
        sampling: How.
        generators: Of random numbers, one for each sequence.

    Returns:
        int64 ``[b]``.
    """
    if not sampling.temperature:
        return logits.argmax(dim=-1)
    # In float64 and below 0, where the smallest temperature gives no infinity but below.
    below = logits.double() - logits.amax(dim=-1, keepdim=True)
    probs, order = (below / sampling.temperature).softmax(dim=-1).sort(dim=-1, descending=True)
    before = probs.cumsum(dim=-1) - probs
    probs = probs.masked_fill(before >= sampling.top_p, 0.0)  # never the likeliest
    sums = probs.cumsum(dim=-1, dtype=torch.float64)
    # The numbers are drawn on the host, so that a seed means the same on every device.
    numbers = torch.cat(
        [torch.rand(1, 1, generator=one, dtype=torch.float64) for one in generators]
    )
    place = torch.searchsorted(sums, numbers * sums[:, -1:], right=True)
    return order.gather(-1, place.clamp(max=sums.shape[-1] - 1)).squeeze(-1)
