"""Run log and pictures from real TensorBoard files."""

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch.utils.tensorboard import SummaryWriter

from trinity_megatron.tracking.report import draw_expert_load, draw_loss
from trinity_megatron.tracking.run_log import TOKENS_TAG, RunLog


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
