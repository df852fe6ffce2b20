"""Errors for folders that are not a Hugging Face checkpoint to train on."""

import json
import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from trinity_megatron.errors import UserError
from trinity_megatron.untrusted.json_file import read_json

# Of a Megatron checkpoint.
_MEGATRON_FILES = ("latest_checkpointed_iteration.txt", ".metadata")
_BF16_RELEASE = "Remedy: download the model's bf16 release (safetensors)."
_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")
_PICKLES = ("*.bin", "*.pt", "*.pth")
_OTHER_FRAMEWORKS = ("*.h5", "*.msgpack", "*.onnx")
# Integers and floats of at most eight bits; 16-bit integers and above hold several weights each.
_QUANTISED_DTYPES = re.compile(r"(F8|F6|F4|I4|I8|I16|I32|U4|U8|U16|U32)\b|(F8|F6|F4)_")
# What the quantisers store beside or instead of a weight: compressed-tensors, FP8, GPTQ, AWQ,
# bitsandbytes, MXFP4, NVFP4.
_QUANTISED_NAMES = re.compile(
    r"([._](weight_|input_)?(scales?|scales?_inv|scale_2|packed|zero_point|zeros|blocks)"
    r"|[._](qweight|qzeros|g_idx|SCB|absmax|quant_map|weight_shape|weight_format)"
    r"|quant_state\.\w+)$"
)


def explain_folder(folder: Path, missing: str) -> str:
    """Say what a folder is instead of a Hugging Face checkpoint, and the remedy.

    Args:
        folder: As the user named it.
        missing: What was looked for there.
    """
    if not folder.exists():
        return _explain_absence(folder)
    if folder.is_file():
        if folder.suffix.lower() == ".gguf":
            return f"{folder} is a GGUF file, which cannot be trained on. {_BF16_RELEASE}"
        return f"{folder} is a file. Remedy: name the folder that it lies in."
    if (folder / "adapter_config.json").is_file():
        return _explain_adapter(folder)
    if any(folder.glob("*.gguf")):
        return f"{folder} holds GGUF files, which cannot be trained on. {_BF16_RELEASE}"
    if any((folder / name).is_file() for name in _MEGATRON_FILES):
        return (
            f"{folder} is a Megatron checkpoint, not one of Hugging Face. Remedy: trinity-megatron "
            f"convert --from-megatron {folder} --to-hf DIR, or name it as the Megatron side."
        )
    if inner := sorted((*folder.glob("*/config.json"), *folder.glob("snapshots/*/config.json"))):
        names = " or ".join(str(path.parent) for path in inner[:3])
        return f"{folder} holds no {missing} itself. Remedy: name the folder inside it: {names}."
    if any(any(folder.glob(pattern)) for pattern in _PICKLES):
        return (
            f"{folder} holds PyTorch's pickled weights and no {missing}. Remedy: load it with "
            "transformers, and save_pretrained(DIR), which writes safetensors."
        )
    if any(any(folder.glob(pattern)) for pattern in _OTHER_FRAMEWORKS):
        return (
            f"{folder} holds the weights of another framework and no {missing}. Remedy: download "
            "the safetensors of the model."
        )
    return (
        f"{folder} has no {missing}. Remedy: give the folder of a Hugging Face "
        "checkpoint, with its config.json beside the .safetensors files."
    )


def _explain_absence(folder: Path) -> str:
    if folder.is_symlink():
        return f"{folder} is a link to {folder.readlink()}, which is not there. Remedy: mend it."
    name = str(folder)
    if _HUB_ID.fullmatch(name) and not folder.parent.exists():
        return (
            f"{name} is no folder here. Remedy: name one; for a model of the hub, hf download "
            f"{name} --local-dir {folder.name} makes it."
        )
    return f"{name} does not exist. Remedy: name the folder of a Hugging Face checkpoint."


def _explain_adapter(folder: Path) -> str:
    base = "its base model"
    try:
        base = read_json(folder / "adapter_config.json")["base_model_name_or_path"]
    except (ValueError, KeyError, TypeError):
        pass
    return (
        f"{folder} is an adapter (LoRA) and not a model. Remedy: merge it into {base} with peft's "
        "merge_and_unload(), and save_pretrained(DIR)."
    )


def refuse_quantised_config(fields: Mapping[str, Any], name: str) -> None:
    """Refuse a ``config.json`` of quantised weights.

    Args:
        fields: Of the file.
        name: Of the file, in the message.

    Raises:
        UserError: Names the method and the remedy.
    """
    for field in ("quantization_config", "compression_config"):
        if given := fields.get(field):
            known = given if isinstance(given, dict) else {}
            method = next((known[key] for key in _METHODS if known.get(key)), given)
            raise UserError(
                f"{name}: {field} says that the weights are quantised ({str(method)[:40]}); they "
                f"cannot be trained on. {_BF16_RELEASE}"
            )


_METHODS = ("quant_method", "quant_algo", "format")


def refuse_quantised_weights(folder: Path, headers: Iterable[str]) -> None:
    """Refuse tensors of quantised weights, by their dtypes and names.

    Args:
        folder: Of the checkpoint.
        headers: JSON header of each of its files.

    Raises:
        UserError: Names the first one and the remedy.
    """
    for header in headers:
        for name, entry in json.loads(header).items():
            if name == "__metadata__":
                continue
            if _QUANTISED_DTYPES.match(entry["dtype"]) or _QUANTISED_NAMES.search(name):
                raise UserError(
                    f"{folder}: {name} ({entry['dtype']}) belongs to quantised weights, which "
                    f"cannot be trained on. {_BF16_RELEASE}"
                )
