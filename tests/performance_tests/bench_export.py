"""Memory and throughput of ``trinity-megatron export`` on a synthetic checkpoint.

python tests/performance_tests/bench_export.py [--gigabytes 2] [--folder DIR]

Prints, for each format: peak resident memory above that after the imports, and the rate in bytes of
the bf16 weights.
"""

import argparse
import importlib.util
import subprocess
import sys
import tempfile
from pathlib import Path

from bench_convert import convert, make_checkpoint

from trinity_megatron.data.tokenizer import save_tokenizer, train_tokenizer

EXPORT = """
import sys, time
from pathlib import Path
from trinity_megatron.checkpoint.convert import export_hf, open_run
from trinity_megatron.export.fp8_encoding import Fp8BlockEncoding
from trinity_megatron.export.gguf_file import write_gguf
import numpy, safetensors, transformers
kind, source, target = sys.argv[1], Path(sys.argv[2]), Path(sys.argv[3])
def status(name):
    text = Path("/proc/self/status").read_text()
    return next(int(line.split()[1]) for line in text.splitlines() if line.startswith(name))
Path("/proc/self/clear_refs").write_text("5")  # the peak of the imports is not ours
baseline = status("VmRSS")
begin = time.monotonic()
run = open_run(source)
if kind in ("bf16", "fp8-block"):
    export_hf(run, target, encoding=Fp8BlockEncoding() if kind == "fp8-block" else None)
else:
    write_gguf(run, target, kind=kind)
print("RESULT", baseline, status("VmHWM"), time.monotonic() - begin)
"""


def main() -> None:
    """Run the benchmark."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--gigabytes", type=float, default=2.0)
    parser.add_argument("--folder", type=Path)
    args = parser.parse_args()
    kinds = ["bf16", "fp8-block"]
    with tempfile.TemporaryDirectory(dir=args.folder) as name:
        hf, megatron = Path(name, "hf"), Path(name, "megatron")
        size = make_checkpoint(hf, args.gigabytes)
        if importlib.util.find_spec("gguf"):
            tokenizer = train_tokenizer([Path(__file__).read_text()], vocab_size=300)
            save_tokenizer(tokenizer, hf)
            kinds += ["BF16", "Q8_0"]
        convert("hf_to_megatron", hf, megatron)
        for kind in kinds:
            command = [sys.executable, "-W", "ignore", "-c", EXPORT, kind, str(megatron)]
            result = subprocess.run(
                [*command, str(Path(name, kind))], check=True, capture_output=True, text=True
            )
            line = next(line for line in result.stdout.splitlines() if line.startswith("RESULT"))
            baseline, peak, seconds = map(float, line.split()[1:])
            memory = (peak - baseline) * 1024 / 1e9
            print(f"{kind:10s} {size / 1e9 / seconds:6.2f} GB/s; {memory:.3f} GB above the imports")


if __name__ == "__main__":
    main()
