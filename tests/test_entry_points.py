"""Every command, tiny, through its command line; and what each says to bad input."""

from __future__ import annotations

import csv
import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
import yaml

from ppl_vaebm import compare, diagnose, evaluate, fit, sample
from ppl_vaebm.config import KernelName
from ppl_vaebm.config import kernel as kernel_config
from ppl_vaebm.config.parsing import options_of
from ppl_vaebm.config.recipes import recipe_names
from ppl_vaebm.errors import InputError
from ppl_vaebm.evaluation import kernels as comparison
from ppl_vaebm.evaluation.store import read_parts
from ppl_vaebm.inference import sampling
from ppl_vaebm.inference.diagnostics.arviz_io import load_netcdf
from ppl_vaebm.inference.diagnostics.convergence import diagnose_columns
from ppl_vaebm.inference.diagnostics.coordinates import load_coordinates
from ppl_vaebm.reports import comparison_page, report
from ppl_vaebm.runs.run import Run
from tests.tiny import IMAGES, POINTS, copy_run, fit_run, write_empty_report, write_recipe

ENVIRONMENT = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[1])}
Main = Callable[[list[str]], None]
EFFORT = ["--num-test", "20", "--num-importance", "10", "--num-z-draws", "500", "--num-samples", "100"]
write_report = report.write_report
write_comparison = comparison_page.write_comparison


@pytest.fixture(scope="module", autouse=True)
def quick_reports(blank_pictures: None) -> Iterator[None]:
    """Write empty pages, which take most of the time, and tune for a few steps; some tests write whole pages."""

    def compare_empty(run: Run, *rest: object) -> Path:
        run.comparison_page.touch()
        return run.comparison_page

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(report, "write_report", write_empty_report)
        patch.setattr(comparison_page, "write_comparison", compare_empty)
        patch.setattr(sampling, "NUM_PILOT_STEPS", 10)
        yield


@pytest.fixture(scope="module")
def points(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return fit_run(tmp_path_factory.mktemp("points"))


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return fit_run(tmp_path_factory.mktemp("images"), IMAGES)


def contents(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


def sentence(main: Main, argv: list[str], capsys: pytest.CaptureFixture[str]) -> str:
    """Run a command that must refuse, and return its one sentence."""
    with pytest.raises(SystemExit) as stop:
        main(argv)
    assert stop.value.code == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ") and error.count("\n") == 1, error
    return error


# --- what the commands write -----------------------------------------------------------------------


def test_fit_leaves_a_run(points: Path) -> None:
    config = yaml.safe_load((points / "config.yaml").read_text())
    assert config["data"]["num_points"] == 500 and config["model"]["latents"] == [1, 1]
    records = Run(points).metrics("ebm")
    assert [record["step"] for record in records if "energy_gap" in record] == list(range(1, 13))
    assert {"validation_gain_nats", "log_z", "log_z_ess"} <= set(records[-1])
    assert (points / "report.html").is_file()


def test_every_step_of_stage_ebm_logs_its_monitors(images: Path) -> None:
    record = next(record for record in Run(images).metrics("ebm") if "energy_gap" in record)
    expected = {"energy_gap", "acceptance_rate", "weight_ess", "rms_move", "step_size", "grad_norm"}
    expected |= {f"eps_mean_square/eps_{name}" for name in ("z_1", "z_2", "x")}
    assert expected <= set(record)


def test_sample_writes_draws(points: Path) -> None:
    sample.main([str(points), "--num", "40", "--num-steps", "2"])
    for name in ("vae", "vaebm", "data"):
        assert np.load(points / "samples" / f"{name}.npz")["x"].shape == (40, 2)
        assert (points / "samples" / f"{name}.png").is_file()


def test_a_sample_does_not_depend_on_how_many_are_asked_for(points: Path) -> None:
    sample.main([str(points), "--num", "7", "--num-steps", "2"])
    few = np.load(points / "samples" / "vaebm.npz")["x"]
    sample.main([str(points), "--num", "600", "--num-steps", "2"])
    np.testing.assert_array_equal(np.load(points / "samples" / "vaebm.npz")["x"][:7], few)


def test_sample_draws_images(images: Path) -> None:
    sample.main([str(images), "--num", "5"])
    assert np.load(images / "samples" / "vaebm.npz")["x"].shape == (5, 1, 8, 8)


@pytest.mark.parametrize("text", [POINTS, IMAGES], ids=["points", "images"])
def test_a_run_of_stage_svi_alone_is_sampled_and_measured(tmp_path: Path, text: str) -> None:
    run, shape = tmp_path / "run", (1, 8, 8) if text == IMAGES else (2,)
    fit.main(["--stage", "svi", "--recipe", str(write_recipe(tmp_path, text)), "--run", str(run)])
    choices = ["--temperatures", "0.5", "1", "--group", "z_2"] if text == IMAGES else []
    sample.main([str(run), "--num", "7", *choices])
    assert np.load(run / "samples" / "vae.npz")["x"].shape == (7, *shape)
    assert not (run / "samples" / "vaebm.npz").exists()
    assert np.load(run / "samples" / "svi_group_kl.npz")["names"].tolist() == ["z_1", "z_2"]
    if text == IMAGES:
        assert np.load(run / "samples" / "svi_prior.npz")["temperatures"].tolist() == [0.5, 1.0]
        assert np.load(run / "samples" / "svi_traversal.npz")["group"] == "z_2"
        return  # the classifier of the Frechet distances takes long to train
    evaluate.main([str(run), *EFFORT])
    parts = read_parts(Run(run))
    assert [section.title for part in parts.values() for section in part.sections] == ["stage 1, test data", "modes"]


def test_of_a_whole_run_stage_svi_has_to_be_asked_for(points: Path) -> None:
    evaluate.main([str(points), "--stage", "svi", *EFFORT])
    assert read_parts(Run(points))["likelihood"].sections[0].title == "stage 1, test data"
    evaluate.main([str(points), *EFFORT])
    assert read_parts(Run(points))["likelihood"].sections[0].title == "log-likelihood of test data (nats per point)"


def test_a_sample_of_stage_svi_does_not_depend_on_how_many_are_asked_for(points: Path) -> None:
    draws = []
    for num in ("7", "600"):
        sample.main([str(points), "--stage", "svi", "--num", num])
        draws.append(np.load(points / "samples" / "vae.npz")["x"][:7])
    np.testing.assert_allclose(draws[0], draws[1], rtol=1e-5)


@pytest.mark.parametrize("kernel", ["hmc", "pyro-hmc"])
def test_diagnose_writes_inference_data(points: Path, kernel: str, capsys: pytest.CaptureFixture[str]) -> None:
    diagnose.main([str(points), "--kernel", kernel, "--num-chains", "4", "--num-warmup", "5", "--num-evals", "40"])
    inference_data = load_netcdf(points / "chains.nc")
    assert inference_data["posterior"]["energy"].dims == ("chain", "draw")
    assert inference_data["posterior"].sizes["chain"] == 4
    assert inference_data["posterior"].attrs["kernel"] == kernel
    assert "R-hat" in capsys.readouterr().out


def test_diagnose_judges_every_coordinate_and_chains_that_share_a_start(
    tmp_path: Path, points: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = copy_run(points, tmp_path)
    options = ["--kernel", "hmc", "--num-chains", "4", "--num-warmup", "5", "--num-evals", "60"]
    diagnose.main([str(run), *options, "--all-coordinates", "--chains-per-start", "2"])
    out = capsys.readouterr().out
    assert "nested" in out and "all 4 coordinates, 4 chains of" in out and "eps_x[1]" in out
    found = load_coordinates(run / "positions.nc")
    assert found.names.tolist() == ["eps_z_1[0]", "eps_z_2[0]", "eps_x[0]", "eps_x[1]"]
    idata = load_netcdf(run / "chains.nc")
    assert found.num_draws == idata["posterior"].sizes["draw"] and found.stride == 1
    # The coordinate of which every draw is stored is the same chain.
    column = idata["posterior"]["coordinate"].to_numpy()[:, :, 1:2]
    assert diagnose_columns(column).r_hat[0] == pytest.approx(found.convergence.r_hat[1], rel=1e-4)
    diagnose.main([str(run), *options])
    assert not (run / "positions.nc").exists()  # they were of other chains


def test_compare_spends_the_same_on_every_kernel(
    tmp_path: Path, points: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = copy_run(points, tmp_path)
    kernels = ["langevin", "tempered", "pyro-nuts"]
    options = ["--num-chains", "4", "--num-warmup", "4", "--num-evals", "30", "--num-seconds", "0", "--num-seeds", "2"]
    compare.main([str(run), "--kernels", ",".join(kernels), *options])
    rows = comparison_rows(run)
    assert list(rows) == kernels
    for row in rows.values():
        assert row["seeds"] == "2" and (row["adjusted"] == "no") == (row["kernel"] == "langevin")
    for name in kernels[:-1]:
        assert 30 <= float(rows[name]["evals"]) <= 60, name  # the last draw may pass the budget by its own cost
    # NUTS's chains stop after different draws, and are cut to the shortest.
    assert 0 < float(rows["pyro-nuts"]["evals"]) < 2_000
    captured = capsys.readouterr()
    assert captured.err.count("done") == 2 * len(kernels) and "[3/3] pyro-nuts, seed 1" in captured.err
    assert "modes" in captured.out
    chains = sorted(path.name for path in (run / "compare").glob("*.nc"))
    assert chains == sorted(f"{kernel}-seed{seed}.nc" for kernel in kernels for seed in (0, 1))

    compare.main([str(run), "--kernels", "pcn,langevin", "--keep", *options])
    again = comparison_rows(run)
    assert set(again) == {*kernels, "pcn"}
    timeless = [name for name in rows["langevin"] if "second" not in name]
    for name in ("langevin", "tempered"):  # one ran anew, the other was kept
        assert {column: again[name][column] for column in timeless} == {
            column: rows[name][column] for column in timeless
        }
    capsys.readouterr()
    assert "num-evals 30 instead of 31" in sentence(
        compare.main, [str(run), "--kernels", "pcn", "--keep", *options, "--num-evals", "31"], capsys
    )
    compare.main([str(run), "--kernels", "pcn", *options, "--num-seeds", "1"])
    assert sorted(path.name for path in (run / "compare").glob("*.nc")) == ["pcn-seed0.nc"]


def comparison_rows(run: Path) -> dict[str, dict[str, str]]:
    with (run / "compare.csv").open() as file:
        return {row["kernel"]: row for row in csv.DictReader(file)}


def test_compare_pictures_images_and_goes_on_after_a_kernel_that_fails(
    tmp_path: Path, images: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    run = copy_run(images, tmp_path)

    def fail(*args: object, **options: object) -> None:
        raise RuntimeError("no memory\nleft")

    monkeypatch.setattr(comparison, "run_pyro", fail)
    monkeypatch.setattr(comparison_page, "write_comparison", write_comparison)
    options = ["--num-chains", "4", "--num-warmup", "2", "--num-evals", "12", "--num-seconds", "0", "--num-seeds", "1"]
    compare.main([str(run), "--kernels", "pyro-hmc,mala", *options])
    rows = comparison_rows(run)
    assert rows["pyro-hmc"]["seeds"] == "0" and rows["pyro-hmc"]["note"] == "no memory left"
    assert rows["mala"]["seeds"] == "1" and float(rows["mala"]["draws"]) == 12
    assert "pyro-hmc: no memory left" in capsys.readouterr().out
    with np.load(run / "compare" / "mala-seed0.npz") as file:
        assert file["x"].shape == (3, 12, 1, 8, 8) and file["stride"] == 1
    page = (run / "compare" / "compare.html").read_text()
    assert "mala: 3 chains over time" in page and "pyro-hmc: no memory left." in page


def test_kernels_of_other_libraries_are_left_out_of_the_default_where_they_are_missing(
    points: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(kernel_config, "find_spec", lambda name: None)
    names = compare.default_kernels()
    assert "pyro-nuts" in names and "numpyro" not in names and "blackjax" not in names
    assert "left out, because they need pip install -e '.[jax]': numpyro-nuts, blackjax-nuts" in capsys.readouterr().err
    monkeypatch.undo()
    assert kernel_config.kernel_names(compare.default_kernels()) == compare.DEFAULT_KERNELS


def test_the_report_of_a_whole_run_has_every_section(points: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(comparison_page, "write_comparison", write_comparison)
    sample.main([str(points), "--num", "20"])
    chains = ["--num-chains", "4", "--num-warmup", "4", "--num-evals", "20"]
    diagnose.main([str(points), *chains])
    compare.main([str(points), "--kernels", "hmc", *chains, "--num-seconds", "0", "--num-seeds", "1"])
    evaluate.main([str(points), *EFFORT])
    page = write_report(Run(points)).read_text()
    assert re.findall(r'<li class="faint">(\w+)', page) == ["Conditioning"]  # which images have
    assert page.count("<img") == 8
    assert '<a href="compare/compare.html">' in page
    kernels = (points / "compare" / "compare.html").read_text()
    assert kernels.count("<img") == 6 and "chains over time" in kernels and "http" not in kernels


def test_evaluate_reports_the_likelihood_and_the_modes(points: Path) -> None:
    evaluate.main([str(points), *EFFORT])
    parts = json.loads((points / "evaluate.json").read_text())["parts"]
    likelihood = parts["likelihood"]["sections"][0]["columns"][""]
    expected = likelihood["log p (VAE)"]["value"] + likelihood["log h - log p"]["value"]
    assert likelihood["log h (VAEBM)"]["value"] == pytest.approx(expected, abs=1e-6)
    assert likelihood["entropy bound (mean log density of the data distribution)"] == pytest.approx(-0.0653, abs=1e-4)
    assert "VAEBM, exact draws" in parts["samples"]["sections"][0]["columns"]


@pytest.mark.slow
def test_evaluate_reports_frechet_distances(images: Path) -> None:
    evaluate.main([str(images), *EFFORT])
    columns = json.loads((images / "evaluate.json").read_text())["parts"]["samples"]["sections"][0]["columns"]
    section, ratios = columns["Frechet distance"], columns["Frechet distance over the VAE's"]
    ratio = section["VAEBM, 30 mala steps"] / section["VAE"]
    assert ratios["VAEBM, 30 mala steps"] == pytest.approx(ratio)


@pytest.mark.parametrize("kernel", [*KernelName.__args__])  # type: ignore[attr-defined]
def test_stage_ebm_trains_with_every_kernel(tmp_path: Path, points: Path, kernel: str) -> None:
    run = copy_run(points, tmp_path)
    options = ["--objective", "mle", "--kernel", kernel, "--ratio-steps", "1", "--ebm.steps", "3"]
    fit.main(["--stage", "ebm", "--run", str(run), "--overwrite", *options])
    records = [record for record in Run(run).metrics("ebm") if "energy_gap" in record]
    assert "acceptance_rate" not in records[0]  # the ratio's step has no chains
    assert all(0 <= record["acceptance_rate"] <= 1 for record in records[1:])


def test_stage_ebm_trains_with_importance_negatives(tmp_path: Path, points: Path) -> None:
    run = copy_run(points, tmp_path)
    fit.main(["--stage", "ebm", "--run", str(run), "--overwrite", "--objective", "mle", "--negatives", "importance"])
    assert all(record["weight_ess"] <= 16 for record in Run(run).metrics("ebm") if "energy_gap" in record)


def test_a_dry_run_writes_nothing(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    fit.main(["--recipe", str(write_recipe(tmp_path)), "--run", str(tmp_path / "run"), "--dry-run"])
    assert not (tmp_path / "run").exists()
    assert "VectorEnergy" in capsys.readouterr().out


@pytest.mark.parametrize("recipe", recipe_names())
def test_every_recipe_resolves(recipe: str) -> None:
    options, folder = fit.resolve(["--recipe", recipe, "--run", "nowhere"])
    assert folder == Path("nowhere")
    if options.config.data.name == recipe:  # a data set's own recipe needs no name
        assert fit.resolve(["--data", recipe, "--run", "nowhere"])[0].config == options.config


def test_the_command_line_wins_over_the_recipe(tmp_path: Path) -> None:
    recipe = str(write_recipe(tmp_path))
    options, _ = fit.resolve(["--recipe", recipe, "--svi.learning-rate", "1e-3", "--kernel", "hmc"])
    assert options.config.svi.learning_rate == 1e-3
    assert options.config.kernel.name == "hmc" and options.config.sampling.kernel.name == "mixture"
    assert options.config.model.latents == (1, 1)


def test_the_command_line_is_read_beside_the_recipe_and_not_beside_the_defaults() -> None:
    """0.1 is above the default starting value of 0.08, and below the recipe's."""
    options, _ = fit.resolve(["--data", "digits", "--run", "nowhere", "--model.min-x-scale", "0.1"])
    assert options.config.model.min_x_scale == 0.1 < options.config.model.init_x_scale


def test_a_stage_that_starts_again_leaves_nothing_of_the_old_one(tmp_path: Path, points: Path) -> None:
    run = copy_run(points, tmp_path)
    names = ("samples/vaebm.npz", "chains.nc", "positions.nc", "evaluate.json", "compare.csv", "compare/compare.html")
    old = [run / name for name in names]
    for file in old:
        file.parent.mkdir(exist_ok=True)
        file.write_text("of the old energy")
    fit.main(["--stage", "ebm", "--run", str(run), "--resume"])
    assert all(file.is_file() for file in old)
    for stage in ("ebm", "ebm-latent", "ebm-balance"):  # the last two from a fit with the first latent's term
        Run(run).log({"stage": stage, "step": 0, "old": 1})
    (run / "features.safetensors").touch()
    fit.main(["--stage", "ebm", "--run", str(run), "--overwrite"])
    assert not any(file.exists() for file in old)
    assert not any("old" in record for record in Run(run).metrics())
    assert (run / "features.safetensors").exists()  # of the data, which stay
    fit.main(["--stage", "svi", "--run", str(run), "--overwrite"])
    assert not (run / "features.safetensors").exists()
    assert {record["stage"] for record in Run(run).metrics()} == {"svi"}
    assert not (run / "checkpoints" / "ebm").exists()


def test_options_that_an_objective_ignores_are_named(points: Path, capsys: pytest.CaptureFixture[str]) -> None:
    command = ["--stage", "ebm", "--run", str(points), "--dry-run", "--kernel", "hmc"]
    for options, words in (
        (["--objective", "ratio"], "kernel, ebm.negatives and ebm.replay-* are not used"),
        (["--objective", "mle", "--negatives", "importance"], "kernel and ebm.replay-* are not used"),
        (["--objective", "mle"], ""),
    ):
        fit.main([*command, *options])
        out = capsys.readouterr().out
        assert words in out and ("note:" in out) == bool(words)


def test_another_kernel_does_not_inherit_the_recipes_tuning() -> None:
    recipe = ["--recipe", "digits", "--run", "nowhere"]
    kept, _ = fit.resolve([*recipe, "--kernel", "mala"])
    assert kept.config.kernel.target_acceptance == 0.75
    other, _ = fit.resolve([*recipe, "--kernel", "pcn"])
    assert other.config.kernel.target_acceptance is None
    named, _ = fit.resolve([*recipe, "--kernel", "pcn", "--kernel.target-acceptance", "0.4"])
    assert named.config.kernel.target_acceptance == 0.4


def help_of(*argv: str, capsys: pytest.CaptureFixture[str]) -> list[str]:
    """Return the words of fit's help."""
    with pytest.raises(SystemExit) as stop:
        fit.resolve([*argv, "--help"])
    assert stop.value.code == 0
    return capsys.readouterr().out.split()


def test_help_has_the_defaults_of_the_recipe(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    def default(words: list[str], flag: str) -> str:
        return next(word for word in words[words.index(flag) :] if word.startswith("["))

    assert default(help_of("--run", str(tmp_path), capsys=capsys), "--svi.steps") == "[6500]"
    recipe = str(write_recipe(tmp_path))
    assert default(help_of("--recipe", recipe, capsys=capsys), "--svi.steps") == "[12]"
    assert default(help_of("--recipe", recipe, "--svi.steps", "7", capsys=capsys), "--svi.steps") == "[7]"
    assert "--svi.steps" in help_of(
        "--recipe", recipe, "--svi.stepz", "7", capsys=capsys
    )  # for a wrong command line too


def test_help_begins_with_the_options_most_used(capsys: pytest.CaptureFixture[str]) -> None:
    words = help_of(capsys=capsys)
    flags = {option.name: option.flags for option in options_of(fit.Options)}
    shown = [word for word in words[words.index("used:") : words.index("more:")] if word.startswith("--")]
    assert shown == ["--help", *(flag for name in fit.FIRST for flag in flags[name])]
    assert len(fit.FIRST) == 10


def test_help_has_the_options_of_the_chosen_kernel_alone(capsys: pytest.CaptureFixture[str]) -> None:
    assert {"--kernel.members", "--kernel.num-steps"} <= {*help_of("--kernel", "mixture", capsys=capsys)}
    words = help_of("--kernel", "tempered", capsys=capsys)
    assert "--kernel.num-levels" in words and "--kernel.members" not in words and "--kernel.integrator" not in words


def test_options_that_the_kernel_ignores_are_named(points: Path, capsys: pytest.CaptureFixture[str]) -> None:
    command = ["--stage", "ebm", "--run", str(points), "--dry-run", "--objective", "mle"]
    fit.main([*command, "--kernel", "mala", "--kernel.num-levels", "3"])
    assert "note: kernel mala does not use kernel.num-steps, kernel.num-levels\n" in capsys.readouterr().out


# --- resuming ----------------------------------------------------------------------------------------


def weights(run: Path, stage: str) -> list[bytes]:
    folders = sorted((run / "checkpoints" / stage).iterdir())
    return [(folder / name).read_bytes() for folder in folders for name in ("weights.safetensors", "state.pt")]


def cut_back(run: Path, stage: str) -> None:
    """Remove a stage's last checkpoint, as if the run had been killed before it."""
    shutil.rmtree(max((run / "checkpoints" / stage).iterdir()))


@pytest.mark.parametrize("text", [POINTS, IMAGES], ids=["points", "images"])
@pytest.mark.parametrize("stage", ["svi", "ebm"])
def test_a_resumed_stage_equals_an_uninterrupted_one(tmp_path: Path, text: str, stage: str) -> None:
    run = fit_run(tmp_path, text)
    whole, records = weights(run, stage), Run(run).metrics(stage)
    cut_back(run, stage)
    assert weights(run, stage) != whole
    fit.main(["--stage", stage, "--run", str(run), "--resume"])
    assert weights(run, stage) == whole
    timeless = [{key: value for key, value in record.items() if key != "seconds"} for record in records]
    again = [{k: v for k, v in record.items() if k != "seconds"} for record in Run(run).metrics(stage)]
    assert again == timeless


@pytest.mark.slow
@pytest.mark.parametrize("stage", ["svi", "ebm"])
def test_a_killed_run_resumes_bit_for_bit(tmp_path: Path, stage: str) -> None:
    (tmp_path / "whole").mkdir()
    whole = fit_run(tmp_path / "whole", POINTS.replace("steps: 12", "steps: 400"))
    killed = tmp_path / "killed"
    shutil.copytree(whole, killed)
    shutil.rmtree(killed / "checkpoints" / stage)
    command = [sys.executable, "-m", "ppl_vaebm.fit", "--run", str(killed), "--stage"]
    with subprocess.Popen([*command, stage], stdout=subprocess.DEVNULL) as process:
        while len(list((killed / "checkpoints" / stage).glob("step-*"))) < 2:
            assert process.poll() is None, "it ended before it could be killed"
        process.kill()
    assert max((killed / "checkpoints" / stage).iterdir()).name < "step-00000400"
    subprocess.run([*command, stage, "--resume"], check=True, stdout=subprocess.DEVNULL)
    assert weights(killed, stage) == weights(whole, stage)


def test_another_seed_gives_other_weights(tmp_path: Path, points: Path) -> None:
    """The comparison of bytes can fail."""
    other = tmp_path / "other"
    fit.main(["--stage", "svi", "--recipe", str(write_recipe(tmp_path, POINTS + "seed: 1\n")), "--run", str(other)])
    assert weights(points, "svi") != weights(other, "svi")


# --- bad input ---------------------------------------------------------------------------------------


MODULES = ("fit", "sample", "diagnose", "compare", "evaluate")
MISTAKES = [
    (["fit", "--recipe", "cifarr"], "did you mean cifar10?"),
    (["fit", "--data", "minst"], "did you mean mnist?"),
    (["fit", "--svi.learning-rat", "1"], "did you mean --svi.learning-rate?"),
    (["fit", "--svi.steps", "many"], "--svi.steps: expected a whole number, found 'many'"),
    (["fit", "--svi.steps", "0"], "svi.steps must be positive, got 0"),
    (["fit", "--kernel", "hcm"], "did you mean hmc?"),
    (["fit", "--run", "file/run"], "expected a folder for the run at file/run, found a file"),
    (["sample", "runs/demoo"], "found nothing; make one with: .* did you mean runs/demo?"),
    (["sample", "runs/demo", "--given-values", "a,b"], "numbers with commas in --given-values, .*, found 'a,b'"),
    (["sample", "runs/demo", "--given-values", "nan,nan"], "numbers with commas .*, found no number in 'nan,nan'"),
    (["sample", "runs/demo", "--nmu", "3"], "unknown option --nmu; did you mean --num?"),
    (["sample", "runs/demo", "--mask", "m.png"], "--mask expects --given or --given-values, found neither"),
    (["sample"], "sample: expected RUN, a folder such as runs/demo, found none"),
    (["diagnose", "runs/demo", "--kernel", "pyro-nutz"], "did you mean pyro-nuts?"),
    (["compare", "runs/demo", "--kernels", "hmcc"], "unknown kernel 'hmcc': .* did you mean hmc?"),
    (["evaluate", "runs/demo", "--only", "likelyhood"], "unknown part 'likelyhood': .* did you mean likelihood?"),
    (["evaluate", "runs/demo", "--ood", "rotatet"], "did you mean rotated?"),
    (["evaluate", "runs/demo", "--num-particles", "8"], "num-particles must be at least 16, two for each .*, got 8"),
]
"""Command lines, and parts of the answers that they get without PyTorch."""
WITHOUT_TORCH = """
import contextlib, importlib, io, json, sys
sys.modules["torch"] = None  # so that an import of it fails
answers = []
for command, *argv in json.loads(sys.argv[1]):
    with contextlib.redirect_stderr(io.StringIO()) as output, contextlib.redirect_stdout(output):
        try:
            importlib.import_module(f"ppl_vaebm.{command}").main(argv)
        except SystemExit as stop:
            answers.append([stop.code, output.getvalue()])
print(json.dumps(answers))
"""


def without_torch(folder: Path, *commands: list[str]) -> list[tuple[int, str]]:
    """Run commands in one process that cannot import torch, and return their exit status and their output."""
    process = [sys.executable, "-c", WITHOUT_TORCH, json.dumps(commands)]
    done = subprocess.run(process, cwd=folder, env=ENVIRONMENT, check=True, capture_output=True)
    return [(status, text) for status, text in json.loads(done.stdout)]


def test_help_is_shown_without_torch(tmp_path: Path) -> None:
    for status, text in without_torch(tmp_path, *([module, "--help"] for module in MODULES)):
        assert status == 0 and "options" in text and "--seed" in text


def test_mistakes_are_answered_without_torch(tmp_path: Path) -> None:
    (tmp_path / "runs" / "demo").mkdir(parents=True)
    (tmp_path / "runs" / "demo" / "config.yaml").write_text("seed: 0")
    (tmp_path / "file").touch()
    answers = without_torch(tmp_path, *(argv for argv, _ in MISTAKES))
    for (argv, expected), (status, text) in zip(MISTAKES, answers, strict=True):
        pattern = "error: .*" + re.escape(expected).replace(re.escape(".*"), ".*") + ".*\n"
        assert status == 2 and re.fullmatch(pattern, text), (argv, text)


@pytest.mark.parametrize(
    ("argv", "words"),
    [
        (["--recipe", "cifarr"], ["cifarr", "gaussians25"]),
        (["--data", "moons"], ["moons", "gaussians25"]),
        (["--kernel", "hcm"], ["hcm", "hmc"]),
        (["--svi.lr", "1"], ["--svi.lr"]),
        (["--svi.learning-rate", "fast"], ["--svi.learning-rate", "fast"]),
        (["--svi.steps", "0"], ["svi.steps", "positive", "0"]),
        (["--model.min-x-scale", "1"], ["model.init-x-scale"]),
        (["--resume", "--overwrite"], ["resume", "overwrite"]),
        (["--run", ""], ["--run", "expected a value"]),
        (["--device", "gpu"], ["'gpu' (PyTorch knows no such device", "--device cpu"]),
        (["--device", "meta"], ["meta", "--device cpu"]),
        (["--kernel.members", "hmc", "mala"], ["kernel.members", "hmc", "mala"]),
        (["--stage", "svi", "--resume"], ["checkpoint", "svi", "--resume"]),
        (["--stage", "ebm"], ["stage svi", "--stage svi"]),
        (["--data", "mnist", "--data.root", "nowhere"], ["mnist", "nowhere", "--data.download"]),
        (["--data", "digits", "--model.kind", "vector"], ["model.kind", "vector"]),
        (["--data", "digits", "--model.latents", "2", "2", "2", "2"], ["model.latents"]),
        (["--data", "gaussians25", "--svi.batch-size", "200000"], ["200000"]),
    ],
)
def test_fit_refuses_in_one_sentence(
    tmp_path: Path, argv: list[str], words: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    run = tmp_path / "run"
    message = sentence(fit.main, ["--run", str(run), *argv], capsys)
    assert all(word in message for word in words), message
    assert not (run / "checkpoints").exists()


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("svi: {learning_rate: quick}", ["tiny.yaml", "learning-rate", "quick"]),
        ("svi: {learnin_rate: 1}", ["tiny.yaml", "learnin-rate"]),
        ("no mapping", ["tiny.yaml"]),
        ("svi: {steps: [", ["tiny.yaml", "YAML"]),
        ("kernel: {members: [langevin]}", ["tiny.yaml", "kernel.members"]),
        ("data: {download: 'yes'}", ["tiny.yaml", "yes"]),
        ("run: elsewhere", ["tiny.yaml", "--run"]),
        ("overwrite: true", ["tiny.yaml", "--overwrite"]),
        ("ebm: {replay_size: 1}", ["tiny.yaml", "ebm.replay-size"]),
    ],
)
def test_fit_refuses_a_bad_recipe(
    tmp_path: Path, text: str, words: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    recipe = write_recipe(tmp_path, text)
    message = sentence(fit.main, ["--recipe", str(recipe), "--run", str(tmp_path / "run")], capsys)
    assert all(word in message for word in words), message
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("main", [sample.main, diagnose.main, compare.main, evaluate.main])
def test_a_folder_that_is_no_run_is_refused(tmp_path: Path, main: Main, capsys: pytest.CaptureFixture[str]) -> None:
    assert "--stage svi" in sentence(main, [str(tmp_path)], capsys)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("main", "argv"),
    [(sample.main, ["--stage", "ebm"]), (diagnose.main, []), (compare.main, []), (evaluate.main, ["--stage", "ebm"])],
)
def test_a_run_without_an_energy_is_refused(
    tmp_path: Path, points: Path, main: Main, argv: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    run = copy_run(points, tmp_path)
    shutil.rmtree(run / "checkpoints" / "ebm")
    before = contents(run)
    assert "--stage ebm" in sentence(main, [str(run), *argv], capsys)
    assert contents(run) == before


@pytest.mark.parametrize(
    ("main", "argv", "words"),
    [
        (fit.main, ["--stage", "svi"], ["--resume", "--overwrite"]),
        (fit.main, ["--stage", "ebm"], ["--resume", "--overwrite"]),
        (fit.main, ["--stage", "ebm", "--overwrite", "--model.width", "9"], ["model.width", "svi"]),
        (fit.main, ["--stage", "ebm", "--resume", "--ebm.steps", "99"], ["ebm.steps", "ebm"]),
        (fit.main, ["--stage", "svi", "--resume", "--data.std", "0.1"], ["data.std"]),
        (fit.main, ["--stage", "ebm", "--overwrite", "--ebm.batch-size", "999", "--ebm.replay-size", "999"], ["999"]),
        (fit.main, ["--stage", "svi", "--overwrite", "--svi.batch-size", "999"], ["999"]),
        (fit.main, ["--stage", "ebm", "--overwrite", "--svi.steps", "13"], ["12 of 13", "--resume", "--svi.steps 12"]),
        (fit.main, ["--stage", "ebm", "--overwrite", "--kernel.members", "hmc", "pcn"], ["kernel.members"]),
        (diagnose.main, ["--kernel", "hmc", "--num-chains", "2", "--num-evals", "3"], ["4 draws"]),
        (compare.main, ["--kernels", "hmc,nope"], ["nope", "pyro-nuts"]),
        (compare.main, ["--kernels", "hmc,hmc"], ["different"]),
        (compare.main, ["--num-chains", "0"], ["num-chains"]),
        (compare.main, ["--num-seeds", "0"], ["num-seeds"]),
        (compare.main, ["--num-seconds", "-1"], ["num-seconds", "-1"]),
        (compare.main, ["--kernels", "hmc", "--keep"], ["--keep", "found none"]),
        (diagnose.main, ["--num-chains", "4", "--chains-per-start", "3"], ["multiple", "(3), got 4"]),
        (diagnose.main, ["--position-mib", "0"], ["position-mib"]),
        (diagnose.main, ["--kernel", "nope"], ["nope"]),
        (sample.main, ["--kernel", "nope"], ["nope"]),
        (sample.main, ["--num", "0"], ["num"]),
        (sample.main, ["--temperatures", "-1"], ["temperatures", "-1"]),
        (sample.main, ["--temperatures", "0.7"], ["temperatures", "--stage svi"]),
        (sample.main, ["--group", "z_2"], ["group", "--stage svi"]),
        (sample.main, ["--stage", "svi", "--group", "z_9"], ["z_9", "z_1 to z_2"]),
        (sample.main, ["--stage", "svi", "--kernel", "hmc"], ["kernel", "--stage ebm"]),
        (sample.main, ["--stage", "svi", "--num-steps", "5"], ["num-steps", "--stage ebm"]),
        (evaluate.main, ["--stage", "svi", "--steps", "5"], ["steps", "svi"]),
        (evaluate.main, ["--steps", "0"], ["steps"]),
        (evaluate.main, ["--num-z-draws", "1"], ["num-z-draws", "2"]),
    ],
)
def test_refusals_leave_a_run_as_it_was(
    points: Path, main: Main, argv: list[str], words: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    before = contents(points)
    run = ["--run", str(points)] if main is fit.main else [str(points)]
    message = sentence(main, [*run, *argv], capsys)
    assert all(word in message for word in words), message
    assert contents(points) == before


@pytest.mark.parametrize(
    ("name", "words"), [("manifest.json", ["schema"]), ("weights.safetensors", ["sha256"]), ("state.pt", ["sha256"])]
)
def test_a_damaged_checkpoint_is_refused(
    tmp_path: Path, points: Path, name: str, words: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    run = copy_run(points, tmp_path)
    for folder in (run / "checkpoints" / "svi").iterdir():
        file = folder / name
        damaged = (
            re.sub(rb'"schema": \d+', b'"schema": 999', file.read_bytes()) if words == ["schema"] else b"cut short"
        )
        file.write_bytes(damaged)
    message = sentence(sample.main, [str(run)], capsys)
    assert name in message and all(word in message for word in words), message


@pytest.mark.parametrize("name", ["evaluate.json", "samples/vae.npz"])
def test_a_damaged_result_is_named_by_the_report(tmp_path: Path, points: Path, name: str) -> None:
    run = copy_run(points, tmp_path)
    (run / name).parent.mkdir(exist_ok=True)
    (run / name).write_text("{cut short")
    with pytest.raises(InputError, match="cannot be read|expected sections of numbers"):
        write_report(Run(run))


def test_a_config_with_an_unknown_key_is_refused(
    tmp_path: Path, points: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = copy_run(points, tmp_path)
    with (run / "config.yaml").open("a") as file:
        file.write("colour: blue\n")
    message = sentence(sample.main, [str(run)], capsys)
    assert "config.yaml" in message and "colour" in message
