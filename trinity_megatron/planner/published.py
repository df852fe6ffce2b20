"""Published runs beside what the planner says of them.

    python -m trinity_megatron.planner.published > docs/planner.md

Every row is planned from its flags by the command's own parser, with the kernel rates that come
with this package and one set of constants.
"""

import argparse
import json
import shlex
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from trinity_megatron.planner.flags import add_plan_flags
from trinity_megatron.planner.layout import check_layout
from trinity_megatron.planner.model_description import describe_hf_config
from trinity_megatron.planner.model_flops import flops_per_token
from trinity_megatron.planner.plan import GIB, Plan
from trinity_megatron.planner.request import make_plan

_FILE = Path(__file__).with_name("published.json")
_UNITS = {
    "tokens_per_second_per_gpu": "tokens/s/GPU",
    "tflops_per_gpu": "TFLOP/s/GPU",
    "memory_gib": "GiB",
}


@dataclass(frozen=True)
class Comparison:
    """One published number.

    Attributes:
        model: Its name.
        quantity: A key of the file.
        fact: As published.
        source: Where.
        is_further: It is not among the rows that the planner is held to.
        plan: What the planner says.
    """

    model: str
    quantity: str
    fact: float
    source: str
    is_further: bool
    plan: Plan

    @cached_property
    def prediction(self) -> float:
        """In the unit of the fact."""
        rate = self.plan.time.tokens_per_second_per_gpu
        if self.quantity == "tflops_per_gpu":
            return rate * flops_per_token(self.plan.model, self.plan.layout.seq_length) / 1e12
        return (
            rate if self.quantity == "tokens_per_second_per_gpu" else self.plan.fullest.peak / GIB
        )

    @property
    def error(self) -> float:
        """Of the prediction, relative to the fact."""
        return self.prediction / self.fact - 1


def compare_all() -> list[Comparison]:
    """All published numbers, the worst error first."""
    table = json.loads(_FILE.read_text(encoding="utf-8"))
    found = []
    for row in table["rows"]:
        plan = _plan(row, table["models"][row["model"]])
        found += [
            Comparison(
                row["model"],
                quantity,
                row[quantity],
                row["source"],
                row.get("further", False),
                plan,
            )
            for quantity in _UNITS
            if quantity in row
        ]
    return sorted(found, key=lambda comparison: -abs(comparison.error))


def _plan(row: dict[str, Any], model: dict[str, Any]) -> Plan:
    parser = argparse.ArgumentParser()
    add_plan_flags(parser)
    args = parser.parse_args(["--preset", row["model"], *shlex.split(row["flags"])])
    plan = make_plan(args, describe_hf_config(model, row["model"]), own_rates=True)
    check_layout(plan.model, plan.layout)
    return plan


def render() -> str:
    """The document."""
    rows = compare_all()
    held = [row for row in rows if not row.is_further]
    tokens = [row for row in held if row.quantity == "tokens_per_second_per_gpu"]
    memory = [row for row in held if row.quantity == "memory_gib"]
    return _TEXT.format(
        tokens_within=sum(abs(row.error) <= 0.15 for row in tokens),
        tokens=len(tokens),
        memory_within=sum(abs(row.error) <= 0.10 for row in memory),
        memory=len(memory),
        held=_table(held),
        further=_table([row for row in rows if row.is_further]),
    )


def _table(rows: list[Comparison]) -> str:
    lines = [
        "| model | GPUs | precision | layout | unit | prediction | fact | error | source |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for row in rows:
        layout, unit = row.plan.layout, _UNITS[row.quantity]
        digits = 1 if row.quantity == "memory_gib" else 0
        words = layout.label
        if layout.overlap_expert_all_to_all and layout.expert_model_parallel_size > 1:
            words += ", exchange overlapped"
        if layout.graph_of_iteration:
            words += ", graph of an iteration, FP8 attention"
        cells = (
            row.model,
            f"{layout.world_size} {row.plan.gpu.title}",
            layout.fp8_recipe or "bf16",
            words,
            unit,
            f"{row.prediction:.{digits}f}",
            f"{row.fact:.{digits}f}",
            f"{100 * row.error:+.1f}%",
            row.source,
        )
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


_TEXT = """\
# The planner beside published runs

Made by `python -m trinity_megatron.planner.published > docs/planner.md`; a test makes it again
and compares. Every row is planned from its published flags by the parser of `trinity-megatron
plan`, with the kernel rates that come with this package (`planner/kernels/rates.json`) and one
set of constants (`planner/constants.py`). The worst rows come first.

## Rows that the planner is held to

{tokens_within} of {tokens} throughputs are within 15%, {memory_within} of {memory} memories within
10%.

{held}

## Further rows

From the same pages, planned with what their recipes say (`--no-overlap-moe-expert-parallel-comm`,
`--cuda-graph-impl`, `--fp8-dot-product-attention`). They were in view when the constants were
chosen, those of the host's launches above all: this is no blind test.

{further}

## How to read the errors

* **The pages change with the software.** The same layout went from 30,720 to 40,769 tokens/s/GPU
  (Qwen3-30B-A3B, B300) within two releases, by CUDA graphs of a whole iteration, fused FP8
  experts and an overlapped exchange. The rows that the planner is held to are planned with the
  exchange overlapped and nothing else of that, for their tables have no column for it.
* **gpt-oss in bf16** spends most of its time in attention with a learnable sink, for which
  cuDNN's path was slow: the page of 26.06.01 fell from 33,166 to 20,288 tokens/s/GPU (GB300) by
  that alone, a known issue of its own (cudnn-frontend#256). `sink_attention` is that quotient;
  FP8 attention is not slow.
* **H100 in FP8 with EP32 across nodes** is bound by the network; how much of it hides is the
  largest unknown.
* **Learned routing** comes as a band: the fullest of the expert-parallel ranks, for loads of
  experts that vary by 3% of their mean (a balanced run) and by 100% (one that is not).
* **Memory** is what the allocator hands out at the worst moment of a step, on the fullest rank.
  Reserved is more: 2.5 to 7% on Blackwell, 7 to 21% on Hopper.

## What a step is made of

Matrix products run at the measured rate of their shape, forward and both products of the backward
pass, times `sustained`; the products of experts at the rate of so many rows as an expert gets;
attention at the rate of its length, with windows; everything else moves bytes. A collective
inside of an NVLink domain runs at NCCL's measured rate of its size, across domains at the
network's. A pipeline runs at the pace of its slowest stage (the LM head counts), with the bubble
of its schedule. Gradients and parameters of data parallelism hide behind one micro-batch; with
HSDP they travel for each. Newton-Schulz is shared over the ranks that share the state. The host
needs its time for each launch.

Measured rates are read from `aiconfigurator-core` where it is installed, else from a coarse table
made from it (`python -m trinity_megatron.planner.kernels.extract`).
"""


if __name__ == "__main__":
    print(render(), end="")
