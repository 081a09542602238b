"""A file of prompts answered without a server: as each alone, in order, kept through a kill; and what is refused."""

import doctest
import errno
import json
import os
from pathlib import Path

import pytest

from helpers import cli, inference, workspace
from helpers.models import TINY, profile
from helpers.serve import batch

QUESTIONS = [f"Which animal does {name} keep?" for name in ("Edith", "Otto", "Ida", "Bruno")]
BODY = {"model": "mine", "messages": [{"role": "user", "content": QUESTIONS[0]}], "max_tokens": 12}
LINES = [
    *({"question": question, "answer": "not asked for", "max_tokens": 12} for question in QUESTIONS),
    {"prompt": "Edith keeps a", "max_tokens": 5},
    {"custom_id": "a", "method": "POST", "url": "/v1/chat/completions", "body": BODY},
    {"custom_id": "b", "method": "POST", "url": "/v1/completions", "body": {"prompt": "Otto lives", "max_tokens": 5}},
    {"prompt": "a long story " * 400},
    {"messages": BODY["messages"], "temperature": 2, "max_tokens": 12},
]


def written(file, lines):
    file.write_text("".join(json.dumps(line) + "\n" for line in lines), encoding="utf-8")
    return file


def read(file):
    return [json.loads(line) for line in file.read_text(encoding="utf-8").split("\n")[:-1]]


@pytest.fixture(scope="module")
def answered(tmp_path_factory):
    """(what was measured, the lines) of LINES answered at one go."""
    folder = tmp_path_factory.mktemp("batch")
    made = batch.answer(TINY, profile("tiny"), written(folder / "p.jsonl", LINES), folder / "a.jsonl")
    assert [path.name for path in sorted(folder.iterdir())] == ["a.jsonl", "p.jsonl"]
    return made, read(folder / "a.jsonl")


def test_examples_in_docstrings():
    assert doctest.testmod(batch).failed == 0


def test_every_line_is_answered_as_it_is_alone_in_the_order_of_the_file(answered):
    made, lines = answered
    loaded = inference.load(TINY, profile("tiny"))
    for given, line in zip(LINES[:4], lines, strict=False):
        (alone,) = inference.batch_generate(loaded, [[{"role": "user", "content": given["question"]}]], 12)
        counts = {"prompt_tokens": alone.prompt_tokens, "completion_tokens": 12}
        counts["total_tokens"] = alone.prompt_tokens + 12
        said = {"text": alone.text.lstrip(), "finish_reason": "length", "usage": counts}
        assert line == given | {"generated": said}
    assert lines[4]["generated"]["text"] == inference.batch_generate(loaded, ["Edith keeps a"], 5)[0].text
    chat, text = lines[5]["response"]["body"], lines[6]["response"]["body"]
    assert lines[5]["custom_id"] == "a" and lines[5]["error"] is None and lines[5]["response"]["status_code"] == 200
    assert chat["choices"][0]["message"] == {"role": "assistant", "content": lines[0]["generated"]["text"]}
    assert chat["object"] == "chat.completion" and chat["model"] == "mine"
    assert text["object"] == "text_completion" and text["usage"]["completion_tokens"] == 5
    assert lines[7]["generated"] is None and "this model's context is 512" in lines[7]["error"]["message"]
    assert lines[8]["generated"]["text"] != lines[0]["generated"]["text"], "its own temperature"
    assert made["answers"] == 9 and made["without_an_answer"] == 1 and made["tokens"] == 6 * 12 + 2 * 5


def test_answers_are_shown_and_the_next_file_takes_another_name(answered, tmp_path):
    file = written(tmp_path / "a.jsonl", answered[1])
    shown = batch.first(file, rows=8)
    assert shown[0] == {"asked": QUESTIONS[0], "answered": answered[1][0]["generated"]["text"]}
    assert shown[4]["asked"] == "Edith keeps a" and "context is 512" in shown[7]["answered"]
    assert shown[5]["asked"] == "a" and shown[5]["answered"] == shown[0]["answered"]
    assert batch.free(file) == written(tmp_path / "a-2.jsonl", []).absolute()
    assert batch.free(file).name == "a-3.jsonl" and batch.free(tmp_path / "b.jsonl").name == "b.jsonl"


def test_a_stop_text_ends_an_answer_and_is_not_part_of_it(answered, tmp_path):
    whole = answered[1][0]["generated"]["text"]
    line = {"question": QUESTIONS[0], "max_tokens": 12, "stop": whole[5:8]}
    batch.answer(TINY, profile("tiny"), written(tmp_path / "p.jsonl", [line]), tmp_path / "a.jsonl")
    said = read(tmp_path / "a.jsonl")[0]["generated"]
    assert said["text"] == whole[: whole.index(whole[5:8])] and said["finish_reason"] == "stop"


def test_who_is_stopped_goes_on_and_another_batch_is_not_mixed_in(answered, tmp_path, monkeypatch):
    prompts, output = written(tmp_path / "p.jsonl", LINES), tmp_path / "a.jsonl"
    command = ["serve", "--profile", "tiny", "--model", str(TINY), "--batch", str(prompts), "--output", str(output)]
    monkeypatch.setattr(batch, "TOGETHER", 2)
    generate, calls = batch.batch_generate, []

    def stopped(*arguments, **settings):
        calls.append(len(arguments[1]))
        if len(calls) == 3:
            raise KeyboardInterrupt
        return generate(*arguments, **settings)

    monkeypatch.setattr(batch, "batch_generate", stopped)
    assert cli.main(command) == cli.FAILED
    kept = tmp_path / "a.jsonl.partial" / batch.ANSWERS
    done = len(read(kept))
    assert not output.exists() and done == sum(calls[:2]) + 1, "the line that is too long came first"
    with kept.open("a", encoding="utf-8") as file:
        file.write('{"row": 1, "reply": {"te')  # as a kill in the middle of a write leaves it
    with pytest.raises(ValueError, match="holds the answers of another batch"):
        batch.answer(TINY, profile("tiny"), prompts, output, max_tokens=3)
    monkeypatch.setattr(batch, "batch_generate", generate)
    made = batch.answer(TINY, profile("tiny"), prompts, output)
    assert made["answered_before"] == done and made["answers"] == len(LINES)
    greedy = [line.get("generated") for line in read(output)[:5]]
    assert greedy == [line.get("generated") for line in answered[1][:5]]
    assert not kept.parent.exists()
    assert cli.main(command) == cli.WRONG_REQUEST, "answers that are there are not written over"


def test_the_longest_go_first_with_their_like_and_no_batch_is_larger_than_its_room():
    rows = [batch.request(n, {"prompt": "x", "max_tokens": 1 + n % 2}) for n in range(20)]
    wishes = {row.number: batch.Wish([0] * (3 * row.number + 1), row.asks.max_tokens) for row in rows}
    found = list(batch.batches(rows, wishes, room_tokens=100))
    assert sorted(row.number for some in found for row in some) == list(range(20))
    for some in found:
        lengths = [len(wishes[row.number].ids) for row in some]
        assert lengths == sorted(lengths, reverse=True)
        assert len({wishes[row.number].max_tokens for row in some}) == 1
        assert len(some) == 1 or len(some) * (lengths[0] + wishes[some[0].number].max_tokens) <= 100


@pytest.mark.parametrize(
    ("line", "said"),
    [
        ("{no", "line 2 is not JSON"),
        ("[]", "line 2 is no request: it is not a JSON object"),
        ("{}", "line 2 is no request: messages is missing"),
        ('{"question": 3}', "line 2 is no request: messages"),
        ('{"question": "a", "n": 2}', "n is not served"),
        ('{"question": "a", "generated": "b"}', "has a field generated already"),
        ('{"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]}', "the assistant's"),
        ('{"custom_id": "a", "url": "/v1/embeddings", "body": {}}', "its url is /v1/embeddings"),
        ('{"question": "a", "note": "\\ud83d"}', "\\ud83d is half a character"),
    ],
)
def test_a_line_that_is_no_request_is_named_before_the_model_is_opened(line, said, tmp_path, monkeypatch):
    monkeypatch.setattr(batch, "load", lambda *arguments: pytest.fail("the model was opened"))
    (tmp_path / "p.jsonl").write_text(f'{{"question": "a"}}\n{line}\n')
    with pytest.raises(ValueError) as caught:
        batch.answer(TINY, profile("tiny"), tmp_path / "p.jsonl", tmp_path / "a.jsonl")
    assert said in str(caught.value) and "\n" not in str(caught.value)
    assert [path.name for path in tmp_path.iterdir()] == ["p.jsonl"]


def test_a_line_ends_where_json_lines_end_and_nowhere_else(tmp_path):
    asked = ["one\u2028two\x85three\u2029", "🐿️ مرحبا"]
    text = "\r\n".join(json.dumps({"question": one}, ensure_ascii=False) for one in asked)
    (tmp_path / "p.jsonl").write_bytes(b"\xef\xbb\xbf" + text.encode() + b"\r\n\r\n")
    made = batch.answer(TINY, profile("tiny"), tmp_path / "p.jsonl", tmp_path / "a.jsonl", max_tokens=2)
    assert made["answers"] == 2 and [line["question"] for line in read(tmp_path / "a.jsonl")] == asked


def test_two_requests_of_one_name_are_told_apart_by_nobody(tmp_path):
    line = {"custom_id": "a", "url": "/v1/completions", "body": {"prompt": "Edith"}}
    file = written(tmp_path / "p.jsonl", [line, line | {"custom_id": "b"}, line])
    with pytest.raises(ValueError, match=r"line 3 is no request: its custom_id a is that of line 1 already"):
        list(batch.read(file))


def test_a_full_disk_is_one_sentence_and_what_was_answered_is_kept(tmp_path, monkeypatch):
    prompts, output = written(tmp_path / "p.jsonl", LINES[:4]), tmp_path / "a.jsonl"
    monkeypatch.setattr(batch, "TOGETHER", 2)
    synced, batches = os.fsync, []

    def full(descriptor):
        if Path(f"/proc/self/fd/{descriptor}").readlink().name == batch.ANSWERS:
            batches.append(descriptor)
            if len(batches) == 2:
                raise OSError(errno.ENOSPC, "No space left on device")
        synced(descriptor)

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(workspace.StorageError, match=r"No space left.*GiB free.*what was answered is kept"):
        batch.answer(TINY, profile("tiny"), prompts, output, max_tokens=2)
    assert not output.exists()
    monkeypatch.setattr(os, "fsync", synced)
    made = batch.answer(TINY, profile("tiny"), prompts, output, max_tokens=2)
    assert made["answered_before"] >= 2 and [line["question"] for line in read(output)] == QUESTIONS


def test_files_that_hold_no_prompts_are_one_sentence(tmp_path):
    (tmp_path / "empty.jsonl").write_text("\n")
    (tmp_path / "bytes.jsonl").write_bytes(b"\xff\xfe")
    for name, said in (("empty", "holds no prompt"), ("bytes", "cannot be read"), ("none", "cannot be read")):
        with pytest.raises(ValueError, match=said):
            batch.answer(TINY, profile("tiny"), tmp_path / f"{name}.jsonl", tmp_path / "a.jsonl")
    prompts = written(tmp_path / "p.jsonl", LINES)
    with workspace.exclusive(tmp_path / "a.jsonl.partial"), pytest.raises(ValueError, match="in use by another"):
        batch.answer(TINY, profile("tiny"), prompts, tmp_path / "a.jsonl")
