"""Tokens per second of raw text through the document buffer on one core, and what it takes.

python tests/performance_tests/bench_text.py [--gigabytes 50] [--files 500] [--tokenizer FOLDER]

The corpus is the standard library's source as JSON Lines, in one file under many names.  The floor
is the tokenizer alone on the same documents in the same run.
"""

import argparse
import gc
import json
import os
import random
import sysconfig
import tempfile
import time
from collections.abc import Iterator
from itertools import cycle
from pathlib import Path
from typing import Any

import torch

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ["TOKENIZERS_PARALLELISM"] = "false"


def read_texts(longest: int) -> list[str]:
    """Documents of at most so many characters, in a random order."""
    texts = []
    for path in sorted(Path(sysconfig.get_paths()["stdlib"]).rglob("*.py")):
        if "site-packages" not in path.parts:
            text = path.read_text(encoding="utf-8", errors="ignore")
            texts += [text[at : at + longest] for at in range(0, len(text), longest)]
    random.Random(1).shuffle(texts)
    return texts


def write_corpus(folder: Path, texts: list[str], gigabytes: float, files: int) -> None:
    """One file of lines under many names."""
    folder.mkdir()
    size = int(gigabytes * 1e9 / files)
    first, written, number = folder / "0.jsonl", 0, 0
    with first.open("wb") as file:
        while written < size:
            row = {"id": number, "text": texts[number % len(texts)]}
            written += file.write(json.dumps(row).encode() + b"\n")
            number += 1
    for index in range(1, files):
        os.link(first, folder / f"{index}.jsonl")


def peak_memory(reset: bool = False) -> float:
    """Of this process, in MiB: the peak since it was set back."""
    if reset:
        Path("/proc/self/clear_refs").write_text("5")
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) / 1024 for line in lines if line.startswith("VmHWM"))


def measure_tokenizer(encoder: Any, texts: Iterator[str], seconds: float) -> float:
    """Tokens per second of the tokenizer alone, one document after the other."""
    tokens, start = 0, time.process_time()
    while time.process_time() - start < seconds:
        tokens += len(encoder.encode(next(texts)))
    return tokens / (time.process_time() - start)


def make_config(seq_length: int) -> Any:
    """Megatron's dataset configuration."""
    from types import SimpleNamespace

    from megatron.core.datasets.gpt_dataset import GPTDatasetConfig

    return GPTDatasetConfig(
        random_seed=1,
        sequence_length=seq_length,
        tokenizer=SimpleNamespace(vocab_size=2**17, eod=0, pad=-1),  # type: ignore[arg-type]
        reset_position_ids=False,
        reset_attention_mask=False,
        eod_mask_loss=False,
        create_attention_mask=False,
    )


def main() -> None:
    """Build a corpus, read it for some seconds, and print what it took."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--gigabytes", type=float, default=50)
    parser.add_argument("--files", type=int, default=500)
    parser.add_argument("--seq-length", type=int, default=8192)
    parser.add_argument("--documents", type=int, default=2048)
    parser.add_argument("--streams", type=int, default=8)
    parser.add_argument("--longest", type=int, default=3000, help="characters of a document")
    parser.add_argument("--vocab-size", type=int, default=16384)
    parser.add_argument("--tokenizer", type=Path)
    parser.add_argument("--seconds", type=float, default=15.0)
    args = parser.parse_args()
    texts = read_texts(args.longest)
    with tempfile.TemporaryDirectory() as folder:
        tokenizer = args.tokenizer or train(Path(folder) / "tokenizer", texts, args.vocab_size)
        write_corpus(Path(folder) / "text", texts, args.gigabytes, args.files)
        del texts
        run(args, Path(folder) / "text", tokenizer)


def train(folder: Path, texts: list[str], vocab_size: int) -> Path:
    """Train a tokenizer."""
    from trinity_megatron.data.tokenizer import save_tokenizer, train_tokenizer

    save_tokenizer(train_tokenizer(texts, vocab_size=vocab_size), folder)
    return folder


def run(args: argparse.Namespace, corpus: Path, tokenizer: Path) -> None:
    """Read the corpus, and print."""
    from trinity_megatron.cpu_host.cuda_stand_ins import enter_host

    enter_host()
    from trinity_megatron.data.formats import ReadOptions
    from trinity_megatron.data.text.text_corpus import find_text
    from trinity_megatron.data.text.text_mixture import TextEncoder, TextMixture
    from trinity_megatron.training.datasets.stream_loader import PackedSamples, ReadingRank
    from trinity_megatron.training.datasets.text_loader import TextLoader

    torch.set_num_threads(1)
    gc.collect()
    memory, begin = peak_memory(reset=True), time.perf_counter()
    found = find_text(corpus, name="text", key="text", options=ReadOptions())
    listed = time.perf_counter() - begin
    mixture = TextMixture(
        corpora=[found],
        starts=(0,),
        parts=({0: 1},),
        order="rsdb",
        documents=args.documents,
        num_streams=args.streams,
        seed=1,
        seq_length=args.seq_length,
        tokenizer=tokenizer,
    )
    samples = PackedSamples(make_config(args.seq_length))
    loader = TextLoader(mixture, samples, ReadingRank(0, 1, 1), 0, num_workers=0)
    begin = time.perf_counter()
    next(loader)
    first = time.perf_counter() - begin
    for _ in range(4 * args.streams):  # the buffers are full
        next(loader)
    memory = peak_memory() - memory
    floor, rate = [], []
    encoder, texts = TextEncoder(tokenizer), cycle(read_texts(args.longest))
    measure_tokenizer(encoder, texts, 1.0)
    for _ in range(3):  # in turns, for others may use the machine
        floor.append(measure_tokenizer(encoder, texts, args.seconds / 6))
        rate.append(measure(loader, args.seq_length, args.seconds / 3))
    states = loader.save_state()["streams"].values()
    state = max(sum(v.nbytes for v in s.values() if hasattr(v, "nbytes")) for s in states)
    print(
        f"{args.files} files, {found.num_bytes / 1e9:.1f} GB: listed in {listed:.1f} s, the first "
        f"sequence after {first:.1f} s more, memory {memory:.0f} MiB above the "
        f"imports, state {state / 1024:.1f} KiB for each stream"
    )
    for one, other in zip(floor, rate, strict=True):
        print(
            f"tokenizer {one / 1e3:.0f}K tokens/s of one core, loader {other / 1e3:.0f}K: "
            f"{other / one:.0%}"
        )


def measure(loader: Any, seq_length: int, seconds: float) -> float:
    """Tokens per second of processor time."""
    sequences, start = 0, time.process_time()
    while time.process_time() - start < seconds:
        next(loader)
        sequences += 1
    return sequences * seq_length / (time.process_time() - start)


if __name__ == "__main__":
    main()
