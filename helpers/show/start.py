"""What is said before a run, and what stops one: which model, on whose data, with which settings, for how long."""

import math
from collections.abc import Mapping
from html import escape
from pathlib import Path
from typing import Any

from helpers import budget, hardware
from helpers.budget.hours import duration
from helpers.config import RunConfig, flat
from helpers.hardware import Machine
from helpers.models import ModelShape
from helpers.profiles import PROFILES, profile
from helpers.show import panel
from helpers.show.shown import say
from helpers.show.words import steps_of
from helpers.workspace import choices

CUT = ("seq_len", "rank", "targets")
"""What is never trained otherwise than asked without a yes."""
LOOKS = 6
DEMO = "background:#f9a825;color:#1a1a1a;border-radius:4px;padding:8px 12px;max-width:756px;line-height:1.45"
LINE = "border-left:5px solid #0072B2;padding:4px 10px;max-width:756px;line-height:1.5"


def profile_of(asked: str, machine: Machine) -> str:
    """The profile that a notebook runs: the one asked for, or what the machine can train.

    Where "auto" had to take the toy model, a coloured banner says so and what to change.
    """
    if asked != "auto":
        return asked
    name = hardware.suggested_profile(machine)
    if name == "tiny":
        say(f"<div style='{DEMO}' role='alert'>{demo(machine)}</div>")
    return name


def demo(machine: Machine) -> str:
    """The banner's words, HTML."""
    why = machine.unusable or (
        f"{machine.name} has too little memory for a 7B" if machine.gpu else "this machine shows no GPU"
    )
    return (
        f"<b>DEMO: a toy model of 4 million weights, not Mistral 7B</b>, because {escape(why)}. Everything below "
        "works, and its answers are a toy's. In Colab: <b>Runtime → Change runtime type → T4 GPU</b>, then Run all."
    )


def check(config: RunConfig, plan: budget.Plan, accepted: bool = False) -> None:
    """Raise DoesNotFit where the plan cuts context, rank or targets of what is asked, and nobody has accepted that.

    Nothing is raised where no plan fits at all: `budget.check` says why.
    """
    asked, planned = flat(config), flat(plan.config)
    cut = {name: planned[name] for name in CUT if planned[name] != asked[name]}
    if not cut or accepted or not plan.budget.fits:
        return
    wanted = choices.words({name: asked[name] for name in cut})
    raise budget.DoesNotFit(
        f"{wanted}: too much for this {plan.budget.machine.name}. What fits is {choices.words(cut)}"
        f"{panel.in_time(plan.budget)}. Nothing is cut without your word: press “{panel.TAKE}” under the "
        "sliders and Run all, or set accept_plan = True among the parameters, or ask for less"
    )


def data_words(source: str, name: str, conversations: int | None = None) -> str:
    """Whose data it is: the profile's sample, or yours, and how many conversations where that is known.

    >>> data_words("/tmp/hats.csv", "tiny", 1204)
    'YOUR data hats.csv, 1,204 conversations'
    >>> data_words(PROFILES["tiny"]["source"], "tiny")
    'the SAMPLE conversations.jsonl'
    """
    own = source != (profile(name).data.source if name in PROFILES else None)
    count = "" if conversations is None else f", {conversations:,} conversations"
    return f"{'YOUR data' if own else 'the SAMPLE'} {Path(source).name}{count}"


def line(config: RunConfig, shape: ModelShape, prepared: Mapping[str, Any], needs: budget.Budget) -> None:
    """Show in one bold line what will be trained. prepared: the manifest of the prepared data."""
    say(f"<div style='{LINE}'>{words(config, shape, prepared, needs)}</div>")


def words(config: RunConfig, shape: ModelShape, prepared: Mapping[str, Any], needs: budget.Budget) -> str:
    """The line as HTML: model, data, settings, steps, and hours where a GPU is timed."""
    made = prepared["measurements"]
    trained_on = made["kept"] - made["heldout_conversations"]
    count = shape.parameters
    size = f"{count / 1e9:.1f} billion" if count >= 1e9 else f"{count / 1e6:.0f} million"
    steps = steps_of(config, made["train_rows"])
    hours = steps * needs.time.step_s / 3600 + needs.time.parts.get(budget.LOOKING, 0.0)
    took = f", about {duration(hours)}" if needs.machine.gpu else ""
    facts = [
        f"rank {config.adapter.rank}",
        f"alpha {config.adapter.alpha:g}",
        f"learning rate {panel.label('learning_rate', config.train.learning_rate, shape)}",
        f"context {config.data.seq_len:,} tokens",
        f"{steps:,} steps{took}",
    ]
    data = escape(data_words(made["source"], config.profile, trained_on))
    model = escape(f"{Path(config.model.model).name} ({size} weights)")
    return f"Training <b>{model}</b> on <b>{data}</b> · <b>{' · '.join(facts)}</b>"


def several(config: RunConfig, machine: Machine) -> None:
    """Where there are several GPUs, show what they are good for here, and which of them train; else nothing."""
    if machine.gpu is None or machine.gpu.count == 1:
        return
    count, asked = machine.gpu.count, config.train.gpus
    training = count if asked == "all" else min(asked, count)
    if training == 1:
        now = f"One of them trains. With <code>gpus = {count}</code> among the parameters, {count} share each step."
    else:
        held = "each GPU holds the whole model" if config.train.sharding == "none" else "they divide the weights"
        now = f"{training} of them train: each step's micro-batches are shared, {held}."
    say(
        f"<div style='{LINE}'><b>{count} × {escape(machine.gpu.name)}.</b> {now} The run is the same on any number of "
        "GPUs, step by step, and goes on with another number after an interruption.</div>"
    )


def watched(config: RunConfig, prepared: Mapping[str, Any]) -> RunConfig:
    """The configuration with some six looks at held-out conversations on its way, unless it says how many itself.

    A look costs a forward pass of each. It changes nothing of what is learned, and shows what is only learned by heart.
    """
    made = prepared["measurements"]
    if config.train.eval_steps or not made["heldout_rows"]:
        return config
    return config.with_values(eval_steps=max(1, math.ceil(steps_of(config, made["train_rows"]) / LOOKS)))
