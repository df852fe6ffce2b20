"""Files at an address of any file system that fsspec knows, such as ``s3://bucket/web``."""

from __future__ import annotations

import io
import os
import stat
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import PurePosixPath
from typing import IO, Any, Literal, cast

import fsspec

from trinity_megatron.errors import MissingInputError, UserError


def is_address(path: object) -> bool:
    """Whether a path is the address of another file system."""
    return "://" in str(path)


@dataclass(frozen=True)
class StoredAt:
    """A file or folder at an address; a :class:`~trinity_megatron.data.streams.StoredFile`.

    Attributes:
        address: With the protocol, without a slash at its end.
        num_bytes: Size of a file.
        version: What the file system says of its content, such as an ETag; empty if nothing.
    """

    address: str
    num_bytes: int = 0
    version: str = ""

    def __str__(self) -> str:
        return self.address

    @property
    def name(self) -> str:
        """Last component of the address."""
        return self.address.rstrip("/").rpartition("/")[2]

    @property
    def suffix(self) -> str:
        """The last suffix."""
        return PurePosixPath(self.name).suffix

    @property
    def suffixes(self) -> list[str]:
        """All suffixes."""
        return PurePosixPath(self.name).suffixes

    def open(self, mode: Literal["rb"]) -> IO[bytes]:
        """Open it for reading.

        Raises:
            OSError: It cannot be opened.
        """
        # Files of remote systems have a readline() without a size.
        return io.BufferedReader(cast(Any, fsspec.open(self.address, mode).open()))

    def stat(self) -> os.stat_result:
        """Its size."""
        return os.stat_result((stat.S_IFREG | 0o444, 0, 0, 1, 0, 0, self.num_bytes, 0, 0, 0))


def list_address(address: str, key: str) -> Iterator[tuple[str, StoredAt]]:
    """All files below an address, or the file at it.

    Args:
        address: With its protocol.
        key: That names it, for errors.

    Yields:
        The place of a file below the address, empty for the file at it; and the file.

    Raises:
        UserError: The protocol is not known, nothing is there, or it cannot be listed.
    """
    try:
        system, root = fsspec.core.url_to_fs(address)
        found: dict[str, dict[str, Any]] = system.find(root, detail=True)
    except ImportError as error:
        raise UserError(f"{key} {address}: {error}. Remedy: pip install that package.") from error
    except ValueError as error:
        raise UserError(
            f"{key} {address}: {error}. Remedy: a protocol that fsspec knows, such as s3:// or gs://."
        ) from error
    except Exception as error:  # each file system has errors of its own
        raise UserError(
            f"{key} {address} cannot be listed ({type(error).__name__}: {error}). Remedy: check "
            "the address, and the credentials in the environment."
        ) from error
    if not found:
        raise MissingInputError(f"{key} {address}: nothing is there. Remedy: name what is there")
    for name, details in sorted(found.items()):
        version = details.get("ETag") or details.get("etag") or details.get("md5Hash") or ""
        stored = StoredAt(
            system.unstrip_protocol(name), int(details.get("size") or 0), str(version)
        )
        yield name.removeprefix(root).strip("/"), stored
