"""torch's ``FileSystemReader`` with read-ahead and checksums."""

import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import serialization
from torch.distributed.checkpoint import FileSystemReader
from torch.distributed.checkpoint.filesystem import FileSystem, _StorageInfo
from torch.distributed.checkpoint.metadata import Metadata

from trinity_megatron.checkpoint.integrity.checks import Checks
from trinity_megatron.checkpoint.integrity.checksums import Window
from trinity_megatron.checkpoint.integrity.direct_read import find_target, load_over
from trinity_megatron.checkpoint.integrity.metadata import read_metadata
from trinity_megatron.checkpoint.integrity.read_ahead import ReadAhead, Request
from trinity_megatron.checkpoint.integrity.safe_pickle import BadCheckpoint


def reading_ahead(
    read_data: Callable[..., Any],
    get_checks: Callable[[Any], Checks],
    *,
    to_targets: bool = False,
) -> Callable[..., Any]:
    """Wrap ``FileSystemReader.read_data``: read ahead and verify checksums.

    Args:
        read_data: torch's method.
        get_checks: Returns the settings of the integrity checks of a reader.
        to_targets: Read tensors straight into those that are loaded; needs :func:`load_in_place`.
    """

    def read(self: Any, plan: Any, planner: Any) -> Any:
        if not isinstance(self.fs, FileSystem):  # not a local file system
            return read_data(self, plan, planner)
        by_file: dict[str, list[Request]] = {}
        for item in plan.items:  # torch reads file by file
            info = self.storage_data[item.storage_index]
            target = find_target(planner, item) if to_targets else None
            by_file.setdefault(info.relative_path, []).append(Request(info, target))
        requests = [request for places in by_file.values() for request in places]
        # By thread: an export reads in two, and the buffers of one are not for the other.
        aheads = vars(self).setdefault("read_aheads", {})
        with ReadAhead(Path(self.path), requests, get_checks(self)) as ahead:
            aheads[threading.get_ident()] = ahead
            try:
                return read_data(self, plan, planner)
            except BadCheckpoint as error:
                raise BadCheckpoint(ahead.locate(error)) from error
            finally:
                del aheads[threading.get_ident()]

    return read


def load_in_place(load: Callable[..., Any]) -> Callable[..., Any]:
    """Wrap ``torch.load``: tensors share the memory of an item that was read ahead, without a copy.

    A tensor that was read to its target is returned as it is; when torch copies it to itself,
    ``copy_`` does nothing.

    Args:
        load: ``torch.load``; called for every other argument.
    """

    def load_tensor(f: Any, *args: Any, **kwargs: Any) -> Any:
        if not isinstance(f, Window):
            return load(f, *args, **kwargs)
        if f.tensor is not None:
            return f.tensor
        storage = torch.frombuffer(f.data, dtype=torch.uint8).untyped_storage()
        with serialization._open_zipfile_reader(f) as archive:  # type: ignore[arg-type]
            return load_over(archive, storage)

    return load_tensor


def slicing_checked(slice_file: Callable[..., Any]) -> Callable[..., Any]:
    """Wrap ``FileSystemReader._slice_file``: return the item that was read ahead.

    Args:
        slice_file: torch's method.
    """

    def take(self: Any, file: Any, info: _StorageInfo) -> Any:
        ahead = getattr(self, "read_aheads", {}).get(threading.get_ident())
        return slice_file(self, file, info) if ahead is None else ahead.take(info)

    return take


class CheckedReader(FileSystemReader):
    """torch's reader with checksums and an allow-list of classes for ``.metadata``.

    Args:
        path: Folder of the checkpoint.
        checks: Settings of the integrity checks.
    """

    def __init__(self, path: Path, checks: Checks) -> None:
        super().__init__(path)
        self.checks = checks

    read_data = reading_ahead(FileSystemReader.read_data, lambda reader: reader.checks)
    _slice_file = slicing_checked(FileSystemReader._slice_file)

    def read_metadata(self, *args: Any, **kwargs: Any) -> Metadata:
        """Read ``.metadata``; see :func:`.metadata.read_metadata`."""
        path = Path(self.path) / ".metadata"
        return read_metadata(path.read_bytes(), path, self.checks)
