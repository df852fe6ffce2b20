"""Trinity's pre-tokenization: the patterns at which text is split before BPE.

Source: report section 2 (tokenizer); the patterns follow llama.cpp's port,
``LLAMA_VOCAB_PRE_TYPE_AFMOE``.
"""

from tokenizers import Regex, pre_tokenizers

# Part of the fingerprint of prepared data.  Increment it with every change to the encoding.
PRE_TOKENIZER_VERSION = "trinity-1"
# A run of digits is isolated, then split from the right: first the one or two leading digits, then
# groups of three. One pattern with a look-ahead would be quadratic in the length of the run.
_DIGIT_PATTERNS = (r"\p{N}+", r"\A\p{N}{1,2}(?=(?:\p{N}{3})+\z)", r"\p{N}{3}")
# Unicode blocks of scripts whose runs are isolated; most are written without spaces.
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
    """Trinity's pre-tokenizer, which splits text into pieces that no token crosses.

    It splits digits into groups of three from the right (``12345`` is ``12``, ``345``), then runs
    of Chinese, Japanese, Korean and similar scripts, then words, punctuation and white space, and
    maps each piece to bytes.
    """
    scripts = "".join(f"{chr(first)}-{chr(last)}" for first, last in _ISOLATED_SCRIPTS)
    patterns = (*_DIGIT_PATTERNS, f"[{scripts}]+", _MAIN_PATTERN)
    splits = [pre_tokenizers.Split(Regex(pattern), "isolated") for pattern in patterns]
    byte_level = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    return pre_tokenizers.Sequence([*splits, byte_level])
