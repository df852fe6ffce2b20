"""Errors in words for users."""

import errno
import os

import pytest

from trinity_megatron.process.rank import describe_error


@pytest.mark.parametrize(
    ("error", "words"),
    [
        (OSError(errno.ENOENT, os.strerror(errno.ENOENT), "a/b"), "a/b: No such file"),
        (OSError(errno.EACCES, os.strerror(errno.EACCES), "a/b"), "a/b: Permission denied"),
        (OSError(errno.ENOTDIR, os.strerror(errno.ENOTDIR), b"a/b"), "a/b: Not a directory"),
        (OSError(errno.EISDIR, os.strerror(errno.EISDIR), "a/b"), "a/b: Is a directory"),
        (OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), "a/b"), "a/b: No space left"),
    ],
)
def test_errors_of_the_system_name_path_and_remedy(error: OSError, words: str) -> None:
    said = describe_error(error)
    assert said.startswith(words) and "Remedy: " in said and "[Errno" not in said


def test_other_errors_keep_their_words() -> None:
    assert describe_error(ValueError("--lr is wrong")) == "--lr is wrong"
    assert describe_error(OSError("the disk has no room")) == "the disk has no room"
    assert describe_error(ValueError()) == "ValueError"


def test_what_a_terminal_would_follow_is_escaped() -> None:
    name = "a\x1b]0;title\x07\x1b[2J\u202eb\rc\ud800"
    said = describe_error(ValueError(f"{name}: it is wrong\nRemedy: ü"))
    assert said.endswith("c\\ud800: it is wrong\nRemedy: ü")
    assert all(letter.isprintable() or letter == "\n" for letter in said)
    said = describe_error(OSError(errno.ENOENT, "No such file", "a\x1b[2J"))
    assert said.startswith("a\\x1b[2J: No such file")
