"""Scores equal their reference libraries; intervals cover; equal models show no difference."""

import re
import string
from collections import Counter

import numpy as np
import pytest
import sacrebleu
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays
from rouge_score.rouge_scorer import RougeScorer

from helpers.evaluate import metrics

ANSWERS = ["Mira lives in Oakford.", "The owl eats mice", "blue", "", "Pip belongs to Una. Who is Una?"]
REFERENCES = ["Mira lives in Brindle.", "An owl eats mice.", "The hat is blue.", "Yes.", "Pip belongs to Una."]
SIMULATIONS = 500
ITEMS = 200  # as many held-out conversations as an evaluation reads by default


def squad_f1(prediction: str, ground_truth: str) -> float:
    """SQuAD's official evaluate-v1.1.py (https://rajpurkar.github.io/SQuAD-explorer/), as it stands there."""

    def normalize(text: str) -> list[str]:
        text = "".join(letter for letter in text.lower() if letter not in set(string.punctuation))
        return " ".join(re.sub(r"\b(a|an|the)\b", " ", text).split()).split()

    prediction_tokens, ground_truth_tokens = normalize(prediction), normalize(ground_truth)
    num_same = sum((Counter(prediction_tokens) & Counter(ground_truth_tokens)).values())
    if num_same == 0:
        return 0
    precision, recall = num_same / len(prediction_tokens), num_same / len(ground_truth_tokens)
    return (2 * precision * recall) / (precision + recall)


def test_scores_equal_their_reference_libraries():
    scores = metrics.answer_scores(ANSWERS, REFERENCES)
    pairs = list(zip(ANSWERS, REFERENCES, strict=True))
    rouge = RougeScorer(["rougeL"], use_stemmer=True)
    assert scores["rouge_l"] == pytest.approx([rouge.score(r, a)["rougeL"].fmeasure for a, r in pairs])
    assert scores["f1"] == pytest.approx([squad_f1(a, r) for a, r in pairs])
    assert scores["chrf"] == pytest.approx([sacrebleu.sentence_chrf(a, [r]).score / 100 for a, r in pairs])
    expected = sacrebleu.corpus_bleu(ANSWERS, [REFERENCES]).score
    assert metrics.bleu_interval(metrics.bleu_counts(ANSWERS, REFERENCES)).value == pytest.approx(expected)


def test_exact_match_is_of_the_whole_reply_after_strip():
    scores = metrics.answer_scores([" yes\n", "yes.", "Yes"], ["yes", "yes", "yes"])
    assert scores["exact_match"].tolist() == [1.0, 0.0, 0.0]


def test_classification_counts_an_answer_that_is_no_label_as_wrong():
    found = metrics.classification(["cat", "cat", "dog", "no idea"], ["cat", "dog", "dog", "dog"])
    assert found == pytest.approx(
        {"accuracy": 0.5, "precision_macro": 0.75, "recall_macro": 2 / 3, "f1_macro": (2 / 3 + 0.5) / 2}
    )


def test_answers_without_references_are_refused():
    with pytest.raises(ValueError, match="2 answers cannot be scored against 1 references"):
        metrics.answer_scores(["a", "b"], ["a"])


def coverage(draw, interval, truth) -> float:
    """Share of simulations whose 95% interval holds the truth."""
    rng = np.random.default_rng(1)
    found = (interval(draw(rng)) for _ in range(SIMULATIONS))
    return sum(one.low <= truth <= one.high for one in found) / SIMULATIONS


def test_intervals_cover_in_93_to_97_of_100_simulations(monkeypatch):
    monkeypatch.setattr(metrics, "RESAMPLES", 500)  # enough for this, and four times as fast
    skewed = coverage(lambda rng: rng.gamma(2.0, 0.5, ITEMS), metrics.mean_interval, 1.0)
    share = coverage(lambda rng: (rng.random(ITEMS) < 0.8).astype(float), metrics.mean_interval, 0.8)

    def conversations(rng):
        tokens = rng.integers(5, 120, ITEMS)
        hardness = rng.gamma(4.0, 0.25, ITEMS)  # one a conversation: its tokens are not independent
        return tokens * hardness, tokens

    losses = coverage(conversations, lambda sums: metrics.ratio_interval(*sums), 1.0)
    assert all(0.93 <= one <= 0.97 for one in (skewed, share, losses)), (skewed, share, losses)


def test_equal_models_are_called_different_in_5_of_100_simulations():
    rng = np.random.default_rng(0)
    verdicts = [metrics.sign_flip_p_value(rng.normal(size=80), seed) < 0.05 for seed in range(SIMULATIONS)]
    assert 0.03 <= np.mean(verdicts) <= 0.07


SCORES = arrays.arrays(float, st.integers(1, 40), elements=st.floats(0, 1, width=32))


@settings(max_examples=25, deadline=None)
@given(scores=SCORES)
def test_a_model_against_itself_shows_no_difference(scores):
    found = metrics.compare(scores, scores)
    assert (found.verdict, found.difference, found.p_value) == ("no difference shown", 0.0, 1.0)


@settings(max_examples=15, deadline=None)
@given(seed=st.integers(0, 1000))
def test_a_comparison_turned_round_says_the_opposite(seed):
    rng = np.random.default_rng(seed)
    one, other = rng.random(60), rng.random(60)
    there, back = metrics.compare(one, other), metrics.compare(other, one)
    opposite = {"better": "worse", "worse": "better"}
    assert back.verdict == opposite.get(there.verdict, there.verdict)
    assert (back.difference, back.p_value) == pytest.approx((-there.difference, there.p_value))


def test_more_loss_is_worse_and_less_is_better():
    rng = np.random.default_rng(0)
    losses, tokens = rng.gamma(2, 10, 80), rng.integers(5, 50, 80)
    noisy = losses + rng.gamma(2, 1, 80)
    assert metrics.compare(noisy, losses, tokens, lower_is_better=True).verdict == "worse"
    assert metrics.compare(losses, noisy, tokens, lower_is_better=True).verdict == "better"


def test_bleu_is_compared_over_the_whole_corpus():
    references = [
        f"the {word} owl eats mice in the barn"
        for word in ("red", "blue", "old", "young", "big", "small", "wise", "sly")
    ] * 4
    good, bad = metrics.bleu_counts(references, references), metrics.bleu_counts(["no"] * 32, references)
    assert metrics.compare_bleu(good, bad).verdict == "better"
    assert metrics.compare_bleu(good, good).verdict == "no difference shown"


def test_items_that_are_not_the_same_number_cannot_be_paired():
    with pytest.raises(ValueError, match="3 items cannot be paired with 2"):
        metrics.compare(np.zeros(3), np.zeros(2))


def test_one_item_has_no_interval_but_its_value():
    assert metrics.ratio_interval(np.array([6.0]), np.array([3.0])) == metrics.Estimate(2.0, 2.0, 2.0)
