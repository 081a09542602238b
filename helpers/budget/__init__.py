"""What a run needs of VRAM, RAM, disk and hours, before anything is downloaded; and a plan that fits. No torch.

>>> from helpers import hardware
>>> from helpers.models import profile, shape
>>> found = budget(profile("mistral-7b", checkpointing="all"), shape("mistral-7b-v0.3"), hardware.machine("t4"))
>>> found.fits, found.vram.phase
(True, "the upper checkpointed layer's backward pass")

Here is what others call; the arithmetic lies below it:

    estimate.py                                     a budget from its parts, a plan, what runs of it
    step.py vram.py activations.py                  a training step: what computes, tensor by tensor
    host.py hours.py placement.py                   RAM and disk, seconds, evaluated models on a small GPU
    export.py                                       GGUF files: bytes, minutes, and where they run
    planning.py guides.py nf4.py                    the search for what fits, claims of guides, 4 bits
    sharding.py ways.py                             several GPUs: what each holds, and which way is fastest
"""

import math
from dataclasses import asdict
from typing import Any

from helpers.budget.estimate import (
    STAGE_NAMES,
    STAGES,
    Budget,
    Disk,
    DoesNotFit,
    Plan,
    Ram,
    Settled,
    Time,
    Vram,
    budget,
    check,
    plan,
    plan_in,
    requested,
    settle,
    vram_of,
)
from helpers.budget.guides import figures as guide_figures
from helpers.budget.hours import LOOKING, duration

__all__ = (
    "LOOKING", "STAGES", "Budget", "Disk", "DoesNotFit", "Plan", "Ram", "Settled", "Time", "Vram", "against_measured",
    "budget", "check", "compared", "guide_figures", "plan", "plan_in", "requested", "settle", "summary", "table",
    "to_json", "took", "vram_of",
)  # fmt: skip
GIB = 2**30
UNTIMED = "times are predicted for GPUs only"


def summary(budget: Budget) -> dict[str, str]:
    """A row of a table: peaks of VRAM, RAM and disk against what there is, time, and whether it fits."""
    sessions = f", {budget.time.sessions} sessions" if budget.time.sessions > 1 else ""
    return {
        "VRAM, GiB": against(budget.vram.process_gib, budget.vram.limit_gib),
        "RAM, GiB": against(budget.ram.peak_gib, budget.ram.limit_gib),
        "disk, GiB": against(budget.disk.peak_gib, budget.disk.limit_gib),
        "time": f"{took(budget) or 'not predicted'}{sessions}",
        "fits": "yes" if budget.fits else "no: " + "; ".join(budget.reasons),
    }


def against(need_gib: float, limit_gib: float) -> str:
    """`4.6 of 14.6`, or "none" where nothing is needed.

    >>> against(4.61, 14.56), against(0.0, 14.56)
    ('4.6 of 14.6', 'none')
    """
    return f"{need_gib:.1f} of {limit_gib:.1f}" if need_gib else "none"


def against_measured(budget: Budget, measured: dict) -> list[dict]:
    """Predicted beside measured, a row for each quantity that a stage measured; without a GPU no VRAM is.

    Seconds of a CPU are measured and not predicted.
    """
    on_gpu = budget.machine.gpu is not None
    hours = budget.time.parts
    result = {"merge": "merged model", "quantize": "GPTQ model"}.get(budget.stage, "")
    stage = f" ({STAGE_NAMES[budget.stage]})" if result else ""  # rows of these two stand in one table
    predicted = {
        "peak_allocated_gib": (f"VRAM allocated{stage}, GiB", budget.vram.allocated_gib if on_gpu else 0.0, 1.0),
        "peak_reserved_gib": (f"VRAM reserved{stage}, GiB", budget.vram.reserved_gib if on_gpu else 0.0, 1.0),
        "peak_anonymous_gib": (f"RAM{stage}, GiB", budget.ram.peak_gib, 1.0),
        "step_s": ("step, s", budget.time.step_s, 1.0),
        "reference_s": ("reference, s", 3600 * hours.get("reference", 0.0), 1.0),
        "train_s": ("training, s", 3600 * (hours.get("training", 0.0) + hours.get(LOOKING, 0.0)), 1.0),
        "merge_s": ("merging, s", 3600 * hours.get("merging", 0.0), 1.0),
        "total_s": ("GPTQ, s", 3600 * hours.get("GPTQ", 0.0), 1.0),
        "size_bytes": (f"{result} on disk, GiB", budget.disk.parts.get(result, 0.0), 1 / GIB),
    }
    return [
        {
            "quantity": name,
            **compared(value, measured[key] * unit, on_gpu or not key.endswith("_s")),
        }
        for key, (name, value, unit) in predicted.items()
        if value and measured.get(key)
    ]


def compared(predicted: float, measured: float, known: bool = True) -> dict[str, Any]:
    """A prediction, what was measured, and by how much they differ; known: whether it is predicted here at all.

    >>> compared(4.0, 5.0), compared(4.0, 5.0, known=False)["predicted"]
    ({'predicted': 4.0, 'measured': 5.0, 'difference %': -20.0}, 'on GPUs only')
    """
    if not known:
        return {"predicted": "on GPUs only", "measured": round(measured, 3), "difference %": None}
    difference = round(100 * (predicted / measured - 1), 1)
    return {"predicted": round(predicted, 3), "measured": round(measured, 3), "difference %": difference}


def to_json(settled: Settled) -> dict:
    """What `python -m helpers budget --json` prints."""
    budget, plan = settled.budget, settled.plan
    return {
        # "moment" is what scripts read it by
        "vram": {"moment" if name == "phase" else name: value for name, value in asdict(budget.vram).items()},
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
    wide = max(map(len, [*budget.vram.parts, "VRAM, all of it"])) + 2 if budget.vram.parts else len("disk") + 2
    lines = [f"{STAGE_NAMES[budget.stage]} on {budget.machine.name}"]
    limit = max(budget.vram.limit_gib, budget.vram.process_gib, 1e-9)
    for name, size in budget.vram.parts.items():
        lines.append(f"  {name:<{wide}}{size:6.2f} GiB  {'█' * math.ceil(40 * size / limit)}")
    if budget.vram.parts:
        lines.append(f"  {'VRAM, all of it':<{wide}}{budget.vram.process_gib:6.2f} GiB of {budget.vram.limit_gib:.2f}")
    lines.append(f"  {'RAM':<{wide}}{budget.ram.peak_gib:6.2f} GiB of {budget.ram.limit_gib:.2f}")
    lines.append(f"  {'disk':<{wide}}{budget.disk.peak_gib:6.2f} GiB of {budget.disk.limit_gib:.2f}")
    lines.append(f"  {'time':<{wide}}{time_text(budget)}")
    lines += [f"{note[0].upper()}{note[1:]}." for note in budget.notes]
    lines += [f"It does not fit: {reason}" for reason in budget.reasons] or ["It fits."]
    return "\n".join(lines)


def time_text(budget: Budget) -> str:
    """Steps, seconds a step, how long, sessions; of a CPU the steps alone."""
    time = budget.time
    if not took(budget):
        return f"{f'{time.steps:,} steps; ' if time.steps else ''}{UNTIMED}"
    step_s = f"{time.step_s:.0f}" if time.step_s >= 10 else f"{time.step_s:.2g}"
    steps = f"{time.steps:,} steps of {step_s} s, " if time.steps else ""
    sessions = f", {time.sessions} sessions with resume" if time.sessions > 1 else ""
    return f"{steps}{took(budget)}{sessions}"


def took(budget: Budget) -> str:
    """How long a stage takes, as people say it; "" on a CPU: they differ too much for a prediction to be shown.

    An export is a CPU's work everywhere, and its minutes are of one.
    """
    return duration(budget.time.total_h) if budget.machine.gpu or budget.stage == "export" else ""
