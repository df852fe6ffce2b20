"""Run log, pictures and page from real TensorBoard files."""

from collections.abc import Callable
from datetime import UTC, datetime, timedelta
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch.utils.tensorboard import SummaryWriter

from tests.unit_tests.report.synthetic_run import write_run
from trinity_megatron.errors import UserError
from trinity_megatron.report.pictures import PICTURES
from trinity_megatron.report.report import (
    Report,
    draw_expert_load,
    draw_loss,
    report_run,
    write_report,
)
from trinity_megatron.telemetry.tensorboard_log import TOKENS_TAG, RunLog


def write(folder: Path, steps: range, *, offset: float = 0.0, layers: int = 2) -> None:
    generator = torch.Generator().manual_seed(steps.start)
    with SummaryWriter(folder) as writer:
        for step in steps:
            writer.add_scalar("lm loss", 8.0 - step / 10 + offset, step)
            writer.add_scalar("learning-rate", 1e-3, step)
            if step % 10 == 0:
                writer.add_scalar("lm loss validation", 8.1 - step / 10, step)
            if layers:
                counts = torch.randint(0, 100, (layers, 8), generator=generator)
                writer.add_tensor(TOKENS_TAG, counts, step)


def test_a_resumed_run_is_one_log(tmp_path: Path) -> None:
    write(tmp_path, range(1, 31))
    write(tmp_path, range(21, 41), offset=0.5)  # continued from a checkpoint at step 20
    log = RunLog(tmp_path)
    loss = log.scalars("lm loss")
    assert list(loss) == list(range(1, 41))
    # TensorBoard keeps fp32.
    assert loss[20] == pytest.approx(6.0, rel=1e-6) and loss[21] == pytest.approx(6.4, rel=1e-6)
    counts = log.tensors(TOKENS_TAG)
    assert list(counts) == list(range(1, 41))
    assert all(value.shape == (2, 8) and value.dtype == np.int64 for value in counts.values())
    assert log.scalars("nothing") == {} == log.tensors("nothing")


def test_what_a_run_does_again_replaces_what_it_did(tmp_path: Path) -> None:
    write(tmp_path, range(1, 31))
    write(tmp_path, range(11, 15), offset=0.5)  # continued at step 10, and not as far
    log = RunLog(tmp_path)
    assert list(log.scalars("lm loss")) == list(range(1, 15)) == list(log.tensors(TOKENS_TAG))
    write(tmp_path, range(1, 4))  # begun anew
    assert list(RunLog(tmp_path).scalars("lm loss")) == [1, 2, 3]


def test_a_file_that_is_no_log(tmp_path: Path) -> None:
    (tmp_path / "events.out.tfevents.1").write_bytes(b"\xff" * 64)
    assert not report_run(tmp_path).pictures
    (tmp_path / "events.out.tfevents.1").unlink()
    write(tmp_path, range(1, 3))
    (tmp_path / "file").write_text("")
    with pytest.raises(ValueError, match="--out .*file is a file. Remedy: "):
        report_run(tmp_path, tmp_path / "file")


def test_no_log(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="no TensorBoard event file. Remedy: "):
        RunLog(tmp_path)


def pixels(path: Path) -> np.ndarray:
    with Image.open(path) as image:
        assert image.format == "PNG"
        return np.asarray(image.convert("RGB"))


@pytest.mark.parametrize("draw", [draw_loss, draw_expert_load])
@pytest.mark.parametrize("steps", [range(1, 61), range(1, 3)])
def test_pictures(draw: Callable[..., None], steps: range, tmp_path: Path) -> None:
    write(tmp_path / "log", steps)
    path = tmp_path / "made" / "picture.png"
    draw(RunLog(tmp_path / "log"), path)
    image = pixels(path)
    assert image.shape[0] > 500 and image.shape[1] > 1000
    # Curves and cells, not an empty sheet: text is grey, and two steps are a short, pale line.
    saturation = image.max(-1).astype(int) - image.min(-1)
    assert (saturation > 20).sum() > 200


def test_the_entropy_line_is_drawn(tmp_path: Path) -> None:
    write(tmp_path / "log", range(1, 61))
    log = RunLog(tmp_path / "log")
    draw_loss(log, tmp_path / "without.png")
    draw_loss(log, tmp_path / "with.png", unigram_entropy=5.0)
    assert not np.array_equal(pixels(tmp_path / "without.png"), pixels(tmp_path / "with.png"))


def test_a_dense_run_has_no_expert_load(tmp_path: Path) -> None:
    write(tmp_path, range(1, 4), layers=0)
    with pytest.raises(ValueError, match=TOKENS_TAG):
        draw_expert_load(RunLog(tmp_path), tmp_path / "picture.png")


class Page(HTMLParser):
    """Tags, links, pictures and text of a page; unbalanced tags fail."""

    VOID = {"meta", "link", "img", "br"}

    def __init__(self, path: Path) -> None:
        super().__init__()
        self.tags: list[str] = []
        self.images: list[dict[str, str | None]] = []
        self.addresses: list[str] = []
        self.ids: list[str] = []
        self.text = ""
        self._open: list[str] = []
        self.feed(path.read_text(encoding="utf-8"))
        assert self._open == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        if tag not in self.VOID:
            self._open.append(tag)
        values = dict(attrs)
        if tag == "img":
            self.images.append(values)
        self.ids += [value for name, value in attrs if name == "id" and value]
        self.addresses += [value or "" for name, value in attrs if name in ("src", "href")]
        assert not any(name.startswith("on") for name, _ in attrs)

    def handle_endtag(self, tag: str) -> None:
        assert self._open.pop() == tag

    def handle_data(self, data: str) -> None:
        if self._open and self._open[-1] != "style":
            self.text += data


@pytest.fixture(scope="module")
def full(tmp_path_factory: pytest.TempPathFactory) -> Report:
    run = tmp_path_factory.mktemp("runs") / "run <7>"
    write_run(run / "tensorboard", "drifting")
    return report_run(run)


def test_page_and_pictures_of_a_full_run(full: Report) -> None:
    assert full.page.name == "report.html" and full.page.parent.name == "report"
    assert [path.stem for path in full.pictures] == [picture.name for picture in PICTURES]
    assert all(pixels(path).shape[1] > 1000 for path in full.pictures)
    assert sorted(full.page.parent.iterdir()) == sorted([full.page, *full.pictures])
    page = Page(full.page)
    assert len(page.images) == len(PICTURES)
    assert "not recorded" not in page.text.lower()
    assert full.page.stat().st_size < 3_000_000


def test_the_page_needs_nothing_else(full: Report) -> None:
    page = Page(full.page)
    assert not {"script", "iframe", "object", "base", "form"} & set(page.tags)
    inside = [address for address in page.addresses if address.startswith("#")]
    assert all(a.startswith("data:") for a in page.addresses if a not in inside)
    assert inside and {address[1:] for address in inside} <= set(page.ids)
    text = full.page.read_text(encoding="utf-8")
    assert "@import" not in text and "url(" not in text and "http:" not in text.lower()


def test_the_page_says_what_it_is_and_how_it_went(full: Report) -> None:
    page = Page(full.page)
    assert page.text.strip().startswith("run <7>")
    assert full.verdict is not None and full.verdict.state == "drifting"
    assert full.verdict.text in page.text
    for words in (
        "step 60 of 60",
        "480,000 tokens",
        "3 MoE layers of 32 experts, 4 per token",
        "(max - mean) / mean",
        "32 / 4 - 1 = 7",
        "layer 3",  # from moe/layer_numbers
    ):
        assert words in page.text, words
    for image in page.images:
        assert len(image["alt"] or "") > 20
    assert "lm loss: 9" in (page.images[0]["alt"] or "")


def test_what_a_run_has_not_recorded_is_named(tmp_path: Path) -> None:
    write(tmp_path, range(1, 41))
    report = report_run(tmp_path, tmp_path / "out")
    page = Page(report.page)
    assert {path.stem for path in report.pictures} == {
        "loss",
        "schedule",
        "max_violation_map",
        "max_violation",
        "expert_load",
    }
    assert len(page.images) == len(report.pictures)
    assert "Left out: the run has not recorded router/max_logit" in page.text
    assert "Not recorded: lr/muon, lr/adamw, batch-size." in page.text
    assert "MoE layer 2" in page.text  # no numbers of layers
    assert report.page.parent == tmp_path / "out"


@pytest.mark.parametrize("steps", [range(1, 2), range(1, 5)])
def test_a_run_that_has_just_begun(steps: range, tmp_path: Path) -> None:
    write(tmp_path, steps)
    report = report_run(tmp_path)
    assert report.verdict is not None and report.verdict.state == "too short"
    assert "Too short" in Page(report.page).text


def test_a_run_without_experts_or_without_anything(tmp_path: Path) -> None:
    write(tmp_path / "dense", range(1, 41), layers=0)
    report = report_run(tmp_path / "dense")
    assert report.verdict is None and "No verdict" in Page(report.page).text
    SummaryWriter(tmp_path / "empty").close()
    report = report_run(tmp_path / "empty")
    assert report.pictures == () and report.verdict is None
    assert "nothing is recorded yet" in Page(report.page).text


def test_values_that_are_not_finite(tmp_path: Path) -> None:
    with SummaryWriter(tmp_path) as writer:
        for step in range(1, 21):
            writer.add_scalar("lm loss", float("nan") if step > 17 else 2.0, step)
            writer.add_scalar("grad-norm", float("inf"), step)
    page = Page(report_run(tmp_path).page)
    assert "The loss was not finite in 3 of 20 logged steps, first at step 18." in page.text
    assert "The gradient norm was not finite in 20 of 20" in page.text


def test_pictures_of_an_earlier_report_do_not_stay(tmp_path: Path) -> None:
    write_run(tmp_path / "one", "balanced", num_steps=12)
    write(tmp_path / "two", range(1, 13), layers=0)
    report_run(tmp_path / "one", tmp_path / "out")
    assert (tmp_path / "out" / "expert_bias.png").exists()
    report = report_run(tmp_path / "two", tmp_path / "out")
    assert sorted((tmp_path / "out").glob("*.png")) == sorted(report.pictures)


def test_the_entropy_reaches_the_page(tmp_path: Path) -> None:
    write(tmp_path / "log", range(1, 41), layers=0)
    log = RunLog(tmp_path / "log")
    one = write_report(log, tmp_path / "without", title="run")
    other = write_report(log, tmp_path / "with", title="run", unigram_entropy=5.0)
    assert not np.array_equal(pixels(one.pictures[0]), pixels(other.pictures[0]))


def test_the_period_is_that_of_the_events(tmp_path: Path) -> None:
    first = datetime(2024, 3, 1, 23, 30, tzinfo=UTC)
    for part in range(2):  # a resumed run has two files
        with SummaryWriter(tmp_path) as writer:
            for step in range(3):
                time = first + timedelta(hours=part * 10 + step)
                writer.add_scalar("lm loss", 1.0, part * 10 + step, walltime=time.timestamp())
                writer.add_tensor(TOKENS_TAG, torch.ones(2, 8), step, walltime=time.timestamp())
    log = RunLog(tmp_path)
    assert log.period() == (first, first + timedelta(hours=12))
    page = write_report(log, tmp_path / "a", title="run", period=(first, first + timedelta(1)))
    assert "2024-03-01 23:30 to 2024-03-02 23:30 UTC" in Page(page.page).text
    page = write_report(log, tmp_path / "b", title="run", period=(first, first))
    assert "2024-03-01 23:30 to 23:30 UTC" in Page(page.page).text


def test_a_torn_event_file(tmp_path: Path) -> None:
    write(tmp_path, range(1, 41))
    (path,) = tmp_path.glob("events.out.tfevents.*")
    whole = RunLog(tmp_path).period()
    path.write_bytes(path.read_bytes()[:-15])  # killed while writing
    assert RunLog(tmp_path).period() == whole
    assert report_run(tmp_path).verdict is not None


def test_no_event_file(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=f"RUN_DIR {tmp_path} has no .* Remedy: "):
        report_run(tmp_path)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("sizes", [[10**6, 10**6, 10**6], [-1], [2**62, 4]])
def test_a_tensor_that_says_it_is_huge(tmp_path: Path, sizes: list[int]) -> None:
    from tensorboard.compat.proto.event_pb2 import Event
    from tensorboard.compat.proto.summary_pb2 import Summary
    from tensorboard.compat.proto.tensor_pb2 import TensorProto
    from tensorboard.compat.proto.tensor_shape_pb2 import TensorShapeProto
    from tensorboard.summary.writer.event_file_writer import EventFileWriter

    shape = TensorShapeProto(dim=[TensorShapeProto.Dim(size=size) for size in sizes])
    tensor = TensorProto(dtype=1, tensor_shape=shape, float_val=[1.0])  # for all of them
    writer = EventFileWriter(str(tmp_path))
    value = Summary.Value(tag=TOKENS_TAG, tensor=tensor)
    writer.add_event(Event(step=1, summary=Summary(value=[value])))
    writer.close()
    with pytest.raises(UserError, match=f"{TOKENS_TAG} has the shape"):
        RunLog(tmp_path).tensors(TOKENS_TAG)
