"""Pairs in the shapes that people keep them in are the same pair; and what is no pair is said and left out."""

import json

import pytest

from helpers.models import profile
from helpers.prepare import load_prepared, prepare

SYSTEM, ASKED, BETTER, WORSE = "Be brief.", "Where is the mill?", "By the river.", "I do not know."
QUESTION = {"role": "user", "content": ASKED}
FIRST = {"role": "system", "content": SYSTEM}


def answer(text):
    return {"role": "assistant", "content": text}


def said(role, text):
    return {"from": role, "value": text}


SHAPES = {
    "trl, texts": {"prompt": ASKED, "chosen": BETTER, "rejected": WORSE},
    "trl, messages": {"prompt": [QUESTION], "chosen": [answer(BETTER)], "rejected": [answer(WORSE)]},
    "whole conversations": {"chosen": [QUESTION, answer(BETTER)], "rejected": [QUESTION, answer(WORSE)]},
    "UltraFeedback, binarized": {
        "prompt": ASKED, "prompt_id": "c0ffee", "chosen": [QUESTION, answer(BETTER)],
        "rejected": [QUESTION, answer(WORSE)], "messages": [QUESTION, answer(BETTER)], "score_chosen": 9.0,
        "score_rejected": 2.0,
    },
    "Anthropic HH": {
        "chosen": f"\n\nHuman: {ASKED}\n\nAssistant: {BETTER}", "rejected": f"\n\nHuman: {ASKED}\n\nAssistant: {WORSE}"
    },
    "LLaMA-Factory, alpaca": {"instruction": ASKED, "input": "", "chosen": BETTER, "rejected": WORSE},
    "LLaMA-Factory, ShareGPT": {
        "conversations": [said("human", ASKED)], "chosen": said("gpt", BETTER), "rejected": said("gpt", WORSE)
    },
    "OpenAI": {
        "input": {"messages": [QUESTION], "tools": [], "parallel_tool_calls": True},
        "preferred_output": [answer(BETTER)], "non_preferred_output": [answer(WORSE)],
    },
    "orca_dpo_pairs": {"system": SYSTEM, "question": ASKED, "chosen": BETTER, "rejected": WORSE},
    "system prompt in the messages": {
        "prompt": [FIRST, QUESTION], "chosen": [answer(BETTER)], "rejected": [answer(WORSE)]
    },
}  # fmt: skip


def prepared(folder, rows, **values):
    path = folder / "pairs.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    config = profile("tiny", **{"method": "dpo", "heldout_fraction": 0} | values)
    return prepare(config, folder / "out", str(path)), folder / "out"


@pytest.mark.parametrize("name", SHAPES)
def test_every_shape_of_a_pair_is_the_same_pair(name, tmp_path):
    made, folder = prepared(tmp_path, [SHAPES[name]])
    (row,) = load_prepared(folder)["train"]
    before = [FIRST, QUESTION] if SYSTEM in json.dumps(SHAPES[name]) else [QUESTION]
    assert (row["messages"], row["rejected"]) == ([*before, answer(BETTER)], [answer(WORSE)])
    sides = (("input_ids", "assistant_masks"), ("rejected_ids", "rejected_masks"))
    prompts = [row[ids][: row[masks].index(1)] for ids, masks in sides]
    assert prompts[0] == prompts[1] and made["kept"] == 1 and made["use"] == "pairs"


NO_PAIRS = {
    "no-pair": {"messages": [QUESTION, answer(BETTER)]},
    "same-answer": {"prompt": ASKED, "chosen": BETTER, "rejected": f"{BETTER} "},
    "empty-turn": {"prompt": ASKED, "chosen": BETTER, "rejected": ""},
    "other-prompt": {
        "chosen": [QUESTION, answer(BETTER)],
        "rejected": [{"role": "user", "content": "Who is the miller?"}, answer(WORSE)],
    },
    "over-context": {"prompt": ASKED, "chosen": BETTER, "rejected": "far " * 100},
}


@pytest.mark.parametrize("kind", NO_PAIRS)
def test_what_is_no_pair_is_said_and_left_out(kind, tmp_path):
    made, _ = prepared(tmp_path, [SHAPES["trl, texts"], NO_PAIRS[kind]], seq_len=64)
    assert made["kept"] == 1 and made["dropped"] == {kind: 1}


def test_data_without_pairs_is_a_sentence(tmp_path):
    with pytest.raises(ValueError, match="a conversation without a second, worse answer"):
        prepared(tmp_path, [NO_PAIRS["no-pair"]])


@pytest.mark.parametrize(("better", "worse", "words"), [(30, 6, "longer"), (6, 30, "shorter"), (9, 9, None)])
def test_a_length_that_tells_the_better_answer_is_said(better, worse, words, tmp_path):
    rows = [
        {"prompt": f"{i}?", "chosen": "yes " * (better + i % 3), "rejected": "no " * (worse + i % 2)} for i in range(9)
    ]
    made, _ = prepared(tmp_path, rows)
    found = [line for line in made["warnings"] if "learn the length" in line]
    assert bool(found) == bool(words) and (not words or f"is the {words} one in 100% of the pairs" in found[0])


def test_pairs_are_kept_only_where_the_method_learns_from_them(tmp_path):
    with pytest.raises(ValueError, match="use=pairs keeps both"):
        prepared(tmp_path, [SHAPES["trl, texts"]], method="sft")
    made, folder = prepared(tmp_path, [SHAPES["trl, texts"]], use="chosen")
    assert made["use"] == "chosen" and "rejected" not in load_prepared(folder)["train"].column_names
