"""What is said before a run, and that nothing is cut without a yes."""

import doctest
from dataclasses import replace

import pytest

from helpers import budget, hardware, models
from helpers.models import profile
from helpers.show import panel, shown, start, words

SHAPE = models.shape("mistral-7b-v0.3")
T4 = hardware.machine("t4")
TOO_LONG = profile("mistral-7b", seq_len=32768, attention="eager")
PREPARED = {
    "measurements": {"source": "/home/me/hats.csv", "kept": 1304, "heldout_conversations": 100, "train_rows": 1204}
}


@pytest.mark.parametrize("module", [start, shown, words])
def test_examples_in_docstrings(module):
    assert doctest.testmod(module).failed == 0


def test_two_gpus_are_told_of_and_one_or_none_is_not(capsys):
    two = hardware.machine("2xt4")
    for machine in (T4, hardware.machine("none")):
        start.several(profile("mistral-7b"), machine)
    assert capsys.readouterr().out == ""
    for asked, said in ((1, "gpus = 2 among the parameters, 2 share each step"), ("all", "2 of them train")):
        start.several(profile("mistral-7b", gpus=asked), two)
        told = capsys.readouterr().out
        assert "2 × Tesla T4" in told and said in told


def test_a_run_that_would_be_cut_stops_with_the_proposal_and_two_ways_to_accept_it():
    plan = budget.plan(TOO_LONG, SHAPE, T4)
    assert plan.budget.fits and plan.config.data.seq_len < 32768
    with pytest.raises(budget.DoesNotFit) as stopped:
        start.check(TOO_LONG, plan)
    said = str(stopped.value)
    assert "a context of 32,768 tokens" in said and f"{plan.config.data.seq_len:,} tokens" in said
    assert panel.TAKE in said and "accept_plan = True" in said
    start.check(TOO_LONG, plan, accepted=True)


@pytest.mark.parametrize("change", [{"rank": 8}, {"targets": "attention"}, {"seq_len": 512}])
def test_rank_targets_and_context_are_never_another_without_a_yes(change):
    config = profile("mistral-7b")
    plan = budget.plan(config, SHAPE, T4)
    start.check(config, plan)
    with pytest.raises(budget.DoesNotFit, match=str(next(iter(change.values())))):
        start.check(config, replace(plan, config=plan.config.with_values(**change)))


def test_how_the_same_steps_are_computed_needs_no_yes():
    config = profile("mistral-7b")
    plan = budget.plan(config, SHAPE, T4)
    assert plan.config != config
    start.check(config, plan)


def test_bar_sentence_and_button_have_one_remedy():
    sliders = panel.panel(profile("mistral-7b", rank=256, seq_len=32768, checkpointing="none"), SHAPE, T4)
    verdict = shown.plain(sliders.picture.value).partition("✗ It does not fit")[2]
    changes = panel.differences(panel.config_of(sliders), sliders.plan.config, SHAPE)
    assert changes and all(change in verdict and change in shown.plain(sliders.proposal.value) for change in changes)
    assert "seq_len" not in verdict and "seq_len" not in sliders.words.partition("It does not fit")[2]
    sliders.button.click()
    start.check(panel.config_of(sliders), budget.plan(panel.config_of(sliders), SHAPE, T4))


def test_one_line_says_what_will_be_trained():
    config = profile("mistral-7b", rank=32)
    plan = budget.plan(config, SHAPE, T4)
    said = shown.plain(start.words(plan.config, SHAPE, PREPARED, plan.budget))
    assert said.startswith("Training Mistral-7B-v0.3 (7.2 billion weights) on YOUR data hats.csv, 1,204 conversations")
    assert "rank 32 · alpha 32 · learning rate 2e-4 · context 1,024 tokens · 151 steps, about" in said
    sample = {"measurements": PREPARED["measurements"] | {"source": config.data.source}}
    assert "on the SAMPLE ultrachat_200k" in shown.plain(start.words(config, SHAPE, sample, plan.budget))


def test_no_time_is_promised_for_a_cpu():
    config, cpu = profile("tiny"), hardware.machine("cpu")
    shape = models.shape(config.model.model)
    said = shown.plain(start.words(config, shape, PREPARED, budget.budget(config, shape, cpu)))
    assert said.endswith("302 steps") and "(4 million weights)" in said


@pytest.mark.parametrize(
    ("asked", "gpu", "name", "banner"),
    [
        ("auto", "cpu", "tiny", "shows no GPU"),
        ("auto", "p100", "tiny", "DEMO"),
        ("auto", "t4", "mistral-7b", ""),
        ("tiny", "cpu", "tiny", ""),
    ],
)
def test_a_banner_says_when_the_toy_model_stands_in(asked, gpu, name, banner, capsys):
    assert start.profile_of(asked, hardware.machine(gpu)) == name
    said = capsys.readouterr().out
    assert banner in said and ("Change runtime type" in said) == bool(banner)
