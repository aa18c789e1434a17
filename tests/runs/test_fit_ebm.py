"""The command line of stage 2: tuning before training, the guard, and what is refused."""

from __future__ import annotations

import shutil
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import yaml

from ppl_vaebm import fit
from ppl_vaebm.errors import InputError
from ppl_vaebm.inference.ebm import step_search
from ppl_vaebm.inference.ebm.guard import Guard
from ppl_vaebm.runs import checkpoint as checkpoints
from ppl_vaebm.runs.loading import load_run
from ppl_vaebm.runs.run import Run
from tests.tiny import POINTS, fit_run

MLE = ["--stage", "ebm", "--overwrite", "--objective", "mle"]


pytestmark = pytest.mark.usefixtures("quick_reports")


@pytest.fixture(scope="module")
def fitted(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return fit_run(tmp_path_factory.mktemp("points"), POINTS)


@pytest.fixture
def run(tmp_path: Path, fitted: Path) -> Path:
    shutil.copytree(fitted, tmp_path / "run")
    return tmp_path / "run"


def options(run: Path) -> dict[str, Any]:
    tree: dict[str, Any] = yaml.safe_load((run / "config.yaml").read_text())
    return tree


def energy_bytes(run: Path) -> bytes:
    folder = run / "checkpoints" / "ebm"
    return (folder / f"step-{checkpoints.available(folder)[-1]:08d}" / "weights.safetensors").read_bytes()


# --- tuning ----------------------------------------------------------------------------------------


def test_tuning_shows_its_trials_and_leaves_its_choice_in_the_run(
    run: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(step_search, "NUM_RATIO_STEPS", 5)
    fit.main([*MLE, "--run", str(run), "--kernel", "mala", "--tune"])
    said, tree = capsys.readouterr().out, options(run)
    (line,) = [line for line in said.splitlines() if line.endswith("<- chosen")]
    step_size, num_steps = line.split()[:2]
    assert f"{tree['kernel']['step_size']:.4g}" == step_size and str(tree["ebm"]["num_transitions"]) == num_steps
    assert "after 5 steps of the ratio" in said and tree["ebm"]["tune"] is True
    first = next(record for record in Run(run).metrics("ebm") if "step_size" in record)
    assert first["step_size"] == pytest.approx(tree["kernel"]["step_size"], rel=1e-6)


@pytest.mark.slow
def test_a_tuned_run_resumes_without_tuning_again(run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(step_search, "NUM_RATIO_STEPS", 5)
    command = ["--run", str(run), "--kernel", "langevin", "--tune"]
    fit.main([*MLE, *command])
    whole, tree = energy_bytes(run), options(run)
    folder = run / "checkpoints" / "ebm"
    shutil.rmtree(folder / f"step-{checkpoints.available(folder)[-1]:08d}")

    def refuse(*args: object) -> None:
        raise AssertionError("it tuned again")

    monkeypatch.setattr("ppl_vaebm.runs.fitting.search", refuse)
    fit.main(["--stage", "ebm", "--run", str(run), "--resume"])
    assert energy_bytes(run) == whole and options(run) == tree


# --- the guard -------------------------------------------------------------------------------------


def test_a_run_that_gives_up_keeps_its_last_checkpoint_and_says_so(
    run: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    limits = ["--ebm.max-energy-gap", "1e-6", "--ebm.max-rollbacks", "1"]
    with pytest.raises(SystemExit) as stop:
        fit.main([*MLE, "--run", str(run), *limits])
    error = capsys.readouterr().err
    assert stop.value.code == 1 and error.count("\n") == 1
    assert "ebm.max-energy-gap" in error and "lower learning rate" in error


def test_a_stopped_stage_is_a_run_like_any_other(run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    original, num_steps = Guard.watch, 0

    def watch(self: Guard, monitors: Mapping[str, float]) -> str | None:
        nonlocal num_steps
        num_steps += 1
        is_bad = num_steps == 10  # after the checkpoint of step 8
        return original(self, {"energy_gap": 1e9} if is_bad else monitors)

    monkeypatch.setattr(Guard, "watch", watch)
    fit.main([*MLE, "--run", str(run), "--ebm.max-rollbacks", "0"])
    assert checkpoints.available(run / "checkpoints" / "ebm")[-1] == 8
    event = Run(run).metrics("ebm")[-1]
    assert (event["event"], event["step"], event["to_step"]) == ("stop", 10, 8)
    loaded = load_run(run)
    saved = checkpoints.load(run / "checkpoints" / "ebm")
    for name, weight in saved.weights["energy_average"].items():
        assert (loaded.vaebm.energy.state_dict()[name] == weight).all()


# --- what belongs to the model ---------------------------------------------------------------------


def test_a_run_is_loaded_at_the_temperature_that_it_was_fitted_at(run: Path) -> None:
    at_one = load_run(run)
    fit.main(["--stage", "ebm", "--overwrite", "--run", str(run), "--ebm.temperature", "0.8"])
    loaded = load_run(run)
    assert loaded.vaebm.vae.model.temperature == 0.8 and at_one.vaebm.vae.model.temperature == 1.0
    elsewhere = replace(loaded.config, ebm=replace(loaded.config.ebm, temperature=1.0))
    assert replace(loaded, config=elsewhere).fingerprint != loaded.fingerprint
    tree = options(run)
    tree["ebm"]["temperature"] = 1.0
    (run / "config.yaml").write_text(yaml.safe_dump(tree))
    with pytest.raises(InputError, match=r"expected ebm.temperature 0.8 .* found 1; put it back"):
        load_run(run)


def test_a_checkpoint_of_a_version_with_fewer_options_is_read(run: Path) -> None:
    """What it did not know has its default; what it did know must still agree."""
    folder = run / "checkpoints" / "ebm"
    for removed, is_read in (({"energy": "spectral_norm", "ebm": "guard"}, True), ({"energy": "nonsense"}, False)):
        saved = checkpoints.load(folder)
        config = {name: dict(part) if isinstance(part, dict) else part for name, part in saved.config.items()}
        for section, name in removed.items():
            if name in config[section]:
                del config[section][name]
            else:
                config[section][name] = 1
        checkpoints.save(
            folder,
            stage="ebm",
            step=saved.step,
            weights=saved.weights,
            state=saved.state,
            config=config,
            score=saved.score,
        )
        if is_read:
            load_run(run)
            fit.main(["--stage", "ebm", "--run", str(run), "--resume"])
        else:
            with pytest.raises(InputError, match="energy.nonsense"):
                load_run(run)


# --- bad input -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("argv", "words"),
    [
        ([*MLE, "--ebm.adam-betas", "0.9", "1.0"], ["ebm.adam-betas", "[0, 1)"]),
        ([*MLE, "--ebm.clip", "value"], ["--ebm.clip", "adam-moments"]),
        ([*MLE, "--ebm.temperature", "0"], ["ebm.temperature", "positive"]),
        ([*MLE, "--ebm.rollback-factor", "1"], ["ebm.rollback-factor", "(0, 1)"]),
        ([*MLE, "--ebm.max-energy-gap", "0"], ["ebm.max-energy-gap", "positive"]),
        ([*MLE, "--ebm.min-acceptance", "1"], ["ebm.min-acceptance"]),
        ([*MLE, "--threads", "-1"], ["fit: threads", "0 or more"]),
        ([*MLE, "--ebm.latent.steps", "3"], ["ebm.latent.steps", "0 without energy.latent-term"]),
        ([*MLE, "--ebm.max-rollbacks", "-1"], ["ebm.max-rollbacks"]),
        (["--stage", "ebm", "--overwrite", "--objective", "ladder"], ["ladder was removed", "--objective mle"]),
        ([*MLE, "--ebm.max-grad-norm", "5"], ["ebm.max-grad-norm was removed", "always 1000000", "found 5"]),
        (["--stage", "ebm", "--overwrite", "--objective", "ratio", "--tune"], ["ebm.tune", "chains"]),
        ([*MLE, "--negatives", "importance", "--tune"], ["ebm.tune", "chains"]),
        ([*MLE, "--kernel", "independence", "--tune"], ["ebm.tune", "langevin", "independence"]),
        ([*MLE, "--kernel", "tempered", "--tune"], ["ebm.tune", "langevin", "tempered"]),
    ],
)
def test_bad_options_end_in_one_sentence(
    run: Path, argv: list[str], words: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    before = (run / "config.yaml").read_bytes()
    assert all(word in sentence([*argv, "--run", str(run)], capsys) for word in words)
    assert (run / "config.yaml").read_bytes() == before and (run / "checkpoints" / "ebm").is_dir()


def sentence(argv: list[str], capsys: pytest.CaptureFixture[str]) -> str:
    """Run the command, which must refuse, and return its one sentence."""
    with pytest.raises(SystemExit) as stop:
        fit.main(argv)
    assert stop.value.code == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ") and error.count("\n") == 1, error
    return error


def test_the_replay_of_another_model_is_refused(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = run / "checkpoints" / "ebm"
    saved = checkpoints.load(folder)
    state = {**saved.state, "replay": saved.state["replay"][:, :-1], "replay_sites": ["eps_z_1 (3,)"]}
    checkpoints.save(
        folder, stage="ebm", step=saved.step, weights=saved.weights, state=state, config=saved.config, score=None
    )
    error = sentence(["--stage", "ebm", "--run", str(run), "--resume"], capsys)
    assert "replay" in error and "found one of 16 chains of 3 noises" in error and "--overwrite" in error


def test_a_checkpoint_of_an_earlier_version_is_not_resumed(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = run / "checkpoints" / "ebm"
    saved = checkpoints.load(folder, "last")
    checkpoints.save(
        folder,
        stage="ebm",
        step=saved.step,
        weights=saved.weights,
        state={name: value for name, value in saved.state.items() if name != "guard"},
        config=saved.config,
        score=saved.score,
    )
    error = sentence(["--stage", "ebm", "--run", str(run), "--resume"], capsys)
    assert "found one of an earlier version" in error and "--overwrite" in error
    assert checkpoints.load(folder, "last").step == saved.step
