"""GPTQ (https://arxiv.org/abs/2210.17323) by GPTQModel, a layer at a time from the folder on disk.

For each linear layer, W (out, in) with inputs X (tokens, in) from the calibration text, GPTQ looks for codes Q that
keep W X and not W: it rounds column after column, and after each spreads the rounding error over the columns that are
still to come, by the inverse of the Hessian H = 2 XᵀX (the paper's section 3, equations 2 and 3). Layers are done in
their order, each with the inputs that the quantized layers before it give.
"""

import json
import os
import shutil
import time
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

from helpers.config import QuantizeConfig
from helpers.models import ModelShape, gptq_kernels
from helpers.workspace import write_text

if TYPE_CHECKING:
    import torch

GIB = 2**30
BATCH_TOKENS = 4096
"""Tokens that go through a layer at once."""


def refuse(sizes: ModelShape, config: QuantizeConfig) -> None:
    """Raises ValueError for a mixture of experts, or when a layer's input width is no multiple of the group size."""
    if sizes.experts > 1:
        raise ValueError(
            f"{sizes.name} is a mixture of {sizes.experts} experts, whose layers GPTQ here does not know: evaluate and "
            "serve the adapter on its base in NF4, which is as small"
        )
    widths = {name: inputs for name, (inputs, _) in sizes.linears.items()}
    odd = [name for name, width in widths.items() if config.group_size > 0 and width % config.group_size]
    if odd:
        fitting = [size for size in (128, 64, 32) if not any(width % size for width in widths.values())]
        raise ValueError(
            f"group_size={config.group_size} does not divide the {widths[odd[0]]} inputs of {odd[0]}; "
            f"group_size={fitting[0] if fitting else -1} does"
        )


def least_tokens(sizes: ModelShape) -> int:
    """Inputs of the widest layer: with fewer tokens than that its Hessian, XᵀX over all tokens, cannot have full rank.

    >>> from helpers.models import shape
    >>> least_tokens(shape("mistral-7b-v0.3"))
    14336
    """
    return max(inputs for inputs, _ in sizes.linears.values())


def remedies(config: QuantizeConfig) -> str:
    """What makes a quantized model better, of what this run has not tried.

    >>> remedies(QuantizeConfig(act_order=True, calibration="both"))
    'calibration_samples=256, group_size=64 or 8 bits do better'
    """
    tries = [f"calibration_samples={2 * config.calibration_samples}"]
    tries += [] if config.calibration == "both" else ["calibration=both"]
    tries += [] if config.act_order else ["act_order"]
    tries += {-1: ["group_size=128"], 128: ["group_size=64"], 64: ["group_size=32"]}.get(config.group_size, [])
    tries += [] if config.bits == 8 else [f"{ {2: 3, 3: 4, 4: 8}[config.bits] } bits"]
    return f"{', '.join(tries[:-1])} or {tries[-1]} do better" if len(tries) > 1 else f"{tries[0]} does better"


def environment() -> dict[str, str]:
    """Environment of the process, read by GPTQModel when it is imported.

    No compiled packing: on a GPU `make` packs there, and without one, compiling takes longer than it saves. What is
    compiled, once, is GPTQ's own step: 19 s on the first layer, then 2.2 s a layer of a 7B instead of 10.1
    (data/measurements/merge_quantize.csv).
    """
    packing = {"GPTQMODEL_DISABLE_PACK_EXT": os.environ.get("GPTQMODEL_DISABLE_PACK_EXT", "1")}
    return gptq_kernels.environment() | packing


# ---- in the process of its own ---------------------------------------------------------------------------------------


def make(job: dict, report: Callable[[dict], object], batch_tokens: int = BATCH_TOKENS, **library: object) -> None:
    """Quantize job["model"] into job["output"], a message a module, then one with time and memory.

    library: more of GPTQModel's own settings, for measurements.
    """
    import torch
    from gptqmodel import GPTQModel
    from gptqmodel import QuantizeConfig as LibraryConfig
    from gptqmodel.looper.gptq_processor import GPTQProcessor

    config, output, gpu = job["config"], Path(job["output"]), torch.cuda.is_available()
    show_row = GPTQProcessor.log_new_row

    # GPTQModel tells a module's error only to its log: each row of that table becomes a message, then goes there too
    def report_row(processor: GPTQProcessor, row: dict) -> None:
        report({"layer": row["layer"], "module": row["module"], **error_of(row["loss"])})
        show_row(processor, row)

    GPTQProcessor.log_new_row = report_row
    settings = LibraryConfig(
        bits=config["bits"],
        group_size=config["group_size"],
        sym=config["symmetric"],
        desc_act=config["act_order"],
        offload_to_disk_path=str(output / "offload"),
        **({"pack_impl": "gpu"} if gpu else {}) | library,
    )
    start = time.monotonic()
    # fp16 whatever the folder says: a T4 has no bf16, and GPTQModel would keep it; a CPU computes fp32 twice as fast
    model = GPTQModel.load(job["model"], settings, dtype=torch.float16 if gpu else torch.float32)
    # Rows of one length need no padding, whose activations would enter the Hessians
    rows = [{"input_ids": ids, "attention_mask": [1] * len(ids)} for ids in job["rows"]]
    model.quantize(rows, batch_size=max(1, batch_tokens // config["calibration_tokens"]))
    quantized = time.monotonic()
    model.save(str(output))
    if not gpu:
        store_in_fp16(output)
    name_no_folder(output)
    for scratch in ("offload", "logs"):
        shutil.rmtree(output / scratch, ignore_errors=True)
    report(
        {
            "quantize_s": round(quantized - start, 1),
            "save_s": round(time.monotonic() - quantized, 1),
            "peak_allocated_gib": round(torch.cuda.max_memory_allocated() / GIB, 3) if gpu else None,
            "peak_reserved_gib": round(torch.cuda.max_memory_reserved() / GIB, 3) if gpu else None,
        }
    )


def store_in_fp16(folder: Path) -> None:
    """Write what GPTQModel saved in fp32 (embedding, head, norms) as fp16."""
    import torch
    from safetensors.torch import load_file, save_file

    for file in folder.glob("*.safetensors"):
        tensors = load_file(file)
        halves = {name: value.half() if value.dtype == torch.float32 else value for name, value in tensors.items()}
        save_file(halves, file, metadata={"format": "pt"})


def name_no_folder(folder: Path) -> None:
    """Take the folder where GPTQModel parked layers out of both of its settings: it is of this machine, and gone."""
    for name in ("config.json", "quantize_config.json"):
        settings = json.loads((folder / name).read_text(encoding="utf-8"))
        settings.get("quantization_config", settings)["meta"].pop("offload_to_disk_path", None)
        write_text(folder / name, json.dumps(settings, indent=2) + "\n")


def error_of(loss: str) -> dict:
    """GPTQModel's loss of a module as a number; it writes words where it fell back to rounding."""
    try:
        return {"error": float(loss)}
    except ValueError:
        return {"error": None, "note": loss}


# ---- what its weights look like --------------------------------------------------------------------------------------


def dequantized(folder: Path, module: str) -> "torch.Tensor":
    """The weights (out, in) that a module of a quantized model stands for, in fp32.

    module: such as model.layers.0.self_attn.q_proj. The format: qweight holds the codes of 32 inputs in `bits` words of
    32 bits, qzeros the zero of each group less one, scales the size of a step; w = scale × (code - zero).
    """
    from safetensors import safe_open

    settings = json.loads((folder / "quantize_config.json").read_text(encoding="utf-8"))
    parts = {}
    for file in sorted(folder.glob("*.safetensors")):
        with safe_open(file, "pt") as tensors:
            names = [name for name in tensors.keys() if name.rpartition(".")[0] == module]  # noqa: SIM118
            parts |= {name.rpartition(".")[2]: tensors.get_tensor(name) for name in names}
    if "qweight" not in parts:
        raise ValueError(f"{folder} has no quantized {module}")
    codes = unpack(parts["qweight"].T, settings["bits"])  # (out, in)
    zeros = unpack(parts["qzeros"], settings["bits"]).T + 1  # (out, groups)
    # Columns of a group share a scale; with act_order they lie anywhere, and g_idx tells each column's group
    group = parts["g_idx"].long()  # (in,)
    return parts["scales"].float().T[:, group] * (codes - zeros[:, group])


def unpack(words: "torch.Tensor", bits: int) -> "torch.Tensor":
    """Codes of `bits` bits that lie one after another in 32-bit words. words: (rows, n); returns (rows, 32 n / bits).

    >>> import torch
    >>> unpack(torch.tensor([[0x76543210]], dtype=torch.int32), bits=4).tolist()
    [[0, 1, 2, 3, 4, 5, 6, 7]]
    """
    import numpy as np
    import torch

    # Lowest bits first, also across words: with 3 bits every third code lies in two of them, so a row is one stream
    raw = np.ascontiguousarray(words.numpy()).view(np.uint8)  # (rows, 4 n)
    stream = np.unpackbits(raw, axis=1, bitorder="little").reshape(len(raw), -1, bits)
    return torch.from_numpy(stream @ (1 << np.arange(bits)))
