"""An importance matrix: the mean square of what meets each column of a matrix, on the run's own conversations.

llama.cpp's quantizers weigh their rounding by it: types of 2 bits need one. On the toy model, fine-tuned, IQ3_S then
lost a third less (KL 0.031 to 0.020 on 60 held-out conversations) and Q4_K_M a fifth; Q3_K_M and IQ4_XS stayed where
they were, give or take what a few tokens decide: their median KL is 0.0001, and single tokens reach 5. It is written in
llama.cpp's own format (an .imatrix in GGUF: sums of squares and counts by tensor), so llama-quantize reads ours, and we
read what llama-imatrix wrote.

>>> gguf_name("base_model.model.model.layers.3.self_attn.q_proj.base_layer")
'blk.3.attn_q.weight'
"""

import hashlib
import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from safetensors import safe_open

from helpers.config import RunConfig
from helpers.models.gguf_types import file_type
from helpers.workspace import Workspace
from helpers.workspace.prepared import conversations

if TYPE_CHECKING:
    import torch

    from helpers.inference import Loaded

PARTS = {
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
}
"""transformers' linear layers in a decoder layer -> GGUF's; the head is left out, as llama-imatrix leaves it out."""
MARK = "recipes.last_norm_sha256"
"""What ties a matrix to its model: training and merging leave the last norm as it was, another base has another."""
ROWS, TOKENS = 128, 512
"""Conversations that are read, and tokens of each: what GPTQ's calibration reads too."""


def gguf_name(module: str) -> str | None:
    """GGUF's name of a decoder layer's matrix, whatever wraps the module; None for any other module."""
    found = re.search(r"(?:^|\.)layers\.(\d+)\.((?:self_attn|mlp)\.\w+_proj)(?:\.base_layer)?$", module)
    return f"blk.{found[1]}.{PARTS[found[2]]}.weight" if found and found[2] in PARTS else None


def for_run(run: Workspace, config: RunConfig, types: str, wanted: bool = False) -> Path | None:
    """The run's importance matrix, collected when a type needs one or it is wanted; else None.

    Collected on the fine-tuned model, the base as training saw it with its adapter: small enough for a T4.
    """
    if not wanted and not any(file_type(name.strip()).needs_importance for name in types.split(",")):
        return None
    output = run.folder("export").with_name("importance.gguf")
    from helpers import inference
    from helpers.models.gpu import free_memory

    loaded = inference.load(run.folder("finetune") / "adapter", config)
    try:
        collect(loaded, rows_of(run.folder("prepare")), output)
    finally:
        del loaded
        free_memory()
    return output


def rows_of(prepared: Path, rows: int = ROWS, tokens: int = TOKENS) -> Iterator[list[int]]:
    """Token ids of prepared training conversations, the first of them, each cut to so many tokens."""
    found = conversations(Path(prepared) / "train")
    for row in found.select(range(min(rows, len(found))))["input_ids"]:
        yield list(row[:tokens])


def collect(loaded: "Loaded", rows: Iterator[list[int]], output: Path) -> dict[str, np.ndarray]:
    """Read conversations with an open model and write what met each matrix; returns the means by GGUF name.

    Raises ValueError when there is nothing to read, or nothing in the model to look at.
    """
    import torch

    sums: dict[str, torch.Tensor] = {}
    counts: dict[str, int] = {}
    read = 0
    with watching(loaded.model, sums, counts), torch.inference_mode():
        for ids in rows:
            loaded.model(torch.tensor([ids], device=loaded.model.device), logits_to_keep=1, use_cache=False)
            read += 1
    if not read or not sums:
        raise ValueError("an importance matrix needs conversations and a model with linear layers: there were none")
    squares = {name: total.cpu().numpy().astype(np.float32) for name, total in sums.items()}
    write(Path(output), squares, counts, read, fingerprint(loaded.model.get_parameter(norm_of(loaded.model))))
    return {name: total / counts[name] for name, total in squares.items()}


@contextmanager
def watching(model: Any, sums: dict[str, "torch.Tensor"], counts: dict[str, int]) -> Iterator[None]:
    """Add up the squares of every linear layer's inputs, by column and in fp64, while the block runs."""
    import torch

    def add(name: str, inputs: "torch.Tensor") -> None:
        squares = inputs.detach().reshape(-1, inputs.shape[-1]).float().square().sum(0, dtype=torch.float64)
        sums[name] = squares if name not in sums else sums[name] + squares
        counts[name] = counts.get(name, 0) + inputs.numel() // inputs.shape[-1]

    hooks = []
    wrapped = {name.removesuffix(".base_layer") for name, _ in model.named_modules() if name.endswith(".base_layer")}
    for path, module in model.named_modules():
        name = gguf_name(path)
        if name is not None and path not in wrapped:  # PEFT's wrapper and what it wraps see the same inputs
            hooks.append(module.register_forward_pre_hook(lambda _, args, name=name: add(name, args[0])))
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


def norm_of(model: Any) -> str:
    """Name of the last norm's weight, whatever wraps the model."""
    return next(name for name, _ in model.named_parameters() if re.search(r"(?:^|\.)model\.norm\.weight$", name))


def fingerprint(norm: "torch.Tensor") -> str:
    """SHA-256 of the last norm in bf16, which no precision that a model is opened in changes."""
    import torch

    return hashlib.sha256(norm.detach().to(torch.bfloat16).cpu().view(torch.int16).numpy().tobytes()).hexdigest()


def write(output: Path, squares: dict[str, np.ndarray], counts: dict[str, int], chunks: int, mark: str) -> None:
    """Sums of squares and counts as llama-imatrix writes them; whole or not there."""
    from gguf import GGUFWriter

    from helpers.export.gguf_file import finish

    writer = GGUFWriter(None, "")
    writer.kv_data[0].pop("general.architecture", None)  # an importance matrix has none
    writer.add_type("imatrix")
    writer.add_array("imatrix.datasets", ["the run's training conversations"])
    writer.add_uint32("imatrix.chunk_count", chunks)
    writer.add_uint32("imatrix.chunk_size", TOKENS)
    writer.add_string(MARK, mark)
    for name, total in squares.items():
        writer.add_tensor(f"{name}.in_sum2", total[None])
        writer.add_tensor(f"{name}.counts", np.array([[counts[name]]], np.float32))
    finish(writer, output)


def read(file: Path, model: Path) -> dict[str, np.ndarray]:
    """GGUF name of a matrix -> (columns,) mean squares, of a file made for a model.

    Raises ValueError for a file that is none, and for that of another model: other matrices, other widths, or another
    last norm.
    """
    from gguf import GGUFReader

    from helpers.export.gguf_file import settings_of, tensors_of

    file = Path(file)
    if not file.is_file():
        raise ValueError(f"there is no importance matrix {file}: collect one, or choose a type that needs none")
    try:
        reader = GGUFReader(file)
        stored = {tensor.name: np.array(tensor.data, np.float32).reshape(-1) for tensor in reader.tensors}
    except (ValueError, IndexError, OSError) as error:
        raise ValueError(f"{file} is no whole importance matrix in GGUF ({error}): collect it again") from None
    names = [name.removesuffix(".in_sum2") for name in stored if name.endswith(".in_sum2")]
    means = {name: stored[f"{name}.in_sum2"] / max(float(stored[f"{name}.counts"][0]), 1.0) for name in names}
    settings = settings_of(model)
    tensors = {tensor.name: tensor for tensor in tensors_of(model, settings)}
    expected = {name: tensor.columns for name, tensor in tensors.items() if gguf_part(name) in PARTS.values()}
    found = {name: len(values) for name, values in means.items() if gguf_part(name) in PARTS.values()}
    if found != expected:
        odd = min(set(expected.items()) ^ set(found.items()))[0]
        raise ValueError(
            f"{file} is an importance matrix of another model: it has {found.get(odd, 'no')} columns for {odd}, and "
            f"{model} has {expected.get(odd, 'none')}; collect one with this model"
        )
    mark = reader.fields.get(MARK)
    if mark is not None and mark.contents() != norm_mark(tensors["output_norm.weight"]):
        raise ValueError(f"{file} is an importance matrix of another model of the same shape: collect one with {model}")
    return means


def gguf_part(name: str) -> str:
    """The part of a layer that a GGUF name names.

    >>> gguf_part("blk.3.attn_q.weight")
    'attn_q'
    """
    return name.removesuffix(".weight").rsplit(".", 1)[-1]


def norm_mark(tensor: Any) -> str:
    """The fingerprint of a folder's last norm."""
    with safe_open(str(tensor.shard), framework="pt") as stored:
        return fingerprint(stored.get_tensor(tensor.source))
