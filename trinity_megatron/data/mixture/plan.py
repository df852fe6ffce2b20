"""What a run reads of each corpus, in each phase: looked at before it starts."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from trinity_megatron.data.mixture.corpora import IndexedCorpus, MixtureData
from trinity_megatron.data.mixture.definition import Mixture, Phase
from trinity_megatron.data.mixture.quantities import format_tokens
from trinity_megatron.data.mixture.schedule import MixtureSchedule
from trinity_megatron.errors import UserError


@dataclass(frozen=True)
class CorpusPlan:
    """What a run reads of a corpus.

    Attributes:
        name: Of the corpus.
        language: Its language, if the file says it.
        by_phase: Tokens in each phase.
        held: Tokens that the corpus has; None for raw text.
        epoch_tokens: Tokens of them that an epoch reads; None for raw text.
        epochs_begin: Consumed tokens of the run where its second, third, ... epoch begins; the
            first ten of them.
    """

    name: str
    language: str | None
    by_phase: tuple[int, ...]
    held: int | None
    epoch_tokens: int | None
    epochs_begin: tuple[int, ...]

    @property
    def tokens(self) -> int:
        """Tokens in the whole run."""
        return sum(self.by_phase)

    @property
    def epochs(self) -> float | None:
        """How often the corpus is read; None for raw text."""
        return None if self.epoch_tokens is None else self.tokens / self.epoch_tokens


@dataclass(frozen=True)
class Plan:
    """What a run reads.

    Attributes:
        phases: Of the mixture, as far as the run gets.
        corpora: In the order of the file.
        tokens: Of the run.
    """

    phases: tuple[Phase, ...]
    corpora: tuple[CorpusPlan, ...]
    tokens: int

    def by_language(self) -> dict[str, tuple[int, ...]]:
        """Tokens in each phase by language, of the corpora that have one."""
        sums: dict[str, tuple[int, ...]] = {}
        for item in self.corpora:
            if item.language is not None:
                before = sums.get(item.language, (0,) * len(self.phases))
                sums[item.language] = tuple(
                    one + other for one, other in zip(before, item.by_phase, strict=True)
                )
        return sums


def phase_starts(phases: Sequence[Phase], seq_length: int) -> list[int]:
    """First sample of each phase.

    A sample belongs to the phase in which its first token is consumed.

    Args:
        phases: Of the mixture.
        seq_length: Tokens of a sample.
    """
    ends = [-(-(phase.until or 0) // seq_length) for phase in phases[:-1]]
    return [0, *ends]


def make_schedule(mixture: Mixture, seq_length: int, seed: int) -> MixtureSchedule:
    """The schedule of a run.

    Args:
        mixture: Its file.
        seq_length: Tokens of a sample.
        seed: Of the run.

    Raises:
        UserError: A phase is shorter than a sample.
    """
    names = {name: number for number, name in enumerate(mixture.corpora)}
    starts = phase_starts(mixture.phases, seq_length)
    for number, (start, after) in enumerate(zip(starts, starts[1:], strict=False)):
        if start == after:
            raise UserError(
                f"--data {mixture.file}: phases[{number}] is empty: no sequence of {seq_length} "
                "tokens begins in it. Remedy: a later until, or drop the phase."
            )
    weights = [{names[n]: w for n, w in phase.weights.items()} for phase in mixture.phases]
    return MixtureSchedule(
        list(zip(starts, weights, strict=True)), num_corpora=len(names), seed=seed
    )


def make_plan(data: MixtureData, *, seq_length: int, seed: int, samples: int) -> Plan:
    """What a run of so many samples reads.

    Args:
        data: The mixture and its corpora.
        seq_length: Tokens of a sample.
        seed: Of the run.
        samples: Of the run.

    Raises:
        UserError: The mixture cannot be met; names the corpus or phase, and the remedy.
    """
    mixture = data.mixture
    check_end(mixture, samples * seq_length, seq_length)
    schedule = make_schedule(mixture, seq_length, seed)
    starts = [start for start in phase_starts(mixture.phases, seq_length) if start < samples]
    counts = [schedule.count(sample) for sample in [*starts, samples]]
    plans = []
    for number, item in enumerate(data.corpora.values()):
        by_phase = tuple(
            int(after[number] - before[number]) * seq_length
            for before, after in zip(counts, counts[1:], strict=False)
        )
        held: int | None = None
        in_epoch: int | None = None
        begin: tuple[int, ...] = ()
        if isinstance(item, IndexedCorpus):
            held, in_epoch = item.tokens, item.epoch_tokens
            begin = _epochs_begin(schedule, number, item, seq_length, samples)
        name, language = item.corpus.name, item.corpus.language
        plan = CorpusPlan(name, language, by_phase, held, in_epoch, begin)
        if isinstance(item, IndexedCorpus):
            _check_corpus(mixture, item, plan, seq_length)
        plans.append(plan)
    return Plan(mixture.phases[: len(starts)], tuple(plans), samples * seq_length)


def check_end(mixture: Mixture, tokens: int, seq_length: int) -> None:
    """Refuse a run that goes on behind the last phase.

    Args:
        mixture: Its file.
        tokens: That the run consumes.
        seq_length: Tokens of a sample, of which the last may begin in the phase.

    Raises:
        UserError: Names both ends and the remedy.
    """
    if mixture.end is not None and tokens - seq_length >= mixture.end:
        raise UserError(
            f"--data {mixture.file}: the last phase ends at {format_tokens(mixture.end)} "
            f"({mixture.end:,}) tokens, and the run consumes {tokens:,}. Remedy: a shorter run, a "
            "later until, or none in the last phase, which goes on then."
        )


def _epochs_begin(
    schedule: MixtureSchedule, number: int, item: IndexedCorpus, seq_length: int, samples: int
) -> tuple[int, ...]:
    found: list[int] = []
    for epoch in range(1, 11):
        # The sample that an epoch's last token is in belongs to the next one.
        first = max(0, epoch * item.epoch_tokens - 1) // seq_length
        sample = schedule.find(number, first, samples)
        if sample is None:
            break
        found.append(sample * seq_length)
    return tuple(found)


def _check_corpus(mixture: Mixture, item: IndexedCorpus, plan: CorpusPlan, seq_length: int) -> None:
    key = f"--data {mixture.file}: corpora.{plan.name}"
    if plan.tokens and item.tokens <= seq_length and mixture.order != "rsdb":
        raise UserError(
            f"{key} has {item.tokens:,} tokens, which is not one sequence of {seq_length} and the "
            "token after it. Remedy: more data, or a shorter --seq-length."
        )
    limit = item.corpus.max_epochs
    if limit is not None and plan.epochs is not None and plan.epochs > limit:
        needed = ", ".join(
            f"{format_tokens(tokens)} in phase {number + 1}"
            for number, tokens in enumerate(plan.by_phase)
            if tokens
        )
        raise UserError(
            f"{key} has {format_tokens(item.epoch_tokens)} tokens and would be read "
            f"{plan.epochs:.2f} times ({needed}), above its max_epochs {limit:g}. "
            "Remedy: a smaller weight, a shorter phase, more data, or a larger max_epochs."
        )


def describe_epochs(plan: Plan) -> list[str]:
    """A line for each corpus that is read more than once."""
    lines = []
    for item in plan.corpora:
        if item.epochs_begin:
            begin = ", ".join(format_tokens(tokens) for tokens in item.epochs_begin[:3])
            more = ", ..." if len(item.epochs_begin) > 3 else ""
            lines.append(
                f"{item.name} is read {item.epochs:.2f} times: an epoch begins after {begin}{more} "
                "consumed tokens"
            )
    return lines
