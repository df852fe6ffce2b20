"""scripts/bootstrap.sh: which Python it takes, what it says without one, what it keeps."""

import shutil
import stat
import subprocess
import sys
import time
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
TOOLS = (
    *("sh", "awk", "cat", "cksum", "df", "dirname", "env", "grep", "head", "mkdir", "rm", "sed"),
    *("ln", "cp", "chmod", "touch"),
)
CANDIDATES = ("python3.12", "python3.13", "python3.14", "python3")
PYENV_SHIM = 'echo "pyenv: $(basename "$0"): command not found" >&2; exit 127'

# A Python of version VERSION at BASE: answers the probe, makes an environment, logs its calls.
FAKE_PYTHON = """#!/bin/sh
here="$0"
case "$1 $2" in
    "-c "*) echo "usable VERSION BASE" ;;
    "-m venv")
        echo venv >>"$LOG"
        mkdir -p "$3/bin"
        cp "$here" "$3/bin/python"
        ;;
    "-m pip")
        case "$*" in
            *" config list") printf '%s\n' "$PIP_CONFIGURATION" ;;
            *" uv") [ -z "$UV_SCRIPT" ] || cp "$UV_SCRIPT" "${here%/*}/uv" ;;
            *) echo "pip $*" >>"$LOG"; exit "${PIP_EXIT_CODE:-0}" ;;
        esac
        ;;
esac
"""


class Checkout:
    """A folder with the script and a machine with nothing but a few tools."""

    def __init__(self, folder: Path) -> None:
        self.path = folder / "checkout"
        self.tools = folder / "bin"
        self.log = folder / "log"
        (self.path / "scripts").mkdir(parents=True)
        self.tools.mkdir()
        shutil.copy(ROOT / "scripts/bootstrap.sh", self.path / "scripts")
        (self.path / "setup.cfg").write_text("[metadata]\n")
        (self.path / "pyproject.toml").write_text("[build-system]\n")
        for tool in [*TOOLS, "basename"]:
            found = shutil.which(tool)
            assert found, f"this test needs {tool}"
            (self.tools / tool).symlink_to(found)
        self.environment = {"PATH": str(self.tools), "HOME": str(folder), "LOG": str(self.log)}

    def add_program(self, path: Path | str, text: str) -> Path:
        file = self.tools / path
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(text)
        file.chmod(file.stat().st_mode | stat.S_IXUSR)
        return file

    def add_python(self, path: Path | str, version: str = "3.12") -> Path:
        text = FAKE_PYTHON.replace("VERSION", version).replace("BASE", str(self.tools / path))
        return self.add_program(path, text)

    def bootstrap(self, **environment: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [str(self.tools / "sh"), str(self.path / "scripts/bootstrap.sh")],
            env={**self.environment, **environment},
            capture_output=True,
            text=True,
        )

    def take_log(self) -> list[str]:
        """What the fakes were told since the last call: ``venv``, ``pip`` and ``uv``."""
        lines = self.log.read_text().splitlines() if self.log.exists() else []
        self.log.unlink(missing_ok=True)
        return [line.split()[0] for line in lines]


@pytest.fixture
def checkout(tmp_path: Path) -> Checkout:
    return Checkout(tmp_path)


def test_without_a_python_says_what_was_tried_and_what_helps(checkout: Checkout) -> None:
    for name in CANDIDATES[:2]:
        checkout.add_program(name, f"#!/bin/sh\n{PYENV_SHIM}\n")
    checkout.add_program("python3", "#!/bin/sh\necho it is Python 3.9.1 >&2; exit 1\n")
    result = checkout.bootstrap(PYTHON="/no/such/python")
    assert result.returncode == 1
    for line in (
        "/no/such/python: not found",
        "python3.12: pyenv: python3.12: command not found",
        "python3.13: pyenv: python3.13: command not found",
        "python3.14: not found",
        "python3: it is Python 3.9.1",
        "pyenv install 3.12",
        "apt install python3.12",
        "uv python install 3.12",
    ):
        assert line in result.stderr
    assert not (checkout.path / ".venv").exists()


def test_reason_is_found_by_running_a_real_python(checkout: Checkout) -> None:
    """The probe itself, under the Python of this test made to look too old or incomplete."""
    script = (ROOT / "scripts/bootstrap.sh").read_text()
    probe = script.split("PROBE='\n")[1].split("'\n\n")[0]
    setups = {
        "import sys; sys.version_info = (3, 11, 7)": "it is Python 3.11.7",
        "import sys; sys.modules['ensurepip'] = None": "apt install python3",
        "": "usable 3.",
    }
    for setup, expected in setups.items():
        result = subprocess.run(
            [sys.executable, "-c", f"{setup}\n{probe}"], capture_output=True, text=True
        )
        assert expected in result.stdout + result.stderr


def test_takes_a_pyenv_version_when_its_shim_fails(checkout: Checkout) -> None:
    checkout.add_program("python3.12", f"#!/bin/sh\n{PYENV_SHIM}\n")
    pyenv = Path(checkout.environment["HOME"]) / ".pyenv/versions"
    checkout.add_python(pyenv / "3.12.1/bin/python")
    result = checkout.bootstrap()
    assert result.returncode == 0, result.stderr
    assert checkout.take_log() == ["venv", "pip"]


@pytest.mark.parametrize(
    ("versions", "chosen"),
    [({"python3.14": "3.14", "python3": "3.13"}, "3.13"), ({"python3.14": "3.14"}, "3.14")],
)
def test_python_without_a_wheel_comes_last(
    checkout: Checkout, versions: dict[str, str], chosen: str
) -> None:
    for name, version in versions.items():
        checkout.add_python(name, version)
    result = checkout.bootstrap()
    assert result.returncode == 0, result.stderr
    assert f"Python {chosen}" in result.stdout


def test_python_that_was_asked_for_comes_first(checkout: Checkout, tmp_path: Path) -> None:
    checkout.add_python("python3.12")
    mine = checkout.add_python(tmp_path / "with space" / "python", "3.13")
    result = checkout.bootstrap(PYTHON=str(mine))
    assert "Python 3.13" in result.stdout


def test_second_call_does_nothing_and_is_quick(checkout: Checkout) -> None:
    checkout.add_python("python3.12")
    checkout.bootstrap()
    assert checkout.take_log() == ["venv", "pip"]
    begin = time.monotonic()
    result = checkout.bootstrap()
    assert time.monotonic() - begin < 3
    assert (result.returncode, result.stdout, result.stderr) == (0, "", "")
    assert checkout.take_log() == []


def test_changed_requirements_are_installed_into_the_environment(checkout: Checkout) -> None:
    checkout.add_python("python3.12")
    checkout.bootstrap()
    checkout.take_log()
    (checkout.path / "setup.cfg").write_text("[metadata]\nname = other\n")
    checkout.bootstrap()
    assert checkout.take_log() == ["pip"]
    checkout.bootstrap()
    assert checkout.take_log() == []


FAKE_UV = """#!/bin/sh
echo "uv $*" >>"$LOG"
env | grep '^UV_' >>"$LOG"
exit "${UV_EXIT_CODE:-0}"
"""


@pytest.fixture
def uv(checkout: Checkout) -> Path:
    checkout.add_python("python3.12")
    return checkout.add_program(checkout.path / "fake_uv", FAKE_UV)


def test_uv_installs_with_the_settings_of_pip(checkout: Checkout, uv: Path) -> None:
    configuration = """:env:.index-url='https://mirror/simple'
global.index-url='https://other/simple'
global.constraint='/etc/a folder/constraints.txt'
global.timeout='5'"""
    result = checkout.bootstrap(UV_SCRIPT=str(uv), PIP_CONFIGURATION=configuration)
    assert result.returncode == 0, result.stderr
    log = checkout.log.read_text().splitlines()
    assert log[0] == "venv" and log[1].startswith("uv pip install --python .venv/bin/python -e")
    assert set(log[2:]) == {
        "UV_DEFAULT_INDEX=https://mirror/simple",
        "UV_CONSTRAINT=/etc/a folder/constraints.txt",
        "UV_INDEX_STRATEGY=unsafe-best-match",
        f"UV_SCRIPT={uv}",
    }


def test_pip_installs_where_uv_fails(checkout: Checkout, uv: Path) -> None:
    result = checkout.bootstrap(UV_SCRIPT=str(uv), UV_EXIT_CODE="1")
    assert result.returncode == 0, result.stderr
    names = [name for name in checkout.take_log() if not name.startswith("UV_")]
    assert names == ["venv", "uv", "pip"]


def test_uv_of_the_machine_is_used(checkout: Checkout, uv: Path) -> None:
    uv.rename(checkout.tools / "uv")
    assert checkout.bootstrap().returncode == 0
    assert [name for name in checkout.take_log() if not name.startswith("UV_")] == ["venv", "uv"]


def test_failed_install_is_reported_and_made_anew(checkout: Checkout) -> None:
    checkout.add_python("python3.12")
    result = checkout.bootstrap(PIP_EXIT_CODE="1")
    assert result.returncode == 1
    assert "pip could not install" in result.stderr and "Remedy" in result.stderr
    assert checkout.take_log() == ["venv", "pip"]
    assert checkout.bootstrap().returncode == 0
    assert checkout.take_log() == ["venv", "pip"]


@pytest.mark.parametrize("left", ["nothing in it", "a python that does not start"])
def test_half_made_environment_is_made_anew(checkout: Checkout, left: str) -> None:
    checkout.add_python("python3.12")
    (checkout.path / ".venv/bin").mkdir(parents=True)
    if left != "nothing in it":
        checkout.add_program(checkout.path / ".venv/bin/python", "#!/bin/sh\nexit 1\n")
    assert checkout.bootstrap().returncode == 0
    assert checkout.take_log() == ["venv", "pip"]


def test_moved_checkout_gets_a_new_environment(checkout: Checkout) -> None:
    checkout.add_python("python3.12")
    checkout.bootstrap()
    checkout.take_log()
    checkout.path = checkout.path.rename(checkout.path.with_name("moved"))
    checkout.bootstrap()
    assert checkout.take_log() == ["venv", "pip"]


def test_other_python_on_request_makes_a_new_environment(checkout: Checkout) -> None:
    checkout.add_python("python3.12")
    checkout.bootstrap()
    checkout.take_log()
    other = checkout.add_python("other", "3.13")
    checkout.bootstrap(PYTHON=str(other))
    assert checkout.take_log() == ["venv", "pip"]
    checkout.bootstrap(PYTHON=str(other))
    checkout.bootstrap()
    assert checkout.take_log() == []
