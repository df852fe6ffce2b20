"""Import Megatron once (10 s), then fork the ranks of several worlds, which train several times.

python worker.py PLAN.json      # or without: the plans that stdin names, one a line
"""

import contextlib
import functools
import gc
import importlib
import inspect
import json
import os
import signal
import sys
import tempfile
import time
import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.multiprocessing import ProcessExitedException

from tests.functional_tests.fsdp_traffic import fsdp_traffic
from tests.functional_tests.kills import killed, look


def train(job: dict[str, Any]) -> None:
    """Run the training entry once, and leave the process as it was before."""
    from megatron.training import get_tensorboard_writer, training

    from trinity_megatron.training import pretrain

    sys.argv = ["worker.py", *job["flags"]]
    try:
        with probed(**job["probe"]):
            pretrain.main()
    except SystemExit as stop:  # --exit-interval
        if stop.code:
            raise
    if writer := get_tensorboard_writer():
        writer.close()
    training.destroy_global_state()
    gc.collect()


@contextmanager
def probed(
    *,
    record: str | None = None,
    spoil: dict[str, float] | None = None,
    trace: str | None = None,
    pad: int = 0,
    collectives: str | None = None,
    traffic: str | None = None,
    gather_state: bool = False,
    tokens: str | None = None,
    kill_at: int | None = None,
    poison: list[int] | None = None,
    kill: dict[str, Any] | None = None,
    slow: dict[str, Any] | None = None,
    opened: dict[str, str] | None = None,
) -> Iterator[None]:
    """Record the routers' state as each step finds it; spoil the gradient of some steps.

    Args:
        record: File for the list of states, one a step.
        spoil: Value to put into one gradient after the reduction, by step (1-based).
        trace: Prefix of the files of ``traced``, one for each rank.
        pad: Tokens of padding at the end of the last sequence of each global batch of 8.
        collectives: Prefix of the files of ``counted``, one for each rank.
        traffic: Prefix of the files of ``fsdp_traffic``, one for each rank.
        tokens: Prefix of the files of ``read_tokens``, one for each rank.
        kill_at: Step (1-based) at whose first micro-batch the whole process group is killed.
        poison: Steps (1-based) whose labels are all the same token.
        kill: See ``kills.killed``.
        slow: See ``slowed``.
        opened: See ``noted_files``.
        gather_state: Save and load the optimizer's state as Megatron does, see ``gathered``.
    """
    from trinity_megatron.model import layer_specs
    from trinity_megatron.model.moe.bias_update import find_routers

    states: list[dict[str, torch.Tensor]] = []
    real = layer_specs.finalize_model_grads

    def finalize_model_grads(model: list[torch.nn.Module], *args: Any, **kwargs: Any) -> None:
        routers = find_routers(model)
        names = ("expert_bias", "expert_bias_momentum", "local_tokens_per_expert")
        states.append(
            {
                name: torch.stack([getattr(r, name).detach().clone() for r in routers])
                for name in names
            }
        )
        weights = [p.detach().double().sum() for p in model[0].parameters()]
        states[-1]["weights"] = torch.stack(weights)
        real(model, *args, **kwargs)
        if spoil and str(len(states)) in spoil:
            gradient = next(p for p in model[0].parameters() if p.requires_grad).main_grad
            gradient.view(-1)[0] = spoil[str(len(states))]

    if record or spoil:
        layer_specs.finalize_model_grads = finalize_model_grads
    try:
        with (
            traced(trace),
            padded(pad),
            counted(collectives),
            fsdp_traffic(traffic),
            gathered(gather_state),
            read_tokens(tokens, kill_at),
            poisoned(poison or []),
            killed(kill),
            slowed(slow),
            noted_files(opened),
        ):
            yield
    finally:
        layer_specs.finalize_model_grads = real
        if record and torch.distributed.get_rank() == 0:
            torch.save(states, record)


@contextmanager
def traced(prefix: str | None) -> Iterator[None]:
    """Write down what every router of this rank saw and what every step did to the biases.

    The file has ``calls``: (step, layer, logits, padding mask or None, routing map) of each call
    with gradients, and ``updates``: what each committed update says of this rank's layers.
    """
    from trinity_megatron.model.moe.bias_update import ExpertBiasUpdater
    from trinity_megatron.model.moe.router import TrinityRouter

    if prefix is None:
        yield
        return
    calls: list[tuple] = []
    updates: list[dict[str, Any]] = []
    routing = TrinityRouter.routing

    def recorded(self: Any, logits: torch.Tensor, padding_mask: torch.Tensor | None = None) -> Any:
        result = routing(self, logits, padding_mask)
        if self.training and torch.is_grad_enabled():
            mask = (
                padding_mask if padding_mask is None else self._own_rows(padding_mask, len(logits))
            )
            seen = (logits.detach().clone(), mask, result[1].clone())
            calls.append((len(updates) + 1, self.layer_number, *seen))
        return result

    def observe(update: Any) -> None:
        updates.append({**vars(update), "dtype": str(update.expert_bias.dtype)})

    make = ExpertBiasUpdater.__init__

    def make_observed(self: Any) -> None:
        make(self)
        self.observers.append(observe)

    ExpertBiasUpdater.__init__ = make_observed
    TrinityRouter.routing = recorded
    try:
        yield
    finally:
        TrinityRouter.routing = routing
        ExpertBiasUpdater.__init__ = make
        content = {"calls": calls, "updates": updates}
        torch.save(content, f"{prefix}.{torch.distributed.get_rank()}.pt")


@contextmanager
def counted(prefix: str | None) -> Iterator[None]:
    """Write down the collectives of the last step's reduction of gradients and of its optimizer.

    The file has ``calls``, (name, bytes on this rank, whether over expert-parallel ranks), and for
    each kind of Muon parameters ``stacks``, ``matrices``, ``owners`` and ``rank``; for each buffer
    of the model its bytes of gradients and of weights.
    """
    from megatron.core import parallel_state
    from megatron.core.distributed import DistributedDataParallel, param_and_grad_buffer

    from trinity_megatron.optimizer.muon import Muon
    from trinity_megatron.optimizer.sharded.optimizer_chain import ShardedMuonOptimizer

    if prefix is None:
        yield
        return
    content: dict[str, Any] = {}
    calls: list[tuple[str, int, bool]] = []
    stepping = []
    places = [
        (param_and_grad_buffer, "dist_reduce_scatter_func", 1),
        (param_and_grad_buffer, "dist_all_gather_func", 0),
        *((torch.distributed, name, 0) for name in ("all_reduce", "all_gather", "broadcast")),
        *((torch.distributed, name, 1) for name in ("all_to_all_single",)),
    ]
    originals = [getattr(module, name) for module, name, _ in places]

    def counting(name: str, argument: int, original: Any) -> Any:
        def wrapper(*args: Any, **kwargs: Any) -> Any:
            tensors = args[argument] if isinstance(args[argument], list) else [args[argument]]
            size = sum(tensor.numel() * tensor.element_size() for tensor in tensors)
            over_experts = kwargs.get("group") is parallel_state.get_expert_model_parallel_group()
            if stepping or name.startswith("dist_"):
                calls.append((name, size, over_experts))
            return original(*args, **kwargs)

        return wrapper

    step, zero_grad = ShardedMuonOptimizer.step, ShardedMuonOptimizer.zero_grad

    def recorded(self: Any) -> Any:
        stepping.append(True)
        result = step(self)
        stepping.clear()
        muons = [p for p in self.chained_optimizers if isinstance(p.optimizer, Muon)]
        content["placements"] = [
            {
                "stacks": p.stacks,
                "matrices": [(m.stack, m.expert, m.block) for m in p.assignment.matrices],
                "owners": p.assignment.owners,
                "rank": p.rank,
                "ranks": torch.distributed.get_world_size(p.group),
            }
            for muon in muons
            for p in muon.optimizer.placements
        ]
        content["buffers"] = [
            (b.grad_data.nbytes, b.param_data.nbytes)
            for chunk in self.model_chunks
            if isinstance(chunk, DistributedDataParallel)
            for b in (*chunk.buffers, *chunk.expert_parallel_buffers)
        ]
        return result

    def cleared(self: Any, *args: Any, **kwargs: Any) -> Any:
        calls.clear()
        return zero_grad(self, *args, **kwargs)

    for (module, name, argument), original in zip(places, originals, strict=True):
        setattr(module, name, counting(name, argument, original))
    ShardedMuonOptimizer.step, ShardedMuonOptimizer.zero_grad = recorded, cleared
    try:
        yield
    finally:
        for (module, name, _), original in zip(places, originals, strict=True):
            setattr(module, name, original)
        ShardedMuonOptimizer.step, ShardedMuonOptimizer.zero_grad = step, zero_grad
        torch.save({**content, "calls": calls}, f"{prefix}.{torch.distributed.get_rank()}.pt")


@contextmanager
def gathered(active: bool) -> Iterator[None]:
    """Megatron's own way to save and load a distributed optimizer, in place of boxes."""
    from megatron.core.optimizer.distrib_optimizer import DistributedOptimizer

    from trinity_megatron.optimizer.sharded.distributed_optimizer import (
        ResumableDistributedOptimizer,
    )

    names = (
        "sharded_param_state_fully_reshardable",
        "load_parameter_state_from_fully_reshardable",
    )
    ours = {name: getattr(ResumableDistributedOptimizer, name) for name in names}
    for name in names if active else ():
        setattr(ResumableDistributedOptimizer, name, getattr(DistributedOptimizer, name))
    try:
        yield
    finally:
        for name, method in ours.items():
            setattr(ResumableDistributedOptimizer, name, method)


@contextmanager
def read_tokens(prefix: str | None, kill_at: int | None = None) -> Iterator[None]:
    """Append the tokens of every training micro-batch to a file, with the step (1-based).

    A row of the file is int32: the step, and the tokens of a sequence.
    """
    from megatron.training import get_args

    from trinity_megatron.training import forward_step

    get_batch = forward_step.get_batch

    def recorded(*args: Any, training: bool, **kwargs: Any) -> dict[str, Any]:
        batch = get_batch(*args, training=training, **kwargs)
        if training:
            step = torch.full((len(batch["tokens"]), 1), get_args().curr_iteration + 1)
            rows = torch.cat([step, batch["tokens"].cpu()], dim=1).to(torch.int32)
            with open(f"{prefix}.{torch.distributed.get_rank()}", "ab") as file:
                file.write(rows.numpy().tobytes())
            if get_args().curr_iteration + 1 == kill_at:
                os.killpg(0, signal.SIGKILL)
        return batch

    if prefix is not None:
        forward_step.get_batch = recorded
    try:
        yield
    finally:
        forward_step.get_batch = get_batch


@contextmanager
def noted_files(opened: dict[str, str] | None) -> Iterator[None]:
    """Count how often this rank opens each file of a folder.

    Args:
        opened: ``below``, the folder; ``prefix`` of the files, one for each rank: counts by name.
    """
    if opened is None:
        yield
        return
    names: list[str] = []
    active = [True]

    def note(event: str, args: tuple[Any, ...]) -> None:
        if event == "open" and active and str(args[0]).startswith(opened["below"]):
            names.append(str(args[0]))

    sys.addaudithook(note)  # there is no way to remove it
    try:
        yield
    finally:
        active.clear()
        counts = {str(Path(n).relative_to(opened["below"])): names.count(n) for n in set(names)}
        path = Path(f"{opened['prefix']}.{torch.distributed.get_rank()}")
        path.write_text(json.dumps(counts))


@contextmanager
def poisoned(steps: list[int]) -> Iterator[None]:
    """Give the training batches of some steps labels that no model has learned."""
    from megatron.training import get_args

    from trinity_megatron.training import forward_step

    get_batch = forward_step.get_batch

    def spoiled(*args: Any, training: bool, **kwargs: Any) -> dict[str, Any]:
        batch = get_batch(*args, training=training, **kwargs)
        if training and get_args().curr_iteration + 1 in steps and batch["labels"] is not None:
            batch["labels"] = torch.full_like(batch["labels"], 5)
        return batch

    if steps:
        forward_step.get_batch = spoiled
    try:
        yield
    finally:
        forward_step.get_batch = get_batch


@contextmanager
def slowed(slow: dict[str, Any] | None) -> Iterator[None]:
    """Let a rank rest in each forward pass for a share of its work in the step before.

    Args:
        slow: ``rank`` and ``share``; ``until``: the last such step (1-based).
    """
    from megatron.training import get_args

    from trinity_megatron.telemetry.work_time import WorkClock
    from trinity_megatron.training import forward_step

    get_batch, stop = forward_step.get_batch, WorkClock.stop
    seconds = {"work": 0.0, "rest": 0.0}

    def slower(*args: Any, training: bool, **kwargs: Any) -> dict[str, Any]:
        assert slow is not None
        is_due = training and get_args().curr_iteration < slow["until"]
        if is_due and torch.distributed.get_rank() == slow["rank"]:
            seconds["rest"] = slow["share"] * seconds["work"]
            time.sleep(seconds["rest"])
        return get_batch(*args, training=training, **kwargs)

    def stopped(self: WorkClock) -> None:
        stop(self)
        seconds["work"] = self.work()[-1] - seconds["rest"]

    if slow is not None:
        forward_step.get_batch, WorkClock.stop = slower, stopped
    try:
        yield
    finally:
        forward_step.get_batch, WorkClock.stop = get_batch, stop


@contextmanager
def padded(num_tokens: int) -> Iterator[None]:
    """Fill up the last of every 8 training sequences as Megatron's dataset pads a short one."""
    from megatron.core.datasets.gpt_dataset import GPTDataset

    get_item = GPTDataset.__getitem__

    def short(self: Any, idx: int) -> dict[str, torch.Tensor]:
        sample = get_item(self, idx)
        if idx % 8 == 7:
            # The label of the last real token is padding too.
            for name, length in (("tokens", num_tokens), ("labels", num_tokens + 1)):
                sample[name][-length:] = 0
            sample["loss_mask"] = sample["loss_mask"].clone()
            sample["loss_mask"][-num_tokens - 1 :] = 0.0
        return sample

    if num_tokens:
        GPTDataset.__getitem__ = short
    try:
        yield
    finally:
        GPTDataset.__getitem__ = get_item


def run_rank(rank: int, ranks: int, jobs: list[dict[str, Any]], store: str) -> None:
    """Set up what torchrun would, and train."""
    import trinity_megatron.training.pretrain  # noqa: F401  enters the host, if not yet there

    values = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": ranks, "LOCAL_WORLD_SIZE": ranks}
    os.environ.update({name: str(value) for name, value in values.items()})
    backend = "gloo"
    if torch.cuda.is_available():
        backend = "nccl"
        torch.cuda.set_device(rank)
    torch.distributed.init_process_group(
        backend, init_method=f"file://{store}", rank=rank, world_size=ranks
    )
    for job in jobs:
        train(job)
    torch.distributed.destroy_process_group()


def import_once() -> None:
    """What every rank would import at its first step: 2 s of processor time for each of them."""
    import transformers

    from trinity_megatron.planner.flops import measured_matmul_rate

    importlib.import_module("torch._dynamo")
    importlib.import_module("megatron.core.tokenizers.text.libraries.huggingface_tokenizer")
    _ = transformers.PreTrainedTokenizerFast, transformers.AutoTokenizer
    measured_matmul_rate(torch.device("cpu"))  # 0.7 s for each of them
    # Megatron's flags come from the sources of its config classes, read anew by every job.
    inspect.getsource = functools.lru_cache(maxsize=None)(inspect.getsource)


def run_worlds(plan: str) -> None:
    """Run the worlds of a plan one after the other, each in processes of its own."""
    for world in json.loads(Path(plan).read_text()):
        kill = world["jobs"][-1]["probe"].get("kill")
        ending = pytest.raises(ProcessExitedException) if kill else contextlib.nullcontext()
        with tempfile.TemporaryDirectory() as folder, ending as ended:
            torch.multiprocessing.start_processes(
                run_rank,
                (world["ranks"], world["jobs"], f"{folder}/store"),
                nprocs=world["ranks"],
                # A process that has looked at a GPU cannot be forked.
                start_method="spawn" if torch.cuda.is_available() else "fork",
            )
        if kill:
            assert ended.value.signal_name == "SIGKILL", ended.value
            look(kill, Path(world["jobs"][-1]["save"]))


def serve() -> None:
    """Run the plan of each line of stdin, in its folder; answer with a line: how it ended.

    What the ranks print goes to ``log`` beside the plan.
    """
    answers = os.fdopen(os.dup(1), "w")
    for line in sys.stdin:
        plan = Path(line.rstrip("\n"))
        os.chdir(plan.parent)
        log = os.open(plan.with_name("log"), os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
        for stream in (1, 2):
            os.dup2(log, stream)
        os.close(log)
        try:
            run_worlds(str(plan))
            answer = "done"
        except BaseException as error:
            traceback.print_exc()
            answer = type(error).__name__
        sys.stdout.flush()
        sys.stderr.flush()
        answers.write(answer + "\n")
        answers.flush()


def main() -> None:
    """Run a plan, or serve."""
    torch.set_num_threads(1)
    import trinity_megatron.training.pretrain  # noqa: F401  enters the host

    import_once()
    if len(sys.argv) > 1:
        run_worlds(sys.argv[1])
    else:
        serve()


if __name__ == "__main__":
    # Inside the guard: the helper processes of a checkpoint save import this module again.
    main()
