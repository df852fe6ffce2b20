"""Reading and writing Megatron's ``torch_dist`` checkpoints, block by block, without a model.

The format is that of ``torch.distributed.checkpoint``, whose reader and writer do the work here.  A
conversion writes as if every part of it came from a rank of its own: a part is one file, and is
written again alone if the conversion is interrupted.
"""

import argparse
import errno
import io
import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any

import torch
from megatron.core import dist_checkpointing
from megatron.core.dist_checkpointing.core import CheckpointingConfig, save_config
from torch.distributed.checkpoint import FileSystemReader, FileSystemWriter
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.default_planner import (
    DefaultLoadPlanner,
    DefaultSavePlanner,
    create_default_global_save_plan,
)
from torch.distributed.checkpoint.filesystem import FileSystem
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

from trinity_megatron.checkpoint.page_cache import WriteBehind, forget
from trinity_megatron.checkpoint.transforms import Shape

TRACKER_NAME = "latest_checkpointed_iteration.txt"
# Megatron's word for weights without optimizer and iteration.
RELEASE = "release"
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
        ValueError: There is none, or it is of another format.
    """
    if (folder / ".metadata").is_file():
        return folder
    tracker, word = folder / TRACKER_NAME, read_tracker(folder)
    if word is None:
        raise ValueError(
            f"{folder} holds no Megatron checkpoint: it has no {TRACKER_NAME}. Remedy: give the "
            "folder of --save (for a run made with --out: OUT/checkpoints)."
        )
    name = word if word == RELEASE else iteration_name(int(word)) if word.isdigit() else None
    if name is None:
        raise ValueError(
            f"{tracker} says {word!r}, which is neither an iteration nor {RELEASE!r}. Remedy: "
            "write the number of a complete iteration into it."
        )
    found = folder / name
    if not (found / ".metadata").is_file():
        raise ValueError(
            f"{found} is no complete torch_dist checkpoint: it has no .metadata. Remedy: save with "
            "--ckpt-format torch_dist, or name a complete iteration in " + str(tracker) + "."
        )
    return found


class TorchDistReader:
    """The model tensors of a checkpoint.

    Attributes:
        folder: Folder of one iteration.
        common: What is not a tensor: the arguments of the run, the iteration.

    Raises:
        ValueError: The checkpoint is damaged, or a file of it is missing or truncated.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = find_checkpoint(folder)
        self._reader = FileSystemReader(self.folder)
        self._reader.fs = _StreamingFileSystem()
        try:
            self._metadata: Metadata = self._reader.read_metadata()
        except PermissionError:
            raise
        except Exception as error:  # a damaged pickle raises almost anything
            raise ValueError(
                f"{self.folder}/.metadata is damaged ({error}). Remedy: copy it again."
            ) from error
        self._reader.set_up_storage_reader(self._metadata, is_coordinator=True)
        self._check_files()
        self.common: dict[str, Any] = self._read_common_state()

    def _read_common_state(self) -> dict[str, Any]:
        try:
            return dist_checkpointing.load_common_state_dict(str(self.folder))
        except (Exception, CheckpointException) as error:  # the latter is a BaseException
            reason = str(error).splitlines()[-1] if str(error) else type(error).__name__
            raise ValueError(
                f"{self.folder} is damaged, or no torch_dist checkpoint of Megatron ({reason}). "
                "Remedy: copy it again, or save it with --ckpt-format torch_dist."
            ) from error

    def _check_files(self) -> None:
        ends: dict[str, int] = {}
        for info in self._metadata.storage_data.values():
            ends[info.relative_path] = max(
                ends.get(info.relative_path, 0), info.offset + info.length
            )
        for name, end in ends.items():
            path = self.folder / name
            if not path.is_file():
                raise ValueError(f"{path} is missing. Remedy: copy the whole checkpoint.")
            if not os.access(path, os.R_OK):
                raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), str(path))
            if path.stat().st_size < end:
                raise ValueError(
                    f"{path} is truncated: {path.stat().st_size} of {end} bytes. Remedy: copy it "
                    "again."
                )

    @property
    def args(self) -> argparse.Namespace:
        """The arguments of the run that saved it.

        Raises:
            ValueError: It was saved without.
        """
        args = self.common.get("args")
        if args is None:
            raise ValueError(
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
            ValueError: The shards do not make up the whole tensor.
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
            raise ValueError(
                f"{self.folder}: the shards of {key} hold {held} of {prod(item.size)} numbers. The "
                "checkpoint is not complete."
            )
        return sorted(groups, key=lambda parts: parts[0].start)

    def read(self, parts: Sequence[Part]) -> torch.Tensor:
        """Shards that are columns of the same rows, side by side; in their dtype.

        Raises:
            ValueError: A shard is damaged.
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
                raise ValueError(
                    f"{self.folder}: the shard of {part.key} at {part.start} is damaged ({error})."
                ) from error
            info = self._metadata.storage_data[place]
            with (self.folder / info.relative_path).open("rb") as file:
                forget(file.fileno(), info.offset, info.length)
        return whole


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

    def write(self, file: int, read: Read) -> list[WriteResult]:
        """Write one file and wait until it is on the disk.

        Args:
            file: Index into ``parts``.
            read: Gives the numbers of a part; called once for each.

        Returns:
            What :meth:`finish` wants of every file.
        """
        return self._writer().write_data(self._plans[file], _Resolve(read)).value()

    def finish(self, results: Sequence[list[WriteResult]]) -> None:
        """Write what is not a tensor and, last, the metadata."""

        def serialise(item: WriteItem) -> io.BytesIO:
            stream = io.BytesIO()
            torch.save([self._objects[item.index.fqn]], stream)
            return stream

        writer = self._writer()
        objects = writer.write_data(self._plans[-1], _Resolve(objects=serialise)).value()
        save_config(CheckpointingConfig("torch_dist", 1), str(self._folder))
        writer.finish(self._metadata, [*results, objects])


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
