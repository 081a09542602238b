"""One bar for what takes long: in a terminal a line, in a notebook a line of the page that stays true when it is saved.

tqdm's own widget keeps "0%" for readers without a kernel (GitHub, an exported page), because its text is the first one.
Here text and picture are of the same moment. Where nobody can rewrite a line, one comes every two seconds at most.
"""

import io
import sys
from html import escape
from typing import Any

from tqdm import tqdm

from helpers.workspace import in_notebook

REDRAW_S = 0.5
"""A notebook's page is redrawn at most so often."""
GOING = "{desc}: {n_fmt}/{total_fmt}, {remaining} left{postfix}"
DONE = "{desc}: {n_fmt}/{total_fmt} in {elapsed}{postfix}"
STYLE = "max-width:756px;font-size:13px;margin:2px"
FRAME = "background:rgba(128,128,128,.2);border-radius:3px;height:6px;margin-top:2px"


def bar(title: str, total: int, keep: bool = True, **settings: Any) -> tqdm:
    """A bar to update, to give figures (set_postfix_str) and to close; `with` closes it.

    keep: leave it where it is when it is done. settings: tqdm's; bytes are unit="B", unit_scale=True.
    """
    if in_notebook():
        return Page(desc=title, total=total, leave=keep, mininterval=REDRAW_S, file=io.StringIO(), **settings)
    seldom = 0.1 if sys.stderr.isatty() else 2.0
    return tqdm(desc=title, total=total, leave=keep, mininterval=seldom, dynamic_ncols=True, **settings)


class Page(tqdm):
    """A bar in one output of a notebook's cell; a class, because that is how tqdm lets itself be drawn elsewhere."""

    handle: Any = None

    def display(self, msg: str | None = None, pos: int | None = None) -> bool:
        """Draw the bar as it is now; one that is not kept leaves nothing to see."""
        from IPython.display import display

        said = "" if msg == "" else in_words(self)
        content = {"text/plain": said, "text/html": said and picture(said, self.n / self.total if self.total else 1.0)}
        if self.handle is None:
            self.handle = display(content, raw=True, display_id=True)
        else:
            self.handle.update(content, raw=True)
        return True

    def clear(self, *arguments: Any, **settings: Any) -> None:
        """Nothing of it is on a line that somebody else wants to write on."""


def in_words(shown: tqdm) -> str:
    """A bar as text.

    >>> with tqdm(total=4, desc="questions", initial=4, file=io.StringIO()) as shown:
    ...     in_words(shown)
    'questions: 4/4 in 00:00'
    """
    return tqdm.format_meter(**shown.format_dict | {"bar_format": DONE if shown.n == shown.total else GOING})


def picture(said: str, share: float) -> str:
    """The text, and a bar that is filled to a share, until it is full and says nothing any more; HTML.

    >>> "width:50.0%" in picture("questions: 2/4", 0.5), picture("questions: 4/4", 1.0).count("<div")
    (True, 1)
    """
    if share >= 1:
        return f"<div style='{STYLE}'>{escape(said)}</div>"
    filled = f"<div style='width:{100 * share:.1f}%;background:#2f8fd0;border-radius:3px;height:6px'></div>"
    return f"<div style='{STYLE}'>{escape(said)}<div style='{FRAME}'>{filled}</div></div>"
