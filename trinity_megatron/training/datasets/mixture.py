"""The training and validation sets of ``--data mix.yaml``."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from megatron.core.datasets.blended_megatron_dataset_builder import BlendedMegatronDatasetBuilder
from megatron.core.datasets.utils import Split

from trinity_megatron.data.index_file import IndexHead
from trinity_megatron.data.mixture.corpora import MixtureData
from trinity_megatron.data.mixture.plan import make_schedule
from trinity_megatron.data.mixture.schedule import MixtureSchedule
from trinity_megatron.training.datasets.epoch_order import (
    EpochOrderConfig,
    EpochOrderGPTDataset,
    FileOrderGPTDataset,
)


class MixtureDataset(torch.utils.data.Dataset):
    """Samples of several corpora in the order of a schedule: Megatron's view of a mixture.

    Args:
        schedule: Says which sample comes from where.
        datasets: Of the corpora; None for those that the run does not come to.
        num_samples: Of the run.
    """

    split = Split.train

    def __init__(
        self, schedule: MixtureSchedule, datasets: Sequence[Any], num_samples: int
    ) -> None:
        self.schedule = schedule
        self.datasets = datasets
        self.num_samples = num_samples

    def __len__(self) -> int:
        return self.num_samples

    def __getitem__(self, index: int) -> dict[str, Any]:
        corpora, numbers = self.schedule.locate(np.array([index]))
        corpus = int(corpora[0])
        return {"dataset_id": corpus, **self.datasets[corpus][int(numbers[0])]}


class DomainDataset(torch.utils.data.Dataset):
    """The validation sets of the corpora, in turns: an evaluation has as many samples of each.

    Args:
        datasets: By number of the corpus in the mixture.
        num_samples: Of the run.
    """

    split = Split.valid

    def __init__(self, datasets: dict[int, Any], num_samples: int) -> None:
        self.numbers = list(datasets)
        self.datasets = list(datasets.values())
        self.num_samples = num_samples

    def __len__(self) -> int:
        return self.num_samples

    def __getitem__(self, index: int) -> dict[str, Any]:
        turn, place = divmod(int(index), len(self.datasets))
        return {"dataset_id": self.numbers[place], **self.datasets[place][turn]}


def build_training_set(
    data: MixtureData,
    config: EpochOrderConfig,
    num_samples: int,
    is_built: Callable[[], bool],
) -> MixtureDataset | None:
    """Build the training set; call it on every rank.

    Args:
        data: The mixture.
        config: Of the datasets.
        num_samples: Samples of the run.
        is_built: Whether this rank reads data.

    Returns:
        None where it reads none.
    """
    is_sequential = data.mixture.order == "sequential"
    kind = FileOrderGPTDataset if is_sequential else EpochOrderGPTDataset
    schedule = make_schedule(data.mixture, config.sequence_length, config.random_seed)
    counts = schedule.count(num_samples)
    datasets = [
        _build(kind, config, Split.train, (item.train, item.train_head), int(count), is_built)
        if count
        else None
        for item, count in zip(data.indexed.values(), counts, strict=True)
    ]
    return MixtureDataset(schedule, datasets, num_samples) if is_built() else None


def build_validation_set(
    data: MixtureData,
    config: EpochOrderConfig,
    num_samples: int,
    is_built: Callable[[], bool],
    prefixes: Mapping[str, Path],
) -> DomainDataset | None:
    """Build the validation set; call it on every rank.

    Args:
        data: The mixture.
        config: Of the datasets.
        num_samples: Samples of all evaluations of the run.
        is_built: Whether this rank reads data.
        prefixes: Of the validation data, by name of the corpus.

    Returns:
        None where it reads none.
    """
    each = -(-num_samples // max(1, len(prefixes)))
    numbers = {name: number for number, name in enumerate(data.corpora)}
    datasets = {}
    for name, prefix in prefixes.items():
        known = prefix, data.corpora[name].validation_head
        datasets[numbers[name]] = _build(
            EpochOrderGPTDataset, config, Split.valid, known, each, is_built
        )
    return DomainDataset(datasets, num_samples) if is_built() and datasets else None


def _build(
    kind: type[EpochOrderGPTDataset],
    config: EpochOrderConfig,
    split: Split,
    known: tuple[Path, IndexHead | None],
    num_samples: int,
    is_built: Callable[[], bool],
) -> Any:
    """One corpus, by Megatron's builder, which lets rank 0 write the index.

    Args:
        known: Its prefix, and the head of its index if that was read.
    """
    prefix, head = known
    is_first = not torch.distributed.is_initialized() or torch.distributed.get_rank() == 0
    if head is not None and is_first:
        head.check_unchanged(prefix)
    blends: list[Any] = [None] * len(Split)
    blends[split.value] = ([str(prefix)], None)
    sizes = [0] * len(Split)
    sizes[split.value] = num_samples
    own = copy.copy(config)
    own.blend_per_split = blends
    return BlendedMegatronDatasetBuilder(kind, sizes, is_built, own).build()[split.value]
