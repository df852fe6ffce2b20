"""What a run has read of its mixture: kept in checkpoints, compared at a resume."""

from __future__ import annotations

import argparse
from collections.abc import Mapping
from dataclasses import dataclass
from itertools import zip_longest
from typing import Any

from trinity_megatron.data.mixture.corpora import MixtureData
from trinity_megatron.data.mixture.plan import phase_starts
from trinity_megatron.data.mixture.quantities import format_tokens
from trinity_megatron.data.mixture.schedule import whole_parts

# What a checkpoint keeps: plain containers, which unpickle without our code.
Described = dict[str, Any]


def describe_mixture(data: MixtureData, seq_length: int) -> Described:
    """What a checkpoint keeps of a mixture.

    Args:
        data: The mixture.
        seq_length: Tokens of a sample.

    Returns:
        ``order``; ``is_text``, whether the corpora are raw text; ``buffer``, the settings of
        ``order: rsdb``; ``corpora``, the names in the order of ``data_identity``; ``languages``,
        theirs or None; ``length_biases``, settings by the names of those that have one;
        ``validated``, the names of those with validation data; ``phases``, each with ``start``
        (its first sample), ``names`` and ``parts`` (whole numbers in the ratio of the weights).
    """
    phases = data.mixture.phases
    return {
        "order": data.mixture.order,
        "is_text": bool(data.raw),
        "buffer": vars(data.mixture.buffer).copy(),
        "corpora": list(data.corpora),
        "languages": [item.corpus.language for item in data.corpora.values()],
        "length_biases": {
            name: vars(item.corpus.length_bias).copy()
            for name, item in data.corpora.items()
            if item.corpus.length_bias is not None
        },
        "validated": list(data.validated),
        "phases": [
            {
                "start": start,
                "names": list(phase.weights),
                "parts": whole_parts(list(phase.weights.values())),
            }
            for start, phase in zip(phase_starts(phases, seq_length), phases, strict=True)
        ],
    }


def numbered_parts(described: Described) -> list[dict[int, int]]:
    """Weights in each phase, by number of the corpus: whole numbers."""
    numbers = {name: number for number, name in enumerate(described["corpora"])}
    return [
        {numbers[name]: part for name, part in zip(phase["names"], phase["parts"], strict=True)}
        for phase in described["phases"]
    ]


@dataclass(frozen=True)
class PastPhase:
    """A phase as far as a run has read it.

    Attributes:
        start: Its first sample.
        end: The sample behind its last.
        contents: Fingerprints of its datasets, in the order of its draw.
        parts: Their weights.
        words: Name and weight of each, for people.
    """

    start: int
    end: int
    contents: tuple[str, ...]
    parts: tuple[int, ...]
    words: str


def read_past(
    identity: Mapping[str, Any], mixture: Described | None, consumed: int
) -> list[PastPhase] | None:
    """What a run has read so far.

    Args:
        identity: Its ``data_identity``.
        mixture: Its ``data_mixture``; None if its data were no mixture.
        consumed: Samples.

    Returns:
        Its phases; None for a blend of Megatron, which no mixture is equal to.
    """
    datasets = identity.get("train", [])
    if mixture is None:
        if len(datasets) != 1:
            return None
        only = datasets[0]
        content = only["content"] or only["prefix"]
        return [PastPhase(0, consumed, (content,), (1,), only["prefix"])]
    contents = {
        name: item["content"] for name, item in zip(mixture["corpora"], datasets, strict=True)
    }
    if mixture["order"] == "rsdb":  # its order of the documents depends on the names
        biases = mixture.get("length_biases", {})
        contents = {
            name: f"{name} {content} {biases.get(name, '')}" for name, content in contents.items()
        }
    starts = [phase["start"] for phase in mixture["phases"]]
    past = []
    for phase, end in zip(mixture["phases"], [*starts[1:], consumed], strict=True):
        if phase["start"] < consumed:
            pairs = zip(phase["names"], phase["parts"], strict=True)
            past.append(
                PastPhase(
                    start=phase["start"],
                    end=min(end, consumed),
                    contents=tuple(contents[name] for name in phase["names"]),
                    parts=tuple(phase["parts"]),
                    words=", ".join(f"{name} {part}" for name, part in pairs),
                )
            )
    return past


def past_differences(saved: object, args: argparse.Namespace) -> list[str]:
    """How the data that a run has read differ from what its mixture now says of them, in words.

    What comes later may differ.

    Args:
        saved: Arguments of the run that saved the checkpoint.
        args: Of the run that resumes.
    """
    consumed = getattr(saved, "consumed_train_samples", 0)
    descriptions = getattr(saved, "data_mixture", None), getattr(args, "data_mixture", None)
    orders = [(item or {}).get("order", "shuffled") for item in descriptions]
    if orders[0] != orders[1]:
        return [f"order {orders[0]} -> {orders[1]}"]
    are_text = [bool((item or {}).get("is_text")) for item in descriptions]
    if are_text[0] != are_text[1]:
        words = [("prepared data", "raw text")[is_text] for is_text in are_text]
        return [f"{words[0]} -> {words[1]}"]
    identities = getattr(saved, "data_identity", None) or {}, args.data_identity
    before = read_past(identities[0], descriptions[0], consumed)
    now = read_past(identities[1], descriptions[1], consumed)
    if before is None or now is None:
        return ["a blend of --data-path -> a mixture, or the reverse"]
    return [
        line
        for number, (one, other) in enumerate(zip_longest(before, now))
        if (line := _difference(number, one, other, args.seq_length))
    ]


def _difference(
    number: int, before: PastPhase | None, now: PastPhase | None, seq_length: int
) -> str:
    if before is None or now is None:
        there = before or now
        assert there is not None
        words = f"from {format_tokens(there.start * seq_length)} tokens on ({there.words})"
        return f"phase {number + 1} {words} is {'gone' if now is None else 'new'}"
    lines = []
    if (before.start, before.end) != (now.start, now.end):
        bounds = [
            f"{format_tokens(item.start * seq_length)} to {format_tokens(item.end * seq_length)}"
            for item in (before, now)
        ]
        lines.append(f"{bounds[0]} -> {bounds[1]} tokens")
    if before.parts != now.parts:
        lines.append(f"weights {before.words} -> {now.words}")
    elif before.contents != now.contents:
        lines.append(f"the content of its corpora ({before.words} -> {now.words})")
    return f"phase {number + 1}: {', '.join(lines)}" if lines else ""


def past_remedy(saved: object, args: argparse.Namespace) -> str:
    """How to go on, and to change the weights of the present phase from here on."""
    mixture = getattr(saved, "data_mixture", None)
    order = (mixture or {}).get("order", "shuffled")
    if order != (getattr(args, "data_mixture", None) or {}).get("order", "shuffled"):
        return f"order: {order}, as the run has begun"
    consumed = getattr(saved, "consumed_train_samples", 0) * args.seq_length
    return (
        "leave what the run has read as it was; new weights go into a phase behind it: until: "
        f"{consumed} ends the present one"
    )
