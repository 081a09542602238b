"""AQLM (https://arxiv.org/abs/2401.06118): how a matrix is stored, what that takes, what it cannot do. No torch.

Eight neighbouring weights of a row are the sum of one vector out of each of a few codebooks, times the row's scale:

    w[o, 8g:8g+8] = scale[o] · (codebook₁[code₁[o, g]] + codebook₂[code₂[o, g]] + …)

1x16 has one codebook of 65,536 vectors (16 bits for 8 weights), 2x8 has two of 256. Each matrix has its own codebooks.

>>> ADDITIVE_1X16.bits_per_weight, ADDITIVE_2X8.bits_per_weight
(2.0, 2.0)
>>> ADDITIVE_1X16.bytes_of(inputs=4096, outputs=4096) - ADDITIVE_2X8.bytes_of(inputs=4096, outputs=4096)
1040384
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from helpers.config import RunConfig

NAME = "aqlm"
"""transformers' quant_method, and the value of `weights`."""
CHECKPOINTS = (
    "ISTA-DASLab/Mistral-7B-v0.1-AQLM-PV-2Bit-1x16-hf",
    "ISTA-DASLab/Mixtral-8x7b-AQLM-2Bit-1x16-hf",
)
"""On the hub, in the layout that is read here."""
NO_MERGE = (
    "its weights are sums of codebook vectors (AQLM), into which no adapter can be added: use the adapter on its base, "
    "as evaluate and serve open it"
)


@dataclass(frozen=True)
class Layout:
    """How a matrix is stored."""

    codebooks: int
    bits: int
    """Of a code: a codebook has 2 ** bits vectors."""
    group: int = 8
    """Neighbouring weights of a row that share their codes."""

    @property
    def name(self) -> str:
        """As the hub's names have it."""
        return f"{self.codebooks}x{self.bits}"

    @property
    def code_bytes(self) -> int:
        """Bytes of a code: int8 up to 8 bits, then int16."""
        return 1 if self.bits <= 8 else 2

    @property
    def bits_per_weight(self) -> float:
        """Bits of a weight's codes, without its share of codebooks and scales."""
        return 8 * self.codebooks * self.code_bytes / self.group

    def bytes_of(self, inputs: int, outputs: int) -> int:
        """Bytes of a matrix: codes, codebooks and scales, the last two in 16 bits."""
        codes = outputs * (inputs // self.group) * self.codebooks * self.code_bytes
        return codes + 2 * self.codebooks * 2**self.bits * self.group + 2 * outputs


ADDITIVE_1X16, ADDITIVE_2X8 = Layout(1, 16), Layout(2, 8)


def layout_for(bits: int) -> Layout:
    """What quantize makes: a codebook of 256 vectors for each bit of a weight. Two bits are 2x8."""
    return Layout(bits, 8)


def layout_of(config: Mapping[str, Any]) -> Layout | None:
    """The layout of a config.json; None for another kind of model. Raises ValueError for one that is not read here."""
    settings = config.get("quantization_config") or {}
    if not isinstance(settings, Mapping) or settings.get("quant_method") != NAME:
        return None
    found = {
        name: settings.get(name, default)
        for name, default in {
            "num_codebooks": 1,
            "nbits_per_codebook": 16,
            "in_group_size": 8,
            "out_group_size": 1,
        }.items()
    }
    wrong = next((name for name, value in found.items() if not isinstance(value, int) or value < 1), None)
    if wrong or found["nbits_per_codebook"] > 16 or found["out_group_size"] != 1:
        name = wrong or ("nbits_per_codebook" if found["nbits_per_codebook"] > 16 else "out_group_size")
        raise ValueError(
            f"its quantization_config says {name}={found[name]!r}: AQLM is read here with codes of at most 16 bits "
            f"for weights of one row, such as {' and '.join(CHECKPOINTS)}"
        )
    return Layout(found["num_codebooks"], found["nbits_per_codebook"], found["in_group_size"])


def settings_of(layout: Layout, kept: Sequence[str]) -> dict[str, Any]:
    """quantization_config of a config.json. kept: parameters that are not quantized."""
    return {
        "quant_method": NAME,
        "in_group_size": layout.group,
        "out_group_size": 1,
        "num_codebooks": layout.codebooks,
        "nbits_per_codebook": layout.bits,
        "linear_weights_not_to_quantize": [*kept],
    }


def refuse(layout: Layout | None, name: str, config: RunConfig) -> None:
    """Raise ValueError where a model is stored otherwise than it is to be trained. layout: the model's own."""
    weights = config.model.weights
    if layout is not None and weights != NAME:
        raise ValueError(f"{name} is stored as AQLM {layout.name}: set weights={NAME}, not {weights}")
    if layout is None and weights == NAME:
        raise ValueError(
            f"weights={NAME} needs a model that is stored so, and {name} is not: take one such as "
            f"{' or '.join(CHECKPOINTS)}, or weights=nf4"
        )
    if layout is not None and config.adapter.dora:
        raise ValueError(f"dora needs the norms of dense weights, and {name} is stored as AQLM: set dora=False")
