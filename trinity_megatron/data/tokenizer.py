"""The tokenizer: Trinity's trained from scratch, or one that a released model brings along.

The trained one is byte-level BPE behind Trinity's pre-tokenisation.

Source: report section 2 (tokenizer); the patterns follow llama.cpp's port,
``LLAMA_VOCAB_PRE_TYPE_AFMOE``.
"""

import hashlib
import json
import shutil
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers

from trinity_megatron.data.corpus import hash_file
from trinity_megatron.errors import UserError

END_OF_TEXT = "<|endoftext|>"
MIN_VOCAB_SIZE = 256 + 1  # every byte, and the end-of-text token
# Part of the dataset's content address: count it up with any change to what is encoded how.
PRE_TOKENIZER_VERSION = "trinity-1"

_TOKENIZER, _CONFIG = "tokenizer.json", "tokenizer_config.json"
# What a model's folder holds besides its tokenizer: weights and their index, code, model, papers.
_FOREIGN_NAMES = {"config.json", "generation_config.json"}
_FOREIGN_STEMS = {"README", "LICENSE"}
_FOREIGN_SUFFIXES = (".safetensors", ".bin", ".pt", ".pth", ".gguf", ".index.json", ".py")

# A run of digits is isolated, then cut from the right: the one or two digits too many in front,
# then threes. One pattern with a look-ahead would be quadratic in the length of the run.
_DIGIT_PATTERNS = (r"\p{N}+", r"\A\p{N}{1,2}(?=(?:\p{N}{3})+\z)", r"\p{N}{3}")

# Scripts whose runs are isolated, most of them written without spaces, as Unicode blocks.
_ISOLATED_SCRIPTS = (
    (0x0E00, 0x0E7F),  # Thai
    (0x0E80, 0x0EFF),  # Lao
    (0x1000, 0x109F),  # Myanmar
    (0x1100, 0x11FF),  # Hangul Jamo
    (0x1780, 0x17FF),  # Khmer
    (0x2F00, 0x2FDF),  # Kangxi radicals
    (0x3040, 0x30FF),  # Hiragana, Katakana
    (0x3400, 0x4DBF),  # CJK extension A
    (0x4E00, 0x9FFF),  # CJK
    (0xA9E0, 0xA9FF),  # Myanmar extended B
    (0xAA60, 0xAA7F),  # Myanmar extended A
    (0xAC00, 0xD7AF),  # Hangul
    (0xF900, 0xFAFF),  # CJK compatibility
    (0xFF65, 0xFF9F),  # halfwidth Katakana
)

_MAIN_PATTERN = "|".join(
    (
        r"[!-/:-@\[-`{-~][A-Za-z]+",  # one ASCII punctuation mark and the word after it
        r"[^\r\n\p{L}\p{P}\p{S}]?[\p{L}\p{M}]+",  # a word, with the space before it
        r" ?[\p{P}\p{S}]+[\r\n]*",  # punctuation and symbols to the end of the line
        r"\s*[\r\n]+",
        r"\s+(?!\S)",  # leaves the last space to the word that follows
        r"\s+",
    )
)


@dataclass(frozen=True)
class GivenTokenizer:
    """A tokenizer that was made elsewhere.

    Attributes:
        folder: Where it lies.
        tokenizer: What encodes, with neither truncation nor padding.
        eos_token: The token that ends every document.
        fingerprint: SHA-256 of ``tokenizer.json``.
        files: Names of the files that belong to it.
    """

    folder: Path
    tokenizer: Tokenizer
    eos_token: str
    fingerprint: str
    files: tuple[str, ...]

    @property
    def vocab_size(self) -> int:
        """Number of tokens, the added ones and unused ids below the highest included."""
        return count_tokens(self.tokenizer)


def count_tokens(tokenizer: Tokenizer) -> int:
    """Number of tokens, the added ones and unused ids below the highest included."""
    highest = max(tokenizer.get_vocab(with_added_tokens=True).values(), default=-1)
    return max(tokenizer.get_vocab_size(with_added_tokens=True), highest + 1)


def get_pre_tokenizer() -> pre_tokenizers.PreTokenizer:
    """Trinity's pre-tokenisation: the stretches of text which no token crosses.

    Digits in groups of three counted from the right (``12345`` is ``12``, ``345``), then runs of
    Chinese, Japanese, Korean and similar scripts, then words, punctuation and white space; each
    stretch is mapped to bytes.
    """
    scripts = "".join(f"{chr(first)}-{chr(last)}" for first, last in _ISOLATED_SCRIPTS)
    patterns = (*_DIGIT_PATTERNS, f"[{scripts}]+", _MAIN_PATTERN)
    splits = [pre_tokenizers.Split(Regex(pattern), "isolated") for pattern in patterns]
    byte_level = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    return pre_tokenizers.Sequence([*splits, byte_level])


def check_vocab_size(vocab_size: int) -> None:
    """Check that a vocabulary can hold every byte.

    Raises:
        UserError: If it cannot.
    """
    if vocab_size < MIN_VOCAB_SIZE:
        raise UserError(
            f"vocab_size {vocab_size} is too small: 256 bytes and {END_OF_TEXT} need "
            f"{MIN_VOCAB_SIZE}; pass --vocab-size {MIN_VOCAB_SIZE} or more"
        )


def train_tokenizer(texts: Iterable[str], *, vocab_size: int) -> Tokenizer:
    """Train a byte-level BPE tokenizer which reproduces every text exactly.

    Args:
        texts: Documents; the same documents give the same tokenizer.
        vocab_size: Number of tokens, the end-of-text token (id 0) and the 256 bytes included.

    Raises:
        UserError: If the vocabulary is too small, or the texts do not fill it.
    """
    check_vocab_size(vocab_size)
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = get_pre_tokenizer()
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        min_frequency=2,
        special_tokens=[END_OF_TEXT],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    reached = tokenizer.get_vocab_size()
    if reached < vocab_size:
        raise UserError(
            f"vocab_size {vocab_size} cannot be filled: this corpus gives {reached} tokens; add "
            f"more text, or pass --vocab-size {reached} or less"
        )
    return tokenizer


def load_tokenizer(folder: Path) -> GivenTokenizer:
    """Load a Hugging Face tokenizer to encode documents with.

    Args:
        folder: Holds ``tokenizer.json`` and ``tokenizer_config.json``, as a released model's does.

    Raises:
        UserError: If one of them is missing or unusable, or the end-of-text token is not in the
            vocabulary or not kept apart from ordinary text.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise UserError(
            f"tokenizer {folder} is not an existing folder; pass --tokenizer with the folder that "
            f"holds {_TOKENIZER} and {_CONFIG}, such as that of a downloaded model"
        )
    content = _read(folder, _TOKENIZER)
    tokenizer = _parse(folder, content)
    eos_token = _read_eos_token(folder)
    if tokenizer.token_to_id(eos_token) is None:
        raise UserError(
            f"tokenizer {folder}: eos_token {eos_token!r} of {_CONFIG} is not in the vocabulary "
            f"of {_TOKENIZER}; set eos_token to a token of the vocabulary"
        )
    tokenizer.no_truncation()
    tokenizer.no_padding()
    # transformers takes it for special even where tokenizer.json does not; the id stays.
    tokenizer.add_special_tokens([eos_token])
    given = GivenTokenizer(
        folder=folder,
        tokenizer=tokenizer,
        eos_token=eos_token,
        fingerprint=hashlib.sha256(content).hexdigest(),
        files=tuple(sorted(path.name for path in folder.iterdir() if is_tokenizer_file(path))),
    )
    _check_end_is_kept_apart(given)
    return given


def read_vocab_size(folder: Path) -> int:
    """Number of tokens of a folder's tokenizer, those that only transformers adds included.

    Raises:
        UserError: A file is missing or damaged.
    """
    size = count_tokens(_parse(folder, _read(folder, _TOKENIZER)))
    if not (folder / _CONFIG).is_file():
        return size
    try:
        added = json.loads(_read(folder, _CONFIG)).get("added_tokens_decoder") or {}
        return max([size, *(int(token) + 1 for token in added)])
    except (ValueError, AttributeError) as error:
        raise UserError(
            f"tokenizer {folder}: {_CONFIG} is damaged ({error}); copy or download it again"
        ) from error


def copy_tokenizer(given: GivenTokenizer, folder: Path) -> None:
    """Copy the files of a tokenizer unchanged into a new folder.

    Raises:
        UserError: If they are no longer those that were loaded.
    """
    folder.mkdir()
    for name in given.files:
        shutil.copyfile(given.folder / name, folder / name)
    copied = (hash_file(folder / _TOKENIZER), _read_eos_token(folder))
    if copied != (given.fingerprint, given.eos_token):
        raise UserError(f"tokenizer {given.folder} changed while it was read; run again")


def get_eod_id(tokenizer: Tokenizer, eos_token: str = END_OF_TEXT) -> int:
    """Id of the token that ends every document."""
    eod_id = tokenizer.token_to_id(eos_token)
    assert eod_id is not None, f"{eos_token} is not in the vocabulary"
    return eod_id


def encode_documents(
    tokenizer: Tokenizer, texts: Sequence[str], *, eos_token: str = END_OF_TEXT
) -> list[list[int]]:
    """Encode documents, each ended by the end-of-text token and without other special tokens.

    The words ``<|endoftext|>`` inside a text are encoded as ordinary characters: only the end of
    a document ends it.
    """
    eod_id = get_eod_id(tokenizer, eos_token)
    tokenizer.encode_special_tokens = True
    encodings = tokenizer.encode_batch_fast(list(texts), add_special_tokens=False)
    return [[*encoding.ids, eod_id] for encoding in encodings]


def save_tokenizer(tokenizer: Tokenizer, folder: Path) -> None:
    """Write a folder that transformers' ``AutoTokenizer`` and Megatron's
    ``HuggingFaceTokenizer`` load without a network.
    """
    folder.mkdir(parents=True, exist_ok=True)
    tokenizer.save(str(folder / _TOKENIZER))
    config = {
        # Known to transformers 4 and 5 alike.
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": END_OF_TEXT,
        "eos_token": END_OF_TEXT,
        "pad_token": END_OF_TEXT,
        # Would otherwise drop spaces before punctuation when decoding.
        "clean_up_tokenization_spaces": False,
    }
    path = folder / _CONFIG
    path.write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")


def is_tokenizer_file(path: Path) -> bool:
    """Whether a file of a model's folder is one of its tokenizer; links count as their target."""
    return (
        path.is_file()
        and not path.name.startswith(".")
        and path.name not in _FOREIGN_NAMES
        and path.name.partition(".")[0].upper() not in _FOREIGN_STEMS
        and not path.name.lower().endswith(_FOREIGN_SUFFIXES)
    )


def _read(folder: Path, name: str) -> bytes:
    try:
        return (folder / name).read_bytes()
    except OSError as error:
        raise UserError(
            f"tokenizer {folder}: {name} cannot be read ({error.strerror or error}); pass "
            f"--tokenizer with a folder that holds {_TOKENIZER} and {_CONFIG}"
        ) from error


def _parse(folder: Path, content: bytes) -> Tokenizer:
    try:
        return Tokenizer.from_buffer(content)
    except Exception as error:  # the library raises nothing more specific
        raise UserError(
            f"tokenizer {folder}: {_TOKENIZER} cannot be loaded ({error}); copy or download it "
            "again, or save it with a release of `tokenizers` not newer than the installed one"
        ) from error


def get_special_token(config: Mapping[str, Any], kind: str) -> Any:
    """A special token of ``tokenizer_config.json``; None if it names none.

    Args:
        config: Content of the file.
        kind: ``bos``, ``eos`` or ``pad``; a string in the file, or an added token with properties.
    """
    token = config.get(f"{kind}_token")
    return token.get("content") if isinstance(token, dict) else token


def _read_eos_token(folder: Path) -> str:
    """The end-of-text token."""
    try:
        config = json.loads(_read(folder, _CONFIG).decode("utf-8"))
        eos_token = get_special_token(config, "eos")
    except (UnicodeDecodeError, json.JSONDecodeError, AttributeError) as error:
        raise UserError(
            f"tokenizer {folder}: {_CONFIG} is not a JSON object ({error}); copy or download it "
            "again"
        ) from error
    if not isinstance(eos_token, str) or not eos_token:
        raise UserError(
            f"tokenizer {folder}: {_CONFIG} names no eos_token ({eos_token!r}), which ends every "
            'document; add it, for example "eos_token": "<|endoftext|>"'
        )
    return eos_token


def _check_end_is_kept_apart(given: GivenTokenizer) -> None:
    """Check that the characters of the end-of-text token in a text do not become that token."""
    token = given.eos_token
    [ids] = encode_documents(given.tokenizer, [f"{token} a{token}"], eos_token=token)
    if ids[-1] in ids[:-1]:
        raise UserError(
            f"tokenizer {given.folder}: the characters {token!r} inside a text become the "
            "end-of-text token; set eos_token to a token that no text contains, or use a "
            "byte-level BPE tokenizer"
        )
