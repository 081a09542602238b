"""Choosing types for an export to GGUF: a box a type, with its size, what it loses and where it runs; and a figure.

Uses only what ipywidgets 7.7 (Colab) and 8 share. Without a screen, the choice shows its table in words.

>>> from helpers import hardware, models
>>> boxes = choice(models.shape("mistral-7b-v0.3"), hardware.machine("t4"), "q4_k_m, q8_0")
>>> types_of(boxes)
'q8_0,q4_k_m'
"""

from collections.abc import Mapping, Sequence
from html import escape
from typing import Any

import ipywidgets
import numpy as np
from IPython.display import display
from ipywidgets import Layout
from matplotlib.figure import Figure

from helpers.budget import export as budget
from helpers.hardware import Machine
from helpers.models import ModelShape
from helpers.models.gguf_types import file_type
from helpers.show import plots

HEADINGS = ("type", "file", "bits", "perplexity", "to make", "RAM to run", "laptop of 8 GB")
WIDTHS = (96, 84, 56, 88, 72, 92, 120)
"""Of the columns, in pixels."""


class Choice(ipywidgets.VBox):
    """A box a type, with what the budget says of it.

    A class, because a widget decides by its own method how it is shown where nobody can tick a box.
    """

    def __init__(self, shape: ModelShape, machine: Machine, types: str, context: int):
        asked = {file_type(name.strip()).name for name in types.split(",")}
        self.shape, self.machine, self.context = shape, machine, context
        self.rows = rows(shape, machine, context)
        narrow = Layout(width="96px")
        self.boxes = {
            name: ipywidgets.Checkbox(value=name in asked, description=name, indent=False, layout=narrow)
            for name, *_ in self.rows
        }
        self.said = ipywidgets.HTML()
        head = ipywidgets.HBox([ipywidgets.HTML(cells(HEADINGS))])
        lines = [ipywidgets.HBox([self.boxes[row[0]], ipywidgets.HTML(cells(row[1:], 1))]) for row in self.rows]
        super().__init__([head, *lines, self.said], layout=Layout(max_width="780px"))
        for box in self.boxes.values():
            box.observe(self.redraw, "value")
        self.redraw()

    def types(self) -> str:
        """The ticked types, as `export` takes them. Raises ValueError when none is."""
        ticked = [name.lower() for name, box in self.boxes.items() if box.value]
        if not ticked:
            raise ValueError("no type is ticked: tick at least one, such as Q4_K_M")
        return ",".join(ticked)

    def redraw(self, _change: Any = None) -> None:
        """What the ticked types take together, below the boxes."""
        ticked = [file_type(name) for name, box in self.boxes.items() if box.value]
        size_gib = sum(budget.file_bytes(self.shape, file) for file in ticked) / budget.GIB
        minutes = budget.minutes(self.shape, ticked, self.machine.host.cpus) if ticked else 0.0
        room = self.machine.host.disk_gib
        fits = f"{room:,.0f} GiB of disk are free" if size_gib <= room else f"does not fit: {room:.1f} GiB are free"
        importance = " Types with * need an importance matrix, which is collected first." if self.needs(ticked) else ""
        self.sentence = (
            f"{', '.join(file.name for file in ticked) or 'nothing'} ticked: {size_gib:.2f} GiB, {fits}; "
            f"about {max(minutes, 1):.0f} min.{importance}"
        )
        self.said.value = f"<div style='line-height:1.5'>{escape(self.sentence)}</div>"

    @staticmethod
    def needs(ticked: Sequence[Any]) -> bool:
        """Whether a type among these needs an importance matrix."""
        return any(file.needs_importance for file in ticked)

    def _ipython_display_(self, **_: Any) -> None:
        """Boxes where the front end can draw them, words where it cannot; ipywidgets 7 and 8 both call this."""
        view = {"version_major": 2, "version_minor": 0, "model_id": self.model_id}
        display({"application/vnd.jupyter.widget-view+json": view, "text/plain": self.words}, raw=True)

    @property
    def words(self) -> str:
        """The table and the choice as text."""
        lines = [
            "  ".join(str(cell).ljust(width // 7) for cell, width in zip(row, WIDTHS, strict=True)).rstrip()
            for row in (HEADINGS, *self.rows)
        ]
        return "\n".join([*lines, self.sentence])


def choice(shape: ModelShape, machine: Machine, types: str, context: int = budget.DEFAULT_CONTEXT) -> Choice:
    """Boxes for the types of a model, those of `types` ticked; `types_of` reads them back."""
    return Choice(shape, machine, types, context)


def types_of(choice: Choice) -> str:
    """The types that are ticked, with commas between."""
    return choice.types()


def rows(shape: ModelShape, machine: Machine, context: int) -> list[tuple[str, ...]]:
    """A row a type in words: name, file, bits a weight, loss, minutes, RAM, and what a laptop of 8 GB makes of it."""
    on_laptop = {row["type"]: row for row in budget.runs_on(shape, context=context)}
    found = []
    for one in budget.choices(shape, machine.host.cpus, context):
        longest = on_laptop[one.name]["longest context, tokens"]
        found.append(
            (
                one.name,
                budget.size(one.size_bytes),
                f"{one.bits:.2f}{'*' if one.needs_importance else ''}",
                f"+{one.loss_percent:g} %",
                f"{max(one.minutes, 1):.0f} min",
                f"{one.run_gib:.1f} GiB",
                f"up to {longest:,} tokens" if longest else "too small",
            )
        )
    return found


def cells(texts: Sequence[str], first: int = 0) -> str:
    """Texts in columns, as HTML."""
    each = zip(texts, WIDTHS[first:], strict=True)
    return "".join(
        f"<span style='display:inline-block;width:{width}px;white-space:nowrap'>{escape(text)}</span>"
        for text, width in each
    )


def kept(errors: Mapping[str, Mapping[str, Any]], chosen: str = "") -> Figure:
    """What each type keeps of one matrix: its error against bits a weight, and how two of them change the weights.

    errors: type -> bits, error (RMS, of the weights' own RMS) and difference (values), as `export.kept` gives them.
    chosen: types that were exported, drawn full.
    """
    figure, (left, right) = plots.canvas(columns=2)
    names = {file_type(name.strip()).name for name in chosen.split(",")} if chosen else set()
    for name, found in errors.items():
        if not found["error"]:  # 16 bits of weights that had 16
            continue
        colour = plots.BLUE if name in names else plots.SKY
        left.plot(found["bits"], 100 * found["error"], "o" if name in names else "s", color=colour)
        beside = {"xytext": (-6, -9), "ha": "right"} if name.startswith("IQ") else {"xytext": (6, 4)}
        left.annotate(name, (found["bits"], 100 * found["error"]), textcoords="offset points", fontsize=8, **beside)
    left.set(xlabel="bits a weight", ylabel="error, % of the weights", title="What a type loses of one matrix")
    left.set_yscale("log")
    left.yaxis.set_major_formatter("{x:g}")
    left.margins(0.15)
    left.margins(x=0.3)  # for the names beside the outermost
    shown = [name for name in errors if name in names] or list(errors)[-2:]
    widest = max(float(np.abs(errors[name]["difference"]).max()) for name in shown) or 1.0
    for name, colour in zip(shown, plots.COLOURS, strict=False):
        values = np.asarray(errors[name]["difference"]).reshape(-1)
        right.hist(values, bins=np.linspace(-widest, widest, 81), histtype="step", color=colour, label=name)
    right.set(xlabel="change of a weight", ylabel="weights", title="How far weights move")
    right.yaxis.set_major_formatter(plots.COUNT)
    right.legend(frameon=False, fontsize=8)
    return figure
