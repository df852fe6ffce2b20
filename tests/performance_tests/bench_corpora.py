"""Start a run over a mixture of many prepared corpora: seconds and opened files of each rank.

python tests/performance_tests/bench_corpora.py [--corpora 2000] [--mebibytes 0]

Two gloo ranks of a small model make one step of a run that reads all corpora; they are forked from
a process that has imported everything.  All corpora are one, by hard links; ``--mebibytes`` makes
its tokens a file of this size, with a hole, of which the fingerprint reads 16 MiB if it has 64 or
more.  CPU seconds are of the rank alone and do not count its waiting for the other one.
"""

import argparse
import contextlib
import json
import os
import shutil
import sys
import sysconfig
import tempfile
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any, TextIO

RANKS = 2
# A sequence of each corpus in a global batch of 8; the run ends after its first step.
STEPS_PER_CORPUS = 1 / 8


def make_corpora(folder: Path, count: int, mebibytes: int) -> Path:
    """A mixture of so many prepared folders; returns its file."""
    from trinity_megatron.data.prepare import prepare_data

    one = folder / "one"
    sources = sorted(Path(sysconfig.get_path("stdlib")).glob("[a-c]*.py"))[:12]
    prepare_data(one, sources, vocab_size=512)
    if mebibytes:
        size = mebibytes * 2**20
        os.truncate(one / "train.bin", size)
        manifest = json.loads((one / "manifest.json").read_text())
        manifest["files"]["train.bin"] = size
        (one / "manifest.json").write_text(json.dumps(manifest))
    names = [f"corpus{number}" for number in range(count)]
    for name in names:
        shutil.copytree(one, folder / name, copy_function=os.link)
    corpora = "\n".join(f"  {name}: {{path: {name}}}" for name in names)
    weights = ", ".join(f"{name}: 1" for name in names)
    path = folder / "mix.yaml"
    path.write_text(f"corpora:\n{corpora}\nphases: [{{weights: {{{weights}}}}}]\n")
    return path


def timed(
    table: TextIO, rank: int, what: str, opened: Counter, work: Callable[..., Any]
) -> Callable[..., Any]:
    """A function that writes a row of the table after each call."""

    def wrapper(*args: Any, **kwargs: Any) -> Any:
        opened.clear()
        start, cpu = time.perf_counter(), time.process_time()
        result = work(*args, **kwargs)
        seconds = f"{time.perf_counter() - start:.1f} | {time.process_time() - cpu:.2f}"
        kinds = ("manifest.json", ".idx", ".bin", "tokenizer.json")
        counts = [sum(n for name, n in opened.items() if name.endswith(kind)) for kind in kinds]
        table.write(f"| {rank} | {what} | {seconds} | {' | '.join(map(str, counts))} |\n")
        table.flush()
        return result

    return wrapper


def run_rank(rank: int, flags: list[str], below: str, store: str) -> None:
    """Train one step; rows of the table go to stdout, what the training prints nowhere."""
    import torch

    from trinity_megatron.training import pretrain

    opened: Counter[str] = Counter()

    def note(event: str, args: tuple[Any, ...]) -> None:
        if event == "open" and str(args[0]).startswith(below):
            opened[str(args[0])] += 1

    values = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": RANKS, "LOCAL_WORLD_SIZE": RANKS}
    os.environ.update({name: str(value) for name, value in values.items()})
    torch.distributed.init_process_group(
        "gloo", init_method=f"file://{store}", rank=rank, world_size=RANKS
    )
    sys.addaudithook(note)
    table = os.fdopen(os.dup(1), "w")
    os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
    parse = timed(table, rank, "arguments and corpora", opened, pretrain.parse_trinity_args)
    pretrain.parse_trinity_args = parse
    provider = pretrain.DatasetsProvider
    provider.__call__ = timed(table, rank, "datasets", opened, provider.__call__)
    sys.argv = ["pretrain", *flags]
    with contextlib.suppress(SystemExit):
        pretrain.main()
    torch.distributed.destroy_process_group()


def main() -> None:
    """Print a table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--corpora", type=int, default=2000)
    parser.add_argument("--mebibytes", type=int, default=0)
    args = parser.parse_args()
    import torch

    torch.set_num_threads(1)
    import trinity_megatron.training.pretrain  # noqa: F401  enters the host
    from tests.functional_tests.launch import SMALL
    from tests.functional_tests.worker import import_once

    import_once()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name) / "corpora"
        folder.mkdir()
        mixture = make_corpora(folder, args.corpora, args.mebibytes)
        steps = int(args.corpora * STEPS_PER_CORPUS) + 20
        flags = [*SMALL, "--data", str(mixture), "--train-iters", str(steps)]
        flags += ["--exit-interval", "1", "--data-cache-path", f"{name}/cache"]
        print(f"{args.corpora} corpora, load {os.getloadavg()[0]:.1f}, {os.cpu_count()} cores\n")
        print("| rank | | s | CPU s | manifests | .idx | .bin | tokenizers |")
        print("|---|---|---|---|---|---|---|---|", flush=True)
        arguments = (flags, str(folder), f"{name}/store")
        torch.multiprocessing.start_processes(
            run_rank, arguments, nprocs=RANKS, start_method="fork"
        )


if __name__ == "__main__":
    main()
