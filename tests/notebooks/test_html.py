"""Pages of executed notebooks: outputs that can be looked at without a kernel, widgets or a network."""

import re
import sys

import nbformat
import pages
import pytest
import run_all
from ipywidgets import HTML, Button, Dropdown, FileUpload, IntSlider, VBox
from ipywidgets.embed import dependency_state


@pytest.fixture
def workspace(tmp_path):
    """A run with one executed notebook, in whose outputs are a widget and a picture's words."""
    panel = VBox(
        [
            IntSlider(16, description="rank r"),
            Dropdown(options=[("a T4", 1), ("an L4", 2)], value=2, description="what if on"),
            HTML("<p>It <b>fits</b>.</p>"),
            FileUpload(description="Your file"),
            Button(description="Take the proposal"),
        ]
    )
    shown = {pages.WIDGET: {"model_id": panel.model_id}, "text/plain": "VBox(children=(IntSlider(value=16),))"}
    setup = nbformat.v4.new_code_cell("import zipfile", metadata={"tags": ["setup"]})
    setup.outputs = [nbformat.v4.new_output("stream", text="Ready")]
    sliders = nbformat.v4.new_code_cell("sliders")
    sliders.outputs = [nbformat.v4.new_output("display_data", data=shown)]
    title = nbformat.v4.new_markdown_cell("# 1 · Environment\n\nYou know what fits.\n\nNext: [2](02_data.ipynb)")
    notebook = nbformat.v4.new_notebook(cells=[title, setup, sliders])
    notebook.metadata["widgets"] = {pages.STATE: {"state": dependency_state([panel])}}
    (tmp_path / "notebooks").mkdir()
    nbformat.write(notebook, tmp_path / "notebooks" / "01_environment.ipynb")
    return tmp_path


def test_a_page_shows_what_widgets_showed_and_asks_the_network_for_nothing(workspace):
    index, page = pages.pages(workspace)
    html = page.read_text(encoding="utf-8")
    text = re.sub(r"\s+", " ", re.sub(r"<style.*?</style>|<[^>]+>", " ", html, flags=re.DOTALL))
    for words in ("rank r 16", "what if on an L4", "It fits .", "Take the proposal", "Ready"):
        assert words in text, words
    assert "IntSlider" not in text and "[]" not in text and "import zipfile" not in text, (
        "no widget's name, and no set-up code"
    )
    assert not re.search(r"<script|<link|src=\"http|url\(http", html)
    assert "02_data.html" in html, "pages link each other"
    assert "01_environment.html" in index.read_text(encoding="utf-8")


def test_the_index_leads_to_the_report_where_there_is_one(workspace):
    (workspace / "evaluate").mkdir()
    (workspace / "evaluate" / "report.html").touch()
    index = pages.pages(workspace)[0].read_text(encoding="utf-8")
    (target,) = re.findall(r'href="(\.\.[^"]+)"', index)
    assert (workspace / "html" / target).is_file()


def test_without_executed_notebooks_it_says_how_to_execute_them(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["pages.py", "--workspace", str(tmp_path)])
    assert pages.main() == 1
    assert "make run" in capsys.readouterr().err
    assert not (tmp_path / "html").exists()


def test_a_notebook_that_is_not_there_is_not_passed_over(monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["run_all.py", "--only", "nosuch.ipynb"])
    with pytest.raises(SystemExit) as end:
        run_all.main()
    assert end.value.code == 2
    assert "01_environment_setup.ipynb" in capsys.readouterr().err
