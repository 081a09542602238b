"""The same conversations in every format give the same tokens and masks."""

import csv
import doctest
import gzip
import importlib
import json
import pkgutil
import random
import zipfile

import pyarrow as pa
import pytest
from datasets import load_from_disk
from pyarrow import parquet

import helpers.prepare
import helpers.sources
from helpers.models import profile
from helpers.prepare import prepare
from helpers.sources.formats import BadRow, from_flattened, recognise, to_messages

WORDS = [
    "river",
    "stone",
    "lamp\nbread",
    "«quoted»",
    "12,5",
    "naïve",
    "日本",
    "|",
    "a;b",
    '"said"',
    "[1, 2]",
    "🙂",
    "{x}",
]


def conversations():
    """Twenty, of one to four exchanges, every third with a system prompt, with commas, quotes and line breaks."""
    rng = random.Random(3)

    def text():
        return " ".join(rng.choices(WORDS, k=rng.randint(1, 6))) + f" {rng.randint(0, 10**6)}"

    made = []
    for i in range(20):
        system = [{"role": "system", "content": text()}] if i % 3 == 0 else []
        turns = [{"role": role, "content": text()} for _ in range(rng.randint(1, 4)) for role in ("user", "assistant")]
        made.append(system + turns)
    return made


def jsonl(rows):
    return "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows).encode()


def table(rows, path, **options):
    with path.open("w", encoding="utf-8", newline="") as stream:
        writer = csv.DictWriter(stream, fieldnames=list(rows[0]), **options)
        writer.writeheader()
        writer.writerows(rows)


def as_sharegpt(talk):
    names = {"system": "system", "user": "human", "assistant": "gpt"}
    return {"conversations": [{"from": names[turn["role"]], "value": turn["content"]} for turn in talk]}


def as_alpaca(talk):
    system = talk[0]["content"] if talk[0]["role"] == "system" else ""
    turns = [turn["content"] for turn in talk if turn["role"] != "system"]
    history = [turns[i : i + 2] for i in range(0, len(turns) - 2, 2)]
    return {"instruction": turns[-2], "input": "", "output": turns[-1], "system": system, "history": history}


def as_hashes(talk):
    names = {"system": "System", "user": "Human", "assistant": "Assistant"}
    return {"text": "".join(f"### {names[turn['role']]}: {turn['content']}" for turn in talk)}


def as_inst(talk):
    text, system = "", ""
    for turn in talk:
        if turn["role"] == "system":
            system = f"<<SYS>>\n{turn['content']}\n<</SYS>>\n\n"
        elif turn["role"] == "user":
            text, system = f"{text}<s>[INST] {system}{turn['content']} [/INST]", ""
        else:
            text += f" {turn['content']} </s>"
    return {"text": text}


def as_chatml(talk):
    return {"text": "".join(f"<|im_start|>{turn['role']}\n{turn['content']}<|im_end|>\n" for turn in talk)}


def as_parts(talk):
    parts = [{"role": turn["role"], "content": [{"type": "text", "text": turn["content"]}]} for turn in talk]
    return {"id": 7, "messages": parts, "weight": 0.5}


def write(name, folder):
    """A file that holds the conversations in one way."""
    talks = conversations()
    rows = [{"messages": talk} for talk in talks]
    cells = [{"messages": json.dumps(talk)} for talk in talks]
    path = folder / name
    makers = {
        "messages.jsonl": lambda: path.write_bytes(jsonl(rows)),
        "windows.jsonl": lambda: path.write_bytes(b"\xef\xbb\xbf" + jsonl(rows).replace(b"\n", b"\r\n\r\n")),
        "bare-lists.jsonl": lambda: path.write_bytes(jsonl(talks)),
        "array.json": lambda: path.write_text(json.dumps(rows), encoding="utf-8"),
        "pretty.json": lambda: path.write_text(json.dumps(rows, indent=2), encoding="utf-8"),
        "object.json": lambda: path.write_text(json.dumps({"version": 1, "data": rows}), encoding="utf-8"),
        "lines.json": lambda: path.write_bytes(jsonl(rows)),
        "no-ending": lambda: path.write_bytes(jsonl(rows)),
        "parts.jsonl": lambda: path.write_bytes(jsonl(map(as_parts, talks))),
        "sharegpt.jsonl": lambda: path.write_bytes(jsonl(map(as_sharegpt, talks))),
        "sharegpt.json": lambda: path.write_text(json.dumps(list(map(as_sharegpt, talks))), encoding="utf-8"),
        "alpaca.json": lambda: path.write_text(json.dumps(list(map(as_alpaca, talks))), encoding="utf-8"),
        "pairs.jsonl": lambda: path.write_bytes(
            jsonl({"prompt": talk[:-1], "completion": talk[-1:]} for talk in talks)
        ),
        "preference.jsonl": lambda: path.write_bytes(
            jsonl({"prompt": talk[0]["content"], "chosen": talk, "rejected": talk[:-1]} for talk in talks)
        ),
        "hashes.jsonl": lambda: path.write_bytes(jsonl(map(as_hashes, talks))),
        "inst.jsonl": lambda: path.write_bytes(jsonl(map(as_inst, talks))),
        "chatml.jsonl": lambda: path.write_bytes(jsonl(map(as_chatml, talks))),
        "cells.csv": lambda: table(cells, path),
        "semicolons.csv": lambda: table(cells, path, delimiter=";"),
        "python.csv": lambda: table([{"messages": str(talk)} for talk in talks], path),
        "hashes.tsv": lambda: table(list(map(as_hashes, talks)), path, delimiter="\t"),
        "rows.parquet": lambda: parquet.write_table(pa.Table.from_pylist(rows), path),
        "cells.parquet": lambda: parquet.write_table(pa.Table.from_pylist(cells), path),
        "rows.jsonl.gz": lambda: path.write_bytes(gzip.compress(jsonl(rows))),
    }
    makers[name]() if name in makers else write_zip(path, talks)
    return path


def write_zip(path, talks):
    """A zip with the rows in two files of other formats, and files that are not data."""
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("data/1.jsonl", jsonl({"messages": talk} for talk in talks[:10]))
        archive.writestr("data/2.json", json.dumps([{"messages": talk} for talk in talks[10:]]))
        archive.writestr("__MACOSX/data/._1.jsonl", b"\0\5\x16\7")
        archive.writestr("LICENSE", "free")


NAMES = [
    "messages.jsonl", "windows.jsonl", "bare-lists.jsonl", "array.json", "pretty.json", "object.json", "lines.json",
    "no-ending", "parts.jsonl", "sharegpt.jsonl", "sharegpt.json", "alpaca.json", "pairs.jsonl", "preference.jsonl",
    "hashes.jsonl", "inst.jsonl", "chatml.jsonl", "cells.csv", "semicolons.csv", "python.csv", "hashes.tsv",
    "rows.parquet", "cells.parquet", "rows.jsonl.gz", "rows.zip",
]  # fmt: skip


def prepared(path, output, **values):
    """(rows, measurements) of a file, everything on one side."""
    made = prepare(profile("tiny", heldout_fraction=0, **values), output, str(path))
    rows = load_from_disk(str(output / "train"))
    return [(row["input_ids"], row["assistant_masks"]) for row in rows], made


@pytest.fixture(scope="module")
def expected(tmp_path_factory):
    folder = tmp_path_factory.mktemp("expected")
    return prepared(write("messages.jsonl", folder), folder / "out")[0]


@pytest.mark.parametrize("name", NAMES)
def test_every_format_gives_the_same_tokens_and_masks(name, tmp_path, expected):
    use = "chosen" if name == "preference.jsonl" else "auto"
    rows, made = prepared(write(name, tmp_path), tmp_path / "out", use=use)
    assert rows == expected
    assert made["dropped"] == {} and made["in"] == made["kept"] == 20


MODULES = [
    f"{room.__name__}.{module.name}"
    for room in (helpers.prepare, helpers.sources)
    for module in pkgutil.iter_modules(room.__path__)
]


@pytest.mark.parametrize("name", ["helpers.prepare", *MODULES])
def test_examples_in_docstrings(name):
    assert doctest.testmod(importlib.import_module(name)).failed == 0


def test_a_folder_is_read_in_the_order_of_its_names(tmp_path, expected):
    write("messages.jsonl", tmp_path)
    (tmp_path / "notes.docx").write_bytes(b"PK nothing")
    assert prepared(tmp_path, tmp_path.parent / "folder-out")[0] == expected


@pytest.mark.parametrize("name", ["text.txt", "text.jsonl", "text.csv", "strings.json"])
def test_plain_text_gives_the_same_rows(name, tmp_path):
    texts = ["One line of text.", "Another, with a comma.", "naïve 日本"]
    path = tmp_path / name
    if name == "text.csv":
        table([{"text": text} for text in texts], path)
    else:
        path.write_bytes(
            {
                "text.txt": "\n\n".join(texts).encode(),
                "text.jsonl": jsonl({"text": text} for text in texts),
                "strings.json": json.dumps(texts).encode(),
            }[name]
        )
    rows, made = prepared(path, tmp_path / "out")
    assert made["formats"] == {"plain-text": 3}
    assert len(rows) == 3 and all(mask == [0] + [1] * (len(ids) - 1) and ids[-1] == 2 for ids, mask in rows)


def test_the_format_can_be_overruled(tmp_path):
    path = tmp_path / "text.jsonl"
    path.write_bytes(jsonl([{"text": "### Human: Hi### Assistant: Ho"}]))
    assert prepared(path, tmp_path / "a")[1]["formats"] == {"flattened-text": 1}
    rows, made = prepared(path, tmp_path / "b", source_format="plain-text")
    assert made["formats"] == {"plain-text": 1} and sum(rows[0][1]) == len(rows[0][0]) - 1


@pytest.mark.parametrize(
    ("row", "row_format"),
    [
        ({"prompt_id": "1", "prompt": "Hi", "messages": [{"role": "user", "content": "Hi"}]}, "messages"),
        ({"conversation": [{"from": "gpt", "value": "Hi"}]}, "sharegpt"),
        ({"instruction": "Do", "context": "", "response": "Done", "category": "x"}, "alpaca"),
        ({"question": "1+1", "answer": "2"}, "prompt-completion"),
        ({"query": "1+1", "response": "2"}, "prompt-completion"),
        ({"text": "### Instruction:\nDo\n### Response:\nDone"}, "flattened-text"),
        ({"text": "A text about [INSTALLING] things."}, "plain-text"),
        ("A line.", "plain-text"),
        ({"label": 3}, None),
        (17, None),
        (None, None),
    ],
)
def test_recognised(row, row_format):
    assert recognise(row) == row_format


def test_what_stands_before_the_first_role_is_a_system_prompt():
    text = "Below is a task.\n\n### Instruction:\nAdd.\n\n### Input:\n1 and 2\n\n### Response:\n3"
    assert from_flattened(text) == [
        {"role": "system", "content": "Below is a task."},
        {"role": "user", "content": "Add.\n\n1 and 2"},
        {"role": "assistant", "content": "3"},
    ]


def test_an_answer_that_looks_like_a_list_stays_a_text():
    row = {"prompt": "[1, 2]", "completion": '[{"name": "x"}]'}
    assert [turn["content"] for turn in to_messages(row, "prompt-completion")] == ["[1, 2]", '[{"name": "x"}]']


@pytest.mark.parametrize(
    ("row", "says"),
    [
        ({"messages": [{"role": "user", "content": 5}]}, "messages[0].content must be text, not 5"),
        ({"messages": [{"role": "user", "content": float("nan")}]}, "messages[0].content must be text, not nan"),
        ({"messages": [{"content": "x"}]}, "messages[0].role is missing"),
        ({"messages": [None]}, "messages[0] must be an object with role and content, not null"),
        ({"messages": "hello"}, "messages must be text"),
        ({"messages": {"role": "user"}}, "messages"),
        ({"messages": [{"role": "wizard", "content": "x"}]}, "the role 'wizard'"),
        ({"messages": [{"role": "assistant", "content": None, "tool_calls": [{}]}]}, "calls a tool"),
        ({"messages": [{"role": "user", "content": [{"type": "image_url"}]}]}, "image_url"),
        ({"conversations": [{"from": "human", "value": ["x"]}]}, "conversations[0].value must be text, not a list"),
        ({"instruction": "x", "output": None}, "output must be text, not null"),
        ({"prompt": None, "completion": "x"}, "prompt must be text, not null"),
    ],
)
def test_a_bad_field_is_named(row, says):
    with pytest.raises(BadRow) as error:
        to_messages(row, recognise(row) or "messages")
    assert says in str(error.value)
