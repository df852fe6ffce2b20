"""Rows of JSON and CSV files: their text, found by a key."""

import codecs
import csv
import json
import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, BinaryIO

from trinity_megatron.data.streams import (
    MAX_DOCUMENT_BYTES,
    DamagedFileError,
    check_size,
    read_lines,
)
from trinity_megatron.untrusted.json_file import check_depth, parse_json

_CHUNK_BYTES = 2**20
_LISTED_KEYS = 20
_JSON_SPACE = re.compile(r"[ \t\r\n]*")
_SPACE_IN_LINE = re.compile(r"[ \t\r]*")
_DECODER = json.JSONDecoder()
# json reports the start of a value that the end of its input cuts; none but a string is longer.
_LONGEST_LITERAL = len("-Infinity") + 1


class RowError(ValueError):
    """What is wrong with one row of a file that is read otherwise."""


# Where the row is, as words (``line 3``) and as a number, and its text; empty if it has none.
Row = tuple[str, int, str | RowError]


def find_key(row: Any, key: str) -> tuple[bool, Any]:
    """Look up a key; one with dots is looked up as it is and, without success, as a path.

    Args:
        row: The row.
        key: For example ``text`` or ``meta.body.text``.

    Returns:
        Whether the row has it, and its value.  Inside of a null every key is a null.
    """
    if row is None:
        return True, None
    if not isinstance(row, Mapping):
        return False, None
    if key in row:
        return True, row[key]
    for position in (index for index, letter in enumerate(key) if letter == "."):
        if key[:position] in row:
            found = find_key(row[key[:position]], key[position + 1 :])
            if found[0]:
                return found
    return False, None


def list_keys(row: Mapping[str, Any]) -> str:
    """The keys of a row, those inside of objects with dots."""

    def names(values: Mapping[str, Any], prefix: str) -> Iterator[str]:
        for name, value in values.items():
            if isinstance(value, Mapping) and value:
                yield from names(value, f"{prefix}{name}.")
            else:
                yield f"{prefix}{name}"

    return shorten(list(names(row, ""))) or "no keys at all"


def shorten(names: Sequence[str]) -> str:
    """The first names in words, each cut to a line."""
    shown = ", ".join(
        name if len(name) <= 60 else f"{name[:60]}..." for name in names[:_LISTED_KEYS]
    )
    return f"{shown}, ..." if len(names) > _LISTED_KEYS else shown


def get_text(row: Any, key: str) -> str | RowError:
    """The text of a row, empty for a null; or why it has none."""
    if not isinstance(row, Mapping):
        return RowError(
            f"no field {key!r}, for it is {type(row).__name__}; every row must be an object such "
            f'as {{"{key}": "..."}}'
        )
    found, value = find_key(row, key)
    if not found:
        return RowError(
            f"no field {key!r}, only {list_keys(row)}; name the one that holds the text with "
            "--text-key"
        )
    return check_text(value, key)


def check_text(value: Any, key: str) -> str | RowError:
    """The value itself if it is text, empty for a null; or why it cannot be used."""
    if value is None:
        return ""
    if not isinstance(value, str):
        return RowError(f"{key!r} is {type(value).__name__}, not a string")
    try:
        value.encode("utf-8")
    except UnicodeEncodeError as error:
        code = ord(value[error.start])
        what = (
            f"the byte 0x{code - 0xDC00:02x}, which is not UTF-8,"
            if 0xDC80 <= code <= 0xDCFF
            else "half of a surrogate pair"
        )
        return RowError(f"{key!r} holds {what} at character {error.start}")
    return value


def decode_text(content: bytes) -> str | RowError:
    """A text, or why it is none."""
    if b"\0" in content:
        return RowError("binary: holds a NUL byte")
    try:
        return content.decode("utf-8")
    except UnicodeDecodeError as error:
        return RowError(f"not UTF-8 text: {error.reason} at byte {error.start}")


def read_json_lines(stream: BinaryIO, key: str) -> Iterator[Row]:
    """One JSON value a line; empty lines are no rows."""
    for number, line in enumerate(read_lines(stream), start=1):
        if not line.strip():
            continue
        yield f"line {number}", number, parse_json_line(line, key)


def parse_json_line(line: bytes, key: str) -> str | RowError:
    """The text of one line of JSON, empty for a null; or why it has none."""
    try:
        return get_text(parse_json(line), key)
    except ValueError as error:
        return RowError(f"not a JSON row in UTF-8 ({error})")


def read_json_values(stream: BinaryIO, key: str) -> Iterator[Row]:
    """The elements of one JSON array, or JSON values one after another, over any lines."""
    for number, value in enumerate(JsonValues(stream), start=1):
        yield f"row {number}", number, get_text(value, key)


class JsonValues:
    """The elements of a JSON array, or concatenated JSON values, read as they are needed.

    Raises:
        DamagedFileError: While iterating, if the content is not JSON.
    """

    def __init__(self, stream: BinaryIO) -> None:
        self._stream = stream
        # What is not UTF-8 is found in the row that has it.
        self._decoder = codecs.getincrementaldecoder("utf-8")("surrogateescape")
        self._buffer, self._position, self._number = "", 0, 0
        self._spans_lines = False
        self.is_array = self._peek() == "["
        if self.is_array:
            self._position += 1

    def __iter__(self) -> Iterator[Any]:
        while (letter := self._peek()) and not (self.is_array and letter == "]"):
            yield self._read_value()
            if self.is_array:
                self._skip_comma()
        if self.is_array:
            self._finish_array()

    def has_more(self) -> bool:
        """Whether anything but white space follows the last value that was read."""
        return self._peek() != ""

    def is_at_end_of_line(self) -> bool:
        """Whether the last value that was read lies on one line and ends it."""
        return not self._spans_lines and self._peek(_SPACE_IN_LINE) in ("\n", "")

    def _skip_comma(self) -> None:
        letter = self._peek()
        if letter == ",":
            self._position += 1
            if self._peek() == "]":
                raise self._damage("a comma before the end of the array")
        elif letter and letter != "]":
            raise self._damage(f"{letter!r} where a comma should be")

    def _finish_array(self) -> None:
        if not self._peek():
            raise self._damage("the file ends inside of the array")
        self._position += 1
        if self._peek():
            raise self._damage("something follows the end of the array")

    def _read_value(self) -> Any:
        self._number += 1
        while True:
            try:
                value, end = _DECODER.raw_decode(self._buffer, self._position)
            except json.JSONDecodeError as error:
                is_cut = error.msg.startswith("Unterminated string")
                is_cut = is_cut or error.pos >= len(self._buffer) - _LONGEST_LITERAL
                if not is_cut or not self._fill():
                    raise self._damage(error.msg) from error
            except (ValueError, RecursionError) as error:
                raise self._damage(str(error)) from error
            else:
                if end < len(self._buffer) or not self._fill():  # else a number may go on
                    self._check_depth(value)
                    self._spans_lines = "\n" in self._buffer[self._position : end]
                    self._position = end
                    return value

    def _check_depth(self, value: Any) -> None:
        try:
            check_depth(value)
        except ValueError as error:
            raise self._damage(str(error)) from error

    def _peek(self, space: re.Pattern[str] = _JSON_SPACE) -> str:
        """The next character that is not white space; empty at the end."""
        while True:
            self._position = space.match(self._buffer, self._position).end()  # type: ignore[union-attr]
            if self._position < len(self._buffer):
                return self._buffer[self._position]
            if not self._fill():
                return ""

    def _fill(self) -> bool:
        """Read as much again as is waiting; whether there was anything."""
        waiting = self._buffer[self._position :]
        check_size(len(waiting))
        chunk = self._stream.read(max(_CHUNK_BYTES, len(waiting)))
        more = self._decoder.decode(chunk, final=not chunk)
        self._buffer, self._position = waiting + more, 0
        return bool(chunk) or bool(more)

    def _damage(self, problem: str) -> DamagedFileError:
        return DamagedFileError(f"not JSON at row {max(1, self._number)}: {problem}")


def read_csv(stream: BinaryIO, key: str, delimiter: str) -> Iterator[Row]:
    """The rows below the header of a CSV file; quoted fields may hold line ends.

    Raises:
        DamagedFileError: If a quote is not closed or not followed by a delimiter: where the next
            row begins is then not known.
    """
    # 131072 characters are no document. The limit is that of all readers, which take turns: it
    # is not restored.
    csv.field_size_limit(MAX_DOCUMENT_BYTES)
    try:
        reader = csv.reader(decoded_lines(stream), delimiter=delimiter, strict=True)
        header = next(fields for fields in reader if fields)
        column = header.index(key)
        for fields in reader:
            if not fields:
                continue
            text: str | RowError
            if len(fields) == len(header):
                text = check_text(fields[column], key)
            else:
                text = RowError(f"{len(fields)} fields, but the header has {len(header)}")
            yield f"line {reader.line_num}", reader.line_num, text
    except csv.Error as error:
        raise DamagedFileError(f"not CSV up to line {reader.line_num}: {error}") from error


def find_delimiter(stream: BinaryIO, key: str, delimiters: str) -> tuple[str | None, list[str]]:
    """The delimiter by which the header of a CSV file has the key.

    Args:
        stream: The file.
        key: Name of the column that holds the text.
        delimiters: Those to try.

    Returns:
        The delimiter, None if none gives the key, and the columns by it or by the first one.
    """
    line = next((line for line in read_lines(stream) if line.strip()), b"")
    headers = {}
    for delimiter in delimiters:
        try:
            headers[delimiter] = next(
                csv.reader([line.decode("utf-8", "surrogateescape")], delimiter=delimiter), []
            )
        except csv.Error:
            continue
        if headers[delimiter].count(key) == 1:
            return delimiter, headers[delimiter]
    return None, max(headers.values(), key=len, default=[])


def decoded_lines(stream: BinaryIO) -> Iterator[str]:
    """Lines as text; what is not UTF-8 is found in the row that has it."""
    return (line.decode("utf-8", "surrogateescape") for line in read_lines(stream))
