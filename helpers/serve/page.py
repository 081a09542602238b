"""The chat page from a notebook: a server in a thread of its process, and what Colab has to reach it.

talk = page.open_page(model, config)
talk.stop()
"""

import os
import threading
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from helpers import serve
from helpers.config import RunConfig

HEIGHT = 720
"""Of the page below a cell, in pixels."""
UNWANTED = "not started: set chat_page at the top, run that cell and this one"


class Page:
    """A page that is being served; it ends with `stop`, or with the notebook's process."""

    def __init__(self, model: str | Path, config: RunConfig) -> None:
        """Open the model and serve it. Raises what `serve.serve` raises."""
        self.server: Any = None
        self.address, self.error = "", None
        self.came = threading.Event()
        self.thread = threading.Thread(target=self.run, args=(model, config), daemon=True)
        self.thread.start()
        self.came.wait()
        if self.error is not None:
            raise self.error

    def run(self, model: str | Path, config: RunConfig) -> None:
        """Serve, in a thread: an error before clients may come is the caller's, a later one everybody's."""
        try:
            serve.serve([str(model)], config, port=0, page=True, ready=self.ready)
        except Exception as error:
            if self.came.is_set():
                raise
            self.error = error
        finally:
            self.came.set()

    def ready(self, server: Any, address: str) -> None:
        """Clients may come."""
        self.server, self.address = server, address
        self.came.set()

    def stop(self) -> None:
        """End the server and give the model's memory back."""
        self.server.should_exit = True
        self.thread.join()

    def __repr__(self) -> str:
        return f"{self.address}/, until stop() or the end of this notebook's process"


def open_page(model: str | Path, config: RunConfig, wanted: bool = True) -> Page | None:
    """Serve a model with its page and show where: in Colab below the cell, through Colab's own way to a port.

    wanted: False says how to start it, and starts nothing. Raises ValueError with one sentence where it cannot be, as
    in Kaggle, whose notebooks have no way to a port.
    """
    if not wanted:
        print(UNWANTED)
        return None
    if "KAGGLE_KERNEL_RUN_TYPE" in os.environ:
        raise ValueError("Kaggle lets nobody reach a port of its machines: talk to the models in the notebook's chat")
    found = Page(model, config)
    if "COLAB_RELEASE_TAG" in os.environ:
        from google.colab import output

        output.serve_kernel_port_as_iframe(urlsplit(found.address).port, path="/", height=str(HEIGHT))
    return found
