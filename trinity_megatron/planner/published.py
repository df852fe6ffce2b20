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
from trinity_megatron.planner.request import make_plan, report_layout
from trinity_megatron.planner.text import summarize

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
        plan = _plan(row, table["models"].get(row["model"]))
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


def _plan(row: dict[str, Any], model: dict[str, Any] | None, *, is_checked: bool = True) -> Plan:
    """The plan of a row; a model that the file does not describe is a preset."""
    parser = argparse.ArgumentParser()
    add_plan_flags(parser)
    args = parser.parse_args(["--preset", row["model"], *shlex.split(row["flags"])])
    described = describe_hf_config(model, row["model"]) if model else None
    plan = make_plan(args, described, own_rates=True)
    if is_checked:
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
        report=_report_run(),
    )


def _report_run() -> str:
    """The layout of the report's own run, in one line."""
    row = {"model": "large", "flags": "--gpus 2048 --gpu b300 --tokens 17T"}
    plan = report_layout(_plan(row, None, is_checked=False))
    assert plan is not None
    return summarize(plan)


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
# What will it cost: `trinity-megatron plan`

```bash
trinity-megatron plan --preset large --gpus 2048 --gpu b300 --tokens 17T          # searches layouts
trinity-megatron plan --preset large --gpus 2048 --gpu b300 --expert-model-parallel-size 8 \\
    --pipeline-model-parallel-size 4 --num-virtual-stages-per-pipeline-rank 3     # one layout
trinity-megatron plan --preset config.json --gpus 16 --gpu h100 --json            # another model
```

Without a GPU and in seconds: memory of the fullest rank of each pipeline stage, time of a step by
term, what binds and which flag would move it, tokens/s balanced and under learned routing, days and
GPU hours (`--gpu-hour-usd`: cost). It takes Megatron's flags and refuses what a training would
refuse. A search prints the best five layouts and why each other kind loses, beside the report's own
for Large; the flags it prints are a training's. `--preset` also takes the `config.json` of afmoe,
qwen3_moe, gpt_oss, mixtral and deepseek_v3.

`--json` prints `layout`, `memory_gib` of the fullest rank (`peak`: allocated, `reserved`: the
middle of its band), `tokens_per_second_per_gpu` (`balanced`, `learned`: [low, high]),
`step_seconds` by term, and `days` with `--tokens`.

Trinity's rates are those of good kernels for its shapes: `gpu-check` says what a machine reaches.
Memory without `--transformer-impl transformer_engine` is that of the local layers. Not planned for:
what a run loses to interruptions. The report's own run made 2,911 tokens/s/GPU, those included; its
layout by the planner, with the best micro-batch:

* {report}

## Do the ranks hold what the plan says: `--verify`

```bash
bash examples/trinity_large/02_plan.sh --verify                # or SHARDED=1 bash ...
trinity-megatron plan --preset large --gpus 2048 --gpu b300 PARALLEL_FLAGS --verify
```

It builds the first, a middle and the last rank of every pipeline stage, one after the other in
this process: the model, the buffers of gradients and the optimizer of a training, on Megatron's
groups of the whole world, without a network and of tensors without data. It prints which ranks
those are, what each holds and by how much the plan is off, adds the stages up to the model, and
ends with 1 where a term is off by more than 5% or the sum is not the model. Without parallel flags
the best layout of the search is built. `trinity-megatron dry-run --verify` does the same after it
has checked every flag of a training. With Megatron's DDP or Megatron-FSDP, in bf16; FP8 weights
and bf16 moments, which are Transformer Engine's, are refused. Activations, logits, buffers of the
exchange and NCCL are not built.

Measured on 2026-11-28, Trinity Large on 2,048 ranks, a busy machine of 2 cores:

| layout of `examples/trinity_large` | ranks | CPU | wall | memory | difference | parameters |
|---|---|---|---|---|---|---|
| PP4 VP3 EP8 | 12 | 31 s | 100 s | 0.9 GiB | 0.00% | 398,635,286,016 |
| `SHARDED=1`: HSDP 128 x 16 EP8 | 3 | 52 s | 169 s | 0.9 GiB | 1.55% | 398,635,286,016 |

The 1.55% are the last rank's, whose shards of the optimizer's state are the shortest.

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

From the same pages, planned with what their recipes say where that is not the newest
(`--no-overlap-moe-expert-parallel-comm`, `--no-fp8-dot-product-attention`, `--cuda-graph-impl
none`).  They were in view when the constants were chosen, those of the host's launches above all:
this is no blind test.

{further}

## How to read the errors

* **The pages change with the software.**  The same layout went from 30,720 to 40,769
  tokens/s/GPU (Qwen3-30B-A3B, B300) within two releases, by CUDA graphs of a whole iteration, fused
  FP8 experts and an overlapped exchange.  Tables of published runs have no column for that.
  Without flags, other models than Trinity are planned as the newest published recipe of their
  system runs them: the exchange overlapped, and MXFP8 on GB200 and GB300 with a graph of the
  iteration and FP8 attention.  So are the rows that the planner is held to.
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
