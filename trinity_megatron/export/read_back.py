"""Reading an export back, dequantised, as the model that a server would compute with."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open

from trinity_megatron.checkpoint.param_mapping import resolve
from trinity_megatron.checkpoint.transformers_model import fill_transformers_model
from trinity_megatron.errors import UserError
from trinity_megatron.export.fp8_block import FP8, dequantise_blocks
from trinity_megatron.export.fp8_encoding import SCALE_SUFFIX
from trinity_megatron.export.gguf_file import FILE_NAME
from trinity_megatron.export.gguf_layout import lay_out
from trinity_megatron.export.gguf_package import import_gguf
from trinity_megatron.model.config import TrinityConfig
from trinity_megatron.model.hf_config import (
    hf_config_from_trinity,
    read_hf_config,
)


def read_back(folder: Path, config: TrinityConfig) -> Any:
    """Load an export in fp32.

    Args:
        folder: What ``export --out`` was, of any format.
        config: The model that was exported.

    Returns:
        transformers' ``AfmoeForCausalLM``.

    Raises:
        UserError: The folder is not an export of this model.
    """
    if (folder / FILE_NAME).is_file():
        return fill_transformers_model(
            hf_config_from_trinity(config), read_gguf_tensors(folder / FILE_NAME, config)
        )
    fields = read_hf_config(folder)
    fields.pop("quantization_config", None)
    return fill_transformers_model(fields, read_safetensors(folder))


def read_safetensors(folder: Path) -> Iterator[tuple[str, torch.Tensor]]:
    """Every tensor of a Hugging Face export, block FP8 dequantised, one at a time.

    Raises:
        UserError: A tensor in FP8 has no scale.
    """
    paths = sorted(folder.glob("*.safetensors"))
    scales = {}
    for path in paths:
        with safe_open(path, framework="pt") as file:
            names = [name for name in file.keys() if name.endswith(SCALE_SUFFIX)]
            scales.update(
                {name.removesuffix(SCALE_SUFFIX): file.get_tensor(name) for name in names}
            )
    for path in paths:
        with safe_open(path, framework="pt") as file:
            for name in file.keys():
                if name.endswith(SCALE_SUFFIX):
                    continue
                values = file.get_tensor(name)
                if values.dtype == FP8:
                    if name not in scales:
                        raise UserError(f"{path}: {name} is FP8 and has no {name}{SCALE_SUFFIX}.")
                    values = dequantise_blocks(values, scales[name])
                yield name, values


def read_gguf_tensors(path: Path, config: TrinityConfig) -> Iterator[tuple[str, torch.Tensor]]:
    """Every tensor of a GGUF file in fp32 under its Hugging Face name, one at a time.

    Args:
        path: The file.
        config: The model.

    Raises:
        UserError: A tensor is missing.
    """
    gguf = import_gguf()
    found = {tensor.name: tensor for tensor in gguf.GGUFReader(path).tensors}
    _, places = lay_out(resolve(config), config.num_moe_experts or 0, "F32")
    for hf_name, place in places.items():
        if place.tensor.name not in found:
            raise UserError(f"{path} has no {place.tensor.name}. Remedy: export it again.")
        stored = found[place.tensor.name]
        data = stored.data
        if len(place.tensor.shape) > len(place.shape):
            data = data[place.expert]
        values = gguf.quants.dequantize(data, stored.tensor_type)
        yield hf_name, torch.from_numpy(values.copy()).view(place.shape)
