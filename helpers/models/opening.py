"""What transformers is told to open a quantized model: dtype, options, and the kernel's name for people."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

Say = Callable[[str], object]


@dataclass(frozen=True)
class Opening:
    """How a quantized model is opened."""

    dtype: Any
    options: Mapping[str, Any] = field(default_factory=dict)
    """More arguments of from_pretrained."""
    kernel: str = ""
    """What multiplies its weights, in words; "" when there is nothing to say."""


def plainly(config: dict, best: Any, device: str, say: Say = print) -> Opening:
    """As config.json says, which transformers reads by itself; in the dtype that other models have."""
    return Opening(best)
