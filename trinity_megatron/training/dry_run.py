"""All flags of a training, checked as rank 0 of its whole world, on any machine.

The parser, the checks and the configuration are those of a training; nothing is started or
written, and the GPU need not be here: what depends on it (FP8, memory) is asked of the planner.
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

from trinity_megatron.cpu_host.cuda_stand_ins import enter_host
from trinity_megatron.errors import UserError
from trinity_megatron.planner.flags import add_plan_flags
from trinity_megatron.planner.layout import check_layout
from trinity_megatron.planner.plan import GIB, Plan
from trinity_megatron.planner.request import make_plan
from trinity_megatron.process.rank import quiet_import_warnings

# What needs Transformer Engine: the planner knows the rules, whatever this machine has.
_OF_TRANSFORMER_ENGINE = ("--transformer-impl", "--fp8-format", "--fp8-recipe")
# A training's defaults on a GPU, which this machine may not have.
_GPU_DEFAULTS = ("--bf16",)


def check_run(flags: Sequence[str], *, world_size: int, gpu: str | None) -> Plan | None:
    """Check the flags of a training in a world of any size.

    Args:
        flags: As a training gets them.
        world_size: Ranks of the world.
        gpu: What the ranks run on, a name of ``trinity-megatron plan --gpu``; None for CPUs.

    Returns:
        What the planner says of it; None without a GPU, and for checkpoints as ``--preset``.

    Raises:
        UserError: Names the flag, its value and the remedy.
    """
    quiet_import_warnings()
    enter_host()
    from trinity_megatron.training.arguments.parser import parse_trinity_args
    from trinity_megatron.training.model_builder import model_config_from_args
    from trinity_megatron.upstream.entries import REGISTRY
    from trinity_megatron.upstream.registry import check_upstream

    if world_size < 1:
        raise UserError(f"--world-size {world_size} is no number of ranks. Remedy: 1 or more.")
    check_upstream(REGISTRY.values(), allow_changes="--allow-upstream-changes" in flags)
    plan = _plan(flags, world_size, gpu) if gpu else None
    with _first_rank_of(world_size, _on_this_machine(flags) if gpu else flags):
        args, _ = parse_trinity_args(is_dry=True)
        model_config_from_args(args)
    if plan is not None and not plan.fits:
        needed, there = sum(plan.fullest.needed) / 2 / GIB, plan.gpu.memory_bytes / GIB
        raise UserError(
            f"{world_size} {plan.gpu.title} with these flags: {needed:.0f} GiB of memory a GPU do "
            f"not fit {there:.0f} GiB. Remedy: trinity-megatron plan without parallel flags "
            "searches layouts that do."
        )
    return plan


def _plan(flags: Sequence[str], world_size: int, gpu: str) -> Plan:
    """The plan of a training's flags; those that the planner has no use for are left out."""
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    add_plan_flags(parser)
    # Batches of a training may grow: the first counts.
    schedule = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    schedule.add_argument("--step-batch-size-schedule")
    found, _ = schedule.parse_known_args(flags)
    first = (found.step_batch_size_schedule or "").split()[:1]
    batch = [f"--global-batch-size={entry.partition(':')[2]}" for entry in first]
    known = ["--gpus", str(world_size), "--gpu", gpu, *flags, *batch]
    plan = make_plan(parser.parse_known_args(known)[0])
    check_layout(plan.model, plan.layout)
    return plan


def _on_this_machine(flags: Sequence[str]) -> list[str]:
    """The flags without those that Transformer Engine checks, and a GPU's defaults before them."""
    kept: list[str] = []
    words = iter(flags)
    for word in words:
        if word in _OF_TRANSFORMER_ENGINE:
            next(words, None)
        elif word.partition("=")[0] not in _OF_TRANSFORMER_ENGINE:
            kept.append(word)
    return [*_GPU_DEFAULTS, *kept]


@contextmanager
def _first_rank_of(world_size: int, flags: Sequence[str]) -> Iterator[None]:
    """The command line and the variables of rank 0, with nothing to write to."""
    variables = {"RANK": "0", "WORLD_SIZE": str(world_size), "LOCAL_RANK": "0"}
    before, argv = dict(os.environ), sys.argv
    os.environ.update(variables)
    sys.argv = ["pretrain", *flags]
    try:
        yield
    finally:
        sys.argv = argv
        os.environ.clear()
        os.environ.update(before)
