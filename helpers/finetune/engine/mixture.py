"""The MLP of a mixture's layer: a router sends each token to a few experts, and adds up what they say, weighed.

An expert reads all of its tokens at once, so each of its matrices is dequantized once a pass, one after another: beside
the activations one matrix is in 16 bits (112 MiB of Mixtral's), not a layer of them (2.6 GiB). No loop over tokens; one
over experts, in which the host waits for the GPU once, for how many tokens each has.

The router is frozen, but what it reads is not: with p the softmax of its logits over a token's own experts alone, which
is what Mixtral's renormalized weights are, and g the gradients for those, the logits get p · (g - Σ p g). Of
y = Wd (w · h) the weight w gets (Wdᵀ grad) · h, which is at hand, as w is applied to h and not to y.
"""

from collections.abc import Iterator

import torch

from helpers.budget.activations import MLP_TOKENS
from helpers.finetune.engine import kernels
from helpers.models.experts import turns

Norm = tuple[torch.Tensor, float]
"""Weight and epsilon of the norm before the MLP."""


class Mixture:
    """A router and its experts: (gate and up, down) each, as `layers.Projections`."""

    def __init__(self, router: torch.nn.Module, experts: list[tuple]):
        self.router, self.top, self.experts = router.weight, router.top_k, experts
        self.groups = [group for expert in experts for group in expert]

    def route(self, normed: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """(weights in fp32, which experts) of each token, (tokens, experts a token) each, as transformers' router."""
        logits = torch.nn.functional.linear(normed, self.router)
        weights, index = torch.topk(logits.float().softmax(-1), self.top, dim=-1)
        return weights / weights.sum(-1, keepdim=True), index

    def turns(self, index: torch.Tensor) -> Iterator[tuple[int, torch.Tensor, torch.Tensor]]:
        """`experts.turns`, at most MLP_TOKENS tokens at a time."""
        for expert, rows, slots in turns(index, len(self.experts)):
            for part in zip(rows.split(MLP_TOKENS), slots.split(MLP_TOKENS), strict=True):
                yield expert, *part

    def forward(self, middle: torch.Tensor, norm: Norm, save_gates: bool) -> tuple[torch.Tensor, list[torch.Tensor]]:
        """middle + mlp(norm(middle)): (tokens, hidden); and gate and up of each turn, for backward."""
        normed = kernels.rms_norm(middle, *norm)
        weights, index = self.route(normed)
        result, gates = torch.zeros_like(middle), []
        for expert, rows, slots in self.turns(index):
            gate_up, down = self.experts[expert]
            gate, up = gate_up.forward(normed[rows])
            product = kernels.swiglu(gate, up, out=None if save_gates else gate)
            gates += [gate, up] if save_gates else []
            del gate, up
            result.index_add_(0, rows, down.forward(product.mul_(weights[rows, slots, None]))[0])
            del product
        return result.add_(middle), gates

    def backward(
        self, grad: torch.Tensor, middle: torch.Tensor, norm: Norm, gates: list[torch.Tensor]
    ) -> tuple[torch.Tensor, list[torch.Tensor]]:
        """Gradients for middle (tokens, hidden), residual included, and for the adapters, zeros where no token came."""
        normed = kernels.rms_norm(middle, *norm)
        weights, index = self.route(normed)  # the same operations on the same shapes, so the same choices
        normed_grad, weights_grad = torch.zeros_like(middle), torch.zeros_like(weights)
        found: dict[int, list[torch.Tensor]] = {}
        for turn, (expert, rows, slots) in enumerate(self.turns(index)):
            gate_up, down = self.experts[expert]
            x, weight = normed[rows], weights[rows, slots, None]
            gate, up = gates[2 * turn : 2 * turn + 2] if gates else gate_up.forward(x)
            product = kernels.swiglu(gate, up)
            weighed = torch.mul(product, weight, out=torch.empty_like(product))  # rounded as in the forward pass
            weighed_grad, down_grads = down.backward([grad[rows]], weighed)
            del weighed
            # a row's sum over the inner size, made in fp32 by the product: (rows, 1, inner) @ (rows, inner, 1)
            weights_grad[rows, slots] = torch.bmm(weighed_grad[:, None], product[:, :, None]).flatten().float()
            del product
            gate, up = kernels.swiglu_backward_(weighed_grad.mul_(weight), gate, up)
            del weighed_grad
            x_grad, gate_up_grads = gate_up.backward([gate, up], x)
            normed_grad.index_add_(0, rows, x_grad)
            del gate, up, x, x_grad
            parts = [*gate_up_grads, *down_grads]
            if expert in found:  # more tokens than go at once: in fp16 a sum would round at every turn
                parts = [before.float() + part.float() for before, part in zip(found[expert], parts, strict=True)]
            found[expert] = parts
        logits_grad = weights * (weights_grad - (weights * weights_grad).sum(-1, keepdim=True))
        spread = torch.zeros(len(index), len(self.router), dtype=middle.dtype, device=middle.device)
        normed_grad.addmm_(spread.scatter_(1, index, logits_grad.to(middle.dtype)), self.router)
        result = kernels.rms_norm_backward(normed_grad, middle, *norm, grad, out=torch.empty_like(middle))
        return result, [part for expert in range(len(self.experts)) for part in found.get(expert) or self.none(expert)]

    def none(self, expert: int) -> list[torch.Tensor]:
        """Zeros for the adapters of an expert that no token of the batch met: with several GPUs all must have some."""
        return [torch.zeros_like(adapter) for group in self.experts[expert] for adapter in group.adapters]
