"""A button that takes your own file, and says in bold whose data is trained on: yours, or the sample.

What was chosen outlives its cell: the file is saved in the run's folder and in its lasting twin, and the configuration
names it, so that "Run all", the next notebook and the next machine go on with it. Uses only what ipywidgets 7.7 (Colab)
and 8 share.
"""

from collections.abc import Callable
from html import escape
from pathlib import Path
from typing import Any

import ipywidgets
from ipywidgets import Layout

from helpers.config import RunConfig
from helpers.prepare.uploads import save_upload
from helpers.profiles import PROFILES, profile
from helpers.show.shown import Shown, plain, tipped
from helpers.show.start import data_words
from helpers.workspace import Workspace, files, lasting_twin

UPLOADS = "upload"
"""In a run's folder: files that came through the button."""
BOX = "border-left:5px solid {};padding:4px 10px;line-height:1.45"
GOOD, BAD = "#0072B2", "#c62828"


class Chooser(Shown):
    """The upload's button, one that goes back to the sample, and a sentence that says what is trained on."""

    def __init__(self, config: RunConfig, run: Workspace, moved: Callable[[RunConfig], None]) -> None:
        self.base, self.run, self.moved = config, run, moved
        self.upload = tipped(
            ipywidgets.FileUpload(multiple=False, description="Your file", layout=Layout(width="160px")),
            "JSON, JSONL, CSV, Parquet or a zip",
        )
        self.sample = ipywidgets.Button(
            description="Use the sample", tooltip="Train on the profile's own data", layout=Layout(width="160px")
        )
        self.state, self.problem = ipywidgets.HTML(), ""
        super().__init__([ipywidgets.HBox([self.upload, self.sample]), self.state], layout=Layout(max_width="780px"))
        self.base = here(config, run)
        self.upload.observe(self.take, "value")
        self.sample.on_click(lambda _: self.choose(own_of(self.base)))
        self.redraw()

    def take(self, _change: Any = None) -> None:
        """Save the file that was chosen, and train on it from now on."""
        if not self.upload.value:
            return
        try:
            file = keep(save_upload(self.upload.value, self.run.folder(UPLOADS)), self.run)
        except (ValueError, OSError) as error:  # in a button's callback nobody would see it
            self.problem = str(error)
            self.redraw()
        else:
            # Which column is which was said of another file.
            self.choose(self.base.with_values(source=str(file), columns="", source_format="auto"))

    def choose(self, config: RunConfig) -> None:
        """Train on what a configuration names, here and wherever the run goes on."""
        self.base, self.problem = config, ""
        self.moved(config)
        self.redraw()

    def redraw(self) -> None:
        """Say what is trained on."""
        source, own = self.base.data.source, own_of(self.base).data.source
        self.sample.disabled = source == own
        said = f"<b>Training data: {escape(data_words(source, self.base.profile))}</b>"
        said += ". Run from the next cell, or “Run all”." if source != own else ""
        self.problem = self.problem or missing(self.base, self.run)
        if self.problem:
            said = f"<b>{escape(self.problem)}</b>"
        self.state.value = f"<div style='{BOX.format(BAD if self.problem else GOOD)}'>{said}</div>"
        self.words = plain(self.state.value)


def chooser(config: RunConfig, run: Workspace, moved: Callable[[RunConfig], None] = lambda config: None) -> Chooser:
    """The button, starting where the configuration is; moved: called with each configuration that it makes."""
    return Chooser(config, run, moved)


def config_of(chooser: Chooser) -> RunConfig:
    """The configuration with the data that the button shows. Raises ValueError when its file is gone."""
    if gone := missing(chooser.base, chooser.run):
        raise ValueError(gone)
    return asked_of_its_own(chooser.base)


def own_of(config: RunConfig) -> RunConfig:
    """A configuration with the data of its profile, and the questions that go with it."""
    own = profile(config.profile) if config.profile in PROFILES else RunConfig()
    return config.with_values(
        source=own.data.source, questions=own.evaluate.questions, columns="", source_format="auto"
    )


def asked_of_its_own(config: RunConfig) -> RunConfig:
    """Without the profile's questions where the data is not the profile's: they are about another world."""
    own = own_of(config)
    other = config.data.source != own.data.source
    theirs = config.evaluate.questions == own.evaluate.questions
    return config.with_values(questions=None) if other and theirs else config


def keep(file: Path, run: Workspace) -> Path:
    """Copy an uploaded file to the run's lasting twin, where there is one: the next machine needs it too."""
    twin = lasting_twin(run.folder(UPLOADS))
    if twin is not None:
        files.make_folder(twin)
        files.copy_verified(file, twin / file.name, files.checksum(file))
    return file


def here(config: RunConfig, run: Workspace) -> RunConfig:
    """The configuration with an uploaded file's place on this machine, fetched from the twin where it is only there."""
    named = Path(config.data.source)
    if named.parent.name != UPLOADS or named.is_file():
        return config
    file, twin = run.folder(UPLOADS) / named.name, lasting_twin(run.folder(UPLOADS))
    if not file.is_file() and twin is not None and files.is_file(twin / named.name):
        files.make_folder(file.parent)
        files.copy_verified(twin / named.name, file, files.checksum(twin / named.name))
    return config.with_values(source=str(file))


def missing(config: RunConfig, run: Workspace) -> str:
    """The sentence of why an uploaded file cannot be trained on; "" while it is there."""
    named = Path(config.data.source)
    if named.parent != run.folder(UPLOADS) or named.is_file():
        return ""
    return f"YOUR file {named.name} is not on this machine any more: upload it again, or press “Use the sample”"
