"""Diagnostics of every coordinate: the text and the file."""

from __future__ import annotations

import os
from pathlib import Path

import arviz
import numpy as np
import pytest
import torch
import xarray

from ppl_vaebm.errors import InputError
from ppl_vaebm.inference.diagnostics.convergence import diagnose_columns
from ppl_vaebm.inference.diagnostics.coordinates import (
    Coordinates,
    coordinate_names,
    load_coordinates,
    save_coordinates,
)
from ppl_vaebm.inference.kernels.packing import Packing

PACKING = Packing({"eps_z_1": torch.Size([3]), "eps_x": torch.Size([1, 2, 2])})
NAMES = ["eps_z_1[0]", "eps_z_1[1]", "eps_z_1[2]", "eps_x[0,0,0]", "eps_x[0,0,1]", "eps_x[0,1,0]", "eps_x[0,1,1]"]


def positions() -> np.ndarray[tuple[int, ...], np.dtype[np.float32]]:
    """Draw mixed chains, but for one coordinate that disagrees and one that never moves."""
    draws = np.random.default_rng(0).normal(size=(4, 200, PACKING.dim)).astype(np.float32)
    draws[0, :, 5] += 2
    draws[:, :, 2] = 0
    return draws


def make_coordinates(stride: int = 4) -> Coordinates:
    draws = positions()
    num_chains, num_draws, _ = draws.shape
    return Coordinates(diagnose_columns(draws), coordinate_names(PACKING), num_chains, num_draws, stride)


def test_coordinates_are_named_by_their_noise_in_the_order_of_the_columns() -> None:
    assert coordinate_names(PACKING).tolist() == NAMES
    position = torch.arange(7.0).unsqueeze(0)
    sites = PACKING.unravel(position)
    assert float(sites["eps_x"][0, 0, 1, 0]) == NAMES.index("eps_x[0,1,0]")


def test_text_names_the_worst_coordinates_and_counts_all() -> None:
    coordinates = make_coordinates()
    text = "\n".join(coordinates.lines)
    assert "all 7 coordinates, 4 chains of 200 positions (one of every 4 draws)" in text
    assert f"largest {coordinates.convergence.r_hat[5]:.4g}; above 1.01: 2" in text  # one disagrees, one is unknown
    assert "largest R-hat: eps_z_1[2] nan, eps_x[0,1,0] " in text
    assert "note: 1 coordinates never moved" in text
    assert "every draw)" in make_coordinates(stride=1).lines[0]


def test_coordinates_that_never_move_have_no_quantiles() -> None:
    nowhere = diagnose_columns(np.zeros((4, 20, 7)))
    lines = Coordinates(nowhere, coordinate_names(PACKING), 4, 20, 1).lines
    assert "R-hat unknown, largest nan; above 1.01: 7" in "\n".join(lines)


def test_saved_coordinates_load_equal_and_arviz_reads_their_positions(tmp_path: Path) -> None:
    path, coordinates = tmp_path / "positions.nc", make_coordinates()
    path.write_text("an older file")
    save_coordinates(path, positions(), coordinates)
    assert os.listdir(tmp_path) == ["positions.nc"]
    loaded = load_coordinates(path)
    assert loaded.lines == coordinates.lines and loaded.names.tolist() == NAMES
    for ours, theirs in zip(loaded.convergence, coordinates.convergence, strict=True):
        np.testing.assert_array_equal(ours, theirs)
    idata = arviz.from_netcdf(str(path), engine="h5netcdf")
    stored = idata["posterior"]["position"]
    assert stored.dims == ("chain", "draw", "coordinate") and stored.dtype == np.float32
    np.testing.assert_array_equal(stored.sel(coordinate="eps_x[0,1,0]"), positions()[:, :, 5])
    idata.close()


@pytest.mark.parametrize("content", ["no file of positions", None])
def test_a_damaged_or_foreign_positions_file_is_an_input_error(tmp_path: Path, content: str | None) -> None:
    path = tmp_path / "positions.nc"
    if content is None:
        xarray.Dataset({"lp": 1.0}).to_netcdf(path, group="posterior", engine="h5netcdf")
    else:
        path.write_text(content)
    with pytest.raises(InputError, match=r"positions\.nc is not a readable file of positions"):
        load_coordinates(path)
