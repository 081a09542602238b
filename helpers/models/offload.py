"""A 16-bit model some of whose decoder layers wait in host memory or on disk, and come to the GPU for their turn.

From disk it is accelerate's hooks that fetch every tensor from the model's own files. In host memory they would do, but
they ask the allocator to give everything back after every tensor, and copy from memory that can be swapped: so here
a layer's weights lie in a row, page-locked, and are copied in one go to the one place on the GPU that all waiting
layers share. Weights are never rounded on the way: a model computes the same bits wherever its layers lie.
"""

import weakref
from collections.abc import Iterator, Sequence
from contextlib import suppress
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch

ALIGNMENT = 256
"""Tensors of a row begin at multiples of so many bytes, as the allocator's own do."""


def device_map(source: str, away: int, placed: str) -> dict[str, str]:
    """Module -> `placed`, or "disk" for the last `away` decoder layers. Every layer is named, and nothing twice.

    A name in a map also stands for those that begin with it, layers.3 for layers.31 too, unless the longer is there.
    """
    import torch

    from helpers.models import loading

    config, _ = loading.config_of(source)
    with torch.device("meta"):
        model = loading.opener(config).from_config(config)
    layers = list(model.get_decoder().layers)
    return dict(places(model, layers[: len(layers) - away], layers[len(layers) - away :], placed))


def places(
    module: "torch.nn.Module", here: Sequence[Any], away: Sequence[Any], placed: str, prefix: str = ""
) -> Iterator[tuple[str, str]]:
    """(name, place) of the modules below one; only what holds decoder layers is looked into."""
    for name, child in module.named_children():
        path = prefix + name
        if not any(layer in (*here, *away) for layer in child.modules()) or child in here:
            yield path, placed
        elif child in away:
            yield path, "disk"
        else:
            yield from places(child, here, away, placed, path + ".")


def wait_in_host_memory(model: "torch.nn.Module", away: int) -> int:
    """Take the last `away` decoder layers from disk into host memory; returns the bytes that they take there.

    model: as from_pretrained opens it with `device_map`. Layers are read tensor by tensor, so that only one is there
    twice.
    """
    import torch
    from accelerate.hooks import remove_hook_from_module

    # All rows in one allocation, to be locked once; one slot on the GPU as large as the largest of them.
    device, layers = model.device, list(model.get_decoder().layers)[-away:]
    rows = [arrange(layer) for layer in layers]
    waiting = page_locked(sum(size for _, size in rows), model)
    slot = torch.empty(max(size for _, size in rows), dtype=torch.uint8, device=device)
    start = 0
    for layer, (tensors, size) in zip(layers, rows, strict=True):
        row = waiting[start : start + size]
        for module, name, offset, old in tensors:
            view(row, offset, old).copy_(module._hf_hook.weights_map[name])  # read from the model's file here
            module._parameters[name] = torch.nn.Parameter(view(slot, offset, old), requires_grad=False)
        layer.register_forward_pre_hook(bringing(row, slot[:size]))
        start += size
    remove_hook_from_module(model, recurse=True)
    return len(waiting)


def arrange(layer: "torch.nn.Module") -> tuple[list[tuple], int]:
    """((module, name, offset, parameter) of each weight, bytes of the row)."""
    tensors, offset = [], 0
    for module in layer.modules():
        for name, old in module.named_parameters(recurse=False):
            tensors.append((module, name, offset, old))
            offset += -(-old.numel() * old.element_size() // ALIGNMENT) * ALIGNMENT
    return tensors, offset


def view(row: "torch.Tensor", offset: int, like: "torch.Tensor") -> "torch.Tensor":
    """The part of a row of bytes that holds a tensor like another."""
    size = like.numel() * like.element_size()
    return row[offset : offset + size].view(like.dtype).view(like.shape)


def bringing(row: "torch.Tensor", slot: "torch.Tensor") -> Any:
    """A hook that copies a layer's row to its place on the GPU, on the stream that computes: in order with it."""

    def bring(module: Any, arguments: Any) -> None:
        slot.copy_(row, non_blocking=True)

    return bring


def page_locked(size: int, owner: object) -> "torch.Tensor":
    """Bytes of host memory that a GPU copies from at the bus's full rate, until owner is gone.

    PyTorch's own page-locked memory comes in powers of two. Where the system will not lock pages the memory is
    ordinary, and copies are slower.
    """
    import torch

    memory = torch.empty(size, dtype=torch.uint8)
    if torch.cuda.is_available() and lock(memory):
        weakref.finalize(owner, unlock, memory).atexit = False  # a process that ends takes its pages along
    return memory


def lock(memory: "torch.Tensor") -> bool:
    """Lock the pages of host memory; False where the system refuses."""
    import torch

    runtime = torch.cuda.cudart()
    if runtime.cudaHostRegister(memory.data_ptr(), memory.numel(), 0) == runtime.cudaError.success:
        return True
    with suppress(RuntimeError):  # CUDA keeps a refusal as its last error, which the next launch would be blamed for
        torch.zeros(1, device="cuda")
    return False


def unlock(memory: "torch.Tensor") -> None:
    """Let go of pages, once nothing is being copied from them."""
    import torch

    torch.cuda.synchronize()
    torch.cuda.cudart().cudaHostUnregister(memory.data_ptr())
