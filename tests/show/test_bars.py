"""A bar in a notebook says the same as text and as picture, at every moment."""

import doctest
from types import SimpleNamespace

import IPython
import pytest

from helpers.show import bars


class Drawn(list):
    """What a cell's output showed, moment by moment; stands for IPython's display handle."""

    def update(self, content, raw):
        assert raw
        self.append(content)


@pytest.fixture
def drawn(monkeypatch):
    """The output of a notebook's cell."""
    shown = Drawn()
    monkeypatch.setattr(IPython, "get_ipython", lambda: SimpleNamespace(kernel=True))
    monkeypatch.setattr("IPython.display.display", lambda content, raw, display_id: shown.update(content, raw) or shown)
    return shown


def test_examples_in_docstrings():
    assert doctest.testmod(bars).failed == 0


def test_in_a_notebook_the_saved_text_is_the_last_moment_and_not_the_first(drawn, capsys):
    with bars.bar("finetuned, 2 of 4", 80) as bar:
        bar.set_postfix_str("perplexity")
        bar.update(30)
        bar.set_postfix_str("<answers>")
        assert drawn[-1]["text/plain"].startswith("finetuned, 2 of 4: 30/80") and "left" in drawn[-1]["text/plain"]
        assert "width:37.5%" in drawn[-1]["text/html"] and "&lt;answers&gt;" in drawn[-1]["text/html"]
        bar.update(50)
    assert drawn[-1]["text/plain"].startswith("finetuned, 2 of 4: 80/80 in ")
    assert "width:" not in drawn[-1]["text/html"].replace("max-width:", ""), "a full bar is no news"
    assert tuple(capsys.readouterr()) == ("", ""), "nothing in a terminal's manner beside it"


def test_what_is_not_kept_leaves_nothing_to_see(drawn):
    with bars.bar("checking", 2, keep=False) as bar:
        bar.update(2)
    assert drawn[0]["text/plain"] and drawn[-1] == {"text/plain": "", "text/html": ""}


def test_in_a_terminal_it_is_a_line_that_ends_where_it_should(capsys):
    with bars.bar("merging", 2048, unit="B", unit_scale=True) as bar:
        bar.update(2048)
    assert "merging: 100%" in capsys.readouterr().err
