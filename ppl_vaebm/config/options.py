"""What an option is: a field of a frozen dataclass, with marks that say which values it takes and how it is shown."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Sequence
from functools import cache
from typing import Annotated, Any, ClassVar, NamedTuple, get_origin, get_type_hints

from ppl_vaebm.errors import InputError, did_you_mean, shown


class Check(NamedTuple):
    """Mark: what the option must be. ``None`` passes, and of a tuple every element must pass."""

    expected: str
    """Completes "must be"."""
    holds: Callable[[Any], bool]

    def accepts(self, value: Any) -> bool:
        """Whether an option may have a value."""
        return all(each is None or self.holds(each) for each in (value if isinstance(value, tuple) else (value,)))


class Alias(NamedTuple):
    """Mark: a second flag for the option, such as ``--data``."""

    flag: str


class OnlyFor(NamedTuple):
    """Mark: the kernels that have the option."""

    kernels: tuple[str, ...]


POSITIONAL = "positional"
"""Mark: the option is the command's first argument and has no flag."""
FLAT = "flat"
"""Mark: the options of the section are named without the section's name."""
FINITE = Check("finite", lambda value: not isinstance(value, float) or math.isfinite(value))
POSITIVE = Check("positive", lambda value: value > 0)
NOT_NEGATIVE = Check("0 or more", lambda value: value >= 0)


def at_least(least: int) -> Check:
    """Make the check of a lower bound."""
    return Check(f"at least {least}", lambda value: value >= least)


def one_of(*values: int) -> Check:
    """Make the check of a choice between numbers."""
    return Check(f"one of {', '.join(map(str, values))}", lambda value: value in values)


def between(low: float, high: float, ends: str = "[]") -> Check:
    """Make the check of an interval, with ``(`` or ``)`` for an end that it excludes."""
    excluded = {low} if ends[0] == "(" else set()
    excluded |= {high} if ends[1] == ")" else set()
    expected = f"in {ends[0]}{low:g}, {high:g}{ends[1]}"
    return Check(expected, lambda value: low <= value <= high and value not in excluded)


FRACTION = between(0, 1)
BELOW_ONE = between(0, 1, "[)")
INSIDE_ONE = between(0, 1, "()")
Positive = Annotated[int, POSITIVE]
PositiveFloat = Annotated[float, POSITIVE]
NonNegative = Annotated[int, NOT_NEGATIVE]
NonNegativeFloat = Annotated[float, NOT_NEGATIVE]


def require(condition: bool, option: str, expected: str, got: object) -> None:
    """Raise ValueError for a wrong value, with the option, what is expected and what was got."""
    if not condition:
        raise ValueError(f"{option} must be {expected}, got {got!r}")


def split_names(text: str, known: Sequence[str], kind: str) -> tuple[str, ...]:
    """Split names of one kind, such as "kernel", that stand between commas.

    Raises:
        InputError: no name, an unknown one, or one that is given twice.
    """
    names = tuple(name.strip() for name in text.split(",") if name.strip())
    for name in names:
        if name not in known:
            end = f", separated by commas{did_you_mean(name, known)}"
            raise InputError(f"unknown {kind} {shown(name)}: expected some of {', '.join(known)}{end}")
    if not names or len(set(names)) < len(names):
        raise InputError(f"expected a list of different {kind}s, found {', '.join(names) or 'none'}")
    return names


@cache
def hints_of(cls: type) -> dict[str, tuple[Any, tuple[Any, ...]]]:
    """Return the type and the marks of each option of a dataclass."""
    hints = get_type_hints(cls, include_extras=True)
    marked = {field.name: hints[field.name] for field in dataclasses.fields(cls)}
    return {
        name: (hint.__origin__, hint.__metadata__) if get_origin(hint) is Annotated else (hint, ())
        for name, hint in marked.items()
    }


class Checked:
    """Base class of options. It refuses wrong values when an instance is made, as ValueError."""

    prefix: ClassVar[str] = ""
    """Name of the section with its dot, such as ``data.``, for messages."""

    def __post_init__(self) -> None:
        """Check every option by itself, then together."""
        for name, (_, marks) in hints_of(type(self)).items():  # type: ignore[arg-type]
            value = getattr(self, name)
            for check in (*(mark for mark in marks if isinstance(mark, Check)), FINITE):
                require(check.accepts(value), self.prefix + name.replace("_", "-"), check.expected, value)
        self.check_together()

    def check_together(self) -> None:
        """Refuse values that do not fit together."""


RunFolder = Annotated[str, POSITIONAL]
"""The run's folder, the first argument of every command but fit."""
Count = Annotated[int, at_least(1)]
OptionalCount = Annotated[int | None, at_least(1)]


@dataclasses.dataclass(frozen=True)
class ChainOptions(Checked):
    """Options of the commands that run long chains."""

    run: RunFolder
    """Folder of the run."""
    num_chains: Count = 16
    """Chains, started from N(0, I). Use 4 or more: R-hat compares chains to find modes that some of them miss."""
    num_warmup: Count = 200
    """Warm-up steps, which tune the step size; counted and timed apart."""
    num_evals: Count = 6_000
    """Energy evaluations per chain, after warm-up; most of them include the gradient."""
    seed: int = 0
    """Seed of the starts and of the chains."""
