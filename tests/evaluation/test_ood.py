"""Scores of other images: areas that are known, and sets that no noise below a level gives away."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from ppl_vaebm.config import Config, DataConfig
from ppl_vaebm.data.load import load_data
from ppl_vaebm.data.splits import IntegerImages, image_data
from ppl_vaebm.errors import InputError
from ppl_vaebm.evaluation.likelihood import Scores, score, score_data
from ppl_vaebm.evaluation.ood import (
    SYNTHETIC,
    auroc_value,
    check_sets,
    images_of,
    levels_of,
    load_other,
    measure_ood,
    ood_sets,
)
from ppl_vaebm.evaluation.sections import Effort, Rows
from ppl_vaebm.inference.potential import noise_potential
from ppl_vaebm.models.energy import Energy
from ppl_vaebm.models.vaebm import VAEBM
from ppl_vaebm.rng import stream
from ppl_vaebm.runs.loading import LoadedRun
from ppl_vaebm.runs.run import Run
from tests.evaluation.test_evaluation import CENTER, MEAN, STD, WIDTH, loaded_run
from tests.judged import LEVELS, Brightness, image_levels, image_run, level_data
from tests.pixels import save
from tests.small_models import VARIANCE, linear_vae, log_normal

EFFORT = Effort(2, 2, 2, 20, (2,), num_scored=60, num_score_draws=2)


def areas(loaded: LoadedRun, *names: str) -> dict[str, Rows]:
    """Return the areas of each score by its name."""
    inside = score_data(loaded, "test", EFFORT, seed=0)
    sets = ood_sets(loaded, names, EFFORT.num_scored, seed=0)
    sections = measure_ood(loaded, inside, sets, EFFORT, seed=0).sections
    return {name.removeprefix("AUROC of "): rows for section in sections for name, rows in section.columns.items()}


def area(section: Rows, name: str) -> tuple[float, float]:
    cell = section[name]
    assert isinstance(cell, dict)
    return cell["value"], cell["error"]


# --- scores --------------------------------------------------------------------------------------


def test_scores_are_those_of_the_closed_form(tmp_path: Path) -> None:
    loaded = loaded_run(tmp_path)
    x = torch.linspace(-1.0, 2.0, 7).unsqueeze(1)
    found = score(loaded, x, num_draws=9_000, seed=0)
    log_p = log_normal(x.double(), 0.0, VARIANCE)
    torch.testing.assert_close(found.log_p, log_p, atol=0.05, rtol=0)  # errors of 0.01, by the draws of wider guides
    torch.testing.assert_close(found.minus_energy, -0.5 * ((x[:, 0].double() - CENTER) / WIDTH).square())
    differences = found.log_h.diff() - log_normal(x.double(), MEAN, STD**2).diff()
    assert float(differences.abs().max()) < 0.1  # the same but for log Z


def test_the_area_of_log_h_is_that_of_its_law(tmp_path: Path) -> None:
    """Both h and the others are Normals about one mean, so log h ranks by |x - MEAN|, whose ratio is a Cauchy."""
    loaded, width = loaded_run(tmp_path), 2.5
    num = 800
    inside = score_data(loaded, "test", EFFORT._replace(num_scored=num, num_score_draws=300), seed=0)
    x = MEAN + width * STD * torch.randn(num, 1, generator=stream(0, "others"))
    outside = score(loaded, x, num_draws=300, seed=1)
    cell = auroc_value(inside, outside, "log h")
    assert isinstance(cell, dict)
    assert abs(cell["value"] - 2 / math.pi * math.atan(width)) < 5 * cell["error"] < 0.1
    wrong = auroc_value(outside, inside, "log h")
    assert isinstance(wrong, dict) and wrong["value"] == pytest.approx(1 - cell["value"])


def test_the_energy_alone_knows_what_it_was_made_to_know(tmp_path: Path) -> None:
    dark = level_data(image_levels(40, high=4), image_levels(150, high=4, name="test"))
    knowing = areas(image_run(tmp_path, dark, Brightness(1e4)), "inverted", "rotated")
    assert area(knowing["-E"], "inverted") == area(knowing["log h"], "inverted") == (1.0, 0.0)
    value, error = area(knowing["-E"], "rotated")
    assert abs(value - 0.5) < 5 * error  # turned, and as bright as before
    mistaken = areas(image_run(tmp_path, dark, Brightness(-1e4)), "inverted")
    assert area(mistaken["-E"], "inverted") == area(mistaken["log h"], "inverted") == (0.0, 0.0)
    ignorant = areas(image_run(tmp_path, dark), "inverted", "noise")
    assert all(area(ignorant["-E"], name)[0] == 0.5 for name in ("inverted", "noise"))
    assert all(area(ignorant["log h"], name) == area(ignorant["log p"], name) for name in ("inverted", "noise"))


@pytest.mark.parametrize(("bad", "is_flagged"), [(math.nan, True), (math.inf, True), (-math.inf, False)])
def test_scores_that_are_not_finite_are_said(bad: float, is_flagged: bool) -> None:
    inside = Scores(torch.arange(4.0).double(), torch.zeros(4).double())
    outside = Scores(torch.tensor([bad, -1.0, -2.0]).double(), torch.zeros(3).double())
    cell = auroc_value(inside, outside, "log h")
    assert outside.num_not_finite == 1
    if is_flagged:
        assert isinstance(cell, str) and "0 test images and 1 of these" in cell
    else:
        assert isinstance(cell, dict) and cell["value"] == 1.0  # an impossible image ranks last
    assert isinstance(auroc_value(inside, outside, "-E"), dict)


# --- sets ----------------------------------------------------------------------------------------


class SubLevelNoise(Energy):
    """How far pixels lie from the middles of their levels: what no image file holds."""

    def forward(self, x: Tensor, z: dict[str, Tensor] | None = None) -> Tensor:
        within = (x.double() + 1) * (LEVELS / 2)
        return 1e3 * (within - within.floor() - 0.5).square().flatten(1).mean(1)


def test_no_set_is_given_away_by_its_noise_below_a_level(tmp_path: Path) -> None:
    data = level_data(image_levels(40), image_levels(200, name="test"))
    loaded = image_run(tmp_path, data, SubLevelNoise())
    found = areas(loaded, *SYNTHETIC)["-E"]
    for name in SYNTHETIC:
        value, error = area(found, name)
        assert abs(value - 0.5) < 5 * error, name
    # Of the middles of levels it would be plain to see, and of means of dequantised images of one level.
    one, two = (data.test.batch(torch.arange(60), stream(0, name)) for name in ("one", "two"))
    inside = score_data(loaded, "test", EFFORT, seed=0).minus_energy
    for given_away in (0.5 * (one + two), (2 * levels_of(one, data) + 1) / LEVELS - 1):
        outside = -loaded.vaebm.energy(given_away)
        assert bool((inside.mean() - outside.mean()).abs() > 5 * inside.std() / math.sqrt(60))


def test_data_of_uniform_levels_cannot_be_told_from_the_set_noise(tmp_path: Path) -> None:
    loaded = image_run(tmp_path, level_data(image_levels(40), image_levels(200, name="test")), Brightness(50.0))
    for section in ("log h", "log p", "-E"):
        value, error = area(areas(loaded, "noise")[section], "noise")
        assert abs(value - 0.5) < 5 * error


def test_levels_come_back(tmp_path: Path) -> None:
    levels = image_levels(30).long()
    data = level_data(image_levels(10), image_levels(10))
    assert torch.equal(levels_of(images_of(levels, data, stream(0, "u")), data), levels)
    assert int(levels_of(torch.tensor([[-9.0, 9.0]]), data).sum()) == LEVELS - 1
    splits = [IntegerImages(image_levels(5, high=256), None, 256, is_binarized=True)] * 3
    binary = image_data("black and white", torch.Size([1, 8, 8]), splits)
    values = images_of(torch.tensor([0, 1]), binary, stream(0, "u"))
    assert values.tolist() == [-1.0, 1.0] and levels_of(values, binary).tolist() == [0, 1]


def test_synthetic_sets_are_what_they_are_called(tmp_path: Path) -> None:
    test = image_levels(20, name="test")
    test[:] = torch.arange(20, dtype=torch.uint8).clamp(max=LEVELS - 1)[:, None, None, None]
    test[:, :, 0, 0] = 0  # a corner
    loaded = image_run(tmp_path, level_data(image_levels(10), test))
    made = {name: make(loaded, test.long(), 0) for name, (make, _) in SYNTHETIC.items()}
    assert all(levels.shape == test.shape for levels in made.values())
    assert all(0 <= int(levels.min()) and int(levels.max()) < LEVELS for levels in made.values())
    assert bool((made["rotated"][:, :, -1, 0] == 0).all()) and bool((made["rotated"][1:, :, 0, 0] > 0).all())
    assert torch.equal(made["inverted"], LEVELS - 1 - test.long())
    assert bool((made["constant"].flatten(1) == made["constant"].flatten(1)[:, :1]).all())
    assert len(made["constant"].flatten(1)[:, 0].unique()) > 5
    assert len(made["noise"].unique()) == LEVELS
    # Half way to another image, but for half levels.
    partner = 2 * made["interpolation"].double().flatten(1).mean(1) - test.double().flatten(1).mean(1)
    assert bool((made["interpolation"][:, :, 0, 0] == 0).all())
    assert -1 < float(partner.min()) and float(partner.max()) < LEVELS + 1 and float(partner.std()) > 1


def test_other_data_are_brought_to_the_shape_or_refused(tmp_path: Path) -> None:
    loaded = image_run(tmp_path, level_data(image_levels(10), image_levels(10)))
    data, what = load_other("digits", loaded, None)
    assert data.name == "digits" and data.event_shape == (1, 8, 8) and what == "test split of digits"
    for name in ("cifar10", "gaussians25"):
        with pytest.raises(InputError, match=f"--ood {name}: expected images of shape 1 x 8 x 8.*found shape"):
            load_other(name, loaded, str(tmp_path))
    with pytest.raises(InputError, match="MNIST"):  # of that size once resized, but not there
        load_other("mnist", loaded, str(tmp_path))


def test_sets_that_make_no_sense_are_refused_before_anything_else(tmp_path: Path) -> None:
    config = Config(data=DataConfig(name="digits"))
    loaded = image_run(tmp_path, load_data(config.data, 0))
    cases = {("nosie",): "unknown set 'nosie': expected some of", ("vae", "vae"): "different", ("digits",): "another"}
    for names, message in cases.items():
        with pytest.raises(InputError, match=message):
            check_sets(names, loaded)
    vaebm = VAEBM(linear_vae(), Brightness(0.0))
    points = LoadedRun(Run(tmp_path), Config(), loaded_run(tmp_path).data, vaebm, noise_potential(vaebm))
    with pytest.raises(InputError, match="are points"):
        check_sets(("noise",), points)


# --- folders of images ---------------------------------------------------------------------------


def write_folder(folder: Path, sides: Sequence[tuple[int, int]], num: int = 60) -> None:
    """Write grey images of one level each, 10 to 250, of these heights and widths in turn."""
    for index in range(num):
        level = 10 + 240 * index // (num - 1)
        save(folder / f"{index:03}.png", np.full(sides[index % len(sides)], level, dtype=np.uint8))


def folder_run(folder: Path, name: str = "image-folder") -> LoadedRun:
    """Make a run of 1 x 8 x 8 images that was fitted on a folder."""
    data = level_data(image_levels(30), image_levels(30, name="test"), name)
    loaded = image_run(folder, data)
    return replace(loaded, config=replace(loaded.config, data=DataConfig(name=name, root=str(folder))))  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("sides", "is_resized"),
    [([(12, 10), (9, 9)], True), ([(16, 16)], True), ([(8, 8)], False)],
    ids=["many sizes", "another size", "the run's size"],
)
def test_a_folder_is_brought_to_the_size_of_the_runs_images(
    tmp_path: Path, sides: list[tuple[int, int]], is_resized: bool
) -> None:
    write_folder(tmp_path / "others", sides)
    loaded = image_run(tmp_path / "run", level_data(image_levels(30), image_levels(30, name="test")))
    data, what = load_other("image-folder", loaded, str(tmp_path / "others"))
    assert data.event_shape == (1, 8, 8) and what.startswith("test split of image-folder")
    assert ("resized" in what) == is_resized
    x = data.test.batch(torch.arange(len(data.test)), stream(0, "u"))
    assert float((x.amax((1, 2, 3)) - x.amin((1, 2, 3))).max()) < 2 / 256  # of one level each, as the files are
    found = ood_sets(loaded, ("image-folder",), 4, seed=0, root=str(tmp_path / "others"))["image-folder"]
    assert found.x.shape[1:] == (1, 8, 8) and 2 <= len(found.x) <= 4


def test_a_folder_that_cannot_be_had_is_named_with_the_option_that_there_is(tmp_path: Path) -> None:
    loaded = image_run(tmp_path / "run", level_data(image_levels(30), image_levels(30, name="test")))
    with pytest.raises(InputError, match="--ood image-folder: expected a folder of images at .*none.*--ood-root names"):
        load_other("image-folder", loaded, str(tmp_path / "nowhere"))
    write_folder(tmp_path / "broken", [(12, 10), (9, 9)])
    (tmp_path / "broken" / "bad.png").write_bytes(b"no image")
    with pytest.raises(InputError, match=r"--ood image-folder: .*bad\.png"):
        load_other("image-folder", loaded, str(tmp_path / "broken"))
    save(tmp_path / "coloured" / "0.png", np.zeros((9, 12, 3), dtype=np.uint8))
    write_folder(tmp_path / "coloured" / "more", [(12, 10)])
    with pytest.raises(InputError, match="expected images of shape 1 x 8 x 8.*found another shape"):
        load_other("image-folder", loaded, str(tmp_path / "coloured"))


@pytest.mark.parametrize("name", ["image-folder", "celeba-hq"])
def test_a_second_folder_is_another_set(tmp_path: Path, name: str) -> None:
    own, other = tmp_path / "own", tmp_path / "other"
    write_folder(other, [(9, 9), (10, 12)])
    own.mkdir()
    (tmp_path / "link").symlink_to(own)
    loaded = folder_run(own)
    for root in (None, str(own), f"{own}/../own/", str(tmp_path / "link")):
        with pytest.raises(InputError, match=f"another distribution, found {name}.*another folder with --ood-root"):
            check_sets((name,), loaded, root)
    check_sets((name,), loaded, str(other))
    found = ood_sets(loaded, ("image-folder",), 5, seed=0, root=str(other))
    assert len(found["image-folder"].x) >= 2


def test_sets_of_a_name_are_the_same_in_every_folder(tmp_path: Path) -> None:
    for root in (None, str(tmp_path / "other")):
        with pytest.raises(InputError, match="found mnist, which the run was fitted to; leave it out"):
            check_sets(("mnist",), folder_run(tmp_path, "mnist"), root)
    check_sets(("image-folder",), folder_run(tmp_path, "mnist"), None)


def test_a_folder_for_sets_without_files_is_refused(tmp_path: Path) -> None:
    loaded = folder_run(tmp_path, "mnist")
    with pytest.raises(InputError, match="--ood-root: .*found only noise, vae"):
        check_sets(("noise", "vae"), loaded, str(tmp_path))
    check_sets(("noise", "digits"), loaded, str(tmp_path))
    check_sets(("noise", "vae"), loaded)
