"""Sections as text: every number is there, and sections of one family share a table."""

from __future__ import annotations

from ppl_vaebm.evaluation.base import Section
from ppl_vaebm.evaluation.tables import lines, tables


def test_lines_hold_every_number() -> None:
    text = lines({"first": {"a": {"value": 1.23456, "error": 0.5}, "b": 7}, "second": {"c": 0.25, "d": "yes"}})
    assert [line.split() for line in text] == [
        ["first"],
        ["a", "1.2346", "+-", "0.5000"],
        ["b", "7"],
        [],
        ["second"],
        ["c", "0.2500"],
        ["d", "yes"],
    ]


def test_sections_of_one_family_are_columns_of_one_table() -> None:
    sections: dict[str, Section] = {
        "distance [net], 50 samples": {"VAE": 3.0, "VAEBM": {"value": 1.0, "error": 0.25}},
        "about [net]": {"features": 7},
        "score [net], 50 samples": {"VAEBM": 9, "data": 10},
    }
    first, second = tables(sections)
    assert first.title == "net, 50 samples" and first.columns == ["distance", "score"]
    assert first.rows == {"VAE": ["3.0000", ""], "VAEBM": ["1.0000 +- 0.2500", "9"], "data": ["", "10"]}
    assert second.title == "about [net]" and second.columns == [] and second.rows == {"features": ["7"]}
    text = lines(sections)
    assert text[0] == "net, 50 samples" and text[1].split() == ["distance", "score"]
    assert text[1].index("score") == text[3].index("9") == text[4].index("10")


def test_numbers_that_four_decimals_would_swallow_keep_their_digits() -> None:
    assert lines({"a": {"b": 1.23e-7, "c": 0.0}})[1:] == [f"  {'b':<58} 1.23e-07", f"  {'c':<58} 0.0000"]


def test_an_empty_section_is_its_heading() -> None:
    assert lines({"nothing": {}}) == ["nothing"]
