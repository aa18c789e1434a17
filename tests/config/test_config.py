"""Recipes and command lines become one configuration, or one sentence that says why not."""

from __future__ import annotations

import dataclasses
import math
from pathlib import Path
from typing import Any, get_args

import pytest
import yaml

from ppl_vaebm.config import (
    Config,
    DataConfig,
    EbmConfig,
    EnergyConfig,
    KernelConfig,
    LatentTermConfig,
    ModelConfig,
    SviConfig,
    retired,
)
from ppl_vaebm.config import kernel as kernel_config
from ppl_vaebm.config.evaluation import SYNTHETIC_SETS
from ppl_vaebm.config.kernel import kernel_names, missing_packages
from ppl_vaebm.config.parsing import as_yaml, differences, from_dict, last_value, parse, to_dict, tokens
from ppl_vaebm.config.recipes import load_yaml, recipe_names, recipe_path
from ppl_vaebm.errors import InputError
from ppl_vaebm.evaluation.ood import SYNTHETIC
from ppl_vaebm.inference.bridges.jax_runner import JaxKernelName
from ppl_vaebm.inference.bridges.pyro_samplers import PyroKernelName


def parsed(text: str) -> Config:
    return from_dict(yaml.safe_load(text) or {}, "recipe.yaml")


def test_nothing_gives_the_defaults() -> None:
    assert parsed("") == Config()


@pytest.mark.parametrize(
    ("text", "option", "value"),
    [
        ("svi: {learning_rate: 1e-3, final_learning_rate: 1e-5}", "svi.learning_rate", 1e-3),  # YAML 1.1: a string
        ("svi: {learning_rate: 0.001, final_learning_rate: 0}", "svi.learning_rate", 1e-3),
        ("svi: {grad-clip: 3}", "svi.grad_clip", 3.0),
        ("svi.grad_clip: 3", "svi.grad_clip", 3.0),
        ("seed: -5", "seed", -5),
        ("model: {latents: [2, 3, 1]}", "model.latents", (2, 3, 1)),
        ("model: {latents: [7]}", "model.latents", (7,)),
        ("model: {latents: 7}", "model.latents", (7,)),
        ("kernel: {members: [pcn, elliptical]}", "kernel.members", ("pcn", "elliptical")),
        ("data: {download: true}", "data.download", True),
        ("data: {download: false}", "data.download", False),
        ("data: {image_size: null}", "data.image_size", None),
        ("data: {image_size: 16}", "data.image_size", 16),
        ("kernel: {step_size: null}", "kernel.step_size", None),
        ("kernel: {num_levels: 3}", "kernel.num_levels", 3),
        ("kernel: {max_num_steps: 64}", "kernel.max_num_steps", 64),
        ("kernel: {step_size: 3e-1}", "kernel.step_size", 0.3),
        ("data: {padding: 0}", "data.padding", 0),
        ("data: {binarize: true}", "data.binarize", True),
        ("data: {flips: never}", "data.flips", "never"),
        ("data: {num_validation: 10000}", "data.num_validation", 10_000),
        ("data: {root: /a folder/with spaces}", "data.root", "/a folder/with spaces"),
        ("data: {root: --odd}", "data.root", "--odd"),
        ("data: digits", "data.name", "digits"),
        ("kernel: pcn", "kernel.name", "pcn"),
        ("sampling: {kernel: {name: pcn}}", "sampling.kernel.name", "pcn"),
        ("objective: mle", "ebm.objective", "mle"),
        ("ratio_steps: 4", "ebm.ratio_steps", 4),
    ],
)
def test_a_recipe_sets_an_option_and_no_other(text: str, option: str, value: object) -> None:
    config: Any = parsed(text)
    for name in option.split("."):
        config = getattr(config, name)
    assert config == value and type(config) is type(value)
    changed = differences(to_dict(Config()), to_dict(parsed(text)))
    assert set(changed) <= {option, "svi.final_learning_rate"}


@pytest.mark.parametrize(
    ("text", "key"),
    [
        ("sed: 1", "--sed"),
        ("model: {widht: 3}", "--model.widht"),
        ("svi: {steps: many}", "--svi.steps"),
        ("svi: {steps: 1.5}", "--svi.steps"),
        ("svi: {steps: 1e3}", "--svi.steps"),
        ("seed: true", "--seed"),
        ("seed: {a: 1}", "--seed.a"),
        ("model: 3", "--model"),
        ("data: {image_size: false}", "--data.no-image-size"),
        ("model: {latents: [2, x]}", "--model.latents"),
        ("data: {name: mnits}", "--data.name"),
        ("kernel: {name: nuts}", "--kernel.name"),
        ("kernel: {members: [hmc, nuts]}", "--kernel.members"),
        ("data: {std: -1}", "data.std must be positive, got -1.0"),
        ("kernel: {members: [hmc, mala]}", "kernel.members must be a cycle with at most one kernel that has a step"),
        ("kernel: {trajectory_length: .inf}", "kernel.trajectory-length must be finite, got inf"),
        ("data: {std: .nan}", "data.std must be positive, got nan"),
        ("model: {latents: []}", "model.latents must be at least one size, got ()"),
        ("model: {latents: [2, 0]}", "model.latents must be positive, got (2, 0)"),
    ],
)
def test_a_mistake_is_one_line_that_names_file_and_key(text: str, key: str) -> None:
    with pytest.raises(InputError) as caught:
        parsed(text)
    message = str(caught.value)
    assert message.startswith("recipe.yaml: ")
    assert key in message
    assert message.isprintable() and not set(message) & set("\u2502\u2500\u256d\u256e\u2570\u256f")
    assert "--help" not in message  # a recipe cannot be run


def test_a_misspelt_key_comes_with_a_suggestion() -> None:
    with pytest.raises(InputError, match=r"unknown option --svi.learning-rat; did you mean --svi.learning-rate\?"):
        parsed("svi: {learning_rat: 1}")


@pytest.mark.parametrize(
    ("cls", "options", "message"),
    [
        (DataConfig, {"spacing": 0.0}, "data.spacing must be positive, got 0.0"),
        (DataConfig, {"num_points": 9}, "data.num-points must be at least 10, got 9"),
        (DataConfig, {"image_size": 3}, "data.image-size must be at least 4, got 3"),
        (DataConfig, {"padding": -1}, "data.padding must be 0 or more, got -1"),
        (DataConfig, {"num_bits": 0}, r"data.num-bits must be in \[1, 8\], got 0"),
        (DataConfig, {"num_bits": 9}, r"data.num-bits must be in \[1, 8\], got 9"),
        (DataConfig, {"num_bits": 5, "binarize": True}, "data.num-bits must be 8 with data.binarize.*, got 5"),
        (DataConfig, {"num_validation": 0}, "data.num-validation must be at least 1, got 0"),
        (ModelConfig, {"depth": 0}, "model.depth must be positive, got 0"),
        (ModelConfig, {"stem_depth": -1}, "model.stem-depth must be 0 or more"),
        (ModelConfig, {"min_x_scale": 0.0}, "model.min-x-scale must be positive"),
        (ModelConfig, {"init_x_scale": 0.03}, r"model.init-x-scale must be above model.min-x-scale \(0.03\), got 0.03"),
        (SviConfig, {"kl_warmup_steps": -1}, "svi.kl-warmup-steps must be 0 or more"),
        (SviConfig, {"steps": 0}, "svi.steps must be positive"),
        (SviConfig, {"final_learning_rate": 1.0}, r"svi.final-learning-rate must be in \[0, learning-rate\], got 1.0"),
        (SviConfig, {"ema_decay": 1.0}, r"svi.ema-decay must be in \[0, 1\), got 1.0"),
        (EnergyConfig, {"fourier_scale": -1.0}, "energy.fourier-scale must be positive"),
        (EbmConfig, {"replay_probability": 1.1}, r"ebm.replay-probability must be in \[0, 1\], got 1.1"),
        (EbmConfig, {"replay_size": 255}, r"ebm.replay-size must be at least ebm.batch-size \(256\), got 255"),
        (EbmConfig, {"energy_l2": -1.0}, "ebm.energy-l2 must be 0 or more"),
        (EbmConfig, {"log_every": 0}, "ebm.log-every must be positive"),
        (KernelConfig, {"step_size": 1.6}, r"kernel.step-size must be an angle in \(0, pi/2\], got 1.6"),
        (KernelConfig, {"num_steps": 0}, "kernel.num-steps must be positive"),
        (KernelConfig, {"jitter": 1.0}, r"kernel.jitter must be in \[0, 1\)"),
        (KernelConfig, {"target_acceptance": 1.0}, r"kernel.target-acceptance must be in \(0, 1\)"),
        (KernelConfig, {"max_num_steps": 0}, "kernel.max-num-steps must be positive, got 0"),
        (KernelConfig, {"num_levels": 1}, "kernel.num-levels must be at least 2, got 1"),
        (KernelConfig, {"members": ()}, "kernel.members must be at least one kernel"),
        (
            KernelConfig,
            {"members": ("hmc", "tempered")},
            "kernel.members must be adjusted kernels, not langevin, chees,",
        ),
        (KernelConfig, {"members": ("chees",)}, r"chees, tempered or another mixture, got \('chees',\)"),
        (KernelConfig, {"members": ("mixture",)}, r"kernel.members must be .*, got \('mixture',\)"),
        (Config, {"threads": -1}, "threads must be 0 or more, got -1"),
        (EbmConfig, {"grad_clip": math.inf}, "ebm.grad-clip must be finite, got inf"),
        (EbmConfig, {"max_energy_gap": math.inf}, "ebm.max-energy-gap must be finite, got inf"),
        (SviConfig, {"free_bits": math.inf}, "svi.free-bits must be finite, got inf"),
        (
            EbmConfig,
            {"objective": "mle", "tune": True, "latent": LatentTermConfig(steps=3)},
            "ebm.tune must be off with ebm.latent.steps, .*, got True",
        ),
    ],
)
def test_a_bad_value_is_refused_at_construction(cls: Any, options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        cls(**options)


def test_configurations_are_frozen() -> None:
    with pytest.raises(dataclasses.FrozenInstanceError):
        Config().seed = 1  # type: ignore[misc]


ODD = parsed(
    "{seed: 7, data: {name: image-folder, root: 'a b', download: true, image_size: 8}, model: {latents: [4, 2]},"
    " svi: {learning_rate: 0.1, final_learning_rate: 1.2345678901234567e-5}, kernel: {name: pcn, step_size: 0.1,"
    " members: [pcn]}, sampling: {kernel: {name: elliptical, num_steps: 3}}}"
)


@pytest.mark.parametrize("config", [Config(), ODD], ids=["defaults", "odd"])
def test_plain_types_and_back_is_the_same(config: Config, tmp_path: Path) -> None:
    plain = to_dict(config)
    assert from_dict(plain, "there and back") == config
    file = tmp_path / "config.yaml"
    file.write_text(yaml.safe_dump(plain))  # safe: nothing but plain types
    assert from_dict(load_yaml(file), str(file)) == config


def test_plain_types_leave_out_what_was_left_open() -> None:
    plain = to_dict(Config())
    assert "image_size" not in plain["data"] and "step_size" not in plain["kernel"]
    assert plain["model"]["latents"] == [2]
    assert plain["kernel"]["trajectory_length"] == math.pi / 2


def test_a_part_is_completed_by_defaults() -> None:
    assert from_dict({"model": {"width": 3}}, "part") == Config(model=ModelConfig(width=3))


def test_tokens_are_those_of_a_command_line() -> None:
    tree = {
        "seed": 1,
        "model": {"latents": [2, 3], "x_scale": "local"},
        "data": {"download": False},
        "resume": True,
        "overwrite": False,
        "kernel": {"step_size": None},
    }
    assert list(tokens(tree)) == [
        "--seed=1",
        "--model.latents",
        "2",
        "3",
        "--model.x-scale=local",
        "--data.no-download",
        "--resume",
        "--no-overwrite",
        "--kernel.step-size=None",
    ]


def test_the_last_token_wins() -> None:
    base = list(tokens({"seed": 1, "model": {"latents": [2, 3]}, "data": {"download": True}}))
    user = ["--seed", "2", "--model.latents", "5", "--data.no-download"]
    config = parse(Config, [*base, *user], "fit")
    assert (config.seed, config.model.latents, config.data.download) == (2, (5,), False)


def test_asking_for_help_is_no_error(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        parse(Config, ["--help"], "fit", "What fit does.")
    assert caught.value.code == 0
    shown = capsys.readouterr().out
    assert "What fit does." in shown and "--svi.learning-rate" in shown


def test_names_the_options_that_differ() -> None:
    one = to_dict(Config())
    other = to_dict(parsed("{seed: 3, model: {width: 3, latents: [2, 2]}, kernel: {step_size: 0.1}}"))
    assert differences(one, one) == []
    assert differences(one, other) == ["kernel.step_size", "model.latents", "model.width", "seed"]
    assert differences(other, one) == differences(one, other)
    assert differences({"a": {"b": 1}}, {"a": 1}) == ["a"]
    assert differences({"a": {"b": {"c": 1, "d": 2}}}, {"a": {"b": {"c": 1, "d": 3}}}) == ["a.b.d"]


@pytest.mark.parametrize("name", recipe_names())
def test_a_recipe_that_ships_is_a_configuration(name: str) -> None:
    config = from_dict(load_yaml(recipe_path(name)), name)
    assert config != Config()


def test_a_recipe_is_found_by_name_or_by_file(tmp_path: Path) -> None:
    assert recipe_path("gaussians25").name == "gaussians25.yaml"
    file = tmp_path / "mine.yaml"
    file.write_text("seed: 1")
    assert recipe_path(str(file)) == file
    for missing in (str(tmp_path), str(tmp_path / "no.yaml"), "gaussian25", ""):
        with pytest.raises(InputError, match="unknown recipe .*expected one of .*gaussians25.*or a YAML file's path"):
            recipe_path(missing)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "must hold options such as 'seed: 1', found NoneType"),
        (b"- 1\n- 2", "found list"),
        (b"just words", "found str"),
        (b"a: [1", "is not a YAML file: "),
        (b"a: !!python/object/apply:os.getcwd []", "is not a YAML file: "),
        (b"\xff\xfe\xfa", "is not a YAML file: "),
    ],
)
def test_a_file_that_is_no_recipe_is_refused_in_one_line(content: bytes, message: str, tmp_path: Path) -> None:
    file = tmp_path / "bad.yaml"
    file.write_bytes(content)
    with pytest.raises(InputError) as caught:
        load_yaml(file)
    assert str(caught.value).startswith(str(file))
    assert message in str(caught.value) and "\n" not in str(caught.value)


def test_a_file_that_is_missing_is_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"no.yaml cannot be read \(No such file or directory\)"):
        load_yaml(tmp_path / "no.yaml")


@pytest.mark.parametrize("name", ["device", "data.root"])
def test_an_empty_text_is_no_value(name: str) -> None:
    with pytest.raises(InputError, match=f"--{name}: expected a value, found ''$"):
        parse(Config, [f"--{name}", ""], "fit", "What fit does.")


def test_the_help_of_an_option_with_several_values_has_one_ellipsis(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        parse(Config, ["--help"], "fit", "What fit does.")
    assert "... ..." not in capsys.readouterr().out


def test_a_file_cannot_ask_for_help() -> None:
    with pytest.raises(InputError, match="^recipe.yaml: unknown option --help"):
        parsed("help: true")


def test_another_kernel_takes_the_options_but_not_the_step() -> None:
    config = KernelConfig("mala", step_size=0.3, target_acceptance=0.9, integrator="leapfrog", num_steps=4)
    assert config.of("mala") is config
    assert config.of("hmc") == KernelConfig("hmc", integrator="leapfrog", num_steps=4)
    assert config.of("tempered") == KernelConfig("tempered", integrator="leapfrog")
    assert KernelConfig("tempered", num_steps=2).of("hmc") == KernelConfig("hmc")


@pytest.mark.parametrize(
    ("argv", "value"),
    [
        ([], None),
        (["--run"], None),
        (["--svi.steps", "5", "--run", "there", "--help"], "there"),
        (["--run=here", "--run", "there"], "there"),
        (["--run", "there", "-r=here"], "here"),
    ],
)
def test_last_value_is_that_of_the_last_flag(argv: list[str], value: str | None) -> None:
    assert last_value(argv, "--run", "-r") == value


def test_an_option_without_a_default_has_to_be_given() -> None:
    @dataclasses.dataclass
    class Study:
        run: str
        seed: int = 0

    assert parse(Study, ["--run", "there"], "study") == Study("there")
    with pytest.raises(InputError, match="^study: expected --run, a folder such as runs/demo, found none$"):
        parse(Study, ["--seed", "1"], "study")


@pytest.mark.parametrize(("names", "message"), [("hcm", "did you mean hmc"), ("hmc,hmc", "different"), (",", "none")])
def test_unknown_and_repeated_kernels_are_refused(names: str, message: str) -> None:
    with pytest.raises(InputError, match=message):
        kernel_names(names)


def test_a_kernel_without_its_packages_is_refused_by_name(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kernel_config, "find_spec", lambda name: None if name == "blackjax" else object())
    assert kernel_names("hmc, numpyro-nuts") == ("hmc", "numpyro-nuts")
    assert missing_packages("blackjax-nuts") == ["blackjax"]
    with pytest.raises(InputError, match=r"blackjax-nuts needs jax and blackjax, found no blackjax; .*-e '.\[jax\]'"):
        kernel_names("hmc,blackjax-nuts")


def test_comparable_kernels_are_those_that_run() -> None:
    assert kernel_config.PYRO_KERNELS == get_args(PyroKernelName)
    assert {*kernel_config.NUMPYRO_KERNELS, *kernel_config.BLACKJAX_KERNELS} == {*get_args(JaxKernelName)}


def test_sets_without_files_are_those_that_are_made() -> None:
    assert SYNTHETIC_SETS == (*SYNTHETIC,)


# --- options of one kernel -------------------------------------------------------------------------


def test_options_that_the_kernel_does_not_have_are_named() -> None:
    assert KernelConfig("mala", num_steps=3, integrator="leapfrog").useless() == ["kernel.num-steps"]
    assert KernelConfig("independence", step_size=0.1, num_levels=3).useless() == [
        "kernel.step-size",
        "kernel.num-levels",
    ]
    assert KernelConfig("mixture", members=("hmc",), num_steps=3).useless() == []
    assert KernelConfig("tempered", num_levels=3, num_steps=1).useless() == []


def test_a_written_configuration_leaves_out_what_its_kernels_do_not_have() -> None:
    config = parsed("{kernel: {name: mala, num_levels: 3}, sampling: {kernel: {name: pcn}}}")
    written = yaml.safe_load(as_yaml(config))
    assert written["kernel"] == {"name": "mala", "integrator": "splitting", "num_levels": 3}
    assert written["sampling"]["kernel"] == {"name": "pcn"}
    assert from_dict(written, "there and back") == config


# --- retired options -------------------------------------------------------------------------------


@pytest.fixture
def retired_options(monkeypatch: pytest.MonkeyPatch) -> None:
    constants = {
        "svi.gone": 0.2,
        "svi.flag": False,
        "svi.open": None,
        "svi.pair": (0.9, 1),
        "sampling.kernel.gone": "x",
    }
    monkeypatch.setattr(retired, "RETIRED", constants)
    monkeypatch.setattr(retired, "RETIRED_VALUES", {("ebm.objective", "adder"): "set --ebm.objective mle"})


@pytest.mark.parametrize(
    "text",
    [
        "svi: {gone: 0.2}",
        "svi: {gone: 2e-1}",
        "svi: {flag: false}",
        "svi: {open: null}",
        "svi: {pair: [0.90, 1]}",
        "sampling: {kernel: {gone: x}}",
    ],
)
@pytest.mark.usefixtures("retired_options")
def test_a_retired_option_may_have_the_value_of_its_constant(text: str) -> None:
    assert parsed(text) == Config()


def test_a_configuration_of_an_earlier_version_is_read() -> None:
    old = "{energy: {kind: auto}, model: {num_fourier: 0}, kernel: {fit_reference: true}}"
    assert parsed(old) == Config()
    with pytest.raises(InputError, match="option model.num-fourier was removed and is always 0, found 8: leave it out"):
        parsed("model: {num_fourier: 8}")


@pytest.mark.parametrize("rung_steps", [500, 20])
def test_an_option_of_a_removed_objective_may_have_any_value(rung_steps: int) -> None:
    assert parsed(f"ebm: {{rung_steps: {rung_steps}}}") == Config()


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (
            "svi: {gone: 0.3}",
            "option svi.gone was removed and is always 0.2, found 0.3: leave it out, or use the version",
        ),
        ("svi: {flag: true}", "option svi.flag was removed and is always False, found True"),
        ("svi: {open: 3}", "option svi.open was removed and is always None, found 3"),
        ("svi: {pair: [0.9, 2]}", r"option svi.pair was removed and is always \(0.9, 1\), found 0.9 2"),
        ("ebm: {objective: adder}", "--ebm.objective: adder was removed; set --ebm.objective mle"),
    ],
)
@pytest.mark.usefixtures("retired_options")
def test_another_value_of_a_retired_option_is_refused(text: str, message: str) -> None:
    with pytest.raises(InputError, match=f"^recipe.yaml: .*{message}"):
        parsed(text)


def test_retired_options_are_always_the_constants_that_replaced_them() -> None:
    from ppl_vaebm.inference.ebm import guard, latent_term, step_search

    constants = {
        "ebm.guard-patience": guard.PATIENCE,
        "ebm.max-energy-sd": guard.MAX_ENERGY_SD,
        "ebm.max-grad-norm": guard.MAX_GRAD_NORM,
        "ebm.max-saturation": guard.MAX_SATURATION,
        "ebm.min-exchange": guard.MIN_SWAP_RATE,
        "ebm.tune-rejection": step_search.MAX_REJECTION,
        "ebm.tune-steps": step_search.NUM_RATIO_STEPS,
        "ebm.latent.batch-size": latent_term.BATCH_SIZE,
        "ebm.latent.num-chains": latent_term.NUM_CHAINS,
        "ebm.latent.store-size": latent_term.STORE_SIZE,
        "ebm.latent.num-sweeps": latent_term.NUM_SWEEPS,
        "ebm.latent.learning-rate": latent_term.TERM_RATE,
        "ebm.latent.energy-l2": latent_term.TERM_L2,
    }
    assert constants.items() <= retired.RETIRED.items()
