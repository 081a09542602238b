"""Figures: each function returns a matplotlib Figure, `save` writes it as PNG.

Colours are Okabe and Ito's (https://jfly.uni-koeln.de/color/), which people with any kind of colour vision tell apart;
what a colour says is also said by a word, a place or a hatch. Units stand in the labels.
"""

import base64
import copy
import io
from collections.abc import Iterable, Mapping, Sequence
from html import escape
from pathlib import Path
from typing import Any

import matplotlib.pyplot as plt
import numpy as np
from IPython.display import Image
from matplotlib.axes import Axes
from matplotlib.colors import to_hex, to_rgba, to_rgba_array
from matplotlib.figure import Figure
from matplotlib.legend import Legend
from matplotlib.text import Text
from matplotlib.ticker import PercentFormatter

BLUE, ORANGE, GREEN, RED, SKY, PURPLE, YELLOW, BLACK, WHITE = (
    "#0072B2", "#E69F00", "#009E73", "#D55E00", "#56B4E9", "#CC79A7", "#F0E442", "#000000", "#ffffff",
)  # fmt: skip
COLOURS = (BLUE, ORANGE, SKY, RED, YELLOW, PURPLE, GREEN, "#999999")  # in this order the first five differ most
HATCHES = ("", "//", "..", "xx", "\\\\", "++", "oo", "--")
WIDTH = 8.0  # inches: a notebook's column
STYLE = {
    "font.size": 11,
    "axes.titlesize": 12,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.axisbelow": True,
    "grid.alpha": 0.3,
    "figure.dpi": 100,
    "hatch.linewidth": 0.6,
}
MIB, GIB = 2**20, 2**30
COUNT = "{x:,.0f}"
"""How an axis that counts is written."""
BEHIND_WORDS = {"facecolor": "white", "alpha": 0.8, "edgecolor": "none", "pad": 1}
"""So that a line behind them leaves them readable."""
READABLE_PX = 600
"""A figure is never shown narrower: its words would be less than 8 pixels high."""
INK, PAGE = "#dddddd", "#16181b"
"""Black and white of a dark page."""
DARK_PAGES = ("[data-jp-theme-light='false']", "[theme='dark']", ".vscode-dark")
"""How pages say that they are dark: JupyterLab's and nbconvert's, Colab's, VS Code's."""
THEMES = ".figure .dark{display:none}" + "".join(
    f"{page} .figure .dark{{display:inline}}{page} .figure .light{{display:none}}" for page in DARK_PAGES
)
Report = Mapping[str, Mapping[str, Any]]


def save(figure: Figure, path: Path | str) -> Path:
    """Write a figure as PNG, at 150 dots an inch; makes the folder."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=150, bbox_inches="tight")
    return path


class Picture(Image):
    """A figure for a notebook's cell, at the size of the text around it, dark where the page is.

    A class, because a front end that draws HTML gets that, and one that does not gets the PNG.
    """

    dark = ""

    def _repr_html_(self) -> str:
        """Both figures, of which the page's theme shows one; a narrow page scrolls them before words are too small."""
        size = f"height:auto;max-width:none;width:min({self.width}px,max(100%,{READABLE_PX}px))"
        light = f"data:image/png;base64,{base64.b64encode(self.data).decode()}"
        images = "".join(
            f"<img class='{kind}' alt='{escape(self.alt, quote=True)}' src='{source}' style='{size}'>"
            for kind, source in (("light", light), ("dark", self.dark))
        )
        return f"<style>{THEMES}</style><div class='figure' style='overflow-x:auto'>{images}</div>"


def image(figure: Figure, path: Path | str) -> Picture:
    """A figure for a notebook's cell: saved, and with its titles as alt text."""
    picture = Picture(str(save(figure, path)), retina=True, alt=alt_text(figure))
    picture.dark = png_data(in_the_dark(figure))
    return picture


def png_data(figure: Figure, dpi: int = 150) -> str:
    """A figure as a data URI; where it is drawn for a dark page, with that page behind it."""
    stream = io.BytesIO()
    dark = to_hex(figure.get_facecolor()) == PAGE
    figure.savefig(stream, dpi=dpi, bbox_inches="tight", transparent=dark)
    return "data:image/png;base64," + base64.b64encode(stream.getvalue()).decode()


def in_the_dark(figure: Figure) -> Figure:
    """A copy whose black and white are those of a dark page; colours stay as they are, for they mean something."""
    figure, others = copy.deepcopy(figure), {BLACK: INK, WHITE: PAGE}
    artists = figure.findobj()
    texts = [artist for artist in artists if isinstance(artist, Text)]
    behind = [part for text in texts for part in (text.get_bbox_patch(), getattr(text, "arrow_patch", None))]
    for artist in [*artists, *filter(None, behind)]:
        for kind in ("color", "facecolor", "edgecolor", "markerfacecolor", "markeredgecolor"):
            if not (hasattr(artist, f"get_{kind}") and hasattr(artist, f"set_{kind}")):
                continue
            found = to_rgba_array(getattr(artist, f"get_{kind}")())
            new = [to_rgba(others.get(to_hex(one), to_hex(one)), one[3]) if one[3] else one for one in found]
            if new and not np.array_equal(found, new):
                getattr(artist, f"set_{kind}")(new if len(new) > 1 else new[0])
    return figure


def alt_text(figure: Figure) -> str:
    """What a figure shows, for those who do not see it: its titles, axes and legends."""
    said = [
        f"{axes.get_title()} ({' against '.join(filter(None, (axes.get_ylabel(), axes.get_xlabel())))})"
        for axes in figure.axes
        if axes.get_title()
    ]
    names = [text.get_text() for legend in figure.findobj(Legend) for text in legend.get_texts()]
    return "; ".join([*said, *dict.fromkeys(names)])


def canvas(columns: int = 1, height: float = 3.6, rows: int = 1, **options: Any) -> tuple[Figure, Any]:
    """A figure of notebook width, in this file's style, and its axes. Closed, so that a notebook shows it once."""
    with plt.rc_context(STYLE):
        figure, axes = plt.subplots(rows, columns, figsize=(WIDTH, height), layout="constrained", **options)
    plt.close(figure)
    return figure, axes


def loss_curve(log: Sequence[Mapping[str, float]]) -> Figure:
    """Training loss, held-out loss and learning rate by step, from a trainer's log history.

    Raises ValueError when the log has no loss.
    """
    train = [(row["step"], row["loss"]) for row in log if "loss" in row]
    heldout = [(row["step"], row["eval_loss"]) for row in log if "eval_loss" in row]
    rate = [(row["step"], row["learning_rate"]) for row in log if "learning_rate" in row]
    if not train:
        raise ValueError("the log has no loss in it: give the trainer's log history, log.json of a finetune stage")
    figure, (above, below) = canvas(rows=2, height=4.6, sharex=True, gridspec_kw={"height_ratios": (3, 1)})
    steps, losses = zip(*train, strict=True)
    above.plot(steps, losses, color=SKY if len(train) > 20 else BLUE, linewidth=1, label="training, each step")
    if len(train) > 20:
        above.plot(steps, smooth(losses), color=BLUE, linewidth=2, label="training, smoothed")
    if heldout:
        above.plot(*zip(*heldout, strict=True), color=RED, marker="o", linestyle="--", label="held out")
    above.set(ylabel="loss (nats a token)", title="Loss")
    above.legend(frameon=False)
    if rate:
        below.plot(*zip(*rate, strict=True), color=GREEN)
    below.ticklabel_format(axis="y", style="sci", scilimits=(0, 0))
    below.set(xlabel="optimizer step", ylabel="learning rate", ylim=(0, None))
    return figure


def preferences(logs: Mapping[str, Sequence[Mapping[str, float]]]) -> Figure:
    """Of trainings on pairs, by name: the margin by step, and what both answers' log-probability does meanwhile.

    logs: trainers' log histories. Raises ValueError for one without margins.
    """
    figure, (left, right) = canvas(columns=2)
    for (name, log), colour in zip(logs.items(), COLOURS, strict=False):
        rows = [row for row in log if "margin" in row]
        if not rows:
            raise ValueError(f"the log of {name} has no margin: give log.json of a finetune stage with method=dpo")
        steps = [row["step"] for row in rows]
        left.plot(steps, smooth([row["margin"] for row in rows]), color=colour, linewidth=2, label=name)
        for side, style in (("chosen", "-"), ("rejected", ":")):
            values = smooth([row[f"{side}_logp"] for row in rows])
            right.plot(steps, values, style, color=colour, linewidth=2, label=f"{name}: {side}")
    left.set(xlabel="optimizer step", ylabel="margin (β × nats)", title="The better answer gets ahead")
    right.set(xlabel="optimizer step", ylabel="log p of an answer (nats)", title="…and what becomes of both")
    for axes in (left, right):
        axes.legend(frameon=False, fontsize=9)
    return figure


def smooth(values: Sequence[float], share: float = 0.1) -> np.ndarray:
    """A centred mean over a share of the values, narrower at both ends."""
    half = max(1, int(len(values) * share / 2))
    return np.array([np.mean(values[max(0, i - half) : i + half + 1]) for i in range(len(values))])


def quality(report: Report) -> Figure:
    """Perplexity (lower is better) and exact match (higher is better) of each model, with 95% intervals.

    Without exact match, ROUGE-L stands in its place.
    """
    figure, (left, right) = canvas(columns=2)
    intervals(left, report, "perplexity", "Perplexity: lower is better", "perplexity a token")
    if any(entry.get("exact_match") is not None for entry in report.values()):
        intervals(right, report, "exact_match", "Exact match: higher is better", "share of questions")
        right.yaxis.set_major_formatter(PercentFormatter(xmax=1, decimals=0))
        right.set_ylim(0, 1.08)
    else:
        intervals(right, report, "rouge_l", "ROUGE-L: higher is better", "ROUGE-L (0 to 1)")
    return figure


def intervals(axes: Axes, report: Report, metric: str, title: str, label: str) -> None:
    """Bars of one metric, a whisker for each interval, the value over it."""
    shown = {name: entry for name, entry in report.items() if entry.get(metric) is not None}
    values = np.array([entry[metric] for entry in shown.values()])
    bounds = np.array([entry.get("intervals", {}).get(metric, (entry[metric],) * 2) for entry in shown.values()])
    whiskers = np.abs(bounds.T - values) if len(shown) else None
    colours = [COLOURS[list(report).index(name) % len(COLOURS)] for name in shown]
    axes.bar(list(shown), values, color=colours, width=0.65)
    axes.errorbar(list(shown), values, whiskers, fmt="none", ecolor=BLACK, capsize=5, linewidth=1.3)
    for at, (value, (_, high)) in enumerate(zip(values, bounds, strict=True)):
        text = f"{value:.1%}" if metric == "exact_match" else f"{value:.3g}"
        axes.annotate(text, (at, high), (0, 4), textcoords="offset points", ha="center", fontsize=10)
    axes.set(title=title, ylabel=label)
    axes.grid(axis="x", visible=False)
    axes.margins(y=0.12)


def size_against_quality(report: Report) -> Figure:
    """Size on disk against perplexity, a point a model; an adapter stands where it is with the base that it needs."""
    figure, axes = canvas()
    unit, unit_bytes = ("GiB", GIB) if max(sizes_of(report), default=0) >= GIB else ("MiB", MIB)
    for i, (name, entry) in enumerate(report.items()):
        size, with_base = entry.get("size_bytes"), entry.get("size_with_base_bytes")
        if size is None:
            continue
        label = f"{name}: {size / unit_bytes:,.3g} {unit}" + (" + base" if with_base else "")
        x, y = (with_base or size) / unit_bytes, entry["perplexity"]
        low, high = entry.get("intervals", {}).get("perplexity", (y, y))
        axes.errorbar(
            x, y, [[y - low], [high - y]], color=COLOURS[i % len(COLOURS)], marker="osD^vP*X"[i % 8], markersize=10,
            markerfacecolor=COLOURS[i % len(COLOURS)] + "B0", capsize=5, linewidth=1.3, linestyle="none", label=label,
        )  # fmt: skip
    axes.set_title("Size against quality: best is lower left")
    axes.set(xlabel=f"size on disk ({unit})", ylabel="perplexity a token")
    axes.margins(x=0.1, y=0.15)
    axes.set_xlim(left=0)
    figure.legend(*axes.get_legend_handles_labels(), loc="outside lower center", ncols=2, frameon=False)
    return figure


def sizes_of(report: Report) -> list[int]:
    """All sizes that a figure of size shows."""
    return [
        entry[key]
        for entry in report.values()
        for key in ("size_bytes", "size_with_base_bytes")
        if entry.get(key) is not None
    ]


def speed(report: Report) -> Figure:
    """Decoded tokens a second at batch 1 and 8, and the time to the first token, of each model."""
    figure, (left, right) = canvas(columns=2)
    names, at = list(report), np.arange(len(report))
    for i, (key, label) in enumerate((("tokens_per_s", "batch 1"), ("tokens_per_s_batch_8", "batch 8"))):
        rates = [entry.get(key) or 0.0 for entry in report.values()]
        colours = [COLOURS[place % len(COLOURS)] for place in range(len(names))]  # a model's colour in every figure
        bars = left.bar(
            at + (i - 0.5) * 0.4, rates, 0.4, label=label, color=colours, hatch=HATCHES[i], edgecolor="white"
        )
        left.bar_label(bars, labels=[f"{rate:,.3g}" if rate < 1000 else f"{rate:,.0f}" for rate in rates], fontsize=9)
    left.set_xticks(at, names)
    left.set(ylabel="tokens a second", title="Decoding: higher is better")
    left.yaxis.set_major_formatter(COUNT)
    left.legend(frameon=False, ncols=2, loc="upper left")
    waits = [1000 * (entry.get("first_token_s") or 0.0) for entry in report.values()]
    bars = right.bar(names, waits, color=[COLOURS[i % len(COLOURS)] for i in range(len(names))], width=0.55)
    right.bar_label(bars, labels=[f"{one:,.3g}" for one in waits], fontsize=9)
    prompt = next((entry["prompt_tokens"] for entry in report.values() if "prompt_tokens" in entry), "?")
    right.set(ylabel="milliseconds", title=f"First token, prompt of {prompt}: lower is better")
    for axes in (left, right):
        axes.grid(axis="x", visible=False)
        axes.margins(y=0.2)
    return figure


def memory(
    predicted_gib: Mapping[str, float], measured_gib: Mapping[str, float], limit_gib: float | None = None
) -> Figure:
    """Predicted and measured peak memory side by side, with the error, for the runs that both name; GiB."""
    names = [name for name in predicted_gib if name in measured_gib]
    if not names:
        raise ValueError("no run has both a predicted and a measured peak: give dicts with the same names")
    figure, axes = canvas(height=1.4 + 0.75 * len(names))
    at, top = np.arange(len(names)), max(*predicted_gib.values(), *measured_gib.values(), limit_gib or 0.0)
    for shift, source, label, colour, hatch in (
        (-0.19, predicted_gib, "predicted", SKY, "//"),
        (0.19, measured_gib, "measured", BLUE, ""),
    ):
        sizes = [source[name] for name in names]
        bars = axes.barh(at + shift, sizes, 0.38, label=label, color=colour, hatch=hatch, edgecolor="white")
        texts = [f"{size:.2f}" for size in sizes]
        if source is measured_gib:
            texts = [
                f"{m:.2f}  (predicted {error(predicted_gib[n], m):+.1%})" for n, m in zip(names, sizes, strict=True)
            ]
        axes.bar_label(bars, labels=texts, padding=4, fontsize=10)
    axes.set_yticks(at, names)
    axes.invert_yaxis()
    axes.set(xlabel="peak memory (GiB)", xlim=(0, 1.3 * top), title="Memory: predicted against measured")
    if limit_gib:
        mark_limit(axes, limit_gib, f"limit {limit_gib:.2f} GiB")
    axes.grid(axis="y", visible=False)
    figure.legend(*axes.get_legend_handles_labels(), loc="outside lower center", ncols=2, frameon=False)
    return figure


def error(predicted: float, measured: float) -> float:
    """How far a prediction is off, as a share of what was measured."""
    return predicted / measured - 1


def mark_limit(axes: Axes, limit: float, text: str) -> None:
    """A line where something ends, its text on the side that has room. Call it when the x axis has its range."""
    axes.axvline(limit, color=RED, linestyle="--", linewidth=1.5)
    left, right = axes.get_xlim()
    side, shift = ("left", 4) if limit < (left + right) / 2 else ("right", -4)
    axes.annotate(
        text, (limit, 1), (shift, -2), xycoords=("data", "axes fraction"), textcoords="offset points", ha=side,
        va="top", color=RED, fontsize=10, bbox=BEHIND_WORDS,
    )  # fmt: skip


def nf4_levels(ours: Sequence[float], library: Sequence[float]) -> Figure:
    """NF4's sixteen levels from the quantiles of a normal distribution, against bitsandbytes' own table."""
    figure, axes = canvas(height=3.4)
    x = np.linspace(-1.15, 1.15, 400)
    scale = 1.8481  # the normal quantile that becomes the level 1
    axes.fill_between(x, np.exp(-((scale * x) ** 2) / 2), color=SKY, alpha=0.35, label="normally distributed weights")
    axes.vlines(ours, 0, 0.5, color=BLUE, linewidth=2, label="computed from quantiles")
    worst = max(abs(a - b) for a, b in zip(ours, library, strict=True))
    table = f"bitsandbytes' table (off by {worst:.0e} at most)"
    axes.scatter(library, [0.5] * len(library), color=RED, marker="v", s=45, zorder=3, label=table)
    axes.set(xlabel="weight ÷ largest weight of its block of 64", yticks=[], ylim=(0, 1.45))
    axes.set_title("NF4: 16 levels, most where most weights are")
    axes.spines["left"].set_visible(False)
    axes.legend(frameon=False, ncols=3, loc="upper center", fontsize=9)
    return figure


def length_histogram(lengths: Iterable[int], context: int) -> Figure:
    """How many tokens the conversations have, and where the context cuts. Raises ValueError without any."""
    values = np.asarray(list(lengths))
    if not len(values):
        raise ValueError("there is no conversation to draw: check what prepare dropped, and why")
    figure, axes = canvas(height=3.2)
    axes.hist(values, bins=min(40, max(5, int(np.sqrt(len(values))))), color=BLUE, edgecolor="white", linewidth=0.5)
    over = float((values > context).mean())
    axes.set(xlabel="tokens of a conversation", ylabel="conversations", xlim=(0, 1.02 * max(values.max(), context)))
    mark_limit(axes, context, f"context {context}" + (f", {over:.1%} longer" if over else ""))
    axes.xaxis.set_major_formatter(COUNT)
    axes.yaxis.set_major_formatter(COUNT)
    axes.set_title(f"{len(values):,} conversations, median {np.median(values):,.0f} tokens")
    return figure


def weights_before_after(before: Any, after: Any, group_size: int) -> Figure:
    """A layer's weights (out, in) before and after GPTQ, and the error of each group of inputs.

    group_size: inputs that share a scale; -1: a whole row. Raises ValueError when the shapes differ.
    """
    old, new = (np.asarray(weights, dtype=np.float32) for weights in (before, after))
    if old.shape != new.shape:
        raise ValueError(f"weights of shape {old.shape} cannot be held against {new.shape}: give the same layer twice")
    figure, (left, right) = canvas(columns=2)
    span = float(np.quantile(np.abs(old), 0.999))
    bins = np.linspace(-span, span, 81)
    left.hist(old.ravel(), bins, color=SKY, label="before")
    left.hist(new.ravel(), bins, histtype="step", color=RED, linewidth=1.2, label="after")
    left.set(xlabel="weight", ylabel="weights", title="Weights")
    left.yaxis.set_major_formatter(COUNT)
    left.legend(frameon=False)
    size = old.shape[1] if group_size == -1 else group_size
    groups = [slice(start, start + size) for start in range(0, old.shape[1], size)]
    errors = [np.linalg.norm(new[:, one] - old[:, one]) / np.linalg.norm(old[:, one]) for one in groups]
    right.bar(range(len(groups)), errors, color=ORANGE, width=0.85)
    total = np.linalg.norm(new - old) / np.linalg.norm(old)
    right.axhline(total, color=BLACK, linestyle=":", linewidth=1.5)
    right.set(xlabel=f"group of {size} inputs", title=f"Error by group ({total:.1%} over all)")
    right.set(ylabel="error ÷ size of the weights")
    right.yaxis.set_major_formatter(PercentFormatter(xmax=1))
    right.xaxis.get_major_locator().set_params(integer=True)
    right.grid(axis="x", visible=False)
    return figure
