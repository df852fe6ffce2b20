"""What saves, their verification, a start and a resume take, each beside its floor.

    python tests/performance_tests/bench_recovery.py [--sizes tiny medium large] [--report FILE]

Trainings of one rank, which save several times, in the step (synchronous) and beside it
(asynchronous), and are resumed; then 1, 2 and 4 processes verify the last checkpoint, which is in
the page cache ("warm") or not ("cold").  The disk's rates are measured between them, in files as
large as the checkpoint.  Seconds are medians; so are seconds of processor, in brackets.
"""

import argparse
import json
import multiprocessing
import os
import platform
import shutil
import statistics
import subprocess
import sys
import sysconfig
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from datetime import date
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))

from trinity_megatron.cpu_host.cuda_stand_ins import enter_host  # noqa: E402

enter_host()

import torch  # noqa: E402

from trinity_megatron.checkpoint.integrity.checksums import crc32  # noqa: E402
from trinity_megatron.checkpoint.page_cache import forget  # noqa: E402
from trinity_megatron.data.prepare import prepare_data  # noqa: E402
from trinity_megatron.process.environment import build_environment  # noqa: E402
from trinity_megatron.training.damage import find_damage  # noqa: E402

_BLOCK = 8 * 2**20
# AdamW, whose step takes less than Muon's where few tokens are trained: the steps are no matter.
_WIDER = (
    "--optimizer adam --lr 1e-3 --decoupled-lr 1e-3 --kv-channels 64 --hidden-size {0} "
    "--ffn-hidden-size {1} --moe-ffn-hidden-size {2}"
)
SIZES: dict[str, list[str]] = {
    "tiny": [],
    "medium": _WIDER.format(512, 1536, 128).split(),
    "large": _WIDER.format(1024, 2048, 224).split(),
}
SAVES, STEPS_BETWEEN = 5, 5
FLAGS = (
    f"--seq-length 64 --global-batch-size 4 --micro-batch-size 4 --train-iters "
    f"{SAVES * STEPS_BETWEEN} --lr-warmup-iters 1 --save-interval {STEPS_BETWEEN} "
    "--log-interval 10 --eval-iters 0 --skip-spikes 6 --on-damage previous"
).split()


@dataclass
class Rates:
    """What this machine can do, bytes a second."""

    write: list[float] = field(default_factory=list)
    read: list[float] = field(default_factory=list)
    cached: list[float] = field(default_factory=list)
    copy: list[float] = field(default_factory=list)
    hash: list[float] = field(default_factory=list)

    def measure(self, folder: Path, num_bytes: int) -> None:
        """Once more: a file of so many bytes, written and read from the disk; a core's rates."""
        block, path = memoryview(bytearray(os.urandom(_BLOCK))), folder / "rate"
        count = max(num_bytes // _BLOCK, 1)
        start = time.perf_counter()
        with path.open("wb", buffering=0) as file:
            for _ in range(count):
                file.write(block)
            os.fsync(file.fileno())
        self.write.append(count * _BLOCK / (time.perf_counter() - start))
        with path.open("rb", buffering=0) as file:
            start = time.thread_time()
            for _ in range(count):
                file.readinto(block)
            self.cached.append(count * _BLOCK / (time.thread_time() - start))
            file.seek(0)
            forget(file.fileno())
            start = time.perf_counter()
            for _ in range(count):
                file.readinto(block)
        self.read.append(count * _BLOCK / (time.perf_counter() - start))
        path.unlink()
        tensor = torch.frombuffer(block, dtype=torch.uint8)
        self.copy.append(_rate(lambda: tensor.clone()))
        self.hash.append(_rate(lambda: crc32(block)))

    def __getitem__(self, name: str) -> float:
        """The median of one of them."""
        return statistics.median(getattr(self, name))


def _rate(work: Callable[[], object]) -> float:
    """Bytes of a block over the median of processor seconds of some work on it."""
    times = []
    for _ in range(9):
        start = time.thread_time()
        work()
        times.append(time.thread_time() - start)
    return _BLOCK / statistics.median(times)


@dataclass
class Times:
    """What a training has written down."""

    records: list[dict[str, Any]]

    def each(self, part: str) -> list[tuple[float, float]]:
        """Seconds and processor seconds of each, in the order of their ends."""
        return [(r["seconds"], r["cpu"]) for r in self.records if r["part"] == part]

    def during(self, outer: str, *parts: str) -> list[tuple[float, float]]:
        """For each of the outer ones the sum of the parts that begin in it or before the next."""
        begins = [r["begin"] for r in self.records if r["part"] == outer]
        sums = []
        for begin, end in zip(begins, [*begins[1:], float("inf")], strict=True):
            inside = [
                (r["seconds"], r["cpu"])
                for r in self.records
                if r["part"] in parts and begin <= r["begin"] < end
            ]
            sums.append((sum(s for s, _ in inside), sum(c for _, c in inside)))
        return sums


def train(flags: Sequence[str], data: Path, out: Path) -> Times:
    """One training, in a fresh process."""
    times = out.with_suffix(".json")
    command = [sys.executable, str(Path(__file__).with_name("timed_training.py")), str(times)]
    command += [*FLAGS, "--data", str(data), "--out", str(out), *flags]
    environment = build_environment(
        {**os.environ, "PYTHONPATH": str(ROOT), "WANDB_MODE": "disabled"},
        num_ranks=1,
        num_cores=os.cpu_count() or 1,
        cuda=False,
    )
    environment["SPAWNED"] = str(time.time())
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    if done.returncode:
        raise SystemExit(f"{done.stdout[-4000:]}\n{done.stderr[-4000:]}")
    return Times(json.loads(times.read_text()))


def _verify_share(
    folder: Path, rank: int, ranks: int, core: int | None, begin: Any, answers: Any
) -> None:
    torch.set_num_threads(1)
    if core is not None:
        os.sched_setaffinity(0, {core})
    begin.wait()
    start, cpu = time.perf_counter(), time.process_time()
    message = find_damage(folder, rank, ranks)
    assert message is None, message
    answers.put((time.perf_counter() - start, time.process_time() - cpu))


def verify(folder: Path, ranks: int, *, is_cold: bool, has_own_core: bool) -> tuple[float, ...]:
    """Seconds of the slowest of so many processes, processor seconds of all and of the busiest."""
    if is_cold:
        for path in folder.iterdir():
            with path.open("rb") as file:
                os.fsync(file.fileno())
                forget(file.fileno())
    context = multiprocessing.get_context("fork")
    begin, answers = context.Barrier(ranks), context.Queue()
    cores = sorted(os.sched_getaffinity(0))
    processes = [
        context.Process(
            target=_verify_share,
            args=(
                folder,
                rank,
                ranks,
                cores[rank % len(cores)] if has_own_core else None,
                begin,
                answers,
            ),
        )
        for rank in range(ranks)
    ]
    for process in processes:
        process.start()
    found = [answers.get(timeout=300) for _ in processes]
    for process in processes:
        process.join()
    return max(s for s, _ in found), sum(c for _, c in found), max(c for _, c in found)


def median(pairs: Sequence[Sequence[float]], *, first: int = 0) -> list[float]:
    """The median of each place, from some pair on."""
    return [statistics.median(values) for values in zip(*pairs[first:], strict=True)]


def shown(pair: Sequence[float]) -> str:
    """Seconds, with processor seconds in brackets."""
    return f"{pair[0]:.3f} ({pair[1]:.3f})" if pair[0] < 1 else f"{pair[0]:.2f} ({pair[1]:.2f})"


def measure(size: str, data: Path, folder: Path, rounds: int) -> dict[str, str]:
    """The rows of one size."""
    rates, flags = Rates(), SIZES[size]
    in_step = train(flags, data, folder / "sync")
    checkpoint = folder / "sync" / "checkpoints" / f"iter_{SAVES * STEPS_BETWEEN:07d}"
    num_bytes = sum(path.stat().st_size for path in checkpoint.iterdir())
    rates.measure(folder, num_bytes)
    beside = train([*flags, "--async-save"], data, folder / "async")
    rates.measure(folder, num_bytes)
    longer = ["--train-iters", str(SAVES * STEPS_BETWEEN + 2), "--save-interval", "1000"]
    starts, resumes = [in_step, beside], []
    for number in range(rounds):
        run = folder / f"resumed_{number}"
        shutil.copytree(folder / "sync", run)
        _sync_and_forget(run)
        resumes.append(train([*flags, *longer], data, run))
        shutil.rmtree(run)
        rates.measure(folder, num_bytes)
    verified = verify_in_turns(checkpoint, rounds)
    rows = {"checkpoint, MB": f"{num_bytes / 1e6:.0f}"}
    rows |= _rows_of_rates(rates, num_bytes)
    rows |= _rows_of_saves(in_step, beside)
    rows |= _rows_of_verification(verified, rates, num_bytes)
    rows |= _rows_of_starts(starts, resumes)
    return rows


def _sync_and_forget(folder: Path) -> None:
    os.sync()
    for path in folder.rglob("*"):
        if path.is_file():
            with path.open("rb") as file:
                forget(file.fileno())


# Name of a way to verify: processes, cold, each on a core of its own.
WAYS = {
    "1 rank": (1, False, False),
    "4 ranks": (4, False, False),
    "1 rank on one core": (1, False, True),
    "2 ranks on a core each": (2, False, True),
    "1 rank, cold": (1, True, False),
    "4 ranks, cold": (4, True, False),
}


def verify_in_turns(checkpoint: Path, rounds: int) -> dict[str, list[float]]:
    """Medians of each way; they take turns."""
    found: dict[str, list[tuple[float, ...]]] = {way: [] for way in WAYS}
    for number in range(2 * rounds + 2):
        for way, (ranks, is_cold, has_own_core) in WAYS.items():
            once = verify(checkpoint, ranks, is_cold=is_cold, has_own_core=has_own_core)
            if number:  # the first one warms up
                found[way].append(once)
    return {way: median(each) for way, each in found.items()}


def _rows_of_rates(rates: Rates, num_bytes: int) -> dict[str, str]:
    return {
        "disk, write and fsync, GB/s": f"{rates['write'] / 1e9:.2f}",
        "disk, read, GB/s": f"{rates['read'] / 1e9:.2f}",
        "read from the page cache on a core, GB/s": f"{rates['cached'] / 1e9:.1f}",
        "CRC-32 on a core, GB/s": f"{rates['hash'] / 1e9:.1f}",
        "copy on a core, GB/s": f"{rates['copy'] / 1e9:.1f}",
        "floor of a save: bytes / write rate, s": f"{num_bytes / rates['write']:.3f}",
        "floor of a copy: bytes / copy rate, s": f"{num_bytes / rates['copy']:.3f}",
    }


def _rows_of_saves(in_step: Times, beside: Times) -> dict[str, str]:
    saves, sums = in_step.each("save"), in_step.during("save", "checksums")
    whole, added = median(saves, first=1), median(sums, first=1)
    waits = [
        (save[0] + rest[0], save[1] + rest[1])
        for save, rest in zip(beside.each("save"), beside.during("save", "finalize"), strict=True)
    ]
    slower = median(beside.each("step beside a save"))[0] / median(beside.each("step"))[0]
    return {
        "synchronous save": shown(whole),
        "of it the check for NaN and infinity": shown(median(in_step.each("checks"), first=1)),
        "of it checksums and manifest": shown(added),
        "their share of the save": f"{added[0] / whole[0]:.1%} ({added[1] / whole[1]:.1%})",
        "asynchronous save: the training waits": shown(median(waits[1:-1])),
        "the first one, which starts the process": shown(waits[0]),
        "until it is complete": shown(median(beside.each("save until complete")[1:-1])),
        "a step beside it / a step alone": f"{slower:.2f}",
    }


def _rows_of_verification(
    verified: dict[str, list[float]], rates: Rates, num_bytes: int
) -> dict[str, str]:
    rows = {f"verification, {way}": shown(each) for way, each in verified.items()}
    one, four = verified["1 rank"], verified["4 ranks"]
    alone, two = verified["1 rank on one core"], verified["2 ranks on a core each"]
    cores, work = os.cpu_count() or 1, num_bytes / rates["hash"] + num_bytes / rates["cached"]
    return rows | {
        "floor on a core: read from the page cache and hash, s": f"{work:.3f}",
        f"floor of 4 ranks on {cores} cores, s": f"{work / min(cores, 4):.3f}",
        "floor cold: bytes / read rate, s": f"{num_bytes / rates['read']:.3f}",
        "1 rank / 4 ranks, seconds": f"{one[0] / four[0]:.2f}",
        "1 rank on a core / 2 ranks on a core each, seconds": f"{alone[0] / two[0]:.2f}",
        "1 rank / the busiest of 4, processor seconds": f"{one[2] / four[2]:.2f}",
    }


def _rows_of_starts(starts: Sequence[Times], resumes: Sequence[Times]) -> dict[str, str]:
    def pick(runs: Sequence[Times], part: str) -> str:
        return shown(median([run.each(part)[0] for run in runs]))

    return {
        "start-up until the first step": pick(starts, "start-up"),
        "of it imports": pick([*starts, *resumes], "imports"),
        "resume until the first step, cold": pick(resumes, "start-up"),
        "of it verification and load": pick(resumes, "load"),
    }


def report(tables: dict[str, dict[str, str]], rounds: int) -> str:
    """The figures as a Markdown page."""
    commit = subprocess.run(
        ["git", "-C", str(ROOT), "rev-parse", "--short", "HEAD"], capture_output=True, text=True
    ).stdout.strip()
    lines = [
        f"# What recovery costs, {date.today().isoformat()}",
        "",
        f"Commit {commit}; {platform.machine()}, {os.cpu_count()} cores; torch "
        f"{torch.__version__}; medians of {SAVES - 1} saves, {rounds} resumes and "
        f"{2 * rounds + 1} verifications.",
        "",
        f"Command: `python tests/performance_tests/bench_recovery.py --sizes {' '.join(tables)}`",
        "",
        "Seconds (processor seconds, of all processes); load average over the last 15 minutes "
        f"{os.getloadavg()[2]:.1f}.",
        "",
        "| | " + " | ".join(tables) + " |",
        "|---" * (len(tables) + 1) + "|",
    ]
    for row in next(iter(tables.values())):
        lines.append(f"| {row} | " + " | ".join(table[row] for table in tables.values()) + " |")
    return "\n".join(lines) + "\n"


def main() -> None:
    """Measure and print; write the report if asked to."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--sizes", nargs="+", choices=SIZES, default=list(SIZES))
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--folder", type=Path, help="on the disk to measure; a temporary one")
    parser.add_argument("--report", type=Path)
    options = parser.parse_args()
    tables = {}
    with tempfile.TemporaryDirectory(dir=options.folder) as name:
        data = Path(name, "data")
        sources = sorted(Path(sysconfig.get_path("stdlib")).glob("[a-f]*.py"))
        prepare_data(data, sources, vocab_size=4096)
        for size in options.sizes:
            folder = Path(name, size)
            folder.mkdir()
            tables[size] = measure(size, data, folder, options.rounds)
            shutil.rmtree(folder)
            print(size, json.dumps(tables[size], indent=1), flush=True)
    text = report(tables, options.rounds)
    print(text)
    if options.report:
        options.report.write_text(text)


if __name__ == "__main__":
    main()
