"""A given tokenizer, such as that of a released model: loading, checks and copying."""

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer

from trinity_megatron.data.corpus import hash_file
from trinity_megatron.data.tokenizer import (
    CONFIG_NAME,
    TOKENIZER_NAME,
    count_tokens,
    encode_documents,
)
from trinity_megatron.data.tokenizer_file import check_vocab, parse_tokenizer
from trinity_megatron.errors import UserError
from trinity_megatron.untrusted.json_file import parse_json
from trinity_megatron.untrusted.links import copy_file

# Files in the folder of a model that do not belong to its tokenizer.
_OTHER_NAMES = {"config.json", "generation_config.json"}
_OTHER_STEMS = {"README", "LICENSE"}
_OTHER_SUFFIXES = (".safetensors", ".bin", ".pt", ".pth", ".gguf", ".index.json", ".py")


@dataclass(frozen=True)
class GivenTokenizer:
    """A tokenizer that was not trained here.

    Attributes:
        folder: Its folder.
        tokenizer: The tokenizer, without truncation and padding.
        eos_token: The token that ends every document.
        fingerprint: SHA-256 of ``tokenizer.json``.
        files: Names of its files.
    """

    folder: Path
    tokenizer: Tokenizer
    eos_token: str
    fingerprint: str
    files: tuple[str, ...]

    @property
    def vocab_size(self) -> int:
        """Number of tokens, including added tokens and unused ids below the highest id."""
        return count_tokens(self.tokenizer)


def load_tokenizer(folder: Path) -> GivenTokenizer:
    """Load a Hugging Face tokenizer for encoding documents.

    Args:
        folder: Folder with ``tokenizer.json`` and ``tokenizer_config.json``, such as that of a
            released model.

    Raises:
        UserError: A file is missing or damaged, the end-of-text token is not in the vocabulary, or
            ordinary text is encoded as the end-of-text token.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise UserError(
            f"tokenizer {folder} is not an existing folder; pass --tokenizer with the folder that "
            f"holds {TOKENIZER_NAME} and {CONFIG_NAME}, such as that of a downloaded model"
        )
    content = _read(folder, TOKENIZER_NAME)
    tokenizer = _parse(folder, content)
    eos_token = _read_eos_token(folder)
    if tokenizer.token_to_id(eos_token) is None:
        raise UserError(
            f"tokenizer {folder}: eos_token {eos_token!r} of {CONFIG_NAME} is not in the "
            f"vocabulary of {TOKENIZER_NAME}; set eos_token to a token of the vocabulary"
        )
    tokenizer.no_truncation()
    tokenizer.no_padding()
    # transformers treats it as special even if tokenizer.json does not.  Its id does not change.
    tokenizer.add_special_tokens([eos_token])
    given = GivenTokenizer(
        folder=folder,
        tokenizer=tokenizer,
        eos_token=eos_token,
        fingerprint=hashlib.sha256(content).hexdigest(),
        files=tuple(sorted(path.name for path in folder.iterdir() if is_tokenizer_file(path))),
    )
    _check_eos_not_encoded_from_text(given)
    return given


def read_vocab_size(folder: Path) -> int:
    """Number of tokens of the tokenizer in a folder, including those that only transformers adds.

    Raises:
        UserError: A file is missing or damaged.
    """
    size = count_tokens(_parse(folder, _read(folder, TOKENIZER_NAME)))
    if not (folder / CONFIG_NAME).is_file():
        return size
    try:
        added = parse_json(_read(folder, CONFIG_NAME)).get("added_tokens_decoder") or {}
        size = max([size, *(int(token) + 1 for token in added)])
        check_vocab(size)
        return size
    except (ValueError, AttributeError) as error:
        raise UserError(
            f"tokenizer {folder}: {CONFIG_NAME} is damaged ({error}); copy or download it again"
        ) from error


def copy_tokenizer(given: GivenTokenizer, folder: Path) -> None:
    """Copy the files of a tokenizer unchanged into a new folder.

    Raises:
        UserError: The files have changed since they were loaded.
    """
    folder.mkdir()
    for name in given.files:
        copy_file(given.folder / name, folder / name)
    copied = (hash_file(folder / TOKENIZER_NAME), _read_eos_token(folder))
    if copied != (given.fingerprint, given.eos_token):
        raise UserError(f"tokenizer {given.folder} changed while it was read; run again")


def is_tokenizer_file(path: Path) -> bool:
    """Whether a file in the folder of a model belongs to its tokenizer; follows links."""
    return (
        path.is_file()
        and not path.name.startswith(".")
        and path.name not in _OTHER_NAMES
        and path.name.partition(".")[0].upper() not in _OTHER_STEMS
        and not path.name.lower().endswith(_OTHER_SUFFIXES)
    )


def get_special_token(config: Mapping[str, Any], kind: str) -> Any:
    """A special token in ``tokenizer_config.json``.

    Args:
        config: Content of the file, where the token is a string or a dict with its properties.
        kind: ``bos``, ``eos`` or ``pad``.

    Returns:
        The token; None if there is none.
    """
    token = config.get(f"{kind}_token")
    return token.get("content") if isinstance(token, dict) else token


def _read(folder: Path, name: str) -> bytes:
    try:
        return (folder / name).read_bytes()
    except OSError as error:
        raise UserError(
            f"tokenizer {folder}: {name} cannot be read ({error.strerror or error}); pass "
            f"--tokenizer with a folder that holds {TOKENIZER_NAME} and {CONFIG_NAME}"
        ) from error


def _parse(folder: Path, content: bytes) -> Tokenizer:
    try:
        return parse_tokenizer(content)
    except Exception as error:  # the library raises no more specific exception
        raise UserError(
            f"tokenizer {folder}: {TOKENIZER_NAME} cannot be loaded ({error}); copy or download it "
            "again, or save it with a release of `tokenizers` not newer than the installed one"
        ) from error


def _read_eos_token(folder: Path) -> str:
    """Read the end-of-text token from ``tokenizer_config.json``."""
    try:
        config = parse_json(_read(folder, CONFIG_NAME))
        eos_token = get_special_token(config, "eos")
    except (ValueError, AttributeError) as error:
        raise UserError(
            f"tokenizer {folder}: {CONFIG_NAME} is not a JSON object ({error}); copy or download "
            "it again"
        ) from error
    if not isinstance(eos_token, str) or not eos_token:
        raise UserError(
            f"tokenizer {folder}: {CONFIG_NAME} names no eos_token ({eos_token!r}), which ends "
            'every document; add it, for example "eos_token": "<|endoftext|>"'
        )
    return eos_token


def _check_eos_not_encoded_from_text(given: GivenTokenizer) -> None:
    """Check that the characters of the end-of-text token in a text are not encoded as the token."""
    token = given.eos_token
    [ids] = encode_documents(given.tokenizer, [f"{token} a{token}"], eos_token=token)
    if ids[-1] in ids[:-1]:
        raise UserError(
            f"tokenizer {given.folder}: the characters {token!r} inside a text become the "
            "end-of-text token; set eos_token to a token that no text contains, or use a "
            "byte-level BPE tokenizer"
        )
