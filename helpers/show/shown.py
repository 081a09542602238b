"""What a notebook shows as a picture where a browser can draw it, and in words where none can."""

import re
from html import unescape
from typing import Any

import ipywidgets
from IPython.display import display


class Shown(ipywidgets.VBox):
    """A box of widgets with words for front ends that draw none: logs, consoles, executed copies.

    A class, because a widget decides by its own method how it is shown; ipywidgets 7 and 8 both call it.
    """

    words = ""

    def _ipython_display_(self, **_: Any) -> None:
        view = {"version_major": 2, "version_minor": 0, "model_id": self.model_id}
        display({"application/vnd.jupyter.widget-view+json": view, "text/plain": self.words}, raw=True)


def tipped(widget: Any, tip: str) -> Any:
    """A widget with words for when the mouse rests on it; returns it. Without any, ipywidgets 8 shows "null".

    >>> tipped(ipywidgets.Text(), "Your question").tooltip
    'Your question'
    """
    trait = "tooltip" if "tooltip" in widget.traits() else "description_tooltip"  # ipywidgets 8 and 7
    setattr(widget, trait, tip)
    return widget


def say(html: str) -> None:
    """Show a piece of HTML, and the same words where HTML is not drawn."""
    display({"text/html": html, "text/plain": plain(html)}, raw=True)


def plain(html: str) -> str:
    """The words of a piece of HTML, on one line.

    >>> plain("<b>rank&nbsp;16</b> on\\n <i>YOUR file</i>")
    'rank 16 on YOUR file'
    """
    html = re.sub(r"<(style|svg)\b.*?</\1>", "", html, flags=re.DOTALL)
    return " ".join(unescape(re.sub(r"<[^>]+>", "", html)).replace("\xa0", " ").split())
