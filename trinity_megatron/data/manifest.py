"""What a prepared data folder holds, what it was made from, and whether it is whole."""

import hashlib
import json
import math
import os
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, get_args, get_origin, get_type_hints

from trinity_megatron.data.corpus import Skipped, hash_file
from trinity_megatron.errors import UserError

MANIFEST_NAME = "manifest.json"
FORMAT_VERSION = 1
# Part of the content address where files are read otherwise than by their suffix, as releases up
# to 0.1 did: count it up with any change to what is read how.
READER_VERSION = "content-1"


class UnsupportedFormatError(ValueError):
    """A data folder written in a format that this release does not read."""


@dataclass(frozen=True)
class DataInputs:
    """Everything that decides the content of a data folder.

    Attributes:
        vocab_size: Number of tokens of the tokenizer.
        validation_fraction: Share of the documents that goes to validation.
        min_split_tokens: The fewest tokens of a split.
        pre_tokenizer: Version of the pre-tokenisation.
        sources: Name and SHA-256 of every source file, sorted.
        tokenizer: SHA-256 of the ``tokenizer.json`` that was given; None if one was trained.
        eos_token: The token by which the given tokenizer ends a document; None if one was trained.
        reader: ``READER_VERSION`` if a file's content was read otherwise than its suffix says.
        text_key: Field of the text, if it is not ``text``.
        split_on: What separates the documents of a text file, if anything does.
        skip_bad_rows: How many bad rows may be left out, if any.
        plain_text: True if JSON and CSV files are read as text.
        validation_tokens: The number for which the validation split was enlarged, if it was.
    """

    vocab_size: int
    validation_fraction: float
    min_split_tokens: int
    pre_tokenizer: str
    sources: tuple[tuple[str, str], ...]
    tokenizer: str | None = None
    eos_token: str | None = None
    reader: str | None = None
    text_key: str | None = None
    split_on: str | None = None
    skip_bad_rows: int | None = None
    plain_text: bool | None = None
    validation_tokens: int | None = None

    @property
    def values(self) -> dict[str, Any]:
        """The fields by name, without those that are None: earlier releases lack these."""
        return {name: value for name, value in asdict(self).items() if value is not None}

    @property
    def fingerprint(self) -> str:
        """Content address: equal exactly when the prepared data are equal."""
        content = json.dumps({"format_version": FORMAT_VERSION, **self.values}, sort_keys=True)
        return hashlib.sha256(content.encode("ascii")).hexdigest()

    def differences(self, other: "DataInputs") -> list[str]:
        """What differs in ``other``, in words; empty if nothing does."""
        mine, theirs = asdict(self), asdict(other)
        in_words = ("sources", "tokenizer", "eos_token")
        lines = [
            f"{name} {_in_words(mine[name])} -> {_in_words(theirs[name])}"
            for name in mine
            if name not in in_words and mine[name] != theirs[name]
        ]
        if self.tokenizer != other.tokenizer:
            old_words, new_words = (
                "trained on the sources" if digest is None else f"given (SHA-256 {digest[:12]})"
                for digest in (self.tokenizer, other.tokenizer)
            )
            lines.append(f"tokenizer {old_words} -> {new_words}")
        if None not in (self.eos_token, other.eos_token) and self.eos_token != other.eos_token:
            lines.append(f"eos_token {self.eos_token!r} -> {other.eos_token!r}")
        old, new = set(self.sources), set(other.sources)
        old_names, new_names = {name for name, _ in old - new}, {name for name, _ in new - old}
        for words, names in (
            ("changed", old_names & new_names),
            ("removed", old_names - new_names),
            ("added", new_names - old_names),
        ):
            if names:
                shown = ", ".join(sorted(names)[:3]) + (", ..." if len(names) > 3 else "")
                lines.append(f"{len(names)} source files {words} ({shown})")
        if not lines and self.sources != other.sources:
            lines.append("how often a source file is given")
        return lines


def _in_words(value: Any) -> str:
    """A value in one line, white space included; None is what earlier releases knew."""
    return "default" if value is None else str(value).encode("unicode_escape").decode("ascii")


@dataclass(frozen=True)
class SplitSummary:
    """One split in numbers.

    Attributes:
        documents: Number of documents.
        tokens: Number of tokens, the end-of-text tokens included.
        bytes: Number of UTF-8 bytes of text.
        unigram_entropy: Entropy of its token frequencies, in nats per token: the loss of the best
            model that ignores the context.
    """

    documents: int
    tokens: int
    bytes: int
    unigram_entropy: float


@dataclass(frozen=True)
class DataManifest:
    """A prepared data folder.

    Attributes:
        path: The folder.
        inputs: What it was made from.
        eod_id: Id of the token that ends every document.
        tokenizer_fingerprint: SHA-256 of ``tokenizer/tokenizer.json``.
        train: The training split.
        validation: The validation split.
        skipped: What was found in the sources and is not part of the data.
        files: Size in bytes of every file of the folder, by relative name.
    """

    path: Path
    inputs: DataInputs
    eod_id: int
    tokenizer_fingerprint: str
    train: SplitSummary
    validation: SplitSummary
    skipped: tuple[Skipped, ...]
    files: Mapping[str, int]

    @property
    def fingerprint(self) -> str:
        """Content address of the data."""
        return self.inputs.fingerprint

    @property
    def vocab_size(self) -> int:
        """Number of tokens of the tokenizer."""
        return self.inputs.vocab_size

    @property
    def train_prefix(self) -> Path:
        """Value for Megatron's ``--train-data-path``."""
        return self.path / "train"

    @property
    def validation_prefix(self) -> Path:
        """Value for Megatron's ``--valid-data-path``."""
        return self.path / "validation"

    @property
    def tokenizer_path(self) -> Path:
        """Value for Megatron's ``--tokenizer-model``."""
        return self.path / "tokenizer"


def load_manifest(path: Path) -> DataManifest:
    """Read the manifest of a data folder and check that the folder is whole.

    Raises:
        FileNotFoundError: If the folder or its manifest is missing.
        UnsupportedFormatError: If it was written in another format.
        ValueError: If the manifest is corrupt, or a file is missing or not what it records.
    """
    path = Path(path)
    remedy = f"run `trinity-megatron prepare-data --out {path}` to prepare it"
    if not path.is_dir():
        raise FileNotFoundError(f"data folder {path} does not exist; {remedy}")
    try:
        values = json.loads((path / MANIFEST_NAME).read_text(encoding="utf-8"))
        if not isinstance(values, dict):
            raise ValueError(f"it is {type(values).__name__}, not an object")
        _check_version(path, values["format_version"])
        manifest = _from_json(path, values)
    except FileNotFoundError as error:
        raise FileNotFoundError(
            f"data folder {path} is half-written: it has no {MANIFEST_NAME}; {remedy} again"
        ) from error
    except UnsupportedFormatError:
        raise
    except OSError as error:
        raise UserError(
            f"data folder {path}: {MANIFEST_NAME} cannot be read ({error.strerror or error}); make "
            f"it readable, or {remedy} again"
        ) from error
    except (ValueError, TypeError, KeyError, AttributeError, RecursionError) as error:
        raise UserError(
            f"data folder {path}: {MANIFEST_NAME} is corrupt "
            f"({type(error).__name__}: {error}); {remedy} again"
        ) from error
    _check_names(manifest)
    damage = _find_damage(manifest)
    if damage is not None:
        raise UserError(f"data folder {path} is damaged: {damage}; {remedy} again")
    return manifest


def save_manifest(manifest: DataManifest) -> None:
    """Write the manifest; the last step, which makes the folder count as whole."""
    values = {
        "format_version": FORMAT_VERSION,
        "fingerprint": manifest.fingerprint,
        **{name: value for name, value in asdict(manifest).items() if name != "path"},
        "inputs": manifest.inputs.values,
        "skipped": [{"name": entry.name, "reason": entry.reason} for entry in manifest.skipped],
    }
    temporary = manifest.path / f".{MANIFEST_NAME}.tmp"
    temporary.write_text(json.dumps(values, indent=1) + "\n", encoding="utf-8")
    sync_file(temporary)
    os.replace(temporary, manifest.path / MANIFEST_NAME)


def sync_file(path: Path) -> None:
    """Wait until a file's content is on the disk."""
    with path.open("rb") as stream:
        os.fsync(stream.fileno())


def _check_version(path: Path, version: Any) -> None:
    if type(version) is not int or version != FORMAT_VERSION:
        raise UnsupportedFormatError(
            f"data folder {path}: format_version is {version!r}, this release reads "
            f"{FORMAT_VERSION}; remove {path}, or pass another --out, and run "
            "`trinity-megatron prepare-data --out ...`"
        )


def _from_json(path: Path, values: dict[str, Any]) -> DataManifest:
    given = values["inputs"]
    sources = tuple((_text(name), _text(digest)) for name, digest in given["sources"])
    files = {name: _count(size, f"files: {name}") for name, size in values["files"].items()}
    manifest = DataManifest(
        path=path,
        inputs=_typed(DataInputs(**{**given, "sources": sources})),
        eod_id=_count(values["eod_id"], "eod_id"),
        tokenizer_fingerprint=_text(values["tokenizer_fingerprint"]),
        train=_typed(SplitSummary(**values["train"])),
        validation=_typed(SplitSummary(**values["validation"])),
        skipped=tuple(
            Skipped(_text(entry["name"]), _text(entry["reason"])) for entry in values["skipped"]
        ),
        files=files,
    )
    if manifest.fingerprint != values["fingerprint"]:
        raise ValueError("its fingerprint does not match its inputs")
    return manifest


def _typed[T: (DataInputs, SplitSummary)](values: T) -> T:
    """Check that every number and text of a dataclass is of its type."""
    for name, hint in get_type_hints(type(values)).items():
        value = getattr(values, name)
        kinds = tuple(get_args(hint)) or (hint,)
        if value is None and type(None) in kinds:
            continue
        if int in kinds:
            _count(value, name)
        elif float in kinds and (type(value) not in (int, float) or not math.isfinite(value)):
            raise ValueError(f"{name} is {value!r}, not a finite number")
        elif str in kinds and get_origin(hint) is not tuple:
            _text(value)
        elif bool in kinds and type(value) is not bool:
            raise ValueError(f"{name} is {value!r}, not true or false")
    return values


def _count(value: Any, name: str) -> int:
    if type(value) is not int or value < 0:
        raise ValueError(f"{name} is {value!r}, not a number of 0 or more")
    return value


def _text(value: Any) -> str:
    if not isinstance(value, str):
        raise ValueError(f"{value!r} where a text should be")
    return value


def _check_names(manifest: DataManifest) -> None:
    """Refuse a manifest whose files lie outside of its folder."""
    root = manifest.path.resolve()
    for name in ["tokenizer/tokenizer.json", *manifest.files]:
        is_inside = not os.path.isabs(name) and ".." not in Path(name).parts and "\0" not in name
        if not is_inside or not (root / name).resolve().is_relative_to(root):
            raise UserError(
                f"data folder {manifest.path}: {name!r} of {MANIFEST_NAME} leads out of the "
                "folder; do not use data from a source that you do not trust, or replace links by "
                "the files themselves"
            )


# First bytes of an index file.  Source: megatron.core.datasets.indexed_dataset, _INDEX_HEADER.
_INDEX_MAGIC = b"MMIDIDX\x00\x00"


def _find_damage(manifest: DataManifest) -> str | None:
    for name, size in manifest.files.items():
        path = manifest.path / name
        if not path.is_file():
            return f"{name} is missing"
        if path.stat().st_size != size:
            return f"{name} has {path.stat().st_size} bytes, not {size}"
        if path.suffix == ".idx":
            with path.open("rb") as stream:
                if stream.read(len(_INDEX_MAGIC)) != _INDEX_MAGIC:
                    return f"{name} does not begin as an index of Megatron does"
    found = hash_file(manifest.tokenizer_path / "tokenizer.json")
    if found != manifest.tokenizer_fingerprint:
        return "tokenizer/tokenizer.json is not the file that was written"
    return None
