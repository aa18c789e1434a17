"""What every test gets: one thread, no display, an empty Pyro store, and a guard over torch's global state."""

from __future__ import annotations

import gc
import os

# Before the first import of torch and matplotlib, so that subprocesses of tests inherit them.
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ["MPLBACKEND"] = "Agg"
# JAX's own arithmetic takes next to no time in these tests, and it compiles twice as fast without optimization.
os.environ.setdefault("XLA_FLAGS", "--xla_backend_optimization_level=0")

from collections.abc import Iterator
from typing import BinaryIO

import pyro
import pytest
import torch
from matplotlib.figure import Figure

import ppl_vaebm.models  # noqa: F401  # sets Pyro's module_local_params, which the guard then finds in place
from ppl_vaebm.rng import seed_for

torch.set_num_threads(1)
# At its usual pace the collector takes a tenth of the suite: it walks over all that torch and JAX have imported.
gc.set_threshold(100_000, 20, 50)

RNG_STATE = torch.get_rng_state()
DTYPE = torch.get_default_dtype()
PYRO_SETTINGS = pyro.settings.get()


def changed_globals() -> list[str]:
    """Name the global state that differs from what the tests started with.

    Returns:
        One phrase each for torch's generator, its default dtype, and every setting of Pyro, among them the
        validation of both libraries' distributions.
    """
    changed = []
    if not torch.equal(torch.get_rng_state(), RNG_STATE):
        changed.append("torch's global generator (draw from a stream, or run Pyro code in ppl_vaebm.rng.global_rng)")
    if torch.get_default_dtype() != DTYPE:
        changed.append(f"the default dtype (now {torch.get_default_dtype()})")
    settings = pyro.settings.get()
    changed += [f"{name} (now {settings[name]})" for name, value in PYRO_SETTINGS.items() if settings[name] != value]
    return changed


@pytest.fixture(autouse=True)
def global_state() -> Iterator[None]:
    """Fail a test that changes torch's or Pyro's global state, and put the state back for the next one."""
    pyro.clear_param_store()
    yield
    changed = changed_globals()
    torch.set_rng_state(RNG_STATE)
    torch.set_default_dtype(DTYPE)
    pyro.settings.set(**PYRO_SETTINGS)
    if changed:
        pytest.fail("the test or one of its fixtures changed " + ", ".join(changed), pytrace=False)


@pytest.fixture
def seed(request: pytest.FixtureRequest) -> int:
    """Return a seed of the test's own: a hash of its name, the same in every order and process."""
    return seed_for(0, request.node.nodeid)


@pytest.fixture
def generator(seed: int) -> torch.Generator:
    """Return a CPU generator at the test's own seed."""
    return torch.Generator().manual_seed(seed)


@pytest.fixture(scope="module")
def blank_pictures() -> Iterator[None]:
    """Save every figure as an empty file: rendering takes most of a report's time, and tests/reports tests it."""

    def save_nothing(figure: Figure, file: BinaryIO, **options: object) -> None:
        file.write(b"")

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Figure, "savefig", save_nothing)
        yield


def pytest_runtest_setup(item: pytest.Item) -> None:
    """Skip a test marked ``gpu`` where there is no accelerator."""
    if item.get_closest_marker("gpu") and not torch.accelerator.is_available():
        pytest.skip("no accelerator")
