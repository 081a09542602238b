"""Where the weights of an evaluated model lie, and in what batches it reads: decided before it is opened. No torch.

A merged model in 16 bits does not fit a T4 beside a batch's keys and values, and must not be rounded to 4 bits again:
that throws part of what it learned away, and the table would compare the rounding. So as many decoder layers as fit
stay on the GPU, and the others wait in host memory, or on disk where there is no room for them, and are copied to one
place on the GPU whenever their turn comes:

>>> from helpers import hardware
>>> from helpers.models import profile, shape
>>> seven, config = shape("mistral-7b-v0.3"), profile("mistral-7b")
>>> in_words(place("model", config, seven, hardware.machine("t4")), seven)
'7 of 32 layers from host memory'
>>> in_words(place("model", config, seven, hardware.machine("l4")), seven)
''

The base is opened like the merged model, in 16 bits and as it came, although training saw it in NF4: its row is then
what one would use without any training, on every machine. What the adapter's row stands on is the base in NF4.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace

from helpers.budget import host, planning, vram
from helpers.budget import hours as pace
from helpers.budget.step import lora_parameters
from helpers.config import RunConfig
from helpers.hardware import Machine
from helpers.models import ModelShape, gguf_sizes
from helpers.models.methods import METHODS

GIB = 2**30
EVALUATED = {"base": "model", "finetuned": "adapter", "merged": "model", "gptq": "gptq"}
"""A run's models, and what kind of folder each is."""
HOST_SHARE = 0.5
"""Share of the free RAM that waiting layers may take: the rest is for libraries, and for files that are being read."""
LONGEST_S = 3600.0
"""A model whose layers wait elsewhere is given so long; beyond that all models answer fewer questions."""
FEWEST_QUESTIONS = 16
"""With fewer answers an interval is too wide to tell anything."""


@dataclass(frozen=True)
class Placement:
    """How one model is opened: the last `away` of its decoder layers are not on the GPU."""

    kind: str
    """model (16 bits), adapter, gguf, or a method of quantization (models/methods.py)."""
    precision: str
    """fp16 (any 16 bits), nf4, int8, aqlm, gptq or gguf."""
    batch_size: int
    away: int = 0
    away_in: str = ""
    """host memory or disk."""
    answers: bool = True
    """False: only perplexity is measured, because answers would take too long."""
    problem: str = ""
    """Why it is not evaluated at all; a sentence."""
    stored_bytes: int = 0
    """Of a GGUF file: bytes of its tensors."""


@dataclass(frozen=True)
class Evaluation:
    """What is read, by which models, opened how."""

    config: RunConfig
    """Fewer questions than asked where time demands it: the same for all models."""
    places: dict[str, Placement]
    notes: tuple[str, ...]
    """What is not as one would expect, in sentences."""


def plan(
    config: RunConfig,
    models: Mapping[str, tuple[str, ModelShape] | tuple[str, ModelShape, int]],
    machine: Machine,
    counts: tuple[int, ...] | None = None,
) -> Evaluation:
    """Place models, given as name -> (kind, shape), on a machine, and say what was cut and what is left out.

    Of a GGUF file a third value, the bytes of its tensors. counts: host.Counts, default what the configuration's data
    has. A model with layers away gets LONGEST_S, and most of that goes into answers: where it does
    not do, all models answer fewer questions, but not fewer than FEWEST_QUESTIONS. A model that would need that is not
    asked for answers, or not evaluated at all.
    """
    counts = host.Counts(*(counts or host.counts(config)))
    questions = counts.questions
    places = {name: place(one[0], config, one[1], machine, *one[2:]) for name, one in models.items()}
    seconds = {
        name: pace.evaluation_s(config, models[name][1], machine, found, counts)
        for name, found in places.items()
        if found.away
    }
    shares = {name: share_answered(parts) for name, parts in seconds.items()}
    least = min(FEWEST_QUESTIONS, questions) / questions if questions else 0.0
    slowest = min((name for name in shares if shares[name] >= least), key=shares.get, default=None)
    for name in (name for name, share in shares.items() if share < least):
        places[name] = without_answers(places[name], models[name][1], seconds[name])
    notes = [note for name, found in places.items() if (note := about(name, found, models[name][1]))]
    fewer = int(questions * shares[slowest]) if slowest else questions
    if fewer == questions:
        return Evaluation(config, places, tuple(notes))
    notes.append(
        f"all models answer {fewer} of {questions} questions: with all of them {slowest} would take "
        f"{hours(seconds[slowest])} on this GPU"
    )
    return Evaluation(config.with_values(max_questions=fewer), places, tuple(notes))


def place(kind: str, config: RunConfig, shape: ModelShape, machine: Machine, stored_bytes: int = 0) -> Placement:
    """How a model is opened: whole on the GPU in the batches that were asked for, if that fits.

    Otherwise a 16-bit model leaves layers away, and reads in smaller batches where that is faster (more layers then
    stay); an adapter's base and a GPTQ model are only read in smaller batches. `problem` says when nothing fits.
    """
    trained = config.model.weights if shape.additive is None else "aqlm"
    stored = {"adapter": trained, "gguf": "gguf"}.get(kind, "fp16")
    precision = METHODS[kind].computes_as if kind in METHODS else stored
    stored_bytes = stored_bytes or gguf_sizes.default_bytes(shape) if kind == "gguf" else 0
    whole = Placement(kind, precision, config.evaluate.eval_batch_size, stored_bytes=stored_bytes)
    if machine.gpu is None or fits(whole, config, shape, machine):
        return whole
    each = (fewest_away(whole, batch, config, shape, machine) for batch in halved(whole.batch_size))
    fitting = [found for found in each if found is not None]
    if fitting:
        return min(fitting, key=lambda found: sum(pace.evaluation_s(config, shape, machine, found).values()))
    leanest = replace(whole, batch_size=1, away=shape.layers if kind == "model" else 0)
    reason = (
        f"it needs at least {needed_gib(leanest, config, shape, machine):.1f} GiB of VRAM and "
        f"{room_gib(machine):.1f} may be used: take a GPU with more, or a smaller eval_context"
    )
    return replace(leanest, away=0, answers=False, problem=reason)


def halved(batch_size: int) -> Iterator[int]:
    """The batch, and its halves down to one row.

    >>> list(halved(12))
    [12, 6, 3, 1]
    """
    while batch_size:
        yield batch_size
        batch_size //= 2


def fewest_away(
    whole: Placement, batch_size: int, config: RunConfig, shape: ModelShape, machine: Machine
) -> Placement | None:
    """With as few layers away as fit the GPU; None when it does not fit with all of them away."""
    for away in range(shape.layers + 1 if whole.kind == "model" else 1):
        found = replace(whole, batch_size=batch_size, away=away)
        if fits(found, config, shape, machine):
            in_ram = away_gib(found, shape) <= HOST_SHARE * machine.host.ram_gib
            return replace(found, away_in=("host memory" if in_ram else "disk") if away else "")
    return None


def fits(found: Placement, config: RunConfig, shape: ModelShape, machine: Machine) -> bool:
    """Whether the predicted need leaves what a prediction can be under."""
    return needed_gib(found, config, shape, machine) <= room_gib(machine)


def room_gib(machine: Machine) -> float:
    """GiB of PyTorch's allocator that an evaluation may be predicted to take."""
    return planning.usable_gib(machine) - machine.gpu.context_gib


def needed_gib(found: Placement, config: RunConfig, shape: ModelShape, machine: Machine) -> float:
    """GiB that the allocator reserves in the largest phase."""
    allocated = allocated_gib(found, config, shape, machine.gpu.capability)
    return allocated + overhead_gib(found, config, shape, allocated)


def allocated_gib(
    found: Placement, config: RunConfig, shape: ModelShape, capability: tuple[int, int] = (7, 5)
) -> float:
    """GiB of tensors in the largest phase."""
    return max(sum(parts.values()) for parts in phases(found, config, shape, capability).values()) / GIB


def needs(
    found: Placement, config: RunConfig, shape: ModelShape, machine: Machine, counts: tuple[int, ...]
) -> dict[str, float]:
    """GiB and seconds of one model's evaluation, by the names that a report measures them under.

    counts: host.Counts. VRAM only with a GPU.
    """
    found_s = pace.evaluation_s(config, shape, machine, found, counts)
    sizes = {
        "anonymous_gib": sum(ram(found, config, shape, machine).values()),
        "evaluation_s": sum(found_s.values()),
    }
    if machine.gpu:
        allocated = allocated_gib(found, config, shape, machine.gpu.capability)
        sizes["allocated_gib"] = allocated
        sizes["reserved_gib"] = allocated + overhead_gib(found, config, shape, allocated)
    return sizes


def phases(
    found: Placement, config: RunConfig, shape: ModelShape, capability: tuple[int, int] = (7, 5)
) -> dict[str, vram.Parts]:
    """Phase -> component -> bytes in the allocator while a model so placed is evaluated."""
    held, dequantizes = weights(found, config, shape), found.precision != "fp16"
    return vram.inference(config, shape, capability, held, dequantizes, found.batch_size)


def ram(found: Placement, config: RunConfig, shape: ModelShape, machine: Machine) -> dict[str, float]:
    """Component -> GiB of host memory while a model so placed is evaluated."""
    capability = machine.gpu.capability if machine.gpu else (7, 5)
    return host.ram(
        config, shape, machine, "inference", phases(found, config, shape, capability), host_gib(found, shape)
    )


def weights(found: Placement, config: RunConfig, shape: ModelShape) -> dict[str, float]:
    """Component -> bytes of what the GPU holds of a model, its adapter included."""
    if found.kind == "adapter":
        return vram.weights(config, shape) | {"LoRA weights": vram.FULL * lora_parameters(config, shape)}
    if found.kind == "aqlm":
        return vram.weights(config, shape)
    if found.kind in METHODS:
        rest = vram.HALF * (shape.parameters - shape.linear_parameters)
        return {"4-bit weights": host.quantized_bytes(config, shape) - rest, "16-bit weights": rest}
    if found.kind == "gguf":
        return {"GGUF blocks": found.stored_bytes, "blocks dequantized at once": gguf_sizes.dequantizing_bytes(shape)}
    layer = layer_bytes(shape)
    held = {"16-bit weights": vram.HALF * shape.parameters - found.away * layer}
    return held | ({"buffer for a waiting layer": layer} if found.away else {})


def layer_bytes(shape: ModelShape) -> float:
    """Bytes of one decoder layer in 16 bits; norms and biases are too small to count."""
    return vram.HALF * shape.layer_linear_parameters


def away_gib(found: Placement, shape: ModelShape) -> float:
    """GiB of the layers that are not on the GPU."""
    return found.away * layer_bytes(shape) / GIB


def host_gib(found: Placement, shape: ModelShape) -> float:
    """GiB of host memory that waiting layers take; from disk they are read anew each time."""
    return away_gib(found, shape) if found.away_in == "host memory" else 0.0


def overhead_gib(found: Placement, config: RunConfig, shape: ModelShape, allocated_gib: float) -> float:
    """Allocator overhead above the tensors' peak, GiB: holes between keys and values that grow; weights leave none.

    The share was calibrated on h200_evaluate.json, an NF4 model's row; h200_evaluate_new.json's two have a little less.
    """
    held_gib = sum(weights(found, config, shape).values()) / GIB
    return 0.165 * max(allocated_gib - held_gib, 0.0)


# ---- time ------------------------------------------------------------------------------------------------------------


def share_answered(seconds: dict[str, float]) -> float:
    """Share of the questions that a model gets through in LONGEST_S, at most 1, beside all else.

    >>> share_answered({"reading": 1000.0, "answers": 4000.0, "speed": 600.0})
    0.5
    """
    left_s = LONGEST_S - seconds["speed"] - seconds["reading"]
    return max(min(left_s / seconds["answers"], 1.0), 0.0) if seconds["answers"] else 1.0


def without_answers(found: Placement, shape: ModelShape, seconds: dict[str, float]) -> Placement:
    """Perplexity alone, where the texts are read in LONGEST_S, else nothing."""
    if seconds["reading"] <= LONGEST_S:
        return replace(found, answers=False)
    why = f"it would take {hours(seconds)}, {in_words(found, shape)}: take a GPU with more memory, or a smaller model"
    return replace(found, answers=False, problem=why)


def hours(seconds: dict[str, float]) -> str:
    """All parts together.

    >>> hours({"reading": 2000.0, "answers": 4000.0, "speed": 600.0})
    '1.8 hours'
    """
    return f"{sum(seconds.values()) / 3600:.1f} hours"


# ---- words -----------------------------------------------------------------------------------------------------------


def in_words(found: Placement, shape: ModelShape) -> str:
    """Where layers are that are not on the GPU; "" when there are none."""
    return f"{found.away} of {shape.layers} layers from {found.away_in}" if found.away else ""


def about(name: str, found: Placement, shape: ModelShape) -> str:
    """What is not as one would expect of a model, in a sentence; "" for one that is opened whole and asked all."""
    if found.problem:
        return f"{name} is not evaluated: {found.problem}"
    if not found.answers:
        return f"{name} is not asked for answers, {in_words(found, shape)}: that would take too long"
    return f"{name} is read in 16 bits, {in_words(found, shape)}" if found.away else ""
