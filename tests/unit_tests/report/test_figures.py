"""What the pictures are drawn from: nothing is lost or hidden when a run is long or large."""

from pathlib import Path

import numpy as np
import pytest
from matplotlib.figure import Figure
from torch.utils.tensorboard import SummaryWriter

from tests.unit_tests.report.synthetic_run import write_run
from trinity_megatron.report import balance_figures, charts, figures, heat_maps
from trinity_megatron.report.history import RunHistory, bin_steps, mean_bins, sum_bins
from trinity_megatron.telemetry.tensorboard_log import RunLog


def history_of(folder: Path, kind: str = "balanced", **size: int) -> RunHistory:
    write_run(folder, kind, **size)
    return RunHistory(RunLog(folder))


@pytest.mark.parametrize("most", [1, 7, 100, 1000])
def test_no_token_is_lost_in_the_columns(most: int) -> None:
    steps = np.arange(10, 5010, 10)
    counts = np.random.default_rng(0).integers(0, 100, size=(500, 3, 8))
    edges, bins = bin_steps(steps, most)
    summed = sum_bins(counts, bins, len(edges) - 1)
    assert len(summed) == min(most, 500)
    np.testing.assert_array_equal(summed.sum(axis=0), counts.sum(axis=0))
    assert edges[0] == 5 and edges[-1] == 5005
    for index in range(len(summed)):
        inside = (edges[index] <= steps) & (steps < edges[index + 1])
        np.testing.assert_array_equal(summed[index], counts[inside].sum(axis=0))


def test_columns_are_time_and_a_gap_stays_a_gap() -> None:
    steps = np.concatenate([np.arange(1, 101), np.arange(201, 301)])
    edges, bins = bin_steps(steps, 30)
    mean = mean_bins(np.ones(200), bins, len(edges) - 1)
    assert np.isnan(mean).sum() == 10 and np.nansum(mean) == 20
    np.testing.assert_allclose(np.diff(edges), 10)


def test_a_change_of_the_logging_interval_makes_no_holes() -> None:
    steps = np.concatenate([np.arange(1, 101), np.arange(110, 1110, 10)])
    edges, bins = bin_steps(steps, 500)
    assert len(np.unique(bins)) == len(edges) - 1


def test_one_step() -> None:
    edges, bins = bin_steps(np.array([5]), 100)
    assert len(edges) == 2 and bins.tolist() == [0]


def test_one_expert_in_hundreds_is_seen() -> None:
    loads = np.ones((20, 256))
    loads[:, 77] = 9.0
    loads[:, 200] = 0.0
    rows = heat_maps.pool_experts(loads)
    assert rows.shape == (20, heat_maps.NUM_ROWS)
    assert (rows[:, -4:] == 9).all() and (rows[:, :4] == 0).all() and (rows[:, 4:-4] == 1).all()


def test_up_to_64_experts_keep_their_row() -> None:
    loads = np.random.default_rng(0).random((5, 64))
    assert heat_maps.pool_experts(loads) is loads


def axes_titles(figure: Figure | None) -> list[str]:
    assert figure is not None
    return [axis.get_title(loc="left") for axis in figure.axes if axis.get_title(loc="left")]


@pytest.mark.parametrize("size", [(3, 32), (30, 128)])
def test_every_layer_has_its_panel(size: tuple[int, int], tmp_path: Path) -> None:
    history = history_of(tmp_path, num_steps=12, num_layers=size[0], num_experts=size[1])
    names = [f"layer {number + 3}" for number in range(size[0])]
    assert axes_titles(balance_figures.expert_load_figure(history)) == names
    assert axes_titles(balance_figures.expert_bias_figure(history)) == names


def test_the_colours_are_those_of_the_loads(tmp_path: Path) -> None:
    history = history_of(tmp_path, "unbalanced", num_steps=12, num_layers=2, num_experts=8)
    figure = balance_figures.expert_load_figure(history)
    assert figure is not None
    counts = history.tokens_per_expert
    for layer, axis in enumerate(figure.axes[:2]):
        (image,) = axis.get_images()
        expected = counts[:, layer] / counts[:, layer].mean(axis=1, keepdims=True)
        np.testing.assert_allclose(image.get_array(), expected.T)
        assert image.get_extent()[:2] == [0.5, 12.5]


def test_losses_are_drawn_over_the_tokens(tmp_path: Path) -> None:
    history = history_of(tmp_path / "with", num_steps=20, tokens=1e5)
    figure = figures.loss_figure(history)
    assert figure is not None
    (axis,) = figure.axes
    # 20 steps of 1e5 tokens for each of 32 experts, 4 experts a token.
    assert axis.lines[0].get_xdata()[-1] == pytest.approx(20 * 1e5 * 32 / 4)  # type: ignore
    assert axis.get_xlabel() == "tokens"
    with SummaryWriter(tmp_path / "without") as writer:
        for step in range(1, 21):
            writer.add_scalar("lm loss", 1.0 / step, step)
    figure = figures.loss_figure(RunHistory(RunLog(tmp_path / "without")))
    assert figure is not None
    assert figure.axes[0].get_xlabel() == "step"
    np.testing.assert_allclose(figure.axes[0].lines[0].get_xdata(), range(1, 21))


def test_long_runs_are_averaged_and_their_spikes_kept(tmp_path: Path) -> None:
    with SummaryWriter(tmp_path) as writer:
        for step in range(1, 2001):
            writer.add_scalar("lm loss", 50.0 if step == 1234 else 2.0, step)
    figure = figures.loss_figure(RunHistory(RunLog(tmp_path)))
    assert figure is not None
    (axis,) = figure.axes
    assert len(axis.lines[0].get_xdata()) == 200
    assert axis.lines[0].get_ydata().max() == pytest.approx(2 + 48 / 10)  # type: ignore
    band = axis.collections[0].get_paths()[0].vertices
    assert band[:, 1].max() == 50  # type: ignore


@pytest.mark.parametrize(
    ("value", "text"),
    [(0.0, "0"), (950.0, "950"), (4096.0, "4.1K"), (2.5e9, "2.5B"), (17e12, "17T")],
)
def test_short_numbers(value: float, text: str) -> None:
    assert charts.short_number(value) == text


def test_every_group_of_gradients_has_a_line() -> None:
    from trinity_megatron.optimizer.param_groups import PARAM_TABLE

    assert set(figures.GRADIENT_GROUPS) == {row.group for row in PARAM_TABLE}
