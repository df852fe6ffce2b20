"""``--evaluate-every N``: score the model on benchmarks while it is trained.

All ranks stop for it alike.  Rank 0 has the tasks and asks; the others take part in the forward
passes (:mod:`trinity_megatron.evaluation.shared_model`).  Nothing of the training changes: no
gradient, no count of tokens, no random number.
"""

from __future__ import annotations

import argparse
import os
import traceback
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from megatron.training import get_args, get_tensorboard_writer, get_timers, get_wandb_writer
from megatron.training.training import (
    disable_forward_pre_hook,
    enable_forward_pre_hook,
    force_param_sync,
    should_disable_forward_pre_hook,
)
from megatron.training.utils import is_last_rank

from trinity_megatron.data.tokenizer_file import load_transformers_tokenizer
from trinity_megatron.evaluation.results import write_results
from trinity_megatron.evaluation.shared_model import SharedModel
from trinity_megatron.evaluation.task_choice import EvaluationFlags, TaskChoice, split_names
from trinity_megatron.process.screen import tell
from trinity_megatron.report.scores import scalars_of
from trinity_megatron.training.callbacks.callback import Callback
from trinity_megatron.training.resume import get_tokenizer_folder

_MOST_SAID = 6


class Evaluation(Callback):
    """Evaluates after every so many steps.

    Args:
        args: Of the run, with ``evaluate_every``.
        beat: Called with each forward pass: an evaluation has many.

    Raises:
        UserError: A task, its data or the package is missing; on rank 0.
    """

    def __init__(self, args: argparse.Namespace, beat: Callable[[], None]) -> None:
        self._beat = beat
        self._interval = args.evaluate_every
        self._tasks: Any = None
        if args.rank == 0:
            self._load(args)

    def _load(self, args: argparse.Namespace) -> None:
        from trinity_megatron.evaluation.harness import load_tasks

        folder = get_tokenizer_folder(args)
        assert folder is not None, "checked with the other arguments"
        self._tokenizer: Any = load_transformers_tokenizer(folder)
        data = Path(args.evaluate_data) if args.evaluate_data else None
        names, lengths = split_names(args.evaluate_tasks), (args.seq_length,)
        choice = TaskChoice(names, data, lengths, self._tokenizer)
        self._tasks = load_tasks(choice, max_length=args.seq_length)
        # A standard error is else drawn by forks of this process, which do not end at SIGTERM
        # where that means to save; the draws are the same.
        os.environ.setdefault("DISABLE_MULTIPROC", "1")

    def on_train_step_end(self, iteration: int, model: Any, optimizer: Any, result: Any) -> None:
        """Evaluate, where it is time."""
        if iteration % self._interval:
            return
        with _training_halted(model, optimizer):
            scalars = self._evaluate(iteration, model)
        _log(scalars, iteration)

    def _evaluate(self, iteration: int, model: Sequence[Any]) -> Mapping[str, float]:
        """The scores, on every rank; none if the harness has failed."""
        args = get_args()
        shared = SharedModel(model[0], args.tokenizer_vocab_size, beat=self._beat)
        scalars: list[Any] = [{}]
        if self._tasks is None:
            shared.serve()
        else:
            scalars[0] = self._ask(shared, iteration, args)
        torch.distributed.broadcast_object_list(scalars, 0)  # the last rank logs them
        return scalars[0]

    def _ask(
        self, shared: SharedModel, iteration: int, args: argparse.Namespace
    ) -> dict[str, float]:
        from trinity_megatron.evaluation import harness

        flags = EvaluationFlags(batch_size=args.micro_batch_size * args.data_parallel_size)
        flags = flags.limited(args.evaluate_limit)
        try:
            results = harness.evaluate(
                shared, self._tokenizer, self._tasks, flags, max_length=args.seq_length
            )
            results["config"]["model_args"] = {"load": args.save, "step": iteration}
            write_results(Path(args.out), iteration, harness.to_json(results))
        except Exception as error:
            if shared.has_failed:
                raise  # in a forward pass, of which other ranks wait for the rest
            tell(f"> step {iteration} is not evaluated: {error}", is_error=True)
            tell(traceback.format_exc(), is_error=True)
            return {}
        return scalars_of(results)


def _log(scalars: Mapping[str, float], iteration: int) -> None:
    if not scalars or not is_last_rank():
        return
    if (writer := get_tensorboard_writer()) is not None:
        for name, value in scalars.items():
            writer.add_scalar(name, value, iteration)
    if (wandb_writer := get_wandb_writer()) is not None:
        wandb_writer.log(dict(scalars), iteration)
    values = [(n.removeprefix("eval/"), v) for n, v in scalars.items() if "_stderr" not in n]
    said = "  ".join(f"{name} {value:.4f}" for name, value in values[:_MOST_SAID])
    more = len(values) - _MOST_SAID
    tell(f"step {iteration} evaluated: {said}{f'  and {more} more' if more > 0 else ''}")


@contextmanager
def _training_halted(model: Sequence[Any], optimizer: Any) -> Iterator[None]:
    """The model in evaluation mode with all its weights, outside of the time of the steps.

    Source: ``evaluate_and_print_results`` in Megatron's ``train()``.
    """
    args, timers = get_args(), get_timers()
    gathers_late = should_disable_forward_pre_hook(args)
    # In the first step of a start Megatron has not switched them on yet.
    is_hooked = gathers_late and any(
        handle is not None for handle in model[0].remove_forward_pre_hook_handles.values()
    )
    timers("interval-time").stop()
    if is_hooked:
        disable_forward_pre_hook(model, optimizer=optimizer)
    elif gathers_late:
        force_param_sync(model, optimizer=optimizer)
    model[0].eval()
    try:
        yield
    finally:
        model[0].train()
    if is_hooked:
        enable_forward_pre_hook(model)
    timers("interval-time", log_level=0).start(barrier=True)
