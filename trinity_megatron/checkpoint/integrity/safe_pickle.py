"""Unpickling with an allow-list of classes and functions.

A pickle calls what it names.  ``.metadata`` of a ``torch_dist`` checkpoint is one, and so is every
object that is no tensor: the arguments of the run, the random state, parts of the optimizer.
"""

import io
import pickle
import re
from collections.abc import Callable
from enum import Enum
from pathlib import Path
from typing import Any

import numpy
import torch
from torch.distributed.checkpoint.metadata import Metadata

from trinity_megatron.checkpoint.integrity.checksums import check_records
from trinity_megatron.errors import UserError

_METADATA = "torch.distributed.checkpoint.metadata"
_PLANNER = "torch.distributed.checkpoint.planner"
_FILESYSTEM = "torch.distributed.checkpoint.filesystem"
_MEGATRON = "megatron.core.dist_checkpointing.strategies.torch"
# What torch and Megatron write into .metadata.  Pairs, compared as a whole: a name with a dot would
# lead through the attributes of a module to anything that it has imported.
_METADATA_NAMES = frozenset(
    {
        *((_METADATA, name) for name in ("Metadata", "MetadataIndex", "StorageMeta")),
        *((_METADATA, name) for name in ("TensorStorageMetadata", "BytesStorageMetadata")),
        *((_METADATA, name) for name in ("ChunkStorageMetadata", "TensorProperties")),
        (_METADATA, "_MEM_FORMAT_ENCODING"),
        *((_PLANNER, name) for name in ("SavePlan", "WriteItem", "WriteItemType")),
        (_PLANNER, "TensorWriteData"),
        *((_FILESYSTEM, name) for name in ("_StorageInfo", "_StoragePrefix")),
        *((_MEGATRON, name) for name in ("MCoreMetadata", "MCoreSavePlan")),
        ("collections", "OrderedDict"),
        ("pathlib", "PosixPath"),
        ("pathlib._local", "PosixPath"),
        ("torch", "Size"),
        ("torch.serialization", "_get_layout"),
        *(("torch", name) for name, value in vars(torch).items() if isinstance(value, torch.dtype)),
    }
)
_REMEDY = (
    "Remedy: take the checkpoint from a source that you trust, or have its author save it again "
    "with Megatron-Core 0.19."
)


class BadCheckpoint(UserError):
    """A checkpoint that is not loaded: it is damaged, or names what no checkpoint holds."""


class _Refused(Exception):
    """A pickle names what is not on the list."""


class _MetadataUnpickler(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> Any:
        if (module, name) not in _METADATA_NAMES:
            raise _Refused(f"{module}.{name}")
        return super().find_class(module, name)


def load_metadata(content: bytes, path: str | Path) -> tuple[Metadata, bytes]:
    """Unpickle a ``.metadata``.

    Args:
        content: Of the file.
        path: Its name, for messages.

    Returns:
        The metadata, and the bytes behind the pickle.

    Raises:
        BadCheckpoint: It names a class that does not belong there, or is damaged.
    """
    stream = io.BytesIO(content)
    try:
        metadata = _MetadataUnpickler(stream).load()
        if not isinstance(metadata, Metadata):
            raise TypeError(f"it holds a {type(metadata).__name__}")
        check_places(metadata)
    except _Refused as error:
        raise _refusal(path, str(error)) from None
    except Exception as error:  # a damaged pickle raises almost anything
        raise BadCheckpoint(f"{path} is damaged ({error}). Remedy: copy it again.") from error
    return metadata, stream.read()


def check_places(metadata: Metadata) -> None:
    """Check that all that is stored lies in files of the checkpoint's own folder.

    Raises:
        ValueError: Names the file.
    """
    for info in metadata.storage_data.values():
        if not is_plain_name(info.relative_path):
            raise ValueError(f"it names the file {info.relative_path!r}, outside its folder")
        if not (info.offset >= 0 and info.length >= 0):
            raise ValueError(f"{info.relative_path} at {info.offset}, {info.length} bytes")


def is_plain_name(name: object) -> bool:
    """Whether a name from a file is that of a file in the same folder."""
    return isinstance(name, str) and name not in ("", ".", "..") and not set(name) & set("/\\\0")


def safe_torch_load(
    load: Callable[..., Any], *, verify_checksums: bool = True
) -> Callable[..., Any]:
    """``torch.load`` that takes what Megatron saves and calls nothing else.

    Args:
        load: ``torch.load``.
        verify_checksums: Compare the checksums of a file that is given by name.

    Returns:
        A function with its arguments.  It raises `BadCheckpoint`.
    """
    torch.serialization.add_safe_globals(_further_classes())

    def load_safely(f: Any, *args: Any, **kwargs: Any) -> Any:
        path = f if isinstance(f, str | Path) else None
        name = path or getattr(f, "name", None) or "an object in it"
        if path and verify_checksums:
            check_named_file(path)
        try:
            return load(f, *args, **{**kwargs, "weights_only": True})
        except pickle.UnpicklingError as error:
            named = re.search(r"GLOBAL ([\w.]+)|function (.+)|Unsupported (class.*)", str(error))
            if named is None:
                raise BadCheckpoint(f"{name} is damaged ({error}).") from error
            raise _refusal(name, next(filter(None, named.groups()))) from None

    return load_safely


def check_named_file(path: str | Path) -> None:
    """Compare the checksums of a file that ``torch.save`` wrote.

    Raises:
        BadCheckpoint: They differ, or it is no such file.
    """
    try:
        with open(path, "rb") as file:
            check_records(file)
    except OSError:
        raise
    except Exception as error:  # damaged bytes raise almost anything
        raise BadCheckpoint(f"{path} is damaged ({error}). Remedy: copy it again.") from error


def _further_classes() -> list[Any]:
    """Beyond those that torch and Megatron allow: Megatron's enums, numbers of numpy."""
    from megatron.core import enums
    from megatron.core.transformer import enums as transformer_enums

    found: list[Any] = []
    for module in (enums, transformer_enums):
        classes = (value for value in vars(module).values() if isinstance(value, type))
        found += [each for each in classes if issubclass(each, Enum) and each is not Enum]
    numbers = (value for value in vars(numpy.dtypes).values() if isinstance(value, type))
    found += [each for each in numbers if each.__name__ != "ObjectDType"]
    for name in ("scalar", "_reconstruct"):  # numpy 1 named its folder otherwise
        function = getattr(numpy._core.multiarray, name)  # type: ignore[attr-defined]
        found += [(function, f"numpy.{core}.multiarray.{name}") for core in ("core", "_core")]
    return found


def _refusal(path: object, name: str) -> BadCheckpoint:
    return BadCheckpoint(
        f"{path} names {name}, which no checkpoint of Megatron holds; loading it could run any "
        f"program. {_REMEDY}"
    )
