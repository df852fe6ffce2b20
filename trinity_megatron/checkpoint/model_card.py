"""The lineage of a run on the model card of its export."""

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

CARD_NAME = "README.md"
_HEADING = "## Lineage"
_EMPTY = "---\nlibrary_name: transformers\n---\n"


def write_lineage(folder: Path, lineage: Mapping[str, Any]) -> None:
    """Add the lineage to the model card of a Hugging Face folder; make the card if there is none.

    A line for each branch, the latest first.  The lineage of the checkpoint that training started
    from stays below.

    Args:
        folder: Gets ``README.md``.
        lineage: ``args.lineage`` of the run (``training/branch.py``).
    """
    card = folder / CARD_NAME
    text = card.read_text(encoding="utf-8") if card.is_file() else _EMPTY
    before, heading, earlier = text.partition(f"\n{_HEADING}\n")
    lines = "\n".join(_lines(lineage))
    rest = earlier.lstrip("\n") if heading else ""
    card.write_text(f"{before.rstrip()}\n\n{_HEADING}\n\n{lines}\n{rest}", encoding="utf-8")


def _lines(lineage: Mapping[str, Any] | None) -> Iterator[str]:
    """A line for each branch."""
    while lineage is not None:
        yield (
            f"- Annealed ({lineage['anneal_style']}, learning rate to 0) over "
            f"{lineage['anneal_tokens']:,} tokens from step {lineage['step']:,} "
            f"({lineage['consumed_tokens']:,} tokens) of the run `{_name(lineage['parent'])}`."
        )
        lineage = lineage["before"]


def _name(parent: str) -> str:
    """The name of a run; its path is nobody else's business."""
    path = Path(parent)
    return path.parent.name if path.name == "checkpoints" else path.name
