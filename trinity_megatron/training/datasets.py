"""Megatron's GPT datasets from the arguments."""

from functools import partial
from typing import Any

from megatron.core import mpu
from megatron.core.datasets.blended_megatron_dataset_builder import BlendedMegatronDatasetBuilder
from megatron.core.datasets.gpt_dataset import GPTDataset, GPTDatasetConfig, MockGPTDataset
from megatron.training import get_args, get_tokenizer
from megatron.training.utils import (
    get_blend_and_blend_per_split,
    is_first_or_last_pipeline_stage,
)


def gpt_dataset_config_from_args(args: Any) -> GPTDatasetConfig:
    """Megatron's dataset config from Megatron's arguments."""
    blend, blend_per_split = get_blend_and_blend_per_split(args)
    return GPTDatasetConfig(
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

    Raises:
        ValueError: A flag takes the index for granted, and it is not in the cache.
    """
    args = get_args()
    config = gpt_dataset_config_from_args(args)
    dataset_type = MockGPTDataset if args.mock_data else GPTDataset
    is_built = partial(_is_built_on_rank, vp_stage, args.dataloader_inter_document_masking)
    builder = BlendedMegatronDatasetBuilder(dataset_type, num_samples, is_built, config)
    try:
        return builder.build()
    except Exception as error:
        if not (args.dataloader_fast_cache_load or args.dataloader_defer_npy_index_mmap):
            raise
        flag = "fast-cache-load" if args.dataloader_fast_cache_load else "defer-npy-index-mmap"
        raise ValueError(
            f"--dataloader-{flag}: --data-cache-path {args.data_cache_path} has no index of these "
            f"samples ({error}). Remedy: one run of this length without the flag, which writes it."
        ) from error


train_valid_test_datasets_provider.is_distributed = True  # type: ignore[attr-defined]
