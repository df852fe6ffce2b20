"""Memory and throughput of a conversion of a synthetic checkpoint, against a plain copy.

python tests/performance_tests/bench_convert.py [--gigabytes 4] [--folder DIR]

Prints, for both directions: peak resident memory above that after the imports, and the rate with
its ratio to ``cp -r`` of the same files in the same run, alone and followed by ``sync`` (a
conversion is on the disk when it ends).  The copy starts after as long a pause as the imports take:
a virtual machine gives freed memory back to its host within seconds, and gets it back slowly.
"""

import argparse
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

# Layers of Nano's width; the vocabulary is small, so that the experts dominate as they do there.
MODEL = {
    "vocab_size": 32768,
    "hidden_size": 1024,
    "intermediate_size": 3072,
    "moe_intermediate_size": 256,
    "num_dense_layers": 2,
    "num_attention_heads": 8,
    "num_key_value_heads": 2,
    "head_dim": 128,
    "num_experts": 128,
    "num_experts_per_tok": 8,
    "num_shared_experts": 1,
    "route_scale": 2.826,
    "sliding_window": 2048,
    "mup_enabled": True,
}
IMPORT_SECONDS = 6
BYTES_PER_LAYER = 2 * 128 * 3 * 1024 * 256  # of bf16 experts

CONVERT = """
import sys, time
from pathlib import Path
from trinity_megatron.checkpoint import convert
function, source, target = sys.argv[1:]
def status(name):
    text = Path("/proc/self/status").read_text()
    return next(int(line.split()[1]) for line in text.splitlines() if line.startswith(name))
Path("/proc/self/clear_refs").write_text("5")  # the peak of the imports is not ours
baseline = status("VmRSS")
begin = time.monotonic()
getattr(convert, function)(Path(source), Path(target))
seconds = time.monotonic() - begin
peak = status("VmHWM")
print("RESULT", baseline, peak, seconds)
"""


def make_checkpoint(folder: Path, gigabytes: float) -> int:
    """Write a checkpoint of random bf16 numbers; returns its bytes."""
    import torch
    from safetensors.torch import save_file

    from trinity_megatron.checkpoint.hf_writer import build_header, build_index, split_into_files
    from trinity_megatron.checkpoint.param_mapping import resolve
    from trinity_megatron.model.hf_config import trinity_config_from_hf

    layers = max(int(gigabytes * 1e9 / BYTES_PER_LAYER), 3)
    fields = {"model_type": "afmoe", "num_hidden_layers": layers, **MODEL}
    folder.mkdir(parents=True)
    (folder / "config.json").write_text(json.dumps(fields))
    (folder / "generation_config.json").write_text("{}\n")
    tensors = {
        name: (torch.float32 if entry.keep_fp32 else torch.bfloat16, shape)
        for entry in resolve(trinity_config_from_hf(fields))
        for name, shape in entry.hf.items()
    }
    headers = {}
    for file, names in split_into_files(tensors, max_shard_size="1GB").items():
        content = {name: torch.randn(tensors[name][1]).to(tensors[name][0]) for name in names}
        save_file(content, folder / file, metadata={"format": "pt"})
        headers[file] = build_header({name: tensors[name] for name in names})
    (folder / "model.safetensors.index.json").write_text(build_index(headers))
    return sum(path.stat().st_size for path in folder.iterdir())


def copy(source: Path, target: Path, pause: float) -> tuple[float, float]:
    """Seconds of ``cp -r`` alone, and with ``sync``."""
    shutil.rmtree(target, ignore_errors=True)
    os.sync()
    time.sleep(pause)
    begin = time.monotonic()
    subprocess.run(["cp", "-r", str(source), str(target)], check=True)
    alone = time.monotonic() - begin
    os.sync()
    both = time.monotonic() - begin
    shutil.rmtree(target)
    os.sync()
    return alone, both


def convert(function: str, source: Path, target: Path) -> tuple[float, float]:
    """Seconds, and peak memory in GB above that after the imports."""
    shutil.rmtree(target, ignore_errors=True)
    os.sync()
    command = [sys.executable, "-W", "ignore", "-c", CONVERT, function, str(source), str(target)]
    result = subprocess.run(command, check=True, capture_output=True, text=True)
    line = next(line for line in result.stdout.splitlines() if line.startswith("RESULT"))
    baseline, peak, seconds = map(float, line.split()[1:])
    return seconds, (peak - baseline) * 1024 / 1e9


def main() -> None:
    """Run the benchmark."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--gigabytes", type=float, default=4.0)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--folder", type=Path)
    parser.add_argument("--pause", type=float, default=IMPORT_SECONDS, help="before a copy")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory(dir=args.folder) as name:
        hf, megatron, back = (Path(name, part) for part in ("hf", "megatron", "back"))
        size = make_checkpoint(hf, args.gigabytes)
        copy(hf, back, 0)  # the first reading
        rows = []
        for _ in range(args.rounds):
            plain, synced = copy(hf, back, args.pause)
            to_megatron, memory_in = convert("hf_to_megatron", hf, megatron)
            to_hf, memory_out = convert("megatron_to_hf", megatron, back)
            rows.append((plain, synced, to_megatron, to_hf, memory_in, memory_out))
        same = subprocess.run(["diff", "-r", str(hf), str(back)]).returncode == 0
        plain, synced, to_megatron, to_hf, memory_in, memory_out = (
            sorted(column)[len(rows) // 2] for column in zip(*rows, strict=True)
        )
        print(f"{size / 1e9:.2f} GB, median of {args.rounds} rounds; back byte-identical: {same}")
        print(f"cp -r                {size / 1e9 / plain:6.2f} GB/s")
        print(f"cp -r and sync       {size / 1e9 / synced:6.2f} GB/s")
        for words, seconds, memory in (
            ("to Megatron", to_megatron, memory_in),
            ("to Hugging Face", to_hf, memory_out),
        ):
            print(
                f"{words:20s} {size / 1e9 / seconds:6.2f} GB/s = {plain / seconds:.2f} of cp, "
                f"{synced / seconds:.2f} of cp and sync; {memory:.3f} GB above the imports"
            )


if __name__ == "__main__":
    main()
