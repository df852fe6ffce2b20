"""The lineage of a run on the model card of its export."""

from collections.abc import Iterator, Mapping
from itertools import islice
from pathlib import Path
from typing import Any

from trinity_megatron.errors import UserError

CARD_NAME = "README.md"
_HEADING = "## Lineage"
_MAX_LINES, _MAX_LETTERS = 100, 200
_EMPTY = "---\nlibrary_name: transformers\n---\n"


def write_lineage(folder: Path, lineage: Mapping[str, Any]) -> None:
    """Add the lineage to the model card of a Hugging Face folder; make the card if there is none.

    A line for each run, the latest first.  What the card has from before stays below.

    Args:
        folder: Gets ``README.md``.
        lineage: ``args.lineage`` of the run (``training/lineage.py``).

    Raises:
        UserError: The lineage is damaged.
    """
    card = folder / CARD_NAME
    text = card.read_text(encoding="utf-8") if card.is_file() else _EMPTY
    before, heading, earlier = text.partition(f"\n{_HEADING}\n")
    try:
        lines = "\n".join(islice(_lines(lineage), _MAX_LINES))
    except (TypeError, ValueError, LookupError, AttributeError) as error:
        raise UserError(
            f"the lineage in the arguments of the checkpoint is damaged ({error!r:.100}). Remedy: "
            "a checkpoint that trinity-megatron has saved."
        ) from error
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
    name = path.parent.name if path.name == "checkpoints" else path.name
    # Anybody may have written it; it is one word of Markdown.
    name = name[:_MAX_LETTERS].replace("`", "'")
    return "".join(letter for letter in name if letter.isprintable())
