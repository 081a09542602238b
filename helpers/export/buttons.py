"""Take it home by a button: a run's finished models to Drive, as a download, or to the hub, private."""

from collections.abc import Callable
from html import escape
from pathlib import Path
from typing import Any

import ipywidgets
from ipywidgets import Layout

from helpers import workspace
from helpers.export import share
from helpers.show.shown import Shown, tipped
from helpers.workspace import Workspace

OPENS = {
    "quantize": "4 bits; opens in transformers, vLLM, ExLlama and AutoGPTQ",
    "finetune": "the adapter; opens in PEFT and vLLM, beside its base",
    "merge": "16 bits; opens in transformers and vLLM, and is what GGUF files are made of",
}
"""Stage -> what it is and what opens it, the one that most take home first."""


class TakeHome(Shown):
    """Which model, a button for each place, and what came of it; a class, because without a browser it is words."""

    def __init__(self, stages: dict[str, Path]) -> None:
        self.stages = stages
        labels = {f"{name}: {size(stage)}, {OPENS[name]}": name for name, stage in stages.items()}
        self.which = ipywidgets.Dropdown(
            options=list(labels.items()), description="model", layout=Layout(width="auto", max_width="640px")
        )
        self.name = tipped(
            ipywidgets.Text(
                placeholder="OWNER/NAME on huggingface.co", description="hub", layout=Layout(width="340px")
            ),
            "Where to on the model hub",
        )
        ways: tuple[tuple[str, str, Callable[[Path], Any]], ...] = (
            ("To Drive", "Copy it to Google Drive, every byte checked", to_drive),
            ("Download", "One zip; in Colab the browser fetches it", share.to_download),
            ("To the hub", "Upload it, private, with the token HF_TOKEN from Colab's secrets", self.to_hub),
        )
        self.buttons = {name: ipywidgets.Button(description=name, tooltip=tip) for name, tip, _ in ways}
        for name, _, take in ways:
            self.buttons[name].on_click(lambda _, take=take: self.take(take))
        self.said = ipywidgets.HTML()
        super().__init__([self.which, self.name, ipywidgets.HBox(list(self.buttons.values())), self.said])
        self.words = "\n".join([*labels, "to Drive, as a zip or to the hub: python -m helpers export --help"])

    def to_hub(self, stage: Path) -> str:
        """Upload to the repository that the box names."""
        name = self.name.value.strip()
        if not name:
            raise ValueError("write OWNER/NAME into the box first, your name on huggingface.co and one for the model")
        return share.to_hub(stage, share.repository(Path(name)))

    def take(self, way: Callable[[Path], Any]) -> None:
        """Go one way with the model that is chosen, and say what came of it: nobody sees a button's traceback."""
        stage = self.stages[self.which.value]
        self.tell(f"{stage.name} is on its way: {size(stage)} …", list(self.buttons.values()))
        try:
            self.tell(f"Done: {way(stage)}")
        except Exception as error:
            self.tell(str(error) if isinstance(error, ValueError) else f"{type(error).__name__}: {error}")

    def tell(self, sentence: str, waiting: list[ipywidgets.Button] | None = None) -> None:
        """Show a sentence; while something is under way no button takes another press."""
        self.said.value = f"<b>{escape(sentence)}</b>"
        for button in self.buttons.values():
            button.disabled = waiting is not None


def take_home(run: Workspace) -> TakeHome:
    """The buttons for what a run has finished. Raises ValueError when it has finished no model."""
    stages = {name: run.folder(name) for name in OPENS if (run.folder(name) / workspace.MANIFEST).is_file()}
    if not stages:
        raise ValueError(f"{run.root} has no finished model to take home: run {workspace.maker('finetune')}")
    return TakeHome(stages)


def to_drive(stage: Path) -> Path:
    """Copy a stage to the mounted Drive. Raises ValueError where there is none."""
    if workspace.lasting_store() is None:
        raise ValueError("no Drive is mounted here: set use_drive at the top and run from there, or press Download")
    return share.to_folder(stage, share.drive())


def size(stage: Path) -> str:
    """A folder's size in words."""
    size_bytes = workspace.size_bytes(stage)
    return f"{size_bytes / 2**30:.2f} GiB" if size_bytes >= 2**29 else f"{size_bytes / 2**20:.1f} MiB"
