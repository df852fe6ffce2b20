"""Reading a ``torch_dist`` checkpoint part by part, without a model.

The format is that of ``torch.distributed.checkpoint``, whose ``FileSystemReader`` does the reading.
"""

import argparse
import errno
import os
import time
from collections.abc import Callable, Sequence
from math import prod
from pathlib import Path
from typing import Any

import torch
from megatron.core.dist_checkpointing.core import CONFIG_FNAME
from megatron.core.dist_checkpointing.strategies.common import COMMON_STATE_FNAME
from torch.distributed.checkpoint.default_planner import DefaultLoadPlanner
from torch.distributed.checkpoint.metadata import Metadata, MetadataIndex, TensorStorageMetadata
from torch.distributed.checkpoint.planner import LoadItemType, LoadPlan, ReadItem

from trinity_megatron.checkpoint.integrity.checked_reader import CheckedReader
from trinity_megatron.checkpoint.integrity.checks import Checks, check_stays_inside
from trinity_megatron.checkpoint.integrity.read_ahead import ReadAhead, Request
from trinity_megatron.checkpoint.integrity.safe_pickle import BadCheckpoint, safe_torch_load
from trinity_megatron.checkpoint.page_cache import forget
from trinity_megatron.checkpoint.torch_dist.parts import COMMON_STATE_KEY, Part, share_of
from trinity_megatron.checkpoint.torch_dist.streams import StreamingFileSystem
from trinity_megatron.checkpoint.torch_dist.tracker import find_checkpoint, iteration_name
from trinity_megatron.checkpoint.transforms import Shape
from trinity_megatron.errors import UserError
from trinity_megatron.untrusted.json_file import read_json

_MAX_SEARCH_SECONDS = 60


def find_whole(folder: Path, *, other_than: Path) -> int | None:
    """Find the newest complete checkpoint with valid checksums.

    Verification stops after a minute; checksums not verified by then count as valid.

    Args:
        folder: Value of ``--save``.
        other_than: Folder of an iteration to skip.

    Returns:
        The iteration; None if there is no such checkpoint.
    """
    end = time.monotonic() + _MAX_SEARCH_SECONDS
    for path in sorted(folder.glob("iter_*"), reverse=True):
        if path.name[5:].isdigit() and path.resolve() != other_than.resolve():
            try:
                TorchDistReader(path, Checks(quiet=True)).check_all(lambda: time.monotonic() > end)
            except (ValueError, OSError):
                continue
            return int(path.name[5:])
    return None


def advise_other(folder: Path) -> str:
    """Advice for an error message: name an intact checkpoint of the same run.

    Args:
        folder: Folder of the damaged iteration.

    Returns:
        A sentence; empty if there is no intact checkpoint.
    """
    step = find_whole(folder.parent, other_than=folder)
    return (
        "" if step is None else f" Or take the whole one, {folder.parent / iteration_name(step)}."
    )


class TorchDistReader:
    """Reads the model tensors of a checkpoint.

    Attributes:
        folder: Folder of one iteration.
        common: The common state: arguments of the run, iteration.

    Args:
        folder: Value of ``--save``, or the folder of one iteration.
        checks: Settings of the integrity checks.

    Raises:
        UserError: A file is missing or truncated, or the format is not ``torch_dist``.
        BadCheckpoint: A file is damaged, or names a class that no checkpoint contains.
    """

    def __init__(self, folder: Path, checks: Checks | None = None) -> None:
        self.folder = find_checkpoint(folder)
        self._checks = checks or Checks()
        self._reader = CheckedReader(self.folder, self._checks)
        self._reader.fs = StreamingFileSystem()
        self._metadata: Metadata = self._reader.read_metadata()
        self._reader.set_up_storage_reader(self._metadata, is_coordinator=True)
        self._check_files()
        _check_format(self.folder)
        self.common: dict[str, Any] = self._read_common_state()
        self._check_step()

    def _check_step(self) -> None:
        """Refuse the files of another step under the name of this one."""
        number, held = self.folder.name.removeprefix("iter_"), self.common.get("iteration")
        if number.isdigit() and isinstance(held, int) and int(number) != held:
            raise BadCheckpoint(
                f"{self.folder} holds step {held}, not the one of its name. Remedy: rename it to "
                f"{iteration_name(held)}, or copy the whole checkpoint of that step."
            )

    def _read_common_state(self) -> dict[str, Any]:
        load = safe_torch_load(torch.load, verify_checksums=self._checks.verify_checksums)
        legacy = self.folder / COMMON_STATE_FNAME
        if legacy.exists():
            check_stays_inside(self.folder, COMMON_STATE_FNAME)
            return load(legacy, map_location="cpu")
        info = self._metadata.storage_data.get(MetadataIndex(COMMON_STATE_KEY))
        if info is None:
            raise UserError(
                f"{self.folder} is no torch_dist checkpoint of Megatron: it holds no common state. "
                "Remedy: save it with --ckpt-format torch_dist."
            )
        with ReadAhead(self.folder, [Request(info)], self._checks) as ahead:
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

    def check_all(
        self, is_late: Callable[[], bool] = lambda: False, *, rank: int = 0, ranks: int = 1
    ) -> None:
        """Verify all checksums, or those of one rank's share of the bytes.

        Args:
            is_late: Verification stops early once this returns True.
            rank: Of the share.
            ranks: Number of shares.

        Raises:
            BadCheckpoint: Names the first damaged file.
        """
        infos = share_of(list(self._metadata.storage_data.values()), rank, ranks)
        requests = map(Request, infos)
        with ReadAhead(self.folder, requests, self._checks, only_verify=True) as ahead:
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
        """The arguments of the run that saved the checkpoint.

        Raises:
            UserError: The checkpoint contains no arguments.
        """
        args = self.common.get("args")
        if args is None:
            raise UserError(
                f"{self.folder} holds no arguments, so the model is not known. Remedy: save it "
                "with Megatron's own save_checkpoint()."
            )
        return args

    def model_tensors(self) -> dict[str, tuple[torch.dtype, Shape]]:
        """Dtype and unsharded shape of every tensor of the model (not of the optimizer)."""
        return {
            key: (item.properties.dtype, tuple(item.size))
            for key, item in self._metadata.state_dict_metadata.items()
            if isinstance(item, TensorStorageMetadata) and not key.startswith("optimizer.")
        }

    def parts(self, key: str) -> list[list[Part]]:
        """The stored shards of a tensor; shards that are columns of the same rows in one list.

        Raises:
            UserError: The shards do not cover the whole tensor.
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
        """Concatenate shards that are columns of the same rows, in the dtype of the tensor.

        Raises:
            BadCheckpoint: A shard is damaged.
            OSError: A file cannot be read.
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
                self._reader.read_data(LoadPlan([request]), _LoadPlanner(target))
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
    """Check ``metadata.json``, in which Megatron names the format."""
    path = folder / CONFIG_FNAME
    try:
        content = read_json(path)
        known = {"sharded_backend", "sharded_backend_version"}
        known |= {"common_backend", "common_backend_version"}  # earlier versions of Megatron
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


class _LoadPlanner(DefaultLoadPlanner):
    """Directs the single item that the reader loads into a given tensor."""

    def __init__(self, target: torch.Tensor) -> None:
        super().__init__()
        self._target = target

    def resolve_tensor(self, read_item: ReadItem) -> torch.Tensor:
        return self._target

    def commit_tensor(self, read_item: ReadItem, tensor: torch.Tensor) -> None:
        pass
