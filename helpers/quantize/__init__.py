"""A merged model in few bits, on a machine that could not hold it in 16: one file a method.

`quantize.quantize` reads a folder in 16 bits and writes one that transformers opens by itself. What it calibrates on is
calibration.py, what it cost is check.py, the process that does it is process.py.

A method is a file of functions, and a line in METHODS:

    refuse(sizes, config)          raise ValueError in a sentence for settings that it cannot follow with this model
    least_tokens(sizes)            tokens of calibration that it needs at least; 0 for a method that looks at none
    environment()                  what the environment of its process must say before its library is imported
    make(job, report)              in that process: job["model"] into job["output"], calibrated on job["rows"]
    remedies(config)               the end of a sentence: what makes the result better, of what was not tried
    dequantized(folder, module)    weights (out, in) that a module of the result stands for, in fp32

What tells its folders and opens them is its record in models/methods.py.
"""

import shutil
import time
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING

from helpers.budget import host
from helpers.config import QuantizeConfig, RunConfig, load_yaml, save_yaml
from helpers.inference import read_config
from helpers.models import methods, shape
from helpers.models.stored import stored_tensors
from helpers.quantize import additive, check, gptq, process
from helpers.quantize import calibration as texts
from helpers.quantize.calibration import CalibrationError as CalibrationError
from helpers.quantize.process import QuantizationFailed
from helpers.quantize.weights import rounded as rounded
from helpers.quantize.weights import stored_weight as stored_weight
from helpers.workspace import (
    MANIFEST,
    SCRATCH,
    beside,
    building,
    empty_folder,
    exclusive,
    files,
    refuse_output,
    write_manifest,
)

if TYPE_CHECKING:
    import torch

METHODS = {
    "gptq": gptq,
    "aqlm": additive,
}
"""quant_method -> what makes such a model."""


class BrokenResult(QuantizationFailed):
    """The result is far worse than the merged model; the message says by how much, where it lies, and what to try."""


def quantize(
    model: Path, output: Path, config: QuantizeConfig, calibration: str | Path | Sequence[str | Path] = ()
) -> dict:
    """Write the model at config.bits by config.quant_method; GPTQ's is read by transformers, vLLM, ExLlama, AutoGPTQ.

    model: a folder in 16 bits. calibration: the user's own text, as prepared folders, files of conversations in any
    format that notebook 02 reads, or plain text; config.calibration says whether it is used, or the general set, or
    both, or names a file or folder to use instead.
    Returns the measurements: the error of each module, perplexity before and after, size, time, memory. Raises
    ValueError in one sentence, before anything is written, for a model that is already quantized or not whole, too
    little text, too little disk, or an output folder that is in use.
    A result whose perplexity is above check.PERPLEXITY_LIMIT times the merged model's is broken: whoever evaluates,
    shares or serves what lies in `output` must not get it unawares, and a sound one that lies there must not go. But
    half an hour of a T4 is in it, and it is the user's: it is left whole beside, in `<output>.rejected`, and
    BrokenResult says so; renamed to `output` it counts as finished. Above check.PERPLEXITY_BOUND it is finished, with
    a sentence.
    """
    start = time.monotonic()
    model, output = Path(model), Path(output)
    work, log = output.with_name(output.name + ".partial"), output.with_name(output.name + ".log")
    method = chosen(config)
    given = [Path(calibration)] if isinstance(calibration, str | Path) else [Path(path) for path in calibration]
    stored_tensors(model)
    sizes = shape(str(model))
    method.refuse(sizes, config)
    _, own = texts.sources(config, given)
    refuse_output(output, [model, *own], "quantize")
    rows, check_rows = texts.draw(model, config, own, method.least_tokens(sizes))
    run = merged_config(model).with_values(**asdict(config))
    host.check_disk(output, host.quantizing_disk_bytes(run, sizes), "quantizing")
    # Everything above reads only. From here on the work folder is this process's, whatever an earlier end left in it.
    with exclusive(work):
        empty_folder(work)
        try:
            with building(output, "quantize", run, {"merged": model}, keep=True, held=True) as stage:
                log.unlink(missing_ok=True)
                job = {"model": str(model.resolve()), "output": str(work.resolve()), "config": asdict(config)}
                figures = process.run(job | {"rows": rows, "check_rows": check_rows}, method, sizes, log)
                shutil.move(log, work / f"{config.quant_method}.log")
                stage.measurements |= {
                    "bits": config.bits,
                    "group_size": config.group_size,
                    "calibration": config.calibration,
                    "calibration_rows": len(rows),
                    "calibration_tokens": sum(map(len, rows)),
                    "size_bytes": sum(file.stat().st_size for file in work.glob("*.safetensors")),
                    **figures,
                    "perplexity_bound": check.PERPLEXITY_BOUND[config.bits],
                    "within_bound": figures["perplexity_ratio"] <= check.PERPLEXITY_BOUND[config.bits],
                    "total_s": round(time.monotonic() - start, 1),
                }
                # not "above": NaN is no sound result either
                if not figures["perplexity_ratio"] <= check.PERPLEXITY_LIMIT[config.bits]:
                    save_yaml(run, work / "config.yaml")
                    write_manifest(work, "quantize", run, {"merged": model}, stage.measurements)
                    raise BrokenResult(set_aside(work, output, config, figures, method.remedies(config)))
                if not stage.measurements["within_bound"]:
                    print(f"{check.loss_of(config, figures)}, more than usual: {method.remedies(config)}.")
        except BrokenResult:
            raise
        except BaseException:
            empty_folder(work)
            raise
    return stage.measurements


def chosen(config: QuantizeConfig) -> ModuleType:
    """The method that a configuration names. Raises ValueError with those that there are."""
    if config.quant_method not in METHODS:
        raise ValueError(f"quant_method must be {' or '.join(METHODS)}, not {config.quant_method!r}")
    return METHODS[config.quant_method]


def dequantized(folder: Path, module: str) -> "torch.Tensor":
    """The weights (out, in) that a module of a quantized model stands for, in fp32.

    module: such as model.layers.0.self_attn.q_proj. Raises ValueError for a folder that no method here made.
    """
    method = methods.of(read_config(folder))
    if method is None or method.name not in METHODS:
        raise ValueError(f"{folder} is not quantized by {' or '.join(METHODS)}")
    return METHODS[method.name].dequantized(Path(folder), module)


def set_aside(work: Path, output: Path, config: QuantizeConfig, figures: dict, remedies: str) -> str:
    """Leave a broken result whole beside its place, instead of an earlier one; returns the sentence about it."""
    rejected = beside(output, "rejected")
    if (rejected / MANIFEST).is_file():
        shutil.rmtree(rejected)
    elif rejected.exists():
        files.set_aside(rejected, "a broken result goes there, and no stage made it")
    work.rename(rejected)
    shutil.rmtree(rejected / SCRATCH)
    outliers = f"; {'; '.join(figures['standing_out'][:3])}" if figures["standing_out"] else ""
    return (
        f"{check.loss_of(config, figures)}{outliers}: that is broken, so {output} was not written; {remedies}. "
        f"The result lies in {rejected}: to use it all the same, rename it to {output.name}"
    )


def merged_config(model: Path) -> RunConfig:
    """The configuration that the merge left in its folder; the defaults for a model from elsewhere."""
    path = model / "config.yaml"
    return load_yaml(path) if path.is_file() else RunConfig().with_values(model=str(model))
