"""The arrays behind the pictures of stage 1 are of fairly chosen data, with the KL of the ELBO."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from ppl_vaebm.config import Config, ModelConfig, NvaeConfig
from ppl_vaebm.data.load import Data
from ppl_vaebm.data.splits import IntegerImages, Points, image_data, random_subset
from ppl_vaebm.errors import InputError
from ppl_vaebm.inference.svi.svi import mean_elbo
from ppl_vaebm.models.vae import HierarchicalVAE
from ppl_vaebm.models.vaebm import build_vae
from ppl_vaebm.reports.gallery import GALLERY, gallery_grids, save_png
from ppl_vaebm.rng import global_rng, seed_for, stream
from ppl_vaebm.runs.drawing import draw_vae
from ppl_vaebm.runs.gallery import Choices, gallery, write_gallery
from ppl_vaebm.runs.loading import FittedVAE
from ppl_vaebm.runs.run import GROUP_KL, PRIOR, RECONSTRUCTIONS, TRAVERSAL, Run
from tests.small_models import linear_vae

NVAE = NvaeConfig(channels=4, num_latents=2, num_scales=2, groups_per_scale=2, encoder_cells=1, decoder_cells=1)


def image_vae(kind: str) -> HierarchicalVAE:
    config = ModelConfig(kind="nvae", nvae=NVAE) if kind == "nvae" else ModelConfig(latents=(3, 2, 1), channels=4)
    with global_rng(0):
        return build_vae(config, torch.Size([1, 8, 8]), 16).eval()


def image_set(num: int = 40) -> Data:
    images = torch.randint(16, (num, 1, 8, 8), generator=stream(0, "images"), dtype=torch.uint8)
    split = IntegerImages(images, None, 16)
    return image_data("noise", images.shape[1:], [split, split, split])


def fitted_images(folder: Path, kind: str = "nvae") -> FittedVAE:
    return FittedVAE(Run.create(folder), Config(), image_set(), image_vae(kind))


def test_kl_bars_are_those_of_the_elbo(tmp_path: Path) -> None:
    fitted = fitted_images(tmp_path)
    found = gallery(fitted, fitted.data.test, seed=0)[GROUP_KL]
    expected = mean_elbo(fitted.vae, fitted.data.test, seed_for(0, "gallery")).kl_nats
    assert dict(zip(found["names"].tolist(), found["kl_nats"].tolist(), strict=True)) == expected
    assert found["sides"].tolist() == [2, 2, 4, 4] and int(found["num_points"]) == 40


@pytest.mark.parametrize("kind", ["nvae", "image"])
def test_a_run_gets_its_gallery(tmp_path: Path, kind: str) -> None:
    fitted = fitted_images(tmp_path, kind)
    assert sorted(write_gallery(fitted, 0, Choices((0.5, 1.0), "z_2"))) == sorted(GALLERY)
    paths = [fitted.run.samples_dir / f"{name}.npz" for name in GALLERY]
    arrays = {path.stem: dict(np.load(path)) for path in paths}
    for path in paths:
        save_png(path)
    assert arrays[RECONSTRUCTIONS]["x"].shape == arrays[RECONSTRUCTIONS]["data"].shape == (16, 1, 8, 8)
    assert arrays[PRIOR]["x"].shape == (64, 2, 1, 8, 8)
    assert arrays[PRIOR]["temperatures"].tolist() == [0.5, 1.0]
    assert arrays[TRAVERSAL]["x"].shape == (6, 9, 1, 8, 8) and str(arrays[TRAVERSAL]["group"]) == "z_2"
    for name in (RECONSTRUCTIONS, PRIOR, TRAVERSAL):
        assert (fitted.run.samples_dir / f"{name}.png").is_file()


def half_black(num: int) -> Data:
    """Images sorted by class: the first half black, the second white."""
    images = (15 * (torch.arange(num) >= num // 2)).to(torch.uint8).reshape(num, 1, 1, 1).expand(num, 1, 8, 8)
    split = IntegerImages(images.contiguous(), None, 16)
    return image_data("noise", images.shape[1:], [split, split, split])


def test_what_is_shown_of_a_sorted_file_has_every_class(tmp_path: Path) -> None:
    fitted = replace(fitted_images(tmp_path), data=half_black(1_200))
    found = gallery(fitted, fitted.data.test, seed=0)
    is_white = (found[RECONSTRUCTIONS]["data"] > 0).all(axis=(1, 2, 3))
    assert 2 <= is_white.sum() <= 14 and (is_white == np.sort(is_white)).all()
    assert not (fitted.data.test.batch(torch.arange(16), stream(0, "a")) > 0).any()  # the first ones are black
    assert int(found[GROUP_KL]["num_points"]) == 500
    chosen = random_subset(fitted.data.test, 500, stream(0, "gallery", "order"))
    of_chosen, of_first = (
        mean_elbo(fitted.vae, split, seed_for(0, "gallery"), 500).kl_nats for split in (chosen, fitted.data.test)
    )
    kl = found[GROUP_KL]
    assert dict(zip(kl["names"].tolist(), kl["kl_nats"].tolist(), strict=True)) == of_chosen
    assert of_chosen != of_first


def test_data_beside_draws_are_a_fair_choice_or_all(tmp_path: Path) -> None:
    fitted = replace(fitted_images(tmp_path), data=half_black(40))
    for num in (20, 40):
        draw_vae(fitted, Choices((1.0,)), num, seed=3)
        x = np.load(fitted.run.samples_dir / "data.npz")["x"]
        assert len(x) == num and 0.2 * num <= (x > 0).all(axis=(1, 2, 3)).sum() <= 0.8 * num
    expected = fitted.data.test.batch(torch.arange(40), stream(3, "dequantise"))
    np.testing.assert_array_equal(x, expected.numpy())  # all of them: to the last bit what it was without a choice


def test_a_gallery_is_the_same_for_the_same_seed(tmp_path: Path) -> None:
    fitted = fitted_images(tmp_path)
    first, again, other = (gallery(fitted, fitted.data.test, seed) for seed in (0, 0, 1))
    for name in (RECONSTRUCTIONS, PRIOR, TRAVERSAL):
        np.testing.assert_array_equal(first[name]["x"], again[name]["x"])
        assert not np.array_equal(first[name]["x"], other[name]["x"])


def test_the_traversal_takes_the_group_with_the_largest_kl(tmp_path: Path) -> None:
    fitted = fitted_images(tmp_path)
    arrays = gallery(fitted, fitted.data.test, seed=0)
    largest = arrays[GROUP_KL]["names"][arrays[GROUP_KL]["kl_nats"].argmax()]
    assert str(arrays[TRAVERSAL]["group"]) == largest


def test_draws_of_the_prior_have_its_statistics_and_reconstructions_those_of_training(tmp_path: Path) -> None:
    fitted = fitted_images(tmp_path)
    spoilt = image_vae("nvae")
    for name, buffer in spoilt.model.named_buffers():
        if name.endswith("running_var"):
            buffer.fill_(3.0)
    both = FittedVAE(fitted.run, fitted.config, fitted.data, fitted.vae, spoilt, 0.7)
    plain, mixed = (gallery(each, fitted.data.test, seed=0) for each in (fitted, both))
    np.testing.assert_array_equal(mixed[RECONSTRUCTIONS]["x"], plain[RECONSTRUCTIONS]["x"])
    assert not np.allclose(mixed[PRIOR]["x"], plain[PRIOR]["x"])
    assert "t = 0.7" in str(mixed[PRIOR]["statistics"]) and "training" in str(plain[PRIOR]["statistics"])


def test_grids_of_a_gallery_have_labels_that_tell_them_apart(tmp_path: Path) -> None:
    fitted = fitted_images(tmp_path)
    files = gallery(fitted, fitted.data.test, 0, Choices(group="z_2"))
    labels = [label for name, arrays in files.items() for label in gallery_grids(name, arrays)]
    assert labels == ["reconstructions", *(f"prior t={t}" for t in ("0.6", "0.7", "0.8", "1")), "traversal z_2"]
    assert not fitted.run.samples_dir.exists()


def test_an_unknown_group_is_refused_with_those_that_there_are(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="z_1 to z_4, found 'z_9'"):
        write_gallery(fitted_images(tmp_path), 0, Choices(group="z_9"))


@pytest.mark.parametrize(("dim", "files"), [(2, {PRIOR, GROUP_KL}), (1, {GROUP_KL})])
def test_points_get_what_makes_sense(tmp_path: Path, dim: int, files: set[str]) -> None:
    points: Tensor = torch.randn(50, dim, generator=stream(0, "points"))
    split = Points(points)
    data = Data("points", points.shape[1:], split, split, split)
    fitted = FittedVAE(Run.create(tmp_path), Config(), data, linear_vae(dim=dim).float())
    assert set(write_gallery(fitted, 0)) == files
