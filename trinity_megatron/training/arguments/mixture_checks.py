"""Checks of the mixture that ``--data`` names, at the start of a run."""

from __future__ import annotations

import argparse
import math
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from functools import partial
from pathlib import Path

from trinity_megatron.data.corpus import hash_file
from trinity_megatron.data.given_tokenizer import load_tokenizer
from trinity_megatron.data.index_file import IndexHead
from trinity_megatron.data.mixture.corpora import MixtureData, MixtureOutline, RawText
from trinity_megatron.data.mixture.open_corpora import find_texts
from trinity_megatron.data.mixture.plan import describe_epochs, make_plan
from trinity_megatron.data.text.text_corpus import TextCorpus
from trinity_megatron.data.text.token_parts import TokenCorpus
from trinity_megatron.errors import UserError
from trinity_megatron.process.environment import count_cores
from trinity_megatron.process.screen import tell, tell_once
from trinity_megatron.training.arguments.schedule import BatchSizes
from trinity_megatron.training.datasets.data_identity import describe_dataset
from trinity_megatron.training.datasets.mixture_past import describe_mixture
from trinity_megatron.training.datasets.splits import is_evaluating
from trinity_megatron.training.datasets.validation_text import tokenize_validation


def check_mixture(args: argparse.Namespace, mixture: MixtureOutline | None) -> None:
    """Refuse a mixture that this run cannot follow; describe it in ``args.data_mixture``.

    The first rank does so for all, see ``training/datasets/shared_data.py``.

    Args:
        args: Of the run, with its schedule; changed.
        mixture: That ``--data`` names, with its corpora on the first rank; None without.

    Raises:
        UserError: Names the file, the key and the remedy.
    """
    args.data_mixture = None
    args.text_corpora = None
    if isinstance(mixture, MixtureData):
        _check_corpora(args, mixture)
    elif mixture is not None and not args.tokenizer_model:
        raise UserError(
            f"--data {mixture.mixture.file} names no tokenizer. Remedy: tokenizer: FOLDER, of a "
            "Hugging Face tokenizer."
        )


def _check_corpora(args: argparse.Namespace, data: MixtureData) -> None:
    _check_flags(args)
    args.train_data_path = data.train_prefixes
    args.valid_data_path = data.validation_prefixes
    _check_tokenizer(args, data)
    if data.raw:
        _find_corpora(args, data)
    args.data_mixture = describe_mixture(data, args.seq_length)
    _check_validation(args, data)
    if is_evaluating(args):
        tokenize_validation(args, data)
    if args.skip_train:
        return
    if data.has_streams:
        _finish_streams(args, data)
    if data.mixture.order == "rsdb" and not data.raw:
        _warn_of_large_buffers(args, data)
    samples = args.train_samples or BatchSizes.of(args).samples_after(args.train_iters or 0)
    plan = make_plan(data, seq_length=args.seq_length, seed=args.seed, samples=samples)
    for line in describe_epochs(plan):
        tell_once(f"> {line}")


def _check_flags(args: argparse.Namespace) -> None:
    """The mixture is all of the data."""
    for name in (
        *("train_data_path", "valid_data_path", "test_data_path", "data_path"),
        *("data_args_path", "per_split_data_args_path", "mock_data"),
    ):
        if getattr(args, name):
            flag = f"--{name.replace('_', '-')}"
            raise UserError(
                f"{flag} beside --data {args.data}: the file names all data of the run. Remedy: "
                f"drop {flag} (a corpus may have validation: PATH)."
            )
    if args.phase_transition_iterations:
        raise UserError(
            f"--phase-transition-iterations beside --data {args.data}, whose phases need no "
            "restart. Remedy: drop the flag."
        )


def _check_tokenizer(args: argparse.Namespace, data: MixtureData) -> None:
    """Refuse a tokenizer that raw text cannot be encoded with, or that prepared data are not of.

    Raises:
        UserError: Names the flag and the remedy.
    """
    has_text = any(isinstance(item.validation, RawText) for item in data.corpora.values())
    if not data.raw and not has_text:
        return
    folder = Path(args.tokenizer_model or "")
    if not args.tokenizer_model or not folder.is_dir():
        given = f" {args.tokenizer_model}" if args.tokenizer_model else ""
        raise UserError(
            f"--data {args.data} is raw text, and --tokenizer-model{given} is no folder. Remedy: "
            "tokenizer: FOLDER in the file of the mixture, or --tokenizer-model FOLDER, of a "
            "Hugging Face tokenizer."
        )
    load_tokenizer(folder)
    known = data.manifest.tokenizer_fingerprint if data.manifest else None
    if known not in (None, hash_file(folder / "tokenizer.json")):
        raise UserError(
            f"--tokenizer-model {folder} is not the tokenizer ({known[:12]}) of the prepared "
            f"corpora of --data {args.data}. Remedy: drop the flag."
        )


def _find_corpora(args: argparse.Namespace, data: MixtureData) -> None:
    """Find what the streams read.

    Raises:
        UserError: A corpus cannot be read.
    """
    with ThreadPoolExecutor(count_cores()) as pool:
        args.text_corpora = list(pool.map(partial(_with_content, data.heads), find_texts(data)))
    for corpus in args.text_corpora:
        what = "prepared"
        if isinstance(corpus, TextCorpus):
            what = f"{len(corpus.files)} files of text"
        tell(f"> {corpus.name}: {what}, {corpus.num_bytes:,} bytes")


def _with_content(
    heads: Mapping[str, IndexHead], corpus: TextCorpus | TokenCorpus
) -> TextCorpus | TokenCorpus:
    if isinstance(corpus, TextCorpus):
        return corpus
    prefix = str(corpus.prefix)
    return replace(corpus, content=describe_dataset(prefix, heads[prefix])["content"])


def _finish_streams(args: argparse.Namespace, data: MixtureData) -> None:
    """Let Megatron take the loader of the streams, and save its state in each checkpoint."""
    for flag, value in (
        ("--non-persistent-ckpt-type", args.non_persistent_ckpt_type),
        ("--num-layers-per-virtual-pipeline-stage", args.num_layers_per_virtual_pipeline_stage),
        (
            "--num-virtual-stages-per-pipeline-rank",
            args.num_virtual_stages_per_pipeline_rank,
        ),
    ):
        if value is not None:
            raise UserError(
                f"{flag} {value} with {_words(data)} of --data {args.data}, whose loader is saved "
                "in the checkpoints of --save, one for each rank. Remedy: drop the flag, or "
                "prepared data in order: shuffled."
            )
    args.dataloader_type = "external"
    args.dataloader_save = args.save  # Megatron looks for it, and has no flag
    sizes = [batch for _, batch in BatchSizes.of(args).entries]
    buffer = args.data_mixture["buffer"]
    buffer["streams"] = buffer["streams"] or math.gcd(*sizes)


def _words(data: MixtureData) -> str:
    return "raw text" if data.raw else "order: rsdb"


def _warn_of_large_buffers(args: argparse.Namespace, data: MixtureData) -> None:
    buffer = args.data_mixture["buffer"]
    capacity = 2 * buffer["documents"] * buffer["streams"]
    held = sum(item.documents for item in data.indexed.values())
    if capacity > held:
        tell_once(
            f"> order: rsdb: the buffers hold {capacity:,} documents and the corpora have "
            f"{held:,}, so those of several epochs are mixed; a smaller number under rsdb, "
            "documents, makes the buffers smaller"
        )


def _check_validation(args: argparse.Namespace, data: MixtureData) -> None:
    if not is_evaluating(args):
        return
    if not data.validated:
        raise UserError(
            f"--eval-iters {args.eval_iters}, and no corpus of --data {args.data} has validation "
            "data. Remedy: validation: PATH for a corpus (a prefix, or text), or --eval-iters 0."
        )
    batch = args.eval_global_batch_size or args.global_batch_size or 1
    if args.eval_iters * batch < len(data.validated):
        raise UserError(
            f"--eval-iters {args.eval_iters}: an evaluation reads {args.eval_iters * batch} "
            f"sequences, and --data {args.data} has {len(data.validated)} corpora with validation "
            f"data. Remedy: --eval-iters {-(-len(data.validated) // batch)} or more."
        )
