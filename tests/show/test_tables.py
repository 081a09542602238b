"""Tables: each kind of rows, and text that must not become HTML."""

import doctest

import helpers.show.tables
from helpers.show.tables import table


def test_examples_in_docstrings():
    assert doctest.testmod(helpers.show.tables).failed == 0


def test_template_tokens_are_shown_and_not_rendered():
    html = table([("template", "<s>[INST]")]).to_html()
    assert "&lt;s&gt;[INST]" in html
    assert "<s>" not in html


def test_rows_of_every_kind():
    assert list(table([{"a": 1, "b": 2.5}]).data.columns) == ["a", "b"]
    assert list(table([("x", 1)], columns=("name", "n")).data.columns) == ["name", "n"]
    assert table([]).data.empty
