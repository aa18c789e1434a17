"""Every path, module, option and recipe that a document names exists, and every stored result is named by one."""

from __future__ import annotations

import importlib
import re
from functools import cache
from pathlib import Path

import pytest

from ppl_vaebm.config.parsing import options_of
from ppl_vaebm.config.recipes import recipe_names
from tests.test_layering import MAY_IMPORT, SMALL

ROOT = Path(__file__).parents[1]
RESULTS = ROOT / "ppl_vaebm" / "experiments" / "results"
DOCUMENTS = (
    "README.md",
    "docs/design.md",
    "docs/choose_a_kernel.md",
    "ppl_vaebm/experiments/README.md",
    "benchmarks/README.md",
)
COMMANDS = (
    "fit",
    "sample",
    "evaluate",
    "diagnose",
    "compare",
    "experiments.sbc_digits",
    "experiments.posterior_points",
)
FOREIGN_OPTIONS = {"help", "nproc-per-node"}
"""Options of argparse and of torchrun."""
OF_A_RUN = ("runs/", "samples/", "checkpoints/", "compare/", "train/", "test/", "config.yaml", "chains.nc", "NVlabs/")
"""Beginnings of paths in a run's folder or in a data set's, and of names of other repositories."""
SUFFIXES = ("py", "md", "json", "yaml", "png", "csv", "cfg", "toml")


@cache
def known_options() -> frozenset[str]:
    """Return the flags of all commands and scripts without their dashes, negations included."""
    modules = [importlib.import_module(f"ppl_vaebm.{name}") for name in COMMANDS]
    flags = {flag for module in modules for option in options_of(module.Options) for flag in option.flags}
    scripts = "".join(path.read_text() for path in (ROOT / "benchmarks").glob("*.py"))
    flags |= set(re.findall(r'add_argument\("(--[a-z-]+)"', scripts))
    names = {flag.removeprefix("--") for flag in flags if flag.startswith("--")}
    return frozenset(names | {re.sub(r"([^.]+)$", r"no-\1", name) for name in names} | FOREIGN_OPTIONS)


def code_of(text: str) -> list[str]:
    """Return the code of a document: blocks and spans."""
    blocks = re.findall(r"```[a-z]*\n(.*?)```", text, re.DOTALL)
    return blocks + re.findall(r"`([^`\n]+)`", re.sub(r"```.*?```", "", text, flags=re.DOTALL))


def exists(name: str, folder: Path) -> bool:
    """Whether a path exists relative to the document, to the repository or to the package."""
    return any((base / name).exists() for base in (folder, ROOT, ROOT / "ppl_vaebm"))


def missing_paths(text: str, folder: Path) -> list[str]:
    """List the links and the paths in code spans that do not exist."""
    links = [link.partition("#")[0] for link in re.findall(r"\]\(([^)\s]+)\)", text) if "://" not in link]
    spans = [span.strip() for span in code_of(text) if re.fullmatch(r"[\w.\-]+(/[\w.\-]+)*/?", span.strip())]
    paths = [span for span in spans if "/" in span or span.rpartition(".")[2] in SUFFIXES]
    named = links + [path for path in paths if not path.startswith((*OF_A_RUN, "evaluate.json", "compare.csv"))]
    return [f"path {name}" for name in named if name and not exists(name, folder)]


def missing_modules(text: str) -> list[str]:
    """List the dotted names of this project that are neither a module nor defined in one."""
    names = set(re.findall(r"\b((?:ppl_vaebm|benchmarks)(?:\.[A-Za-z_]\w*)+)", text))
    return [f"module {name}" for name in sorted(names) if not is_defined(name)]


def is_defined(name: str) -> bool:
    """Whether a dotted name is a module, a folder, or defined in the module before its last dot."""
    path = ROOT / name.replace(".", "/")
    if path.is_dir() or path.with_suffix(".py").is_file():
        return True
    source = path.parent.with_suffix(".py")
    pattern = rf"^(def|class) {path.name}\b|^{path.name}\b.*="
    return source.is_file() and re.search(pattern, source.read_text(), re.MULTILINE) is not None


def missing_options(text: str) -> list[str]:
    """List the flags, and the options in code spans such as ``svi.norm_temperature``, that no command has."""
    sections = {name.partition(".")[0] for name in known_options() if "." in name}
    flags = [flag for code in code_of(text) for flag in re.findall(r"(?<![\w-])--([a-z][a-z0-9.-]*)", code)]
    spans = [span.split()[0].replace("_", "-") for span in code_of(text) if span.strip()]
    dotted = [span for span in spans if re.fullmatch(r"[a-z]+(\.[a-z][a-z0-9-]*)+", span)]
    named = flags + [span for span in dotted if span.partition(".")[0] in sections]
    return [f"option {name}" for name in named if name not in known_options()]


def missing_recipes(text: str) -> list[str]:
    """List the recipes on command lines that do not ship with the package."""
    named = re.findall(r"--recipe ([a-z][a-z0-9-]*)", text)
    return [f"recipe {name}" for name in named if name not in recipe_names()]


def missing(text: str, folder: Path) -> list[str]:
    """List everything that a document names and that does not exist."""
    return [*missing_paths(text, folder), *missing_modules(text), *missing_options(text), *missing_recipes(text)]


@pytest.mark.parametrize("document", DOCUMENTS)
def test_documents_name_only_what_exists(document: str) -> None:
    path = ROOT / document
    assert missing(path.read_text(), path.parent) == []


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("see `inference/nowhere.py`", "path inference/nowhere.py"),
        ("see [it](docs/nowhere.md#part)", "path docs/nowhere.md"),
        ("![it](figures/nowhere.png)", "path figures/nowhere.png"),
        ("`python -m ppl_vaebm.nowhere RUN`", "module ppl_vaebm.nowhere"),
        ("a draw of `ppl_vaebm.rng.streams`", "module ppl_vaebm.rng.streams"),
        ("```sh\npython -m ppl_vaebm.fit --ebm.nothing 3\n```", "option ebm.nothing"),
        ("set `ebm.no_such_thing`", "option ebm.no-such-thing"),
        ("`fit --recipe nowhere`", "recipe nowhere"),
    ],
)
def test_a_name_without_its_thing_is_found(text: str, expected: str) -> None:
    assert missing(text, ROOT) == [expected]


def test_names_with_their_thing_pass() -> None:
    text = (
        "`python -m ppl_vaebm.fit --recipe gaussians25 --no-resume --ebm.steps 3`, `ppl_vaebm.rng.stream`, `ebm.steps`"
    )
    assert missing(f"{text}, `inference/potential.py`, [README](README.md#start), `runs/demo/report.html`", ROOT) == []


def test_stored_results_are_named_by_a_document() -> None:
    text = "".join((ROOT / document).read_text() for document in DOCUMENTS)
    scripts = "".join(path.read_text() for path in (ROOT / "docs" / "figures").glob("*.py"))
    assert [path.name for path in sorted(RESULTS.iterdir()) if path.name not in text + scripts] == []


def test_readme_is_short() -> None:
    assert (ROOT / "README.md").read_text().count("\n") <= 200


@pytest.mark.parametrize("document", DOCUMENTS)
def test_documents_install_from_the_checkout(document: str) -> None:
    assert "pip install ppl_vaebm" not in (ROOT / document).read_text()


def test_design_has_the_fields_of_the_kernels_tuples() -> None:
    source = fields_of((ROOT / "ppl_vaebm" / "inference" / "kernels" / "base.py").read_text())
    design = fields_of((ROOT / "docs" / "design.md").read_text())
    assert {"KernelState", "KernelInfo", "KernelParams", "Kernel"} == set(design)
    assert design == {name: source[name] for name in design}


def test_design_has_a_sentence_for_every_folder() -> None:
    table = (ROOT / "docs" / "design.md").read_text().partition("## Folders")[2].partition("## Flow")[0]
    rows = re.findall(r"^\| (?:top level|(`.*?`)) \|", table, re.MULTILINE)
    folders = {name.replace(".", "/") + "/" for name in MAY_IMPORT if name not in {"", "commands", *SMALL}}
    assert {name for row in rows for name in re.findall(r"`(.*?)`", row)} == folders


def fields_of(text: str) -> dict[str, list[str]]:
    """Return the names of the fields of every NamedTuple in a text."""
    classes = re.split(r"^class ", text, flags=re.MULTILINE)[1:]
    tuples = [block for block in classes if "(NamedTuple)" in block.partition("\n")[0]]
    return {
        block.partition("(")[0]: re.findall(r"^    (\w+): ", re.split(r"\n(?=[^\s])", block)[0], re.MULTILINE)
        for block in tuples
    }
