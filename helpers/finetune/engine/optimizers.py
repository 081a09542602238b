"""Fused AdamW: all adapters as one parameter, so that a step is one kernel instead of one for each of 448 matrices.

bitsandbytes' 8-bit and paged optimizers go through their parameters one by one in Python, 0.1 ms each, while the GPU
waits. The update is the same: they quantize their states in blocks of 256 values, and a LoRA matrix of a 7B is a
multiple of that, so no block holds values of two matrices.
"""

from collections.abc import Callable, Iterable
from typing import Any

import torch


class FlatOptimizer(torch.optim.Optimizer):
    """Looks like an optimizer of the given fp32 parameters; `make` builds the one that does the work, on their join."""

    def __init__(
        self,
        parameters: Iterable[torch.nn.Parameter],
        make: Callable[[list[torch.nn.Parameter]], torch.optim.Optimizer],
    ):
        parameters = list(parameters)
        # The matrices become views of the joined memory: what the inner optimizer writes, the model computes with.
        self.flat = torch.nn.Parameter(torch.cat([value.detach().reshape(-1) for value in parameters]))
        for value, part in zip(parameters, self.flat.data.split([value.numel() for value in parameters]), strict=True):
            value.data = part.view(value.shape)
        self.inner = make([self.flat])
        # Gradient clipping, scaler and scheduler of the trainer see the matrices, as with any other optimizer.
        super().__init__([{"params": parameters}], dict(self.inner.defaults))

    @torch.no_grad()
    def step(self, closure: None = None) -> None:
        """One update of all parameters; those without a gradient count as having zeros."""
        (group,) = self.param_groups
        # Gradients arrive in tensors of their own, already unscaled and clipped by the trainer; a copy joins them.
        self.flat.grad = torch.cat(
            [
                torch.zeros_like(value).view(-1) if value.grad is None else value.grad.view(-1)
                for value in group["params"]
            ]
        )
        # The scheduler writes the learning rate into this optimizer's group, the inner one knows nothing of it.
        (inner_group,) = self.inner.param_groups
        inner_group.update(lr=group["lr"], weight_decay=group["weight_decay"])
        self.inner.step()
        self.flat.grad = None

    def state_dict(self) -> dict[str, Any]:
        """Rates of this one, states of the one inside."""
        return {**super().state_dict(), "inner": self.inner.state_dict()}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """What `state_dict` gave."""
        self.inner.load_state_dict(state_dict["inner"])
        super().load_state_dict({name: value for name, value in state_dict.items() if name != "inner"})
