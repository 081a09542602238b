"""Fine-tuning beside Unsloth and the baseline recipe: the README's table from h200_finetune.csv, and that CSV.

python tests/benchmarks/finetune_table.py                        # print the tables
python tests/benchmarks/finetune_table.py OUT/finetune.jsonl …   # put bench_finetune.py's rows into the CSVs first
"""

import csv
import json
import sys
from pathlib import Path

MEASURED = Path(__file__).resolve().parents[2] / "data" / "measurements"
ROWS, CHECKS, PLANS, KERNELS = (
    MEASURED / f"h200_{name}.csv" for name in ("finetune", "finetune_check", "planned", "dequantize")
)
ABOUT = (
    *("date", "gpu", "cap_gib"),
    *("torch", "triton", "transformers", "peft", "trl", "bitsandbytes", "liger_kernel", "unsloth"),
)
COLUMNS = {
    ROWS: (
        *("engine", "batch", "seq", "checkpointing", "keep_attention", "offload_activations", "layers"),
        *("step_s", "tok_s", "busy_s", "busy_tok_s", "allocated_gib", "reserved_gib", "applied", "losses", "error"),
    ),
    CHECKS: ("variant", "layers", "steps", "first", "last", "worst_difference", "worst_difference_of_window", "error"),
    PLANS: (
        *("batch", "seq", "planned", "predicted_allocated_gib", "allocated_gib", "predicted_reserved_gib"),
        *("reserved_gib", "card_share", "predicted_tok_s", "tok_s", "applied", "error"),
    ),
    KERNELS: ("matrix", "different", "ours_ms", "bitsandbytes_ms"),
}
# CSV -> the columns that say which row it is.
SETTINGS = {
    ROWS: ("engine", "batch", "seq", "checkpointing", "keep_attention", "offload_activations"),
    CHECKS: ("variant",),
    PLANS: ("batch", "seq"),
    KERNELS: ("matrix",),
}
SHOWN = {"ours": "ours", "unsloth": "Unsloth", "baseline": "baseline recipe"}


def write(sources: list[Path]) -> None:
    """The benchmark's JSON lines into the CSVs; a row measured again takes the place of the earlier one."""
    records = [json.loads(line) for source in sources for line in source.read_text(encoding="utf-8").splitlines()]
    kinds = {"check": CHECKS, "planned": PLANS, "kernels": KERNELS}
    for path, columns in COLUMNS.items():
        chosen = [*read(path), *(record for record in records if kinds.get(record["engine"], ROWS) == path)]
        latest = {tuple(str(record.get(name, "")) for name in SETTINGS[path]): record for record in chosen}
        if latest:
            with path.open("w", encoding="utf-8", newline="") as stream:
                table = csv.DictWriter(stream, (*ABOUT, *columns), extrasaction="ignore", lineterminator="\n")
                table.writeheader()
                table.writerows(latest.values())


def read(path: Path) -> list[dict[str, str]]:
    """The rows of a CSV; none when it was not measured."""
    return list(csv.DictReader(path.open(encoding="utf-8"))) if path.exists() else []


def memory_setting(row: dict[str, str]) -> str:
    """What a row of ours recomputes and where it keeps the rest, in words."""
    if row["engine"] != "ours":
        return "all, offloaded" if row["engine"] == "unsloth" else "all"
    layers = {"none": "no layer"}.get(
        row["checkpointing"], f"{row['checkpointing']} layers".replace("all layers", "all")
    )
    kept = ", attention too" if row["keep_attention"] == "False" else ""
    return layers + kept + (", offloaded" if row["offload_activations"] == "True" else "")


def ratios(row: dict[str, str], others: list[dict[str, str]], engine: str) -> str:
    """A row's speed over another engine's at the same batch, by the clock and GPU-busy; — where that did not run."""
    same = [other for other in others if other["engine"] == engine and not other["error"]]
    same = [other for other in same if (other["batch"], other["seq"]) == (row["batch"], row["seq"])]
    if row["engine"] != "ours" or not same or not row["busy_tok_s"]:
        return "—"
    return " · ".join(f"{float(row[name]) / float(same[0][name]):.2f}" for name in ("tok_s", "busy_tok_s"))


def speeds() -> str:
    """Speed and memory, a line a configuration, the same tokens a step together."""
    rows = read(ROWS)
    lines = [
        "| batch × context | | recomputed | tokens/s, clock · GPU-busy | × Unsloth | × baseline | "
        "GiB allocated / reserved |",
        "|---|---|---|--:|--:|--:|--:|",
    ]
    for row in sorted(rows, key=lambda row: (int(row["batch"]) * int(row["seq"]), int(row["seq"]))):
        size = f"{row['batch']}×{int(row['seq']):,}"
        if row["error"]:
            said = "out of memory" if "out of memory" in row["error"] else row["error"][:60]
            lines.append(f"| {size} | {SHOWN[row['engine']]} | {memory_setting(row)} | {said} | | | |")
            continue
        speed = " · ".join(f"{int(row[name]):,}" for name in ("tok_s", "busy_tok_s") if row[name])
        against = " | ".join(ratios(row, rows, engine) for engine in ("unsloth", "baseline"))
        memory = f"{float(row['allocated_gib']):.2f} / {float(row['reserved_gib']):.2f}"
        lines.append(f"| {size} | {SHOWN[row['engine']]} | {memory_setting(row)} | {speed} | {against} | {memory} |")
    return "\n".join(lines)


def checks() -> str:
    """Our layers' losses against transformers', the largest difference of 20 steps in fp16."""
    lines = ["| 2 layers of the 7B shape, fp16 | largest difference of 20 losses |", "|---|--:|"]
    for row in read(CHECKS):
        if not row["variant"].startswith("plain"):
            difference = row["worst_difference"]
            if row["variant"] == "window":  # in older files the plain one with a window ran after it
                plain = next(other for other in read(CHECKS) if other["variant"] == "plain, window")
                difference = plain.get("worst_difference_of_window") or difference
            lines.append(f"| {row['variant']} | {float(difference):.5f} |")
    return "\n".join(lines)


def plans() -> str:
    """What the planner chose for a T4 and what it took."""
    lines = [
        "| batch × context | planned | GiB allocated: predicted, measured | reserved | of the card | tokens/s |",
        "|---|---|--:|--:|--:|--:|",
    ]
    for row in read(PLANS):
        size = f"{row['batch']}×{int(row['seq']):,}"
        if row["error"]:
            lines.append(f"| {size} | {row['planned']} | {row['error'][:60]} | | | |")
            continue
        pairs = [
            f"{float(row[f'predicted_{name}']):.2f}, {float(row[name]):.2f}"
            for name in ("allocated_gib", "reserved_gib")
        ]
        lines.append(
            f"| {size} | {row['planned']} | {' | '.join(pairs)} | {float(row['card_share']):.0%} | {row['tok_s']} |"
        )
    return "\n".join(lines)


if __name__ == "__main__":
    if sys.argv[1:]:
        write([Path(name) for name in sys.argv[1:]])
    print(speeds(), checks(), *([plans()] if PLANS.exists() else []), sep="\n\n")
