"""The parts of a corpus of raw text that streams take in turn, and the rows of a part.

A part is what is read one row after the other from its beginning: a range of bytes of a file of
JSON Lines, a range of rows of a parquet file, a whole text, or every so many-th row of a file that
can only be read from its beginning, such as a compressed one.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from itertools import islice
from typing import BinaryIO, NamedTuple, cast

import numpy as np

from trinity_megatron.data.corpus import read_rows
from trinity_megatron.data.rows import RowError, decode_text, parse_json_line
from trinity_megatron.data.streams import (
    MAX_DOCUMENT_BYTES,
    DamagedFileError,
    StoredFile,
    check_size,
    open_stream,
    read_lines,
    read_whole,
)
from trinity_megatron.data.tables import MissingColumnError, read_parquet
from trinity_megatron.data.text.text_corpus import TextCorpus, TextFile
from trinity_megatron.errors import UserError

# A stream reads a part in seconds, and each has some.
_MAX_PART_BYTES = 8 * 2**20
_MIN_PART_BYTES = 2**16
_PARTS_PER_STREAM = 8
_CHUNK_BYTES = 2**20
_NAMED_ROWS = 10  # that are left out
# Beyond so many, no larger share of the rows may be left out.
_FEW_ROWS, _MAX_LEFT_OUT = 100, 0.1


# A text, or the tokens (int32 ``[n]``) of a corpus that is prepared.
Document = str | np.ndarray


class Row(NamedTuple):
    """A row of a part.

    Attributes:
        number: In the part, from 0 on.
        document: Empty if the row has none.
    """

    number: int
    document: Document


# Whether a row is read, by its number in the part.
IsWanted = Callable[[int], bool]
_Numbered = tuple[int, str, str | RowError]


class Parts:
    """The parts of a corpus.

    Args:
        corpus: Its files.
        num_streams: Number of virtual streams, each of which needs some parts.
    """

    def __init__(self, corpus: TextCorpus, num_streams: int) -> None:
        self.corpus = corpus
        size = part_bytes(corpus.num_bytes, num_streams)
        of_file = [_count_parts(file, size, corpus, num_streams) for file in corpus.files]
        self._ends = np.cumsum(of_file)
        self._num_read = self._num_left_out = 0
        self._notices: list[str] = []

    def __len__(self) -> int:
        return int(self._ends[-1])

    def locate(self, part: int) -> tuple[TextFile, int, int]:
        """The file of a part, its number among those of the file, and their number."""
        index = int(np.searchsorted(self._ends, part, side="right"))
        first = int(self._ends[index - 1]) if index else 0
        return self.corpus.files[index], part - first, int(self._ends[index]) - first

    def path_of(self, part: int) -> StoredFile:
        """The file that a part is in."""
        return self.locate(part)[0].source.path

    def read(self, part: int, is_wanted: IsWanted) -> Iterator[Row]:
        """The rows of a part that are wanted.

        Args:
            part: Its number.
            is_wanted: Asked once for each row, in their order.

        Raises:
            UserError: A row has no text, or the file is damaged or cannot be read; names the file,
                the row and the remedy.
        """
        file, number, count = self.locate(part)
        where = "its beginning"
        try:
            for row, where, text in _read(file, number, count, self.corpus, is_wanted):
                if isinstance(text, str):
                    self._num_read += 1
                    yield Row(row, text)
                else:
                    self._leave_out(file, f"{where}: {text}")
        except MissingColumnError as error:
            raise self._damage(file, str(error)) from error
        except OSError as error:
            words = str(error) if isinstance(error, DamagedFileError) else error.strerror or error
            raise self._damage(file, f"cannot be read beyond {where} ({words})") from error

    def take_notices(self) -> list[str]:
        """What has been left out since the last call; the first rows only, each by its name."""
        notices, self._notices = self._notices, []
        return notices

    def _leave_out(self, file: TextFile, what: str) -> None:
        words = f"{self.corpus.key}: {file.source.path}, {what}"
        if not self.corpus.skips_bad_rows:
            raise UserError(
                f"{words}. Remedy: correct the row, or leave such rows out with skip_bad_rows: "
                "true for the corpus in the file of --data."
            )
        self._num_left_out += 1
        if self._num_left_out <= _NAMED_ROWS:
            self._notices.append(f"left out: {words}")
        elif _is_round(self._num_left_out):
            self._notices.append(f"left out: {self._num_left_out:,} rows so far; {words}")
        share = self._num_left_out / (self._num_left_out + self._num_read)
        if self._num_left_out > _FEW_ROWS and share > _MAX_LEFT_OUT:
            raise UserError(
                f"{words}; {self._num_left_out} of {self._num_left_out + self._num_read} rows hold "
                f"no text, more than {_MAX_LEFT_OUT:.0%}. Remedy: text_key with the name of their "
                "field, or mend the file."
            )

    def _damage(self, file: TextFile, what: str) -> UserError:
        return UserError(
            f"{self.corpus.key}: {file.source.path} {what}. Remedy: put the whole file there, or "
            "take it out of the corpus (with --allow-data-change where the run has begun)."
        )


def part_bytes(num_bytes: int, num_streams: int) -> int:
    """Size of a part of a corpus, so that each stream has some."""
    share = num_bytes // (_PARTS_PER_STREAM * num_streams)
    return min(max(share, _MIN_PART_BYTES), _MAX_PART_BYTES)


def _is_round(number: int) -> bool:
    """Whether it is a power of ten."""
    return set(str(number)[1:]) <= {"0"} and str(number)[0] == "1"


def _count_parts(file: TextFile, size: int, corpus: TextCorpus, num_streams: int) -> int:
    found = file.source.format
    needed = -(-num_streams // len(corpus.files))
    wanted = max(needed, -(-file.source.num_bytes // size))
    if _has_ranges(file):
        return wanted
    if found.kind == "parquet":
        return max(1, min(wanted, file.rows))
    if found.kind == "text" and corpus.options.split_on is None:
        return 1
    # Each part is a reading of the whole file: only as many as the streams need.
    return needed


def _has_ranges(file: TextFile) -> bool:
    """Whether a reader can begin anywhere in the file."""
    found = file.source.format
    return found.kind == "json_lines" and not found.layers and found.encoding is None


def _read(
    file: TextFile, part: int, count: int, corpus: TextCorpus, is_wanted: IsWanted
) -> Iterator[_Numbered]:
    """Rows with their number in the part, and their place in the file in words."""
    source, options = file.source, corpus.options
    if _has_ranges(file):
        yield from _read_range(file, part, count, options.text_key, is_wanted)
    elif source.format.kind == "parquet":
        first, end = file.rows * part // count, file.rows * (part + 1) // count
        rows = read_parquet(source.path, options.text_key, first, end)
        for row, (_, number, text) in enumerate(rows):
            if is_wanted(row):
                yield row, f"row {number}", text
    elif source.format.kind == "json_lines":
        yield from _read_lines(file, part, count, options.text_key, is_wanted)
    elif source.format.kind == "text" and options.split_on is None:
        if is_wanted(0):
            with _open(file) as stream:
                yield 0, "the text", decode_text(read_whole(stream))
    else:
        rows = islice(read_rows(source, options, set()), part, None, count)
        for row, (where, _, text) in enumerate(rows):
            if is_wanted(row):
                yield row, where, text


def _open(file: TextFile) -> BinaryIO:
    found = file.source.format
    return open_stream(file.source.path, found.layers, found.encoding)


def _read_range(
    file: TextFile, part: int, count: int, key: str, is_wanted: IsWanted
) -> Iterator[_Numbered]:
    """The lines that begin in a range of bytes."""
    size = file.source.num_bytes
    position, end = size * part // count, size * (part + 1) // count
    with file.source.path.open("rb") as stream:
        if position:  # to the first line that begins in the range
            position = stream.seek(position - 1)
            while piece := stream.readline(_CHUNK_BYTES):
                position += len(piece)
                if piece.endswith(b"\n"):
                    break
        row = -1
        while position < end and (line := stream.readline(MAX_DOCUMENT_BYTES + 1)):
            check_size(len(line))
            begin, position = position, position + len(line)
            if line.isspace():
                continue
            row += 1
            if is_wanted(row):
                text = parse_json_line(line, key)
                where = f"byte {begin}" if isinstance(text, str) else _name_line(file, begin)
                yield row, where, text


def _name_line(file: TextFile, position: int) -> str:
    """Count the lines before a position; this takes long, and is for an error."""
    lines = 1
    with file.source.path.open("rb") as stream:
        while position > 0 and (block := stream.read(min(position, _CHUNK_BYTES))):
            lines += block.count(b"\n")
            position -= len(block)
    return f"line {lines}"


def _read_lines(
    file: TextFile, part: int, count: int, key: str, is_wanted: IsWanted
) -> Iterator[_Numbered]:
    """Every ``count``-th line that is not empty; the others are not parsed."""
    found = -1
    with _open(file) as stream:
        for number, line in enumerate(read_lines(cast(BinaryIO, stream)), start=1):
            if line.isspace():
                continue
            found += 1
            row, turn = divmod(found, count)
            if turn == part and is_wanted(row):
                yield row, f"line {number}", parse_json_line(line, key)
