"""Validation data that are raw text: tokenised once, into the data cache of the run."""

from __future__ import annotations

import argparse
import json
import os
from pathlib import Path

from trinity_megatron.data.corpus import hash_file
from trinity_megatron.data.mixture.corpora import MixtureData, RawText
from trinity_megatron.data.mixture.definition import Corpus
from trinity_megatron.data.text.parts import Parts
from trinity_megatron.data.text.text_corpus import TextCorpus, find_text
from trinity_megatron.data.text.text_mixture import TextEncoder
from trinity_megatron.errors import UserError
from trinity_megatron.process.screen import tell

# Some minutes of work for rank 0, for which the others wait.
MOST_BYTES = 2**30


def validation_prefixes(args: argparse.Namespace, data: MixtureData) -> dict[str, Path]:
    """Prefix of the validation data of each corpus that has some, by name.

    Args:
        args: Of the run.
        data: Its mixture.
    """
    return {
        name: _cached(args, name) if isinstance(item.validation, RawText) else item.validation
        for name, item in data.corpora.items()
        if item.validation is not None
    }


def tokenize_validation(args: argparse.Namespace, data: MixtureData) -> None:
    """Tokenise what is not in the cache yet, and name all validation data in ``args``.

    Rank 0 calls it, before the others read: they meet in between.

    Args:
        args: Of the run; ``valid_data_path`` is set.
        data: Its mixture.

    Raises:
        UserError: The text cannot be read, is too much, or holds none; names it and the remedy.
    """
    texts = {
        name: (item.validation, item.corpus)
        for name, item in data.corpora.items()
        if isinstance(item.validation, RawText)
    }
    if not texts or getattr(args, "is_dry", False):
        return
    if args.data_cache_path is None:
        raise UserError(
            f"{next(iter(texts.values()))[0].key} is raw text, and there is no folder to "
            "keep its tokens in. Remedy: --data-cache-path, or --out."
        )
    for name, (text, corpus) in texts.items():
        _tokenize(args, name, text, corpus)
    args.valid_data_path = [str(prefix) for prefix in validation_prefixes(args, data).values()]


def _cached(args: argparse.Namespace, name: str) -> Path:
    return Path(args.data_cache_path) / f"validation_{name}"


def _tokenize(args: argparse.Namespace, name: str, text: RawText, corpus: Corpus) -> None:
    found = find_text(
        text.place,
        name=name,
        key=text.key,
        options=corpus.options,
        skips_bad_rows=corpus.skips_bad_rows,
    )
    if found.num_bytes > MOST_BYTES:
        raise UserError(
            f"{text.key} {text.place} has {found.num_bytes:,} bytes, which a run would tokenise at "
            f"its start; {MOST_BYTES:,} are its limit. Remedy: trinity-megatron prepare-data, and "
            "the prefix of what that makes."
        )
    prefix, tokenizer = _cached(args, name), Path(args.tokenizer_model)
    made_of = {"text": found.content, "tokenizer": hash_file(tokenizer / "tokenizer.json")}
    note = prefix.with_suffix(".json")
    if _read_note(note) == made_of:
        return
    note.unlink(missing_ok=True)
    prefix.parent.mkdir(parents=True, exist_ok=True)
    tokens = _write(found, TextEncoder(tokenizer), prefix)
    if not tokens:
        raise UserError(f"{text.key} {text.place} holds no text. Remedy: more text, or drop it.")
    note.write_text(json.dumps(made_of))
    tell(f"> {name}: {tokens:,} validation tokens of {found.num_bytes:,} bytes of text")


def _read_note(path: Path) -> dict[str, str] | None:
    """What the tokens in the cache were made of; written last."""
    try:
        return json.loads(path.read_text())
    except (OSError, ValueError):
        return None


def _write(corpus: TextCorpus, encoder: TextEncoder, prefix: Path) -> int:
    from megatron.core.datasets.indexed_dataset import DType, IndexedDatasetBuilder

    parts, total = Parts(corpus, num_streams=1), 0
    making = prefix.with_suffix(f".{os.getpid()}")
    builder = IndexedDatasetBuilder(f"{making}.bin", dtype=DType.optimal_dtype(2**31 - 1))
    try:
        for part in range(len(parts)):
            for row in parts.read(part, lambda _: True):
                if len(row.document):
                    tokens = encoder.encode(row.document)
                    builder.add_document(tokens, [len(tokens)])
                    total += len(tokens)
        builder.finalize(f"{making}.idx")
        for line in parts.take_notices():
            tell(f"> {line}")
        for ending in ("bin", "idx") if total else ():
            os.replace(f"{making}.{ending}", f"{prefix}.{ending}")
    finally:
        for ending in ("bin", "idx"):
            Path(f"{making}.{ending}").unlink(missing_ok=True)
    return total
