"""What data sets that nobody here wrote did to preparation, one test a trap: what was trained, lost or unsaid."""

import io
import json
import zipfile

import numpy as np
import pyarrow as pa
import pytest
from pyarrow import parquet

from helpers import cli, evaluate
from helpers.config import DataConfig
from helpers.evaluate.perplexity import read_items
from helpers.models import TINY, profile
from helpers.models.templates import load_tokenizer
from helpers.prepare import load_prepared, prepare
from helpers.prepare.checks import Findings, actions, check, leaks
from helpers.prepare.duplicates import groups, jaccard, sketches, windows
from helpers.prepare.outliers import language_name, languages
from helpers.sources import columns, encodings, formats, jsonfiles
from helpers.sources.readers import FromUtf16, read
from helpers.workspace import building
from helpers.workspace.prepared import with_own_questions


def user(text):
    return {"role": "user", "content": text}


def assistant(text):
    return {"role": "assistant", "content": text}


def jsonl(path, rows):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return str(path)


def pairs(count, start=0):
    return [{"prompt": f"Where is house {i}?", "completion": f"In street {i * 7919}."} for i in range(start, count)]


def made(path, output, **values):
    """(what prepare counted, question and answer of each training row)."""
    values.setdefault("heldout_fraction", 0)
    counts = prepare(profile("tiny", **values), output, str(path))
    rows = load_prepared(output)["train"]["messages"]
    return counts, [tuple(turn["content"] for turn in turns) for turns in rows]


def test_an_output_that_holds_the_input_or_a_thesis_is_refused(tmp_path):
    (tmp_path / "p").mkdir()
    (tmp_path / "p" / "thesis.txt").write_text("thesis")
    path = jsonl(tmp_path / "p" / "train.jsonl", pairs(5))
    with pytest.raises(ValueError, match="lie in each other"):
        prepare(profile("tiny"), tmp_path / "p", path)
    with pytest.raises(ValueError, match="lie in each other"):
        prepare(profile("tiny"), tmp_path / "p" / "out", str(tmp_path / "p"))
    assert sorted(file.name for file in (tmp_path / "p").iterdir()) == ["thesis.txt", "train.jsonl"]


@pytest.mark.parametrize(
    ("output", "says"), [(".", "holds the working folder"), ("/proc/x", "nothing can be made there")]
)
def test_an_output_where_nothing_can_be_made_is_refused(output, says, tmp_path, monkeypatch):
    path = jsonl(tmp_path / "train.jsonl", pairs(5))
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    with pytest.raises(ValueError, match=says):
        prepare(profile("tiny"), output, path)
    assert sorted(file.name for file in tmp_path.iterdir()) == ["here", "train.jsonl"]


# ---- how much, and which side ----------------------------------------------------------------------------------------


def test_the_2000_of_the_profile_are_for_its_own_hub_set():
    assert profile("mistral-7b").data.cap() == 2000
    assert profile("mistral-7b").data.cap("gsm8k_train.jsonl") is None
    assert profile("mistral-7b", source="mine.csv").data.cap() is None
    assert DataConfig(max_conversations="all").cap() is None


def test_a_cap_takes_rows_at_random_by_the_seed_and_says_of_how_many(tmp_path):
    path = jsonl(tmp_path / "a.jsonl", pairs(60))
    counts, rows = made(path, tmp_path / "a", max_conversations=20)
    places = [pairs(60).index({"prompt": question, "completion": answer}) for question, answer in rows]
    assert counts["in"] == 20 and places == sorted(places) and max(places) >= 40 and counts["available"] == 60
    assert any("20 of the 60 rows" in warning for warning in counts["warnings"])
    assert made(path, tmp_path / "b", max_conversations=20)[1] == rows
    assert made(path, tmp_path / "c", max_conversations=20, heldout_fraction=0)[0]["warnings"]


def test_conversations_that_are_the_same_after_the_cut_are_one(tmp_path):
    """Wordle: the first exchange is always the same, and the rest does not fit."""
    talks = [
        [user("Start of game 7"), assistant("crane"), user("word " * 400 + str(i)), assistant(f"x{i} " * 300)]
        for i in range(12)
    ]
    path = jsonl(tmp_path / "a.jsonl", [{"messages": talk} for talk in talks])
    counts, rows = made(path, tmp_path / "out", seq_len=64, heldout_fraction=0.3)
    assert rows == [("Start of game 7", "crane")] and counts["dropped"] == {"exact-duplicate": 11}


def test_a_group_of_near_duplicates_is_like_its_first_member():
    """Data made from a template wanders a little with each row; chained, all of it was one group."""
    rng = np.random.default_rng(3)
    words = [f"{a}{b}" for a in ("ri", "sto", "la", "brea") for b in range(80)]
    text = list(rng.choice(words, 60))
    texts = []
    for i in range(120):
        text[i % 60] = str(rng.choice(words))
        texts.append(" ".join(text))
    share = [windows(text) for text in texts]
    found = groups(sketches(texts), lambda i, k: jaccard(share[i], share[k]))
    members = np.flatnonzero(found != np.arange(120))
    exact = [jaccard(share[i], share[found[i]]) for i in members]
    assert len(members) > 50 and len(np.unique(found)) > 5
    assert min(exact) >= 0.8
    assert jaccard(windows("abcdefgh ijk"), windows("abcdefgh ijk")) == 1


def test_a_share_held_out_that_misses_what_was_asked_is_said(tmp_path):
    body = " ".join(f"finding{i}" for i in range(60))
    alike = [{"prompt": f"Case {i}: {body}", "completion": f"Treat it, {i}."} for i in range(80)]
    path = jsonl(tmp_path / "a.jsonl", alike + pairs(40))
    said = [
        prepare(profile("tiny", seq_len=512, heldout_fraction=share), tmp_path / f"{share}", path)["warnings"]
        for share in (0.3, 0.5, 0.7)
    ]
    assert any("was asked, because 79 are almost like others" in warning for warnings in said for warning in warnings)


def test_few_held_out_conversations_come_with_what_a_verdict_on_them_is_worth(tmp_path):
    path = jsonl(tmp_path / "a.jsonl", pairs(200))
    said = " ".join(prepare(profile("tiny"), tmp_path / "out", path)["warnings"])
    assert "held-out conversations: a share of right answers on so few is known to ±" in said
    assert "heldout_fraction=0.15 would hold 30 out" in said


def test_nothing_held_out_stops_no_later_stage(tmp_path, capsys):
    prepare(profile("tiny", heldout_fraction=0), tmp_path / "out", jsonl(tmp_path / "a.jsonl", pairs(3)))
    sides = load_prepared(tmp_path / "out")
    assert (len(sides["train"]), len(sides["heldout"])) == (3, 0)
    assert len(list(read_items(tmp_path / "out", load_tokenizer(TINY)))) == 3
    assert len(evaluate.conversation_starts(tmp_path / "out", 10)) == 3
    assert "nothing is held out" in capsys.readouterr().out


def test_the_questions_of_the_invented_world_are_asked_with_its_data_alone(tmp_path):
    config = profile("tiny", max_conversations=10)
    assert config.evaluate.questions
    prepare(config, tmp_path / "own")
    prepare(config, tmp_path / "mine", jsonl(tmp_path / "a.jsonl", pairs(5)))
    assert with_own_questions(config, tmp_path / "own") == config
    assert with_own_questions(config, tmp_path / "mine").evaluate.questions is None
    named = config.with_values(questions="mine.jsonl")
    assert with_own_questions(named, tmp_path / "mine") == named


def test_both_answers_are_kept_for_a_preference_method(tmp_path):
    path = jsonl(tmp_path / "a.jsonl", [{"prompt": "Where?", "chosen": "There.", "rejected": "No."}])
    prepare(profile("tiny", use="pairs", heldout_fraction=0), tmp_path / "out", path)
    (row,) = load_prepared(tmp_path / "out")["train"]
    tokenizer = load_tokenizer(TINY)
    better, worse = ("input_ids", "assistant_masks"), ("rejected_ids", "rejected_masks")
    for names, text in ((better, " There.</s>"), (worse, " No.</s>")):
        ids, mask = (row[name] for name in names)
        assert tokenizer.decode([token for token, kept in zip(ids, mask, strict=True) if kept]) == text
    assert row["messages"] == [user("Where?"), assistant("There.")] and row["rejected"] == [assistant("No.")]


# ---- encodings, arrays, folders --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("charset", "question", "answer"),
    [
        ("cp1252", "Wo ist das Café?", "Über der Straße"),
        ("cp932", "よくある質問はどこにありますか？", "はい、こちらのページをご覧ください。"),
        ("gb18030", "你好，今天天气怎么样？", "今天天气很好，谢谢你。"),
        ("cp949", "안녕하세요? 오늘 날씨가 어떻습니까?", "네, 오늘은 날씨가 좋습니다."),
        ("cp1251", "Где находится дом?", "За рекой, в деревне."),
    ],
)
@pytest.mark.parametrize("name", ["a.csv", "a.jsonl", "a.json", "a.txt"])
def test_bytes_in_another_charset_are_repaired_once(name, charset, question, answer, tmp_path):
    row = {"question": question, "answer": answer}
    text = {
        "a.csv": f"question;answer\n{question};{answer}\n",
        "a.jsonl": json.dumps(row, ensure_ascii=False) + "\n",
        "a.json": json.dumps([row], ensure_ascii=False, indent=1),
        "a.txt": f"{question} {answer}\n",
    }[name]
    (tmp_path / name).write_bytes(text.encode(charset))
    (record,) = read(str(tmp_path / name))
    assert record.problem == "invalid-utf8" and charset in record.detail
    assert record.mended == (f"{question} {answer}" if name == "a.txt" else row)


def test_an_accent_in_a_header_is_no_traceback(tmp_path):
    (tmp_path / "h.csv").write_bytes("question,answer,Catégorie\nOù est-ce ?,Là-bas.,x\n".encode("cp1252"))
    _, rows = made(tmp_path / "h.csv", tmp_path / "out", on_finding="invalid-utf8=repair")
    assert rows == [("Où est-ce ?", "Là-bas.")]


@pytest.mark.parametrize("order", ["utf-16-le", "utf-16-be"])
def test_what_powershell_and_excel_save_as_unicode_is_read_and_said(order, tmp_path):
    table = "Question\tAnswer\r\n" + "".join(f"Wo ist {i} 🏠?\tÜber der Straße {i}.\r\n" for i in range(40))
    path = tmp_path / "table.txt"
    path.write_bytes(("\ufeff" + table).encode(order))
    counts, rows = made(path, tmp_path / "out")
    parts = FromUtf16(io.BytesIO(path.read_bytes()))
    assert b"".join(iter(lambda: parts.read(7), b"")).decode() == table  # some end inside of letters
    assert rows[39] == ("Wo ist 39 🏠?", "Über der Straße 39.") and len(rows) == 40
    assert any("table.txt is in UTF-16" in warning for warning in counts["warnings"])


def test_half_width_katakana_are_not_believed():
    assert encodings.guess("Где находится дом? За рекой, в деревне.".encode("koi8_r")) != "cp932"


@pytest.mark.parametrize("name", ["all.json", "all.jsonl"])
def test_two_arrays_in_one_file_are_both_read(name, tmp_path):
    arrays = [json.dumps(part, indent=1) for part in (pairs(3), pairs(5, start=3))]
    (tmp_path / name).write_text("\n".join(arrays))
    assert [record.row for record in read(str(tmp_path / name))] == pairs(5)
    (tmp_path / name).write_text(arrays[0] + " garbage " + arrays[1])
    with pytest.raises(ValueError, match=r"goes on after its closing \] at line 14 with 'garbage"):
        list(read(str(tmp_path / name)))


CONTAINERS = {
    "what an API answers": {"status": "ok", "page": 1, "data": {"items": pairs(3)}},
    "rows by their names": {f"q{i}": row for i, row in enumerate(pairs(3))},
    "one after the other": "".join(json.dumps(row) for row in pairs(3)),
    "what jq prints": "\n".join(json.dumps(row, indent=2) for row in pairs(3)),
    "an array without its brackets": "".join(f"{json.dumps(row)},\n" for row in pairs(3)),
}


@pytest.mark.parametrize("what", CONTAINERS)
@pytest.mark.parametrize("name", ["a.json", "a.jsonl", "a"])
def test_rows_are_found_in_what_programs_wrap_them_in(what, name, tmp_path):
    content = CONTAINERS[what]
    (tmp_path / name).write_text(content if isinstance(content, str) else json.dumps(content, indent=1))
    assert [record.row for record in read(str(tmp_path / name))] == pairs(3)


@pytest.mark.parametrize(
    ("content", "says"),
    [
        (
            '[{"prompt": "a", "completion": "b"}, {"prompt": ' + "[" * 1100 + "]" * 1100 + "}]",
            "nested too deep; in JSONL",
        ),
        ('[{"prompt": "a"}, {"prompt": "' + "long " * 500_000 + '"}]', "a row of more than 1 MiB or a broken one"),
        ('{"data": [{"prompt": "' + "long " * 500_000 + '"}]}', "one JSON object of more than 1 MiB, which is read"),
    ],
)
def test_json_that_is_too_large_or_deep_is_not_called_broken(content, says, tmp_path, monkeypatch):
    monkeypatch.setattr(jsonfiles, "ROW_LIMIT", 2**20)
    monkeypatch.setattr(jsonfiles, "OBJECT_LIMIT", 2**20)
    (tmp_path / "a.json").write_text(content)
    with pytest.raises(ValueError, match=says):
        list(read(str(tmp_path / "a.json")))


def test_two_lists_somewhere_in_an_object_are_not_chosen_between(tmp_path):
    (tmp_path / "a.json").write_text(json.dumps({"data": {"old": pairs(2), "new": pairs(3)}}))
    with pytest.raises(ValueError, match=r"holds the lists data\.old, data\.new: give each a file of its own"):
        list(read(str(tmp_path / "a.json")))


def test_rows_of_an_array_on_one_line_have_places_of_their_own(tmp_path):
    (tmp_path / "a.json").write_text(json.dumps(pairs(3)))
    assert [record.place for record in read(str(tmp_path / "a.json"))] == [
        "a.json line 1", "a.json line 1 row 2", "a.json line 1 row 3",
    ]  # fmt: skip


def test_of_a_folder_or_zip_only_data_of_one_split_is_read(tmp_path):
    files = {
        "README.md": "Read me.", "CHANGELOG.md": "None.", "docs/how.md": "So.", "requirements-dev.txt": "pytest",
        "data/train.jsonl": pairs(4), "data/validation.jsonl": pairs(6, start=4), "data/test.jsonl": pairs(8, start=6),
        "samples/sample.jsonl": pairs(1), ".ipynb_checkpoints/a-checkpoint.jsonl": pairs(2), "._train.jsonl": "\0\5",
        "dataset_infos.json": "{}",
    }  # fmt: skip
    with zipfile.ZipFile(tmp_path / "set.zip", "w") as archive:
        for name, content in files.items():
            path = tmp_path / "set" / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(content) if isinstance(content, str) else jsonl(path, content)
            archive.write(path, name)
    for source in ("set", "set.zip"):
        notes = []
        assert [record.row for record in read(str(tmp_path / source), notes=notes)] == pairs(4)
        assert "data/test.jsonl, the test split" in notes[0] and "--heldout-split validation" in notes[0]
        counts = prepare(
            profile("tiny", heldout_split="validation"), tmp_path / f"{source}.out", str(tmp_path / source)
        )
        assert (counts["train_conversations"], counts["heldout_conversations"]) == (4, 2)
        assert any("left out: data/test.jsonl" in said for said in counts["warnings"])
        assert not any("validation" in said for said in counts["warnings"])
    for source in ("set", "set.zip", "set/data/train.jsonl"):
        with pytest.raises(ValueError, match=r"has no dev2 split: leave heldout_split empty"):
            prepare(profile("tiny", heldout_split="dev2"), tmp_path / "none", str(tmp_path / source))
    assert len(list(read(str(tmp_path / "set"), "test"))) == 2
    counts, _ = made(tmp_path / "set", tmp_path / "out")
    assert counts["in"] == 4 and any("left out" in warning for warning in counts["warnings"])


def test_a_folder_of_texts_alone_is_read(tmp_path):
    (tmp_path / "in").mkdir()
    (tmp_path / "in" / "poem.txt").write_text("One line.\nAnother.\n")
    assert [record.row for record in read(str(tmp_path / "in"))] == ["One line.", "Another."]


def test_dates_beyond_python_and_pictures_in_parquet_are_told_and_do_no_harm(tmp_path):
    table = pa.table(
        {
            "prompt": ["a", "b"],
            "completion": ["c", "d"],
            "when": pa.array([2**62, None], pa.timestamp("us")),
            "image": pa.array([None, b"\x89PNG"], pa.binary()),
        }
    )
    parquet.write_table(table, tmp_path / "a.parquet")
    counts, rows = made(tmp_path / "a.parquet", tmp_path / "out")
    assert rows == [("a", "c")] and counts["dropped"] == {"media": 1}
    (told,) = [finding for finding in counts["findings"] if finding["kind"] == "unused-fields"]
    assert "when in 1 row, such as <timestamp[us]>" in told["sentence"]
    parquet.write_table(pa.table({"d": pa.array([2**62], pa.timestamp("us"))}), tmp_path / "d.parquet")
    with pytest.raises(ValueError, match="it has the fields d; messages"):
        made(tmp_path / "d.parquet", tmp_path / "none")


def test_two_at_once_into_one_output_is_a_sentence(tmp_path):
    path = jsonl(tmp_path / "a.jsonl", pairs(5))
    with building(tmp_path / "out", "prepare"), pytest.raises(ValueError, match="in use by another process"):
        prepare(profile("tiny"), tmp_path / "out", path)


# ---- words, and small things -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("header", ["Question,Answer", "question, answer", "\ufeffQUESTION, Answer "])
def test_letter_case_and_spaces_in_a_header_do_not_count(header, tmp_path):
    (tmp_path / "faq.csv").write_text(f"{header}\nWhere?,There.\n", encoding="utf-8")
    assert made(tmp_path / "faq.csv", tmp_path / "out")[1] == [("Where?", "There.")]


def test_a_refusal_lists_the_fields_and_the_names_that_would_do(tmp_path):
    path = jsonl(tmp_path / "a.jsonl", [{"question_en": "Where?", "answer_en": "There."}])
    with pytest.raises(ValueError, match=r"it has the fields question_en, answer_en; messages, .* question . answer"):
        made(path, tmp_path / "out")
    turns = [{"author_name": "Ann", "body": "Hi"}]
    with pytest.raises(ValueError, match="it has author_name, body; a turn needs role and content"):
        made(jsonl(tmp_path / "b.jsonl", [{"messages": turns}]), tmp_path / "out")
    assert columns.parse('"user=Question, in full",assistant=A')["user"] == "Question, in full"


def test_chats_with_markers_of_nobody_known_are_refused(tmp_path):
    text = "<|START_OF_TURN_TOKEN|><|USER_TOKEN|>Hi{}<|END_OF_TURN_TOKEN|><|CHATBOT_TOKEN|>Hello"
    path = jsonl(tmp_path / "a.jsonl", [{"text": text.format(i)} for i in range(5)])
    with pytest.raises(ValueError, match="markers that are not known here"):
        made(path, tmp_path / "out")
    assert made(path, tmp_path / "out", source_format="plain-text")[0]["kept"] == 5


TRANSCRIPTS = {
    "_chat.txt": "\u200e[21.11.26, 10:15:22] Ann: Hi\n[21.11.26, 10:15:40] Bob: Hi\nCake?\n[1.12.26, 9:17:00] Bob: Yes",
    "WhatsApp Chat with Bob.txt": "1/2/26, 10:15\u202fPM - Ann: Hi\n1/2/26, 10:16\u202fPM - Bob: Ho",
    "signal.txt": "[2026-11-21 10:15] Ann: Hi\n[2026-11-21 10:16] Me: Ho",
    "copied.md": "**You:** Hi\n\n**ChatGPT:** Hello,\nhow are you?\nWell?\n\n**You:** Well.\n\n**ChatGPT:** Fine!",
    "pasted.txt": "User: Hi\nAssistant: Hello\n",
}


@pytest.mark.parametrize("name", TRANSCRIPTS)
def test_a_transcript_of_a_chat_is_not_learned_as_lines_of_text(name, tmp_path):
    (tmp_path / name).write_text(TRANSCRIPTS[name], encoding="utf-8")
    with pytest.raises(ValueError, match="give messages of role and content, or say --source-format plain-text"):
        made(tmp_path / name, tmp_path / "out")
    assert made(tmp_path / name, tmp_path / "out", source_format="plain-text")[0]["kept"] > 1


@pytest.mark.parametrize(
    ("text", "wanted"),
    [
        ("Q: Why?\nA: So.", [user("Why?"), assistant("So.")]),
        ("Question: Why?\n\nAnswer: So,\nand so.\n", [user("Why?"), assistant("So,\nand so.")]),
        ("On page 3.\nQ: Why?\nA: So.", [{"role": "text", "content": "On page 3.\nQ: Why?\nA: So."}]),
        ("Vitamin A: good.", [{"role": "text", "content": "Vitamin A: good."}]),
    ],
)
def test_a_text_that_opens_with_a_question_and_goes_on_with_its_answer_is_an_exchange(text, wanted):
    assert formats.to_messages({"text": text}, formats.recognise({"text": text})) == wanted


def test_a_first_line_of_two_rows_costs_no_other_line(tmp_path):
    (tmp_path / "a.jsonl").write_text('{"text": "a"}{"text": "b"}\n{"text": "c"}\n{oops\n{"text": "d"}\n')
    assert [record.row for record in read(str(tmp_path / "a.jsonl")) if not record.problem] == [
        {"text": "c"}, {"text": "d"},
    ]  # fmt: skip


def test_a_story_with_talk_in_it_stays_a_text(tmp_path):
    lines = [f"He came to house {i} and rang: nobody." for i in range(60)]
    lines[7:9] = ["User: a word on the door.", "12.11.2026, 10:15 was written on it - strange: a clock?"]
    (tmp_path / "story.txt").write_text("\n".join(lines))
    assert made(tmp_path / "story.txt", tmp_path / "out")[0]["formats"] == {"plain-text": 60}


@pytest.mark.parametrize(
    ("name", "content", "says"),
    [
        ("a.yaml", "- prompt: a\n  completion: b\n", "a.yaml is of a kind that is not known here"),
        ("sms.xml", '\ufeff<?xml version="1.0"?>\n<sms body="Hi"/>\n', "sms.xml is XML"),
        ("deck.txt", "#separator:tab\n#html:true\nWhat is 1+1?\t2\n", "an Anki export, which names no columns"),
        ("cards.txt", "Wo?\tDort.\nWer?\tIch.\n", "it has the fields wo?, dort.; messages"),
        ("py.jsonl", "{'prompt': 'a'}\n{'prompt': 'b'}\n", "a row as Python prints it, where json.dumps would"),
        ("discord.json", '{"messages": [{"author": {"name": "Ann"}, "content": "Hi"}]}', "the role 'Ann'; there are"),
    ],
)
def test_what_is_no_conversation_says_what_it_is(name, content, says, tmp_path):
    (tmp_path / name).write_text(content, encoding="utf-8")
    with pytest.raises(ValueError) as error:
        made(tmp_path / name, tmp_path / "out")
    assert says in str(error.value)


@pytest.mark.parametrize(
    ("text", "wanted"),
    [
        ("<|eot_id|>", "<|eot_id|>"),
        ("Use <b>, not <|im_end|>, here.", "Use <b>, not <|im_end|>, here."),
        ("It is <s>old</s> new.", "It is < s>old< /s> new."),
        ("<s>old</s> is struck", "< s>old< /s> is struck"),
        ("<s> Hello.</s>", "Hello."),
        ("[INST] Hello [/INST]", "Hello"),
        ("Hello<|im_end|>\n", "Hello"),
        ("page one\fChapter", "page one\nChapter"),
        ("Wait \xe2\x80\x94 there", "Wait — there"),
    ],
)
def test_what_nobody_wrote_goes_and_what_somebody_wrote_stays(text, wanted):
    found = Findings(actions())
    turns = check([user("?"), assistant(text)], "a line 1", found, leaks("<s>", "</s>", "[INST]", "[/INST]"))
    assert turns[1]["content"] == wanted


def test_indentation_can_be_kept():
    turns = check([user("?"), assistant("    return a")], "a", Findings(actions("edge-spaces=keep")), leaks())
    assert turns[1]["content"] == "    return a"


def test_a_quotation_mark_that_nothing_closes_says_which_lines_went_with_it(tmp_path):
    (tmp_path / "q.csv").write_text('question,answer\na,b\n"c,d\ne,f\ng,h\n')
    first, second = read(str(tmp_path / "q.csv"))
    assert (first.place, second.place) == ("q.csv line 2", "q.csv line 3")
    assert "lines 3 to 5 went with it" in second.detail


def test_a_comma_in_a_quoted_name_separates_nothing(tmp_path):
    (tmp_path / "a.csv").write_text('"Question, in full, please";"Answer"\n"Why, then?";So.\n')
    (record,) = read(str(tmp_path / "a.csv"))
    assert record.row == {"Question, in full, please": "Why, then?", "Answer": "So."}


def test_a_cell_of_a_megabyte_and_excel_s_first_line_are_read(tmp_path):
    (tmp_path / "a.csv").write_text(f"sep=;\nquestion;answer\nWhy?;{'because ' * 140_000}\n")
    (record,) = read(str(tmp_path / "a.csv"))
    assert len(record.row["answer"]) > 2**20 and record.place == "a.csv line 3"


@pytest.mark.parametrize("content", ['{"prompt": "a", "completion": "b"}\n', "question\tanswer\na\tb\n"])
def test_jsonl_and_tables_in_a_txt_are_no_text(content, tmp_path):
    (tmp_path / "a.txt").write_text(content)
    assert made(tmp_path / "a.txt", tmp_path / "out")[1] == [("a", "b")]


def test_neighbours_of_chinese_and_english_are_no_strangers():
    names = {language_name(number) for number in languages(["我哋今日去邊度食飯呀？", "你好，世界。今天天气很好。"])}
    assert names <= {"zh", "not sure"}


def test_a_typing_error_in_a_path_does_not_ask_the_hub(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "mydata").mkdir()
    with pytest.raises(ValueError, match="there is no file mydata/train"):
        list(read("mydata/train"))


def test_a_pointer_of_git_lfs_says_what_fetches_the_data(tmp_path):
    (tmp_path / "a.jsonl").write_text("version https://git-lfs.github.com/spec/v1\noid sha256:1\nsize 2\n")
    with pytest.raises(ValueError, match=r"is a pointer of Git LFS \(git lfs pull fetches the data\): give JSON"):
        list(read(str(tmp_path / "a.jsonl")))


def test_too_short_a_context_says_the_length_that_would_do(tmp_path):
    rows = [{"prompt": "word " * (40 + i), "completion": "x"} for i in range(40)]
    path = jsonl(tmp_path / "a.jsonl", [*rows, *pairs(4)])
    counts, _ = made(path, tmp_path / "a", seq_len=32)
    (said,) = [warning for warning in counts["warnings"] if "seq_len=" in warning]
    enough = int(said.split("seq_len=")[1].split()[0])
    assert made(path, tmp_path / "b", seq_len=enough)[0]["kept"] >= 0.9 * 44


def test_help_says_what_each_setting_of_prepare_does(capsys):
    with pytest.raises(SystemExit):
        cli.main(["prepare", "--help"])
    told = " ".join(capsys.readouterr().out.split())
    for flag in ("--columns", "--use", "--source-format", "--on-finding", "--heldout-fraction", "--seq-len"):
        assert flag in told
    assert "Whose field is which" in told and "--bits" not in told and "--group-size" not in told
