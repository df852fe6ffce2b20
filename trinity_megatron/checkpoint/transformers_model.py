"""Models of transformers, filled with Megatron's tensors."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import torch

from trinity_megatron.checkpoint.hf_assets import Assets
from trinity_megatron.checkpoint.source import MegatronSource
from trinity_megatron.checkpoint.tensor_checks import match_tensors
from trinity_megatron.model.config import TrinityConfig
from trinity_megatron.model.hf_config import hf_config_from_trinity, plain_rope

if TYPE_CHECKING:
    from transformers import AfmoeConfig


def load_transformers_model(
    source: MegatronSource,
    config: TrinityConfig,
    *,
    name: str,
    assets: Assets | None = None,
) -> Any:
    """Build the model in transformers, in the dtype of Megatron's tensors.

    The expert bias stays in fp32.

    Args:
        source: Source of the tensors.
        config: Config of the model.
        name: Name of the source in messages.
        assets: Files of the Hugging Face checkpoint that training started from.

    Returns:
        transformers' ``AfmoeForCausalLM``.

    Raises:
        UserError: The tensors do not match the config.
    """
    from transformers import AfmoeForCausalLM
    from transformers.initialization import no_init_weights

    found = source.model_tensors()
    entries = match_tensors(found, config, assets=assets, name=name, stacked_experts=True)
    dtype = found["output_layer.weight"][0]
    fields = assets.config if assets else hf_config_from_trinity(config, dtype=dtype)
    hf_config = transformers_config({**fields, "dtype": dtype})
    with no_init_weights():
        model = AfmoeForCausalLM._from_config(hf_config, dtype=dtype)
    if (config.hidden_size * dtype.itemsize) % 16 or (
        hf_config.moe_intermediate_size * dtype.itemsize
    ) % 16:
        model.set_experts_implementation("eager")  # grouped_mm requires rows of 16 bytes
    tensors = dict(model.named_parameters())
    with torch.no_grad():
        for entry in entries:
            if entry.keep_fp32:
                for hf_name in entry.hf:
                    tensors[hf_name].data = tensors[hf_name].data.float()
            for parts in source.parts(entry.megatron):
                whole, start = source.read(parts), parts[0].start
                for block in entry.clip(start, tuple(whole.shape)):
                    target = block.hf_view(tensors[block.hf_name])
                    target.copy_(block.megatron_view(whole, start))
    return model.eval()


def transformers_config(fields: Mapping[str, Any]) -> AfmoeConfig:
    """transformers' config from the fields of a ``config.json`` with old or new RoPE keys."""
    from transformers import AfmoeConfig

    others = {n: value for n, value in fields.items() if n not in ("rope_scaling", "rope_theta")}
    return AfmoeConfig(**{**others, "rope_parameters": plain_rope(fields)})
