"""What an export to GGUF needs and gives: file size, RAM, disk and minutes of each type, and where it runs. No torch.

>>> from helpers.models import shape
>>> seven = shape("mistral-7b-v0.3")
>>> round(file_bytes(seven, file_type("q4_k_m")) / GIB, 2)
4.07
>>> round(kv_cache_gib(seven, 8192), 2)
1.0
"""

import shutil
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

from helpers import hardware
from helpers.budget import Budget, Disk, DoesNotFit, Ram, Time, Vram, host
from helpers.config import RunConfig
from helpers.hardware import Machine
from helpers.models import ModelShape
from helpers.models.gguf_sizes import file_bytes, kinds, refuse_family, weight_bytes
from helpers.models.gguf_types import FILE_TYPES, FileType, file_type

GIB = 2**30
RATES = {
    "F32": 470.0, "F16": 470.0, "Q8_0": 300.0, "Q5_1": 410.0, "Q5_0": 320.0, "Q4_0": 480.0, "Q6_K": 33.0, "Q5_K": 17.5,
    "Q4_K": 14.5, "Q3_K": 80.0, "Q2_K": 16.0, "IQ4_NL": 3.0, "IQ4_XS": 3.0, "IQ3_S": 3.4, "IQ2_XXS": 2.8,
}  # fmt: skip
"""Million values that one core (AVX2, a server's of 2023) quantizes a second, by ggml_quantize_chunk on normal numbers:
data/measurements/gguf_export.jsonl. tests/benchmarks/bench_export.py --rates measures another CPU's."""
READ_RATE = 190.0
"""Million values that one core reads from safetensors, widens to fp32, puts in order and writes, a second."""
FIXED_S = 4.0
"""Seconds of importing, and of llama.cpp opening the file and reading the prompts."""
PROCESS_GIB = 0.45
"""Anonymous memory of an export, whatever the model: rows go through in pieces. Four of two layers of a 7B took 0.41 to
0.49 (gguf_export.jsonl), in which time and size of reading were calibrated too."""
LOSS_PERCENT = {
    "f16": 0.0, "q8_0": 0.04, "q6_k": 0.35, "q5_k_m": 0.91, "q4_k_m": 2.8, "iq4_xs": 3.7, "q3_k_m": 10.5, "iq3_s": 11.8,
    "iq2_xxs": 126.0,
}  # fmt: skip
"""Perplexity above 16 bits, per cent, of Llama 3 8B on Wikitext: llama.cpp's own table (tools/perplexity/README.md; the
IQ types with an importance matrix). Models with fewer words and less training lose less: Llama 2 7B 1.4 at q4_k_m."""
SYSTEM_GIB = 2.0
"""Left for the system and a browser on a laptop: an allowance, not a measurement."""
ENGINE_GIB = 0.3
"""llama.cpp's work space for a batch of 512 tokens, and the process."""
LAPTOP_GIB = 8.0
DEFAULT_CONTEXT = 4096


@dataclass(frozen=True)
class Choice:
    """One type of a model: what it costs to make, what it loses and what it takes to run."""

    name: str
    size_bytes: int
    bits: float
    """A weight, on average."""
    loss_percent: float
    """Of perplexity, as published for Llama 3 8B."""
    minutes: float
    run_gib: float
    """RAM to run it without a GPU: the file, keys and values at the context, work space."""
    needs_importance: bool


def kv_cache_gib(shape: ModelShape, context: int) -> float:
    """GiB of llama.cpp's keys and values, which are fp16 and as long as the context whatever the window."""
    return context * shape.layers * 2 * shape.kv_heads * shape.head_dim * 2 / GIB


# ---- time ------------------------------------------------------------------------------------------------------------


def core_seconds(
    shape: ModelShape, files: Iterable[FileType], importance: bool = False, rates: Mapping[str, float] = RATES
) -> float:
    """Seconds of one core for several types in one pass: read once, quantized for each."""
    values = {}
    for file in files:
        for kind, rows, columns in kinds(shape, file, importance):
            values[kind] = values.get(kind, 0) + rows * columns
    quantizing = sum(count / 1e6 / rates[kind] for kind, count in values.items())
    return quantizing + shape.parameters / 1e6 / READ_RATE


def minutes(
    shape: ModelShape,
    files: Iterable[FileType],
    cpus: int,
    importance: bool = False,
    rates: Mapping[str, float] = RATES,
) -> float:
    """Minutes on a machine: at most two threads quantize, one reads."""
    return (core_seconds(shape, files, importance, rates) / min(cpus, THREADS) + FIXED_S) / 60


THREADS = 2
"""Of `gguf_file.write`: Colab's cores."""


# ---- choosing --------------------------------------------------------------------------------------------------------


def choices(
    shape: ModelShape,
    cpus: int,
    context: int = DEFAULT_CONTEXT,
    importance: bool = False,
    rates: Mapping[str, float] = RATES,
) -> list[Choice]:
    """Every type of a model, largest first; context: at most what the model reaches."""
    context = min(context, shape.max_context)
    found = []
    for name, file in FILE_TYPES.items():
        size = file_bytes(shape, file, importance)
        found.append(
            Choice(
                file.name,
                size,
                8 * weight_bytes(shape, file, importance) / shape.parameters,
                LOSS_PERCENT[name],
                minutes(shape, [file], cpus, importance, rates),
                run_gib(shape, size, context),
                file.needs_importance,
            )
        )
    return sorted(found, key=lambda choice: -choice.size_bytes)


def run_gib(shape: ModelShape, size_bytes: int, context: int) -> float:
    """GiB that llama.cpp takes for a file at a context."""
    return size_bytes / GIB + kv_cache_gib(shape, context) + ENGINE_GIB


def runs_on(
    shape: ModelShape, ram_gib: float = LAPTOP_GIB, vram_gib: float = 0.0, context: int = DEFAULT_CONTEXT
) -> list[dict[str, object]]:
    """What runs on a laptop: a row a type, with its file, its need, the longest context, and layers on the GPU.

    Without a GPU everything is in RAM; with one, as many layers as fit go there, with their keys and values.
    """
    context, rows = min(context, shape.max_context), []
    for choice in choices(shape, THREADS, context):
        rest_gib = ram_gib - SYSTEM_GIB - choice.size_bytes / GIB - ENGINE_GIB
        longest = int(rest_gib / kv_cache_gib(shape, 1024)) * 1024 if rest_gib > 0 else 0
        row: dict[str, object] = {
            "type": choice.name,
            "file": size(choice.size_bytes),
            f"RAM at {context:,} tokens, GiB": round(choice.run_gib, 1),
            f"on {ram_gib:g} GB": "yes" if longest >= context else "no",
            "longest context, tokens": min(longest, shape.max_context),
        }
        if vram_gib:
            row[f"layers on a {vram_gib:g} GB GPU"] = on_gpu(shape, choice, vram_gib, context)
        rows.append(row)
    return rows


def size(size_bytes: int) -> str:
    """Bytes in GiB, in MiB below one.

    >>> size(2**30 * 4), size(2**20 * 3)
    ('4.00 GiB', '3.0 MiB')
    """
    return f"{size_bytes / GIB:.2f} GiB" if size_bytes >= GIB else f"{size_bytes / 2**20:.1f} MiB"


def table(types: Iterable[Choice], laptop: list[dict[str, object]]) -> str:
    """Every type in words: what it takes to make, and where it runs."""
    heads = list(laptop[0])
    lines = [f"{'':<9}{'MiB':>10}{'bits':>7}{'minutes':>9}{'perplexity':>12}  " + "  ".join(heads[2:])]
    for one, row in zip(types, laptop, strict=True):
        cells = "  ".join(f"{row[head]!s:>{len(head)}}" for head in heads[2:])
        size = f"{one.size_bytes / 2**20:>10,.1f}{one.bits:>7.2f}{one.minutes:>9.1f}"
        lines.append(f"{one.name:<9}{size}{f'+{one.loss_percent:g} %':>12}  {cells}")
    return "\n".join([*lines, "Perplexity: of Llama 3 8B above 16 bits, as llama.cpp's authors measured it."])


def on_gpu(shape: ModelShape, choice: Choice, vram_gib: float, context: int) -> str:
    """How many of the layers, with their keys and values, fit a GPU beside llama.cpp's work there."""
    layer_gib = (choice.size_bytes / GIB + kv_cache_gib(shape, context)) / (shape.layers + 1)
    fit = int((vram_gib - 2 * ENGINE_GIB) / layer_gib)
    return "all" if fit > shape.layers else f"{max(fit, 0)} of {shape.layers}"


# ---- does it fit -----------------------------------------------------------------------------------------------------


def needs(
    config: RunConfig, shape: ModelShape, machine: Machine, types: str = "q4_k_m", importance: bool = False
) -> Budget:
    """RAM, disk and hours of exporting a merged model; disk counts the merged model, which is read."""
    files = [file_type(name.strip()) for name in types.split(",")]
    refuse_family(shape.name, shape.model_type)
    disk = {"merged model": 2 * shape.parameters / GIB}
    disk |= {f"{file.name} file": file_bytes(shape, file, importance) / GIB for file in files}
    ram = {"Python and libraries": host.LIBRARIES_GIB["merge"], "rows on their way": PROCESS_GIB - 0.22}
    hours = minutes(shape, files, machine.host.cpus, importance) / 60
    time = Time(0.0, 0, hours, 1, {"export": hours})
    found = Budget(
        "export",
        machine,
        Vram(0.0, 0.0, 0.0, machine.vram_gib, machine.vram_gib, "", {}),
        Ram(sum(ram.values()), machine.host.ram_gib, ram),
        Disk(sum(disk.values()), machine.host.disk_gib, disk),
        time,
        True,
        (),
    )
    reasons = [
        f"the export needs {need:.1f} GiB of {what}, {machine.host.name} has {limit:.1f} free: {remedy}"
        for what, need, limit, remedy in (
            ("RAM", found.ram.peak_gib, found.ram.limit_gib, "close what else runs"),
            ("disk", found.disk.peak_gib, found.disk.limit_gib, "choose fewer or smaller types, or free some"),
        )
        if need > limit
    ]
    return found if not reasons else Budget(**(vars(found) | {"fits": False, "reasons": tuple(reasons)}))


def against_measured(predicted: Budget, measured: Mapping) -> list[dict]:
    """Predicted beside measured: bytes of each file, and time where the machine was free. Of what `export` returns."""
    pairs = [
        (f"{Path(path).name}, bytes", measured["predicted_bytes"][path], size)
        for path, size in measured["files"].items()
    ]
    pairs += [("export, s", 3600 * predicted.time.total_h, measured["export_s"])]
    pairs += [("RAM, GiB", predicted.ram.peak_gib, measured[key]) for key in ("peak_anonymous_gib",) if key in measured]
    return [
        {
            "quantity": quantity,
            "predicted": f"{value:,}" if isinstance(value, int) else f"{value:.2f}",
            "measured": f"{found:,}" if isinstance(found, int) else f"{found:.2f}",
            "difference %": round(100 * (value / found - 1), 1),
        }
        for quantity, value, found in pairs
    ]


def refuse_disk(needed: Mapping[Path, int]) -> None:
    """Raise DoesNotFit when the files do not fit the disk of the folder that they go to."""
    for folder, size in needed.items():
        free = shutil.disk_usage(folder).free
        if size > free:
            raise DoesNotFit(
                f"the files need {size / GIB:.2f} GiB at {folder}, and {free / GIB:.2f} are free: "
                "free some, choose fewer or smaller types, or another folder"
            )


def refuse_memory() -> None:
    """Raise DoesNotFit when this machine has less memory free than an export takes."""
    free = hardware.probe().host.ram_gib
    if free < PROCESS_GIB:
        raise DoesNotFit(
            f"the export needs {PROCESS_GIB:.1f} GiB of RAM and {free:.1f} are free: close what else runs, in a "
            "notebook a model that is open (Runtime > Restart session)"
        )
