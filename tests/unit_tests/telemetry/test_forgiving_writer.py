"""A run goes on when its TensorBoard files cannot be written."""

import resource
import subprocess
import sys
from pathlib import Path

import pytest
from tensorboard.summary.writer import event_file_writer
from torch.utils.tensorboard import SummaryWriter

from trinity_megatron.telemetry.forgiving_writer import ForgivingRecordWriter
from trinity_megatron.telemetry.tensorboard_log import RunLog

ROOT = Path(__file__).resolve().parents[3]


@pytest.fixture
def writer(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> SummaryWriter:
    monkeypatch.setattr(event_file_writer, "RecordWriter", ForgivingRecordWriter)
    return SummaryWriter(str(tmp_path), max_queue=2)


def run(script: str, folder: Path) -> subprocess.CompletedProcess[str]:
    """A process of its own, whose limits are its own too."""
    return subprocess.run(
        [sys.executable, "-c", script],
        cwd=folder,
        env={"PYTHONPATH": str(ROOT), "PATH": ""},
        capture_output=True,
        text=True,
        timeout=120,
    )


def test_nothing_changes_while_it_can_be_written(writer: SummaryWriter, tmp_path: Path) -> None:
    for step in range(50):
        writer.add_scalar("loss", 1.5 * step, step)
    writer.close()
    assert RunLog(tmp_path).scalars("loss") == {step: 1.5 * step for step in range(50)}


@pytest.mark.parametrize("limit", [0, 1000, 10_000])
def test_a_limit_that_is_met(limit: int, tmp_path: Path) -> None:
    """The process goes on, says it once, and what was written before can be read."""
    script = f"""
import resource, sys
from tensorboard.summary.writer import event_file_writer
from torch.utils.tensorboard import SummaryWriter
from trinity_megatron.telemetry.forgiving_writer import ForgivingRecordWriter
event_file_writer.RecordWriter = ForgivingRecordWriter
resource.setrlimit(resource.RLIMIT_FSIZE, ({limit}, {resource.RLIM_INFINITY}))
writer = SummaryWriter("log", max_queue=2)
for step in range(500):
    writer.add_scalar("loss", step, step)
    if step % 7 == 0:
        writer.flush()
writer.close()
writer.add_scalar("loss", 1000.0, 1000)  # torch begins another file
print("the training has ended")
"""
    result = run(script, tmp_path)
    assert (result.returncode, result.stdout) == (0, "the training has ended\n"), result.stderr
    assert "Traceback" not in result.stderr
    named = [line for line in result.stderr.splitlines() if "TensorBoard" in line]
    assert len(named) == 1 + (limit == 0) and "File too large" in named[0]
    read = RunLog(tmp_path / "log").scalars("loss")
    assert set(read) - {1000} == set(range(len(set(read) - {1000})))
    assert limit // 100 <= len(read) <= limit // 40


def test_nothing_is_missing_once_it_can_be_written_again(tmp_path: Path) -> None:
    """The disk is full in the middle of a record; some steps later it has room again."""
    script = f"""
import resource, time
from pathlib import Path
from tensorboard.summary.writer import event_file_writer
from torch.utils.tensorboard import SummaryWriter
from trinity_megatron.telemetry import forgiving_writer
forgiving_writer._RETRY_SECONDS = 0.05
event_file_writer.RecordWriter = forgiving_writer.ForgivingRecordWriter
def limit(size):
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, {resource.RLIM_INFINITY}))
writer = SummaryWriter("log", max_queue=2)
for step in range(600):
    if step in (100, 400):
        writer.flush()
        limit(sum(path.stat().st_size for path in Path("log").iterdir()) + 200)
    if step in (200, 500):
        limit({resource.RLIM_INFINITY})
    writer.add_scalar("loss", step, step)
    if step % 7 == 0:
        writer.flush()
        time.sleep(0.01)
writer.close()
"""
    result = run(script, tmp_path)
    assert result.returncode == 0 and "Traceback" not in result.stderr, result.stderr
    assert result.stderr.count("cannot be written: File too large") == 2
    assert result.stdout.count("is written again") == 2
    read = RunLog(tmp_path / "log").scalars("loss")
    assert read == {step: step for step in range(600)}
