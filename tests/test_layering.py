"""Who may import whom: one row a folder, as docs/design.md says it."""

from __future__ import annotations

import ast
import subprocess
import sys
from functools import cache
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PACKAGE = "ppl_vaebm"
SMALL = {"errors", "rng", "files", "devices", "tables"}
KERNELS = {"inference.kernels", "inference.log_z", "inference.diagnostics"}
INFERENCE = {"inference", "inference.bridges", "inference.svi", "inference.ebm"} | KERNELS
FITTED = {"config", "data", "models", "runs"} | INFERENCE | SMALL

MAY_IMPORT = {
    "": set(),
    **{name: SMALL for name in SMALL},
    "config": SMALL,
    "data": {"config"} | SMALL,
    "models": {"config"} | SMALL,
    "inference.kernels": {"config"} | SMALL,
    "inference.log_z": {"config", "inference.kernels"} | SMALL,
    "inference.diagnostics": {"inference.kernels"} | SMALL,
    "inference.bridges": KERNELS - {"inference.log_z"} | SMALL,
    "inference": {"config", "models", "inference.bridges"} | KERNELS | SMALL,
    "inference.svi": FITTED,
    "inference.ebm": FITTED,
    "runs": FITTED,
    "evaluation.metrics": {"config", "data"} | SMALL,
    "evaluation": FITTED | {"evaluation.metrics"},
    "reports": {"config", "data", "runs", "evaluation", "evaluation.metrics"} | KERNELS | SMALL,
    "experiments": FITTED | {"evaluation", "evaluation.metrics", "reports"},
    "commands": FITTED | {"evaluation", "evaluation.metrics", "reports"},
}
"""What a folder may import of the package, beside itself and the package's own name."""
COMMANDS = {"fit", "sample", "diagnose", "compare", "evaluate"}
"""Run with ``python -m``; nothing imports them."""
KERNEL_PACKAGES = {"torch", "numpy"}
"""The only packages outside the standard library that the kernels import, so that they serve any potential."""
OF_A_RUN = {"runs.run", "runs.checkpoint"}
"""All that the two training stages may know of a run."""
MAX_MODULES, MAX_TOP_MODULES, MAX_TOP_FOLDERS, MAX_LINES = 14, 12, 8, 400


@cache
def modules() -> dict[str, str]:
    """Return the source of every module by its name within the package."""
    paths = sorted((ROOT / PACKAGE).rglob("*.py"))
    names = (".".join(path.relative_to(ROOT / PACKAGE).with_suffix("").parts) for path in paths)
    return {
        name.removesuffix("__init__").removesuffix("."): path.read_text()
        for name, path in zip(names, paths, strict=True)
    }


def folder(module: str) -> str:
    """Return the row of a module."""
    if module in COMMANDS:
        return "commands"
    if module in MAY_IMPORT:
        return module
    return module.rpartition(".")[0]


def imports(source: str) -> list[str]:
    """Return what a module imports anywhere in it; a name imported from a module counts as that module's."""
    nodes = list(ast.walk(ast.parse(source)))
    found = [alias.name for node in nodes if isinstance(node, ast.Import) for alias in node.names]
    froms = [node for node in nodes if isinstance(node, ast.ImportFrom)]
    return found + ["." * n.level + f"{n.module or ''}.{alias.name}" for n in froms for alias in n.names]


def own(name: str, known: set[str]) -> str | None:
    """Return the module of the package that an imported name stands for, or lies in."""
    inner = name.removeprefix(PACKAGE).removeprefix(".")
    while inner and inner not in known:
        inner = inner.rpartition(".")[0]
    return inner if name.split(".")[0] == PACKAGE else None


def violations(module: str, source: str) -> list[str]:
    """Return a sentence for each import that the rows do not allow."""
    row, known, found = folder(module), set(modules()), []
    if row not in MAY_IMPORT:
        return [f"{module} is in no folder of MAY_IMPORT: give it a row, here and in docs/design.md"]
    for name in imports(source):
        target = own(name, known)
        if name.startswith("."):
            found.append(f"{module} imports {name}: write the whole name")
        elif target is None:
            is_foreign = name.split(".")[0] not in sys.stdlib_module_names | KERNEL_PACKAGES
            if row in ("inference.kernels", "inference.log_z") and is_foreign:
                found.append(f"{module} imports {name}: kernels import torch and numpy alone")
        elif target in COMMANDS:
            found.append(f"{module} imports {name}: nothing imports a command")
        elif folder(target) not in MAY_IMPORT[row] | {row, ""}:
            found.append(f"{module} imports {name}: {row} may not import {folder(target)}")
        elif row in ("inference.svi", "inference.ebm") and folder(target) == "runs" and target not in OF_A_RUN:
            found.append(f"{module} imports {name}: stages write through runs.run and runs.checkpoint alone")
    return found


@pytest.mark.parametrize("module", modules())
def test_folders_import_what_their_row_allows(module: str) -> None:
    assert violations(module, modules()[module]) == []


def test_modules_form_no_circle() -> None:
    sources = modules()
    TopologicalSorter({name: graph_of(name, source, set(sources)) for name, source in sources.items()}).prepare()


def test_a_circle_is_found() -> None:
    known = {"rng", "files"}
    graph = {
        name: graph_of(name, f"import {PACKAGE}.{other}", known) for name, other in (("rng", "files"), ("files", "rng"))
    }
    with pytest.raises(CycleError):
        TopologicalSorter(graph).prepare()


def graph_of(module: str, source: str, known: set[str]) -> set[str]:
    """Return the modules that a module imports; a folder's face, which imports from the folder, counts as none."""
    targets = {own(name, known) for name in imports(source)}
    return {
        target
        for target in targets
        if target and target != module and not any(each.startswith(f"{target}.") for each in known)
    }


@pytest.mark.parametrize(
    ("module", "source", "because"),
    [
        ("inference.kernels.base", "import pyro", "torch and numpy alone"),
        ("inference.kernels.base", "from pyro.distributions import Normal", "torch and numpy alone"),
        ("inference.kernels.hmc", "def f():\n    from ppl_vaebm.models.vaebm import VAEBM", "may not import models"),
        ("inference.kernels.hmc", "from ppl_vaebm import data", "may not import data"),
        ("inference.log_z.ais", "from ppl_vaebm.inference import potential", "may not import inference"),
        ("models.vaebm", "import ppl_vaebm.inference.potential as p", "may not import inference"),
        ("config.config", "from ppl_vaebm.reports.html import write", "may not import reports"),
        ("inference.ebm.train", "from ppl_vaebm.runs.loading import load_run", "alone"),
        ("runs.run", "from ppl_vaebm.evaluation import store", "may not import evaluation"),
        ("sample", "from ppl_vaebm.fit import main", "nothing imports a command"),
        ("inference.kernels.hmc", "from .base import Kernel", "write the whole name"),
        ("unheard_of.module", "", "is in no folder"),
    ],
)
def test_a_violation_is_found(module: str, source: str, because: str) -> None:
    (found,) = violations(module, source)
    assert because in found


@pytest.mark.parametrize(
    ("module", "source"),
    [
        ("inference.kernels.langevin", "from ppl_vaebm.inference.kernels import hmc"),
        ("inference.kernels.registry", "import torch\nfrom ppl_vaebm.config import KernelConfig"),
        ("inference.potential", "import pyro\nfrom ppl_vaebm.models.vaebm import VAEBM"),
        ("inference.ebm.train", "from ppl_vaebm.runs import checkpoint"),
        ("fit", "from ppl_vaebm import __version__, files"),
    ],
)
def test_an_allowed_import_passes(module: str, source: str) -> None:
    assert violations(module, source) == []


def test_rooms_are_small() -> None:
    names, top = modules(), ROOT / PACKAGE
    assert sum(path.suffix == ".py" for path in top.iterdir()) <= MAX_TOP_MODULES
    assert sum((path / "__init__.py").exists() for path in top.iterdir()) <= MAX_TOP_FOLDERS
    rooms = [path.parent.relative_to(top) for path in top.rglob("*.py") if path.name != "__init__.py"]
    assert {str(room) for room in rooms if rooms.count(room) > MAX_MODULES} == set()
    assert {name for name, source in names.items() if source.count("\n") > MAX_LINES} == set()


def test_tests_mirror_the_package() -> None:
    rooms = {path.parent.relative_to(ROOT / "tests") for path in (ROOT / "tests").rglob("test_*.py")}
    assert {str(room) for room in rooms if not (ROOT / PACKAGE / room).is_dir()} == set()


def test_only_the_random_streams_name_cuda() -> None:
    assert {module for module, source in modules().items() if "cuda" in source.lower()} <= {"rng"}


def test_package_and_configuration_import_without_torch() -> None:
    code = "import sys, ppl_vaebm, ppl_vaebm.config; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=False).returncode == 0
