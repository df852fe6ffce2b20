"""A helper process leaves the core of the thread that started it."""

import os
import subprocess
import sys

import pytest

# The main thread is bound to one core, another thread is not; the child of the former says where
# it may run, before and after.
PARENT = """
import os, subprocess, sys, threading
threading.Thread(target=threading.Event().wait, daemon=True).start()
os.sched_setaffinity(0, {min(os.sched_getaffinity(0))})
sys.exit(subprocess.run([sys.executable, "-c", sys.argv[1]]).returncode)
"""
CHILD = """
import os
from trinity_megatron.process.affinity import inherit_cores_of_parent
print(len(os.sched_getaffinity(0)))
inherit_cores_of_parent()
print(len(os.sched_getaffinity(0)))
"""


@pytest.mark.skipif(not hasattr(os, "sched_getaffinity"), reason="needs Linux")
def test_it_takes_the_cores_of_all_threads() -> None:
    command = [sys.executable, "-c", PARENT, CHILD]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["1", str(len(os.sched_getaffinity(0)))]
