"""What quantizing cost: perplexity before and after on text that was not calibrated with, and modules that stand out.

>>> standing_out([{"layer": n, "module": "mlp.down_proj", "error": 9.0 if n == 1 else 1.0} for n in range(4)])
['layer 1 mlp.down_proj: 9 where its neighbours have 1']
"""

import math
from collections.abc import Callable
from pathlib import Path
from statistics import median

from helpers import inference
from helpers.config import EvaluateConfig, QuantizeConfig, RunConfig
from helpers.hardware import Machine
from helpers.models import loading
from helpers.models.gpu import free_memory
from helpers.models.opening import Say

PERPLEXITY_BOUND = {8: 1.005, 4: 1.03, 3: 1.15, 2: 2.0}
"""Bits -> how many times the merged model's perplexity is usual; above, a sentence says what to try.

Measured: 12 GPTQs to 4 bits of two small models 0.999 to 1.001, to 3 bits 1.000 to 1.010
(data/measurements/merge_bases.csv). Published for Mistral 7B, other formats: of 4 bits 1.006 to 1.023, of 3 bits 1.028
to 1.066 (https://huggingface.co/ikawrakow/mistral-7b-quantized-gguf). For 2 and 8 bits it is a guess.
"""
PERPLEXITY_LIMIT = {8: 1.02, 4: 1.10, 3: 1.5, 2: 20.0}
"""Bits -> the ratio above which the result is broken, and does not take the place of a finished model."""
STANDS_OUT = 5.0
"""A module is named when its error is so many times the median of the same module in the layers around it."""
AROUND_LAYERS = 4


def loss_of(config: QuantizeConfig, figures: dict) -> str:
    """The first half of a sentence: what quantizing cost.

    >>> loss_of(QuantizeConfig(), {"perplexity_merged": 5.0, "perplexity_gptq": 5.3, "perplexity_ratio": 1.06})
    '4 bits cost this model 6.0 % of perplexity (5.000 before, 5.300 after, usual: at most 3.0 %)'
    """
    usual = 100 * (PERPLEXITY_BOUND[config.bits] - 1)
    before, after = figures["perplexity_merged"], figures[f"perplexity_{config.quant_method}"]
    return (
        f"{config.bits} bits cost this model {100 * (figures['perplexity_ratio'] - 1):.1f} % of perplexity "
        f"({before:.3f} before, {after:.3f} after, usual: at most {usual:.1f} %)"
    )


def layer_error(modules: list[dict], layer: int) -> float:
    """Sum of the errors of a layer's modules, as the method tells them; GPTQ's of a module is |(W - Q) X|² a token."""
    return sum(module["error"] or 0.0 for module in modules if module["layer"] == layer)


def standing_out(modules: list[dict]) -> list[str]:
    """Modules whose error is STANDS_OUT times the median of the same module in the layers around it.

    >>> standing_out([{"layer": n, "module": "mlp.down_proj", "error": 9.0 if n == 1 else 1.0} for n in range(4)])
    ['layer 1 mlp.down_proj: 9 where its neighbours have 1']
    """
    found = []
    # No one bound fits all: an error is a sum over outputs, of inputs whose size changes with depth and kind of module.
    # So a module is held against the same module in the layers around it.
    for module in modules:
        around = [
            other["error"]
            for other in modules
            if other["module"] == module["module"]
            and 0 < abs(other["layer"] - module["layer"]) <= AROUND_LAYERS
            and other["error"]
        ]
        if around and module["error"] and module["error"] > STANDS_OUT * median(around):
            name = f"layer {module['layer']} {module['module']}"
            found.append(f"{name}: {module['error']:.3g} where its neighbours have {median(around):.3g}")
    return found


# ---- in the process of its own ---------------------------------------------------------------------------------------


def measure(job: dict, report: Callable[[dict], object]) -> None:
    """Perplexity of the merged and of the quantized model on other rows, and an answer of the quantized one."""
    import torch

    free_memory()  # what GPTQ left
    merged = opened(Path(job["model"]))
    before = perplexity(merged.model, job["check_rows"])
    del merged
    free_memory()  # hooks that fetch waiting layers make cycles: without a collection all of it stays on the GPU
    quantized = opened(Path(job["output"]), say=lambda sentence: report({"said": sentence}))
    model, tokenizer = quantized.model, quantized.tokenizer
    after = perplexity(model, job["check_rows"])
    question = [{"role": "user", "content": "Who are you?"}]
    if tokenizer.chat_template:
        ids = tokenizer.apply_chat_template(question, add_generation_prompt=True, return_dict=False)
    else:
        ids = tokenizer(question[0]["content"])["input_ids"]
    batch = torch.tensor([ids], device=model.device)
    answer = model.generate(batch, attention_mask=torch.ones_like(batch), max_new_tokens=16, do_sample=False)
    report(
        {
            "perplexity_merged": before,
            f"perplexity_{job['config']['quant_method']}": after,
            "perplexity_ratio": after / before,
            "question": tokenizer.decode(ids),
            "answer": tokenizer.decode(answer[0, len(ids) :], skip_special_tokens=True),
        }
    )


def opened(folder: Path, machine: Machine | None = None, say: Say = print) -> inference.Loaded:
    """A model as its users open it, for one row at a time; layers that do not fit the GPU wait in host memory.

    In fp16 whatever the GPU knows: both models are stored in it, and 8 bits of bf16's mantissa would blur the ratio.
    """
    import torch

    one_row = RunConfig(evaluate=EvaluateConfig(eval_batch_size=1))
    dtype = torch.float16 if loading.device() == "cuda" else torch.float32
    return inference.load(folder, one_row, machine, dtype, say)


def perplexity(model, rows: list[list[int]]) -> float:
    """exp of the mean loss over all tokens but each row's first. rows: token ids."""
    import torch

    loss = count = 0.0
    for row in rows:  # one at a time: (tokens, words) in fp32 is 64 MiB for 512 tokens of Mistral's vocabulary
        ids = torch.tensor([row], device=model.device)
        with torch.inference_mode():
            logits = model(ids).logits[0, :-1].float()  # (tokens - 1, words)
        loss += torch.nn.functional.cross_entropy(logits, ids[0, 1:], reduction="sum").item()
        count += len(row) - 1
    return math.exp(loss / count) if loss / count < 700 else math.inf
