"""Train Trinity with Megatron's own ``pretrain()``: the entry that every rank runs.

torchrun --nproc-per-node 2 examples/pretrain_trinity.py --preset tiny --data D --out O
"""

import argparse
import contextlib
import gc
import os
import shutil
import sys
import time
from collections.abc import Iterator
from functools import partial
from pathlib import Path

from filelock import FileLock, SoftFileLock, Timeout

from trinity_megatron.cpu_host.cuda_stand_ins import enter_host
from trinity_megatron.errors import MachineError, UserError
from trinity_megatron.process.alarms import Alarms
from trinity_megatron.process.console import make_screen_safe
from trinity_megatron.process.rank import (
    USER_ERROR,
    describe_error,
    is_user_error,
    quiet_import_warnings,
)
from trinity_megatron.process.screen import tell, tell_once, upstream_output_in
from trinity_megatron.process.temporary import use_short_temporary_folder

quiet_import_warnings()
make_screen_safe()  # before loggers keep the standard error
ON_CPU = enter_host()  # before anything of Megatron is imported

import torch  # noqa: E402
from megatron.core.enums import ModelType  # noqa: E402
from megatron.core.rerun_state_machine import (  # noqa: E402
    EXIT_CODE_FAILED_ON_RESULT_VALIDATION,
    EXIT_CODE_RESUME_TO_DISAMBIGUATE,
)
from megatron.training import get_wandb_writer, pretrain  # noqa: E402
from megatron.training.argument_utils import pretrain_cfg_container_from_args  # noqa: E402

from trinity_megatron.checkpoint.hf_assets import inherit_assets, keep_tokenizer  # noqa: E402
from trinity_megatron.checkpoint.integrity.guarded_load import guarded_loads  # noqa: E402
from trinity_megatron.checkpoint.save_worker import results_in_this_process  # noqa: E402
from trinity_megatron.cpu_host.fsdp_stand_ins import fsdp_on_cpu  # noqa: E402
from trinity_megatron.data.mixture.corpora import MixtureData  # noqa: E402
from trinity_megatron.model.attention.rope import rope_on_device  # noqa: E402
from trinity_megatron.model.config import TrinityConfig  # noqa: E402
from trinity_megatron.model.initialization import (  # noqa: E402
    initialize_wrapped,
    set_matrices_aside,
)
from trinity_megatron.model.lm_head_loss import attach_language_model_loss  # noqa: E402
from trinity_megatron.model.moe.bias_update import get_expert_bias_updater  # noqa: E402
from trinity_megatron.model.weight_gradients import products_into_main_grad  # noqa: E402
from trinity_megatron.optimizer.fsdp.wrapper import trinity_fsdp  # noqa: E402
from trinity_megatron.optimizer.gradient_norm import norms_on_device  # noqa: E402
from trinity_megatron.optimizer.param_groups import label_gradient_groups  # noqa: E402
from trinity_megatron.optimizer.register import MuonSettings, registered_muon  # noqa: E402
from trinity_megatron.optimizer.sharded.buffer_layout import separate_muon_buffers  # noqa: E402
from trinity_megatron.telemetry.forgiving_writer import ForgivingRecordWriter  # noqa: E402
from trinity_megatron.telemetry.wandb_writer import open_writer  # noqa: E402
from trinity_megatron.training.alarms import alarms_of  # noqa: E402
from trinity_megatron.training.annealing import annealed  # noqa: E402
from trinity_megatron.training.arguments.parser import parse_trinity_args  # noqa: E402
from trinity_megatron.training.arguments.parser_errors import megatron_refusals  # noqa: E402
from trinity_megatron.training.branch import annealing_of  # noqa: E402
from trinity_megatron.training.callbacks.callback import callbacks_in_training_loop  # noqa: E402
from trinity_megatron.training.callbacks.disk_errors import explain_disk_error  # noqa: E402
from trinity_megatron.training.callbacks.disk_space import disk_watched  # noqa: E402
from trinity_megatron.training.callbacks.end_of_run import ValidationTokens, finish_run  # noqa: E402
from trinity_megatron.training.callbacks.evaluation import Evaluation  # noqa: E402
from trinity_megatron.training.callbacks.finite_check import FiniteCheck  # noqa: E402
from trinity_megatron.training.callbacks.gradient_check import GradientCheck  # noqa: E402
from trinity_megatron.training.callbacks.hang_watchdog import HangWatchdog, hangs_watched  # noqa: E402
from trinity_megatron.training.callbacks.heartbeat import heartbeat  # noqa: E402
from trinity_megatron.training.callbacks.oom_report import explain, is_out_of_memory  # noqa: E402
from trinity_megatron.training.callbacks.progress import Progress  # noqa: E402
from trinity_megatron.training.callbacks.replica_check import ReplicaCheck  # noqa: E402
from trinity_megatron.training.callbacks.retention import old_checkpoints_deleted  # noqa: E402
from trinity_megatron.training.callbacks.save_errors import named_save_errors  # noqa: E402
from trinity_megatron.training.callbacks.signals import (  # noqa: E402
    EndedBySignal,
    check_exit_signal,
    save_on_signals,
)
from trinity_megatron.training.callbacks.spike_skipping import SpikeSkipping  # noqa: E402
from trinity_megatron.training.callbacks.step_metrics import StepMetrics  # noqa: E402
from trinity_megatron.training.callbacks.straggler import stragglers_named  # noqa: E402
from trinity_megatron.training.damage import damage_left_behind  # noqa: E402
from trinity_megatron.training.datasets.index_cache import plain_index_cache  # noqa: E402
from trinity_megatron.training.datasets.provider import DatasetsProvider  # noqa: E402
from trinity_megatron.training.datasets.splits import check_splits  # noqa: E402
from trinity_megatron.training.forward_step import forward_step  # noqa: E402
from trinity_megatron.training.model_builder import model_config_from_args  # noqa: E402
from trinity_megatron.training.model_parallel_statistics import local_statistics  # noqa: E402
from trinity_megatron.training.preflight import check_folders, check_space  # noqa: E402
from trinity_megatron.training.resume import advise_other_step, get_tokenizer_folder  # noqa: E402
from trinity_megatron.training.run_writer import recorded  # noqa: E402
from trinity_megatron.training.script import training_without_cuda  # noqa: E402
from trinity_megatron.upstream.entries import REGISTRY  # noqa: E402
from trinity_megatron.upstream.registry import check_upstream, replaced  # noqa: E402

# A run that was stopped may still be ending.
_PATIENCE_SECONDS = 20
LOGS_NAME = "logs"
_WANDB_WRITER = "megatron.training.global_vars:_GLOBAL_WANDB_WRITER"


def main() -> None:
    """Parse the arguments, build the configuration, train, show what came of it."""
    with contextlib.ExitStack() as stack:
        stack.enter_context(
            replaced(
                "tensorboard.summary.writer.event_file_writer:RecordWriter",
                lambda _: ForgivingRecordWriter,
            )
        )

        def begin(args: argparse.Namespace) -> None:
            check_exit_signal(args)
            if args.out and os.environ.get("TRINITY_DEBUG") != "1":
                log = Path(args.out) / LOGS_NAME / f"rank_{args.rank:05d}.log"
                stack.enter_context(upstream_output_in(log))

        args, mixture = parse_trinity_args(lambda args: stack.enter_context(_alone_in(args)), begin)
        alarms = stack.enter_context(alarms_of(args))
        watchdog = stack.enter_context(hangs_watched(args, alarms))
        for line in check_upstream(REGISTRY.values(), allow_changes=args.allow_upstream_changes):
            tell_once(f"> Megatron-Core differs from the one this was written for: {line}")
        stack.enter_context(training_without_cuda() if ON_CPU else _training_with_cuda())
        stack.enter_context(local_statistics())
        stack.enter_context(rope_on_device())
        check_folders(args)
        check_space(args)
        if args.rank == 0:
            heads = mixture.heads if isinstance(mixture, MixtureData) else {}
            check_splits(args, {prefix: head.tokens for prefix, head in heads.items()})
        stack.enter_context(replaced(_WANDB_WRITER, lambda _: open_writer(args)))
        stack.enter_context(registered_muon(MuonSettings.from_args(args)))
        if annealing := annealing_of(args.lineage):
            stack.enter_context(annealed(annealing))
        if args.use_megatron_fsdp:
            stack.enter_context(trinity_fsdp())
            stack.enter_context(fsdp_on_cpu() if ON_CPU else contextlib.nullcontext())
        _train(args, DatasetsProvider(mixture), watchdog, alarms)


@contextlib.contextmanager
def _training_with_cuda() -> Iterator[None]:
    with norms_on_device(), products_into_main_grad():
        yield


def _train(
    args: argparse.Namespace,
    build_datasets: DatasetsProvider,
    watchdog: HangWatchdog,
    alarms: Alarms,
) -> None:
    if args.save and args.rank == 0:
        for start in (args.load, args.pretrained_checkpoint):
            if start and start != args.save:
                inherit_assets(Path(start), Path(args.save))
        if tokenizer := get_tokenizer_folder(args):
            keep_tokenizer(tokenizer, Path(args.save))
    config = model_config_from_args(args)
    metrics = StepMetrics(config.transformer)
    validation = ValidationTokens()
    config.pre_wrap_hooks += [label_gradient_groups, attach_language_model_loss]
    if args.use_distributed_optimizer:
        config.transformer.set_matrices_aside = True
        config.pre_wrap_hooks.append(set_matrices_aside)
        config.post_wrap_hooks.append(initialize_wrapped)
    is_buffered = args.use_distributed_optimizer and not args.use_megatron_fsdp
    if args.optimizer == "muon" and is_buffered:
        config.pre_wrap_hooks.append(separate_muon_buffers)
    trained: list = []

    def connect(model: list) -> list:
        trained.extend(model)
        updater = get_expert_bias_updater(model)
        updater.current_step = lambda: args.curr_iteration + 1
        updater.observers.append(metrics.observe_bias_update)
        return model

    config.post_wrap_hooks.append(connect)
    writer = get_wandb_writer()
    with writer.kept_open() if writer else contextlib.nullcontext():
        end: SystemExit | None = None
        try:
            with _prepared_loop(args, metrics, watchdog, alarms):
                pretrain(
                    pretrain_cfg_container_from_args(args, config),
                    build_datasets,
                    ModelType.encoder_or_decoder,
                    watchdog.watched(partial(forward_step, validation)),
                )
        except EndedBySignal:
            raise
        except SystemExit as early:  # --exit-interval and the like
            if early.code:
                _print_error(args, early.code)
                raise
            end = early
        if args.out:
            last = _last_step(args, end is not None)
            finish_run(trained, last, validation, is_complete=end is None)
        if end is not None:
            raise end


@contextlib.contextmanager
def _prepared_loop(
    args: argparse.Namespace, metrics: StepMetrics, watchdog: HangWatchdog, alarms: Alarms
) -> Iterator[None]:
    """Megatron's training loop with the callbacks, and the checks of what it reads and writes."""
    with contextlib.ExitStack() as stack:
        enter = stack.enter_context
        enter(_imports_out_of_collections())
        # First: it looks for data below another folder, which no thread may do.
        evaluation = [Evaluation(args, watchdog.beat)] if args.evaluate_every else []
        enter(guarded_loads(verify_checksums=args.verify_checksums, advise=advise_other_step))
        enter(damage_left_behind(args))
        enter(plain_index_cache())
        if not args.async_save:
            enter(results_in_this_process())
        recorder = enter(recorded())
        callbacks = [
            *enter(stragglers_named(args, alarms)),
            enter(metrics.installed()),
            enter(named_save_errors(alarms)),
            FiniteCheck(),
            *([GradientCheck()] if args.check_gradient_norm else []),
            *_spike_skipping(args, metrics.config, alarms),
            *([ReplicaCheck(args.check_replicas)] if args.check_replicas else []),
            enter(old_checkpoints_deleted(args)),
            enter(disk_watched(args, alarms)),
            watchdog,
            enter(heartbeat(args)),
            enter(save_on_signals(args)),
        ]
        if args.out:  # else the screen has Megatron's lines
            callbacks.append(Progress(metrics.latest))
        callbacks += evaluation  # when the others have ended the step
        # The clocks of work and of the metrics start last and stop first; signals are noted first.
        enter(callbacks_in_training_loop([*reversed(callbacks), recorder]))
        enter(
            megatron_refusals((AssertionError, ValueError), lambda: hasattr(args, "curr_iteration"))
        )
        yield


@contextlib.contextmanager
def _imports_out_of_collections() -> Iterator[None]:
    """Keep the garbage collector from walking all that was imported, 0.4 s at any step."""
    gc.freeze()
    try:
        yield
    finally:
        gc.unfreeze()


def _spike_skipping(
    args: argparse.Namespace, config: TrinityConfig, alarms: Alarms
) -> list[SpikeSkipping]:
    if args.skip_spikes is None:
        return []
    rule = {"sigma": args.skip_spikes, "window": args.spike_window}
    return [SpikeSkipping(config, **rule, alarms=alarms)]


def _print_error(args: argparse.Namespace, code: object) -> None:
    """Megatron's re-run engine ends a run with a code alone."""
    if code in (EXIT_CODE_RESUME_TO_DISAMBIGUATE, EXIT_CODE_FAILED_ON_RESULT_VALIDATION):
        where = f"; {args.out}/{LOGS_NAME} says what it found" if args.out else ""
        tell_once(
            f"--rerun-mode {args.rerun_mode}: Megatron has ended the run in step "
            f"{args.curr_iteration + 1} with exit code {code}{where}. Remedy: the same command "
            "again on another machine, or lower --lr and --decoupled-lr if the loss diverged."
        )


def _last_step(args: argparse.Namespace, has_ended_early: bool) -> int:
    """The last step of the run so far."""
    if args.skip_train:
        return args.iteration
    return max(args.iteration, args.curr_iteration + 1 if has_ended_early else args.train_iters)


@contextlib.contextmanager
def _alone_in(args: argparse.Namespace) -> Iterator[None]:
    """Let one run at a time write ``--out``; the lock ends with the process.

    Raises:
        UserError: Another run writes it, and does not end soon.
    """
    if not args.out or args.rank != 0:
        yield
        return
    lock = FileLock(Path(args.out) / ".lock")
    out = Path(args.out)
    new = [out] * _is_new(out) + [path for path in out.parents if not path.exists()]
    logs = out / LOGS_NAME
    has_logs = logs.exists()
    try:
        Path(args.out).mkdir(parents=True, exist_ok=True)
        lock.acquire(timeout=_PATIENCE_SECONDS)
        if isinstance(lock, SoftFileLock):  # a mere file, which would outlive this process
            lock.release()
    except Timeout as error:
        raise UserError(
            f"--out {args.out} is being written by another run. Remedy: wait for its end, or name "
            "another --out."
        ) from error
    except (OSError, NotImplementedError):
        pass  # a filesystem without locks
    try:
        yield
    except (UserError, OSError):
        is_refused = not hasattr(args, "curr_iteration")  # before its first step
        if is_refused and not has_logs:
            shutil.rmtree(logs, ignore_errors=True)
        if is_refused and new:
            shutil.rmtree(args.out, ignore_errors=True)
            with contextlib.suppress(OSError):
                for path in new[1:]:
                    path.rmdir()
        raise
    finally:
        lock.release()


def _is_new(folder: Path) -> bool:
    """Whether a folder is missing, or has only what other ranks of this start have made."""
    try:
        return {path.name for path in folder.iterdir()} == {LOGS_NAME}
    except FileNotFoundError:
        return True
    except OSError:  # a file, or a folder that may not be listed
        return False


def _print_once(message: str) -> None:
    """Print an error that most likely every rank met.

    The first rank to exit makes torchrun stop the others.  Other ranks wait 10 s so that rank 0
    reports first.
    """
    rank = os.environ.get("RANK", "0")
    if rank != "0":
        time.sleep(10)
        message = f"[rank {rank}] {message}"
    tell(message, is_error=True)


def run() -> None:
    """Run :func:`main`; say what is wrong with the input in one paragraph instead of a trace."""
    try:
        use_short_temporary_folder()
        main()
        _leave_world()
    except (UserError, OSError) as error:
        message = explain_disk_error(error) if isinstance(error, OSError) else None
        if message is None and is_user_error(error):
            message = describe_error(error)
        if message is None or os.environ.get("TRINITY_DEBUG") == "1":
            raise
        _print_once(f"error: {message}")
        sys.exit(USER_ERROR)
    except RuntimeError as error:
        is_known = is_out_of_memory(error) or isinstance(error, MachineError)
        if not is_known or os.environ.get("TRINITY_DEBUG") == "1":
            raise
        _print_once(f"error: {error if isinstance(error, MachineError) else explain(error)}")
        sys.exit(1)
    except KeyboardInterrupt:
        sys.exit(130)
    except EndedBySignal as end:
        _wait_for_all_ranks()
        sys.exit(128 + end.signum)


def _leave_world() -> None:
    """NCCL wants it, once all ranks are done; Megatron leaves it to the entry."""
    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()


def _wait_for_all_ranks() -> None:
    """Let all ranks end what they do: the first that ends with a code makes torchrun stop them."""
    if torch.distributed.is_initialized():
        with contextlib.suppress(RuntimeError):  # a rank has died meanwhile
            torch.distributed.barrier()
