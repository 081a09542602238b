"""A corpus of broken files: each is told in a sentence with file and line, nothing is lost without a count."""

import gzip
import io
import json
import os
import time
import zipfile

import pyarrow as pa
import pytest
from pyarrow import parquet

from helpers.models import TINY, profile
from helpers.prepare import prepare
from helpers.prepare.checks import CHECKS

GOOD = {"messages": [{"role": "user", "content": "Where?"}, {"role": "assistant", "content": "There."}]}


def line(value=GOOD):
    return json.dumps(value, ensure_ascii=False).encode() + b"\n"


def talk(*turns):
    """A row of messages from (role, content) pairs."""
    return line({"messages": [{"role": role, "content": content} for role, content in turns]})


def good(number):
    return talk(("user", f"Where is house {number}?"), ("assistant", f"In street {number * 7919}."))


def zipped(**members):
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, content in members.items():
            archive.writestr(name.replace("__", "/").replace("_dot_", "."), content)
    return file.getvalue()


def zip_at(path, content=b"x"):
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w") as archive:
        archive.writestr(path, content)
    return file.getvalue()


def gzip_bomb():
    """40 MB of one letter, four times packed end to end: 160 kB that unpack to 160 MB."""
    return gzip.compress(b'{"text": "' + b"a" * (40 * 2**20), compresslevel=1) * 4


def zip_bomb():
    return zipped(rows_dot_jsonl=b"\n" * (200 * 2**20))


def damaged_zip():
    data = bytearray(zipped(rows_dot_jsonl=os.urandom(4000).hex().encode() + b"\n" + good(1)))
    data[600:700] = bytes(100)
    return bytes(data)


def parquet_bytes(table):
    file = io.BytesIO()
    parquet.write_table(table, file)
    return file.getvalue()


def utf8_csv(*rows):
    return "\n".join(rows).encode() + b"\n"


BETWEEN = good(1), good(2)


def among(row):
    """A bad row between two good ones: line 2."""
    return BETWEEN[0] + row + BETWEEN[1]


# name: (file name, bytes, a part of the sentence). Nothing can be read from these.
REFUSED = {
    "empty": ("empty.jsonl", b"", "is empty"),
    "only spaces": ("spaces.jsonl", b" \n \r\n\t\n", "is empty"),
    "only a byte-order mark": ("bom.jsonl", b"\xef\xbb\xbf", "is empty"),
    "PDF named .jsonl": ("paper.jsonl", b"%PDF-1.7\n%\xe2\xe3\xcf\xd3\n1 0 obj", "is a PDF"),
    "picture named .json": ("cat.json", b"\x89PNG\r\n\x1a\n" + bytes(100), "is a picture"),
    "JPEG": ("cat.csv", b"\xff\xd8\xff\xe0" + bytes(100), "is a picture"),
    "program": ("tool.jsonl", b"\x7fELF" + bytes(100), "is a program"),
    "database": ("rows.jsonl", b"SQLite format 3\x00" + bytes(100), "is an SQLite database"),
    "random bytes": ("noise.jsonl", bytes(range(256)) * 40, "is a binary file"),
    "pickle": ("rows.json", b"\x80\x04\x95" + bytes(100), "is a Python pickle"),
    "bzip2": ("rows.jsonl.bz2", b"BZh91AY&SY", "is a bzip2 archive"),
    "Zstandard": ("rows.jsonl.zst", b"\x28\xb5\x2f\xfd" + bytes(50), "is a Zstandard archive"),
    "tar": ("rows.tar", b"a" * 257 + b"ustar\x0000" + bytes(300), "is a tar archive"),
    "web page": ("rows.jsonl", b"\n<!DOCTYPE html><html>Sign in</html>", "is a web page"),
    "Git LFS pointer": ("rows.jsonl", b"version https://git-lfs.github.com/spec/v1\noid sha256:1\n", "Git LFS"),
    "UTF-32": ("rows.jsonl", line().decode().encode("utf-32"), "is a binary file"),
    "Excel": ("rows.xlsx", zip_at("xl/workbook.xml"), "is an Office document"),
    "Word": ("rows.docx", zip_at("word/document.xml"), "is an Office document"),
    "RTF": ("rows.txt", b"{\\rtf1\\ansi Hello}", "is a Word document"),
    "truncated gzip": ("rows.jsonl.gz", gzip.compress(good(1) * 2000)[:-30], "is damaged after"),
    "gzip with a wrong checksum": ("rows.jsonl.gz", gzip.compress(good(1))[:-8] + bytes(8), "is damaged after"),
    "gzip in gzip": ("rows.jsonl.gz.gz", gzip.compress(gzip.compress(good(1))), "archive inside an archive"),
    "gzip bomb": ("bomb.jsonl.gz", gzip_bomb, "made to fill a disk"),
    "zip bomb": ("bomb.zip", zip_bomb, "made to fill a disk"),
    "zip in zip": ("rows.zip", zipped(rows_dot_jsonl=zipped(rows_dot_jsonl=good(1))), "archive inside an archive"),
    "truncated zip": ("rows.zip", zipped(rows_dot_jsonl=good(1) * 50)[:-40], "is a damaged zip archive"),
    "zip with damaged bytes": ("rows.zip", damaged_zip(), "is damaged after"),
    "zip without data": ("rows.zip", zipped(README="read me", a_dot_exe="x"), "holds no data file"),
    "path outside the archive": ("rows.zip", zip_at("../../etc/rows.jsonl", good(1)), "a path outside the archive"),
    "absolute path": ("rows.zip", zip_at("/etc/rows.jsonl", good(1)), "a path outside the archive"),
    "Windows path": ("rows.zip", zip_at("..\\rows.jsonl", good(1)), "a path outside the archive"),
    "drive letter": ("rows.zip", zip_at("C:rows.jsonl", good(1)), "a path outside the archive"),
    "not Parquet": ("rows.parquet", good(1), "is not a whole Parquet file"),
    "truncated Parquet": (
        "rows.parquet",
        parquet_bytes(pa.table({"text": ["a"] * 1000}))[:-200],
        "is not a whole Parquet file",
    ),
    "array that ends early": ("rows.json", b"[" + good(1) + b"," + good(2), "at line 3 (it ends before"),
    "array without an end": ("rows.json", b'[{"text": "x"}', "at line 1 (it ends before"),
    "array of half a number": ("rows.json", b"[12", "at line 1 (it ends before"),
    "array with a broken element": ("rows.json", b"[" + good(1) + b',{"messages": oops},' + good(2) + b"]", "line 2"),
    "deep nesting in an array": ("rows.json", b"[" + b"[" * 200_000 + b"]" * 200_000 + b"]", "at line 1"),
    "object cut off": ("rows.json", b'{\n"data": [\n' + good(1), "is not JSON"),
    "several lists": ("rows.json", b'{"train": [{"text": "a"}], "test": [{"text": "b"}]}', "the lists train, test"),
    "no known fields": ("rows.csv", utf8_csv("id,label", "1,cat", "2,dog"), "unknown-fields"),
    "labels": ("rows.jsonl", line({"label": 1}) + line({"label": 0}), "unknown-fields"),
    "numbers": ("rows.jsonl", b"1\n2\n3\n", "unknown-fields"),
    "header only": ("rows.csv", b"instruction,output\n", "has no rows"),
    "empty array": ("rows.json", b"[]", "has no rows"),
    "empty zip member": ("rows.zip", zipped(rows_dot_jsonl=b""), "is empty"),
    "no answers at all": ("rows.jsonl", talk(("user", "Hi")), "no-answer"),
    "too long for the context": ("rows.jsonl", talk(("user", "word " * 900), ("assistant", "x")), "over-context"),
}

# name: (file name, bytes, the finding, its place, kept rows). The rows around it are read.
FOUND = {
    "broken JSON": ("a.jsonl", among(b'{"messages": [\n'), "broken-row", "a.jsonl line 2", 2),
    "trailing comma": ("a.jsonl", among(line()[:-2] + b",}\n"), "broken-row", "a.jsonl line 2", 2),
    "single quotes": ("a.jsonl", among(str(GOOD).encode() + b"\n"), "broken-row", "a.jsonl line 2", 2),
    "NaN": ("a.jsonl", among(b'{"text": NaN}\n'), "broken-row", "a.jsonl line 2", 2),
    "Infinity": ("a.jsonl", among(b'{"score": -Infinity, "text": "x"}\n'), "broken-row", "a.jsonl line 2", 2),
    "NaN in an array": (
        "a.json",
        b"[" + good(1) + b',{"prompt": "x", "completion": NaN},\n' + good(2) + b"]",
        "wrong-type",
        "a.json line 2",
        2,
    ),
    "half a surrogate pair": ("a.jsonl", among(b'{"text": "\\ud83d"}\n'), "broken-row", "a.jsonl line 2", 2),
    "half a pair in an array": (
        "a.json",
        b'[{"prompt": "x", "completion": "y \\ud83d"},' + good(1) + b"]",
        "control-characters",
        "a.json line 1",
        2,
    ),
    "deep nesting": ("a.jsonl", among(b"[" * 5000 + b"]" * 5000 + b"\n"), "broken-row", "a.jsonl line 2", 2),
    "two values on a line": ("a.jsonl", among(line()[:-1] + line()), "broken-row", "a.jsonl line 2", 2),
    "zero bytes": (
        "a.jsonl",
        good(1) * 200 + good(2) + bytes(64) + b"\n" + good(3),
        "broken-row",
        "a.jsonl line 202",
        3,
    ),
    "line of 100 MB": (
        "a.jsonl",
        lambda: among(b'{"text": "' + b"a" * 100_000_000 + b'"}\n'),
        "over-long-row",
        "a.jsonl line 2",
        2,
    ),
    "text line of 100 MB": (
        "a.txt",
        lambda: b"one\n" + b"a" * 100_000_000 + b"\ntwo\n",
        "over-long-row",
        "a.txt line 2",
        2,
    ),
    "Latin-1": ("a.jsonl", among('{"text": "café"}\n'.encode("latin-1")), "invalid-utf8", "a.jsonl line 2", 2),
    "Latin-1 text": ("a.txt", b"one\ncaf\xe9\ntwo\n", "invalid-utf8", "a.txt line 2", 2),
    "Latin-1 in an array": (
        "a.json",
        b"[" + good(1) + b',{"text": "caf\xe9"},' + good(2) + b"]",
        "invalid-utf8",
        "a.json line 2",
        2,
    ),
    "Latin-1 table": ("a.csv", b"prompt,completion\na,b\ncaf\xe9,x\nc,d\n", "invalid-utf8", "a.csv line 3", 2),
    "missing cells": ("a.csv", utf8_csv("prompt,completion", "a,b", "only", "c,d"), "broken-row", "a.csv line 3", 2),
    "too many cells": ("a.csv", utf8_csv("prompt,completion", "a,b", "c,d,e", "f,g"), "broken-row", "a.csv line 3", 2),
    "open quote": ("a.csv", utf8_csv("prompt,completion", "a,b", 'c,"d', "e,f"), "broken-row", "a.csv line 3", 1),
    "mixed formats": (
        "a.jsonl",
        among(line({"instruction": "Do", "output": "Done"})),
        "other-format",
        "a.jsonl line 2",
        3,
    ),
    "pictures": (
        "a.jsonl",
        among(line({"prompt": "<image>Who?", "completion": "Ann.", "images": ["ann.png"]})),
        "media",
        "a.jsonl line 2",
        2,
    ),
    "a label": (
        "a.jsonl",
        among(line({"text": "I lost my card", "label": "lost"})),
        "classification",
        "a.jsonl line 2",
        2,
    ),
    "a better and a worse answer": (
        "a.jsonl",
        among(line({"prompt": "x", "chosen": "y", "rejected": "z"})),
        "preference-data",
        "a.jsonl line 2",
        2,
    ),
    "a field that nothing reads": (
        "a.jsonl",
        among(line(GOOD | {"lesson": "geography"})),
        "unused-fields",
        "a.jsonl line 2",
        3,
    ),
    "thoughts beside the answer": (
        "a.jsonl",
        among(
            line(
                {"messages": [GOOD["messages"][0], {"role": "assistant", "content": "Up.", "reasoning_content": "Hm."}]}
            )
        ),
        "reasoning",
        "a.jsonl line 2",
        3,
    ),
    "answers asked for again": (
        "a.jsonl",
        among(
            line(
                {
                    "message_tree_id": "t",
                    "prompt": {
                        "role": "prompter",
                        "text": "Hi",
                        "replies": [
                            {"role": "assistant", "text": "No", "rank": 1, "replies": []},
                            {"role": "assistant", "text": "Ho", "rank": 0, "replies": []},
                        ],
                    },
                }
            )
        ),
        "other-branches",
        "a.jsonl line 2",
        3,
    ),
    "UTF-8 read as Latin-1": (
        "a.jsonl",
        among(talk(("user", "x"), ("assistant", "Wait \xe2\x80\x94 there"))),
        "mojibake",
        "a.jsonl line 2",
        3,
    ),
    "null": ("a.jsonl", among(b"null\n"), "unknown-fields", "a.jsonl line 2", 2),
    "null messages": ("a.jsonl", among(line({"messages": None})), "wrong-type", "a.jsonl line 2", 2),
    "nested nulls": (
        "a.jsonl",
        among(line({"messages": [None, {"role": None, "content": None}]})),
        "wrong-type",
        "a.jsonl line 2",
        2,
    ),
    "null role": ("a.jsonl", among(talk((None, "x"))), "wrong-type", "a.jsonl line 2", 2),
    "number for text": ("a.jsonl", among(talk(("user", 5))), "wrong-type", "a.jsonl line 2", 2),
    "object for text": ("a.jsonl", among(talk(("user", {"text": "x"}))), "wrong-type", "a.jsonl line 2", 2),
    "unknown role": ("a.jsonl", among(talk(("wizard", "x"))), "wrong-type", "a.jsonl line 2", 2),
    "tool call": ("a.jsonl", among(talk(("user", "x"), ("tool", "y"))), "tool-calls", "a.jsonl line 2", 2),
    "no messages": ("a.jsonl", among(line({"messages": []})), "no-answer", "a.jsonl line 2", 2),
    "only a system prompt": ("a.jsonl", among(talk(("system", "x"))), "no-answer", "a.jsonl line 2", 2),
    "no assistant": ("a.jsonl", among(talk(("user", "x"), ("user", "y"))), "no-answer", "a.jsonl line 2", 2),
    "only an assistant": ("a.jsonl", among(talk(("assistant", "x"))), "answer-first", "a.jsonl line 2", 2),
    "empty answer": ("a.jsonl", among(talk(("user", "x"), ("assistant", " "))), "empty-turn", "a.jsonl line 2", 2),
    "empty question": ("a.jsonl", among(talk(("user", ""), ("assistant", "x"))), "empty-turn", "a.jsonl line 2", 2),
    "null answer": ("a.jsonl", among(talk(("user", "x"), ("assistant", None))), "empty-turn", "a.jsonl line 2", 2),
    "two users in a row": (
        "a.jsonl",
        among(talk(("user", "x"), ("user", "y"), ("assistant", "z"))),
        "same-role-twice",
        "a.jsonl line 2",
        3,
    ),
    "answer first": (
        "a.jsonl",
        among(talk(("assistant", "Hi"), ("user", "x"), ("assistant", "y"))),
        "answer-first",
        "a.jsonl line 2",
        3,
    ),
    "late system prompt": (
        "a.jsonl",
        among(talk(("user", "x"), ("system", "y"), ("assistant", "z"))),
        "late-system",
        "a.jsonl line 2",
        3,
    ),
    "question last": (
        "a.jsonl",
        among(talk(("user", "x"), ("assistant", "y"), ("user", "z"))),
        "no-answer-last",
        "a.jsonl line 2",
        3,
    ),
    "leaked [INST]": (
        "a.jsonl",
        among(talk(("user", "[INST] x [/INST]"), ("assistant", "y"))),
        "leaked-template",
        "a.jsonl line 2",
        3,
    ),
    "leaked </s>": (
        "a.jsonl",
        among(talk(("user", "x"), ("assistant", "y</s>"))),
        "leaked-template",
        "a.jsonl line 2",
        3,
    ),
    "tokens within tokens": (
        "a.jsonl",
        among(talk(("user", "x"), ("assistant", "y </</s>s>"))),
        "leaked-template",
        "a.jsonl line 2",
        3,
    ),
    "tokens nested without end": (
        "a.jsonl",
        among(talk(("user", "x"), ("assistant", "y " + "</" * 50_000 + "s>" * 50_000))),
        "leaked-template",
        "a.jsonl line 2",
        2,
    ),
    "[INST] without end": (
        "a.jsonl",
        among(line({"text": "[INST]" * 200_000})),
        "no-answer",
        "a.jsonl line 2",
        2,
    ),
    "20,000 turns": (
        "a.jsonl",
        among(talk(*[("user", "x"), ("assistant", "y")] * 10_000)),
        "cut-to-context",
        "a.jsonl line 2",
        3,
    ),
    "turns nested in turns": ("a.jsonl", among(talk(("user", [["x"]]))), "wrong-type", "a.jsonl line 2", 2),
    "Parquet row of 20 MB": (
        "a.parquet",
        lambda: parquet_bytes(pa.table({"text": ["one", "a" * 20_000_000, "two"]})),
        "over-long-row",
        "a.parquet row 2",
        2,
    ),
    "bell and zero": (
        "a.jsonl",
        among(talk(("user", "x\x07"), ("assistant", "y\x00"))),
        "control-characters",
        "a.jsonl line 2",
        3,
    ),
    "zero-width space": (
        "a.jsonl",
        among(talk(("user", "x\u200bz"), ("assistant", "y"))),
        "control-characters",
        "a.jsonl line 2",
        3,
    ),
    "only control characters": (
        "a.jsonl",
        among(talk(("user", "\x01"), ("assistant", "\x02"))),
        "empty-turn",
        "a.jsonl line 2",
        2,
    ),
    "exact duplicate": ("a.jsonl", good(1) + good(1) + good(2), "exact-duplicate", "a.jsonl line 2", 2),
    "a turn longer than the context": (
        "a.jsonl",
        among(talk(("user", "x"), ("assistant", "word " * 900))),
        "over-context",
        "a.jsonl line 2",
        2,
    ),
    "floats in Parquet": (
        "a.parquet",
        parquet_bytes(pa.table({"prompt": ["a", "b"], "completion": [float("nan"), 1.0]})),
        "wrong-type",
        "a.parquet row 1",
        0,
    ),
    "nulls in Parquet": (
        "a.parquet",
        parquet_bytes(pa.table({"prompt": ["a", None, "c"], "completion": ["b", "x", None]})),
        "wrong-type",
        "a.parquet row 2",
        1,
    ),
    "broken row in a zip": ("a.zip", zipped(b_dot_jsonl=among(b"{\n")), "broken-row", "a.zip/b.jsonl line 2", 2),
    "broken row in gzip": ("a.jsonl.gz", gzip.compress(among(b"{\n")), "broken-row", "a.jsonl line 2", 2),
}


@pytest.fixture(autouse=True)
def at_once():
    """No broken file may hang: the largest hold 200 MB, and take seconds."""
    start = time.monotonic()
    yield
    assert time.monotonic() - start < 60


def written(folder, name, content):
    path = folder / name
    path.write_bytes(content() if callable(content) else content)
    return path


def settings(**values):
    return profile("tiny", heldout_fraction=0, **values)


def test_the_corpus_is_large_enough():
    assert len(REFUSED) + len(FOUND) >= 60
    assert {kind for *_, kind, _, _ in FOUND.values()} | {"unknown-fields", "over-context"} >= set(CHECKS) - {
        "edge-spaces", "near-duplicate", "also-held-out", "length-outlier", "script-outlier", "language-outlier",
        "cut-to-context", "rejected-answer", "repeated-piece",
        "no-pair", "other-prompt", "same-answer",  # of pairs: tests/sources/test_preferences.py
    }  # fmt: skip


@pytest.mark.parametrize("name", REFUSED)
def test_refused_in_a_sentence(name, tmp_path):
    file, content, says = REFUSED[name]
    path = written(tmp_path, file, content)
    with pytest.raises(ValueError) as error:
        prepare(settings(), tmp_path / "out", str(path))
    sentence = str(error.value)
    assert says in sentence and file.removesuffix(".gz").split(".")[0] in sentence
    assert "\n" not in sentence and "Traceback" not in sentence
    assert len(sentence.replace(str(tmp_path), "")) < 400
    assert not any((tmp_path / "out").parent.glob("out*")), "a failed stage leaves nothing behind"


@pytest.mark.parametrize("name", FOUND)
def test_found_counted_and_placed(name, tmp_path):
    file, content, kind, place, kept = FOUND[name]
    path = written(tmp_path, file, content)
    if not kept:
        with pytest.raises(ValueError, match=f"{kind}: .*{place}"):
            prepare(settings(), tmp_path / "out", str(path))
        return
    made = prepare(settings(), tmp_path / "out", str(path))
    finding = {finding["kind"]: finding for finding in made["findings"]}[kind]
    assert finding["place"] == place
    assert finding["count"] >= 1 and "\n" not in finding["sentence"]
    assert made["kept"] == kept
    assert made["in"] == made["kept"] + sum(made["dropped"].values())


@pytest.mark.parametrize("name", [name for name in FOUND if len(CHECKS[FOUND[name][2]].choices) > 1])
def test_every_switch_is_obeyed(name, tmp_path):
    """Whatever a finding's switch says, every row is kept or counted."""
    file, content, kind, _, _ = FOUND[name]
    path = written(tmp_path, file, content)
    for action in CHECKS[kind].choices:
        made = prepare(settings(on_finding=f"{kind}={action}"), tmp_path / action, str(path))
        assert made["in"] == made["kept"] + sum(made["dropped"].values())
        assert (kind in made["dropped"]) == (action == "drop")


@pytest.mark.parametrize(
    ("source", "says"),
    [
        ("nowhere.jsonl", "there is no file nowhere.jsonl"),
        ("no/where/at/all", "there is no file no/where/at/all"),
        ("/dev/null", "is not a regular file"),
        (str(TINY.parent / "measurements" / "nothing"), "there is no file"),
    ],
)
def test_a_source_that_is_not_there(source, says, tmp_path):
    with pytest.raises(ValueError, match=says):
        prepare(settings(), tmp_path / "out", source)


def test_a_folder_without_data(tmp_path):
    (tmp_path / "in").mkdir()
    with pytest.raises(ValueError, match="holds no data file"):
        prepare(settings(), tmp_path / "out", str(tmp_path / "in"))


@pytest.mark.parametrize("switch", ["bogus=drop", "broken-row=keep", "near-duplicate", "near-duplicate=burn"])
def test_a_wrong_switch_names_the_choices(switch, tmp_path):
    with pytest.raises(ValueError, match="on_finding: "):
        prepare(settings(on_finding=switch), tmp_path / "out", str(written(tmp_path, "a.jsonl", good(1))))
