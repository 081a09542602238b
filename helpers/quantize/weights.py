"""Weights to look at: those of a 16-bit model, those that codes stand for, and those that rounding would give."""

from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch


def stored_weight(folder: Path, module: str) -> "torch.Tensor":
    """The weights (out, in) of a module of a 16-bit model, in fp32, without opening the model."""
    from safetensors import safe_open

    name = f"{module}.weight"
    for file in sorted(folder.glob("*.safetensors")):
        with safe_open(file, "pt") as tensors:
            if name in tensors.keys():  # noqa: SIM118 - not a dict
                return tensors.get_tensor(name).float()
    raise ValueError(f"{folder} has no {name}")


def rounded(weight: "torch.Tensor", bits: int, group_size: int) -> "torch.Tensor":
    """Round to nearest, what GPTQ is held against: the same symmetric grid a group, no look at the data. (out, in)

    >>> import torch
    >>> rounded(torch.tensor([[7.5, -7.0, 1.2, 0.0]]), bits=4, group_size=4).tolist()
    [[7.0, -7.0, 1.0, 0.0]]
    """
    import torch

    # A group of inputs shares one step, so that an outlier spoils the resolution of its group and not of its row
    groups = weight.float().reshape(len(weight), -1, weight.shape[1] if group_size < 0 else group_size)
    levels = 2**bits - 1
    step = (2 * groups.abs().amax(dim=-1, keepdim=True) / levels).clamp(min=1e-12)
    zero = (levels + 1) / 2  # the code of 0: 8 of 0 … 15, one more code below than above
    return (step * (torch.clamp(torch.round(groups / step) + zero, 0, levels) - zero)).reshape(weight.shape)
