"""The dropdowns of columns and the first rows under them, without a browser."""

import json

import pytest

from helpers import prepare
from helpers.models import profile
from helpers.prepare import columnview


def table(tmp_path, text="Canonical Question,Réponse,Topic\nOpen?,From nine.,hours\nRefunds?,Within a week.,money\n"):
    path = tmp_path / "faq.csv"
    path.write_text(text, encoding="utf-8")
    return str(path)


def test_a_table_with_names_of_its_own_is_trained_as_chosen(tmp_path):
    choice = columnview.chooser(profile("tiny", heldout_fraction=0), table(tmp_path))
    assert choice.names == ["canonical_question", "réponse", "topic"]
    assert "it has the fields canonical_question" in choice.words and "wrong" in choice.picture.value
    assert columnview.config_of(choice).data.columns == ""
    for role, name in (("user", "canonical_question"), ("assistant", "réponse")):
        choice.controls[role].value = name
    assert choice.words.splitlines()[:3] == ["row 1", "  user: Open?", "  assistant: From nine."]
    config = columnview.config_of(choice)
    made = prepare.prepare(config, tmp_path / "out", table(tmp_path))
    assert made["kept"] == 2 and made["fields"] == ["canonical_question", "réponse"]
    rows = prepare.load_prepared(tmp_path / "out")["train"]["messages"]
    shown = [line.strip() for line in choice.words.splitlines() if line.startswith("  ")]
    assert shown == [f"{turn['role']}: {turn['content']}" for turns in rows for turn in turns]


def test_what_columns_can_hold_survives_the_choice(tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_text(json.dumps({"Question, in full": "<b>Where?</b>", 'The "answer"': "There."}) + "\n")
    choice = columnview.chooser(profile("tiny"), str(path))
    for role, name in zip(("user", "assistant"), choice.names, strict=True):
        choice.controls[role].value = name
    assert "  user: <b>Where?</b>" in choice.words and "<b>Where?</b>" not in choice.picture.value
    assert prepare.prepare(columnview.config_of(choice), tmp_path / "out", str(path))["kept"] == 1


def test_three_rows_are_shown_and_a_source_that_cannot_be_read_is_said(tmp_path):
    assert columnview.chooser(profile("tiny")).words.count("row ") == columnview.SHOWN_ROWS
    assert "there is no file" in columnview.chooser(profile("tiny"), str(tmp_path / "nothing.csv")).words


def test_what_prepare_drops_or_refuses_is_not_shown_as_trained(tmp_path):
    path = tmp_path / "a.csv"
    path.write_bytes("question,answer\nO\xf9 ?,L\xe0.\nQui ?,Moi.\n".encode("latin-1"))
    first, then = (
        columnview.chooser(profile("tiny", on_finding=asked), str(path)).words for asked in ("", "invalid-utf8=repair")
    )
    assert first.splitlines()[0].startswith("row 1: bytes that are not UTF-8") and "as cp1252: Où ? Là." in first
    assert "assistant: Là." not in first and "assistant: Là." in then and "assistant: Moi." in first
    chat = tmp_path / "_chat.txt"
    chat.write_text("[21.11.26, 10:15:22] Ann: Hi\n[21.11.26, 10:15:40] Bob: Ho\n")
    shown = columnview.chooser(profile("tiny"), str(chat))
    assert "holds chats with markers" in shown.words and "holds chats with markers" in shown.picture.value
    assert "text: [21.11.26" in columnview.chooser(profile("tiny", source_format="plain-text"), str(chat)).words


@pytest.mark.parametrize("asked", ["user=Where", "user=a,assistant=", "wizard=a,assistant=b", "user"])
def test_columns_that_say_nothing_are_refused_with_what_can_be_named(asked, tmp_path):
    with pytest.raises(ValueError, match=r"columns (is|must name)"):
        prepare.prepare(profile("tiny", columns=asked), tmp_path / "out", table(tmp_path))


def test_a_column_that_is_not_there_is_named_with_those_that_are(tmp_path):
    with pytest.raises(ValueError, match=r"no column 'where'; there are canonical_question, réponse, topic"):
        prepare.prepare(profile("tiny", columns="user=Where,assistant=Topic"), tmp_path / "out", table(tmp_path))
