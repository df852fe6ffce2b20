"""``prepare-data --workers 2`` against one process, and one process against datatrove's tokenizer.

python tests/performance_tests/bench_prepare.py [--megabytes 24] [--turns 3]

datatrove (pip install 'trinity_megatron[cluster]') reads the same JSON Lines with its own reader
and writes Megatron's format with its own tokenizer step, in one process with one thread.  Each
turn runs all three, so that what else the machine does meets all alike; times are without imports,
which both take once.  CPU seconds are of the process and its children.
"""

import argparse
import json
import os
import sys
import sysconfig
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

FILES, VOCAB_SIZE = 8, 16_384


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


def main() -> None:
    """Print a line for each turn."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--megabytes", type=float, default=24)
    parser.add_argument("--turns", type=int, default=3)
    args = parser.parse_args()
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    import datatrove.pipeline.readers
    import datatrove.pipeline.tokens.megatron_tokenizer  # noqa: F401
    import megatron.core.datasets.indexed_dataset  # noqa: F401

    from trinity_megatron.data.prepare import prepare_data

    with tempfile.TemporaryDirectory() as name:
        root = Path(name)
        size = write_rows(root / "text", args.megabytes) / 1e6
        small = root / "small"
        write_rows(small, 4)
        prepare_data(root / "first", [small], vocab_size=VOCAB_SIZE)
        tokenizer = root / "first" / "tokenizer"
        print(f"{size:.1f} MB of text in {FILES} files, on {os.cpu_count()} cores")
        for turn in range(args.turns):
            runs = {
                "1 worker": lambda out: ours(out, root / "text", tokenizer, 1),
                "2 workers": lambda out: ours(out, root / "text", tokenizer, 2),
                "datatrove": lambda out: theirs(out, root / "text", tokenizer),
            }
            found = {}
            for label, run in runs.items():
                out = root / f"{turn} {label}"
                out.mkdir()
                found[label] = measure(lambda run=run, out=out: run(out))
            one, two, other = found.values()
            times = [
                f"{label} {wall:.1f} s ({cpu:.1f} s CPU)" for label, (wall, cpu) in found.items()
            ]
            print(
                f"turn {turn + 1}, load {os.getloadavg()[0]:.1f}: {', '.join(times)}; "
                f"2 workers {one[0] / two[0]:.2f} of one by the clock, "
                f"{2 * one[1] / two[1]:.2f} by CPU; one against datatrove {other[0] / one[0]:.2f} "
                f"by the clock, {other[1] / one[1]:.2f} by CPU",
                flush=True,
            )


if __name__ == "__main__":
    sys.exit(main())
