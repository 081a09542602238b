"""Seconds of a training step and hours of every stage, from FLOPs and bytes moved; no torch.

A step is a roofline (https://doi.org/10.1145/1498765.1498785) summed over its kinds of work: matrix products at a share
of the GPU's matrix rate, attention at another, weights dequantized and activations passed through the GPU's memory;
and where a GPU is so fast that it waits for Python, Python's time.
"""

import math
from collections.abc import Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING

from helpers.budget import activations, host, sharding
from helpers.budget.step import Step, lora_parameters, trained_parameters
from helpers.config import RunConfig
from helpers.hardware import GPU, Machine
from helpers.models import ModelShape
from helpers.models.methods import METHODS

if TYPE_CHECKING:
    from helpers.budget.placement import Placement

CPU_GFLOPS_PER_CORE = 45.0
"""fp32 products of a training step on one core of a server (the tiny profile's step of 0.17 s on two idle ones)."""
CPU_GB_S_PER_CORE = 6.0
"""Bytes that PyTorch's elementwise operators move on one core of a server: GGUF's blocks of the tiny model took 8 to 10
ns of processor time a weight and pass."""
CPU_S_PER_LAYER = 0.004
"""Overheads of one layer, forward and backward, on a CPU."""
PYTHON_S_PER_LAYER = 0.0085
"""Python's and the driver's time for one decoder layer, forward and backward, with adapters on all linear layers."""
PYTHON_S_PER_RECOMPUTED_LAYER = 0.008
WIDE = 14336
"""From this MLP size on, products reach a GPU's full share."""
LOOKING = "held-out loss"
"""The part of a training's hours that nothing is learned in."""
MERGE_S = 3.0
"""Before the first tensor: PyTorch and bitsandbytes are imported, 4.7 s of processor time on a loaded server."""
READ_S_PER_GB = 6.0
"""Reading a model's files, the safe side of what rented disks do."""
DEQUANTIZED = 4.5
"""Bytes moved for a 4-bit weight that is written out in 16 bits and read again: half a byte, two and two."""
GGUF_DEQUANTIZED = 50.0
"""The same for a GGUF file's, in a dozen of PyTorch's own operators on 32-bit numbers: counted, not measured."""
ADDITIVE_REBUILT = 6.25
"""The same for AQLM's: two bits of codes, two bytes out of a codebook, two written and two read: counted."""
DECODED = {
    "fp16": (2.0, 2.0), "int8": (1.0, 1.0), "nf4": (0.53, DEQUANTIZED), "gptq": (0.53, 0.53),
    "gguf": (GGUF_DEQUANTIZED, GGUF_DEQUANTIZED), "aqlm": (ADDITIVE_REBUILT, ADDITIVE_REBUILT),
}  # fmt: skip
"""Bytes moved for a weight and a new token: with one row, and with more. bitsandbytes has a fused product for one row
only; GPTQ's here is ExLlamaV2's, fused up to 50 rows (MAX_Q_GEMM_ROWS in its sources), while Triton's and PyTorch's
dequantize for every token."""
BUS_GB_S = {7: 10.0, 8: 20.0, 9: 40.0}
"""Copies from page-locked memory to a GPU, by its generation: 40 on an H200 (h200_evaluate_new.json), and as large a
share, 0.63, of PCIe 3 and 4 with 16 lanes."""
SPEED_TOKENS = (148, 100)
"""Tokens that evaluate/cost.py decodes one by one, and several at once: three runs of 32, four to warm up, profiles."""
PYTHON_S_PER_DECODED_LAYER = {
    "fp16": (0.0008, 0.0008), "int8": (0.0017, 0.0021), "nf4": (0.0017, 0.0021), "gptq": (0.0009, 0.0009),
    "gguf": (0.0035, 0.0035), "aqlm": (0.0017, 0.0021),
}  # fmt: skip
"""Python's time for a layer and a new token, with one row and with more; NF4 with PEFT's adapter (an H200's host:
h200_decode.csv, h200_evaluate_new.json)."""


@dataclass(frozen=True)
class Work:
    """What one micro-batch has a GPU do."""

    matrix_flops: float
    attention_flops: float
    bytes_moved: float
    python_s: float


def duration(hours: float) -> str:
    """Hours as people say them.

    >>> duration(0.01), duration(0.5), duration(7.42), duration(346.6)
    ('1 min', '30 min', '7.4 h', '347 h')
    """
    if hours < 1:
        return f"{max(60 * hours, 1):.0f} min"
    return f"{hours:.1f} h" if hours < 100 else f"{hours:,.0f} h"


def work(step: Step, seq_len: int | None = None) -> Work:
    """FLOPs and bytes of one micro-batch, forward, recomputation and backward; seq_len: of its rows, default full.

    A frozen base's backward pass is one product (for the inputs), not two; causal attention does half of
    seq² products, and its backward 2.5 times its forward's (FlashAttention, https://arxiv.org/abs/2205.14135).
    """
    config, shape = step.config, step.shape
    seq_len = seq_len or config.data.seq_len
    tokens = config.train.batch_size * config.train.sides * seq_len
    # the share of all layers' forward work that is done twice
    again = scores_again = step.checkpointed / shape.layers
    own = step.backend == "own"
    if own:  # finetune/engine/layers.py repeats neither down_proj nor, where its result is saved, attention
        down = shape.intermediate * shape.hidden * shape.experts_per_token
        scores_again = 0.0 if config.train.keep_attention else again
        again *= 1 - down / shape.active_linear_parameters
    # two FLOPs a weight and token for each product
    linear = 2 * shape.layers * shape.active_linear_parameters
    adapters = 2 * lora_parameters(config, shape)
    head = 2 * shape.vocab * shape.hidden
    trained = 1 if config.train.trains == "all" else 0  # a third product, for the weights' own gradients
    matrix = tokens * (linear * (2 + again + trained) + adapters * (3 + again) + head * (2 + trained))
    scores = 4 * shape.layers * shape.heads * shape.head_dim * seq_len / 2
    attention = tokens * scores * (1 + scores_again + 2.5)
    # NF4: read half a byte, write two, read two again, a weight and a pass
    moved = {"nf4": DEQUANTIZED, "aqlm": ADDITIVE_REBUILT}.get(config.model.weights, 2.0)
    dequantized = shape.linear_parameters * moved * (2 + again)
    # elementwise work reads and writes about what a layer saves
    passes = tokens * shape.layers * sum(activations.saved_by_layer(step).values()) * 2 * (2 + again)
    if config.model.attention != "efficient":
        passes += activations.score_bytes(step) * shape.layers * 2 * (2 + again)
    # Python's time is that of a layer of seven matrices; a mixture's has three an expert
    matrices = (4 + 3 * shape.experts) / 7
    python = shape.layers * (PYTHON_S_PER_LAYER + PYTHON_S_PER_RECOMPUTED_LAYER * again) * matrices
    python *= 0.6 if own else 1.0
    return Work(matrix, attention, dequantized + passes, python)


def micro_batch_s(step: Step, machine: Machine, seq_len: int | None = None) -> float:
    """Seconds of one micro-batch.

    Calibrated: T4's shares on published steps of Qwen2.5-7B (3.72 and 3.91 s at 1×1024), narrow products' loss on
    those of 1B and 3B models; H200's shares on rows of 8,192 tokens and more. Attention runs at a quarter of the
    products' rate. Of several GPUs, what each does: behind the weights that it gathers, or they behind that.
    """
    asked, shape = work(step, seq_len), step.shape
    if machine.gpu is None:
        rate = 1e9 * CPU_GFLOPS_PER_CORE * machine.host.cpus
        return (asked.matrix_flops + asked.attention_flops) / rate + shape.layers * CPU_S_PER_LAYER
    gpu = machine.gpu
    rate = 1e12 * gpu.fp16_tflops * gpu.efficiency * min(1.0, (shape.intermediate / WIDE) ** 0.5)
    busy = (asked.matrix_flops + 4 * asked.attention_flops) / rate
    busy += asked.bytes_moved / (1e9 * gpu.bandwidth_share * gpu.bandwidth_gb_s)
    waits = sharding.waits(step, machine, sharding.world(step.config, machine))
    first = waits.gathering_s / (2 * shape.layers)  # nothing computes yet while the first layer's weights come
    return max(busy, waits.gathering_s, asked.python_s + waits.python_s) + first


def step_s(step: Step, machine: Machine, seq_len: int | None = None) -> float:
    """Seconds of one optimizer step, the update included; seq_len: tokens of its rows, full contexts when None."""
    update, gpus = 0.0, sharding.world(step.config, machine)
    if machine.gpu:
        update = 20 * trained_parameters(step.config, step.shape) / (0.5e9 * machine.gpu.bandwidth_gb_s)
        update /= gpus if step.config.train.sharding != "none" else 1
    averaging = sharding.waits(step, machine, gpus).averaging_s
    return sharding.micro_batches(step.config, gpus) * micro_batch_s(step, machine, seq_len) + update + averaging


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
    config: RunConfig,
    shape: ModelShape,
    machine: Machine,
    stage: str,
    tokens_in_dataset: int | None = None,
    places: Iterable["Placement"] = (),
) -> dict[str, float]:
    """Part -> hours of one stage; places: of the models that an evaluation opens, on each GPU one."""
    base_gib = host.disk(config, shape, "inference").get(host.base_part(shape), 0.0)
    parts = {"download": base_gib * host.GIB / 1e6 / machine.host.download_mb_s / 3600}
    gigabytes = host.stored_bytes(shape) / 1e9
    if stage == "train":
        count, mean = steps(config, tokens_in_dataset)
        each = step_s(Step.of(config, shape), machine, mean)
        parts |= {"loading": gigabytes * READ_S_PER_GB / 3600, "training": count * each / 3600}
        looking = looks(config, count) * look_s(config, shape, machine, mean)
        parts |= {LOOKING: looking / 3600, "reference": reference_s(config, shape, machine, count, mean) / 3600}
    elif stage == "merge":
        parts |= {"merging": (MERGE_S + gigabytes * 8) / 3600}
    elif stage == "quantize":
        parts |= {"GPTQ": gptq_s(config, shape, machine) / 3600}
    else:
        found = list(places)
        stored = dict.fromkeys(METHODS, host.quantized_bytes(config, shape) / 1e9) | {"aqlm": gigabytes}
        read = sum(one.stored_bytes / 1e9 or stored.get(one.kind, gigabytes) for one in found)
        each_s = [sum(evaluation_s(config, shape, machine, one).values()) for one in found]
        seconds = side_by_side(each_s, sharding.on_this_host(config, machine))
        parts |= {"loading": read * READ_S_PER_GB / 3600, "evaluation": seconds / 3600}
    return {name: hours for name, hours in parts.items() if hours}


def side_by_side(each_s: list[float], gpus: int) -> float:
    """Seconds until all are done, in their order and each on the first GPU that is free.

    >>> side_by_side([3.0, 2.0, 2.0], 1), side_by_side([3.0, 2.0, 2.0], 2)
    (7.0, 4.0)
    """
    busy_s = [0.0] * gpus
    for one_s in each_s:
        busy_s[busy_s.index(min(busy_s))] += one_s
    return max(busy_s)


def looks(config: RunConfig, count: int) -> int:
    """How often the loss on held-out conversations is measured: on the way, if asked for, and at the end.

    >>> looks(RunConfig().with_values(eval_steps=20), 100), looks(RunConfig(), 100)
    (6, 1)
    """
    if not (config.data.heldout_fraction or config.data.heldout_source):
        return 0
    return 1 + (count // config.train.eval_steps if config.train.eval_steps else 0)


def look_s(config: RunConfig, shape: ModelShape, machine: Machine, mean: float) -> float:
    """Seconds of one look at what is held out."""
    rows = host.heldout_rows(config.with_values(max_heldout=None))  # training leaves none out
    return forward_s(config, shape, machine, rows, mean)


def reference_s(config: RunConfig, shape: ModelShape, machine: Machine, count: int, mean: float) -> float:
    """Seconds of DPO's reference: what is trained in so many steps, and what is held out, read once."""
    if config.train.method != "dpo":
        return 0.0
    met = min(count * config.train.batch_size * config.train.accumulation, host.conversations(config))
    return forward_s(config, shape, machine, met, mean) + look_s(config, shape, machine, mean) * (looks(config, 0) > 0)


def forward_s(config: RunConfig, shape: ModelShape, machine: Machine, rows: int, mean: float) -> float:
    """Seconds of a forward pass over rows, or pairs, of so many tokens a side on average, in training's batches."""
    batches = math.ceil(rows / config.train.batch_size)
    flops = 2 * rows * config.train.sides * mean * shape.parameters
    if machine.gpu is None:
        return flops / (1e9 * CPU_GFLOPS_PER_CORE * machine.host.cpus) + batches * shape.layers * CPU_S_PER_LAYER / 3
    gpu = machine.gpu
    dequantizing = (DEQUANTIZED if config.model.weights == "nf4" else 2.0) * shape.linear_parameters
    busy = flops / (1e12 * gpu.fp16_tflops * gpu.efficiency)
    busy += batches * dequantizing / (1e9 * gpu.bandwidth_share * gpu.bandwidth_gb_s)
    return max(busy, batches * shape.layers * PYTHON_S_PER_LAYER / 3)  # a third of a step's launches


def gptq_s(config: RunConfig, shape: ModelShape, machine: Machine) -> float:
    """Seconds of GPTQ: two passes of the calibration set, Hessians, a column-by-column sweep a module, and packing."""
    tokens = config.quantize.calibration_samples * config.quantize.calibration_tokens
    # each layer reads the calibration set twice: to collect its Hessians, and quantized, for what the next one reads
    products = 2 * tokens * shape.linear_parameters * 2
    # XᵀX of each module's inputs; a Cholesky factor of its inverse; and the error of each column onto those after it
    hessians = 2 * tokens * shape.layers * sum(a * a * shape.copies(n) for n, (a, _) in shape.linears.items())
    solving = shape.layers * sum((4 * a**3 + 2 * a * a * b) * shape.copies(n) for n, (a, b) in shape.linears.items())
    # a column waits for the one before it: on a GPU that is kernel launches, not arithmetic
    columns = shape.layers * sum(a * shape.copies(n) for n, (a, _) in shape.linears.items())
    rate = 1e12 * machine.gpu.fp16_tflops * machine.gpu.efficiency if machine.gpu else 3e10 * machine.host.cpus
    slow = rate / 8 if machine.gpu else rate  # fp32
    fixed = 25.0 + shape.parameters / 1e9 * 20
    return fixed + products / rate + (hessians + solving) / slow + columns * 1.0e-4


def evaluation_s(
    config: RunConfig,
    shape: ModelShape,
    machine: Machine,
    found: "Placement",
    counts: tuple[int, ...] | None = None,
) -> dict[str, float]:
    """Seconds of one model by part: reading the held-out texts, answers to the questions, measuring its speed.

    Of pairs of a better and a worse answer both are read, and the first are answered, as many as questions at most.

    Layers that are not on the GPU are copied to it once a batch while texts are read, and once a token of a batch
    while answers are written. counts: host.Counts, default what the configuration's data has.
    """
    asked = config.evaluate
    rows, questions, pairs = host.Counts(*(counts or host.counts(config)))
    each = [questions, min(pairs, asked.max_questions or pairs)] if found.answers else [0]
    answers, batches = sum(each), sum(math.ceil(one / found.batch_size) for one in each)
    rows += 2 * pairs if found.answers else 0
    tokens = rows * read_tokens(host.mean_tokens(config), asked.eval_context, asked.eval_stride)
    reading = 2 * tokens * shape.parameters
    if machine.gpu is None:
        rate = 1e9 * CPU_GFLOPS_PER_CORE * machine.host.cpus
        writing = 2 * answers * asked.max_new_tokens * shape.parameters / rate
        speed = 2 * (SPEED_TOKENS[0] + 8 * SPEED_TOKENS[1]) * shape.parameters / rate
        speed += sum(SPEED_TOKENS) * shape.layers * CPU_S_PER_LAYER / 2
        # a GGUF file's blocks are dequantized for every pass, however many rows it has
        blocks = GGUF_DEQUANTIZED * shape.linear_parameters if found.precision == "gguf" else 0.0
        each = blocks / (1e9 * CPU_GB_S_PER_CORE * machine.host.cpus)
        return {
            "reading": reading / rate + math.ceil(rows / found.batch_size) * each,
            "answers": writing + batches + batches * asked.max_new_tokens * each,
            "speed": speed + sum(SPEED_TOKENS) * each if answers else 0.0,
        }
    gpu = machine.gpu
    # a batch pays once for what does not grow with its rows: dequantized weights, and layers copied from the host
    several = {"nf4": DEQUANTIZED, "gptq": DEQUANTIZED, "gguf": GGUF_DEQUANTIZED, "aqlm": ADDITIVE_REBUILT}
    moved = several.get(found.precision, 0.0)
    dequantizing = moved * shape.linear_parameters
    away = away_s(shape, machine, found)
    a_batch = dequantizing / (1e9 * gpu.bandwidth_share * gpu.bandwidth_gb_s) + away
    one, many = (token_s(shape, gpu, found.precision, rows, away) for rows in (1, found.batch_size))
    return {
        "reading": reading / (1e12 * gpu.fp16_tflops * gpu.efficiency) + math.ceil(rows / found.batch_size) * a_batch,
        "answers": batches * asked.max_new_tokens * many,
        "speed": SPEED_TOKENS[0] * one + SPEED_TOKENS[1] * many if answers else 0.0,
    }


def read_tokens(tokens: float, context: int, stride: int) -> float:
    """Tokens that a model reads of a text in strided windows, those that it reads again included.

    >>> read_tokens(1000, context=1024, stride=512), read_tokens(2048, context=1024, stride=512)
    (1000, 3072)
    """
    return tokens if tokens <= context else context * (1 + math.ceil((tokens - context) / stride))


def token_s(shape: ModelShape, gpu: GPU, precision: str, rows: int, away: float = 0.0) -> float:
    """Seconds of one new token of each of `rows` answers: the weights pass through memory once, or Python is slower.

    away: seconds of copying the layers that are not on the GPU, which the GPU waits for, but Python does not.
    """
    head = 2 * shape.vocab * shape.hidden
    moved = DECODED[precision][rows > 1] * shape.layers * shape.active_linear_parameters + head
    busy = moved / (0.8e9 * gpu.bandwidth_gb_s) + away
    return max(busy, shape.layers * PYTHON_S_PER_DECODED_LAYER[precision][rows > 1])


def away_s(shape: ModelShape, machine: Machine, found: "Placement") -> float:
    """Seconds of copying the layers that are not on the GPU to it, once."""
    gigabytes = 2 * found.away * shape.layer_linear_parameters / 1e9
    if found.away_in == "disk":
        return gigabytes * READ_S_PER_GB
    return gigabytes / BUS_GB_S[min(max(machine.gpu.capability[0], 7), 9)]
