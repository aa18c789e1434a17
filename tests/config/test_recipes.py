"""The recipes that ship: their sizes are those of the published models, and every number has its source beside it."""

from __future__ import annotations

import re
from typing import NamedTuple

import pytest
import torch

from ppl_vaebm import fit
from ppl_vaebm.config import Config, EnergyConfig, SviConfig
from ppl_vaebm.config.parsing import from_dict
from ppl_vaebm.config.recipes import load_yaml, recipe_names, recipe_path
from ppl_vaebm.models.energy import build_energy
from ppl_vaebm.models.layers import spectral_layers
from ppl_vaebm.models.vaebm import has_discrete_x
from ppl_vaebm.runs.dry_run import count, describe, form_of
from tests.small_models import nvae_on_meta


class Published(NamedTuple):
    """What is known of an NVAE: sizes that its authors' code has with the same options."""

    num_parameters: int
    num_generator: int
    num_latents: int
    num_convs: int | None = None
    num_norms: int | None = None


PUBLISHED = {
    "cifar10": Published(130_744_004, 51_718_860, 153_600, 610, 364),
    "celeba64": Published(65_005_372, 24_078_330, 134_400, 330, 196),
    "lsun-church64": Published(65_005_372, 24_078_330, 134_400, 330, 196),
    "celebahq256": Published(365_372_032, 132_288_928, 1_745_920, 570, 268),
    "mnist": Published(33_363_134, 12_672_258, 14_400),
}
# More than five seconds each.
LARGE = ("cifar10", "celeba64", "lsun-church64", "celebahq256")
# The head of a recipe that has no other source for its numbers.
OURS = "# Every value was chosen by us"
SOURCED = [name for name in recipe_names() if OURS not in recipe_path(name).read_text()]


def config_of(recipe: str) -> Config:
    return from_dict(load_yaml(recipe_path(recipe)), recipe)


def text_of(recipe: str) -> str:
    return "\n".join(describe(config_of(recipe)))


def check_text(recipe: str, text: str) -> None:
    known = PUBLISHED[recipe]
    assert f"({known.num_parameters:,}) parameters, generator " in text
    assert f"({known.num_generator:,}), guide " in text
    assert f"latents: {known.num_latents:,} in " in text
    assert f"noise: {known.num_latents + form_of(config_of(recipe).data).event_shape.numel():,}, " in text
    if known.num_convs:
        assert f"layers: {known.num_convs} convolutions, {known.num_norms} batch normalisations" in text


# --- sizes ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("recipe", PUBLISHED)
def test_the_networks_have_the_published_sizes(recipe: str) -> None:
    config, known = config_of(recipe), PUBLISHED[recipe]
    form = form_of(config.data)
    assert config.model.kind == "nvae"
    vae = nvae_on_meta(config.model.nvae, tuple(form.event_shape), form.levels)
    assert (count(vae), count(vae.model)) == (known.num_parameters, known.num_generator)
    assert sum(shape.numel() for shape in vae.model.latent_shapes.values()) == known.num_latents


@pytest.mark.slow
@pytest.mark.parametrize("recipe", LARGE)
def test_the_dry_run_of_a_large_recipe_prints_the_published_sizes(recipe: str) -> None:
    text = text_of(recipe)
    check_text(recipe, text)
    assert "bfloat16 and float32" in text
    known = PUBLISHED_EBM[recipe]
    sizes = f"({known.num_parameters:,}) parameters, layout {recipe}, {known.num_energy_convs} convolutions"
    assert "energy: ImageEnergy of x, " in text and sizes in text


@pytest.mark.parametrize(
    "recipe",
    [
        pytest.param(name, marks=pytest.mark.slow if config_of(name).model.kind == "nvae" else ())
        for name in sorted(set(recipe_names()) - set(LARGE))
    ],
)
def test_the_dry_run_of_a_recipe_works(recipe: str, capsys: pytest.CaptureFixture[str]) -> None:
    """Through the command line, without any data."""
    size = ["--data.image-size", "32"] if config_of(recipe).data.name == "image-folder" else []
    fit.main(["--dry-run", "--recipe", recipe, "--run", "nowhere", "--data.root", "nowhere", *size])
    text = capsys.readouterr().out
    assert text.startswith("run: nowhere\nstage: svi\n")
    assert "saved for backward" in text and ("energy: " in text) == (recipe != "mnist")
    if recipe in PUBLISHED:
        check_text(recipe, text)


def test_a_dry_run_refuses_what_the_fit_would(capsys: pytest.CaptureFixture[str]) -> None:
    command = ["--dry-run", "--stage", "ebm", "--run", "nowhere", "--data.root", "nowhere"]
    for options, words in (
        (["--recipe", "mnist"], "Bernoulli decoder"),
        (["--objective", "ladder", "--kernel", "langevin"], "adjusted kernel"),
    ):
        with pytest.raises(SystemExit) as stop:
            fit.main([*command, *options])
        assert stop.value.code == 2 and words in capsys.readouterr().err


# --- schedules -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("recipe", "num_train", "num_processes", "steps_per_epoch", "steps", "warmup", "kl_warmup"),
    [
        ("cifar10", 49_000, 8, 191, 76_400, 955, 22_920),
        ("celeba64", 162_770, 8, 635, 31_750, 635, 9_525),
        ("lsun-church64", 125_227, 8, 489, 29_340, 489, 8_802),
        ("celebahq256", 26_500, 8, 414, 82_800, 2_070, 24_840),
        ("mnist", 59_000, 2, 147, 58_800, 735, 17_640),
        ("stacked-mnist", 59_000, 1, 921, 46_050, 921, 13_815),
    ],
)
def test_the_schedules_resolve(
    recipe: str, num_train: int, num_processes: int, steps_per_epoch: int, steps: int, warmup: int, kl_warmup: int
) -> None:
    loop = config_of(recipe).svi
    assert num_train // (loop.batch_size * num_processes) == steps_per_epoch
    resolved = loop.resolved(steps_per_epoch)
    assert (resolved.steps, resolved.warmup_steps, resolved.kl_warmup_steps) == (steps, warmup, kl_warmup)
    assert (resolved.epochs, resolved.warmup_epochs, resolved.kl_warmup_share) == (None, None, None)


@pytest.mark.parametrize("recipe", recipe_names())
def test_every_schedule_resolves(recipe: str) -> None:
    loop = config_of(recipe).svi.resolved(100)
    assert loop.warmup_steps < loop.steps and loop.kl_warmup_steps < loop.steps


@pytest.mark.parametrize("recipe", PUBLISHED)
def test_stage_svi_is_that_of_nvae(recipe: str) -> None:
    loop = config_of(recipe).svi
    assert (loop.optimizer, loop.epsilon, loop.weight_decay, loop.final_learning_rate) == ("adamax", 1e-3, 3e-4, 1e-4)
    assert (loop.kl_warmup_share, loop.min_kl_weight, loop.kl_balance, loop.free_bits) == (0.3, 1e-4, True, 0)
    assert (loop.ema_decay, loop.grad_clip) == (0, 1e9)


def test_the_penalty_is_annealed_where_the_authors_do() -> None:
    def penalty(loop: SviConfig) -> tuple[float | None, float, float]:
        return loop.spectral_penalty_start, loop.spectral_penalty, loop.learning_rate

    assert {name: penalty(config_of(name).svi) for name in PUBLISHED} == {
        "cifar10": (None, 0.1, 1e-2),
        "celeba64": (None, 0.1, 1e-2),
        "lsun-church64": (None, 0.1, 1e-2),
        "celebahq256": (10.0, 0.01, 6e-3),
        "mnist": (None, 0.01, 1e-2),
    }


class PublishedEbm(NamedTuple):
    """Stage ebm as published: the network, and the options of the commands."""

    channels: int
    num_parameters: int
    num_energy_convs: int
    data_init: bool
    negative_image: str
    eta: float
    num_train_steps: int
    num_test_steps: int
    alpha_s: float
    learning_rate: float
    num_updates: int
    batch_size: int
    replay: tuple[float, int]
    """Probability of a kept chain, and steps until it is reached."""


PUBLISHED_EBM = {
    "cifar10": PublishedEbm(128, 5_137_921, 16, True, "draw", 8e-5, 10, 16, 0.2, 4e-5, 30_000, 32, (0.0, 0)),
    "celeba64": PublishedEbm(64, 4_337_537, 22, True, "mean", 5e-6, 10, 20, 0.2, 5e-5, 30_000, 32, (0.0, 0)),
    "lsun-church64": PublishedEbm(64, 5_813_633, 26, True, "mean", 4e-6, 10, 20, 0.2, 4e-5, 30_000, 32, (0.6, 5_000)),
    "celebahq256": PublishedEbm(64, 14_207_105, 31, False, "mean", 3e-6, 6, 24, 0.3, 4e-5, 9_000, 16, (0.6, 3_000)),
}


@pytest.mark.parametrize("recipe", PUBLISHED_EBM)
def test_stage_ebm_is_that_of_vaebm(recipe: str) -> None:
    config, known = config_of(recipe), PUBLISHED_EBM[recipe]
    for kernel in (config.kernel, config.sampling.kernel):
        assert kernel.name == "langevin" and kernel.step_size is not None
        assert kernel.step_size**2 == pytest.approx(known.eta, rel=1e-5)
    loop = config.ebm
    assert (loop.objective, loop.negatives, loop.energy_l2, loop.ema_decay) == ("mle", "chains", 0, 0)
    assert (loop.num_transitions, config.sampling.num_steps) == (known.num_train_steps, known.num_test_steps)
    assert (loop.spectral_penalty, loop.spectral_head) == (known.alpha_s, False)
    assert (loop.steps, loop.batch_size, loop.negative_image) == (
        known.num_updates,
        known.batch_size,
        known.negative_image,
    )
    assert (loop.replay_probability, loop.replay_anneal_steps, loop.temperature) == (*known.replay, 1)
    assert loop.learning_rate == loop.final_learning_rate == known.learning_rate
    assert (loop.adam_betas, loop.weight_decay, loop.clip) == ((0.99, 0.999), 3e-5, "adam-moments")


@pytest.mark.parametrize("recipe", PUBLISHED_EBM)
def test_the_energy_is_that_of_vaebm(recipe: str) -> None:
    config, known = config_of(recipe), PUBLISHED_EBM[recipe]
    assert config.energy == EnergyConfig(
        layout=recipe,  # type: ignore[arg-type]
        channels=known.channels,
        weight_norm=True,
        data_init=known.data_init,
    )
    with torch.device("meta"):
        energy = build_energy(config.energy, form_of(config.data).event_shape)
    assert count(energy) == known.num_parameters
    assert len(spectral_layers(energy, has_linear=False)) == known.num_energy_convs


def test_mnist_is_binary_and_has_no_stage_ebm() -> None:
    config = config_of("mnist")
    assert has_discrete_x(config) and config.data.binarize
    assert (config.energy, config.ebm, config.kernel) == (Config().energy, Config().ebm, Config().kernel)


# --- sources -------------------------------------------------------------------------------------

NUMBER = re.compile(r"[:\[,]\s*[-+.]?\d")
TAG = re.compile(r"\[[\w-]+\]")


def unexplained(text: str) -> list[str]:
    """Return the lines with a number, but no source that the head of the file names.

    The source stands in a comment behind the number, or on a line of its own directly above it.
    """
    lines = text.splitlines()
    head = next(index for index, line in enumerate(lines) if not line.startswith("#"))
    sources = set(TAG.findall(" ".join(lines[:head])))
    found = []
    for above, line in zip(lines[head - 1 :], lines[head:], strict=False):
        value, _, comment = line.partition("#")
        if above.lstrip().startswith("#") and above.startswith(" "):
            comment += above
        if NUMBER.search(value) and not sources & set(TAG.findall(comment)):
            found.append(line.strip())
    return found


@pytest.mark.parametrize("recipe", SOURCED)
def test_every_number_has_a_source(recipe: str) -> None:
    assert unexplained(recipe_path(recipe).read_text()) == []


def test_the_recipes_of_papers_name_their_sources() -> None:
    assert {*PUBLISHED, "stacked-mnist"} <= set(SOURCED)


def test_numbers_without_a_source_are_found() -> None:
    text = """# [ours] chosen by us
data: cifar10
svi:
  steps: 1  # [ours]
  batch_size: 2
  epsilon: 1.0e-3  # small
  # [ours] not for the one after the next
  warmup_steps: 3
  kl_warmup_steps: -4  # [theirs]
latents: [5, 6]
"""
    assert unexplained(text) == [
        "batch_size: 2",
        "epsilon: 1.0e-3  # small",
        "kl_warmup_steps: -4  # [theirs]",
        "latents: [5, 6]",
    ]
