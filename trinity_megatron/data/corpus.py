"""The documents of a corpus: which files belong to it, in which order, and their text."""

import hashlib
import json
import os
import stat
import sysconfig
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

TEXT_FIELD = "text"

_ROW_SUFFIXES = (".jsonl", ".parquet")
# Left out of the standard library: what is not part of it, its tests, which not every Python ships,
# and pydoc_data, one generated document that would be most of the validation split.
_STDLIB_EXCLUDED = {"site-packages", "dist-packages", "test", "tests", "idle_test", "pydoc_data"}


@dataclass(frozen=True)
class SourceFile:
    """A file that belongs to the corpus, as it was found.

    Attributes:
        name: The folder's (or ``stdlib``) and the relative name; independent of where it lies.
        path: Where it lies.
        is_explicit: Whether it was named itself; then it must be readable text.
        num_bytes: Its size.
        modified_ns: Its modification time in nanoseconds.
    """

    name: str
    path: Path
    is_explicit: bool
    num_bytes: int
    modified_ns: int


@dataclass(frozen=True)
class Skipped:
    """A file, folder or row that is not part of the corpus, and why."""

    name: str
    reason: str


@dataclass(frozen=True)
class Document:
    """One document: a text file, or one row of a ``.jsonl`` or ``.parquet`` file."""

    name: str
    text: str


def find_files(
    sources: Sequence[Path], *, exclude: Path | None = None
) -> tuple[list[SourceFile], list[Skipped]]:
    """Find the files of a corpus, in an order that does not depend on the machine.

    Args:
        sources: Files and folders; folders are read with everything below them. Without any,
            the modules of the running Python's standard library.
        exclude: A folder that is never read: the one that is being written.

    Returns:
        The files sorted by name, and what was left out of the folders.

    Raises:
        ValueError: If a source does not exist, is not a file or folder, is given twice, or the
            sources hold no file.
    """
    if not sources:
        return _standard_library(), []
    files: list[SourceFile] = []
    skipped: list[Skipped] = []
    for source in map(Path, sources):
        found = list(_find_in_source(source, exclude))
        files.extend(entry for entry in found if isinstance(entry, SourceFile))
        skipped.extend(entry for entry in found if isinstance(entry, Skipped))
    _check_distinct(files)
    if not files:
        raise ValueError(
            f"source {_listed(sources)} holds no readable file ({len(skipped)} left out); "
            "name text, source code, .jsonl or .parquet files, or folders of them"
        )
    return sorted(files, key=lambda file: (file.name, file.path)), skipped


def hash_file(path: Path) -> str:
    """SHA-256 of a file's bytes, as hexadecimal digits.

    Raises:
        ValueError: If the file cannot be read.
    """
    try:
        with path.open("rb") as stream:
            return hashlib.file_digest(stream, "sha256").hexdigest()
    except OSError as error:
        raise ValueError(_unreadable(path, error)) from error


def is_unchanged(file: SourceFile) -> bool:
    """Whether the file still has the size and modification time with which it was found."""
    try:
        status = file.path.stat()
    except OSError:
        return False
    return (status.st_size, status.st_mtime_ns) == (file.num_bytes, file.modified_ns)


def read_documents(files: Sequence[SourceFile]) -> Iterator[Document | Skipped]:
    """Read the documents of all files in order.

    Yields:
        A document, or an entry for what holds none: an empty file or row, and, for a file found
        in a folder, one that is not UTF-8 text.

    Raises:
        ValueError: If a file that was named itself is not UTF-8 text, a file cannot be read, or a
            ``.jsonl`` or ``.parquet`` file does not hold rows with a ``text``.
    """
    readers = {".jsonl": _read_jsonl, ".parquet": _read_parquet}
    for file in files:
        reader = readers.get(file.path.suffix.lower(), _read_text)
        try:
            for entry in reader(file):
                if isinstance(entry, Document) and not entry.text:
                    yield Skipped(entry.name, "empty")
                else:
                    yield entry
        except OSError as error:
            raise ValueError(_unreadable(file.path, error)) from error


def _standard_library() -> list[SourceFile]:
    root = Path(sysconfig.get_paths()["stdlib"])
    files = []
    for folder, subfolders, names in os.walk(root):
        subfolders[:] = sorted(name for name in subfolders if name not in _STDLIB_EXCLUDED)
        for path in (Path(folder, name) for name in names if name.endswith(".py")):
            name = f"stdlib/{path.relative_to(root).as_posix()}"
            files.append(_source_file(name, path, is_explicit=False))
    if not files:
        raise ValueError(
            f"source: Python's standard library at {root} holds no .py file; name files or folders "
            "with --source"
        )
    return sorted(files, key=lambda file: file.name)


def _find_in_source(source: Path, exclude: Path | None) -> Iterator[SourceFile | Skipped]:
    if source.is_dir():
        yield from _walk(source, exclude)
    elif source.is_file():
        yield _source_file(source.name, source, is_explicit=True)
    elif source.exists():
        raise ValueError(f"source {source} is neither a file nor a folder; name one of these")
    else:
        raise ValueError(f"source {source} does not exist; name an existing file or folder")


def _walk(root: Path, exclude: Path | None) -> Iterator[SourceFile | Skipped]:
    prefix = root.resolve().name
    unreadable: list[OSError] = []
    for folder, subfolders, names in os.walk(root, onerror=unreadable.append):
        here = Path(folder)
        label = (Path(prefix) / here.relative_to(root)).as_posix()
        for name in list(subfolders):
            reason = _folder_left_out(here / name, exclude)
            if reason is not None:
                subfolders.remove(name)
                yield Skipped(f"{label}/{name}/", reason)
        for name in names:
            reason = _file_left_out(here / name)
            if reason is not None:
                yield Skipped(f"{label}/{name}", reason)
            else:
                yield _source_file(f"{label}/{name}", here / name, is_explicit=False)
    for error in unreadable:
        yield Skipped(str(error.filename), f"unreadable: {error.strerror}")


def _folder_left_out(folder: Path, exclude: Path | None) -> str | None:
    if folder.name.startswith(".") or folder.name == "__pycache__":
        return "hidden folder"
    if folder.is_symlink():
        return "link to a folder"
    if exclude is not None and folder.resolve() == exclude.resolve():
        return "the folder being written"
    return None


def _file_left_out(path: Path) -> str | None:
    if path.name.startswith("."):
        return "hidden file"
    try:
        mode = path.stat().st_mode
    except OSError as error:
        return f"unreadable: {error.strerror}"
    if not stat.S_ISREG(mode):
        return "not a regular file"
    return None if os.access(path, os.R_OK) else "unreadable: permission denied"


def _source_file(name: str, path: Path, *, is_explicit: bool) -> SourceFile:
    status = path.stat()
    return SourceFile(name, path, is_explicit, status.st_size, status.st_mtime_ns)


def _check_distinct(files: Sequence[SourceFile]) -> None:
    seen: set[str] = set()
    for file in files:
        path = os.path.abspath(file.path)
        if path in seen:
            raise ValueError(
                f"source: {file.path} is named twice, itself or through a folder that holds it; "
                "name it once"
            )
        seen.add(path)


def _read_text(file: SourceFile) -> Iterator[Document | Skipped]:
    content = file.path.read_bytes()
    reason = "binary: holds a NUL byte" if b"\0" in content else None
    if reason is None:
        try:
            yield Document(file.name, content.decode("utf-8"))
        except UnicodeDecodeError as error:
            reason = f"not UTF-8 text: {error.reason} at byte {error.start}"
    if reason is None:
        return
    if file.is_explicit:
        raise ValueError(
            f"source {file.path} is not UTF-8 text ({reason}); unpack it or convert it to "
            "UTF-8, or leave it out"
        )
    yield Skipped(file.name, reason)


def _read_jsonl(file: SourceFile) -> Iterator[Document | Skipped]:
    with file.path.open("rb") as stream:
        for number, line in enumerate(stream, start=1):
            if not line.strip():
                continue
            try:
                row = json.loads(line.decode("utf-8"))
            except (ValueError, RecursionError) as error:
                raise ValueError(
                    f"source {file.path}, line {number}: not a JSON row in UTF-8 ({error}); "
                    "correct the line, or leave the file out"
                ) from error
            if not isinstance(row, dict) or TEXT_FIELD not in row:
                raise ValueError(
                    f"source {file.path}, line {number}: no field {TEXT_FIELD!r}; every line must "
                    f'be an object such as {{"{TEXT_FIELD}": "..."}}'
                )
            yield Document(f"{file.name}:{number}", _row_text(file, number, row[TEXT_FIELD]))


def _read_parquet(file: SourceFile) -> Iterator[Document | Skipped]:
    import pyarrow.parquet  # here, for it takes longer than all the rest

    try:
        table = pyarrow.parquet.ParquetFile(file.path)
        if TEXT_FIELD not in table.schema_arrow.names:
            raise ValueError(
                f"source {file.path} has no column {TEXT_FIELD!r}, only "
                f"{_listed(table.schema_arrow.names)}; rename the column that holds the text"
            )
        number = 0
        for batch in table.iter_batches(batch_size=1024, columns=[TEXT_FIELD]):
            for value in batch.column(0):
                number += 1
                text = _row_text(file, number, value.as_py())
                yield Document(f"{file.name}:{number}", text)
    except (pyarrow.ArrowInvalid, UnicodeDecodeError) as error:
        raise ValueError(
            f"source {file.path} is not a parquet file with readable UTF-8 text ({error}); write "
            "it again, or leave it out"
        ) from error


def _row_text(file: SourceFile, number: int, value: Any) -> str:
    """The text of a row; empty for a null, which its reader then reports as skipped."""
    if value is None:
        return ""
    if not isinstance(value, str):
        raise ValueError(
            f"source {file.path}, row {number}: {TEXT_FIELD!r} is {type(value).__name__}, not a "
            "string; correct the row, or leave the file out"
        )
    try:
        value.encode("utf-8")
    except UnicodeEncodeError as error:
        raise ValueError(
            f"source {file.path}, row {number}: {TEXT_FIELD!r} holds half of a surrogate pair at "
            f"character {error.start}; correct the row, or leave the file out"
        ) from error
    return value


def _unreadable(path: Path, error: OSError) -> str:
    return f"source {path} cannot be read ({error.strerror}); correct it, or leave it out"


def _listed(values: Sequence[object]) -> str:
    return ", ".join(str(value) for value in values)
