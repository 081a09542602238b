"""What an evaluation found, to look at: a table, verdicts, answers side by side, one HTML file, a model card."""

import difflib
import html
import json
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from itertools import pairwise
from math import expm1
from pathlib import Path
from typing import Any

from helpers.budget import compared
from helpers.evaluate.pages import TEMPLATES
from helpers.show import card, plots
from helpers.workspace import MANIFEST, checksum, maker, read_manifest, seal, write_text

MIB, DPI = 2**20, 120
Report = Mapping[str, Mapping[str, Any]]
COLUMNS = {  # figure -> heading, how it is written
    "loaded_as": ("opened as", "{}"),
    "perplexity": ("perplexity", "{:.3f}"),
    "bits_per_byte": ("bits/byte", "{:.3f}"),
    "exact_match": ("exact match", "{:.1%}"),
    "preference_accuracy": ("prefers the better", "{:.1%}"),
    "preference_margin": ("by how much, nats", "{:.2f}"),
    "nearer_chosen": ("says the better", "{:.1%}"),
    "answer_tokens": ("answer tokens", "{:.1f}"),
    "f1": ("F1", "{:.3f}"),
    "rouge_l": ("ROUGE-L", "{:.3f}"),
    "bleu": ("BLEU", "{:.1f}"),
    "chrf": ("chrF", "{:.3f}"),
    "ended_share": ("ended", "{:.0%}"),
    "size_bytes": ("size, MiB", "{:,.1f}"),
    "load_s": ("loading, s", "{:.1f}"),
    "peak_allocated_gib": ("VRAM, GiB", "{:.2f}"),
    "peak_anonymous_gib": ("RAM, GiB", "{:.2f}"),
    "first_token_s": ("first token, s", "{:.3f}"),
    "tokens_per_s": ("tokens/s", "{:,.1f}"),
    "gpu_ms_per_token": ("GPU a token, ms", "{:.2f}"),
    "tokens_per_s_batch_8": ("tokens/s, batch 8", "{:,.1f}"),
    "prompt_tokens_per_s": ("prompt tokens/s", "{:,.0f}"),
    "llama_cpp_tokens_per_s": ("llama.cpp tokens/s on this CPU", "{:,.1f}"),
    "llama_cpp_prompt_tokens_per_s": ("llama.cpp prompt tokens/s", "{:,.0f}"),
}
NARROW = (
    "perplexity", "bits_per_byte", "exact_match", "f1", "rouge_l", "ended_share", "size_bytes", "tokens_per_s",
    "gpu_ms_per_token",
)  # fmt: skip
"""Of a table of text; how models were opened is its last column."""
PAIRS = ("preference_accuracy", "preference_margin", "nearer_chosen", "answer_tokens")
"""And where pairs of answers were judged."""
SAYS_NEITHER = ("loaded_as", "answer_tokens")
LESS_IS_BETTER = ("perplexity", "bits_per_byte", "size_bytes", "load_s", "peak_allocated_gib", "peak_anonymous_gib")
LESS_IS_BETTER += ("first_token_s", "gpu_ms_per_token")
ARROWS = {name: "↓" if name in LESS_IS_BETTER else "↑" for name in COLUMNS if name not in SAYS_NEITHER}
EQUAL = "no difference shown"
SIDE_BY_SIDE_ROWS = 24
PREDICTED = {  # predicted figure -> measured figure, what it is called
    "predicted_allocated_gib": ("peak_allocated_gib", "VRAM allocated, GiB"),
    "predicted_reserved_gib": ("peak_reserved_gib", "VRAM reserved, GiB"),
    "predicted_anonymous_gib": ("peak_anonymous_gib", "RAM, GiB"),
    "predicted_evaluation_s": ("evaluation_s", "evaluation, s"),
}


def cell(entry: Mapping[str, Any], column: str) -> str:
    """A figure as a table shows it; a dash when it was not measured.

    >>> cell({"exact_match": 0.25, "size_bytes": 3 * 2**20}, "size_bytes"), cell({}, "exact_match")
    ('3.0', '–')
    """
    value = entry.get(column)
    if value is None:
        return "–"
    return COLUMNS[column][1].format(value / MIB if column == "size_bytes" else value)


def with_interval(entry: Mapping[str, Any], column: str) -> str:
    """A figure with its 95% interval, where it has one.

    >>> with_interval({"f1": 0.5, "intervals": {"f1": [0.4, 0.6]}}, "f1")
    '0.500 [0.400, 0.600]'
    """
    return f"{cell(entry, column)} {interval(entry, column)}".rstrip()


def interval(entry: Mapping[str, Any], column: str) -> str:
    """A figure's 95% interval in brackets; "" where it has none."""
    bounds = entry.get("intervals", {}).get(column)
    if entry.get(column) is None or not bounds:
        return ""
    low, high = (COLUMNS[column][1].format(bound) for bound in bounds)
    return f"[{low}, {high}]"


def evaluated(report: Report) -> dict[str, Mapping[str, Any]]:
    """The entries with figures: not those that were left out."""
    return {name: entry for name, entry in report.items() if "left_out" not in entry}


def sentences(report: Report) -> list[str]:
    """Which models have no figures, and why."""
    return [f"{name} is not evaluated: {entry['left_out']}." for name, entry in report.items() if entry.get("left_out")]


def against_measured(report: Report) -> list[dict[str, Any]]:
    """Predicted beside measured, a row for each quantity of each model that was evaluated; VRAM only with a card.

    Seconds of a CPU are measured and not predicted.
    """
    return [
        {
            "model": name,
            "quantity": quantity,
            **compared(entry[predicted], entry[measured], on_gpu(entry) or not measured.endswith("_s")),
        }
        for name, entry in report.items()
        for predicted, (measured, quantity) in PREDICTED.items()
        if entry.get(predicted) and entry.get(measured)
    ]


def on_gpu(entry: Mapping[str, Any]) -> bool:
    """Whether a model was evaluated on a GPU: only there VRAM was predicted."""
    return bool(entry.get("predicted_allocated_gib"))


def measured_columns(report: Report) -> list[str]:
    """Columns that at least one model has."""
    return [column for column in COLUMNS if any(entry.get(column) is not None for entry in report.values())]


def table(report: Report) -> Any:
    """A pandas DataFrame for a notebook: a row a figure, a column a model, 95% intervals in brackets."""
    import pandas as pd

    rows = {
        COLUMNS[column][0]: [with_interval(entry, column) for entry in report.values()]
        for column in measured_columns(report)
    }
    return pd.DataFrame.from_dict(rows, orient="index", columns=list(report))


def text_table(report: Report) -> str:
    """The most wanted figures as lines of text, how each model was opened, and under them the verdicts."""
    judged = [name for name in PAIRS if any(name in entry for entry in report.values())]
    columns = (*NARROW, *judged, "loaded_as")
    rows = [["", *(COLUMNS[column][0] for column in columns)]]
    rows += [[name, *(cell(entry, column) for column in columns)] for name, entry in report.items()]
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    lines = [
        "  ".join(
            [
                row[0].ljust(widths[0]),
                *(text.rjust(width) for text, width in zip(row[1:-1], widths[1:-1], strict=True)),
                row[-1],
            ]
        )
        for row in rows
    ]
    verdicts = [
        f"{row['model']} against {row['against']}: {row['metric']} {row['verdict']}"
        for row in comparisons(report)
        if row["metric"] in ("perplexity", "exact match")
    ]
    return "\n".join([*lines, "", *verdicts, *sentences(report)])


def comparisons(report: Report) -> list[dict[str, str]]:
    """A row for each metric of each model against the one before it: verdict, difference with interval, p.

    A difference is this model's figure less the other's; of perplexity it is a ratio, in per cent.
    """
    rows, names = [], list(evaluated(report))
    for other, name in pairwise(names):
        found = report[name].get("against", {}).get(other, {})
        for metric in COLUMNS:
            if metric in found:
                one = found[metric]
                rows.append(
                    {
                        "model": name,
                        "against": other,
                        "metric": COLUMNS[metric][0],
                        "verdict": one["verdict"],
                        "difference": difference(metric, one),
                        "p": f"{one['p_value']:.2g}",
                    }
                )
    return rows


def difference(metric: str, one: Mapping[str, Any]) -> str:
    """A difference with its interval, in words that fit the metric; nothing is never "-0.0".

    >>> difference("exact_match", {"difference": 0.5, "low": 0.4, "high": 0.6})
    '+50.0 points [+40.0, +60.0]'
    >>> difference("perplexity", {"difference": -1e-9, "low": -2e-9, "high": 1e-9})
    '+0.0% [+0.0, +0.0]'
    """
    numbers = [one["difference"], one["low"], one["high"]]
    if metric == "perplexity":
        value, low, high = (100 * expm1(min(number, 50.0)) for number in numbers)
        return f"{value:+z.1f}% [{low:+z.1f}, {high:+z.1f}]"
    if metric in ("exact_match", "ended_share", "preference_accuracy", "nearer_chosen"):
        value, low, high = (100 * number for number in numbers)
        return f"{value:+z.1f} points [{low:+z.1f}, {high:+z.1f}]"
    value, low, high = numbers
    return f"{value:+z.3f} [{low:+z.3f}, {high:+z.3f}]"


def verdicts(report: Report) -> str:
    """HTML for a notebook: what came out in a sentence or two, what differs as a table, the rest folded under it."""
    return template("verdicts").render(verdict=verdict(report), **compared_values(report))


def compared_values(report: Report) -> dict[str, list[dict[str, str]]]:
    """What the template of comparisons takes: those that show a difference, and those that show none."""
    rows = comparisons(report)
    return {
        "shown": [row for row in rows if row["verdict"] != EQUAL],
        "equal": [row for row in rows if row["verdict"] == EQUAL],
    }


def read_generations(folder: Path) -> list[dict[str, Any]]:
    """generations.jsonl of an evaluation. Raises ValueError when there is none."""
    path = Path(folder) / "generations.jsonl"
    if not path.is_file():
        raise ValueError(f"{folder} has no generations.jsonl: run {maker('evaluate')} first")
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def side_by_side(folder: Path, rows: int = SIDE_BY_SIDE_ROWS) -> str:
    """HTML table: the first prompts of an evaluation, each model's answer, its differences from the left one marked."""
    return template("side_by_side").render(**side_by_side_values(read_generations(folder)[:rows]))


def side_by_side_values(generations: list[dict[str, Any]]) -> dict[str, Any]:
    """What the template of side_by_side takes."""
    rows = []
    for row in generations:
        answers, left = [], None
        for said in row["models"].values():
            answers.append(
                {
                    "html": marked(left, said["text"]),
                    "right": said["text"].strip() == row["answer"].strip(),
                    "ended": said["ended"],
                }
            )
            left = said["text"]
        rows.append({"question": row["question"], "answer": row["answer"], "answers": answers})
    return {"names": list(generations[0]["models"]) if generations else [], "rows": rows}


def marked(left: str | None, text: str) -> str:
    """Escaped HTML of a text, the words that the left one has not in <mark>.

    >>> marked("It is red.", "It is <blue>.")
    'It is <mark>&lt;blue&gt;.</mark>'
    """
    words = text.split()
    if left is None:
        return html.escape(" ".join(words))
    parts = []
    for change, _, _, start, end in difflib.SequenceMatcher(None, left.split(), words, autojunk=False).get_opcodes():
        piece = html.escape(" ".join(words[start:end]))
        if piece:
            parts.append(piece if change == "equal" else f"<mark>{piece}</mark>")
    return " ".join(parts)


def figures(report: Report, log: list[dict[str, Any]] | None = None) -> dict[str, Any]:
    """The report's figures by name: quality, size, speed; loss with a training log; memory where it was predicted."""
    report = evaluated(report)
    drawn = {
        "quality": plots.quality(report),
        "size": plots.size_against_quality(report),
        "speed": plots.speed(report),
    }
    if log:
        drawn["loss"] = plots.loss_curve(log)
    predicted = {
        name: entry["predicted_allocated_gib"] for name, entry in report.items() if entry.get("predicted_allocated_gib")
    }
    if predicted:
        drawn["memory"] = plots.memory(predicted, {name: report[name]["peak_allocated_gib"] for name in predicted})
    return drawn


def write_html(
    path: Path,
    report: Report,
    generations: list[dict[str, Any]],
    drawn: Mapping[str, Any],
    about: str,
    made: Sequence[tuple[str, str]] = (),
) -> Path:
    """One file with the verdict, the table, figures and answers; it needs nothing beside it and no network.

    made: (what, value) of the run that it is about, as `made_with` gives them.
    """
    columns = measured_columns(report)
    page = template("report").render(
        title=f"Evaluation: {', '.join(evaluated(report))}",
        verdict=verdict(report),
        made=made,
        about=about,
        columns=[f"{COLUMNS[column][0]} {ARROWS.get(column, '')}".strip() for column in columns],
        models=[
            {"name": name, "cells": [(cell(entry, column), interval(entry, column)) for column in columns]}
            for name, entry in report.items()
        ],
        **compared_values(report),
        figures=[both(figure) for figure in drawn.values()],
        tasks={name: entry["tasks"] for name, entry in report.items() if entry.get("tasks")},
        side=template("side_by_side").render(**side_by_side_values(generations[:SIDE_BY_SIDE_ROWS])),
        first=f"The first {min(SIDE_BY_SIDE_ROWS, len(generations))}",
        total=len(generations),
    )
    return write_text(path, page)


def both(figure: Any) -> dict[str, str]:
    """What the page shows of a figure, as data: in light, in the dark, and in words."""
    light, dark = (plots.png_data(one, DPI) for one in (figure, plots.in_the_dark(figure)))
    return {"alt": plots.alt_text(figure), "light": light, "dark": dark}


def verdict(report: Report) -> list[str]:
    """What came out, a sentence for each step of the way: the first model to the second, and that one to the last."""
    names = list(evaluated(report))
    steps = [(names[0], names[1]), (names[1], names[-1])] if len(names) > 2 else list(pairwise(names))
    said = [sentence_of(report, other, name) for other, name in steps]
    return [sentence for sentence in said if sentence] or [f"{', '.join(names)}: nothing is there to compare with."]


def sentence_of(report: Report, other: str, name: str) -> str:
    """One model against another in the figure that says most: exact match, else perplexity; "" without either."""
    found = report[name].get("against", {}).get(other, {})
    metric = next((one for one in ("exact_match", "perplexity") if one in found), None)
    if metric is None:
        return ""
    words = {"better": f"{name} is better than {other}", "worse": f"{name} is worse than {other}"}
    title, _ = COLUMNS[metric]
    sizes = [report[one].get("size_bytes") for one in (other, name)]
    small = f", in {sizes[1] / sizes[0]:.0%} of the disk space" if all(sizes) and sizes[1] < 0.8 * sizes[0] else ""
    small = "" if report[name].get("size_with_base_bytes") else small  # an adapter is small, and needs its base
    return (
        f"{words.get(found[metric]['verdict'], f'No difference is shown between {name} and {other}')}{small}: {title} "
        f"{cell(report[name], metric)} against {cell(report[other], metric)} ({difference(metric, found[metric])})."
    )


def made_with(config: Mapping[str, Any], machine: str) -> list[tuple[str, str]]:
    """(what, value): which model was trained on what, with which settings, where this was measured and when.

    config: a run's configuration as its manifest holds it.
    """
    model, adapter, train = config["model"], config["adapter"], config["train"]
    step = f"{train['batch_size']} × {train['accumulation']} conversations a step"
    folder = Path(model["model"]).exists() or Path(model["model"]).is_absolute()  # which may lie on another machine
    return [
        ("model", Path(model["model"]).name if folder else model["model"]),
        ("data", Path(config["data"]["source"]).name),
        ("adapter", f"rank {adapter['rank']}, alpha {adapter['alpha']:g}, {adapter['targets']}"),
        ("training", f"learning rate {train['learning_rate']:g}, {step}, context {config['data']['seq_len']:,} tokens"),
        ("measured on", f"{machine}, {datetime.now(UTC):%d %B %Y}"),
    ]


def template(name: str) -> Any:
    """A template of pages.py, in HTML: every value is escaped unless it is marked safe."""
    from jinja2 import DictLoader, Environment

    return Environment(loader=DictLoader(TEMPLATES), autoescape=True).get_template(name)


def model_card(name: str, entry: Mapping[str, Any], config: Mapping[str, Any]) -> str:
    """README.md for a model folder: how it was made, and what the evaluation measured.

    config: a run's configuration as its manifest holds it.
    """
    kind = entry["kind"] if entry["kind"] != "model" or entry["path"] == config["model"]["model"] else "merged"
    rows = [
        (COLUMNS[column][0], with_interval(entry, column))
        for column in COLUMNS
        if column != "loaded_as" and entry.get(column) is not None
    ]
    measured = (
        f"On held-out conversations (perplexity of the assistant's tokens, context {entry['context']}, stride "
        f"{entry['stride']}) and {entry['answers']} questions, greedy; 95% intervals in brackets. "
        f"Loaded as: {entry['loaded_as']}."
    )
    return card.card(name, kind, config, measured, rows, {metric: entry.get(metric) for metric in card.METRICS})


def put_card(text: str, folder: Path) -> Path | None:
    """Write README.md into a model folder that a run made, and keep its manifest true; None for any other folder."""
    stage = next((place for place in (folder, folder.parent) if (place / MANIFEST).is_file()), None)
    if stage is None:
        return None
    manifest = read_manifest(stage)
    name = str((folder / "README.md").relative_to(stage))
    known = manifest["outputs"].pop(name, None)
    if known is not None:  # PEFT wrote a card of its own: not listed while it is replaced, it damages nothing
        seal(stage / MANIFEST, manifest)
    path = write_text(folder / "README.md", text)
    if known is not None:
        manifest["outputs"][name] = known | {"size_bytes": path.stat().st_size, "sha256": checksum(path)}
        seal(stage / MANIFEST, manifest)
    return path
