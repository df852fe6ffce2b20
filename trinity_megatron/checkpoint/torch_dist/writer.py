"""Writing a ``torch_dist`` checkpoint part by part, without a model.

The format is that of ``torch.distributed.checkpoint``, whose ``FileSystemWriter`` does the writing.
A conversion writes each file as if it were the only file of one rank.  An interrupted conversion
can therefore rewrite a single file.
"""

import io
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from megatron.core.dist_checkpointing.core import CheckpointingConfig, save_config
from torch.distributed.checkpoint import FileSystemWriter
from torch.distributed.checkpoint.default_planner import (
    DefaultSavePlanner,
    create_default_global_save_plan,
)
from torch.distributed.checkpoint.filesystem import _StorageInfo, _StorageWriterTransforms
from torch.distributed.checkpoint.metadata import (
    ChunkStorageMetadata,
    MetadataIndex,
    TensorProperties,
)
from torch.distributed.checkpoint.planner import SavePlan, TensorWriteData, WriteItem, WriteItemType
from torch.distributed.checkpoint.storage import WriteResult

from trinity_megatron.checkpoint.integrity.checks import Checks
from trinity_megatron.checkpoint.integrity.checksums import crc32, get_checksum, set_checksum
from trinity_megatron.checkpoint.integrity.metadata import MetadataPickle
from trinity_megatron.checkpoint.torch_dist.parts import COMMON_STATE_KEY, Part
from trinity_megatron.checkpoint.torch_dist.streams import StreamingFileSystem
from trinity_megatron.checkpoint.transforms import Shape
from trinity_megatron.upstream.registry import replaced

# Returns the values of a part.
Read = Callable[[Part], torch.Tensor]
# Location and checksum of a written item, in a form that JSON can represent.
Stored = list[Any]


class TorchDistWriter:
    """Writes a checkpoint of model tensors.

    Args:
        folder: Folder of one iteration.
        tensors: Dtype and unsharded shape of every tensor.
        parts: Parts to write, by file.
        common: The common state.
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
        self._objects = {COMMON_STATE_KEY: common, **{f"{k}/shard_0_1": None for k in extra_state}}
        plans = [
            SavePlan([_write_item(part, *tensors[part.key]) for part in file]) for file in parts
        ]
        objects = [WriteItem(MetadataIndex(key), WriteItemType.BYTE_IO) for key in self._objects]
        plans.append(SavePlan(objects))
        plans, self._metadata = create_default_global_save_plan(plans)
        self._plans = self._writer().prepare_global_plan(plans)

    def _writer(self) -> FileSystemWriter:
        # No copies ahead of writing: the caller reuses the memory of a part for the next one.
        writer = FileSystemWriter(
            self._folder, single_file_per_rank=True, sync_files=True, per_thread_copy_ahead=0
        )
        writer.fs = StreamingFileSystem()
        return writer

    def _write(self, plan: SavePlan, planner: "_SavePlanner") -> list[WriteResult]:
        writer = self._writer()
        writer.transforms = checksums = _ChecksumTransforms()
        results = writer.write_data(plan, planner).value()
        for result in results:
            set_checksum(result.storage_data, checksums.found[result.index])
        return results

    def write(self, file: int, read: Read) -> list[Stored]:
        """Write one file and wait until it is on disk.

        Args:
            file: Index into ``parts``.
            read: Returns the values of a part; called once per part.

        Returns:
            The results that :meth:`finish` takes; JSON can represent them.
        """
        return [_to_json(result) for result in self._write(self._plans[file], _SavePlanner(read))]

    def finish(self, results: Sequence[list[Stored]]) -> None:
        """Write the common state, the extra state and, last, the metadata.

        Args:
            results: Return values of :meth:`write`, by file.
        """

        def serialise(item: WriteItem) -> io.BytesIO:
            stream = io.BytesIO()
            torch.save([self._objects[item.index.fqn]], stream)
            return stream

        objects = self._write(self._plans[-1], _SavePlanner(objects=serialise))
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


class _ChecksumTransforms(_StorageWriterTransforms):
    """Computes the CRC-32 of each item while it is written.

    Attributes:
        found: The checksums, by item.
    """

    def __init__(self) -> None:
        super().__init__()
        self.found: dict[MetadataIndex, int] = {}

    def transform_save_stream(self, write_item: WriteItem, raw_stream: Any) -> tuple[Any, list]:
        """Put a checksum stream in front of torch's stream."""
        stream, descriptors = super().transform_save_stream(write_item, raw_stream)
        self.found[write_item.index] = 0
        return _ChecksumStream(stream, self.found, write_item.index), descriptors


class _ChecksumStream(io.RawIOBase):
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


class _SavePlanner(DefaultSavePlanner):
    """Reads the data of an item when the writer requests it."""

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
