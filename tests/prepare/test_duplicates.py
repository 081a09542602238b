"""Near duplicates, outliers and the sentences about the hub."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from helpers.models.hub import hub_sentence
from helpers.prepare.duplicates import BINS, SIMILAR, groups, similarity, sketches
from helpers.prepare.outliers import SCRIPTS, far_lengths, language_name, languages, rare, script


def shingles(text):
    text = " ".join(text.split()).lower() + "\0" * 7
    return {text[i : i + 8] for i in range(len(text) - 7)}


def sentences(count, words=40, seed=0):
    rng = np.random.default_rng(seed)
    vocabulary = [f"{a}{b}" for a in ("ri", "sto", "la", "brea", "clou") for b in range(60)]
    return [" ".join(rng.choice(vocabulary, words)) for _ in range(count)]


def test_the_estimate_is_near_the_share_of_windows_in_common():
    texts = sentences(200)
    cut = [text[: len(text) * (50 + i % 50) // 100] for i, text in enumerate(texts)]
    estimates = similarity(sketches(texts), sketches(cut))
    exact = [len(shingles(a) & shingles(b)) / len(shingles(a) | shingles(b)) for a, b in zip(texts, cut, strict=True)]
    assert np.abs(estimates - exact).mean() < 0.08
    assert abs((estimates - exact).mean()) < 0.03


def test_near_duplicates_are_found_and_others_are_not():
    texts = sentences(500)
    nearly = [text.replace(text.split()[10], "changed", 1) for text in texts]
    found = groups(sketches(texts + nearly + sentences(500, seed=1)))
    assert (found[500:1000] == np.arange(500)).mean() > 0.98
    assert (found[:500] == np.arange(500)).all() and (found[1000:] == np.arange(1000, 1500)).all()


def test_chains_and_many_equals_are_one_group():
    text = sentences(1)[0]
    assert groups(sketches([text] * 1000)).max() == 0
    assert groups(sketches(["", "", "a", "b"])).tolist() == [0, 1, 2, 3], "empty texts are like nothing"


@settings(max_examples=50, deadline=None)
@given(st.lists(st.text(max_size=40), min_size=1, max_size=5))
def test_any_text_has_a_sketch_that_knows_neither_case_nor_neighbours(texts):
    together = sketches(texts)
    assert together.shape == (len(texts), BINS)
    for text, sketch in zip(texts, together, strict=True):
        assert (sketches([text])[0] == sketch).all()
        assert (sketches([f"  {text.replace(' ', '  ')}".strip(" ")])[0] == sketches([text.strip(" ")])[0]).all()


def test_the_threshold_is_the_one_that_is_documented():
    assert SIMILAR == 0.8


@pytest.mark.parametrize(
    ("text", "name"),
    [
        ("Hello", "Latin"), ("naïve café", "Latin"), ("Привет", "Cyrillic"), ("Γειά", "Greek"), ("שלום", "Hebrew"),
        ("مرحبا", "Arabic"), ("नमस्ते", "Indic"), ("สวัสดี", "Thai or Lao"), ("안녕", "Hangul"), ("世界", "Han or kana"),
        ("12 + 3 = 15", "none"), ("🙂", "none"), ("", "none"), ("Say привет twice: привет", "Cyrillic"),
    ],
)  # fmt: skip
def test_scripts(text, name):
    assert SCRIPTS[script(text)] == name


@pytest.mark.parametrize(
    ("text", "name"),
    [
        ("Guten Morgen, wie geht es dir heute? Mir geht es gut, danke der Nachfrage.", "de"),
        ("Quel est le nom du jardinier? Il s'appelle Yara et il aime les pommes.", "fr"),
        ("Hello! Hi, how can I help you today?", "en"),
        ("你好，世界。今天天气很好。", "zh"),
        ("for i in range(10):\n    print(i, f(i))", "not sure"), ("12 + 3 = 15", "not sure"), ("", "not sure"),
        ("x", "not sure"), ("\ud800 alone", "not sure"),
    ],
)  # fmt: skip
def test_languages(text, name):
    assert language_name(languages([text])[0]) == name


def test_outliers_need_enough_to_compare_with():
    assert not far_lengths(np.array([10, 10, 10_000])).any()
    assert np.flatnonzero(far_lengths(np.array([10] * 200 + [201, 200]))).tolist() == [200]
    assert not rare(np.array([1, 1, 3])).any()
    assert np.flatnonzero(rare(np.array([1] * 200 + [3, 0]))).tolist() == [200], "digits alone are no script"


def raised(name, cause=None):
    error = type(name, (Exception,), {})("details\nover lines")
    error.__cause__ = cause
    return error


@pytest.mark.parametrize(
    ("error", "kind", "says"),
    [
        (
            raised("OSError", raised("GatedRepoError")),
            "model",
            "accept its terms at huggingface.co/a/b, then set HF_TOKEN",
        ),
        (raised("GatedRepoError"), "dataset", "accept its terms at huggingface.co/datasets/a/b"),
        (raised("RepositoryNotFoundError"), "model", "neither a path here nor on the hub"),
        (raised("ConnectionError"), "dataset", "check the network, or give a local path"),
    ],
)
def test_what_the_hub_says_is_one_sentence_with_a_remedy(error, kind, says):
    sentence = hub_sentence(error, kind, "a/b")
    assert says in sentence and sentence.startswith(f"{kind} a/b") and "\n" not in sentence
