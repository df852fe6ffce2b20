"""TensorBoard's own reader over the files of a run with several starts."""

from collections.abc import Iterable
from pathlib import Path

import pytest
from tensorboard.backend.event_processing.plugin_event_multiplexer import EventMultiplexer
from torch.utils.tensorboard import SummaryWriter

from trinity_megatron.cpu_host.cuda_stand_ins import enter_host
from trinity_megatron.telemetry.tensorboard_log import RunLog

enter_host()

from trinity_megatron.training.run_writer import BY_SAMPLES, RunWriter  # noqa: E402

LOSS, VALIDATION = "lm loss", "lm loss validation"
BATCH = 4


def validate(writer: SummaryWriter, step: int, value: float) -> None:
    writer.add_scalar(VALIDATION, value, step)
    writer.add_scalar(f"{VALIDATION} vs samples", value, BATCH * step)


def train(folder: Path, done: int, last: int, *, killed: bool = False) -> None:
    """A start of a run as Megatron writes it, with a validation every fifth step and at the end."""
    writer = RunWriter(str(folder), max_queue=10)
    writer.begin(done, BATCH * done)
    writer.add_text("seed", "1", done)
    for step in range(done + 1, last + 1):
        writer.add_scalar(LOSS, 1 / step, step)
        writer.add_scalar(f"{LOSS} vs samples", 1 / step, BATCH * step)
        if step % 5 == 0:
            validate(writer, step, 1.0)
    if not killed:
        validate(writer, last, 2.0)
        writer.end()
    writer.close()
    put_in_order(folder)


def put_in_order(folder: Path) -> None:
    """Name the files by their order: by its name one is as old as the second it was begun in."""
    for file in folder.rglob("events.out.tfevents.*"):
        if not file.name.endswith(".start"):
            number = len(list(file.parent.glob("*.start")))
            file.rename(file.with_name(f"events.out.tfevents.{number:010d}.start"))


def read(folder: Path) -> dict[str, dict[str, list[int]]]:
    """Steps by run and tag, as TensorBoard shows them."""
    everything = {"scalars": 0, "text": 0}
    reader = EventMultiplexer(tensor_size_guidance=everything).AddRunsFromDirectory(str(folder))
    reader.Reload()
    runs: dict[str, dict[str, list[int]]] = {}
    for run in reader.Runs():
        found = reader.GetAccumulator(run)
        runs[run] = {tag: [e.step for e in found.Tensors(tag)] for tag in found.Tags()["tensors"]}
    return runs


def check(folder: Path, last: int, validated: Iterable[int]) -> None:
    runs, validated = read(folder), list(validated)
    steps = list(range(1, last + 1))
    assert runs["."][LOSS] == steps and runs["."][VALIDATION] == validated
    by_samples = runs[BY_SAMPLES]
    assert by_samples[f"{LOSS} vs samples"] == [BATCH * step for step in steps]
    assert by_samples[f"{VALIDATION} vs samples"] == [BATCH * step for step in validated]
    texts = runs["."]["seed/text_summary"]
    assert len(texts) == len(set(texts))
    assert list(RunLog(folder).scalars(LOSS)) == steps


@pytest.mark.parametrize(
    ("starts", "validated"),
    [
        ([(0, 12, False)], [5, 10, 12]),
        ([(0, 10, False)], [5, 10]),  # the last step is evaluated twice
        ([(0, 10, False), (10, 20, False)], [5, 10, 15, 20]),
        ([(0, 13, True), (8, 20, False)], [5, 10, 15, 20]),
        ([(0, 9, True), (8, 12, True), (8, 15, True), (12, 16, False)], [5, 10, 15, 16]),
        ([(0, 4, True), (0, 6, False)], [5, 6]),  # killed before its first save
        ([(0, 20, False), (8, 11, False)], [5, 10, 11]),  # --ckpt-step 8
        ([(0, 10, False), (10, 10, False)], [5, 10]),  # nothing left to train
    ],
)
def test_each_step_once(
    starts: list[tuple[int, int, bool]], validated: list[int], tmp_path: Path
) -> None:
    for done, last, killed in starts:
        train(tmp_path, done, last, killed=killed)
    check(tmp_path, starts[-1][1], validated)


def test_the_later_validation_of_the_last_step_counts(tmp_path: Path) -> None:
    train(tmp_path, 0, 10)
    assert RunLog(tmp_path).scalars(VALIDATION) == {5: 1.0, 10: 2.0}


def test_a_start_with_nothing_to_train_over_files_of_an_earlier_release(tmp_path: Path) -> None:
    writer = SummaryWriter(str(tmp_path))
    validate(writer, 10, 1.0)
    writer.close()
    put_in_order(tmp_path)
    train(tmp_path, 10, 10)
    runs = read(tmp_path)
    assert runs["."][VALIDATION] == [10]
    assert runs[BY_SAMPLES][f"{VALIDATION} vs samples"] == [10 * BATCH]


def test_files_of_an_earlier_release(tmp_path: Path) -> None:
    writer = SummaryWriter(str(tmp_path))
    for step in range(1, 13):
        writer.add_scalar(LOSS, 1.0, step)
    writer.close()
    put_in_order(tmp_path)
    train(tmp_path, 8, 14)
    assert read(tmp_path)["."][LOSS] == list(range(1, 15))
