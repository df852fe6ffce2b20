"""The machine: shared memory, limits, the folder of a run, caches, the clock."""

import os
import resource
import shutil
import tempfile
import time
from collections.abc import Iterator, Mapping
from pathlib import Path

from trinity_megatron.doctor.finding import Finding

_MIB, _GIB = 2**20, 2**30
# NCCL and gloo exchange through it within a node; containers give 64 MiB by default.
_SHARED_MEMORY = _GIB
_OPEN_FILES = 4096
_FREE_SPACE = 10 * _GIB
_CLOCK_SECONDS = (5.0, 60.0)  # yellow, red
_LOCK_SECONDS = 5


def check_shared_memory(path: Path = Path("/dev/shm")) -> Iterator[Finding]:
    """Ranks of a node exchange through it, and an asynchronous save copies into it."""
    try:
        usage = shutil.disk_usage(path)
    except OSError as error:
        yield Finding(
            str(path),
            "red",
            f"is missing ({error.strerror})",
            "mount a tmpfs there (container: --ipc=host)",
        )
        return
    text = f"{usage.free / _GIB:.1f} of {usage.total / _GIB:.1f} GiB free"
    remedy = "a larger one (container: --ipc=host or --shm-size), or remove what lies there"
    if usage.free < 64 * _MIB:
        yield Finding(str(path), "red", text, remedy)
    elif usage.free < _SHARED_MEMORY:
        yield Finding(str(path), "yellow", text, remedy)
    else:
        yield Finding(str(path), "green", text)


def check_limits() -> Iterator[Finding]:
    """Open files: each rank holds sockets, data files and libraries."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    infinite = resource.RLIM_INFINITY
    text = f"{'unlimited' if soft == infinite else soft} open files"
    if soft != infinite and soft < _OPEN_FILES:
        can = hard == infinite or hard >= _OPEN_FILES
        yield Finding(
            "file limits",
            "yellow" if can else "red",
            text,
            f"ulimit -n {_OPEN_FILES}" + ("" if can else ", by whoever runs this machine"),
        )
    else:
        yield Finding("file limits", "green", text)


def check_folder(folder: Path) -> Iterator[Finding]:
    """Where a run is written: space, rename, locks, and the clock of its file server."""
    name = f"disk {folder}"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        usage = shutil.disk_usage(folder)
        with tempfile.TemporaryDirectory(dir=folder, prefix=".doctor-") as own:
            yield from _check_space(name, usage.free, usage.total, Path(own))
            yield from _check_rename(name, Path(own))
            yield from _check_locks(name, Path(own))
            yield from _check_clock(name, Path(own))
    except OSError as error:
        yield Finding(
            name, "red", f"cannot be written: {error.strerror or error}",
            "free space there, mend its permissions, or name another --out",
        )  # fmt: skip


def _check_space(name: str, free: int, total: int, own: Path) -> Iterator[Finding]:
    with (own / "space").open("wb") as file:  # a full disk fails here
        file.write(bytes(_MIB))
        file.flush()
        os.fsync(file.fileno())
    text = f"{free / _GIB:.1f} of {total / _GIB:.1f} GiB free"
    if free < _FREE_SPACE:
        yield Finding(
            name, "yellow", text, "more space: trinity-megatron plan says what a save takes"
        )
    else:
        yield Finding(name, "green", text)


def _check_rename(name: str, own: Path) -> Iterator[Finding]:
    """A save appears under its name at once: by a rename over what is there."""
    first, second = own / "first", own / "second"
    first.write_bytes(b"new")
    second.write_bytes(b"old")
    os.replace(first, second)
    if second.read_bytes() != b"new" or first.exists():
        yield Finding(
            f"{name}, rename", "red", "a rename does not replace the file that is there",
            "another file system for --out",
        )  # fmt: skip


def _check_locks(name: str, own: Path) -> Iterator[Finding]:
    """Two runs in one folder are kept apart by a lock."""
    from filelock import FileLock, Timeout

    try:
        with FileLock(own / "lock", timeout=_LOCK_SECONDS):
            pass
    except (OSError, NotImplementedError, Timeout) as error:
        yield Finding(
            f"{name}, locks", "red", f"cannot be locked: {error}",
            "mount it with locks (NFS: without nolock; Lustre: -o flock), or another --out",
        )  # fmt: skip


def _check_clock(name: str, own: Path) -> Iterator[Finding]:
    """The time of a file that was written now."""
    before = time.time()
    path = own / "clock"
    path.write_bytes(b"")
    after = time.time()
    written = path.stat().st_mtime
    # File systems round to a second or two.
    offset = max(0.0, before - written - 2, written - after - 2)
    if offset >= _CLOCK_SECONDS[0]:
        yield Finding(
            f"{name}, clock",
            "red" if offset >= _CLOCK_SECONDS[1] else "yellow",
            f"this machine and the file server differ by {offset:.0f} s",
            "set both clocks (chrony, NTP)",
        )


def check_caches(environment: Mapping[str, str]) -> Iterator[Finding]:
    """Caches of compiled kernels and downloads must be writable."""
    home = Path(environment.get("HOME") or Path.home())
    cache = Path(environment.get("XDG_CACHE_HOME") or home / ".cache")
    folders = {
        "TRITON_CACHE_DIR": Path(environment.get("TRITON_CACHE_DIR") or home / ".triton" / "cache"),
        "HF_HOME": Path(environment.get("HF_HOME") or cache / "huggingface"),
    }
    wrong = 0
    for variable, folder in folders.items():
        try:
            folder.mkdir(parents=True, exist_ok=True)
            with tempfile.TemporaryFile(dir=folder):
                pass
        except OSError as error:
            wrong += 1
            yield Finding(
                f"cache {folder}", "red", f"cannot be written: {error.strerror or error}",
                f"export {variable}=DIR, a folder of your own on a local disk",
            )  # fmt: skip
    if not wrong:
        yield Finding("caches", "green", ", ".join(map(str, folders.values())))
