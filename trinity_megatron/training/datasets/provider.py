"""Megatron's GPT datasets from the arguments."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from megatron.core import mpu
from megatron.core.datasets.blended_megatron_dataset_builder import BlendedMegatronDatasetBuilder
from megatron.training import get_args, get_tokenizer
from megatron.training.datasets.data_samplers import MegatronPretrainingSampler
from megatron.training.utils import (
    get_blend_and_blend_per_split,
    is_first_or_last_pipeline_stage,
)

from trinity_megatron.data.mixture.corpora import MixtureOutline
from trinity_megatron.errors import UserError
from trinity_megatron.process.open_files import allow_open_files, explain_open_files
from trinity_megatron.training.datasets.buffer_state import build_stream_loader
from trinity_megatron.training.datasets.chat import ChatDataset
from trinity_megatron.training.datasets.data_identity import fingerprints_of
from trinity_megatron.training.datasets.epoch_order import (
    EpochOrderConfig,
    EpochOrderGPTDataset,
    EpochOrderMockGPTDataset,
    check_is_long_enough,
)
from trinity_megatron.training.datasets.mixture import (
    DomainDataset,
    build_training_set,
    build_validation_set,
)
from trinity_megatron.training.datasets.shared_data import SharedData, share_data
from trinity_megatron.training.datasets.splits import check_unweighted, needed_splits
from trinity_megatron.training.datasets.validation_text import validation_prefixes


def gpt_dataset_config_from_args(args: Any) -> EpochOrderConfig:
    """Megatron's dataset config from Megatron's arguments."""
    blend, blend_per_split = get_blend_and_blend_per_split(args)
    return EpochOrderConfig(
        fingerprints=fingerprints_of(args.data_identity),
        refuse_long_conversations=args.refuse_long_conversations,
        random_seed=args.seed,
        sequence_length=args.seq_length,
        blend=blend,
        blend_per_split=blend_per_split,
        split=args.split,
        num_dataset_builder_threads=args.num_dataset_builder_threads,
        path_to_cache=args.data_cache_path,
        mmap_bin_files=args.mmap_bin_files,
        object_storage_cache_path=args.object_storage_cache_path,
        fast_cache_load=args.dataloader_fast_cache_load,
        defer_npy_index_mmap=args.dataloader_defer_npy_index_mmap,
        tokenizer=get_tokenizer(),
        reset_position_ids=args.reset_position_ids,
        reset_attention_mask=args.reset_attention_mask,
        eod_mask_loss=args.eod_mask_loss,
        create_attention_mask=args.create_attention_mask_in_dataloader,
        mid_level_dataset_surplus=args.mid_level_dataset_surplus,
        allow_ambiguous_pad_tokens=args.allow_ambiguous_pad_tokens,
        context_parallel_size=args.context_parallel_size,
        data_parallel_size=args.data_parallel_size,
        sequence_parallel_size=args.tensor_model_parallel_size * args.sequence_parallel,
        hybrid_context_parallel=args.hybrid_context_parallel,
        inter_document_masking=args.dataloader_inter_document_masking,
    )


def _is_built_on_rank(vp_stage: int | None, is_packed: bool) -> bool:
    if mpu.get_tensor_model_parallel_rank() != 0:
        return False
    return is_packed or is_first_or_last_pipeline_stage(vp_stage)


def _leave_out(config: EpochOrderConfig, needed: Sequence[bool]) -> None:
    """Build no set that the run does not read: it may be too short for one sequence."""
    for splits in (config.split_matrix, config.blend_per_split):
        if splits is None or config.mock:
            continue
        for index, is_needed in enumerate(needed):
            if not is_needed:
                splits[index] = None


def samples_to_build(args: Any, num_samples: list[int]) -> list[int]:
    """What Megatron asks for, and what a resume has behind it and still reads.

    A resume counts on from the samples that are consumed.  They are more than Megatron thinks if
    the run has evaluated more often before, or is complete.

    Args:
        args: Of the run, with the checkpoint's state.
        num_samples: Samples of train, validation and test.
    """
    train, valid, test = num_samples
    if args.skip_train or args.phase_transition_iterations:
        return [train, valid, test]
    if args.consumed_train_samples >= train:
        train = args.consumed_train_samples + 1
    if valid and args.train_iters:
        passed = args.iteration // args.eval_interval
        ahead = max(0, args.train_iters // args.eval_interval - passed) + 1
        batch = args.eval_global_batch_size or args.global_batch_size
        valid = max(valid, args.consumed_valid_samples + ahead * args.eval_iters * batch)
    return [train, valid, test]


class DatasetsProvider:
    """Builds the datasets; ``pretrain()`` calls it on every rank, for each virtual stage.

    Args:
        mixture: That ``--data`` names, with its corpora on the first rank; None without.
    """

    is_distributed = True  # Megatron asks for it

    def __init__(self, mixture: MixtureOutline | None) -> None:
        self._mixture = mixture
        self._shared: SharedData | None = None

    def __call__(self, num_samples: list[int], vp_stage: int | None = None) -> tuple[Any, Any, Any]:
        """Build the datasets.

        Args:
            num_samples: Samples of train, validation and test.
            vp_stage: Virtual pipeline stage, if any.

        Raises:
            UserError: A flag takes the index for granted, and it is not in the cache; or a file
                has changed since the start of the run.
        """
        args = get_args()
        if self._shared is None:
            self._shared = share_data(args, self._mixture)
        config = gpt_dataset_config_from_args(args)
        _leave_out(config, needed_splits(args))
        is_built = partial(_is_built_on_rank, vp_stage, args.dataloader_inter_document_masking)
        if self._shared.mixture is None:
            return _build_blends(args, config, num_samples, is_built)
        num_samples = samples_to_build(args, num_samples)
        with _named_index_errors(args):
            return _build_mixture(args, self._shared, config, num_samples, is_built)


def _build_blends(
    args: Any, config: EpochOrderConfig, num_samples: list[int], is_built: Callable[[], bool]
) -> tuple[Any, Any, Any]:
    """By Megatron's own builder."""
    if args.rank == 0 and not (config.mock or args.data_is_chat):
        check_unweighted(args, num_samples)
    num_samples = samples_to_build(args, num_samples)
    dataset_type: Any = EpochOrderMockGPTDataset if args.mock_data else EpochOrderGPTDataset
    if args.data_is_chat:
        dataset_type = ChatDataset
    with _named_index_errors(args):
        made = BlendedMegatronDatasetBuilder(dataset_type, num_samples, is_built, config).build()
    if not args.skip_train:
        check_is_long_enough(made[0], num_samples[0])
    return made


def _build_mixture(
    args: Any,
    shared: SharedData,
    config: EpochOrderConfig,
    num_samples: Sequence[int],
    is_built: Callable[[], bool],
) -> tuple[Any, Any, Any]:
    data = shared.mixture
    assert data is not None
    if is_built():
        allow_open_files(len(data.heads))
    is_trained, is_evaluated, _ = needed_splits(args)
    train: Any = None
    valid: Any = None
    if is_evaluated:
        prefixes = validation_prefixes(args, data)
        valid = build_validation_set(data, config, num_samples[1], is_built, prefixes)
    if not data.has_streams:
        if is_trained:
            train = build_training_set(data, config, num_samples[0], is_built)
        return train, valid, None
    if is_trained:
        train = build_stream_loader(args, data, shared.texts, config, is_built)
    return train, None if valid is None else _iterate(valid, args), None


def _iterate(valid: DomainDataset, args: Any) -> Iterator[Any]:
    """What Megatron's loader makes of a set, where the training has a loader of its own."""
    sampler = MegatronPretrainingSampler(
        total_samples=len(valid),
        consumed_samples=0 if args.skip_train else args.consumed_valid_samples,
        micro_batch_size=args.eval_micro_batch_size,
        data_parallel_rank=mpu.get_data_parallel_rank(),
        data_parallel_size=mpu.get_data_parallel_world_size(),
    )
    loader = torch.utils.data.DataLoader(
        valid, batch_sampler=sampler, pin_memory=torch.cuda.is_available()
    )
    return iter(loader)


@contextmanager
def _named_index_errors(args: Any) -> Iterator[None]:
    """Name why the index of the samples cannot be written, or is not there.

    Raises:
        UserError: Names the flag, the folder and the remedy.
    """
    try:
        yield
    except UserError:  # of the data
        raise
    except Exception as error:  # Megatron's own has no type
        for one in (error, error.__cause__):
            if words := explain_open_files(one):
                raise UserError(f"--data {args.data}: {words}.") from error
        if isinstance(error.__cause__, OSError):
            raise UserError(
                f"--data-cache-path {args.data_cache_path}: the order of the samples cannot be "
                f"written: {error.__cause__}. Remedy: mend that, or name a folder with free space."
            ) from error
        if not (args.dataloader_fast_cache_load or args.dataloader_defer_npy_index_mmap):
            raise
        flag = "fast-cache-load" if args.dataloader_fast_cache_load else "defer-npy-index-mmap"
        raise UserError(
            f"--dataloader-{flag}: --data-cache-path {args.data_cache_path} has no index of these "
            f"samples ({error}). Remedy: one run of this length without the flag, which writes it."
        ) from error
