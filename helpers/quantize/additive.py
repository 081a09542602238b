"""Additive quantization in AQLM's format (https://arxiv.org/abs/2401.06118), small enough to read, for small models.

A matrix becomes codes: each run of 8 weights of a row is the sum of one vector out of each of a few codebooks, times
the row's scale. What is made small is what the layer says wrong, |(W - Ŵ) X|², and not the weights' own error: with
H = XᵀX of the calibration text's inputs that is tr(E H Eᵀ), E = W - Ŵ. Then in rounds, each of which lowers it:

    codebooks, once    k-means of the runs, and of what the first codebook leaves for the second (section 3.2)
    codes              coordinate descent: one run of every row at a time takes the vector that lowers the error most
    codebooks          with the codes as they are, the error is a quadratic function of them: conjugate gradients
    scales             likewise, and each row has one: in closed form

AQLM itself searches codes by beams, and trains codebooks and norms through whole blocks: a day of an A100 for a 7B.
Layers are done in their order, each with the inputs that the quantized layers before it give. Matrices of a layer that
are equal, as the experts of a mixture that was made of a dense model, are done once, on the tokens of all of them.
"""

import json
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

from helpers.config import QuantizeConfig
from helpers.models import ModelShape
from helpers.models.aqlm_sizes import Layout, layout_for, settings_of
from helpers.workspace import write_text

if TYPE_CHECKING:
    import torch

LARGEST = 1e9
"""Weights of a model at most: it is held whole, in fp32 on a CPU."""
ROUNDS, KMEANS_STEPS, GRADIENT_STEPS = 4, 12, 12
DAMPING = 0.01
"""Of H's mean diagonal, added to it: directions that the text does not show must not be given away."""


def refuse(sizes: ModelShape, config: QuantizeConfig) -> None:
    """Raises ValueError for bits that are no number of 8-bit codes for 8 weights, widths of no 8, and large models."""
    if config.bits == 8:
        raise ValueError("bits must be 2, 3 or 4 for aqlm, one codebook each, not 8: quant_method=gptq has 8")
    odd = next((name for name, (inputs, _) in sizes.linears.items() if inputs % 8), None)
    if odd:
        raise ValueError(f"aqlm quantizes runs of 8 weights, and the {sizes.linears[odd][0]} inputs of {odd} are no 8s")
    if sizes.parameters > LARGEST:
        raise ValueError(
            f"aqlm is made here of models up to {LARGEST / 1e9:.0f}e9 weights, and {Path(sizes.name).name} has "
            f"{sizes.parameters / 1e9:.1f}e9: quant_method=gptq quantizes it, a layer at a time"
        )


def least_tokens(sizes: ModelShape) -> int:
    """Inputs of the widest layer, as for GPTQ: with fewer, H has no full rank."""
    return max(inputs for inputs, _ in sizes.linears.values())


def environment() -> dict[str, str]:
    """Nothing: no library but PyTorch and transformers."""
    return {}


def remedies(config: QuantizeConfig) -> str:
    """What makes a quantized model better, of what this run has not tried.

    >>> remedies(QuantizeConfig(quant_method="aqlm", bits=2, calibration="both"))
    'calibration_samples=256 or 3 bits do better'
    """
    tries = [f"calibration_samples={2 * config.calibration_samples}"]
    tries += [] if config.calibration == "both" else ["calibration=both"]
    tries += [f"{config.bits + 1} bits"] if config.bits < 4 else ["quant_method=gptq"]
    return f"{', '.join(tries[:-1])} or {tries[-1]} do better"


# ---- one matrix ------------------------------------------------------------------------------------------------------


def fit(
    weight: "torch.Tensor", gram: "torch.Tensor", layout: Layout, rounds: int = ROUNDS
) -> tuple["torch.Tensor", "torch.Tensor", "torch.Tensor"]:
    """Codes (out, groups, books), codebooks (books, vectors, group) and scales (out,) of a matrix (out, in), in fp32.

    gram: H, (in, in), of its inputs. No randomness but the start's, which is the same for every call.
    """
    import torch

    scales = weight.square().mean(dim=1).sqrt().clamp(min=1e-8)
    runs = (weight / scales[:, None]).reshape(-1, layout.group)  # (out · groups, group)
    codes, books = residual_kmeans(runs, layout)
    codes = codes.reshape(len(weight), -1, layout.codebooks)
    gram = gram + DAMPING * gram.diagonal().mean() * torch.eye(len(gram), device=gram.device)
    for _ in range(rounds):
        codes = better_codes(weight, gram, codes, books, scales)
        books = better_books(weight, gram, codes, books, scales)
        scales = better_scales(weight, gram, codes, books, scales)
    return codes, books, scales


def rebuilt(codes: "torch.Tensor", books: "torch.Tensor") -> "torch.Tensor":
    """The matrix (out, in) that codes stand for, without the scales."""
    return sum(books[book][codes[..., book]] for book in range(len(books))).flatten(1)


def output_error(weight: "torch.Tensor", made: "torch.Tensor", gram: "torch.Tensor") -> float:
    """|(W - Ŵ) X|² as a share of |W X|²."""
    error = weight - made
    return (((error @ gram) * error).sum() / ((weight @ gram) * weight).sum()).item()


def residual_kmeans(runs: "torch.Tensor", layout: Layout) -> tuple["torch.Tensor", "torch.Tensor"]:
    """Codes (runs, books) and codebooks: k-means of the runs, then of what is left of them, and so on."""
    import torch

    draw = torch.Generator().manual_seed(0)
    left, codes, books = runs, [], []
    for _ in range(layout.codebooks):
        start = torch.randint(len(left), (2**layout.bits,), generator=draw).to(left.device)
        book = left[start].clone()
        for _ in range(KMEANS_STEPS):
            code = nearest(left, book)
            count = torch.bincount(code, minlength=len(book))[:, None]
            total = torch.zeros_like(book).index_add_(0, code, left)
            book = torch.where(count > 0, total / count.clamp(min=1), book)  # a vector that nobody takes stays
        codes.append(nearest(left, book))
        books.append(book)
        left = left - book[codes[-1]]
    return torch.stack(codes, dim=-1), torch.stack(books)


def nearest(runs: "torch.Tensor", book: "torch.Tensor") -> "torch.Tensor":
    """The nearest vector of a codebook to each run: |r - c|² less |r|², which is the same for all."""
    return (book.square().sum(1) - 2 * runs @ book.T).argmin(dim=1)


def better_codes(
    weight: "torch.Tensor", gram: "torch.Tensor", codes: "torch.Tensor", books: "torch.Tensor", scales: "torch.Tensor"
) -> "torch.Tensor":
    """Each run of each row takes, book by book, the vector that lowers tr(E H Eᵀ) most; the other runs stay.

    With e the run's error if it took nothing of this book, and the vector v = scale · c, what depends on v is
    v Hgg vᵀ - 2 v · ((E H)g - eg Hgg + e Hgg), g the run's columns. E H is kept up to date.
    """
    codes, group = codes.clone(), books.shape[-1]
    error = weight - scales[:, None] * rebuilt(codes, books)
    pull = error @ gram  # E H: (out, in)
    for run in range(codes.shape[1]):
        columns = slice(run * group, (run + 1) * group)
        within = gram[columns, columns]
        for number, book in enumerate(books):
            taken = scales[:, None] * book[codes[:, run, number]]  # (out, group)
            wanted = pull[:, columns] + taken @ within  # as if nothing were taken: e = eg + taken
            length = ((book @ within) * book).sum(1)  # c Hgg cᵀ: (vectors,)
            cost = scales[:, None] * length - 2 * wanted @ book.T  # over one scale, which is above zero
            codes[:, run, number] = cost.argmin(dim=1)
            change = taken - scales[:, None] * book[codes[:, run, number]]
            pull += change @ gram[columns]
    return codes


def better_books(
    weight: "torch.Tensor", gram: "torch.Tensor", codes: "torch.Tensor", books: "torch.Tensor", scales: "torch.Tensor"
) -> "torch.Tensor":
    """The codebooks after some steps of conjugate gradients, whose every step lowers the error."""
    import torch

    def spread(values: torch.Tensor) -> torch.Tensor:
        """What (out, in) does to each vector of the codebooks: the sum over the places that took it."""
        values = (scales[:, None] * values).reshape(-1, books.shape[-1])
        each = (
            torch.zeros_like(books[0]).index_add_(0, codes[..., book].flatten(), values) for book in range(len(books))
        )
        return torch.stack(list(each))

    left = spread((weight - scales[:, None] * rebuilt(codes, books)) @ gram)  # half the gradient, downhill
    step, length = left.clone(), left.square().sum()
    for _ in range(GRADIENT_STEPS):
        moved = spread(scales[:, None] * rebuilt(codes, step) @ gram)
        far = length / (step * moved).sum().clamp(min=1e-30)
        books, left = books + far * step, left - far * moved
        before, length = length, left.square().sum()
        step = left + (length / before.clamp(min=1e-30)) * step
    return books


def better_scales(
    weight: "torch.Tensor", gram: "torch.Tensor", codes: "torch.Tensor", books: "torch.Tensor", scales: "torch.Tensor"
) -> "torch.Tensor":
    """Each row's best scale, w H q / q H q with q its sum of vectors; as it was where that is not above zero."""
    import torch

    made = rebuilt(codes, books)
    pull = made @ gram
    best = (weight * pull).sum(1) / (made * pull).sum(1).clamp(min=1e-30)
    return torch.where(best > 0, best, scales)


def example(
    weight: "torch.Tensor", layout: Layout, row: int = 0, runs: int = 3
) -> tuple[list[float], list[list[float]]]:
    """To be drawn: the first runs of a row, and what each codebook's vector, times the scale, gives of them.

    Inputs count alike here: a matrix alone has no calibration text.
    """
    import torch

    codes, books, scales = fit(weight.float(), torch.eye(weight.shape[1]), layout)
    shown = slice(runs * layout.group)
    parts = [(scales[row] * books[book][codes[row, :, book]].flatten())[shown].tolist() for book in range(len(books))]
    return weight[row, shown].tolist(), parts


# ---- in the process of its own ---------------------------------------------------------------------------------------


def make(job: dict, report: Callable[[dict], object]) -> None:
    """Quantize job["model"] into job["output"], a message a module, then one with time and memory."""
    import torch

    from helpers.models import loading

    start, gpu = time.monotonic(), torch.cuda.is_available()
    layout = layout_for(job["config"]["bits"])
    model = loading.causal_lm(job["model"], dtype=torch.float32, device_map={"": loading.device()})
    stored: dict[str, tuple] = {}
    with torch.inference_mode():
        states, more = first_inputs(model, job["rows"])
        for number, layer in enumerate(model.model.layers):
            grams = input_grams(layer, states, more)
            for names, weight, gram in equal_ones(layer, grams):
                codes, books, scales = fit(weight, gram, layout)
                made = scales[:, None] * rebuilt(codes, books)
                error = output_error(weight, made, gram)
                for name in names:
                    layer.get_submodule(name).weight.data = made
                    stored[f"model.layers.{number}.{name}"] = (codes, books, scales)
                    report({"layer": number, "module": name, "error": error})
            states = [layer(state, **more) for state in states]  # what the next layer reads
    write(model, stored, layout, Path(job["model"]), Path(job["output"]))
    report(
        {
            "quantize_s": round(time.monotonic() - start, 1),
            "peak_allocated_gib": round(torch.cuda.max_memory_allocated() / 2**30, 3) if gpu else None,
            "peak_reserved_gib": round(torch.cuda.max_memory_reserved() / 2**30, 3) if gpu else None,
        }
    )


def first_inputs(model: Any, rows: list[list[int]], batch: int = 16) -> tuple[list["torch.Tensor"], dict[str, Any]]:
    """What the first decoder layer reads of calibration rows of one length, in batches, and its other arguments."""
    import torch

    class Seen(Exception):
        """Nothing after the first layer need be computed."""

    seen: list[tuple] = []

    def look(module: Any, arguments: tuple, more: dict) -> None:
        seen.append((arguments[0] if arguments else more["hidden_states"], more))
        raise Seen

    handle = model.model.layers[0].register_forward_pre_hook(look, with_kwargs=True)
    whole = [row for row in rows if len(row) == len(rows[0])]
    for start in range(0, len(whole) - len(whole) % batch or len(whole), batch):
        ids = torch.tensor(whole[start : start + batch], device=model.device)
        with suppress(Seen):
            model(input_ids=ids, use_cache=False)
    handle.remove()
    more = {name: value for name, value in seen[0][1].items() if name != "hidden_states"}
    return [state for state, _ in seen], more


def input_grams(layer: Any, states: list["torch.Tensor"], more: dict[str, Any]) -> dict[str, "torch.Tensor"]:
    """Linear layer -> XᵀX of its inputs, (in, in), while the decoder layer computes."""
    import torch

    grams: dict[str, torch.Tensor] = {}

    def watch(name: str) -> Callable:
        def look(module: Any, arguments: tuple) -> None:
            x = arguments[0].reshape(-1, module.in_features).float()
            grams[name] = grams.get(name, 0) + x.T @ x

        return look

    linears = {name: part for name, part in layer.named_modules() if isinstance(part, torch.nn.Linear)}
    handles = [part.register_forward_pre_hook(watch(name)) for name, part in linears.items()]
    for state in states:
        layer(state, **more)
    for handle in handles:
        handle.remove()
    # an expert that no token met: nothing is known, so every input counts as much
    return {
        name: grams.get(name, torch.eye(part.in_features, device=part.weight.device)) for name, part in linears.items()
    }


def equal_ones(
    layer: Any, grams: dict[str, "torch.Tensor"]
) -> Iterator[tuple[list[str], "torch.Tensor", "torch.Tensor"]]:
    """(names, weight, sum of their grams) of the matrices of a layer, equal ones together."""
    import torch

    left = list(grams)
    while left:
        weight = layer.get_submodule(left[0]).weight
        same = [name for name in left if torch.equal(layer.get_submodule(name).weight, weight)]
        left = [name for name in left if name not in same]
        yield same, weight.float(), sum(grams[name] for name in same)


def write(model: Any, stored: dict[str, tuple], layout: Layout, source: Path, output: Path) -> None:
    """The folder in the hub's layout: codes as signed bytes, all else in fp16, and config.json."""
    import torch
    from safetensors.torch import save_file

    from helpers.models.experts import stored_name

    family = model.config.model_type
    tensors: dict[str, torch.Tensor] = {}
    for module, (codes, books, scales) in stored.items():
        name = stored_name(f"{module}.", family)
        parts = {"codes": codes.to(torch.uint8).view(torch.int8), "codebooks": books[:, :, None].half()}
        parts["scales"] = scales.reshape(-1, 1, 1, 1).half()
        tensors |= {name + part: value.cpu().contiguous() for part, value in parts.items()}
    kept = [name for name, value in model.named_parameters() if name.removesuffix(".weight") not in stored]
    values = dict(model.named_parameters())
    tied = {"lm_head.weight"} if model.config.tie_word_embeddings else set()
    names = {name: stored_name(name, family) for name in kept if name not in tied}
    tensors |= {names[name]: values[name].detach().half().cpu().contiguous() for name in names}
    save_file(tensors, output / "model.safetensors", {"format": "pt"})
    matrices = [names[name] for name in names if values[name].dim() == 2]
    settings = json.loads((source / "config.json").read_text(encoding="utf-8"))
    settings |= {"quantization_config": settings_of(layout, matrices), "dtype": "float16"}
    write_text(output / "config.json", json.dumps(settings, indent=2) + "\n")


# ---- what its weights look like --------------------------------------------------------------------------------------


def dequantized(folder: Path, module: str) -> "torch.Tensor":
    """The weights (out, in) that a module of a quantized model stands for, in fp32."""
    from safetensors import safe_open

    from helpers.models import aqlm

    parts = {}
    for file in sorted(folder.glob("*.safetensors")):
        with safe_open(file, "pt") as tensors:
            for part in ("codes", "codebooks", "scales"):
                if f"{module}.{part}" in tensors.keys():  # noqa: SIM118 - not a dict
                    parts[part] = tensors.get_tensor(f"{module}.{part}")
    if len(parts) < 3:
        raise ValueError(f"{folder} has no {module}")
    import torch

    return aqlm.gathered(parts["codes"], parts["codebooks"].float(), parts["scales"].float(), torch.float32)
