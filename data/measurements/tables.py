"""The README's tables about the budget, from this folder's CSVs: predicted against measured, and other estimators.

python data/measurements/tables.py            # print
python data/measurements/tables.py --write    # into README.md, between <!-- budget --> and <!-- /budget -->
"""

import argparse
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from statistics import mean

import rows
from rows import CAP_GIB, GIB, HERE, Measured

from helpers import pace, vram

README = HERE.parents[1] / "README.md"


@dataclass(frozen=True)
class Errors:
    """Percent errors of a set of rows."""

    percent: tuple[float, ...]

    def __str__(self) -> str:
        if not self.percent:
            return "–"
        return f"{mean(map(abs, self.percent)):.1f} % ({min(self.percent):+.1f} … {max(self.percent):+.1f})"


def reserved_gib(row: Measured) -> float:
    """Predicted GiB that the allocator reserves."""
    return rows.allocated_gib(row)[0] + vram.beyond(row.shape, row.config, row.expandable) / GIB


def process_gib(row: Measured) -> float:
    """Predicted GiB of the whole process: reserved, paged optimizer states, CUDA's context."""
    return reserved_gib(row) + vram.optimizer_states(row.shape, row.config)[1] / GIB + row.machine.gpu.context_gib


def compare(chosen: Sequence[Measured], predict: Callable[[Measured], float], measured: str) -> Errors:
    """Percent by which predictions are over what was measured."""
    pairs = [(predict(row), getattr(row, measured)) for row in chosen]
    return Errors(tuple(100 * (predicted / value - 1) for predicted, value in pairs if value))


def spread_gib() -> float:
    """The most that the allocator's default reserved beyond its prediction in the T4 rows that this was fitted to."""
    return max(row.reserved_gib - reserved_gib(row) for row in rows.t4("first"))


def verdicts(chosen: Sequence[Measured]) -> str:
    """How many fits and does-not-fit are right; with the allocator's default, its spread has to fit too."""
    spread = spread_gib()
    needed = [reserved_gib(row) + (0 if row.expandable else spread) for row in chosen]
    right = [(gib <= CAP_GIB) == (row.status == "ok") for gib, row in zip(needed, chosen, strict=True)]
    return f"{sum(right)} of {len(right)}"


def sets() -> dict[str, list[Measured]]:
    """Name -> rows. The factors of helpers/activations.py were read off the first two, nothing off the others."""
    run = list(rows.h200("h200_t4_envelope.csv"))
    big = [row for row in run if row.shape.name.startswith("mistral") and row.expandable]
    small = [row for row in run if not row.shape.name.startswith("mistral")]
    seen = [row for row in small if row.shape.name.startswith("tiny") and row.recipe == "baseline"]
    unseen = [row for row in small if row not in seen]
    found = {
        "7B, H200 as a T4: Liger's recipe (factors read off)": [row for row in big if row.recipe == "ours"],
        "7B, H200 as a T4: the guides' recipe (factors read off)": [row for row in big if row.recipe == "baseline"],
        "**three other models, H200 as a T4**": unseen,
        "**7B, an earlier run with other scripts**": list(rows.facts()),
        "real T4, plain loop, three models (the loop read off)": list(rows.t4("first")),
        "**real T4, plain loop, five models, published later**": list(rows.t4("unseen")),
        "**real T4, at the largest batches**": list(rows.t4("ceiling")),
    }
    if (HERE / "h200_finetune.csv").exists():
        found["7B, our own layers, H200 as a T4 (parts found through them)"] = list(rows.own_layers())
        found["7B, what the planner chose (parts found through them)"] = list(rows.planned())
    own = HERE / "h200_own_layers.csv"
    if own.exists():
        found["**our own layers, all four models, H200 as a T4**"] = list(rows.h200(own.name))
    return found


def accuracy() -> str:
    """Predicted against measured, a line a set of rows."""
    lines = [
        "| rows (bold: nothing was read off or fitted to them) | n | allocated: mean error (worst under … over) | "
        "whole process, rows not fitted to | verdict right |",
        "|---|--:|---|---|--:|",
    ]
    for name, chosen in sets().items():
        allocated = compare(chosen, lambda row: rows.allocated_gib(row)[0], "allocated_gib")
        others = [row for row in chosen if not row.fitted] or chosen
        process = compare(others, process_gib, "process_gib")
        if not process.percent:
            process = compare(others, reserved_gib, "reserved_gib")
        lines.append(f"| {name} | {len(chosen)} | {allocated} | {process} | {verdicts(chosen)} |")
    return "\n".join(lines)


def other_estimators() -> str:
    """Ours, fitcheck-llm and accelerate on the same rows, from comparison.csv."""
    found = rows.read("comparison.csv")
    groups = {
        "7B, Liger's recipe": lambda row: row["recipe"] == "ours" and row["model"].startswith("mistral"),
        "7B, the guides' recipe": lambda row: row["recipe"] == "baseline" and row["model"].startswith("mistral"),
        "three other models, all recipes": lambda row: (
            not row["model"].startswith("mistral") and not row["source"].startswith("T4")
        ),
        "real T4, fitcheck's own rows": lambda row: row["source"].startswith("T4"),
    }
    lines = [
        "| rows | n | ours: allocated | ours: reserved | fitcheck-llm 0.3.1: allocated | reserved | "
        "accelerate (weights): allocated |",
        "|---|--:|---|---|---|---|---|",
    ]
    for name, belongs in groups.items():
        chosen = [row for row in found if belongs(row) and row["status"] == "ok"]
        cells = [
            percent(chosen, "ours_allocated_gib", "measured_allocated_gib"),
            percent(chosen, "ours_reserved_gib", "measured_reserved_gib"),
            percent(chosen, "fitcheck_allocated_gib", "measured_allocated_gib"),
            percent(chosen, "fitcheck_reserved_gib", "measured_reserved_gib"),
            percent(chosen, "accelerate_gib", "measured_allocated_gib"),
        ]
        lines.append(f"| {name} | {len(chosen)} | {' | '.join(map(str, cells))} |")
    return "\n".join(lines)


def percent(chosen: list[dict[str, str]], predicted: str, measured: str) -> Errors:
    """Errors between two columns."""
    return Errors(tuple(100 * (float(row[predicted]) / float(row[measured]) - 1) for row in chosen))


def step_times() -> str:
    """Seconds of a step, predicted against published ones of a real T4, a line each."""
    lines = ["| published step of a T4, 1×1024 tokens | predicted, s | measured, s | error |", "|---|--:|--:|--:|"]
    for row in rows.t4("unseen"):
        predicted = pace.step_s(row.config, row.shape, row.machine)
        name = f"{row.shape.name}, {row.config.model.attention}"
        lines.append(f"| {name} | {predicted:.2f} | {row.step_s:.2f} | {100 * (predicted / row.step_s - 1):+.0f} % |")
    return "\n".join(lines)


def step_errors() -> Errors:
    """Of the published T4 steps of models of 7B."""
    sevens = [row for row in rows.t4("unseen") if "7b" in row.shape.name]
    return compare(sevens, lambda row: pace.step_s(row.config, row.shape, row.machine), "step_s")


def fine_tuning() -> str:
    """Ours at its fastest and leanest beside Unsloth and the guides' recipe: tokens a second and GiB."""
    found = [row for row in rows.read("h200_finetune.csv") if not row["error"]]
    engines = {name: [row for row in found if row["engine"] == name] for name in ("ours", "unsloth", "baseline")}
    sizes = sorted({(int(row["batch"]), int(row["seq"])) for row in found}, key=lambda size: (size[0] * size[1], size))
    lines = [
        "| batch × context | ours, fastest | ours, leanest | Unsloth | guides' recipe |",
        "|---|--:|--:|--:|--:|",
    ]
    for batch, seq in sizes:
        ours, *others = (
            [row for row in chosen if (int(row["batch"]), int(row["seq"])) == (batch, seq)]
            for chosen in engines.values()
        )
        fastest = max(ours, key=lambda row: float(row["tok_s"]))
        leanest = min(ours, key=lambda row: float(row["reserved_gib"]))
        cells = [
            fastest,
            leanest if leanest is not fastest else None,
            *(other[0] if other else None for other in others),
        ]
        lines.append(f"| {batch}×{seq:,} | {' | '.join(map(speed_and_memory, cells))} |")
    return "\n".join(lines)


def speed_and_memory(row: dict[str, str] | None) -> str:
    """`10,747 · 10.3`; — where it was not measured."""
    return f"{int(row['tok_s']):,} · {float(row['reserved_gib']):.1f}" if row else "—"


def merge_and_gptq() -> str:
    """What merging and GPTQ of the 7B shape took, in time, VRAM and host memory."""
    found = {row["task"]: row for row in rows.read("merge_quantize.csv")}
    named = {
        "merge into the fp16 base": ("merge-original", "merge_s"),
        "merge into the base as training saw it (NF4)": ("merge-nf4", "merge_s"),
        "GPTQ, 4 bits, 32 layers": ("full-gpu-pack", "quantize_s"),
    }
    lines = ["| | seconds | VRAM reserved, GiB | RAM, GiB |", "|---|--:|--:|--:|"]
    for name, (task, seconds) in named.items():
        row = found[task]
        sizes = " | ".join(f"{float(row[column]):.1f}" for column in ("vram_reserved_gib", "anon_gib"))
        lines.append(f"| {name} | {float(row[seconds]):.0f} | {sizes} |")
    return "\n".join(lines)


def planned() -> str:
    """What the planner chose and what it took, in a sentence."""
    chosen = list(rows.planned())
    allocated = compare(chosen, lambda row: rows.allocated_gib(row)[0], "allocated_gib")
    reserved = compare(chosen, reserved_gib, "reserved_gib")
    longest, most = max(row.config.data.seq_len for row in chosen), max(row.reserved_gib for row in chosen)
    return (
        f"The plans for a T4 at {len(chosen)} points, up to {longest:,} tokens, all trained; reserved at most "
        f"{most:.2f} of {CAP_GIB} GiB. Predicted against measured: allocated {allocated}, reserved {reserved}."
    )


def document() -> str:
    """All tables with a sentence each."""
    return "\n\n".join(
        [
            "An H200 held to a T4's envelope (14.42 GiB for the allocator, fp16, no flash attention) unless it says "
            "*real T4*, whose rows others published; [data/measurements](data/measurements/README.md) has every row, "
            "says what was fitted to what, and makes these tables: `python data/measurements/tables.py`.",
            "**Predicted against measured.**",
            accuracy(),
            f"A step of a 7B on a real T4 is predicted with a mean error of {step_errors()}.",
            "**Other estimators on the same rows**, errors of theirs and ours:",
            other_estimators(),
            "**Fine-tuning the 7B shape**, r = 16 on all linear layers: tokens a second · GiB reserved (an H200 often "
            "waits for Python at 2,048 tokens a step, which a T4 does not: there the speeds lie nearer to each other):",
            fine_tuning(),
            planned(),
            "**Merging and GPTQ** of the 7B shape, held to 12 GiB of host memory as well:",
            merge_and_gptq(),
        ]
    )


def main() -> None:
    """Print, or write into the README."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--write", action="store_true", help="into README.md")
    options = parser.parse_args()
    if not options.write:
        print(document(), step_times(), sep="\n\n")
        return
    text, found = re.subn(
        r"(<!-- budget -->).*?(<!-- /budget -->)",
        lambda match: f"{match[1]}\n{document()}\n{match[2]}",
        README.read_text(encoding="utf-8"),
        flags=re.DOTALL,
    )
    if not found:
        raise SystemExit("README.md has no <!-- budget --><!-- /budget --> markers")
    README.write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main()
