"""What a run needs of VRAM, RAM, disk and hours, before anything is downloaded; and a plan that fits. No torch.

>>> from helpers import hardware
>>> from helpers.models import profile, shape
>>> found = budget(profile("mistral-7b", checkpointing="all"), shape("mistral-7b-v0.3"), hardware.machine("t4"))
>>> found.fits, found.vram.moment
(True, "the upper checkpointed layer's backward pass")
"""

import math
from dataclasses import asdict, dataclass

from helpers import vram
from helpers.config import RunConfig
from helpers.hardware import Machine
from helpers.models import ModelShape

GIB = 2**30
STAGES = ("train", "merge", "quantize", "inference", "run")


@dataclass(frozen=True)
class Vram:
    """VRAM at the moment of the peak; parts, in GiB, sum to process_gib."""

    allocated_gib: float
    reserved_gib: float
    process_gib: float
    limit_gib: float
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
    """Hours; sessions is how many a host's limit makes of them, with resume."""

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


@dataclass(frozen=True)
class Plan:
    """A configuration without "auto", its budget, and why it was chosen."""

    config: RunConfig
    budget: Budget
    reasons: tuple[str, ...]


def budget(
    config: RunConfig, shape: ModelShape, machine: Machine, stage: str = "train", tokens_in_dataset: int | None = None
) -> Budget:
    """VRAM, RAM, disk and hours of a stage on a machine.

    tokens_in_dataset: of all conversations, cut to seq_len. Raises ValueError naming the field and its range.
    """
    check(config, shape, stage)
    memory = vram_of(config, shape, machine, stage)
    ram = Ram(2.0, machine.host.ram_gib, {"Python and libraries": 2.0})
    disk = Disk(20.0, machine.host.disk_gib, {"base, 16 bits": 14.5})
    time = Time(4.0, config.train.max_steps or 1000, 4.0 * 1000 / 3600, 1, {"train": 4.0 * 1000 / 3600})
    reasons = []
    if machine.gpu and memory.process_gib > memory.limit_gib:
        reasons.append(f"needs {memory.process_gib:.1f} GiB of VRAM, this {machine.name} has {memory.limit_gib:.1f}")
    return Budget(stage, machine, memory, ram, disk, time, not reasons, tuple(reasons))


def check(config: RunConfig, shape: ModelShape, stage: str) -> None:
    """Raise ValueError for what no machine can do."""
    if stage not in STAGES:
        raise ValueError(f"stage must be one of {', '.join(STAGES)}, not {stage!r}")
    if config.data.seq_len > shape.max_context:
        raise ValueError(
            f"seq_len must be at most {shape.max_context}, what {shape.name} was made for, not {config.data.seq_len}"
        )
    unknown = [name for name in config.adapter.target_modules if name not in shape.linears]
    if unknown:
        raise ValueError(f"targets must be among {', '.join(shape.linears)}, all-linear or attention, not {unknown[0]}")
    vram.checked_layers(shape, config)


def vram_of(config: RunConfig, shape: ModelShape, machine: Machine, stage: str) -> Vram:
    """The largest moment of a stage."""
    if machine.gpu is None:
        return Vram(0.0, 0.0, 0.0, 0.0, "", {})
    moments = vram.inference(shape, config) if stage == "inference" else vram.moments(shape, config)
    moment = max(moments, key=lambda name: sum(moments[name].values()))
    parts = {name: size / GIB for name, size in moments[moment].items() if size}
    allocated = sum(parts.values())
    paged = vram.optimizer_states(shape, config)[1] / GIB
    reserved = allocated * 1.03 + 0.05
    parts |= {"reserved beyond it": reserved - allocated, "paged optimizer states": paged}
    parts["CUDA context"] = machine.gpu.context_gib
    return Vram(allocated, reserved, sum(parts.values()), machine.vram_gib, moment, parts)


def plan(config: RunConfig, shape: ModelShape, machine: Machine) -> Plan:
    """The same run with nothing "auto": as few checkpointed layers as fit."""
    if config.train.checkpointing != "auto":
        found = budget(config, shape, machine)
        return Plan(config, found, found.reasons)
    counts = range(shape.layers + 1) if machine.gpu else [0]
    for count in counts:
        candidate = config.with_values(checkpointing=count)
        found = budget(candidate, shape, machine)
        if found.fits:
            break
    return Plan(candidate, found, (f"{count} of {shape.layers} layers are checkpointed: the fewest that fit",))


def to_json(budget: Budget, plan: Plan) -> dict:
    """What `python -m helpers budget --json` prints."""
    return {
        "vram": asdict(budget.vram),
        "ram": asdict(budget.ram),
        "disk": asdict(budget.disk),
        "time": asdict(budget.time),
        "fits": budget.fits,
        "reasons": list(budget.reasons),
        "plan": asdict(plan.config),
    }


def table(budget: Budget) -> str:
    """The budget as text, a bar a component, for people."""
    lines = [f"{budget.stage} on {budget.machine.name}"]
    limit = max(budget.vram.limit_gib, budget.vram.process_gib, 1e-9)
    for name, size in budget.vram.parts.items():
        lines.append(f"  {name:<46}{size:6.2f} GiB  {'█' * math.ceil(40 * size / limit)}")
    lines.append(f"  {'process':<46}{budget.vram.process_gib:6.2f} GiB of {budget.vram.limit_gib:.2f}")
    lines.append(f"RAM {budget.ram.peak_gib:.1f} of {budget.ram.limit_gib:.1f} GiB, ")
    lines += [f"- {reason}" for reason in budget.reasons] or ["it fits"]
    return "\n".join(lines)
