"""What goes to the screen may be lost, and nothing else with it."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[3]
SCRIPT = """
import logging, sys
from trinity_megatron.process.console import make_screen_safe, screen_failure
make_screen_safe()
print("first z\\u00fc\\u4e2d\\ud800", flush=True)
logging.warning("a warning \\u4e2d")
for _ in range(3000):
    print("x" * 100)
sys.stdout.buffer.write(b"raw\\n")
failure = screen_failure()
with open(sys.argv[1], "w") as file:
    file.write(f"reached the end, {failure.strerror if failure else failure}")
"""


def run_in_shell(command: str, tmp_path: Path, **variables: str) -> tuple[int, str, str]:
    """Run the script in a shell line.

    Args:
        command: ``RUN`` stands for the script.

    Returns:
        Exit code of the script, what was shown, what the script noted at its end.
    """
    end, code = tmp_path / "end", tmp_path / "code"
    (tmp_path / "script.py").write_text(SCRIPT)
    line = command.replace("RUN", f"{sys.executable} $UNBUFFERED script.py {end}")
    result = subprocess.run(
        ["bash", "-c", f"{line}; echo ${{PIPESTATUS[0]}} > {code}"],
        env={**os.environ, "PYTHONPATH": str(ROOT), "UNBUFFERED": "", **variables},
        cwd=tmp_path,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        timeout=60,
    )
    return int(code.read_text()), result.stdout.decode(errors="replace"), end.read_text()


@pytest.mark.parametrize(
    "variables",
    [
        {"PYTHONIOENCODING": "ascii"},
        {"PYTHONIOENCODING": "latin-1"},
        {"PYTHONIOENCODING": "gbk"},
        {"PYTHONIOENCODING": "utf-8"},
        {"PYTHONUTF8": "0", "LC_ALL": "C", "PYTHONCOERCECLOCALE": "0"},
    ],
)
@pytest.mark.parametrize("unbuffered", ["", "-u"])
def test_letters_that_the_screen_does_not_have(
    variables: dict[str, str], unbuffered: str, tmp_path: Path
) -> None:
    code, shown, end = run_in_shell("RUN", tmp_path, UNBUFFERED=unbuffered, **variables)
    assert (code, end) == (0, "reached the end, None")
    assert "\\ud800" in shown and "a warning" in shown and "Traceback" not in shown
    if variables.get("PYTHONIOENCODING") == "ascii":
        assert "first z\\xfc\\u4e2d\\ud800\n" in shown


@pytest.mark.parametrize(
    ("command", "failure"),
    [
        ("RUN | head -1", None),
        ("RUN 2>&1 | true", None),
        ("RUN >&-", None),
        ("RUN >&- 2>&- <&-", None),
        ("RUN > /dev/full", "No space left on device"),
        ("RUN > /dev/full 2>&1", "No space left on device"),
        ("(ulimit -f 1; RUN > log)", "File too large"),
    ],
)
@pytest.mark.parametrize("unbuffered", ["", "-u"])
def test_a_screen_that_is_gone(
    command: str, failure: str | None, unbuffered: str, tmp_path: Path
) -> None:
    code, shown, end = run_in_shell(command, tmp_path, UNBUFFERED=unbuffered)
    assert (code, end) == (0, f"reached the end, {failure}")
    assert "Traceback" not in shown and "Exception ignored" not in shown


def test_no_file_takes_the_place_of_a_closed_screen(tmp_path: Path) -> None:
    """What writes to descriptor 1 by itself, as C++ does, would write into a checkpoint."""
    script = (
        "import os\nfrom trinity_megatron.process import console\nconsole.make_screen_safe()\n"
        "f = open('kept', 'w')\nos.write(1, b'from C')\nos.write(2, b'from C')\nf.write('content')"
    )
    (tmp_path / "s.py").write_text(script)
    line = f"PYTHONPATH={ROOT} {sys.executable} s.py >&- 2>&- <&-"
    assert subprocess.run(["bash", "-c", line], cwd=tmp_path).returncode == 0
    assert (tmp_path / "kept").read_text() == "content"


@pytest.mark.parametrize("command", ["--help", "--version", "train --help", "gpu-check --help"])
def test_a_command_into_a_closed_pipe(command: str) -> None:
    line = (
        f"{sys.executable} -m trinity_megatron.cli {command} 2>&1 | true; echo ${{PIPESTATUS[0]}}"
    )
    shown = subprocess.run(["bash", "-c", line], cwd=ROOT, capture_output=True, text=True)
    assert shown.stdout == "0\n"
