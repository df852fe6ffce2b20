"""The raw text of a run: its mixture from the arguments."""

from __future__ import annotations

import argparse
from collections.abc import Mapping, Sequence
from pathlib import Path

from trinity_megatron.data.mixture.corpora import MixtureData
from trinity_megatron.data.mixture.plan import make_schedule
from trinity_megatron.data.text.text_corpus import TextCorpus
from trinity_megatron.data.text.text_mixture import TextMixture
from trinity_megatron.data.text.token_parts import TokenCorpus
from trinity_megatron.training.datasets.mixture_past import numbered_parts


def make_text_mixture(
    args: argparse.Namespace, data: MixtureData, corpora: Sequence[TextCorpus | TokenCorpus]
) -> TextMixture:
    """What all streams of a run share.

    Args:
        args: Of the run, with ``data_mixture``.
        data: The mixture.
        corpora: In its order.
    """
    described = args.data_mixture
    is_sequential = described["order"] == "sequential"
    return TextMixture(
        corpora=corpora,
        starts=[phase["start"] for phase in described["phases"]],
        parts=numbered_parts(described),
        order=described["order"],
        documents=described["buffer"]["documents"],
        num_streams=described["buffer"]["streams"],
        seed=args.seed,
        seq_length=args.seq_length,
        tokenizer=Path(args.tokenizer_model),
        schedule=make_schedule(data.mixture, args.seq_length, args.seed) if is_sequential else None,
    )


def contents_of(corpora: Sequence[TextCorpus | TokenCorpus], order: str) -> dict[str, str]:
    """What streams read of each corpus, by name: its fingerprint, and in which order."""
    return {corpus.name: f"{order} {corpus.content}" for corpus in corpora}


def is_other_text(before: Mapping[str, str] | None, now: Mapping[str, str] | None) -> bool:
    """Whether streams cannot go on, for they have read another kind of data, or other text.

    Args:
        before: See :func:`contents_of`; None for indexed data.
        now: The same of the run that resumes.
    """
    if before is None or now is None:
        return before is not now
    return any(now.get(name, content) != content for name, content in before.items())
