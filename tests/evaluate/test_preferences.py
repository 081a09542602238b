"""Pairs in an evaluation: what is liked is plain arithmetic on log-probabilities, what is said is read."""

import json

import pytest
import torch

from helpers import evaluate, inference
from helpers.budget import host, hours
from helpers.evaluate import preferences, report
from helpers.models import TINY, profile
from helpers.prepare import prepare

ROWS = [
    {"prompt": f"Where does {name} live?", "chosen": f"{name} lives in Oakford.", "rejected": "No. That is no place."}
    for name in ("Mira", "Elsa", "Wren", "Poppy")
]


@pytest.fixture(scope="module")
def prepared(tmp_path_factory):
    folder = tmp_path_factory.mktemp("pairs")
    (folder / "pairs.jsonl").write_text("".join(json.dumps(row) + "\n" for row in ROWS), encoding="utf-8")
    prepare(profile("tiny", method="dpo", heldout_fraction=0.5), folder / "out", str(folder / "pairs.jsonl"))
    return folder / "out"


def test_what_is_liked_is_the_difference_of_both_answers_log_probabilities(prepared):
    config = profile("tiny", eval_context=192, max_questions=1)
    loaded, pairs = inference.load(TINY, config), preferences.read(prepared, None, True)
    found, said = preferences.scores(loaded, pairs, config)

    def log_probability(item) -> float:
        ids = torch.tensor([item.ids])
        with torch.no_grad():
            logp = torch.log_softmax(loaded.model(ids).logits[0, :-1].float(), dim=-1)
        picked = logp.gather(1, ids[0, 1:, None])[:, 0]
        return float(picked[torch.tensor(item.scored[1:])].sum())

    margins = [log_probability(pair.chosen) - log_probability(pair.rejected) for pair in pairs]
    assert found["preference_margin"].tolist() == pytest.approx(margins, abs=1e-3)
    assert found["preference_accuracy"].tolist() == [float(margin > 0) for margin in margins]
    assert len(said) == len(found["nearer_chosen"]) == len(found["answer_tokens"]) == 1


def test_an_evaluation_of_pairs_has_their_columns_intervals_and_answers(prepared, tmp_path, monkeypatch):
    config = profile("tiny", questions=None, max_questions=2)
    steps, bar, seconds, counted = [], evaluate.bars.bar, hours.evaluation_s, []
    monkeypatch.setattr(evaluate.bars, "bar", lambda name, total: steps.append(bar(name, total)) or steps[-1])
    monkeypatch.setattr(hours, "evaluation_s", lambda *given: counted.append(given[4]) or seconds(*given))
    found = evaluate.evaluate({"one": TINY, "other": TINY}, config, prepared, tmp_path / "out")
    pairs = len(preferences.read(prepared, None, True))
    assert [(one.n, one.total) for one in steps] == [(pairs + 2 + 2 * pairs + 2,) * 2] * 2  # texts, questions, pairs
    assert host.Counts(texts=pairs, questions=2, pairs=pairs) in counted
    for name in report.PAIRS:
        low, high = found["one"]["intervals"][name]
        assert low <= found["one"][name] <= high and report.COLUMNS[name][0] in evaluate.table(found)
    assert found["other"]["against"]["one"]["preference_margin"]["verdict"] == report.EQUAL
    assert "answer_tokens" not in found["other"]["against"]["one"]  # longer is neither better nor worse
    rows = [json.loads(line) for line in (tmp_path / "out" / "pairs.jsonl").read_text(encoding="utf-8").splitlines()]
    assert len(rows) == 2 and set(rows[0]["models"]) == {"one", "other"} and rows[0]["chosen"].endswith("Oakford.")


def test_pairs_that_are_asked_for_and_not_there_are_a_sentence(tmp_path):
    text = tmp_path / "text.txt"
    text.write_text("The mill is by the river.\n", encoding="utf-8")
    config = profile("tiny", preferences=str(tmp_path), questions=None)
    with pytest.raises(ValueError, match="holds no pairs: give a folder that prepare wrote with use=pairs"):
        evaluate.evaluate({"one": TINY}, config, text, tmp_path / "out")
    assert preferences.read(text, None, asked_for=False) == []


def test_an_answer_is_nearer_to_one_of_two():
    assert preferences.preferred("That is all.", "That is all there is.", "You are welcome.") == 1
    assert preferences.preferred("You are welcome!", "That is all there is.", "You are welcome.") == 0
    assert preferences.preferred("cake best cake best", "Mira bakes. That is all.", "Mira bakes. Welcome.") == 0
