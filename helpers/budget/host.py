"""RAM and disk of every stage, from the shape: sizes only, no torch.

>>> from helpers.models import profile, shape
>>> seven = shape("mistral-7b-v0.3")
>>> round(sum(disk(profile("mistral-7b"), seven, "merge").values()), 1)
27.2
"""

import json
import shutil
from collections.abc import Iterator
from functools import lru_cache
from pathlib import Path
from typing import NamedTuple

from helpers.budget import activations, vram
from helpers.budget.step import Step, lora_parameters
from helpers.config import RunConfig
from helpers.hardware import Machine
from helpers.models import ModelShape, aqlm_sizes
from helpers.workspace import existing

GIB = 2**30
LIBRARIES_GIB = {"train": 0.3, "merge": 0.22, "quantize": 0.9, "inference": 0.68}
"""Memory of a process that has imported what a stage needs (measured: data/measurements/README.md)."""
CUDA_HOST_GIB = {"train": 0.7, "merge": 0.36, "quantize": 0.25, "inference": 0.5}
"""What CUDA's libraries take of the host's memory, beside that (merge, quantize: merge_quantize.csv)."""
BITSANDBYTES_GIB = 0.55
"""What bitsandbytes takes beside them where nothing else has imported it (merge_quantize.csv)."""
COMMAND = {"command that waits": 0.21}
"""The command, or notebook, that has read the calibration text and waits for the process that quantizes."""
COMPILER_GIB = 1.5
"""g++ and nvcc's host pass on a source that includes PyTorch's headers: 1.50 of ext_gptq.cpp (CUDA 13.0, g++ 12)."""
KERNEL_SOURCES = 3
"""Files of ExLlamaV2's kernel, compiled by as many processes at once as there are cores (models/gptq_kernels.py)."""
COMPILERS = "compilers of the 4-bit kernel"
UNASKED_PROMPTS = 32
"""Without questions, so many held-out conversations begin the answers of an evaluation."""
KNOWN_CONVERSATIONS = {"HuggingFaceH4/ultrachat_200k": 207_865, "kaitchup/ultrachat-100k-flattened": 100_000}
"""Rows of data sets that people start with (their cards on the hub)."""
FP32 = {"LoRA weights", "LoRA gradients", "optimizer states", "optimizer buffers"}
"""Components that are as large on a CPU as on a GPU; what a GPU holds in 16 bits a CPU holds in 32."""


def ram(
    config: RunConfig,
    shape: ModelShape,
    machine: Machine,
    stage: str,
    phases: dict[str, vram.Parts] | None = None,
    waiting_gib: float = 0.0,
) -> dict[str, float]:
    """Component -> GiB of host memory that cannot be given back, at a stage's peak.

    Pages of memory-mapped files (safetensors, Arrow) are left out: the kernel drops them when memory is short.
    phases: of an evaluated model (placement.phases), default the adapter on its base; waiting_gib: of its layers that
    are not on the GPU.
    """
    on_gpu = machine.gpu is not None
    libraries = libraries_of(stage, on_gpu)
    if stage == "merge":
        return libraries | merging(config, shape, on_gpu)
    if stage == "quantize":
        return libraries | COMMAND | quantizing(config, shape, on_gpu)
    if on_gpu:
        at_once = 1 if stage == "inference" else 4  # measured: h200_evaluate_new.json
        parts = libraries | {"tensors on their way to the GPU": at_once * 2 * largest_tensor(shape) / GIB}
        if stage == "train":
            parts["adapters, for checkpoints"] = 2 * 4 * lora_parameters(config, shape) / GIB
            if config.train.offload_activations:
                parts["offloaded activations"] = activations.offloaded_bytes(Step.of(config, shape)) / GIB
        return parts | ({"layers that wait for their turn": waiting_gib} if waiting_gib else {})
    if phases is None:
        train = stage == "train"
        phases = vram.phases(Step.of(config, shape)) if train else vram.inference(config, shape)
    fixed = FP32 | {name for name in vram.weights(config, shape) if "16-bit" not in name}
    held = max(sum(size if name in fixed else 2 * size for name, size in parts.items()) for parts in phases.values())
    return libraries | {"model and activations, in fp32": held / GIB}


def merging(config: RunConfig, shape: ModelShape, on_gpu: bool) -> dict[str, float]:
    """Component -> GiB of a merge: one tensor at a time, and its adapter."""
    widest = max(a * b for a, b in shape.linears.values())
    adapter = {"adapter": 4 * lora_parameters(config, shape) / shape.layers / GIB}
    if on_gpu:  # only the result comes back
        quantizing = {"bitsandbytes": BITSANDBYTES_GIB} if merges_into_nf4(config) else {}
        return quantizing | {"one tensor": 2 * widest / GIB} | adapter
    # the tensor as read, in fp32, its adapter's product in fp32, and the result in fp16; an embedding is only copied
    return {"one tensor": max(12 * widest, 4 * largest_tensor(shape)) / GIB} | adapter


def quantizing(config: RunConfig, shape: ModelShape, on_gpu: bool) -> dict[str, float]:
    """Component -> GiB of GPTQ, which holds a layer at a time and that layer's inputs for the whole calibration set.

    What comes after it in the same process, the check, may take more: `checking`, `building_kernel`.
    """
    rest, layer = 2 * (shape.parameters - shape.linear_parameters), 2 * shape.layer_linear_parameters
    wide = 1 if on_gpu else 2  # a CPU computes in fp32
    parts = {"embedding and head": wide * rest / GIB, "one layer": wide * layer / GIB}
    parts["calibration activations"] = wide * calibration_bytes(config, shape) / GIB
    return parts if on_gpu else parts | {"Hessians": gptq_hessian_bytes(shape) / GIB}


def checking(opened: dict[str, float], on_gpu: bool) -> dict[str, float]:
    """Component -> GiB of the process that quantized while it measures the merged model's perplexity.

    opened: of a process that does nothing else (placement.ram).
    """
    return opened | libraries_of("quantize", on_gpu) | COMMAND


def building_kernel(machine: Machine) -> dict[str, float]:
    """Component -> GiB while the kernel that opens the result is compiled, which a machine does once.

    >>> from helpers import hardware
    >>> round(sum(building_kernel(hardware.machine("t4")).values()), 2)  # 5.09 measured: h200_whole_way.jsonl
    5.26
    """
    jobs = min(machine.host.cpus, KERNEL_SOURCES)
    compiling = {"process that starts compilers": LIBRARIES_GIB["quantize"], COMPILERS: jobs * COMPILER_GIB}
    return libraries_of("quantize", on_gpu=True) | COMMAND | compiling


def libraries_of(stage: str, on_gpu: bool) -> dict[str, float]:
    """Component -> GiB of a stage's process before it does anything."""
    return {"Python and libraries": LIBRARIES_GIB[stage] + (CUDA_HOST_GIB[stage] if on_gpu else 0.0)}


def largest_tensor(shape: ModelShape) -> int:
    """Values of the largest tensor of a model: a matrix of a layer, or the embedding."""
    return max(shape.vocab * shape.hidden, *(a * b for a, b in shape.linears.values()))


def merges_into_nf4(config: RunConfig) -> bool:
    """Whether the base is rounded to NF4 first: asked for, or (auto) because training saw it so."""
    return config.merge.merge_base == "nf4" or (config.merge.merge_base == "auto" and config.model.weights == "nf4")


def calibration_bytes(config: RunConfig, shape: ModelShape) -> float:
    """Bytes of one layer's inputs for the whole calibration set, in fp16."""
    asked = config.quantize
    return 2 * asked.calibration_samples * asked.calibration_tokens * shape.hidden


def gptq_hessian_bytes(shape: ModelShape) -> float:
    """Bytes that GPTQ of the widest layer works in: Hessian, its inverse and its Cholesky factor, all in fp32."""
    widest = max(inputs for inputs, _ in shape.linears.values())
    return 3 * 4 * widest**2


def quantized_bytes(config: RunConfig, shape: ModelShape) -> float:
    """Bytes of the GPTQ model: codes, a scale of 16 bits and a zero of `bits` a group, the rest in 16 bits.

    >>> from helpers.models import shape
    >>> round(quantized_bytes(RunConfig(), shape("mistral-7b-v0.3")) / GIB, 2)
    3.88
    """
    asked, bits = config.quantize, 0.0
    if asked.quant_method == aqlm_sizes.NAME:
        return vram.additive_bytes(aqlm_sizes.layout_for(asked.bits), shape) + 2 * (
            shape.parameters - shape.linear_parameters
        )
    for name, (inputs, outputs) in shape.linears.items():
        groups = 1 if asked.group_size < 0 else -(-inputs // asked.group_size)
        bits += shape.copies(name) * outputs * (inputs * asked.bits + groups * (16 + asked.bits))
    return shape.layers * bits / 8 + 2 * (shape.parameters - shape.linear_parameters)


def check_disk(output: Path, needed_bytes: float, work: str) -> None:
    """Raise ValueError with both numbers where the disk of an output folder has too little left for some work."""
    free = shutil.disk_usage(existing(output)).free
    if needed_bytes > free:
        raise ValueError(
            f"{work} needs {needed_bytes / GIB:.2f} GiB of disk at {output}, {free / GIB:.2f} are free: "
            "free some, or give an output folder on another disk"
        )


def quantizing_disk_bytes(config: RunConfig, shape: ModelShape) -> float:
    """Bytes that GPTQ writes at most: its result, as much again for layers that GPTQModel parks, and small files."""
    return 2 * quantized_bytes(config, shape) + GIB // 16


def checkpoint_bytes(config: RunConfig, shape: ModelShape) -> float:
    """Bytes of a training checkpoint: adapters in fp32 and the optimizer's states."""
    return 4 * lora_parameters(config, shape) + sum(vram.optimizer_states(config, shape))


def disk(config: RunConfig, shape: ModelShape, stage: str) -> dict[str, float]:
    """Component -> GiB on disk at a stage's fullest, the downloaded base among it."""
    local = Path(config.model.model).exists()
    base = base_part(shape)
    parts = {base: 0.0 if local else stored_bytes(shape) / GIB}
    merged = 2 * shape.parameters / GIB
    if stage in ("train", "run"):
        parts["prepared conversations"] = prepared_gib(config)
        # the newest are kept, and one more is being written beside them
        parts["checkpoints"] = (config.train.keep_checkpoints + 1) * checkpoint_bytes(config, shape) / GIB
    if stage in ("merge", "run") and config.merge.free_base and not (stage == "run" and shape.adapter_only):
        parts[base] = min(parts[base], config.merge.shard_gib + 4.6)
    if shape.adapter_only and stage not in ("merge", "quantize"):  # there is nothing to merge into, or to quantize
        return {name: size for name, size in parts.items() if size}
    if stage in ("merge", "quantize", "run"):
        parts["adapter"] = 4 * lora_parameters(config, shape) / GIB
        parts["merged model"] = merged
    if stage in ("quantize", "run"):
        parts["GPTQ model"] = quantized_bytes(config, shape) / GIB
        parts["layers parked by GPTQ"] = parts["GPTQ model"]
    return {name: size for name, size in parts.items() if size}


def base_part(shape: ModelShape) -> str:
    """What the base's files are called among the parts of a disk."""
    if shape.additive is not None:
        return f"base, AQLM {shape.additive.name}"
    return "base, NF4" if shape.packed == "bitsandbytes" else "base, 16 bits"


def stored_bytes(shape: ModelShape) -> float:
    """Bytes of the base's files.

    >>> from helpers.models import shape
    >>> round(stored_bytes(shape("mixtral-8x7b-aqlm")) / 1e9, 2)
    13.09
    """
    as_loaded = shape.additive is not None or shape.packed == "bitsandbytes"
    return sum(vram.weights(RunConfig(), shape).values()) if as_loaded else 2 * shape.parameters


def prepared_gib(config: RunConfig) -> float:
    """The prepared conversations: text, and 9 bytes a token (a number of 8 bytes, a mask of one)."""
    return conversations(config) * min(config.data.seq_len, 600) * (9 + 5) / GIB


@lru_cache
def lines_and_mean_tokens(path: str) -> tuple[int, float]:
    """Lines of a local file, and the tokens of one on average: a fourth of its characters, and one a turn.

    Looks at the first 200 lines; in JSON, at what is said, not at names and identifiers.
    """
    lines = Path(path).read_text(encoding="utf-8", errors="replace").splitlines() or [""]
    sample = lines[:200]
    return len(lines), max(sum(map(tokens_of_line, sample)) / len(sample), 1.0)


def tokens_of_line(line: str) -> float:
    """Tokens of one conversation in JSON, or of a line of text, roughly.

    >>> tokens_of_line('{"id": "c0ffee", "messages": [{"role": "user", "content": "Hello, who are you?"}]}')
    5.75
    """
    try:
        row = json.loads(line)
    except json.JSONDecodeError:
        return len(line) / 4
    turns = row.get("messages") or row.get("conversations") if isinstance(row, dict) else None
    said = [turn.get("content") or turn.get("value") for turn in turns] if turns else list(strings(row))
    return sum(len(str(text)) / 4 + 1 for text in said)


def strings(value: object) -> Iterator[str]:
    """Every text inside a JSON value."""
    if isinstance(value, str):
        yield value
    elif isinstance(value, dict | list):
        for inner in value.values() if isinstance(value, dict) else value:
            yield from strings(inner)


def conversations(config: RunConfig) -> int:
    """How many conversations the run's data has: counted in a local file, known for a few hub sets, else 10,000."""
    data = config.data
    known = KNOWN_CONVERSATIONS.get(data.source, 10_000)
    if Path(data.source).is_file():
        known = lines_and_mean_tokens(data.source)[0]
    return min(known, data.cap() or known)


def heldout_rows(config: RunConfig) -> int:
    """How many held-out conversations are evaluated: those of a file, or the share that prepare splits off."""
    named = config.data.heldout_source
    rows = conversations(config) * config.data.heldout_fraction
    if named and Path(named).is_file():
        rows = lines_and_mean_tokens(named)[0]
    return max(1, min(round(rows), config.evaluate.max_heldout or round(rows)))


def questions(config: RunConfig) -> int:
    """How many answers each model writes: to the lines of a questions file, else to held-out conversations."""
    asked = config.evaluate
    if asked.questions:
        found = lines_and_mean_tokens(asked.questions)[0] if Path(asked.questions).is_file() else 200
    else:
        found = min(UNASKED_PROMPTS, heldout_rows(config))
    return min(found, asked.max_questions or found)


class Counts(NamedTuple):
    """What an evaluation reads and asks."""

    texts: int
    questions: int
    pairs: int = 0
    """Of a better and a worse answer: both are read, and as many as questions may be asked are answered."""


def counts(config: RunConfig) -> Counts:
    """What the configuration's data has to evaluate; pairs of a folder named for them: as many as are taken."""
    own = heldout_rows(config) if config.train.sides == 2 else 0
    pairs = config.evaluate.max_heldout or own if config.evaluate.preferences else own
    return Counts(heldout_rows(config), questions(config), pairs)


def mean_tokens(config: RunConfig) -> float:
    """Tokens of a conversation on average: from a local file, else a full context (the safe side).

    Of a pair, each side: the prompt and one of two answers, as long as each other on average.
    """
    if Path(config.data.source).is_file():
        share = 2 / 3 if config.train.sides == 2 else 1.0
        return min(share * lines_and_mean_tokens(config.data.source)[1], config.data.seq_len)
    return config.data.seq_len
