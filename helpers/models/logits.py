"""What a family does to its logits, as transformers' own model does it."""

import torch

from helpers.models.families import Logits


def finished(logits: torch.Tensor, how: Logits) -> torch.Tensor:
    """What the model makes of its head's result: scaled, then capped by a tanh."""
    if how.scale != 1:
        logits = logits * how.scale
    return logits if how.cap is None else how.cap * torch.tanh(logits / how.cap)
