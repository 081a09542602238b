"""Silence for the model libraries: their banners, bars and warnings stay out of a notebook."""

import contextlib
import logging
import os
import warnings
from collections.abc import Iterator


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Keep banners, progress bars and warnings of the model libraries out of a notebook."""
    import transformers

    level, bars = transformers.logging.get_verbosity(), transformers.logging.is_progress_bar_enabled()
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    disabled = logging.root.manager.disable
    logging.disable(logging.WARNING)
    with warnings.catch_warnings(), open(os.devnull, "w") as nowhere:  # noqa: PTH123 (os.devnull is no path)
        warnings.simplefilter("ignore")
        try:
            with contextlib.redirect_stdout(nowhere), contextlib.redirect_stderr(nowhere):
                yield
        finally:
            logging.disable(disabled)
            transformers.logging.set_verbosity(level)
            if bars:
                transformers.logging.enable_progress_bar()
