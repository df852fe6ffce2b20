"""Time and error of Newton-Schulz and of a Muon step, on a CPU or a GPU.

    python tests/performance_tests/bench_muon.py [--device auto|cpu|cuda] [--quick]
        [--rounds 15] [--threads 2] [--report FILE]

Contenders of one table run in turn in one process, so that a slow moment of the machine hits all of
them; a ratio is the median over the rounds of each round's ratio, with its quartiles.  ``--quick``
runs every branch once with tiny sizes; ``--device cpu --quick`` also those for a GPU, the Triton
kernels in Triton's interpreter.  It says that the benchmark works, its figures say nothing.
"""

import argparse
import os
import platform
import socket
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from datetime import date
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))

if {"cpu", "--quick"} <= set(sys.argv):
    os.environ["TRITON_INTERPRET"] = "1"  # read when Triton is imported, as Megatron does

from trinity_megatron.cpu_host.cuda_stand_ins import enter_host  # noqa: E402

enter_host()

import torch  # noqa: E402
from torch import Tensor  # noqa: E402
from torch.nn import Parameter  # noqa: E402
from torch.utils.flop_counter import FlopCounterMode  # noqa: E402

from trinity_megatron.model.presets import get_preset  # noqa: E402
from trinity_megatron.optimizer.muon import MatrixSplit, Muon  # noqa: E402
from trinity_megatron.optimizer.newton_schulz import orthogonalize  # noqa: E402

GOAL_OF_STEP, GOAL_OF_RATE, GOAL_OF_SHARE = 0.5, 0.7, 0.25
SETS = (("simple", 5), ("dion", 5), ("polar_express", 5), ("polar_express", 8))
Call = Callable[[], object]


def ratio(numerator: Sequence[float], denominator: Sequence[float]) -> str:
    """Median of the rounds' ratios and its quartiles."""
    ratios = [a / b for a, b in zip(numerator, denominator, strict=True)]
    if len(ratios) == 1:
        return f"{ratios[0]:.3g}"
    low, middle, high = statistics.quantiles(ratios, n=4, method="inclusive")
    return f"**{middle:.3g}** ({low:.3g} to {high:.3g})"


class Times(NamedTuple):
    """Seconds of each round."""

    wall: list[float]
    processor: list[float]

    @property
    def ms(self) -> str:
        """Median of wall-clock time in milliseconds."""
        return f"{statistics.median(self.wall) * 1e3:.3g}"

    def over(self, other: "Times") -> str:
        """Ratio of wall-clock times."""
        return ratio(self.wall, other.wall)

    def plus(self, other: "Times") -> "Times":
        """Sum, round by round."""
        pairs = zip(self, other, strict=True)
        return Times(*([a + b for a, b in zip(mine, its, strict=True)] for mine, its in pairs))

    def after(self, warm: int) -> "Times":
        """Without the first rounds."""
        return Times(self.wall[warm:], self.processor[warm:])


class Bench(NamedTuple):
    """What all parts need to know."""

    device: torch.device
    quick: bool
    rounds: int

    @property
    def on_gpu(self) -> bool:
        """Whether the sizes and dtypes are those for a GPU."""
        return self.device.type == "cuda"

    @property
    def dtype(self) -> torch.dtype:
        """What Newton-Schulz computes in by default."""
        return torch.bfloat16 if self.on_gpu else torch.float32

    def random(self, *shape: int) -> Tensor:
        """Float32 standard normal numbers, the same in every run."""
        generator = torch.Generator(self.device).manual_seed(0)
        return torch.randn(*shape, generator=generator, device=self.device)

    def measure(self, call: Call, times: Times) -> None:
        """Add one call, with what it has started on the device."""
        self.wait()
        start, start_of_processor = time.perf_counter(), time.process_time()
        call()
        self.wait()
        times.wall.append(time.perf_counter() - start)
        times.processor.append(time.process_time() - start_of_processor)

    def wait(self) -> None:
        """Until the device has done everything."""
        if self.on_gpu:
            torch.cuda.synchronize()

    def in_turn(self, calls: dict[str, Call]) -> dict[str, Times]:
        """Time every call in every round, after two rounds to warm up."""
        warm = min(2, self.rounds)
        times = {name: Times([], []) for name in calls}
        for _ in range(warm + self.rounds):
            for name, call in calls.items():
                self.measure(call, times[name])
        return {name: found.after(warm) for name, found in times.items()}


def table(header: str, rows: Sequence[str]) -> list[str]:
    """A Markdown table and an empty line."""
    return [header, "|" + "---|" * (header.count("|") - 1), *rows, ""]


# --- (a) batched against loop ---------------------------------------------------------------------


def report_batching(bench: Bench) -> list[str]:
    """One call for many matrices against one call for each."""
    if bench.quick:
        shapes = [(3, 16, 32)]
    elif bench.on_gpu:
        shapes = [(128, 256, 1024), (64, 128, 256), (16, 1024, 1024), (4, 3072, 3072)]
    else:
        shapes = [(64, 64, 256), (64, 128, 256), (32, 32, 256), (8, 256, 768)]
    rows = []
    for count, short, long in shapes:
        matrices = bench.random(count, short, long)
        # On a CPU, Muon's batches are of what fits its cache.
        part = count if bench.on_gpu else max(1, 2**19 // (short * long))

        def batched(matrices: Tensor = matrices, part: int = part) -> None:
            for some in matrices.split(part):
                orthogonalize(some, dtype=bench.dtype)

        def loop(matrices: Tensor = matrices) -> None:
            for matrix in matrices:
                orthogonalize(matrix, dtype=bench.dtype)

        times = bench.in_turn({"batched": batched, "loop": loop})
        rows.append(
            f"| {count} x {short} x {long} | {min(part, count)} | {times['batched'].ms} "
            f"| {times['loop'].ms} | {times['batched'].over(times['loop'])} |"
        )
    return [
        f"## Batched against loop, {_name(bench.dtype)}",
        "",
        *table("| matrices | at once | batched (ms) | loop (ms) | batched / loop |", rows),
    ]


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


# --- (b) SYRK against matmul ----------------------------------------------------------------------


def report_syrk(bench: Bench) -> list[str]:
    """The Triton kernels against torch.bmm and torch.baddbmm, bf16."""
    title = ["## SYRK against matmul, bfloat16", ""]
    if not bench.on_gpu and "TRITON_INTERPRET" not in os.environ:
        return [*title, "Not measured: the kernels are for a GPU; a CPU only interprets them.", ""]
    from trinity_megatron.optimizer.syrk import TILINGS, symmetric_product, symmetric_square

    sizes = [(2, 16, 32)] if bench.quick else _syrk_sizes()
    tilings = TILINGS[torch.bfloat16][: 1 if bench.quick else None]
    rows, whole = [], []
    for count, short, long in sizes:
        x = bench.random(count, short, long).bfloat16() / (short * long) ** 0.5
        gram = torch.bmm(x, x.mT)
        calls: dict[str, Call] = {
            "bmm": lambda x=x: torch.bmm(x, x.mT),
            "baddbmm": lambda g=gram: torch.baddbmm(g, g, g, beta=-4.775, alpha=2.0315),
        }
        for tiling in tilings:
            calls[f"X X^T {tuple(tiling)}"] = lambda x=x, t=tiling: symmetric_product(x, tiling=t)
            calls[f"A A {tuple(tiling)}"] = lambda g=gram, t=tiling: symmetric_square(
                g, alpha=2.0315, beta=-4.775, tiling=t
            )
        times = bench.in_turn(calls)
        for kind, other in (("X X^T", "bmm"), ("A A", "baddbmm")):
            for name in times:
                if name.startswith(f"{kind} ("):
                    rows.append(
                        f"| {count} x {short} x {long} | {name} | {times[other].ms} "
                        f"| {times[name].ms} | {times[name].over(times[other])} |"
                    )
        times = bench.in_turn(
            {
                "matmul": lambda x=x: orthogonalize(x, dtype=torch.bfloat16, syrk=False),
                "syrk": lambda x=x: orthogonalize(x, dtype=torch.bfloat16, syrk=True),
            }
        )
        whole.append(
            f"| {count} x {short} x {long} | {times['matmul'].ms} "
            f"| {times['syrk'].ms} | {times['syrk'].over(times['matmul'])} |"
        )
    device = (
        f"Compute capability {torch.cuda.get_device_capability(bench.device)}."
        if bench.on_gpu
        else "In Triton's interpreter: not times of the kernels."
    )
    return [
        *title,
        f"{device} A tiling is (rows, depth, warps, stages); the first one is used.",
        "",
        *table("| X | product | torch (ms) | SYRK (ms) | SYRK / torch |", rows),
        *table("| orthogonalize | matmul (ms) | SYRK (ms) | SYRK / matmul |", whole),
        "`_SYRK_FROM` in newton_schulz.py takes, for this compute capability, the smallest short "
        "side from which the last column stays below 1.",
        "",
    ]


def _syrk_sizes() -> list[tuple[int, int, int]]:
    squares = [(max(1, 2**26 // n**2), n, n) for n in (256, 512, 1024, 2048, 3072, 4096)]
    return [(128, 256, 1024), *squares]


# --- (c) coefficient sets -------------------------------------------------------------------------


def report_coefficients(bench: Bench) -> list[str]:
    """Distance of the result from the polar factor, and time."""
    count, short, long = (2, 16, 32) if bench.quick else (8, 128, 256)
    if bench.on_gpu and not bench.quick:
        count, short, long = 4, 512, 1024  # the float64 decompositions take their time
    matrices = bench.random(count, short, long)
    left, _, right = torch.linalg.svd(matrices.double(), full_matrices=False)
    dtypes = (torch.float32, torch.bfloat16)
    calls: dict[str, Call] = {
        f"{name} {steps} {dtype}": lambda n=name, s=steps, d=dtype: orthogonalize(
            matrices, coefficients=n, steps=s, dtype=d
        )
        for name, steps in SETS
        for dtype in dtypes
    }
    times = bench.in_turn(calls)
    rows = []
    for name, steps in SETS:
        for dtype in dtypes:
            result = orthogonalize(matrices, coefficients=name, steps=steps, dtype=dtype)
            values = torch.linalg.svdvals(result.double())
            error = (result.double() - left @ right).norm() / (count * short) ** 0.5
            rows.append(
                f"| {name} | {steps} | {_name(dtype)} | {error:.3f} | {values.min():.3f} to "
                f"{values.max():.3f} | {times[f'{name} {steps} {dtype}'].ms} |"
            )
    header = "| set | steps | dtype | RMS error | singular values | ms |"
    return [
        f"## Coefficient sets, {count} random matrices {short} x {long}",
        "",
        "RMS error: of the result against U V^T, for each singular direction. docs/muon.md has the "
        "bands over all singular values.",
        "",
        *table(header, rows),
    ]


# --- (d) a step against torch.optim.Muon ----------------------------------------------------------


def parameters_with_gradients(bench: Bench, shapes: Sequence[Sequence[int]]) -> list[Parameter]:
    """Random parameters, and a gradient for each."""
    params = [Parameter(0.02 * bench.random(*shape)) for shape in shapes]
    for param in params:
        param.grad = bench.random(*param.shape)
    return params


def report_step_against_torch(bench: Bench) -> list[str]:
    """64 matrices of 128 x 256, the same settings, triple and number of steps."""
    count, *shape = (3, 16, 32) if bench.quick else (64, 128, 256)
    settings = {"lr": 1e-3, "momentum": 0.95, "weight_decay": 0.1, "nesterov": True}
    theirs = torch.optim.Muon(parameters_with_gradients(bench, [shape] * count), **settings)
    calls: dict[str, Call] = {"torch": theirs.step}
    names = {"torch": "torch.optim.Muon, bfloat16"}
    for dtype in (torch.float32, torch.bfloat16):
        ours = Muon(
            parameters_with_gradients(bench, [shape] * count),
            coefficients="simple",
            dtype=dtype,
            **settings,
        )
        calls[_name(dtype)] = ours.step
        default = " (default)" if dtype == bench.dtype else ""
        names[_name(dtype)] = f"ours, {_name(dtype)}{default}"
    times = bench.in_turn(calls)
    rows = [
        f"| {names[key]} | {times[key].ms} | {times[key].over(times['torch'])} "
        f"| {ratio(times[key].processor, times['torch'].processor)} |"
        for key in calls
    ]
    return [
        f"## Step of {count} matrices {shape[0]} x {shape[1]} against torch.optim.Muon",
        "",
        *table(
            f"| optimizer | ms | ratio (goal <= {GOAL_OF_STEP}) | ratio of processor time |", rows
        ),
    ]


# --- (e) the rate of matrix products --------------------------------------------------------------


def report_rate(bench: Bench) -> list[str]:
    """FLOP/s of Newton-Schulz against those of one large product of the same dtype."""
    if bench.quick:
        shapes, size = [(2, 32, 32)], 64
    elif bench.on_gpu:
        shapes, size = [(20, 3072, 3072), (32, 1024, 1024), (128, 256, 1024)], 8192
    else:
        shapes, size = [(16, 128, 256), (32, 64, 256), (2, 256, 768), (4, 512, 512)], 1024
    square = bench.random(size, size).to(bench.dtype)
    calls: dict[str, Call] = {"peak": lambda: square @ square}
    flops: dict[str, float] = {"peak": 2.0 * size**3}
    for shape in shapes:
        matrices, name = bench.random(*shape), " x ".join(map(str, shape))
        calls[name] = lambda m=matrices: orthogonalize(m, dtype=bench.dtype)
        counter = FlopCounterMode(display=False)
        with counter:  # what is really multiplied: less than step by step where steps share a Gram
            orthogonalize(matrices, dtype=bench.dtype, syrk=False)
        flops[name] = counter.get_total_flops()
    times = bench.in_turn(calls)
    rates = {name: [flops[name] / t for t in times[name].wall] for name in calls}
    rows = [
        f"| {name} | {times[name].ms} | {statistics.median(rates[name]) / 1e9:,.0f} "
        f"| {ratio(rates[name], rates['peak'])} |"
        for name in calls
    ]
    return [
        f"## Rate of matrix products, {_name(bench.dtype)}",
        "",
        f"The peak is one product of {size} x {size}, measured in the same rounds.",
        "",
        *table(f"| matrices | ms | GFLOP/s | of the peak (goal >= {GOAL_OF_RATE}) |", rows),
    ]


# --- (f) against AdamW, and the share of a training step ------------------------------------------


def layer_parameters(bench: Bench, preset: str) -> list[Parameter]:
    """Matrices of one mixture-of-experts layer, fused and stacked as in the model."""
    model = get_preset(preset).model
    hidden, width = model["hidden_size"], model["moe_ffn_hidden_size"]
    heads, groups, head = (
        model[name] for name in ("num_attention_heads", "num_query_groups", "kv_channels")
    )
    shared, experts = model["moe_shared_expert_intermediate_size"], model["num_moe_experts"]
    experts = 2 if bench.quick else experts
    queries = heads // groups * head
    params = parameters_with_gradients(
        bench,
        [
            (groups * (2 * queries + 2 * head), hidden),  # per group: queries, gates, key, value
            (hidden, heads * head),
            (experts, hidden),  # the router
            (2 * shared, hidden),
            (hidden, shared),
            (experts, 2 * width, hidden),
            (experts, hidden, width),
        ],
    )
    for number, sizes in (
        (0, (queries, queries, head, head)),
        (3, (shared, shared)),
        (5, (width, width)),
    ):
        params[number].muon_split = MatrixSplit(sizes)  # type: ignore[attr-defined]
    return params


def report_against_adamw(bench: Bench) -> list[str]:
    """The same parameters under Muon and under fused AdamW."""
    preset = "nano" if bench.on_gpu and not bench.quick else "tiny"
    muon = Muon(layer_parameters(bench, preset), lr=1e-4)
    adamw = torch.optim.AdamW(layer_parameters(bench, preset), lr=1e-4, fused=True)
    times = bench.in_turn({"Muon": muon.step, "AdamW": adamw.step})
    numel = sum(p.numel() for group in muon.param_groups for p in group["params"])
    return [
        f"## A layer of the {preset} preset: Muon against fused AdamW",
        "",
        *table(
            "| parameters | Muon (ms) | AdamW (ms) | Muon / AdamW |",
            [
                f"| {numel:,} | {times['Muon'].ms} | {times['AdamW'].ms} "
                f"| {times['Muon'].over(times['AdamW'])} |"
            ],
        ),
    ]


def report_share(bench: Bench) -> list[str]:
    """What the optimizer takes of a training step of the tiny preset."""
    title = ["## Share of a training step of the tiny preset", ""]
    if bench.on_gpu:
        text = "Not measured on a GPU: tiny is made for a CPU, and a GPU would wait for its kernels"
        return [*title, f"{text} to be launched.", ""]
    # Not at the top: it brings transformers, of which nothing else here has need.
    from bench_training_step import BATCH, SEQ, build_ours

    from trinity_megatron.optimizer.param_groups import attach_muon_splits, is_adam_parameter

    _start_world()
    model = build_ours()
    named = [(name, p) for name, p in model.named_parameters() if p.requires_grad]
    attach_muon_splits(named, model.config)
    hidden = [p for name, p in named if not is_adam_parameter(p, name)]
    others = [p for name, p in named if is_adam_parameter(p, name)]
    muon = Muon(hidden, lr=1e-4)
    adamw = torch.optim.AdamW(others, lr=1e-4, fused=True)
    for_hidden = torch.optim.AdamW(hidden, lr=1e-4, fused=True)
    tokens = torch.randint(0, 4096, (BATCH, SEQ), generator=torch.Generator().manual_seed(1))
    positions = torch.arange(SEQ).expand(BATCH, -1)
    calls: dict[str, Call] = {
        "forward and backward": lambda: (
            model.zero_grad(set_to_none=True),
            model(tokens, positions, None, labels=tokens).mean().backward(),
        ),
        "Muon, hidden matrices": muon.step,
        "fused AdamW, the rest": adamw.step,
        "for comparison: fused AdamW, hidden matrices": for_hidden.step,
    }
    times = bench.in_turn(calls)
    passes, of_muon, of_adamw, _ = times.values()
    times[f"both optimizers (goal <= {GOAL_OF_SHARE})"] = both = of_muon.plus(of_adamw)
    whole = passes.plus(both)
    rows = [
        f"| {name} | {found.ms} | {found.over(whole)} | {ratio(found.processor, whole.processor)} |"
        for name, found in times.items()
    ]
    numel = sum(p.numel() for p in hidden)
    return [
        *title,
        f"{numel:,} parameters under Muon, {sum(p.numel() for p in others):,} under AdamW; "
        f"{BATCH} x {SEQ} tokens; float32.",
        "",
        *table("| part | ms | of the step | of its processor time |", rows),
    ]


def _start_world() -> None:
    from megatron.core import parallel_state
    from megatron.core.tensor_parallel import model_parallel_cuda_manual_seed

    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    torch.distributed.init_process_group(
        "gloo", init_method=f"tcp://127.0.0.1:{port}", rank=0, world_size=1
    )
    parallel_state.initialize_model_parallel()
    model_parallel_cuda_manual_seed(1234)


# --- the page -------------------------------------------------------------------------------------

PARTS = (
    report_batching,
    report_syrk,
    report_coefficients,
    report_step_against_torch,
    report_rate,
    report_against_adamw,
    report_share,
)


def report(bench: Bench, arguments: Sequence[str]) -> str:
    """Measure everything; the figures as a Markdown page."""
    commit = subprocess.run(
        ["git", "-C", str(ROOT), "describe", "--always", "--dirty"], capture_output=True, text=True
    ).stdout.strip()
    machine = f"{platform.machine()}, {torch.get_num_threads()} threads"
    if bench.on_gpu:
        machine = f"one {torch.cuda.get_device_name(bench.device)}"
    load, start = os.getloadavg()[0], time.perf_counter()
    parts = [line for part in PARTS for line in part(bench)]
    seconds = time.perf_counter() - start
    lines = [
        f"# Muon and Newton-Schulz, {date.today().isoformat()}",
        "",
        f"Commit {commit}; {machine}, load {load:.1f} at the start and {os.getloadavg()[0]:.1f} at "
        f"the end; torch {torch.__version__}; {bench.rounds} rounds in turn; {seconds:.0f} s.",
        "",
        f"Command: `{' '.join(['python tests/performance_tests/bench_muon.py', *arguments])}`, "
        f"OMP_WAIT_POLICY={os.environ.get('OMP_WAIT_POLICY', 'not set')}; "
        "a ratio is the median of the rounds' ratios, in brackets their quartiles.",
        "",
        *parts,
    ]
    return "\n".join(lines).rstrip() + "\n"


def main() -> None:
    """Measure and print; write the report if asked to."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--device", choices=("auto", "cpu", "cuda"), default="auto")
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--rounds", type=int)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--report", type=Path)
    args = parser.parse_args()
    device = args.device
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    torch.set_num_threads(args.threads)
    bench = Bench(torch.device(device), args.quick, args.rounds or (1 if args.quick else 15))
    options = [a for a in sys.argv[1:] if a != "--report" and a != str(args.report)]
    text = report(bench, options)
    print(text)
    if args.report:
        args.report.write_text(text)


if __name__ == "__main__":
    main()
