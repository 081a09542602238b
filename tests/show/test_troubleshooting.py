"""An error in a notebook: a helper's as its sentence, a known one with its remedy, any other as it always is."""

import doctest
import re

import nbformat
import pytest
from nbclient import NotebookClient

from helpers import cli
from helpers.models import ROOT
from helpers.show import troubleshooting

OUT_OF_MEMORY = "torch.OutOfMemoryError: CUDA out of memory. Tried to allocate 2.00 GiB"


def test_examples_in_docstrings():
    assert doctest.testmod(troubleshooting).failed == 0


def test_a_notebook_shows_the_sentence_the_remedy_or_the_traceback():
    """Executed for real: what the kernel sends is what a page shows."""
    cells = [
        "from helpers import models, setup\nfrom helpers.show import troubleshooting\nsetup.ready()",
        "models.profile('mistral-7b', rank=0)",
        "from helpers.workspace import files\nwith files.reached('/gone', 'all is left'):\n    raise OSError(5)",
        "import os, signal, time\nos.kill(os.getpid(), signal.SIGINT)\ntime.sleep(600)",
        "raise ValueError('my own')",
        "exec(compile('int(str())', troubleshooting.__file__, 'exec'))",
        f"raise RuntimeError({OUT_OF_MEMORY!r})",
        "{}['key']",
        "1 / 0",
    ]
    notebook = nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell(source) for source in cells])
    NotebookClient(notebook, kernel_name="python3", allow_errors=True).execute(cwd=str(ROOT))
    assert all(len(cell.outputs) == 1 for cell in notebook.cells)
    refused, unreachable, stopped, *usual = [cell.outputs[0] for cell in notebook.cells[1:]]
    for output, sentence in (
        (refused, "rank must be"),
        (unreachable, "/gone cannot be reached"),
        (stopped, troubleshooting.STOPPED),
    ):
        assert output.output_type == "error" and sentence in output.traceback[0]
        assert len(output.traceback) == 1 and "\n" not in output.traceback[0]
    for output in usual:  # the reader's own mistake, a helper's bug, and what others raise
        assert output.output_type == "error" and "Traceback" in "\n".join(output.traceback)
    told = ["What to do: " in "\n".join(output.traceback) for output in usual]
    assert told == [False, False, True, False, False]
    assert usual[2].traceback[-1] == f"What to do: {troubleshooting.remedy(OUT_OF_MEMORY)}"


def test_the_command_line_says_the_remedy_below_the_error(monkeypatch, capfd):
    def fail(*_):
        raise OSError("[Errno 28] No space left on device")

    monkeypatch.setitem(cli.STAGES, "merge", fail)
    assert cli.main(["merge", "--profile", "tiny"]) == cli.FAILED
    assert capfd.readouterr().err.rstrip().endswith(troubleshooting.remedy("No space left on device"))


def test_troubles_are_known_by_their_own_messages_and_by_what_caused_an_error():
    for row in troubleshooting.TROUBLES:
        if row.pattern != "(?!)":
            assert re.search(row.pattern, row.message) or row.message.startswith(("Sliders", "loss is")), row.message
    try:
        try:
            raise OSError("429 Client Error: Too Many Requests for url")
        except OSError as error:
            raise RuntimeError("the model cannot be loaded") from error
    except RuntimeError as error:
        assert "HF_TOKEN" in troubleshooting.remedy(error)


@pytest.mark.parametrize("message", ["row 1429 is empty", "there are 401 rows", "finance", "loss=0.4290"])
def test_other_numbers_and_words_are_no_troubles(message):
    assert troubleshooting.remedy(message) is None
