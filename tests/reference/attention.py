"""The slow oracle of attention: one dense mask, float64, no library attention."""

import torch


def visible(
    num_queries: int,
    num_keys: int,
    window: int | None = None,
    documents: list[int] | None = None,
) -> torch.Tensor:
    """Which keys a query sees, ``[num_queries, num_keys]``; the last query stands at the last key.

    Args:
        num_queries: Number of queries.
        num_keys: Number of keys.
        window: Keys that a query sees, itself included.
        documents: Lengths of the documents; they add up to the number of keys.

    Source: report eq 8.
    """
    document = [i for i, length in enumerate(documents or [num_keys]) for _ in range(length)]
    window = num_keys if window is None else window
    rows = [
        [t - window < j <= t and document[j] == document[t] for j in range(num_keys)]
        for t in range(num_keys - num_queries, num_keys)
    ]
    return torch.tensor(rows)


def attention(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    *,
    window: int | None = None,
    documents: list[int] | None = None,
    scale: float | None = None,
) -> torch.Tensor:
    """Softmax attention of ``[sq, b, np, hn]`` to ``[sk, b, ng, hn]``: ``[sq, b, np * hn]``.

    Query head i reads the group floor(i * ng / np).

    Source: report eq 1-14.
    """
    query, key, value = query.double(), key.double(), value.double()
    num_heads, num_groups = query.size(2), key.size(2)
    group = [i * num_groups // num_heads for i in range(num_heads)]
    scores = torch.einsum("qbhd,kbhd->bhqk", query, key[:, :, group])
    scores = scores * (query.size(-1) ** -0.5 if scale is None else scale)
    mask = visible(query.size(0), key.size(0), window, documents)
    scores = scores.masked_fill(~mask, float("-inf"))
    output = torch.einsum("bhqk,kbhd->qbhd", scores.softmax(-1), value[:, :, group])
    return output.flatten(2)
