"""Attention for GPUs without flash kernels, as transformers' attention function "efficient".

On compute capability 7.5 (a T4) SDPA has a memory-efficient kernel, but not for grouped key-value heads
(enable_gqa=True): it then falls back to materialising the scores, heads × context² of them. Repeating keys and
values first keeps to the kernel. Packed rows (cu_seq_lens_q) attend within their own conversation only, and a sliding
window (Mistral v0.1) is applied here too, both without a context² mask.

    model = AutoModelForCausalLM.from_pretrained(..., attn_implementation=register())
"""

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import torch

from helpers.models.families import KINDS

NAME = "efficient"
UNIMPORTANT = {
    "position_ids",
    "use_cache",
    "cache_position",
    "output_attentions",
    "output_hidden_states",
    "output_router_logits",
    "logits_to_keep",
    "return_dict",
    "cu_seq_lens_k",
    "max_length_q",
    "max_length_k",
}
"""Arguments that transformers' layers hand on and that change nothing here."""


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
    mask_function: Callable | None = None,
    local_size: int | None = None,
    allow_is_causal_skip: bool = True,
    allow_is_bidirectional_skip: bool = False,
    **kwargs: Any,
) -> torch.Tensor | None:
    """transformers' boolean mask (batch, 1, query, key); None where `attention` needs none: no cache and no padding.

    None means causal to `attention`, or causal within the window that its layer hands over: any other mask_function
    (chunks, looking ahead) gets its mask, whatever transformers may skip for functions that know what None stands for.
    """
    from transformers.masking_utils import causal_mask_function, sdpa_mask

    mask_function = mask_function or causal_mask_function
    usual = mask_function is causal_mask_function
    whole = attention_mask is None or bool(attention_mask.all())
    if allow_is_causal_skip and q_length == kv_length and whole:
        kind = KINDS.get(getattr(kwargs.get("config"), "model_type", ""))
        handed = kind is not None and kind.window and kind.hands_window
        if usual or (handed and is_window(mask_function, local_size, kv_length, kwargs.get("device"))):
            return None
    return sdpa_mask(
        batch_size=batch_size,
        q_length=q_length,
        kv_length=kv_length,
        attention_mask=attention_mask,
        mask_function=mask_function,
        local_size=local_size,
        allow_is_causal_skip=allow_is_causal_skip and usual,
        allow_is_bidirectional_skip=False,
        **kwargs,
    )


def is_window(mask_function: Callable, window: int | None, tokens: int, device: Any = None) -> bool:
    """Whether a mask function lets each token look at itself and at those before it, at most `window` of them.

    Asked at both ends of every token's window and one past each: tokens × 5 answers, not tokens².
    """
    if window is None:
        return False
    queries = torch.arange(tokens, device=device)
    back = torch.tensor([-1, 0, 1, window - 1, window], device=device)[:, None]
    keys = queries - back  # (5, tokens)
    there = (keys >= 0) & (keys < tokens)
    keys = keys.clamp(0, tokens - 1)
    first = torch.zeros_like(keys)
    seen = mask_function(first, first, queries.expand_as(keys), keys)
    return bool(((seen == (back >= 0) & (back < window)) | ~there).all())


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
    is_causal: bool | None = None,
    **kwargs: Any,
) -> tuple[torch.Tensor, None]:
    """Causal attention. query: (batch, heads, new, head_dim); key, value: (batch, kv_heads, all, head_dim).

    attention_mask: (batch, 1, new, all), True where it may look, or None for plain causal attention. Returns
    (batch, new, heads, head_dim). Raises ValueError for what it cannot compute, rather than leave it out.
    """
    unknown = [name for name, value in kwargs.items() if value is not None and name not in UNIMPORTANT]
    if unknown:
        raise ValueError(
            f"attention=efficient knows no {unknown[0]}, which {type(module).__name__} asks for: set attention=eager"
        )
    looks_ahead = is_causal is False or not getattr(module, "is_causal", True)
    if attention_mask is None and looks_ahead and query.shape[2] > 1:
        raise ValueError(f"attention=efficient is causal, and {type(module).__name__} looks ahead: set attention=eager")
    # Grouped heads (GQA, https://arxiv.org/abs/2305.13245) are repeated: enable_gqa has no memory-efficient kernel.
    key, value = repeat_heads(key, query.shape[1]), repeat_heads(value, query.shape[1])
    inputs = (query, key, value)
    dot = partial(torch.nn.functional.scaled_dot_product_attention, dropout_p=dropout, scale=scaling)
    if attention_mask is not None:
        out = dot(*inputs, attn_mask=attention_mask)
    elif cu_seq_lens_q is None:
        out = causal(dot, *inputs, sliding_window)
    else:  # a row of conversations that must not see each other
        sizes = cu_seq_lens_q.diff().tolist()
        apart = zip(*(states.split(sizes, dim=2) for states in inputs), strict=True)
        out = torch.cat([causal(dot, *conversation, sliding_window) for conversation in apart], dim=2)
    return out.transpose(1, 2).contiguous(), None


def causal(
    dot: Callable, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, window: int | None
) -> torch.Tensor:
    """Each token attends to itself and to those before it, at most a window of them."""
    new, known = query.shape[2], key.shape[2]  # new < known while a key-value cache answers
    if window is None or known <= window:
        return dot(query, key, value, is_causal=new > 1)
    back = torch.arange(known - new, known, device=query.device)[:, None] - torch.arange(known, device=query.device)
    return dot(query, key, value, attn_mask=(back >= 0) & (back < window))


def repeat_heads(states: torch.Tensor, heads: int) -> torch.Tensor:
    """(batch, kv_heads, tokens, head_dim) -> (batch, heads, tokens, head_dim): heads repeated."""
    return states.repeat_interleave(heads // states.shape[1], dim=1)


class Packing(NamedTuple):
    """Several conversations in one row: where each starts, and the end (int32), and the length of the longest."""

    bounds: torch.Tensor
    longest: int


def forward(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, packing: Packing | None, window: int | None
) -> tuple[torch.Tensor, tuple]:
    """Causal attention outside of autograd, and the statistics that `backward` needs beside its result.

    query: (batch, tokens, heads, head_dim); key, value: (batch, tokens, kv_heads, head_dim). Returns
    (batch, tokens, heads, head_dim).
    """
    kernel = kernel_for(query)
    bounds, longest = packing or (None, query.shape[1])
    # stats: the log-sum-exp of each query's scores, from which the backward pass makes the scores again block by block
    # (FlashAttention, section 3.1, https://arxiv.org/abs/2205.14135), and the generator's state for a dropout of none.
    if kernel == "flash":
        out, *stats = torch.ops.aten._flash_attention_forward(
            *for_flash(packing, query, key, value), bounds, bounds, longest, longest, 0.0, True, False,
            window_size_left=-1 if window is None else window - 1, window_size_right=0,
        )  # fmt: skip
        return out.view(query.shape), tuple(stats[:3])
    if kernel == "memory-efficient":
        heads = query.shape[2]
        out, *stats = torch.ops.aten._efficient_attention_forward(
            query, spread(key, heads), spread(value, heads), None, bounds, bounds, longest, longest, 0.0, 1, True,
            window_size=window if window is not None and window < longest else None,
        )  # fmt: skip
        return out, tuple(stats[:3])
    return through_sdpa(query, key, value, bounds, window), ()


def backward(
    grad: torch.Tensor,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    out: torch.Tensor,
    stats: tuple,
    packing: Packing | None,
    window: int | None,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Gradients for query, key and value, from `forward`'s result and statistics; shapes as there."""
    kernel = kernel_for(query)
    bounds, longest = packing or (None, query.shape[1])
    if kernel == "flash":
        lse, rng, unused = stats
        grads = torch.ops.aten._flash_attention_backward(
            *for_flash(packing, grad, query, key, value, out), lse, bounds, bounds, longest, longest, 0.0, True,
            rng, unused, window_size_left=-1 if window is None else window - 1, window_size_right=0,
        )  # fmt: skip
        return tuple(part.view(whole.shape) for part, whole in zip(grads, (query, key, value), strict=True))
    if kernel == "memory-efficient":
        lse, seed, offset = stats
        heads = query.shape[2]
        query_grad, key_grad, value_grad, _ = torch.ops.aten._efficient_attention_backward(
            grad, query, spread(key, heads), spread(value, heads), None, out, bounds, bounds, longest, longest,
            lse, 0.0, seed, offset, 1, False,
            window_size=window if window is not None and window < longest else None,
        )  # fmt: skip
        return query_grad, gathered(key_grad, key.shape[2]), gathered(value_grad, value.shape[2])
    # No operator gives back statistics here: SDPA runs again, and autograd goes through it.
    with torch.enable_grad():
        leaves = [states.detach().requires_grad_() for states in (query, key, value)]
        return torch.autograd.grad(through_sdpa(*leaves, bounds, window), leaves, grad)


def for_flash(packing: Packing | None, *states: torch.Tensor) -> tuple[torch.Tensor, ...]:
    """(batch, tokens, heads, head_dim) as the flash operators want it: with bounds (tokens, heads, head_dim).

    The memory-efficient ones keep the batch axis with bounds too (aten/src/ATen/native/transformers/cuda/attention.cu).
    """
    return states if packing is None else tuple(part.flatten(0, 1) for part in states)


def kernel_for(query: torch.Tensor) -> str:
    """Which kernel: "flash" from compute capability 8 on, "memory-efficient" on other GPUs, "sdpa" elsewhere."""
    if not query.is_cuda or query.shape[-1] % 8:
        return "sdpa"
    flash = torch.backends.cuda.flash_sdp_enabled() and torch.cuda.get_device_capability(query.device) >= (8, 0)
    return "flash" if flash and query.dtype != torch.float32 else "memory-efficient"


def through_sdpa(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, bounds: torch.Tensor | None, window: int | None
) -> torch.Tensor:
    """`attention` with tokens before heads, as the layers lay them."""
    swapped = (states.transpose(1, 2) for states in (query, key, value))
    return attention(None, *swapped, attention_mask=None, sliding_window=window, cu_seq_lens_q=bounds)[0]


def spread(states: torch.Tensor, heads: int) -> torch.Tensor:
    """(batch, tokens, kv_heads, head_dim) -> (batch, tokens, heads, head_dim)."""
    batch, tokens, kv_heads, size = states.shape
    grouped = states[:, :, :, None].expand(batch, tokens, kv_heads, heads // kv_heads, size)
    return grouped.reshape(batch, tokens, heads, size)


def gathered(grad: torch.Tensor, kv_heads: int) -> torch.Tensor:
    """`spread`'s gradient: the heads that shared a key-value head, added up."""
    batch, tokens, heads, size = grad.shape
    return grad.view(batch, tokens, kv_heads, heads // kv_heads, size).sum(3)
