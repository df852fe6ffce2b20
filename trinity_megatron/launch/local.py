"""``trinity-megatron train``: start the ranks of a run on this machine.

It is torchrun over :mod:`trinity_megatron.training`, with the settings that a machine
needs filled in.  A run over several machines is launched by torchrun or srun over
``examples/pretrain_trinity.py``, which takes the same flags.
"""

import argparse
import contextlib
import logging
import os
import signal
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from trinity_megatron.errors import UserError
from trinity_megatron.process.environment import build_environment, count_cores, count_cuda_devices
from trinity_megatron.process.rank import (
    LAUNCHER_PID_VARIABLE,
    SECONDS_BETWEEN_INTERRUPTS,
    hang_up_with_shell,
)
from trinity_megatron.process.world import refuse_worlds_in_tasks, single_rank_environment
from trinity_megatron.upstream.registry import replaced

TRAINING_MODULE = "trinity_megatron.training"
# Importing the presets imports Megatron, which takes seconds: these are known to be there.
_RELEASED_PRESETS = ("tiny", "nano", "mini", "large")
# A save takes as long as it takes; supervisors send SIGKILL when their patience is over.
_SHUTDOWN_SECONDS = 24 * 3600
_SECONDS_AFTER_FAILURE = 3
_CLOSE = "torch.distributed.elastic.multiprocessing.api:PContext.close"
_FORWARDED = ("SIGHUP", "SIGTERM", "SIGUSR1", "SIGUSR2")


def train(
    megatron_flags: Sequence[str], *, preset: str, data: str, out: str, nproc: int | None = None
) -> int:
    """Check the request, then train.

    Args:
        megatron_flags: Further flags, passed to Megatron as they are.
        preset: Name of a preset.
        data: Folder that ``prepare-data`` made, or the file of a mixture.
        out: Folder of the run; made if missing.
        nproc: Number of ranks; one per CUDA device, or one on a CPU, if None.

    Returns:
        The exit code of the run.

    Raises:
        UserError: An argument cannot be met.
        FileNotFoundError: ``data`` is missing or not complete.
    """
    check_preset(preset)
    check_out(out)
    check_data(data)
    num_devices = count_cuda_devices()
    num_ranks = choose_num_ranks(nproc, num_devices)
    arguments = ["--preset", preset, "--data", data, "--out", out, *megatron_flags]
    return launch(arguments, num_ranks=num_ranks, cuda=num_devices > 0)


def check_preset(preset: str) -> None:
    """Refuse a preset that does not exist.

    Raises:
        UserError: No preset has this name.
    """
    if preset not in _RELEASED_PRESETS:
        from trinity_megatron.model.presets import get_preset

        get_preset(preset)


def check_data(data: str) -> None:
    """Refuse a data folder or a mixture without complete, readable data.

    Raises:
        UserError: What is there cannot be used.
        FileNotFoundError: Nothing is there.
    """
    from trinity_megatron.data.manifest import load_manifest
    from trinity_megatron.data.mixture.open_corpora import read_mixture

    if read_mixture(data) is None:
        load_manifest(Path(data))


def check_out(out: str) -> None:
    """Refuse an output folder that cannot be written.

    Raises:
        UserError: The path is a file, or its folder is not writable.
    """
    if not out:
        raise UserError("--out is empty: nothing would be saved. Remedy: name a folder.")
    path = Path(out).absolute()
    if path.is_symlink() and not path.exists():
        raise UserError(
            f"--out {out} is a link to {path.readlink()}, which is not there. Remedy: mend it."
        )
    existing = next(folder for folder in (path, *path.parents) if folder.exists())
    if not existing.is_dir():
        raise UserError(f"--out {out}: {existing} is a file. Remedy: name a folder.")
    if not os.access(existing, os.W_OK):
        raise UserError(f"--out {out}: {existing} is not writable. Remedy: name a folder that is.")


def choose_num_ranks(nproc: int | None, num_devices: int) -> int:
    """Number of ranks to start.

    Raises:
        UserError: ``nproc`` is below one, or above the number of CUDA devices where there are any.
    """
    if nproc is None:
        return max(num_devices, 1)
    if nproc < 1:
        raise UserError(
            f"--nproc {nproc} is below 1. Remedy: give the number of ranks, or leave "
            "it out for one per GPU."
        )
    if num_devices and nproc > num_devices:
        raise UserError(
            f"--nproc {nproc} exceeds the {num_devices} CUDA devices that are visible. Remedy: "
            f"--nproc {num_devices}, or make more visible through CUDA_VISIBLE_DEVICES."
        )
    return nproc


def launch(
    arguments: Sequence[str],
    *,
    num_ranks: int,
    cuda: bool = False,
    module: str = TRAINING_MODULE,
) -> int:
    """Run ``python -m module arguments`` on ``num_ranks`` ranks of this machine until they end.

    One rank takes the place of this process.  Several are children of torchrun, which runs in this
    process: it hands signals on to them and waits for their end, however long they save.  A second
    Ctrl-C ends them at once, and so does the end of this process.

    Returns:
        0, the exit code of the rank that failed first, or 128 plus the number of a signal.

    Raises:
        UserError: This process is one of several tasks of srun or mpirun.
    """
    refuse_worlds_in_tasks(os.environ, num_ranks)
    hang_up_with_shell()
    environment = build_environment(
        os.environ, num_ranks=num_ranks, num_cores=count_cores(), cuda=cuda
    )
    if num_ranks == 1:
        sys.stdout.flush()
        sys.stderr.flush()
        command = [sys.executable, "-u", "-m", module, *arguments]
        os.execve(sys.executable, command, {**environment, **single_rank_environment()})
    os.environ.update(environment)
    os.environ[LAUNCHER_PID_VARIABLE] = str(os.getpid())
    os.environ.setdefault("TORCH_ELASTIC_SHUTDOWN_TIMEOUT", str(_SHUTDOWN_SECONDS))
    torchrun_arguments = build_torchrun_arguments(arguments, num_ranks=num_ranks, module=module)
    return _run_torchrun(torchrun_arguments, forwarded_signals(arguments))


def build_torchrun_arguments(arguments: Sequence[str], *, num_ranks: int, module: str) -> list[str]:
    """What torchrun is called with.  It chooses a free port itself."""
    return [
        "--standalone",
        f"--nproc-per-node={num_ranks}",
        "--local-addr=127.0.0.1",
        f"--log-dir={os.devnull}",  # or it makes a folder, which nothing would be written to
        "--signals-to-handle=SIGQUIT",  # the others are handled here
        "-m",
        module,
        *arguments,
    ]


def forwarded_signals(arguments: Sequence[str]) -> tuple[signal.Signals, ...]:
    """Signals that the ranks are to get: what supervisors send, and that of ``--exit-signal``.

    What this process was started to ignore (SIGHUP under nohup) stays ignored.
    """
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    parser.add_argument("--exit-signal", default="SIGTERM")
    name = parser.parse_known_args(list(arguments))[0].exit_signal
    names = {*_FORWARDED, name} - {"SIGINT", "SIGKILL", "SIGSTOP"}
    known = [signal.Signals[name] for name in sorted(names) if name in signal.Signals.__members__]
    return tuple(signum for signum in known if signal.getsignal(signum) != signal.SIG_IGN)


class _SignalForwarder:
    """Lets torchrun hand the first signal on to the ranks and wait for their end.

    Attributes:
        received: The first signal; None so far.
    """

    def __init__(self) -> None:
        self.received: signal.Signals | None = None
        self._last = 0.0

    def install(self, signals: Sequence[signal.Signals]) -> None:
        """Handle these signals, and SIGINT, from now on."""
        for signum in (*signals, signal.SIGINT):
            signal.signal(signum, self._handle)

    def _handle(self, signum: int, frame: Any) -> None:
        from torch.distributed.elastic.multiprocessing.api import SignalException

        before, self._last = self._last, time.monotonic()
        if self.received is None:
            self.received = signal.Signals(signum)
            # On SIGTERM they can save and end; SIGINT would be a traceback from each.
            passed = signal.SIGTERM if signum == signal.SIGINT else self.received
            if signum == signal.SIGINT:
                with contextlib.suppress(OSError):
                    os.write(
                        1, b"\n> the ranks end, after a save if they train; Ctrl-C again: at once\n"
                    )
            raise SignalException(f"{self.received.name} for the ranks", passed)
        if signum == signal.SIGINT and self._last - before > SECONDS_BETWEEN_INTERRUPTS:
            raise SignalException("the ranks end with this process", signal.SIGKILL)


def _run_torchrun(torchrun_arguments: Sequence[str], signals: Sequence[signal.Signals]) -> int:
    from torch.distributed import run
    from torch.distributed.elastic.multiprocessing.api import SignalException
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError

    forwarder = _SignalForwarder()
    forwarder.install(signals)
    if os.environ.get("TRINITY_DEBUG") != "1":
        logging.disable(logging.ERROR)  # torchrun's reports; the ranks have written their own
    exit_codes: list[int] = []

    def noting_exit_codes(close: Callable[..., None]) -> Callable[..., None]:
        def wrapper(context: Any, *given: Any, **settings: Any) -> None:
            if forwarder.received is None:  # a rank has failed: the others cannot save without it
                given, settings["timeout"] = given[:1], _SECONDS_AFTER_FAILURE
            close(context, *given, **settings)
            handlers = context.subprocess_handlers.values()
            exit_codes[:] = [handler.proc.returncode or 0 for handler in handlers]

        return wrapper

    try:
        with replaced(_CLOSE, noting_exit_codes):
            run.run(run.parse_args(list(torchrun_arguments)))
    except ChildFailedError as error:
        return _report_failure(error)
    except SignalException as error:
        return _code_after_signal(forwarder.received or error.sigval, exit_codes)
    return 0


def _code_after_signal(received: int, exit_codes: Sequence[int]) -> int:
    """128 plus the signal, or the code of a rank that ended in another way: it could not save."""
    codes = (128 + received, 128 + signal.SIGTERM)  # SIGINT reaches them as SIGTERM
    failed = [code for code in map(_as_shell, exit_codes) if code not in (0, *codes)]
    return failed[0] if failed else 128 + received


def _as_shell(exit_code: int) -> int:
    return exit_code if exit_code >= 0 else 128 - exit_code


def _report_failure(error: Any) -> int:
    rank, failure = error.get_first_failure()
    code = _as_shell(failure.exitcode)
    if failure.exitcode - 128 in signal.valid_signals():
        name = signal.Signals(failure.exitcode - 128).name
        sys.stderr.write(f"trinity-megatron: all ranks have ended after {name} to one of them.\n")
        return code
    if failure.exitcode >= 0:
        reason = f"ended with exit code {failure.exitcode}; its message is above"
    else:
        reason = f"was killed by {failure.signal_name()}"
    if failure.exitcode == -signal.SIGKILL:
        reason += ", as happens when memory runs out. Remedy: lower --micro-batch-size or --nproc"
    sys.stderr.write(f"trinity-megatron: rank {rank} {reason}. All other ranks were stopped.\n")
    return code
