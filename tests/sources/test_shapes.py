"""Real shapes of conversations, true to the documentation of the tools that write them, and the rows that are wanted.

shapes/NAME.* is the file, NAME.expected.json was written by hand: a turn is [role, text], with 0 behind it where
it is read and not trained.
"""

import json
from functools import cache
from pathlib import Path

import pytest

from helpers.models import TINY, profile
from helpers.models.templates import Template
from helpers.prepare import Reading, conversations, load_tokenizer
from helpers.prepare.checks import Findings, actions
from helpers.prepare.rows import Rows

SHAPES = Path(__file__).resolve().parent / "shapes"
NAMES = sorted(path.name.removesuffix(".expected.json") for path in SHAPES.glob("*.expected.json"))


@cache
def template():
    return Template(load_tokenizer(TINY))


def read(path, **options):
    """(conversations, what was learned) of a file."""
    reading = Reading(Findings(actions(options.get("on_finding", ""))))
    config = profile("tiny", seq_len=2048, **options)
    return list(conversations(str(path), config, reading, template())), reading


@pytest.mark.parametrize("name", NAMES)
def test_a_shape_gives_the_rows_that_a_careful_person_would_want(name):
    wanted = json.loads((SHAPES / f"{name}.expected.json").read_text(encoding="utf-8"))
    path = next(path for path in SHAPES.glob(f"{name}.*") if not path.name.endswith(".expected.json"))
    talks, reading = read(path, **wanted.get("options", {}))
    said = " ".join(reading.found.sentences())
    if "refused" in wanted:
        assert not talks and wanted["refused"] in said
        return
    made = [
        [[turn["role"], turn["content"], *([0] if turn.get("weight") == 0 else [])] for turn in talk.messages]
        for talk in talks
    ]
    assert made == wanted["rows"]
    assert reading.found.dropped() == wanted.get("dropped", {})
    assert set(reading.found.found) - set(reading.found.dropped()) == set(wanted.get("findings", []))
    assert reading.formats.total() == len(talks) + sum(reading.found.dropped().values())


def test_there_are_enough_shapes():
    assert len(NAMES) >= 25


def test_an_answer_of_weight_0_is_in_the_row_and_not_in_its_mask(tmp_path):
    talks, reading = read(SHAPES / "openai_weights.jsonl")
    with Rows(tmp_path / "rows.arrow", template(), 2048, reading.found) as rows:
        (made,) = rows.fitted(talks)
    ids, mask = made.rows[0].input_ids, made.rows[0].assistant_masks
    trained = template().tokenizer.decode([token for token, kept in zip(ids, mask, strict=True) if kept])
    assert trained == " Paris, as if nobody knew!</s>"
    assert "Paris</s>" in template().tokenizer.decode(ids)
