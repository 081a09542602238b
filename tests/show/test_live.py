"""The figure and the bar of a training: what they show, how often, and that they stay in their frames."""

import doctest
import io
import re
from xml.etree import ElementTree

import nbformat
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from nbclient import NotebookClient

from helpers.models import ROOT
from helpers.show import live


def logs(loss=0.5):
    return {"loss": loss, "grad_norm": 0.8, "learning_rate": 2e-4}


def seen(steps=60, total=180, limit_gib=14.42):
    """Curves of a run under way."""
    curves = live.Curves(total, limit_gib)
    for step in range(1, steps + 1):
        curves.add(step, logs(2 / step))
        curves.speeds.append((step, 900.0 + step))
    curves.add(steps, {"eval_loss": 0.21})
    curves.vram_gib, curves.left_s = 9.84, 4500.0
    return curves


def test_examples_in_docstrings():
    assert doctest.testmod(live).failed == 0


def test_a_constant_loss_is_its_own_smoothed_value_from_the_first_step_on():
    curves = live.Curves(10)
    for step in range(1, 6):
        curves.add(step, logs(0.5))
    assert curves.smoothed == pytest.approx([0.5] * 5)
    curves.add(6, logs(1.5))
    assert 0.5 < curves.smoothed[-1] < 1.0, "one outlier moves it little"


def test_what_a_dot_means_has_its_colour_beside_its_number_and_a_run_that_is_over_no_bar():
    going, over = (live.picture(seen(steps)) for steps in (60, 180))
    assert (
        f"held out 0.210 <span style='color:{live.RED}'>●</span>" in going
        and f"<circle r='4' fill='{live.RED}'" in going
    )
    assert "●" in going and "<span" not in going.split("aria-label='loss")[1].split("'")[0]
    assert going.count("class='bar'") == 2 and over.count("class='bar'") == 1, "memory keeps its own"


def test_the_page_is_redrawn_every_few_seconds_and_ends_with_the_last_step():
    drawn, clock_s = [], iter(range(1000))
    progress = live.Progress(
        live.Curves(100), lambda curves, last: drawn.append((len(curves.steps), last)), 3.0, lambda: next(clock_s)
    )
    for step in range(1, 101):
        progress.step(step, logs(), tokens_per_s=900, step_s=1.0)
    assert drawn == [(step, False) for step in range(1, 101, 3)]
    progress.close()
    assert drawn[-1] == (100, True)


def test_held_out_points_are_drawn_at_once_and_a_run_that_goes_on_has_its_past():
    history = [
        {"step": 1, **logs(2.0)},
        {"step": 2, **logs(1.0)},
        {"step": 2, "eval_loss": 1.5},
        {"step": 2, "other": 1},
    ]
    progress = live.begin(10, history=history, clock=lambda: 0.0)
    assert progress.curves.steps == [1, 2] and progress.curves.heldout == [(2, 1.5)]
    drawn = []
    progress.show = lambda curves, last: drawn.append(list(curves.heldout))
    progress.heldout(4, 0.9)
    assert drawn == [[(2, 1.5), (4, 0.9)]]


def test_the_figure_has_every_curve_memory_against_its_limit_and_one_clock():
    html = live.picture(seen())
    for words in ("step 60 of 180, 1.2 h left", "33%", "9.84 of 14.42 GiB", "held out 0.210", "960"):
        assert words in html, words
    assert html.count("left") - html.count("left:") == 1, "one clock"
    assert {"loss, smoothed", "learning rate", "gradient norm", "tokens a second"} <= set(
        re.findall(r"<span>([a-z, ]+)</span>", html)
    )
    loss = re.search(r"points='([^']+)'", html)[1].split()
    assert len(loss) == 60
    assert "VRAM" not in live.picture(seen(limit_gib=None)), "no memory of a GPU that is not there"


@settings(max_examples=40, deadline=None)
@given(
    st.lists(st.floats(-1e6, 1e6), min_size=0, max_size=600),
    st.integers(1, 1000),
    st.booleans(),
)
def test_curves_stay_in_their_frame_and_the_picture_is_well_formed(values, more, zero):
    points = list(enumerate(values, 1))
    html = live.chart("loss", "", [(points, "#000", 1, 1)], points[-1:], len(points) + more, zero)
    tree = ElementTree.fromstring(html)
    (line,) = tree.iter("polyline")
    places = [tuple(map(float, pair.split(","))) for pair in line.get("points").split()]
    assert all(-0.1 <= x <= live.WIDE + 0.1 and -0.1 <= y <= live.HIGH + 0.1 for x, y in places)
    assert len(places) <= live.POINTS + 2
    assert not points or places[-1][0] == pytest.approx(live.WIDE * points[-1][0] / (len(points) + more), abs=0.1)


class Terminal(io.StringIO):
    def isatty(self):
        return True


def test_a_terminal_of_80_columns_shows_all_figures_and_a_bar(monkeypatch):
    monkeypatch.setenv("COLUMNS", "80")
    stream, curves = Terminal(), live.Curves(1250, 14.42)
    show = live.terminal(curves, stream)
    for step in range(1, 1251):
        curves.add(step, logs(0.412))
        curves.speeds.append((step, 2512.3))
        curves.vram_gib, curves.left_s = 12.84, (1250 - step) * 10.0 + 1
        show(curves, step == 1250)
    lines = [line for line in re.split(r"[\r\n]+", stream.getvalue()) if "tok/s" in line]
    assert lines and all(len(line) <= 80 for line in lines)
    for line in lines:
        assert (
            "loss 0.412" in line
            and "2,512 tok/s" in line
            and "12.8/14.4 GiB" in line
            and line.rstrip().endswith("left")
        )
        assert len(re.search(r"\|(.*)\|", line)[1]) >= 8, line
    assert "1250/1250" in lines[-1]
    show(curves, False)  # the look at the end, when the bar is closed


def test_in_a_notebook_one_output_is_redrawn():
    """For real: what the kernel sends while the loop runs, and what stands there at the end."""
    source = (
        "from helpers.show import live\n"
        "clock_s = iter(range(100))\n"
        "progress = live.begin(9, clock=lambda: next(clock_s))\n"
        "for step in range(1, 10):\n"
        "    progress.step(step, {'loss': 1 / step}, tokens_per_s=5, step_s=1)\n"
        "progress.close()"
    )
    notebook = nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell(source)])
    updates = []

    class Listener(NotebookClient):
        def process_message(self, msg, cell, cell_index):
            if "display_data" in msg["msg_type"]:
                updates.append((msg["msg_type"], re.search(r"step (\d)", msg["content"]["data"]["text/plain"])[1]))
            return super().process_message(msg, cell, cell_index)

    Listener(notebook, kernel_name="python3").execute(cwd=str(ROOT))
    assert updates == [("display_data", "1"), *(("update_display_data", step) for step in "479")]
    (shown,) = notebook.cells[0].outputs
    assert "step 9 of 9" in shown.data["text/plain"] and "<polyline" in shown.data["text/html"]
