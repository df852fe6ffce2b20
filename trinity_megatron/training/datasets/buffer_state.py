"""The loader of virtual streams from the arguments, and its state beside a checkpoint."""

from __future__ import annotations

import argparse
import pickle
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from megatron.core import mpu
from megatron.core.datasets.gpt_dataset import GPTDataset

from trinity_megatron.checkpoint.torch_dist.tracker import iteration_name
from trinity_megatron.data.mixture.corpora import MixtureData
from trinity_megatron.data.rsdb.length_bias import LengthBias
from trinity_megatron.data.rsdb.virtual_stream import BufferedMixture
from trinity_megatron.data.text.text_corpus import TextCorpus
from trinity_megatron.data.text.token_parts import TokenCorpus
from trinity_megatron.errors import UserError
from trinity_megatron.process.screen import tell_once
from trinity_megatron.training.datasets.buffer_loader import BufferedSamples, BufferLoader
from trinity_megatron.training.datasets.epoch_order import EpochOrderConfig
from trinity_megatron.training.datasets.mixture_past import numbered_parts
from trinity_megatron.training.datasets.stream_loader import (
    PackedSamples,
    ReadingRank,
    StreamLoader,
)
from trinity_megatron.training.datasets.text_loader import TextLoader
from trinity_megatron.training.datasets.texts import (
    contents_of,
    is_other_text,
    make_text_mixture,
)

# Megatron's name, see maybe_save_dataloader_state; the folder has the pipeline's rank in it.
_FILES = "mp_rank_00*/train_dataloader_dprank*.pt"


def build_stream_loader(
    args: argparse.Namespace,
    data: MixtureData,
    texts: Sequence[TextCorpus | TokenCorpus],
    config: EpochOrderConfig,
    is_built: Callable[[], bool],
) -> StreamLoader | None:
    """The loader of this rank, at the sample that the run has come to.

    Args:
        args: Of the run, with the checkpoint's counters and ``data_mixture``.
        data: The mixture.
        texts: What the streams of a mixture with raw text read.
        config: Of the datasets.
        is_built: Whether this rank reads data.

    Returns:
        None where it reads none.

    Raises:
        UserError: The state is missing, damaged or does not fit; names the file and the remedy.
    """
    if not is_built():
        return None
    contents = contents_of(texts, data.mixture.order) if data.raw else None
    folder = None
    if args.consumed_train_samples:
        folder = Path(args.load) / iteration_name(args.iteration)
    state = folder and read_head(folder, args, contents)
    if state:
        args.data_mixture["buffer"]["streams"] = state["num_streams"]
    rank = ReadingRank(
        mpu.get_data_parallel_rank(), mpu.get_data_parallel_world_size(), args.micro_batch_size
    )
    check_streams(args.data_mixture["buffer"]["streams"], rank.at_a_time, data)
    loader: StreamLoader
    if data.raw:
        mixture = make_text_mixture(args, data, texts)
        workers = args.num_workers
        samples = PackedSamples(config)
        loader = TextLoader(mixture, samples, rank, args.consumed_train_samples, workers)
    else:
        loader = _make_buffer_loader(args, data, config, rank)
    if folder and state:
        load_state(loader, folder, state)
    return loader


def _make_buffer_loader(
    args: argparse.Namespace, data: MixtureData, config: EpochOrderConfig, rank: ReadingRank
) -> BufferLoader:
    datasets = [
        GPTDataset.build_low_level_dataset(str(item.train), config)
        for item in data.indexed.values()
    ]
    mixture = _make_mixture(args.data_mixture, datasets, args)
    samples = BufferedSamples(datasets, config)
    return BufferLoader(mixture, samples, rank, args.consumed_train_samples)


def check_streams(num_streams: int, at_a_time: int, data: MixtureData) -> None:
    """Refuse streams that the ranks cannot share.

    Args:
        num_streams: Number of virtual streams.
        at_a_time: Samples that all ranks read at a time.
        data: The mixture.

    Raises:
        UserError: Names both numbers and the remedy.
    """
    if num_streams % at_a_time:
        raise UserError(
            f"--data {data.mixture.file}: there are {num_streams} virtual streams, and all "
            f"ranks together read {at_a_time} sequences at a time (micro-batch by data-parallel "
            f"ranks), which does not divide them. Remedy: a smaller --micro-batch-size, or fewer "
            "ranks; for a new run rsdb: {streams: N}, a multiple of that."
        )


def _make_mixture(
    described: dict[str, Any], datasets: list[Any], args: argparse.Namespace
) -> BufferedMixture:
    return BufferedMixture(
        names=described["corpora"],
        lengths=[dataset.sequence_lengths for dataset in datasets],
        starts=[phase["start"] for phase in described["phases"]],
        parts=numbered_parts(described),
        documents=described["buffer"]["documents"],
        num_streams=described["buffer"]["streams"],
        seed=args.seed,
        seq_length=args.seq_length,
        biases={
            described["corpora"].index(name): LengthBias(**settings)
            for name, settings in described["length_biases"].items()
        },
    )


def read_head(
    folder: Path, args: argparse.Namespace, contents: Mapping[str, str] | None = None
) -> dict[str, Any] | None:
    """The state of one rank, which says how the streams lie on all; None for a new order.

    Args:
        folder: Of the checkpoint.
        args: Of the run that resumes, with the checkpoint's counters.
        contents: See :func:`contents_of`; None for indexed data.

    Raises:
        UserError: It is missing, damaged or of another sample of the run.
    """
    files = sorted(folder.glob(_FILES))
    if not files:
        if args.allow_data_change:
            tell_once(f"> {folder} has no state of the streams: they begin with new documents")
            return None
        raise UserError(
            f"{folder} has no state of the streams (train_dataloader_dprank*.pt). Remedy: another "
            "--ckpt-step, or --allow-data-change to begin with the first documents."
        )
    state = _read(files[0])
    if state["consumed"] != args.consumed_train_samples:
        raise UserError(
            f"{files[0]} is of {state['consumed']} consumed samples, and the checkpoint of "
            f"{args.consumed_train_samples}. Remedy: another --ckpt-step."
        )
    if args.allow_data_change and is_other_text(state.get("contents"), contents):
        tell_once(f"> {folder} has read other text: the streams begin with the first documents")
        return None
    return state


def load_state(loader: StreamLoader, folder: Path, head: dict[str, Any]) -> None:
    """Read the files of the ranks that had this rank's streams.

    Args:
        loader: That goes on.
        folder: Of the checkpoint.
        head: The state of one of its ranks.

    Raises:
        UserError: A file is missing or damaged, or does not fit the mixture.
    """
    states: dict[int, Any] = {}
    at_a_time = head["micro_batch"] * head["size"]
    paths = {int(path.stem.rpartition("dprank")[2]): path for path in folder.glob(_FILES)}
    for number in loader.numbers:
        if number in states:
            continue
        owner = (number - head["consumed"]) % at_a_time // head["micro_batch"]
        if owner not in paths:
            raise UserError(
                f"{folder} lacks the state of data-parallel rank {owner} "
                f"(train_dataloader_dprank{owner:03d}.pt). Remedy: another --ckpt-step."
            )
        states |= _read(paths[owner])["streams"]
    try:
        loader.load_streams(states)
    except (ValueError, KeyError) as error:
        raise UserError(
            f"{folder}: the state of the streams does not fit --data: {error}. Remedy: the "
            "corpora and the rsdb settings of that run, or another --out."
        ) from error


def _read(path: Path) -> dict[str, Any]:
    try:
        return torch.load(path, weights_only=True)["dataloader_state_dict"]
    except (RuntimeError, OSError, pickle.UnpicklingError, EOFError, KeyError) as error:
        raise UserError(
            f"{path} is damaged ({type(error).__name__}). Remedy: another --ckpt-step."
        ) from error
