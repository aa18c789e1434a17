"""Parse options: recipe and command line -> one dataclass, by argparse.

A recipe becomes command-line tokens, placed before the user's. One parser checks both, and the last token wins.
"""

from __future__ import annotations

import argparse
import ast
import dataclasses
import inspect
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from functools import partial
from types import UnionType
from typing import Any, Literal, NamedTuple, NoReturn, TypeVar, Union, get_args, get_origin

import yaml

from ppl_vaebm.config.config import Config
from ppl_vaebm.config.kernel import KernelConfig
from ppl_vaebm.config.options import FLAT, POSITIONAL, Alias, OnlyFor, hints_of
from ppl_vaebm.errors import InputError, did_you_mean, shown

Parsed = TypeVar("Parsed")
HELP = ("-h", "--help")
MAX_CHOICES = 4  # that stand behind a flag in --help; the texts of options with more name them

RETIRED: dict[str, object] = {}
"""Options of earlier versions and the constants that replaced them. A stored configuration or a command line may still
set an option to its constant."""
RETIRED_VALUES: dict[tuple[str, str], str] = {}
"""Values that an option had in earlier versions, with what to use instead."""


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
        aliases = [mark.flag for mark in self.marks if isinstance(mark, Alias)]
        return sorted([f"--{self.name}", *aliases], key=len)


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
        cls: dataclass of options.
        argv: tokens.
        prog: name of the program, or of the file that the tokens are from; messages begin with it.
        description: first paragraph of ``--help``; without one there is no ``--help``.
        first: names of the options that ``--help`` shows first; the others follow under the headings of their sections.

    Raises:
        InputError: an unknown option or a wrong value.
    """
    options = list(options_of(cls))
    if description is not None and any(flag in argv for flag in HELP):
        try:
            values = _values(options, prog, [token for token in argv if token not in HELP])
        except InputError:  # help is for those whose command line is wrong, too
            values = {}
        print(_help_text(options, values, prog, description, first), end="")
        raise SystemExit(0)
    try:
        return _build(cls, _values(options, prog, argv))
    except ValueError as error:
        raise InputError(str(error) if isinstance(error, InputError) else f"{prog}: {error}") from None


def _values(options: Sequence[Option], prog: str, argv: Sequence[str]) -> dict[str, Any]:
    """Read tokens into values by their options' names."""
    given, unknown = _parser(options, prog).parse_known_args([_with_hyphens(token) for token in argv])
    if unknown:
        flag = unknown[0].partition("=")[0]
        kind = "option" if flag.startswith("-") else "argument"
        flags = [known for option in options for known in option.flags]
        raise InputError(f"{prog}: unknown {kind} {flag}{did_you_mean(flag, flags)}")
    values = {name: tuple(value) if isinstance(value, list) else value for name, value in vars(given).items()}
    for name in RETIRED.keys() & values.keys():
        _check_retired(prog, name, values.pop(name))
    return values


class _Parser(argparse.ArgumentParser):
    """An argparse parser whose errors are InputError."""

    def error(self, message: str) -> NoReturn:
        if "required" in message:
            message = "expected the folder of a run as first argument, such as runs/demo, found none"
        message = message.removeprefix("argument ").replace("ignored explicit argument", "takes no value, found")
        raise InputError(f"{self.prog}: {message}")


def _parser(options: Iterable[Option], prog: str) -> _Parser:
    parser = _Parser(prog, allow_abbrev=False, add_help=False, argument_default=argparse.SUPPRESS)
    for option in options:
        if POSITIONAL in option.marks:
            parser.add_argument(option.name)
        elif option.hint is bool:
            parser.add_argument(*option.flags, dest=option.name, action="store_true")
            parser.add_argument(_negated(option.name), dest=option.name, action="store_false")
        else:
            is_tuple = get_origin(option.hint) is tuple
            element = get_args(option.hint)[0] if is_tuple else option.hint
            read = partial(_read, _reader(element), option.name)
            parser.add_argument(*option.flags, dest=option.name, type=read, nargs="*" if is_tuple else None)
    sections = {option.name.partition(".")[0] for option in options if "." in option.name}
    for name in (name for name in RETIRED if name.partition(".")[0] in sections):
        parser.add_argument(f"--{name}", dest=name, nargs="*")
        parser.add_argument(_negated(name), dest=name, action="store_const", const=["False"])
    return parser


def _negated(name: str) -> str:
    """Return the flag that switches an option off, such as ``--data.no-download``."""
    section, dot, last = name.rpartition(".")
    return f"--{section}{dot}no-{last}"


def _with_hyphens(token: str) -> str:
    """Write underscores of a flag as hyphens."""
    flag, equals, value = token.partition("=")
    return flag.replace("_", "-") + equals + value if token.startswith("--") else token


def _reader(hint: Any) -> Callable[[str], Any]:
    """Return the function that reads a value of a type; it raises ValueError with what it expects."""
    if get_origin(hint) in (Union, UnionType):
        (inner,) = (_reader(part) for part in get_args(hint) if part is not type(None))
        return lambda text: None if text == "None" else inner(text)
    if get_origin(hint) is Literal:
        return partial(_choose, get_args(hint))
    readers: dict[Any, Callable[[str], Any]] = {int: _whole_number, float: _number, str: str}
    return readers[hint]


def _choose(choices: Sequence[str], text: str) -> str:
    if text in choices:
        return text
    raise ValueError(f"one of {', '.join(choices)}, found {shown(text)}{did_you_mean(text, choices)}")


def _whole_number(text: str) -> int:
    try:
        return int(text)
    except ValueError:
        raise ValueError(f"a whole number, found {shown(text)}") from None


def _number(text: str) -> float:
    try:
        return float(text)
    except ValueError:
        raise ValueError(f"a number, found {shown(text)}") from None


def _read(reader: Callable[[str], Any], name: str, text: str) -> Any:
    if (name, text) in RETIRED_VALUES:
        raise argparse.ArgumentTypeError(f"{text} was removed; {RETIRED_VALUES[name, text]}")
    try:
        return reader(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(f"expected {error}") from None


def _check_retired(prog: str, name: str, texts: Sequence[str]) -> None:
    """Refuse a retired option unless it has the value of its constant."""
    constant = RETIRED[name]
    wanted = constant if isinstance(constant, tuple) else (constant,)
    if [*map(_plain, texts or ["True"])] != [*map(_plain, wanted)]:
        raise InputError(
            f"{prog}: option {name} was removed and is always {constant}, found {' '.join(texts) or True}: leave it "
            "out, or use the version of ppl_vaebm that the options are from"
        )


def _plain(value: object) -> object:
    """Make values comparable: ``1``, ``1.0`` and ``"1e0"`` are one number."""
    try:
        return float(str(value))
    except ValueError:
        return str(value)


def _build(cls: type[Parsed], values: Mapping[str, Any], prefix: str = "") -> Parsed:
    """Make a dataclass, and the sections in it, of values by their options' names."""
    made = {}
    for field in dataclasses.fields(cls):  # type: ignore[arg-type]
        hint, marks = hints_of(cls)[field.name]
        name = prefix + field.name.replace("_", "-")
        if dataclasses.is_dataclass(hint):
            made[field.name] = _build(hint, values, prefix if FLAT in marks else f"{name}.")  # type: ignore[arg-type]
        elif name in values:
            made[field.name] = values[name]
    return cls(**made)


# --- help ------------------------------------------------------------------------------------------


def _help_text(
    options: Sequence[Option], values: Mapping[str, Any], prog: str, description: str, first: Sequence[str]
) -> str:
    """Write the text of ``--help``, with the values that the tokens set as defaults."""
    positional = "".join(f" {option.name.upper()}" for option in options if POSITIONAL in option.marks)
    parser = argparse.ArgumentParser(
        prog, usage=f"python -m ppl_vaebm.{prog}{positional} [options]", description=description, add_help=False
    )
    leading = parser.add_argument_group("most used" if first else "options")
    groups: dict[str, Any] = {"": parser.add_argument_group("more") if first else leading}
    for option in sorted(options, key=lambda option: first.index(option.name) if option.name in first else len(first)):
        section = option.name.rpartition(".")[0]
        if not _is_for(option, section, values):
            continue
        if section not in groups and option.name not in first:
            summary = str(inspect.getdoc(option.owner)).partition("\n")[0]
            groups[section] = parser.add_argument_group(section, summary)
        _describe(leading if option.name in first else groups[section], option, values)
    leading.add_argument(*HELP, action="help", help="Show this text, with the options of the chosen kernel.")
    return parser.format_help()


def _is_for(option: Option, section: str, values: Mapping[str, Any]) -> bool:
    """Whether the section's kernel has an option."""
    kernels = {kernel for mark in option.marks if isinstance(mark, OnlyFor) for kernel in mark.kernels}
    name = values.get(f"{section}.name", KernelConfig.name)
    members = values.get(f"{section}.members", KernelConfig.members) if name == "mixture" else ()
    return not kernels or bool(kernels & {name, *members})


def _describe(group: Any, option: Option, values: Mapping[str, Any]) -> None:
    """Add an option to a group of ``--help``."""
    text, metavar = docs_of(option.owner)[option.field.name], _metavar(option.hint)
    if metavar.startswith("NAME"):
        text += f" Of {', '.join(_choices(option.hint))}."
    value = values.get(option.name, option.field.default)
    if isinstance(value, bool):
        text += f" [on; {_negated(option.name)} turns it off]" if value else ""
    elif value not in (None, (), dataclasses.MISSING):
        text += f" [{' '.join(map(_written, value)) if isinstance(value, tuple) else _written(value)}]"
    text = text.replace("%", "%%")
    if POSITIONAL in option.marks:
        group.add_argument(option.name, help=text, metavar=option.name.upper())
    elif option.hint is bool:
        group.add_argument(*option.flags, action="store_true", help=text)
    else:
        group.add_argument(*option.flags, metavar=metavar, help=text)


def _written(value: object) -> str:
    return f"{value:.6g}" if isinstance(value, float) else str(value)


def _choices(hint: Any) -> tuple[str, ...]:
    """Return the values that an option or its elements may have, or nothing if any may be."""
    if get_origin(hint) is Literal:
        return get_args(hint)
    return next((found for found in map(_choices, get_args(hint)) if found), ())


def _metavar(hint: Any) -> str:
    """Return the placeholder of a value: the choices where they are few."""
    choices, kinds = _choices(hint), (hint, *get_args(hint))
    text = "NAME" if len(choices) > MAX_CHOICES else "{" + ",".join(choices) + "}"
    if not choices:
        text = "N" if int in kinds else "X" if float in kinds else "TEXT"
    return f"{text} ..." if get_origin(hint) is tuple else text


def docs_of(cls: type) -> dict[str, str]:
    """Return the docstrings of a dataclass's fields, those of its base classes included, each in one line."""
    docs: dict[str, str] = {}
    for base in reversed(cls.__mro__):
        if not dataclasses.is_dataclass(base):
            continue
        tree = ast.parse(inspect.getsource(sys.modules[base.__module__]))
        body = next(node.body for node in tree.body if isinstance(node, ast.ClassDef) and node.name == base.__name__)
        for node, following in zip(body, body[1:], strict=False):
            if isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name):
                text = following.value if isinstance(following, ast.Expr) else None
                docs[node.target.id] = " ".join(str(text.value).split()) if isinstance(text, ast.Constant) else ""
    return docs


# --- plain types -----------------------------------------------------------------------------------


def tokens(tree: Mapping[str, Any], prefix: str = "") -> Iterator[str]:
    """Flatten a recipe into command-line tokens.

    Args:
        tree: nested mappings of option names to values.
        prefix: name of the enclosing section with its dot.

    Yields:
        Tokens that :func:`parse` reads, so ``1e-3``, lists and misspelled keys behave as on the command line.
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
    """Return the value that the last of some flags has among tokens, ``None`` without one."""
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
    """Turn plain YAML types into a configuration.

    Args:
        tree: what :func:`to_dict` returns, or a part of it; other options have their defaults.
        source: where it is from, for messages.

    Raises:
        InputError: an unknown key or a wrong value.
    """
    return parse(Config, list(tokens(tree)), prog=source)


def as_yaml(config: Config) -> str:
    """Write a configuration as a run's ``config.yaml``, without the unchanged options that its kernels do not have."""
    tree = to_dict(config)
    for section, kernel in ((tree["kernel"], config.kernel), (tree["sampling"]["kernel"], config.sampling.kernel)):
        for name in kernel.ignored():
            if section.get(name) == to_dict(Config())["kernel"].get(name):
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
