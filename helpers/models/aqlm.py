"""AQLM checkpoints (https://arxiv.org/abs/2401.06118) opened exactly: linear layers that rebuild a matrix for each use.

The layout is ISTA-DASLab's, as on the hub. Their package, aqlm, is not needed, nor nvcc or numba. transformers 5 asks
for it and still opens no such checkpoint right: what is not to be quantized is a list of parameters ("lm_head.weight")
that it takes for modules, so the head becomes a random quantized layer. `register` puts `Checkpoint` in the place of
its integration, for every from_pretrained of this process.

A matrix is rebuilt in fp32 and rounded once, by a Triton kernel on a GPU and by PyTorch's gather elsewhere. Both have
the same bits; each model's first matrix is compared before it is used.
"""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch.nn import functional
from transformers.quantizers import auto
from transformers.quantizers.base import HfQuantizer

from helpers.models.aqlm_sizes import NAME, Layout, layout_of
from helpers.models.experts import stored_name
from helpers.models.gguf_sizes import PIECE_VALUES
from helpers.models.stored import UnusableModel, read_header

try:
    import triton
    import triton.language as tl
except ImportError:  # PyTorch's CPU wheels have none
    triton = None


class AdditiveLinear(torch.nn.Linear):
    """y = x Wᵀ + bias with W as codes; a Linear for PEFT, which attaches LoRA to it as to any other.

    codes: (out, in / group, codebooks), int8 or int16, of which all bits count. codebooks: (codebooks, 2 ** bits, 1,
    group). scales: (out, 1, 1, 1).
    """

    def __init__(self, inputs: int, outputs: int, bias: bool, layout: Layout, dtype: torch.dtype | None = None):
        torch.nn.Module.__init__(self)  # not Linear's, which would make the dense matrix
        self.in_features, self.out_features, self.layout = inputs, outputs, layout
        sizes = {
            "codes": ((outputs, inputs // layout.group, layout.codebooks), code_type(layout)),
            "codebooks": ((layout.codebooks, 2**layout.bits, 1, layout.group), dtype),
            "scales": ((outputs, 1, 1, 1), dtype),
        }
        for name, (size, kind) in sizes.items():
            self.register_parameter(name, torch.nn.Parameter(torch.empty(size, dtype=kind), requires_grad=False))
        self.register_parameter("weight", None)  # whoever asks for a dense matrix finds that there is none
        self.register_parameter("bias", torch.nn.Parameter(torch.empty(outputs, dtype=dtype)) if bias else None)
        self.rebuild = gathered

    @property
    def qweight(self) -> torch.Tensor:
        """Where PEFT looks for a quantized layer's device."""
        return self.codes

    def dense(self, dtype: torch.dtype) -> torch.Tensor:
        """The matrix in dtype: (out, in)."""
        return self.rebuild(self.codes, self.codebooks, self.scales, dtype)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        kind = x.device.type
        dtype = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else x.dtype
        result = Product.apply(x.to(dtype), self)
        return result if self.bias is None else result + self.bias.to(dtype)


class Product(torch.autograd.Function):
    """x Wᵀ; W is rebuilt in each direction and forgotten, and, being frozen, gets no gradient."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, layer: AdditiveLinear) -> torch.Tensor:
        ctx.layer = layer
        return functional.linear(x, layer.dense(x.dtype))

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor, None]:
        return grad @ ctx.layer.dense(grad.dtype), None


def code_type(layout: Layout) -> torch.dtype:
    """What codes are stored in; a code above the type's largest number is stored as a negative one."""
    return torch.int8 if layout.code_bytes == 1 else torch.int16


# ---- rebuilding ------------------------------------------------------------------------------------------------------


def gathered(codes: torch.Tensor, codebooks: torch.Tensor, scales: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """The matrix (out, in) by PyTorch's operators, a run of rows at a time."""
    count, size, _, group = codebooks.shape
    outputs, groups = codes.shape[:2]
    out = torch.empty(outputs, groups * group, dtype=dtype, device=codes.device)
    step = max(PIECE_VALUES // (groups * group), 1)
    for start in range(0, outputs, step):
        index = codes[start : start + step].int() & (size - 1)  # (rows, groups, codebooks)
        total = functional.embedding(index[..., 0], codebooks[0, :, 0]).float()  # (rows, groups, group)
        for book in range(1, count):
            total += functional.embedding(index[..., book], codebooks[book, :, 0]).float()
        out[start : start + step] = total.mul_(scales[start : start + step, 0].float()).flatten(1)
    return out


def on_triton(codes: torch.Tensor, codebooks: torch.Tensor, scales: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """The same by one kernel, which reads each code once and writes each weight once."""
    count, size, _, group = codebooks.shape
    outputs, groups = codes.shape[:2]
    out = torch.empty(outputs, groups * group, dtype=dtype, device=codes.device)
    # No fused multiply-add: the sum is not to be rounded otherwise than by the gather
    _rebuild[(triton.cdiv(outputs * groups, BLOCK),)](
        codes, codebooks, scales, out, outputs * groups, groups,
        **constants(Layout(count, size.bit_length() - 1, group)), enable_fp_fusion=False,
    )  # fmt: skip
    return out


BLOCK = 256
"""Groups of weights that a program of the kernel rebuilds."""


def constants(layout: Layout) -> dict[str, int]:
    """What the kernel is compiled for."""
    return {"BOOKS": layout.codebooks, "SIZE": 2**layout.bits, "GROUP": layout.group, "BLOCK": BLOCK}


def rebuilder(layer: AdditiveLinear) -> Callable[..., torch.Tensor]:
    """Triton's kernel where it gives, bit for bit, the gather's matrix on this device; else the gather.

    Asked on one matrix before the model is used: Triton compiles anew for each GPU, and a wrong weight raises nothing.
    """
    parts = (layer.codes, layer.codebooks, layer.scales, layer.codebooks.dtype)
    group = layer.layout.group
    if triton is None or not layer.codes.is_cuda or group & (group - 1):
        return gathered
    return on_triton if torch.equal(on_triton(*parts), gathered(*parts)) else gathered


if triton is not None:

    @triton.jit
    def _rebuild(
        codes, codebooks, scales, out, groups, row_groups,
        BOOKS: tl.constexpr, SIZE: tl.constexpr, GROUP: tl.constexpr, BLOCK: tl.constexpr,
    ):  # fmt: skip
        # A program takes BLOCK groups, which lie one after the other in codes and in the matrix.
        place = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
        inside = place < groups
        within = tl.arange(0, GROUP)[None, :]
        total = tl.zeros((BLOCK, GROUP), dtype=tl.float32)
        for book in tl.static_range(BOOKS):
            # Stored signed: the mask takes away the copies of the sign that widening puts in front.
            code = tl.load(codes + place * BOOKS + book, mask=inside, other=0).to(tl.int32) & (SIZE - 1)
            vector = (book * SIZE + code)[:, None] * GROUP + within
            total += tl.load(codebooks + vector, mask=inside[:, None], other=0.0).to(tl.float32)
        scale = tl.load(scales + place // row_groups, mask=inside, other=0.0).to(tl.float32)
        values = (total * scale[:, None]).to(out.dtype.element_ty)
        tl.store(out + place[:, None] * GROUP + within, values, mask=inside[:, None])


# ---- opening a checkpoint --------------------------------------------------------------------------------------------


class Checkpoint(HfQuantizer):
    """What transformers calls while it opens an AQLM checkpoint: linear layers become `AdditiveLinear`."""

    requires_calibration = True

    def validate_environment(self, *args: Any, **kwargs: Any) -> None:
        """No package is needed, and no GPU."""

    def _process_model_before_weight_loading(
        self, model: Any, checkpoint_files: list[str] | None = None, dtype: torch.dtype | None = None, **kwargs: Any
    ) -> None:
        layout = layout_of({"quantization_config": self.quantization_config.to_dict()})
        for file in map(Path, checkpoint_files or ()):
            if file.suffix == ".safetensors":  # what else is odd about a pickle's shapes is found as it is read
                check_stored(file, layout)
        # The hub's lists name parameters, those of transformers 5 modules
        listed = {name.removesuffix(".weight") for name in self.quantization_config.linear_weights_not_to_quantize}
        family = model.config.model_type
        for name, module in list(model.named_modules()):
            if type(module) is torch.nn.Linear and not {name, stored_name(f"{name}.", family)[:-1]} & listed:
                sizes, weight = (module.in_features, module.out_features), module.weight
                with weight.device:  # meta: nothing is allocated
                    model.set_submodule(name, AdditiveLinear(*sizes, module.bias is not None, layout, weight.dtype))

    def _process_model_after_weight_loading(self, model: Any, **kwargs: Any) -> None:
        layers = [module for module in model.modules() if isinstance(module, AdditiveLinear)]
        chosen = rebuilder(layers[0]) if layers else gathered
        for layer in layers:
            layer.rebuild = chosen

    def is_serializable(self) -> bool:
        return True

    @property
    def is_trainable(self) -> bool:
        """Adapters on it are."""
        return True


def check_stored(file: Path, layout: Layout) -> None:
    """Raise UnusableModel where a file's codebooks are others than config.json says."""
    for tensor in read_header(file):
        if tensor.name.endswith(".codebooks") and tensor.shape != (wanted := books_shape(layout)):
            raise UnusableModel(
                f"{file} holds {tensor.name} of {tensor.shape}, and config.json says {layout.name} for groups of "
                f"{layout.group}, which is {wanted}: download config.json and weights again, from one place"
            )


def books_shape(layout: Layout) -> tuple[int, int, int, int]:
    """The shape of a matrix's codebooks."""
    return layout.codebooks, 2**layout.bits, 1, layout.group


def register() -> None:
    """Let transformers open AQLM checkpoints through `Checkpoint`, in this process.

    Its own decorator for this, register_quantizer, takes new names only, and checkpoints name this one.
    """
    auto.AUTO_QUANTIZER_MAPPING[NAME] = Checkpoint
