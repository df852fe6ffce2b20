"""Tokens per second of the document buffer on one core, from an indexed dataset.

python tests/performance_tests/bench_rsdb.py [--seq-length 8192] [--mean 700] [--streams 6]
"""

import argparse
import os
import resource
import tempfile
import time
from pathlib import Path

import numpy as np

from trinity_megatron.data.rsdb.virtual_stream import BufferedMixture, VirtualStream


def write(prefix: Path, lengths: np.ndarray) -> None:
    """A dataset of random tokens in Megatron's format."""
    import torch
    from megatron.core.datasets.indexed_dataset import IndexedDatasetBuilder

    builder = IndexedDatasetBuilder(f"{prefix}.bin", dtype=np.int32)
    generator = np.random.default_rng(1)
    for length in lengths.tolist():
        builder.add_document(torch.from_numpy(generator.integers(0, 2**17, length)), [length])
    builder.finalize(f"{prefix}.idx")


def main() -> None:
    """Read sequences for some seconds, and print the rate."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--seq-length", type=int, default=8192)
    parser.add_argument("--documents", type=int, default=2048)
    parser.add_argument("--streams", type=int, default=6)
    parser.add_argument("--mean", type=float, nargs="+", default=[60, 700, 5000])
    parser.add_argument("--seconds", type=float, default=5.0)
    args = parser.parse_args()
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    from trinity_megatron.cpu_host.cuda_stand_ins import enter_host

    enter_host()
    from megatron.core.datasets.indexed_dataset import IndexedDataset

    from trinity_megatron.training.datasets.buffer_loader import BufferedSamples

    for mean in args.mean:
        with tempfile.TemporaryDirectory() as folder:
            prefix = Path(folder) / "data"
            count = int(2e7 / mean)
            lengths = 1 + np.random.default_rng(0).lognormal(np.log(mean) - 0.5, 1, count)
            write(prefix, lengths.astype(np.int64))
            dataset = IndexedDataset(str(prefix))
            mixture = BufferedMixture(
                names=("data",),
                lengths=(dataset.sequence_lengths,),
                starts=(0,),
                parts=({0: 1},),
                documents=args.documents,
                num_streams=args.streams,
                seed=1,
                seq_length=args.seq_length,
            )
            streams = [VirtualStream(mixture, number) for number in range(args.streams)]
            samples = BufferedSamples([dataset], make_config(args.seq_length))
            start, process, sequences = time.perf_counter(), time.process_time(), 0
            while time.perf_counter() - start < args.seconds:
                samples.make(streams[sequences % args.streams].next())
                sequences += 1
            cpu = time.process_time() - process
            memory = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
            print(
                f"documents of {mean:g} tokens: {sequences * args.seq_length / cpu / 1e6:.2f}M "
                f"tokens/s of one core ({sequences} sequences, {cpu:.1f} s of processor time, "
                f"process {memory:.2f} GiB)",
                flush=True,
            )


def make_config(seq_length: int) -> object:
    """Megatron's dataset configuration."""
    from types import SimpleNamespace

    from megatron.core.datasets.gpt_dataset import GPTDatasetConfig

    return GPTDatasetConfig(
        random_seed=1,
        sequence_length=seq_length,
        blend_per_split=[(["data"], None), None, None],
        tokenizer=SimpleNamespace(vocab_size=2**17, eod=0, pad=-1),
        reset_position_ids=False,
        reset_attention_mask=False,
        eod_mask_loss=False,
        create_attention_mask=False,
    )


if __name__ == "__main__":
    main()
