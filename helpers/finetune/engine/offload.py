"""Inputs of checkpointed layers in host memory, copied there and back while the GPU computes.

On the GPU are at most two layers' inputs: that of the layer that computes, and one on its way. What is pinned is what
helpers/budget counts, to the byte: `Arena` is one stack in whole chunks, whatever the contexts were.
"""

from typing import Any

import torch

from helpers.budget import step


class Arena:
    """Pinned host memory in chunks, handed out from the bottom up and given back from the top down.

    What is taken may lie across chunks, so that none has a gap; chunks are made when they are first reached and stay
    for the next step. So what is pinned is the largest step's bytes in whole chunks, whatever the contexts were.
    """

    def __init__(self, room: int, pin: bool):
        """room: bytes at most, whole chunks of it are used. pin: page-locked, which copies to and from a GPU want."""
        # Chunks of a power of two: PyTorch's pinned allocator rounds up to one, and keeps what it has pinned.
        self.size, self.pin = step.CHUNK_BYTES, pin
        self.room = room // self.size * self.size
        self.chunks: list[torch.Tensor] = []
        self.top = 0

    def take(self, size: int) -> list[torch.Tensor] | None:
        """The next so many bytes, as the parts of chunks that they lie in (uint8); None when there is no room."""
        end = self.top + size
        if end > self.room:
            return None
        while end > len(self.chunks) * self.size:
            self.chunks.append(torch.empty(self.size, dtype=torch.uint8, pin_memory=self.pin))
        parts = []
        while self.top < end:  # to the end of each chunk, then on in the next
            chunk, start = divmod(self.top, self.size)
            parts.append(self.chunks[chunk][start : start + end - self.top])
            self.top += len(parts[-1])
        return parts

    def give_back(self, size: int) -> None:
        """The topmost so many bytes are free again."""
        self.top -= size


class Offload:
    """A stack of layers' inputs: the forward pass puts, the backward pass gets them in reverse, one layer ahead."""

    def __init__(self, device: torch.device, room: int):
        """room: bytes of host memory at most."""
        self.device = device
        self.stream = torch.cuda.Stream(device) if device.type == "cuda" else None
        self.arena = Arena(room, pin=self.stream is not None)
        self.stack: list[dict[str, Any]] = []

    def begin(self) -> None:
        """A new forward pass: whatever an unfinished one left is not needed any more."""
        self.arena.top = 0
        self.stack.clear()

    def put(self, x: torch.Tensor) -> dict[str, Any]:
        """Start copying x out; its GPU memory goes back once the next but one layer's input is on its way."""
        host = self.arena.take(x.nbytes)
        slot = {"host": host, "shape": x.shape, "dtype": x.dtype, "x": x, "copied": None}
        if host is not None:  # else there is no room, and it stays where it is
            slot["copied"] = self.copy(host, bytes_like(host, x))
        # Waiting for the copy before the last, not for this one, leaves it a layer's time to run beside the products.
        if len(self.stack) >= 2 and self.stack[-2]["host"] is not None:
            self.wait(self.stack[-2]["copied"])
            self.stack[-2]["x"] = None
        self.stack.append(slot)
        return slot

    def get(self, slot: dict[str, Any]) -> torch.Tensor:
        """The input again, and the one below it on its way; its host memory is free for the next step.

        That one is written by the same stream which reads here, so no copy overtakes another.
        """
        self.fetch(slot)  # on its way since the layer above, but for the first that is asked for
        self.wait(slot["copied"])
        self.stack.pop()  # the backward pass goes the other way: this is the last one put
        if self.stack:
            self.fetch(self.stack[-1])
        # Given back before the layer has computed: the next that writes there is the next step's forward pass.
        x, slot["x"] = slot["x"], None
        if slot["host"] is not None:
            self.arena.give_back(x.nbytes)
        return x

    def fetch(self, slot: dict[str, Any]) -> None:
        """Start copying back, unless the input is on the GPU still or already."""
        if slot["x"] is None:
            slot["x"] = torch.empty(slot["shape"], dtype=slot["dtype"], device=self.device)
            slot["copied"] = self.copy(bytes_like(slot["host"], slot["x"]), slot["host"])

    def copy(self, targets: list[torch.Tensor], sources: list[torch.Tensor]) -> Any:
        """Copy on the second stream, after what the first has been given; returns what `wait` waits for."""
        if self.stream is None:
            for target, source in zip(targets, sources, strict=True):
                target.copy_(source)
            return None
        # The source may still be being computed, and the target still be read, by what the first stream was given.
        self.stream.wait_event(torch.cuda.current_stream().record_event())
        with torch.cuda.stream(self.stream):
            for target, source in zip(targets, sources, strict=True):
                target.copy_(source, non_blocking=True)
            return self.stream.record_event()

    def wait(self, copied: Any) -> None:
        """Let the first stream wait until a copy is done."""
        if self.stream is not None and copied is not None:
            torch.cuda.current_stream().wait_event(copied)


def bytes_like(parts: list[torch.Tensor], x: torch.Tensor) -> list[torch.Tensor]:
    """The bytes of x, which is contiguous, cut as the parts are."""
    return list(x.view(-1).view(torch.uint8).split([len(part) for part in parts]))
