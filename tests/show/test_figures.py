"""The seven figures that teach: their numbers, and that what they draw can be read."""

import doctest
from itertools import combinations, pairwise

import matplotlib.pyplot as plt
import numpy as np
import pytest
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.legend import Legend
from matplotlib.text import Annotation, Text

from helpers import budget, hardware, models, quantize
from helpers.budget import nf4
from helpers.models import ROOT, TINY, profile
from helpers.models.aqlm_sizes import ADDITIVE_2X8
from helpers.quantize import additive
from helpers.show import figures, plots, words

SHAPE, T4 = models.shape("mistral-7b-v0.3"), hardware.machine("t4")
PLANNED = budget.plan(profile("mistral-7b"), SHAPE, T4).config
WEIGHTS = np.random.default_rng(0).normal(size=64)
TEXT = (ROOT / "data" / "evaluation.txt").read_text(encoding="utf-8")


def two_bits() -> tuple[list[float], list[list[float]]]:
    """Three runs of a row of the tiny model, as AQLM 2x8 has them."""
    weight = quantize.stored_weight(TINY, "model.layers.0.self_attn.k_proj")
    return additive.example(weight, ADDITIVE_2X8)


DRAWN = {
    "stages": lambda: figures.stages(figures.stage_sizes(PLANNED, SHAPE, T4), 13.5),
    "lora": lambda: figures.lora(figures.lora_shapes(SHAPE, 16)),
    "nf4": lambda: figures.nf4_rounding(figures.nf4_block(WEIGHTS)),
    "card": lambda: figures.card(figures.card_filling(PLANNED, SHAPE, T4), T4.vram_gib, "free T4"),
    "timeline": lambda: figures.timeline(SHAPE.layers, *figures.kept_gib(PLANNED, SHAPE, T4)),
    "sweep": lambda: figures.sweep(figures.sample_sweep(TINY, TEXT)),
    "additive": lambda: figures.additive(*two_bits()),
}


def test_examples_in_docstrings():
    assert doctest.testmod(figures).failed == 0


@pytest.mark.parametrize("name", DRAWN)
def test_a_figure_is_labelled_closed_and_said_in_words(name, tmp_path):
    figure = DRAWN[name]()
    assert any(axes.get_title() for axes in figure.axes) and not plt.get_fignums()
    image = plots.image(figure, tmp_path / f"{name}.png")
    assert image.alt and figure.axes[0].get_title() in image.alt
    assert image.width < 1000, "as wide as the text, not twice"


@pytest.mark.parametrize("name", DRAWN)
def test_words_lie_over_nothing(name):
    assert clashes(DRAWN[name]()) == []


def clashes(figure):
    """Words of a figure, but its ticks', that lie over other words, over an arrow or over a curve."""
    canvas = FigureCanvasAgg(figure)
    canvas.draw()
    drawn, found = canvas.get_renderer(), []
    legend = [(None, text) for legend in figure.findobj(Legend) for text in legend.get_texts()]
    words = [
        (axes, text) for axes in figure.axes for text in (*axes.texts, axes.title, axes.xaxis.label, axes.yaxis.label)
    ]
    boxes = [
        (text.get_text(), Text.get_window_extent(text, drawn), axes) for axes, text in words + legend if text.get_text()
    ]
    found += [(one, two) for (one, a, _), (two, b, _) in combinations(boxes, 2) if a.overlaps(b)]
    for arrow in (note.arrow_patch for note in figure.findobj(Annotation) if note.arrow_patch):
        found += [
            (said, "an arrow") for said, box, _ in boxes if box.overlaps(arrow.get_window_extent(drawn).padded(8))
        ]
    for line in (line for axes in figure.axes for line in axes.lines if len(line.get_xydata()) > 2):
        points = line.get_transform().transform(line.get_xydata())
        points = np.concatenate([np.linspace(*two, 50) for two in pairwise(points)])
        over = [
            box
            for _, box, axes in boxes
            if axes is line.axes and ((points > box.min) & (points < box.max)).all(1).any()
        ]
        found += [(said, line.get_label()) for said, box, _ in boxes if any(box is one for one in over)]
    return found


def test_stages_are_as_large_as_the_budget_says():
    rows = {stage: (size, vram) for stage, _, size, vram, _ in figures.stage_sizes(PLANNED, SHAPE, T4)}
    assert rows["merge"][0] == pytest.approx(2 * SHAPE.parameters / 2**30, rel=0.01)
    assert rows["quantize"][0] < rows["merge"][0] / 3 and rows["train"][0] < 0.2
    assert all(vram < T4.vram_gib for _, vram in rows.values())


def test_lora_of_a_square_matrix_has_two_thin_ones():
    assert figures.lora_shapes(SHAPE, 16) == {"W": (4096, 4096), "B": (4096, 16), "A": (16, 4096)}


def test_a_block_comes_back_as_its_codes_say():
    block = figures.nf4_block(WEIGHTS)
    levels = nf4.levels()
    assert block.rounded == pytest.approx([levels[code] * block.scale for code in block.codes])
    assert block.scale == np.abs(WEIGHTS).max() and 0.03 < block.error < 0.15
    with pytest.raises(ValueError, match="a block has 64 weights, not 63"):
        figures.nf4_block(WEIGHTS[1:])


def test_the_bars_of_a_card_hold_all_of_the_budget_and_no_crumbs():
    filling = figures.card_filling(PLANNED, SHAPE, T4)
    train = budget.budget(PLANNED, SHAPE, T4).vram
    assert sum(filling["training"].values()) == pytest.approx(train.process_gib)
    assert all(size >= words.SMALL_GIB for parts in filling.values() for name, size in parts.items()
               if name != "smaller parts")  # fmt: skip


def test_checkpointing_saves_what_the_budget_says_and_costs_a_forward_pass():
    whole, held = figures.kept_gib(PLANNED, SHAPE, T4)
    assert held == PLANNED.data.seq_len * PLANNED.train.batch_size * 4096 * 2 / 2**30 and whole > 5 * held
    none, everything = (figures.recomputation(32, count, whole, held) for count in (0, 32))
    assert max(gib for _, gib in none) == pytest.approx(32 * whole)
    assert max(gib for _, gib in everything) == pytest.approx(31 * held + whole)
    assert (none[-1][0], everything[-1][0]) == (96, 128)
    assert none[-1][1] == pytest.approx(0, abs=1e-9) and everything[-1][1] == pytest.approx(0, abs=1e-9)


def test_two_bits_are_a_sum_that_comes_near():
    weights, parts = two_bits()
    assert len(weights) == 24 and [len(part) for part in parts] == [24, 24]
    lost = np.linalg.norm(np.sum(parts, axis=0) - weights) / np.linalg.norm(weights)
    assert 0 < lost < np.linalg.norm(np.subtract(parts[0], weights)) / np.linalg.norm(weights) < 1, "each codebook adds"
    assert f"{lost:.1%} lost" in figures.additive(weights, parts).axes[0].get_title()


def test_the_sweep_loses_less_than_rounding_where_inputs_hang_together_and_as_much_where_not():
    found = figures.sample_sweep(TINY, TEXT)
    assert found.gptq_error < 0.7 * found.rounding_error
    weights = np.random.default_rng(1).normal(size=(16, 32))
    apart = figures.column_sweep(weights, np.eye(32))
    assert apart.gptq_error == pytest.approx(apart.rounding_error)
    levels = {len(np.unique(np.round(row, 9))) for row in weights + apart.changes[32]}
    assert max(levels) <= 16, "four bits are sixteen levels a row"


def test_what_is_not_yet_swept_has_changed_already():
    changes = figures.sample_sweep(TINY, TEXT).changes
    half = min(changes)
    assert np.abs(changes[half][:, half:]).max() > 0
    assert np.allclose(changes[half][:, :half], changes[max(changes)][:, :half]), "a column that is done stays"
