"""Figures that explain the method, each drawn from numbers that a function computes and a test checks.

For each figure there is a function that computes and one that draws: stage_sizes and stages, lora_shapes and lora,
nf4_block and nf4_rounding, card_filling and card, recomputation and timeline, column_sweep and sweep;
additive draws what quantize.additive.example computes.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle
from matplotlib.ticker import PercentFormatter

from helpers import budget
from helpers.budget import nf4
from helpers.budget.hours import duration
from helpers.config import RunConfig
from helpers.hardware import Machine
from helpers.models import ModelShape
from helpers.show.plots import BEHIND_WORDS, BLUE, COLOURS, GREEN, HATCHES, ORANGE, RED, SKY, canvas, mark_limit
from helpers.show.words import joined

GIB = 2**30
# ---- 1. the line of stages -------------------------------------------------------------------------------------------


def stage_sizes(config: RunConfig, shape: ModelShape, machine: Machine) -> list[tuple[str, str, float, float, float]]:
    """(stage, what it leaves, its GiB on disk, GiB of VRAM at the peak, hours) for each stage of a run."""
    rows = []
    for stage, made, part in (
        ("train", "adapter", "adapter"),
        ("merge", "merged model, 16 bits", "merged model"),
        ("quantize", "GPTQ model, 4 bits", "GPTQ model"),
    ):
        needs = budget.budget(config, shape, machine, stage=stage)
        on_disk = budget.budget(config, shape, machine, stage="quantize").disk.parts[part]
        rows.append((stage, made, on_disk, needs.vram.process_gib, needs.time.total_h))
    return rows


def stages(rows: Sequence[tuple[str, str, float, float, float]], base_gib: float) -> Figure:
    """The stages from left to right; a box's height is what it leaves on disk, its words what it takes."""
    figure, axes = canvas(height=3.4)
    boxes = [("base", "base, 16 bits", base_gib, None, None), *rows]
    top = max(size for _, _, size, _, _ in boxes)
    for at, (stage, made, size, vram, hours) in enumerate(boxes):
        said = budget.STAGE_NAMES.get(stage, stage)
        axes.bar(at, size, width=0.62, color=COLOURS[at % len(COLOURS)], edgecolor="none")
        size_said = f"{size:.1f} GiB" if size >= 1 else f"{1024 * size:.0f} MiB"
        took = f"\n{vram:.1f} GiB of VRAM\n{duration(hours)}" if vram is not None else "\ndownloaded"
        axes.annotate(f"{made}\n{size_said}", (at, size), (0, 4), textcoords="offset points", ha="center", fontsize=10)
        axes.annotate(f"{said}{took}", (at, 0), (0, -6), textcoords="offset points", ha="center", va="top", fontsize=10)
        if at:
            high = 0.75 * top  # between the words above tall boxes and those above low ones
            axes.annotate("", (at - 0.35, high), (at - 0.65, high), arrowprops={"arrowstyle": "-|>", "lw": 2})
    axes.set(
        xticks=[], ylim=(0, 1.3 * top), ylabel="GiB on disk", title="One line of stages: what each takes and leaves"
    )
    axes.grid(axis="x", visible=False)
    return figure


# ---- 2. W + BA -------------------------------------------------------------------------------------------------------


def lora_shapes(shape: ModelShape, rank: int, module: str = "q_proj") -> dict[str, tuple[int, int]]:
    """Rows and columns of W, B and A of one linear layer."""
    inputs, outputs = shape.linears[module]
    return {"W": (outputs, inputs), "B": (outputs, rank), "A": (rank, inputs)}


def lora(shapes: Mapping[str, tuple[int, int]], module: str = "q_proj") -> Figure:
    """W, frozen, and the two thin matrices that are trained; all to one scale, a rank too thin to see drawn thicker."""
    figure, axes = canvas(height=3.2)
    largest = max(shapes["W"])
    at = 0.0
    for name, colour, sign in (("W", SKY, "+"), ("B", ORANGE, "·"), ("A", ORANGE, "")):
        rows, columns = shapes[name]
        high, wide = (max(size / largest, 0.03) for size in (rows, columns))
        axes.add_patch(Rectangle((at, (1 - high) / 2), wide, high, color=colour))
        what = "frozen, 4 bits" if name == "W" else "trained"
        words = f"{name}: {rows:,} × {columns:,}\n{rows * columns:,} weights\n{what}"
        axes.text(at + wide / 2, (1 - high) / 2 - 0.05, words,
                  ha="center", va="top", fontsize=10)  # fmt: skip
        gap = 0.75 if name == "B" else 0.45
        axes.text(at + wide + gap / 2, 0.5, sign, ha="center", va="center", fontsize=36 if sign == "·" else 20)
        at += wide + gap
    trained = sum(rows * columns for name, (rows, columns) in shapes.items() if name != "W")
    share = trained / (shapes["W"][0] * shapes["W"][1])
    axes.set(xlim=(-0.2, at), ylim=(-0.35, 1.1), xticks=[], yticks=[], aspect="equal")
    axes.set(title=f"LoRA of {module}: W + (α/r) B·A, {share:.2%} as many weights are trained", xlabel="")
    for spine in axes.spines.values():
        spine.set_visible(False)
    axes.set_ylabel("inputs run to the right, outputs down", fontsize=9)
    axes.grid(visible=False)
    return figure


# ---- 3. one block through NF4 ----------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Block:
    """One block of weights through NF4."""

    weights: list[float]
    scale: float
    """The largest of them, without its sign: what the block is divided by."""
    codes: list[int]
    """Which of the sixteen levels stands for each."""
    rounded: list[float]
    """What the codes and the scale stand for."""

    @property
    def error(self) -> float:
        """Size of what was lost, as a share of the weights' size."""
        lost = np.subtract(self.rounded, self.weights)
        return float(np.linalg.norm(lost) / np.linalg.norm(self.weights))


def nf4_block(weights: Any) -> Block:
    """A block of weights as NF4 stores it. Raises ValueError for more or fewer than nf4.BLOCK.

    >>> block = nf4_block([1.0, -0.5] * 32)
    >>> block.scale, block.codes[:2]
    (1.0, [15, 2])
    """
    values = [float(weight) for weight in np.asarray(weights, dtype=np.float64).ravel()]
    if len(values) != nf4.BLOCK:
        raise ValueError(f"a block has {nf4.BLOCK} weights, not {len(values)}")
    levels, scale = nf4.levels(), max(abs(value) for value in values)
    codes = [min(range(16), key=lambda code: abs(levels[code] - value / scale)) for value in values]
    return Block(values, scale, codes, nf4.round_to_levels(values))


def nf4_rounding(block: Block) -> Figure:
    """The weights of a block, and under each the level that stands for it."""
    figure, axes = canvas(height=3.2)
    at = np.arange(len(block.weights))
    for level in nf4.levels():
        axes.axhline(level * block.scale, color="#999999", linewidth=0.6, alpha=0.6)
    axes.vlines(at, block.weights, block.rounded, color=RED, linewidth=1.2, label="what rounding loses")
    axes.scatter(at, block.weights, s=16, color=BLUE, label="16 bits", zorder=3)
    axes.scatter(at, block.rounded, s=26, marker="_", color=ORANGE, label="4 bits: one of 16 lines", zorder=3)
    axes.set(xlabel="weight of the block", ylabel="value", ylim=(-1.15 * block.scale, 1.45 * block.scale))
    axes.set_title(f"One block of {len(at)} weights: 16 levels, one scale ({block.scale:.3g}), {block.error:.1%} lost")
    axes.grid(visible=False)
    axes.legend(frameon=False, ncols=3, loc="upper center", fontsize=10)
    return figure


# ---- 4. what fills a card --------------------------------------------------------------------------------------------


def card_filling(config: RunConfig, shape: ModelShape, machine: Machine) -> dict[str, dict[str, float]]:
    """Stage -> component -> GiB of VRAM when it is fullest, small components joined."""
    return {
        budget.STAGE_NAMES[stage]: joined(budget.budget(config, shape, machine, stage=stage).vram.parts)
        for stage in ("train", "merge", "quantize", "inference")
    }


def card(filling: Mapping[str, Mapping[str, float]], limit_gib: float, name: str) -> Figure:
    """A bar a stage, its components, and the GPU's limit."""
    figure, axes = canvas(height=4.4)
    names = list(dict.fromkeys(part for parts in filling.values() for part in parts))
    left = dict.fromkeys(filling, 0.0)
    for i, part in enumerate(names):
        sizes = [parts.get(part, 0.0) for parts in filling.values()]
        colour = COLOURS[i % len(COLOURS)]
        axes.barh(list(filling), sizes, left=list(left.values()), height=0.62, label=part, color=colour,
                  hatch=HATCHES[i // len(COLOURS) * 2 % len(HATCHES)], edgecolor="white", linewidth=0.8)  # fmt: skip
        for stage, size in zip(filling, sizes, strict=True):
            left[stage] += size
    for stage, total in left.items():
        axes.annotate(f"{total:.1f} GiB", (total, stage), (4, 0), textcoords="offset points", va="center", fontsize=10,
                      bbox=BEHIND_WORDS, zorder=5)  # fmt: skip
    axes.invert_yaxis()
    axes.set(xlabel="GiB", xlim=(0, 1.06 * limit_gib), title=f"What fills a {name}, stage by stage")
    mark_limit(axes, limit_gib, f"limit {limit_gib:.2f} GiB")
    axes.grid(axis="y", visible=False)
    figure.legend(*axes.get_legend_handles_labels(), loc="outside lower center", ncols=3, frameon=False, fontsize=9)
    return figure


# ---- 5. recomputation over time --------------------------------------------------------------------------------------


def kept_gib(config: RunConfig, shape: ModelShape, machine: Machine) -> tuple[float, float]:
    """GiB that a layer saves for its backward pass: whole, and only its input; from the budget's own totals."""

    def allocated(count: int) -> float:
        run = config.with_values(checkpointing=count, keep_attention=False, offload_activations=False)
        return budget.budget(run, shape, machine).vram.allocated_gib

    tokens = config.data.seq_len * config.train.batch_size * config.train.sides
    layers, held = shape.layers, tokens * shape.hidden * 2 / GIB
    half = layers // 2
    return (allocated(0) - allocated(half)) / half + held, held


def recomputation(layers: int, checkpointed: int, whole_gib: float, input_gib: float) -> list[tuple[float, float]]:
    """(time, GiB of activations) after each layer of a step: forward, then backward.

    A layer's forward pass takes 1, its backward pass 2, and recomputing a checkpointed one another 1, in which its
    activations are there in whole until its backward pass is done.
    """
    time, held, points = 0.0, 0.0, [(0.0, 0.0)]
    for layer in range(layers):
        time, held = time + 1, held + (input_gib if layer < checkpointed else whole_gib)
        points.append((time, held))
    for layer in reversed(range(layers)):
        if layer < checkpointed:
            time += 1
            points.append((time, held + whole_gib - input_gib))
            held -= input_gib
        else:
            held -= whole_gib
        time += 2
        points.append((time, max(held, 0.0)))
    return points


def timeline(layers: int, whole_gib: float, input_gib: float) -> Figure:
    """Activations in memory over one step, for no, half and all layers checkpointed."""
    figure, axes = canvas(height=3.4)
    for count, colour, style in ((0, RED, "-"), (layers // 2, ORANGE, "--"), (layers, BLUE, "-.")):
        points = recomputation(layers, count, whole_gib, input_gib)
        said = {0: "no layer", layers: "every layer"}.get(count, f"{count} of {layers} layers")
        peak, end = max(gib for _, gib in points), points[-1][0] / points_end(layers)
        axes.plot(*zip(*points, strict=True), color=colour, linestyle=style, linewidth=2,
                  label=f"{said} checkpointed: {peak:.1f} GiB, {end:.2f} of the time")  # fmt: skip
    axes.axvline(layers, color="#999999", linewidth=1)
    axes.annotate("forward", (layers, 1), (-4, -2), xycoords=("data", "axes fraction"), textcoords="offset points",
                  ha="right", va="top", fontsize=10)  # fmt: skip
    axes.annotate("backward", (layers, 1), (4, -2), xycoords=("data", "axes fraction"), textcoords="offset points",
                  va="top", fontsize=10)  # fmt: skip
    axes.set(xlabel="time (forward passes of one layer)", ylabel="activations (GiB)", xlim=(0, None))
    axes.set_ylim(0, 1.2 * axes.dataLim.y1)  # room for the words above the highest peak
    axes.set_title("Activation checkpointing: less memory, more time")
    figure.legend(*axes.get_legend_handles_labels(), loc="outside lower center", ncols=1, frameon=False, fontsize=10)
    return figure


def points_end(layers: int) -> float:
    """How long a step takes in which nothing is recomputed."""
    return 3.0 * layers


# ---- 6. GPTQ's sweep over columns ------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Sweep:
    """A small matrix quantized column by column, beside the same matrix rounded."""

    changes: dict[int, Any]
    """Columns done -> what differs from the original, (out, in)."""
    rounding_error: float
    """‖(W - Ŵ)X‖ / ‖WX‖ of rounding to the nearest level."""
    gptq_error: float


def column_sweep(weights: Any, inputs: Any, bits: int = 4) -> Sweep:
    """GPTQ (https://arxiv.org/abs/2210.17323, algorithm 1) of one matrix (out, in) for inputs (in, samples).

    The error of each rounded column goes into the columns that are still to come, by the inverse Hessian of the inputs.
    One scale a row, found before the sweep.
    """
    original = np.array(weights, dtype=np.float64)
    samples = np.array(inputs, dtype=np.float64)
    left, columns = original.copy(), original.shape[1]
    step = 2 * np.abs(original).max(axis=1) / (2**bits - 1)

    def nearest(column: Any) -> Any:
        return step * np.clip(np.round(column / step), -(2 ** (bits - 1)), 2 ** (bits - 1) - 1)

    hessian = samples @ samples.T
    hessian += 0.01 * np.mean(np.diag(hessian)) * np.eye(columns)  # damping, as the paper has it
    inverse = np.linalg.cholesky(np.linalg.inv(hessian)).T  # upper
    changes = {}
    for column in range(columns):
        if column == columns // 2:
            changes[column] = left - original
        kept = nearest(left[:, column])
        error = (left[:, column] - kept) / inverse[column, column]
        left[:, column:] -= np.outer(error, inverse[column, column:])
        left[:, column] = kept
    changes[columns] = left - original
    rounded = np.stack([nearest(original[:, column]) for column in range(columns)], axis=1)

    def lost(result: Any) -> float:
        return float(np.linalg.norm((result - original) @ samples) / np.linalg.norm(original @ samples))

    return Sweep(changes, lost(rounded), lost(left))


def sweep(found: Sweep) -> Figure:
    """What the weights have changed by at half of the sweep and at its end, and what each way does to the outputs."""
    figure, axes = canvas(columns=3, height=3.2, gridspec_kw={"width_ratios": (1, 1, 0.8)})
    *pictures, bars = axes
    span = float(np.quantile(np.abs(list(found.changes.values())[-1]), 0.98))
    for place, (done, change) in zip(pictures, found.changes.items(), strict=True):
        place.imshow(change, cmap="PuOr", vmin=-span, vmax=span, aspect="auto", interpolation="nearest")
        place.set(title=f"{done} of {change.shape[1]} columns done", xlabel="input", ylabel="output")
        if done < change.shape[1]:
            place.axvline(done - 0.5, color=RED, linewidth=1.5)
        place.grid(visible=False)
    shown = bars.bar(["rounding", "GPTQ"], [found.rounding_error, found.gptq_error], color=[SKY, GREEN], width=0.6)
    bars.bar_label(shown, labels=[f"{one:.1%}" for one in (found.rounding_error, found.gptq_error)], fontsize=10)
    bars.set(title="error of the outputs", ylabel="error ÷ size of the outputs", ylim=(0, 1.25 * found.rounding_error))
    bars.yaxis.set_major_formatter(PercentFormatter(xmax=1, decimals=0))
    bars.grid(axis="x", visible=False)
    return figure


OUTPUTS = 256
"""Rows of the matrix that are swept: each is quantized by itself, and so many show it."""
TOKENS = 8192
"""Of the text, at most: fewer than a few thousand, and the sweep would fit these very inputs."""
EPSILON = 1e-5


def sample_sweep(folder: Path, text: str, bits: int = 3) -> Sweep:
    """The query matrix of a model's first layer through the sweep, with exactly the inputs that a text gives it.

    In 3 bits, where the difference is plain to see. Of a large matrix the first outputs only.
    """
    from helpers.models.templates import load_tokenizer

    tokens = load_tokenizer(folder)(text, truncation=True, max_length=TOKENS)["input_ids"]
    read = rows_of(folder, "model.embed_tokens.weight", tokens)  # (tokens, hidden)
    norm = rows_of(folder, "model.layers.0.input_layernorm.weight")
    inputs = norm * read / np.sqrt((read**2).mean(axis=1, keepdims=True) + EPSILON)
    weights = rows_of(folder, "model.layers.0.self_attn.q_proj.weight", slice(OUTPUTS))
    return column_sweep(weights, inputs.T, bits)


def rows_of(folder: Path, name: str, rows: Any = slice(None)) -> Any:
    """Some rows of a stored tensor, in float64; nothing else of the model is converted."""
    from safetensors import safe_open

    for file in sorted(Path(folder).glob("*.safetensors")):
        with safe_open(str(file), "pt") as tensors:
            if name in tensors.keys():  # noqa: SIM118 - not a dict
                return tensors.get_tensor(name)[rows].double().numpy()
    raise ValueError(f"{folder} has no {name}")


def first_block(folder: Path, module: str = "model.layers.0.self_attn.q_proj") -> Block:
    """The first block of a matrix, as NF4 stores it."""
    return nf4_block(rows_of(folder, f"{module}.weight", slice(1)).ravel()[: nf4.BLOCK])


# ---- 7. two bits: a sum of vectors -----------------------------------------------------------------------------------


def additive(weights: Sequence[float], parts: Sequence[Sequence[float]], group: int = 8) -> Figure:
    """Weights of a row, and the vectors whose sum stands for each run of them: one out of each codebook."""
    figure, axes = canvas(height=3.4)
    axes.use_sticky_edges = False  # bars end below the frame
    at, before = np.arange(len(weights)), np.zeros(len(weights))
    for number, part in enumerate(parts):
        # one beside the other, and the second starts where the first one ends: they are added, whatever their signs
        axes.bar(at + 0.38 * number - 0.19, part, 0.38, bottom=before, color=(SKY, ORANGE, GREEN, BLUE)[number % 4],
                 hatch=HATCHES[number % len(HATCHES)], edgecolor="white", label=f"codebook {number + 1}")  # fmt: skip
        before = before + np.asarray(part)
    axes.hlines(before, at - 0.4, at + 0.4, color=RED, linewidth=2, label="their sum", zorder=3)
    axes.scatter(at, weights, s=18, color="black", label="16 bits", zorder=4)
    for start in range(group, len(weights), group):
        axes.axvline(start - 0.5, color="#999999", linewidth=0.8)
    lost = float(np.linalg.norm(np.subtract(before, weights)) / np.linalg.norm(weights))
    codes = f"{len(parts)} codes of 8 bits" if len(parts) > 1 else "one code"
    axes.set(xlabel=f"weight of the row, in runs of {group}", ylabel="value")
    axes.set_title(f"{codes} for {group} weights: a sum of vectors, {lost:.1%} lost here")
    axes.set_xticks(at[::group], [str(place) for place in at[::group]])
    axes.grid(visible=False)
    figure.legend(*axes.get_legend_handles_labels(), loc="outside lower center", ncols=4, frameon=False, fontsize=9)
    return figure
