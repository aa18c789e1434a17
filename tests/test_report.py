"""The report shows what a run has, says what it lacks, and is one safe file."""

from __future__ import annotations

import base64
import csv
import json
import re
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from matplotlib import image
from matplotlib.figure import Figure
from numpy.typing import NDArray

from ppl_vaebm import report
from ppl_vaebm.errors import InputError
from ppl_vaebm.inference import diagnostics
from ppl_vaebm.inference.base import init_params
from ppl_vaebm.inference.chains import Chains
from ppl_vaebm.run import Run


def normals(*shape: int, seed: int = 0) -> NDArray[np.float64]:
    return np.random.default_rng(seed).normal(size=shape)


def add_svi(run: Run) -> None:
    for step in (10, 20, 30):
        run.log(
            {"stage": "svi", "step": step, "loss": 3.0 / step, "elbo_nats": -3.0 / step, "kl_nats": 0.1, "lr": 1e-3}
        )
    run.log({"stage": "svi", "step": 30, "validation_elbo_nats": -0.2})


def add_ebm(run: Run) -> None:
    for step in (1, 2):
        run.log(
            {
                "stage": "ebm",
                "step": step,
                "energy_data": 0.1 * step,
                "energy_model": float("inf") if step == 1 else 0.3,
                "energy_gap": float("nan"),
                "acceptance_rate": 0.8,
                "step_size": 0.3,
                "eps_mean_square/z1": 1.01,
                "weight_ess": 77.0,
                "num_divergent": 3,
                "num_skipped": 4,
            }
        )
    run.log({"stage": "ebm", "step": 2, "validation_gain_nats": 0.5, "log_z": 0.1, "log_z_ess": 900.0})


def add_samples(run: Run) -> None:
    for seed, name in enumerate(report.SAMPLE_SETS):
        run.save_npz(name, x=normals(50, 2, seed=seed))


def add_evaluation(run: Run) -> None:
    sections = {
        "samples": {"Frechet distance": {"value": 12.345678, "error": 0.25}, "num_samples": 100_000},
        "likelihood": {"gain_nats": 0.0078125, "feature net": "cnn<digits>", "worst": {"value": float("nan")}},
    }
    run.evaluation_file.write_text(json.dumps(sections))


def add_chains(run: Run, shift: float = 0.0) -> None:
    x = normals(4, 400)
    x[0] += shift
    energy = torch.from_numpy(normals(4, 400, seed=1))
    chains = Chains(
        kernel="hmc",
        draws={"moves": torch.from_numpy(x), "stuck": torch.ones(4, 400)},
        stats={
            "lp": -energy,
            "acceptance_rate": torch.full((4, 400), 0.75),
            "diverging": torch.zeros(4, 400, dtype=torch.bool),
            "energy": energy,
            "n_steps": torch.ones(4, 400, dtype=torch.long),
        },
        position=torch.zeros(4, 1),
        params=init_params(torch.zeros(4, 1), 0.25),
        seconds=2.0,
    )
    diagnostics.save_netcdf(diagnostics.to_inference_data(chains), run.chains_file)


def add_comparison(run: Run) -> None:
    with run.comparison_file.open("w", newline="") as file:
        csv.writer(file).writerows([["kernel", "r_hat", "evals"], ["hmc, jittered", 1.00123456, 80000]])


ADD: dict[str, Callable[[Run], None]] = {
    "svi": add_svi,
    "ebm": add_ebm,
    "samples": add_samples,
    "evaluation": add_evaluation,
    "chains": add_chains,
    "comparison": add_comparison,
}


@pytest.fixture
def run(tmp_path: Path) -> Run:
    run = Run.create(tmp_path / "a-run")
    run.config_file.write_text("seed: 17\n")
    return run


def page_of(run: Run) -> str:
    assert report.write_report(run) == run.report_file
    return run.report_file.read_text(encoding="utf-8")


def sections_of(page: str) -> list[str]:
    return re.findall(r'<section id="(\w+)">', page)


def cells_of(page: str) -> list[str]:
    return re.findall(r"<td[^>]*>([^<]*)</td>", page)


def test_a_bare_run_says_what_it_is_and_what_it_lacks(run: Run) -> None:
    page = page_of(run)
    assert sections_of(page) == [] and "<img" not in page
    assert "<h1>a-run</h1>" in page
    assert re.search(r"<details[^>]*><summary>[^<]*</summary><pre>seed: 17\s*</pre></details>", page)
    assert all(f"<code>{part.command}</code>" in page for part in report.PARTS)


@pytest.mark.parametrize("name", ADD)
def test_a_section_appears_with_its_file_and_only_with_it(run: Run, name: str) -> None:
    ADD[name](run)
    page = page_of(run)
    assert sections_of(page) == [name]
    (part,) = (part for part in report.PARTS if part.anchor == name)
    assert f"<code>{part.command}</code>" not in page
    assert f"<h2>{part.title}</h2>" in page


def test_a_full_report_is_one_file_without_scripts_or_links_to_elsewhere(run: Run) -> None:
    for add in ADD.values():
        add(run)
    page = page_of(run)
    assert sections_of(page) == list(ADD)
    assert "Not in this run yet" not in page
    sources = re.findall(r'(?:src|href)\s*=\s*"([^"]*)"', page)
    assert sources and all(source.startswith(("data:image/png;base64,", "#")) for source in sources)
    assert not re.search(r"https?:|@import|url\(|<script|<link|<iframe", page)
    pictures = [source.removeprefix("data:image/png;base64,") for source in sources if source.startswith("data:")]
    assert len(pictures) == 5
    assert all(base64.b64decode(png, validate=True).startswith(b"\x89PNG") for png in pictures)
    assert len(re.findall(r'<img [^>]*width="\d+" alt="[^"]+"', page)) == len(pictures)


def test_numbers_of_the_evaluation_and_of_the_comparison_appear(run: Run) -> None:
    add_evaluation(run)
    add_comparison(run)
    cells = cells_of(page_of(run))
    assert cells == [
        *("Frechet distance", "12.346 ± 0.25", "num_samples", "100000"),
        *("gain_nats", "0.0078125", "feature net", "cnn&lt;digits&gt;", "worst", "nan"),
        *("hmc, jittered", "1.0012", "80000"),
    ]


def test_whatever_a_file_says_is_escaped(run: Run) -> None:
    attack = "<script>alert(1)</script>"
    run.config_file.write_text(f"data: {attack}\n")
    run.evaluation_file.write_text(json.dumps({attack: {attack: attack}}))
    run.comparison_file.write_text(f"{attack}\n{attack}\n")
    page = page_of(run)
    assert "<script" not in page
    assert page.count("&lt;script&gt;alert(1)&lt;/script&gt;") == 6


def test_failures_of_training_are_counted(run: Run) -> None:
    add_ebm(run)
    assert "not finite: 4. Divergent moves: 6." in page_of(run)


def test_chains_that_disagree_or_never_move_are_marked(run: Run) -> None:
    rows = {}
    for shift in (0.0, 3.0):
        add_chains(run, shift)
        page = page_of(run)
        for name in ("moves", "stuck"):
            row = re.search(rf"<tr><td[^>]*>{name}</td>(.*?)</tr>", page)
            assert row
            rows[name, shift] = row[1].count("bad")
        assert "kernel hmc, step size 0.25" in page
        assert f"{int(shift == 0)} of 2 functionals meet" in page
    assert rows["moves", 0.0] == 0
    assert rows["moves", 3.0] >= 2
    assert rows["stuck", 0.0] == 3


def test_a_damaged_file_of_chains_is_an_input_error(run: Run) -> None:
    run.chains_file.write_text("no chains")
    with pytest.raises(InputError, match="chains.nc"):
        report.write_report(run)


def test_images_are_saved_pixel_by_pixel(tmp_path: Path) -> None:
    x = np.zeros((12, 1, 3, 2))
    x[0] = -1.0
    x[1] = 5.0  # cut off at white
    x[2, 0, 1, 0] = np.nan
    report.save_image_grid_png(tmp_path / "grid.png", torch.from_numpy(x))
    saved = np.round(image.imread(tmp_path / "grid.png")[..., :3] * 255).astype(int)
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
    assert (report._grid(x) == [0, 255, 0]).all()


def test_points_are_saved_as_a_picture(tmp_path: Path) -> None:
    report.save_points_png(tmp_path / "points.png", torch.from_numpy(normals(100, 2)))
    assert image.imread(tmp_path / "points.png").shape[:2] == (5 * report.DPI, 5 * report.DPI)


def test_points_outside_the_frame_of_the_data_are_counted() -> None:
    data = np.array([[0.0, 0.0], [1.0, 1.0]])
    stray = np.array([[0.5, 0.5], [9.0, 0.5], [np.nan, 0.5]])
    figure = report._scatters({"data": np.concatenate([data, data]), "VAE": stray})
    titles = [ax.get_title() for ax in figure.axes]
    assert titles[:2] == ["data: 3 points", "VAE: 3 points, 2 of them outside"]


@pytest.mark.parametrize(
    ("save", "shape"),
    [
        (report.save_points_png, (5, 3)),
        (report.save_points_png, (0, 2)),
        (report.save_points_png, (5, 1, 4, 4)),
        (report.save_image_grid_png, (5, 2)),
        (report.save_image_grid_png, (5, 2, 4, 4)),
    ],
)
def test_arrays_of_another_shape_are_refused(
    tmp_path: Path, save: Callable[[Path, NDArray[np.float64]], None], shape: tuple[int, ...]
) -> None:
    with pytest.raises(InputError, match="found"):
        save(tmp_path / "x.png", np.zeros(shape))
    assert list(tmp_path.iterdir()) == []


def test_a_figure_of_curves_has_a_panel_per_known_quantity() -> None:
    records: list[report.Record] = [
        {"step": 1, "loss": 2.0, "kl_nats": 1.0, "kl_nats/z1": 0.4, "unheard_of": 1.0},
        {"step": 5, "validation_elbo_nats": -1.5, "loss": None},
    ]
    figure = report._curves(records, report.SVI_PANELS)
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
    report._curve(ax, np.stack([steps, 3 * steps], axis=1), "line")
    raw, smooth = ax.lines
    assert len(raw.get_xdata()) == 1000  # type: ignore[arg-type]
    assert smooth.get_label() == "line"
    x, y = np.asarray(smooth.get_xdata()), np.asarray(smooth.get_ydata())
    assert len(x) == 1000 - 20 + 1
    np.testing.assert_allclose(y, 3 * x)


def test_the_first_tenth_of_a_run_does_not_set_the_frame() -> None:
    ax = Figure().subplots()
    steps = np.arange(1.0, 101.0)
    report._frame_late_values(ax, np.stack([steps, np.where(steps <= 10, -1e6, 1.0 + steps / 100)], axis=1), 0.0)
    np.testing.assert_allclose(ax.get_ylim(), (-0.1, 2.1))


def test_ranks_of_chains_that_agree_are_uniform_and_of_others_are_not() -> None:
    # Chain c holds the numbers c, c + 4, c + 8, ...: each chain has the same share of every bin.
    interleaved = np.arange(400.0).reshape(100, 4).T
    np.testing.assert_array_equal(report._rank_counts(interleaved), np.full((4, 20), 5.0))
    separate = np.arange(400.0).reshape(4, 100)
    expected = np.repeat(np.eye(4), 5, axis=1) * 20
    np.testing.assert_array_equal(report._rank_counts(separate), expected)


def test_equal_draws_share_a_rank_whatever_their_chain() -> None:
    draws = np.tile(np.array([0.0, 1.0, 1.0, 2.0]), (3, 25))
    counts = report._rank_counts(draws)
    assert (counts == counts[0]).all()
    assert (counts.sum(axis=1) == 100).all()
    assert sorted(counts[0][counts[0] > 0]) == [25, 25, 50]


def test_autocorrelation_of_an_autoregression_is_a_power() -> None:
    noise = normals(8, 5000, seed=3)
    draws = noise.copy()
    for t in range(1, 5000):
        draws[:, t] = 0.8 * draws[:, t - 1] + 0.6 * noise[:, t]
    correlation = report._autocorrelation(draws)
    np.testing.assert_allclose(correlation[:10], 0.8 ** np.arange(10), atol=0.05)
    assert len(correlation) == report.MAX_LAG + 1
    # Chains that sit at +1 and -1 share no mean, so their correlation stays at 1 / (1 + 0.1**2).
    apart = 0.1 * noise + np.where(np.arange(8) % 2, 1.0, -1.0)[:, None]
    np.testing.assert_allclose(report._autocorrelation(apart)[1:20], 0.99, atol=0.01)
