"""What a training does while it runs: a figure in a notebook, a bar in a terminal, and one clock in either.

    progress = live.begin(total_steps=180, limit_gib=14.42)
    progress.step(1, {"loss": 2.1, "grad_norm": 0.8, "learning_rate": 2e-4}, tokens_per_s=900, step_s=2.3, vram_gib=9.8)
    progress.heldout(60, 1.4)
    progress.close()

The figure is drawn as SVG, a millisecond's work: matplotlib would take a good part of a second from two cores that
have a GPU to feed. It takes the page's colours, so that it is right in light and dark.
"""

import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from html import escape
from typing import Any

from IPython import get_ipython
from IPython.display import display

from helpers.budget.hours import duration
from helpers.show.plots import GREEN, ORANGE, PURPLE, RED
from helpers.show.shown import plain

REDRAW_S = 3.0
"""A notebook's page is redrawn at most so often."""
POINTS = 240
"""More in one curve are no wider than the curve's own line."""
MEMORY = 0.9
"""Share of the smoothed loss that the next step leaves; after TensorBoard's smoothing, with its correction."""
WIDE, HIGH = 340, 96
BLUE = "#2f8fd0"  # lighter than the figures': it has to be seen on dark pages too
STYLE = """<style>
.live{max-width:756px;font-size:13px;line-height:1.45;margin:2px}
.live .charts{display:grid;grid-template-columns:repeat(auto-fit,minmax(min(300px,100%),1fr));gap:8px 18px}
.live .name{display:flex;justify-content:space-between}
.live svg{width:100%;height:auto;display:block;overflow:visible}
.live .bar{position:relative;background:rgba(128,128,128,.2);border-radius:3px;height:10px;margin:3px 0 8px}
.live .bar i{position:absolute;top:0;bottom:0;left:0;border-radius:3px}
.live text{font-size:10px;fill:currentColor;opacity:.75}
</style>"""


@dataclass
class Curves:
    """What has been seen of a training, step by step."""

    total_steps: int
    limit_gib: float | None = None
    steps: list[int] = field(default_factory=list)
    losses: list[float] = field(default_factory=list)
    smoothed: list[float] = field(default_factory=list)
    rates: list[tuple[int, float]] = field(default_factory=list)
    norms: list[tuple[int, float]] = field(default_factory=list)
    margins: list[tuple[int, float]] = field(default_factory=list)
    """Of pairs: by how much the better answer is ahead."""
    speeds: list[tuple[int, float]] = field(default_factory=list)
    heldout: list[tuple[int, float]] = field(default_factory=list)
    vram_gib: float | None = None
    left_s: float | None = None
    mean: float = 0.0
    weight: float = 0.0

    def add(self, step: int, logs: Mapping[str, float]) -> None:
        """One entry of the trainer's log: of a step, or of an evaluation."""
        if "eval_loss" in logs and (step, logs["eval_loss"]) not in self.heldout:
            self.heldout.append((step, logs["eval_loss"]))
        if "loss" not in logs:
            return
        self.mean = MEMORY * self.mean + (1 - MEMORY) * logs["loss"]
        self.weight = MEMORY * self.weight + (1 - MEMORY)
        self.steps.append(step)
        self.losses.append(logs["loss"])
        self.smoothed.append(self.mean / self.weight)
        for points, name in ((self.rates, "learning_rate"), (self.norms, "grad_norm"), (self.margins, "margin")):
            if name in logs:
                points.append((step, logs[name]))


class Progress:
    """Takes what is measured step by step and shows it, as a figure or as a bar.

    A class, because what was drawn last and when belongs to one training. clock: seconds, from anywhere.
    """

    def __init__(
        self, curves: Curves, show: Callable[[Curves, bool], None], every_s: float, clock: Callable[[], float]
    ) -> None:
        self.curves, self.show, self.every_s, self.clock = curves, show, every_s, clock
        self.drawn_s: float | None = None

    def step(
        self, step: int, logs: Mapping[str, float], tokens_per_s: float, step_s: float, vram_gib: float | None = None
    ) -> None:
        """One optimizer step: the trainer's log of it, throughput and the seconds of a step of late, peak memory."""
        self.curves.add(step, logs)
        self.curves.speeds.append((step, tokens_per_s))
        self.curves.vram_gib, self.curves.left_s = vram_gib, (self.curves.total_steps - step) * step_s
        now_s = self.clock()
        if self.drawn_s is None or now_s - self.drawn_s >= self.every_s:
            self.drawn_s = now_s
            self.show(self.curves, False)

    def heldout(self, step: int, loss: float) -> None:
        """The loss on held-out conversations after a step; drawn at once, for it took long enough."""
        self.curves.add(step, {"eval_loss": loss})
        self.show(self.curves, False)

    def close(self) -> None:
        """Draw the last state, whenever the one before was."""
        self.show(self.curves, True)


def begin(
    total_steps: int,
    limit_gib: float | None = None,
    history: Sequence[Mapping[str, Any]] = (),
    clock: Callable[[], float] = time.monotonic,
) -> Progress:
    """Show a training that begins, or goes on: history is the trainer's log so far."""
    curves = Curves(total_steps, limit_gib)
    for entry in history:
        curves.add(entry["step"], entry)
    shell = get_ipython()
    if shell is not None and hasattr(shell, "kernel"):
        return Progress(curves, page(), REDRAW_S, clock)
    return Progress(curves, terminal(curves), 0.0, clock)  # tqdm itself writes seldom enough


def unseen(total_steps: int, limit_gib: float | None = None, history: Sequence[Mapping[str, Any]] = ()) -> Progress:
    """Shows nothing: the training is one of several processes', and another one shows it."""
    return Progress(Curves(total_steps, limit_gib), lambda curves, last: None, 0.0, time.monotonic)


def page() -> Callable[[Curves, bool], None]:
    """Draws into one output of a notebook's cell, over what was there."""
    handle: list[Any] = []

    def show(curves: Curves, _last: bool) -> None:
        html = picture(curves)
        content = {"text/html": html, "text/plain": plain(html)}
        if handle:
            handle[0].update(content, raw=True)
        else:
            handle.append(display(content, raw=True, display_id=True))

    return show


def terminal(curves: Curves, stream: Any = None) -> Callable[[Curves, bool], None]:
    """A bar of one line; where nobody can rewrite a line, a line every two seconds at most."""
    from tqdm import tqdm

    stream = stream or sys.stderr
    bar = tqdm(
        total=curves.total_steps,
        initial=curves.steps[-1] if curves.steps else 0,
        file=stream,
        dynamic_ncols=True,
        bar_format="{percentage:3.0f}% |{bar}| {n_fmt}/{total_fmt}{postfix}",
        mininterval=0.1 if stream.isatty() else 2.0,
    )

    def show(seen: Curves, last: bool) -> None:
        if bar.disable:  # closed: the loss on held-out conversations after the end is among the figures
            return
        bar.set_postfix_str(in_short(seen), refresh=False)
        if seen.steps:
            bar.update(seen.steps[-1] - bar.n)
        if last:
            bar.close()

    return show


def in_short(curves: Curves) -> str:
    """The figures of a bar, the most wanted first: at 80 columns all are seen, and a bar of ten.

    >>> in_short(Curves(10, 14.42, [5], [0.5], [0.41234], speeds=[(5, 2512.3)], vram_gib=9.84, left_s=7200))
    'loss 0.412, 2,512 tok/s, 9.8/14.4 GiB, 2.0 h left'
    """
    said = [f"loss {curves.smoothed[-1]:.3f}"] if curves.smoothed else []
    said += [f"margin {curves.margins[-1][1]:.2f}"] if curves.margins else []
    said += [f"{curves.speeds[-1][1]:,.0f} tok/s"] if curves.speeds else []
    if curves.vram_gib is not None and curves.limit_gib:
        said.append(f"{curves.vram_gib:.1f}/{curves.limit_gib:.1f} GiB")
    said += [f"{duration(curves.left_s / 3600)} left"] if curves.left_s else []
    return ", ".join(said)


def picture(curves: Curves) -> str:
    """The figure as HTML: progress, four charts, memory against its limit."""
    step = curves.steps[-1] if curves.steps else 0
    left = f", {duration(curves.left_s / 3600)} left" if curves.left_s else ""
    share = step / max(curves.total_steps, 1)
    loss = list(zip(curves.steps, curves.losses, strict=True))
    smooth = list(zip(curves.steps, curves.smoothed, strict=True))
    held = f" · held out {curves.heldout[-1][1]:.3f} <span style='color:{RED}'>●</span>" if curves.heldout else ""
    value = f"{curves.smoothed[-1]:.3f}{held}" if smooth else ""
    end = curves.total_steps
    rate = mark(curves.rates[-1][1]) if curves.rates else ""
    charts = [
        chart("loss, smoothed", value, [(loss, BLUE, 0.5, 1), (smooth, BLUE, 1, 2)], curves.heldout, end),
        chart("learning rate", rate, [(curves.rates, GREEN, 1, 2)], [], end, zero=True),
        chart("gradient norm", latest(curves.norms, ".3g"), [(curves.norms, ORANGE, 1, 1.5)], [], end, zero=True),
        chart("tokens a second", latest(curves.speeds, ",.0f"), [(curves.speeds, PURPLE, 1, 1.5)], [], end, zero=True),
    ]
    if curves.margins:
        value = latest(curves.margins, ".2f")
        charts.insert(1, chart("margin of pairs", value, [(curves.margins, GREEN, 1, 2)], [], end, zero=True))
    return (
        f"{STYLE}<div class='live'><div class='name'><b>step {step:,} of {curves.total_steps:,}{left}</b>"
        f"<span>{share:.0%}</span></div>{filled(share, BLUE) if share < 1 else ''}{memory(curves)}"
        f"<div class='charts'>{''.join(charts)}</div></div>"
    )


def memory(curves: Curves) -> str:
    """Peak VRAM against its limit, HTML; "" without a GPU."""
    if curves.vram_gib is None or not curves.limit_gib:
        return ""
    share = curves.vram_gib / curves.limit_gib
    words = f"{curves.vram_gib:.2f} of {curves.limit_gib:.2f} GiB at the peak"
    colour = RED if share > 0.97 else GREEN
    return f"<div class='name'><span>VRAM</span><span>{words}</span></div>{filled(share, colour)}"


def filled(share: float, colour: str) -> str:
    """A bar filled to a share, HTML."""
    return f"<div class='bar'><i style='width:{100 * min(share, 1):.1f}%;background:{colour}'></i></div>"


def latest(points: Sequence[tuple[int, float]], form: str) -> str:
    """The last value, as it is written; "" before there is one."""
    return format(points[-1][1], form) if points else ""


def chart(
    name: str,
    value: str,
    lines: Sequence[tuple[Sequence[tuple[int, float]], str, float, float]],
    dots: Sequence[tuple[int, float]],
    end: int,
    zero: bool = False,
) -> str:
    """One chart: its name, its newest value, curves of (points, colour, opacity, width), dots over them; HTML.

    end: the last step of the run, where the axis ends from the beginning. zero: the axis starts at 0.
    """
    seen = [y for points, *_ in lines for _, y in points] + [y for _, y in dots]
    low, high = (min(seen), max(seen)) if seen else (0.0, 1.0)
    low = min(low, 0.0) if zero else low
    span = (high - low) or abs(high) or 1.0

    def place(x: int, y: float) -> str:
        return f"{WIDE * x / max(end, 1):.1f},{HIGH - HIGH * (y - low) / span:.1f}"

    drawn = [
        f"<polyline fill='none' stroke='{colour}' stroke-opacity='{opacity}' stroke-width='{width}' "
        f"points='{' '.join(place(*point) for point in thinned(points))}'/>"
        for points, colour, opacity, width in lines
    ]
    drawn += [f"<circle r='4' fill='{RED}' cx='{x}' cy='{y}'/>" for x, y in (place(*dot).split(",") for dot in dots)]
    words = escape(f"{name}: {plain(value) or 'nothing yet'}, from {mark(low)} to {mark(high)}", quote=True)
    return (
        f"<div><div class='name'><span>{name}</span><b>{value}</b></div>"
        f"<svg viewBox='-2 -12 {WIDE + 4} {HIGH + 26}' role='img' aria-label='{words}'>"
        f"<path d='M0,{HIGH}H{WIDE}' stroke='currentColor' stroke-opacity='.35'/>{''.join(drawn)}"
        f"<text text-anchor='end' x='{WIDE}' y='-3'>{mark(high)}</text>"
        f"<text text-anchor='end' x='{WIDE}' y='{HIGH + 11}'>{mark(low)}</text></svg></div>"
    )


def mark(value: float) -> str:
    """A figure at an axis' end: three digits, small ones as learning rates are written.

    >>> mark(2.6561), mark(3773.8), mark(0.0005), mark(0.02062), mark(0)
    ('2.66', '3,774', '5e-4', '0.0206', '0')
    """
    if 0 < abs(value) < 0.01 and f"{value:.3g}" != "0.01":
        digits, power = f"{value:.1e}".split("e")
        return f"{float(digits):g}e{int(power)}"
    return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.3g}"


def thinned(points: Sequence[tuple[int, float]]) -> Sequence[tuple[int, float]]:
    """At most about POINTS of them, evenly, the last among them."""
    apart = -(-len(points) // POINTS)
    return points if apart <= 1 else [*points[:-1:apart], points[-1]]
