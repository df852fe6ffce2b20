"""What is left out of a corpus: counted by reason, and refused if it is too much."""

import logging
from collections.abc import Iterable, Sequence

from trinity_megatron.data.corpus import Skipped, SourceFile, describe_unread
from trinity_megatron.errors import UserError

logger = logging.getLogger(__name__)


class LeftOut:
    """Collects what is left out; rows are kept as one entry for a file and a kind of reason."""

    def __init__(self, entries: Iterable[Skipped] = ()) -> None:
        self._files: list[Skipped] = []
        self._rows: dict[tuple[str, str], tuple[Skipped, int]] = {}
        for entry in entries:
            self.add(entry)

    def add(self, entry: Skipped) -> None:
        """Count one entry."""
        if entry.row_of is None:
            self._files.append(entry)
            return
        key = (entry.row_of, _kind(entry))
        first, count = self._rows.get(key, (entry, 0))
        self._rows[key] = (first, count + 1)

    def entries(self) -> tuple[Skipped, ...]:
        """For the manifest: files and folders, then rows."""
        files = [Skipped(entry.name, entry.reason) for entry in self._files]
        rows = [
            Skipped(first.name + (f" and {count - 1} further rows" if count > 1 else ""), reason)
            for (_, reason), (first, count) in self._rows.items()
        ]
        return (*files, *rows)

    def report(self) -> None:
        """Log the number of each kind of reason, and the first name."""
        counts: dict[str, tuple[str, int]] = {}
        for first, count in [*((entry, 1) for entry in self._files), *self._rows.values()]:
            what = (
                f"{_kind(first)} rows" if first.row_of and _kind(first) == "empty" else _kind(first)
            )
            name, number = counts.get(what, (first.name, 0))
            counts[what] = (name, number + count)
        for what, (name, number) in sorted(counts.items(), key=lambda item: -item[1][1]):
            logger.warning("left out %d: %s (first: %s)", number, what, name)

    def check(self, files: Sequence[SourceFile], max_share: float) -> None:
        """Check that little is left out that could be text.

        Binary files such as pictures, hidden files and empty ones are no text and do not count.

        Args:
            files: The files of the corpus, those among the entries included.
            max_share: Largest share, by bytes, of the files that could be text.

        Raises:
            UserError: If it is more.
        """
        lost = [entry for entry in self._files if entry.could_be_text and entry.num_bytes]
        unread = sum(entry.num_bytes for entry in self._files if entry.is_source_file)
        lost_bytes = sum(entry.num_bytes for entry in lost)
        read_bytes = sum(file.num_bytes for file in files) - unread
        share = lost_bytes / max(1, lost_bytes + read_bytes)
        if share <= max_share:
            return
        firsts = {_kind(entry): entry for entry in reversed(lost)}
        listed = "; ".join(f"{entry.name}: {entry.reason}" for entry in list(firsts.values())[:5])
        raise UserError(
            f"{len(lost)} files with {lost_bytes:,} bytes, {share:.0%} of what could be text, "
            f"would be left out (of each kind the first: {listed}); unpack or convert them to "
            "text, JSON, CSV, parquet or Arrow files, move them away, or allow it with "
            "--max-left-out 1"
        )


def check_formats(
    skipped: Sequence[Skipped], files: Sequence[SourceFile], max_share: float
) -> None:
    """Check the same before anything is read, by what the files hold.

    Raises:
        UserError: If more than ``max_share`` is left out.
    """
    unread = [describe_unread(file) for file in files if file.format.kind == "unread"]
    LeftOut([*skipped, *unread]).check(files, max_share)


def _kind(entry: Skipped) -> str:
    return entry.reason.partition(":")[0]
