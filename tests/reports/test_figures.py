"""Pictures keep the pixels, count what they leave out, and draw quantities with known values."""

from __future__ import annotations

import base64
import io

import numpy as np
import pytest
import torch
from matplotlib import image
from matplotlib.figure import Figure
from numpy.typing import NDArray

from ppl_vaebm.errors import InputError
from ppl_vaebm.inference.diagnostics.convergence import Convergence
from ppl_vaebm.reports import chains as figures_chains
from ppl_vaebm.reports import evaluation as figures_evaluation
from ppl_vaebm.reports import figures
from ppl_vaebm.reports import gallery as figures_svi
from ppl_vaebm.reports import kernels as figures_kernels
from ppl_vaebm.reports import samples as figures_samples
from ppl_vaebm.runs.gallery import images_per_row
from ppl_vaebm.runs.run import PRIOR, RECONSTRUCTIONS, TRAVERSAL


def normals(*shape: int) -> NDArray[np.float64]:
    return np.random.default_rng(3).normal(size=shape)


def pixels_of(png: bytes) -> NDArray[np.uint8]:
    return np.round(image.imread(io.BytesIO(png))[..., :3] * 255).astype(np.uint8)


def test_images_are_drawn_pixel_by_pixel() -> None:
    x = np.zeros((12, 1, 3, 2))
    x[0] = -1.0
    x[1] = 5.0  # cut off at white
    x[2, 0, 1, 0] = np.nan
    saved = pixels_of(figures_samples.samples_png(torch.from_numpy(x)))
    # Two rows of ten images of 3 x 2, one white pixel apart: 7 x 29, enlarged 12 times to pass 320.
    assert saved.shape == (7 * 12, 29 * 12, 3)
    pixels = saved[::12, ::12]
    np.testing.assert_array_equal(saved, pixels.repeat(12, 0).repeat(12, 1))
    expected = np.full((7, 29, 3), 255)
    for index in range(12):
        top, left = 4 * (index // 10), 3 * (index % 10)
        expected[top : top + 3, left : left + 2] = 128
    expected[:3, :2] = 0
    expected[:3, 3:5] = 255
    expected[1, 6] = (255, 0, 255)
    np.testing.assert_array_equal(pixels, expected)


def test_colour_images_keep_their_channels() -> None:
    x = np.full((1, 3, 4, 4), -1.0)
    x[:, 1] = 1.0
    assert (figures_samples.image_grid(x) == [0, 255, 0]).all()


def test_points_are_drawn_as_a_square_picture() -> None:
    png = figures_samples.samples_png(torch.from_numpy(normals(100, 2)))
    assert pixels_of(png).shape[:2] == (5 * figures.DPI, 5 * figures.DPI)


def test_points_outside_the_frame_of_the_data_are_counted() -> None:
    data = np.array([[0.0, 0.0], [1.0, 1.0]])
    stray = np.array([[0.5, 0.5], [9.0, 0.5], [np.nan, 0.5]])
    figure = figures_samples._scatters({"data": np.concatenate([data, data]), "VAE": stray})
    titles = [ax.get_title() for ax in figure.axes]
    assert titles[:2] == ["data: 3 points", "VAE: 3 points, 2 of them outside"]


@pytest.mark.parametrize("shape", [(5, 3), (0, 2), (5, 2, 4, 4)])
def test_arrays_of_another_shape_are_refused(shape: tuple[int, ...]) -> None:
    with pytest.raises(InputError, match="found shape"):
        figures_samples.samples_png(np.zeros(shape))


def test_a_figure_of_curves_has_a_panel_per_known_quantity() -> None:
    records: list[figures.Record] = [
        {"step": 1, "loss": 2.0, "kl_nats": 1.0, "kl_nats/z1": 0.4, "unheard_of": 1.0},
        {"step": 5, "validation_elbo_nats": -1.5, "loss": None},
    ]
    figure = figures._curves(records, figures.SVI_PANELS)
    curves = {
        str(line.get_label()): line.get_xydata().tolist()  # type: ignore[union-attr]
        for ax in figure.axes
        for line in ax.lines
    }
    assert curves == {
        "validation_elbo_nats": [[5, -1.5]],
        "loss": [[1, 2]],
        "kl_nats": [[1, 1]],
        "kl_nats/z1": [[1, 0.4]],
    }


def test_long_curves_get_a_moving_average_that_keeps_a_straight_line() -> None:
    ax = Figure().subplots()
    steps = np.arange(1.0, 1001.0)
    figures._curve(ax, np.stack([steps, 3 * steps], axis=1), "line")
    raw, smooth = ax.lines
    assert len(raw.get_xdata()) == 1000  # type: ignore[arg-type]
    assert smooth.get_label() == "line"
    x, y = np.asarray(smooth.get_xdata()), np.asarray(smooth.get_ydata())
    assert len(x) == 1000 - 20 + 1
    np.testing.assert_allclose(y, 3 * x)


def test_the_first_tenth_of_a_run_does_not_set_the_frame() -> None:
    ax = Figure().subplots()
    steps = np.arange(1.0, 101.0)
    figures._frame_late_values(ax, np.stack([steps, np.where(steps <= 10, -1e6, 1.0 + steps / 100)], axis=1), 0.0)
    np.testing.assert_allclose(ax.get_ylim(), (-0.1, 2.1))


def test_ranks_of_chains_that_agree_are_uniform_and_of_others_are_not() -> None:
    # Chain c holds the numbers c, c + 4, c + 8, ...: each chain has the same share of every bin.
    interleaved = np.arange(400.0).reshape(100, 4).T
    np.testing.assert_array_equal(figures_chains._rank_counts(interleaved), np.full((4, 20), 5.0))
    separate = np.arange(400.0).reshape(4, 100)
    expected = np.repeat(np.eye(4), 5, axis=1) * 20
    np.testing.assert_array_equal(figures_chains._rank_counts(separate), expected)


def test_equal_draws_share_a_rank_whatever_their_chain() -> None:
    draws = np.tile(np.array([0.0, 1.0, 1.0, 2.0]), (3, 25))
    counts = figures_chains._rank_counts(draws)
    assert (counts == counts[0]).all()
    assert (counts.sum(axis=1) == 100).all()
    assert sorted(counts[0][counts[0] > 0]) == [25, 25, 50]


def test_autocorrelation_of_an_autoregression_is_a_power() -> None:
    noise = normals(8, 5000)
    draws = noise.copy()
    for t in range(1, 5000):
        draws[:, t] = 0.8 * draws[:, t - 1] + 0.6 * noise[:, t]
    correlation = figures_chains.autocorrelation_curve(draws)
    np.testing.assert_allclose(correlation[:10], 0.8 ** np.arange(10), atol=0.05)
    assert len(correlation) == figures_chains.MAX_LAG + 1
    # Chains that sit at +1 and -1 share no mean, so their correlation stays at 1 / (1 + 0.1**2).
    apart = 0.1 * noise + np.where(np.arange(8) % 2, 1.0, -1.0)[:, None]
    np.testing.assert_allclose(figures_chains.autocorrelation_curve(apart)[1:20], 0.99, atol=0.01)


@pytest.mark.parametrize(
    ("lengths", "scale", "left"), [([5.5, 6.3], "linear", 0.0), ([0.5, 60.0], "log", 0.1), ([10.0, 500.0], "log", 1.0)]
)
def test_bars_have_a_logarithmic_axis_only_above_a_factor_of_ten(lengths: list[float], scale: str, left: float) -> None:
    ax = Figure().subplots()
    ax.barh([0, 1], np.nan_to_num(lengths))
    figures_kernels._scale_bars(ax, np.array(lengths))
    assert ax.get_xscale() == scale
    assert ax.get_xlim()[0] == pytest.approx(left)


def test_a_trace_runs_over_what_its_draws_cost() -> None:
    ax = Figure().subplots()
    figures_chains.draw_trace(ax, normals(3, 1000), scale=7.0)
    assert len(ax.lines) == 3
    x = np.asarray(ax.lines[0].get_xdata())
    assert x[0] == 0 and x[1] == 14 and len(x) == figures_chains.MAX_TRACE_DRAWS


def test_coordinates_without_numbers_leave_the_others_their_bars() -> None:
    r_hat = np.array([1.0, 1.002, np.nan, 1.3, np.inf])
    found = Convergence(r_hat, np.array([500.0, 900.0, np.nan, 3.0, np.nan]), np.full(5, np.nan))
    picture = figures_chains.coordinates_picture(found)
    assert picture.title == "every coordinate of the noise" and "1.01" in picture.note and picture.width > 200


def test_a_family_of_many_curves_is_not_named_one_by_one() -> None:
    groups = {f"kl_nats/z_{i}": float(i) for i in range(30)}
    figure = figures._curves([{"step": step, "kl_nats": 1.0, **groups} for step in (1, 2)], figures.SVI_PANELS)
    (legend,) = (ax.get_legend() for ax in figure.axes if ax.lines)
    assert legend is not None and [text.get_text() for text in legend.get_texts()] == ["kl_nats"]
    assert len(figure.axes[0].lines) == 31


def test_reconstructions_stand_under_their_images() -> None:
    data = np.linspace(-1, 1, 16).reshape(16, 1, 1, 1) * np.ones((1, 1, 2, 2))
    (grid,) = figures_svi.gallery_grids(RECONSTRUCTIONS, {"x": -data, "data": data}).values()
    factor = grid.shape[0] // 11  # four rows of two pixels, one white pixel apart
    assert grid.shape == (11 * factor, 23 * factor, 3)
    shown = grid[::factor, ::factor, 0].astype(int)
    rows = [shown[top, ::3] for top in (0, 3, 6, 9)]
    for above, below in (rows[:2], rows[2:]):
        assert (np.diff(above) > 0).all()
        np.testing.assert_allclose(above + below, 255, atol=1)


def test_a_grid_with_labels_keeps_its_pixels() -> None:
    grid = np.random.default_rng(0).integers(0, 256, (30, 50, 3)).astype(np.uint8)
    figure = figures_svi._labelled(grid, ["a", "b"], ["1", "2", "3"])
    png = pixels_of(figures.png_of(figure))
    enlarged = grid.repeat(18, 0).repeat(18, 1)
    left = round(figures_svi.LABEL_INCHES * figures.DPI)
    bottom = round(figures_svi.EDGE_INCHES * figures.DPI)
    shown = png[: len(png) - bottom][-len(enlarged) :, left : left + enlarged.shape[1]]
    np.testing.assert_array_equal(shown, enlarged)


@pytest.mark.parametrize("side", [8, 96])
def test_every_picture_of_stage_1_can_be_drawn(side: int) -> None:
    columns = images_per_row(side)
    files: dict[str, figures_samples.Arrays] = {
        RECONSTRUCTIONS: {"x": normals(2 * columns, 3, side, side), "data": normals(2 * columns, 3, side, side)},
        PRIOR: {
            "x": normals(columns**2, 2, 3, side, side),
            "temperatures": np.array([0.7, 1.0]),
            "statistics": np.array(""),
        },
        TRAVERSAL: {
            "x": normals(3, 5, 3, side, side),
            "angles": np.linspace(-2, 2, 5),
            "group": np.array("z_2"),
            "temperature": np.array(1.0),
        },
    }
    for name, arrays in files.items():
        (picture,) = figures_svi.gallery_pictures(name, arrays)
        assert picture.title and "Good: " in picture.note and picture.width > 200


def test_bars_are_the_groups_in_order() -> None:
    arrays = {
        "kl_nats": np.array([3.0, 0.5, 1.0]),
        "names": np.array(["z_1", "z_2", "z_3"]),
        "sides": np.array([0, 4, 4]),
        "num_points": np.array(7),
    }
    ax = figures_svi._bars(arrays).axes[0]
    assert [bar.get_height() for bar in ax.patches] == [3.0, 0.5, 1.0]  # type: ignore[attr-defined]
    assert [label.get_text() for label in ax.get_xticklabels()] == ["z_1", "z_2", "z_3"]
    legend = ax.get_legend()
    assert legend is not None and [text.get_text() for text in legend.get_texts()] == ["vector", "4 x 4 grid"]
    assert "4.5" in ax.get_title()


@pytest.mark.parametrize("event", [(2,), (1, 4, 4)])
def test_a_posterior_of_points_and_of_images_can_be_drawn(event: tuple[int, ...]) -> None:
    mask = np.zeros(event, dtype=bool)
    mask[..., :1] = True
    arrays = {"x": normals(50, *event), "mean": normals(*event), "sd": np.where(mask, 0.0, 1.0), "mask": mask}
    arrays |= {"given": np.where(mask, 0.5, np.nan), "r_hat": np.where(mask, np.nan, 1.0)}
    assert pixels_of(figures_samples.conditional_png(arrays)).ndim == 3


# --- evaluation ----------------------------------------------------------------------------------


def metric_arrays() -> figures_samples.Arrays:
    value = np.array([[1.0, 0.1, 4.0, 0.9, 0.9, 0.9], [2.0, 0.2, 4.0, 0.8, 0.8, 0.9], [50.0, 9.0, 2.0, 0.3, 0.6, 0.2]])
    value = np.concatenate([value, [[20.0, 3.0, 3.0, 0.5, 0.7, 0.6], [10.0, 2.0, 3.5, 0.6, 0.75, 0.7]]])
    error = np.where(np.isin(np.arange(6), (1, 3, 4)), 0.05, np.nan) * np.ones((5, 1))
    metrics = np.array(["Frechet distance", "KID", "Inception Score", "precision", "recall", "coverage"])
    rows = np.array(["training data", "held-out data", "VAE", "short", "long"])
    labels = {"net": np.array("cnn"), "num": np.array(60), "kernel": np.array("mala")}
    return {"value": value, "error": error, "metrics": metrics, "rows": rows, "steps": np.array([0, 20, 200]), **labels}


def test_metrics_stand_over_chain_length_with_the_vae_and_the_data_across() -> None:
    figure = figures_evaluation._metrics(metric_arrays())
    frechet, kid, shares = figure.axes
    lines = {str(line.get_label()): np.asarray(line.get_ydata()).tolist() for line in frechet.lines}
    assert lines["VAE"] == [50.0, 50.0] and lines["held-out data"] == [2.0, 2.0]
    assert [np.asarray(line.get_xydata()).tolist() for line in frechet.lines if len(line.get_xdata()) == 2][0] == [  # type: ignore[arg-type]
        [20.0, 20.0],
        [200.0, 10.0],
    ]
    assert frechet.get_xscale() == "log" and len(kid.containers) == 1
    legend = shares.get_legend()
    assert legend is not None
    names = [text.get_text() for text in legend.get_texts()]
    assert names == ["held-out data", "VAE", "precision", "recall", "coverage"]
    for ax in figure.axes:
        assert ax.get_xlabel() == "steps from fresh noise" and ax.get_ylabel()
    (drawn,) = figures_evaluation.samples_pictures(metric_arrays())
    assert drawn.title == "60 samples in features of cnn, by steps of mala"
    before_coverage = dict(metric_arrays())
    for name in ("value", "error", "metrics"):
        before_coverage[name] = before_coverage[name][..., :5]
    assert figures_evaluation._metrics(before_coverage).axes[2].get_title() == "precision, recall"
    single = {**metric_arrays(), "steps": np.array([0, 100])}
    single |= {name: np.asarray(single[name])[:4] for name in ("value", "error", "rows")}
    assert len(figures_evaluation.samples_pictures(single)) == 1  # with no warning, which is an error here
    without_chains = {name: values for name, values in metric_arrays().items() if name != "steps"}
    assert figures_evaluation.samples_pictures(without_chains) == []


def test_areas_stand_in_the_row_of_their_set() -> None:
    value, error = np.array([[0.9, 0.8, 0.5], [1.0, np.nan, 0.2]]), np.full((2, 3), 0.01)
    arrays = {"sets": np.array(["mnist", "noise"]), "scores": np.array(["log h", "log p", "-E"])}
    ax = figures_evaluation._areas({**arrays, "value": value, "error": error}).axes[0]
    assert [label.get_text() for label in ax.get_yticklabels()] == ["mnist", "noise"]
    points = [np.asarray(container.lines[0].get_xydata()) for container in ax.containers]  # type: ignore[attr-defined]
    np.testing.assert_array_equal(np.stack(points)[:, :, 0], value.T)
    assert (np.stack(points)[:, 0, 1] > np.stack(points)[:, 1, 1]).all()
    (drawn,) = figures_evaluation.ood_pictures({**arrays, "value": value, "error": error})
    assert "Good: " in drawn.note


def test_histograms_leave_out_what_is_not_finite_and_say_how_many_they_show() -> None:
    scores = {f"{part} {name}": normals(50) for part in ("train", "test") for name in ("log h", "log p", "-E")}
    scores["train log p"][:3] = (np.nan, np.inf, -np.inf)
    scores["test -E"] = np.full(50, np.nan)
    figure = figures_evaluation._histogram_figure(scores)
    legends = [[text.get_text() for text in ax.get_legend().get_texts()] for ax in figure.axes]  # type: ignore[union-attr]
    assert legends[0] == ["train: 50 points", "test: 50 points"]
    assert legends[1] == ["train: 47 points", "test: 50 points"] and legends[2][1] == "test: 0 points"


def test_neighbours_stand_under_their_samples() -> None:
    samples = np.linspace(-1, 1, 10).reshape(10, 1, 1, 1) * np.ones((1, 1, 4, 4))
    (drawn,) = figures_evaluation.neighbours_pictures({"samples": samples, "pixels": -samples})
    png = pixels_of(base64.b64decode(drawn.png))[..., 0].astype(int)
    factor = png.shape[1] // (10 * 5 - 1)
    rows = png[::factor, ::factor]
    assert rows.shape == (2 * 5 - 1, 10 * 5 - 1)
    np.testing.assert_allclose(rows[0, ::5] + rows[5, ::5], 255, atol=1)
    assert "nearest to it in pixels." in drawn.note
