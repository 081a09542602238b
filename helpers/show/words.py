"""How numbers are said to people, the same everywhere."""

import math
from collections.abc import Mapping

from helpers.config import RunConfig

SMALL_GIB = 0.1
"""Smaller pieces of a bar are one piece: nobody sees them, and their labels hide the others."""


def steps_of(config: RunConfig, rows: int) -> int:
    """Optimizer steps of a run over so many training rows."""
    rows_a_step = config.train.batch_size * config.train.accumulation
    return config.train.max_steps or math.ceil(math.ceil(rows / rows_a_step) * config.train.epochs)


def joined(parts_gib: Mapping[str, float], least_gib: float = SMALL_GIB) -> dict[str, float]:
    """Parts of at least so much, and the sum of the smaller ones as "smaller parts".

    >>> joined({"weights": 4.0, "norms": 0.01, "biases": 0.02})
    {'weights': 4.0, 'smaller parts': 0.03}
    """
    large = {name: size for name, size in parts_gib.items() if size >= least_gib}
    rest = sum(size for name, size in parts_gib.items() if name not in large)
    return large | ({"smaller parts": rest} if rest else {})
