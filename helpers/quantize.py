"""GPTQ of a merged model (https://arxiv.org/abs/2210.17323) on a machine that could not hold it in 16 bits.

GPTQModel quantizes a layer at a time from the folder on disk. It runs in a process of its own: its chatter goes to a
log file, its memory is gone when it ends, and its settings reach it before it is imported, whatever the notebook has
imported already (PEFT and transformers import GPTQModel wherever they find it).
"""

import json
import math
import os
import random
import shutil
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import closing
from dataclasses import asdict
from pathlib import Path
from statistics import median
from typing import TYPE_CHECKING

from helpers.config import QuantizeConfig, RunConfig, load_yaml
from helpers.inference import gptq_kernel, kind
from helpers.merge import TOKENIZER_FILES, for_all_readers, nearest_folder, stored_tensors
from helpers.models import ROOT, ModelShape, shape
from helpers.workspace import building, exclusive, refuse_output, write_text

if TYPE_CHECKING:
    import torch

GIB = 2**30
GENERAL = ROOT / "data" / "calibration.jsonl"
"""The general set: text that is nobody's conversations."""
LOG = "gptq.log"
CHECK_ROWS = 16
"""Rows of text, none of them calibrated with, on which the result is held against the merged model."""
PERPLEXITY_BOUND = {8: 1.02, 4: 1.15, 3: 2.0, 2: 20.0}
"""Bits -> how many times the merged model's perplexity a sound result may have."""
BATCH_TOKENS = 4096
"""Tokens that go through a layer at once."""
STANDS_OUT = 5.0
"""A module is named when its error is so many times the median of the same module in the layers around it."""
AROUND_LAYERS = 4


class CalibrationError(ValueError):
    """The calibration text is missing, unreadable or too little; the message says how much is needed."""


class QuantizationFailed(RuntimeError):
    """GPTQModel's process ended early; the message holds its last words and where its log lies."""


def quantize(
    model: Path, output: Path, config: QuantizeConfig, calibration: str | Path | Sequence[str | Path] = ()
) -> dict:
    """Write the model at config.bits in the format that transformers, vLLM, ExLlama and AutoGPTQ read.

    model: a folder in 16 bits. calibration: the user's own text, as prepared folders, JSONL (input_ids, messages or
    text) or plain text; config.calibration says whether it is used, or the general set, or both.
    Returns the measurements: the error of each module, perplexity before and after, size, time, memory. Raises
    ValueError in one sentence, before anything is written, for a model that is already quantized or not whole, too
    little text, too little disk, or an output folder that is in use.
    """
    start = time.monotonic()
    model, output = Path(model), Path(output)
    work, log = output.with_name(output.name + ".partial"), output.with_name(output.name + ".log")
    own = [Path(calibration)] if isinstance(calibration, str | Path) else [Path(path) for path in calibration]
    stored_tensors(model)
    sizes = shape(str(model))
    check_group_size(sizes, config)
    refuse_output(output, [model, *own], "quantize")
    rows, check_rows = calibration_rows(model, config, own, widest_input(sizes))
    check_disk(output, quantized_bytes(sizes, config))
    with exclusive(work):
        run = merged_config(model).with_values(**asdict(config))
        remove_all(work)
        try:
            with building(output, "quantize", run, {"merged": model}, keep=True) as stage:
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
        except BaseException:
            remove_all(work)
            raise
    return stage.measurements


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


def quantized_bytes(sizes: ModelShape, config: QuantizeConfig) -> int:
    """Size of the result: codes, a scale (16 bits) and a zero (bits) a group, and the rest in 16 bits.

    >>> round(quantized_bytes(shape("mistral-7b-v0.3"), QuantizeConfig()) / GIB, 2)
    3.88
    """
    bits = 0
    for name, (inputs, outputs) in sizes.linears.items():
        groups = 1 if config.group_size < 0 else math.ceil(inputs / config.group_size)
        bits += sizes.copies(name) * outputs * (inputs * config.bits + groups * (16 + config.bits))
    return sizes.layers * bits // 8 + 2 * (sizes.parameters - sizes.linear_parameters)


def check_disk(output: Path, result_bytes: int) -> None:
    """The result, and as much again for layers that GPTQModel parks on disk. Raises ValueError with both numbers."""
    needed, free = 2 * result_bytes + GIB // 16, shutil.disk_usage(nearest_folder(output)).free
    if needed > free:
        raise ValueError(
            f"quantizing needs {needed / GIB:.2f} GiB of disk at {output}, {free / GIB:.2f} are free: "
            f"free some, or give an output folder on another disk"
        )


# ---- calibration -----------------------------------------------------------------------------------------------------


def calibration_rows(
    model: Path, config: QuantizeConfig, own: Sequence[Path], least_tokens: int
) -> tuple[list[list[int]], list[list[int]]]:
    """Rows of token ids to calibrate with, and other rows to check the result with.

    Texts are shuffled (always alike) and laid end to end until a row has calibration_tokens tokens; every row begins
    with the beginning of a text. One text in 16 is kept for the check.
    Raises CalibrationError when there are fewer than least_tokens.
    """
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(model)
    if config.calibration != "general" and not own:
        raise CalibrationError(f"calibration={config.calibration} needs a file of text, or calibration=general")
    sets = {"own": list(own), "general": [GENERAL], "both": [*own, GENERAL]}[config.calibration]
    parts = [[ids for path in paths for ids in read_tokens(path, tokenizer)] for paths in split_sources(sets)]
    rows: list[list[int]] = []
    check: list[list[int]] = []
    for number, texts in enumerate(parts):
        random.Random(number).shuffle(texts)
        kept = max(1, len(texts) // 16) if len(texts) > 1 else 0
        share = config.calibration_samples // len(parts)
        rows += pack(texts[kept:], config.calibration_tokens, share)
        check += pack(texts[:kept] or texts, config.calibration_tokens, CHECK_ROWS // len(parts))
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


def split_sources(sets: list[Path]) -> list[list[Path]]:
    """The user's own text together, and the general set by itself, so that each gives half of the rows."""
    return [
        part
        for part in ([path for path in sets if path != GENERAL], [path for path in sets if path == GENERAL])
        if part
    ]


def read_tokens(path: Path, tokenizer) -> list[list[int]]:
    """Token ids of each text in a prepared folder, a JSONL file or a text file. Raises CalibrationError for others."""
    if (path / "train").is_dir():
        from datasets import load_from_disk

        return load_from_disk(str(path / "train"))["input_ids"][:]
    if not path.is_file():
        raise CalibrationError(f"calibration {path} is neither a file nor a prepared folder")
    text = path.read_text(encoding="utf-8")
    if path.suffix not in (".jsonl", ".json"):
        return [tokenizer(part)["input_ids"] for part in text.split("\n\n") if part.strip()]
    try:
        lines = [json.loads(line) for line in text.splitlines() if line.strip()]
        return [row_tokens(row, tokenizer) for row in lines]
    except (json.JSONDecodeError, KeyError, TypeError):
        raise CalibrationError(f"calibration {path} must hold one JSON object a line, with messages or text") from None


def row_tokens(row: dict, tokenizer) -> list[int]:
    """Token ids of one row; a conversation goes through the model's own template."""
    if "input_ids" in row:
        return row["input_ids"]
    if "messages" in row:
        return tokenizer.apply_chat_template(row["messages"], return_dict=False)
    if not isinstance(row["text"], str):
        raise TypeError("text is no string")
    return tokenizer(row["text"])["input_ids"]


def pack(texts: list[list[int]], tokens: int, rows: int) -> list[list[int]]:
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
            if "module" in message:
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
            env=os.environ | worker_settings(),
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
    for name in (*TOKENIZER_FILES, "generation_config.json"):
        if (model / name).is_file():
            shutil.copyfile(model / name, work / name)
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
    import gc

    import torch
    from transformers import AutoTokenizer

    gc.collect()  # what GPTQ left
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
    merged = open_model(Path(job["model"]), Path(job["output"]) / "offload")
    before = perplexity(merged, job["check_rows"])
    del merged
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
    model = open_model(Path(job["output"]), Path(job["output"]) / "offload")
    after = perplexity(model, job["check_rows"])
    tokenizer = AutoTokenizer.from_pretrained(job["output"])
    prompt = [{"role": "user", "content": "Hello, who are you?"}]
    if tokenizer.chat_template:
        ids = tokenizer.apply_chat_template(prompt, add_generation_prompt=True, return_dict=False)
    else:
        ids = tokenizer(prompt[0]["content"])["input_ids"]
    batch = torch.tensor([ids], device=model.device)
    answer = model.generate(batch, attention_mask=torch.ones_like(batch), max_new_tokens=16, do_sample=False)
    shutil.rmtree(Path(job["output"]) / "offload", ignore_errors=True)
    report(
        {
            "perplexity_merged": before,
            "perplexity_gptq": after,
            "perplexity_ratio": after / before,
            "answer": tokenizer.decode(answer[0, len(ids) :], skip_special_tokens=True),
        }
    )


def open_model(folder: Path, offload: Path, gpu_gib: float | None = None):
    """A model as its users open it; layers that do not fit the GPU (gpu_gib, else what is free) stay on disk."""
    import torch
    from transformers import AutoModelForCausalLM

    if not torch.cuda.is_available():
        return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    room = int((gpu_gib or torch.cuda.mem_get_info()[0] / GIB) * GIB) - 3 * GIB // 2
    weights = sum(file.stat().st_size for file in folder.glob("*.safetensors"))
    place = {"device_map": "cuda"}
    if weights > room:
        place = {"device_map": "auto", "max_memory": {0: room, "cpu": 0}, "offload_folder": str(offload)}
    if kind(folder) == "gptq":
        place |= gptq_kernel(folder, torch.float16)
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
    return math.exp(loss / count)


if __name__ == "__main__":
    main()
