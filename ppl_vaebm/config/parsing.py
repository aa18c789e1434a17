"""Parse options: recipe and command line -> one dataclass, by argparse.

A recipe becomes command-line tokens, placed before the user's. One parser checks both, and the last token wins.
"""

from __future__ import annotations

import argparse
import ast
import dataclasses
import inspect
import sys
from collections.abc import Iterator, Mapping, Sequence
from functools import cache, partial
from typing import Any, Literal, NamedTuple, NoReturn, TypeVar, get_args, get_origin

import yaml

from ppl_vaebm.config import retired
from ppl_vaebm.config.config import Config
from ppl_vaebm.config.kernel import KernelConfig
from ppl_vaebm.config.options import FLAT, POSITIONAL, Alias, OnlyFor, hints_of
from ppl_vaebm.errors import InputError, did_you_mean, shown

Parsed = TypeVar("Parsed")
HELP = ("-h", "--help")
MAX_CHOICES = 4  # that stand behind a flag in --help; the texts of options with more list them


class Option(NamedTuple):
    """One option of a parser."""

    name: str
    """With the section, such as ``svi.learning-rate``."""
    hint: Any
    """Type without marks."""
    marks: tuple[Any, ...]
    field: dataclasses.Field[Any]
    owner: type
    """Dataclass that has the field."""

    @property
    def flags(self) -> list[str]:
        """Flags on the command line, the shortest first."""
        return sorted([f"--{self.name}", *(mark.flag for mark in self.marks if isinstance(mark, Alias))], key=len)

    @property
    def kinds(self) -> tuple[Any, ...]:
        """Types of a value, or of a tuple's elements."""
        is_plain = get_origin(self.hint) in (None, Literal)
        return (self.hint,) if is_plain else get_args(self.hint)

    @property
    def choices(self) -> tuple[str, ...]:
        """Values that it may have, empty if any."""
        return next((get_args(kind) for kind in self.kinds if get_origin(kind) is Literal), ())


def options_of(cls: type, prefix: str = "") -> Iterator[Option]:
    """List the options of a dataclass and of the sections in it."""
    for field in dataclasses.fields(cls):
        hint, marks = hints_of(cls)[field.name]
        name = prefix + field.name.replace("_", "-")
        if dataclasses.is_dataclass(hint):
            yield from options_of(hint, prefix if FLAT in marks else f"{name}.")  # type: ignore[arg-type]
        else:
            yield Option(name, hint, marks, field, cls)


# --- the parser ------------------------------------------------------------------------------------


def parse(
    cls: type[Parsed], argv: Sequence[str], prog: str, description: str | None = None, first: Sequence[str] = ()
) -> Parsed:
    """Parse command-line tokens into a dataclass.

    Args:
        prog: name of the program, or of the file that the tokens are from; messages begin with it.
        description: first paragraph of ``--help``; without one there is no ``--help``.
        first: names of the options that ``--help`` shows first; the others follow under the headings of their sections.

    Raises:
        InputError: an unknown option or a wrong value.
    """
    options, asks_help = list(options_of(cls)), description is not None and not {*HELP}.isdisjoint(argv)
    try:
        values = _values(options, prog, [token for token in argv if not (asks_help and token in HELP)])
        if not asks_help:
            return _build(cls, values)
    except ValueError as error:
        if not asks_help:
            raise InputError(str(error) if isinstance(error, InputError) else f"{prog}: {error}") from None
        values = {}
    parser = _Parser(prog, options, description, first, values)
    parser.print_help()
    raise SystemExit(0)


def _values(options: Sequence[Option], prog: str, argv: Sequence[str]) -> dict[str, Any]:
    """Read tokens into values by option name."""
    given, unknown = _Parser(prog, options).parse_known_args([_with_hyphens(token) for token in argv])
    if unknown:
        flag = unknown[0].partition("=")[0]
        kind = "option" if flag.startswith("-") else "argument"
        flags = [known for option in options for known in option.flags]
        raise InputError(f"{prog}: unknown {kind} {flag}{did_you_mean(flag, flags)}")
    values = {name: tuple(value) if isinstance(value, list) else value for name, value in vars(given).items()}
    for name in retired.RETIRED.keys() & values.keys():
        retired.check(prog, name, values.pop(name))
    return values


def _build(cls: type[Parsed], values: Mapping[str, Any], prefix: str = "") -> Parsed:
    """Make a dataclass, and the sections in it, from values by option name."""
    made = {}
    for field in dataclasses.fields(cls):  # type: ignore[arg-type]
        hint, marks = hints_of(cls)[field.name]  # type: ignore[arg-type]
        name = prefix + field.name.replace("_", "-")
        if dataclasses.is_dataclass(hint):
            made[field.name] = _build(hint, values, prefix if FLAT in marks else f"{name}.")  # type: ignore[arg-type]
        elif name in values:
            made[field.name] = values[name]
    return cls(**made)


class _Parser(argparse.ArgumentParser):
    """Parser of options. With values, it shows them in its help as the defaults."""

    def __init__(
        self,
        prog: str,
        options: Sequence[Option],
        description: str | None = None,
        first: Sequence[str] = (),
        values: Mapping[str, Any] | None = None,
    ) -> None:
        arguments = "".join(f"{option.name.upper()} " for option in options if POSITIONAL in option.marks)
        usage = f"python -m ppl_vaebm.{prog} {arguments}[options]"
        super().__init__(
            prog, usage, description, allow_abbrev=False, add_help=False, argument_default=argparse.SUPPRESS
        )
        leading = self.add_argument_group("most used" if first else "options")
        if values is not None:
            leading.add_argument(*HELP, action="help", help="Show this text.")
        groups = {"": self.add_argument_group("more") if first else leading}
        rank = {name: index for index, name in enumerate(first)}
        for option in sorted(options, key=lambda option: rank.get(option.name, len(first))):
            section = option.name.rpartition(".")[0]
            if section not in groups and option.name not in rank:
                groups[section] = self.add_argument_group(section, str(option.owner.__doc__).partition("\n")[0])
            text = "" if values is None else _help_text(option, section, values)
            self._add(leading if option.name in rank else groups[section], option, text)
        sections = {option.name.partition(".")[0] for option in options}
        for name in (name for name in retired.RETIRED if name.partition(".")[0] in sections):
            self.add_argument(f"--{name}", dest=name, nargs="*", help=argparse.SUPPRESS)
            flag = _negated(name)
            self.add_argument(flag, dest=name, action="store_const", const=["False"], help=argparse.SUPPRESS)

    def _add(self, group: Any, option: Option, text: str) -> None:
        """Add an option to a group."""
        if POSITIONAL in option.marks:
            group.add_argument(option.name, type=partial(_read, option), metavar=option.name.upper(), help=text)
        elif option.hint is bool:
            group.add_argument(*option.flags, dest=option.name, action="store_true", help=text)
            flag = _negated(option.name)
            self.add_argument(flag, dest=option.name, action="store_false", help=argparse.SUPPRESS)
        else:
            nargs = "*" if get_origin(option.hint) is tuple else None
            group.add_argument(
                *option.flags,
                dest=option.name,
                type=partial(_read, option),
                nargs=nargs,
                metavar=_metavar(option),
                help=text,
                required=option.field.default is option.field.default_factory is dataclasses.MISSING,
            )

    def error(self, message: str) -> NoReturn:
        """Raise InputError in place of exiting."""
        if "required" in message:
            message = f"expected {message.rpartition(': ')[2]}, a folder such as runs/demo, found none"
        message = message.removeprefix("argument ").replace("ignored explicit argument", "takes no value, found")
        raise InputError(f"{self.prog}: {message}")


def _negated(name: str) -> str:
    """Return the flag that turns an option off, such as ``--data.no-download``."""
    section, dot, last = name.rpartition(".")
    return f"--{section}{dot}no-{last}"


def _with_hyphens(token: str) -> str:
    """Write underscores of a flag as hyphens."""
    flag, equals, value = token.partition("=")
    return flag.replace("_", "-") + equals + value if token.startswith("--") else token


def _read(option: Option, text: str) -> Any:
    """Read a value of an option, or of an element of its tuple."""
    if text == "None" and type(None) in option.kinds:
        return None
    if (option.name, text) in retired.RETIRED_VALUES:
        raise argparse.ArgumentTypeError(f"{text} was removed; {retired.RETIRED_VALUES[option.name, text]}")
    numbers = {int: "a whole number", float: "a number"}
    kind = next((kind for kind in numbers if kind in option.kinds), str)
    expected = numbers.get(kind, f"one of {', '.join(option.choices)}" if option.choices else "a value")
    try:
        if not text or (option.choices and text not in option.choices):
            raise ValueError
        return kind(text)
    except ValueError:
        found = f"{shown(text)}{did_you_mean(text, option.choices)}"
        raise argparse.ArgumentTypeError(f"expected {expected}, found {found}") from None


# --- help ------------------------------------------------------------------------------------------


def _help_text(option: Option, section: str, values: Mapping[str, Any]) -> str:
    """Return the text of an option, with its default; options that the section's kernel does not have are hidden."""
    kernels = {kernel for mark in option.marks if isinstance(mark, OnlyFor) for kernel in mark.kernels}
    name = values.get(f"{section}.name", KernelConfig.name)
    members = values.get(f"{section}.members", KernelConfig.members) if name == "mixture" else ()
    if kernels and kernels.isdisjoint({name, *members}):
        return argparse.SUPPRESS
    text = docs_of(option.owner)[option.field.name]
    if len(option.choices) > MAX_CHOICES:
        text += f" Of {', '.join(option.choices)}."
    value = values.get(option.name, option.field.default)
    if isinstance(value, bool):
        text += f" [on; {_negated(option.name)} turns it off]" if value else ""
    elif value not in (None, (), dataclasses.MISSING):
        elements = value if isinstance(value, tuple) else (value,)
        text += f" [{' '.join(f'{item:.6g}' if isinstance(item, float) else str(item) for item in elements)}]"
    return text.replace("%", "%%")


def _metavar(option: Option) -> str:
    """Return the placeholder of a value: the choices where they are few."""
    text = "N" if int in option.kinds else "X" if float in option.kinds else "TEXT"
    if option.choices:
        text = "NAME" if len(option.choices) > MAX_CHOICES else "{" + ",".join(option.choices) + "}"
    return text


@cache
def docs_of(cls: type) -> dict[str, str]:
    """Return the docstrings of a dataclass's fields, those of its base classes included, each in one line."""
    docs: dict[str, str] = {}
    for base in filter(dataclasses.is_dataclass, reversed(cls.__mro__)):
        tree = ast.parse(inspect.getsource(sys.modules[base.__module__]))
        body = next(node.body for node in tree.body if isinstance(node, ast.ClassDef) and node.name == base.__name__)
        for node, following in zip(body, body[1:], strict=False):
            if isinstance(node, ast.AnnAssign) and isinstance(following, ast.Expr):
                docs[ast.unparse(node.target)] = " ".join(str(ast.literal_eval(following.value)).split())
    return docs


# --- plain types -----------------------------------------------------------------------------------


def tokens(tree: Mapping[str, Any], prefix: str = "") -> Iterator[str]:
    """Flatten a recipe, or a section of it whose name and dot are the prefix, into tokens that :func:`parse` reads.

    So ``1e-3``, lists and misspelled keys behave as on the command line.
    """
    for key, value in tree.items():
        name = f"{prefix}{key}".replace("_", "-")
        if isinstance(value, Mapping):
            yield from tokens(value, f"{name}.")
        elif isinstance(value, bool):
            yield f"--{name}" if value else _negated(name)
        elif isinstance(value, (list, tuple)):
            yield "--" + name
            yield from map(str, value)
        else:
            yield f"--{name}={value}"


def last_value(argv: Sequence[str], *flags: str) -> str | None:
    """Return the value of the last token that is one of some flags, ``None`` without one."""
    value = None
    for token, following in zip(argv, [*argv[1:], None], strict=False):
        flag, equals, rest = token.partition("=")
        if flag in flags:
            value = rest if equals else following
    return value


def to_dict(config: Config) -> dict[str, Any]:
    """Turn a configuration into plain YAML types; options that are ``None`` are left out."""

    def plain(value: Any) -> Any:
        if dataclasses.is_dataclass(value):
            named = {field.name: getattr(value, field.name) for field in dataclasses.fields(value)}
            return {name: plain(inner) for name, inner in named.items() if inner is not None}
        return list(value) if isinstance(value, tuple) else value

    return plain(config)  # type: ignore[no-any-return]


def from_dict(tree: Mapping[str, Any], source: str) -> Config:
    """Turn the plain YAML types of :func:`to_dict` into a configuration; missing options have their defaults.

    Args:
        source: file that the options are from, for messages.

    Raises:
        InputError: an unknown key or a wrong value.
    """
    return parse(Config, list(tokens(tree)), prog=source)


def as_yaml(config: Config) -> str:
    """Write a configuration as a run's ``config.yaml``, without the unchanged options that its kernels do not have."""
    tree = to_dict(config)
    for section, kernel in ((tree["kernel"], config.kernel), (tree["sampling"]["kernel"], config.sampling.kernel)):
        for name in kernel.ignored():
            if getattr(kernel, name) == getattr(KernelConfig, name):
                section.pop(name, None)
    text: str = yaml.safe_dump(tree, sort_keys=False)
    return text


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
