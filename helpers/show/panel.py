"""RunConfig <-> ipywidgets: sliders for the knobs of a run and, under them, what the run needs, live.

Uses only what ipywidgets 7.7 (Colab) and 8 share. Without a screen, the panel shows its summary in words.

>>> from helpers import hardware, models
>>> config = models.profile("mistral-7b", rank=8)
>>> sliders = panel(config, models.shape(config.model.model), hardware.machine("t4"))
>>> config_of(sliders) == config
True
"""

import re
from collections.abc import Callable
from dataclasses import replace
from html import escape
from typing import Any
from zlib import crc32

import ipywidgets
from ipywidgets import Layout

from helpers import budget
from helpers.budget import ways
from helpers.budget.hours import duration
from helpers.config import RunConfig, flat
from helpers.hardware import GPUS, Machine
from helpers.hardware import machine as machine_of
from helpers.models import KNOWN, ModelShape
from helpers.models import shape as shape_of
from helpers.profiles import PROFILES, profile
from helpers.show.shown import Shown, tipped
from helpers.show.words import joined

DOUBLINGS = [2**power for power in range(10)]
COUNTS = sorted({*DOUBLINGS[:8], 3, 6, 12, 24, 48})
LEFT = {
    "rank": ("rank r", DOUBLINGS[:9]),
    "alpha": ("alpha α", DOUBLINGS),
    "learning_rate": (
        "learning rate",
        [float(f"{digit}e{power}") for power in (-6, -5, -4, -3) for digit in (1, 1.5, 2, 3, 5, 7)] + [1e-2],
    ),
    "targets": ("targets", ["all-linear", "attention", "q_proj,v_proj"]),
}
RIGHT = {
    "seq_len": ("context", [64 * count for count in sorted({*DOUBLINGS, *(3 * count for count in DOUBLINGS[:9])})]),
    "batch_size": ("micro-batch", COUNTS),
    "accumulation": ("accumulation", COUNTS),
    "checkpointing": ("checkpointed", []),  # as many as the model has layers
}
KNOBS = LEFT | RIGHT
TIPS = {
    "rank": "How thin the two trained matrices are. 4 to 8 for one simple task, 16 to 32 to follow instructions, 64 "
    "and more for a field of its own",
    "alpha": "The adapter counts alpha ÷ rank times. Twice the rank is usual",
    "learning_rate": "How large a step is. Too high and the loss jumps, too low and nothing is learned",
    "targets": "Which matrices of each layer get an adapter",
    "seq_len": "Tokens of one training sequence, at most. Longer conversations lose their last turns",
    "batch_size": "Conversations that are computed at once: faster, and more memory",
    "accumulation": "Micro-batches that make one optimizer step together: more of them need no more memory",
    "checkpointing": "Layers that save their input only and compute the rest again: less memory, more time. "
    "auto: as few as fit",
}
"""What a control is for, in plain words; shown when the mouse rests on its label."""
PRESETS = {
    "gentle": (
        {"rank": 8, "alpha": 16},
        0.5,
        "Small adapter, half the learning rate: little data, or a change of tone",
    ),
    "balanced": ({"rank": 16, "alpha": 32}, 1.0, "What most people need"),
    "thorough": ({"rank": 64, "alpha": 128}, 0.5, "Large adapter, small steps: much data, or a field of its own"),
}
"""Name -> settings, share of the profile's learning rate, what for."""
HERE_NOW = "this machine"
AS_CHOSEN = "as chosen"
OTHERS = {
    "keep_attention": "attention outputs kept",
    "offload_activations": "activations in host memory",
    "offload_gib": "host memory for them, GiB",
}
"""How the proposal says what no control shows."""

# One colour a component, whatever else is in the bar: weights blue, adapter green, activations orange, the rest grey.
COLOURS = {
    "4-bit weights": "#4c78a8",
    "AQLM codes": "#4c78a8",
    "8-bit weights": "#4c78a8",
    "16-bit weights": "#9ecae9",
    "32-bit weights": "#9ecae9",
    "quantization scales": "#2f5582",
    "codebooks and scales": "#2f5582",
    "LoRA weights": "#54a24b",
    "LoRA gradients": "#88c87f",
    "adapters in 16 bits": "#b5dcae",
    "optimizer states": "#2f7d5b",
    "paged optimizer states": "#79b8a5",
    "optimizer buffers": "#a9d6c9",
    "checkpointed activations": "#ffe2bd",
    "saved activations": "#f58518",
    "recomputed activations (one layer)": "#c9620c",
    "layer gradients": "#e0a93b",
    "temporary buffers": "#ecc56f",
    "attention scores": "#e45756",
    "logits and loss": "#b279a2",
    "keys and values": "#d67195",
    "model and activations, in fp32": "#4c78a8",
    "Python and libraries": "#a6a6a6",
    "cuBLAS workspace": "#c9c2b8",
    "allocator overhead": "#a6a6a6",
    "CUDA context": "#707070",
    "smaller parts": "#d9d2c8",
}
SPARE_COLOURS = ["#8c6bb1", "#9d755d", "#439894", "#b79a20", "#d88aa5", "#6b8fb3"]
MARK = "cursor:help;border:1px solid currentColor;border-radius:50%;padding:0 5px;font-size:11px;opacity:.7"
TAKE = "Take the proposal"
GOOD, LONG, BAD = "#2e7d32", "#b8860b", "#c62828"
STYLE = f"""<style>
.needs{{max-width:756px;font-size:13px;line-height:1.45;margin:2px}}
.needs b{{font-weight:600}}
.needs .line{{display:flex;justify-content:space-between;flex-wrap:wrap;gap:0 12px;margin-bottom:3px}}
.needs .bar{{position:relative;overflow:hidden;background:rgba(128,128,128,.2);border-radius:3px;height:22px}}
.needs .thin{{height:6px}}
.needs .bar i{{position:absolute;top:0;bottom:0}}
.needs .bar .over{{background:repeating-linear-gradient(45deg,{BAD} 0 4px,rgba(255,255,255,.5) 4px 8px)}}
.needs .key{{display:grid;grid-template-columns:repeat(auto-fill,minmax(232px,1fr));gap:0 14px;font-size:12px}}
.needs .key{{margin:6px 0 10px}}
.needs .key i{{display:inline-block;width:10px;height:10px;border-radius:2px;margin-right:6px}}
.needs .key div{{display:flex;align-items:baseline}}
.needs .key b,.needs .key em{{margin-left:auto;font-style:normal;font-variant-numeric:tabular-nums}}
.needs .rest{{display:grid;grid-template-columns:repeat(auto-fit,minmax(200px,1fr));gap:4px 18px;margin-bottom:10px}}
.needs .verdict{{border-left:5px solid;border-radius:3px;padding:5px 10px}}
</style>"""


class Panel(Shown):
    """Sliders that start at a configuration, the budget of what they show, and a button that takes the plan's.

    Words stand in its place where nobody can move a slider.
    """

    def __init__(
        self, config: RunConfig, shape: ModelShape, machine: Machine, moved: Callable[[RunConfig], None] | None = None
    ):
        self.base, self.shape, self.machine = config, shape, machine
        self.moved: Callable[[RunConfig], None] | None = None  # nobody has moved anything yet
        values = values_of(config, shape)
        self.controls = {name: control(name, values[name], shape) for name in KNOBS}
        self.derived, self.picture, self.proposal = (ipywidgets.HTML() for _ in range(3))
        self.button = ipywidgets.Button(description=TAKE, icon="check", layout=Layout(width="160px", flex="0 0 auto"))
        gpus = [(gpu.name if gpu.count == 1 else f"{gpu.count} × {gpu.name}", key) for key, gpu in GPUS.items()]
        models = sorted({known.name for known in KNOWN.values()})
        self.looked_at = {
            "GPU": choice_of("what if on", [(HERE_NOW, HERE_NOW), *gpus]),
            "model": choice_of("what if it were", [(AS_CHOSEN, AS_CHOSEN), *((name, name) for name in models)]),
        }
        self.typed = tipped(
            ipywidgets.Text(
                placeholder="or type: rank=24, context=3000, then Enter",
                continuous_update=False,
                layout=Layout(width="340px"),
            ),
            "Settings by name, also between the sliders' stops",
        )
        self.presets = {
            name: ipywidgets.Button(description=name, tooltip=tip, layout=Layout(width="94px"))
            for name, (_, _, tip) in PRESETS.items()
        }
        self.presets["reset"] = ipywidgets.Button(
            description="reset", tooltip="Back to the profile's own settings", layout=Layout(width="74px")
        )
        columns = [
            ipywidgets.VBox(
                [explained(name, self.controls[name]) for name in names],
                layout=Layout(width="374px", margin="0 4px 0 0"),
            )
            for names in (LEFT, RIGHT)
        ]
        super().__init__(
            [
                ipywidgets.HBox([*self.presets.values(), self.typed], layout=Layout(flex_flow="row wrap")),
                ipywidgets.HBox(columns, layout=Layout(flex_flow="row wrap")),
                ipywidgets.HBox(list(self.looked_at.values()), layout=Layout(flex_flow="row wrap")),
                self.derived,
                self.picture,
                ipywidgets.HBox([self.button, self.proposal], layout=Layout(align_items="center")),
            ],
            layout=Layout(max_width="780px"),
        )
        self.listen(True)
        self.button.on_click(lambda _: self.show(self.plan.config))
        for name, button in self.presets.items():
            button.on_click(lambda _, name=name: self.show(preset(self.base, name, self.shape)))
        for widget in self.looked_at.values():
            widget.observe(self.redraw, "value")
        self.typed.observe(self.take_typed, "value")
        self.redraw()
        self.moved = moved

    def listen(self, listening: bool) -> None:
        """Redraw when a control moves, or leave that for a while."""
        for widget in self.controls.values():
            (widget.observe if listening else widget.unobserve)(self.redraw, "value")

    def config(self) -> RunConfig:
        """The configuration with the values shown. Raises ValueError naming what is not allowed."""
        return self.base.with_values(**{name: widget.value for name, widget in self.controls.items()})

    def what_if(self) -> tuple[ModelShape, Machine]:
        """Whose budget is drawn: of this model on this machine, unless another is looked at."""
        model, gpu = (self.looked_at[name].value for name in ("model", "GPU"))
        return (
            self.shape if model == AS_CHOSEN else shape_of(model),
            self.machine if gpu == HERE_NOW else machine_of(gpu),
        )

    def take_typed(self, _change: Any = None) -> None:
        """Take values that no slider stops at; what cannot be used is said where the budget stands."""
        text = self.typed.value.strip()
        if not text:
            return
        try:
            config = self.config().with_values(**typed_values(text))
        except ValueError as error:
            self.picture.value = f"{STYLE}<div class='needs'>{verdict(False, [str(error)])}</div>"
        else:
            self.typed.value = ""
            self.show(config)

    def show(self, config: RunConfig) -> None:
        """Move the controls to a configuration, and draw once."""
        self.base = config
        values = values_of(config, self.shape)
        self.listen(False)
        for name, widget in self.controls.items():
            widget.options = stops(name, values[name], self.shape)
            widget.value = values[name]
        self.listen(True)
        self.redraw()

    def redraw(self, _change: Any = None) -> None:
        """Budget and plan of what is shown, into the picture, the words, the proposal and its button."""
        try:
            config = self.config()
            self.derived.value = derived(config, self.shape)
            shape, machine = self.what_if()
            free = config.with_values(checkpointing="auto")  # a proposal may choose what the reader has set
            self.plan = budget.plan(free, shape, machine)
            needs = budget.settle(config, shape, machine, self.plan).budget
            others = other_gpus(ways.every(config, shape, machine, ("none", "fsdp")))
        except ValueError as error:  # what the sliders show is no run at all; the sentence says why
            self.picture.value = f"{STYLE}<div class='needs'>{verdict(False, [str(error)])}</div>"
            self.words, self.button.disabled, self.proposal.value = str(error), True, ""
            return
        changes = differences(config, self.plan.config, shape)
        needs = with_one_remedy(needs, self.plan.budget, changes)
        self.picture.value = picture(needs)
        shown = (f"{KNOBS[name][0]} {label(name, w.value, self.shape)}" for name, w in self.controls.items())
        self.words = "\n".join([", ".join(shown), budget.table(needs), *others])
        elsewhere = (shape, machine) != (self.shape, self.machine)
        self.button.disabled = elsewhere or not changes
        worth = gain(needs, self.plan.budget)
        proposal = f"{'; '.join(changes)}{worth}" if changes else "The sliders show the proposal."
        if changes and needs.fits and not worth:
            proposal = f"It runs like this, as fast as can be: {proposal}"
        if elsewhere:
            self.words = f"What if: {shape.name} on {machine.name}, {machine.host.name}\n{self.words}"
            proposal = f"Only looked at, never trained: {shape.name} on {machine.name}. There: {proposal}"
        said = "<br>".join(escape(sentence) for sentence in (proposal, *others))
        self.proposal.value = f"<div style='line-height:1.4;margin-left:6px'>{said}</div>"
        if self.moved is not None:
            self.moved(config)


def panel(
    config: RunConfig, shape: ModelShape, machine: Machine, moved: Callable[[RunConfig], None] | None = None
) -> Panel:
    """The sliders, the budget and the proposal of a configuration; `config_of` reads it back.

    moved: called with each configuration that somebody moves the sliders to.
    """
    return Panel(config, shape, machine, moved)


def config_of(panel: Panel) -> RunConfig:
    """The configuration with the values that a panel shows."""
    return panel.config()


def preset(config: RunConfig, name: str, shape: ModelShape) -> RunConfig:
    """A configuration with a preset's settings, or for "reset" with the profile's own.

    >>> from helpers import models
    >>> tuned = preset(models.profile("mistral-7b", rank=3), "gentle", models.shape("mistral-7b-v0.3"))
    >>> tuned.adapter.rank, tuned.train.learning_rate
    (8, 0.0001)
    """
    own = flat(profile(config.profile) if config.profile in PROFILES else RunConfig(profile=config.profile))
    if name == "reset":
        return config.with_values(**{knob: own[knob] for knob in KNOBS})
    settings, share, _ = PRESETS[name]
    most = min(min(pair) for pair in shape.linears.values())  # a rank is at most the smallest matrix's smaller side
    settings = settings | {"rank": min(settings["rank"], most), "learning_rate": share * own["learning_rate"]}
    return config.with_values(**settings)


def typed_values(text: str) -> dict[str, Any]:
    """Settings out of what somebody types: by a control's label, its first word, or the setting's own name.

    Raises ValueError naming what there is.

    >>> typed_values("rank = 24, context=3,000; learning rate=3e-4, targets=q_proj,v_proj")
    {'rank': 24, 'seq_len': 3000, 'learning_rate': 0.0003, 'targets': 'q_proj,v_proj'}
    """
    titles = {title: knob for knob, (title, _) in KNOBS.items()}
    names = {title.split(" ")[0]: knob for title, knob in titles.items()} | titles | {knob: knob for knob in KNOBS}
    found: dict[str, str] = {}
    last = ""
    for piece in re.split(r"[;,]\s*(?=[^\d\s])", text):  # a comma before a digit is one of its thousands
        name, given, value = (part.strip() for part in piece.partition("="))
        if given and name not in names:
            raise ValueError(f"there is no control {name!r}; there are {', '.join(titles)}")
        if not given and not last:
            raise ValueError(f"{text!r} names no value: type such as rank=24, context=3000")
        last, value = (names[name], value) if given else (last, f"{found[last]},{name}")
        found[last] = value
    return {knob: number(value) for knob, value in found.items()}


def number(text: str) -> Any:
    """A number as people write it, or the word itself."""
    for kind in (int, float):
        try:
            return kind(text.replace(",", ""))
        except ValueError:
            continue
    return text


def values_of(config: RunConfig, shape: ModelShape) -> dict[str, Any]:
    """Field name -> value, whatever its part; no or all layers checkpointed go by that word."""
    values = flat(config)
    count = values["checkpointing"]
    return values | {"checkpointing": {0: "none", shape.layers: "all"}.get(count, count)}


def label(name: str, value: Any, shape: ModelShape) -> str:
    """A value as its control writes it.

    >>> from helpers import models
    >>> label("learning_rate", 2e-4, models.shape("mistral-7b-v0.3"))
    '2e-4'
    >>> label("checkpointing", 8, models.shape("mistral-7b-v0.3"))
    '8 of 32'
    """
    if name == "learning_rate":
        digits, power = f"{value:.2e}".split("e")
        return f"{float(digits):g}e{int(power)}"
    if name == "checkpointing" and isinstance(value, int):
        return f"{value} of {shape.layers}"
    return value if isinstance(value, str) else f"{value:,g}" if value < 1e6 else f"{value:,}"


def stops(name: str, value: Any, shape: ModelShape) -> list[tuple[str, Any]]:
    """Where a control can stop, as (label, value): what people use, and the configuration's own value."""
    usual = KNOBS[name][1]
    if name == "targets":
        values = list(dict.fromkeys([*usual, value]))
    elif name == "checkpointing":
        values = ["auto", "none", *range(1, shape.layers), "all"]
    else:
        values = sorted({*(stop for stop in usual if name != "seq_len" or stop <= shape.max_context), value})
    return [(label(name, stop, shape), stop) for stop in values]


def control(name: str, value: Any, shape: ModelShape) -> ipywidgets.Widget:
    """The slider, or for module names the list, of one field."""
    kind = ipywidgets.Dropdown if name == "targets" else ipywidgets.SelectionSlider
    widget = kind(
        description=KNOBS[name][0],
        options=stops(name, value, shape),
        value=value,
        style={"description_width": "96px"},
        layout=Layout(width="366px"),
    )
    return tipped(widget, TIPS[name])


def explained(name: str, widget: Any) -> Any:
    """A control with what it is for: of a list, ipywidgets 8 shows no tooltip, so that a mark beside it has it."""
    if not isinstance(widget, ipywidgets.Dropdown):
        return widget
    widget.layout.width = "336px"
    mark = ipywidgets.HTML(f"<span title='{escape(TIPS[name], quote=True)}' style='{MARK}'>?</span>")
    return ipywidgets.HBox([widget, mark])


def choice_of(title: str, options: list[tuple[str, str]]) -> ipywidgets.Dropdown:
    """A list of what may be looked at; the first is what there is."""
    style = {"description_width": "96px"}
    return ipywidgets.Dropdown(description=title, options=options, style=style, layout=Layout(width="366px"))


def derived(config: RunConfig, shape: ModelShape) -> str:
    """What follows from the sliders by arithmetic alone, as HTML."""
    trained = shape.lora_parameters(config.adapter.rank, config.adapter.target_modules)
    step = config.train.batch_size * config.train.accumulation * config.train.sides
    facts = [
        f"α/r = <b>{config.adapter.alpha / config.adapter.rank:.3g}</b>",
        f"<b>{trained / 1e6:.1f} M</b> trained weights, {trained / shape.parameters:.2%} of the model",
        f"a step: {step} × {config.data.seq_len:,} = <b>{step * config.data.seq_len:,} tokens</b>",
    ]
    return f"<div style='line-height:1.4;margin:2px'>{' &nbsp;·&nbsp; '.join(facts)}</div>"


def picture(needs: budget.Budget) -> str:
    """A budget as HTML: the stacked bar against the limit, its key, RAM, disk and hours, and the verdict."""
    on_card = needs.vram.limit_gib > 0
    main = needs.vram if on_card else needs.ram
    used = needs.vram.process_gib if on_card else needs.ram.peak_gib
    where = f"VRAM of this {needs.machine.name}" if on_card else f"RAM of {needs.machine.name}, which has no GPU"
    when = f"<span>fullest at {escape(needs.vram.phase)}</span>" if on_card and needs.vram.phase else ""
    parts = joined(main.parts)
    rest = space("RAM", needs.ram) if on_card else ""
    rest += space("Disk", needs.disk) + hours(needs)
    return (
        f"{STYLE}<div class='needs'>"
        f"<div class='line'><span><b>{escape(where)}: {used:,.2f} of {main.limit_gib:,.2f} GiB</b></span>{when}</div>"
        f"{bar(parts, main.limit_gib)}{key(parts)}"
        f"<div class='rest'>{rest}</div>"
        f"{verdict(needs.fits, needs.reasons or (room(needs),))}</div>"
    )


def bar(parts: dict[str, float], limit_gib: float) -> str:
    """A stacked bar, as HTML: its right end is the limit, or the need where that is more; the excess is hatched."""
    total = sum(parts.values())
    scale = 100 / max(total, limit_gib, 1e-9)
    pieces, start = [], 0.0
    for name, size_gib in parts.items():
        title = escape(f"{name}: {size_gib:.2f} GiB", quote=True)
        place = f"left:{start * scale:.2f}%;width:{size_gib * scale:.2f}%"
        pieces.append(f"<i title=\"{title}\" style='{place};background:{colour_of(name)}'></i>")
        start += size_gib
    if total > limit_gib:
        place = f"left:{limit_gib * scale:.2f}%;right:0;border-left:3px solid {BAD}"
        pieces.append(f"<i class='over' title='beyond the limit' style='{place}'></i>")
    return f"<div class='bar' role='img' aria-label='{total:.2f} of {limit_gib:.2f} GiB'>{''.join(pieces)}</div>"


def key(parts: dict[str, float]) -> str:
    """What each colour of the bar is, and its GiB, as HTML."""
    rows = [
        f"<div><i style='background:{colour_of(name)}'></i>{escape(name)}<b>{size_gib:.2f}</b></div>"
        for name, size_gib in parts.items()
    ]
    return f"<div class='key'>{''.join(rows)}</div>"


def colour_of(name: str) -> str:
    """A component's colour; one that is not in the list keeps a spare one."""
    return COLOURS.get(name) or SPARE_COLOURS[crc32(name.encode()) % len(SPARE_COLOURS)]


def meter(name: str, figures: str, share: float, colour: str) -> str:
    """One thin bar, filled to a share of it, below its name and figures; HTML."""
    return (
        f"<div><div class='line'><span>{name}</span><span>{figures}</span></div>"
        f"<div class='bar thin'><i style='left:0;width:{100 * min(share, 1):.1f}%;background:{colour}'></i></div></div>"
    )


def space(name: str, need: budget.Ram | budget.Disk) -> str:
    """GiB of RAM or disk against what is free, as HTML."""
    over = need.peak_gib > need.limit_gib
    figures = f"{'✗ ' if over else ''}<b>{need.peak_gib:.1f}</b> of {need.limit_gib:.1f} GiB"
    return meter(name, figures, need.peak_gib / max(need.limit_gib, 1e-9), BAD if over else GOOD)


def hours(needs: budget.Budget) -> str:
    """How long, against a session where there is one; several are no misfit, because a run goes on. HTML."""
    time, session_h = needs.time, needs.machine.host.session_h
    name = f"{time.steps:,} steps" if time.steps else "Time"
    if not budget.took(needs):
        return f"<div><div class='line'><span>{name}</span><span>{budget.UNTIMED}</span></div></div>"
    sessions = f", {time.sessions} sessions" if time.sessions > 1 else ""
    share = time.total_h / session_h if session_h else 0.0
    return meter(name, f"<b>{budget.took(needs)}</b>{sessions}", share, LONG if sessions else GOOD)


def room(needs: budget.Budget) -> str:
    """What is left, in words, where everything fits."""
    if needs.vram.limit_gib:
        return f"{needs.vram.limit_gib - needs.vram.process_gib:.1f} GiB of VRAM to spare"
    return f"{needs.ram.limit_gib - needs.ram.peak_gib:.1f} GiB of RAM to spare"


def verdict(fits: bool, reasons: tuple[str, ...] | list[str]) -> str:
    """Fits or not, with the reasons, in words and a mark as well as in colour; HTML."""
    colour, word = (GOOD, "✓ It fits") if fits else (BAD, "✗ It does not fit")
    text = "<br>".join(escape(reason) for reason in reasons)
    style = f"border-color:{colour};background:{colour}26"
    return f"<div class='verdict' role='status' style='{style}'><b>{word}</b>: {text}</div>"


def differences(shown: RunConfig, proposed: RunConfig, shape: ModelShape) -> list[str]:
    """What taking the proposal would change, setting by setting, in words."""
    old, new = values_of(shown, shape), values_of(proposed, shape)
    return [
        f"{KNOBS[name][0]} {label(name, old[name], shape)} → {label(name, new[name], shape)}"
        if name in KNOBS
        else f"{OTHERS.get(name, name)} {in_words(old[name])} → {in_words(new[name])}"
        for name in old
        if old[name] != new[name]
    ]


def in_words(value: Any) -> str:
    """A setting's value that no control shows.

    >>> in_words(True), in_words("paged_adamw_8bit")
    ('yes', 'paged_adamw_8bit')
    """
    return {True: "yes", False: "no"}[value] if isinstance(value, bool) else str(value)


def with_one_remedy(shown: budget.Budget, proposed: budget.Budget, changes: list[str]) -> budget.Budget:
    """A budget that does not fit, with the proposal's changes as the remedy in each of its sentences.

    The button takes all of them at once; a sentence with another remedy beside it would leave the reader to choose.
    """
    if shown.fits or not proposed.fits:
        return shown
    remedy = f"the proposal fits{in_time(proposed)} ({'; '.join(changes)})"
    return replace(shown, reasons=tuple(f"{reason.partition(': ')[0]}: {remedy}" for reason in shown.reasons))


def gain(shown: budget.Budget, proposed: budget.Budget) -> str:
    """What the proposal is worth, in words: that it fits, or its hours."""
    if not proposed.fits:
        return ", which does not fit either"
    before, after = budget.took(shown), budget.took(proposed)
    if not shown.fits:
        return f", which fits{in_time(proposed)}"
    return "" if after == before else f": {after} instead of {before}"


def in_time(needs: budget.Budget) -> str:
    """How long it takes, as the end of a sentence; "" where that is not predicted."""
    took = budget.took(needs)
    return f", in {took}" if took else ""


def other_gpus(found: tuple[ways.Way, ...]) -> tuple[str, ...]:
    """What the machine's other GPUs buy, in a sentence; () where there are none.

    found: one GPU first, then all of them in each way.

    >>> from helpers import hardware, models
    >>> seven, kaggle = models.shape("mistral-7b-v0.3"), hardware.machine("kaggle")
    >>> other_gpus(ways.every(models.profile("mistral-7b", max_steps=1000), seven, kaggle))[0].partition(":")[0]
    'Both GPUs (gpus=2)'
    """
    if not found:
        return ()
    alone, best = found[0], ways.fastest(found)
    count = found[-1].gpus
    both = "Both GPUs" if count == 2 else f"All {count} GPUs"
    if best is None:
        return (f"{both} together do not hold it either.",) if not alone.fits else ()
    flags = f"gpus={best.gpus}" + (f", sharding={best.sharding}" if best.sharding != "none" else "")
    if best is alone:
        return (f"{both} would be no faster than one: a step has too few sequences, or one GPU waits for another.",)
    if not alone.fits:
        return (
            f"It fits on {'both' if count == 2 else f'all {count}'} GPUs ({flags}): {best.process_gib:.1f} GiB "
            f"on each, {duration(best.total_h)}",
        )
    return (f"{both} ({flags}): {duration(best.total_h)} instead of {duration(alone.total_h)}",)
