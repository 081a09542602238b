"""A budget from its parts: VRAM, RAM, disk and hours of a stage on a machine, a plan that fits, and what runs."""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace

from helpers.budget import host, hours, placement, planning, sharding, vram
from helpers.budget.step import Step, checkpointed_layers
from helpers.config import RunConfig
from helpers.hardware import Machine
from helpers.models import ModelShape, aqlm_sizes, families, refuse_packed

GIB = 2**30
STAGES = ("train", "merge", "quantize", "inference", "run")
PARTS_OF_A_RUN = ("train", "merge", "quantize", "inference")
STAGE_NAMES = {
    "train": "training",
    "merge": "merging",
    "quantize": "GPTQ",
    "inference": "evaluation",
    "export": "the export",
    "run": "the whole run",
}


@dataclass(frozen=True)
class Vram:
    """VRAM in the phase that needs most; parts, in GiB, sum to process_gib."""

    allocated_gib: float
    reserved_gib: float
    process_gib: float
    limit_gib: float
    usable_gib: float
    """What it may be predicted to take: the limit less what predictions were under (`planning.MARGIN`)."""
    phase: str
    parts: dict[str, float]


@dataclass(frozen=True)
class Ram:
    """Host memory: the largest stage's peak."""

    peak_gib: float
    limit_gib: float
    parts: dict[str, float]


@dataclass(frozen=True)
class Disk:
    """Space that a run takes at most, and by what."""

    peak_gib: float
    limit_gib: float
    parts: dict[str, float]


@dataclass(frozen=True)
class Time:
    """Hours, and seconds of a step of rows of average length; sessions: how many a host's limit makes of them."""

    step_s: float
    steps: int
    total_h: float
    sessions: int
    parts: dict[str, float]


@dataclass(frozen=True)
class Budget:
    """What one stage, or a whole run, needs on a machine; reasons say why it does not fit and what mends it."""

    stage: str
    machine: Machine
    vram: Vram
    ram: Ram
    disk: Disk
    time: Time
    fits: bool
    reasons: tuple[str, ...]
    notes: tuple[str, ...] = ()
    """What an evaluation does otherwise than one would expect, where the machine is small."""


@dataclass(frozen=True)
class Plan:
    """A configuration without "auto", its budget, and why it was chosen."""

    config: RunConfig
    budget: Budget
    reasons: tuple[str, ...]
    continues: bool = False
    """Its micro-batches are those of a checkpoint, and training goes on in them whatever else is asked for."""


class DoesNotFit(ValueError):
    """A run needs more than the machine has; the message says of what, how much, and which change mends it."""


@dataclass(frozen=True)
class Settled:
    """What was asked for, settled for a machine: what runs, what that needs, and what the plan proposes."""

    config: RunConfig
    budget: Budget
    plan: Plan


def budget(
    config: RunConfig,
    shape: ModelShape,
    machine: Machine,
    stage: str = "train",
    tokens_in_dataset: int | None = None,
    evaluated: Mapping[str, str] = placement.EVALUATED,
    asked: RunConfig | None = None,
) -> Budget:
    """VRAM, RAM, disk and hours of a stage on a machine.

    tokens_in_dataset: of all conversations, cut to seq_len. evaluated: name -> kind (model, adapter, gptq) of the
    models that an evaluation opens. asked: what was asked for, where `config` is what a plan made of it: remedies are
    changes of that. Raises ValueError naming the field and its range.
    """
    refuse(config, shape, stage)
    stages = PARTS_OF_A_RUN if stage == "run" else (stage,)
    if stage == "run" and shape.adapter_only:  # base and adapter are what is evaluated
        stages = tuple(part for part in stages if part not in ("merge", "quantize"))
    if shape.adapter_only and evaluated is placement.EVALUATED:
        evaluated = {"base": "model" if shape.additive is None else aqlm_sizes.NAME, "finetuned": "adapter"}
    notes: tuple[str, ...] = ()
    opened: tuple[placement.Placement, ...] = ()
    if "inference" in stages:  # decides first what is opened how, and whether fewer questions are answered
        evaluation = placement.plan(config, {name: (kind, shape) for name, kind in evaluated.items()}, machine)
        opened, notes = tuple(evaluation.places.values()), evaluation.notes
        config = evaluation.config
    # stages run one after another, each in a process of its own: of memory the largest counts
    each = (vram_of(config, shape, machine, part, opened) for part in stages)
    memory = max(each, key=lambda found: found.process_gib - found.usable_gib)
    rams = [ram_of(config, shape, machine, part, opened) for part in stages]
    ram_parts = max(rams, key=lambda parts: sum(parts.values()))
    ram = Ram(sum(ram_parts.values()), machine.host.ram_gib, ram_parts)
    # what they write stays
    disk_parts = host.disk(config, shape, stage)
    disk = Disk(sum(disk_parts.values()), machine.host.disk_gib, disk_parts)
    time = time_of(config, shape, machine, stages, tokens_in_dataset, opened)
    reasons = tuple(shortages(asked or config, shape, machine, stage, memory, ram, disk))
    return Budget(stage, machine, memory, ram, disk, time, not reasons, reasons, notes)


def refuse(config: RunConfig, shape: ModelShape, stage: str) -> None:
    """Raise ValueError for what no machine can do."""
    if stage not in STAGES:
        raise ValueError(f"stage must be one of {', '.join(STAGES)}, not {stage!r}")
    if config.data.seq_len > shape.max_context:
        raise ValueError(
            f"seq_len must be at most {shape.max_context}, what {shape.name} was made for, not {config.data.seq_len}"
        )
    families.refuse(shape.family, shape.name, config.adapter.target_modules)
    sharding.refuse(config)
    if stage in ("merge", "quantize") and shape.additive is not None:
        raise ValueError(f"{shape.name}: {aqlm_sizes.NO_MERGE}")
    aqlm_sizes.refuse(shape.additive, shape.name, config)
    if stage in ("train", "run"):
        refuse_packed(shape)
    checkpointed_layers(config, shape)


def vram_of(
    config: RunConfig, shape: ModelShape, machine: Machine, stage: str, opened: tuple[placement.Placement, ...] = ()
) -> Vram:
    """The largest phase of a stage, of an evaluation with the largest of the models opened; nothing without a GPU."""
    if machine.gpu is None:
        return Vram(0.0, 0.0, 0.0, machine.vram_gib, machine.vram_gib, "", {})
    capability, usable = machine.gpu.capability, planning.usable_gib(machine)
    if stage == "inference":
        each = (
            largest(
                machine,
                placement.phases(found, config, shape, capability),
                lambda allocated, found=found: placement.overhead_gib(found, config, shape, allocated),
                usable,
            )
            for found in counted(opened)
        )
        return max(each, key=lambda found: found.process_gib)
    if stage == "merge":
        share = MERGE_OVERHEAD["nf4" if host.merges_into_nf4(config) else "original"]
        return largest(machine, vram.merging(shape, capability), lambda allocated: allocated * share, usable)
    if stage == "quantize":
        found = vram.quantization(config, shape, capability)
        return largest(machine, found, lambda allocated: allocated * GPTQ_OVERHEAD, usable)
    step = Step.of(config, shape)
    overhead = vram.allocator_overhead(step) / GIB
    paged = vram.optimizer_states(config, shape)[1] / GIB
    usable = planning.usable_gib(machine, step.backend)
    gpus = sharding.world(config, machine)
    overhead += sharding.held_apart(step, gpus) / GIB
    return largest(machine, sharding.phases(step, gpus, capability), lambda _: overhead, usable, paged)


def largest(
    machine: Machine,
    phases: dict[str, vram.Parts],
    overhead_gib: Callable[[float], float],
    usable_gib: float,
    paged_gib: float = 0.0,
) -> Vram:
    """The largest of a stage's phases, and what is taken beside the allocator's tensors.

    overhead_gib: of GiB allocated, what the allocator reserves beyond them. paged_gib: of optimizer states.
    """
    phase = max(phases, key=lambda name: sum(phases[name].values()))
    parts = {name: size / GIB for name, size in phases[phase].items() if size}
    allocated = sum(parts.values())
    overhead = overhead_gib(allocated)
    parts |= {"allocator overhead": overhead} | ({"paged optimizer states": paged_gib} if paged_gib else {})
    parts["CUDA context"] = machine.gpu.context_gib
    return Vram(allocated, allocated + overhead, sum(parts.values()), machine.vram_gib, usable_gib, phase, parts)


MERGE_OVERHEAD = {"nf4": 0.57, "original": 0.125}
"""What a merge reserves beyond its tensors, as a share of them; NF4's row was measured before segments could grow."""
GPTQ_OVERHEAD = 0.52
"""The same of GPTQ; all three calibrated on merge_quantize.csv."""


def counted(opened: tuple[placement.Placement, ...]) -> tuple[placement.Placement, ...]:
    """The models that are opened. A 16-bit model may be left out with a note; without any other, nothing fits."""
    return tuple(found for found in opened if found.kind != "model" or not found.problem) or opened


def ram_of(
    config: RunConfig, shape: ModelShape, machine: Machine, stage: str, opened: tuple[placement.Placement, ...] = ()
) -> dict[str, float]:
    """Component -> GiB of host memory at a stage's peak, of an evaluation with the largest of the models opened.

    Of GPTQ the largest of what its process does one after another: quantizing, perplexity of the merged model, and, the
    first time on a machine with a GPU, compiling the kernel that opens the result.
    """
    if stage == "train":  # a process a GPU
        gpus = sharding.on_this_host(config, machine)
        parts = {name: gpus * size for name, size in host.ram(config, shape, machine, stage).items()}
        if config.train.trains == "all" and machine.gpu:  # fp32 weights and both moments on rank 0; the start on all
            parts["whole weights and states, for checkpoints"] = 16 * shape.parameters / GIB
        return parts
    if stage == "quantize":
        place = placement.place("model", config.with_values(eval_batch_size=1), shape, machine)
        phases = [host.ram(config, shape, machine, stage)]
        phases += [host.checking(placement.ram(place, config, shape, machine), machine.gpu is not None)]
        if machine.gpu and (config.quantize.quant_method, config.quantize.bits) == ("gptq", 4):
            phases.append(host.building_kernel(machine))
        return max(phases, key=lambda parts: sum(parts.values()))
    if stage != "inference":
        return host.ram(config, shape, machine, stage)
    each = (placement.ram(found, config, shape, machine) for found in counted(opened))
    return max(each, key=lambda parts: sum(parts.values()))


def time_of(
    config: RunConfig,
    shape: ModelShape,
    machine: Machine,
    stages: tuple[str, ...],
    tokens_in_dataset: int | None,
    opened: tuple[placement.Placement, ...] = (),
) -> Time:
    """Hours by part, and the sessions that they take; opened: the models of an evaluation, one after the other."""
    parts: dict[str, float] = {}
    places = [found for found in opened if not found.problem]
    for stage in stages:
        for name, size in hours.stage_hours(config, shape, machine, stage, tokens_in_dataset, places).items():
            # the base is downloaded once, by whichever stage comes first
            parts[name] = max(parts.get(name, 0.0), size) if name == "download" else parts.get(name, 0.0) + size
    total = sum(parts.values())
    session_h = machine.host.session_h
    sessions = 1 if session_h is None else math.ceil(total / session_h)
    step_s, steps = 0.0, 0
    if "train" in stages:
        steps, mean_tokens = hours.steps(config, tokens_in_dataset)
        step_s = hours.step_s(Step.of(config, shape), machine, mean_tokens)
    return Time(step_s, steps, total, sessions, parts)


def shortages(
    config: RunConfig, shape: ModelShape, machine: Machine, stage: str, memory: Vram, ram: Ram, disk: Disk
) -> list[str]:
    """A sentence with number and remedy for each thing that there is too little of."""
    reasons, work = [], STAGE_NAMES[stage]
    if machine.gpu is None and shape.parameters > 1e9 and stage != "merge":
        reasons.append(
            f"{work} needs a GPU for {shape.parameters / 1e9:.1f}e9 parameters, and {machine.name} has none: take one "
            "(in Colab: Runtime > Change runtime type > T4 GPU), or the profile tiny, made for a CPU"
        )
    if machine.unusable:
        reasons.append(f"{work} cannot run: {machine.unusable}")
    if machine.gpu and memory.process_gib > memory.usable_gib:
        remedy = planning.vram_remedy(config, shape, machine, stage, training_needs(shape, machine))
        near = memory.process_gib <= memory.limit_gib
        kept_gib = memory.limit_gib - memory.usable_gib
        why = f", and {kept_gib:.1f} must stay free because a prediction can be that much under" if near else ""
        reasons.append(
            f"{work} needs {memory.process_gib:.1f} GiB of VRAM, this {machine.name} has {memory.limit_gib:.1f}{why}: "
            f"{remedy}"
        )
    if ram.peak_gib > ram.limit_gib:
        reasons.append(
            f"{work} needs {ram.peak_gib:.1f} GiB of RAM, {machine.host.name} has {ram.limit_gib:.1f} free: "
            f"{planning.ram_remedy(ram.parts)}"
        )
    if disk.peak_gib > disk.limit_gib:
        reasons.append(
            f"{work} needs {disk.peak_gib:.1f} GiB of disk, {machine.host.name} has {disk.limit_gib:.1f} free: "
            f"{planning.disk_remedy(config, disk.parts, shape)}"
        )
    written_gib, limit_gib = disk.peak_gib - disk.parts.get(host.base_part(shape), 0.0), machine.host.kept_gib
    if limit_gib is not None and written_gib > limit_gib:
        reasons.append(
            f"{work} writes {written_gib:.1f} GiB into the run's folder, and {machine.host.name} keeps {limit_gib:.1f} "
            f"there: {planning.kept_remedy()}"
        )
    return reasons


def plan(config: RunConfig, shape: ModelShape, machine: Machine) -> Plan:
    """The configuration that does the same and finishes first of those that fit (or, when none fits, comes nearest)."""
    refuse(config, shape, "train")
    chosen, reasons = planning.search(config, shape, machine, training_needs(shape, machine))
    said = (*families.fallbacks(shape.family, chosen), *vram.another_optimizer(chosen))
    return Plan(chosen, budget(chosen, shape, machine), (*reasons, *said))


def plan_in(config: RunConfig, batch_size: int, shape: ModelShape, machine: Machine, continued: str) -> Plan:
    """The plan in micro-batches of a given size, those of a checkpoint that is continued, as little recomputed as fits.

    Where no way of computing them fits, the leanest, and its budget says by how much not.
    """
    refuse(config, shape, "train")
    chosen = planning.in_batches(config, batch_size, shape, machine, training_needs(shape, machine))
    found = budget(chosen, shape, machine)
    split = f"micro-batches of {chosen.train.batch_size} × {chosen.train.accumulation}"
    need, limit = found.vram.process_gib, found.vram.limit_gib
    if machine.gpu and need > found.vram.usable_gib:
        said = f"{continued} was made in {split}, which need at least {need:.1f} GiB of VRAM, this {machine.name} has"
        remedy = "continue on a GPU with more, or start anew with resume='never'"
        return Plan(chosen, replace(found, reasons=(f"{said} {limit:.1f}: {remedy}",)), (), continues=True)
    layers = f"{checkpointed_layers(chosen, shape)} of {shape.layers} layers are checkpointed"
    memory = f", and {need:.1f} of {limit:.1f} GiB are needed" if machine.gpu else ""
    said = f"{continued} was made in {split}, and training goes on in them: {layers}{memory}"
    return Plan(chosen, found, (said,), continues=True)


def settle(
    config: RunConfig, shape: ModelShape, machine: Machine, proposed: Plan | None = None, stage: str = "train"
) -> Settled:
    """What runs on a machine when a configuration is asked for, and its budget; `check` raises when that does not fit.

    proposed: the plan to settle by, where it is not `plan`'s for just this configuration: a panel's, which is free to
    choose what the reader has set, or a checkpoint's (`plan_in`).
    """
    found = proposed or plan(config, shape, machine)
    runs = planning.within_host(requested(config, found), machine)
    same = stage == "train" and runs == found.config
    return Settled(runs, found.budget if same else budget(runs, shape, machine, stage, asked=config), found)


def requested(config: RunConfig, plan: Plan) -> RunConfig:
    """What runs when this is asked for: as the plan computes it, as long as context and rank stay.

    Where the plan had to cut one of them the request does not fit, even with every layer checkpointed. Checkpointing
    that is given stays, unless a checkpoint was made in other micro-batches: training goes on in those.
    """
    asked, proposed = config.train, plan.config.train
    if plan.continues and (asked.batch_size, asked.accumulation) != (proposed.batch_size, proposed.accumulation):
        return plan.config
    if asked.checkpointing != "auto":
        return config
    same = (config.data.seq_len, config.adapter.rank) == (plan.config.data.seq_len, plan.config.adapter.rank)
    return plan.config if same else config.with_values(checkpointing="all")


def training_needs(shape: ModelShape, machine: Machine) -> Callable[[RunConfig], float]:
    """GiB of VRAM that training takes, as a function of the configuration."""
    return lambda config: vram_of(config, shape, machine, "train").process_gib


def check(budget: Budget) -> None:
    """Raise DoesNotFit, all reasons in its message, for a budget that does not fit."""
    if not budget.fits:
        raise DoesNotFit("; ".join(budget.reasons))
