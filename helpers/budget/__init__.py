"""What a run needs of VRAM, RAM, disk and hours, before anything is downloaded; and a plan that fits. No torch.

>>> from helpers import hardware
>>> from helpers.models import profile, shape
>>> found = budget(profile("mistral-7b", checkpointing="all"), shape("mistral-7b-v0.3"), hardware.machine("t4"))
>>> found.fits, found.vram.moment
(True, "the upper checkpointed layer's backward pass")
"""

import math
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, replace

from helpers.budget import activations, host, placement, planning, vram
from helpers.budget import hours as pace
from helpers.config import RunConfig
from helpers.hardware import Machine
from helpers.models import ModelShape, families

GIB = 2**30
STAGES = ("train", "merge", "quantize", "inference", "run")


@dataclass(frozen=True)
class Vram:
    """VRAM at the moment of the peak; parts, in GiB, sum to process_gib."""

    allocated_gib: float
    reserved_gib: float
    process_gib: float
    limit_gib: float
    usable_gib: float
    """What it may be predicted to take: the limit less what predictions were under (`planning.MARGIN`)."""
    moment: str
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


class DoesNotFit(ValueError):
    """A run needs more than the machine has; the message says of what, how much, and which change mends it."""


def budget(
    config: RunConfig,
    shape: ModelShape,
    machine: Machine,
    stage: str = "train",
    tokens_in_dataset: int | None = None,
    evaluated: Mapping[str, str] = placement.EVALUATED,
) -> Budget:
    """VRAM, RAM, disk and hours of a stage on a machine.

    tokens_in_dataset: of all conversations, cut to seq_len. evaluated: name -> kind (model, adapter, gptq) of the
    models that an evaluation opens. Raises ValueError naming the field and its range.
    """
    refuse(config, shape, stage)
    stages = PARTS_OF_A_RUN if stage == "run" else (stage,)
    notes: tuple[str, ...] = ()
    opened: tuple[placement.Placement, ...] = ()
    if "inference" in stages:
        evaluation = placement.plan(config, {name: (kind, shape) for name, kind in evaluated.items()}, machine)
        opened, notes = tuple(evaluation.places.values()), evaluation.notes
        config = evaluation.config
    each = (vram_of(config, shape, machine, part, opened) for part in stages)
    memory = max(each, key=lambda found: found.process_gib - found.usable_gib)
    rams = {part: ram_of(config, shape, machine, part, opened) for part in stages}
    ram_parts = max(rams.values(), key=lambda parts: sum(parts.values()))
    ram = Ram(sum(ram_parts.values()), machine.host.ram_gib, ram_parts)
    disk_parts = host.disk(config, shape, stage)
    disk = Disk(sum(disk_parts.values()), machine.host.disk_gib, disk_parts)
    time = time_of(config, shape, machine, stages, tokens_in_dataset, opened)
    reasons = tuple(shortages(config, shape, machine, stage, memory, ram, disk))
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
    activations.checked_layers(shape, config)


def vram_of(
    config: RunConfig,
    shape: ModelShape,
    machine: Machine,
    stage: str,
    opened: tuple[placement.Placement, ...] = (),
) -> Vram:
    """The largest moment of a stage, of an evaluation with the largest of the models opened; nothing without a card."""
    if machine.gpu is None:
        return Vram(0.0, 0.0, 0.0, machine.vram_gib, machine.vram_gib, "", {})
    capability = machine.gpu.capability
    if stage != "inference":
        return largest(config, shape, machine, stage, STAGE_MOMENTS[stage](shape, config, capability))
    each = (
        largest(config, shape, machine, stage, placement.vram_moments(found, config, shape, capability), found)
        for found in counted(opened)
    )
    return max(each, key=lambda found: found.process_gib)


def largest(
    config: RunConfig,
    shape: ModelShape,
    machine: Machine,
    stage: str,
    moments: dict[str, dict[str, float]],
    opened: placement.Placement | None = None,
) -> Vram:
    """The largest of a stage's moments (component -> bytes each), and what is taken beside the allocator's tensors."""
    moment = max(moments, key=lambda name: sum(moments[name].values()))
    parts = {name: size / GIB for name, size in moments[moment].items() if size}
    allocated = sum(parts.values())
    paged = vram.optimizer_states(shape, config)[1] / GIB if stage == "train" else 0.0
    if opened:
        beyond = placement.beyond_gib(opened, config, shape, allocated)
    else:
        beyond = beyond_gib(config, shape, stage, allocated)
    parts |= {"reserved beyond it": beyond} | ({"paged optimizer states": paged} if paged else {})
    parts["CUDA context"] = machine.gpu.context_gib
    usable = planning.usable_gib(config, shape, machine, stage)
    return Vram(allocated, allocated + beyond, sum(parts.values()), machine.vram_gib, usable, moment, parts)


def counted(opened: tuple[placement.Placement, ...]) -> tuple[placement.Placement, ...]:
    """The models that are opened. A 16-bit model may be left out with a note; without any other, nothing fits."""
    return tuple(found for found in opened if found.kind != "model" or not found.problem) or opened


def beyond_gib(config: RunConfig, shape: ModelShape, stage: str, allocated_gib: float) -> float:
    """GiB that the allocator reserves beyond its tensors' peak; merge and GPTQ: read off merge_quantize.csv."""
    if stage == "train":
        return vram.beyond(shape, config) / GIB
    merge = 0.57 if host.merges_into_nf4(config) else 0.125  # NF4's row was measured before segments could grow
    return allocated_gib * {"merge": merge, "quantize": 0.52}[stage]


def ram_of(
    config: RunConfig, shape: ModelShape, machine: Machine, stage: str, opened: tuple[placement.Placement, ...] = ()
) -> dict[str, float]:
    """Component -> GiB of host memory at a stage's peak, of an evaluation with the largest of the models opened."""
    if stage != "inference":
        return host.ram(config, shape, machine, stage)
    each = (
        host.ram(
            config,
            shape,
            machine,
            stage,
            placement.vram_moments(found, config, shape),
            placement.host_gib(found, shape),
        )
        for found in counted(opened)
    )
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
        for name, hours in pace.stage_hours(config, shape, machine, stage, tokens_in_dataset, places).items():
            parts[name] = max(parts.get(name, 0.0), hours) if name == "download" else parts.get(name, 0.0) + hours
    total = sum(parts.values())
    session_h = machine.host.session_h
    sessions = 1 if session_h is None else math.ceil(total / session_h)
    step, steps = 0.0, 0
    if "train" in stages:
        steps, mean_tokens = pace.steps(config, tokens_in_dataset)
        step = pace.step_s(config, shape, machine, mean_tokens)
    return Time(step, steps, total, sessions, parts)


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
            f"{planning.disk_remedy(config, disk.parts)}"
        )
    written_gib, limit_gib = disk.peak_gib - disk.parts.get("base, 16 bits", 0.0), machine.host.kept_gib
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
    said = families.fallbacks(shape.family, chosen)
    return Plan(chosen, budget(chosen, shape, machine), (*reasons, *said))


def plan_in(config: RunConfig, batch_size: int, shape: ModelShape, machine: Machine, continued: str) -> Plan:
    """The plan in micro-batches of a given size, those of a checkpoint that is continued, as little recomputed as fits.

    Where no way of computing them fits, the leanest, and its budget says by how much not.
    """
    refuse(config, shape, "train")
    chosen = planning.in_batches(config, batch_size, shape, machine, training_needs(shape, machine))
    split, found = (
        f"micro-batches of {chosen.train.batch_size} × {chosen.train.accumulation}",
        budget(chosen, shape, machine),
    )
    need, limit = found.vram.process_gib, found.vram.limit_gib
    if machine.gpu and need > found.vram.usable_gib:
        said = f"{continued} was made in {split}, which need at least {need:.1f} GiB of VRAM, this {machine.name} has"
        remedy = "continue on a card with more, or start anew with resume='never'"
        return Plan(chosen, replace(found, reasons=(f"{said} {limit:.1f}: {remedy}",)), ())
    layers = f"{activations.checked_layers(shape, chosen)} of {shape.layers} layers are checkpointed"
    memory = f", and {need:.1f} of {limit:.1f} GiB are needed" if machine.gpu else ""
    return Plan(chosen, found, (f"{continued} was made in {split}, and training goes on in them: {layers}{memory}",))


def requested(config: RunConfig, plan: Plan) -> RunConfig:
    """What runs when this is asked for: the plan's way of computing it, as long as context and rank stay.

    Where the plan had to cut one of them the request does not fit, even with every layer checkpointed.
    """
    if config.train.checkpointing != "auto":
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


def summary(budget: Budget) -> dict[str, str]:
    """A row of a table: peaks of VRAM, RAM and disk against what there is, hours, and whether it fits."""
    sessions = f", {budget.time.sessions} sessions" if budget.time.sessions > 1 else ""
    return {
        "VRAM, GiB": against(budget.vram.process_gib, budget.vram.limit_gib),
        "RAM, GiB": against(budget.ram.peak_gib, budget.ram.limit_gib),
        "disk, GiB": against(budget.disk.peak_gib, budget.disk.limit_gib),
        "hours": f"{budget.time.total_h:.2f}{sessions}",
        "fits": "yes" if budget.fits else "no: " + "; ".join(budget.reasons),
    }


def against(need_gib: float, limit_gib: float) -> str:
    """`4.6 of 14.6`, or "none" where nothing is needed.

    >>> against(4.61, 14.56), against(0.0, 14.56)
    ('4.6 of 14.6', 'none')
    """
    return f"{need_gib:.1f} of {limit_gib:.1f}" if need_gib else "none"


def against_measured(budget: Budget, measured: dict) -> list[dict]:
    """Predicted beside measured, a row for each quantity that a stage measured; only RAM and time without a card."""
    on_gpu = budget.machine.gpu is not None
    hours = budget.time.parts
    result = {"merge": "merged model", "quantize": "GPTQ model"}.get(budget.stage, "")
    predicted = {
        "peak_allocated_gib": ("VRAM allocated, GiB", budget.vram.allocated_gib if on_gpu else 0.0, 1.0),
        "peak_reserved_gib": ("VRAM reserved, GiB", budget.vram.reserved_gib if on_gpu else 0.0, 1.0),
        "peak_anonymous_gib": ("RAM, GiB", budget.ram.peak_gib, 1.0),
        "step_s": ("step, s", budget.time.step_s, 1.0),
        "train_s": ("training, s", 3600 * hours.get("training", 0.0), 1.0),
        "merge_s": ("merging, s", 3600 * hours.get("merging", 0.0), 1.0),
        "total_s": ("GPTQ, s", 3600 * hours.get("GPTQ", 0.0), 1.0),
        "size_bytes": ("result on disk, GiB", budget.disk.parts.get(result, 0.0), 1 / GIB),
    }
    return [
        {
            "quantity": name,
            "predicted": round(value, 3),
            "measured": round(measured[key] * unit, 3),
            "difference %": round(100 * (value / (measured[key] * unit) - 1), 1),
        }
        for key, (name, value, unit) in predicted.items()
        if value and measured.get(key)
    ]


def guide_figures() -> list[dict]:
    """What the guides say of a 7B's needs, and what the formulas give: claim, says, formula gives, verdict."""
    from helpers.budget import guides  # it asks this file for budgets

    return guides.figures()


def to_json(budget: Budget, plan: Plan) -> dict:
    """What `python -m helpers budget --json` prints."""
    return {
        "vram": asdict(budget.vram),
        "ram": asdict(budget.ram),
        "disk": asdict(budget.disk),
        "time": asdict(budget.time),
        "fits": budget.fits,
        "reasons": list(budget.reasons),
        "notes": list(budget.notes),
        "plan": asdict(plan.config),
        "plan_reasons": list(plan.reasons),
    }


def table(budget: Budget) -> str:
    """The budget as text, a bar a component, for people."""
    lines = [f"{STAGE_NAMES[budget.stage]} on {budget.machine.name}"]
    limit = max(budget.vram.limit_gib, budget.vram.process_gib, 1e-9)
    for name, size in budget.vram.parts.items():
        lines.append(f"  {name:<46}{size:6.2f} GiB  {'█' * math.ceil(40 * size / limit)}")
    if budget.vram.parts:
        lines.append(f"  {'VRAM, all of it':<46}{budget.vram.process_gib:6.2f} GiB of {budget.vram.limit_gib:.2f}")
    lines.append(f"  {'RAM':<46}{budget.ram.peak_gib:6.2f} GiB of {budget.ram.limit_gib:.2f}")
    lines.append(f"  {'disk':<46}{budget.disk.peak_gib:6.2f} GiB of {budget.disk.limit_gib:.2f}")
    lines.append(f"  {'time':<46}{time_text(budget)}")
    lines += [f"{note[0].upper()}{note[1:]}." for note in budget.notes]
    lines += [f"It does not fit: {reason}" for reason in budget.reasons] or ["It fits."]
    return "\n".join(lines)


def time_text(budget: Budget) -> str:
    """Steps, seconds a step, hours, sessions."""
    time = budget.time
    step_s = f"{time.step_s:.0f}" if time.step_s >= 10 else f"{time.step_s:.2g}"
    steps = f"{time.steps:,} steps of {step_s} s, " if time.steps else ""
    sessions = f", {time.sessions} sessions with resume" if time.sessions > 1 else ""
    return f"{steps}{time.total_h:.2f} h{sessions}"


STAGE_MOMENTS = {
    "train": vram.moments,
    "merge": vram.merging,
    "quantize": vram.quantization,
}
STAGE_NAMES = {
    "train": "training",
    "merge": "merging",
    "quantize": "GPTQ",
    "inference": "evaluation",
    "export": "the export",
    "run": "the whole run",
}
PARTS_OF_A_RUN = ("train", "merge", "quantize", "inference")
