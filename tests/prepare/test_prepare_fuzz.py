"""2,000 files spoiled by a seeded hand: each ends in rows that are counted, or in one sentence.

The road is the one of `prepare` up to the tokenizer; every hundredth file goes the whole of it. More:
PREPARE_FUZZ=20000 python -m pytest tests/prepare/test_prepare_fuzz.py
"""

import os
import random
import zipfile
from pathlib import Path

import pytest

from helpers.models import TINY, profile
from helpers.models.templates import Template
from helpers.prepare import Reading, conversations, load_tokenizer, prepare
from helpers.prepare.checks import Findings, actions

SHAPES = sorted(
    path
    for path in (Path(__file__).resolve().parents[1] / "sources" / "shapes").iterdir()
    if ".expected." not in path.name
)
FILES = int(os.environ.get("PREPARE_FUZZ", 2000))
JUNK = [
    b"\x00", b"\xff\xfe", b'"', b"\\", b"{", b"[", b"]}", b"\n", b"\r", b",", b";", b"null", b"NaN", b"1e999", b"[[[[",
    b"\xed\xa0\x80", b'{"a":', b"\\ud800", b"</s>", b"[INST]", b"\t", b"-", b"true", b"\xe9", "日本".encode(),
]  # fmt: skip


def spoiled(rng, content):
    """The bytes of a file with one to four things done to them."""
    content = bytearray(content)
    for _ in range(rng.randint(1, 4)):
        if not content:
            return b"\n"
        at, length = rng.randrange(len(content)), rng.randint(1, 40)
        what = rng.randrange(6)
        if what == 0:
            content[at] = rng.randrange(256)
        elif what == 1:
            content[at:at] = rng.choice(JUNK) * rng.choice((1, 1, 2, 50))
        elif what == 2:
            del content[at : at + length]
        elif what == 3:
            content[at:at] = content[rng.randrange(len(content)) :][:length]
        elif what == 4:
            del content[at:]
        else:
            content += rng.choice(SHAPES).read_bytes()
    return bytes(content)


@pytest.fixture(scope="module")
def template():
    return Template(load_tokenizer(TINY))


@pytest.mark.parametrize("part", range(4))
def test_a_spoiled_file_ends_in_rows_that_are_counted_or_in_one_sentence(part, tmp_path, template):
    rng, read, refused = random.Random(f"20261121 {part}"), 0, 0
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.txt").write_text("thesis")
    for i in range(FILES // 4):
        shape = rng.choice(SHAPES)
        path = tmp_path / rng.choice([shape.name, f"{i}.json", f"{i}.jsonl", f"{i}.csv", f"{i}.txt", str(i)])
        path.write_bytes(spoiled(rng, shape.read_bytes()))
        if rng.random() < 0.05:
            with zipfile.ZipFile(tmp_path / f"{i}.zip", "w") as archive:
                archive.writestr(rng.choice(["a.json", "data/train.jsonl", "b.csv"]), path.read_bytes())
            path.unlink()
            path = tmp_path / f"{i}.zip"
        repair = ",".join(
            f"{kind}=repair" for kind in ("invalid-utf8", "empty-turn") if rng.random() < 0.5
        )  # fmt: skip
        use, reading = rng.choice(["auto", "chosen", "pairs"]), Reading(Findings(actions(repair)))
        config = profile("tiny", on_finding=repair, use=use)
        try:
            if i % 100 == 99:
                made = prepare(config, tmp_path / f"out-{i}", str(path))
                assert made["in"] == made["kept"] + sum(made["dropped"].values())
            else:
                talks = sum(1 for _ in conversations(str(path), config, reading, template))
                assert reading.formats.total() == talks + sum(reading.found.dropped().values()), path.read_bytes()
            read += 1
        except ValueError as error:
            assert str(error) and "\n" not in str(error), path.read_bytes()
            refused += 1
        path.unlink()
    assert read > refused > 0
    assert [file.name for file in tmp_path.iterdir() if not file.name.startswith("out-")] == ["mine"]
    assert (tmp_path / "mine" / "thesis.txt").read_text() == "thesis"
