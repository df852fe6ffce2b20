"""Time a training step of the tiny preset against transformers and stock Megatron-Core.

    python tests/performance_tests/bench_training_step.py [--rounds 7] [--threads 2] [--report FILE]

One process, the same weight shapes, batch and threads; forward, backward and optimizer.  The
contenders take turns, so that a slow moment of the machine hits all of them; the figure is the
median over the rounds of each round's ratio.
"""

import argparse
import os
import platform
import socket
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from datetime import date
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]

from trinity_megatron.cpu_host.cuda_stand_ins import enter_host  # noqa: E402

enter_host()

import torch  # noqa: E402
from megatron.core import parallel_state  # noqa: E402
from megatron.core.models.gpt.gpt_layer_specs import get_gpt_decoder_block_spec  # noqa: E402
from megatron.core.models.gpt.gpt_model import GPTModel  # noqa: E402
from megatron.core.tensor_parallel import model_parallel_cuda_manual_seed  # noqa: E402
from megatron.core.transformer.transformer_config import TransformerConfig  # noqa: E402
from reference.hf_afmoe import hf_model  # noqa: E402

from trinity_megatron.model.architecture import TRINITY_ARCHITECTURE  # noqa: E402
from trinity_megatron.model.initialization import initialize_parameters  # noqa: E402
from trinity_megatron.model.layer_specs import get_trinity_layer_spec  # noqa: E402
from trinity_megatron.model.presets import get_preset, trinity_preset  # noqa: E402
from trinity_megatron.optimizer.muon import Muon  # noqa: E402
from trinity_megatron.optimizer.param_groups import attach_muon_splits, is_adam_parameter  # noqa: E402
from trinity_megatron.planner.flops import training_flops_per_token  # noqa: E402

SEQ = get_preset("tiny").training["seq_length"]
BATCH = get_preset("tiny").training["global_batch_size"]
HOST = {"masked_softmax_fusion": False, "apply_rope_fusion": False}


def _start_world() -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        os.environ["MASTER_PORT"] = str(free.getsockname()[1])
    os.environ.update(MASTER_ADDR="127.0.0.1", RANK="0", WORLD_SIZE="1")
    torch.distributed.init_process_group("gloo")
    parallel_state.initialize_model_parallel()
    model_parallel_cuda_manual_seed(1234)


def _gpt(config: TransformerConfig, spec: object) -> GPTModel:
    return GPTModel(
        config,
        spec,
        vocab_size=get_preset("tiny").model["vocab_size"],
        max_sequence_length=SEQ,
        position_embedding_type="rope",
        share_embeddings_and_output_weights=False,
    )


def build_ours() -> GPTModel:
    """The tiny preset, ``local`` implementation."""
    config = trinity_preset("tiny", transformer_impl="local", **HOST)
    model = _gpt(config, get_trinity_layer_spec(config))
    initialize_parameters([model])
    return model


def build_stock() -> GPTModel:
    """Megatron-Core's own MoE GPT of the same shapes: local implementation, SequentialMLP."""
    model = dict(get_preset("tiny").model)
    layers, dense = model["num_layers"], model.pop("num_dense_layers")
    model.pop("vocab_size")
    for name in list(model):
        if name in ("moe_router_bias_update_rule",) or name.startswith("moe_router_bias_mom"):
            model.pop(name)
    model.pop("moe_router_bias_clamp_scale")
    config = TransformerConfig(
        **{
            **TRINITY_ARCHITECTURE,
            **model,
            **HOST,
            "moe_layer_freq": [int(layer >= dense) for layer in range(layers)],
            "window_attn_skip_freq": 4,
            "no_rope_freq": 4,
            "persist_layer_norm": False,
        }
    )
    return _gpt(config, get_gpt_decoder_block_spec(config, False, normalization="RMSNorm"))


def adamw(model: torch.nn.Module) -> Callable[[], None]:
    """Fused AdamW over every trainable parameter."""
    parameters = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=1e-4, fused=True)
    return _stepper([optimizer])


def muon(model: GPTModel) -> Callable[[], None]:
    """Our Muon with fused AdamW on what the table gives to it."""
    named = [(name, p) for name, p in model.named_parameters() if p.requires_grad]
    attach_muon_splits(named, model.config)
    adam = [p for name, p in named if is_adam_parameter(p, name)]
    hidden = [p for name, p in named if not is_adam_parameter(p, name)]
    return _stepper([Muon(hidden, lr=1e-4), torch.optim.AdamW(adam, lr=1e-4, fused=True)])


def _stepper(optimizers: list[torch.optim.Optimizer]) -> Callable[[], None]:
    def step() -> None:
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)

    return step


def training_steps() -> dict[str, Callable[[], None]]:
    """One training step of each contender on the same batch."""
    tokens = torch.randint(0, 4096, (BATCH, SEQ), generator=torch.Generator().manual_seed(1))
    positions = torch.arange(SEQ).expand(BATCH, -1)
    ours, with_muon, stock = build_ours(), build_ours(), build_stock()
    theirs = hf_model(build_ours())
    theirs.set_attn_implementation("sdpa")
    steps: dict[str, Callable[[], None]] = {}

    def megatron(model: GPTModel, update: Callable[[], None], mask: object) -> Callable[[], None]:
        def step() -> None:
            model(tokens, positions, mask, labels=tokens).mean().backward()
            update()

        return step

    causal = torch.ones(1, 1, SEQ, SEQ, dtype=torch.bool).triu(1)
    steps["ours, AdamW"] = megatron(ours, adamw(ours), None)
    steps["ours, Muon"] = megatron(with_muon, muon(with_muon), None)
    steps["stock Megatron-Core, AdamW"] = megatron(stock, adamw(stock), causal)
    update = adamw(theirs)
    for experts in ("grouped_mm", "batched_mm", "eager"):

        def hf_step(experts: str = experts) -> None:
            theirs.set_experts_implementation(experts)
            theirs(tokens, labels=tokens, use_cache=False).loss.backward()
            update()

        steps[f"transformers, sdpa, {experts}, AdamW"] = hf_step
    return steps


def matmul_rate() -> float:
    """Best fp32 FLOP/s of a product as large as the model's."""
    a, b = torch.randn(BATCH * SEQ, 1024), torch.randn(1024, 1024)
    best = float("inf")
    for _ in range(8):
        start = time.perf_counter()
        a @ b
        best = min(best, time.perf_counter() - start)
    return 2 * a.shape[0] * 1024 * 1024 / best


def measure(rounds: int) -> tuple[dict[str, list[float]], list[float]]:
    """Seconds of every contender in every round, and the matmul rate of every round."""
    steps = training_steps()
    skipped = []
    for name, step in steps.items():  # warm up; leave out what is far slower than the best
        step()
        start = time.perf_counter()
        step()
        if "transformers" in name and time.perf_counter() - start > 6:
            skipped.append(name)
    for name in skipped:
        steps.pop(name)
    times: dict[str, list[float]] = {name: [] for name in steps}
    rates = []
    for _ in range(rounds):
        rates.append(matmul_rate())
        for name, step in steps.items():
            start = time.perf_counter()
            step()
            times[name].append(time.perf_counter() - start)
    return times, rates


def report(times: dict[str, list[float]], rates: list[float], threads: int) -> str:
    """The figures as a Markdown page."""
    peers = [name for name in times if "transformers" in name]
    best = min(peers, key=lambda name: statistics.median(times[name]))
    goals = (
        ("ours, AdamW", best, 0.85),
        ("ours, AdamW", "stock Megatron-Core, AdamW", 0.6),
        ("ours, Muon", "ours, AdamW", 1.25),
    )
    commit = subprocess.run(
        ["git", "-C", str(ROOT), "rev-parse", "--short", "HEAD"], capture_output=True, text=True
    ).stdout.strip()
    flops = training_flops_per_token(trinity_preset("tiny"), SEQ) * BATCH * SEQ
    rate = statistics.median(rates)
    ours = statistics.median(times["ours, AdamW"])
    lines = [
        f"# Training step of the tiny preset, {date.today().isoformat()}",
        "",
        f"Commit {commit}; {platform.machine()}, {threads} threads, fp32; torch "
        f"{torch.__version__}; batch {BATCH} x {SEQ} tokens; {len(rates)} rounds in turn.",
        "",
        "Command: `python tests/performance_tests/bench_training_step.py`",
        "",
        "| contender | median (ms) | min (ms) |",
        "|---|---|---|",
        *(
            f"| {name} | {statistics.median(t) * 1e3:.0f} | {min(t) * 1e3:.0f} |"
            for name, t in times.items()
        ),
        "",
        "| ratio (median over rounds) | value | goal |",
        "|---|---|---|",
        *(
            f"| {a} / {b} | "
            f"{statistics.median(x / y for x, y in zip(times[a], times[b], strict=True)):.3f} | "
            f"<= {goal} |"
            for a, b, goal in goals
        ),
        "",
        f"Floor: {flops / 1e9:.1f} GFLOP a step (matrices and windowed attention) over the matmul "
        f"rate measured in the same run, {rate / 1e9:.0f} GFLOP/s: {flops / rate * 1e3:.0f} ms. "
        f"Our step with AdamW reaches {flops / rate / ours:.0%} of it.",
    ]
    return "\n".join(lines) + "\n"


def main() -> None:
    """Measure and print; write the report if asked to."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--report", type=Path)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    _start_world()
    text = report(*measure(args.rounds), args.threads)
    print(text)
    if args.report:
        args.report.write_text(text)


if __name__ == "__main__":
    main()
