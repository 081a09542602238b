"""Methods of quantization: what tells a model that is stored in few bits, opens it, counts it and describes it.

One record a method. A folder is of a method when its config.json says so; then its kind, its row in the table of an
evaluation and its name in a manifest are the method's name. How a method makes such a folder is quantize/NAME.py's.

>>> of({"quantization_config": {"quant_method": "gptq"}}).title
'GPTQ'
>>> of({"model_type": "mistral"}) is None
True
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from helpers.models import aqlm_sizes, gptq_kernels
from helpers.models.opening import Opening, Say, plainly


@dataclass(frozen=True)
class Method:
    """A method of quantization, as its models are found on disk."""

    name: str
    """transformers' quant_method in config.json."""
    title: str
    """In sentences and on bars."""
    card: str
    """A sentence of the model card: how it was made, with settings in braces, and what loads it."""
    opening: Callable[..., Opening] = plainly
    """(config.json, best dtype, device, say) -> how transformers opens it."""
    computes_as: str = "nf4"
    """The row of budget/hours.py's tables that tells what its weights cost when they are read."""


def additively(config: dict, best: Any, device: str, say: Say = print) -> Opening:
    """An AQLM checkpoint, of which the folder says all."""
    return Opening(best, kernel=f"AQLM {aqlm_sizes.layout_of(config).name}")


RECORDS = (
    Method(
        "gptq",
        "GPTQ",
        card="A QLoRA fine-tuned model, quantized with GPTQ to {bits} bits, groups of {group_size}; "
        "transformers opens it with optimum and gptqmodel installed.",
        opening=gptq_kernels.opening,
        computes_as="gptq",
    ),
    Method(
        aqlm_sizes.NAME,
        "AQLM",
        card="Stored as sums of codebook vectors (AQLM), {bits} bits a weight; helpers.models.aqlm opens it, and "
        "transformers with the package aqlm.",
        opening=additively,
        computes_as=aqlm_sizes.NAME,
    ),
)
METHODS = {method.name: method for method in RECORDS}


def of(config: dict) -> Method | None:
    """The method of a config.json; None for a model in 16 bits, and for a method that is not known here."""
    return METHODS.get((config.get("quantization_config") or {}).get("quant_method"))
