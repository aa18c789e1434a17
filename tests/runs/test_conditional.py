"""``sample --given``: what it writes, what it says of the chains, and what it refuses."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from PIL import Image

from ppl_vaebm import sample
from ppl_vaebm.config import DataConfig, KernelConfig
from ppl_vaebm.data.load import load_data
from ppl_vaebm.data.splits import Data, IntegerImages, image_data
from ppl_vaebm.errors import InputError
from ppl_vaebm.inference.conditioning import condition
from ppl_vaebm.inference.diagnostics.arviz_io import load_netcdf
from ppl_vaebm.inference.diagnostics.summary import QuantitySummary
from ppl_vaebm.models.vaebm import VAEBM
from ppl_vaebm.runs import conditional
from ppl_vaebm.runs.given import GivenOptions, read_given
from ppl_vaebm.runs.loading import load_run
from tests.small_models import VARIANCE, A, S, ZeroEnergy, linear_vae
from tests.tiny import IMAGES, POINTS, fit_run

SHORT = ["--num-chains", "4", "--num-warmup", "5", "--num-draws", "12"]
FEW = ["--num", "20"]


pytestmark = pytest.mark.usefixtures("blank_pictures", "quick_reports")


@pytest.fixture(scope="module")
def points(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return fit_run(tmp_path_factory.mktemp("points"), POINTS)


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return fit_run(tmp_path_factory.mktemp("images"), IMAGES)


def save_png(path: Path, pixels: NDArray[np.uint8]) -> str:
    Image.fromarray(pixels).save(path)
    return str(path)


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """Files that a user might give, by what they are."""
    folder = tmp_path_factory.mktemp("files")
    ramp = np.arange(64, dtype=np.uint8).reshape(8, 8) * 4
    mask = np.zeros((8, 8), np.uint8)
    mask[:4] = 255
    colours = np.stack([ramp, ramp, 255 - ramp], axis=-1)
    made = {
        "image": ramp,
        "mask": mask,
        "coarse": ramp[:4, :4],
        "colours": colours,
        "grey in colour": np.stack([ramp] * 3, axis=-1),
        "small mask": mask[:7, :7],
        "grey mask": np.full((8, 8), 128, np.uint8),
        "black mask": np.zeros((8, 8), np.uint8),
        "white mask": np.full((8, 8), 255, np.uint8),
    }
    found = {name: save_png(folder / f"{name}.png", pixels) for name, pixels in made.items()}
    arrays = {
        "array": np.linspace(-1, 0.9, 64).reshape(8, 8),
        "wild array": np.full((8, 8), 3.0),
        "long array": np.zeros((9, 9)),
        "nan array": np.full((8, 8), np.nan),
    }
    for name, array in arrays.items():
        found[name] = str(folder / f"{name}.npy")
        np.save(found[name], array)
    found["text"] = str(folder / "text.png")
    Path(found["text"]).write_text("no image")
    found["missing"] = str(folder / "missing.png")
    return found


def samples_of(run: Path) -> dict[str, NDArray[Any]]:
    with np.load(run / "samples" / "conditional.npz") as file:
        return dict(file)


# --- what it writes --------------------------------------------------------------------------------


def test_a_part_of_an_image_stays_and_the_rest_is_drawn(
    images: Path, files: dict[str, str], capsys: pytest.CaptureFixture[str]
) -> None:
    sample.main([str(images), "--given", files["image"], "--mask", files["mask"], *SHORT, *FEW])
    found = samples_of(images)
    mask = found["mask"]
    assert found["x"].shape == (20, 1, 8, 8) and mask.sum() == 32 and mask[0, :4].all()
    # The level of a byte v of 17 is floor(17 v / 256), and x the centre of its cell.
    levels = np.arange(64).reshape(1, 8, 8) * 4 * 17 // 256
    np.testing.assert_allclose(found["given"], (2 * levels + 1) / 17 - 1)
    np.testing.assert_allclose(found["x"][:, mask], np.broadcast_to(found["given"][mask], (20, 32)), rtol=1e-6)
    assert (found["sd"][mask] == 0).all() and (found["sd"][~mask] > 0).all()
    assert np.isnan(found["r_hat"][mask]).all() and np.isfinite(found["r_hat"][~mask]).all()
    np.testing.assert_allclose(found["mean"][mask], found["given"][mask], rtol=1e-6)
    assert (images / "samples" / "conditional.png").is_file()
    idata = load_netcdf(images / "samples" / "conditional.nc")
    assert idata["posterior"].sizes["chain"] == 4 and "misfit" in idata["posterior"]
    assert re.search(r"R-hat: largest of quantities \S+ \(.*\), of values of x \d", capsys.readouterr().out)


@pytest.mark.parametrize(
    "options",
    [
        ["coarse", "--noise-sd", "0.5", "--subsample", "2"],
        ["image", "--noise-sd", "0.5", "--mask", "mask", "--stage", "svi"],
        pytest.param(["image", "--noise-sd", "0.3"], marks=pytest.mark.slow),
        pytest.param(["image", "--noise-sd", "0.2", "--blur", "0.8"], marks=pytest.mark.slow),
        pytest.param(["array", "--mask", "mask", "--kernel", "mala"], marks=pytest.mark.slow),
        pytest.param(["grey in colour", "--mask", "mask"], marks=pytest.mark.slow),
        pytest.param(["image", "--mask", "mask", "--stage", "svi"], marks=pytest.mark.slow),
    ],
    ids=" ".join,
)
def test_every_kind_of_observation_gives_draws(images: Path, files: dict[str, str], options: list[str]) -> None:
    given, *rest = [files.get(word, word) for word in options]
    sample.main([str(images), "--given", given, *rest, *SHORT, *FEW])
    assert np.isfinite(samples_of(images)["x"]).all()


def test_a_point_is_given_by_its_values(points: Path) -> None:
    sample.main([str(points), "--given-values", "0.5,nan", *SHORT, *FEW])
    found = samples_of(points)
    assert (found["x"][:, 0] == 0.5).all() and found["sd"][0] == 0 and found["sd"][1] > 0
    sample.main([str(points), "--given-values", "nan,-1", "--noise-sd", "0.1", *SHORT, *FEW])
    assert samples_of(points)["mask"].tolist() == [False, True]


def test_draws_repeat_with_the_seed(points: Path) -> None:
    loaded = load_run(points)
    options = GivenOptions(given_values="0.5,nan", num_chains=4, num_warmup=5, num_draws=12)
    draws = []
    for seed in (0, 0, 1):
        conditional.sample_given(loaded, options, conditional.kernel_of(loaded, None), num=20, seed=seed)
        draws.append(samples_of(points)["x"])
    assert np.array_equal(draws[0], draws[1]) and not np.array_equal(draws[0], draws[2])


# --- what it says ----------------------------------------------------------------------------------


def test_moments_are_those_of_the_linear_model() -> None:
    """Of x = a z + s e, seen with noise of variance v, the posterior is known."""
    noise_sd = 0.6
    potential = condition(
        VAEBM(linear_vae(), ZeroEnergy()), given=torch.tensor([1.2], dtype=torch.float64), noise_sd=noise_sd
    )
    posterior = conditional.sample_posterior(
        potential, KernelConfig("hmc"), num=50, num_chains=16, num_warmup=50, num_draws=150, seed=0
    )
    gain = VARIANCE / (VARIANCE + noise_sd**2)
    sd = (VARIANCE * (1 - gain)) ** 0.5
    assert posterior.x.shape == (50, 1)
    error = sd / (16 * 150 / 4) ** 0.5  # were only every fourth draw independent
    assert abs(float(posterior.mean[0]) - 1.2 * gain) < 5 * error
    assert abs(float(posterior.sd[0]) / sd - 1) < 5 / (2 * 16 * 150 / 4) ** 0.5
    assert posterior.r_hat[0] < 1.1
    assert A**2 + S**2 == VARIANCE
    misfit = posterior.chains.draws["misfit"]
    expected = 0.5 * ((1.2 - posterior.chains.draws["value"][..., 0]) / noise_sd) ** 2
    torch.testing.assert_close(misfit, expected)
    assert posterior.chains.draws["energy"].abs().max() < 1e-12


def summary(r_hat: float) -> QuantitySummary:
    fields = dict.fromkeys(QuantitySummary._fields, 500.0)
    return QuantitySummary(**{**fields, "name": "energy", "r_hat": r_hat})  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("functional", "value", "is_flagged"),
    [(1.005, 1.005, False), (1.02, 1.005, True), (1.005, 1.02, True), (np.nan, 1.0, True), (1.0, np.nan, True)],
)
def test_chains_that_disagree_are_flagged(functional: float, value: float, is_flagged: bool) -> None:
    posterior = conditional.Posterior(
        x=torch.zeros(1, 2),
        mean=np.zeros(2),
        sd=np.array([0.0, 1.0]),
        r_hat=np.array([np.nan, value]),
        chains=None,  # type: ignore[arg-type]
    )
    assert ("NOT CONVERGED" in conditional.convergence_line(posterior, [summary(functional)])) == is_flagged


# --- how it reads ----------------------------------------------------------------------------------


def padded_data(name: str = "mnist") -> tuple[Data, DataConfig]:
    images = torch.zeros(3, 1, 32, 32, dtype=torch.uint8)
    return image_data(name, torch.Size([1, 32, 32]), [IntegerImages(images)] * 3), DataConfig(name)  # type: ignore[arg-type]


@pytest.mark.parametrize("side", [28, 32])
def test_an_image_of_the_data_sets_own_size_is_padded_as_they_are(tmp_path: Path, side: int) -> None:
    pixels = np.full((side, side), 200, np.uint8)
    mask = np.full((side, side), 255, np.uint8)
    mask[-1] = 0
    options = GivenOptions(given=save_png(tmp_path / "x.png", pixels), mask=save_png(tmp_path / "m.png", mask))
    given = read_given(options, *padded_data())
    assert given.given.shape == (1, 32, 32) and given.mask is not None
    border = (32 - side) // 2
    inner = given.given[0, border : 32 - border, border : 32 - border]
    assert torch.equal(inner, torch.full_like(inner, 401 / 256 - 1))
    assert int(given.mask.sum()) == side * (side - 1)  # what was padded is not observed
    if border:
        assert torch.equal(given.given[0, 0], torch.full_like(given.given[0, 0], 1 / 256 - 1))


@pytest.mark.parametrize("name", ["celeba", "image-folder"])
def test_an_image_is_padded_before_it_is_resized_as_images_of_a_folder_are(tmp_path: Path, name: str) -> None:
    images = torch.zeros(3, 3, 32, 32, dtype=torch.uint8)
    data = image_data(name, torch.Size([3, 32, 32]), [IntegerImages(images)] * 3)
    config = DataConfig(name, padding=8, image_size=32)  # type: ignore[arg-type]
    pixels = np.full((48, 48, 3), 200, np.uint8)
    options = GivenOptions(given=save_png(tmp_path / "x.png", pixels), noise_sd=0.1)
    x = read_given(options, data, config).given
    black, light = 1 / 256 - 1, 401 / 256 - 1
    assert x[:, :3].allclose(torch.tensor(black, dtype=x.dtype))
    assert x[:, 6:26, 6:26].allclose(torch.tensor(light, dtype=x.dtype))


def test_pixels_of_binarised_images_are_signs(tmp_path: Path) -> None:
    images = torch.zeros(3, 1, 8, 8, dtype=torch.uint8)
    data = image_data("mnist", torch.Size([1, 8, 8]), [IntegerImages(images, is_binarized=True)] * 3)
    pixels = np.full((8, 8), 200, np.uint8)
    pixels[0] = 100
    mask = np.full((8, 8), 255, np.uint8)
    mask[1] = 0
    options = GivenOptions(given=save_png(tmp_path / "x.png", pixels), mask=save_png(tmp_path / "m.png", mask))
    given = read_given(options, data, DataConfig("mnist", binarize=True)).given
    assert (given[0, 0] == -1).all() and (given[0, 1:] == 1).all()


# --- what it refuses -------------------------------------------------------------------------------

IMAGE_REFUSALS = {
    "--given image": "expected --mask, for pixels that were observed exactly, or --noise-sd",
    "--given image --blur 1": "or --noise-sd",
    "--given missing --mask mask": "cannot be read",
    "--given text --mask mask": "cannot be read",
    "--given image --mask missing": "cannot be read",
    "--given image --mask text": "cannot be read",
    "--given image --mask small_mask": "expected a mask of 8 x 8 pixels, the size of what is given, found 7 x 7",
    "--given image --mask grey_mask": "expected a mask of black and white",
    "--given image --mask black_mask": "found nothing observed",
    "--given image --mask white_mask": "found everything observed",
    "--given colours --mask mask": "expected a grey image",
    "--given wild_array --mask mask": "expected observed values in [-1, 1]",
    "--given nan_array --mask mask": "expected observed values in [-1, 1]",
    "--given nan_array --noise-sd 0.1": "expected finite values",
    "--given long_array --mask mask": "expected an array of real numbers of shape (1, 8, 8)",
    "--given image --noise-sd 0.1 --mask mask --blur 1": "expected one of mask, blur and subsample",
    "--given image --noise-sd 0.1 --subsample 3": "expected --subsample to divide the side 8",
    "--given image --noise-sd 0": "expected noise-sd positive",
    "--given image --noise-sd 0.1 --blur nan": "expected blur positive",
    "--given image --noise-sd 0.1 --num-chains 0": "expected num-chains of at least 1",
    "--given image --noise-sd 0.1 --num-draws 3": "expected num-draws of at least 4",
    "--given image --noise-sd 0.1 --num-steps 3": "--num-steps is for samples without --given",
    "--mask mask": "--mask expects --given or --given-values",
    "--num-draws 7": "--num-draws expects --given or --given-values",
    "--given-values 0.5": "holds images, expected --given",
}
POINT_REFUSALS = {
    "--given image": "holds points, expected --given-values",
    "--given-values 0.5": "expected 2 numbers with commas",
    "--given-values a,b": "expected numbers with commas",
    "--given-values nan,nan": "found no number in 'nan,nan'",
    "--given-values 0.5,0.5": "found everything observed",
    "--given-values 1e6,nan": "expected values near the data",
    "--given-values inf,nan": "expected values near the data",
    "--given-values inf,nan --noise-sd 1": "expected finite values",
    "--given-values 0.5,nan --mask mask": "--mask is for images",
}


def contents(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


def refusal(run: Path, argv: list[str], capsys: pytest.CaptureFixture[str]) -> str:
    before = contents(run)
    with pytest.raises(SystemExit) as stop:
        sample.main([str(run), *argv])
    error = capsys.readouterr().err
    assert stop.value.code == 2
    assert error.startswith("error: ") and error.count("\n") == 1, error
    assert contents(run) == before, "something was written"
    return error


def argv_of(text: str, files: dict[str, str]) -> list[str]:
    return [files.get(word.replace("_", " "), word) for word in text.split()]


@pytest.mark.parametrize("text", IMAGE_REFUSALS)
def test_bad_input_to_images_gets_one_sentence(
    text: str, images: Path, files: dict[str, str], capsys: pytest.CaptureFixture[str]
) -> None:
    short = [] if "--num-" in text or "--given " not in text else SHORT
    assert IMAGE_REFUSALS[text] in refusal(images, [*argv_of(text, files), *short], capsys)


@pytest.mark.parametrize("text", POINT_REFUSALS)
def test_bad_input_to_points_gets_one_sentence(
    text: str, points: Path, files: dict[str, str], capsys: pytest.CaptureFixture[str]
) -> None:
    assert POINT_REFUSALS[text] in refusal(points, [*argv_of(text, files), *SHORT], capsys)


def test_a_grey_image_is_refused_by_a_run_in_colour(files: dict[str, str]) -> None:
    images = torch.zeros(3, 3, 8, 8, dtype=torch.uint8)
    data = image_data("cifar10", torch.Size([3, 8, 8]), [IntegerImages(images)] * 3)
    read: Callable[[str], object] = lambda name: read_given(  # noqa: E731
        GivenOptions(given=files[name], mask=files["mask"]), data, DataConfig("cifar10")
    )
    read("colours")
    with pytest.raises(InputError, match="expected an image in colour"):
        read("image")


def test_digits_are_read_in_their_own_levels() -> None:
    data = load_data(DataConfig("digits"), 0)
    assert data.levels == 17  # what the expected values above are written for
