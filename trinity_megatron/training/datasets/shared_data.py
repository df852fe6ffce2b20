"""What the first rank knows of the data of a run, which all ranks get in one broadcast."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

from trinity_megatron.data.mixture.corpora import MixtureData, MixtureOutline
from trinity_megatron.data.text.text_corpus import TextCorpus
from trinity_megatron.data.text.token_parts import TokenCorpus
from trinity_megatron.training.first_rank import from_first_rank

# Arguments that follow from the corpora of a mixture, see ``arguments/mixture_checks.py``.
_OF_MIXTURE = (
    "train_data_path",
    "valid_data_path",
    "data_mixture",
    "dataloader_type",
    "dataloader_save",
)


@dataclass(frozen=True)
class SharedData:
    """What all ranks know of the data of a run.

    Attributes:
        mixture: That ``--data`` names, without a manifest; None for a prepared folder and without.
        texts: What the streams of a mixture with raw text read; empty without raw text.
        arguments: Of the run, that follow from the data, by name.
    """

    mixture: MixtureData | None
    texts: Sequence[TextCorpus | TokenCorpus]
    arguments: dict[str, Any]


def share_data(args: argparse.Namespace, mixture: MixtureOutline | None) -> SharedData:
    """Give every rank what the first one has read; call it on all ranks.

    ``args.data_identity`` is saved in every checkpoint, as all of ``args`` but the files of the
    text, which leave them.

    Args:
        args: Of the run; on other ranks than the first they are completed.
        mixture: That ``--data`` names, with its corpora on the first rank; None without.
    """
    found = from_first_rank(lambda: _found(args, mixture))
    vars(args).update(found.arguments)
    args.text_corpora = None
    return found


def _found(args: argparse.Namespace, mixture: MixtureOutline | None) -> SharedData:
    names = ("data_identity", *(_OF_MIXTURE if mixture is not None else ()))
    values = {name: getattr(args, name) for name in names if hasattr(args, name)}
    if mixture is None:
        return SharedData(None, [], values)
    assert isinstance(mixture, MixtureData)
    # A manifest lists all sources of its folder, and has done its work.
    return SharedData(replace(mixture, manifest=None), args.text_corpora or [], values)
