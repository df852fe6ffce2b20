"""Trinity's tokenizer trained from scratch: byte-level BPE behind Trinity's pre-tokenisation.

Source: report section 2 (tokenizer); the patterns follow llama.cpp's port,
``LLAMA_VOCAB_PRE_TYPE_AFMOE``.
"""

import json
from collections.abc import Iterable, Sequence
from pathlib import Path

from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers

END_OF_TEXT = "<|endoftext|>"
MIN_VOCAB_SIZE = 256 + 1  # every byte, and the end-of-text token
# Part of the dataset's content address: count it up with any change to what is encoded how.
PRE_TOKENIZER_VERSION = "trinity-1"

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
        ValueError: If it cannot.
    """
    if vocab_size < MIN_VOCAB_SIZE:
        raise ValueError(
            f"vocab_size {vocab_size} is too small: 256 bytes and {END_OF_TEXT} need "
            f"{MIN_VOCAB_SIZE}; pass --vocab-size {MIN_VOCAB_SIZE} or more"
        )


def train_tokenizer(texts: Iterable[str], *, vocab_size: int) -> Tokenizer:
    """Train a byte-level BPE tokenizer which reproduces every text exactly.

    Args:
        texts: Documents; the same documents give the same tokenizer.
        vocab_size: Number of tokens, the end-of-text token (id 0) and the 256 bytes included.

    Raises:
        ValueError: If the vocabulary is too small, or the texts do not fill it.
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
        raise ValueError(
            f"vocab_size {vocab_size} cannot be filled: this corpus gives {reached} tokens; add "
            f"more text, or pass --vocab-size {reached} or less"
        )
    return tokenizer


def get_eod_id(tokenizer: Tokenizer) -> int:
    """Id of the token that ends every document."""
    eod_id = tokenizer.token_to_id(END_OF_TEXT)
    assert eod_id is not None, f"{END_OF_TEXT} is not in the vocabulary"
    return eod_id


def encode_documents(tokenizer: Tokenizer, texts: Sequence[str]) -> list[list[int]]:
    """Encode documents, each ended by the end-of-text token.

    The words ``<|endoftext|>`` inside a text are encoded as ordinary characters: only the end of
    a document ends it.
    """
    eod_id = get_eod_id(tokenizer)
    tokenizer.encode_special_tokens = True
    return [[*encoding.ids, eod_id] for encoding in tokenizer.encode_batch_fast(list(texts))]


def save_tokenizer(tokenizer: Tokenizer, folder: Path) -> None:
    """Write a folder that transformers' ``AutoTokenizer`` and Megatron's
    ``HuggingFaceTokenizer`` load without a network.
    """
    folder.mkdir(parents=True, exist_ok=True)
    tokenizer.save(str(folder / "tokenizer.json"))
    config = {
        # Known to transformers 4 and 5 alike.
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": END_OF_TEXT,
        "eos_token": END_OF_TEXT,
        "pad_token": END_OF_TEXT,
        # Would otherwise drop spaces before punctuation when decoding.
        "clean_up_tokenization_spaces": False,
    }
    path = folder / "tokenizer_config.json"
    path.write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
