"""Elementwise operations of a decoder layer with their gradients: a Triton kernel each on a GPU, PyTorch elsewhere.

Each reads its inputs once and writes its result once, where PyTorch's own operations would take three to eight passes
over memory and keep fp32 copies. Rounding follows transformers' modules: statistics and exponentials in fp32, results
in the activations' type.

>>> x, ones = torch.tensor([[3.0, 4.0]]), torch.ones(2)
>>> rms_norm(x, ones, eps=0.0)
tensor([[0.8485, 1.1314]])
"""

from collections.abc import Callable
from typing import Any

import torch

try:
    import triton
    import triton.language as tl
except ImportError:  # PyTorch's CPU wheels have none
    triton = None


def rms_norm(x: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
    """x / rms(x) * weight over the last axis (https://arxiv.org/abs/1910.07467). x: (tokens, hidden)."""
    if not on_triton(x):
        # Rounded to x's type before the weight comes in, as transformers' module does: the order decides the last bit.
        inverse = torch.rsqrt(x.float().square().mean(-1, keepdim=True) + eps)
        return weight * (x.float() * inverse).to(x.dtype)
    out = torch.empty_like(x)
    block, warps = row_block(x.shape[1])
    _rms_norm[(x.shape[0],)](x, weight, out, eps, x.shape[1], BLOCK=block, num_warps=warps)
    return out


def rms_norm_backward(
    grad: torch.Tensor, x: torch.Tensor, weight: torch.Tensor, eps: float, residual: torch.Tensor, out: torch.Tensor
) -> torch.Tensor:
    """out = residual + gradient for x of rms_norm(x), given the gradient for its result. All (tokens, hidden).

    With r = 1 / rms(x), n = r x and s = gradient · weight it is r (s - n mean(s n)): the second term is what x changes
    through r. The weight is frozen and gets none. Only x is saved: r and n are made again.
    """
    if not on_triton(x):
        inverse = torch.rsqrt(x.float().square().mean(-1, keepdim=True) + eps)
        normed, scaled = x.float() * inverse, (grad * weight).float()
        inner = inverse * (scaled - normed * (scaled * normed).mean(-1, keepdim=True))
        return out.copy_(residual.float() + inner)
    block, warps = row_block(x.shape[1])
    _rms_norm_backward[(x.shape[0],)](grad, x, weight, residual, out, eps, x.shape[1], BLOCK=block, num_warps=warps)
    return out


def rotate_(states: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, back: bool = False) -> torch.Tensor:
    """Rotary positions, in place (https://arxiv.org/abs/2104.09864). back: the gradient, a rotation the other way.

    states: (tokens, heads, head_dim), contiguous. cos, sin: (rows, head_dim); token t takes row t % rows. A head's
    value i turns with value i + head_dim / 2, as in the weights on the hub; the paper pairs neighbours.
    """
    tokens, heads, size = states.shape
    half = size // 2
    if not on_triton(states):
        repeat = tokens // cos.shape[0]
        # transformers writes the angles twice, for both halves; the first half is enough.
        cos, sin = cos.repeat(repeat, 1)[:, None, :half], sin.repeat(repeat, 1)[:, None, :half]
        first, second = states[..., :half].clone(), states[..., half:].clone()
        sin = -sin if back else sin
        states[..., :half] = first * cos - second * sin
        states[..., half:] = second * cos + first * sin
        return states
    _rotate[(tokens,)](
        states, cos, sin, cos.shape[0], cos.stride(0), heads, HALF=half, BACK=back, HEADS=triton.next_power_of_2(heads)
    )
    return states


def swiglu(gate: torch.Tensor, up: torch.Tensor, out: torch.Tensor | None = None) -> torch.Tensor:
    """silu(gate) * up (https://arxiv.org/abs/2002.05202), into out when it is given (gate itself may be)."""
    if not on_triton(gate):
        return torch.mul(torch.nn.functional.silu(gate), up, out=out)
    out = torch.empty_like(gate) if out is None else out
    _swiglu[(triton.cdiv(gate.numel(), 1024),)](gate, up, out, gate.numel(), BLOCK=1024)
    return out


def swiglu_backward_(grad: torch.Tensor, gate: torch.Tensor, up: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Gradients for gate and up, written over them, given the gradient for swiglu's result."""
    if not on_triton(gate):
        # silu(x) = x σ(x), so silu'(x) = σ(x) (1 + x (1 - σ(x))), because σ' = σ (1 - σ)
        sigmoid = torch.sigmoid(gate.float())
        silu = gate.float() * sigmoid
        slope = sigmoid * (1 + gate.float() * (1 - sigmoid))
        gate_grad, up_grad = grad.float() * up.float() * slope, grad.float() * silu
        return gate.copy_(gate_grad), up.copy_(up_grad)
    _swiglu_backward[(triton.cdiv(gate.numel(), 1024),)](grad, gate, up, gate.numel(), BLOCK=1024)
    return gate, up


def dequantize(packed: torch.Tensor, state: Any, dtype: torch.dtype) -> torch.Tensor:
    """A matrix that bitsandbytes packed in 4 bits (QLoRA, https://arxiv.org/abs/2305.14314), as dtype: state.shape.

    state: its QuantState. With double quantization (section 3 there) a block's scale is itself a byte, with a scale for
    each 256 of them: equation 6. bitsandbytes runs three kernels for that; here it is one.
    """
    blocks = state.absmax.numel()
    if not on_triton(packed) or blocks * state.blocksize != state.shape.numel():
        return bitsandbytes_dequantize(packed, state, dtype)
    out = torch.empty(state.shape, dtype=dtype, device=packed.device)
    groups = state.state2 if state.nested else None
    # No fused multiply-add: bitsandbytes rounds a scale's product before it adds the offset.
    _dequantize[(triton.cdiv(blocks, 64),)](
        packed, state.absmax, state.code, out, blocks,
        groups.code if groups else None, groups.absmax if groups else None, state.offset if groups else None,
        NESTED=bool(groups), GROUP=groups.blocksize if groups else 1, HALF=state.blocksize // 2, BLOCKS=64,
        enable_fp_fusion=False,
    )  # fmt: skip
    return out


def bitsandbytes_dequantize(packed: torch.Tensor, state: Any, dtype: torch.dtype) -> torch.Tensor:
    """The same through bitsandbytes' kernels."""
    from bitsandbytes.functional import dequantize_4bit

    return dequantize_4bit(packed.view(-1, 1), state).to(dtype)


def dequantizer(weight: torch.Tensor, state: Any = None) -> Callable[[torch.Tensor, Any, torch.dtype], torch.Tensor]:
    """`dequantize` where it gives on this device, bit for bit, what bitsandbytes gives for a packed weight; else that.

    Asked once before training, on one matrix: Triton compiles anew for each GPU, and a wrong weight raises nothing.
    state: its QuantState, where the weight itself has none.
    """
    packed, state = weight.data.view(torch.uint8), state or weight.quant_state
    expected = bitsandbytes_dequantize(packed, state, state.dtype)
    return dequantize if torch.equal(dequantize(packed, state, state.dtype), expected) else bitsandbytes_dequantize


def on_triton(x: torch.Tensor) -> bool:
    """Whether a tensor is where Triton's kernels run."""
    return triton is not None and x.is_cuda


def row_block(columns: int) -> tuple[int, int]:
    """(block, warps) for a kernel that holds one row."""
    block = triton.next_power_of_2(columns)
    return block, min(max(block // 512, 1), 16)


if triton is not None:

    @triton.jit
    def _rms_norm(x, weight, out, eps, columns, BLOCK: tl.constexpr):
        # A program a row, all of it in registers. 64 bits: tokens × hidden passes 2³¹ at 524,288 tokens of 4,096.
        row, column = tl.program_id(0).to(tl.int64), tl.arange(0, BLOCK)
        inside = column < columns
        values = tl.load(x + row * columns + column, mask=inside, other=0.0)
        wide = values.to(tl.float32)
        inverse = tl.rsqrt(tl.sum(wide * wide, 0) / columns + eps)
        scale = tl.load(weight + column, mask=inside, other=0.0)
        tl.store(out + row * columns + column, (wide * inverse).to(values.dtype) * scale, mask=inside)

    @triton.jit
    def _rms_norm_backward(grad, x, weight, residual, out, eps, columns, BLOCK: tl.constexpr):
        row, column = tl.program_id(0).to(tl.int64), tl.arange(0, BLOCK)
        inside = column < columns
        place = row * columns + column
        wide = tl.load(x + place, mask=inside, other=0.0).to(tl.float32)
        inverse = tl.rsqrt(tl.sum(wide * wide, 0) / columns + eps)
        normed = wide * inverse
        # gradient · weight, and its mean product with the normed row: the row's second sum, both in fp32
        scaled = tl.load(grad + place, mask=inside, other=0.0).to(tl.float32)
        scaled *= tl.load(weight + column, mask=inside, other=0.0).to(tl.float32)
        inner = inverse * (scaled - normed * (tl.sum(scaled * normed, 0) / columns))
        straight = tl.load(residual + place, mask=inside, other=0.0).to(tl.float32)
        tl.store(out + place, straight + inner, mask=inside)

    @triton.jit
    def _rotate(states, cos, sin, rows, stride, heads, HALF: tl.constexpr, BACK: tl.constexpr, HEADS: tl.constexpr):
        # A program a token turns all its heads; HEADS is their number, rounded up to a power of two as Triton wants.
        token = tl.program_id(0).to(tl.int64)
        head, place = tl.arange(0, HEADS)[:, None], tl.arange(0, HALF)[None, :]
        inside = (head < heads) & (place < HALF)
        cosine = tl.load(cos + (token % rows) * stride + place).to(tl.float32)
        sine = tl.load(sin + (token % rows) * stride + place).to(tl.float32)
        if BACK:  # a rotation's gradient is its transpose, the rotation by the negative angle
            sine = -sine
        start = states + token * heads * (2 * HALF) + head * (2 * HALF) + place
        first = tl.load(start, mask=inside, other=0.0).to(tl.float32)
        second = tl.load(start + HALF, mask=inside, other=0.0).to(tl.float32)
        tl.store(start, first * cosine - second * sine, mask=inside)
        tl.store(start + HALF, second * cosine + first * sine, mask=inside)

    @triton.jit
    def _swiglu(gate, up, out, size, BLOCK: tl.constexpr):
        place = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
        inside = place < size
        left = tl.load(gate + place, mask=inside, other=0.0)
        right = tl.load(up + place, mask=inside, other=0.0)
        wide = left.to(tl.float32)
        # silu is rounded before it is multiplied, as by PyTorch's two operations
        tl.store(out + place, (wide * tl.sigmoid(wide)).to(left.dtype) * right, mask=inside)

    @triton.jit
    def _swiglu_backward(grad, gate, up, size, BLOCK: tl.constexpr):
        place = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
        inside = place < size
        above = tl.load(grad + place, mask=inside, other=0.0).to(tl.float32)
        left = tl.load(gate + place, mask=inside, other=0.0).to(tl.float32)
        right = tl.load(up + place, mask=inside, other=0.0).to(tl.float32)
        sigmoid = tl.sigmoid(left)
        # Both inputs are in registers by now, and nobody needs them again: their gradients take their memory.
        tl.store(gate + place, above * right * sigmoid * (1 + left * (1 - sigmoid)), mask=inside)
        tl.store(up + place, above * left * sigmoid, mask=inside)

    @triton.jit
    def _dequantize(
        packed, scales, levels, out, blocks, scale_levels, group_scales, offset,
        NESTED: tl.constexpr, GROUP: tl.constexpr, HALF: tl.constexpr, BLOCKS: tl.constexpr,
    ):  # fmt: skip
        # A program takes BLOCKS blocks of 2 · HALF values (64 in QLoRA) that share a scale each.
        block = tl.program_id(0).to(tl.int64) * BLOCKS + tl.arange(0, BLOCKS)
        inside = block < blocks
        scale = tl.load(scales + block, mask=inside, other=0)
        if NESTED:  # the scale is a code: level × its group's scale + the mean that was taken off all of them
            group = tl.load(group_scales + block // GROUP, mask=inside, other=0.0)
            scale = tl.load(scale_levels + scale.to(tl.int32)) * group + tl.load(offset)
        place = block[:, None] * HALF + tl.arange(0, HALF)[None, :]
        # A byte holds two values, the first in its high half; each is one of 16 levels (NF4's quantiles of a normal).
        pair = tl.load(packed + place, mask=inside[:, None], other=0).to(tl.int32)
        first = tl.load(levels + (pair >> 4)) * scale[:, None]
        second = tl.load(levels + (pair & 15)) * scale[:, None]
        values = tl.interleave(first, second).to(out.dtype.element_ty)
        place = block[:, None] * (2 * HALF) + tl.arange(0, 2 * HALF)[None, :]
        tl.store(out + place, values, mask=inside[:, None])
