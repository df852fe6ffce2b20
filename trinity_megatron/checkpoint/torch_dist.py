"""Reading and writing Megatron's ``torch_dist`` checkpoints, block by block, without a model.

The format is that of ``torch.distributed.checkpoint``, whose reader and writer do the work here.  A
conversion writes as if every part of it came from a rank of its own: a part is one file, and is
written again alone if the conversion is interrupted.
"""

import argparse
import errno
import io
import json
import os
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any

import torch
from megatron.core.dist_checkpointing.core import CONFIG_FNAME, CheckpointingConfig, save_config
from megatron.core.dist_checkpointing.strategies.common import COMMON_STATE_FNAME
from torch.distributed.checkpoint import FileSystemWriter
from torch.distributed.checkpoint.default_planner import (
    DefaultLoadPlanner,
    DefaultSavePlanner,
    create_default_global_save_plan,
)
from torch.distributed.checkpoint.filesystem import (
    FileSystem,
    _StorageInfo,
    _StorageWriterTransforms,
)
from torch.distributed.checkpoint.metadata import (
    ChunkStorageMetadata,
    Metadata,
    MetadataIndex,
    TensorProperties,
    TensorStorageMetadata,
)
from torch.distributed.checkpoint.planner import (
    LoadItemType,
    LoadPlan,
    ReadItem,
    SavePlan,
    TensorWriteData,
    WriteItem,
    WriteItemType,
)
from torch.distributed.checkpoint.storage import WriteResult

from trinity_megatron.checkpoint.integrity.checked_reader import (
    CheckedReader,
    Checks,
    MetadataPickle,
    ReadAhead,
    check_stays_inside,
)
from trinity_megatron.checkpoint.integrity.checksums import crc32, get_checksum, set_checksum
from trinity_megatron.checkpoint.integrity.safe_pickle import BadCheckpoint, safe_torch_load
from trinity_megatron.checkpoint.page_cache import WriteBehind, forget
from trinity_megatron.checkpoint.transforms import Shape
from trinity_megatron.errors import UserError
from trinity_megatron.upstream.registry import replaced

TRACKER_NAME = "latest_checkpointed_iteration.txt"
# Megatron's word for weights without optimizer and iteration.
RELEASE = "release"
_PATIENCE_SECONDS = 60
_COMMON_STATE = "common_state/shard_0_1"


@dataclass(frozen=True)
class Part:
    """What one Megatron tensor holds at one place: a shard that is stored, or is to be.

    Attributes:
        key: The tensor.
        start: Where the shard begins in the whole tensor.
        shape: Its size.
    """

    key: str
    start: Shape
    shape: Shape


def read_tracker(folder: Path) -> str | None:
    """What names the latest checkpoint: an iteration, `RELEASE`, or whatever a crash left.

    Args:
        folder: What ``--save`` was.

    Returns:
        The word; None where there is no such file.
    """
    tracker = folder / TRACKER_NAME
    return tracker.read_text(errors="replace").strip() if tracker.is_file() else None


def iteration_name(step: int) -> str:
    """Name of the folder of an iteration."""
    return f"iter_{step:07d}"


def find_checkpoint(folder: Path) -> Path:
    """The folder of the latest checkpoint.

    Args:
        folder: What ``--save`` was, or the folder of one iteration.

    Raises:
        UserError: There is none, or it is of another format.
    """
    if (folder / ".metadata").is_file():
        return folder
    tracker, word = folder / TRACKER_NAME, read_tracker(folder)
    if word is None:
        raise UserError(
            f"{folder} holds no Megatron checkpoint: it has no {TRACKER_NAME}. Remedy: give the "
            "folder of --save (for a run made with --out: OUT/checkpoints)."
        )
    name = word if word == RELEASE else iteration_name(int(word)) if word.isdigit() else None
    if name is None:
        raise UserError(
            f"{tracker} says {word!r}, which is neither an iteration nor {RELEASE!r}. Remedy: "
            "write the number of a complete iteration into it."
        )
    found = folder / name
    if not (found / ".metadata").is_file():
        raise UserError(
            f"{found} is no complete torch_dist checkpoint: it has no .metadata. Remedy: save with "
            "--ckpt-format torch_dist, or name a complete iteration in " + str(tracker) + "."
        )
    return found


def find_whole(folder: Path, *, other_than: Path) -> int | None:
    """The newest iteration whose checkpoint is complete and has its checksums.

    Not all are compared where that takes more than a minute.

    Args:
        folder: What ``--save`` was.
        other_than: Folder of an iteration that is left out.
    """
    end = time.monotonic() + _PATIENCE_SECONDS
    for path in sorted(folder.glob("iter_*"), reverse=True):
        if path.name[5:].isdigit() and path.resolve() != other_than.resolve():
            try:
                TorchDistReader(path, Checks(quiet=True)).check_all(lambda: time.monotonic() > end)
            except (ValueError, OSError):
                continue
            return int(path.name[5:])
    return None


def advise_other(folder: Path) -> str:
    """Words that name a whole checkpoint beside a damaged one; empty if there is none.

    Args:
        folder: Of the damaged iteration.
    """
    step = find_whole(folder.parent, other_than=folder)
    return (
        "" if step is None else f" Or take the whole one, {folder.parent / iteration_name(step)}."
    )


class TorchDistReader:
    """The model tensors of a checkpoint.

    Attributes:
        folder: Folder of one iteration.
        common: What is not a tensor: the arguments of the run, the iteration.

    Args:
        folder: What ``--save`` was, or the folder of one iteration.
        checks: Whether checksums are compared.

    Raises:
        UserError: The checkpoint is damaged, or a file of it is missing or truncated, or it names
            what no checkpoint holds.
    """

    def __init__(self, folder: Path, checks: Checks | None = None) -> None:
        self.folder = find_checkpoint(folder)
        self._checks = checks or Checks()
        self._reader = CheckedReader(self.folder, self._checks)
        self._reader.fs = _StreamingFileSystem()
        self._metadata: Metadata = self._reader.read_metadata()
        self._reader.set_up_storage_reader(self._metadata, is_coordinator=True)
        self._check_files()
        _check_format(self.folder)
        self.common: dict[str, Any] = self._read_common_state()

    def _read_common_state(self) -> dict[str, Any]:
        load = safe_torch_load(torch.load, verify_checksums=self._checks.verify_checksums)
        legacy = self.folder / COMMON_STATE_FNAME
        if legacy.exists():
            check_stays_inside(self.folder, COMMON_STATE_FNAME)
            return load(legacy, map_location="cpu")
        info = self._metadata.storage_data.get(MetadataIndex(_COMMON_STATE))
        if info is None:
            raise UserError(
                f"{self.folder} is no torch_dist checkpoint of Megatron: it holds no common state. "
                "Remedy: save it with --ckpt-format torch_dist."
            )
        with ReadAhead(self.folder, [info], self._checks) as ahead:
            item = ahead.take(info)
            try:
                return load(item)[0]
            except BadCheckpoint as error:
                raise BadCheckpoint(f"{self.folder / info.relative_path}: {error}") from error
            except Exception as error:  # damaged bytes raise almost anything
                raise BadCheckpoint(
                    f"{self.folder / info.relative_path} is damaged: the common state cannot be "
                    f"read ({error}). Remedy: copy it again."
                ) from error

    def check_all(self, is_late: Callable[[], bool] = lambda: False) -> None:
        """Compare all checksums.

        Args:
            is_late: Says when to stop.

        Raises:
            BadCheckpoint: Names the first file that is damaged.
        """
        infos = list(self._metadata.storage_data.values())
        with ReadAhead(self.folder, infos, self._checks) as ahead:
            for info in infos:
                if is_late():
                    return
                ahead.take(info)

    def _check_files(self) -> None:
        ends: dict[str, int] = {}
        for info in self._metadata.storage_data.values():
            ends[info.relative_path] = max(
                ends.get(info.relative_path, 0), info.offset + info.length
            )
        for name, end in ends.items():
            check_stays_inside(self.folder, name)
            path = self.folder / name
            if not path.is_file():
                raise UserError(f"{path} is missing. Remedy: copy the whole checkpoint.")
            if not os.access(path, os.R_OK):
                raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), str(path))
            if path.stat().st_size < end:
                raise UserError(
                    f"{path} is truncated: {path.stat().st_size} of {end} bytes. Remedy: copy it "
                    "again."
                )

    @property
    def args(self) -> argparse.Namespace:
        """The arguments of the run that saved it.

        Raises:
            UserError: It was saved without.
        """
        args = self.common.get("args")
        if args is None:
            raise UserError(
                f"{self.folder} holds no arguments, so the model is not known. Remedy: save it "
                "with Megatron's own save_checkpoint()."
            )
        return args

    def model_tensors(self) -> dict[str, tuple[torch.dtype, Shape]]:
        """Dtype and whole shape of every tensor of the model (not of the optimizer)."""
        return {
            key: (item.properties.dtype, tuple(item.size))
            for key, item in self._metadata.state_dict_metadata.items()
            if isinstance(item, TensorStorageMetadata) and not key.startswith("optimizer.")
        }

    def parts(self, key: str) -> list[list[Part]]:
        """The stored shards of a tensor; those that are columns of the same rows in one list.

        Raises:
            UserError: The shards do not make up the whole tensor.
        """
        item = self._metadata.state_dict_metadata[key]
        assert isinstance(item, TensorStorageMetadata)
        rows: dict[tuple[Shape, Shape], list[Part]] = {}
        for chunk in item.chunks:
            part = Part(key, tuple(chunk.offsets), tuple(chunk.sizes))
            rows.setdefault((part.start[:-1], part.shape[:-1]), []).append(part)
        groups = [sorted(parts, key=lambda part: part.start[-1]) for parts in rows.values()]
        held = sum(prod(part.shape) for parts in groups for part in parts)
        whole = all(sum(part.shape[-1] for part in parts) == item.size[-1] for parts in groups)
        if held != prod(item.size) or not whole:
            raise UserError(
                f"{self.folder}: the shards of {key} hold {held} of {prod(item.size)} numbers. The "
                "checkpoint is not complete."
            )
        return sorted(groups, key=lambda parts: parts[0].start)

    def read(self, parts: Sequence[Part]) -> torch.Tensor:
        """Shards that are columns of the same rows, side by side; in their dtype.

        Raises:
            UserError: A shard is damaged.
        """
        item = self._metadata.state_dict_metadata[parts[0].key]
        assert isinstance(item, TensorStorageMetadata)
        width = sum(part.shape[-1] for part in parts)
        whole = torch.empty((*parts[0].shape[:-1], width), dtype=item.properties.dtype)
        at = 0
        for part in parts:
            target = whole.narrow(-1, at, part.shape[-1])
            at += part.shape[-1]
            place = MetadataIndex(part.key, torch.Size(part.start))
            zero, size = torch.Size((0,) * len(part.shape)), torch.Size(part.shape)
            request = ReadItem(LoadItemType.TENSOR, place, zero, place, zero, size)
            try:
                self._reader.read_data(LoadPlan([request]), _ReadInto(target))
            except OSError:
                raise
            except Exception as error:  # damaged bytes raise almost anything
                raise BadCheckpoint(
                    f"{self.folder}: the shard of {part.key} at {part.start} is damaged ({error})."
                    f"{advise_other(self.folder)}"
                ) from error
            info = self._metadata.storage_data[place]
            with (self.folder / info.relative_path).open("rb") as file:
                forget(file.fileno(), info.offset, info.length)
        return whole


def _check_format(folder: Path) -> None:
    """Check Megatron's own file, which names the format."""
    path = folder / CONFIG_FNAME
    try:
        content = json.loads(path.read_text())
        known = {"sharded_backend", "sharded_backend_version"}
        known |= {"common_backend", "common_backend_version"}  # of earlier versions
        is_whole = content["sharded_backend"] == "torch_dist" and content.keys() <= known
    except FileNotFoundError as error:
        raise UserError(f"{path} is missing. Remedy: copy the whole checkpoint.") from error
    except (ValueError, KeyError, TypeError, AttributeError):
        is_whole = False
    if not is_whole:
        raise BadCheckpoint(
            f"{path} is damaged, or names another format than torch_dist. Remedy: copy it again, "
            "or save with --ckpt-format torch_dist."
        )


class _ReadInto(DefaultLoadPlanner):
    """Has the reader put what it loads into one tensor."""

    def __init__(self, target: torch.Tensor) -> None:
        super().__init__()
        self._target = target

    def resolve_tensor(self, read_item: ReadItem) -> torch.Tensor:
        return self._target

    def commit_tensor(self, read_item: ReadItem, tensor: torch.Tensor) -> None:
        pass


Read = Callable[[Part], torch.Tensor]
# Where an item was written, as JSON.
Stored = list[Any]


class TorchDistWriter:
    """Writes a checkpoint of the model's tensors.

    Args:
        folder: Folder of one iteration.
        tensors: Dtype and whole shape of every tensor.
        parts: What to write, cut into files.
        common: What is not a tensor.
        extra_state: Keys of Megatron's (empty) extra state objects.
    """

    def __init__(
        self,
        folder: Path,
        tensors: dict[str, tuple[torch.dtype, Shape]],
        parts: Sequence[Sequence[Part]],
        *,
        common: dict[str, Any],
        extra_state: Sequence[str],
    ) -> None:
        self._folder = folder
        self._objects = {_COMMON_STATE: common, **{f"{k}/shard_0_1": None for k in extra_state}}
        plans = [
            SavePlan([_write_item(part, *tensors[part.key]) for part in file]) for file in parts
        ]
        objects = [WriteItem(MetadataIndex(key), WriteItemType.BYTE_IO) for key in self._objects]
        plans.append(SavePlan(objects))
        plans, self._metadata = create_default_global_save_plan(plans)
        self._plans = self._writer().prepare_global_plan(plans)

    def _writer(self) -> FileSystemWriter:
        # Nothing is copied ahead: what a part is read into is used again for the next one.
        writer = FileSystemWriter(
            self._folder, single_file_per_rank=True, sync_files=True, per_thread_copy_ahead=0
        )
        writer.fs = _StreamingFileSystem()
        return writer

    def _write(self, plan: SavePlan, planner: "_Resolve") -> list[WriteResult]:
        writer = self._writer()
        writer.transforms = checksums = _SumWhileWriting()
        results = writer.write_data(plan, planner).value()
        for result in results:
            set_checksum(result.storage_data, checksums.found[result.index])
        return results

    def write(self, file: int, read: Read) -> list[Stored]:
        """Write one file and wait until it is on the disk.

        Args:
            file: Index into ``parts``.
            read: Gives the numbers of a part; called once for each.

        Returns:
            What :meth:`finish` wants of every file; can be written as JSON.
        """
        return [_to_json(result) for result in self._write(self._plans[file], _Resolve(read))]

    def finish(self, results: Sequence[list[Stored]]) -> None:
        """Write what is not a tensor and, last, the metadata."""

        def serialise(item: WriteItem) -> io.BytesIO:
            stream = io.BytesIO()
            torch.save([self._objects[item.index.fqn]], stream)
            return stream

        objects = self._write(self._plans[-1], _Resolve(objects=serialise))
        save_config(CheckpointingConfig("torch_dist", 1), str(self._folder))
        tensors = [[_from_json(stored) for stored in file] for file in results]
        with replaced(
            "torch.distributed.checkpoint.filesystem:pickle",
            lambda before: MetadataPickle(Checks()),
        ):
            self._writer().finish(self._metadata, [*tensors, objects])


def _to_json(result: WriteResult) -> Stored:
    index, info = result.index, result.storage_data
    place = [info.relative_path, info.offset, info.length, get_checksum(info)]
    return [index.fqn, list(index.offset or ()), index.index, result.size_in_bytes, *place]


def _from_json(stored: Stored) -> WriteResult:
    name, offset, number, size, file, start, length, checksum = stored
    info = _StorageInfo(file, start, length)
    set_checksum(info, checksum)
    return WriteResult(MetadataIndex(name, torch.Size(offset), number), size, info)


class _SumWhileWriting(_StorageWriterTransforms):
    """Adds up the CRC-32 of each item as it is written.

    Attributes:
        found: The checksums, by item.
    """

    def __init__(self) -> None:
        super().__init__()
        self.found: dict[MetadataIndex, int] = {}

    def transform_save_stream(self, write_item: WriteItem, raw_stream: Any) -> tuple[Any, list]:
        """A stream in front of torch's."""
        stream, descriptors = super().transform_save_stream(write_item, raw_stream)
        self.found[write_item.index] = 0
        return _SummedStream(stream, self.found, write_item.index), descriptors


class _SummedStream(io.RawIOBase):
    def __init__(self, stream: Any, found: dict[MetadataIndex, int], index: MetadataIndex) -> None:
        self._stream, self._found, self._index = stream, found, index

    def writable(self) -> bool:
        return True

    def write(self, data: Any, /) -> int:
        self._found[self._index] = crc32(data, self._found[self._index])
        return self._stream.write(data)

    def close(self) -> None:
        if not self.closed:
            self._stream.close()
        super().close()


class _StreamingFileSystem(FileSystem):
    """Opens files so that they do not fill the page cache."""

    @contextmanager
    def create_stream(self, path: str | os.PathLike, mode: str) -> Iterator[Any]:
        if mode != "wb":
            with open(path, mode, buffering=2**20) as stream:
                yield stream
            return
        with open(path, "wb", buffering=0) as raw, _WriteBehindStream(raw) as stream:
            yield stream


class _WriteBehindStream(io.BufferedWriter):
    def __init__(self, raw: io.FileIO) -> None:
        super().__init__(raw, buffer_size=2**20)
        self._behind = WriteBehind(self.fileno())

    def write(self, data: Any, /) -> int:
        written = super().write(data)
        self._behind.wrote(written)
        return written


def _write_item(part: Part, dtype: torch.dtype, shape: Shape) -> WriteItem:
    start = torch.Size(part.start)
    return WriteItem(
        MetadataIndex(part.key, start),
        WriteItemType.SHARD,
        tensor_data=TensorWriteData(
            chunk=ChunkStorageMetadata(start, torch.Size(part.shape)),
            properties=TensorProperties(dtype=dtype),
            size=torch.Size(shape),
        ),
    )


class _Resolve(DefaultSavePlanner):
    """Gives the writer its data when it asks for them."""

    def __init__(
        self, read: Read | None = None, *, objects: Callable[[WriteItem], io.BytesIO] | None = None
    ) -> None:
        super().__init__()
        self._read, self._serialise = read, objects

    def resolve_data(self, write_item: WriteItem) -> torch.Tensor | io.BytesIO:
        if write_item.type == WriteItemType.BYTE_IO:
            assert self._serialise is not None
            return self._serialise(write_item)
        assert self._read is not None and write_item.tensor_data is not None
        chunk = write_item.tensor_data.chunk
        return self._read(Part(write_item.index.fqn, tuple(chunk.offsets), tuple(chunk.sizes)))
