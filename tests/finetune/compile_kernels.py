"""Compile every Triton kernel (engine/kernels.py, models/aqlm.py) for a GPU that is not there, and interpret each.

    python tests/finetune/compile_kernels.py compile 75 80 89 90     # a line of JSON a kernel, type and capability
    TRITON_INTERPRET=1 python tests/finetune/compile_kernels.py run  # and one a comparison with PyTorch

A program of its own: Triton decides at import whether it interprets, and the tests' environment has none.
"""

import json
import sys

import torch

from helpers.finetune.engine import kernels
from helpers.models import aqlm
from helpers.models.aqlm_sizes import ADDITIVE_1X16, ADDITIVE_2X8, Layout

ROW, HEADS, HALF = 4096, 32, 64  # the 7B's hidden width, heads and half of a head
INTEGERS = {"columns", "rows", "stride", "heads", "size", "blocks", "groups", "row_groups"}


def variants(dtype: str) -> list[tuple]:
    """(kernel, pointers' types beside dtype, constants, warps) as they are launched for a 7B."""
    block, warps = kernels.row_block(ROW)
    fp32 = {"scales": "*fp32", "levels": "*fp32", "scale_levels": "*fp32", "group_scales": "*fp32", "offset": "*fp32"}
    packed, nothing = fp32 | {"packed": "*u8"}, dict.fromkeys(("scale_levels", "group_scales", "offset"))
    sizes = {"HALF": 32, "BLOCKS": 64}
    return [
        (kernels._rms_norm, {}, {"BLOCK": block}, warps),
        (kernels._rms_norm_backward, {}, {"BLOCK": block}, warps),
        (kernels._rotate, {}, {"HALF": HALF, "BACK": False, "HEADS": HEADS}, 4),
        (kernels._rotate, {}, {"HALF": HALF, "BACK": True, "HEADS": HEADS}, 4),
        (kernels._swiglu, {}, {"BLOCK": 1024}, 4),
        (kernels._swiglu_backward, {}, {"BLOCK": 1024}, 4),
        (kernels._dequantize, packed | {"scales": "*u8"}, {"NESTED": True, "GROUP": 256, **sizes}, 4),
        (kernels._dequantize, packed, {"NESTED": False, "GROUP": 1, **sizes, **nothing}, 4),
        *(
            (aqlm._rebuild, {"codes": codes}, aqlm.constants(layout), 4)
            for codes, layout in (("*i16", ADDITIVE_1X16), ("*i8", ADDITIVE_2X8))
        ),
    ]


def compile_all(capabilities: list[int]) -> None:
    """In fp16, and from 8.0 on in bf16: shared memory, and whether the machine code knows bf16."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    for capability in capabilities:
        for dtype in ("fp16", "bf16")[: 1 + (capability >= 80)]:
            for kernel, others, constants, warps in variants(dtype):
                signature = {
                    name: "constexpr" if name in constants
                    else "fp32" if name == "eps" else "i32" if name in INTEGERS
                    else others.get(name, f"*{dtype}")
                    for name in kernel.arg_names
                }  # fmt: skip
                places = {(kernel.arg_names.index(name),): value for name, value in constants.items()}
                made = triton.compile(
                    ASTSource(kernel, signature, places),
                    target=GPUTarget("cuda", capability, 32),
                    options={"num_warps": warps},
                )
                row = {"kernel": kernel.fn.__name__, "capability": capability, "dtype": dtype}
                row |= {"shared_bytes": made.metadata.shared, "bf16": "bf16" in made.asm["ptx"]}
                print(json.dumps(row | {"machine_code_bytes": len(made.asm["cubin"])}), flush=True)


def run_all() -> None:
    """Both branches of each function on the same inputs: the largest difference, beside that of two roundings.

    For dequantization (NF4 and FP4, scales nested or not; AQLM) bits must agree.
    """
    torch.manual_seed(0)
    for dtype in (torch.float16, torch.float32):
        for name, call in elementwise(dtype).items():
            compare(name, dtype, call)
    for kind in ("nf4", "fp4"):
        for nested in (True, False):
            compare(f"dequantize {kind}{' nested' * nested}", torch.float16, dequantization(kind, nested), exact=True)
    for layout in (Layout(1, 12), ADDITIVE_1X16, ADDITIVE_2X8):
        for dtype in (torch.float16, torch.float32):
            compare(f"rebuild {layout.name}", dtype, rebuilding(layout, dtype), exact=True)


def elementwise(dtype: torch.dtype) -> dict:
    """Calls with rows of zeros, of 5e3 (massive activations, whose square fp16 cannot hold) and of noise."""
    x = torch.randn(6, 96)
    x[1], x[2] = 0.0, 5e3
    x, other, grad = x.to(dtype), torch.randn(6, 96).to(dtype), torch.randn(6, 96).to(dtype)
    weight = (1 + torch.randn(96) / 8).to(dtype)
    angles = torch.randn(3, 8)
    cos, sin = (torch.cat([part, part], 1).to(dtype) for part in (angles.cos(), angles.sin()))
    states = x.view(6, 6, 16)
    return {
        "rms_norm": lambda: kernels.rms_norm(x, weight, 1e-5),
        "rms_norm_backward": lambda: kernels.rms_norm_backward(grad, x, weight, 1e-5, other, torch.empty_like(x)),
        "rotate_": lambda: kernels.rotate_(states.clone(), cos, sin),
        "rotate_ back": lambda: kernels.rotate_(states.clone(), cos, sin, back=True),
        "swiglu": lambda: kernels.swiglu(x, other),
        "swiglu_backward_": lambda: torch.cat(kernels.swiglu_backward_(grad, x.clone(), other.clone())),
    }


def dequantization(kind: str, nested: bool):
    """A call for 70 × 512 values: 560 blocks, so that the last program and the last group of scales are not full."""
    from bitsandbytes.functional import quantize_4bit

    dense = torch.randn(70, 512, dtype=torch.float16) / 8
    dense[3] = 0
    packed, state = quantize_4bit(dense, quant_type=kind, compress_statistics=nested, blocksize=64)
    return lambda: kernels.dequantize(packed, state, torch.float16)


def rebuilding(layout: Layout, dtype: torch.dtype):
    """A call for 70 × 96 weights, the last program not full, by whichever of the two `compare` chooses."""
    low = -(2 ** (layout.bits - 1))
    codes = torch.randint(low, -low, (70, 96 // layout.group, layout.codebooks), dtype=aqlm.code_type(layout))
    books = torch.randn(layout.codebooks, 2**layout.bits, 1, layout.group, dtype=torch.float16)
    parts = (codes, books, torch.rand(70, 1, 1, 1, dtype=torch.float16), dtype)
    return lambda: (aqlm.on_triton if kernels.on_triton(codes) else aqlm.gathered)(*parts)


def compare(name: str, dtype: torch.dtype, call, exact: bool = False) -> None:
    """One call with Triton's kernel and one with PyTorch's operations; worst: as a share of a row's largest value."""
    kernels.on_triton = lambda x: False
    expected = call()
    kernels.on_triton = lambda x: True
    found = call()
    largest = 1 + expected.float().abs().amax(-1, keepdim=True)
    worst = ((found.float() - expected.float()).abs() / largest).max().item()
    row = {"call": name, "dtype": str(dtype), "worst": worst, "allowed": 0.0 if exact else 2 * torch.finfo(dtype).eps}
    row["finite"] = bool(found.isfinite().all() and expected.isfinite().all())
    print(json.dumps(row), flush=True)


if __name__ == "__main__":
    compile_all([int(word) for word in sys.argv[2:]]) if sys.argv[1] == "compile" else run_all()
