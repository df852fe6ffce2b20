"""CSV files that are read in turns."""

import csv
import io

from trinity_megatron.data.rows import read_csv

_LONG = "a" * 200_000  # more than the limit that csv begins with


def test_readers_in_turns_keep_the_limit():
    previous = csv.field_size_limit(131_072)
    try:
        ended = read_csv(io.BytesIO(b"text\nshort\n"), "text", ",")
        going = read_csv(io.BytesIO(f"text\nshort\n{_LONG}\n".encode()), "text", ",")
        next(ended), next(going)
        assert not list(ended)
        assert [text for _, _, text in going] == [_LONG]
    finally:
        csv.field_size_limit(previous)
