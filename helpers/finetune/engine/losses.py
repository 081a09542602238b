"""Chunked cross-entropy over a large vocabulary: the logits are never there all at once, nor saved for backward.

Full logits of 32,768 words in fp32 cost 128 KiB a token, several times over. Only tokens with a label are looked at,
a chunk at a time; the gradient for the hidden states is made on the way (the head is frozen), so that only s·hidden
bytes a token are saved (8 KiB at 7B). Alive at once, for a chunk: about 10 bytes × LOGITS_AT_ONCE (160 MiB).

What a family does to its logits (a scale, a cap) comes from models/families.py, and before training `check` holds one
batch's loss to transformers' own.
"""

import functools
import sys
import types
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch

from helpers.budget.activations import LOGITS_AT_ONCE, LOSS_WORDS
from helpers.finetune.batches import IGNORE
from helpers.models import families
from helpers.models.families import PLAIN, Logits
from helpers.models.logits import finished

CHECKED_TOKENS = 256
"""Tokens of the batch that `check` compares: their logits take 32 MiB in fp32 for 32,768 words."""


class ChunkedLoss(torch.autograd.Function):
    """-log p(label) of each row of hidden (rows, hidden size) under a frozen head (words, hidden size): (rows,)."""

    @staticmethod
    def forward(
        ctx: Any, hidden: torch.Tensor, head: torch.Tensor, labels: torch.Tensor, how: Logits = PLAIN
    ) -> torch.Tensor:
        # -log p(label) = log Σ exp(logits) - logits[label]; its gradient for the logits is softmax - onehot(label), and
        # for hidden that times the head. All of it is at hand here, so backward has nothing left to do but scale.
        each = torch.empty(hidden.shape[0], dtype=torch.float32, device=hidden.device)
        grads = torch.empty_like(hidden) if ctx.needs_input_grad[0] else None  # none in evaluation
        step = max(1, LOGITS_AT_ONCE // head.shape[0])
        with torch.autocast(hidden.device.type, enabled=False):
            for start in range(0, hidden.shape[0], step):
                rows = slice(start, start + step)
                logits = finished(products(hidden[rows], head), how)
                label = labels[rows, None]  # (chunk, 1); logits (chunk, words)
                normalizer = torch.logsumexp(logits, dim=-1, keepdim=True)
                each[rows] = (normalizer - logits.gather(1, label))[:, 0]
                if grads is not None:
                    # logits = cap tanh(raw / cap) has the slope 1 - tanh², which is 1 - (logits / cap)².
                    slopes = None if how.cap is None else 1 - (logits / how.cap).square_()
                    # Not divided by the number of labels yet: fp16 would lose the small probabilities.
                    logits.sub_(normalizer).exp_().scatter_add_(1, label, logits.new_full(label.shape, -1.0))
                    if slopes is not None:
                        logits.mul_(slopes)
                    if how.scale != 1:
                        logits.mul_(how.scale)
                    for words, part in parts(head, hidden.dtype):
                        before = 1.0 if words.start else 0.0  # the sum of the parts before, or memory never written
                        grads[rows].addmm_(logits[:, words].to(hidden.dtype), part, beta=before)
        ctx.save_for_backward(grads)
        return each

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor, None, None, None]:
        (grads,) = ctx.saved_tensors
        return grads.mul_(grad[:, None]), None, None, None


def parts(head: torch.Tensor, dtype: torch.dtype) -> Iterator[tuple[slice, torch.Tensor]]:
    """The head in dtype, with the words of each part: one of all words, or an fp32 head (upcast) LOSS_WORDS at a time.

    A whole copy of it would be 1 GiB at 128,256 words of 4,096.
    """
    step = head.shape[0] if head.dtype == dtype else LOSS_WORDS
    for start in range(0, head.shape[0], step):
        words = slice(start, min(start + step, head.shape[0]))
        yield words, head[words].to(dtype)


def products(rows: torch.Tensor, head: torch.Tensor) -> torch.Tensor:
    """rows · headᵀ in fp32, multiplied in the type of rows: (rows, hidden) -> (rows, words)."""
    if head.dtype == rows.dtype:
        return (rows @ head.T).float()
    return torch.cat([(rows @ part.T).float() for _, part in parts(head, rows.dtype)], dim=1)


def label_losses(
    hidden: torch.Tensor, head: torch.nn.Linear, labels: torch.Tensor, kind: str, how: Logits = PLAIN
) -> torch.Tensor:
    """-log p of every label, in their order: (labels that are not IGNORE,), fp32.

    hidden: (batch, tokens, hidden); labels: (batch, tokens), IGNORE where none. kind: "chunked", or "full" (all logits
    at once, in fp32). Products are in autocast's type, an fp32 head's too.
    """
    # Token t's hidden state predicts token t + 1, so labels are one to the left of where they stand.
    targets = labels[:, 1:].reshape(-1)
    places = (targets != IGNORE).nonzero()[:, 0]
    rows = hidden[:, :-1].reshape(-1, hidden.shape[-1]).index_select(0, places)
    device = hidden.device.type
    dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else head.weight.dtype
    rows = rows.to(dtype)  # DoRA's layers answer in fp32 under autocast
    targets = targets.index_select(0, places)
    if kind == "full" or head.weight.requires_grad:  # in chunks a head gets no gradient
        logits = finished(torch.nn.functional.linear(rows, head.weight.to(dtype)).float(), how)
        return torch.nn.functional.cross_entropy(logits, targets, reduction="none")
    return ChunkedLoss.apply(rows, head.weight, targets, how)


def label_loss(
    hidden: torch.Tensor,
    head: torch.nn.Linear,
    labels: torch.Tensor,
    count: torch.Tensor | float | None,
    kind: str,
    how: Logits = PLAIN,
) -> torch.Tensor:
    """Cross-entropy of the next token: `label_losses` summed and divided by count (their number when None)."""
    losses = label_losses(hidden, head, labels, kind, how)
    # count is of the whole optimizer step: micro-batches then add up to the loss of one large batch.
    return losses.sum() / (max(len(losses), 1) if count is None else count)


def log_probabilities(losses: torch.Tensor, label_counts: torch.Tensor) -> torch.Tensor:
    """log p of each sequence's labels together, from -log p of each label: (labels,), (sequences,) -> (sequences,)."""
    sequences = torch.arange(len(label_counts), device=losses.device)
    # the output's size is said, or the GPU would be waited for
    sequence = sequences.repeat_interleave(label_counts, output_size=len(losses))
    return losses.new_zeros(len(label_counts)).index_add(0, sequence, -losses)


def install(model: torch.nn.Module, kind: str, objective: Callable | None = None) -> None:
    """Let a causal LM compute its loss by `label_loss`, without logits; without labels it answers as before.

    objective: what makes an output with a loss of sequences' log-probabilities, when label_counts (labels of each
    sequence, (sequences,)) come with the labels: finetune/preferences.py.
    """
    from transformers.modeling_outputs import CausalLMOutputWithPast
    from transformers.utils import ModelOutput

    original, how = model.forward, families.of(model.config.to_dict()).logits

    @functools.wraps(type(model).forward)  # `generate` reads the signature
    def forward(
        self: torch.nn.Module,
        *args: Any,
        labels: torch.Tensor | None = None,
        num_items_in_batch: torch.Tensor | float | None = None,
        label_counts: torch.Tensor | None = None,
        reference: torch.Tensor | None = None,
        **kwargs: Any,
    ) -> ModelOutput:
        if labels is None:
            return original(*args, **kwargs)
        routed = getattr(self.config, "output_router_logits", False)
        found = self.model(*args, **kwargs, **({"output_router_logits": True} if routed else {}))
        if label_counts is None:
            loss = label_loss(found.last_hidden_state, self.lm_head, labels, num_items_in_batch, kind, how)
            result = CausalLMOutputWithPast(loss=loss)
        else:
            each = label_losses(found.last_hidden_state, self.lm_head, labels, kind, how)
            result = objective(log_probabilities(each, label_counts), label_counts, reference, num_items_in_batch)
        if routed:
            result.loss = result.loss + balance_loss(self, found.router_logits, kwargs.get("attention_mask"))
        return result

    model.forward = types.MethodType(forward, model)


def balance_loss(
    model: torch.nn.Module, router_logits: tuple[torch.Tensor, ...], mask: torch.Tensor | None
) -> torch.Tensor:
    """What transformers adds to a mixture's loss where its config.json says output_router_logits: by its own function.

    Experts' shares of tokens times their mean probabilities (equations 4 to 6 of https://arxiv.org/abs/2101.03961).
    """
    theirs = sys.modules[type(model).forward.__module__].load_balancing_loss_func
    return model.router_aux_loss_coef * theirs(router_logits, model.num_experts, model.num_experts_per_tok, mask)


# ---- one batch against transformers ---------------------------------------------------------------------------------


def forward_loss(model: torch.nn.Module, ids: list[int], dtype: torch.dtype) -> float:
    """Loss of one row through a causal LM's forward as it stands, without gradients: (tokens,) -> nats a token."""
    row, was_training = torch.tensor([ids[:CHECKED_TOKENS]], device=model.device), model.training
    model.eval()  # dropout and noise would make two passes differ
    try:
        with torch.no_grad(), torch.autocast(row.device.type, dtype, enabled=dtype != torch.float32):
            return float(model(input_ids=row, labels=row, use_cache=False).loss)
    finally:
        model.train(was_training)


@contextmanager
def transformers_attention(model: torch.nn.Module) -> Iterator[None]:
    """transformers' own attention for a while: SDPA, or eager where the family does not know that."""
    configured = model.config._attn_implementation
    model.set_attn_implementation("sdpa" if model._supports_sdpa else "eager")
    try:
        yield
    finally:
        model.set_attn_implementation(configured)


def bound(dtype: torch.dtype, loss: float) -> float:
    """How far two right losses may lie apart: 1e-4 of the loss, and eight roundings to dtype.

    In 16 bits both passes round what goes from layer to layer and every logit, each in an order of its own; over a
    hundred tokens or more these errors average out to less than one rounding (fp16: 2**-10, bf16: 2**-7). On an H200
    in fp16 they were 0.0004 at a loss of 11.3 (h200_finetune_check.csv), where this allows 0.09. Another function, such
    as a scale that is left out, is off by some tenths.
    """
    rounding = 0.0 if dtype == torch.float32 else 8 * torch.finfo(dtype).eps
    return (1e-4 + rounding) * max(1.0, abs(loss))


def check(theirs: float, ours: float, dtype: torch.dtype, tokens: int) -> dict[str, float]:
    """Both losses of one batch as a measurement. Raises ValueError when they differ by more than `bound`."""
    allowed = bound(dtype, theirs)
    if not abs(theirs - ours) <= allowed:
        raise ValueError(
            f"the loss of one batch is {theirs:.4f} through transformers' own forward and {ours:.4f} as it would be "
            f"trained here, more apart than the {allowed:.4f} that rounding explains: training would learn something "
            "else, so it is refused; set kernels=plain and attention=eager, and report the model if that is refused too"
        )
    return {
        "transformers": round(theirs, 6),
        "ours": round(ours, 6),
        "bound": round(allowed, 6),
        "tokens": min(tokens, CHECKED_TOKENS),
    }
