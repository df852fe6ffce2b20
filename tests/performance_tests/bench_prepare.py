"""``prepare-data --workers 2`` against one process, and one process against datatrove's tokenizer.

python tests/performance_tests/bench_prepare.py [--megabytes 24] [--turns 4]

datatrove (pip install 'trinity_megatron[cluster]') reads the same JSON Lines with its own reader
and writes Megatron's format with its own tokenizer step, in one process with one thread.  "Two
commands" are two of one process at the same time, with half of the files each: what two cores of
this machine give at most.  Each turn runs all, every other one in the reverse order, so that what
else the machine does meets all alike; times are without imports, which all take once.  CPU seconds
are of the process and its children.
"""

import argparse
import json
import os
import shutil
import statistics
import sys
import sysconfig
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

FILES, VOCAB_SIZE = 8, 16_384
RUNS = ("1 worker", "2 workers", "2 commands", "datatrove")


def write_rows(folder: Path, megabytes: float) -> int:
    """The library's source, in pieces of up to 8 KB, as rows of several files; returns its size."""
    folder.mkdir()
    files = [(folder / f"{number}.jsonl").open("w") for number in range(FILES)]
    texts = [
        path.read_text("utf-8", "ignore")
        for path in sorted(Path(sysconfig.get_path("stdlib")).rglob("*.py"))
        if "site-packages" not in path.parts
    ]
    size = number = 0
    while size < megabytes * 1e6:
        for text in texts:
            for start in range(0, len(text), 8192):
                piece = f"# {number}\n{text[start : start + 8192]}"
                files[number % FILES].write(json.dumps({"text": piece}) + "\n")
                size += len(piece.encode())
                number += 1
            if size >= megabytes * 1e6:
                break
    for file in files:
        file.close()
    return size


def ours(folder: Path, source: Path, tokenizer: Path, workers: int) -> None:
    """Prepare data."""
    from trinity_megatron.data.prepare import prepare_data

    prepare_data(folder / "out", [source], tokenizer=tokenizer, workers=workers)


def theirs(folder: Path, source: Path, tokenizer: Path) -> None:
    """Read and tokenize with datatrove."""
    from datatrove.pipeline.readers import JsonlReader
    from datatrove.pipeline.tokens.megatron_tokenizer import MegatronDocumentTokenizer

    step = MegatronDocumentTokenizer(
        str(folder / "out"), tokenizer_name_or_path=str(tokenizer / "tokenizer.json")
    )
    step.run(JsonlReader(str(source)).run())


def measure(run: Callable[[], None]) -> tuple[float, float]:
    """Wall and CPU seconds, of a process of its own."""
    reader, writer = os.pipe()
    pid = os.fork()
    if not pid:
        start, before = time.monotonic(), os.times()
        run()
        wall, after = time.monotonic() - start, os.times()
        cpu = sum(after[:4]) - sum(before[:4])
        os.write(writer, json.dumps([wall, cpu]).encode())
        os._exit(0)
    os.close(writer)
    os.waitpid(pid, 0)
    with os.fdopen(reader) as pipe:
        wall, cpu = json.load(pipe)
    return wall, cpu


def two_commands(folder: Path, halves: list[Path], tokenizer: Path) -> None:
    """Prepare data in two processes at the same time."""
    pids = []
    for half in halves:
        pid = os.fork()
        if not pid:
            out = folder / half.name
            out.mkdir()
            ours(out, half, tokenizer, 1)
            os._exit(0)
        pids.append(pid)
    for pid in pids:
        os.waitpid(pid, 0)


def split_files(source: Path, root: Path) -> list[Path]:
    """Two folders with half of the files each."""
    halves = [root / "half_1", root / "half_2"]
    for number, half in enumerate(halves):
        half.mkdir()
        for path in sorted(source.iterdir())[number::2]:
            os.link(path, half / path.name)
    return halves


def ratios(found: dict[str, tuple[float, float]]) -> dict[str, tuple[float, float]]:
    """Rates of a turn, by the clock and by CPU seconds."""
    one, two, apart, other = (found[name] for name in RUNS)
    return {
        "two workers against one": (one[0] / two[0], 2 * one[1] / two[1]),
        "two commands against one": (one[0] / apart[0], 2 * one[1] / apart[1]),
        "one worker against datatrove": (other[0] / one[0], other[1] / one[1]),
    }


def main() -> None:
    """Print a row for each turn, and the medians."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--megabytes", type=float, default=24)
    parser.add_argument("--turns", type=int, default=4)
    args = parser.parse_args()
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    import datatrove.pipeline.readers
    import datatrove.pipeline.tokens.megatron_tokenizer  # noqa: F401
    import megatron.core.datasets.indexed_dataset  # noqa: F401

    from trinity_megatron.data.prepare import prepare_data

    with tempfile.TemporaryDirectory() as name:
        root = Path(name)
        text = root / "text"
        size = write_rows(text, args.megabytes) / 1e6
        halves = split_files(text, root)
        write_rows(root / "small", 4)
        prepare_data(root / "first", [root / "small"], vocab_size=VOCAB_SIZE)
        tokenizer = root / "first" / "tokenizer"
        runs: dict[str, Callable[[Path], None]] = {
            "1 worker": lambda out: ours(out, text, tokenizer, 1),
            "2 workers": lambda out: ours(out, text, tokenizer, 2),
            "2 commands": lambda out: two_commands(out, halves, tokenizer),
            "datatrove": lambda out: theirs(out, text, tokenizer),
        }
        assert tuple(runs) == RUNS
        print(f"{size:.1f} MB of text in {FILES} files, on {os.cpu_count()} cores\n")
        print(f"| turn | load | {' | '.join(f'{name}: s (CPU s)' for name in runs)} |")
        print("|---" * (2 + len(runs)) + "|")
        turns = []
        for turn in range(args.turns):
            found = {}
            for label in RUNS if turn % 2 == 0 else reversed(RUNS):
                out = root / "result"
                out.mkdir()
                found[label] = measure(lambda run=runs[label], out=out: run(out))
                shutil.rmtree(out)
            turns.append(ratios(found))
            cells = [f"{found[name][0]:.1f} ({found[name][1]:.2f})" for name in RUNS]
            load = os.getloadavg()[0]
            print(f"| {turn + 1} | {load:.1f} | {' | '.join(cells)} |", flush=True)
        print("\n| median (each turn) | by the clock | by CPU |\n|---|---|---|")
        for label in turns[0]:
            cells = []
            for kind in range(2):
                each = [turn[label][kind] for turn in turns]
                words = ", ".join(f"{ratio:.2f}" for ratio in each)
                cells.append(f"{statistics.median(each):.2f} ({words})")
            print(f"| {label} | {' | '.join(cells)} |")


if __name__ == "__main__":
    sys.exit(main())
