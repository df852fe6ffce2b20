"""The limit of open files, in a process of its own."""

import subprocess
import sys

SCRIPT = """
import resource
from trinity_megatron.process.open_files import allow_open_files, explain_open_files

print(explain_open_files(FileNotFoundError(2, "no")), explain_open_files(None))
resource.setrlimit(resource.RLIMIT_NOFILE, (64, 500))
for datasets in (20, 2, 2000):
    allow_open_files(datasets)
    print(resource.getrlimit(resource.RLIMIT_NOFILE))
opened = []
try:
    while True:
        opened.append(open("/dev/null"))
except OSError as error:
    words = explain_open_files(error)
opened.clear()
print(words)
"""


def test_a_file_for_each_dataset() -> None:
    run = subprocess.run([sys.executable, "-c", SCRIPT], capture_output=True, text=True, check=True)
    *lines, words = run.stdout.splitlines()
    assert lines == ["None None", "(376, 500)", "(376, 500)", "(500, 500)"]
    assert "/dev/null cannot be opened: this process may have 500" in words and "Remedy: " in words
