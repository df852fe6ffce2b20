"""Import the training entry once (10 s), then fork the ranks of many short runs, two at a time.

python flag_server.py PLAN.json RESULTS.jsonl

PLAN.json is a list of runs, ``{"name": str, "flags": [str], "ranks": int}``; each result is
``{"name": str, "code": int, "output": str}``, 124 being the code of a run that took too long.
"""

import argparse
import importlib
import json
import os
import shutil
import signal
import socket
import sys
import tempfile
import time
import traceback
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Any

SECONDS_FOR_A_RUN = 240
PROCESSES = 2


@dataclass
class Run:
    """A run in progress: a folder of its own, and a process for each rank."""

    name: str
    folder: Path
    pids: list[int] = field(default_factory=list)
    start: float = field(default_factory=time.monotonic)


def start(job: dict[str, Any]) -> Run:
    """Fork the ranks of a run."""
    folder = Path(tempfile.mkdtemp(prefix="flag_run_"))
    run = Run(job["name"], folder)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1] if job["ranks"] > 1 else 0
    for rank in range(job["ranks"]):
        sys.stdout.flush()
        pid = os.fork()
        if pid == 0:
            train(job, folder, rank, port)
        run.pids.append(pid)
    return run


def train(job: dict[str, Any], folder: Path, rank: int, port: int) -> None:
    """Be a rank: train, and end the process with the code that the entry ends with."""
    log = os.open(folder / f"output_{rank}", os.O_WRONLY | os.O_CREAT)
    for stream in (1, 2):
        os.dup2(log, stream)
    ranks = str(job["ranks"])
    os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=ranks)
    os.environ.update(LOCAL_WORLD_SIZE=ranks, MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
    (folder / "cwd").mkdir(exist_ok=True)
    os.chdir(folder / "cwd")
    sys.argv = ["train", *(flag.replace("{run}", str(folder)) for flag in job["flags"])]
    from trinity_megatron.process.helpers import own_helpers
    from trinity_megatron.training import pretrain

    own_helpers()  # those of a save end with this process
    code = 1
    try:
        pretrain.run()
        code = 0
    except SystemExit as end:
        code = end.code if isinstance(end.code, int) else int(end.code is not None)
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


def finish(run: Run, codes: list[int]) -> dict[str, Any]:
    """The result of a run that has ended; removes its folder."""
    code = next((code for code in codes if code), 0)
    logs = sorted(run.folder.glob("output_*"))
    output = "\n".join(log.read_text(errors="replace") for log in logs)
    shutil.rmtree(run.folder, ignore_errors=True)
    return {"name": run.name, "code": code, "output": output}


def serve(plan: list[dict[str, Any]], results: IO[str]) -> None:
    """Do all runs, and write each result when it is there."""
    waiting, running = list(plan), []
    codes: dict[int, int] = {}
    while waiting or running:
        used = sum(len(run.pids) for run in running)
        if waiting and used + waiting[0]["ranks"] <= PROCESSES:
            running.append(start(waiting.pop(0)))
            continue
        time.sleep(0.02)
        for run in list(running):
            reap(run, codes)
            ended = [codes[pid] for pid in run.pids if pid in codes]
            late = time.monotonic() - run.start > SECONDS_FOR_A_RUN
            if len(ended) == len(run.pids):
                results.write(json.dumps(finish(run, ended)) + "\n")
                results.flush()
                running.remove(run)
            elif late or any(ended):
                kill(run, codes, late=late)


def reap(run: Run, codes: dict[int, int]) -> None:
    """Note the exit codes of the ranks that have ended."""
    for pid in run.pids:
        if pid not in codes:
            ended, status = os.waitpid(pid, os.WNOHANG)
            if ended:
                codes[pid] = os.waitstatus_to_exitcode(status)


def kill(run: Run, codes: dict[int, int], *, late: bool) -> None:
    """End the ranks that are left: too late, or a while after the failure of another."""
    if not late:
        time.sleep(1)  # to tell their failure
    for pid in run.pids:
        if pid not in codes:
            os.kill(pid, signal.SIGKILL)
            os.waitpid(pid, 0)
            codes[pid] = 124 if late else 0


def main() -> None:
    """Import, then serve."""
    plan, results = json.loads(Path(sys.argv[1]).read_text()), Path(sys.argv[2])
    from megatron.training.arguments import add_megatron_arguments

    from trinity_megatron.training import pretrain  # noqa: F401

    # What every run would import or read by itself, in 5 s.
    importlib.import_module("megatron.core.tokenizers.text.text_tokenizer")
    importlib.import_module("transformers").AutoTokenizer  # noqa: B018
    add_megatron_arguments(argparse.ArgumentParser())
    first = [job for job in plan if job.get("first")]
    with results.open("w") as file:
        for jobs in (first, [job for job in plan if job not in first]):
            serve(jobs, file)


if __name__ == "__main__":
    main()
