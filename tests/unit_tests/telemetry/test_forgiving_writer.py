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
    result = subprocess.run(
        [sys.executable, "-c", script],
        cwd=tmp_path,
        env={"PYTHONPATH": str(ROOT), "PATH": ""},
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert (result.returncode, result.stdout) == (0, "the training has ended\n"), result.stderr
    assert "Traceback" not in result.stderr
    named = [line for line in result.stderr.splitlines() if "TensorBoard" in line]
    assert len(named) == 1 + (limit == 0) and "File too large" in named[0]
    read = RunLog(tmp_path / "log").scalars("loss")
    assert set(read) - {1000} == set(range(len(set(read) - {1000})))
    assert limit // 100 <= len(read) <= limit // 40
