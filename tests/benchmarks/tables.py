"""The tables of data/measurements/README.md and three rows of the README: predicted against measured, and others.

python tests/benchmarks/tables.py            # print
python tests/benchmarks/tables.py --write    # between <!-- budget --> and <!-- /budget --> there, <!-- rows --> here
"""

import argparse
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import mean

import rows
from rows import CAP_GIB, GIB, MEASURED, ROOT, Measured

from helpers import hardware
from helpers.budget import hours, planning, vram

README = ROOT / "README.md"
MEASUREMENTS = ROOT / "data" / "measurements" / "README.md"


@dataclass(frozen=True)
class Errors:
    """Percent errors of a set of rows."""

    percent: tuple[float, ...]

    def __format__(self, digits: str) -> str:
        if not self.percent:
            return "–"
        average = f"{mean(map(abs, self.percent)):{digits or '.1f'}} %"
        return f"{average} ({min(self.percent):+.1f} … {max(self.percent):+.1f})"


@dataclass(frozen=True)
class Verdicts:
    """How often "it fits" and "it does not fit" were wrong, and of how many."""

    ran_out: int
    promised_though_ran_out: int
    ran: int
    refused_though_ran: int

    def __str__(self) -> str:
        promised = f"{self.promised_though_ran_out} of {self.ran_out}" if self.ran_out else "none ran out"
        return f"{promised} | {self.refused_though_ran} of {self.ran}"


def reserved_gib(row: Measured) -> float:
    """Predicted GiB that the allocator reserves."""
    return rows.allocated_gib(row)[0] + vram.allocator_overhead(row.step, row.expandable) / GIB


def process_gib(row: Measured) -> float:
    """Predicted GiB of the whole process: reserved, paged optimizer states, CUDA's context."""
    return reserved_gib(row) + vram.optimizer_states(row.config, row.shape)[1] / GIB + row.machine.gpu.context_gib


def compare(chosen: Sequence[Measured], predict: Callable[[Measured], float], measured: str) -> Errors:
    """Percent by which predictions are over what was measured."""
    pairs = [(predict(row), getattr(row, measured)) for row in chosen]
    return Errors(tuple(100 * (predicted / value - 1) for predicted, value in pairs if value))


def verdicts(chosen: Sequence[Measured]) -> Verdicts:
    """The product's own rule (`planning.usable_gib`) on a T4, against what ran and what ran out of memory."""
    t4 = hardware.machine("t4")
    context_gib = t4.gpu.context_gib
    promised = [
        process_gib(row) - row.machine.gpu.context_gib + context_gib <= planning.usable_gib(t4, row.step.backend)
        for row in chosen
    ]
    ran = [row.status == "ok" for row in chosen]
    pairs = list(zip(promised, ran, strict=True))
    return Verdicts(
        ran_out=ran.count(False),
        promised_though_ran_out=pairs.count((True, False)),
        ran=ran.count(True),
        refused_though_ran=pairs.count((False, True)),
    )


def sets() -> dict[str, list[Measured]]:
    """Name -> rows. The factors of budget/activations.py were calibrated on the first two, not on the others."""
    run = list(rows.h200("h200_t4_envelope.csv"))
    big = [row for row in run if row.shape.name.startswith("mistral") and row.expandable]
    small = [row for row in run if not row.shape.name.startswith("mistral")]
    seen = [row for row in small if row.shape.name.startswith("tiny") and row.recipe == "baseline"]
    unseen = [row for row in small if row not in seen]
    found = {
        "7B, H200 as a T4: Liger's recipe (calibrated on)": [row for row in big if row.recipe == "ours"],
        "7B, H200 as a T4: the guides' recipe (calibrated on)": [row for row in big if row.recipe == "baseline"],
        "**three other models, H200 as a T4**": unseen,
        "**7B, an earlier run with other scripts**": list(rows.facts()),
        "real T4, plain loop, three models (calibrated on)": list(rows.t4("first")),
        "**real T4, plain loop, five models, published later**": list(rows.t4("unseen")),
        "**real T4, at the largest batches**": list(rows.t4("ceiling")),
    }
    if (MEASURED / "h200_finetune.csv").exists():
        found["7B, our own layers, H200 as a T4 (formulas found through them)"] = list(rows.own_layers())
        found["7B, what the planner chose (formulas found through them)"] = list(rows.planned())
    return found


def accuracy() -> str:
    """Predicted against measured, a line a set of rows."""
    lines = [
        "| rows (bold: nothing was calibrated on them) | n | allocated: mean error (worst under … over) | n | whole "
        'process, rows not calibrated on | "fits" of those that ran out of memory | "does not fit" of those that ran |',
        "|---|--:|---|--:|---|--:|--:|",
    ]
    for name, chosen in sets().items():
        allocated = compare(chosen, lambda row: rows.allocated_gib(row)[0], "allocated_gib")
        others = [row for row in chosen if not row.calibrated] or chosen
        process = compare(others, process_gib, "process_gib")
        if not process.percent:
            process = compare(others, reserved_gib, "reserved_gib")
        sizes = f"{len(allocated.percent)} | {allocated} | {len(process.percent)} | {process}"
        lines.append(f"| {name} | {sizes} | {verdicts(chosen)} |")
    return "\n".join(lines)


def other_estimators() -> str:
    """Ours and fitcheck-llm on the T4 rows that neither was calibrated on and that both can express."""
    found = [row for row in rows.read("comparison.csv") if row["source"] == "T4 unseen" and row["status"] == "ok"]
    lines = [f"| {len(found)} rows of a real T4, five models | allocated | reserved |", "|---|---|---|"]
    for name, estimator in (("ours", "ours"), ("fitcheck-llm 0.3.1", "fitcheck")):
        cells = [
            percent(found, f"{estimator}_{size}_gib", f"measured_{size}_gib") for size in ("allocated", "reserved")
        ]
        lines.append(f"| {name} | {' | '.join(f'{cell:.2f}' for cell in cells)} |")
    return "\n".join(lines)


def percent(chosen: list[dict[str, str]], predicted: str, measured: str) -> Errors:
    """Errors between two columns."""
    return Errors(tuple(100 * (float(row[predicted]) / float(row[measured]) - 1) for row in chosen))


def published_steps() -> list[Measured]:
    """Rows of a real T4 whose seconds of a step were published."""
    return [row for row in (*rows.t4("first"), *rows.t4("unseen")) if row.step_s]


def step_times() -> str:
    """Seconds of a step, predicted against published ones of a real T4, a line each."""
    lines = ["| published step of a T4 | predicted, s | measured, s | error |", "|---|--:|--:|--:|"]
    for row in published_steps():
        predicted = predicted_step_s(row)
        size = f"{row.config.train.batch_size}×{row.config.data.seq_len}"
        name = f"{row.shape.name}, {size}, {row.config.model.attention}"
        lines.append(f"| {name} | {predicted:.2f} | {row.step_s:.2f} | {100 * (predicted / row.step_s - 1):+.0f} % |")
    return "\n".join(lines)


def predicted_step_s(row: Measured) -> float:
    """Predicted seconds of one optimizer step of a row."""
    return hours.step_s(row.step, row.machine)


def step_errors() -> str:
    """How far predicted steps are from those that were published, all of them and a 7B's, in sentences."""
    published = published_steps()
    sevens = [row for row in published if "-7b" in row.shape.name]
    every, seven = (compare(chosen, predicted_step_s, "step_s") for chosen in (published, sevens))
    return (
        f"Seconds of a step on a real T4: {len(published)} were published, of a plain loop with every layer "
        f"checkpointed; ours are off by {every}, those of a 7B ({len(sevens)}, the T4's rate was calibrated on two of "
        f"them) by {seven}. No step of our own layers has been timed on a T4 yet."
    )


def fine_tuning() -> str:
    """Ours at its fastest and leanest beside Unsloth and the guides' recipe: tokens a second of GPU time, and GiB."""
    found = [row for row in rows.read("h200_finetune.csv") if not row["error"]]
    engines = {name: [row for row in found if row["engine"] == name] for name in ("ours", "unsloth", "baseline")}
    sizes = sorted({(int(row["batch"]), int(row["seq"])) for row in found}, key=lambda size: (size[0] * size[1], size))
    lines = [
        "| batch × context | ours, fastest | ours, leanest | Unsloth | guides' recipe | ours : Unsloth, GPU time "
        "(clock) |",
        "|---|--:|--:|--:|--:|--:|",
    ]
    for batch, seq in sizes:
        ours, *others = (
            [row for row in chosen if (int(row["batch"]), int(row["seq"])) == (batch, seq)]
            for chosen in engines.values()
        )
        fastest = max(ours, key=tokens_per_s)
        leanest = min(ours, key=lambda row: float(row["reserved_gib"]))
        unsloth, baseline = (other[0] if other else None for other in others)
        cells = [fastest, leanest if leanest is not fastest else None, unsloth, baseline]
        ratios = "—"
        if unsloth:
            busy, clock = (float(fastest[name]) / float(unsloth[name]) for name in ("busy_tok_s", "tok_s"))
            ratios = f"{busy:.2f} ({clock:.2f})"
        lines.append(f"| {batch}×{seq:,} | {' | '.join(map(speed_and_memory, cells))} | {ratios} |")
    return "\n".join(lines)


def tokens_per_s(row: dict[str, str]) -> float:
    """Tokens a second of GPU time; by the clock where only that was measured."""
    return float(row["busy_tok_s"] or row["tok_s"])


def speed_and_memory(row: dict[str, str] | None) -> str:
    """`10,747 · 10.3`; — where it was not measured."""
    return f"{tokens_per_s(row):,.0f} · {float(row['reserved_gib']):.1f}" if row else "—"


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
            "*real T4*, whose rows others published. `python tests/benchmarks/tables.py --write` makes these tables.",
            "**Predicted against measured.** A run fits when its prediction leaves 3 % of the VRAM free (5 % where "
            "transformers' layers compute); the last two columns count where that was wrong.",
            accuracy(),
            step_errors(),
            "**Another estimator**, on rows that both can express and neither was calibrated on:",
            other_estimators(),
            "**Fine-tuning the 7B shape**, r = 16 on all linear layers: tokens a second of GPU time · GiB reserved. "
            "GPU time, because a T4 always computes where an H200 waits for Python:",
            fine_tuning(),
            planned(),
            "**Merging and GPTQ** of the 7B shape, held to 12 GiB of host memory as well:",
            merge_and_gptq(),
        ]
    )


def in_three_rows() -> str:
    """What the README shows of it: one row each of speed, of the prediction, of merge and GPTQ."""
    _, _, ours, _, unsloth, _, ratio, _ = (cell.strip() for cell in row_of(fine_tuning(), "4×2,048").split("|"))
    merging, quantizing = (
        [cell.strip() for cell in row_of(merge_and_gptq(), start).split("|")]
        for start in ("merge into the base as training saw it", "GPTQ")
    )
    allocated = planned().partition("Predicted against measured: ")[2].rstrip(".")
    rows = [
        (
            "fine-tuning, 4×2,048 tokens a step: tokens/s · GiB",
            f"{ours}; Unsloth {unsloth}, so {ratio.split()[0]} times",
        ),
        ("GPU memory of the planned runs, predicted against measured", allocated),
        (
            "merge, and GPTQ",
            f"{merging[2]} s in {merging[4]} GiB of RAM, and {quantizing[2]} s in {quantizing[3]} GiB of VRAM",
        ),
    ]
    return "\n".join(
        ["| Mistral 7B's shape in a T4's memory | measured |", "|---|---|", *(f"| {a} | {b} |" for a, b in rows)]
    )


def row_of(table: str, start: str) -> str:
    """The row of a Markdown table that starts with these words."""
    return next(line for line in table.splitlines() if line.startswith(f"| {start}"))


def main() -> None:
    """Print, or write into the two READMEs."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--write", action="store_true", help="into README.md and data/measurements/README.md")
    options = parser.parse_args()
    if not options.write:
        print(in_three_rows(), document(), step_times(), sep="\n\n")
        return
    for file, mark, text in ((README, "rows", in_three_rows()), (MEASUREMENTS, "budget", document())):
        write(file, mark, text)


def write(file: Path, mark: str, text: str) -> None:
    """Put a text between its marks. Raises SystemExit when the file has none."""
    new, found = re.subn(
        rf"(<!-- {mark} -->).*?(<!-- /{mark} -->)",
        lambda match: f"{match[1]}\n{text}\n{match[2]}",
        file.read_text(encoding="utf-8"),
        flags=re.DOTALL,
    )
    if not found:
        raise SystemExit(f"{file} has no <!-- {mark} --><!-- /{mark} --> marks")
    file.write_text(new, encoding="utf-8")


if __name__ == "__main__":
    main()
