"""The tokenizer in a GGUF file.

llama.cpp has its pre-tokenizers built in, by name; ``afmoe`` is Trinity's.
"""

from pathlib import Path
from types import ModuleType
from typing import Any

from tokenizers import Tokenizer

from trinity_megatron.data.pre_tokenizer import get_pre_tokenizer
from trinity_megatron.data.tokenizer_file import check_json_files, parse_tokenizer
from trinity_megatron.errors import UserError
from trinity_megatron.untrusted.json_file import read_json

_FILE = "tokenizer.json"
# Texts that pre-tokenizers split differently: digits, scripts without spaces, marks, white space.
_PROBES = (
    "12345678 1234 12 a1b22c333d4444",
    "def f(x):\n    return x[0] == 'it''s'  # don't\n\n\n\tend",
    "日本語のテキスト한국어 텍스트ภาษาไทย中文123字",
    "  two  spaces\t\ttabs \r\n\r\n mixed   ",
    "(hello) [World] {x_y}.z -> **bold** ~~a~~ €5 £10 ±½ ²³",
    "Ünïcödé naïve e\u0301tude Привет мир नमस्ते",
)


def add_tokenizer(gguf: ModuleType, writer: Any, folder: Path, num_rows: int) -> None:
    """Add vocabulary, merges and special tokens.

    Args:
        gguf: The package.
        writer: Its ``GGUFWriter``.
        folder: Of the tokenizer.
        num_rows: Rows of the embedding; those without a token are marked unused.

    Raises:
        UserError: llama.cpp would tokenize differently.
    """
    tokenizer = _read(folder)
    check_tokenizer(tokenizer, folder)
    tokens, types = _list_tokens(gguf, tokenizer, folder, num_rows)
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("afmoe")
    writer.add_token_list(tokens)
    writer.add_token_types(types)
    special = gguf.SpecialVocab(folder, load_merges=True, n_vocab=num_rows)
    # Else llama.cpp chooses for the architecture.
    for kind in ("bos", "eos"):
        special.add_special_token.setdefault(kind, False)
    special.add_to_gguf(writer, quiet=True)


def _read(folder: Path) -> Tokenizer:
    try:
        check_json_files(folder)  # the package gguf reads them too
        return parse_tokenizer((folder / _FILE).read_bytes())
    except Exception as error:  # the library raises no more specific exception
        raise UserError(
            f"tokenizer {folder} cannot be loaded ({error}). Remedy: copy it again."
        ) from error


def check_tokenizer(tokenizer: Tokenizer, folder: Path) -> None:
    """Refuse a tokenizer that llama.cpp's ``afmoe`` does not stand for.

    Args:
        tokenizer: The tokenizer.
        folder: Where it lies, for the message.

    Raises:
        UserError: It is not byte-level BPE, normalizes, or splits text differently from Trinity's.
    """
    kind = read_json(folder / _FILE)["model"].get("type")
    remedy = "Remedy: --format bf16, and llama.cpp's own converter."
    if kind != "BPE" or tokenizer.normalizer is not None or tokenizer.pre_tokenizer is None:
        raise UserError(
            f"{folder} is not a byte-level BPE tokenizer without normalizer (its model is {kind}), "
            f"and llama.cpp's afmoe reads no other. {remedy}"
        )
    ours = get_pre_tokenizer()
    for text in _PROBES:
        expected = [piece for piece, _ in ours.pre_tokenize_str(text)]
        found = [piece for piece, _ in tokenizer.pre_tokenizer.pre_tokenize_str(text)]
        if found != expected:
            raise UserError(
                f"{folder} splits {text!r} differently from Trinity's pre-tokenizer, the only one "
                f"that llama.cpp has for this architecture. {remedy}"
            )


def _list_tokens(
    gguf: ModuleType, tokenizer: Tokenizer, folder: Path, num_rows: int
) -> tuple[list[str], list[int]]:
    names = {number: token for token, number in tokenizer.get_vocab(True).items()}
    added = tokenizer.get_added_tokens_decoder()
    if max(names) >= num_rows:
        raise UserError(
            f"{folder} has token {max(names)}, but the model has {num_rows} rows of embeddings. "
            "Remedy: --tokenizer DIR with the tokenizer that the model was trained with."
        )
    kinds = gguf.TokenType
    tokens, types = [], []
    for number in range(num_rows):
        tokens.append(names.get(number, f"[PAD{number}]"))
        if number not in names:
            types.append(kinds.UNUSED)
        elif number in added:
            types.append(kinds.CONTROL if added[number].special else kinds.USER_DEFINED)
        else:
            types.append(kinds.NORMAL)
    return tokens, types
