"""What holds for any rows: no field is lost without a word, no row is on both sides, and batches know their letters."""

import json
import tempfile
from pathlib import Path

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from helpers.models import TINY, profile
from helpers.models.templates import Template
from helpers.prepare import Reading, conversations, load_prepared, load_tokenizer, prepare, rows
from helpers.prepare.checks import Findings, actions, clean, flawless, in_turns, leaks
from helpers.prepare.rows import BATCH, BATCH_LETTERS, Conversation, batches
from helpers.sources.columns import is_empty, renamed

BASES = [
    {"messages": [{"role": "user", "content": "Where?"}, {"role": "assistant", "content": "There."}]},
    {"instruction": "Do it.", "output": "Done."},
    {"question": "Where?", "answer": "There."},
    {"text": "A text that says nothing."},
    {"conversations": [{"from": "human", "value": "Hi"}, {"from": "gpt", "value": "Ho"}]},
]
NAMES = st.sampled_from(
    ["label", "context", "system", "system_prompt", "history", "images", "tools", "input", "summary", "category",
     "chosen", "Answer", "score", "id", "weight", "prompt", "completion", "response", "text", "data", "reasoning"]
) | st.text(min_size=1, max_size=8)  # fmt: skip
VALUES = st.one_of(
    st.none(), st.booleans(), st.integers(-5, 5), st.text(max_size=12), st.lists(st.text(max_size=5), max_size=3),
    st.dictionaries(st.text(max_size=3), st.integers(), max_size=2),
)  # fmt: skip


@pytest.fixture(scope="module")
def template():
    return Template(load_tokenizer(TINY))


@settings(max_examples=300, deadline=None)
@given(base=st.sampled_from(BASES), extras=st.dictionaries(NAMES, VALUES, max_size=4))
def test_a_field_is_read_or_told_or_its_row_is_dropped(template, base, extras):
    row = extras | base
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "a.jsonl"
        path.write_text(json.dumps(row) + "\n", encoding="utf-8")
        reading = Reading(Findings(actions()))
        talks = list(conversations(str(path), profile("tiny"), reading, template))
    if not talks:
        assert reading.found.dropped()
        return
    told = reading.found.found["unused-fields"].fields if "unused-fields" in reading.found.found else {}
    turns = {turn["content"].strip() for turn in talks[0].messages}
    short = renamed(tuple(row)) or {name: name for name in row}
    for name, value in row.items():
        repeated = isinstance(value, str) and any(value.strip() in turn for turn in turns)
        assert is_empty(value) or repeated or short[name] in reading.fields or short[name] in told, (name, talks)


WORDS = ["river", "stone", "lamp", "bread", "cloud", "copper", "violet", "ladder", "harbour", "winter"]
TURN = st.lists(st.sampled_from(WORDS), min_size=1, max_size=30).map(" ".join)
TALK = st.lists(st.tuples(st.sampled_from(["Start of game 7", "Guess."]) | TURN, TURN), min_size=1, max_size=3)
TEXT = st.lists(st.sampled_from(["one " * 60, "two " * 70, "three " * 50]), min_size=1, max_size=4).map("".join)


def row_of(talk):
    """A talk of pairs as messages, a text as itself."""
    if isinstance(talk, str):
        return {"text": talk}
    turns = [(role, text) for pair in talk for role, text in zip(("user", "assistant"), pair, strict=True)]
    return {"messages": [{"role": role, "content": text} for role, text in turns]}


def sides(folder, talks, seq_len=32, **values):
    """id -> side, and the rows of each side, of prepared conversations."""
    folder.mkdir()
    (folder / "a.jsonl").write_text("".join(json.dumps(row_of(talk)) + "\n" for talk in talks))
    prepare(profile("tiny", seq_len=seq_len, heldout_fraction=0.4, **values), folder / "out", str(folder / "a.jsonl"))
    made = load_prepared(folder / "out")
    held = {side: [tuple(ids) for ids in part["input_ids"]] for side, part in made.items()}
    return {row: side for side, part in made.items() if len(part) for row in part["id"]}, held


@settings(max_examples=8, deadline=None)
@given(talks=st.lists(TALK | TEXT, min_size=2, max_size=14), keep=st.booleans())
@example(talks=["one " * 60 + "two " * 140, [("Start of game 7", "river")], "two " * 210, "two " * 140], keep=True)
def test_no_row_is_on_both_sides_after_the_cut(talks, keep):
    with tempfile.TemporaryDirectory() as folder:
        switch = "exact-duplicate=keep" if keep else ""
        try:
            _, held = sides(Path(folder) / "a", talks, on_finding=switch)
        except ValueError as error:
            assert "nothing that could be trained on" in str(error)
            return
    assert not set(held["train"]) & set(held["heldout"])


def test_the_first_rows_keep_their_side_when_others_are_added():
    rng = np.random.default_rng(5)
    talks = [[(" ".join(rng.choice(WORDS, 9)), " ".join(rng.choice(WORDS, 9)))] for _ in range(120)]
    nearly = [[(question, f"{answer} {WORDS[i % 10]}")] for i, [(question, answer)] in enumerate(talks[:40])]
    with tempfile.TemporaryDirectory() as folder:
        first, _ = sides(Path(folder) / "a", talks[:60], seq_len=192)
        both, _ = sides(Path(folder) / "b", talks[:60] + nearly + talks[60:], seq_len=192)
    assert set(first.values()) == {"train", "heldout"}
    assert {row: both[row] for row in first} == first


PIECES = ["a", "a", "Ω b", " ", "\n", "\t", "\x07", "\u200e", "\xa0", "<s>", "</s>", "[INST]", "<"]
ODD = st.lists(st.sampled_from(PIECES), max_size=4).map("".join)


@given(texts=st.lists(ODD, min_size=2, max_size=3))
@example(texts=["a < b", "\ta"])
def test_what_is_passed_by_at_once_is_what_every_check_leaves_alone(texts):
    roles = ["system", "user", "assistant"][-len(texts) :]
    talk = [{"role": role, "content": text} for role, text in zip(roles, texts, strict=True)]
    leaked, found = leaks("<s>", "</s>", "[INST]", "[/INST]"), Findings(actions())
    turns = [turn | {"content": clean(turn["content"], "a", found, leaked, set())} for turn in talk]
    untouched = in_turns(turns, "a", found) == talk and not found.found
    assert untouched or not flawless(talk, leaked)
    assert flawless([turn | {"content": "Hi < 5."} for turn in talk], leaked)


@given(letters=st.lists(st.integers(1, 3 * BATCH_LETTERS), max_size=30))
def test_a_batch_ends_at_so_many_letters(letters):
    class Text(str):
        def __len__(self):
            return int(self)

    talks = [Conversation(f"a line {i}", [], Text(size)) for i, size in enumerate(letters)]
    made = list(batches(iter(talks)))
    assert [talk for batch in made for talk in batch] == talks
    for batch in made:
        assert len(batch) <= BATCH and sum(len(talk.text) for talk in batch[:-1]) < BATCH_LETTERS


def test_the_tokenizer_never_gets_more_letters_at_once_than_said(tmp_path, template, monkeypatch):
    """The road: what `prepare` hands to the tokenizer, whatever the rows' lengths."""
    given_letters = []
    call = type(template.tokenizer).__call__

    def counted(self, texts, **how):
        given_letters.append(sum(map(len, texts)) if isinstance(texts, list) else len(texts))
        return call(self, texts, **how)

    monkeypatch.setattr(type(template.tokenizer), "__call__", counted)
    monkeypatch.setattr(rows, "BATCH_LETTERS", 20_000)
    monkeypatch.setattr("helpers.models.templates.PART", 5_000)
    sizes = [10, 200_000, 15_000, 30, 90_000, 12_000, 12_000]
    made = [{"text": "word " * (size // 5)} if i % 2 else {"prompt": "word " * (size // 5), "completion": "x"}
            for i, size in enumerate(sizes)]  # fmt: skip
    path = tmp_path / "a.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in made))
    prepare(profile("tiny", seq_len=64, heldout_fraction=0), tmp_path / "out", str(path))
    assert max(given_letters) <= 20_000 + 2 * 10_100
