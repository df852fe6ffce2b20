"""The folder that ``prepare-data`` writes: locking, reuse of finished data, publication."""

import contextlib
import errno
import logging
import os
import shutil
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

from filelock import FileLock, Timeout

from trinity_megatron.data.inputs import DataInputs
from trinity_megatron.data.manifest import (
    MANIFEST_NAME,
    DataManifest,
    UnsupportedFormatError,
    load_manifest,
)
from trinity_megatron.data.split import WANTED_VALIDATION_TOKENS
from trinity_megatron.errors import UserError

logger = logging.getLogger(__name__)
SPLITS = ("train", "validation")
DATA_FILES = [f"{split}{suffix}" for split in SPLITS for suffix in (".bin", ".idx")]
# All names in a prepared folder, including Megatron's index cache.
_OWN_NAMES = {*DATA_FILES, "tokenizer", MANIFEST_NAME, f".{MANIFEST_NAME}.tmp", "cache"}


def check_out(out: Path) -> None:
    """Check that ``out`` can be created or replaced as a whole.

    Raises:
        UserError: ``out`` is a file or a mount point.
    """
    if out.exists() and not out.is_dir():
        raise UserError(f"out {out} is a file; pass --out with a folder")
    if out.is_mount():
        raise UserError(
            f"out {out} is a mount point, which cannot be replaced as a whole; pass --out with a "
            "folder inside it"
        )


@contextlib.contextmanager
def locked(out: Path) -> Iterator[None]:
    """Hold a lock on ``out`` while the block runs, waiting for another process if necessary.

    The operating system releases the lock when the process ends.

    Raises:
        UserError: The lock file cannot be created.
    """
    out.parent.mkdir(parents=True, exist_ok=True)
    lock = FileLock(out.with_name(f".{out.name}.lock"))
    try:
        lock.acquire(timeout=0)
    except Timeout:
        if not Path(lock.lock_file).exists():
            raise UserError(
                f"out {out}: no file can be made in {out.parent}; pass --out with another folder"
            ) from None
        logger.info("another process is preparing %s; waiting for it", out)
        lock.acquire()
    try:
        yield
    finally:
        lock.release()


def find_existing(out: Path, inputs: DataInputs) -> DataManifest | None:
    """Load ``out`` if it is complete and was prepared from the same inputs.

    Returns:
        Its manifest; None if there is no complete folder.

    Raises:
        UserError: ``out`` was prepared from other inputs.
        UnsupportedFormatError: ``out`` has another format.
    """
    try:
        manifest = load_manifest(out)
    except UnsupportedFormatError:
        raise
    except (FileNotFoundError, ValueError):
        return None
    # Tokenizers of earlier releases have no tokens for chat; their folders stay as they are.
    earlier = replace(inputs, special_tokens=None)
    same = [
        *(item.fingerprint for item in (inputs, earlier)),
        *(enlarged_inputs(item).fingerprint for item in (inputs, earlier)),
    ]
    if manifest.fingerprint not in same:
        differences = "; ".join(manifest.inputs.differences(inputs))
        raise UserError(
            f"out {out} holds data made from other inputs: {differences}; pass another --out, or "
            f"remove {out} first"
        )
    logger.info("%s is already prepared from the same inputs; nothing to do", out)
    return manifest


def building_prefix(out: Path) -> str:
    """Prefix of the temporary folders in which ``out`` is built."""
    return f".{out.name}.building-"


def remove_half_written(out: Path) -> None:
    """Remove the files of interrupted attempts.  The caller holds the lock, so none is running.

    Raises:
        UserError: ``out`` contains files that ``prepare-data`` did not write.
    """
    for path in out.parent.iterdir():
        if path.name.startswith(building_prefix(out)):
            shutil.rmtree(path, ignore_errors=True)
    if not out.exists():
        return
    names = sorted(path.name for path in out.iterdir())
    foreign = [name for name in names if name not in _OWN_NAMES]
    if foreign:
        raise UserError(
            f"out {out} is not a prepared data folder and holds other files "
            f"({', '.join(foreign[:3])}); pass --out with a new or empty folder"
        )
    if names:
        logger.warning("%s is half-written or damaged; preparing it again", out)
    shutil.rmtree(out)


def publish(building: Path, out: Path, inputs: DataInputs) -> DataManifest:
    """Rename a finished folder to ``out`` and log a summary.

    Args:
        building: The finished folder.
        out: Its final path.
        inputs: What it was prepared from.

    Returns:
        The manifest of ``out``.

    Raises:
        OSError: The folder cannot be renamed.
    """
    try:
        os.rename(building, out)
    except OSError as error:
        if error.errno not in (errno.ENOTEMPTY, errno.EEXIST):
            raise
        # On some network file systems the lock does not exclude other machines: one was faster.
        faster = find_existing(out, inputs)
        if faster is None:
            raise
        return faster
    manifest = load_manifest(out)
    _report(manifest)
    return manifest


def _report(manifest: DataManifest) -> None:
    for name, split in (("train", manifest.train), ("validation", manifest.validation)):
        logger.info(
            "%s: %d documents, %d tokens, %.2f bytes per token, unigram entropy %.3f nats",
            name,
            split.documents,
            split.tokens,
            split.bytes / split.tokens,
            split.unigram_entropy,
        )
    logger.info("prepared %s", manifest.path)


def enlarged_inputs(inputs: DataInputs) -> DataInputs:
    """The inputs that are recorded if the validation split was enlarged.

    If it was not, ``validation_tokens`` stays None, and the fingerprint that of earlier releases.
    """
    return replace(inputs, validation_tokens=WANTED_VALIDATION_TOKENS)
