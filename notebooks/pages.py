"""Pages of executed notebooks, to read what they show without running them: no network, no kernel, no widgets.

usage: python notebooks/pages.py --workspace runs/tiny        (`make docs` does; writes runs/tiny/html/index.html)
"""

import argparse
import sys
from collections.abc import Mapping
from html import escape
from pathlib import Path

import nbformat
from badges import summary
from nbconvert import HTMLExporter
from traitlets.config import Config

WIDGET = "application/vnd.jupyter.widget-view+json"
STATE = "application/vnd.jupyter.widget-state+json"
NO_SCRIPTS = "{% extends 'lab/index.html.j2' %}" + "".join(
    f"{{% block {name} %}}{{% endblock %}}"
    for name in ("html_head_js", "html_head_js_mathjax", "html_head_js_mermaidjs")
)
"""nbconvert's page without what it fetches from the network: there is no formula and no diagram here."""
BETWEEN_WORDS = (
    "{% block html_head_css %}{{ super() }}"
    "<style>.jp-OutputArea-output pre {word-break: normal; overflow-wrap: anywhere}</style>{% endblock %}"
)
"""Plain text breaks between words on a phone, where nbconvert's breaks anywhere."""
LEFT = "<style>.jp-RenderedHTMLCommon .still :is(td, th) {text-align: left}</style>"
"""As a widget's tables are; those of an output are set to the right."""
HEAD = (
    '<!doctype html><html lang="en"><meta charset="utf-8"><meta name="viewport" content="width=device-width">'
    "<title>The notebooks, executed</title><style>body{font:16px/1.5 system-ui;max-width:46em;margin:2em auto;"
    "padding:0 1em;color-scheme:light dark}</style><h1>The notebooks, executed</h1>"
)


def pages(workspace: Path) -> list[Path]:
    """Write a page a notebook that was executed, and an index; returns them, the index first.

    Raises FileNotFoundError, with the command that executes them, where none was.
    """
    executed = sorted((workspace / "notebooks").glob("*.ipynb"))
    if not executed:
        raise FileNotFoundError(f"no notebook was executed in {workspace}: make run, or python notebooks/run_all.py")
    folder = workspace / "html"
    folder.mkdir(exist_ok=True)
    written, rows = [], []
    for path in executed:
        title, sentence = summary(nbformat.read(path, as_version=4))
        written.append(folder / f"{path.stem}.html")
        written[-1].write_text(page(path, title), encoding="utf-8")
        rows.append(f'<li><a href="{path.stem}.html">{escape(title)}</a><br>{escape(sentence)}</li>')
    report = '<p><a href="../evaluate/report.html">The report of the evaluation</a></p>'
    last = report if (workspace / "evaluate" / "report.html").is_file() else ""
    (folder / "index.html").write_text(f"{HEAD}<ul>{''.join(rows)}</ul>{last}", encoding="utf-8")
    return [folder / "index.html", *written]


def page(path: Path, title: str) -> str:
    """HTML of one executed notebook: widgets as what they showed, the set-up cell without its code."""
    notebook = nbformat.read(path, as_version=4)
    states = notebook.metadata.pop("widgets", {}).get(STATE, {}).get("state", {})
    for cell in notebook.cells:
        if cell.cell_type == "markdown":
            cell.source = cell.source.replace(".ipynb)", ".html)")
        for output in cell.get("outputs", ()):
            view = output.get("data", {}).pop(WIDGET, None)
            if view:
                output.data["text/html"] = f"{LEFT}<div class='still'>{still(view['model_id'], states)}</div>"
    notebook.metadata["title"] = title
    hidden = Config({"TagRemovePreprocessor": {"enabled": True, "remove_input_tags": ["setup"]}})
    exporter = HTMLExporter(config=hidden, template_name="lab", raw_template=NO_SCRIPTS + BETWEEN_WORDS)
    return exporter.from_notebook_node(notebook)[0]


def still(model_id: str, states: Mapping[str, dict]) -> str:
    """What a widget showed, as HTML that needs no widgets: its text, its name and value, or its children."""
    kind, state = (states.get(model_id, {}).get(key, {}) for key in ("model_name", "state"))
    if "children" in state:
        return "".join(still(child.removeprefix("IPY_MODEL_"), states) for child in state["children"] or ())
    if kind == "HTMLModel":
        return f"<div>{state.get('value', '')}</div>"
    name, shown = state.get("description") or "", state.get("value")
    if state.get("_options_labels") and isinstance(state.get("index"), int):
        shown = state["_options_labels"][state["index"]]
    if kind == "ButtonModel":
        return f" <button disabled>{escape(name)}</button> "
    if not name or not isinstance(shown, str | int | float) or shown == "":
        return ""
    return f" <span>{escape(name)} <b>{escape(str(shown))}</b> ·</span> "


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--workspace", type=Path, default=Path("runs/tiny"))
    try:
        index, *written = pages(parser.parse_args().workspace)
    except FileNotFoundError as error:
        print(error, file=sys.stderr)
        return 1
    print(f"{len(written)} pages: open {index}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
