"""Import Megatron once, then fork one training after the other, and disturb some of them.

python wandb_worker.py PLAN.json

The exit codes of the jobs go to ``PLAN.json.codes``.
"""

import atexit
import functools
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
import traceback
from pathlib import Path
from typing import Any

from tests.functional_tests.worker import run_rank
from trinity_megatron.process.helpers import own_helpers

WAIT_SECONDS = 60


def run_child(job: dict[str, Any]) -> None:
    """Train in this forked process, and leave it as the interpreter would."""
    from megatron.training import training

    descriptor = os.open(job["console"], os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    os.dup2(descriptor, 1)
    os.dup2(descriptor, 2)
    os.environ.update(job["environment"])
    own_helpers()  # those of Megatron's asynchronous save end with this process
    if job["action"]:
        training.train_step = disturbed(training.train_step, job)
    code = 0
    with tempfile.TemporaryDirectory() as folder:
        try:
            run_rank(0, 1, [{"flags": job["flags"], "probe": {}}], f"{folder}/store")
        except BaseException:
            traceback.print_exc()
            code = 1
    atexit._run_exitfuncs()
    sys.stdout.flush()
    os._exit(code)


def disturbed(train_step: Any, job: dict[str, Any]) -> Any:
    """Before step ``at`` wait until W&B has the step ``has``; then act."""
    steps = 0

    @functools.wraps(train_step)  # the registry knows what it wraps
    def wrapper(*args: Any, **kwargs: Any) -> Any:
        nonlocal steps
        steps += 1
        if steps == job["at"]:
            wait_for_row(Path(job["folder"]), job["has"])
            if job["action"] == "SIGKILL":
                os.kill(os.getpid(), signal.SIGKILL)
            subprocess.run(job["action"], shell=True, check=False, capture_output=True)
        return train_step(*args, **kwargs)

    return wrapper


def wait_for_row(folder: Path, step: int) -> None:
    """Wait until the journal has the row of a step."""
    end = time.monotonic() + WAIT_SECONDS
    while time.monotonic() < end:
        journals = [file.read_text() for file in folder.glob("wandb/journal-*.jsonl")]
        if any(f'{{"step": {step},' in text for text in journals):
            return
        time.sleep(0.01)
    raise TimeoutError(f"{folder} has no row of step {step}")


def main() -> None:
    """Run the jobs of the plan."""
    import torch

    torch.set_num_threads(1)
    import trinity_megatron.training.pretrain  # noqa: F401  enters the host

    plan = Path(sys.argv[1])
    codes = {}
    for job in json.loads(plan.read_text()):
        child = os.fork()
        if child == 0:
            run_child(job)
        codes[job["name"]] = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    Path(f"{plan}.codes").write_text(json.dumps(codes))


if __name__ == "__main__":
    main()
