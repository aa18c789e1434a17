"""Recipe and command line -> one resolved configuration.

A recipe is a YAML file of the form that a run's own ``config.yaml`` has. It becomes command-line tokens,
placed before the user's, so one parser checks both and the last one wins.
"""

from __future__ import annotations

import contextlib
import dataclasses
import io
import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

import tyro
import yaml

from ppl_vaebm.config import Config
from ppl_vaebm.errors import InputError

ANSI_STYLE = re.compile(r"\x1b\[[0-9;]*m")

RECIPES = Path(__file__).parents[1] / "experiments" / "recipes"
"""Folder of the recipes that ship."""

Parsed = TypeVar("Parsed")


def as_yaml(config: Config) -> str:
    """Write a configuration in the form of a run's own file."""
    text: str = yaml.safe_dump(to_dict(config), sort_keys=False)
    return text


def parse(cls: type[Parsed], argv: Sequence[str], prog: str, description: str | None = None) -> Parsed:
    """Parse command-line tokens into a dataclass.

    Args:
        cls: dataclass of options.
        argv: tokens.
        prog: the program's name in messages, and the file that tokens came from, if any.
        description: first paragraph of ``--help``; without one, as for a file, there is no ``--help``.

    Returns:
        An instance.

    Raises:
        InputError: the parser refused; the message is its own, on one line.
    """
    has_help = description is not None
    with _refusals(prog):
        return tyro.cli(cls, args=list(argv), prog=prog, description=description, add_help=has_help)


def parse_known(cls: type[Parsed], argv: Sequence[str], prog: str) -> Parsed:
    """Parse the tokens that a dataclass knows, and pass over the others.

    Args:
        cls: dataclass of options.
        argv: tokens.
        prog: the program's name in messages.

    Returns:
        An instance.

    Raises:
        InputError: as :func:`parse`.
    """
    with _refusals(prog):
        return tyro.cli(cls, args=list(argv), prog=prog, add_help=False, return_unknown_args=True)[0]


@contextlib.contextmanager
def _refusals(prog: str) -> Iterator[None]:
    """Turn the parser's exit on a mistake into an :class:`InputError`, and what the outermost dataclass refuses."""
    stderr = io.StringIO()
    try:
        with contextlib.redirect_stderr(stderr):
            yield
    except SystemExit as stop:
        if not stop.code:
            raise
        raise InputError(f"{prog}: {_unboxed(stderr.getvalue())}") from None
    except ValueError as error:  # the parser words those of nested dataclasses only
        raise InputError(f"{prog}: {error}") from None


def _unboxed(box: str) -> str:
    """Take the words out of the frame that the parser draws around its message, and leave out its advice on --help.

    The frame is in colour where standard output is a terminal, and of hyphens and bars where that has no other signs.
    """
    plain = ANSI_STYLE.sub("", box)
    lines = (line.strip(" |+\u2502\u2500\u256d\u256e\u2570\u256f") for line in plain.splitlines()[1:])
    lines = (line for line in lines if line.strip("-"))
    # The advice calls the program by its short name, or tells the user to run a YAML file.
    return " ".join(lines).partition(" For full helptext, ")[0]


def tokens(tree: Mapping[str, Any], prefix: str = "") -> Iterator[str]:
    """Flatten a recipe into command-line tokens.

    Args:
        tree: nested mappings of option names to values.
        prefix: name of the enclosing section with its dot.

    Yields:
        Tokens that :func:`parse` reads, so ``1e-3``, lists and misspelt keys behave as on the command line.
    """
    for key, value in tree.items():
        name = f"{prefix}{key}".replace("_", "-")
        if isinstance(value, Mapping):
            yield from tokens(value, f"{name}.")
        elif isinstance(value, bool):
            section, _, last = name.rpartition(".")
            yield "--" + (name if value else f"{section}.no-{last}" if section else f"no-{last}")
        elif isinstance(value, (list, tuple)):
            yield "--" + name
            yield from map(str, value)
        else:
            yield f"--{name}={value}"


def load_yaml(path: Path) -> dict[str, Any]:
    """Read a recipe or a run's configuration.

    Args:
        path: YAML file.

    Returns:
        Its nested mappings.

    Raises:
        InputError: no such file, not YAML, or not a mapping.
    """
    try:
        tree = yaml.safe_load(path.read_text())
    except OSError as error:
        raise InputError(f"{path} cannot be read ({error.strerror}); name a recipe file that exists") from None
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise InputError(f"{path} is not a YAML file: {' '.join(str(error).split())}") from None
    if not isinstance(tree, dict):
        raise InputError(f"{path} must hold options such as 'seed: 1', found {type(tree).__name__}")
    return tree


def recipe_names() -> list[str]:
    """Name the recipes that ship."""
    return sorted(path.stem for path in RECIPES.glob("*.yaml"))


def recipe_path(recipe: str) -> Path:
    """Find a recipe by its name or its file.

    Args:
        recipe: name of one that ships, or the path of a YAML file.

    Returns:
        Its path.

    Raises:
        InputError: neither.
    """
    shipped = RECIPES / f"{recipe}.yaml"
    if shipped.is_file():
        return shipped
    if Path(recipe).is_file():
        return Path(recipe)
    raise InputError(f"unknown recipe {recipe!r}: expected one of {', '.join(recipe_names())}, or a YAML file's path")


def to_dict(config: Config) -> dict[str, Any]:
    """Turn a configuration into plain YAML types, without the options that were left open."""

    def plain(value: Any) -> Any:
        if dataclasses.is_dataclass(value):
            named = {f.name: getattr(value, f.name) for f in dataclasses.fields(value)}
            return {name: plain(inner) for name, inner in named.items() if inner is not None}
        return list(value) if isinstance(value, tuple) else value

    return plain(config)  # type: ignore[no-any-return]


def from_dict(tree: Mapping[str, Any], source: str) -> Config:
    """Turn plain YAML types into a configuration.

    Args:
        tree: as :func:`to_dict` gives, or a part of it; the rest is default.
        source: where it came from, for messages.

    Returns:
        The configuration.

    Raises:
        InputError: an unknown key or a wrong value.
    """
    return parse(Config, list(tokens(tree)), prog=source)


def differences(one: Mapping[str, Any], other: Mapping[str, Any], prefix: str = "") -> list[str]:
    """Name the options in which two plain configurations differ, such as ``model.width``."""
    names: list[str] = []
    for key in sorted({*one, *other}):
        a, b = one.get(key), other.get(key)
        if isinstance(a, Mapping) and isinstance(b, Mapping):
            names += differences(a, b, f"{prefix}{key}.")
        elif a != b:
            names.append(prefix + key)
    return names
