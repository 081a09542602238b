"""How numbers are said to people, the same everywhere."""

import math

from helpers.config import RunConfig


def duration(hours: float) -> str:
    """Hours as people say them.

    >>> duration(0.01), duration(0.5), duration(7.42), duration(346.6)
    ('1 min', '30 min', '7.4 h', '347 h')
    """
    if hours < 1:
        return f"{max(60 * hours, 1):.0f} min"
    return f"{hours:.1f} h" if hours < 100 else f"{hours:,.0f} h"


def steps_of(config: RunConfig, rows: int) -> int:
    """Optimizer steps of a run over so many training rows."""
    rows_a_step = config.train.batch_size * config.train.accumulation
    return config.train.max_steps or math.ceil(math.ceil(rows / rows_a_step) * config.train.epochs)
