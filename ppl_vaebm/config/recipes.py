"""Find and read recipes: YAML files of options, of the same form as a run's ``config.yaml``."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import yaml

from ppl_vaebm.errors import InputError, did_you_mean

RECIPES = Path(__file__).parents[1] / "experiments" / "recipes"
"""Folder of the recipes that ship with the package."""


def recipe_names() -> list[str]:
    """Name the recipes that ship with the package."""
    return sorted(path.stem for path in RECIPES.glob("*.yaml"))


def recipe_path(recipe: str) -> Path:
    """Find a recipe by its name or by the path of its file; InputError if there is neither."""
    shipped = RECIPES / f"{recipe}.yaml"
    if shipped.is_file():
        return shipped
    if Path(recipe).is_file():
        return Path(recipe)
    names = recipe_names()
    raise InputError(
        f"unknown recipe {recipe!r}: expected one of {', '.join(names)}, or a YAML file's path"
        + did_you_mean(recipe, names)
    )


def load_yaml(path: Path) -> dict[str, Any]:
    """Read a recipe or a run's configuration into nested mappings.

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
