"""The blind vote: no name before a vote, and every vote counts at once."""

import doctest
import json

import pytest

from helpers.evaluate import vote


@pytest.fixture
def folder(tmp_path):
    rows = [
        {"question": f"{n} + 1?", "answer": str(n + 1), "models": {"base": {"text": "7"}, "gptq": {"text": str(n + 1)}}}
        for n in range(12)
    ]
    (tmp_path / "generations.jsonl").write_text("\n".join(map(json.dumps, rows)))
    return tmp_path


def test_examples_in_docstrings():
    assert doctest.testmod(vote).failed == 0


def test_votes_for_the_right_answer_show_which_model_is_better(folder):
    ballot = vote.ballot(folder)
    assert ballot.words.startswith("11 pairs in which base and gptq differ"), "6 + 1 is 7 in both"
    left, same, right = vote.buttons_in(ballot.ballot)
    prompt, (left_text, right_text) = ballot.ballot.children[0], ballot.ballot.children[1].children
    assert not {"base", "gptq"} & set((prompt.value + left_text.value + right_text.value).split())
    same.click()
    for _ in range(10):
        wanted = str(int(prompt.value.partition("<b>")[2].split()[0]) + 1)
        (left if f">{wanted}<" in left_text.value else right).click()
    assert ballot.preferred.count("gptq") == 10 and ballot.preferred.count(None) == 1
    assert "gptq was better in 10 of 10 decided pairs" in ballot.count.value and ": better against base" in ballot.words
    left.click()  # nothing is left to vote on
    assert len(ballot.preferred) == 11


def test_an_evaluation_without_answers_says_so(tmp_path):
    (tmp_path / "generations.jsonl").write_text("")
    with pytest.raises(ValueError, match="holds no answers to compare"):
        vote.ballot(tmp_path)
