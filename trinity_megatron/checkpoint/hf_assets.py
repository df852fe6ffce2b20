"""What a Hugging Face checkpoint has beside its weights, kept with the Megatron checkpoint.

Config, tokenizer, chat template, licence and the headers of the weight files wait in ``hf/`` beside
the iterations, so that an export has them again, in the same files.
"""

import argparse
import json
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from trinity_megatron.checkpoint.hf_weights import check_file_names, parse_header
from trinity_megatron.checkpoint.integrity.checks import check_stays_inside
from trinity_megatron.data.corpus import hash_file
from trinity_megatron.data.given_tokenizer import get_special_token, is_tokenizer_file
from trinity_megatron.data.tokenizer import CONFIG_NAME, TEMPLATE_NAME
from trinity_megatron.data.tokenizer_file import parse_tokenizer
from trinity_megatron.errors import UserError
from trinity_megatron.model.hf_config import read_hf_config
from trinity_megatron.untrusted.json_file import read_json
from trinity_megatron.untrusted.links import copy_file

ASSETS_NAME = "hf"
# Beside the iterations of a run: SHA-256 of the tokenizer.json that it was trained with, and a copy
# of the tokenizer.
STAMP_NAME = "tokenizer.sha256"
_TOKENIZER_NAME = "tokenizer"
_TOKENIZER_FILE = "tokenizer.json"
_HEADERS_NAME = "safetensors_headers.json"
_WEIGHT_SUFFIXES = (".safetensors", ".bin", ".pt", ".pth", ".gguf", ".onnx", ".h5", ".msgpack")
_GENERATION_CONFIG = "generation_config.json"


@dataclass(frozen=True)
class Assets:
    """The folder ``hf/``.

    Attributes:
        folder: Where it lies.
        config: Its ``config.json``.
        headers: JSON header of each weight file, as it was.
    """

    folder: Path
    config: dict[str, Any]
    headers: dict[str, str]

    def copy_files(self, target: Path) -> None:
        """Copy everything but the headers."""
        for path in self.folder.iterdir():
            if path.name != _HEADERS_NAME:
                copy_file(path, target / path.name)


def save_assets(hf: Path, target: Path, headers: Mapping[str, str]) -> None:
    """Copy the files beside the weights.

    Args:
        hf: Hugging Face checkpoint.
        target: The folder ``hf/`` to make.
        headers: JSON header of each weight file.
    """
    target.mkdir(exist_ok=True)
    for path in sorted(hf.iterdir()):
        if path.is_file() and not path.name.endswith(_WEIGHT_SUFFIXES):
            copy_file(path, target / path.name)
    (target / _HEADERS_NAME).write_text(json.dumps(dict(headers)), encoding="utf-8")


def find_assets(checkpoint: Path) -> Assets | None:
    """The assets of a checkpoint; None if it did not begin as a Hugging Face checkpoint.

    Args:
        checkpoint: What ``--save`` was, or the folder of one iteration.

    Raises:
        ValueError: They are damaged.
    """
    for parent in (checkpoint, checkpoint.absolute().parent):
        folder = parent / ASSETS_NAME
        if (folder / _HEADERS_NAME).is_file():
            check_stays_inside(parent, ASSETS_NAME)
            for path in folder.iterdir():
                check_stays_inside(folder, path.name)
            headers = _read_headers(folder / _HEADERS_NAME)
            return Assets(folder, read_hf_config(folder), headers)
    return None


def _read_headers(path: Path) -> dict[str, str]:
    try:
        headers = read_json(path)
        check_file_names(headers, path)
        for file, header in headers.items():
            infos = sorted(parse_header(file, header).values(), key=lambda info: info.start)
            end = 0
            for info in infos:
                if info.start != end:
                    raise ValueError(f"{file} has a gap at byte {end}")
                end += info.num_bytes
    except (ValueError, KeyError, TypeError, AttributeError, IndexError) as error:
        raise UserError(f"{path} is damaged ({error}). Remedy: copy it again.") from error
    return headers


def read_stamp(folder: Path) -> str | None:
    """SHA-256 of the tokenizer that a run was trained with; None where it is not known.

    Args:
        folder: What ``--save`` was.
    """
    stamp = folder / STAMP_NAME
    return stamp.read_text().strip() if stamp.is_file() else None


def check_tokenizer(checkpoint: Path, tokenizer: Path, *, flag: str = "--tokenizer") -> None:
    """Refuse a tokenizer that the model was not trained with, where that is known.

    Args:
        checkpoint: What ``--save`` was, or the folder of one iteration.
        tokenizer: Folder with a ``tokenizer.json``.
        flag: That names the tokenizer.

    Raises:
        ValueError: It is another one.
    """
    known = read_stamp(checkpoint) or read_stamp(checkpoint.absolute().parent)
    if known is None or not (tokenizer / _TOKENIZER_FILE).is_file():
        return
    found = hash_file(tokenizer / _TOKENIZER_FILE)
    if known != found:
        raise UserError(
            f"{checkpoint} was trained with the tokenizer {known[:12]}, but {tokenizer} is "
            f"{found[:12]}. Remedy: {flag} DIR with that of the run (the folder tokenizer beside "
            "its checkpoints, or of its --data)."
        )


def keep_tokenizer(tokenizer: Path, save: Path) -> None:
    """Stamp a run with its tokenizer, and copy that beside the checkpoints, which may be moved.

    Nothing is copied where the tokenizer came with the Hugging Face checkpoint of the run, unless
    that has another chat template, or none, or ends texts with another token.

    Args:
        tokenizer: Folder with a ``tokenizer.json``.
        save: What ``--save`` is.
    """
    save.mkdir(parents=True, exist_ok=True)
    fingerprint, stamp = hash_file(tokenizer / _TOKENIZER_FILE), save / STAMP_NAME
    if not stamp.exists():
        stamp.write_text(fingerprint + "\n")
    for name in (ASSETS_NAME, _TOKENIZER_NAME):
        known = save / name / _TOKENIZER_FILE
        if known.is_file() and hash_file(known) == fingerprint:
            if _has_template_of(known.parent, tokenizer) and _ends_as(known.parent, tokenizer):
                return
    half = save / f"{_TOKENIZER_NAME}.incomplete"
    shutil.rmtree(half, ignore_errors=True)
    half.mkdir()
    for path in tokenizer.iterdir():
        if is_tokenizer_file(path):
            copy_file(path, half / path.name)
    shutil.rmtree(save / _TOKENIZER_NAME, ignore_errors=True)  # damaged
    half.rename(save / _TOKENIZER_NAME)


def _has_template_of(known: Path, tokenizer: Path) -> bool:
    """Whether a copy has the chat template of a tokenizer that has one."""
    wanted, found = (folder / TEMPLATE_NAME for folder in (tokenizer, known))
    if not wanted.is_file():
        return True
    return found.is_file() and found.read_bytes() == wanted.read_bytes()


def _ends_as(known: Path, tokenizer: Path) -> bool:
    """Whether texts end with the same token, which a tokenizer of conversations changes."""
    ends = []
    for folder in (known, tokenizer):
        file = folder / CONFIG_NAME
        config = read_json(file) if file.is_file() else {}
        ends.append(get_special_token(config, "eos"))
    return ends[0] == ends[1]


def find_tokenizer(checkpoint: Path, args: argparse.Namespace) -> Path | None:
    """The tokenizer that a run was trained with; None if it had none of Hugging Face.

    Args:
        checkpoint: Folder of one iteration.
        args: Of the run that saved it.

    Raises:
        ValueError: It is not there any more.
    """
    for parent in (checkpoint, checkpoint.absolute().parent):
        # The run's own was copied because that of Hugging Face is another one.
        for folder in (parent / _TOKENIZER_NAME, parent / ASSETS_NAME):
            if (folder / _TOKENIZER_FILE).is_file():
                return folder
    named = getattr(args, "tokenizer_model", None)  # runs of earlier releases
    if not named or getattr(args, "tokenizer_type", None) != "HuggingFaceTokenizer":
        return None
    if not Path(named).is_dir():
        raise UserError(
            f"The tokenizer that the run was trained with, {named}, is not there. Remedy: "
            "--tokenizer DIR."
        )
    return Path(named)


def inherit_assets(load: Path, save: Path) -> None:
    """Hand the assets of the checkpoint that a run starts from on to the run's own."""
    assets = find_assets(load)
    if assets is not None and not (save / ASSETS_NAME).exists():
        half = save / f"{ASSETS_NAME}.incomplete"
        shutil.rmtree(half, ignore_errors=True)
        shutil.copytree(assets.folder, half)
        half.rename(save / ASSETS_NAME)


def write_tokenizer(tokenizer: Path, target: Path) -> dict[str, int]:
    """Copy a tokenizer and write the ``generation_config.json`` that goes with it.

    Args:
        tokenizer: Folder with ``tokenizer.json`` and ``tokenizer_config.json``.
        target: Hugging Face checkpoint.

    Returns:
        Ids of the special tokens, for ``config.json``.

    Raises:
        ValueError: The folder has no tokenizer.
    """
    if not (tokenizer / _TOKENIZER_FILE).is_file():
        raise UserError(
            f"{tokenizer} holds no tokenizer.json. Remedy: --tokenizer DIR with the tokenizer that "
            "the model was trained with."
        )
    for path in sorted(tokenizer.iterdir()):
        if is_tokenizer_file(path):
            copy_file(path, target / path.name)
    names = {}
    if (tokenizer / "tokenizer_config.json").is_file():
        names = read_json(tokenizer / "tokenizer_config.json")
    vocabulary = parse_tokenizer((tokenizer / _TOKENIZER_FILE).read_bytes())
    ids: dict[str, int] = {}
    for kind in ("bos", "eos", "pad"):
        token = get_special_token(names, kind)
        found = vocabulary.token_to_id(token) if token else None
        if found is not None:
            ids[f"{kind}_token_id"] = found
    write_generation_config(target, ids)
    return ids


def write_generation_config(target: Path, ids: Mapping[str, int]) -> None:
    """Write ``generation_config.json``: greedy decoding, ended by the end-of-text token."""
    content = {"_from_model_config": True, **ids}
    (target / _GENERATION_CONFIG).write_text(json.dumps(content, indent=2, sort_keys=True) + "\n")
