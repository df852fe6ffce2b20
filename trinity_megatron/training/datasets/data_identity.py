"""Which data a run reads, known by their content: kept in checkpoints, compared at a resume."""

from __future__ import annotations

import argparse
import hashlib
import os
import struct
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from io import RawIOBase
from itertools import zip_longest
from pathlib import Path
from typing import Any

from megatron.core.datasets.blended_megatron_dataset_config import parse_and_normalize_split
from megatron.core.datasets.indexed_dataset import DType
from megatron.core.datasets.object_storage_utils import is_object_storage_path
from megatron.core.datasets.utils import normalize
from megatron.training.utils import get_blend_and_blend_per_split

from trinity_megatron.data.index_file import HEADER, MAGIC, IndexHead
from trinity_megatron.data.text.text_corpus import TextCorpus
from trinity_megatron.data.text.token_parts import TokenCorpus
from trinity_megatron.errors import UserError
from trinity_megatron.process.environment import count_cores
from trinity_megatron.process.screen import tell
from trinity_megatron.training.datasets.mixture_past import past_differences, past_remedy

# Files up to this size are read whole, larger ones in blocks that are spread evenly.
_WHOLE_BYTES = 64 * 2**20
_BLOCKS, _BLOCK_BYTES = 256, 64 * 2**10

# Megatron's, if --split is not given.
_DEFAULT_SPLIT = "969, 30, 1"

# Training reads these.
_ALL, _TRAIN = "all splits", "train"

# What a checkpoint keeps: plain containers, which unpickle without our code.
Dataset = dict[str, Any]
Identity = dict[str, list[Dataset]]


def read_identity(
    args: argparse.Namespace, heads: Mapping[str, IndexHead] | None = None
) -> Identity | None:
    """The datasets of each split, known by their content.

    Args:
        args: Of the run.
        heads: Of the indices that were read, by their prefixes; the files are those of then.

    Returns:
        For each split (or for all of them, where ``--split`` cuts one) its datasets in the order of
        the blend, each with ``prefix``, ``weight``, ``documents``, ``tokens`` and ``content``,
        a fingerprint; None for mock data.

    Raises:
        UserError: A file is missing, has changed or is no dataset of Megatron; names it and the
            remedy.
    """
    if args.mock_data:
        return None
    descriptions = Descriptions(heads or {})
    try:
        blend, per_split = get_blend_and_blend_per_split(args)
    except AssertionError:  # flags that exclude each other, which Megatron's own check names
        return None
    if blend is not None:
        split = parse_and_normalize_split(args.split or _DEFAULT_SPLIT)
        return {_ALL: [{**item, "split": split} for item in _read_blend(blend, descriptions)]}
    if per_split is None:
        return None
    names = (_TRAIN, "validation", "test")
    blends = zip(names, per_split, strict=True)
    return {name: _read_blend(blend, descriptions) for name, blend in blends if blend is not None}


def add_text(
    identity: Identity | None, corpora: Sequence[TextCorpus | TokenCorpus] | None
) -> Identity | None:
    """An identity with the corpora of a mixture with raw text; None: there is no raw text."""
    if corpora is None:
        return identity
    unknown = {"weight": None, "documents": None, "tokens": None}
    found = [{"prefix": corpus.name, **unknown, "content": corpus.content} for corpus in corpora]
    return {_TRAIN: found, **(identity or {})}


class Descriptions:
    """Size and fingerprint of datasets, each read once.

    Args:
        heads: Of the indices that were read, by their prefixes.
    """

    def __init__(self, heads: Mapping[str, IndexHead]) -> None:
        self._heads = heads
        self._known: dict[str, Dataset] = {}

    def of(self, prefixes: Sequence[str]) -> list[Dataset]:
        """Describe datasets side by side: reading and hashing let other threads work.

        Raises:
            UserError: See :func:`describe_dataset`.
        """
        new = [prefix for prefix in dict.fromkeys(prefixes) if prefix not in self._known]
        with ThreadPoolExecutor(count_cores()) as pool:
            found = pool.map(lambda prefix: describe_dataset(prefix, self._heads.get(prefix)), new)
            self._known |= zip(new, found, strict=True)
        return [self._known[prefix] for prefix in prefixes]


def _read_blend(blend: Any, descriptions: Descriptions) -> list[Dataset]:
    prefixes, weights = blend
    # One dataset is read as it is, whatever its weight.
    shares = normalize(weights) if weights and len(weights) > 1 else [None] * len(prefixes)
    return [
        {"prefix": prefix, "weight": share, **described}
        for prefix, share, described in zip(
            prefixes, shares, descriptions.of(prefixes), strict=True
        )
    ]


def describe_dataset(prefix: str, head: IndexHead | None = None) -> Dataset:
    """Size and fingerprint of a dataset; without them if it lies in an object storage.

    Each of its files is opened once.

    Args:
        prefix: Of its files ``.idx`` and ``.bin``.
        head: Of its index, if that was read before.

    Raises:
        UserError: A file is missing or no dataset of Megatron, or has changed since ``head``.
    """
    if is_object_storage_path(prefix):
        return {"documents": None, "tokens": None, "content": None}
    index, tokens = Path(f"{prefix}.idx"), Path(f"{prefix}.bin")
    digest = hashlib.sha256()
    try:
        with index.open("rb", buffering=0) as file:
            documents, token_bytes = _read_counts(file, index)
            if head is not None:
                head.index.check(index, os.fstat(file.fileno()))
            _add_file(digest, file)
        with tokens.open("rb", buffering=0) as file:
            status = os.fstat(file.fileno())
            if head is not None:
                head.bin.check(tokens, status)
            _add_file(digest, file)
    except OSError as error:
        raise UserError(
            f"the data {prefix} cannot be read ({error}). Remedy: the path of both files, .idx and "
            ".bin, without that ending."
        ) from error
    count = status.st_size // token_bytes
    return {"documents": documents, "tokens": count, "content": digest.hexdigest()}


def _read_counts(file: RawIOBase, path: Path) -> tuple[int, int]:
    """Documents, and bytes of a token, as the head of an index says."""
    head = (file.read(HEADER.size) or b"").ljust(HEADER.size, b"\0")
    magic, _, code, documents, _ = HEADER.unpack(head)
    if magic != MAGIC or code not in {item.value for item in DType}:
        raise UserError(
            f"{path} does not begin as an index of Megatron does. Remedy: prepare the data "
            "again, or name another path."
        )
    return documents, DType.size(code)


def _add_file(digest: Any, file: RawIOBase) -> None:
    size = os.fstat(file.fileno()).st_size
    digest.update(struct.pack("<Q", size))
    if size > _WHOLE_BYTES:
        for index in range(_BLOCKS):
            start = (size - _BLOCK_BYTES) * index // (_BLOCKS - 1)
            digest.update(os.pread(file.fileno(), _BLOCK_BYTES, start))
        return
    file.seek(0)
    while block := file.read(2**20):
        digest.update(block)


def fingerprints_of(identity: Identity | None) -> dict[str, str]:
    """Fingerprint of each dataset of an identity, by its prefix."""
    datasets = [item for items in (identity or {}).values() for item in items]
    return {item["prefix"]: item["content"] for item in datasets if item["content"]}


def check_data(saved: object, step: int | None, args: argparse.Namespace) -> None:
    """Refuse a resume with other training data than those of the checkpoint.

    What does not change what is read, but its order, or is not trained on, is said.

    Args:
        saved: Arguments of the run that saved the checkpoint.
        step: Its iteration.
        args: Of the run that resumes, with ``data_identity`` and ``data_mixture``.

    Raises:
        UserError: Names both data and the remedy.
    """
    before, now = getattr(saved, "data_identity", None), getattr(args, "data_identity", None)
    consumed = getattr(saved, "consumed_train_samples", 0)
    if now is None or not consumed:
        return
    if before is None:
        _warn_of_old_order(saved, args, now)
        return
    changed = differences(before, now)
    remedy = "the data of that run"
    if getattr(saved, "data_mixture", None) or getattr(args, "data_mixture", None):
        changed.pop(_ALL, None)
        changed[_TRAIN] = past_differences(saved, args)
        remedy = past_remedy(saved, args)
    what = "; ".join(line for name in (_ALL, _TRAIN) for line in changed.pop(name, []))
    passed = (
        f"the first {consumed} sequences of its order, as many as the run has read, are passed over"
    )
    mixture = getattr(args, "data_mixture", None) or {}
    if mixture.get("order") == "rsdb" or mixture.get("is_text"):
        passed = "the streams begin with the first documents of each corpus"
    if _begins_phase(step, args):
        tell(f"> a phase ends with step {step}; the next one reads its data from their start")
    elif what and not args.allow_data_change:
        raise UserError(
            f"--load {args.load} was trained on other data: {what}. Remedy: {remedy}; "
            "or another --out (or --finetune) to start anew; or --allow-data-change to go on with "
            f"these: a new order begins, and {passed}."
        )
    elif what:
        tell(f"> the training data have changed: {what}. A new order begins; {passed}")
    for name, lines in changed.items():
        tell(f"> the {name} data have changed: {'; '.join(lines)}")
    _warn_of_other_order(saved, args)


def _begins_phase(step: int | None, args: argparse.Namespace) -> bool:
    """Whether Megatron expects other data from here on, and counts their samples from 0."""
    phases = args.phase_transition_iterations or ""
    return step is not None and str(step) in phases.replace(" ", "").split(",")


def differences(before: Mapping[str, Any], now: Mapping[str, Any]) -> dict[str, list[str]]:
    """What differs between two identities, in words, by split.

    Where a dataset lies does not matter.
    """
    found = {}
    for name in {**before, **now}:
        old, new = before.get(name, []), now.get(name, [])
        lines = _different_datasets(old, new)
        if lines:
            more = [f"and {len(lines) - 3} more"] if len(lines) > 3 else []
            found[name] = lines[:3] + more
    return found


def _different_datasets(old: Sequence[Dataset], new: Sequence[Dataset]) -> list[str]:
    lines = []
    for index, (one, other) in enumerate(zip_longest(old, new)):
        which = f"dataset {index + 1}, " if max(len(old), len(new)) > 1 else ""
        if one is None or other is None:
            lines.append(f"{which}{_in_words(one)} -> {_in_words(other)}")
            continue
        contents = one["content"], other["content"]
        if None not in contents and contents[0] != contents[1]:
            lines.append(f"{which}{_in_words(one)} -> {_in_words(other)}")
        for key in ("weight", "split"):
            if one.get(key) != other.get(key):
                lines.append(f"{which}{key} {one.get(key)} -> {other.get(key)}")
    return lines


def _in_words(dataset: Dataset | None) -> str:
    if dataset is None:
        return "none"
    if dataset["content"] is None:
        return dataset["prefix"]
    numbers = f"{dataset['documents']} documents, {dataset['tokens']} tokens"
    return f"{numbers} (fingerprint {dataset['content'][:12]})"


def _warn_of_other_order(saved: object, args: argparse.Namespace) -> None:
    for name in ("seed", "seq_length"):
        before, now = getattr(saved, name, None), getattr(args, name)
        if before is not None and before != now:
            tell(
                f"> {name} is {now} and was {before}: the data have another order, in which a part "
                "of what was read comes again before the rest"
            )


def _warn_of_old_order(saved: object, args: argparse.Namespace, now: Identity) -> None:
    """Say that a checkpoint of an earlier release has shuffled several epochs together."""
    steps, batch = getattr(saved, "train_iters", None), getattr(saved, "global_batch_size", None)
    samples = getattr(saved, "train_samples", None) or (steps or 0) * (batch or 0)
    datasets = now.get(_TRAIN) or now.get(_ALL) or []
    for item in datasets:
        if item["tokens"] is None or (item["weight"] is None and len(datasets) > 1):
            continue  # not known, or never repeated
        has = item["tokens"] * item.get("split", [1])[0]
        if samples * (item["weight"] or 1) * args.seq_length >= has:
            tell(
                "> the checkpoint is of an earlier release, which shuffled all epochs of a run "
                "together; from here on each epoch has its own order, so of the present one a part "
                "comes again and another not at all"
            )
            return
