"""Training, saving and applying a tokenizer: byte-level BPE with Trinity's pre-tokenization.

Source: report section 2 (tokenizer).
"""

import json
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

from trinity_megatron.data.pre_tokenizer import get_pre_tokenizer
from trinity_megatron.errors import UserError

TOKENIZER_NAME, CONFIG_NAME = "tokenizer.json", "tokenizer_config.json"
TEMPLATE_NAME = "chat_template.jinja"  # transformers' name
END_OF_TEXT = "<|endoftext|>"
# Around each turn of a conversation.  Text has none; a model meets them when it learns to chat.
CHATML_TOKENS = ("<|im_start|>", "<|im_end|>")
CHATML_VERSION = "chatml-1"
SPECIAL_TOKENS = (END_OF_TEXT, *CHATML_TOKENS)
MIN_VOCAB_SIZE = 256 + len(SPECIAL_TOKENS)  # all bytes too


def check_vocab_size(vocab_size: int) -> None:
    """Check that a vocabulary has room for every byte.

    Raises:
        UserError: It is too small.
    """
    if vocab_size < MIN_VOCAB_SIZE:
        raise UserError(
            f"vocab_size {vocab_size} is too small: 256 bytes and {', '.join(SPECIAL_TOKENS)} need "
            f"{MIN_VOCAB_SIZE}; pass --vocab-size {MIN_VOCAB_SIZE} or more"
        )


def train_tokenizer(texts: Iterable[str], *, vocab_size: int) -> Tokenizer:
    """Train a byte-level BPE tokenizer, which encodes every text without loss.

    Args:
        texts: Documents.  Training is deterministic.
        vocab_size: Number of tokens, including the end-of-text token (id 0), ChatML's (1 and 2) and
            the 256 bytes.

    Raises:
        UserError: The vocabulary is too small, or the texts do not fill it.
    """
    check_vocab_size(vocab_size)
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = get_pre_tokenizer()
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        min_frequency=2,
        special_tokens=list(SPECIAL_TOKENS),
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


def save_tokenizer(tokenizer: Tokenizer, folder: Path) -> None:
    """Save a tokenizer for transformers' ``AutoTokenizer`` and Megatron's ``HuggingFaceTokenizer``.

    Both load the folder without a network.
    """
    folder.mkdir(parents=True, exist_ok=True)
    tokenizer.save(str(folder / TOKENIZER_NAME))
    config = {
        # transformers 4 and 5 both know this class.
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": END_OF_TEXT,
        "eos_token": END_OF_TEXT,
        "pad_token": END_OF_TEXT,
        # True would remove spaces before punctuation in decoded text.
        "clean_up_tokenization_spaces": False,
    }
    path = folder / CONFIG_NAME
    path.write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
    (folder / TEMPLATE_NAME).write_text(chatml_template(), encoding="utf-8")


def chatml_template() -> str:
    """The chat template of tokenizers that are trained here: ChatML without tools."""
    return Path(__file__).with_name("chatml.jinja").read_text(encoding="utf-8")


def get_eod_id(tokenizer: Tokenizer, eos_token: str = END_OF_TEXT) -> int:
    """Id of the token that ends every document."""
    eod_id = tokenizer.token_to_id(eos_token)
    assert eod_id is not None, f"{eos_token} is not in the vocabulary"
    return eod_id


def encode_documents(
    tokenizer: Tokenizer, texts: Sequence[str], *, eos_token: str = END_OF_TEXT
) -> list[list[int]]:
    """Encode documents with an end-of-text token after each and no other special tokens.

    The string ``<|endoftext|>`` within a text is encoded as ordinary characters.

    Raises:
        UserError: The tokenizer's patterns cannot be matched with a text.
    """
    eod_id = get_eod_id(tokenizer, eos_token)
    tokenizer.encode_special_tokens = True
    with named_panic():
        encodings = tokenizer.encode_batch_fast(list(texts), add_special_tokens=False)
    return [[*encoding.ids, eod_id] for encoding in encodings]


@contextmanager
def named_panic() -> Iterator[None]:
    """Name the tokenizer where its library panics, which is no ``Exception`` of Python.

    Raises:
        UserError: It does.
    """
    try:
        yield
    except BaseException as error:
        if type(error).__name__ != "PanicException":
            raise
        raise UserError(
            f"the tokenizer cannot be used: {error}. Remedy: another tokenizer; a pattern in its "
            "tokenizer.json is damaged, or takes too long on a text."
        ) from error


def count_tokens(tokenizer: Tokenizer) -> int:
    """Number of tokens, including added tokens and unused ids below the highest id."""
    highest = max(tokenizer.get_vocab(with_added_tokens=True).values(), default=-1)
    return max(tokenizer.get_vocab_size(with_added_tokens=True), highest + 1)
