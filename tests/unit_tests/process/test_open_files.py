"""The limit of open files, in a process of its own."""

import subprocess
import sys

SCRIPT = """
import resource
from trinity_megatron.errors import UserError
from trinity_megatron.process.open_files import allow_open_files

resource.setrlimit(resource.RLIMIT_NOFILE, (64, 800))
allow_open_files(500)
print(resource.getrlimit(resource.RLIMIT_NOFILE))
allow_open_files(2)
print(resource.getrlimit(resource.RLIMIT_NOFILE))
try:
    allow_open_files(600)
except UserError as error:
    print(error)
"""


def test_a_file_for_each_dataset() -> None:
    run = subprocess.run([sys.executable, "-c", SCRIPT], capture_output=True, text=True, check=True)
    first, second, refused = run.stdout.splitlines()
    assert first == second == "(756, 800)"
    assert "600 datasets" in refused and "800 open files. Remedy: " in refused
