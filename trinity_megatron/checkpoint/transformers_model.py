"""Models of transformers, filled with Megatron's tensors."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING, Any

import torch

from trinity_megatron.checkpoint.hf_assets import Assets
from trinity_megatron.checkpoint.param_mapping import resolve
from trinity_megatron.checkpoint.source import MegatronSource
from trinity_megatron.checkpoint.tensor_checks import match_tensors
from trinity_megatron.errors import UserError
from trinity_megatron.model.config import TrinityConfig
from trinity_megatron.model.hf_config import (
    hf_config_from_trinity,
    plain_rope,
    trinity_config_from_hf,
)

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
    found = source.model_tensors()
    entries = match_tensors(found, config, assets=assets, name=name, stacked_experts=True)
    dtype = found["output_layer.weight"][0]
    fields = assets.config if assets else hf_config_from_trinity(config, dtype=dtype)
    model = _empty_model(fields, dtype)
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


def fill_transformers_model(
    fields: Mapping[str, Any], tensors: Iterable[tuple[str, torch.Tensor]]
) -> Any:
    """Build the model in transformers in fp32 from tensors of the hub's layout.

    Args:
        fields: Of its ``config.json``.
        tensors: Name and values of every tensor, in any order.

    Returns:
        transformers' ``AfmoeForCausalLM``.

    Raises:
        UserError: A tensor is missing, or belongs to another model.
    """
    model = _empty_model(fields, torch.float32)
    targets = dict(model.named_parameters())
    missing = {name for entry in resolve(trinity_config_from_hf(fields)) for name in entry.hf}
    with torch.no_grad():
        for name, values in tensors:
            if name not in missing:
                raise UserError(f"{name} is not a tensor of this model, or comes twice.")
            missing.remove(name)
            _find_target(targets, name).copy_(values)
    if missing:
        raise UserError(
            f"{len(missing)} tensors of the model are missing, the first {min(missing)}. Remedy: "
            "export it again."
        )
    return model.eval()


_EXPERT = re.compile(r"(.*\.mlp\.experts\.)(\d+)\.(gate|up|down)_proj\.weight")


def _find_target(targets: Mapping[str, torch.Tensor], name: str) -> torch.Tensor:
    """Where a tensor of the hub's layout lies in transformers' stacked one."""
    match = _EXPERT.fullmatch(name)
    if match is None:
        return targets[name]
    prefix, expert, kind = match[1], int(match[2]), match[3]
    if kind == "down":
        return targets[f"{prefix}down_proj"][expert]
    gate, up = targets[f"{prefix}gate_up_proj"][expert].chunk(2)
    return gate if kind == "gate" else up


def _empty_model(fields: Mapping[str, Any], dtype: torch.dtype) -> Any:
    """A model with weights yet to be filled in."""
    from transformers import AfmoeForCausalLM
    from transformers.initialization import no_init_weights

    config = transformers_config({**fields, "dtype": dtype})
    with no_init_weights():
        model = AfmoeForCausalLM._from_config(config, dtype=dtype)
    if any(
        (size * dtype.itemsize) % 16 for size in (config.hidden_size, config.moe_intermediate_size)
    ):
        model.set_experts_implementation("eager")  # grouped_mm requires rows of 16 bytes
    return model


def transformers_config(fields: Mapping[str, Any]) -> AfmoeConfig:
    """transformers' config from the fields of a ``config.json`` with old or new RoPE keys."""
    from transformers import AfmoeConfig

    others = {n: value for n, value in fields.items() if n not in ("rope_scaling", "rope_theta")}
    return AfmoeConfig(**{**others, "rope_parameters": plain_rope(fields)})
