"""The files of a corpus: which belong to it, in which order, and what they hold."""

import contextlib
import os
import stat
import sysconfig
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

from trinity_megatron.data import tables
from trinity_megatron.data.formats import Format, ReadOptions, recognize
from trinity_megatron.data.saved_datasets import find_not_data
from trinity_megatron.data.streams import DamagedFileError, StoredFile
from trinity_megatron.errors import UserError

# Left out of the standard library: what is not part of it, its tests, which not every Python ships,
# and pydoc_data, one generated document that would be most of the validation split.
_STDLIB_EXCLUDED = {"site-packages", "dist-packages", "test", "tests", "idle_test", "pydoc_data"}


_DEFAULTS = ReadOptions()
# Text is what JSON and CSV files without the key are, unless there is more of them than this.
_MAX_ODD_SHARE = 0.5


@dataclass(frozen=True)
class SourceFile:
    """A file that belongs to the corpus, as it was found.

    Attributes:
        name: The folder's (or ``stdlib``) and the relative name; independent of where it lies.
        path: Where it lies.
        is_explicit: Whether it was named itself; then it must be readable text.
        num_bytes: Its size.
        modified_ns: Its modification time in nanoseconds.
        format: What it holds.
    """

    name: str
    path: StoredFile
    is_explicit: bool
    num_bytes: int
    modified_ns: int
    format: Format = Format()


@dataclass(frozen=True)
class Skipped:
    """A file, folder or row that is not part of the corpus, and why.

    Attributes:
        name: Its name; that of a row is the file's and a number.
        reason: A kind of reason and, after a colon, details.
        row_of: Name of the file whose row it is.
        num_bytes: Size of a file.
        could_be_text: Whether the file may hold text that was meant to be read.
        is_source_file: Whether it was found as a file that should be read.
    """

    name: str
    reason: str
    row_of: str | None = None
    num_bytes: int = 0
    could_be_text: bool = False
    is_source_file: bool = False


def find_files(
    sources: Sequence[Path],
    *,
    exclude: Path | None = None,
    options: ReadOptions = _DEFAULTS,
) -> tuple[list[SourceFile], list[Skipped]]:
    """Find the files of a corpus, in an order that does not depend on the machine.

    Args:
        sources: Files and folders; folders are read with everything below them. Without any,
            the modules of the running Python's standard library.
        exclude: A folder that is never read: the one that is being written.
        options: How documents are found in files.

    Returns:
        The files sorted by name, and what was left out of the folders.

    Raises:
        UserError: If a source does not exist, is not a file or folder, is given twice, or the
            sources hold no file; if a file that was named itself is neither text nor rows; or if
            most of the files are JSON or CSV without the key of the text.
    """
    if not sources:
        library = _standard_library()
        _check_options(library, options)
        return library, []
    files: list[SourceFile] = []
    skipped: list[Skipped] = []
    for source in map(Path, sources):
        found = list(_find_in_source(source, exclude))
        files.extend(entry for entry in found if isinstance(entry, SourceFile))
        skipped.extend(entry for entry in found if isinstance(entry, Skipped))
    _check_distinct(files)
    if not files:
        raise UserError(
            f"source {_listed(sources)} holds no readable file ({len(skipped)} left out); "
            "name text, source code, JSON, CSV, parquet or Arrow files, or folders of them"
        )
    return recognize_files(files, options), skipped


def recognize_files(
    files: Sequence[SourceFile],
    options: ReadOptions,
    apply: Callable[..., Iterable[SourceFile]] = map,
) -> list[SourceFile]:
    """Decide what each file of a corpus holds.

    Args:
        files: As they were found.
        options: How documents are found in files.
        apply: As the built-in ``map``: that of several threads where a look takes long.

    Returns:
        The files sorted by name.

    Raises:
        UserError: A file that was named itself is neither text nor rows, or most of the files are
            JSON or CSV without the key of the text.
    """
    found = list(apply(partial(_recognized, options=options), files))
    found = _settle_odd_files(found)
    _check_options(found, options)
    return sorted(found, key=lambda file: (file.name, str(file.path)))


def _standard_library() -> list[SourceFile]:
    root = Path(sysconfig.get_paths()["stdlib"])
    files = []
    for folder, subfolders, names in os.walk(root):
        subfolders[:] = sorted(name for name in subfolders if name not in _STDLIB_EXCLUDED)
        for path in (Path(folder, name) for name in names if name.endswith(".py")):
            name = f"stdlib/{path.relative_to(root).as_posix()}"
            files.append(_source_file(name, path, is_explicit=False))
    if not files:
        raise UserError(
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
        raise UserError(f"source {source} is neither a file nor a folder; name one of these")
    else:
        raise UserError(f"source {source} does not exist; name an existing file or folder")


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
        not_data = find_not_data(here, names, subfolders)
        for name in names:
            reason = not_data.get(name) or _file_left_out(here / name)
            if reason is not None:
                yield _skipped_file(f"{label}/{name}", here / name, reason)
            else:
                yield _source_file(f"{label}/{name}", here / name, is_explicit=False)
    for error in unreadable:
        yield Skipped(str(error.filename), f"unreadable: {error.strerror or error}")


def _skipped_file(name: str, path: Path, reason: str) -> Skipped:
    could_be_text = reason.startswith("unreadable")
    num_bytes = path.stat().st_size if could_be_text and path.exists() else 0
    return Skipped(name, reason, num_bytes=num_bytes, could_be_text=could_be_text)


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
        return f"unreadable: {error.strerror or error}"
    if not stat.S_ISREG(mode):
        return "not a regular file"
    return None if os.access(path, os.R_OK) else "unreadable: permission denied"


def _source_file(name: str, path: Path, *, is_explicit: bool) -> SourceFile:
    status = path.stat()
    return SourceFile(name, path, is_explicit, status.st_size, status.st_mtime_ns)


def _check_distinct(files: Sequence[SourceFile]) -> None:
    seen: set[str] = set()
    for file in files:
        path = os.path.abspath(str(file.path))
        if path in seen:
            raise UserError(
                f"source: {file.path} is named twice, itself or through a folder that holds it; "
                "name it once"
            )
        seen.add(path)


def _recognized(file: SourceFile, options: ReadOptions) -> SourceFile:
    with naming(file.path):
        found = recognize(file.path, options)
    if file.is_explicit and found.kind == "unread":
        raise UserError(describe_not_text(file.path, found.reason))
    if file.is_explicit and found.reason:
        raise UserError(f"source {file.path} is {found.reason}; {_ODD_REMEDY}")
    return replace(file, format=found)


_ODD_REMEDY = (
    "name the field that holds the text with --text-key, or read JSON and CSV as the text they "
    "are, as in a corpus of code, with --plain-text"
)


def _check_options(files: Sequence[SourceFile], options: ReadOptions) -> None:
    """Refuse options that have no effect on any file."""
    kinds = {file.format.kind for file in files}
    if options.text_key != _DEFAULTS.text_key and kinds <= {"text", "unread"}:
        odd = next((file for file in files if file.format.reason), None)
        what = "" if odd is None else f"; {odd.path} is {odd.format.reason}"
        raise UserError(
            f"text_key {options.text_key!r}: no source has rows with such a field{what}; correct "
            "--text-key, or leave it out"
        )
    if options.split_on is not None and "text" not in kinds:
        raise UserError(
            f"split_on {options.split_on!r}: no source is a text file; leave out --split-on"
        )


def _settle_odd_files(files: list[SourceFile]) -> list[SourceFile]:
    """Decide about JSON and CSV files without the key: settings among code, or data."""
    texts = [file for file in files if file.format.kind == "text"]
    odd = [file for file in texts if file.format.reason]
    if not odd:
        return files
    if all(file.format.kind in ("text", "unread") for file in files):
        num_bytes = sum(file.num_bytes for file in odd)
        share = num_bytes / max(1, sum(file.num_bytes for file in texts))
        if share <= _MAX_ODD_SHARE:
            return files
        first = min(odd, key=lambda file: file.name)
        raise UserError(
            f"{len(odd)} files with {share:.0%} of the bytes are JSON or CSV without rows of text; "
            f"the first, {first.path}, is {first.format.reason}; {_ODD_REMEDY}"
        )
    return [replace(file, format=_unread(file.format)) if file in odd else file for file in files]


def _unread(found: Format) -> Format:
    """A JSON or CSV file without the key beside others that have it."""
    return replace(
        found,
        kind="unread",
        reason=f"JSON or CSV without rows of text: {found.reason}",
        could_be_text=True,
        is_as_before=False,
    )


def describe_not_text(path: StoredFile, reason: str) -> str:
    """The error of a file that was named itself and is not text."""
    return (
        f"source {path} is not UTF-8 text ({reason}); unpack it or convert it to UTF-8, or leave "
        "it out"
    )


@contextlib.contextmanager
def naming(path: StoredFile) -> Iterator[None]:
    """Name the file in what is wrong with it."""
    try:
        yield
    except DamagedFileError as error:
        raise UserError(f"source {path} is {error}; correct it, or leave it out") from error
    except tables.MissingColumnError as error:
        raise UserError(f"source {path} {error}") from error
    except OSError as error:
        raise UserError(describe_unreadable(path, error)) from error


def describe_unreadable(path: StoredFile, error: OSError) -> str:
    """The error of a file that the system does not let us read."""
    if "too much memory" in str(error):  # zstd --long
        error = OSError(f"{error}: a window over 128 MiB, compress it again without --long")
    return f"source {path} cannot be read ({error.strerror or error}); correct it, or leave it out"


def _listed(values: Sequence[object]) -> str:
    return ", ".join(str(value) for value in values)
