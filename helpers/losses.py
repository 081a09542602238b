"""Cross-entropy over a large vocabulary without keeping its logits.

Full logits of 32,768 words in fp32 cost 128 KiB a token, several times over. Only tokens with a label are looked at,
a piece at a time; the gradient for the hidden states is made on the way (the head is frozen), so that a token keeps
only s·hidden bytes (8 KiB at 7B). Alive at once, for a piece: about 10 bytes × LOGITS_AT_ONCE (160 MiB).
"""

import functools
import types
from typing import Any

import torch

from helpers.activations import LOGITS_AT_ONCE
from helpers.batches import IGNORE


class ChunkedLoss(torch.autograd.Function):
    """Sum of -log p(label) over the rows of hidden (rows, hidden size) under a frozen head (words, hidden size)."""

    @staticmethod
    def forward(ctx: Any, hidden: torch.Tensor, head: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        total = torch.zeros((), dtype=torch.float32, device=hidden.device)
        grads = torch.empty_like(hidden) if ctx.needs_input_grad[0] else None
        step = max(1, LOGITS_AT_ONCE // head.shape[0])
        with torch.autocast(hidden.device.type, enabled=False):
            for start in range(0, hidden.shape[0], step):
                rows = slice(start, start + step)
                logits = (hidden[rows] @ head.T).float()
                label = labels[rows, None]
                normalizer = torch.logsumexp(logits, dim=-1, keepdim=True)
                total += (normalizer - logits.gather(1, label)).sum()
                if grads is not None:
                    # Not divided by the number of labels yet: fp16 would lose the small probabilities.
                    logits.sub_(normalizer).exp_().scatter_add_(1, label, logits.new_full(label.shape, -1.0))
                    torch.mm(logits.to(hidden.dtype), head, out=grads[rows])
        ctx.save_for_backward(grads)
        return total

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor, None, None]:
        (grads,) = ctx.saved_tensors
        return grads.mul_(grad), None, None


def label_loss(
    hidden: torch.Tensor, head: torch.nn.Linear, labels: torch.Tensor, count: torch.Tensor | float | None, kind: str
) -> torch.Tensor:
    """Cross-entropy of the next token, summed over labels and divided by count (their number when None).

    hidden: (batch, tokens, hidden); labels: (batch, tokens), IGNORE where none. kind: "chunked", "fused" (Liger's
    kernel) or "full" (all logits at once, in fp32).
    """
    targets = labels[:, 1:].reshape(-1)
    places = (targets != IGNORE).nonzero()[:, 0]
    rows = hidden[:, :-1].reshape(-1, hidden.shape[-1]).index_select(0, places)
    rows = rows.to(head.weight.dtype)  # DoRA's layers answer in fp32 under autocast
    targets = targets.index_select(0, places)
    if kind == "full":
        total = torch.nn.functional.cross_entropy(head(rows).float(), targets, reduction="sum")
    elif kind == "fused":
        from liger_kernel.transformers.functional import liger_fused_linear_cross_entropy

        total = liger_fused_linear_cross_entropy(rows, head.weight, targets, reduction="sum")
    else:
        total = ChunkedLoss.apply(rows, head.weight, targets)
    return total / (max(len(targets), 1) if count is None else count)


def install(model: torch.nn.Module, kind: str) -> None:
    """Let a causal LM compute its loss by `label_loss`, without logits; without labels it answers as before."""
    from transformers.modeling_outputs import CausalLMOutputWithPast

    original = model.forward

    @functools.wraps(type(model).forward)  # `generate` reads the signature
    def forward(
        self: torch.nn.Module,
        *args: Any,
        labels: torch.Tensor | None = None,
        num_items_in_batch: torch.Tensor | float | None = None,
        **kwargs: Any,
    ) -> CausalLMOutputWithPast:
        if labels is None:
            return original(*args, **kwargs)
        hidden = self.model(*args, **kwargs).last_hidden_state
        loss = label_loss(hidden, self.lm_head, labels, num_items_in_batch, kind)
        return CausalLMOutputWithPast(loss=loss)

    model.forward = types.MethodType(forward, model)
