"""RunConfig <-> ipywidgets: sliders for the knobs of a run and, under them, what the run needs, live."""

import sys
import traceback
from pathlib import Path

HERE = Path(__file__).resolve().parent


def plain_errors() -> None:
    """In a notebook, show a ValueError that a helper raised as its one sentence; other errors keep their traceback.

    The cell still fails, so that "Run all" stops there. Outside IPython nothing happens.
    """
    if "IPython" not in sys.modules:
        return
    from IPython import get_ipython

    shell = get_ipython()
    if shell is not None:
        shell.set_custom_exc((ValueError,), sentence_or_traceback)


def sentence_or_traceback(shell, kind, error, trace, tb_offset=None):
    """IPython's hook: one sentence where the error was raised in helpers/, the usual traceback elsewhere."""
    raised_in = Path(traceback.extract_tb(trace)[-1].filename)
    if raised_in.parent != HERE:
        lines = shell.InteractiveTB.structured_traceback(kind, error, trace, tb_offset=tb_offset)
    else:
        lines = [f"\033[31m{kind.__name__}\033[0m: {error}"]
    shell._showtraceback(kind, error, lines)
    return lines
