"""The file of a mixture: corpora, phases by consumed tokens, and the order of the samples.

```yaml
corpora:
  web:  {path: data/web}
  code: {path: data/code, language: python, max_epochs: 4}
phases:                       # consumed tokens; the last may be open
  - {until: 10T, weights: {web: 0.7, code: 0.3}}
  - {weights: {web: 0.4, code: 0.6}}
order: shuffled               # or sequential, rsdb
```
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path

from trinity_megatron.data.address import StoredAt
from trinity_megatron.data.formats import ReadOptions
from trinity_megatron.data.rsdb.length_bias import LengthBias

SUFFIXES = (".yaml", ".yml")
ORDERS = ("shuffled", "sequential", "rsdb")
TEXT_ORDERS = ("rsdb", "sequential")


@dataclass(frozen=True)
class Corpus:
    """A corpus as the file names it.

    Attributes:
        name: Its name in the file.
        path: Folder that ``prepare-data`` made, the prefix of a ``.bin`` and ``.idx``, or raw text.
        validation: Prefix of its validation data, or raw text; None for those of the folder, if
            any.
        language: For the plan, and the losses by language.
        max_epochs: A plan that reads it more often is refused.
        length_bias: Which of its documents an epoch reads; None for all.
        options: How documents are found in raw text.
        skips_bad_rows: Whether rows of raw text that hold no text are left out.
    """

    name: str
    path: Path | StoredAt
    validation: Path | StoredAt | None = None
    language: str | None = None
    max_epochs: float | None = None
    length_bias: LengthBias | None = None
    options: ReadOptions = ReadOptions()
    skips_bad_rows: bool = False


@dataclass(frozen=True)
class Phase:
    """Weights of the corpora up to a number of consumed tokens.

    Attributes:
        until: Where it ends, in consumed tokens of the run; None if it is open.
        weights: Share of each corpus in the tokens, by name in alphabetical order; their sum is 1.
    """

    until: int | None
    weights: Mapping[str, Fraction]


@dataclass(frozen=True)
class BufferSettings:
    """Settings of ``order: rsdb``.

    Attributes:
        documents: The buffer of a stream is filled up when so few are left in it; it holds twice
            as many.  The default makes 16.8M documents of the 4,096 streams of Trinity Large, as
            many as the report's 8,192 on each of 2,048 GPUs.
        streams: Number of virtual streams; None for the largest number that divides every batch.
    """

    documents: int = 2048
    streams: int | None = None


@dataclass(frozen=True)
class Mixture:
    """What a file of a mixture says.

    Attributes:
        file: The file; the text itself where ``--data`` names that.
        corpora: By name, in the order of the file.
        phases: In the order in which they are read; all but the last have an end.
        order: One of ``ORDERS``.
        tokenizer: Folder of the tokenizer; None for that of the prepared folders.
        buffer: Settings of the order ``rsdb``.
    """

    file: Path | StoredAt
    corpora: Mapping[str, Corpus]
    phases: tuple[Phase, ...]
    order: str = "shuffled"
    tokenizer: Path | None = None
    buffer: BufferSettings = BufferSettings()

    @property
    def end(self) -> int | None:
        """Consumed tokens at the end of the last phase; None if that is open."""
        return self.phases[-1].until


def is_mixture(path: str | Path | None) -> bool:
    """Whether ``--data`` names a file of a mixture, not a folder."""
    return path is not None and Path(path).suffix.lower() in SUFFIXES and not Path(path).is_dir()
