"""Whole evaluations: every part on a run of images, and what the command says to bad input."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import get_args

import numpy as np
import pytest
import torch

from ppl_vaebm import evaluate
from ppl_vaebm.config.evaluation import PARTS, Part, split_parts
from ppl_vaebm.data.splits import IntegerImages, image_data
from ppl_vaebm.errors import InputError
from ppl_vaebm.evaluation import evaluation
from ppl_vaebm.evaluation import evaluation as evaluation_plan
from ppl_vaebm.evaluation.evaluation import Evaluation, Plan
from ppl_vaebm.evaluation.evaluation import evaluate as evaluate_parts
from ppl_vaebm.evaluation.likelihood import SCORES
from ppl_vaebm.evaluation.ood import SYNTHETIC
from ppl_vaebm.evaluation.sections import Effort
from ppl_vaebm.evaluation.store import read_parts, store
from ppl_vaebm.inference import sampling
from ppl_vaebm.reports import report
from ppl_vaebm.reports.evaluation import PICTURES
from ppl_vaebm.reports.sections import evaluation_contents
from ppl_vaebm.runs.loading import LoadedRun
from ppl_vaebm.runs.run import Run
from tests.evaluation.test_evaluation import loaded_run
from tests.judged import LEVELS, Brightness, PixelNet, columns_of, image_levels, image_run, level_data
from tests.tiny import IMAGES, fit_run, write_empty_report

EFFORT = Effort(20, 2, 100, num_samples=30, steps=(1, 3), num_scored=20, num_score_draws=2)
WITHOUT_LOG_Z: tuple[Part, ...] = tuple(part for part in PARTS if part != "log-z")
FEW = ["--num-test", "20", "--num-importance", "4", "--num-z-draws", "200", "--num-samples", "30"]


@pytest.fixture
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sampling, "BLOCK", 15)
    monkeypatch.setattr(sampling, "NUM_PILOT_STEPS", 3)
    monkeypatch.setattr(report, "write_report", write_empty_report)


def test_every_part_is_measured_and_pictured(tmp_path: Path, quick: None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(evaluation_plan, "feature_net", lambda *options: PixelNet())
    data = level_data(image_levels(120), image_levels(60, name="test"))
    loaded = image_run(Run.create(tmp_path / "run").path, data, Brightness(3.0))
    plan = Plan(EFFORT, WITHOUT_LOG_Z, features="classifier", ood=tuple(SYNTHETIC))
    found = dict(evaluate_parts(loaded, plan))
    assert tuple(found) == WITHOUT_LOG_Z
    assert {part for part, measured in found.items() if measured.arrays} == set(PICTURES)
    titles = [section.title for measured in found.values() for section in measured.sections]
    assert len(titles) == len(set(titles))  # no part hides another's numbers
    for part, measured in found.items():
        store(loaded.run, part, measured, "ab", 0)
    section = evaluation_contents(loaded.run)
    assert section is not None and len(section.pictures) == len(PICTURES)
    assert all("Good: " in picture.note for picture in section.pictures)
    assert any(table.caption == "pixels, 30 samples" and len(table.header) == 9 for table in section.tables)
    assert section.notes == [f"{part}: seed 0, weights ab" for part in WITHOUT_LOG_Z]


def test_neighbours_alone_take_the_first_samples_of_all(
    tmp_path: Path, quick: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    loaded = image_run(tmp_path, level_data(image_levels(60), image_levels(40, name="test")))
    alone = Evaluation(loaded, Plan(EFFORT, ("neighbours",))).measure("neighbours")
    monkeypatch.setattr(evaluation_plan, "feature_net", lambda *options: PixelNet())
    beside = Evaluation(loaded, Plan(EFFORT, ("samples", "neighbours"), features="classifier")).measure("neighbours")
    np.testing.assert_array_equal(alone.arrays["samples"], beside.arrays["samples"])
    # Without labels there is no network unless one is asked for.
    assert all(len(measured.sections[0].columns) == num for measured, num in ((alone, 1), (beside, 2)))


@pytest.mark.parametrize(
    ("plan", "message"),
    [
        (Plan(EFFORT, ("neighbours",)), "neighbours are those of images"),
        (Plan(EFFORT, ("samples",), features="inception"), "--features are those of images"),
        (Plan(EFFORT, ("ood",), ood=("noise",)), "are points"),
        (Plan(EFFORT, ("ood",)), "name them with --ood"),
    ],
)
def test_parts_that_do_not_go_with_points_are_refused(tmp_path: Path, plan: Plan, message: str) -> None:
    with pytest.raises(InputError, match=message):
        Evaluation(loaded_run(tmp_path), plan)


@pytest.fixture
def unmeasured(monkeypatch: pytest.MonkeyPatch) -> None:
    """Fail where a likelihood is measured."""

    def too_early(*options: object) -> None:
        raise AssertionError("the likelihood comes after the network")

    monkeypatch.setattr(evaluation, "likelihood_terms", too_early)


def labelled_run(folder: Path) -> LoadedRun:
    train, test = image_levels(60), image_levels(40, name="test")
    splits = [IntegerImages(images, torch.arange(len(images)) % 3, LEVELS) for images in (train, test, test)]
    return image_run(folder, image_data("levels", train.shape[1:], splits))


@pytest.mark.parametrize("part", ["samples", "neighbours"])
def test_a_network_that_cannot_be_had_is_refused_before_the_likelihood(
    tmp_path: Path, unmeasured: None, part: Part, monkeypatch: pytest.MonkeyPatch
) -> None:
    loaded = labelled_run(tmp_path)
    parts: tuple[Part, ...] = ("likelihood", part)
    with pytest.raises(InputError, match="expected the weights of a classifier in .*none, found no file"):
        next(evaluate_parts(loaded, Plan(EFFORT, parts, feature_weights=tmp_path / "none")))
    with pytest.raises(InputError, match="expected weights of Inception-v3|need the package"):
        next(evaluate_parts(loaded, Plan(EFFORT, parts, features="inception", feature_weights=tmp_path / "none")))
    monkeypatch.setitem(sys.modules, "torch_fidelity", None)
    with pytest.raises(InputError, match="need the package torch-fidelity"):
        next(evaluate_parts(loaded, Plan(EFFORT, parts, features="inception")))
    monkeypatch.setattr(evaluation_plan, "feature_net", lambda *options: pytest.fail("trained for too few samples"))
    few = {"num_samples": 9}, {"num_reference": 19}
    for effort in few:
        with pytest.raises(InputError, match=f"at least 10 samples.*or leave {part} out with --only"):
            next(evaluate_parts(loaded, Plan(EFFORT._replace(**effort), parts)))  # type: ignore[arg-type]


def test_no_network_is_looked_for_where_no_part_takes_one(tmp_path: Path, unmeasured: None) -> None:
    plan = Plan(EFFORT._replace(num_samples=9), ("likelihood", "histograms"))
    with pytest.raises(AssertionError, match="after the network"):
        next(evaluate_parts(labelled_run(tmp_path), plan))


def test_weights_without_a_network_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    loaded = image_run(tmp_path, level_data(image_levels(60), image_levels(40, name="test")))
    with pytest.raises(InputError, match="--feature-weights .* no labels for one; name --features inception"):
        Evaluation(loaded, Plan(EFFORT, ("samples",), feature_weights=tmp_path / "w"))
    monkeypatch.setattr(evaluation_plan, "feature_net", lambda *options: PixelNet())
    named = Evaluation(loaded, Plan(EFFORT, ("samples",), features="inception", feature_weights=tmp_path / "w"))
    assert named.judge is not None
    assert Evaluation(loaded, Plan(EFFORT, ("samples",))).judge is None


# --- the command ---------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def points(tmp_path_factory: pytest.TempPathFactory) -> Path:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(report, "write_report", write_empty_report)
        return fit_run(tmp_path_factory.mktemp("points"))


def test_parts_can_be_measured_one_by_one(points: Path, quick: None, capsys: pytest.CaptureFixture[str]) -> None:
    evaluate.main([str(points), *FEW, "--only", "histograms", "--num-ood", "10", "--num-ood-importance", "2"])
    first = read_parts(Run(points))
    assert list(first["histograms"].sections[0].columns) == list(SCORES) and "log h" in capsys.readouterr().out
    evaluate.main([str(points), *FEW, "--only", "likelihood"])
    both = read_parts(Run(points))
    assert set(both) == {"likelihood", "histograms"} and both["histograms"] == first["histograms"]
    evaluate.main([str(points), *FEW, "--stage", "svi", "--only", "samples"])
    assert list(read_parts(Run(points))) == ["samples"]


def test_an_old_name_of_a_part_is_accepted_with_a_note(points: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert split_parts("ood, normaliser") == ("ood", "log-z")
    with pytest.raises(SystemExit):
        evaluate.main([str(points), "--only", "normaliser", "--stage", "svi"])
    note, error = capsys.readouterr().err.splitlines()
    assert note == "note: the part normaliser is called log-z now" and "log-z not" in error


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["--only", "log-z,normaliser"], ["different parts", "log-z, log-z"]),
        (["--only", "likelyhood"], ["unknown part", "expected some of likelihood", "did you mean likelihood?"]),
        (["--only", ","], ["parts", "none"]),
        (["--ood", "noise"], ["are points"]),
        (["--ood", "noise", "--only", "samples"], ["add ood to it"]),
        (["--only", "ood", "--stage", "svi"], ["stage svi", "ood not"]),
        (["--ood", "noise", "--stage", "svi"], ["stage svi has none"]),
        (["--num-ood", "1"], ["num-ood", "at least 2"]),
        (["--num-reference", "0"], ["num-reference", "at least 2"]),
        (["--features", "inseption"], ["classifier", "inception"]),
        (["--features", "inception"], ["--features are those of images"]),
        (["--features", "inception", "--stage", "svi"], ["--features are those of images"]),
        (["--feature-weights", "w"], ["--feature-weights are those of images"]),
        (["--feature-weights", "w", "--stage", "svi"], ["--feature-weights are those of images"]),
        (["--features", "inception", "--only", "likelihood"], ["features", "samples or neighbours", "leave it out"]),
        (["--feature-weights", "w", "--only", "histograms"], ["feature-weights", "samples or neighbours"]),
        (["--ood-root", "images"], ["ood-root", "the part ood", "leave it out"]),
        (["--ood-root", "images", "--stage", "svi"], ["ood-root", "the part ood"]),
        (["--num-particles", "256"], ["num-particles", "--log-likelihood", "leave it out"]),
        (["--num-temperatures", "9"], ["num-temperatures", "--log-likelihood"]),
        (["--num-particles", "64", "--stage", "svi"], ["num-particles", "--log-likelihood"]),
    ],
)
def test_options_that_cannot_work_end_in_a_sentence(
    points: Path, options: list[str], words: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    before = (points / "evaluate.json").read_bytes() if (points / "evaluate.json").exists() else None
    with pytest.raises(SystemExit) as ended:
        evaluate.main([str(points), *options])
    said = capsys.readouterr().err
    assert ended.value.code == 2 and said.startswith("error: ") and said.count("\n") == 1
    assert all(word in said for word in words), said
    assert before is None or (points / "evaluate.json").read_bytes() == before


def test_a_damaged_file_is_refused_before_anything_is_measured(
    tmp_path: Path, points: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = Run.create(tmp_path / "run")
    run.config_file.write_text((points / "config.yaml").read_text())
    run.evaluation_file.write_text("[]")
    with pytest.raises(SystemExit) as ended:
        evaluate.main([str(run.path)])
    assert ended.value.code == 2 and "evaluate.json, found something else" in capsys.readouterr().err


@pytest.mark.slow
def test_the_command_on_images(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """With the classifier that it trains, and the report that it draws."""
    run = fit_run(tmp_path, IMAGES)
    few = [*FEW, "--num-ood", "20", "--num-ood-importance", "2", "--ood", "noise,vae", "--steps", "1", "2"]
    evaluate.main([str(run), *few])
    parts = read_parts(Run(run))
    areas = columns_of(parts["ood"].sections, "test data against others, 20 test images, 2 draws of z")
    assert list(areas["AUROC of log h"]) == ["noise", "vae"]
    metrics = columns_of(parts["samples"].sections, "cnn-digits, 30 samples")
    assert "VAEBM, 2 mala steps" in metrics["Frechet distance"]
    assert "30 samples are fewer than the 64 features" in capsys.readouterr().out
    assert (run / "report.html").read_text().count("<img") >= 6
    assert set(parts) == set(get_args(Part)) - {"log-z"}
