"""Tokens per second of generation with a KV cache, against transformers on the same weights.

    python tests/performance_tests/bench_generation.py [--size tiny] [--rounds 5] [--threads 2]

One process, the same weights, prompts and threads, greedy.  The contenders take turns, so that a
slow moment of the machine hits all of them; the ratio is the median over the rounds of each round's
ratio.  ``generate`` of transformers runs with its default cache and all of its implementations of
experts for a CPU; ``grouped_mm`` is its default.  The tokens of both are compared.
"""

import argparse
import statistics
import time
from collections.abc import Callable
from functools import partial

import torch
from bench_training_step import HOST, _start_world
from megatron.core.models.gpt.gpt_model import GPTModel
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
EXPERTS = ("grouped_mm", "batched_mm", "eager")
DEFAULT = EXPERTS[0]
Tokens = list[list[int]]


def build(size: str) -> torch.nn.Module:
    """A model with random weights, in evaluation mode."""
    given = dict(SIZES[size])
    config = trinity_preset(given.pop("preset"), transformer_impl="local", **HOST, **given)
    model = GPTModel(
        config,
        get_trinity_layer_spec(config),
        vocab_size=config.vocab_size,
        max_sequence_length=config.max_position_embeddings,
        position_embedding_type="rope",
        share_embeddings_and_output_weights=False,
    )
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

    return {"ours": partial(ours, model), **{name: make(name) for name in EXPERTS}}


def measure(
    size: str, batch: int, *, prompt: int, new: int, rounds: int
) -> tuple[dict[str, list[float]], float]:
    """Tokens per second of each contender in each round, and the share of equal tokens."""
    model = build(size)
    generator = torch.Generator().manual_seed(1)
    prompts = torch.randint(model.config.vocab_size, (batch, prompt), generator=generator)
    runs = contenders(model)
    made, seconds = {}, {}
    for name, run in runs.items():  # warm up; leave out what is far slower than the default
        run(prompts, 8)
        start = time.perf_counter()
        made[name] = run(prompts, new)
        seconds[name] = time.perf_counter() - start
        if seconds[name] > 2 * seconds.get(DEFAULT, seconds[name]):
            made.pop(name)
    mine, twins = (torch.tensor(made[name]) for name in ("ours", DEFAULT))
    rates: dict[str, list[float]] = {name: [] for name in made}
    for _ in range(rounds):
        for name in rates:
            start = time.perf_counter()
            runs[name](prompts, new)
            rates[name].append(batch * new / (time.perf_counter() - start))
    return rates, float((mine == twins).float().mean())


def report(rates: dict[str, list[float]], equal: float, title: str) -> str:
    """A row of a Markdown table."""
    cells = [
        f"{statistics.median(rates[name]):.0f}" if name in rates else ""
        for name in ("ours", *EXPERTS)
    ]
    ratios = {
        name: statistics.median(a / b for a, b in zip(rates["ours"], rates[name], strict=True))
        for name in rates
        if name != "ours"
    }
    best = min(ratios, key=ratios.__getitem__)
    last = f"{ratios[DEFAULT]:.2f} | {ratios[best]:.2f} ({best}) | {equal:.1%}"
    return f"| {title} | {' | '.join(cells)} | {last} |"


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
    names = " | ".join(["ours", *(f"transformers, {name}" for name in EXPERTS)])
    print(f"| tokens/s | {names} | ours / default | ours / fastest | equal tokens |")
    for size in args.size or SIZES:
        for batch in args.batch or (1, 8):
            rates, equal = measure(
                size, batch, prompt=args.prompt, new=args.new, rounds=args.rounds
            )
            print(report(rates, equal, f"{size}, batch {batch}"), flush=True)


if __name__ == "__main__":
    main()
