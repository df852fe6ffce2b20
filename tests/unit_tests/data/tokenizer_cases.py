"""Texts that the tests of tokenizers share."""

from trinity_megatron.data.tokenizer import (
    END_OF_TEXT,
)

VOCAB_SIZE = 700
TEXTS = [
    "",
    "The quick brown fox -- it's 12345 metres (3.14159) away!\n",
    "  leading, trailing \t tabs\t\n\n\r\n   \r mixed   ",
    "0 00 000 0000 1234567890123 3,000,000 ½²Ⅷ ١٢٣٤٥",
    "日本語のテキスト、漢字12345とカナ。한국어 문장입니다 中文没有空格 ภาษาไทย ພາສາລາວ ខ្មែរ မြန်မာ",
    "e\u0301 combining, \u200bzero width, \ufeffmark, \x00\x01\x7f\x85 controls \u2028 lines",
    "👩‍👩‍👧‍👦 😀🏽 🇪🇺 ∑∞≠ ← \U0010ffff \ufffd \ue000",
    "def f(x):\n    return x ** 2  # 1234\n\n\tif a != b: pass\n",
    f"a {END_OF_TEXT} b{END_OF_TEXT}{END_OF_TEXT}",
    "Ġ Ċ ĉ č Ā ÿ look like bytes in the vocabulary",
]
