"""Tokens per second of generation with a KV cache, against transformers on the same weights.

    python tests/performance_tests/bench_generation.py [--preset tiny] [--rounds 5] [--threads 2]

One process, the same weights, prompts and threads, greedy.  The contenders take turns, so that a
slow moment of the machine hits all of them; the ratio is the median over the rounds of each round's
ratio.  ``generate`` of transformers runs with its own default cache and with the fastest of its
implementations of experts.  The tokens of both are compared.
"""

import argparse
import statistics
import time
from collections.abc import Callable

import torch
from bench_training_step import HOST, _gpt, _start_world
from reference.hf_afmoe import hf_model

from trinity_megatron.model.generation import generate_tokens
from trinity_megatron.model.initialization import initialize_parameters
from trinity_megatron.model.layer_specs import get_trinity_layer_spec
from trinity_megatron.model.presets import trinity_preset

# Widths of Nano with layers and a vocabulary that fit a small machine.
SIZES = {
    "tiny": {"preset": "tiny"},
    "nano-width": {
        "preset": "nano",
        "num_layers": 8,
        "vocab_size": 8192,
        "num_moe_experts": 32,
        "window_size": (127, 0),
    },
}
Tokens = list[list[int]]


def build(size: str) -> torch.nn.Module:
    """A model with random weights, in evaluation mode."""
    given = dict(SIZES[size])
    config = trinity_preset(given.pop("preset"), transformer_impl="local", **HOST, **given)
    model = _gpt(config, get_trinity_layer_spec(config))
    initialize_parameters([model])
    return model.eval()


def ours(model: torch.nn.Module, prompts: torch.Tensor, new: int) -> Tokens:
    """The loop of ``trinity-megatron generate``."""
    steps = generate_tokens(model, prompts.tolist(), max_new_tokens=new, vocab_size=None)
    return [list(row) for row in zip(*steps, strict=True)]


def theirs(model: torch.nn.Module, prompts: torch.Tensor, new: int) -> Tokens:
    """``generate`` of transformers."""
    made = model.generate(
        prompts,
        attention_mask=torch.ones_like(prompts),
        do_sample=False,
        max_new_tokens=new,
        eos_token_id=None,
        pad_token_id=0,
    )
    return made[:, prompts.shape[1] :].tolist()


def contenders(model: torch.nn.Module) -> dict[str, Callable[[torch.Tensor, int], Tokens]]:
    """Ours, and transformers with each implementation of experts."""
    twin = hf_model(model).eval()
    twin.set_attn_implementation("sdpa")

    def make(experts: str) -> Callable[[torch.Tensor, int], Tokens]:
        def run(prompts: torch.Tensor, new: int) -> Tokens:
            twin.set_experts_implementation(experts)
            return theirs(twin, prompts, new)

        return run

    runs = {name: make(name) for name in ("grouped_mm", "batched_mm", "eager")}
    return {"ours": lambda prompts, new: ours(model, prompts, new), **runs}


def measure(
    size: str, batch: int, *, prompt: int, new: int, rounds: int
) -> tuple[dict[str, list[float]], float]:
    """Tokens per second of each contender in each round, and the share of equal tokens."""
    model = build(size)
    generator = torch.Generator().manual_seed(1)
    prompts = torch.randint(model.config.vocab_size, (batch, prompt), generator=generator)
    runs = contenders(model)
    made = {name: run(prompts, new) for name, run in runs.items()}  # warm up, too
    pairs = [pair for rows in zip(made["ours"], made["grouped_mm"], strict=True)
             for pair in zip(*rows, strict=True)]
    equal = sum(a == b for a, b in pairs) / len(pairs)
    rates: dict[str, list[float]] = {name: [] for name in runs}
    for _ in range(rounds):
        for name, run in runs.items():
            start = time.perf_counter()
            run(prompts, new)
            rates[name].append(batch * new / (time.perf_counter() - start))
    return rates, equal


def report(rates: dict[str, list[float]], equal: float, title: str) -> str:
    """A row of a Markdown table."""
    best = max((name for name in rates if name != "ours"), key=lambda n: statistics.median(rates[n]))
    ratio = statistics.median(a / b for a, b in zip(rates["ours"], rates[best], strict=True))
    cells = [f"{statistics.median(rates[name]):.0f}" for name in rates]
    return f"| {title} | {' | '.join(cells)} | {ratio:.2f} ({best}) | {equal:.1%} |"


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--size", choices=SIZES, action="append")
    parser.add_argument("--batch", type=int, action="append")
    parser.add_argument("--prompt", type=int, default=32)
    parser.add_argument("--new", type=int, default=256)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--threads", type=int, default=2)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    _start_world()
    for size in args.size or SIZES:
        for batch in args.batch or (1, 8):
            rates, equal = measure(
                size, batch, prompt=args.prompt, new=args.new, rounds=args.rounds
            )
            print(report(rates, equal, f"{size}, batch {batch}"), flush=True)


if __name__ == "__main__":
    main()
