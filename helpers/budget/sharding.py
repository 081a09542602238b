"""Several GPUs that train together: what each holds, what goes between them, and the time that this takes; no torch.

The micro-batches of a step are dealt to the GPUs. What is whole on each of them, and what is divided by their number:

    sharding   weights of layers   gradients   optimizer states   goes between GPUs
    none       whole               whole       whole              gradients, once a step (DistributedDataParallel)
    zero2      whole               divided     divided            gradients and updated weights, once a step
    fsdp       divided             divided     divided            a layer's weights for its turns, twice a micro-batch
    zero3      divided             divided     divided            the same, three times where layers recompute

FSDP is torch's fully_shard (https://arxiv.org/abs/2304.11277), ZeRO DeepSpeed's (https://arxiv.org/abs/1910.02054). A
frozen embedding and head stay whole: gathered for a micro-batch they would be there as well, beside their shards.
Scales of 4-bit weights stay whole too, as bitsandbytes keeps them outside of the parameter.

>>> from helpers.models import profile, shape
>>> one, two = (profile("mistral-7b", gpus=count, sharding="fsdp", checkpointing=0) for count in (1, 2))
>>> held = [phases(Step.of(asked, shape("mistral-7b-v0.3")), asked.train.gpus) for asked in (one, two)]
>>> [round(parts["the top layer"]["4-bit weights"] / 2**30, 2) for parts in held]
[3.25, 1.62]
"""

import math
from dataclasses import dataclass, replace

from helpers.budget import vram
from helpers.budget.step import FULL, HALF, Step, lora_parameters, trained_parameters
from helpers.config import RunConfig
from helpers.hardware import Machine

Parts = vram.Parts
WAYS = ("none", "fsdp", "zero2", "zero3")
PROPOSED = ("none", "fsdp")
"""Of these, what a plan proposes: of DeepSpeed's, zero2 runs where it is asked for, and zero3 does not."""
DIVIDES_WEIGHTS = ("fsdp", "zero3")
LAST, ON_THEIR_WAY = "the lowest layer's backward pass", "gradients on their way"
"""A phase of vram.phases after whose layer none is fetched, and a component."""
BUCKET_VALUES = 2**24
"""Values that ZeRO collects before it sends them. DeepSpeed's own default, 5e8, takes 1.9 GiB in 16 bits, twice."""
GATHERED_LAYERS = 2
"""Layers whose weights are there at once: the one that computes, and the next one's on their way (fully_shard keeps a
gathered row until the copies out of it are made; backward fetches one layer ahead)."""
PYTHON_S_PER_LAYER = {"none": 0.001, "zero2": 0.0035, "fsdp": 0.0055, "zero3": 0.05}
"""Python's time for a layer and micro-batch beside the layer's own: hooks of gradients and of gathering. Of two H200
against one, 1×2048 tokens each, where they wait for Python: 453, 535, 600 and 2,022 ms a step against 424."""


@dataclass(frozen=True)
class Waits:
    """What several GPUs add to the time of one; all 0 for one GPU."""

    gathering_s: float = 0.0
    """A micro-batch's weights on their way; behind them a layer computes."""
    python_s: float = 0.0
    """Of a micro-batch."""
    averaging_s: float = 0.0
    """A step's gradients, and weights where each GPU updates a part of them."""


def world(config: RunConfig, machine: Machine) -> int:
    """GPUs that a configuration trains on, one without a GPU unless it says more; "all" are the machine's.

    >>> from helpers import hardware
    >>> world(RunConfig().with_values(gpus="all"), hardware.machine("2xt4"))
    2
    """
    asked = config.train.gpus
    return asked if asked != "all" else machine.gpu.count if machine.gpu else 1


def on_this_host(config: RunConfig, machine: Machine) -> int:
    """Processes of a training that share the machine's memory: one of several that were started sees its own GPU."""
    return min(world(config, machine), machine.gpu.count if machine.gpu else 1)


def refuse_more_than_there_are(config: RunConfig, machine: Machine) -> None:
    """Raise ValueError for more GPUs than a machine has. A cluster has more than one machine: so not `refuse`'s."""
    asked, have = world(config, machine), machine.gpu.count if machine.gpu else 0
    if machine.gpu and asked > have:
        raise ValueError(f"gpus={asked}, but this machine has {have} × {machine.name}: set gpus={have}, or gpus=all")


def refuse(config: RunConfig) -> None:
    """Raise ValueError for weights that cannot be trained, or not be divided."""
    if config.train.trains == "all" and config.model.weights != "fp16":
        raise ValueError(
            f"trains=all changes every weight, which weights={config.model.weights} cannot hold: set weights=fp16"
        )
    if config.train.sharding != "none" and config.model.weights == "int8":
        raise ValueError(
            f"sharding={config.train.sharding} cannot divide bitsandbytes' 8-bit weights: set weights=nf4 or fp16"
        )


def micro_batches(config: RunConfig, gpus: int) -> int:
    """Micro-batches that each GPU computes of a step.

    >>> micro_batches(RunConfig().with_values(accumulation=8), gpus=2)
    4
    """
    return math.ceil(config.train.accumulation / gpus)


def layer_bytes(step: Step) -> float:
    """Bytes of one decoder layer's weights as they are gathered: 4-bit codes, or 16 bits; norms are among them."""
    config, shape = step.config, step.shape
    dense = shape.linear_parameters
    packed = config.model.weights == "nf4"
    codes = (dense - shape.expert_parameters) / 2 + shape.expert_parameters * HALF if packed else dense * HALF
    return (codes + shape.small_parameters * HALF) / shape.layers


def phases(step: Step, gpus: int, capability: tuple[int, int] = (7, 5)) -> dict[str, Parts]:
    """Phase of a training step -> component -> bytes in one GPU's allocator, of so many GPUs; vram.phases' for one."""
    if gpus == 1:
        return vram.phases(step, capability)
    config = step.config
    if config.train.sharding == "fsdp":  # gradients go with the step: several micro-batches of a GPU keep them
        each = replace(config.train, accumulation=micro_batches(config, gpus))
        step = replace(step, config=replace(config, train=each))
    found = {name: on_each(parts, name, step, gpus) for name, parts in vram.phases(step, capability).items()}
    if config.train.sharding == "fsdp" and config.train.trains == "all":  # divided as one: their gradients come last
        after, outside = found["the optimizer step"], step.shape.embedding_parameters
        there = after["gradients"] - (FULL * outside / gpus if step.config.train.accumulation == 1 else 0.0)
        on_their_way = {"gathered embedding and head": HALF * outside, ON_THEIR_WAY: (HALF + FULL) * outside}
        found["the embedding's backward pass"] = after | {"gradients": there} | on_their_way
    return found


def on_each(whole: Parts, phase: str, step: Step, gpus: int) -> Parts:
    """What each of several GPUs holds of a phase's components, and what it needs to speak with the others."""
    config, shape = step.config, step.shape
    sharding, trained = config.train.sharding, trained_parameters(config, shape)
    gradients = vram.gradients_name(config)
    parts = dict(whole)
    if sharding != "fsdp":
        parts[gradients] = FULL * trained  # in buckets, which stay from step to step
    if sharding == "none":
        return parts
    for name in {gradients, "optimizer states", "optimizer buffers"} & parts.keys():
        parts[name] /= gpus
    if sharding in ("zero2", "zero3"):
        parts["communication buffers"] = 2 * FULL * min(BUCKET_VALUES, trained)
    if sharding == "zero2":
        if config.train.trains == "all":  # the optimizer's own copy of them is what DeepSpeed divides
            parts["32-bit weights"] += FULL * shape.parameters / gpus
        return parts
    rest = HALF * shape.embedding_parameters
    if config.train.trains == "all":
        parts["32-bit weights"] /= gpus
        parts.pop("weights in 16 bits", None)  # they are gathered in 16 bits, and autocast has nothing to keep
        parts["gathered embedding and head"] = rest
        if "backward" in phase:  # one layer's gradients in 16 bits, and in fp32 on their way
            parts[ON_THEIR_WAY] = (HALF + FULL) * shape.layer_linear_parameters
            if phase == LAST and config.train.accumulation == 1:  # its own are these, the embedding's come later
                there = trained - shape.layer_linear_parameters - shape.embedding_parameters
                parts[gradients] = FULL * there / gpus + HALF * shape.embedding_parameters / 2  # the head's, undivided
    else:
        parts["LoRA weights"] /= gpus
        for name in {"4-bit weights", "experts in 16 bits"} & parts.keys():
            parts[name] /= gpus
        if config.model.weights == "fp16":
            parts["16-bit weights"] = (whole["16-bit weights"] - rest) / gpus + rest
    if "optimizer" not in phase:
        count = 1 if "loss" in phase or phase == LAST else GATHERED_LAYERS
        adapters = FULL * lora_parameters(config, shape) / shape.layers
        parts["gathered layers"] = count * (layer_bytes(step) + adapters)
    return parts


def held_apart(step: Step, gpus: int) -> float:
    """Bytes that the allocator reserves for what goes between GPUs: what one stream frees no other may take at once.

    One layer's weights, as two H200 showed: without them four runs reserved up to 1.7 % more than predicted
    (h200x2_sharding). Of full fine-tuning one layer's gradients in fp32 too, which another stream scatters.
    """
    if gpus == 1 or step.config.train.sharding not in DIVIDES_WEIGHTS:
        return 0.0
    everything = step.config.train.trains == "all"
    return layer_bytes(step) + (FULL * step.shape.layer_linear_parameters if everything else 0.0)


def waits(step: Step, machine: Machine, gpus: int) -> Waits:
    """Seconds that several GPUs spend on each other.

    A ring sends (n - 1)/n of what is gathered or scattered over each link, and twice that of what is averaged
    (https://doi.org/10.1016/j.jpdc.2008.09.002).
    """
    if gpus == 1 or machine.gpu is None:
        return Waits()
    config, shape = step.config, step.shape
    link, share = 1e9 * machine.gpu.link_gb_s, (gpus - 1) / gpus
    python_s = PYTHON_S_PER_LAYER[config.train.sharding] * shape.layers
    averaged = 2 * FULL * trained_parameters(config, shape) * share / link
    if config.train.sharding not in DIVIDES_WEIGHTS:
        return Waits(0.0, python_s, averaged)
    recomputes = config.train.sharding == "zero3" and step.checkpointed > 0
    gathered = (3 if recomputes else 2) * shape.layers * layer_bytes(step)
    # gradients are scattered with each micro-batch: one that waited would be whole until then
    return Waits((gathered * share + averaged * link / 2) / link, python_s, 0.0)
