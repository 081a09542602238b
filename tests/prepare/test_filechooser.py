"""Your own file stays chosen: after Run All, in the next notebook, on the next machine."""

import shutil
from datetime import UTC, datetime
from pathlib import Path

import pytest

from helpers import workspace
from helpers.models import profile
from helpers.prepare import columnview, filechooser
from helpers.workspace import choices

ROWS = b"question,answer\n" + b"".join(b"Where is hat %d?,On shelf %d.\n" % (n, n) for n in range(40))
HERE = "in notebook 2"


@pytest.fixture
def machine(tmp_path, monkeypatch):
    """Opens the same run as another machine would, which shares nothing but the lasting folder."""
    (tmp_path / "drive").mkdir()
    monkeypatch.setenv("RECIPES_LASTING", str(tmp_path / "drive"))
    return lambda name: workspace.open_run(profile("tiny"), tmp_path / name / "tiny")


def run_all(run, **given):
    """The notebook's cells: a chooser of its own each time they run."""
    config = choices.start(run, profile("tiny"), HERE, **given)
    return filechooser.chooser(config, run, choices.keeper(run, HERE, given))


def send(chooser, name, content):
    """As ipywidgets 8 hands over what the browser sent."""
    sent = {"name": name, "content": memoryview(content), "size": len(content), "type": ""}
    chooser.upload.set_trait("value", (sent | {"last_modified": datetime.now(UTC)},))


def go_on(chooser):
    """The cell below the button."""
    return choices.keep(chooser.run, filechooser.config_of(chooser), HERE)


def test_run_all_after_an_upload_trains_on_it_also_on_the_next_machine(machine, tmp_path):
    chooser = run_all(machine("one"))
    assert "the SAMPLE conversations.jsonl" in chooser.words and chooser.sample.disabled
    send(chooser, "hats.csv", ROWS)
    assert "YOUR data hats.csv" in chooser.words
    again = run_all(machine("one"))
    assert "YOUR data hats.csv" in again.words
    config = go_on(again)
    assert (tmp_path / "one" / "tiny" / "upload" / "hats.csv").read_bytes() == ROWS
    assert config.data.source.endswith("upload/hats.csv") and config.evaluate.questions is None
    shutil.rmtree(tmp_path / "one")
    elsewhere = filechooser.config_of(run_all(machine("two")))
    assert elsewhere.data.source == str(tmp_path / "two" / "tiny" / "upload" / "hats.csv")
    assert Path(elsewhere.data.source).read_bytes() == ROWS


def test_a_file_that_is_gone_stops_instead_of_training_on_something_else(tmp_path):
    run = workspace.open_run(profile("tiny"), tmp_path / "tiny")
    chooser = run_all(run)
    send(chooser, "hats.csv", ROWS)
    (run.root / "upload" / "hats.csv").unlink()
    again = run_all(run)
    assert "is not on this machine any more" in again.words
    with pytest.raises(ValueError, match="upload it again"):
        filechooser.config_of(again)
    again.sample.click()
    config = filechooser.config_of(again)
    assert config == profile("tiny"), "the sample, and the questions that go with it"
    assert filechooser.config_of(run_all(run)) == config


def test_the_later_word_wins_an_upload_over_the_form_and_a_form_that_is_changed_over_the_upload(tmp_path):
    run = workspace.open_run(profile("tiny"), tmp_path / "tiny")
    chooser = run_all(run, source="theirs.csv")
    assert "YOUR data theirs.csv" in chooser.words
    send(chooser, "hats.csv", ROWS)
    assert "hats.csv" in run_all(run, source="theirs.csv").words
    assert "YOUR data others.csv" in run_all(run, source="others.csv").words


def test_an_upload_cannot_overwrite_what_lies_in_the_run(tmp_path):
    run = workspace.open_run(profile("tiny"), tmp_path / "tiny")
    (run.root / "report.json").write_text("mine")
    send(run_all(run), "../report.json", b"[]")
    assert (run.root / "report.json").read_text() == "mine"


def test_an_upload_that_cannot_be_saved_is_said_in_the_box(tmp_path):
    run = workspace.open_run(profile("tiny"), tmp_path / "tiny")
    (run.root / "upload").write_text("a file where the folder should be")
    chooser = run_all(run)
    send(chooser, "hats.csv", ROWS)
    assert "upload" in chooser.words and "SAMPLE" not in chooser.words
    assert filechooser.config_of(chooser) == profile("tiny")


def test_columns_stay_chosen_with_their_file_and_go_with_it(tmp_path):
    run = workspace.open_run(profile("tiny"), tmp_path / "tiny")
    send(run_all(run), "hats.csv", ROWS.replace(b"question", b"frage").replace(b"answer", b"antwort"))
    choice = columnview.chooser(filechooser.config_of(run_all(run)), moved=choices.keeper(run, HERE))
    for role, name in (("user", "frage"), ("assistant", "antwort")):
        choice.controls[role].value = name
    chooser = run_all(run)
    again = columnview.chooser(filechooser.config_of(chooser))
    assert again.chosen() == {"user": "frage", "assistant": "antwort"} and "row 1:" not in again.words
    assert columnview.config_of(again).data.columns == "user=frage,assistant=antwort"
    send(chooser, "other.csv", ROWS)
    assert filechooser.config_of(chooser).data.columns == ""
