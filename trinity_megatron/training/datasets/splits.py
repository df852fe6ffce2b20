"""Where the sequences of the training, validation and test sets come from, and how many there are.

Megatron's own flags name one set, a weighted blend of several, shares of one, or a file of these.
"""

from __future__ import annotations

import argparse
import os
from collections.abc import Mapping
from dataclasses import dataclass, replace

import numpy as np
from megatron.core.datasets.blended_megatron_dataset_config import (
    convert_split_vector_to_split_matrix,
    parse_and_normalize_split,
)
from megatron.core.datasets.indexed_dataset import IndexedDataset, get_bin_path, get_idx_path
from megatron.training.utils import get_blend_and_blend_per_split

from trinity_megatron.data.index_file import HEADER, MAGIC
from trinity_megatron.errors import UserError
from trinity_megatron.process.screen import tell_once

_NAMES = ("train", "valid", "test")
_SPLIT_FLAGS = ("--train-data-path", "--valid-data-path", "--test-data-path")
_MANY = 10**7  # sequence lengths that are not read one by one


@dataclass(frozen=True)
class Source:
    """A share of an indexed dataset that a split draws from.

    Attributes:
        flag: That names it, with the dataset.
        prefix: Path without ``.bin`` and ``.idx``.
        weight: Of the blend; None if the sources are drawn from by their size.
        share: From where to where, as fractions of the dataset's sequences.
        tokens: Of the share, if they are known.
    """

    flag: str
    prefix: str
    weight: float | None = None
    share: tuple[float, float] = (0.0, 1.0)
    tokens: int | None = None

    def open(self) -> IndexedDataset | None:
        """The dataset; None if it is empty.

        Raises:
            UserError: A file is missing or damaged.
        """
        for path in (get_idx_path(self.prefix), get_bin_path(self.prefix)):
            if not os.path.isfile(path):
                raise UserError(f"{self.flag}: there is no {path}. Remedy: name what is there.")
        if not os.path.getsize(get_bin_path(self.prefix)):
            return None
        if not _is_whole_index(get_idx_path(self.prefix)):
            raise UserError(
                f"{self.flag}: {get_idx_path(self.prefix)} is damaged. Remedy: make it again."
            )
        return IndexedDataset(self.prefix)

    def bounds(self, number: int) -> tuple[int, int]:
        """The first sequence of the share, and the one behind its last, of so many."""
        first, last = (int(round(fraction * float(number))) for fraction in self.share)
        return first, last

    def num_sequences(self, seq_length: int) -> int:
        """Training sequences in the share; each shares a token with the next."""
        return max(0, self.num_tokens() - 1) // seq_length

    def num_tokens(self) -> int:
        """Tokens of the share, by its part of the file if its sequences are very many."""
        if self.tokens is not None:
            return self.tokens
        dataset = self.open()
        if dataset is None:
            return 0
        first, last = self.bounds(len(dataset))
        if last - first <= _MANY:
            return int(dataset.sequence_lengths[first:last].sum(dtype=np.int64))
        tokens = os.path.getsize(get_bin_path(self.prefix)) // dataset.index.dtype_size
        return tokens * (last - first) // len(dataset)


def _is_whole_index(path: str) -> bool:
    """Whether an index has all that its header promises; Megatron's reader leaves a trace if not.

    Source: megatron.core.datasets.indexed_dataset, _IndexWriter.
    """
    with open(path, "rb") as file:
        header = file.read(HEADER.size)
    if len(header) < HEADER.size:
        return False
    magic, version, _, sequences, documents = HEADER.unpack(header)
    # A length, a position, and a document's first sequence.
    size = HEADER.size + sequences * (4 + 8) + documents * 8
    return magic == MAGIC and version == 1 and os.path.getsize(path) >= size


def is_evaluating(args: argparse.Namespace) -> bool:
    """Whether the run ever evaluates."""
    return bool(args.full_validation or args.eval_iters)


def needed_splits(args: argparse.Namespace) -> tuple[bool, bool, bool]:
    """Whether train, validation and test set are read in this run."""
    return not args.skip_train, is_evaluating(args), is_evaluating(args)


def split_sources(
    args: argparse.Namespace, known: Mapping[str, int] | None = None
) -> tuple[list[Source], list[Source], list[Source]]:
    """The sources of train, validation and test set; empty where the flags name none.

    Args:
        args: Of the run, after Megatron's checks.
        known: Tokens of datasets that need not be opened, by their prefixes.

    Raises:
        UserError: A blend cannot be read.
    """
    flag = "--data-path" if args.data_path else ", ".join(_SPLIT_FLAGS)
    file = args.data_args_path or args.per_split_data_args_path
    if file is not None:
        flag = "--data-args-path" if args.data_args_path else "--per-split-data-args-path"
        flag = f"{flag} {file}"
    try:
        blend, blend_per_split = get_blend_and_blend_per_split(args)
    except (KeyError, ValueError, AssertionError, OSError) as error:
        raise UserError(
            f"{flag}: {type(error).__name__} {error}. Remedy: weights and prefixes in turn; in the "
            "file of --per-split-data-args-path under train, valid and test, null where there is "
            "none."
        ) from error
    found: tuple[list[Source], list[Source], list[Source]] = ([], [], [])
    if blend is not None:
        shares = convert_split_vector_to_split_matrix(parse_and_normalize_split(args.split))
        for sources, share, name in zip(found, shares, _NAMES, strict=True):
            words = f"the {name} part of --split {args.split}"
            sources += _sources(flag, blend, share, words) if share else []
    for sources, blend, own in zip(found, blend_per_split or (), _SPLIT_FLAGS, strict=False):
        of_split = _sources(own if file is None else flag, blend) if blend else []
        sources += [replace(item, tokens=(known or {}).get(item.prefix)) for item in of_split]
    return found


def _sources(
    flag: str, blend: tuple, share: tuple[float, float] = (0.0, 1.0), words: str = ""
) -> list[Source]:
    prefixes, weights = blend
    return [
        Source(f"{flag} {prefix}{words and f' ({words})'}", prefix, weight, share)
        for prefix, weight in zip(prefixes, weights or [None] * len(prefixes), strict=True)
    ]


def check_splits(args: argparse.Namespace, known: Mapping[str, int] | None = None) -> None:
    """Refuse sets that the run needs and that have no sequence.

    Args:
        args: Of the run, after Megatron's checks.
        known: Tokens of datasets that need not be opened, by their prefixes.

    Raises:
        UserError: Names the set, its tokens and the remedy.
    """
    if args.mock_data:
        return
    splits = split_sources(args, known)
    if is_evaluating(args) and not splits[1]:
        raise UserError(
            f"--eval-iters {args.eval_iters}, and there is no validation set. Remedy: --eval-iters "
            "0, or --valid-data-path (with --data-path: --split 99,1,0)."
        )
    if args.data_is_chat:
        return  # a sample is filled up with padding, and conversations are read again
    for name, sources, is_needed in zip(_NAMES, splits, needed_splits(args), strict=True):
        if is_needed:
            for source in sources:
                _check_length(args, name, source)
    if is_evaluating(args):
        _warn_of_repeated_data(args, splits[1])


def _check_length(args: argparse.Namespace, name: str, source: Source) -> None:
    if source.weight == 0 or "://" in source.prefix:
        return
    tokens = source.num_tokens()
    if tokens > args.seq_length:
        return
    remedy = "a shorter --seq-length, or more data"
    if name != "train":
        remedy = f"--eval-iters 0, {remedy} (prepare-data --validation-fraction)"
    raise UserError(
        f"{source.flag} has {tokens:,} tokens, which is not one sequence of --seq-length "
        f"{args.seq_length} and the token after it. Remedy: {remedy}."
    )


def _warn_of_repeated_data(args: argparse.Namespace, sources: list[Source]) -> None:
    """Say that an evaluation reads more sequences than there are."""
    if any("://" in source.prefix for source in sources):
        return
    asked = args.eval_iters * (args.eval_global_batch_size or args.global_batch_size or 0)
    held = sum(source.num_sequences(args.seq_length) for source in sources)
    if asked > held:
        tell_once(
            f"> an evaluation reads {asked} sequences (--eval-iters {args.eval_iters}), and the "
            f"validation set has {held}: some are read more than once"
        )


def check_unweighted(args: argparse.Namespace, num_samples: list[int]) -> None:
    """Refuse a blend without weights that is too short: Megatron reads it once, and then stops.

    Args:
        args: Of the run.
        num_samples: Samples of train, validation and test set that the run reads.

    Raises:
        UserError: Names the blend and the remedy.
    """
    for sources, asked, is_needed in zip(
        split_sources(args), num_samples, needed_splits(args), strict=True
    ):
        is_blend = len(sources) > 1 and sources[0].weight is None
        if not (is_blend and is_needed) or any("://" in source.prefix for source in sources):
            continue
        held = sum(source.num_sequences(args.seq_length) for source in sources)
        if asked is not None and held < asked:
            raise UserError(
                f"{sources[0].flag} and {len(sources) - 1} more without weights have {held:,} "
                f"sequences, which are read once, and the run reads {asked:,}. Remedy: weights, as "
                f"in '1 {sources[0].prefix} 1 {sources[1].prefix}'."
            )
