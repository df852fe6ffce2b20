"""KV cache of generation; local layers keep the keys and values of their window only."""

import torch
from megatron.core.inference.contexts import StaticInferenceContext


class KeyValueCache(StaticInferenceContext):
    """Megatron's static context, with caches of rotated keys that know windows.

    Set ``sequence_len_offset`` to the position of the first token of what the model is to read.
    It must not decrease.

    Args:
        max_batch_size: Number of sequences.
        max_sequence_length: Most tokens of a sequence.
        max_read: Most tokens that are read at once.
    """

    def __init__(self, max_batch_size: int, max_sequence_length: int, *, max_read: int) -> None:
        super().__init__(max_batch_size, max_sequence_length)
        self._max_read = max_read
        self._layers: dict[int, _LayerCache] = {}

    def append(
        self, layer_number: int, key: torch.Tensor, value: torch.Tensor, *, window: int | None
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Keep those of the tokens that are read, over what may be there of their positions.

        Args:
            layer_number: Number of the layer in the model.
            key: Rotated keys, ``[n, b, ng, hn]``.
            value: ``[n, b, ng, hn]``.
            window: Keys that a query of the layer attends to, its own included; None for all.

        Returns:
            Keys and values from the first one that one of the tokens attends to, to the last token:
            views ``[at most n + window - 1, b, ng, hn]``.
        """
        if layer_number not in self._layers:
            rows = self.max_sequence_length
            if window is not None:  # twice: what is still needed moves once in a window
                rows = min(rows, window - 1 + max(window, self._max_read))
            self._layers[layer_number] = _LayerCache(key, value, rows=rows)
        return self._layers[layer_number].append(
            key, value, position=self.sequence_len_offset, window=window
        )


class _LayerCache:
    """The latest keys and values of a layer, in the order of their positions."""

    def __init__(self, key: torch.Tensor, value: torch.Tensor, *, rows: int) -> None:
        self._buffers = tuple(tensor.new_empty(rows, *tensor.shape[1:]) for tensor in (key, value))
        self._rows, self._first = rows, 0  # position of the first row

    def append(
        self, key: torch.Tensor, value: torch.Tensor, *, position: int, window: int | None
    ) -> tuple[torch.Tensor, torch.Tensor]:
        end = position + key.shape[0]
        seen = 0 if window is None else max(0, position - window + 1)
        if end - self._first > self._rows:
            self._forget_before(seen, position)
        assert self._first <= seen and end - self._first <= self._rows, (position, end, self._first)
        for buffer, new in zip(self._buffers, (key, value), strict=True):
            buffer[position - self._first : end - self._first] = new
        keys, values = (buffer[seen - self._first : end - self._first] for buffer in self._buffers)
        return keys, values

    def _forget_before(self, first: int, end: int) -> None:
        """Move the rows of ``first .. end`` to the front."""
        for buffer in self._buffers:
            buffer[: end - first] = buffer[first - self._first : end - self._first].clone()
        self._first = first
