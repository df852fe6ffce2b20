"""A folder that appears under its name only when it is complete.

It is built beside its final place, part by part, and renamed at the end.  What an interrupted
conversion has finished is taken up again; after an error nothing is left.
"""

import json
import logging
import os
import shutil
import signal
import threading
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import FIRST_EXCEPTION, Future, ThreadPoolExecutor, wait
from contextlib import contextmanager
from pathlib import Path
from types import TracebackType
from typing import Any

from filelock import FileLock, Timeout
from rich.progress import (
    BarColumn,
    DownloadColumn,
    Progress,
    TextColumn,
    TimeRemainingColumn,
    TransferSpeedColumn,
)

from trinity_megatron.cpu_host.matmul import one_thread
from trinity_megatron.errors import UserError

logger = logging.getLogger(__name__)

_SUFFIX = ".incomplete"
_FINGERPRINT, _LOCK = "source.json", "lock"
# One reads while the other writes or waits for the disk.
_NUM_THREADS = 2
_WAKE_SECONDS = 0.25
# Size of a job: the work that is repeated after an interruption.
_JOB_BYTES = 512 * 2**20


def group_into_jobs[T](items: Iterable[T], num_bytes: Callable[[T], int]) -> list[list[T]]:
    """Group consecutive items into jobs of about ``_JOB_BYTES``.

    Args:
        items: What to write.
        num_bytes: Returns the size of an item.
    """
    jobs: list[list[T]] = []
    size = _JOB_BYTES
    for item in items:
        if size >= _JOB_BYTES:
            jobs.append([])
            size = 0
        jobs[-1].append(item)
        size += num_bytes(item)
    return jobs


class Interrupted(Exception):
    """Another part has failed, or the user has asked to stop."""


class Staging:
    """The folder under construction; a context manager.

    Args:
        target: Where it goes in the end; missing, or an empty folder.
        fingerprint: What it is made from.  Finished parts of another source are thrown away.
        num_bytes: What will be written.

    Raises:
        UserError: The target is not empty, its disk has too little room, or the same conversion is
            running.
        OSError: The folder cannot be created.
    """

    def __init__(self, target: Path, fingerprint: Any, *, num_bytes: int) -> None:
        self._target = target.resolve()
        check_target(self._target)
        self._root = self._target.with_name(self._target.name + _SUFFIX)
        self._journal = self._root / "journal"
        self.folder = self._root / "content"
        self._fingerprint = json.dumps(fingerprint)
        self._num_bytes = num_bytes
        self._stop = threading.Event()
        self._lock = FileLock(self._root / _LOCK)

    def __enter__(self) -> "Staging":
        self._root.mkdir(parents=True, exist_ok=True)
        names = {path.name for path in self._root.iterdir()}
        if foreign := names - {_FINGERPRINT, _LOCK, self._journal.name, self.folder.name}:
            raise UserError(
                f"{self._root}, where the work would be done, holds {', '.join(sorted(foreign))}, "
                "which is not ours. Remedy: move it away, or name another target."
            )
        try:
            self._lock.acquire(timeout=0)
        except Timeout as error:
            raise UserError(f"{self._root} is in use: another conversion is writing it.") from error
        source = self._root / _FINGERPRINT
        self.resumed = source.is_file() and source.read_text() == self._fingerprint
        try:
            if not self.resumed:
                for leftover in (self.folder, self._journal):
                    shutil.rmtree(leftover, ignore_errors=True)
                self._check_room()
                self._journal.mkdir()
                self.folder.mkdir()
                source.write_text(self._fingerprint)
        except BaseException:
            self._discard()
            raise
        if self.resumed:
            logger.info("Going on with an interrupted conversion.")
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if kind is None:
            self._commit()
        elif issubclass(kind, Exception):
            self._discard()
        self._lock.release()

    def _check_room(self) -> None:
        free = shutil.disk_usage(self._root).free
        if free < self._num_bytes:
            raise UserError(
                f"{self._target} needs {self._num_bytes / 1e9:.2f} GB, but its disk has "
                f"{free / 1e9:.2f} GB left. Remedy: make room, or name a folder on another disk."
            )

    def run(
        self,
        work: Callable[[int, Callable[[int], None]], Any],
        sizes: Sequence[int],
        *,
        description: str,
    ) -> list[Any]:
        """Do the parts that are not done yet, two at a time, with a progress bar.

        Args:
            work: Does a part; gets its index and a function to call with the number of bytes done.
                When it returns, everything is on the disk.  What it returns is kept as JSON.
            sizes: Bytes of each part.
            description: Words in front of the bar.

        Returns:
            What ``work`` has returned for each part, now or before an interruption.
        """
        markers = [self._journal / f"{index}.done" for index in range(len(sizes))]
        columns = (
            TextColumn("{task.description}"),
            BarColumn(),
            DownloadColumn(),
            TransferSpeedColumn(),
            TimeRemainingColumn(),
        )
        # Copies that are cut over all cores would stand in each other's way.
        with Progress(*columns) as bar, one_thread():
            task = bar.add_task(description, total=sum(sizes))

            def advance(num_bytes: int) -> None:
                if self._stop.is_set():
                    raise Interrupted
                bar.advance(task, num_bytes)

            def do(index: int) -> Any:
                advance(0)
                if (finished := _read_marker(markers[index])) is not None:
                    advance(sizes[index])
                    return finished[0]
                result = work(index, advance)
                _write_marker(markers[index], result)
                return result

            with _on_ctrl_c(self._stop.set), ThreadPoolExecutor(_NUM_THREADS) as pool:
                futures = [pool.submit(do, index) for index in range(len(sizes))]
                _wait_for_all_or_an_error(futures)
                failed = [each.exception() for each in futures if each.done()]
                if any(failed):
                    self._stop.set()  # what has not begun ends at once
        for error in failed:
            if error is not None and not isinstance(error, Interrupted):
                raise error
        if self._stop.is_set():
            raise KeyboardInterrupt
        return [future.result() for future in futures]

    def _commit(self) -> None:
        for folder, _, files in os.walk(self.folder):
            for name in (*files, "."):
                file = os.open(os.path.join(folder, name), os.O_RDONLY)
                os.fsync(file)
                os.close(file)
        if self._target.is_dir():
            self._target.rmdir()
        self.folder.rename(self._target)
        self._discard()

    def _discard(self) -> None:
        shutil.rmtree(self._root, ignore_errors=True)
        self._lock.release()


def _write_marker(marker: Path, result: Any) -> None:
    half = marker.with_suffix(".tmp")
    with half.open("w") as file:
        json.dump([result], file)
        file.flush()
        os.fsync(file.fileno())
    half.replace(marker)


def _read_marker(marker: Path) -> list[Any] | None:
    """The result of a finished part in a list; None if it is not finished."""
    if not marker.is_file():
        return None
    try:
        content = json.loads(marker.read_bytes())
    except ValueError:  # an earlier release wrote it, or it is cut off
        return None
    return content if isinstance(content, list) and len(content) == 1 else None


def _wait_for_all_or_an_error(futures: Sequence[Future[Any]]) -> None:
    # Python sees a signal between two of its own steps.  One that arrives just before the thread
    # falls asleep would otherwise be seen only when a part ends, which can be minutes away.
    while True:
        done, others = wait(futures, timeout=_WAKE_SECONDS, return_when=FIRST_EXCEPTION)
        if not others or any(each.exception() for each in done):
            return


@contextmanager
def _on_ctrl_c(stop: Callable[[], None]) -> Iterator[None]:
    """Have Ctrl-C call ``stop`` instead of breaking in wherever the threads are waited for."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = signal.signal(signal.SIGINT, lambda number, frame: stop())
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)


def check_target(target: Path) -> None:
    """Refuse to write where something is.

    Raises:
        UserError: The target is a file or a folder that is not empty.
    """
    if target.is_mount():
        raise UserError(
            f"{target} is a mount point, which cannot be replaced as a whole. Remedy: name a "
            "folder inside it."
        )
    if target.is_dir() and not any(target.iterdir()):
        return
    if target.exists():
        raise UserError(
            f"{target} exists and is not an empty folder. Remedy: remove it, or name another one."
        )


def fingerprint_folder(folder: Path) -> list[tuple[str, int, int]]:
    """Name, size and time of change of the files in a folder, not in those inside it."""
    files = sorted(path for path in folder.iterdir() if path.is_file())
    stats = ((path, path.stat()) for path in files)
    return [(str(path.relative_to(folder)), s.st_size, s.st_mtime_ns) for path, s in stats]
