"""Values of a run reach programs as they are: no shell reads them a second time."""

import json
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

from trinity_megatron.errors import UserError

ROOT = Path(__file__).resolve().parents[3]
HOSTILE = (
    "$(touch made)",
    "`touch made`",
    "a; touch made",
    "a' ; touch made ; '",
    'a" ; touch made ; "',
    "a\ntouch made\n",
    "a && touch made #",
    "* ~ {1,2} $HOME \\",
)
# The flags of every launch script, printed with DRY_RUN=1 as one line to be typed.
SCRIPT = """
EXAMPLE={root}/examples/trinity_tiny
. {root}/examples/launch/common.sh
train_flags "$1"
run "${{FLAGS[@]}}"
"""


def in_bash(folder: Path, script: str, *args: str, env: dict[str, str] | None = None) -> str:
    """What a script prints; its environment is that of this process, if None."""
    done = subprocess.run(
        ["bash", "-c", script, *args],
        env=env,
        cwd=folder,
        capture_output=True,
        text=True,
        check=True,
    )
    return done.stdout


@pytest.mark.parametrize("value", HOSTILE)
def test_flags_of_the_launch_scripts(tmp_path: Path, value: str) -> None:
    script = SCRIPT.format(root=shlex.quote(str(ROOT)))
    variables = {"PATH": "/usr/bin:/bin", "DRY_RUN": "1", "OUT": value, "DATA": value}
    printed = in_bash(tmp_path, script, "launch", value, env=variables)
    loop = f'for word in {printed.rstrip()}; do printf "%s\\0" "$word"; done'
    words = in_bash(tmp_path, loop).split("\0")
    assert words[words.index("--data") + 1] == value == words[words.index("--out") + 1]
    assert words[-2] == value
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("value", HOSTILE)
def test_the_command_of_supervise(tmp_path: Path, value: str) -> None:
    program = "import json, sys; print(json.dumps(sys.argv[1:]))"
    supervise = (
        "import sys; from pathlib import Path\n"
        "from trinity_megatron.launch.supervise import supervise\n"
        "sys.exit(supervise(sys.argv[1:], Path('out')))"
    )
    done = subprocess.run(
        [sys.executable, "-c", supervise, sys.executable, "-c", program, "--out", value],
        env={"PATH": "/usr/bin:/bin", "PYTHONPATH": str(ROOT)},
        cwd=tmp_path,
        capture_output=True,
        text=True,
        check=True,
    )
    assert json.loads(done.stdout) == ["--out", value]
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("value", ["cpu\n#SBATCH --wrap='touch made'", "a\rb", "\x1b[2J"])
def test_options_of_a_job(value: str) -> None:
    from trinity_megatron.data.cluster.engines import Engine

    with pytest.raises(UserError, match="--engine-options partition=.* has a control character"):
        Engine("slurm", 1, {"partition": value}).check()


def test_the_environment_of_a_job(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from trinity_megatron.data.cluster.engines import _environment

    folder = tmp_path / "it's $(touch made)"
    folder.mkdir()
    monkeypatch.syspath_prepend(str(folder))
    monkeypatch.setattr(sys, "executable", str(folder / "python"))
    script = f'{_environment()}\nprintf "%s\\0%s" "$PATH" "$PYTHONPATH"'
    path, python_path = in_bash(tmp_path, script).split("\0")
    assert path.startswith(f"{folder}:") and str(folder) in python_path.split(":")
    assert not (tmp_path / "made").exists()
