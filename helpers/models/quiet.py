"""Silence for the model libraries: their banners, bars and warnings stay out of a notebook."""

import contextlib
import logging
import os
import threading
import warnings
from collections.abc import Iterator


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Keep banners, progress bars and warnings of the model libraries out of a notebook.

    sys.stdout is the whole process's: in a thread of its own (a chat that opens its model) nothing is redirected, else
    the cell that runs meanwhile would lose its words, and might get a closed file back.
    """
    import transformers

    level, bars = transformers.logging.get_verbosity(), transformers.logging.is_progress_bar_enabled()
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    disabled = logging.root.manager.disable
    logging.disable(logging.WARNING)
    with warnings.catch_warnings(), contextlib.ExitStack() as silent:
        warnings.simplefilter("ignore")
        if threading.current_thread() is threading.main_thread():
            nowhere = silent.enter_context(open(os.devnull, "w"))  # noqa: PTH123 (os.devnull is no path)
            silent.enter_context(contextlib.redirect_stdout(nowhere))
            silent.enter_context(contextlib.redirect_stderr(nowhere))
        try:
            yield
        finally:
            logging.disable(disabled)
            transformers.logging.set_verbosity(level)
            if bars:
                transformers.logging.enable_progress_bar()
