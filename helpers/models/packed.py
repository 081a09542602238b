"""A linear layer whose weights stay in llama.cpp's blocks and are dequantized when they are used, in PyTorch.

So a GGUF file is evaluated through the same code as every other model, on a GPU that its 16-bit weights would not fit.
The layouts are those of ggml-quants.c; each dequantizer gives the bits of `gguf.quants.dequantize` (a test holds them).
llama.cpp itself also rounds activations to 8 bits, which this does not: a row of a table says which engine it is from.

>>> block = torch.zeros(1, 34, dtype=torch.uint8)
>>> block[0, 1], block[0, 2:] = 0x3C, 2                    # d = 1.0 in fp16, 32 values of 2
>>> dequantize(block, "Q8_0").unique()
tensor([2.])
"""

from collections.abc import Callable
from functools import cache

import torch

from helpers.models.gguf_sizes import PIECE_VALUES
from helpers.models.gguf_types import BLOCKS

Blocks = torch.Tensor
"""(blocks, bytes of a block), uint8."""


def dequantize(packed: torch.Tensor, kind: str) -> torch.Tensor:
    """packed: (rows, bytes of a row), uint8 -> (rows, columns) in fp32."""
    if kind in ("F16", "F32"):
        return packed.view(torch.float16 if kind == "F16" else torch.float32).float()
    return DEQUANTIZERS[kind](packed.reshape(-1, BLOCKS[kind][1])).reshape(len(packed), -1)


class PackedLinear(torch.nn.Module):
    """y = x Wᵀ with W in blocks; x: (…, columns), y: (…, rows)."""

    def __init__(self, packed: torch.Tensor, kind: str):
        super().__init__()
        self.register_buffer("packed", packed)
        self.kind = kind
        values, size = BLOCKS[kind]
        self.out_features, self.in_features = len(packed), packed.shape[1] // size * values

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        step = max(PIECE_VALUES // self.in_features, 1)
        parts = [
            torch.nn.functional.linear(x, dequantize(rows, self.kind).to(x.dtype)) for rows in self.packed.split(step)
        ]
        return parts[0] if len(parts) == 1 else torch.cat(parts, dim=-1)

    def extra_repr(self) -> str:
        return f"in_features={self.in_features}, out_features={self.out_features}, kind={self.kind}"


class PackedEmbedding(torch.nn.Module):
    """Rows of a matrix in blocks, dequantized for the ids that are asked for; ids: (…) -> (…, columns)."""

    def __init__(self, packed: torch.Tensor, kind: str, dtype: torch.dtype):
        super().__init__()
        self.register_buffer("packed", packed)
        self.kind, self.dtype = kind, dtype

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        rows = dequantize(self.packed[ids.reshape(-1)], self.kind).to(self.dtype)
        return rows.reshape(*ids.shape, -1)


# ---- the layouts -----------------------------------------------------------------------------------------------------


def half(blocks: Blocks, at: int) -> torch.Tensor:
    """The fp16 number at a byte, in fp32: (blocks, 1)."""
    return blocks[:, at : at + 2].contiguous().view(torch.float16).float()


def nibbles(part: torch.Tensor, run: int) -> torch.Tensor:
    """Low halves of a run of bytes, then their high halves: (blocks, bytes) -> (blocks, 2 × bytes)."""
    return fields(part, run, (0, 4), 15)


def fields(part: torch.Tensor, run: int, shifts: tuple[int, ...], mask: int) -> torch.Tensor:
    """Bit fields of bytes, shift by shift within a run: (blocks, bytes) -> (blocks, bytes × shifts), int32."""
    wide = part.int().reshape(len(part), -1, 1, run)
    by = torch.tensor(shifts, dtype=torch.int32, device=part.device).reshape(1, 1, -1, 1)
    return ((wide >> by) & mask).reshape(len(part), -1)


def bits(part: torch.Tensor) -> torch.Tensor:
    """The bits of bytes, the lowest of each first: (blocks, bytes) -> (blocks, 8 × bytes), int32."""
    by = torch.arange(8, dtype=torch.int32, device=part.device)
    return ((part.int()[..., None] >> by) & 1).reshape(len(part), -1)


def q8_0(blocks: Blocks) -> torch.Tensor:
    return half(blocks, 0) * blocks[:, 2:].contiguous().view(torch.int8).float()


def q4_0(blocks: Blocks) -> torch.Tensor:
    return half(blocks, 0) * (nibbles(blocks[:, 2:], 16) - 8).float()


def q5_0(blocks: Blocks) -> torch.Tensor:
    return half(blocks, 0) * ((nibbles(blocks[:, 6:], 16) | bits(blocks[:, 2:6]) << 4) - 16).float()


def q5_1(blocks: Blocks) -> torch.Tensor:
    return half(blocks, 0) * (nibbles(blocks[:, 8:], 16) | bits(blocks[:, 4:8]) << 4).float() + half(blocks, 2)


def six_bits(scales: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Eight scales and eight minima of 6 bits each in 12 bytes, as Q4_K and Q5_K pack them: (blocks, 8) each."""
    low, middle, high = scales.int().reshape(-1, 3, 4).unbind(1)
    scale = torch.cat([low & 63, high & 15 | low >> 2 & 48], dim=1)
    minimum = torch.cat([middle & 63, high >> 4 | middle >> 2 & 48], dim=1)
    return scale.float(), minimum.float()


def scaled(blocks: Blocks, values: torch.Tensor) -> torch.Tensor:
    """values, (blocks, 256), in eight groups: d × scale × value - dmin × minimum, as Q4_K and Q5_K have it."""
    scale, minimum = six_bits(blocks[:, 4:16])
    d, least = half(blocks, 0) * scale, half(blocks, 2) * minimum
    return (d[..., None] * values.reshape(-1, 8, 32).float() - least[..., None]).reshape(len(blocks), -1)


def q4_k(blocks: Blocks) -> torch.Tensor:
    return scaled(blocks, nibbles(blocks[:, 16:], 32))


def q5_k(blocks: Blocks) -> torch.Tensor:
    return scaled(blocks, nibbles(blocks[:, 48:], 32) | fields(blocks[:, 16:48], 32, tuple(range(8)), 1) << 4)


def q6_k(blocks: Blocks) -> torch.Tensor:
    low, high = nibbles(blocks[:, :128], 64), fields(blocks[:, 128:192], 32, (0, 2, 4, 6), 3)
    d = half(blocks, 208) * blocks[:, 192:208].contiguous().view(torch.int8).float()
    return (d[..., None] * ((low | high << 4) - 32).reshape(-1, 16, 16).float()).reshape(len(blocks), -1)


def q3_k(blocks: Blocks) -> torch.Tensor:
    scales = nibbles(blocks[:, 96:104], 8) | fields(blocks[:, 104:108], 4, (0, 2, 4, 6), 3) << 4
    d = half(blocks, 108) * (scales - 32).float()
    low = fields(blocks[:, 32:96], 32, (0, 2, 4, 6), 3)
    missing = 1 - fields(blocks[:, :32], 32, tuple(range(8)), 1)  # a bit that is not set takes 4 away
    return (d[..., None] * (low - 4 * missing).reshape(-1, 16, 16).float()).reshape(len(blocks), -1)


def q2_k(blocks: Blocks) -> torch.Tensor:
    scales = blocks[:, :16].int()
    d, least = half(blocks, 80) * (scales & 15).float(), half(blocks, 82) * (scales >> 4).float()
    values = fields(blocks[:, 16:80], 32, (0, 2, 4, 6), 3).reshape(-1, 16, 16).float()
    return (d[..., None] * values - least[..., None]).reshape(len(blocks), -1)


LEVELS = (-127, -104, -83, -65, -49, -35, -22, -10, 1, 13, 25, 38, 53, 69, 89, 113)
"""The sixteen values of IQ4_NL and IQ4_XS (ggml-common.h: kvalues_iq4nl)."""


def levels(index: torch.Tensor) -> torch.Tensor:
    """The value of each index of four bits."""
    return torch.tensor(LEVELS, dtype=torch.float32, device=index.device)[index]


def iq4_nl(blocks: Blocks) -> torch.Tensor:
    return half(blocks, 0) * levels(nibbles(blocks[:, 2:], 16))


def iq4_xs(blocks: Blocks) -> torch.Tensor:
    high = blocks[:, 2].int() | blocks[:, 3].int() << 8
    by = 2 * torch.arange(8, dtype=torch.int32, device=blocks.device)
    low = torch.stack([blocks[:, 4:8].int() & 15, blocks[:, 4:8].int() >> 4], dim=2).reshape(-1, 8)
    d = half(blocks, 0) * ((low | (high[:, None] >> by & 3) << 4) - 32).float()
    return (d[..., None] * levels(nibbles(blocks[:, 8:], 16)).reshape(-1, 8, 32)).reshape(len(blocks), -1)


@cache
def grid(kind: str, device: torch.device) -> torch.Tensor:
    """The code book of IQ3_S, (512, 4), or IQ2_XXS, (256, 8), as gguf carries it."""
    from gguf import quants

    owner = getattr(quants, kind)
    owner.init_grid()
    return torch.from_numpy(owner.grid.reshape(owner.grid_shape)).to(device)


def iq3_s(blocks: Blocks) -> torch.Tensor:
    low, high = blocks[:, 2:66].int(), bits(blocks[:, 66:74])
    sign = 1 - 2 * bits(blocks[:, 74:106])
    scales = blocks[:, 106:110].int()
    scales = torch.stack([scales & 15, scales >> 4], dim=2).reshape(-1, 8)
    d = half(blocks, 0) * (1 + 2 * scales).float()
    values = grid("IQ3_S", blocks.device)[low | high << 8].reshape(-1, 8, 32)
    return (d[..., None] * values * sign.reshape(-1, 8, 32)).reshape(len(blocks), -1)


@cache
def sign_patterns(device: torch.device) -> torch.Tensor:
    """Seven bits of signs -> eight signs, the last one making their number even: (128, 8)."""
    seven = torch.arange(128)[:, None] >> torch.arange(7) & 1
    return 1 - 2 * torch.cat([seven, seven.sum(1, keepdim=True) % 2], dim=1).to(device)


def iq2_xxs(blocks: Blocks) -> torch.Tensor:
    words = blocks[:, 2:].reshape(-1, 8, 8)
    index, packed = words[..., :4].int(), words[..., 4:].int()
    packed = (
        packed[..., 0].long() | packed[..., 1].long() << 8 | packed[..., 2].long() << 16 | packed[..., 3].long() << 24
    )
    d = half(blocks, 0) * (0.5 + (packed >> 28).float()) * 0.25
    by = 7 * torch.arange(4, device=blocks.device)
    sign = sign_patterns(blocks.device)[packed[..., None] >> by & 127]
    values = grid("IQ2_XXS", blocks.device)[index]
    return (d[..., None, None] * values * sign).reshape(len(blocks), -1)


DEQUANTIZERS: dict[str, Callable[[Blocks], torch.Tensor]] = {
    "Q8_0": q8_0,
    "Q5_1": q5_1,
    "Q5_0": q5_0,
    "Q4_0": q4_0,
    "Q6_K": q6_k,
    "Q5_K": q5_k,
    "Q4_K": q4_k,
    "Q3_K": q3_k,
    "Q2_K": q2_k,
    "IQ4_NL": iq4_nl,
    "IQ4_XS": iq4_xs,
    "IQ3_S": iq3_s,
    "IQ2_XXS": iq2_xxs,
}
"""Type -> (blocks, bytes) to (blocks, values) in fp32."""
