"""A finding of ``trinity-megatron doctor``: one line with its state and its remedy."""

from dataclasses import asdict, dataclass
from typing import Any, Literal

Level = Literal["green", "yellow", "red"]
LEVELS: tuple[Level, ...] = ("green", "yellow", "red")


@dataclass(frozen=True)
class Finding:
    """A line.

    Attributes:
        name: What was looked at.
        level: ``green``: right; ``yellow``: a run starts, and may miss it; ``red``: mend it first.
        text: What was found.
        remedy: What to do; every line that is not green has one.
    """

    name: str
    level: Level
    text: str
    remedy: str = ""

    def __post_init__(self) -> None:
        """A line without a remedy helps nobody."""
        assert self.level == "green" or self.remedy, self.name

    def as_json(self) -> dict[str, Any]:
        """Fields, for ``--json``."""
        return asdict(self)

    def __str__(self) -> str:
        line = f"{self.level:6}  {self.name}: {self.text}"
        return f"{line}. Remedy: {self.remedy}" if self.remedy else line


def worst(findings: list[Finding]) -> Level:
    """The worst level of some lines."""
    return max((finding.level for finding in findings), key=LEVELS.index, default="green")
