from __future__ import annotations

from pathlib import Path

import pytest
import torch

CONFTEST = Path(__file__).with_name("conftest.py")

GUARDED = """
import pyro
import torch

import ppl_vaebm.rng

def test_draws_globally():
    torch.rand(())

def test_seeds_globally():
    torch.manual_seed(0)

def test_changes_the_dtype():
    torch.set_default_dtype(torch.float64)

def test_turns_validation_off():
    torch.distributions.Distribution.set_default_validate_args(False)

def test_draws_from_a_stream(generator):
    torch.rand((), generator=generator)

def test_draws_behind_the_door(seed):
    with ppl_vaebm.rng.global_rng(seed):
        torch.rand(())
    pyro.param("left_behind", torch.zeros(()))

def test_finds_an_empty_store():
    assert not list(pyro.get_param_store())
"""


def test_guard_fails_exactly_the_tests_that_change_global_state(pytester: pytest.Pytester) -> None:
    pytester.makeconftest(CONFTEST.read_text())
    pytester.makepyfile(GUARDED)
    result = pytester.runpytest_inprocess("-p", "no:cacheprovider")
    # The guard speaks at teardown: all seven bodies pass, and four are errors after that.
    result.assert_outcomes(passed=7, errors=4)
    for name in ("draws_globally", "seeds_globally", "changes_the_dtype", "turns_validation_off"):
        result.stdout.fnmatch_lines([f"ERROR *::test_{name}*"])


def test_seed_is_a_known_function_of_the_tests_name(seed: int, generator: torch.Generator) -> None:
    # blake2b of "0/<node id>", computed apart from the package.
    assert seed == 8754660359365176836
    assert generator.initial_seed() == seed
