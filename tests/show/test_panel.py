"""The panel without a browser: values in and out, what it draws, what it says where nothing can be drawn."""

import re
from itertools import pairwise

import nbformat
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from nbclient import NotebookClient

from helpers import budget, hardware, models
from helpers.config import RunConfig
from helpers.show import panel as widgets

SHAPE = models.shape("mistral-7b-v0.3")
T4 = hardware.machine("t4")


def panel(machine=T4, **values):
    return widgets.panel(models.profile("mistral-7b", **values), SHAPE, machine)


def text(html):
    """What a person reads of some HTML."""
    return re.sub(r"\s+", " ", re.sub(r"<style>.*?</style>|<[^>]+>", " ", html, flags=re.DOTALL)).replace("&nbsp;", " ")


@pytest.mark.parametrize("profile", models.PROFILES)
@pytest.mark.parametrize("gpu", ["t4", "cpu"])
def test_the_values_of_the_parameters_cell_come_out_as_they_went_in(profile, gpu):
    config = models.profile(profile, rank=8, alpha=4, learning_rate=3e-4)
    assert widgets.config_of(widgets.panel(config, SHAPE, hardware.machine(gpu))) == config


@settings(max_examples=25, deadline=None)
@given(
    rank=st.integers(1, 1024),
    alpha=st.floats(0.01, 4096),
    learning_rate=st.floats(1e-8, 1),
    seq_len=st.integers(16, SHAPE.max_context),
    batch_size=st.integers(1, 1024),
    accumulation=st.integers(1, 4096),
    targets=st.sampled_from(["all-linear", "attention", "q_proj", "gate_proj,up_proj"]),
    checkpointing=st.sampled_from(["auto", "all", "none"]) | st.integers(1, SHAPE.layers - 1),
)
def test_no_value_is_rounded_to_a_stop_of_its_slider(**values):
    config = RunConfig().with_values(**values)
    assert widgets.config_of(widgets.panel(config, SHAPE, T4)) == config


def test_moving_a_slider_changes_the_configuration_the_bar_and_the_arithmetic():
    sliders = panel(checkpointing="all")
    before = sliders.picture.value
    sliders.controls["rank"].value = 256
    assert widgets.config_of(sliders) == models.profile("mistral-7b", rank=256, checkpointing="all")
    assert sliders.picture.value != before
    assert "α/r = 0.125" in text(sliders.derived.value)
    assert f"{SHAPE.lora_parameters(256, SHAPE.linears) / 1e6:.1f} M trained" in text(sliders.derived.value)


def test_all_other_settings_survive_the_sliders():
    config = models.profile("mistral-7b", seed=7, optimizer="adamw_torch", bits=8)
    sliders = widgets.panel(config, SHAPE, T4)
    sliders.controls["rank"].value = 4
    assert widgets.config_of(sliders) == config.with_values(rank=4)


def test_it_says_in_words_and_marks_what_its_colours_say():
    sliders = panel(checkpointing="all")
    assert "✓ It fits" in text(sliders.picture.value)
    sliders.controls["seq_len"].value = 32768
    needs = budget.budget(widgets.config_of(sliders), SHAPE, T4)
    assert not needs.fits
    assert "✗ It does not fit" in text(sliders.picture.value)
    assert all(reason in text(sliders.picture.value) for reason in needs.reasons)
    assert "class='over'" in sliders.picture.value


def test_the_proposal_is_taken_whole_and_then_there_is_none_left():
    sliders = panel(seq_len=8192, checkpointing="none")
    assert not budget.budget(widgets.config_of(sliders), SHAPE, T4).fits
    assert "→" in sliders.proposal.value and not sliders.button.disabled
    proposed = sliders.plan
    sliders.button.click()
    taken = widgets.config_of(sliders)
    assert widgets.differences(taken, proposed.config, SHAPE) == []
    assert budget.budget(taken, SHAPE, T4).fits and "✓ It fits" in text(sliders.picture.value)
    assert sliders.button.disabled and "→" not in sliders.proposal.value


def test_auto_shows_what_the_plan_makes_of_it():
    sliders = panel(checkpointing="auto")
    planned = budget.plan(widgets.config_of(sliders), SHAPE, T4).budget
    assert f"{planned.vram.process_gib:.2f} of {planned.vram.limit_gib:.2f} GiB" in text(sliders.picture.value)


def test_a_run_that_is_none_is_a_sentence_in_the_panel_and_the_next_value_mends_it():
    sliders = panel(seq_len=2 * SHAPE.max_context)
    assert "seq_len must be" in text(sliders.picture.value) and sliders.button.disabled
    assert "seq_len must be" in sliders.words
    sliders.controls["seq_len"].value = 1024
    assert "✓ It fits" in text(sliders.picture.value)


def test_without_a_gpu_the_bar_is_of_the_ram():
    machine = hardware.machine("cpu")
    sliders = widgets.panel(models.profile("tiny"), SHAPE, machine)
    assert f"of {machine.host.ram_gib:.2f} GiB" in text(sliders.picture.value)
    assert "no GPU" in text(sliders.picture.value)


def test_names_from_outside_are_escaped():
    assert "<script>" not in widgets.bar({"<script>": 1.0}, 2.0) + widgets.key({"<script>": 1.0})
    assert "'" not in re.search(r'title="([^"]*)"', widgets.bar({"a 'b' \"c\"": 1.0}, 2.0))[1]


@given(st.dictionaries(st.sampled_from(sorted(widgets.COLOURS)), st.floats(0, 100), max_size=8), st.floats(0, 100))
def test_the_bar_never_leaves_its_frame(parts, limit_gib):
    places = re.findall(r"left:([\d.]+)%;width:([\d.]+)%", widgets.bar(parts, limit_gib))
    assert len(places) == len(parts)
    assert all(float(left) + float(width) <= 100.1 for left, width in places)
    assert ("class='over'" in widgets.bar(parts, limit_gib)) == (sum(parts.values()) > limit_gib)


@pytest.mark.parametrize(
    "values",
    [{}, {"attention": "eager"}, {"loss": "full", "upcast": True}, {"checkpointing": 3}, {"weights": "int8"}],
)
def test_neighbours_in_the_bar_differ_in_colour(values):
    parts = budget.budget(models.profile("mistral-7b", **values), SHAPE, T4).vram.parts
    colours = [widgets.colour_of(name) for name in parts]
    assert all(one != next_one for one, next_one in pairwise(colours)), dict(zip(parts, colours, strict=True))


def test_a_notebook_shows_sliders_or_words():
    """Executed for real, as a headless run does; the front end that draws the sliders is test_panel_browser's."""
    cells = [
        "from helpers import hardware, models\nfrom helpers.show import panel",
        "config = models.profile('mistral-7b', rank=8)",
        "panel.panel(config, models.shape('mistral-7b-v0.3'), hardware.machine('t4'))",
    ]
    notebook = nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell(source) for source in cells])
    NotebookClient(notebook, kernel_name="python3").execute(cwd=str(models.ROOT))
    (shown,) = notebook.cells[2].outputs
    assert "application/vnd.jupyter.widget-view+json" in shown.data
    words = shown.data["text/plain"]
    assert "rank r 8" in words and budget.table(panel(rank=8).plan.budget) in words
