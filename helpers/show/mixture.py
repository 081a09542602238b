"""Mixtures of experts in a notebook: which of them trains on which GPU, the one to take here, and who reads what.

>>> from helpers import hardware
>>> longest("mixtral-8x7b", "attention", hardware.machine("a100-40")), longest("mixtral-8x7b", "attention", T4)
(8192, 0)
>>> longest("mixtral-8x7b-aqlm", "attention", T4)
4096
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure
from matplotlib.ticker import PercentFormatter

from helpers import budget, hardware, workspace
from helpers.budget import host, vram
from helpers.config import RunConfig
from helpers.hardware import Machine
from helpers.models import profile, shape
from helpers.show import plots
from helpers.show.shown import say

T4 = hardware.machine("t4")
MIXTURES = {
    "mistralai/Mixtral-8x7B-v0.1": ("attention", "all-linear"),
    "Qwen/Qwen3-30B-A3B": ("attention",),
    "ISTA-DASLab/Mixtral-8x7b-AQLM-2Bit-1x16-hf": ("attention",),
}
"""Mixture -> what its adapters can change, the one to prefer first: in 4 bits before 2."""
CARDS = ("t4", "l4", "rtx5090", "a100-40", "l40s", "a100-80")
CONTEXTS = (8192, 4096, 2048, 1024, 512)
TINY_STEPS = 40


def settings(model: str, **values: Any) -> RunConfig:
    """The settings of a mixture: in NF4, or as it is stored where that is AQLM's two bits."""
    return profile("mistral-7b", model=model, weights="aqlm" if shape(model).additive else "nf4", **values)


def longest(model: str, targets: str, machine: Machine) -> int:
    """The longest of CONTEXTS that trains on a machine, a sequence at a time and as its plan would; 0: none does."""
    config, sizes = settings(model, targets=targets, batch_size=1, accumulation=1), shape(model)
    asked = ((context, config.with_values(seq_len=context)) for context in CONTEXTS)
    return next((context for context, one in asked if budget.settle(one, sizes, machine).budget.fits), 0)


def fitting(machine: Machine) -> list[dict[str, Any]]:
    """A row a mixture and target: GiB and kind of its weights, and the longest context on this GPU and on others."""
    cards = {"this machine": machine} | {hardware.machine(name).name: hardware.machine(name) for name in CARDS}
    rows = []
    for model, groups in MIXTURES.items():
        config = settings(model, targets="attention")
        kind = "AQLM" if shape(model).additive else "NF4"
        weights = sum(vram.weights(config, shape(model)).values()) / 2**30
        for targets in groups:
            contexts = {name: longest(model, targets, card) or "–" for name, card in cards.items() if card.gpu}
            row = {"mixture": Path(model).name, "adapters on": targets, "weights": f"{weights:.1f} GiB, {kind}"}
            rows.append(row | contexts)
    return rows


def start(name: str, machine: Machine, folder: Path, model: str = "", targets: str = "auto") -> RunConfig:
    """The settings of a run of a mixture: `model`, else the largest that fits, else the tiny one, made in `folder`.

    name: the profile that the machine can train. targets: what adapters are put on; auto: attention, of the tiny
    mixture all-linear. A banner says so where it is the tiny one, and why.
    """
    fits = {one: longest(one, "attention", machine) for one in MIXTURES} if machine.gpu else {}
    chosen = model or next((one for one, context in fits.items() if context), None)
    if chosen and (model or name != "tiny"):
        context = min(fits.get(chosen) or 1024, 1024)
        return settings(chosen, targets="attention" if targets == "auto" else targets, seq_len=context)
    from helpers.models import experts

    if name != "tiny":
        rows = ", ".join(Path(one).name for one in MIXTURES)
        say(f"<p role='alert'><b>DEMO: a toy of four experts</b>, because none of {rows} fits this {machine.name}.</p>")
    made = experts.tiny_mixture(folder / "tiny-mixture")
    small = {"max_steps": TINY_STEPS, "learning_rate": 1e-3, "max_questions": 16, "max_heldout": 24}
    return profile("tiny", model=str(made), targets=None if targets == "auto" else targets, **small)


def open_run(name: str, folder: str | Path | None = None, use_drive: bool = False) -> workspace.Workspace:
    """The run's folder, beside that of the dense model: runs/<profile>-mixture, or `mixture` in a folder that is given.

    use_drive: in Colab, mount Google Drive first. Raises and says what workspace.open_run does.
    """
    root = Path(folder) / "mixture" if folder else workspace.runs.home() / "runs" / f"{name}-mixture"
    return workspace.open_run(profile(name), root, use_drive)


def compared(config: RunConfig, adapter: Path, machine: Machine) -> dict[str, str | Path]:
    """The models of an evaluation: the adapter on its base, and the base itself where its weights as stored fit."""
    size_gib = host.stored_bytes(shape(config.model.model, config.model.revision)) / 2**30
    base = {"base": config.model.model} if machine.gpu is None or size_gib < machine.vram_gib else {}
    return base | {"finetuned": adapter}


def routing(shares: Sequence[Sequence[float]], even: str = "an even share") -> Figure:
    """Share of the tokens that each expert of each layer reads, as `experts.shares` counts them."""
    figure, axes = plots.canvas(height=3.2)
    experts = len(shares[0])
    for layer, found in enumerate(shares):
        places = [layer + (expert - (experts - 1) / 2) * 0.8 / experts for expert in range(experts)]
        for expert, (place, share) in enumerate(zip(places, found, strict=True)):
            style = {"color": plots.COLOURS[expert % 8], "hatch": plots.HATCHES[expert % 8], "edgecolor": "white"}
            axes.bar(place, share, 0.8 / experts, label=f"expert {expert}" if not layer else None, **style)
    axes.axhline(sum(shares[0]) / experts, color=plots.BLACK, linestyle="--", linewidth=1, label=even)
    axes.yaxis.set_major_formatter(PercentFormatter(1))
    axes.set(xlabel="layer", ylabel="share of the tokens", title="Who reads what: tokens of each expert")
    axes.set_xticks(range(len(shares)))
    figure.legend(*axes.get_legend_handles_labels(), loc="outside lower center", ncols=5, frameon=False, fontsize=9)
    return figure
