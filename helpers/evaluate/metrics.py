"""Scores of answers, their intervals, and whether two models differ. No torch.

Every score is one number an item (an answer, a conversation), so that all of them share one interval and one paired
test:

>>> scores = answer_scores(["It is red.", "blue"], ["It is red.", "It is blue."])
>>> scores["exact_match"].tolist(), scores["f1"].round(2).tolist()
([1.0, 0.0], [1.0, 0.5])
"""

import re
import string
from collections import Counter
from dataclasses import dataclass
from functools import cache

import numpy as np

RESAMPLES = 2_000
PERMUTATIONS, BLOCK = 5_000, 500
BLEU_RESAMPLES = 500
SIGNIFICANCE = 0.05


@dataclass(frozen=True)
class Estimate:
    """A figure with its 95% confidence interval."""

    value: float
    low: float
    high: float


@dataclass(frozen=True)
class Comparison:
    """One model against another on the same items. difference = one − other, in the metric's unit."""

    verdict: str
    """better, worse, or no difference shown."""
    difference: float
    low: float
    high: float
    p_value: float


def answer_scores(answers: list[str], references: list[str]) -> dict[str, np.ndarray]:
    """Scores of each answer against its reference, all in 0..1: exact match, SQuAD's F1, ROUGE-L, chrF.

    exact_match asks for the whole reply after strip. Raises ValueError when the lists differ in length or are empty.
    """
    if not references or len(answers) != len(references):
        raise ValueError(f"{len(answers)} answers cannot be scored against {len(references)} references")
    from sacrebleu.metrics import CHRF

    chrf, pairs = CHRF(), list(zip(answers, references, strict=True))
    return {
        "exact_match": np.array([float(a.strip() == r.strip()) for a, r in pairs]),
        "f1": np.array([token_f1(a, r) for a, r in pairs]),
        "rouge_l": np.array([rouge().score(r, a)["rougeL"].fmeasure for a, r in pairs]),
        "chrf": np.array([chrf.sentence_score(a, [r]).score / 100 for a, r in pairs]),
    }


@cache
def rouge():
    """Google's ROUGE-L with its Porter stemmer (https://aclanthology.org/W04-1013/)."""
    from rouge_score.rouge_scorer import RougeScorer

    return RougeScorer(["rougeL"], use_stemmer=True)


def words(text: str) -> list[str]:
    """SQuAD's normal form: lower case, without punctuation and articles (https://arxiv.org/abs/1606.05250).

    >>> words("The Cat's hat!")
    ['cats', 'hat']
    """
    bare = "".join(letter for letter in text.lower() if letter not in string.punctuation)
    return re.sub(r"\b(a|an|the)\b", " ", bare).split()


def token_f1(answer: str, reference: str) -> float:
    """SQuAD's F1: harmonic mean of precision and recall over words.

    >>> round(token_f1("a red house", "the house"), 2)
    0.67
    """
    given, wanted = words(answer), words(reference)
    if not given or not wanted:
        return float(given == wanted)
    common = sum((Counter(given) & Counter(wanted)).values())
    return 2 * common / (len(given) + len(wanted))


def bleu_counts(answers: list[str], references: list[str]) -> np.ndarray:
    """What corpus BLEU adds up, an item a row: 4 n-gram matches, 4 n-gram totals, and the two lengths: (items, 10)."""
    from sacrebleu.metrics import BLEU

    scorer = BLEU(effective_order=True)
    scores = [scorer.sentence_score(a, [r]) for a, r in zip(answers, references, strict=True)]
    return np.array([[*s.counts, *s.totals, s.sys_len, s.ref_len] for s in scores], dtype=float)


def bleu_of(counts: np.ndarray) -> float:
    """Corpus BLEU in 0..100 from summed counts (10,): sacrebleu's (https://aclanthology.org/W18-6319/)."""
    from sacrebleu.metrics import BLEU

    matches, totals, (length, reference_length) = counts[:4], counts[4:8], counts[8:].astype(int)
    return BLEU.compute_bleu(matches.tolist(), totals.tolist(), int(length), int(reference_length)).score


def bleu_interval(counts: np.ndarray, seed: int = 0) -> Estimate:
    """Corpus BLEU with its 95% percentile bootstrap interval over items (https://aclanthology.org/W04-3250/)."""
    rng = np.random.default_rng(seed)
    draws = rng.multinomial(len(counts), np.full(len(counts), 1 / len(counts)), size=BLEU_RESAMPLES)
    low, high = np.percentile([bleu_of(sums) for sums in draws @ counts], (2.5, 97.5))
    return Estimate(bleu_of(counts.sum(axis=0)), float(low), float(high))


def compare_bleu(one: np.ndarray, other: np.ndarray, seed: int = 0) -> Comparison:
    """Corpus BLEU of two models on the same items, by approximate randomization (https://aclanthology.org/W05-0908/).

    Raises ValueError when the items are not the same number.
    """
    check_paired(one, other)
    rng = np.random.default_rng(seed)
    seen = bleu_of(one.sum(axis=0)) - bleu_of(other.sum(axis=0))
    total, extreme = (one + other).sum(axis=0), 0
    for _ in range(BLEU_RESAMPLES):
        swapped = rng.random((len(one), 1)) < 0.5
        sums = np.where(swapped, other, one).sum(axis=0)
        extreme += abs(bleu_of(sums) - bleu_of(total - sums)) >= abs(seen) - 1e-9
    draws = rng.multinomial(len(one), np.full(len(one), 1 / len(one)), size=BLEU_RESAMPLES)
    spread = [bleu_of(a) - bleu_of(b) for a, b in zip(draws @ one, draws @ other, strict=True)]
    low, high = np.percentile(spread, (2.5, 97.5))
    p_value = (extreme + 1) / (BLEU_RESAMPLES + 1)
    return Comparison(verdict(seen, p_value), seen, float(low), float(high), p_value)


def classification(answers: list[str], references: list[str]) -> dict[str, float]:
    """accuracy, and macro precision, recall and F1 over the labels that references hold (scikit-learn).

    >>> classification(["yes", "no", "maybe"], ["yes", "no", "no"])["accuracy"]
    0.6666666666666666
    """
    from sklearn.metrics import accuracy_score, precision_recall_fscore_support

    given, wanted = [answer.strip() for answer in answers], [reference.strip() for reference in references]
    precision, recall, f1, _ = precision_recall_fscore_support(
        wanted, given, labels=sorted(set(wanted)), average="macro", zero_division=0
    )
    return {
        "accuracy": float(accuracy_score(wanted, given)),
        "precision_macro": float(precision),
        "recall_macro": float(recall),
        "f1_macro": float(f1),
    }


def mean_interval(values: np.ndarray, seed: int = 0) -> Estimate:
    """Mean of items with its 95% interval: Wilson's for 0/1 items, else a BCa bootstrap over items.

    A bootstrap of 250 wrong answers says [0, 0]; Wilson's interval (https://doi.org/10.2307/2276774) does not.

    >>> estimate = mean_interval(np.zeros(250))
    >>> estimate.value, round(estimate.high, 3)
    (0.0, 0.015)
    """
    values = np.asarray(values, dtype=float)
    if np.isin(values, (0, 1)).all():
        from scipy.stats import binomtest

        found = binomtest(int(values.sum()), len(values)).proportion_ci(0.95, method="wilson")
        return Estimate(float(values.mean()), float(found.low), float(found.high))
    return ratio_interval(values, np.ones_like(values), seed)


def ratio_interval(amounts: np.ndarray, weights: np.ndarray, seed: int = 0) -> Estimate:
    """sum(amounts) / sum(weights) with a BCa bootstrap interval over items (https://doi.org/10.2307/2289144).

    For a mean over tokens the items are conversations: tokens of one conversation are not independent.
    One item, or items that are all alike, have no spread to resample: the interval is then the value itself.
    """
    amounts, weights = np.asarray(amounts, dtype=float), np.asarray(weights, dtype=float)
    value = float(amounts.sum() / weights.sum())
    if len(amounts) < 2 or np.ptp(amounts - value * weights) <= 1e-12 * max(abs(amounts).max(), 1e-300):
        return Estimate(value, value, value)
    from scipy.stats import bootstrap

    found = bootstrap(
        (amounts, weights), ratio, paired=True, vectorized=True, n_resamples=RESAMPLES, method="BCa",
        rng=np.random.default_rng(seed),
    ).confidence_interval  # fmt: skip
    return Estimate(value, float(found.low), float(found.high))


def ratio(amounts: np.ndarray, weights: np.ndarray, axis: int = -1) -> np.ndarray:
    """sum(amounts) / sum(weights) along an axis."""
    return amounts.sum(axis=axis) / weights.sum(axis=axis)


def compare(
    one: np.ndarray, other: np.ndarray, weights: np.ndarray | None = None, lower_is_better: bool = False, seed: int = 0
) -> Comparison:
    """A paired test on the same items: is one's (weighted) mean above the other's, below, or is nothing shown.

    The p-value is that of a sign-flip permutation test (for 0/1 items: McNemar's exact test, up to sampling); the
    interval of the difference a BCa bootstrap. With weights, one and other are sums over each item's weights.
    Raises ValueError when the items are not the same number.
    """
    one, other = np.asarray(one, dtype=float), np.asarray(other, dtype=float)
    check_paired(one, other)
    weights = np.ones_like(one) if weights is None else np.asarray(weights, dtype=float)
    estimate = ratio_interval(one - other, weights, seed)
    p_value = sign_flip_p_value(one - other, seed)
    word = verdict(-estimate.value if lower_is_better else estimate.value, p_value)
    return Comparison(word, estimate.value, estimate.low, estimate.high, p_value)


def check_paired(one: np.ndarray, other: np.ndarray) -> None:
    """Raises ValueError when two models were scored on different numbers of items."""
    if one.shape != other.shape:
        raise ValueError(f"{len(one)} items cannot be paired with {len(other)}: score both models on the same items")


def verdict(gain: float, p_value: float) -> str:
    """What a reader is told.

    >>> verdict(0.2, 0.001), verdict(-0.2, 0.001), verdict(0.2, 0.3)
    ('better', 'worse', 'no difference shown')
    """
    if p_value >= SIGNIFICANCE or gain == 0:
        return "no difference shown"
    return "better" if gain > 0 else "worse"


def sign_flip_p_value(differences: np.ndarray, seed: int = 0) -> float:
    """Two-sided: how often random signs give a sum as far from zero, counting the data themselves once.

    >>> sign_flip_p_value(np.zeros(10)), sign_flip_p_value(np.ones(50)) < 0.001
    (1.0, True)
    """
    nonzero = differences[differences != 0]
    if not len(nonzero):
        return 1.0
    rng, extreme = np.random.default_rng(seed), 0
    seen = abs(nonzero.sum()) * (1 - 1e-12)
    for _ in range(PERMUTATIONS // BLOCK):
        signs = rng.integers(0, 2, size=(BLOCK, len(nonzero)), dtype=np.int8) * 2 - 1
        extreme += int((abs(signs @ nonzero) >= seen).sum())
    return (extreme + 1) / (PERMUTATIONS + 1)
