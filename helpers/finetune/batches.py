"""Micro-batches of a prepared dataset, decided before training starts: which conversations, in which order.

All epochs are laid out at once as a list that depends on nothing but the lengths, the configuration and the seed, so
that a resumed run meets the same data whatever the libraries' samplers do. Conversations of like length share a batch,
or several are packed into one row, so that little is computed for padding.

>>> plan = micro_batches([5, 3, 9, 4], batch_size=2, seq_len=9, epochs=1.0, seed=0)
>>> sorted(row for batch in plan for row in batch)
[0, 1, 2, 3]
"""

import math
import random
from collections.abc import Sequence
from typing import Any

IGNORE = -100
"""The label that cross-entropy leaves out (torch's own default)."""


def micro_batches(
    lengths: Sequence[int],
    batch_size: int,
    seq_len: int,
    epochs: float,
    seed: int,
    packing: bool = False,
    micro_batch_limit: int | None = None,
) -> list[list[int]]:
    """Row indices of every micro-batch of the run, epoch after epoch.

    lengths: tokens of each conversation. packing: fill rows of seq_len tokens, batch_size of them a micro-batch, with
    whole conversations (best fit, longest first); else batch_size conversations of like length each. A fraction of
    an epoch takes that share of its micro-batches. micro_batch_limit: stop after so many.
    """
    planned: list[list[int]] = []
    epoch = 0
    while epoch < epochs and (micro_batch_limit is None or len(planned) < micro_batch_limit):
        order = list(range(len(lengths)))
        # A generator an epoch, seeded by both numbers: no epoch's order depends on how far another one got.
        shuffle = random.Random(f"{seed} {epoch}")
        shuffle.shuffle(order)
        batches = packed(order, lengths, batch_size, seq_len) if packing else grouped(order, lengths, batch_size)
        shuffle.shuffle(batches)  # grouping has sorted within windows: batches would grow shorter and shorter
        share = min(1.0, epochs - epoch)
        planned += batches[: max(1, round(share * len(batches)))]
        epoch += 1
    return planned[:micro_batch_limit]


def grouped(order: list[int], lengths: Sequence[int], batch_size: int, window: int = 50) -> list[list[int]]:
    """Batches of like length: within windows of 50 batches only, so that an epoch stays random.

    >>> grouped([0, 1, 2, 3], [5, 3, 5, 3], batch_size=2)
    [[0, 2], [1, 3]]
    """
    reach = window * batch_size
    windows = [order[start : start + reach] for start in range(0, len(order), reach)]
    if batch_size > 1:
        windows = [sorted(rows, key=lambda row: -lengths[row]) for rows in windows]
    return [rows[start : start + batch_size] for rows in windows for start in range(0, len(rows), batch_size)]


def packed(
    order: list[int], lengths: Sequence[int], batch_size: int, seq_len: int, window: int = 2000
) -> list[list[int]]:
    """Batches whose conversations lie end to end in batch_size × seq_len tokens: best fit, longest first.

    >>> packed([0, 1, 2], [6, 5, 4], batch_size=1, seq_len=10)
    [[0, 2], [1]]
    """
    room = batch_size * seq_len
    batches = []
    for start in range(0, len(order), window):
        bins: list[tuple[int, list[int]]] = []  # (tokens left, rows)
        # Best fit decreasing: into the fullest bin that takes it. At most 11/9 of the fewest bins, and 4 (Johnson 1973)
        for row in sorted(order[start : start + window], key=lambda row: -lengths[row]):
            fitting = [place for place, (left, _) in enumerate(bins) if left >= lengths[row]]
            if fitting:
                place = min(fitting, key=lambda place: bins[place][0])
                left, rows = bins[place]
                bins[place] = (left - lengths[row], [*rows, row])
            else:
                bins.append((room - lengths[row], [row]))
        batches += [rows for _, rows in bins]
    return batches


NOTHING = {"input_ids": [0, 0], "assistant_masks": [0, 0]}
"""A conversation without a label: a micro-batch of it has no loss, and gradients of zero."""


def dealt(plan: list[list[int]], accumulation: int, ranks: int) -> tuple[list[list[int]], int]:
    """A plan for several ranks that makes the very same steps, and the micro-batches of a step that each rank gets.

    Micro-batch i goes to rank i mod ranks, as accelerate deals them. A step's accumulation micro-batches that do not
    divide by the ranks are cut into as many parts as that takes, row by row; the step's loss is a sum over tokens
    divided by their number, so where a row is computed does not matter. Steps of fewer parts are filled up with empty
    ones: accelerate would fill up with rows from the start, which would be trained on twice.

    >>> dealt([[0], [1], [2], [3], [4]], accumulation=2, ranks=2)
    ([[0], [1], [2], [3], [4], []], 1)
    >>> dealt([[0, 1], [2, 3]], accumulation=1, ranks=2)
    ([[0], [1], [2], [3]], 1)
    >>> dealt([[0], [1], [2]], accumulation=3, ranks=2)
    ([[0], [1], [2], []], 2)
    """
    if ranks == 1:
        return plan, accumulation
    cuts = ranks // math.gcd(accumulation, ranks)
    steps = [
        [part for rows in plan[start : start + accumulation] for place in range(cuts) if (part := rows[place::cuts])]
        for start in range(0, len(plan), accumulation)
    ]
    each = -(-max(map(len, steps)) // ranks)
    return [part for parts in steps for part in (parts + [[]] * (ranks * each - len(parts)))], each


def collate(rows: list[dict[str, Any]], pad_id: int, packing: bool = False, by_bounds: bool = True) -> dict[str, Any]:
    """Tensors of one micro-batch from rows with input_ids and assistant_masks.

    Padded on the right: input_ids and labels (batch, longest); there is no attention mask, for under causal attention
    no token sees the padding behind it. Packed: one row (1, all tokens) with position_ids that start again at each
    conversation, and cu_seq_lens_q/k with max_length_q/k. by_bounds: the attention function keeps to those
    (models/attention.py does), so transformers need not make a tokens² mask from position_ids. Labels are IGNORE where
    assistant_masks is 0, and on every first token: nothing predicts it.
    """
    import torch

    ids = [torch.tensor(row["input_ids"], dtype=torch.long) for row in rows]
    labels = [
        torch.where(torch.tensor(row["assistant_masks"]) == 1, tokens, IGNORE)
        for row, tokens in zip(rows, ids, strict=True)
    ]
    for label in labels:
        label[0] = IGNORE
    if not packing:
        pad = torch.nn.utils.rnn.pad_sequence
        return {
            "input_ids": pad(ids, batch_first=True, padding_value=pad_id),
            "labels": pad(labels, batch_first=True, padding_value=IGNORE),
        }
    # Where each conversation starts, and the end of the last: [5, 3] -> [0, 5, 8], in the kernels' int32.
    sizes = torch.tensor([len(tokens) for tokens in ids])
    ends = torch.nn.functional.pad(sizes.cumsum(0), (1, 0)).to(torch.int32)
    return {
        "input_ids": torch.cat(ids)[None],
        # Without a mask transformers would read the packing out of position_ids, and make one for it.
        **({"attention_mask": torch.ones(1, int(ends[-1]), dtype=torch.long)} if by_bounds else {}),
        "position_ids": torch.cat([torch.arange(len(tokens)) for tokens in ids])[None],
        "labels": torch.cat(labels)[None],
        "cu_seq_lens_q": ends,
        "cu_seq_lens_k": ends,
        "max_length_q": int(sizes.max()),
        "max_length_k": int(sizes.max()),
    }


def token_counts(plan: list[list[int]], lengths: Sequence[int], packing: bool = False) -> dict[str, int]:
    """Tokens of a plan that are text, and those that only fill its batches up.

    >>> token_counts([[0, 1]], [5, 3])
    {'text': 8, 'padding': 2}
    """
    text = sum(lengths[row] for batch in plan for row in batch)
    if packing:
        return {"text": text, "padding": 0}
    return {"text": text, "padding": sum(len(batch) * max(lengths[row] for row in batch) for batch in plan) - text}
