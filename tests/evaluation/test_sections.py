"""Sections as text: every number is there, in the column and the row that it belongs to."""

from __future__ import annotations

from ppl_vaebm.evaluation.sections import Section, sections_text, table_cells, value_text


def test_text_of_sections_holds_every_number() -> None:
    first = Section("first", {"": {"a": {"value": 1.23456, "error": 0.5}, "b": 7}})
    text = sections_text([first, Section("second", {"": {"c": 0.25, "d": "yes"}})])
    assert [line.split() for line in text.splitlines()] == [
        ["first"],
        ["a", "1.2346", "+-", "0.5000"],
        ["b", "7"],
        [],
        ["second"],
        ["c", "0.2500"],
        ["d", "yes"],
    ]


def test_rows_that_a_column_lacks_are_empty() -> None:
    section = Section(
        "net, 50 samples",
        {"distance": {"VAE": 3.0, "VAEBM": {"value": 1.0, "error": 0.25}}, "score": {"VAEBM": 9, "data": 10}},
    )
    header, lines = table_cells(section)
    assert header == ["", "distance", "score"]
    assert lines == [["VAE", "3.0000", ""], ["VAEBM", "1.0000 +- 0.2500", "9"], ["data", "", "10"]]
    title, names, _, vaebm, data = sections_text([section]).splitlines()
    assert title == "net, 50 samples" and names.index("score") == vaebm.index("9") == data.index("10")


def test_numbers_that_four_decimals_would_swallow_keep_their_digits() -> None:
    assert [value_text(value) for value in (1.23e-7, 0.0, 0.5)] == ["1.23e-07", "0.0000", "0.5000"]


def test_text_of_an_empty_section_is_its_title() -> None:
    assert sections_text([Section("nothing", {"": {}})]) == "nothing"
