"""Attention for cards without flash kernels, as transformers' attention function "efficient".

On compute capability 7.5 (a T4) SDPA has a memory-efficient kernel, but not for grouped key-value heads
(enable_gqa=True): it then falls back to materialising the scores, heads × context² of them. Repeating keys and
values first keeps to the kernel. Packed rows (cu_seq_lens_q) attend within their own conversation only, and a sliding
window (Mistral v0.1) is applied here too, both without a context² mask.

    model = AutoModelForCausalLM.from_pretrained(..., attn_implementation=register())
"""

from collections.abc import Callable
from functools import partial
from typing import Any

import torch

NAME = "efficient"


def register() -> str:
    """Make "efficient" known to transformers; returns the name for attn_implementation."""
    from transformers import AttentionInterface
    from transformers.masking_utils import AttentionMaskInterface

    AttentionInterface.register(NAME, attention)
    AttentionMaskInterface.register(NAME, mask)
    return NAME


def mask(
    batch_size: int,
    q_length: int,
    kv_length: int,
    attention_mask: torch.Tensor | None = None,
    allow_is_causal_skip: bool = True,
    **kwargs: Any,
) -> torch.Tensor | None:
    """transformers' boolean mask (batch, 1, query, key); None where `attention` needs none: no cache and no padding."""
    from transformers.masking_utils import sdpa_mask

    whole = attention_mask is None or bool(attention_mask.all())
    if allow_is_causal_skip and q_length == kv_length and whole:
        return None
    return sdpa_mask(
        batch_size=batch_size,
        q_length=q_length,
        kv_length=kv_length,
        attention_mask=attention_mask,
        allow_is_causal_skip=allow_is_causal_skip,
        **kwargs,
    )


def attention(
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    sliding_window: int | None = None,
    cu_seq_lens_q: torch.Tensor | None = None,
    **kwargs: Any,
) -> tuple[torch.Tensor, None]:
    """Causal attention. query: (batch, heads, new, head_dim); key, value: (batch, kv_heads, all, head_dim).

    attention_mask: (batch, 1, new, all), True where it may look, or None for plain causal attention. Returns
    (batch, new, heads, head_dim).
    """
    key, value = repeat_heads(key, query.shape[1]), repeat_heads(value, query.shape[1])
    inputs = (query, key, value)
    dot = partial(torch.nn.functional.scaled_dot_product_attention, dropout_p=dropout, scale=scaling)
    if attention_mask is not None:
        out = dot(*inputs, attn_mask=attention_mask)
    elif cu_seq_lens_q is None:
        out = causal(dot, *inputs, sliding_window)
    else:  # a row of conversations that must not see each other
        sizes = cu_seq_lens_q.diff().tolist()
        pieces = zip(*(states.split(sizes, dim=2) for states in inputs), strict=True)
        out = torch.cat([causal(dot, *piece, sliding_window) for piece in pieces], dim=2)
    return out.transpose(1, 2).contiguous(), None


def causal(
    dot: Callable, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, window: int | None
) -> torch.Tensor:
    """Each token attends to itself and to those before it, at most a window of them."""
    new, known = query.shape[2], key.shape[2]
    if window is None or known <= window:
        return dot(query, key, value, is_causal=new > 1)
    back = torch.arange(known - new, known, device=query.device)[:, None] - torch.arange(known, device=query.device)
    return dot(query, key, value, attn_mask=(back >= 0) & (back < window))


def repeat_heads(states: torch.Tensor, heads: int) -> torch.Tensor:
    """(batch, kv_heads, tokens, head_dim) -> (batch, heads, tokens, head_dim): heads repeated."""
    return states.repeat_interleave(heads // states.shape[1], dim=1)
