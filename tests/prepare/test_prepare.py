"""prepare as a whole: counts, masks, split and bytes; what the notebook shows of it."""

import filecmp
import json
import re
from functools import cache
from html.parser import HTMLParser
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from datasets import load_from_disk
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from helpers import prepare
from helpers.models import TINY, profile
from helpers.prepare import view
from helpers.prepare.rows import hash_of
from helpers.workspace import MissingArtifact

SAMPLE = TINY.parent / "conversations.jsonl"


@pytest.fixture(scope="module")
def prepared(tmp_path_factory):
    output = tmp_path_factory.mktemp("run") / "prepare"
    return output, prepare.prepare(profile("tiny"), output)


@cache
def tokenizer():
    return prepare.load_tokenizer(TINY)


def talk(*texts):
    return [{"role": ("user", "assistant")[i % 2], "content": text} for i, text in enumerate(texts)]


def write(path, talks):
    path.write_text("".join(json.dumps({"messages": messages}) + "\n" for messages in talks), encoding="utf-8")
    return str(path)


def sides(output):
    """id -> train or heldout."""
    return {row: side for side in ("train", "heldout") for row in load_from_disk(str(output / side))["id"]}


def many(count, start=0):
    """Conversations that are not like one another."""
    words = [f"{word}{i}" for i in range(40) for word in ("river", "stone", "lamp", "bread", "cloud")]
    rng = np.random.default_rng(7)
    made = [talk(" ".join(rng.choice(words, 12)) + "?", " ".join(rng.choice(words, 12))) for _ in range(start + count)]
    return made[start:]


def test_the_sample_is_read_whole(prepared):
    _, made = prepared
    assert made["in"] == made["kept"] + sum(made["dropped"].values())
    assert made["dropped"] == {} and made["warnings"] == []
    assert (made["train_rows"], made["heldout_rows"]) == (720, 80)
    assert made["formats"] == {"messages": 800}
    assert sum(made["length_counts"]) == 800


def test_masks_hold_the_answers_and_their_ends(prepared):
    output, made = prepared
    trained_tokens = 0
    for row in load_from_disk(str(output / "train")):
        assert row["input_ids"][0] == tokenizer().bos_token_id
        assert len(row["input_ids"]) == len(row["assistant_masks"]) == row["full_tokens"] <= 192
        trained = [token for token, kept in zip(row["input_ids"], row["assistant_masks"], strict=True) if kept]
        answers = [turn["content"] for turn in row["messages"] if turn["role"] == "assistant"]
        assert tokenizer().decode(trained) == "".join(f" {answer}</s>" for answer in answers)
        trained_tokens += len(trained)
    assert trained_tokens == made["trained_tokens"]


def test_twice_gives_the_same_bytes(prepared, tmp_path):
    output, _ = prepared
    prepare.prepare(profile("tiny"), tmp_path / "again")
    files = [str(file.relative_to(output)) for file in output.rglob("*") if file.is_file()]
    assert len(files) == 8
    assert filecmp.cmpfiles(output, tmp_path / "again", files, shallow=False)[0] == files


def test_the_fingerprint_follows_the_content(prepared, tmp_path):
    """Caches of later `map` calls hang on it."""
    output, _ = prepared
    prepare.prepare(profile("tiny", seq_len=64), tmp_path / "shorter")
    one, other = (load_from_disk(str(folder / "train")) for folder in (output, tmp_path / "shorter"))
    assert one._fingerprint != other._fingerprint


def test_the_manifest_says_where_from(prepared):
    output, _ = prepared
    manifest = json.loads((output / "manifest.json").read_text())
    assert manifest["inputs"]["source"]["sha256"] and manifest["inputs"]["heldout_source"]["sha256"]
    assert manifest["measurements"]["template"]["shown"] == "<s>[INST] …[/INST] …</s>"
    assert manifest["measurements"]["context"] == 192


JSON_VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=10),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=8,
)
ROLES = st.sampled_from(["user", "assistant", "system", "tool", "human", "gpt", ""])
MESSAGES = st.lists(
    st.fixed_dictionaries({"role": ROLES | JSON_VALUES, "content": st.text(max_size=30) | JSON_VALUES}), max_size=6
)
ROWS = st.one_of(
    st.fixed_dictionaries({"messages": MESSAGES}),
    st.fixed_dictionaries({"conversations": st.lists(st.fixed_dictionaries({"from": ROLES, "value": st.text()}))}),
    st.fixed_dictionaries({"instruction": st.text() | JSON_VALUES, "output": st.text() | JSON_VALUES}),
    st.fixed_dictionaries({"text": st.text() | st.just("### Human: a### Assistant: b")}),
    JSON_VALUES,
)


@settings(max_examples=30, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.lists(ROWS, min_size=1, max_size=6), st.sampled_from(["a.jsonl", "a.json"]))
def test_whatever_comes_in_is_kept_or_counted(tmp_path, rows, name):
    path = tmp_path / name
    text = json.dumps(rows) if name.endswith(".json") else "".join(json.dumps(row) + "\n" for row in rows)
    path.write_text(text, encoding="utf-8")
    good = {"prompt": "Where is the good row?", "completion": "It is here."}
    config = profile("tiny", heldout_fraction=0)
    write_good = tmp_path / "b.jsonl"
    write_good.write_text(json.dumps(good) + "\n")
    (tmp_path / "in").mkdir(exist_ok=True)
    for file in (path, write_good):
        file.replace(tmp_path / "in" / file.name)
    try:
        made = prepare.prepare(config, tmp_path / "out", str(tmp_path / "in"))
    except ValueError as error:  # one JSON value a file that holds no rows
        assert "a.json" in str(error) and "\n" not in str(error)
        return
    finally:
        (tmp_path / "in" / name).unlink()
    assert made["in"] == len(rows) + 1
    assert made["in"] == made["kept"] + sum(made["dropped"].values())
    for row in load_from_disk(str(tmp_path / "out" / "train")):
        assert any(row["assistant_masks"])
        trained = [token for token, kept in zip(row["input_ids"], row["assistant_masks"], strict=True) if kept]
        if row["messages"][0]["role"] != "text" and "▁" not in str(row["messages"]):
            answers = [turn["content"] for turn in row["messages"] if turn["role"] == "assistant"]
            assert tokenizer().decode(trained) == "".join(f" {answer}</s>" for answer in answers)


def test_the_split_is_stable_when_rows_are_added(tmp_path):
    config = profile("tiny", heldout_fraction=0.2)
    before, after = many(100), many(100) + many(60, start=100)
    prepare.prepare(config, tmp_path / "a", write(tmp_path / "a.jsonl", before))
    prepare.prepare(config, tmp_path / "b", write(tmp_path / "b.jsonl", after[::-1]))
    first, second = sides(tmp_path / "a"), sides(tmp_path / "b")
    assert len(first) == 100 and len(second) == 160
    assert {row: second[row] for row in first} == first
    assert 8 <= sum(side == "heldout" for side in first.values()) <= 32


def test_a_small_file_has_something_held_out(tmp_path):
    made = prepare.prepare(profile("tiny"), tmp_path / "a", write(tmp_path / "a.jsonl", many(5)))
    assert (made["train_rows"], made["heldout_rows"]) == (4, 1)


def test_near_duplicates_stay_on_one_side(tmp_path):
    talks = []
    for messages in many(80):
        question, answer = (turn["content"] for turn in messages)
        talks += [messages, talk(question.upper(), answer), talk(question, answer + "!")]
    config = profile("tiny", heldout_fraction=0.5)
    made = prepare.prepare(config, tmp_path / "a", write(tmp_path / "a.jsonl", talks))
    found = {finding["kind"]: finding for finding in made["findings"]}
    assert found["near-duplicate"]["count"] == 160 and made["kept"] == 240
    side_of = sides(tmp_path / "a")
    in_order = [side_of[f"{int(hash_of(messages)[:16], 16):016x}"] for messages in talks]
    assert [side for side in in_order[::3] for _ in range(3)] == in_order
    made = prepare.prepare(
        config.with_values(on_finding="near-duplicate=drop"), tmp_path / "b", str(tmp_path / "a.jsonl")
    )
    assert made["kept"] == 80 and made["dropped"] == {"near-duplicate": 160}


def test_what_is_held_out_leaves_the_training_rows(tmp_path):
    talks = many(20)
    heldout = write(tmp_path / "heldout.jsonl", talks[:3])
    nearly = talk(talks[3][0]["content"], talks[3][1]["content"] + ".")
    config = profile("tiny", heldout_source=heldout)
    made = prepare.prepare(config, tmp_path / "out", write(tmp_path / "train.jsonl", [*talks, nearly]))
    assert made["dropped"] == {"also-held-out": 3} and made["heldout_rows"] == 3 and made["train_rows"] == 18
    assert made["findings"][-1]["place"].startswith("train.jsonl line ")


def test_nothing_left_to_train_on_is_refused(tmp_path):
    path = write(tmp_path / "same.jsonl", many(5))
    with pytest.raises(ValueError, match=r"nothing that could be trained on: also-held-out: .*5 dropped"):
        prepare.prepare(profile("tiny", heldout_source=path), tmp_path / "out", path)


def test_the_profile_s_held_out_file_is_not_for_other_data(tmp_path):
    made = prepare.prepare(profile("tiny"), tmp_path / "out", write(tmp_path / "mine.jsonl", many(30)))
    assert made["heldout_source"] is None and made["in"] == 30 and made["heldout_rows"] >= 1


def test_outliers_are_told(tmp_path):
    german = talk("Wie heißt die Gärtnerin?", "Sie heißt Yara, und sie verkauft ihre Äpfel auf dem Markt.")
    talks = [*many(300), talk("Где?", "Там, за рекой."), talk("word " * 900, "x"), german]
    config = profile("tiny", seq_len=1024)
    made = prepare.prepare(config, tmp_path / "a", write(tmp_path / "a.jsonl", talks))
    places = {finding["kind"]: (finding["count"], finding["place"]) for finding in made["findings"]}
    assert places["script-outlier"] == (1, "a.jsonl line 301")
    assert places["length-outlier"] == (1, "a.jsonl line 302")
    assert places["language-outlier"] == (1, "a.jsonl line 303")
    assert any(
        "language-outlier" in finding["sentence"] and "'de'" in finding["sentence"] for finding in made["findings"]
    )
    assert made["kept"] == 303
    dropped = config.with_values(on_finding="language-outlier=drop")
    assert prepare.prepare(dropped, tmp_path / "b", str(tmp_path / "a.jsonl"))["dropped"] == {"language-outlier": 1}


def test_a_short_context_warns_before_training(tmp_path):
    talks = [[*messages, *talk("More, please.", "word " * 120)] for messages in many(20)]
    made = prepare.prepare(profile("tiny", seq_len=200), tmp_path / "a", write(tmp_path / "a.jsonl", talks))
    assert made["cut_share"] == 1.0 and 0 < made["cut_token_share"] < 1
    assert "lose their last turns" in made["warnings"][0]
    enough = int(re.search(r"seq_len=(\d+)", made["warnings"][0])[1])
    again = prepare.prepare(profile("tiny", seq_len=enough + 16), tmp_path / "b", str(tmp_path / "a.jsonl"))
    assert again["cut_share"] <= 0.1
    with pytest.raises(ValueError, match="over-context"):
        prepare.prepare(profile("tiny", seq_len=16), tmp_path / "c", str(tmp_path / "a.jsonl"))


def test_masked_data_warns_before_training(tmp_path):
    talks = [talk(messages[0]["content"] + " word" * 100, "x") for messages in many(20)]
    made = prepare.prepare(profile("tiny", seq_len=512), tmp_path / "a", write(tmp_path / "a.jsonl", talks))
    assert any("of the tokens are trained" in warning for warning in made["warnings"])


def test_a_failure_leaves_the_earlier_output(tmp_path):
    prepare.prepare(profile("tiny"), tmp_path / "out", write(tmp_path / "a.jsonl", many(5)))
    (tmp_path / "b.jsonl").write_text("oops\n")
    with pytest.raises(ValueError, match=r"b.jsonl line 1: .*oops"):
        prepare.prepare(profile("tiny"), tmp_path / "out", str(tmp_path / "b.jsonl"))
    assert len(prepare.load_prepared(tmp_path / "out")["train"]) == 4


def test_load_prepared_names_what_makes_it(tmp_path):
    with pytest.raises(MissingArtifact, match="run python -m helpers prepare"):
        prepare.load_prepared(tmp_path)


class Texts(HTMLParser):
    """The text of a page's spans, and whether its tags close."""

    def __init__(self):
        super().__init__()
        self.open, self.spans, self.skip = [], [], False

    def handle_starttag(self, tag, attrs):
        self.open.append(tag)
        if tag == "span":
            self.spans.append([dict(attrs)["class"], ""])

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, text):
        if self.open and self.open[-1] == "span":
            self.spans[-1][1] += text


def test_token_view_shows_every_token_and_no_tag_of_the_text():
    template = prepare.Template(tokenizer())
    messages = talk("<script>alert(1)</script> & \"'", "</span><b>x</b>\nnew line")
    ids, mask, _ = template.encode([messages])[0]
    page = Texts()
    page.feed(view.token_view({"input_ids": ids, "assistant_masks": mask}, tokenizer()))
    assert page.open == []
    spans = [(kind, text) for kind, text in page.spans if "title" not in kind][3:]  # behind the legend's three
    assert len(spans) == len(ids)
    assert "".join(text for _, text in spans).replace("⏎\n", "\n") == template.text(messages)
    kinds = [kind.split()[0] for kind, _ in spans]
    assert [kind != "read" for kind in kinds] == [bool(kept) for kept in mask]
    assert kinds[-1] == "end" and kinds.count("end") == 1


def test_token_view_of_a_long_row_stops():
    page = view.token_view({"input_ids": [300] * 5000, "assistant_masks": [1] * 5000}, tokenizer())
    assert "3,000 more tokens" in page and len(page) < 400_000


def test_tables_for_the_notebook(prepared, tmp_path):
    output, made = prepared
    assert dict(prepare.summary(made))["kept"] == "800"
    budget = SimpleNamespace(time=SimpleNamespace(step_s=2.0), machine=SimpleNamespace(gpu="T4"))
    rows = dict(view.epoch(made, profile("tiny", batch_size=16, epochs=3.0), budget))
    assert rows["steps an epoch"] == "45" and rows["this run"] == "135 steps, 4 min" and len(rows) == 5
    rows = dict(view.epoch(made | {"available": 8000}, profile("tiny", batch_size=16), budget))
    assert rows["all 8,000 rows"] == "some 450 steps an epoch, 15 min: max_conversations=all"
    assert view.lengths(load_from_disk(str(output / "train"))).max() == made["longest_tokens"] or made["heldout_rows"]
    path = tmp_path / "a.jsonl"
    path.write_text("oops\n" + json.dumps({"prompt": "x", "completion": " y"}) + "\n")
    bad = prepare.prepare(profile("tiny"), tmp_path / "out", str(path))
    table = view.findings(bad)
    assert [row["done"] for row in table] == ["dropped", "repaired"]
    assert (
        table[1]["to change it"] == "edge-spaces=drop or edge-spaces=keep"
        and "a.jsonl line 2" in table[1]["for example"]
    )
    assert "1; broken-row 1" in dict(prepare.summary(bad))["dropped"]
    assert view.findings(made) == [] or made["findings"]


@pytest.mark.parametrize(
    "value",
    [
        {"rows.jsonl": {"metadata": {"name": "rows.jsonl", "size": 2}, "content": b"{}"}},  # ipywidgets 7.7, Colab's
        ({"name": "rows.jsonl", "type": "", "size": 2, "content": memoryview(b"{}")},),  # ipywidgets 8
        {"..\\..\\rows.jsonl": {"content": b"{}"}},
        {"/etc/../rows.jsonl": {"content": b"{}"}},
    ],
)
def test_uploads_of_both_widgets_land_in_the_folder(value, tmp_path):
    path = prepare.save_upload(value, tmp_path / "uploads")
    assert path == tmp_path / "uploads" / "rows.jsonl" and path.read_bytes() == b"{}"


@pytest.mark.parametrize(("value", "says"), [((), "no file"), ({}, "no file"), ({"a": 1, "b": 2}, "2 files")])
def test_uploads_of_none_or_several_are_refused(value, says, tmp_path):
    value = {name: {"content": b""} for name in value} if value else value
    with pytest.raises(ValueError, match=says):
        prepare.save_upload(value, tmp_path)


def test_names_of_the_hub_without_a_network(tmp_path, monkeypatch):
    """No network here or anywhere in the tests: the sentence says what was wanted and what to do."""
    import huggingface_hub.constants

    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(ValueError, match=r"dataset HuggingFaceH4/ultrachat_200k .*(check|local path)"):
        prepare.prepare(profile("tiny"), tmp_path / "out", "HuggingFaceH4/ultrachat_200k")


def test_the_profile_s_own_data_by_another_path_keeps_its_held_out_file(tmp_path, monkeypatch):
    monkeypatch.chdir(SAMPLE.parent)
    made = prepare.prepare(profile("tiny", max_conversations=10), tmp_path / "out", SAMPLE.name)
    assert made["heldout_rows"] == made["train_rows"] == 10


def test_prepare_takes_paths(tmp_path):
    config = profile("tiny", max_conversations=10).with_values(heldout_source=None)
    made = prepare.prepare(config, tmp_path / "out", Path(SAMPLE))
    assert made["in"] == 10
