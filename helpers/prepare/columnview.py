"""Dropdowns that say which column is which, and under them the first rows as they would be trained.

Uses only what ipywidgets 7.7 (Colab) and 8 share. Without a screen, the rows are shown in words.

>>> from helpers.models import profile
>>> choice = chooser(profile("tiny"))
>>> choice.names, config_of(choice).data.columns
(['messages'], '')
"""

import itertools
from collections.abc import Callable
from html import escape
from typing import Any, NamedTuple

import ipywidgets
from ipywidgets import Layout

from helpers.config import RunConfig
from helpers.prepare import Reading, refuse_markers
from helpers.prepare.checks import CHECKS, REPAIR, Findings, actions, check, leaks
from helpers.show.shown import Shown
from helpers.sources import columns, markers
from helpers.sources.formats import BadRow, as_row, read_row, recognise
from helpers.sources.readers import Record, read

LOOKED_AT, SHOWN_ROWS, SHOWN_LETTERS = 50, 3, 400
ROLES = {"user": "the user's", "assistant": "the answer's", "system": "system", "context": "context"}
RECOGNISED = "as recognised"
STYLE = """<style>
.rows{max-width:756px;font-size:13px;line-height:1.45;margin:4px 2px}
.rows table{border-collapse:collapse;width:100%;margin:2px 0 10px}
.rows td{vertical-align:top;padding:2px 8px;border-top:1px solid rgba(128,128,128,.3);overflow-wrap:anywhere}
.rows td:first-child{width:84px;opacity:.75}
.rows .assistant{background:rgba(46,160,67,.22)}
.rows .wrong{border-left:4px solid #c62828;padding:3px 9px;background:rgba(198,40,40,.12)}
</style>"""


class Chooser(Shown):
    """A dropdown a role and the first rows as they would be trained.

    A class, because a widget decides by its own method how it is shown where nobody can use it.
    """

    def __init__(self, config: RunConfig, source: str | None, moved: Callable[[RunConfig], None] | None = None) -> None:
        self.base = config
        self.moved: Callable[[RunConfig], None] | None = None  # nobody has chosen anything yet
        self.rows, self.problem = first_rows(str(source or config.data.source), config)
        self.names = list(dict.fromkeys(name for row in self.rows for name in fields_of(row.value)))
        asked = columns.parse(config.data.columns) if config.data.columns else {}
        self.controls = {role: control(role, self.names, asked.get(role, "")) for role in ROLES}
        self.started = self.chosen()
        self.picture = ipywidgets.HTML()
        boxes = ipywidgets.HBox(list(self.controls.values()), layout=Layout(flex_flow="row wrap"))
        super().__init__([boxes, self.picture], layout=Layout(max_width="780px"))
        for widget in self.controls.values():
            widget.observe(self.redraw, "value")
        self.redraw()
        self.moved = moved

    def columns(self) -> str:
        """The choice as `--columns` takes it; "" while the fields are recognised by their names."""
        chosen = self.chosen()
        if chosen == self.started:
            return self.base.data.columns
        if not {"user", "assistant"} <= set(chosen):
            return ""
        return ",".join(quoted(f"{role}={name}") for role, name in chosen.items())

    def chosen(self) -> dict[str, str]:
        """Role -> the column that its dropdown shows, where it shows one."""
        return {role: widget.value for role, widget in self.controls.items() if widget.value}

    def redraw(self, _change: Any = None) -> None:
        """The first rows under the choice, as a picture and in words."""
        shown, words = [], []
        for number, row in enumerate(self.rows[:SHOWN_ROWS], 1):
            turns, wrong = ([], row.dropped) if row.dropped else as_trained(row.value, self.base, self.columns())
            shown.append(f"<b>row {number}</b>" + (refusal(wrong) if wrong else turns_table(turns)))
            words += [f"row {number}: {wrong}"] if wrong else [f"row {number}"]
            words += [f"  {turn['role']}: {turn['content'][:SHOWN_LETTERS]}" for turn in turns]
        if self.problem:
            shown, words = [refusal(self.problem)], [self.problem]
        self.picture.value = f"{STYLE}<div class='rows'>{''.join(shown)}</div>"
        self.words = "\n".join(words)
        if self.moved is not None:
            self.moved(config_of(self))


def chooser(config: RunConfig, source: str | None = None, moved: Callable[[RunConfig], None] | None = None) -> Chooser:
    """The dropdowns and the first rows of a source, instead of config.data.source; `config_of` reads the choice.

    moved: called with each configuration that somebody chooses.
    """
    return Chooser(config, source, moved)


def config_of(chooser: Chooser) -> RunConfig:
    """The configuration with the columns that were chosen."""
    return chooser.base.with_values(columns=chooser.columns())


class Look(NamedTuple):
    """A row that can be read, and why it is dropped even so, "" where it is not."""

    value: Any
    dropped: str


def first_rows(source: str, config: RunConfig) -> tuple[list[Look], str]:
    """The first rows that can be read, and the sentence of why nothing of the source is trained."""
    try:
        records = list(itertools.islice(read(source, config.data.source_split), LOOKED_AT))
        rows = [look(record, config) for record in records if record.row is not None or record.mended is not None]
        if config.data.source_format == "auto" and not config.data.columns:
            refuse_markers(marks_of([row.value for row in rows]), source)
    except ValueError as error:  # prepare says the same, and stops there
        return [], str(error)
    return rows, "" if records else f"{source} has no rows"


def look(record: Record, config: RunConfig) -> Look:
    """A row, or what it may have meant and whether that is believed."""
    if not record.problem:
        return Look(record.row, "")
    repaired = actions(config.data.on_finding)[record.problem] == REPAIR
    remedy = f"dropped, unless on_finding={record.problem}=repair"
    return Look(record.mended, "" if repaired else f"{CHECKS[record.problem].says}; {remedy}: {record.detail}")


def marks_of(values: list[Any]) -> Reading:
    """What of texts without roles looks like a chat's markers."""
    reading = Reading(Findings(actions()))
    for row in filter(None, map(as_row, values)):
        if recognise(row) == "plain-text":
            reading.formats["plain-text"] += 1
            reading.marked.update(markers.strange(str(row.fields.get("text", row.fields.get("content")))))
    return reading


def fields_of(value: Any) -> list[str]:
    """The names of a row's fields."""
    row = as_row(value)
    return list(row.fields) if row else []


def control(role: str, names: list[str], chosen: str) -> ipywidgets.Dropdown:
    """The dropdown of one role: recognised, or one of the columns."""
    value = columns.normal(chosen) if columns.normal(chosen) in names else ""
    nothing = RECOGNISED if role in ("user", "assistant") else "none, or as recognised"
    return ipywidgets.Dropdown(
        description=ROLES[role],
        options=[(nothing, ""), *((name, name) for name in names)],
        value=value,
        style={"description_width": "96px"},
        layout=Layout(width="366px"),
    )


def quoted(part: str) -> str:
    """A part of --columns, in quotation marks where its name holds a comma."""
    return '"' + part.replace('"', '""') + '"' if "," in part or '"' in part else part


def as_trained(value: Any, config: RunConfig, named: str) -> tuple[list[dict], str]:
    """A row's messages as prepare would write them, or the sentence of why it would not."""
    row = as_row(value)
    chosen = config.data.source_format
    row_format = None if row is None else recognise(row) if chosen == "auto" else chosen
    if row is None or (row_format is None and not named):
        return [], columns.told(row.fields) if row else f"no fields: {value!s:.80}"
    found = Findings(actions(config.data.on_finding))
    try:
        parsed = read_row(row, row_format or "columns", columns.parse(named) if named else None, config.data.use)
    except (BadRow, ValueError) as error:
        return [], str(error)
    turns = check(parsed.messages, "row", found, leaks())
    return (turns, "") if turns else ([], "; ".join(found.sentences()))


def turns_table(turns: list[dict]) -> str:
    """Turns as a table; what is trained is green, as in the token view. HTML."""
    rows = []
    for turn in turns:
        trained = turn["role"] in ("assistant", "text") and turn.get("weight") != 0
        text = escape(turn["content"][:SHOWN_LETTERS]).replace("\n", "<br>")
        more = " …" if len(turn["content"]) > SHOWN_LETTERS else ""
        rows.append(
            f"<tr><td>{turn['role']}</td><td class='{'assistant' if trained else 'read'}'>{text}{more}</td></tr>"
        )
    return f"<table>{''.join(rows)}</table>"


def refusal(sentence: str) -> str:
    """Why a row would not be trained; HTML."""
    return f"<div class='wrong' role='status'>{escape(sentence)}</div>"
