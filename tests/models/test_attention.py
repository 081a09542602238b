"""Attention's kernels: what they are called with, and that each gives what plain attention gives.

No CPU has PyTorch's flash operators. Their shapes are checked against their meta kernels, and what goes in and comes
out against a plain computation in their place that takes the shapes that the CUDA code takes
(aten/src/ATen/native/transformers/cuda/flash_attn/flash_api.cpp). benchmarks/gpu_checks.py runs the operators.
"""

import pytest
import torch

from helpers.models import attention

HEADS, KV_HEADS, SIZE = 4, 2, 8
LENGTHS = (5, 9, 3)
CASES = pytest.mark.parametrize(
    ("packed", "window"), [(False, None), (False, 4), (True, None), (True, 4)], ids=["", "window", "packed", "both"]
)


def inputs(packed: bool, device: str = "cpu"):
    """(queries, keys and values; the result's gradient; packing)."""
    generator, tokens = torch.Generator().manual_seed(0), sum(LENGTHS)
    shapes = [(1 if packed else 2, tokens, heads, SIZE) for heads in (HEADS, KV_HEADS, KV_HEADS, HEADS)]
    *states, grad = (torch.randn(shape, generator=generator).to(device) for shape in shapes)
    bounds = torch.tensor([0, *LENGTHS], device=device).cumsum(0, dtype=torch.int32)
    return states, grad, attention.Packing(bounds, max(LENGTHS)) if packed else None


def plain(query, key, value, bounds, longest, window_size_left, window_size_right, **_):
    """Softmax over the scores of all pairs, those that a token may not see at -inf."""
    assert query.dim() == (4 if bounds is None else 3), f"temp_q must have shape (total_q, …), not {query.shape}"
    assert window_size_right == 0
    states = (part if bounds is None else part[None] for part in (query, key, value))
    query, key, value = (part.repeat_interleave(HEADS // part.shape[2], 2).transpose(1, 2) for part in states)
    place = torch.arange(query.shape[2])
    back = place[:, None] - place[None]
    seen = (back >= 0) & (back <= (window_size_left if window_size_left >= 0 else len(place)))
    if bounds is not None:
        assert longest == bounds.diff().max() and bounds.dtype == torch.int32
        conversation = torch.bucketize(place, bounds[1:], right=True)
        seen &= conversation[:, None] == conversation[None]
    scores = (query @ key.transpose(2, 3) / SIZE**0.5).masked_fill(~seen, -torch.inf)
    out = (scores.softmax(-1) @ value).transpose(1, 2)
    return out if bounds is None else out[0]


def plain_forward(query, key, value, bounds, _, longest, longest_key, dropout, causal, debug, **window):
    """aten._flash_attention_forward."""
    tokens = query.shape[:1] if bounds is not None else (len(query), HEADS, longest)
    lse = torch.empty(HEADS, *tokens) if bounds is not None else torch.empty(tokens)
    return plain(query, key, value, bounds, longest, **window), lse, torch.empty(2), torch.empty(()), torch.empty(0)


def plain_backward(grad, query, key, value, out, lse, bounds, _, longest, *rest, **window):
    """aten._flash_attention_backward."""
    assert lse.shape == ((HEADS, len(query)) if bounds is not None else (len(query), HEADS, longest))
    assert grad.shape == out.shape == query.shape
    with torch.enable_grad():
        leaves = [states.detach().requires_grad_() for states in (query, key, value)]
        return torch.autograd.grad(plain(*leaves, bounds, longest, **window), leaves, grad)


@CASES
def test_flash_gives_what_plain_attention_gives(packed, window, monkeypatch):
    states, grad, packing = inputs(packed)
    expected, _ = attention.forward(*states, packing, window)
    expected_grads = attention.backward(grad, *states, expected, (), packing, window)
    monkeypatch.setattr(attention, "kernel_for", lambda query: "flash")
    monkeypatch.setattr(torch.ops.aten, "_flash_attention_forward", plain_forward)
    monkeypatch.setattr(torch.ops.aten, "_flash_attention_backward", plain_backward)
    out, stats = attention.forward(*states, packing, window)
    grads = attention.backward(grad, *states, out, stats, packing, window)
    torch.testing.assert_close(out, expected)
    for ours, theirs, whole in zip(grads, expected_grads, states, strict=True):
        assert ours.shape == whole.shape
        torch.testing.assert_close(ours, theirs)


@CASES
def test_the_flash_operators_see_every_token(packed, window, monkeypatch):
    """By PyTorch's own meta kernels: the log-sum-exp has a place for each query."""
    states, grad, packing = inputs(packed, "meta")
    monkeypatch.setattr(attention, "kernel_for", lambda query: "flash")
    out, stats = attention.forward(*states, packing, window)
    assert stats[0].shape == ((HEADS, sum(LENGTHS)) if packed else (2, HEADS, sum(LENGTHS)))
    grads = attention.backward(grad, *states, out, stats, packing, window)
    assert out.shape == states[0].shape
    assert [part.shape for part in grads] == [part.shape for part in states]
