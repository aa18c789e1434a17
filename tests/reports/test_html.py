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
from numpy.typing import NDArray

from ppl_vaebm.errors import InputError
from ppl_vaebm.inference.diagnostics.arviz_io import save_netcdf, to_inference_data
from ppl_vaebm.inference.kernels.base import init_params
from ppl_vaebm.inference.kernels.chains import Chains
from ppl_vaebm.reports import figures, report
from ppl_vaebm.reports import sections as report_sections
from ppl_vaebm.runs.run import GROUP_KL, PRIOR, RECONSTRUCTIONS, TRAVERSAL, Run


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
    for seed, name in enumerate(report_sections.SAMPLE_SETS):
        run.save_npz(name, x=normals(50, 2, seed=seed))


def add_evaluation(run: Run) -> None:
    sections = {
        "samples": {"Frechet distance": {"value": 12.345678, "error": 0.25}, "num_samples": 100_000},
        "likelihood": {"gain_nats": 0.0078125, "feature net": "cnn<digits>", "worst": {"value": float("nan")}},
    }
    run.evaluation_file.write_text(json.dumps(sections))


def add_conditioning(run: Run) -> None:
    had_chains = run.chains_file.exists()
    mask = np.array([True, False])
    arrays = {"x": normals(50, 2), "mean": normals(2), "sd": np.array([0.0, 1.0]), "r_hat": np.array([np.nan, 1.0])}
    file = run.save_npz("conditional", **arrays, given=np.array([0.5, np.nan]), mask=mask)
    add_chains(run)
    file.with_suffix(".nc").write_bytes(run.chains_file.read_bytes())
    if not had_chains:
        run.chains_file.unlink()


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
    save_netcdf(to_inference_data(chains), run.chains_file)


def add_comparison(run: Run) -> None:
    with run.comparison_file.open("w", newline="") as file:
        csv.writer(file).writerows([["kernel", "max_r_hat", "evals"], ["hmc, jittered", 1.00123456, 80000]])


ADD: dict[str, Callable[[Run], None]] = {
    "svi": add_svi,
    "ebm": add_ebm,
    "samples": add_samples,
    "conditioning": add_conditioning,
    "evaluation": add_evaluation,
    "chains": add_chains,
    "comparison": add_comparison,
}


@pytest.fixture
def drawn_run(tmp_path: Path) -> Run:
    run = Run.create(tmp_path / "a-run")
    run.config_file.write_text("seed: 17\n")
    return run


@pytest.fixture
def run(drawn_run: Run, monkeypatch: pytest.MonkeyPatch) -> Run:
    """Make a run whose figures are not rendered, which takes most of the time."""
    monkeypatch.setattr(figures, "png_of", lambda figure: b"no picture")
    return drawn_run


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
    assert all(f"<code>{part.command}</code>" in page for part in report.PLACES)


@pytest.mark.parametrize("name", ADD)
def test_a_section_appears_with_its_file_and_only_with_it(run: Run, name: str) -> None:
    ADD[name](run)
    page = page_of(run)
    assert sections_of(page) == [name]
    (part,) = (part for part in report.PLACES if part.anchor == name)
    assert f"<code>{part.command}</code>" not in page
    assert f"<h2>{part.title}</h2>" in page


def test_a_full_report_is_one_file_without_scripts_or_links_to_elsewhere(drawn_run: Run) -> None:
    for add in ADD.values():
        add(drawn_run)
    page = page_of(drawn_run)
    assert sections_of(page) == list(ADD)
    assert "Not in this run yet" not in page
    sources = re.findall(r'(?:src|href)\s*=\s*"([^"]*)"', page)
    assert sources and all(source.startswith(("data:image/png;base64,", "#")) for source in sources)
    assert not re.search(r"https?:|@import|url\(|<script|<link|<iframe", page)
    pictures = [source.removeprefix("data:image/png;base64,") for source in sources if source.startswith("data:")]
    assert len(pictures) == 6
    assert all(base64.b64decode(png, validate=True).startswith(b"\x89PNG") for png in pictures)
    assert len(re.findall(r'<img [^>]*width="\d+" alt="[^"]+"', page)) == len(pictures)


def test_pictures_of_the_vae_stand_in_its_section_and_say_what_good_looks_like(run: Run) -> None:
    x = normals(16, 2, 1, 8, 8)
    run.save_npz(RECONSTRUCTIONS, x=x[:, 0], data=x[:, 1])
    run.save_npz(PRIOR, x=x, temperatures=np.array([0.7, 1.0]), statistics=np.array("statistics of <b>"))
    run.save_npz(TRAVERSAL, x=x, angles=np.zeros(2), group=np.array("z_2"), temperature=np.array(0.7))
    group_kl = {"kl_nats": np.ones(2), "names": np.array(["z_1", "z_2"]), "sides": np.array([2, 4])}
    run.save_npz(GROUP_KL, **group_kl, num_points=np.array(40))
    add_svi(run)
    page = page_of(run)
    assert sections_of(page) == ["svi"]
    notes = re.findall(r"<figcaption><strong>([^<]*)</strong><br>([^<]*)</figcaption>", page)
    titles = ["reconstructions", "prior samples by temperature", "traversal of latent group z_2"]
    assert [title for title, _ in notes] == [*titles, "KL of every latent group"]
    assert all("Good: " in note for _, note in notes)
    assert "statistics of &lt;b&gt;" in page
    assert page.count("<img") == 5


def test_points_are_drawn_beside_the_data(run: Run) -> None:
    draws = {"x": normals(30, 1, 2), "data": normals(20, 2), "temperatures": np.ones(1), "statistics": np.array("")}
    run.save_npz(PRIOR, **draws)
    assert "prior samples" in page_of(run)


def test_numbers_of_the_evaluation_and_of_the_comparison_appear(run: Run) -> None:
    add_evaluation(run)
    add_comparison(run)
    cells = cells_of(page_of(run))
    assert cells == [
        *("Frechet distance", "12.3 ± 0.2", "num_samples", "100000"),
        *("gain_nats", "0.0078125", "feature net", "cnn&lt;digits&gt;", "worst", "nan"),
        *("hmc, jittered", "1.001"),
    ]


def test_whatever_a_file_says_is_escaped(run: Run) -> None:
    attack = "<script>alert(1)</script>"
    run.config_file.write_text(f"data: {attack}\n")
    run.evaluation_file.write_text(json.dumps({attack: {attack: attack}}))
    run.comparison_file.write_text(f"kernel,note\n{attack},{attack}\n")
    page = page_of(run)
    assert "<script" not in page
    assert page.count("&lt;script&gt;alert(1)&lt;/script&gt;") == 7


def test_failures_of_training_are_counted(run: Run) -> None:
    add_ebm(run)
    assert "not finite: 4. Divergent moves: 6." in page_of(run)


def test_returns_to_a_checkpoint_are_told(run: Run) -> None:
    add_ebm(run)
    for step, event in ((9, "rollback"), (12, "stop")):
        run.log({"stage": "ebm", "step": step, "event": event, "to_step": 5, "reason": "the energy gap passed 100"})
    page = page_of(run)
    assert "Step 9: the energy gap passed 100: back to step 5." in page
    assert "Step 12: the energy gap passed 100: stopped, with the result of step 5." in page


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
        assert f"{int(shift == 0)} of 2 quantities meet" in page
    assert rows["moves", 0.0] == 0
    assert rows["moves", 3.0] >= 2
    assert rows["stuck", 0.0] == 3


def test_a_damaged_file_of_chains_is_an_input_error(run: Run) -> None:
    run.chains_file.write_text("no chains")
    with pytest.raises(InputError, match="chains.nc"):
        report.write_report(run)


def test_the_comparison_shows_spreads_and_leaves_out_what_no_kernel_has(run: Run) -> None:
    header = [*report_sections.COMPARED, *(f"{name}_sd" for name in report_sections.COMPARED), "note", "draws"]
    lines = []
    for kernel, r_hat in (("hmc", "1.25"), ("mala", "1.001"), ("pcn", "3e15")):
        values = {"kernel": kernel, "adjusted": "yes", "max_r_hat": r_hat, "note": f"{kernel} is slow"}
        values |= {"modes_found": "nan", "ess_per_second": "12.5", "ess_per_second_sd": "0.25"}
        lines.append([values.get(name, "3.0") for name in header])
    with run.comparison_file.open("w", newline="") as file:
        csv.writer(file).writerows([header, *lines])
    page = page_of(run)
    cells = cells_of(page)
    assert cells[:5] == ["hmc", "yes", "1.250", "3 ± 3", "12.5 ± 0.2"]
    assert cells[len(cells) // 3 :][2] == "1.001" and cells[2 * len(cells) // 3 :][2] == "&gt; 1000"
    assert page.count("number bad") == 2
    assert "modes" not in "".join(re.findall(r"<th[^>]*>([^<]*)</th>", page))
    assert "hmc: hmc is slow" in page and "compare.html" not in page
    run.comparison_dir.mkdir()
    run.comparison_page.touch()
    assert '<a href="compare/compare.html">' in page_of(run)
