"""NF4, the 4-bit type of QLoRA: sixteen levels that are quantiles of a normal distribution (arXiv:2305.14314, §3).

>>> [round(level, 4) for level in levels()[:3]], levels()[7], levels()[15]
([-1.0, -0.6962, -0.5251], 0.0, 1.0)
>>> bits_per_weight(double_quant=False), bits_per_weight(double_quant=True)
(4.5, 4.126953125)
"""

from statistics import NormalDist

BLOCK = 64
"""Weights that share one scale."""
SECOND_BLOCK = 256
"""Scales that share one scale of their own, in double quantization."""
OFFSET = 0.9677083
"""The largest probability whose quantile is a level: midway between 1 - 1/32 and 1 - 1/30, as bitsandbytes has it."""


def levels() -> list[float]:
    """The 16 levels in rising order, from -1 to 1: 7 quantiles below zero, zero itself, 8 above; scaled by the largest.

    Quantiles, so that each of the 16 codes is used equally often by weights that are normally distributed.
    """
    quantile = NormalDist().inv_cdf
    above = [quantile(OFFSET + (0.5 - OFFSET) * step / 8) for step in range(8)]
    below = [-quantile(OFFSET + (0.5 - OFFSET) * step / 7) for step in range(7)]
    return sorted(level / above[0] for level in [*above, 0.0, *below])


def library_levels() -> list[float]:
    """The table that bitsandbytes computes with, to hold ours against."""
    from bitsandbytes.functional import get_4bit_type

    return get_4bit_type("nf4", device="cpu").tolist()


def bits_per_weight(double_quant: bool) -> float:
    """Bits a weight costs: its code, and its share of the scales.

    Without double quantization a block of 64 shares one fp32 scale. With it the scale is 8 bits, and 256 of them share
    one fp32 scale.
    """
    scale_bits = 8 + 32 / SECOND_BLOCK if double_quant else 32
    return 4 + scale_bits / BLOCK


def round_to_levels(block: list[float]) -> list[float]:
    """What NF4 makes of one block of weights: divide by the largest, take the nearest level, multiply back.

    >>> round_to_levels([0.5, -0.02, 0.1])
    [0.5, 0.0, 0.08046...]
    """
    scale = max(abs(weight) for weight in block)
    return [scale * min(levels(), key=lambda level: abs(level - weight / scale)) for weight in block]
