"""Reads a stored tensor straight into the tensor that is loaded.

torch reads an item into memory of its own and copies it from there.  That copy takes longer than
the checksum, so that a load with checksums and without the copy is the faster one.
"""

import os
import sys
from typing import Any

import torch
from torch import Tensor, _weights_only_unpickler, serialization
from torch.distributed.checkpoint.default_planner import DefaultLoadPlanner
from torch.distributed.checkpoint.filesystem import _StorageInfo
from torch.distributed.checkpoint.planner import LoadItemType, ReadItem

from trinity_megatron.checkpoint.integrity.checksums import FilePart, crc32

# Bytes per read: the checksum is computed while they are in the processor's second cache.
_PIECE_BYTES = 2**18


def find_target(planner: Any, request: ReadItem) -> Tensor | None:
    """Find the memory to which a request loads a tensor.

    Args:
        planner: Planner of the load.
        request: What is loaded, and where to.

    Returns:
        A contiguous view of the tensor that is loaded; None if torch has to load the item: it is no
        tensor, not needed from its first element on, or goes to a GPU or to scattered memory.
    """
    if request.type != LoadItemType.TENSOR or any(request.storage_offsets):
        return None
    if not isinstance(planner, DefaultLoadPlanner):
        return None
    # Not `resolve_tensor`, in which Megatron makes intermediate tensors for quantized ones.
    target = planner.lookup_tensor(request.dest_index).detach()
    if type(target) is not Tensor or target.device.type != "cpu":
        return None
    for dim, (start, length) in enumerate(zip(request.dest_offsets, request.lengths, strict=True)):
        target = target.narrow(dim, start, length)
    return target if target.is_contiguous() else None


def load_over(archive: Any, storage: torch.UntypedStorage) -> Any:
    """``torch.load`` whose tensors share given memory, instead of reading their values.

    Args:
        archive: The opened zip archive.
        storage: Memory of its size.

    Returns:
        What was saved.  Each tensor lies in ``storage`` where its values lie in the archive.
    """
    # torch.load does the same with weights_only and mmap, but only for the name of a file.
    return serialization._load(
        archive, "cpu", _weights_only_unpickler, overall_storage=storage, encoding="utf-8"
    )


def find_values(item: Any, num_bytes: int, target: Tensor) -> int | None:
    """Find the values in a stored tensor.

    Args:
        item: The zip archive, as a file.
        num_bytes: Its size.
        target: Tensor to be loaded.

    Returns:
        Offset of the first value in bytes; None if the archive is damaged, or what it stores does
        not have the dtype, shape, layout and byte order of ``target``.
    """
    storage = torch.UntypedStorage(num_bytes)
    try:
        with serialization._open_zipfile_reader(item) as archive:
            if archive.get_record("byteorder") != sys.byteorder.encode():
                return None
            stored = load_over(archive, storage)
    except Exception:  # damaged bytes raise almost anything; reading the whole item names them
        return None
    is_same = (
        type(stored) is Tensor
        and (stored.dtype, stored.shape) == (target.dtype, target.shape)
        and stored.is_contiguous()
        and not any(each.is_conj() or each.is_neg() for each in (stored, target))
    )
    at = stored.data_ptr() - storage.data_ptr() if is_same else -1
    return at if 0 <= at <= num_bytes - target.nbytes else None


def read_into(target: Tensor, file: int, info: _StorageInfo, *, verify: bool) -> int | None:
    """Read a stored tensor into a tensor.

    Args:
        target: Contiguous, on the CPU.
        file: Descriptor of the file.
        info: Location of the item in the file.
        verify: Compute the checksum.

    Returns:
        CRC-32 of the item (0 without ``verify``); None, with nothing read, if :func:`find_values`
        does not find the values.

    Raises:
        EOFError: The file is too short.
    """
    at = find_values(FilePart(file, info.offset, info.length), info.length, target)
    if at is None:
        return None
    values = memoryview(target.reshape(-1).view(torch.uint8).numpy())
    if not verify:
        read_pieces(values, file, info.offset + at, None)
        return 0
    end = at + len(values)
    around = memoryview(bytearray(max(at, info.length - end)))
    checksum = read_pieces(around[:at], file, info.offset, 0)
    checksum = read_pieces(values, file, info.offset + at, checksum)
    return read_pieces(around[: info.length - end], file, info.offset + end, checksum)


def read_pieces(place: memoryview, file: int, offset: int, checksum: int | None) -> int | None:
    """Fill memory from a file.

    Args:
        place: The memory.
        file: Descriptor of the file.
        offset: Where in the file its bytes begin.
        checksum: CRC-32 of what lies before them; None: compute none.

    Returns:
        CRC-32 with these bytes, or None.

    Raises:
        EOFError: The file is too short.
    """
    at = 0
    while at < len(place):
        count = os.preadv(file, [place[at : at + _PIECE_BYTES]], offset + at)
        if not count:
            raise EOFError
        if checksum is not None:
            checksum = crc32(place[at : at + count], checksum)
        at += count
    return checksum


def read_checksum(buffer: bytearray, file: int, offset: int, num_bytes: int) -> int:
    """CRC-32 of a part of a file, which is read piece by piece into the same memory.

    Args:
        buffer: Of the size of a piece.
        file: Descriptor of the file.
        offset: Where in the file the part begins.
        num_bytes: Its size.

    Raises:
        EOFError: The file is too short.
    """
    place, checksum, at = memoryview(buffer), 0, 0
    while at < num_bytes:
        count = os.preadv(file, [place[: num_bytes - at]], offset + at)
        if not count:
            raise EOFError
        checksum, at = crc32(place[:count], checksum), at + count
    return checksum
