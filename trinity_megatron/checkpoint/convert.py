"""``trinity-megatron convert``: Hugging Face safetensors <-> Megatron ``torch_dist``, streamed.

Memory holds a few tensors at a time.  The conversion copies values and computes nothing, so a round
trip gives the same bytes.
"""

import logging
import time
from pathlib import Path

from trinity_megatron import __version__
from trinity_megatron.checkpoint.hf_assets import check_tokenizer, find_assets, find_tokenizer
from trinity_megatron.checkpoint.hf_export import MAX_SHARD_SIZE, write_hf
from trinity_megatron.checkpoint.hf_weights import HFWeights
from trinity_megatron.checkpoint.integrity.checks import Checks
from trinity_megatron.checkpoint.megatron_export import write_megatron
from trinity_megatron.checkpoint.model_args import config_from_args
from trinity_megatron.checkpoint.staging import fingerprint_folder
from trinity_megatron.checkpoint.torch_dist.reader import TorchDistReader
from trinity_megatron.checkpoint.vocabulary import find_vocab_size
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
    _log_rate(hf, megatron, num_bytes, time.monotonic() - begin)
    logger.info(
        "The momentum of the expert bias (SMEBU) has no name on the Hugging Face side: it starts "
        "at zero.\nTo train on: trinity-megatron train --preset %s --pretrained-checkpoint %s ...",
        megatron,
        megatron,
    )


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
        tokenizer: Folder of the tokenizer.  Defaults to the tokenizer of the Hugging Face
            checkpoint that training started from, or else the tokenizer of the run.
        max_shard_size: Largest weight file, e.g. ``5GB``.  If the weights still have the names and
            shapes of the Hugging Face checkpoint that training started from, the files are split
            as there.
        verify_checksums: Verify the checksums of what is read.

    Raises:
        UserError: The checkpoint is incomplete or damaged, or contains no Trinity model.
        OSError: The folder cannot be written.
    """
    begin = time.monotonic()
    source = TorchDistReader(megatron, Checks(verify_checksums))
    config = config_from_args(source.args)
    assets = find_assets(megatron)
    if tokenizer is None and assets is None:
        tokenizer = find_tokenizer(source.folder, source.args)
    if tokenizer is not None:
        check_tokenizer(megatron, tokenizer)
    config.tokenizer_vocab_size = find_vocab_size(source.args, tokenizer)
    num_bytes = write_hf(
        source,
        config,
        hf,
        name=str(source.folder),
        assets=assets,
        tokenizer=tokenizer,
        max_shard_size=max_shard_size,
        fingerprint=["megatron", __version__, fingerprint_folder(source.folder), max_shard_size],
    )
    _log_rate(megatron, hf, num_bytes, time.monotonic() - begin)


def _log_rate(source: Path, target: Path, num_bytes: int, seconds: float) -> None:
    rate = num_bytes / 1e9 / seconds
    logger.info(
        "%s -> %s: %.2f GB in %.1f s (%.2f GB/s)", source, target, num_bytes / 1e9, seconds, rate
    )
