"""Figures: every one has its axes named with units, says what it should, and is written as a PNG."""

import matplotlib.pyplot as plt
import numpy as np
import pytest
from matplotlib.colors import to_hex
from matplotlib.patches import Rectangle

from helpers.budget import nf4
from helpers.show import plots

MODELS = {
    "base": {"perplexity": 5.6, "exact_match": 0.0, "size_bytes": 14_500_000_000, "tokens_per_s": 33.0},
    "finetuned": {"perplexity": 4.2, "exact_match": 0.7, "size_bytes": 160_000_000, "size_with_base_bytes": 14.66e9},
    "gptq": {"perplexity": 4.3, "exact_match": 0.69, "size_bytes": 4_160_000_000, "tokens_per_s": 35.0},
}
INTERVALS = {"perplexity": [4.0, 5.9], "exact_match": [0.0, 0.8]}
REPORT = {name: entry | {"intervals": INTERVALS, "prompt_tokens": 128} for name, entry in MODELS.items()}
LOG = [{"step": step, "loss": 2 / step, "learning_rate": 1e-4} for step in range(1, 40)] + [
    {"step": 40, "eval_loss": 1}
]
WEIGHTS = np.random.default_rng(0).normal(size=(32, 256)).astype(np.float32)
FIGURES = {
    "loss": lambda: plots.loss_curve(LOG),
    "quality": lambda: plots.quality(REPORT),
    "size": lambda: plots.size_against_quality(REPORT),
    "speed": lambda: plots.speed(REPORT),
    "memory": lambda: plots.memory({"base": 4.6, "planned": 9.0}, {"base": 4.5}, limit_gib=14.42),
    "nf4": lambda: plots.nf4_levels(nf4.levels(), nf4.library_levels()),
    "lengths": lambda: plots.length_histogram([10, 20, 700], 512),
    "weights": lambda: plots.weights_before_after(WEIGHTS, WEIGHTS.round(1), 128),
}


def words(figure):
    """All text of a figure."""
    return " ".join(text.get_text() for text in figure.findobj(plt.Text))


def test_a_dark_page_shows_the_dark_figure_and_a_narrow_one_none_that_is_too_small(tmp_path):
    picture = plots.image(FIGURES["lengths"](), tmp_path / "lengths.png")
    html = picture._repr_html_()
    for page in plots.DARK_PAGES:
        assert f"{page} .figure .dark{{display:inline}}" in html and f"{page} .figure .light{{display:none}}" in html
    assert html.count(f"alt='{picture.alt}'") == 2 and picture.dark in html
    assert html.count(f"max(100%,{plots.READABLE_PX}px)") == 2


@pytest.mark.parametrize("name", FIGURES)
def test_in_the_dark_words_are_light_and_colours_stay_and_the_figure_itself_is_as_it_was(name):
    figure = FIGURES[name]()
    dark = plots.in_the_dark(figure)
    assert not plt.get_fignums() and words(dark) == words(figure)
    assert [to_hex(one.get_facecolor()) for one in (figure, dark)] == [plots.WHITE, plots.PAGE]
    assert plots.BLACK in inks(figure) and plots.BLACK not in inks(dark)
    bars = [{to_hex(bar.get_facecolor()) for bar in one.findobj(Rectangle)} for one in (figure, dark)]
    assert bars[0] - {plots.BLACK, plots.WHITE} <= bars[1]


def test_arrows_and_what_stands_behind_words_turn_too():
    figure, axes = plots.canvas()
    axes.annotate("", (1, 1), (0, 0), arrowprops={"arrowstyle": "->"})
    axes.text(0, 0, "limit", bbox={"facecolor": "white"})
    arrow, box = plots.in_the_dark(figure).axes[0].texts
    assert to_hex(arrow.arrow_patch.get_edgecolor()) == plots.INK
    assert to_hex(box.get_bbox_patch().get_facecolor()) == plots.PAGE


def inks(figure):
    """The colours of a figure's words."""
    return {to_hex(text.get_color()) for text in figure.findobj(plt.Text)}


@pytest.mark.parametrize("name", FIGURES)
def test_a_figure_is_labelled_closed_and_saved(name, tmp_path):
    figure = FIGURES[name]()
    assert all(axes.get_xlabel() or axes.get_ylabel() for axes in figure.axes)
    assert any(axes.get_title() for axes in figure.axes)
    assert figure.get_size_inches()[0] == plots.WIDTH
    path = plots.save(figure, tmp_path / "deep" / f"{name}.png")
    assert path.read_bytes().startswith(b"\x89PNG")
    assert not plt.get_fignums()  # an open figure would be shown twice in a notebook


def test_bars_stand_at_the_values_and_whiskers_at_the_interval():
    axes = plots.quality(REPORT).axes[0]
    assert [bar.get_height() for bar in axes.patches] == [5.6, 4.2, 4.3]
    whiskers = axes.collections[0].get_segments()
    assert np.allclose([point[1] for point in whiskers[0]], [4.0, 5.9])


def test_without_exact_match_rouge_stands_in_its_place():
    open_ended = {name: entry | {"exact_match": None, "rouge_l": 0.3} for name, entry in REPORT.items()}
    assert "ROUGE-L" in words(plots.quality(open_ended))


def test_an_adapter_is_drawn_with_its_base_and_labelled_with_its_own_size():
    text = words(plots.size_against_quality(REPORT))
    assert "finetuned: 0.149 GiB + base" in text
    assert "gptq: 3.87 GiB" in text
    small = {name: entry | {"size_bytes": 2**20, "size_with_base_bytes": None} for name, entry in REPORT.items()}
    assert "1 MiB" in words(plots.size_against_quality(small))


def test_memory_shows_only_what_is_both_predicted_and_measured_with_its_error():
    text = words(FIGURES["memory"]())
    assert "predicted +2.2%" in text and "limit 14.42 GiB" in text
    assert "planned" not in text


def test_a_histogram_says_how_many_are_longer_than_the_context():
    assert "context 512, 33.3% longer" in words(FIGURES["lengths"]())


def test_the_error_of_each_group_is_relative_to_its_weights():
    after = WEIGHTS.copy()
    after[:, 128:] *= 1.1
    heights = [bar.get_height() for bar in plots.weights_before_after(WEIGHTS, after, 128).axes[1].patches]
    assert np.allclose(heights, [0.0, 0.1], atol=1e-6)


@pytest.mark.parametrize(
    ("draw", "sentence"),
    [
        (lambda: plots.loss_curve([]), "the log has no loss"),
        (lambda: plots.length_histogram([], 512), "no conversation to draw"),
        (lambda: plots.memory({"a": 1.0}, {"b": 1.0}), "no run has both"),
        (lambda: plots.weights_before_after(WEIGHTS, WEIGHTS[:4], 128), "cannot be held against"),
    ],
)
def test_nothing_to_draw_is_said_in_a_sentence(draw, sentence):
    with pytest.raises(ValueError, match=sentence):
        draw()


DICHROMACY = {  # Machado et al. 2009, https://doi.org/10.1109/TVCG.2009.113, severity 1, of linear RGB
    "normal": [[1, 0, 0], [0, 1, 0], [0, 0, 1]],
    "protanopia": [[0.1523, 1.0526, -0.2049], [0.1145, 0.7863, 0.0992], [-0.0039, -0.0481, 1.0520]],
    "deuteranopia": [[0.3673, 0.8606, -0.2280], [0.2801, 0.6725, 0.0474], [-0.0118, 0.0429, 0.9689]],
    "tritanopia": [[1.2555, -0.0767, -0.1788], [-0.0784, 0.9308, 0.1476], [0.0047, 0.6914, 0.3039]],
}  # fmt: skip


@pytest.mark.parametrize("kind", DICHROMACY)
def test_the_first_five_colours_are_told_apart_by_every_kind_of_colour_vision(kind):
    codes = [[int(colour[i : i + 2], 16) / 255 for i in (1, 3, 5)] for colour in plots.COLOURS[:5]]
    linear = np.where(np.array(codes) <= 0.04045, np.array(codes) / 12.92, ((np.array(codes) + 0.055) / 1.055) ** 2.4)
    seen = np.clip(linear @ np.array(DICHROMACY[kind]).T, 0, 1) ** (1 / 2.4)  # back to what a screen shows
    distances = np.linalg.norm(seen[:, None] - seen[None], axis=-1)[~np.eye(5, dtype=bool)]
    assert distances.min() > 0.2
