"""The layers of docs/design.md, enforced on the imports of every module.

``LAYERS`` is the whole rule book: a module imports only modules that stand before it here. To add a module, give it a
row, here and in docs/design.md.
"""

from __future__ import annotations

import ast
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PACKAGE = "ppl_vaebm"

# Names relative to the package; "." is ppl_vaebm/__init__.py, and a folder's name is its __init__.py.
LAYERS = {
    "0": ("version", ".", "errors", "rng", "files", "processes", "devices", "config", "options"),
    "1": (
        "run",
        "tensorboard",
        "splits",
        "image_files",
        "image_folder",
        "image_sets",
        "data",
        "checkpoint",
        "pixels",
        "metrics_inputs",
        "metrics_distances",
        "metrics_modes",
        "metrics_neighbours",
        "metrics",
        "features_base",
        "features_inception",
        "features_classifier",
        "features_digits",
        "features",
        "models",
        "models.distributions",
        "models.logistic_mixture",
        "models.quantile_transport",
        "models.decoders",
        "models.cells",
        "models.vae",
        "models.small_vae",
        "models.nvae_cells",
        "models.flows",
        "models.nvae",
        "models.build",
        "models.spectral",
        "models.energy_layouts",
        "models.energy_blocks",
        "models.energy_init",
        "models.energy",
        "models.vaebm",
    ),
    "2a": (
        "inference",
        "inference.base",
        "inference.targets",
        "inference.targets_curved",
        "inference.targets_modes",
        "inference.hmc",
        "inference.langevin",
        "inference.crank_nicolson",
        "inference.elliptical",
        "inference.mixture",
        "inference.adaptation",
        "inference.chees",
        "inference.ladder",
        "inference.tempered",
        "inference.chains",
        "inference.kernels",
        "inference.log_z",
        "inference.annealing",
        "inference.annealing_pilot",
        "inference.ais",
        "inference.smc",
        "inference.bridge_sampling",
        "inference.thermodynamic",
    ),
    "2b": (
        "inference.elbo",
        "inference.norms",
        "inference.potential",
        "inference.observations",
        "inference.conditioning",
        "inference.conditional_starts",
        "inference.calibration",
        "inference.replay",
        "inference.latent_chains",
        "inference.latent_exchange",
        "inference.likelihood",
        "inference.convergence",
        "inference.containers",
        "inference.diagnostics",
        "inference.diagnostics_text",
        "inference.pyro_kernel",
        "inference.pyro_mcmc",
        "inference.jax_potential",
        "inference.jax_compiled",
        "inference.jax_sampler",
        "inference.numpyro_kernels",
        "inference.blackjax_kernels",
        "inference.jax_bridge",
        "inference.coordinates",
        "inference.functionals",
        "inference.sampling",
        "inference.vae_draws",
        "inference.normaliser",
    ),
    "3": (
        "inference.training",
        "inference.svi",
        "inference.latent_term",
        "inference.latent_balance",
        "inference.negatives",
        "inference.guard",
        "inference.learner",
        "inference.tuning",
        "inference.ebm",
        "summary",
        "loading",
        "fitted_vae",
        "evaluation_base",
        "evaluation_likelihood",
        "evaluation_normaliser",
        "evaluation_modes",
        "evaluation_metrics",
        "evaluation_samples",
        "evaluation_scores",
        "evaluation_ood_sets",
        "evaluation_ood",
        "evaluation_neighbours",
        "evaluation_plan",
        "evaluation",
        "evaluation_svi",
        "evaluation_file",
        "evaluation_tables",
        "comparison",
        "comparison_files",
        "comparison_table",
        "comparison_text",
        "figures",
        "figures_samples",
        "figures_svi",
        "figures_chains",
        "figures_compare",
        "figures_conditional",
        "figures_evaluation",
        "gallery",
        "drawing",
        "given",
        "conditional",
        "report_cells",
        "report_sections",
        "report",
        "comparison_page",
        "fitting",
    ),
    "4": (
        *(
            "experiments",
            "experiments.shared_vae",
            "experiments.objectives",
            "experiments.posterior_points",
            "experiments.sbc_digits",
        ),
        *("experiments.judging", "experiments.image_objectives", "experiments.stability"),
    ),
    "5": ("cli", "fit", "sample", "diagnose", "compare", "evaluate"),
}

# The kernels are a library of their own that works on any batched potential.
FORBIDDEN = {
    "2a": ("pyro", *(f"{PACKAGE}.{name}" for name in ("models", "splits", "image_sets", "data"))),
}

# Run with python -m, imported by nothing.
ENTRY_POINTS = ("fit", "sample", "diagnose", "compare", "evaluate")

# Tensors are made like an input, so no module has to name a device; who does has a reason:
# rng keeps the state of the devices' own generators.
MAY_NAME_CUDA = ("rng",)


def full_name(row: str) -> str:
    return PACKAGE if row == "." else f"{PACKAGE}.{row}"


ORDER = [full_name(row) for rows in LAYERS.values() for row in rows]
LAYER_OF = {full_name(row): layer for layer, rows in LAYERS.items() for row in rows}


def modules() -> dict[str, Path]:
    """Return every module of the package by its dotted name."""
    paths = sorted((ROOT / PACKAGE).rglob("*.py"))
    return {".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__"): path for path in paths}


def imports(source: str) -> list[str]:
    """Return what a module imports anywhere in it, as dotted names; a relative import starts with dots."""
    names = []
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            names += [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            base = "." * node.level + (node.module or "")
            # The name may be a module itself: "from ppl_vaebm.inference import hmc".
            candidates = [f"{base}.{alias.name}" for alias in node.names]
            names += [name if name in LAYER_OF else base for name in candidates]
    return names


def is_within(name: str, package: str) -> bool:
    return name == package or name.startswith(package + ".")


def violations(module: str, source: str) -> list[str]:
    """Return one sentence for each import that the table does not allow."""
    if module not in LAYER_OF:
        return [f"{module} is in no layer: give it a row in LAYERS and in docs/design.md"]
    found = []
    for name in imports(source):
        if name.startswith("."):
            found.append(f"{module} imports {name}: write the whole name")
        if any(is_within(name, package) for package in FORBIDDEN.get(LAYER_OF[module], ())):
            found.append(f"{module} imports {name}: layer {LAYER_OF[module]} must not know it")
        elif is_within(name, PACKAGE):
            found += order_violations(module, name)
    return found


def order_violations(module: str, name: str) -> list[str]:
    if name not in LAYER_OF:
        return [f"{module} imports {name}, which is in no layer"]
    if name.removeprefix(f"{PACKAGE}.") in ENTRY_POINTS:
        return [f"{module} imports {name}: nothing imports an entry point"]
    if ORDER.index(name) >= ORDER.index(module):
        return [f"{module} (layer {LAYER_OF[module]}) imports {name} (layer {LAYER_OF[name]}), which stands after it"]
    return []


@pytest.mark.parametrize("module", modules())
def test_imports_follow_the_table(module: str) -> None:
    assert violations(module, modules()[module].read_text()) == []


def test_every_row_has_its_module() -> None:
    assert sorted(set(LAYER_OF) - set(modules())) == []


def test_the_design_document_has_the_same_table() -> None:
    text = (ROOT / "docs" / "design.md").read_text()
    in_document = {
        layer: [row for cell in re.findall(rf"^\| {layer} \|([^|]*)\|", text, re.MULTILINE) for row in table_rows(cell)]
        for layer in LAYERS
    }
    assert in_document == {layer: list(rows) for layer, rows in LAYERS.items()}


def table_rows(cell: str) -> list[str]:
    """Turn "`inference/base.py`, `models/__init__.py`" into rows of LAYERS."""
    names = [name.removesuffix(".py").replace("/", ".") for name in re.findall(r"`([^`]+\.py)`", cell)]
    return [name.removesuffix("__init__").removesuffix(".") or "." for name in names]


@pytest.mark.parametrize(
    ("module", "source", "because"),
    [
        ("inference.base", "import pyro", "layer 2a must not know it"),
        ("inference.base", "from pyro.distributions import Normal", "layer 2a must not know it"),
        ("inference.hmc", "def f():\n    from ppl_vaebm.models.vaebm import VAEBM", "layer 2a must not know it"),
        ("inference.hmc", "from ppl_vaebm import data", "layer 2a must not know it"),
        ("inference.hmc", "from ppl_vaebm.splits import Data", "layer 2a must not know it"),
        ("inference.hmc", "from ppl_vaebm.image_sets import LOADERS", "layer 2a must not know it"),
        ("inference.base", "from ppl_vaebm.inference import hmc", "which stands after it"),
        ("inference.base", "from ppl_vaebm.inference.base import Kernel", "which stands after it"),
        ("models.vaebm", "import ppl_vaebm.inference.potential as p", "which stands after it"),
        ("config", "from ppl_vaebm.report import write", "which stands after it"),
        ("models", "from ppl_vaebm.models.vae import VAE", "which stands after it"),
        ("sample", "from ppl_vaebm.fit import main", "nothing imports an entry point"),
        ("inference.hmc", "from .base import Kernel", "write the whole name"),
        ("inference.hmc", "from ppl_vaebm.inference.unheard_of import x", "which is in no layer"),
        ("unheard_of", "", "is in no layer"),
    ],
)
def test_checker_flags_a_violation(module: str, source: str, because: str) -> None:
    (found,) = violations(full_name(module), source)
    assert because in found


@pytest.mark.parametrize(
    ("module", "source"),
    [
        ("inference.langevin", "from ppl_vaebm.inference import hmc\nfrom ppl_vaebm.inference.base import Kernel"),
        ("inference.kernels", "import torch\nfrom ppl_vaebm.config import KernelConfig"),
        ("inference.potential", "import pyro\nfrom ppl_vaebm.models.vaebm import VAEBM"),
        ("fit", "from ppl_vaebm import __version__, cli, report"),
        # Not pyro, though it starts alike.
        ("inference.base", "import pyrometer"),
    ],
)
def test_checker_lets_an_allowed_import_pass(module: str, source: str) -> None:
    assert violations(full_name(module), source) == []


def test_no_module_names_cuda() -> None:
    naming = {module for module, path in modules().items() if "cuda" in path.read_text().lower()}
    assert naming <= {full_name(row) for row in MAY_NAME_CUDA}


def test_package_and_configuration_import_without_torch() -> None:
    code = "import sys, ppl_vaebm, ppl_vaebm.config; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=False).returncode == 0
