"""``trinity-megatron convert``: Hugging Face safetensors <-> Megatron ``torch_dist``, streamed.

Memory holds a few tensors at a time.  The conversion copies values and computes nothing, so a round
trip gives the same bytes; ``trinity-megatron export`` gives it an encoding that computes.
"""

import argparse
import logging
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from trinity_megatron import __version__
from trinity_megatron.checkpoint.hf_assets import (
    Assets,
    check_tokenizer,
    find_assets,
    find_tokenizer,
)
from trinity_megatron.checkpoint.hf_export import MAX_SHARD_SIZE, Encoding, write_hf
from trinity_megatron.checkpoint.hf_weights import HFWeights
from trinity_megatron.checkpoint.integrity.checks import Checks
from trinity_megatron.checkpoint.megatron_export import write_megatron
from trinity_megatron.checkpoint.model_args import config_from_args
from trinity_megatron.checkpoint.staging import fingerprint_folder
from trinity_megatron.checkpoint.torch_dist.reader import TorchDistReader
from trinity_megatron.checkpoint.vocabulary import find_vocab_size
from trinity_megatron.model.config import TrinityConfig
from trinity_megatron.model.hf_config import read_hf_config, trinity_config_from_hf

__all__ = [
    "MAX_SHARD_SIZE",
    "config_from_args",
    "find_vocab_size",
    "hf_to_megatron",
    "megatron_to_hf",
    "write_hf",
]

logger = logging.getLogger(__name__)


def hf_to_megatron(hf: Path, megatron: Path) -> None:
    """Convert a Hugging Face checkpoint to a ``torch_dist`` checkpoint.

    ``--load`` and ``--pretrained-checkpoint`` read the result under any parallel layout.

    Args:
        hf: Folder with ``config.json`` and safetensors files.
        megatron: Folder to create.

    Raises:
        UserError: The model is not supported, or the checkpoint is incomplete or damaged.
        OSError: The folder cannot be written.
    """
    begin = time.monotonic()
    config = trinity_config_from_hf(read_hf_config(hf))
    num_bytes = write_megatron(hf, HFWeights(hf), config, megatron)
    log_rate(hf, megatron, num_bytes, time.monotonic() - begin)
    logger.info(
        "The momentum of the expert bias (SMEBU) has no name on the Hugging Face side: it starts "
        "at zero.\nTo train on: trinity-megatron train --preset %s --pretrained-checkpoint %s ...",
        megatron,
        megatron,
    )


@dataclass(frozen=True)
class Run:
    """A checkpoint of a run, opened for an export.

    Attributes:
        source: The tensors.
        config: The model.
        assets: Files of the Hugging Face checkpoint that training started from.
        tokenizer: Folder of the tokenizer; None if it is that of the assets, or there is none.
        checkpoint: The folder, as the user named it.
    """

    source: TorchDistReader
    config: TrinityConfig
    assets: Assets | None
    tokenizer: Path | None
    checkpoint: Path

    @property
    def name(self) -> str:
        """Name in messages."""
        return str(self.source.folder)

    def fingerprint(self, *options: Any) -> list[Any]:
        """Identifies what an export of these options is made from."""
        return ["megatron", __version__, fingerprint_folder(self.source.folder), *options]


def open_run(
    megatron: Path, *, tokenizer: Path | None = None, verify_checksums: bool = True
) -> Run:
    """Open a ``torch_dist`` checkpoint with the tokenizer that it was trained with.

    Args:
        megatron: Value of ``--save``, or the folder of one iteration, saved under any layout.
        tokenizer: Folder of the tokenizer; see :func:`megatron_to_hf`.
        verify_checksums: Verify the checksums of what is read.

    Raises:
        UserError: The checkpoint is incomplete or damaged, or contains no Trinity model.
    """
    source = TorchDistReader(megatron, Checks(verify_checksums))
    config = config_from_args(source.args)
    assets = find_assets(megatron)
    if tokenizer is None and assets is None:
        tokenizer = find_tokenizer(source.folder, source.args)
    elif tokenizer is None and assets is not None:
        own = find_tokenizer(source.folder, argparse.Namespace())
        # The files of the assets are copied as they are.
        tokenizer = None if own is None or own.name == assets.folder.name else own
    if tokenizer is not None:
        check_tokenizer(megatron, tokenizer)
    config.tokenizer_vocab_size = find_vocab_size(source.args, tokenizer)
    return Run(source, config, assets, tokenizer, megatron)


def megatron_to_hf(
    megatron: Path,
    hf: Path,
    *,
    tokenizer: Path | None = None,
    max_shard_size: str = MAX_SHARD_SIZE,
    verify_checksums: bool = True,
) -> None:
    """Convert the model of a ``torch_dist`` checkpoint to Hugging Face safetensors.

    Args:
        megatron: Value of ``--save``, or the folder of one iteration, saved under any layout.
        hf: Folder to create.
        tokenizer: Folder of the tokenizer.  Defaults to the tokenizer of the run, which is that of
            the Hugging Face checkpoint that it started from unless it has another chat template.
        max_shard_size: Largest weight file, e.g. ``5GB``.  If the weights still have the names and
            shapes of the Hugging Face checkpoint that training started from, the files are split
            as there.
        verify_checksums: Verify the checksums of what is read.

    Raises:
        UserError: The checkpoint is incomplete or damaged, or contains no Trinity model.
        OSError: The folder cannot be written.
    """
    run = open_run(megatron, tokenizer=tokenizer, verify_checksums=verify_checksums)
    export_hf(run, hf, max_shard_size=max_shard_size)


def export_hf(
    run: Run,
    hf: Path,
    *,
    max_shard_size: str = MAX_SHARD_SIZE,
    encoding: Encoding | None = None,
) -> None:
    """Write the model of a run as Hugging Face safetensors.

    Args:
        run: The checkpoint.
        hf: Folder to create.
        max_shard_size: See :func:`megatron_to_hf`.
        encoding: How the weights are stored; as they are if None.

    Raises:
        UserError: The checkpoint is incomplete or damaged, or contains no Trinity model.
        OSError: The folder cannot be written.
    """
    begin = time.monotonic()
    num_bytes = write_hf(
        run.source,
        run.config,
        hf,
        name=run.name,
        assets=run.assets,
        tokenizer=run.tokenizer,
        max_shard_size=max_shard_size,
        fingerprint=run.fingerprint(max_shard_size),
        encoding=encoding,
        seq_length=getattr(run.source.args, "seq_length", None),
        lineage=getattr(run.source.args, "lineage", None),
    )
    log_rate(run.checkpoint, hf, num_bytes, time.monotonic() - begin)


def log_rate(source: Path, target: Path, num_bytes: int, seconds: float) -> None:
    """Log how much was converted and how fast."""
    rate = num_bytes / 1e9 / seconds
    logger.info(
        "%s -> %s: %.2f GB in %.1f s (%.2f GB/s)", source, target, num_bytes / 1e9, seconds, rate
    )
