"""What decides the rewritten documents: kept beside them, and compared when a command goes on."""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from trinity_megatron.data.corpus import SourceFile, hash_file
from trinity_megatron.data.rewrite.prompts import Prompt
from trinity_megatron.errors import UserError
from trinity_megatron.untrusted.json_file import read_json

SETTINGS_NAME = "rewrite.json"
_VERSION = 1
_MAX_BYTES = 2**30  # a line for each file of the sources


@dataclass(frozen=True)
class RewriteSettings:
    """What decides the rewritten documents.

    The address and ``--max-tokens`` are not among them: a server may move, and an answer that is
    cut off is not kept.

    Attributes:
        prompts: By name.
        model: Name for the server.
        seed: Decides the prompt of each document, and the seed that the server gets.
        temperature: None for the server's.
        text_key: Field of the text in rows.
    """

    prompts: tuple[Prompt, ...]
    model: str
    seed: int
    temperature: float | None
    text_key: str

    def to_json(self, files: Sequence[SourceFile]) -> dict[str, Any]:
        """The content of ``rewrite.json``; reads the files."""
        return {
            "format_version": _VERSION,
            "model": self.model,
            "seed": self.seed,
            "temperature": self.temperature,
            "text_key": self.text_key,
            "prompts": [
                {"name": prompt.name, "sha256": prompt.digest, "text": prompt.template}
                for prompt in self.prompts
            ],
            "sources": [[file.name, hash_file(file.path)] for file in files],
        }


def keep_settings(out: Path, content: dict[str, Any]) -> None:
    """Write the settings, or compare them with those that are there.

    Raises:
        UserError: The folder holds documents of other settings, or something else.
    """
    path = out / SETTINGS_NAME
    if path.is_file():
        try:
            before = read_json(path, max_bytes=_MAX_BYTES)
            different = [name for name in content if before.get(name) != content[name]]
        except (ValueError, AttributeError) as error:
            raise UserError(f"{path} is damaged ({error}). Remedy: another --out.") from error
        if different:
            raise UserError(
                f"--out {out} holds documents that were rewritten with other {_listed(different)} "
                f"(see {path}). Remedy: the same flags, or another --out."
            )
        return
    others = [entry.name for entry in out.iterdir() if not entry.name.startswith(".")]
    if others:
        raise UserError(
            f"--out {out} holds other files ({', '.join(sorted(others)[:3])}). Remedy: a new "
            "folder."
        )
    temporary = out / f".{SETTINGS_NAME}.tmp"
    temporary.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
    os.replace(temporary, path)


def _listed(names: Sequence[str]) -> str:
    return ", ".join(name.replace("_", " ") for name in names)
