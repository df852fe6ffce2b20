"""Megatron's GPT datasets from the arguments."""

from functools import partial
from typing import Any

from megatron.core import mpu
from megatron.core.datasets.blended_megatron_dataset_builder import BlendedMegatronDatasetBuilder
from megatron.training import get_args, get_tokenizer
from megatron.training.utils import (
    get_blend_and_blend_per_split,
    is_first_or_last_pipeline_stage,
)

from trinity_megatron.training.data_identity import share_identity
from trinity_megatron.training.epoch_order import (
    EpochOrderConfig,
    EpochOrderGPTDataset,
    EpochOrderMockGPTDataset,
    check_is_long_enough,
)


def gpt_dataset_config_from_args(args: Any) -> EpochOrderConfig:
    """Megatron's dataset config from Megatron's arguments; call it on all ranks."""
    blend, blend_per_split = get_blend_and_blend_per_split(args)
    return EpochOrderConfig(
        fingerprints=share_identity(args),
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


def train_valid_test_datasets_provider(
    num_samples: list[int], vp_stage: int | None = None
) -> tuple[Any, Any, Any]:
    """Build the datasets; called by ``pretrain()`` on every rank.

    Args:
        num_samples: Samples of train, validation and test.
        vp_stage: Virtual pipeline stage, if any.
    """
    args = get_args()
    config = gpt_dataset_config_from_args(args)
    dataset_type = EpochOrderMockGPTDataset if args.mock_data else EpochOrderGPTDataset
    is_built = partial(_is_built_on_rank, vp_stage, args.dataloader_inter_document_masking)
    made = BlendedMegatronDatasetBuilder(dataset_type, num_samples, is_built, config).build()
    if not args.skip_train:
        check_is_long_enough(made[0], num_samples[0])
    return made


train_valid_test_datasets_provider.is_distributed = True  # type: ignore[attr-defined]
