"""Tokenizers from elsewhere: what their files may make this process do."""

from collections.abc import Mapping
from math import prod
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer

from trinity_megatron.data.tokenizer import (
    CONFIG_NAME,
    TOKENIZER_NAME,
    count_tokens,
    named_panic,
)
from trinity_megatron.errors import UserError
from trinity_megatron.untrusted.json_file import parse_json, read_json
from trinity_megatron.untrusted.trial import try_apart

# Ids are rows of an embedding, and of counts.
MAX_TOKENS = 2**24
# A text may grow so much by what replaces its characters.
_MAX_GROWTH = 100
_TRIAL_SECONDS, _TRIAL_BYTES = 2, 2**30
_PROBE = (
    {"role": "user", "content": "A question"},
    {"role": "assistant", "content": "An answer"},
)


def parse_tokenizer(content: bytes) -> Tokenizer:
    """The tokenizer of a ``tokenizer.json``.

    Raises:
        ValueError: It is damaged, has ids far above any vocabulary, or makes texts far longer.
    """
    fields = parse_json(content)
    if not isinstance(fields, dict):
        raise ValueError("it is no JSON object")
    growth = _growth(fields.get("normalizer"))
    if growth > _MAX_GROWTH:
        raise ValueError(f"its normalizer makes texts {growth:.3g} times as long")
    with named_panic():
        tokenizer = Tokenizer.from_buffer(content)
    check_vocab(count_tokens(tokenizer))
    return tokenizer


def check_vocab(num_tokens: int) -> None:
    """Refuse a vocabulary whose counts would fill the memory.

    Raises:
        ValueError: It is too large.
    """
    if num_tokens > MAX_TOKENS:
        raise ValueError(f"its highest id is {num_tokens - 1}, above {MAX_TOKENS - 1}")


def load_transformers_tokenizer(folder: Path) -> Any:
    """transformers' tokenizer of a folder; no code in the folder is run.

    Args:
        folder: With ``tokenizer.json``.

    Raises:
        UserError: A file is damaged, or the tokenizer or a chat template of it needs code, or far
            more memory or time than another one.
    """
    from transformers import AutoTokenizer

    try:
        check_json_files(folder)
        _check_config(folder / CONFIG_NAME)
        with named_panic():
            tokenizer: Any = AutoTokenizer.from_pretrained(folder, trust_remote_code=False)
    except Exception as error:  # the libraries raise no more specific exception
        raise UserError(
            f"tokenizer {folder} cannot be loaded ({error}). Remedy: download it again, from a "
            "source that you trust."
        ) from error
    templates = tokenizer.chat_template or {}
    if isinstance(templates, str):
        templates = {"default": templates}
    for source in templates.values():
        check_template(tokenizer, source, str(folder))
    return tokenizer


def check_json_files(folder: Path) -> None:
    """Check the JSON files of a folder before a library of others reads them.

    Raises:
        ValueError: One is damaged; see :func:`parse_tokenizer`.
    """
    for path in sorted(folder.glob("*.json")):
        if path.name == TOKENIZER_NAME:
            parse_tokenizer(path.read_bytes())
        elif not path.name.endswith(".index.json"):
            try:
                read_json(path)
            except ValueError as error:
                raise ValueError(f"{path.name}: {error}") from error


def check_template(tokenizer: Any, source: str, name: str) -> None:
    """Try a chat template in a process of its own.

    Args:
        tokenizer: transformers' tokenizer.
        source: The template in Jinja.
        name: Where it comes from, for the message.

    Raises:
        UserError: A question and its answer take it far more memory or time than any template.
    """

    def render() -> None:
        tokenizer.apply_chat_template(list(_PROBE), chat_template=source, tokenize=False)

    needed = try_apart(render, seconds=_TRIAL_SECONDS, num_bytes=_TRIAL_BYTES)
    if needed:
        raise UserError(
            f"the chat template of {name} takes {needed} for a question and its answer. Remedy: "
            "--chat-template with one that does not."
        )


def _check_config(path: Path) -> None:
    """Refuse a tokenizer that consists of code, which would else be left out without a word."""
    config = read_json(path) if path.is_file() else {}
    if not isinstance(config, dict):
        raise ValueError(f"{path.name} is no JSON object")
    if config.get("auto_map"):
        raise ValueError(
            f"auto_map of {path.name} names code in the folder, which is never run here"
        )


def _growth(normalizer: Any) -> float:
    """How many times as long a normalizer may make a text."""
    if not isinstance(normalizer, Mapping):
        return 1
    kind = normalizer.get("type")
    if kind == "Sequence":
        return prod(_growth(each) for each in normalizer.get("normalizers") or ())
    if kind == "Replace":
        pattern = normalizer.get("pattern")
        is_text = isinstance(pattern, Mapping) and isinstance(pattern.get("String"), str)
        shortest = len(pattern["String"]) if is_text else 1  # type: ignore[index]
        return max(1, len(str(normalizer.get("content"))) / max(1, shortest))
    return 1
