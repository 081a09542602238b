"""GPTQ of a merged model (https://arxiv.org/abs/2210.17323) on a machine that could not hold it in 16 bits.

GPTQModel quantizes a layer at a time from the folder on disk. It runs in a process of its own: its chatter goes to a
log file, its memory is gone when it ends, and its settings reach it before it is imported, whatever the notebook has
imported already (PEFT and transformers import GPTQModel wherever they find it).
"""

import functools
import json
import math
import os
import random
import shutil
import subprocess
import sys
import threading
import time
from array import array
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import closing
from dataclasses import asdict
from pathlib import Path
from statistics import median
from typing import TYPE_CHECKING

from helpers.budget import host, placement
from helpers.config import QuantizeConfig, RunConfig, load_yaml, save_yaml
from helpers.inference import kind, read_config
from helpers.models import ROOT, ModelShape, shape
from helpers.models.gptq_kernels import Say, gptq_kernel, tools_path
from helpers.models.gpu import free_memory, seeing
from helpers.models.stored import for_all_readers, stored_tensors
from helpers.models.templates import Template, hand_on, load_tokenizer
from helpers.sources.formats import BadRow, recognise, to_messages
from helpers.sources.readers import kind_of, read
from helpers.workspace import beside, building, exclusive, refuse_output, write_manifest, write_text

if TYPE_CHECKING:
    import torch

GIB = 2**30
GENERAL = ROOT / "data" / "calibration.jsonl"
"""The general set: text that is nobody's conversations."""
LOG = "gptq.log"
CHECK_ROWS = 16
"""Rows of text, none of them calibrated with, on which the result is held against the merged model."""
PERPLEXITY_BOUND = {8: 1.005, 4: 1.03, 3: 1.15, 2: 2.0}
"""Bits -> how many times the merged model's perplexity is usual; above, a sentence says what to try.

Measured: 12 GPTQs to 4 bits of two small models 0.999 to 1.001, to 3 bits 1.000 to 1.010
(data/measurements/merge_bases.csv). Published for Mistral 7B, other formats: of 4 bits 1.006 to 1.023, of 3 bits 1.028
to 1.066 (https://huggingface.co/ikawrakow/mistral-7b-quantized-gguf). For 2 and 8 bits it is a guess.
"""
PERPLEXITY_LIMIT = {8: 1.02, 4: 1.10, 3: 1.5, 2: 20.0}
"""Bits -> the ratio above which the result is broken, and does not take the place of a finished model."""
BLOCK_TEXTS = 256
"""Texts that are read at a time, at first; twice as many each further time."""
BATCH_TOKENS = 4096
"""Tokens that go through a layer at once."""
STANDS_OUT = 5.0
"""A module is named when its error is so many times the median of the same module in the layers around it."""
AROUND_LAYERS = 4


class CalibrationError(ValueError):
    """The calibration text is missing, unreadable or too little; the message says how much is needed."""


class QuantizationFailed(RuntimeError):
    """GPTQModel's process ended early; the message holds its last words and where its log lies."""


class BrokenResult(QuantizationFailed):
    """The result is far worse than the merged model; the message says by how much, where it lies, and what to try."""


def quantize(
    model: Path, output: Path, config: QuantizeConfig, calibration: str | Path | Sequence[str | Path] = ()
) -> dict:
    """Write the model at config.bits in the format that transformers, vLLM, ExLlama and AutoGPTQ read.

    model: a folder in 16 bits. calibration: the user's own text, as prepared folders, files of conversations in any
    format that notebook 02 reads, or plain text; config.calibration says whether it is used, or the general set, or
    both, or names a file or folder to use instead.
    Returns the measurements: the error of each module, perplexity before and after, size, time, memory. Raises
    ValueError in one sentence, before anything is written, for a model that is already quantized or not whole, too
    little text, too little disk, or an output folder that is in use.
    A result whose perplexity is above PERPLEXITY_LIMIT times the merged model's is broken: whoever evaluates, shares
    or serves what lies in `output` must not get it unawares, and a sound one that lies there must not go. But half an
    hour of a T4 is in it, and it is the user's: it is left whole beside, in `<output>.rejected`, and BrokenResult
    says so; renamed to `output` it counts as finished. Above PERPLEXITY_BOUND it is finished, with a sentence.
    """
    start = time.monotonic()
    model, output = Path(model), Path(output)
    work, log = output.with_name(output.name + ".partial"), output.with_name(output.name + ".log")
    given = [Path(calibration)] if isinstance(calibration, str | Path) else [Path(path) for path in calibration]
    stored_tensors(model)
    sizes = shape(str(model))
    check_group_size(sizes, config)
    _, own = calibration_sets(config, given)
    refuse_output(output, [model, *own], "quantize")
    rows, check_rows = calibration_rows(model, config, own, widest_input(sizes))
    host.check_disk(output, host.quantizing_disk_bytes(RunConfig(quantize=config), sizes), "quantizing")
    with exclusive(work):
        run = merged_config(model).with_values(**asdict(config))
        remove_all(work)
        try:
            with building(output, "quantize", run, {"merged": model}, keep=True, held=True) as stage:
                log.unlink(missing_ok=True)
                job = {"model": str(model.resolve()), "output": str(work.resolve()), "config": asdict(config)}
                figures = run_gptq(job | {"rows": rows, "check_rows": check_rows}, sizes, log)
                shutil.move(log, work / LOG)
                stage.measurements |= {
                    "bits": config.bits,
                    "group_size": config.group_size,
                    "calibration": config.calibration,
                    "calibration_rows": len(rows),
                    "calibration_tokens": sum(map(len, rows)),
                    "size_bytes": sum(file.stat().st_size for file in work.glob("*.safetensors")),
                    **figures,
                    "perplexity_bound": PERPLEXITY_BOUND[config.bits],
                    "within_bound": figures["perplexity_ratio"] <= PERPLEXITY_BOUND[config.bits],
                    "total_s": round(time.monotonic() - start, 1),
                }
                if not figures["perplexity_ratio"] <= PERPLEXITY_LIMIT[config.bits]:  # NaN is no sound result either
                    save_yaml(run, work / "config.yaml")
                    write_manifest(work, "quantize", run, {"merged": model}, stage.measurements)
                    raise BrokenResult(set_aside(work, output, config, figures))
                if not stage.measurements["within_bound"]:
                    print(f"{loss_of(config, figures)}, more than usual: {remedies(config)}.")
        except BrokenResult:
            raise
        except BaseException:
            remove_all(work)
            raise
    return stage.measurements


def loss_of(config: QuantizeConfig, figures: dict) -> str:
    """The first half of a sentence: what quantizing cost.

    >>> loss_of(QuantizeConfig(), {"perplexity_merged": 5.0, "perplexity_gptq": 5.3, "perplexity_ratio": 1.06})
    '4 bits cost this model 6.0 % of perplexity (5.000 before, 5.300 after, usual: at most 3.0 %)'
    """
    usual = 100 * (PERPLEXITY_BOUND[config.bits] - 1)
    before, after = figures["perplexity_merged"], figures["perplexity_gptq"]
    return (
        f"{config.bits} bits cost this model {100 * (figures['perplexity_ratio'] - 1):.1f} % of perplexity "
        f"({before:.3f} before, {after:.3f} after, usual: at most {usual:.1f} %)"
    )


def remedies(config: QuantizeConfig) -> str:
    """What makes a quantized model better, of what this run has not tried.

    >>> remedies(QuantizeConfig(act_order=True, calibration="both"))
    'calibration_samples=256, group_size=64 or 8 bits do better'
    """
    tries = [f"calibration_samples={2 * config.calibration_samples}"]
    tries += [] if config.calibration == "both" else ["calibration=both"]
    tries += [] if config.act_order else ["act_order"]
    tries += {-1: ["group_size=128"], 128: ["group_size=64"], 64: ["group_size=32"]}.get(config.group_size, [])
    tries += [] if config.bits == 8 else [f"{ {2: 3, 3: 4, 4: 8}[config.bits] } bits"]
    return f"{', '.join(tries[:-1])} or {tries[-1]} do better" if len(tries) > 1 else f"{tries[0]} does better"


def set_aside(work: Path, output: Path, config: QuantizeConfig, figures: dict) -> str:
    """Leave a broken result whole beside its place, instead of an earlier one; returns the sentence about it."""
    rejected = beside(output, "rejected")
    shutil.rmtree(rejected, ignore_errors=True)
    work.rename(rejected)
    outliers = f"; {'; '.join(figures['standing_out'][:3])}" if figures["standing_out"] else ""
    return (
        f"{loss_of(config, figures)}{outliers}: that is broken, so {output} was not written; {remedies(config)}. "
        f"The result lies in {rejected}: to use it all the same, rename it to {output.name}"
    )


def merged_config(model: Path) -> RunConfig:
    """The configuration that the merge left in its folder; the defaults for a model from elsewhere."""
    path = model / "config.yaml"
    return load_yaml(path) if path.is_file() else RunConfig().with_values(model=str(model))


def remove_all(folder: Path) -> None:
    """Empty a folder that this process holds."""
    for path in folder.iterdir():
        if path.is_dir():
            shutil.rmtree(path)
        else:
            path.unlink()


# ---- what is needed, and what is refused -----------------------------------------------------------------------------


def check_group_size(sizes: ModelShape, config: QuantizeConfig) -> None:
    """Raises ValueError when a layer's input width is no multiple of the group size."""
    widths = {name: inputs for name, (inputs, _) in sizes.linears.items()}
    odd = [name for name, width in widths.items() if config.group_size > 0 and width % config.group_size]
    if odd:
        fitting = [size for size in (128, 64, 32) if not any(width % size for width in widths.values())]
        raise ValueError(
            f"group_size={config.group_size} does not divide the {widths[odd[0]]} inputs of {odd[0]}; "
            f"group_size={fitting[0] if fitting else -1} does"
        )


def widest_input(sizes: ModelShape) -> int:
    """Inputs of the widest layer: with fewer tokens than that its Hessian, XᵀX over all tokens, cannot have full rank.

    >>> widest_input(shape("mistral-7b-v0.3"))
    14336
    """
    return max(inputs for inputs, _ in sizes.linears.values())


# ---- calibration -----------------------------------------------------------------------------------------------------


def calibration_rows(
    model: Path, config: QuantizeConfig, own: Sequence[Path], least_tokens: int
) -> tuple[list[list[int]], list[list[int]]]:
    """Rows of token ids to calibrate with, and other rows to check the result with.

    Texts are drawn from all over each source in an order that a seed decides, and laid end to end until a row has
    calibration_tokens tokens; every row begins with the beginning of a text. One text in 16 is kept for the check.
    Only as many are read and tokenized as are needed, however long the source is: what grows with it is 8 bytes a text.
    Raises CalibrationError when there are fewer than least_tokens.
    """
    encode = encoder(model)
    sets, _ = calibration_sets(config, own)
    parts = split_sources(sets)
    rows: list[list[int]] = []
    check: list[list[int]] = []
    for number, paths in enumerate(parts):
        counts = [count_texts(path) for path in paths]
        order = array("Q", range(sum(counts)))
        random.Random(number).shuffle(order)
        kept = max(1, len(order) // 16) if len(order) > 1 else 0
        drawn = functools.partial(texts_at, paths, counts, encode)
        rows += pack(drawn(order[kept:]), config.calibration_tokens, config.calibration_samples // len(parts))
        check += pack(drawn(order[:kept] or order), config.calibration_tokens, CHECK_ROWS // len(parts))
    have = sum(map(len, rows))
    if have < least_tokens:
        wanted = min(config.calibration_samples, math.ceil(least_tokens / config.calibration_tokens))
        raise CalibrationError(
            f"calibration has {have} tokens and needs at least {least_tokens}, one for each input of the widest layer: "
            + (
                f"give more text than {', '.join(map(str, sets))} or take calibration=both"
                if wanted * config.calibration_tokens >= least_tokens and len(rows) < config.calibration_samples
                else f"raise calibration_samples to {math.ceil(least_tokens / config.calibration_tokens)}"
            )
        )
    return rows, check


def calibration_sets(config: QuantizeConfig, own: Sequence[Path]) -> tuple[list[Path], list[Path]]:
    """What to calibrate with, and what of it is the user's: own, general or both, or what config.calibration names.

    Raises CalibrationError for what is not there.
    """
    if config.calibration not in ("own", "general", "both"):
        own = [Path(config.calibration).expanduser()]
    sets = {"general": [GENERAL], "both": [*own, GENERAL]}.get(config.calibration, list(own))
    for path in sets:
        if not (path.is_file() or (path / "train").is_dir()):
            other = "own, general or both, nor " if path == Path(config.calibration) else ""
            raise CalibrationError(
                f"calibration {path} is neither {other}a file nor a prepared folder: give a file of conversations or "
                "text, or calibration=general"
            )
    if config.calibration != "general" and not own:
        raise CalibrationError(f"calibration={config.calibration} needs a file of text, or calibration=general")
    return sets, list(own)


def split_sources(sets: list[Path]) -> list[list[Path]]:
    """The user's own text together, and the general set by itself, so that each gives half of the rows."""
    return [
        part
        for part in ([path for path in sets if path != GENERAL], [path for path in sets if path == GENERAL])
        if part
    ]


def count_texts(path: Path) -> int:
    """How many texts a source has; a file is read once for it. Raises CalibrationError for what cannot be read."""
    if (path / "train").is_dir():
        from datasets import load_from_disk

        return len(load_from_disk(str(path / "train")))
    return sum(1 for _ in texts_of(path))


def texts_at(
    paths: Sequence[Path], counts: Sequence[int], encode: Callable[[object], list[int]], order: Sequence[int]
) -> Iterator[list[int]]:
    """Token ids of the texts at these places of all sources laid end to end, in this order, read block by block.

    A file is read through once a block, so blocks double.
    """
    start, size = 0, BLOCK_TEXTS
    while start < len(order):
        wanted = order[start : start + size]
        found: dict[int, list[int]] = {}
        first = 0
        for path, count in zip(paths, counts, strict=True):
            here = sorted(place - first for place in wanted if first <= place < first + count)
            found |= {first + place: encode(text) for place, text in chosen_texts(path, here)}
            first += count
        yield from (found[place] for place in wanted)
        start, size = start + size, 2 * size


def chosen_texts(path: Path, places: list[int]) -> Iterator[tuple[int, object]]:
    """The texts of one source at these places, which rise."""
    if not places:
        return
    if (path / "train").is_dir():
        from datasets import load_from_disk

        yield from zip(places, load_from_disk(str(path / "train"))[places]["input_ids"], strict=True)
        return
    wanted = iter(places)
    place = next(wanted)
    for number, text in enumerate(texts_of(path)):
        if number == place:
            yield number, text
            if (place := next(wanted, None)) is None:
                return


def texts_of(path: Path) -> Iterator[object]:
    """Texts of a file, one in memory at a time: token ids, messages, or text. Raises CalibrationError in a sentence."""
    try:
        if kind_of(path.name) in ("", "text"):
            yield from paragraphs(path)
            return
        for record in read(str(path)):
            row = record.row
            if isinstance(row, dict) and isinstance(row.get("input_ids"), list):
                yield row["input_ids"]
                continue
            row_format = None if record.problem else recognise(row)
            if row_format is None:
                raise CalibrationError(f"calibration {path} must hold rows with messages or text: see {record.place}")
            yield to_messages(row, row_format)
    except BadRow as error:
        raise CalibrationError(f"calibration {path} must hold rows with messages or text: {error}") from None
    except UnicodeDecodeError:
        raise CalibrationError(f"calibration {path} is not text in UTF-8: give conversations or text") from None
    except CalibrationError:
        raise
    except ValueError as error:
        raise CalibrationError(f"calibration: {error}") from None


def paragraphs(path: Path) -> Iterator[str]:
    """Texts between blank lines.

    >>> import tempfile
    >>> file = Path(tempfile.mkdtemp()) / "poem.txt"
    >>> _ = file.write_text("one\\ntwo\\n\\n\\nthree\\n")
    >>> list(paragraphs(file))
    ['one\\ntwo', 'three']
    """
    lines: list[str] = []
    with path.open(encoding="utf-8") as stream:
        for line in stream:
            if line.strip():
                lines.append(line)
            elif lines:
                yield "".join(lines).rstrip("\n")
                lines = []
    if lines:
        yield "".join(lines).rstrip("\n")


def encoder(model: Path) -> Callable[[object], list[int]]:
    """A function from a text to its token ids: conversations as in training, through the model's own template."""
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(model)
    template = functools.cache(lambda: Template(load_tokenizer(model)))  # text alone needs none

    def encode(text: object) -> list[int]:
        if isinstance(text, str):
            return tokenizer(text)["input_ids"]
        if not text or isinstance(text[0], int):
            return text
        if text[0]["role"] == "text":
            return tokenizer(text[0]["content"])["input_ids"]
        return template().encode([text])[0][0]

    return encode


def pack(texts: Iterable[list[int]], tokens: int, rows: int) -> list[list[int]]:
    """At most so many rows of at most so many tokens; what does not fit at the end of a row is left out.

    >>> pack([[1, 2], [3, 4], [5, 6]], tokens=3, rows=9)
    [[1, 2, 3], [5, 6]]
    """
    packed: list[list[int]] = []
    row: list[int] = []
    for text in texts:
        row = row + text[: tokens - len(row)]
        if len(row) == tokens:
            packed.append(row)
            row = []
        if len(packed) >= rows:
            return packed
    return [*packed, row] if len(row) > 1 else packed


# ---- in this process: start the work, follow it ----------------------------------------------------------------------


def run_gptq(job: dict, sizes: ModelShape, log: Path) -> dict:
    """Quantize in a process of its own, with a bar; returns measurements, the error of each module among them.

    With job["check_rows"] the result is then opened as its users do, asked a question, and held against the model.
    """
    from tqdm.auto import tqdm

    modules: list[dict] = []
    figures: dict = {}
    with (
        closing(worker(job, log)) as messages,
        tqdm(total=sizes.layers * len(sizes.linears), unit="module", desc="GPTQ") as bar,
    ):
        for message in messages:
            if "said" in message:
                tqdm.write(message["said"])
            elif "module" in message:
                modules.append(message)
                bar.update()
                bar.set_postfix_str(f"layer {message['layer']}: error {layer_error(modules, message['layer']):.3g}")
            else:
                figures |= message
                bar.set_postfix_str("checking")
    outliers = standing_out(modules)
    return figures | {
        "layer_errors": {
            str(layer): layer_error(modules, layer) for layer in sorted({module["layer"] for module in modules})
        },
        "standing_out": outliers,
        "modules": modules,
    }


def layer_error(modules: list[dict], layer: int) -> float:
    """Sum of the errors of a layer's modules; GPTQ's error of a module is |(W - Q) X|² a token."""
    return sum(module["error"] or 0.0 for module in modules if module["layer"] == layer)


def standing_out(modules: list[dict]) -> list[str]:
    """Modules whose error is STANDS_OUT times the median of the same module in the layers around it.

    >>> standing_out([{"layer": n, "module": "mlp.down_proj", "error": 9.0 if n == 1 else 1.0} for n in range(4)])
    ['layer 1 mlp.down_proj: 9 where its neighbours have 1']
    """
    found = []
    for module in modules:
        around = [
            other["error"]
            for other in modules
            if other["module"] == module["module"]
            and 0 < abs(other["layer"] - module["layer"]) <= AROUND_LAYERS
            and other["error"]
        ]
        if around and module["error"] and module["error"] > STANDS_OUT * median(around):
            name = f"layer {module['layer']} {module['module']}"
            found.append(f"{name}: {module['error']:.3g} where its neighbours have {median(around):.3g}")
    return found


def worker(job: dict, log: Path) -> Iterator[dict]:
    """Messages of a process that does the job; what it prints goes to the log. Raises QuantizationFailed."""
    with log.open("ab") as stream:
        process = subprocess.Popen(
            [sys.executable, "-m", "helpers.quantize"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=stream,
            cwd=job["output"],  # GPTQModel writes a folder of logs where it stands
            env=os.environ | worker_settings() | seeing(1),
            text=True,
        )
    try:
        with process:
            process.stdin.write(json.dumps(job) + "\n")
            process.stdin.flush()
            yield from map(json.loads, process.stdout)
    finally:
        process.kill()  # when the notebook's cell is interrupted
    if process.returncode:
        raise QuantizationFailed(last_words(process.returncode, log))


def worker_settings() -> dict[str, str]:
    """Environment of the process, read by GPTQModel when it is imported.

    Two CPU workers: with the default on two cores, one, its loader finds no thread for itself and nothing starts.
    No compiled packing: on a GPU gptq_task packs there, and without one, compiling takes longer than it saves. What is
    compiled, once, is GPTQ's own step: 19 s on the first layer, then 2.2 s a layer of a 7B instead of 10.1
    (data/measurements/merge_quantize.csv).
    """
    return {
        "GPTQMODEL_CPU_WORKERS": os.environ.get("GPTQMODEL_CPU_WORKERS", "2"),
        "PATH": tools_path(),  # pip's ninja, which that step is compiled with
        "GPTQMODEL_DISABLE_PACK_EXT": os.environ.get("GPTQMODEL_DISABLE_PACK_EXT", "1"),
        "PYTHONPATH": os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")])),
    }


def last_words(status: int, log: Path) -> str:
    """Why a process ended, from its exit status and its log."""
    lines = [line.strip() for line in log.read_text(encoding="utf-8", errors="replace").splitlines() if line.strip()]
    last = next((line for line in reversed(lines) if "Error" in line), f"exit status {status}")
    if "OutOfMemory" in last or "out of memory" in last:
        return (
            f"GPTQ ran out of GPU memory: halve calibration_tokens, or restart the notebook's kernel; its log is {log}"
        )
    if status == -9:
        return f"GPTQ was killed, most often because host memory ran out: close other notebooks; its log is {log}"
    return f"GPTQ stopped with {last!r}; its log is {log}"


def finish_folder(model: Path, work: Path) -> None:
    """Tokenizer and template as the merged model has them, and settings that every reader understands."""
    hand_on(model, work)
    if (model / "generation_config.json").is_file():
        shutil.copyfile(model / "generation_config.json", work / "generation_config.json")
    settings, quantizer = (
        json.loads((work / name).read_text(encoding="utf-8")) for name in ("config.json", "quantize_config.json")
    )
    for made in (settings["quantization_config"], quantizer):
        made["meta"].pop("offload_to_disk_path", None)  # a folder of this machine, gone by now
    write_text(work / "config.json", json.dumps(for_all_readers(settings), indent=2) + "\n")
    write_text(work / "quantize_config.json", json.dumps(quantizer, indent=2) + "\n")


# ---- what the 4-bit weights look like --------------------------------------------------------------------------------


def dequantized(folder: Path, module: str) -> "torch.Tensor":
    """The weights (out, in) that a module of a quantized model stands for, in fp32.

    module: such as model.layers.0.self_attn.q_proj. The format: qweight holds the codes of 32 inputs in `bits` words of
    32 bits, qzeros the zero of each group less one, scales the size of a step; w = scale × (code - zero).
    """
    from safetensors import safe_open

    settings = json.loads((folder / "quantize_config.json").read_text(encoding="utf-8"))
    parts = {}
    for file in sorted(folder.glob("*.safetensors")):
        with safe_open(file, "pt") as tensors:
            names = [name for name in tensors.keys() if name.rpartition(".")[0] == module]  # noqa: SIM118
            parts |= {name.rpartition(".")[2]: tensors.get_tensor(name) for name in names}
    if "qweight" not in parts:
        raise ValueError(f"{folder} has no quantized {module}")
    codes = unpack(parts["qweight"].T, settings["bits"])  # (out, in)
    zeros = unpack(parts["qzeros"], settings["bits"]).T + 1  # (out, groups)
    group = parts["g_idx"].long()  # (in,)
    return parts["scales"].float().T[:, group] * (codes - zeros[:, group])


def stored_weight(folder: Path, module: str) -> "torch.Tensor":
    """The weights (out, in) of a module of a 16-bit model, in fp32, without opening the model."""
    from safetensors import safe_open

    name = f"{module}.weight"
    for file in sorted(folder.glob("*.safetensors")):
        with safe_open(file, "pt") as tensors:
            if name in tensors.keys():  # noqa: SIM118 - not a dict
                return tensors.get_tensor(name).float()
    raise ValueError(f"{folder} has no {name}")


def unpack(words: "torch.Tensor", bits: int) -> "torch.Tensor":
    """Codes of `bits` bits that lie one after another in 32-bit words. words: (rows, n); returns (rows, 32 n / bits).

    >>> import torch
    >>> unpack(torch.tensor([[0x76543210]], dtype=torch.int32), bits=4).tolist()
    [[0, 1, 2, 3, 4, 5, 6, 7]]
    """
    import numpy as np
    import torch

    raw = np.ascontiguousarray(words.numpy()).view(np.uint8)  # (rows, 4 n)
    stream = np.unpackbits(raw, axis=1, bitorder="little").reshape(len(raw), -1, bits)
    return torch.from_numpy(stream @ (1 << np.arange(bits)))


def rounded(weight: "torch.Tensor", bits: int, group_size: int) -> "torch.Tensor":
    """Round to nearest, what GPTQ is held against: the same symmetric grid a group, no look at the data. (out, in)

    >>> import torch
    >>> rounded(torch.tensor([[7.5, -7.0, 1.2, 0.0]]), bits=4, group_size=4).tolist()
    [[7.0, -7.0, 1.0, 0.0]]
    """
    import torch

    groups = weight.float().reshape(len(weight), -1, weight.shape[1] if group_size < 0 else group_size)
    levels = 2**bits - 1
    step = (2 * groups.abs().amax(dim=-1, keepdim=True) / levels).clamp(min=1e-12)
    zero = (levels + 1) / 2
    return (step * (torch.clamp(torch.round(groups / step) + zero, 0, levels) - zero)).reshape(weight.shape)


# ---- in the process of its own ---------------------------------------------------------------------------------------


def main() -> None:
    """Do the job, a line of JSON on standard input; messages, JSON too, go to standard output."""
    channel = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)
    job = json.loads(sys.stdin.readline())
    done = threading.Event()
    threading.Thread(target=end_with_parent, args=(done,), daemon=True).start()

    def report(message: dict) -> None:
        channel.write(json.dumps(message) + "\n")

    gptq_task(job, report)
    finish_folder(Path(job["model"]), Path(job["output"]))
    if "check_rows" in job:
        check_task(job, report)
    done.set()
    channel.close()  # from here on the parent may go
    sys.stderr.flush()
    os._exit(0)  # GPTQModel's pools need seconds to wind down, and nothing is left to do


def end_with_parent(done: threading.Event) -> None:
    """Standard input ends when the parent does, however it does: nobody is left to write for."""
    os.read(0, 1)
    os._exit(0 if done.is_set() else 1)


def gptq_task(job: dict, report: Callable[[dict], object], batch_tokens: int = BATCH_TOKENS, **library: object) -> None:
    """Quantize job["model"] into job["output"], a message a module, then one with time and memory.

    library: more of GPTQModel's own settings, for measurements.
    """
    import torch
    from gptqmodel import GPTQModel
    from gptqmodel import QuantizeConfig as LibraryConfig
    from gptqmodel.looper.gptq_processor import GPTQProcessor

    config, output, gpu = job["config"], Path(job["output"]), torch.cuda.is_available()
    show_row = GPTQProcessor.log_new_row

    def report_row(processor: GPTQProcessor, row: dict) -> None:
        report({"layer": row["layer"], "module": row["module"], **error_of(row["loss"])})
        show_row(processor, row)

    GPTQProcessor.log_new_row = report_row
    settings = LibraryConfig(
        bits=config["bits"],
        group_size=config["group_size"],
        sym=config["symmetric"],
        desc_act=config["act_order"],
        offload_to_disk_path=str(output / "offload"),
        **({"pack_impl": "gpu"} if gpu else {}) | library,
    )
    start = time.monotonic()
    # fp16 whatever the folder says: a T4 has no bf16, and GPTQModel would keep it; a CPU computes fp32 twice as fast
    model = GPTQModel.load(job["model"], settings, dtype=torch.float16 if gpu else torch.float32)
    rows = [{"input_ids": ids, "attention_mask": [1] * len(ids)} for ids in job["rows"]]
    model.quantize(rows, batch_size=max(1, batch_tokens // config["calibration_tokens"]))
    quantized = time.monotonic()
    model.save(str(output))
    if not gpu:
        store_in_fp16(output)
    for scratch in ("offload", "logs"):
        shutil.rmtree(output / scratch, ignore_errors=True)
    report(
        {
            "quantize_s": round(quantized - start, 1),
            "save_s": round(time.monotonic() - quantized, 1),
            "peak_allocated_gib": round(torch.cuda.max_memory_allocated() / GIB, 3) if gpu else None,
            "peak_reserved_gib": round(torch.cuda.max_memory_reserved() / GIB, 3) if gpu else None,
        }
    )


def store_in_fp16(folder: Path) -> None:
    """Write what GPTQModel saved in fp32 (embedding, head, norms) as fp16."""
    import torch
    from safetensors.torch import load_file, save_file

    for file in folder.glob("*.safetensors"):
        tensors = load_file(file)
        halves = {name: value.half() if value.dtype == torch.float32 else value for name, value in tensors.items()}
        save_file(halves, file, metadata={"format": "pt"})


def error_of(loss: str) -> dict:
    """GPTQModel's loss of a module as a number; it writes words where it fell back to rounding."""
    try:
        return {"error": float(loss)}
    except ValueError:
        return {"error": None, "note": loss}


def check_task(job: dict, report: Callable[[dict], object]) -> None:
    """Perplexity of the merged and of the quantized model on other rows, and an answer of the quantized one."""
    import torch
    from transformers import AutoTokenizer

    free_memory()  # what GPTQ left
    merged = open_model(Path(job["model"]), Path(job["output"]) / "offload")
    before = perplexity(merged, job["check_rows"])
    del merged
    free_memory()  # hooks that fetch layers from disk make cycles: without a collection all of it stays on the GPU
    model = open_model(
        Path(job["output"]), Path(job["output"]) / "offload", say=lambda sentence: report({"said": sentence})
    )
    after = perplexity(model, job["check_rows"])
    tokenizer, question = AutoTokenizer.from_pretrained(job["output"]), [{"role": "user", "content": "Who are you?"}]
    if tokenizer.chat_template:
        ids = tokenizer.apply_chat_template(question, add_generation_prompt=True, return_dict=False)
    else:
        ids = tokenizer(question[0]["content"])["input_ids"]
    batch = torch.tensor([ids], device=model.device)
    answer = model.generate(batch, attention_mask=torch.ones_like(batch), max_new_tokens=16, do_sample=False)
    shutil.rmtree(Path(job["output"]) / "offload", ignore_errors=True)
    report(
        {
            "perplexity_merged": before,
            "perplexity_gptq": after,
            "perplexity_ratio": after / before,
            "question": tokenizer.decode(ids),
            "answer": tokenizer.decode(answer[0, len(ids) :], skip_special_tokens=True),
        }
    )


def open_model(folder: Path, offload: Path, gpu_gib: float | None = None, say: Say = print):
    """A model as its users open it; layers that do not fit the GPU (gpu_gib, else what is free) stay on disk."""
    import torch
    from transformers import AutoModelForCausalLM

    if not torch.cuda.is_available():
        return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    room = placement.weights_room(int((gpu_gib or torch.cuda.mem_get_info()[0] / GIB) * GIB))
    weights = sum(file.stat().st_size for file in folder.glob("*.safetensors"))
    place = {"device_map": "cuda"}
    if weights > room:
        place = {"device_map": "auto", "max_memory": {0: room, "cpu": 0}, "offload_folder": str(offload)}
    if kind(folder) == "gptq":
        place |= gptq_kernel(read_config(folder)["quantization_config"], torch.float16, say=say)
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float16, **place)


def perplexity(model, rows: list[list[int]]) -> float:
    """exp of the mean loss over all tokens but each row's first. rows: token ids."""
    import torch

    loss = count = 0.0
    for row in rows:
        ids = torch.tensor([row], device=model.device)
        with torch.inference_mode():
            logits = model(ids).logits[0, :-1].float()  # (tokens - 1, words)
        loss += torch.nn.functional.cross_entropy(logits, ids[0, 1:], reduction="sum").item()
        count += len(row) - 1
    return math.exp(loss / count) if loss / count < 700 else math.inf
