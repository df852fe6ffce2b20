"""Wrap Megatron's loading and saving: verify checksums, and unpickle with an allow-list.

Megatron reads through torch's ``FileSystemReader``; both unpickle whatever a checkpoint names.
"""

import contextlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from megatron.core.dist_checkpointing.core import CheckpointingException
from torch.distributed.checkpoint.api import CheckpointException

from trinity_megatron.checkpoint.integrity.checked_reader import (
    load_in_place,
    reading_ahead,
    slicing_checked,
)
from trinity_megatron.checkpoint.integrity.checks import Checks
from trinity_megatron.checkpoint.integrity.checksums import add_checksums
from trinity_megatron.checkpoint.integrity.metadata import MetadataPickle, read_metadata
from trinity_megatron.checkpoint.integrity.safe_pickle import BadCheckpoint, safe_torch_load
from trinity_megatron.upstream.registry import replaced

_TORCH = "torch.distributed.checkpoint.filesystem"
_MEGATRON = "megatron.core.dist_checkpointing"
# Advice for a checkpoint that cannot be loaded, from its folder.
Advise = Callable[[Path], str]


@contextlib.contextmanager
def guarded_loads(
    *, verify_checksums: bool = True, advise: Advise = lambda folder: ""
) -> Iterator[None]:
    """Check what Megatron loads while the block runs, and give what it saves checksums.

    All ranks raise where one of them finds something.

    Args:
        verify_checksums: Compare checksums.
        advise: What to add to the message; called on rank 0.

    Raises:
        BadCheckpoint: Names the file and the remedy.
    """
    is_first = not _is_distributed() or torch.distributed.get_rank() == 0
    checks = Checks(verify_checksums, quiet=not is_first)

    def raise_together(load: Callable[..., Any]) -> Callable[..., Any]:
        return raising_together(load, advise)

    def load_common(load: Callable[..., Any]) -> Callable[..., Any]:
        def check_before_load(folder: str) -> Any:
            # torch would print the trace, and look for another file.
            path = Path(folder) / ".metadata"
            read_metadata(path.read_bytes(), path, checks)
            return load(folder)

        return raise_together(check_before_load)

    def load(before: Callable[..., Any]) -> Callable[..., Any]:
        return safe_torch_load(load_in_place(before), verify_checksums=verify_checksums)

    def read(before: Callable[..., Any]) -> Callable[..., Any]:
        return reading_ahead(before, lambda _: checks, to_targets=True)

    places = (
        (f"{_TORCH}:pickle", lambda before: MetadataPickle(checks)),
        ("torch:load", load),
        (f"{_TORCH}:FileSystemReader.read_data", read),
        (f"{_TORCH}:FileSystemReader._slice_file", slicing_checked),
        (
            f"{_MEGATRON}.strategies.filesystem_async:FileSystemWriterAsync.retrieve_write_results",
            adding_checksums,
        ),
        (f"{_MEGATRON}.strategies.torch:TorchDistLoadShardedStrategy.load", raise_together),
        (f"{_MEGATRON}.serialization:verify_integrity_manifest", _plain),
        # Megatron calls it by both names.
        (f"{_MEGATRON}:load_common_state_dict", load_common),
        (f"{_MEGATRON}.serialization:load_common_state_dict", load_common),
    )
    with contextlib.ExitStack() as stack:
        for target, make in places:
            stack.enter_context(replaced(target, make))
        try:
            yield
        except (CheckpointException, SystemExit) as error:
            found = find_bad_checkpoint(error) or checks.refused
            if found is None:
                raise
            raise found from error


def find_bad_checkpoint(error: BaseException) -> BadCheckpoint | None:
    """What torch has wrapped, or Megatron has printed before it ended the process."""
    if isinstance(error, BadCheckpoint):
        return error
    inner = [error.__context__, error.__cause__]
    if isinstance(error, CheckpointException):
        inner += [pair[0] for pair in error.failures.values()]
    found = (find_bad_checkpoint(each) for each in inner if each is not None)
    return next((each for each in found if each is not None), None)


def raising_together(
    load: Callable[..., Any], advise: Advise = lambda folder: ""
) -> Callable[..., Any]:
    """A load by all ranks that raises on all where it fails on one, so that nobody waits for it.

    Args:
        load: Has the folder of the checkpoint as its first string or path.
        advise: See :func:`guarded_loads`.
    """

    def load_together(*args: Any, **kwargs: Any) -> Any:
        error, result = None, None
        try:
            result = load(*args, **kwargs)
        except (Exception, CheckpointException) as failure:
            error = find_bad_checkpoint(failure)
            if error is None:
                raise
        folder = next(each for each in (*args, *kwargs.values()) if isinstance(each, str | Path))
        message = first_message(str(error) if error else None, lambda: advise(Path(folder)))
        if message is not None:
            raise BadCheckpoint(message) from error
        return result

    return load_together


def first_message(message: str | None, advise: Callable[[], str]) -> str | None:
    """The message of the first rank that has one, with the advice of rank 0; on all ranks."""
    if not _is_distributed():
        return None if message is None else message + advise()
    messages: list[str | None] = [None] * torch.distributed.get_world_size()
    torch.distributed.all_gather_object(messages, message)
    first = next((each for each in messages if each is not None), None)
    if first is None:
        return None
    whole = [first + advise() if torch.distributed.get_rank() == 0 else None]
    torch.distributed.broadcast_object_list(whole, src=0)
    return whole[0]


def _is_distributed() -> bool:
    return torch.distributed.is_initialized() and torch.distributed.get_world_size() > 1


def adding_checksums(retrieve: Callable[..., Any]) -> Callable[..., Any]:
    """``FileSystemWriterAsync.retrieve_write_results`` with a checksum for every result.

    Each rank adds those of what it has written itself; rank 0 gathers them with the rest.
    """

    def retrieve_with_checksums(self: Any) -> Any:
        results = retrieve(self)
        if isinstance(results, list) and not self.use_msc:  # else it is a failure
            add_checksums(Path(self.checkpoint_dir), [each.storage_data for each in results])
        return results

    return retrieve_with_checksums


def _plain(verify: Callable[..., Any]) -> Callable[..., Any]:
    """``--verify-integrity`` that ends without a trace; it raises on all ranks already."""

    def verify_plainly(folder: str) -> None:
        try:
            verify(folder)
        except CheckpointingException as error:
            raise BadCheckpoint(
                f"--verify-integrity: {error} Remedy: copy the files again, or drop the flag for "
                "a checkpoint that was saved without it."
            ) from error

    return verify_plainly
