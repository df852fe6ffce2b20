"""Checks of a training on conversations: what ``prepare-data --chat`` wrote."""

from __future__ import annotations

import argparse
from collections.abc import Mapping

from trinity_megatron.data.index_file import IndexHead
from trinity_megatron.data.manifest import DataManifest
from trinity_megatron.errors import UserError
from trinity_megatron.training.datasets.chat import has_modes


def finish_chat(args: argparse.Namespace, manifest: DataManifest | None) -> None:
    """Say in ``args.data_is_chat`` whether the run reads conversations, and pack them if so.

    Args:
        args: Of the run, before the checks of its layout; changed.
        manifest: Of ``--data``; None without.

    Raises:
        UserError: A flag does not go with conversations, or only with them.
    """
    is_chat = manifest is not None and manifest.inputs.chat is not None
    args.data_is_chat = is_chat and not args.mock_data
    if not args.data_is_chat:
        if args.refuse_long_conversations:
            raise UserError(
                "--refuse-long-conversations is for conversations, and --data holds none. Remedy: "
                "drop the flag, or --data with what prepare-data --chat made."
            )
        return
    args.dataloader_inter_document_masking = True
    pp = args.pipeline_model_parallel_size
    if pp > 1:
        raise UserError(
            f"--pipeline-model-parallel-size {pp} with conversations ({args.data}): their "
            "sequences end with padding, which stages in the middle of a pipeline would count as "
            "load of the experts. Remedy: --pipeline-model-parallel-size 1."
        )
    for flag, value in (
        ("--eod-mask-loss", args.eod_mask_loss),
        ("--dataloader-fast-cache-load", args.dataloader_fast_cache_load),
        ("--dataloader-defer-npy-index-mmap", args.dataloader_defer_npy_index_mmap),
    ):
        if value:
            raise UserError(
                f"{flag} does not go with conversations ({args.data}), which have a loss mask of "
                f"their own and no index of samples. Remedy: drop {flag}."
            )


def check_chat_sources(args: argparse.Namespace, heads: Mapping[str, IndexHead]) -> None:
    """Refuse to read text as conversations, or conversations as text.

    Args:
        args: Of the run, with ``data_identity`` on rank 0.
        heads: Of the indices that were read, by their prefixes.

    Raises:
        UserError: Names the dataset and the remedy.
    """
    for item in {
        item["prefix"]: item for items in (args.data_identity or {}).values() for item in items
    }.values():
        head = heads.get(item["prefix"])
        is_chat = has_modes(item["prefix"]) if head is None else head.has_modes
        if item["content"] is None or is_chat == args.data_is_chat:
            continue
        if args.data_is_chat:
            raise UserError(
                f"{item['prefix']} is text, and --data {args.data} conversations. Remedy: only "
                "folders that prepare-data --chat made."
            )
        raise UserError(
            f"{item['prefix']} holds conversations, and would be read as text. Remedy: --data with "
            "its folder, whose manifest says so."
        )
