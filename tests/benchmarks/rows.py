"""The measured rows of this folder as (configuration, shape, machine, figures), for tables.py and compare.py."""

import csv
import re
from collections.abc import Iterator
from dataclasses import dataclass

from t4 import ALLOCATOR_GIB as CAP_GIB  # noqa: F401 - tables.py names it
from t4 import GIB, ROOT

from helpers import hardware
from helpers.budget import vram
from helpers.budget.step import Step
from helpers.config import RunConfig
from helpers.hardware import Machine
from helpers.models import ModelShape, known, shape

MEASURED = ROOT / "data" / "measurements"
CALIBRATED = "h200_t4_envelope.csv"
"""The run on whose every other row vram.allocator_overhead was calibrated; the rows between them test it."""
DEEPSEEK = known("deepseek-coder-1.3b", "llama", (24, 2048, 5504, 16, 16, 128, 32256, 16384))
UPCAST_ORDER = ("mistral-7b-v0.3", "tinyllama-1.1b", "smollm2-1.7b", "qwen2.5-1.5b")


@dataclass(frozen=True)
class Measured:
    """One measured row; GiB and seconds, None where it was not measured."""

    source: str
    recipe: str
    config: RunConfig
    shape: ModelShape
    machine: Machine
    expandable: bool
    status: str
    allocated_gib: float | None = None
    reserved_gib: float | None = None
    process_gib: float | None = None
    step_s: float | None = None
    plain_loop: bool = False
    calibrated: bool = False
    """Whether vram.allocator_overhead was calibrated on this row."""

    @property
    def step(self) -> Step:
        """Its training step, as the formulas take it."""
        return Step.of(self.config, self.shape)

    @property
    def label(self) -> str:
        """The row in a few words."""
        asked = self.config
        words = [self.shape.name, self.recipe, f"{asked.train.batch_size}×{asked.data.seq_len}"]
        words += [f"ckpt {asked.train.checkpointing}", f"r{asked.adapter.rank}"]
        return " ".join(words)


def read(name: str) -> list[dict[str, str]]:
    """Rows of a CSV of this folder, without its comment lines."""
    with (MEASURED / name).open(encoding="utf-8") as stream:
        return list(csv.DictReader(line for line in stream if not line.startswith("#")))


def number(text: str, unit: float = 1.0) -> float | None:
    """A cell as a number, None where it is empty."""
    return float(text) * unit if text else None


def count_or_word(text: str) -> int | str:
    """all, none, auto, or a number of layers."""
    return int(text) if text.isdigit() else text


def h200(name: str) -> Iterator[Measured]:
    """Rows of an H200 held to a T4's envelope, as measure.py writes them."""
    card, finished = hardware.machine("h200"), 0
    for row in read(name):
        if row["recipe"] == "inference" or row["status"] not in ("ok", "oom"):
            continue
        expandable = row["expandable"] == "True"
        calibrated = name == CALIBRATED and row["status"] == "ok" and (finished % 2 == 0 or not expandable)
        finished += expandable and row["status"] == "ok"
        config = RunConfig().with_values(
            batch_size=int(row["batch"]),
            seq_len=int(row["seq"]),
            checkpointing=count_or_word(row["checkpointing"]),
            rank=int(row["rank"]),
            targets=row["targets"],
            optimizer=row["optimizer"],
            attention=row["attention"],
            loss=row["loss"],
            dropout=float(row["dropout"]),
            accumulation=int(row["accumulation"]),
            offload_activations=row["offload"] == "True",
            upcast=row["upcast"] == "True",
            kernels="own" if row.get("kernels") == "own" else "plain",
            double_quant=row["double_quant"] == "True",
            keep_attention=row.get("keep_attention") != "False",
        )
        config = with_liger(config) if row["fused_kernels"] == "True" else config
        stale = stale_gib(row)
        measured = {key: number(row[key]) for key in ("allocated_gib", "reserved_gib", "process_gib", "step_s")}
        sizes = {key: size - stale for key, size in measured.items() if key != "step_s" and size is not None}
        yield Measured(
            row["group"], row["recipe"], config, shape(row["model"]), card, expandable, row["status"],
            calibrated=calibrated, step_s=measured["step_s"], **sizes,
        )  # fmt: skip


def with_liger(config: RunConfig) -> RunConfig:
    """A configuration just made, with Liger's kernels, which the budget has formulas for and no setting takes."""
    object.__setattr__(config.train, "kernels", "liger")
    return config


def stale_gib(row: dict[str, str]) -> float:
    """GiB that earlier models of the same process left behind: an embedding each, kept by a hook.

    Seen in every row after the first model, to the MiB; measure.py starts a process a model since.
    """
    if row.get("kernels") is not None or row["group"] not in ("ours", "baseline") or row["model"] not in UPCAST_ORDER:
        return 0.0
    earlier = [shape(name) for name in UPCAST_ORDER[: UPCAST_ORDER.index(row["model"])]]
    return sum(each.vocab * each.hidden for each in earlier) * (4 if row["upcast"] == "True" else 2) / GIB


def own_layers() -> Iterator[Measured]:
    """Our own layers as bench_finetune.py measured them."""
    for row in read("h200_finetune.csv"):
        if row["engine"] != "ours":
            continue
        config = RunConfig().with_values(
            batch_size=int(row["batch"]),
            seq_len=int(row["seq"]),
            accumulation=1,
            checkpointing=count_or_word(row["checkpointing"]),
            keep_attention=row["keep_attention"] != "False",
            offload_activations=row["offload_activations"] == "True",
        )
        yield Measured(
            "own layers", "own", config, shape("mistral-7b-v0.3"), hardware.machine("h200"), True, "ok",
            number(row["allocated_gib"]), number(row["reserved_gib"]), step_s=number(row["step_s"]),
        )  # fmt: skip


def planned() -> Iterator[Measured]:
    """What the planner chose for a T4, trained; `planned` is micro-batch × accumulation and what is recomputed."""
    for row in read("h200_planned.csv"):
        batch, accumulation, layers = map(int, re.match(r"(\d+) × (\d+), (\d+) layers", row["planned"]).groups())
        config = RunConfig().with_values(
            batch_size=batch,
            seq_len=int(row["seq"]),
            accumulation=accumulation,
            checkpointing=layers,
            offload_activations="offloaded" in row["planned"],
        )
        tokens = int(row["batch"]) * int(row["seq"])
        yield Measured(
            "planned", "own", config, shape("mistral-7b-v0.3"), hardware.machine("h200"), True, "ok",
            number(row["allocated_gib"]), number(row["reserved_gib"]), step_s=tokens / float(row["tok_s"]),
        )  # fmt: skip


def facts() -> Iterator[Measured]:
    """An earlier run on the same GPU, with other versions and scripts (20 November 2026)."""
    card = hardware.machine("h200")
    for row in read("h200_first_run.csv"):
        if row["recipe"] == "unsloth":
            continue
        ours = row["recipe"] == "ours"
        config = RunConfig().with_values(
            batch_size=int(row["batch"]),
            seq_len=int(row["seq"]),
            checkpointing=count_or_word(row["checkpointing"]),
            rank=int(row["rank"]),
            targets=row["targets"],
            optimizer=row["optimizer"],
            accumulation=1,
            attention="efficient" if ours else "math",
            upcast=not ours,
            kernels="plain",
        )
        config = with_liger(config) if ours else config
        yield Measured(
            "first run", row["recipe"], config, shape("mistral-7b-v0.3"), card, True, row["status"],
            allocated_gib=number(row["allocated_gib"]), reserved_gib=number(row["reserved_gib"]),
            step_s=int(row["batch"]) * int(row["seq"]) / float(row["tokens_s"]) if row["tokens_s"] else None,
        )  # fmt: skip


def t4(chosen: str) -> Iterator[Measured]:
    """Rows of a real T4 that others published: set first, unseen or ceiling."""
    for row in read("t4_fitcheck.csv"):
        if row["set"] != chosen:
            continue
        config = RunConfig().with_values(
            batch_size=int(row["batch"]),
            seq_len=int(row["seq"]),
            checkpointing="all",
            rank=int(row["rank"]),
            targets="attention",
            accumulation=1,
            optimizer="adamw_torch",
            attention=row["attention"],
            loss="full",
            upcast=True,
            kernels="plain",
            double_quant=False,
        )
        model = DEEPSEEK if row["model"] == DEEPSEEK.name else shape(row["model"])
        mib = 2**20 / GIB
        yield Measured(
            f"T4 {chosen}", "plain loop", config, model, hardware.machine("t4"), False, row["status"],
            number(row["peak_alloc_mib"], mib), number(row["peak_reserved_mib"], mib),
            number(row["process_mib"], mib), number(row["step_s"]), plain_loop=True, calibrated=chosen == "first",
        )  # fmt: skip


def allocated_gib(row: Measured) -> tuple[float, str]:
    """(predicted peak in PyTorch's allocator, its phase)."""
    phases = vram.phases(row.step, row.machine.gpu.capability)
    if row.plain_loop:
        phases = as_plain_loop(phases, row)
    phase = max(phases, key=lambda name: sum(phases[name].values()))
    return sum(phases[phase].values()) / GIB, phase


def as_plain_loop(phases: dict[str, vram.Parts], row: Measured) -> dict[str, vram.Parts]:
    """The phases of a loop without autocast that holds the model's output: logits stay in fp32 to the end.

    So there are no casts of adapters or head; forward: logits and log-softmax; backward: those and two gradients.
    """
    tokens, words = row.step.tokens, row.shape.vocab
    stream = tokens * row.shape.hidden * 4
    held = {"the loss": 8 * tokens * words + 2 * stream, "the loss's backward pass": 16 * tokens * words + stream}
    found = {}
    for name, parts in phases.items():
        rest = {part: size for part, size in parts.items() if part not in ("adapters in 16 bits", "logits and loss")}
        found[name] = rest | {"logits and loss": held.get(name, 4 * tokens * words)}
    return found
