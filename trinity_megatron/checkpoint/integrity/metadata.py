"""Read and write ``.metadata`` with a checksum; it is unpickled with an allow-list."""

import pickle
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch.distributed.checkpoint.metadata import Metadata

from trinity_megatron.checkpoint.integrity.checks import Checks
from trinity_megatron.checkpoint.integrity.checksums import seal, unseal
from trinity_megatron.checkpoint.integrity.safe_pickle import BadCheckpoint, load_metadata


@dataclass
class MetadataPickle:
    """Replaces the ``pickle`` module where torch reads and writes ``.metadata``.

    Attributes:
        checks: Settings of the integrity checks.
    """

    checks: Checks

    def load(self, stream: Any) -> Metadata:
        """See :func:`read_metadata`."""
        try:
            return read_metadata(stream.read(), stream.name, self.checks)
        except BadCheckpoint as error:
            self.checks.refused = error
            raise

    def dump(self, metadata: Metadata, stream: Any) -> None:
        """Write the pickle and its checksum."""
        stream.write(seal(pickle.dumps(metadata)))


def read_metadata(content: bytes, path: str | Path, checks: Checks) -> Metadata:
    """Verify the checksum of a ``.metadata`` file and unpickle it with an allow-list of classes.

    Args:
        content: Content of the file.
        path: Path of the file, for messages.
        checks: Settings of the integrity checks.

    Raises:
        BadCheckpoint: The file is damaged, or names a class that is not allowed.
    """
    if not checks.verify_checksums:
        return load_metadata(content, path)[0]
    try:
        pickled, is_sealed = unseal(content)
    except ValueError as error:
        raise BadCheckpoint(f"{path} is damaged ({error}). Remedy: copy it again.") from error
    metadata, rest = load_metadata(pickled, path)
    if rest:
        raise BadCheckpoint(f"{path} is damaged (its end is not readable). Remedy: copy it again.")
    if not is_sealed:
        checks.note_missing(path)
    return metadata
