"""The inputs that determine the content of a prepared data folder."""

import hashlib
import json
from dataclasses import asdict, dataclass
from typing import Any

FORMAT_VERSION = 1
# Version of the file readers.  Part of the fingerprint if a file was not read by its suffix alone,
# as releases up to 0.1 did.  Increment it with every change to how files are read.
READER_VERSION = "content-1"


@dataclass(frozen=True)
class DataInputs:
    """All inputs that determine the content of a data folder.

    Attributes:
        vocab_size: Number of tokens of the tokenizer.
        validation_fraction: Share of the documents that goes to validation.
        min_split_tokens: Minimum number of tokens of a split.
        pre_tokenizer: Version of the pre-tokenization.
        sources: Name and SHA-256 of every source file, sorted.
        tokenizer: SHA-256 of the given ``tokenizer.json``; None if a tokenizer was trained.
        eos_token: End-of-text token of the given tokenizer; None if a tokenizer was trained.
        reader: ``READER_VERSION`` if a file was not read by its suffix alone.
        text_key: Name of the text field, if it is not ``text``.
        split_on: Separator of the documents in a text file, if any.
        skip_bad_rows: Number of bad rows that may be left out, if any.
        plain_text: True if JSON and CSV files are read as text.
        validation_tokens: Number of tokens to which the validation split was enlarged, if it was.
        special_tokens: Version of the special tokens beside the end of text, if it was trained.
        chat: SHA-256 of the chat template, if the documents are conversations.
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
    special_tokens: str | None = None
    chat: str | None = None

    @property
    def values(self) -> dict[str, Any]:
        """The fields that are not None, by name.  Manifests of earlier releases lack the others."""
        return {name: value for name, value in asdict(self).items() if value is not None}

    @property
    def fingerprint(self) -> str:
        """Content address: equal if and only if the prepared data are equal."""
        content = json.dumps({"format_version": FORMAT_VERSION, **self.values}, sort_keys=True)
        return hashlib.sha256(content.encode("ascii")).hexdigest()

    def differences(self, other: "DataInputs") -> list[str]:
        """Describe the differences to ``other``; empty if there are none."""
        mine, theirs = asdict(self), asdict(other)
        in_words = ("sources", "tokenizer", "eos_token")
        lines = [
            f"{name} {_format_value(mine[name])} -> {_format_value(theirs[name])}"
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


def _format_value(value: Any) -> str:
    """A value in one line with escaped white space; ``default`` for None."""
    return "default" if value is None else str(value).encode("unicode_escape").decode("ascii")
