"""Tasks on this machine, a Slurm or a Ray cluster: datatrove's executors, which this file imports.

Source: https://github.com/huggingface/datatrove, ``datatrove.executor``.
"""

from __future__ import annotations

import importlib
import logging
import os
import shlex
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from trinity_megatron.errors import UserError

logger = logging.getLogger(__name__)
ENGINES = ("local", "ray", "slurm")
_EXTRA = "pip install 'trinity_megatron[cluster]'"
_COMPLETIONS = "completions"  # datatrove's
_POLL_S = 5.0
# A job is out of squeue for a moment before the completions of its last tasks are seen.
_GRACE_S = 60.0

# A step of datatrove, or any function of documents, rank and number of tasks.
Step = Callable[[Any, int, int], Any]


@dataclass(frozen=True)
class Engine:
    """Where tasks run.

    Attributes:
        name: One of :data:`ENGINES`.
        workers: Tasks at a time.
        options: Further arguments of datatrove's executor, such as Slurm's ``partition``.
    """

    name: str
    workers: int
    options: dict[str, Any] = field(default_factory=dict)

    def check(self) -> None:
        """Refuse what is not installed, and options that the executor does not have.

        Raises:
            UserError: Names the package or the option.
        """
        for name, value in self.options.items():
            if not str(value).isprintable():  # a line of a job's script each
                raise UserError(
                    f"--engine-options {name}={value!r} has a control character. Remedy: a value "
                    "in one line."
                )
        _import_datatrove()
        if self.name == "ray":
            _import_ray()
        if self.name == "slurm":
            if shutil.which("sbatch") is None:
                raise UserError(
                    "--engine slurm: there is no sbatch here. Remedy: a login node of a Slurm "
                    "cluster, or --engine local."
                )
            missing = [name for name in ("partition", "time") if name not in self.options]
            if missing:
                raise UserError(
                    f"--engine slurm needs {' and '.join(missing)}. Remedy: --engine-options "
                    "partition=NAME time=HH:MM:SS."
                )
        try:
            self._make([], 1, "unused")
        except TypeError as error:
            raise UserError(
                f"--engine-options: {error}. Remedy: arguments of datatrove's "
                f"{self.name.title()}PipelineExecutor."
            ) from error

    def run(self, steps: Sequence[Step], num_tasks: int, folder: Path) -> None:
        """Run all tasks that are not complete, and wait for them.

        Args:
            steps: Of each task.
            num_tasks: Their number.
            folder: For logs and marks of what is complete; all machines must see it.

        Raises:
            UserError: A task has failed; names its log.
        """
        missing = self.incomplete(num_tasks, folder)
        if not missing:
            return
        logger.info("%d of %d tasks to run, %d at a time", len(missing), num_tasks, self.workers)
        executor = self._make(list(steps), num_tasks, str(folder))
        problem: BaseException | None = None
        try:
            if self.name == "ray":
                self._run_on_ray(executor)
            else:
                executor.run()
            if self.name == "slurm":
                self._wait_for_slurm(executor, num_tasks, folder)
        except (RuntimeError, OSError, subprocess.CalledProcessError) as error:
            problem = error
        missing = self.incomplete(num_tasks, folder)
        if missing:
            logs = folder / "logs" / f"task_{missing[0]:05d}.log"
            because = f" ({type(problem).__name__}: {problem})" if problem else ""
            raise UserError(
                f"{len(missing)} of {num_tasks} tasks have not ended well{because}; the first is "
                f"task {missing[0]}, see {logs if logs.is_file() else folder}. Remedy: mend that, "
                "and run the same command again; complete tasks are kept."
            ) from problem

    def incomplete(self, num_tasks: int, folder: Path) -> list[int]:
        """Tasks that are to run."""
        done = folder / _COMPLETIONS
        return [task for task in range(num_tasks) if not (done / f"{task:05d}").is_file()]

    def forget(self, task: int, folder: Path) -> None:
        """Run a task again the next time."""
        (folder / _COMPLETIONS / f"{task:05d}").unlink(missing_ok=True)

    def _make(self, steps: list[Step], num_tasks: int, folder: str) -> Any:
        _import_datatrove()
        common = {"pipeline": steps, "tasks": num_tasks, "logging_dir": folder}
        workers = min(self.workers, num_tasks)
        if self.name == "local":
            from datatrove.executor import LocalPipelineExecutor

            # Not forked: torch and tokenizers have threads.
            return LocalPipelineExecutor(
                **common, workers=workers, start_method="spawn", **self.options
            )
        if self.name == "ray":
            from datatrove.executor.ray import RayPipelineExecutor

            return RayPipelineExecutor(**common, workers=workers, **self.options)
        from datatrove.executor import SlurmPipelineExecutor

        options = {"job_name": "prepare-data", "qos": "", "env_command": _environment()}
        return SlurmPipelineExecutor(**common, workers=workers, **{**options, **self.options})

    def _run_on_ray(self, executor: Any) -> None:
        ray = _import_ray()
        started = not ray.is_initialized()
        if started:
            # A cluster's address is in RAY_ADDRESS; without one Ray starts on this machine.
            address = os.environ.get("RAY_ADDRESS")
            here: dict[str, Any] = {} if address else {"num_cpus": self.workers}
            path = os.pathsep.join(entry for entry in sys.path if entry)
            environment = {"env_vars": {"PYTHONPATH": path}}
            ray.init(
                address=address,
                include_dashboard=False,
                log_to_driver=False,
                logging_level="warning",
                runtime_env=environment,
                **here,
            )
        try:
            executor.run()
        finally:
            if started:
                ray.shutdown()

    def _wait_for_slurm(self, executor: Any, num_tasks: int, folder: Path) -> None:
        """Wait until all tasks are complete, or none of the job is in the queue any more."""
        gone_since: float | None = None
        while self.incomplete(num_tasks, folder):
            listed = subprocess.run(
                ["squeue", "--noheader", "--jobs", str(executor.job_id)],
                capture_output=True,
                text=True,
            )
            if listed.stdout.strip():
                gone_since = None
            elif gone_since is None:
                gone_since = time.monotonic()
            elif time.monotonic() - gone_since > _GRACE_S:
                return
            time.sleep(_POLL_S)


def datatrove_class(module: str, name: str) -> Any:
    """A class of datatrove; None if the module has none of the name.

    Raises:
        UserError: datatrove is not installed.
    """
    _import_datatrove()
    return getattr(importlib.import_module(module), name, None)


def _environment() -> str:
    """Shell lines that give a job this command's Python and packages."""
    scripts = shlex.quote(os.path.dirname(sys.executable))
    path = os.pathsep.join(os.path.abspath(entry) for entry in sys.path if entry)
    return f"export PATH={scripts}:$PATH PYTHONPATH={shlex.quote(path)}"


def _import_datatrove() -> None:
    try:
        import datatrove.executor  # noqa: F401
    except ImportError as error:
        raise UserError(
            f"--engine needs the package datatrove, which is not installed ({error}). Remedy: "
            f"{_EXTRA}"
        ) from error


def _import_ray() -> Any:
    try:
        import ray
    except ImportError as error:
        raise UserError(
            f"--engine ray needs the package ray, which is not installed. Remedy: {_EXTRA}"
        ) from error
    return ray
