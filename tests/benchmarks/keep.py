"""Rows of a benchmark's JSON lines into the CSVs of data/measurements; one measured again replaces the earlier.

python tests/benchmarks/keep.py OUT/finetune.jsonl OUT/merge_quantize.jsonl …
"""

import argparse
import csv
import json
from pathlib import Path

from t4 import ROOT

MEASURED = ROOT / "data" / "measurements"
# CSV -> the columns that say which row it is.
SETTINGS = {
    "h200_finetune": ("engine", "batch", "seq", "checkpointing", "keep_attention", "offload_activations"),
    "h200_finetune_check": ("variant",),
    "h200_planned": ("batch", "seq"),
    "h200_dequantize": ("matrix",),
    "merge_quantize": ("task",),
}
ENGINES = {"check": "h200_finetune_check", "planned": "h200_planned", "kernels": "h200_dequantize"}


def main() -> None:
    """Sort the files' rows into their CSVs."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("files", type=Path, nargs="+", help="of bench_finetune.py or bench_merge_quantize.py")
    rows = [json.loads(line) for file in parser.parse_args().files for line in file.read_text().splitlines()]
    for name, settings in SETTINGS.items():
        keep(MEASURED / f"{name}.csv", [flat(row) for row in rows if csv_of(row) == name], settings)


def csv_of(row: dict) -> str:
    """The CSV that a row belongs to."""
    return "merge_quantize" if "task" in row else ENGINES.get(row["engine"], "h200_finetune")


def flat(row: dict) -> dict:
    """A row in single cells, as the CSVs have them."""
    found = {name: value for name, value in row.items() if name not in ("limit_events", "modules", "kernels")}
    if "layer_times_s" in row:
        found["layer_times_s"] = " ".join(map(str, row["layer_times_s"]))
    return found | ({"oom_kill": row["limit_events"].get("oom_kill", "")} if "limit_events" in row else {})


def keep(path: Path, rows: list[dict], settings: tuple[str, ...]) -> None:
    """Put rows into a CSV, told apart by their settings. Its columns stay; merging and GPTQ may bring new ones."""
    if not rows:
        return
    with path.open(encoding="utf-8", newline="") as stream:
        earlier = csv.DictReader(stream)
        latest = {tuple(row.get(name, "") for name in settings): row for row in earlier}
        columns = list(earlier.fieldnames)
    latest |= {tuple(str(row.get(name, "")) for name in settings): row for row in rows}
    if "task" in settings:
        columns += dict.fromkeys(name for row in rows for name in row if name not in columns)
    with path.open("w", encoding="utf-8", newline="") as stream:
        table = csv.DictWriter(stream, columns, extrasaction="ignore", lineterminator="\n")
        table.writeheader()
        table.writerows(latest.values())


if __name__ == "__main__":
    main()
