"""A page of HTML: one file with embedded pictures, which needs no network and no JavaScript."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import jinja2

from ppl_vaebm import __version__
from ppl_vaebm.reports.figures import Picture


class Table(NamedTuple):
    """A table of a page; numbers are aligned to the right."""

    caption: str
    header: Sequence[str]
    """May be empty; a line break separates a title from its unit."""
    rows: Sequence[Sequence[str]]
    misses: frozenset[tuple[int, int]] = frozenset()
    """Row and column of the cells that miss their threshold, which are marked."""


class Contents(NamedTuple):
    """The contents of a chapter."""

    pictures: Sequence[Picture] = ()
    tables: Sequence[Table] = ()
    notes: Sequence[str] = ()
    link: str = ""
    """Path of a page with more, relative to the run's folder; none if empty."""


class Chapter(NamedTuple):
    """A chapter of a page."""

    anchor: str
    """Its name in links."""
    title: str
    lead: str
    """What is shown and what good looks like."""
    contents: Contents


def render(
    name: str,
    subtitle: str,
    chapters: Sequence[Chapter],
    missing: Mapping[str, str] | None = None,
    config: str | None = None,
) -> str:
    """Make a page as HTML.

    ``missing`` has the titles of chapters that the run lacks, with the commands that add them; the configuration is
    shown folded.
    """
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(Path(__file__).parent),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.tests["numeric"] = is_number
    return environment.get_template("report.html.j2").render(
        name=name, subtitle=subtitle, version=__version__, config=config, chapters=chapters, missing=missing or {}
    )


def is_number(text: str) -> bool:
    """Return whether a text is a number, with or without its error."""
    try:
        float(text.partition(" ± ")[0].removeprefix("> "))
    except ValueError:
        return False
    return True
