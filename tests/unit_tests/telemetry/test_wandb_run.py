"""The guarded W&B writer on real wandb, offline and with a small server of our own."""

import contextlib
import json
import os
import shutil
import signal
import socket
import subprocess
import time
from argparse import Namespace
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from tests.alarm_receiver import TOKEN
from tests.functional_tests.wandb_server import Server
from trinity_megatron.process.alarms import VARIABLE
from trinity_megatron.telemetry import wandb_run, wandb_writer
from trinity_megatron.telemetry.code_version import read_git_commit
from trinity_megatron.telemetry.wandb_file import last_history_step, read_records
from trinity_megatron.telemetry.wandb_run import (
    WandbUnavailableError,
    check_folder,
    find_or_make_id,
    json_values,
)
from trinity_megatron.telemetry.wandb_writer import WandbWriter, open_writer

Open = Callable[..., WandbWriter]
KEY = "a" * 40


@pytest.fixture(autouse=True)
def clean(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    for name in list(os.environ):
        if name.startswith("WANDB_"):
            monkeypatch.delenv(name)
    monkeypatch.setenv("NETRC", str(tmp_path / "netrc"))
    monkeypatch.setenv("WANDB_CONFIG_DIR", str(tmp_path / "config"))
    monkeypatch.setenv("WANDB_ERROR_REPORTING", "false")


@pytest.fixture
def start(tmp_path: Path) -> Iterator[Open]:
    """Open the writer of a training whose folders are in ``tmp_path``."""
    writers = []

    def run(**overrides: Any) -> WandbWriter:
        args = {
            "rank": 0,
            "world_size": 1,
            "wandb_project": "p",
            "wandb_exp_name": "n",
            "wandb_entity": "",
            "wandb_save_dir": str(tmp_path / "w"),
            "save": str(tmp_path / "checkpoints"),
            "out": None,
            "tensorboard_dir": "TB",
            "lr": 0.5,
            "params_dtype": torch.float32,
        }
        writer = open_writer(Namespace(**{**args, **overrides}))
        assert writer is not None
        writers.append(writer)
        return writer

    yield run
    for writer in writers:
        writer.finish()


def test_nothing_is_to_be_seen_before_the_start(
    start: Open, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    writer = start(wandb_save_dir=str(tmp_path / "w"))
    writer.config.update({"slurm_job_name": "N/A"})
    with pytest.raises(ValueError), writer.kept_open():
        raise ValueError("refused")
    writer.log({"loss": 1.0}, 1)
    assert not (tmp_path / "w").exists() and not (tmp_path / "checkpoints").exists()
    assert not said(caplog)


def wait_until(condition: Callable[[], Any], seconds: float = 30) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.01)


def wait_for_row(folder: Path, step: int) -> None:
    def is_there() -> bool:
        return any(f'"step": {step},' in f.read_text() for f in folder.glob("wandb/journal-*"))

    wait_until(is_there)


def files(folder: Path) -> list[Path]:
    return sorted(folder.glob("wandb/*run-2*/*.wandb"))


def contents(file: Path) -> list[Any]:
    from wandb.proto.wandb_internal_pb2 import Record

    return [Record.FromString(content) for content in read_records(file.read_bytes())]


def history(file: Path) -> dict[int, dict[str, Any]]:
    rows = [r.history for r in contents(file) if r.WhichOneof("record_type") == "history"]
    return {
        row.step.num: {"/".join(i.nested_key) or i.key: json.loads(i.value_json) for i in row.item}
        for row in rows
    }


def said(caplog: pytest.LogCaptureFixture) -> list[str]:
    names = ("trinity_megatron.telemetry.wandb_run", "trinity_megatron.telemetry.wandb_writer")
    return [r.getMessage() for r in caplog.records if r.name in names]


def test_values_of_a_step_are_one_row(
    start: Open,
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv(VARIABLE, f"https://hooks.example/{TOKEN}")
    writer = start()
    for step in range(1, 6):
        writer.log({"lm loss": torch.tensor([8.0 - step])}, step)
        writer.log({"lr": 0.25, "count": np.int64(step)}, step)
    writer.log({"late": 1, "said": "rank 2 (host a)"})
    writer.config.update({"slurm_job_name": "N/A"})
    writer.finish()
    writer.finish()
    writer.log({"lost": 1}, 7)
    (file,) = files(tmp_path / "w")
    rows = history(file)
    assert list(rows) == [1, 2, 3, 4, 5] and not said(caplog)
    assert all(row["lm loss"] == 8.0 - step for step, row in rows.items())
    assert all(row["lr"] == 0.25 and row["count"] == step for step, row in rows.items())
    assert rows[5]["late"] == 1 and rows[5]["said"] == "rank 2 (host a)"
    names = {name for row in rows.values() for name in row if not name.startswith("_")}
    assert names == {"lm loss", "lr", "count", "late", "said"}
    written = [path.read_bytes() for path in (tmp_path / "w").rglob("*") if path.is_file()]
    assert len(written) > 2 and not any(TOKEN.encode() in content for content in written)
    assert last_history_step(file) == 5
    updates = [r.run.config for r in contents(file) if r.HasField("run")]
    config = {item.key: json.loads(item.value_json) for item in updates[0].update}
    assert config["lr"] == 0.5 and "params_dtype" not in config
    assert config["versions"]["torch"] == torch.__version__
    assert config["git_commit"] == read_git_commit(Path.cwd())
    assert any(i.key == "slurm_job_name" for r in contents(file) for i in r.config.update)


def test_what_megatron_does_with_a_writer(start: Open, tmp_path: Path) -> None:
    import wandb
    from megatron.training import global_vars, wandb_utils

    checkpoint, tracker = tmp_path / "checkpoints" / "iter_0000005", tmp_path / "latest.txt"
    checkpoint.mkdir(parents=True)
    (checkpoint / "weights").write_text("...")
    tracker.write_text("5")
    writer = start()
    assert writer == wandb and writer != None and writer is not wandb  # noqa: E711  in timers.write
    assert writer.Histogram is wandb.Histogram
    global_vars._GLOBAL_WANDB_WRITER = writer
    try:
        wandb_utils.on_load_checkpoint_success(str(checkpoint), str(tmp_path / "checkpoints"))
        wandb_utils.on_save_checkpoint_success(
            str(checkpoint), str(tracker), str(tmp_path / "checkpoints"), 5
        )
    finally:
        global_vars._GLOBAL_WANDB_WRITER = None
    writer.log_image("picture", np.zeros((4, 6, 3), np.uint8), 5)
    writer.finish()
    (file,) = files(tmp_path / "w")
    (artifact,) = [
        r.request.log_artifact.artifact for r in contents(file) if r.HasField("request")
    ] or [r.artifact for r in contents(file) if r.HasField("artifact")]
    assert artifact.name == "checkpoints" and artifact.type == "model"
    row = history(file)[5]
    assert (row["picture/width"], row["picture/height"]) == (6, 4)
    assert (file.parent / "files" / row["picture/path"]).is_file()


def test_a_resumed_run_goes_on(
    start: Open, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    first = start()
    for step in range(1, 31):
        first.log({"x": step}, step)
    first.finish()
    second = start()
    for step in range(21, 41):
        second.log({"x": step, "y": 1}, step)
    second.finish()
    parts = files(tmp_path / "w")
    assert [list(history(part)) for part in parts] == [list(range(1, 31)), list(range(31, 41))]
    (run_id,) = {part.stem for part in parts}
    assert run_id == "run-" + (tmp_path / "checkpoints" / "wandb_run_id").read_text().strip()
    (message,) = said(caplog)
    assert "up to 30" in message and "steps 21 to 30" in message


def test_rows_that_wandb_had_not_written_are_sent_after_a_kill(start: Open, tmp_path: Path) -> None:
    first = start()
    for step in range(1, 31):
        first.log({"x": step}, step)
    first.finish()
    (file,) = files(tmp_path / "w")
    data = file.read_bytes()
    whole = list(read_records(data))
    end = data.index(whole[-1])
    while last_history_step(file) > 24:  # as a kill leaves it
        end -= 200
        file.write_bytes(data[:end])
    kept = last_history_step(file)
    second = start()
    second.log({"x": 29}, 29)
    second.finish()
    steps = [step for part in files(tmp_path / "w") for step in history(part)]
    assert kept >= 20 and steps == list(range(1, 30))


def test_the_user_decides(start: Open, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WANDB_RUN_ID", "mine")
    writer = start()
    writer.log({"x": 1}, 1)
    writer.finish()
    assert [file.name for file in files(tmp_path / "w")] == ["run-mine.wandb"]
    assert not (tmp_path / "checkpoints").exists()
    monkeypatch.setenv("WANDB_MODE", "disabled")
    flags = Namespace(wandb_project="p", rank=0, world_size=1)
    assert open_writer(flags) is None
    assert open_writer(Namespace(wandb_project="", rank=0, world_size=1)) is None
    assert open_writer(Namespace(wandb_project="p", rank=0, world_size=2)) is None


def test_the_run_outlives_megatron(start: Open, tmp_path: Path) -> None:
    writer = start()
    with writer.kept_open():
        writer.log({"x": 1}, 1)
        writer.finish()
        writer.log({"end": 1}, 1)
    assert not writer.is_on
    with pytest.raises(SystemExit), start().kept_open() as other:
        other.log({"x": 2}, 2)
        raise SystemExit(3)
    codes = [
        [r.exit.exit_code for r in contents(file) if r.HasField("exit")]
        for file in files(tmp_path / "w")
    ]
    assert codes == [[0], [1]] and history(files(tmp_path / "w")[0])[1]["end"] == 1


def own_process() -> int:
    """The process that wandb runs beside this one; the latest of them."""
    tasks = Path("/proc/self/task").glob("*/children")
    children = [int(pid) for task in tasks for pid in task.read_text().split()]
    return max(p for p in children if "wandb-core" in Path(f"/proc/{p}/comm").read_text())


def test_a_server_that_answers_nothing_delays_nothing(
    start: Open, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setenv("WANDB_API_KEY", KEY)
    monkeypatch.setenv("WANDB_INIT_TIMEOUT", "100")
    monkeypatch.setenv("WANDB_FINISH_TIMEOUT", "0")
    monkeypatch.setattr(wandb_writer, "_SECONDS_BESIDE_UPLOAD", 0.3)
    monkeypatch.setattr(wandb_writer, "_CAPACITY", 10)
    with socket.create_server(("127.0.0.1", 0)) as listener:
        monkeypatch.setenv("WANDB_BASE_URL", f"http://127.0.0.1:{listener.getsockname()[1]}")
        writer = start()
        writer.start()
        kept = [listener.accept() for _ in range(2)]  # it is asked whether it is there, and again
        begin = time.monotonic()
        for step in range(1000):
            writer.log({"x": 1.0}, step)
        assert time.monotonic() - begin < 0.1
        writer.finish()
        assert time.monotonic() - begin < 2 and kept
    full, late = said(caplog)
    assert "10 values wait" in full and "from step 10" in full
    assert "did not finish within 0 s" in late and "TensorBoard" in late


@pytest.mark.parametrize("has_failed", [False, True])
def test_a_stuck_process_of_wandb_does_not_hold_up_the_end(
    has_failed: bool,
    start: Open,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    limit = "_SECONDS_AFTER_FAILURE" if has_failed else "_SECONDS_TO_CLOSE_OFFLINE"
    monkeypatch.setattr(wandb_writer, limit, 1)
    writer = start()
    with writer.kept_open():
        writer.log({"x": 1}, 1)
        wait_for_row(tmp_path / "w", 1)
        pid = own_process()
        os.kill(pid, signal.SIGSTOP)
        begin = time.monotonic()
        try:
            with contextlib.suppress(ZeroDivisionError), writer.kept_open():
                _ = 1 / (not has_failed)
            assert time.monotonic() - begin < 3
        finally:
            os.kill(pid, signal.SIGKILL)
    (message,) = said(caplog)
    assert "did not finish within 1 s" in message and "`wandb sync " in message


def test_an_artifact_that_fails_stops_no_metrics(
    start: Open, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    writer = start()
    for step in range(1, 4):
        writer.log({"x": step}, step)
        artifact = writer.Artifact("no good name!", type="model")
        writer.run.log_artifact(artifact, aliases=["x"])
    writer.finish()
    assert list(history(files(tmp_path / "w")[0])) == [1, 2, 3]
    (message,) = said(caplog)
    assert "no artifacts" in message and "ValueError" in message


def test_a_server_out_of_reach(
    start: Open, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setenv("WANDB_API_KEY", KEY)
    monkeypatch.setenv("WANDB_BASE_URL", "http://127.0.0.1:9")
    writer = start()
    writer.log({"x": 1}, 1)
    writer.finish()
    (file,) = files(tmp_path / "w")
    assert "offline-run" in str(file) and list(history(file)) == [1]
    (message,) = said(caplog)
    command = message.split("`")[1].removeprefix("wandb sync ")
    assert "http://127.0.0.1:9" in message and "refused" in message
    assert subprocess.check_output(f"ls -d {command}", shell=True, text=True).split() == [
        str(file.parent)
    ]


@pytest.mark.parametrize("fault", ["key", "no login", "silent server"])
def test_offline_instead(
    fault: str,
    start: Open,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    listener = socket.create_server(("127.0.0.1", 0))
    monkeypatch.setenv("WANDB_BASE_URL", f"http://127.0.0.1:{listener.getsockname()[1]}")
    monkeypatch.setenv("WANDB_INIT_TIMEOUT", "1")
    monkeypatch.setenv("WANDB_MODE", "online")
    if fault != "no login":
        monkeypatch.setenv("WANDB_API_KEY", "short" if fault == "key" else KEY)
    writer = start()
    writer.log({"x": 1}, 1)
    writer.finish()
    listener.close()
    (file,) = [f for f in files(tmp_path / "w") if history(f)]
    assert "offline-run" in str(file)
    (message,) = said(caplog)
    expected = {"key": "40", "no login": "`wandb login`", "silent server": "did not start"}
    assert expected[fault] in message and "kept offline" in message


def online(monkeypatch: pytest.MonkeyPatch, server: Server) -> None:
    monkeypatch.setenv("WANDB_API_KEY", KEY)
    monkeypatch.setenv("WANDB_BASE_URL", server.url)


def test_online(
    start: Open, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    with Server(last_step=20).running() as server:
        online(monkeypatch, server)
        writer = start()
        for step in range(16, 31):
            writer.log({"x": step}, step)
        writer.finish()
        assert writer.url and server.url in writer.url
    assert [row["_step"] for row in server.rows] == list(range(21, 31))
    (message,) = said(caplog)
    assert "steps 16 to 20" in message and writer.run.entity == "e"


def test_what_was_kept_offline_goes_first(
    start: Open, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    first = start()
    first.log({"x": 1}, 1)
    first.finish()
    with Server().running() as server:
        online(monkeypatch, server)
        second = start()
        second.log({"x": 2}, 2)
        second.finish()
    assert not server.rows and [list(history(f)) for f in files(tmp_path / "w")] == [[1], [2]]
    (message,) = said(caplog)
    assert "sent first" in message and "offline-run-*" in message


def test_a_server_that_dies(
    start: Open, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setenv("WANDB_FINISH_TIMEOUT", "2")
    with Server().running() as server:
        online(monkeypatch, server)
        writer = start()
        writer.log({"x": 1}, 1)
        wait_for_row(tmp_path / "w", 1)
    for step in range(2, 10):
        writer.log({"x": step}, step)
    begin = time.monotonic()
    writer.finish()
    assert time.monotonic() - begin < 10
    (file,) = files(tmp_path / "w")
    (message,) = said(caplog)
    assert "did not take all data within 2 s" in message
    assert f"`wandb sync --include-online {file.parent}`" in message
    assert list(history(file)) == list(range(1, 10))


def test_the_folder_disappears(
    start: Open, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    writer = start()
    writer.log({"x": 1}, 1)
    wait_for_row(tmp_path / "w", 1)
    shutil.rmtree(tmp_path / "w" / "wandb")
    for step in range(2, 6):
        writer.log({"x": step}, step)
    wait_until(lambda: not writer.is_on)
    writer.log({"x": 9}, 9)
    writer.finish()
    (message,) = said(caplog)
    assert str(tmp_path / "w" / "wandb") in message and "TensorBoard" in message


def test_the_process_of_wandb_dies(
    start: Open, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    writer = start()
    writer.log({"x": 1}, 1)
    wait_for_row(tmp_path / "w", 1)
    os.kill(own_process(), signal.SIGKILL)
    for step in range(2, 200):
        writer.log({"x": step}, step)
        time.sleep(0.005)
    writer.finish()
    (message,) = said(caplog)
    assert "W&B " in message and "TensorBoard" in message


def test_a_folder_that_is_no_folder(
    start: Open, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "w").write_text("a file")
    writer = start()
    writer.log({"x": 1}, 1)
    writer.finish()
    (message,) = said(caplog)
    assert "Not a directory" in message or "exists" in message
    assert str(tmp_path / "w") in message and "--wandb-save-dir" in message


def test_a_full_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    check_folder(tmp_path / "made")
    assert list((tmp_path / "made").iterdir()) == []
    monkeypatch.setattr(wandb_run, "MIN_FREE_BYTES", 1 << 62)
    with pytest.raises(WandbUnavailableError, match="is full .*Remedy: "):
        check_folder(tmp_path)


def test_the_id_lies_with_the_checkpoints(tmp_path: Path) -> None:
    save, out = tmp_path / "save", tmp_path / "out"
    made = find_or_make_id([save, out])
    assert (save / "wandb_run_id").read_text() == made + "\n" and not out.exists()
    assert find_or_make_id([save, out]) == made != find_or_make_id([out])
    (save / "wandb_run_id").write_text("")  # cut by a kill
    assert find_or_make_id([save]) not in ("", made)
    assert find_or_make_id([]) != find_or_make_id([])


def test_a_server_behind_a_proxy(start: Open, monkeypatch: pytest.MonkeyPatch) -> None:
    with Server().running() as server:
        monkeypatch.setenv("WANDB_API_KEY", KEY)
        monkeypatch.setenv("WANDB_BASE_URL", "http://server.invalid")
        monkeypatch.setenv("http_proxy", server.url)
        writer = start()
        writer.log({"x": 1}, 1)
        writer.finish()
    assert [row["_step"] for row in server.rows] == [1]


def test_code_and_values(tmp_path: Path) -> None:
    assert read_git_commit(tmp_path) is None
    assert json_values({"a": [1, None], "b": print, "c": {1: torch}}) == {"a": [1, None]}


def test_the_end_of_a_long_file(start: Open, tmp_path: Path) -> None:
    writer = start()
    for step in range(1, 3001):
        writer.log({f"key{i}": step + i / 7 for i in range(20)}, step)
    writer.finish()
    (file,) = files(tmp_path / "w")
    assert file.stat().st_size > 3 << 20
    assert last_history_step(file) == 3000 and list(history(file)) == list(range(1, 3001))
    data = file.read_bytes()
    for cut in (len(data) - 5, len(data) // 2, 32768 + 3, 5):
        file.write_bytes(data[:cut])
        assert last_history_step(file) == max(history(file), default=-1)
    assert last_history_step(tmp_path / "nothing") == -1


def test_the_key_is_in_no_file_and_no_message(
    start: Open, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setenv("WANDB_API_KEY", KEY)
    monkeypatch.setenv("WANDB_BASE_URL", "http://user:pass-word@127.0.0.1:9")
    monkeypatch.setenv("WANDB_INIT_TIMEOUT", "1")
    writer = start()
    writer.start()
    writer.log({"loss": 1.0}, 1)
    wait_for_row(tmp_path / "w", 1)
    writer.finish()
    assert files(tmp_path / "w")  # it was kept
    kept = [path for path in tmp_path.rglob("*") if path.is_file()]
    for secret in (KEY, "pass-word"):
        assert [path for path in kept if secret.encode() in path.read_bytes()] == []
        assert secret not in caplog.text
    assert "http://127.0.0.1:9 is out of reach" in caplog.text


@pytest.mark.parametrize("text", ["../../etc", "a/b", "a" * 200, "ü", "a b", "*"])
def test_an_id_that_is_none(
    start: Open, tmp_path: Path, caplog: pytest.LogCaptureFixture, text: str
) -> None:
    from trinity_megatron.telemetry.wandb_run import ID_FILE

    folder = tmp_path / "checkpoints"
    folder.mkdir()
    (folder / ID_FILE).write_text(text)
    writer = start()
    writer.start()
    writer.finish()
    assert "which is no id of a run" in caplog.text and not files(tmp_path / "w")
