"""Prompts in files, and which document gets which."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from trinity_megatron.errors import UserError

# Where the document goes.  Nothing else of a prompt has a meaning, braces neither.
PLACE = "{text}"


@dataclass(frozen=True)
class Prompt:
    """A prompt.

    Attributes:
        name: Of its file.
        template: Its text, with ``{text}`` where the document goes.
    """

    name: str
    template: str

    @property
    def digest(self) -> str:
        """SHA-256 of the template, as hexadecimal digits."""
        return hashlib.sha256(self.template.encode("utf-8")).hexdigest()

    def fill(self, text: str) -> str:
        """What is sent for a document."""
        return self.template.replace(PLACE, text)


def read_prompts(paths: Sequence[Path]) -> list[Prompt]:
    """Read prompt files.

    Raises:
        UserError: A file cannot be read, has no ``{text}``, or two have the same name.
    """
    prompts: list[Prompt] = []
    for path in paths:
        try:
            template = path.read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as error:
            raise UserError(
                f"--prompt-file {path} cannot be read ({error}). Remedy: a file of UTF-8 text."
            ) from error
        if PLACE not in template:
            raise UserError(
                f"--prompt-file {path} does not say where the document goes. Remedy: put {PLACE} "
                "there."
            )
        if path.name in [prompt.name for prompt in prompts]:
            raise UserError(
                f"--prompt-file {path}: another prompt is called {path.name} too. Remedy: give "
                "each a name of its own; documents are recorded with it."
            )
        prompts.append(Prompt(path.name, template))
    return sorted(prompts, key=lambda prompt: prompt.name)


def draw(seed: int, source: str, count: int) -> tuple[int, int]:
    """What a document draws, whatever else is rewritten and in which order.

    Args:
        seed: Of the command.
        source: Name of the document.
        count: Number of prompts.

    Returns:
        The number of its prompt, and the seed that the server is sent, below 2**31.
    """
    digest = hashlib.sha256(f"{seed}\0{source}".encode("utf-8", "surrogatepass")).digest()
    return (
        int.from_bytes(digest[:8], "big") % count,
        int.from_bytes(digest[8:12], "big") >> 1,
    )
