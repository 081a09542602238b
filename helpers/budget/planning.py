"""Finding the configuration that fits and finishes first, and the words for what mends one that does not fit."""

from bisect import bisect_left
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from typing import Any

from helpers.budget import host, hours, sharding, vram
from helpers.budget.step import Step
from helpers.config import RunConfig
from helpers.hardware import Machine
from helpers.models import KNOWN, ModelShape

CONTEXT_STEP, RANK_STEP = 128, 4
"""What a context or a rank is cut by: the largest multiple that fits is looked for."""
MARGIN = {"own": 0.03, "other": 0.05}
"""Share of the VRAM that must stay free: what a process took of rows that nothing was calibrated on was at most 2.5 %
above its prediction with our own layers, and 4.8 % with transformers' (tests/benchmarks/tables.py)."""
LEANEST = {"keep_attention": False, "offload_activations": True}

Needs = Callable[[RunConfig], float]
"""GiB of VRAM that training with a configuration needs."""
Cut = tuple[str, RunConfig]
"""What was changed, in words, and the configuration with it."""


def search(config: RunConfig, shape: ModelShape, machine: Machine, needs: Needs) -> tuple[RunConfig, tuple[str, ...]]:
    """(configuration without "auto", reasons): the fastest that fits; the nearest when none does.

    Sequences a step, context, rank and targets stay, unless no way of training them fits: then the context shrinks,
    and where that does not do, the rank.
    A configuration that says how many layers are checkpointed, and fits, stays as it is.
    """
    config = within_host(config, machine)
    if machine.gpu is None:
        asked = config.train.checkpointing
        return (with_train(config, checkpointing="none") if asked == "auto" else config), (
            "without a GPU there is nothing to trade: no layer is checkpointed",
        )
    room = usable_gib(machine, Step.of(config, shape).backend)
    # what is asked for, then other ways of computing the same steps, then less than was asked for
    if config.train.checkpointing != "auto" and needs(config) <= room:
        return config, ("these settings fit as they are",)
    found = fastest(config, shape, machine, needs, room)
    if found is not None:
        return found, reasons(found, shape, machine, needs(found))
    smaller = with_train(config, optimizer="paged_adamw_8bit")
    if cut := shrunk(smaller, lambda less: fastest(less, shape, machine, needs, room) is not None):
        found = fastest(cut[1], shape, machine, needs, room)
        return found, (f"{cut[0]}: no way of training more fits", *reasons(found, shape, machine, needs(found)))
    nearest = with_train(smallest(smaller), checkpointing="all", keep_attention=False)
    return nearest, ("nothing fits: this comes nearest",)


def within_host(config: RunConfig, machine: Machine) -> RunConfig:
    """With at most half of the machine's free RAM for offloaded inputs, in whole 1/16 GiB; layers keep to that number.

    Several GPUs have a process each, which share it.

    So it is settled once, when a run is planned: later the run itself has taken some of what is free now.
    """
    half = int(8 * machine.host.ram_gib / sharding.on_this_host(config, machine)) / 16
    offloads = config.train.offload_activations and half < config.train.offload_gib
    return with_train(config, offload_gib=half) if offloads else config


def usable_gib(machine: Machine, backend: str = "") -> float:
    """GiB of a machine's VRAM that a stage may be predicted to take; the rest is the prediction's own error.

    backend: what computes a training step's layers (`Step.backend`); other stages have none.

    >>> from helpers import hardware
    >>> round(usable_gib(hardware.machine("t4"), "own"), 2)
    14.12
    """
    return machine.vram_gib * (1 - MARGIN["own" if backend == "own" else "other"])


def shrunk(config: RunConfig, fits: Callable[[RunConfig], bool]) -> Cut | None:
    """The longest context that fits; where none does, the highest rank, alone or with the context; None: nothing does.

    fits: whether some way of training a configuration does.
    """
    asked, lowest = config.data.seq_len, (lower_ranks(config) or [config])[-1]
    if not fits(shortest(lowest)):
        return None
    if found := largest(contexts(config), fits):
        return f"the context is cut from {asked} to {found.data.seq_len} tokens", found
    rank = config.adapter.rank
    if found := largest(lower_ranks(config), fits):
        return f"the rank is cut from {rank} to {found.adapter.rank}", found
    lower = largest(lower_ranks(config), lambda less: fits(shortest(less)))
    found = largest(contexts(lower), fits) if lower else None
    if found is None:
        return None
    said = f"rank and context are cut from {rank} to {lower.adapter.rank}, {asked} to {found.data.seq_len}"
    return said, found


def contexts(config: RunConfig) -> list[RunConfig]:
    """The same with each shorter context, in steps, the longest first."""
    lengths = range((config.data.seq_len - 1) // CONTEXT_STEP * CONTEXT_STEP, 0, -CONTEXT_STEP)
    return [replace(config, data=replace(config.data, seq_len=length)) for length in lengths]


def shortest(config: RunConfig) -> RunConfig:
    """With the shortest context that a plan would cut to, or the one that it has."""
    return (contexts(config) or [config])[-1]


def lower_ranks(config: RunConfig) -> list[RunConfig]:
    """The same with each lower rank, in steps, the highest first; alpha keeps its ratio, and so the update its size."""
    asked = config.adapter
    ranks = range((asked.rank - 1) // RANK_STEP * RANK_STEP, 0, -RANK_STEP)
    return [replace(config, adapter=replace(asked, rank=rank, alpha=asked.alpha * rank / asked.rank)) for rank in ranks]


def largest(less: Sequence[RunConfig], fits: Callable[[RunConfig], bool]) -> RunConfig | None:
    """The first that fits of configurations that need ever less, by halving the interval; None when none does."""
    place = bisect_left(less, True, key=fits)
    return less[place] if place < len(less) else None


def fastest(config: RunConfig, shape: ModelShape, machine: Machine, needs: Needs, room_gib: float) -> RunConfig | None:
    """The configuration of the same steps that fits and takes least time; None when none fits."""

    def step_s(found: RunConfig) -> float:
        return round(hours.step_s(Step.of(found, shape), machine), 3)

    gpus = sharding.world(config, machine)
    each = (least_recomputed(split, shape, machine, needs, room_gib) for split in splits(config, gpus))
    fitting = [found for found in each if found is not None]
    # of equally fast ones the smaller micro-batch: less padding, and more room
    return min(fitting, key=lambda found: (step_s(found), found.train.batch_size), default=None)


def splits(config: RunConfig, gpus: int = 1) -> Iterator[RunConfig]:
    """Every micro-batch × accumulation that makes the configuration's sequences a step.

    Of several GPUs each gets as many micro-batches as any other, where the step has sequences enough.
    """
    every = [with_batch(config, batch) for batch in batch_sizes(config)]
    even = [split for split in every if split.train.accumulation % gpus == 0]
    yield from even or every


def in_batches(config: RunConfig, batch_size: int, shape: ModelShape, machine: Machine, needs: Needs) -> RunConfig:
    """The same steps in micro-batches of this size, with as little recomputed as fits; the leanest when none does."""
    split = with_batch(config, batch_size)
    if machine.gpu is None:
        return with_train(split, checkpointing="none") if split.train.checkpointing == "auto" else split
    split = with_train(split, keep_attention=True, offload_activations=False)  # chosen anew for this machine
    leanest = within_host(with_train(split, checkpointing="all", **LEANEST), machine)
    room = usable_gib(machine, Step.of(split, shape).backend)
    return least_recomputed(split, shape, machine, needs, room) or leanest


def batch_sizes(config: RunConfig) -> list[int]:
    """Micro-batches of at most 64 that make the same step; TrainConfig accumulates at most 4,096 of them."""
    rows = config.train.batch_size * config.train.accumulation
    sizes = [size for size in range(1, min(rows, 64) + 1) if rows % size == 0 and rows // size <= 4096]
    return sizes or [config.train.batch_size]


def with_batch(config: RunConfig, batch_size: int) -> RunConfig:
    """The same step in other micro-batches."""
    rows = config.train.batch_size * config.train.accumulation
    return with_train(config, batch_size=batch_size, accumulation=rows // batch_size)


def least_recomputed(
    config: RunConfig, shape: ModelShape, machine: Machine, needs: Needs, room_gib: float
) -> RunConfig | None:
    """With as few layers checkpointed as fit, and where all of them do not, with inputs in host memory or less saved.

    Copies to the host cost next to nothing beside the work of a layer; attention again costs 12 % at 16,384 tokens.
    """
    # from what costs no time to what costs most: the first that fits with every layer checkpointed is taken
    for more in ({}, {"offload_activations": True}, {"keep_attention": False}, LEANEST):
        leaner = within_host(with_train(config, **more), machine)
        everything = with_train(leaner, checkpointing="all")
        gpus = sharding.on_this_host(config, machine)
        in_ram = gpus * sum(host.ram(everything, shape, machine, "train").values()) <= machine.host.ram_gib
        if (in_ram or not leaner.train.offload_activations) and needs(everything) <= room_gib:
            return fewest_checkpointed(leaner, shape, needs, room_gib)
    return None


def fewest_checkpointed(config: RunConfig, shape: ModelShape, needs: Needs, room_gib: float) -> RunConfig:
    """With as few layers checkpointed as fit: memory falls with each, so halving the interval finds it."""

    def fits(count: int) -> bool:
        return needs(with_train(config, checkpointing=count)) <= room_gib

    low, high = 0, shape.layers
    while low < high:
        middle = (low + high) // 2
        low, high = (low, middle) if fits(middle) else (middle + 1, high)
    return with_train(config, checkpointing=low)


def smallest(config: RunConfig) -> RunConfig:
    """The same steps in the smallest micro-batches."""
    return with_batch(config, batch_sizes(config)[0])


def with_train(config: RunConfig, **values: Any) -> RunConfig:
    """with_values for fields of config.train alone, and quicker."""
    return replace(config, train=replace(config.train, **values))


def reasons(config: RunConfig, shape: ModelShape, machine: Machine, needed_gib: float) -> tuple[str, ...]:
    """Why a configuration was chosen, in sentences."""
    step, asked = Step.of(config, shape), config.train
    room_gib = usable_gib(machine, step.backend)
    layers = "no layer is checkpointed: nothing is computed twice"
    if step.checkpointed:
        layers = f"{step.checkpointed} of {shape.layers} layers are checkpointed, the fewest that fit"
    free = f"{1 - room_gib / machine.vram_gib:.0%} stay free, because a prediction can be that much under"
    said = [
        f"micro-batches of {asked.batch_size} × {asked.accumulation} accumulated: the fastest way of a step that fits",
        layers,
        f"needs {needed_gib:.1f} GiB, and {room_gib:.1f} may be used: {free}",
    ]
    if asked.offload_activations:
        said.append("layers' inputs wait in host memory")
    return tuple(said)


def single_changes(config: RunConfig, shape: ModelShape) -> Iterator[list[Cut]]:
    """(in words, configuration) for each single setting that needs less VRAM, what costs least first.

    Values of one setting come together, what needs most first. What the plan chooses where checkpointing is "auto" is
    no change then.
    """
    train, model, step = config.train, config.model, Step.of(config, shape)
    given = train.checkpointing != "auto"
    if given and step.checkpointed < shape.layers:
        yield [("checkpointing=all", with_train(config, checkpointing="all"))]
    elif given and train.keep_attention and step.backend == "own":
        yield [("keep_attention=False", with_train(config, keep_attention=False))]
    if model.attention != "efficient":
        yield [("attention=efficient", replace(config, model=replace(model, attention="efficient")))]
    if model.weights not in ("nf4", "aqlm"):
        yield [("weights=nf4", replace(config, model=replace(model, weights="nf4")))]
    if model.upcast:
        yield [("upcast=False", replace(config, model=replace(model, upcast=False)))]
    if train.loss == "full":
        yield [("loss=chunked", with_train(config, loss="chunked"))]
    if train.optimizer == "adamw_torch" and not vram.fused(config):
        yield [("optimizer=paged_adamw_8bit", with_train(config, optimizer="paged_adamw_8bit"))]
    if given:
        smaller = reversed([with_batch(config, size) for size in batch_sizes(config) if size < train.batch_size])
        yield [
            (f"batch_size={one.train.batch_size} with accumulation={one.train.accumulation}", one) for one in smaller
        ]
        if not train.offload_activations and step.checkpointed:
            yield [("offload_activations=True", with_train(config, offload_activations=True))]
        yield [("checkpointing=auto", with_train(config, checkpointing="auto"))]
    yield [(f"seq_len={one.data.seq_len}", one) for one in contexts(config)]
    yield [(f"rank={one.adapter.rank}", one) for one in lower_ranks(config)]


def vram_remedy(config: RunConfig, shape: ModelShape, machine: Machine, stage: str, needs: Needs) -> str:
    """Which single change fits, and of its values which is the largest; when none does, which change frees most.

    config: as it was asked for: with checkpointing="auto" a change fits where some way of training it does.
    """
    if stage == "inference":
        return "a smaller eval_batch_size or eval_context needs less"
    if stage == "quantize":
        return "fewer calibration_samples need less"
    weights_gib = sum(vram.weights(config, shape).values()) / vram.GIB
    if weights_gib > machine.allocator_gib and config.model.weights in ("nf4", "aqlm"):
        smaller = f", or {twin}, of the same shape in 2 bits" if (twin := in_two_bits(shape)) else ""
        alone = f"the weights alone take {weights_gib:.1f} GiB, and no setting makes them less"
        return f"{alone}; take a GPU with more{smaller}"

    def as_run(change: Cut) -> tuple[RunConfig, bool]:
        one = change[1]
        room_gib = usable_gib(machine, Step.of(one, shape).backend)
        if one.train.checkpointing == "auto":
            found = fastest(one, shape, machine, needs, room_gib)
            leanest = with_train(smallest(one), checkpointing="all", **LEANEST)
            return found or within_host(leanest, machine), found is not None
        one = within_host(one, machine)
        return one, needs(one) <= room_gib

    best, best_gib = "", needs(as_run(("", config))[0])
    for changes in single_changes(config, shape):
        place = bisect_left(changes, True, key=lambda change: as_run(change)[1])
        words, found = changes[min(place, len(changes) - 1)] if changes else ("", config)
        needed = needs(as_run((words, found))[0])
        if place < len(changes):
            return f"{words} fits, with {needed:.1f} GiB"
        if needed < best_gib:
            best, best_gib = words, needed
    if not best:
        return "no setting needs less; take a smaller model, or a GPU with more"
    return f"no single change makes it fit, {best} frees most and leaves {best_gib:.1f} GiB; take the plan's proposal"


def in_two_bits(shape: ModelShape) -> str:
    """The hub's checkpoint of this shape in AQLM's 2 bits; "" where there is none, or the model is in them."""
    known = {name: (other.model_type, other.parameters) for name, other in KNOWN.items() if other.additive}
    same = (name for name, sizes in known.items() if sizes == (shape.model_type, shape.parameters))
    return "" if shape.additive else next(same, "")


def ram_remedy(parts: dict[str, float]) -> str:
    """What frees most of the host's memory."""
    if "offloaded activations" in parts:
        return "offload_activations=False needs less"
    if "calibration activations" in parts:
        return "fewer calibration_samples need less"
    if host.COMPILERS in parts:
        return "MAX_JOBS=1 in the environment compiles one file after another"
    return "close what else runs, or take a smaller model"


def kept_remedy() -> str:
    """Where to put a run that is more than Kaggle keeps."""
    return (
        "give a workspace in /kaggle/temp, and set RECIPES_LASTING=/kaggle/working: checkpoints, adapter and GPTQ "
        "model are kept there, the merged model is not"
    )


def disk_remedy(config: RunConfig, parts: dict[str, float], shape: ModelShape) -> str:
    """What frees most of the disk."""
    if (twin := in_two_bits(shape)) and "merged model" not in parts:
        return f"choose another disk for the run, or take {twin}, of the same shape in 2 bits"
    if "merged model" in parts and "base, 16 bits" in parts and not config.merge.free_base:
        return "free_base=True deletes each shard of the base once it is merged"
    return "delete what lies there, or choose another disk for the run"
