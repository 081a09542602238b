"""Seconds of a training step and hours of every stage, from FLOPs and bytes moved; no torch.

A step is a roofline (https://doi.org/10.1145/1498765.1498785) summed over its kinds of work: matrix products at a share
of the card's matrix rate, attention at another, weights dequantized and activations passed through the card's memory;
and where a card is so fast that it waits for Python, Python's time.
"""

import math
from dataclasses import dataclass

from helpers import activations, host, vram
from helpers.config import RunConfig
from helpers.hardware import Machine
from helpers.models import ModelShape

CPU_GFLOPS_PER_CORE = 45.0
"""fp32 products of a training step on one core of a server (the tiny profile's step of 0.17 s on two idle ones)."""
CPU_S_PER_LAYER = 0.004
"""Overheads of one layer, forward and backward, on a CPU."""
PYTHON_S_PER_LAYER = 0.0085
"""Python's and the driver's time for one decoder layer, forward and backward, with adapters on all linear layers."""
PYTHON_S_PER_RECOMPUTED_LAYER = 0.008


WIDE = 14336
"""From this MLP size on, products reach a card's full share."""


@dataclass(frozen=True)
class Work:
    """What one micro-batch has a card do."""

    matrix_flops: float
    attention_flops: float
    bytes_moved: float
    python_s: float


def work(config: RunConfig, shape: ModelShape, seq_len: int | None = None) -> Work:
    """FLOPs and bytes of one micro-batch, forward, recomputation and backward.

    The base is frozen, so its backward pass is one product (for the inputs), not two; causal attention does half of
    seq² products, and its backward 2.5 times its forward's (FlashAttention, https://arxiv.org/abs/2205.14135).
    """
    seq_len = seq_len or config.data.seq_len
    tokens = config.train.batch_size * seq_len
    again = scores_again = activations.checked_layers(shape, config) / shape.layers
    own = activations.way(shape, config) == "own"
    if own:  # helpers/layers.py repeats neither down_proj nor, where its result is kept, attention
        down = shape.intermediate * shape.hidden * shape.experts_per_token
        scores_again = 0.0 if config.train.keep_attention else again
        again *= 1 - down / shape.active_linear_parameters
    linear = 2 * shape.layers * shape.active_linear_parameters
    adapters = 2 * vram.lora_parameters(shape, config)
    head = 2 * shape.vocab * shape.hidden
    matrix = tokens * (linear * (2 + again) + adapters * (3 + again) + head * 2)
    scores = 4 * shape.layers * shape.heads * shape.head_dim * seq_len / 2
    attention = tokens * scores * (1 + scores_again + 2.5)
    # NF4: read half a byte, write two, read two again, a weight and a pass
    dequantized = shape.linear_parameters * (4.5 if config.model.weights == "nf4" else 2) * (2 + again)
    passes = tokens * shape.layers * sum(activations.kept_by_layer(shape, config).values()) * 2 * (2 + again)
    if config.model.attention != "efficient":
        passes += activations.score_bytes(shape, config) * shape.layers * 2 * (2 + again)
    python = shape.layers * (PYTHON_S_PER_LAYER + PYTHON_S_PER_RECOMPUTED_LAYER * again) * (0.6 if own else 1.0)
    return Work(matrix, attention, dequantized + passes, python)


def micro_batch_s(config: RunConfig, shape: ModelShape, machine: Machine, seq_len: int | None = None) -> float:
    """Seconds of one micro-batch.

    Fitted: T4's shares to published steps of Qwen2.5-7B (3.72 and 3.91 s at 1×1024), narrow products' loss to those of
    1B and 3B models; H200's shares to rows of 8,192 tokens and more. Attention runs at a quarter of the products' rate.
    """
    asked = work(config, shape, seq_len)
    if machine.gpu is None:
        rate = 1e9 * CPU_GFLOPS_PER_CORE * machine.host.cpus
        return (asked.matrix_flops + asked.attention_flops) / rate + shape.layers * CPU_S_PER_LAYER
    gpu = machine.gpu
    rate = 1e12 * gpu.fp16_tflops * gpu.efficiency * min(1.0, (shape.intermediate / WIDE) ** 0.5)
    busy = (asked.matrix_flops + 4 * asked.attention_flops) / rate
    busy += asked.bytes_moved / (1e9 * gpu.bandwidth_share * gpu.bandwidth_gb_s)
    return max(busy, asked.python_s)


def step_s(config: RunConfig, shape: ModelShape, machine: Machine, seq_len: int | None = None) -> float:
    """Seconds of one optimizer step, the update included; seq_len: tokens of its rows, full contexts when None."""
    update = 0.0
    if machine.gpu:
        update = 20 * vram.lora_parameters(shape, config) / (0.5e9 * machine.gpu.bandwidth_gb_s)
    return config.train.accumulation * micro_batch_s(config, shape, machine, seq_len) + update


def steps(config: RunConfig, tokens_in_dataset: int | None = None) -> tuple[int, int]:
    """(optimizer steps of the run, tokens of its rows on average)."""
    rows, mean = host.conversations(config), host.mean_tokens(config)
    if tokens_in_dataset is not None:
        mean = min(max(tokens_in_dataset / rows, 1.0), config.data.seq_len)
    rows_a_step = config.train.batch_size * config.train.accumulation
    if config.train.packing:
        rows, mean = math.ceil(rows * mean / config.data.seq_len), config.data.seq_len
    whole = math.ceil(rows * config.train.epochs / rows_a_step)
    return min(config.train.max_steps or whole, whole) or 1, max(round(mean), 16)


def stage_hours(
    config: RunConfig, shape: ModelShape, machine: Machine, stage: str, tokens_in_dataset: int | None = None
) -> dict[str, float]:
    """Part -> hours of one stage."""
    base_gib = host.disk(config, shape, "inference").get("base, 16 bits", 0.0)
    parts = {"download": base_gib * host.GIB / 1e6 / machine.host.download_mb_s / 3600}
    gigabytes = 2 * shape.parameters / 1e9
    if stage == "train":
        count, mean = steps(config, tokens_in_dataset)
        each = step_s(config, shape, machine, mean)
        parts |= {"loading": gigabytes * 6 / 3600, "training": count * each / 3600}
    elif stage == "merge":
        parts |= {"merging": gigabytes * 8 / 3600}
    elif stage == "quantize":
        parts |= {"GPTQ": gptq_s(config, shape, machine) / 3600}
    else:
        parts |= {"loading": gigabytes * 6 / 3600, "evaluation": evaluation_s(config, shape, machine) / 3600}
    return {name: hours for name, hours in parts.items() if hours}


def gptq_s(config: RunConfig, shape: ModelShape, machine: Machine) -> float:
    """Seconds of GPTQ: two passes of the calibration set, Hessians, a column-by-column sweep a module, and packing."""
    tokens = config.quantize.calibration_samples * config.quantize.calibration_tokens
    products = 2 * tokens * shape.linear_parameters * 2
    hessians = 2 * tokens * shape.layers * sum(a * a * shape.copies(n) for n, (a, _) in shape.linears.items())
    solving = shape.layers * sum((4 * a**3 + 2 * a * a * b) * shape.copies(n) for n, (a, b) in shape.linears.items())
    columns = shape.layers * sum(a * shape.copies(n) for n, (a, _) in shape.linears.items())
    rate = 1e12 * machine.gpu.fp16_tflops * machine.gpu.efficiency if machine.gpu else 3e10 * machine.host.cpus
    slow = rate / 8 if machine.gpu else rate  # fp32
    fixed = 25.0 + shape.parameters / 1e9 * 20
    return fixed + products / rate + (hessians + solving) / slow + columns * 1.0e-4


def evaluation_s(config: RunConfig, shape: ModelShape, machine: Machine) -> float:
    """Seconds to read the held-out conversations and to write the answers, for one model."""
    asked = config.evaluate
    rows = min(host.conversations(config) * config.data.heldout_fraction or 80, asked.max_heldout or 1e9)
    reading = 2 * rows * asked.eval_context * shape.parameters
    answers = asked.max_questions or 200
    batches = math.ceil(answers / asked.eval_batch_size)
    if machine.gpu is None:
        rate = 1e9 * CPU_GFLOPS_PER_CORE * machine.host.cpus
        return (reading + 2 * answers * asked.max_new_tokens * shape.parameters) / rate + batches
    token_s = max(2.5 * shape.parameters / (0.8e9 * machine.gpu.bandwidth_gb_s), shape.layers * 0.0012)
    rate = 1e12 * machine.gpu.fp16_tflops * machine.gpu.efficiency
    return reading / rate + batches * asked.max_new_tokens * token_s
