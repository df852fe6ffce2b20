"""What W&B finds in the environment."""

import os
from pathlib import Path

import pytest

from trinity_megatron.tracking.wandb_run import prepare_wandb

NAMES = ("WANDB_MODE", "WANDB_RUN_ID", "WANDB_RESUME", "WANDB_SILENT", "WANDB_API_KEY")


@pytest.fixture(autouse=True)
def clean(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    for name in NAMES:
        monkeypatch.setenv(name, "")  # so that monkeypatch restores what the test sets
        monkeypatch.delenv(name)
    monkeypatch.setenv("NETRC", str(tmp_path / "netrc"))


def forget() -> None:
    """As in a new process."""
    for name in NAMES:
        os.environ.pop(name, None)


def test_a_resumed_run_keeps_its_id(tmp_path: Path) -> None:
    prepare_wandb(tmp_path / "run")
    first = os.environ["WANDB_RUN_ID"]
    assert first and os.environ["WANDB_RESUME"] == "allow"
    forget()
    prepare_wandb(str(tmp_path / "run"))
    assert os.environ["WANDB_RUN_ID"] == first
    forget()
    prepare_wandb(tmp_path / "other")
    assert os.environ["WANDB_RUN_ID"] != first


def test_offline_unless_logged_in(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    prepare_wandb(tmp_path)
    assert os.environ["WANDB_MODE"] == "offline"
    forget()
    monkeypatch.setenv("WANDB_API_KEY", "not-a-key")
    prepare_wandb(tmp_path)
    assert "WANDB_MODE" not in os.environ
    forget()
    (tmp_path / "netrc").write_text("machine api.wandb.ai login user password not-a-key\n")
    prepare_wandb(tmp_path)
    assert "WANDB_MODE" not in os.environ


def test_the_user_decides(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    given = {"WANDB_MODE": "online", "WANDB_RUN_ID": "mine", "WANDB_RESUME": "never"}
    for name, value in given.items():
        monkeypatch.setenv(name, value)
    prepare_wandb(tmp_path)
    assert {name: os.environ[name] for name in given} == given
    assert list(tmp_path.iterdir()) == []
