"""The lineage of a run on the model card of its export."""

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

CARD_NAME = "README.md"
_HEADING = "## Lineage"
_EMPTY = "---\nlibrary_name: transformers\n---\n"


def write_lineage(folder: Path, lineage: Mapping[str, Any]) -> None:
    """Add the lineage to the model card of a Hugging Face folder; make the card if there is none.

    A line for each run, the latest first.  What the card has from before stays below.

    Args:
        folder: Gets ``README.md``.
        lineage: ``args.lineage`` of the run (``training/lineage.py``).
    """
    card = folder / CARD_NAME
    text = card.read_text(encoding="utf-8") if card.is_file() else _EMPTY
    before, heading, earlier = text.partition(f"\n{_HEADING}\n")
    lines = "\n".join(_lines(lineage))
    rest = earlier.lstrip("\n") if heading else ""
    card.write_text(f"{before.rstrip()}\n\n{_HEADING}\n\n{lines}\n{rest}", encoding="utf-8")


def _lines(lineage: Mapping[str, Any] | None) -> Iterator[str]:
    """A line for each run."""
    while lineage is not None:
        parent = f"the run `{_name(lineage['parent'])}`"
        if lineage["step"] is None:
            parent = f"the converted checkpoint `{_name(lineage['parent'])}`"
        else:
            parent = f"step {lineage['step']:,} ({lineage['consumed_tokens']:,} tokens) of {parent}"
        if "annealing" in lineage:
            how = f"({lineage['anneal_style']}, learning rate to 0)"
            yield f"- Annealed {how} over {lineage['anneal_tokens']:,} tokens from {parent}."
        else:
            yield f"- Trained with sequences of {lineage['seq_length']:,} tokens from {parent}."
        lineage = lineage["before"]


def _name(parent: str) -> str:
    """The name of a run; its path is nobody else's business."""
    path = Path(parent)
    return path.parent.name if path.name == "checkpoints" else path.name
