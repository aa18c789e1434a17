"""Diagnostics against processes whose effective sample size, R-hat and BFMI are known."""

from __future__ import annotations

import dataclasses
import math
import os
from pathlib import Path

import arviz
import numpy as np
import pytest
import torch
import xarray
from numpy.typing import NDArray

from ppl_vaebm.errors import InputError
from ppl_vaebm.inference.diagnostics import summary as diagnostics
from ppl_vaebm.inference.diagnostics.arviz_io import (
    InferenceData,
    attribute_list,
    cut,
    load_netcdf,
    save_netcdf,
    scalar_draws,
    to_inference_data,
)
from ppl_vaebm.inference.diagnostics.convergence import nested_r_hat
from ppl_vaebm.inference.kernels.base import init_params
from ppl_vaebm.inference.kernels.chains import Chains


def make_chains(draws: dict[str, NDArray[np.float64]], energy: NDArray[np.float64] | None = None) -> Chains:
    """Wrap given draws ``(C, N, ...)`` as the chains of a kernel that took 8 evaluations per draw."""
    num_chains, num_draws = next(iter(draws.values())).shape[:2]
    shape = (num_chains, num_draws)
    energy = np.random.default_rng(99).normal(size=shape) if energy is None else energy
    diverging = torch.zeros(shape, dtype=torch.bool)
    diverging[0, :2] = True
    return Chains(
        kernel="hmc",
        draws={name: torch.from_numpy(value) for name, value in draws.items()},
        stats={
            "lp": torch.from_numpy(-energy),
            "acceptance_rate": torch.full(shape, 0.75, dtype=torch.float64),
            "diverging": diverging,
            "energy": torch.from_numpy(energy),
            "n_steps": torch.full(shape, 8),
        },
        position=torch.zeros(num_chains, 3),
        params=init_params(torch.zeros(num_chains, 3), 0.25),
        seconds=2.0,
        warmup_seconds=0.5,
        warmup_evals=1234,
        attrs={"seed": 7, "thin": 2},
    )


def make_idata(**draws: NDArray[np.float64]) -> InferenceData:
    return to_inference_data(make_chains(draws))


def autoregression(rho: float, num_chains: int, num_draws: int, seed: int) -> NDArray[np.float64]:
    """Draw stationary AR(1) chains with unit variance, whose autocorrelation at lag k is ``rho**k``."""
    noise = np.random.default_rng(seed).normal(size=(num_chains, num_draws))
    draws = noise.copy()
    for t in range(1, num_draws):
        draws[:, t] = rho * draws[:, t - 1] + math.sqrt(1 - rho**2) * noise[:, t]
    return draws


def normals(*shape: int, seed: int = 0) -> NDArray[np.float64]:
    return np.random.default_rng(seed).normal(size=shape)


def test_independent_draws_have_r_hat_one_and_as_many_effective_draws() -> None:
    (summary,) = diagnostics.summarize(make_idata(x=normals(4, 1000)))
    assert abs(summary.r_hat - 1) < 0.005
    assert summary.ess_bulk == pytest.approx(4000, rel=0.1)
    assert summary.ess_tail == pytest.approx(4000, rel=0.15)
    assert summary.mcse_mean == pytest.approx(1 / math.sqrt(4000), rel=0.1)
    assert abs(summary.mean) < 5 / math.sqrt(4000)
    assert summary.sd == pytest.approx(1, abs=5 / math.sqrt(8000))
    assert diagnostics.is_converged(summary)


@pytest.mark.parametrize("rho", [0.5, 0.9])
def test_ess_of_an_autoregression_is_draws_over_its_autocorrelation_time(rho: float) -> None:
    (summary,) = diagnostics.summarize(make_idata(x=autoregression(rho, 8, 4000, seed=1)))
    expected = 8 * 4000 * (1 - rho) / (1 + rho)
    assert summary.ess_bulk == pytest.approx(expected, rel=0.15)
    assert summary.autocorrelation_time == pytest.approx((1 + rho) / (1 - rho), rel=0.15)
    # 8 evaluations per draw and 2 seconds, warm-up left out.
    assert summary.ess_per_1000_evals == pytest.approx(1000 * summary.ess_bulk / (8 * 8 * 4000))
    assert summary.ess_per_second == pytest.approx(summary.ess_bulk / 2)


@pytest.mark.parametrize("change", ["shift", "scale"])
def test_chains_that_disagree_have_a_large_r_hat(change: str) -> None:
    draws = normals(4, 500)
    draws[0] = draws[0] + 3 if change == "shift" else draws[0] * 10
    (summary,) = diagnostics.summarize(make_idata(x=draws))
    assert summary.r_hat > 1.1
    assert not diagnostics.is_converged(summary)


def test_summaries_equal_those_of_arviz() -> None:
    idata = make_idata(x=autoregression(0.8, 4, 300, seed=2), v=normals(4, 300, 2, seed=3))
    expected = arviz.summary(idata, round_to="none").astype(float)
    ours = diagnostics.summarize(idata)
    assert [summary.name for summary in ours] == ["x", "v[0]", "v[1]"] == list(expected.index)
    for column in ("mean", "sd", "mcse_mean", "r_hat", "ess_bulk"):
        np.testing.assert_allclose([getattr(summary, column) for summary in ours], expected[column], rtol=1e-12)
    for summary, draws in zip(ours, scalar_draws(idata).values(), strict=True):
        assert summary.ess_tail == pytest.approx(float(arviz.ess(draws, method="tail", prob=(0.05, 0.95))), rel=1e-12)


def test_elements_of_arrays_are_named_by_index_and_keep_their_draws() -> None:
    matrix = normals(2, 5, 2, 3)
    draws = scalar_draws(make_idata(m=matrix))
    assert list(draws) == ["m[0,0]", "m[0,1]", "m[0,2]", "m[1,0]", "m[1,1]", "m[1,2]"]
    np.testing.assert_array_equal(draws["m[1,2]"], matrix[:, :, 1, 2])


def test_a_quantity_that_never_moves_has_no_effective_draws() -> None:
    idata = make_idata(stuck=np.full((4, 50), 1.5), x=normals(4, 50))
    stuck, moving = diagnostics.summarize(idata)
    assert (stuck.mean, stuck.sd) == (1.5, 0.0)
    assert all(math.isnan(value) for value in stuck[3:])
    assert not diagnostics.is_converged(stuck)
    assert all(math.isfinite(value) for value in moving._replace(r_hat_nested=1.0)[1:])
    assert diagnostics.worst([moving, stuck]) == (stuck, stuck)


def test_draws_that_are_not_finite_are_reported_as_they_are() -> None:
    has_nan, has_inf = normals(4, 50), normals(4, 50)
    has_nan[1, 7], has_inf[1, 7] = np.nan, np.inf
    nan, inf = diagnostics.summarize(make_idata(has_nan=has_nan, has_inf=has_inf))
    assert all(math.isnan(value) for value in nan[1:])
    # Ranks know what to do with an infinite draw, moments do not.
    assert inf.mean == math.inf and math.isnan(inf.sd) and math.isnan(inf.mcse_mean)
    assert inf.r_hat < 1.1


def test_worst_returns_the_largest_r_hat_and_the_smallest_ess() -> None:
    template = diagnostics.summarize(make_idata(x=normals(4, 50)))[0]
    summaries = [template._replace(r_hat=1.0, ess_bulk=30.0), template._replace(r_hat=1.2, ess_bulk=90.0)]
    assert diagnostics.worst(summaries) == (summaries[1], summaries[0])


def test_r_hat_of_one_chain_compares_its_quarters_and_has_a_note() -> None:
    steady, drifting = normals(1, 400), normals(1, 400) + np.linspace(0, 5, 400)
    idata = make_idata(steady=steady, drifting=drifting)
    good, bad = diagnostics.summarize(idata)
    assert good.r_hat < 1.03
    assert bad.r_hat > 1.5
    assert "note: R-hat of 1 chain cannot detect" in diagnostics.summary_table([good, bad], idata)
    assert "R-hat of" not in diagnostics.summary_table([good, bad], make_idata(x=normals(4, 8)))


def test_fewer_than_four_draws_are_refused() -> None:
    with pytest.raises(InputError, match="at least 4 draws per chain, found 3"):
        diagnostics.summarize(make_idata(x=normals(4, 3)))
    assert len(diagnostics.summarize(make_idata(x=normals(4, 4)))) == 1


def test_bfmi_of_known_energies() -> None:
    # Independent energies: E[(e' - e)^2] = 2 Var(e). AR(1): 2 (1 - rho) Var(e).
    energies = np.concatenate([normals(2, 20_000), autoregression(0.95, 2, 20_000, seed=4)])
    idata = to_inference_data(make_chains({"x": energies}, energies))
    values = diagnostics.bfmi(idata)
    np.testing.assert_allclose(values, [2, 2, 0.1, 0.1], rtol=0.1)
    np.testing.assert_allclose(values, arviz.bfmi(energies), rtol=1e-12)


def test_chains_that_each_stand_still_elsewhere_disagree_without_bound() -> None:
    (summary,) = diagnostics.summarize(make_idata(x=np.arange(4.0)[:, None].repeat(50, axis=1)))
    assert math.isinf(summary.r_hat)
    assert not diagnostics.is_converged(summary)
    assert summary.ess_bulk < 10


def test_bfmi_of_an_energy_that_never_moves_is_nan() -> None:
    idata = to_inference_data(make_chains({"x": normals(2, 9)}, np.ones((2, 9))))
    assert np.isnan(diagnostics.bfmi(idata)).all()


def test_inference_data_has_the_names_shapes_and_dtypes_of_arviz() -> None:
    x = normals(2, 5, 3)
    idata = make_idata(x=x)
    assert idata["posterior"]["x"].dims[:2] == ("chain", "draw")
    np.testing.assert_array_equal(idata["posterior"]["x"], x)
    stats = idata["sample_stats"]
    assert set(stats.data_vars) == {"lp", "acceptance_rate", "diverging", "energy", "n_steps", "step_size"}
    assert all(stats[name].shape == (2, 5) for name in stats.data_vars)
    assert stats["diverging"].dtype == bool
    assert float(stats["step_size"].min()) == float(stats["step_size"].max()) == 0.25
    assert diagnostics.num_divergent(idata) == 2
    attrs = idata["posterior"].attrs
    assert {key: attrs[key] for key in ("kernel", "seed", "thin", "num_evals", "warmup_evals")} == {
        "kernel": "hmc",
        "seed": 7,
        "thin": 2,
        "num_evals": 2 * 5 * 8,
        "warmup_evals": 1234,
    }
    assert (attrs["seconds"], attrs["warmup_seconds"]) == (2.0, 0.5)
    assert f"torch {torch.__version__.split('+')[0]}" in attrs["versions"]


def test_many_short_chains_are_not_taken_for_swapped_axes() -> None:
    assert make_idata(x=normals(64, 5))["posterior"].sizes["chain"] == 64


def test_netcdf_round_trip_is_exact(tmp_path: Path) -> None:
    idata = make_idata(x=normals(3, 6, 2), y=normals(3, 6, seed=5).astype(np.float32))
    path = tmp_path / "chains.nc"
    path.write_text("an older file")
    save_netcdf(idata, path)
    assert os.listdir(tmp_path) == ["chains.nc"]
    loaded = load_netcdf(path)
    path.unlink()  # everything is in memory
    for group in ("posterior", "sample_stats"):
        assert dict(loaded[group].attrs) == dict(idata[group].attrs)
        assert set(loaded[group].data_vars) == set(idata[group].data_vars)
        for name in idata[group].data_vars:
            assert loaded[group][name].dtype == idata[group][name].dtype
            assert loaded[group][name].dims == idata[group][name].dims
            np.testing.assert_array_equal(loaded[group][name], idata[group][name])
    assert diagnostics.summarize(loaded) == diagnostics.summarize(idata)


def test_a_failed_save_keeps_the_older_file(tmp_path: Path) -> None:
    path = tmp_path / "chains.nc"
    path.write_text("an older file")
    idata = make_idata(x=normals(2, 5))
    idata["posterior"].attrs["bad"] = object()
    with pytest.raises(TypeError):
        save_netcdf(idata, path)
    assert os.listdir(tmp_path) == ["chains.nc"]
    assert path.read_text() == "an older file"


@pytest.mark.parametrize("content", [None, b"not a NetCDF file"])
def test_a_missing_or_damaged_chains_file_is_an_input_error(tmp_path: Path, content: bytes | None) -> None:
    path = tmp_path / "chains.nc"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(InputError, match="chains.nc"):
        load_netcdf(path)


def test_a_truncated_chains_file_is_an_input_error(tmp_path: Path) -> None:
    path = tmp_path / "chains.nc"
    save_netcdf(make_idata(x=normals(2, 50)), path)
    path.write_bytes(path.read_bytes()[:3000])
    with pytest.raises(InputError, match="not a readable NetCDF file"):
        load_netcdf(path)


def test_a_chains_file_without_posterior_is_an_input_error(tmp_path: Path) -> None:
    path = tmp_path / "other.nc"
    xarray.Dataset({"lp": 1.0}).to_netcdf(path, group="sample_stats", engine="h5netcdf")
    with pytest.raises(InputError, match="expected a group 'posterior'"):
        load_netcdf(path)


def test_summary_table_is_aligned_and_complete() -> None:
    idata = make_idata(x=normals(4, 500), a_longer_name=normals(4, 500, seed=1) * 1000)
    summaries = diagnostics.summarize(idata)
    lines = diagnostics.summary_table(summaries, idata).splitlines()
    titles, units, first, second, blank, *footer = lines
    assert titles.split()[:5] == ["quantity", "mean", "sd", "MCSE", "R-hat"]
    assert units.split()[:2] == ["own", "unit"]
    assert first.startswith("x   ") and second.startswith("a_longer_name ") and blank == ""
    assert len(first) == len(second) == len(units)
    assert f"{summaries[1].ess_bulk:.0f}" in second.split()
    text = " ".join(footer)
    assert footer[-1] == "R-hat is at most 1.01 for 2 of 2 quantities"
    for part in ("kernel hmc", "step size 0.25", "acceptance 0.750", "draws 2 of 2000", "16000 evaluations", "1234"):
        assert part in text


def test_table_cells_are_readable_for_large_and_small_numbers() -> None:
    nan = float("nan")
    numbers = (-10234.56, 101.234, 0.01234, 1.0, nan, 3999.6, 55.2, 1.2345, 0.123456, 12345.6)
    summary = diagnostics.QuantitySummary("lp", *numbers)
    assert diagnostics.table_cells(summary) == [
        *("lp", "-10235", "101", "0.012", "1.000", "", "4000", "55", "1.23", "0.123", "12346")
    ]
    assert diagnostics.table_cells(summary._replace(r_hat=nan, mean=6.5e15))[1:5:3] == ["6.5e+15", "nan"]
    assert diagnostics.table_cells(summary._replace(r_hat=3e15, r_hat_nested=1.5))[4:6] == ["> 1000", "1.500"]


# --- attributes, prefixes, and words ----------------------------------------------------------------


def with_attrs(chains: Chains, **attrs: str | float | int | list[float]) -> InferenceData:
    return to_inference_data(dataclasses.replace(chains, attrs={**chains.attrs, **attrs}))


def test_the_report_of_a_kernel_survives_saving(tmp_path: Path) -> None:
    report: dict[str, str | float | int | list[float]] = {
        "swap_rates": [0.25, 0.5, 0.75],
        "inverse_temperatures": [0.0, 0.25, 0.5, 1.0],
        "num_round_trips": 17,
        "round_trips_per_1000_sweeps": 3.25,
        "one_level": [0.5],
        "words": "and signs: é",
    }
    idata = with_attrs(make_chains({"x": normals(4, 20)}), **report)
    path = tmp_path / "chains.nc"
    save_netcdf(idata, path)
    loaded = load_netcdf(path)
    attrs = loaded["posterior"].attrs
    assert {name: attrs[name] for name in report if name != "one_level"} == {
        name: value for name, value in report.items() if name != "one_level"
    }
    assert attribute_list(loaded, "one_level") == [0.5]
    assert attribute_list(loaded, "absent") == []
    for lines in (diagnostics.run_lines(idata), diagnostics.run_lines(loaded)):
        (line,) = (line for line in lines if line.startswith("inverse temperatures"))
        assert line == (
            "inverse temperatures 0, 0.25, 0.5, 1; swaps of neighbours accepted 0.25 to 0.75; "
            "round trips between the ends 17, per 1000 sweeps 3.25"
        )


def test_run_lines_describe_swaps_of_the_first_latent_and_its_ladder() -> None:
    ladder: dict[str, list[float]] = {"swap_rates": [0.25, 0.75], "inverse_temperatures": [0.0, 0.5, 1.0]}
    report = {f"first_latent_{name}": values for name, values in ladder.items()}
    idata = with_attrs(make_chains({"x": normals(4, 20)}), exchange_rate=0.6543, **report)
    told = diagnostics.run_lines(idata)
    assert "swaps of the first latent with chains of its own accepted 0.65" in told
    assert "those chains: inverse temperatures 0, 0.5, 1; swaps of neighbours accepted 0.25 to 0.75" in told


def test_a_prefix_is_what_the_run_would_have_been(tmp_path: Path) -> None:
    chains = dataclasses.replace(
        make_chains({"x": normals(4, 50), "y": normals(4, 50, 2)}), elapsed=torch.linspace(0.04, 2, 50).double()
    )
    path = tmp_path / "chains.nc"
    save_netcdf(to_inference_data(chains), path)
    for idata in (to_inference_data(chains), load_netcdf(path)):
        before = dict(idata["posterior"].attrs)
        part = cut(idata, 20)
        assert part["posterior"].sizes["draw"] == part["sample_stats"].sizes["draw"] == 20
        np.testing.assert_array_equal(part["posterior"]["y"], chains.draws["y"][:, :20])
        attrs = part["posterior"].attrs
        assert attrs["num_evals"] == 4 * 20 * 8 and attrs["seconds"] == pytest.approx(0.8)
        assert attrs["warmup_seconds"] == 0.5 and attrs["kernel"] == "hmc"
        assert dict(idata["posterior"].attrs) == before  # the whole is left as it was
    no_times = cut(to_inference_data(dataclasses.replace(chains, elapsed=None)), 20)
    assert no_times["posterior"].attrs["seconds"] == pytest.approx(0.8)  # the evaluations' share


def test_chains_that_share_starts_have_a_nested_r_hat() -> None:
    draws = normals(8, 30)
    (plain,) = diagnostics.summarize(with_attrs(make_chains({"x": draws})))
    assert math.isnan(plain.r_hat_nested)
    for per_start, is_known in ((2, True), (4, True), (8, False)):
        idata = with_attrs(make_chains({"x": draws}), chains_per_start=per_start)
        (summary,) = diagnostics.summarize(idata)
        assert math.isnan(summary.r_hat_nested) != is_known
        header = diagnostics.summary_table([summary], idata).splitlines()[1]
        assert ("nested" in header) == is_known
        if is_known:
            assert summary.r_hat_nested == nested_r_hat(draws, np.arange(8) // per_start)


def test_notes_say_what_is_wrong_with_chains() -> None:
    good = make_chains({"x": normals(4, 500)})
    good = dataclasses.replace(good, stats={**good.stats, "diverging": torch.zeros(4, 500, dtype=torch.bool)})
    assert diagnostics.notes(to_inference_data(good)) == []

    never = {**good.stats, "acceptance_rate": torch.full((4, 500), 0.002)}
    idata = to_inference_data(dataclasses.replace(good, stats=never))
    (note,) = diagnostics.notes(idata)
    assert note.startswith("the chains stand still: 0.2 %")
    unadjusted = with_attrs(dataclasses.replace(good, stats=never), is_adjusted=0)
    assert diagnostics.notes(unadjusted) == []  # nothing is rejected there

    (note,) = diagnostics.notes(make_idata(x=normals(4, 500)))
    assert note.startswith("2 of 2000 draws diverged")

    draws = normals(4, 500)
    draws[0, 0] = np.nan
    (note,) = diagnostics.notes(to_inference_data(dataclasses.replace(good, draws={"x": torch.from_numpy(draws)})))
    assert "draws of x are not all finite" in note

    slow = autoregression(0.99, 4, 500, seed=3)
    idata = to_inference_data(dataclasses.replace(good, stats={**good.stats, "energy": torch.from_numpy(slow)}))
    (note,) = diagnostics.notes(idata)
    assert note.startswith("the BFMI of a chain is below 0.3")
    assert f"note: {note}" in diagnostics.run_lines(idata)
