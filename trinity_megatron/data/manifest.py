"""The manifest of a prepared data folder: its inputs, its splits and its files."""

import json
import math
import os
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, get_args, get_origin, get_type_hints

from trinity_megatron.data.corpus import Skipped, hash_file
from trinity_megatron.data.index_file import IndexHead, read_head
from trinity_megatron.data.inputs import FORMAT_VERSION, DataInputs
from trinity_megatron.errors import MissingInputError, UserError
from trinity_megatron.untrusted.json_file import read_json

MANIFEST_NAME = "manifest.json"
_MAX_BYTES = 2**30  # it has a line for each file of the sources


class UnsupportedFormatError(UserError):
    """A data folder written in a format that this release does not read."""


@dataclass(frozen=True)
class SplitSummary:
    """Summary of one split.

    Attributes:
        documents: Number of documents.
        tokens: Number of tokens, including end-of-text tokens.
        bytes: Number of UTF-8 bytes of text.
        unigram_entropy: Entropy of the token frequencies in nats per token, i.e. the loss of the
            best model without context.
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
        inputs: The inputs it was prepared from.
        eod_id: Id of the token that ends every document.
        tokenizer_fingerprint: SHA-256 of ``tokenizer/tokenizer.json``.
        train: The training split.
        validation: The validation split.
        skipped: Files, folders and rows of the sources that are not part of the data.
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
    """Read the manifest of a data folder and check that the folder is complete.

    Args:
        path: The folder.

    Raises:
        MissingInputError: The folder or its manifest is missing.
        UnsupportedFormatError: The folder has another format.
        UserError: The manifest is corrupt, or a file is missing or differs from the manifest.
    """
    manifest = read_manifest(path)
    check_files(manifest)
    check_tokenizer(manifest)
    return manifest


def read_manifest(path: Path) -> DataManifest:
    """Read the manifest of a data folder, and no other file of it.

    Args:
        path: The folder.

    Raises:
        MissingInputError: The folder or its manifest is missing.
        UnsupportedFormatError: The folder has another format.
        UserError: The manifest is corrupt, or names a file outside the folder.
    """
    path = Path(path)
    if not path.is_dir():
        raise MissingInputError(f"data folder {path} does not exist; {_remedy(path)}")
    try:
        values = read_json(path / MANIFEST_NAME, max_bytes=_MAX_BYTES)
        if not isinstance(values, dict):
            raise ValueError(f"it is {type(values).__name__}, not an object")
        _check_version(path, values["format_version"])
        manifest = _from_json(path, values)
    except FileNotFoundError as error:
        raise MissingInputError(
            f"data folder {path} is half-written: it has no {MANIFEST_NAME}; {_remedy(path)} again"
        ) from error
    except UnsupportedFormatError:
        raise
    except OSError as error:
        raise UserError(
            f"data folder {path}: {MANIFEST_NAME} cannot be read ({error.strerror or error}); make "
            f"it readable, or {_remedy(path)} again"
        ) from error
    except (ValueError, TypeError, KeyError, AttributeError, RecursionError) as error:
        raise UserError(
            f"data folder {path}: {MANIFEST_NAME} is corrupt "
            f"({type(error).__name__}: {error}); {_remedy(path)} again"
        ) from error
    _check_paths(manifest)
    return manifest


def _remedy(path: Path) -> str:
    return f"run `trinity-megatron prepare-data --out {path}` to prepare it"


def save_manifest(manifest: DataManifest) -> None:
    """Write the manifest.  It marks the folder as complete, so this is the last step."""
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
    """Wait until the content of a file is on disk."""
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
    sources = tuple((_check_text(name), _check_text(digest)) for name, digest in given["sources"])
    files = {name: _check_count(size, f"files: {name}") for name, size in values["files"].items()}
    manifest = DataManifest(
        path=path,
        inputs=_check_types(DataInputs(**{**given, "sources": sources})),
        eod_id=_check_count(values["eod_id"], "eod_id"),
        tokenizer_fingerprint=_check_text(values["tokenizer_fingerprint"]),
        train=_check_types(SplitSummary(**values["train"])),
        validation=_check_types(SplitSummary(**values["validation"])),
        skipped=tuple(
            Skipped(_check_text(entry["name"]), _check_text(entry["reason"]))
            for entry in values["skipped"]
        ),
        files=files,
    )
    if manifest.fingerprint != values["fingerprint"]:
        raise ValueError("its fingerprint does not match its inputs")
    return manifest


def _check_types[T: (DataInputs, SplitSummary)](values: T) -> T:
    """Check the type of every number and string of a dataclass."""
    for name, hint in get_type_hints(type(values)).items():
        value = getattr(values, name)
        kinds = tuple(get_args(hint)) or (hint,)
        if value is None and type(None) in kinds:
            continue
        if int in kinds:
            _check_count(value, name)
        elif float in kinds and (type(value) not in (int, float) or not math.isfinite(value)):
            raise ValueError(f"{name} is {value!r}, not a finite number")
        elif str in kinds and get_origin(hint) is not tuple:
            _check_text(value)
        elif bool in kinds and type(value) is not bool:
            raise ValueError(f"{name} is {value!r}, not true or false")
    return values


def _check_count(value: Any, name: str) -> int:
    if type(value) is not int or value < 0:
        raise ValueError(f"{name} is {value!r}, not a number of 0 or more")
    return value


def _check_text(value: Any) -> str:
    if not isinstance(value, str):
        raise ValueError(f"{value!r} where a text should be")
    return value


def _check_paths(manifest: DataManifest) -> None:
    """Refuse a manifest that names files outside its folder."""
    root = manifest.path.resolve()
    for name in ["tokenizer/tokenizer.json", *manifest.files]:
        is_inside = not os.path.isabs(name) and ".." not in Path(name).parts and "\0" not in name
        if not is_inside or not (root / name).resolve().is_relative_to(root):
            raise UserError(
                f"data folder {manifest.path}: {name!r} of {MANIFEST_NAME} leads out of the "
                "folder; do not use data from a source that you do not trust, or replace links by "
                "the files themselves"
            )


def check_files(manifest: DataManifest) -> dict[str, IndexHead]:
    """Refuse a folder whose files are not those of its manifest; each index is opened once.

    Returns:
        What the heads of the indices say, by the names of the files.

    Raises:
        UserError: A file is missing or has another size, or an index is damaged.
    """
    heads = {}
    for name, size in manifest.files.items():
        path = manifest.path / name
        if not path.is_file():
            raise _damage(manifest, f"{name} is missing")
        if path.stat().st_size != size:
            raise _damage(manifest, f"{name} has {path.stat().st_size} bytes, not {size}")
        if path.suffix == ".idx":
            try:
                heads[name] = read_head(path, path.with_suffix(".bin"))
            except ValueError as error:
                what = f"{name} is no whole index of token ids ({error})"
                raise _damage(manifest, what) from error
    return heads


def check_tokenizer(manifest: DataManifest) -> None:
    """Refuse a folder whose tokenizer is not the one that made its tokens.

    Raises:
        UserError: It is another file.
    """
    found = hash_file(manifest.tokenizer_path / "tokenizer.json")
    if found != manifest.tokenizer_fingerprint:
        raise _damage(manifest, "tokenizer/tokenizer.json is not the file that was written")


def _damage(manifest: DataManifest, what: str) -> UserError:
    path = manifest.path
    return UserError(f"data folder {path} is damaged: {what}; {_remedy(path)} again")
