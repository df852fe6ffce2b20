"""Rows of parquet, Arrow and Feather files: their text, found by the name of a column."""

import contextlib
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

from trinity_megatron.data.rows import Row, RowError, check_text, shorten
from trinity_megatron.data.streams import DamagedFileError, StoredFile

ARROW_FILE_MAGIC = b"ARROW1\0\0"
ARROW_STREAM_MAGIC = b"\xff\xff\xff\xff"
PARQUET_MAGIC = b"PAR1"
_END_OF_STREAM = ARROW_STREAM_MAGIC + bytes(4)
# Rows that are unpacked together: a file of a kilobyte may hold rows of a gigabyte each.
_BATCH_ROWS = 8


class MissingColumnError(ValueError):
    """A table without the column that should hold the text."""


def count_parquet_rows(path: StoredFile, key: str) -> int:
    """Number of rows of a parquet file, from its footer.

    Raises:
        MissingColumnError: If there is no such column.
        DamagedFileError: If the footer cannot be read.
    """
    with _opened_parquet(path) as table:
        _find_column(table.schema_arrow, key)
        return table.metadata.num_rows


def read_parquet(
    path: StoredFile, key: str, first: int = 0, end: int | None = None
) -> Iterator[Row]:
    """The rows of a parquet file, a few pages of one column in memory at a time.

    Args:
        path: The file.
        key: Name of the column.
        first: Row at which to begin, counted from 0.
        end: Row before which to end; None for that of the file.

    Raises:
        MissingColumnError: If there is no such column.
        DamagedFileError: If the file cannot be read.
    """
    with _opened_parquet(path) as table:
        column = _find_column(table.schema_arrow, key)
        begin, groups = _find_groups(table, first, end)
        batches = table.iter_batches(
            batch_size=_BATCH_ROWS, columns=[".".join(column)], row_groups=groups
        )
        rows = _read_batches(_cut(batches, first - begin, end and end - begin), column, key, first)
        yield from rows


@contextlib.contextmanager
def _opened_parquet(path: StoredFile) -> Iterator[Any]:
    import pyarrow.parquet  # here, for it takes longer than all the rest

    with _named_damage("parquet"), path.open("rb") as stream:
        # The defaults keep whole row groups in memory, and do not look at checksums.
        yield pyarrow.parquet.ParquetFile(
            stream, pre_buffer=False, buffer_size=2**20, page_checksum_verification=True
        )


def _find_groups(table: Any, first: int, end: int | None) -> tuple[int, list[int]]:
    """The first row of the row groups that hold some rows, and these groups."""
    position, begin = 0, 0
    groups: list[int] = []
    for group in range(table.num_row_groups):
        after = position + table.metadata.row_group(group).num_rows
        if after > first and (end is None or position < end):
            begin = begin if groups else position
            groups.append(group)
        position = after
    return begin, groups


def _cut(batches: Any, first: int, end: int | None) -> Iterator[Any]:
    """The rows from ``first`` to before ``end`` of some batches."""
    position = 0
    for batch in batches:
        start, position = position, position + batch.num_rows
        if position > first:
            skipped = max(0, first - start)
            length = None if end is None else min(end, position) - start - skipped
            yield batch.slice(skipped, length)
        if end is not None and position >= end:
            return


def read_arrow_file(path: StoredFile, key: str) -> Iterator[Row]:
    """The rows of an Arrow file (Feather version 2).

    Raises:
        MissingColumnError: If there is no such column.
        DamagedFileError: If the file cannot be read.
    """
    import pyarrow.ipc

    _check_is_local(path)
    with _named_damage("Arrow"), pyarrow.memory_map(str(path)) as source:
        reader = pyarrow.ipc.open_file(source)
        column = _find_column(reader.schema, key)
        batches = (reader.get_batch(index) for index in range(reader.num_record_batches))
        yield from _read_batches(batches, column, key)


def read_arrow_stream(path: StoredFile, key: str) -> Iterator[Row]:
    """The rows of an Arrow stream, as `datasets` writes it.

    Raises:
        MissingColumnError: If there is no such column.
        DamagedFileError: If the file cannot be read, or its end is missing.
    """
    import pyarrow.ipc

    _check_is_local(path)
    _check_end_of_stream(path)
    with _named_damage("Arrow"), pyarrow.memory_map(str(path)) as source:
        reader = pyarrow.ipc.open_stream(source)
        yield from _read_batches(reader, _find_column(reader.schema, key), key)


def read_rows(kind: str, path: StoredFile, columns: Sequence[str]) -> Iterator[dict[str, Any]]:
    """The rows of a file with several columns, without the fields that are null.

    Args:
        kind: ``parquet``, ``arrow_file`` or ``arrow_stream``.
        path: The file.
        columns: Names of columns; all but the first may be missing.

    Raises:
        MissingColumnError: If there is no column of the first name.
        DamagedFileError: If the file cannot be read.
    """
    import pyarrow.ipc
    import pyarrow.parquet

    if kind == "parquet":
        with _opened_parquet(path) as table:
            names = _present(table.schema_arrow, columns)
            yield from _rows_of(table.iter_batches(batch_size=_BATCH_ROWS, columns=names), names)
        return
    if kind == "arrow_stream":
        _check_end_of_stream(path)
    with _named_damage("Arrow"), pyarrow.memory_map(str(path)) as source:
        if kind == "arrow_stream":
            reader = pyarrow.ipc.open_stream(source)
            yield from _rows_of(reader, _present(reader.schema, columns))
            return
        file = pyarrow.ipc.open_file(source)
        batches = (file.get_batch(index) for index in range(file.num_record_batches))
        yield from _rows_of(batches, _present(file.schema, columns))


def _check_end_of_stream(path: StoredFile) -> None:
    """A stream that is cut between two batches reads like a whole one."""
    with path.open("rb") as stream:
        stream.seek(-min(len(_END_OF_STREAM), path.stat().st_size), 2)
        if stream.read() != _END_OF_STREAM:
            raise DamagedFileError("an Arrow stream without its end: it is cut off")


def _present(schema: Any, columns: Sequence[str]) -> list[str]:
    if columns[0] not in schema.names:
        raise MissingColumnError(
            f"has no column {columns[0]!r}, only {shorten(schema.names) or 'none at all'}; name "
            "the right one with --text-key"
        )
    return [name for name in columns if name in schema.names]


def _rows_of(batches: Iterable[Any], names: Sequence[str]) -> Iterator[dict[str, Any]]:
    for batch in batches:
        for row in batch.select(names).to_pylist():
            yield _without_nulls(row)


def _without_nulls(value: Any) -> Any:
    """Structs of a column have the same fields in every row; those of other rows are null."""
    if isinstance(value, dict):
        return {name: _without_nulls(item) for name, item in value.items() if item is not None}
    return [_without_nulls(item) for item in value] if isinstance(value, list) else value


@contextlib.contextmanager
def _named_damage(kind: str) -> Iterator[None]:
    import pyarrow

    try:
        yield
    except (pyarrow.ArrowException, OSError) as error:
        reason = str(error) or type(error).__name__
        raise DamagedFileError(f"not a {kind} file that can be read: {reason}") from error


def _check_is_local(path: StoredFile) -> None:
    if not isinstance(path, Path):
        raise DamagedFileError("an Arrow file, which is read on a file system, not at an address")


def _find_column(schema: Any, key: str) -> list[str]:
    """The names that lead to a column: that of a field, or of fields inside of structs."""
    path = _find_path(list(schema), key)
    if path is None:
        names = shorten(list(_list_columns(list(schema), "")))
        raise MissingColumnError(
            f"has no column {key!r}, only {names or 'none at all'}; name the one that holds the "
            "text with --text-key"
        )
    return path


def _find_path(fields: list[Any], key: str) -> list[str] | None:
    for field in fields:
        if field.name == key:
            return [key]
    for field in fields:
        if key.startswith(f"{field.name}.") and _is_struct(field):
            inner = _find_path(list(field.type), key[len(field.name) + 1 :])
            if inner is not None:
                return [field.name, *inner]
    return None


def _list_columns(fields: list[Any], prefix: str) -> Iterator[str]:
    for field in fields:
        if _is_struct(field) and field.type.num_fields:
            yield from _list_columns(list(field.type), f"{prefix}{field.name}.")
        else:
            yield f"{prefix}{field.name}"


def _is_struct(field: Any) -> bool:
    import pyarrow

    return pyarrow.types.is_struct(field.type)


def _read_batches(batches: Any, path: list[str], key: str, number: int = 0) -> Iterator[Row]:
    from pyarrow import compute

    for batch in batches:
        column = batch.column(path[0])
        for name in path[1:]:
            column = compute.struct_field(column, name)
        for value in column:
            number += 1
            yield f"row {number}", number, _get_text(value, key)


def _get_text(value: Any, key: str) -> str | RowError:
    try:
        text = value.as_py()
        if isinstance(text, bytes):  # a column of strings by a writer that did not say so
            text = text.decode("utf-8")
    except UnicodeDecodeError as error:
        return RowError(f"{key!r} is not UTF-8 text: {error.reason} at byte {error.start}")
    return check_text(text, key)
