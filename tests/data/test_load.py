"""Data sets that need no files, the loaders by name, and the order of the data."""

from __future__ import annotations

import math
from collections import Counter
from typing import Any, get_args

import numpy as np
import pytest
import torch
from torch import Tensor

from ppl_vaebm.config import Config, DataConfig, DataName, ModelConfig, NvaeConfig
from ppl_vaebm.data import load as data_module
from ppl_vaebm.data.load import form_without_files, load_data
from ppl_vaebm.data.sampler import KeyedSampler
from ppl_vaebm.data.splits import Points, without_noise
from ppl_vaebm.data.toys import gaussians25_log_prob, gaussians25_modes
from ppl_vaebm.errors import InputError
from ppl_vaebm.rng import stream
from tests.pixels import noise, pixels

# --- gaussians25 ---


def test_log_density_integrates_to_one() -> None:
    axis = torch.linspace(-3.5, 3.5, 281, dtype=torch.float64)
    density = gaussians25_log_prob(torch.cartesian_prod(axis, axis), spacing=1.0, std=0.1).exp()
    assert float(density.sum() * 0.025**2) == pytest.approx(1, abs=1e-6)


def test_log_density_at_a_mode_is_that_of_one_component() -> None:
    at_modes = gaussians25_log_prob(gaussians25_modes(2.0), spacing=2.0, std=0.05)
    expected = -math.log(25 * 2 * math.pi * 0.05**2)
    assert at_modes.tolist() == pytest.approx([expected] * 25, abs=1e-12)
    between = gaussians25_log_prob(torch.tensor([[1.0, 0.0]]), spacing=2.0, std=0.05)
    assert float(between) == pytest.approx(expected - 0.5 * 20**2 + math.log(2), abs=1e-9)


def test_points_have_the_moments_and_the_mean_log_density_of_the_mixture() -> None:
    data = load_data(DataConfig(num_points=100_000, spacing=1.5, std=0.1), 0)
    assert isinstance(data.train, Points) and isinstance(data.test, Points)
    x = data.train.points.double()
    # A coordinate is spacing x uniform{-2..2} (variance 2, fourth moment 6.8) plus the noise.
    variance = 2 * 1.5**2 + 0.1**2
    assert x.mean(0).tolist() == pytest.approx([0, 0], abs=5 * math.sqrt(variance / 1e5))
    assert x.var(0).tolist() == pytest.approx([variance] * 2, abs=5 * math.sqrt((6.8 - 4) * 1.5**4 / 1e5) + 1e-3)
    log_prob = gaussians25_log_prob(data.test.points, 1.5, 0.1)
    # The log density of a mode is a constant minus half a chi-squared of two degrees of freedom: variance 1.
    assert float(log_prob.mean()) == pytest.approx(data.max_log_density_nats, abs=5 / math.sqrt(20_000))


def test_defaults_have_the_known_bound_and_sizes() -> None:
    data = load_data(DataConfig(), 0)
    assert data.max_log_density_nats == pytest.approx(-0.0653, abs=5e-5)
    assert (len(data.train), len(data.validation), len(data.test)) == (100_000, 20_000, 20_000)
    assert data.event_shape == (2,) and data.levels is None and data.mode_std == 0.05


def test_overlapping_modes_have_no_stated_bound() -> None:
    assert load_data(DataConfig(num_points=10, std=0.11), 0).max_log_density_nats is None


def test_gaussians25_depends_on_seed_and_split() -> None:
    first, again, other = (load_data(DataConfig(num_points=50), seed) for seed in (0, 0, 1))
    ten = torch.arange(10)
    assert torch.equal(first.train.batch(ten, noise()), again.train.batch(ten, noise()))
    assert not torch.equal(first.train.batch(ten, noise()), other.train.batch(ten, noise()))
    assert not torch.equal(first.train.batch(ten, noise()), first.test.batch(ten, noise()))


# --- digits ---


def test_digits_are_split_once_and_for_all() -> None:
    from sklearn.datasets import load_digits

    data, other = (load_data(DataConfig(name="digits"), seed) for seed in (0, 1))
    splits = (data.train, data.validation, data.test)
    assert [len(split) for split in splits] == [1260, 140, 397]
    assert (data.event_shape, data.levels) == ((1, 8, 8), 17)
    assert torch.equal(pixels(data.test, 17), pixels(other.test, 17))
    # Known answer: a change here changes what every published number was measured on.
    assert data.test.labels is not None
    assert data.test.labels[:10].tolist() == [2, 6, 7, 3, 4, 8, 4, 8, 9, 0]
    bunch = load_digits()
    expected = Counter(zip(map(bytes, bunch.images.astype(np.uint8)), bunch.target.tolist(), strict=True))
    found: Counter[tuple[bytes, int]] = Counter()
    for split in splits:
        assert split.labels is not None
        images = pixels(split, 17).numpy().astype(np.uint8)
        found.update(zip(map(bytes, images), split.labels.tolist(), strict=True))
    assert found == expected


# --- options and names ---


@pytest.mark.parametrize(
    ("name", "option", "value"),
    [
        *(
            (name, option, value)
            for name in ("digits", "gaussians25")
            for option, value in (
                ("image_size", 16),
                ("num_bits", 5),
                ("binarize", True),
                ("padding", 2),
                ("flips", "random"),
                ("num_validation", 10),
                ("skip_unreadable", True),
            )
        ),
        ("cifar10", "binarize", True),
        ("stacked-mnist", "binarize", True),
        ("celeba", "binarize", True),
        ("celeba-hq", "binarize", True),
        ("celeba", "num_validation", 10),
        ("mnist", "skip_unreadable", True),
        ("lsun-church", "skip_unreadable", True),
    ],
)
def test_an_option_that_does_not_fit_the_data_is_refused(name: DataName, option: str, value: Any) -> None:
    config = DataConfig(name=name, root="/nowhere", **{option: value})
    flag = "--data." + option.replace("_", "-")
    for function in (form_without_files, lambda config: load_data(config, 0)):
        with pytest.raises(InputError, match=f"^{flag} is for .*, got {value} for {name}; leave it out$"):
            function(config)


def test_eight_bits_fit_everything() -> None:
    assert load_data(DataConfig(name="digits", num_bits=8), 0).levels == 17


@pytest.mark.parametrize(
    ("name", "options", "shape", "levels", "is_dequantized"),
    [
        ("gaussians25", {}, (2,), None, False),
        ("digits", {}, (1, 8, 8), 17, True),
        ("mnist", {}, (1, 32, 32), 256, True),
        ("mnist", {"padding": 0, "binarize": True}, (1, 28, 28), 2, False),
        ("fashion-mnist", {"image_size": 16, "num_bits": 3}, (1, 16, 16), 8, True),
        ("stacked-mnist", {"padding": 1}, (3, 30, 30), 256, True),
        ("cifar10", {}, (3, 32, 32), 256, True),
        ("cifar100", {"padding": 4}, (3, 40, 40), 256, True),
        ("svhn", {}, (3, 32, 32), 256, True),
        ("celeba", {}, (3, 64, 64), 256, True),
        ("celeba", {"image_size": 32}, (3, 32, 32), 256, True),
        ("celeba-hq", {"num_bits": 5}, (3, 256, 256), 32, True),
        ("lsun-church", {}, (3, 64, 64), 256, True),
    ],
)
def test_form_is_known_without_files(
    name: DataName, options: dict[str, Any], shape: tuple[int, ...], levels: int | None, is_dequantized: bool
) -> None:
    form = form_without_files(DataConfig(name=name, root="/nowhere", **options))
    assert form == (shape, levels, is_dequantized)


def test_form_of_an_image_folder_needs_its_files() -> None:
    assert form_without_files(DataConfig(name="image-folder", image_size=16)) is None


@pytest.mark.parametrize("name", ["gaussians25", "digits"])
def test_form_is_that_of_the_data(name: DataName) -> None:
    config = DataConfig(name=name, num_points=50)
    data = load_data(config, 0)
    assert form_without_files(config) == (data.event_shape, data.levels, data.is_dequantized)
    assert data.train.batch(torch.arange(3), noise()).shape[1:] == data.event_shape


def test_every_name_of_the_configuration_has_a_loader() -> None:
    assert set(get_args(DataName)) == {"gaussians25", *data_module._IMAGE_SETS}


# --- order ---


def epoch_of(sampler: KeyedSampler, epoch: int) -> Tensor:
    steps = range(epoch * sampler.steps_per_epoch, (epoch + 1) * sampler.steps_per_epoch)
    return torch.cat([sampler.indices(step) for step in steps])


def test_noise_goes_on_every_part_of_a_data_set_and_changes_nothing_below_it() -> None:
    clean, noisy = (load_data(DataConfig(name="digits", noise_sd=noise_sd), 0) for noise_sd in (0.0, 0.1))
    assert noisy.noise_sd == 0.1 and clean.noise_sd == 0.0
    for part in ("train", "validation", "test"):
        split = getattr(noisy, part)
        indices = torch.arange(100)
        x, x_clean = (each.batch(indices, stream(0, "x")) for each in (split, getattr(clean, part)))
        assert float((x - x_clean).std()) == pytest.approx(0.1, rel=0.05)
        assert torch.equal(without_noise(split).batch(indices, stream(0, "x")), x_clean)


def test_noise_is_refused_where_it_would_contradict_the_data() -> None:
    with pytest.raises(InputError, match="--data.noise-sd is for .*digits.*, got 0.1 for gaussians25"):
        load_data(DataConfig(name="gaussians25", noise_sd=0.1), 0)
    with pytest.raises(ValueError, match="data.noise-sd must be 0 with data.binarize"):
        DataConfig(name="mnist", binarize=True, noise_sd=0.1)
    with pytest.raises(ValueError, match="data.noise-sd must be 0 with a discretised decoder"):
        Config(
            data=DataConfig(name="mnist", noise_sd=0.1),
            model=ModelConfig(kind="nvae", nvae=NvaeConfig(decoder="logistic-mixture")),
        )


def test_an_epoch_has_every_index_once_and_another_order_each_time() -> None:
    sampler = KeyedSampler(100, 10, seed=0)
    first, second = epoch_of(sampler, 0), epoch_of(sampler, 1)
    assert torch.equal(first.sort().values, torch.arange(100))
    assert torch.equal(second.sort().values, torch.arange(100))
    assert not torch.equal(first, second)
    assert not torch.equal(first, epoch_of(KeyedSampler(100, 10, seed=1), 0))
    assert torch.equal(first, epoch_of(sampler, 0))  # going back is possible too


def test_a_remainder_is_left_out_of_the_epoch() -> None:
    sampler = KeyedSampler(23, 5, seed=0)
    assert sampler.steps_per_epoch == 4
    assert len(epoch_of(sampler, 0).unique()) == 20
    left_out = {tuple(sorted(set(range(23)) - set(epoch_of(sampler, epoch).tolist()))) for epoch in range(5)}
    assert len(left_out) > 1


@pytest.mark.parametrize("step", [0, 3, 4, 17, 40])
def test_jumping_to_a_step_equals_walking_there(step: int) -> None:
    walker = KeyedSampler(23, 5, seed=0)
    for before in range(step):
        walker.indices(before)
    assert torch.equal(walker.indices(step), KeyedSampler(23, 5, seed=0).indices(step))


def test_ranks_share_the_batch_of_one_process() -> None:
    whole = KeyedSampler(40, 12, seed=0)
    ranks = [KeyedSampler(40, 4, seed=0, rank=rank, world=3) for rank in range(3)]
    for step in (0, 2, 5):
        parts = torch.cat([rank.indices(step) for rank in ranks])
        assert len(parts.unique()) == 12
        assert torch.equal(parts, whole.indices(step))


@pytest.mark.parametrize(("batch_size", "world"), [(11, 1), (6, 2), (0, 1)])
def test_a_step_larger_than_the_split_is_refused(batch_size: int, world: int) -> None:
    with pytest.raises(InputError, match=f"{batch_size} x {world} elements .* the 10 of .*change the batch size"):
        KeyedSampler(10, batch_size, seed=0, world=world)
    assert KeyedSampler(10, 5, seed=0, world=2).steps_per_epoch == 1
