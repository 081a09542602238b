"""Perplexity by strided windows, in memory that grows neither with the text nor with the vocabulary.

A window reads at most `context` tokens and scores the last `stride` of them (the first window: all), so every token is
scored once, and all but the first have at least context − stride tokens before them:

>>> [(list(w.ids), w.first_scored) for w in windows([0, 1, 2, 3, 4, 5, 6], context=4, stride=2)]
[([0, 1, 2, 3, 4], 1), ([2, 3, 4, 5, 6], 3)]

With stride = context these are the windows of lm-evaluation-harness's rolling log-likelihood. (Give the harness
add_bos_token=False: else it puts bos before a text that its tokenizer began with one already.)
"""

import json
import math
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, replace
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np

from helpers.evaluate.metrics import Estimate, ratio_interval
from helpers.inference import Loaded
from helpers.models import families
from helpers.models.templates import Template
from helpers.workspace import maker
from helpers.workspace.prepared import scored

LOGIT_ROWS = 256
"""Tokens whose logits exist at a time: 32 MiB in float32 for 32,768 words."""
PIECE_CHARACTERS = 262_144
"""A longer text is read in pieces, cut at a line's end; each begins anew, which costs some 1e-4 of the perplexity."""
SORTED_BATCHES = 16
"""Windows of so many batches are ordered by length before they are batched, so that little is padding."""


@dataclass(frozen=True)
class Item:
    """What an interval resamples: a conversation, or a piece of text."""

    ids: list[int]
    scored: list[bool] | None
    """One a token: whether its loss counts; None: every token's."""
    bytes: int
    """UTF-8 bytes of what is scored."""
    whole: bool = True
    """False: its windows are the items, since one long text has no other parts to resample."""


@dataclass(frozen=True)
class Window:
    """At most context + 1 tokens: each but the last is read, each but the first may be scored."""

    ids: list[int]
    first_scored: int
    scored: list[bool] | None = None
    item: int = 0


@dataclass(frozen=True)
class Perplexity:
    """exp of the mean loss a token, and the losses that it comes from."""

    perplexity: Estimate
    bits_per_byte: Estimate
    tokens: int
    context: int
    stride: int
    losses: np.ndarray
    """Nats, summed over each item."""
    weights: np.ndarray
    """Scored tokens of each item."""


def windows(ids: list[int], context: int, stride: int, scored: list[bool] | None = None) -> Iterator[Window]:
    """Cut a sequence so that every token but the first is scored once. Raises ValueError when stride > context."""
    if not 1 <= stride <= context:
        raise ValueError(f"eval_stride must be between 1 and eval_context={context}, not {stride}")
    last, done = min(context, len(ids) - 1), 0  # the index of the last token scored in this window, and before it
    while done < len(ids) - 1:
        start = max(0, last - context)
        part = None if scored is None else scored[start : last + 1]
        if part is None or any(part[done + 1 - start :]):
            yield Window(ids[start : last + 1], done + 1 - start, part)
        done, last = last, min(last + stride, len(ids) - 1)


def read_items(source: Path, tokenizer: Any, limit: int | None = None) -> Iterator[Item]:
    """Conversations or text to score: a prepared folder, JSONL with messages or text, or a plain text file.

    Raises ValueError with one sentence when there is nothing to score.
    """
    source, count = Path(source), 0
    for item in islice(read_any(source, tokenizer), limit):
        if len(item.ids) > 1 and (item.scored is None or any(item.scored[1:])):
            count += 1
            yield item
    if not count:
        raise ValueError(f"{source} holds nothing to score: give held-out conversations, or a text that is not empty")


def rows_in(source: Path, context: int) -> int:
    """How many texts a source holds, before it is read; of one long text: its windows, four bytes a token."""
    source = Path(source)
    if source.is_dir():
        return len(scored(source))
    if source.suffix in (".jsonl", ".json"):
        with source.open("rb") as lines:
            return sum(1 for line in lines if line.strip())
    return math.ceil(source.stat().st_size / (4 * context))


def read_any(source: Path, tokenizer: Any) -> Iterator[Item]:
    """Items of whatever source is. Raises ValueError when it is not there."""
    if source.is_dir():
        yield from read_prepared(source, tokenizer)
    elif not source.is_file():
        raise ValueError(f"there is no evaluation data {source}: give a prepared folder, a JSONL or a text file")
    elif source.suffix in (".jsonl", ".json"):
        yield from (row_item(row, tokenizer) for row in read_jsonl(source))
    else:
        yield from (text_item(piece, tokenizer) for piece in pieces(source))


def read_prepared(folder: Path, tokenizer: Any) -> Iterator[Item]:
    """The held-out split that prepare wrote: tokens and masks are in it."""
    try:
        rows = scored(folder)
    except (FileNotFoundError, ValueError):
        raise ValueError(f"{folder} is not a prepared folder: run {maker('prepare')} first") from None
    for row in rows:
        yield masked_item(row["input_ids"], row["assistant_masks"], tokenizer)


def read_jsonl(path: Path) -> Iterator[dict]:
    """Objects of a JSONL file, one at a time. Raises ValueError naming the line that is none."""
    with path.open(encoding="utf-8") as lines:
        for number, line in enumerate(lines, 1):
            if not line.strip():
                continue
            try:
                row = json.loads(line)
            except ValueError:
                row = None
            if not isinstance(row, dict):
                raise ValueError(f"{path}, line {number} is not a JSON object: write one {{…}} a line")
            yield row


def row_item(row: dict, tokenizer: Any) -> Item:
    """A conversation by its messages (assistant tokens are scored), or a text (all are)."""
    if isinstance(row.get("text"), str):
        return replace(text_item(row["text"], tokenizer), whole=True)
    if not isinstance(row.get("messages"), list):
        raise ValueError(f"a row to evaluate has messages or text, but here is one with {', '.join(row) or 'nothing'}")
    ids, mask, _ = Template(tokenizer).encode([row["messages"]])[0]  # exact also where a template marks nothing
    return masked_item(ids, mask, tokenizer)


def masked_item(ids: list[int], mask: list[int], tokenizer: Any) -> Item:
    """A conversation whose mask says which tokens are the assistant's."""
    scored = [bool(one) for one in mask]
    texts, run = [], []
    for token, counts in zip([*ids, 0], [*scored, False], strict=True):
        if counts:
            run.append(token)
        elif run:
            texts.append(tokenizer.decode(run, skip_special_tokens=True))
            run = []
    return Item(ids, scored, sum(len(text.encode()) for text in texts))


def text_item(text: str, tokenizer: Any) -> Item:
    """A text, whole: bos, then every token is scored."""
    ids = tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]
    first = tokenizer.bos_token_id if tokenizer.bos_token_id is not None else tokenizer.eos_token_id
    return Item([first, *ids], None, len(text.encode()), whole=False)


def pieces(path: Path) -> Iterator[str]:
    """A text file, at most about PIECE_CHARACTERS at a time, cut at the ends of lines."""
    with path.open(encoding="utf-8", newline="") as stream:
        while piece := stream.read(PIECE_CHARACTERS):
            yield piece + (stream.readline() if len(piece) == PIECE_CHARACTERS else "")


def perplexity(
    loaded: Loaded, items: Iterable[Item], context: int, stride: int, batch_size: int = 8, seed: int = 0
) -> Perplexity:
    """Token-weighted: every scored token counts the same, whichever conversation it is in.

    context and stride are tokens. The interval resamples items (of one long text: windows).
    Raises ValueError when context is longer than the model's, and when a loss is not a number.
    """
    if context > loaded.context:
        raise ValueError(f"eval_context={context} is longer than the model's {loaded.context}: set it to that at most")
    sums: list[list[float]] = []  # nats, tokens and bytes of an item
    for batch in batches(number_windows(items, context, stride, sums), batch_size):
        for window, loss in zip(batch, window_losses(loaded.model, batch), strict=True):
            sums[window.item][0] += loss
            sums[window.item][1] += scored_tokens(window)
    losses, weights, sizes = np.array(sums, dtype=float).T
    if not np.isfinite(losses).all():
        raise ValueError(
            f"the loss of {loaded.path} is not a number on {int((~np.isfinite(losses)).sum())} of {len(losses)} texts: "
            "its weights are damaged, or fp16 overflows; evaluate the model it was made from to tell which"
        )
    nats, bits = ratio_interval(losses, weights, seed), ratio_interval(losses / math.log(2), sizes, seed)
    return Perplexity(exponential(nats), bits, int(weights.sum()), context, stride, losses, weights)


def exponential(nats: Estimate) -> Estimate:
    """A mean loss and its interval as perplexities; beyond e^700 a float ends."""
    return Estimate(*(math.exp(min(value, 700.0)) for value in (nats.value, nats.low, nats.high)))


def number_windows(items: Iterable[Item], context: int, stride: int, sums: list[list[float]]) -> Iterator[Window]:
    """Windows that know their item; appends [0, 0, bytes] to sums for every item met."""
    for item in items:
        cut = list(windows(item.ids, context, stride, item.scored))
        tokens = sum(scored_tokens(window) for window in cut)
        if item.whole:
            sums.append([0.0, 0.0, item.bytes])
        for window in cut:
            if not item.whole:
                sums.append([0.0, 0.0, item.bytes * scored_tokens(window) / tokens])
            yield replace(window, item=len(sums) - 1)


def scored_tokens(window: Window) -> int:
    """How many of a window's tokens count."""
    if window.scored is None:
        return len(window.ids) - window.first_scored
    return sum(window.scored[window.first_scored :])


def batches(stream: Iterator[Window], size: int) -> Iterator[list[Window]]:
    """Windows of like length together, a bounded number in memory."""
    while block := list(islice(stream, size * SORTED_BATCHES)):
        block.sort(key=lambda window: -len(window.ids))
        yield from (block[start : start + size] for start in range(0, len(block), size))


def window_losses(model: Any, batch: list[Window]) -> list[float]:
    """Nats of each window's scored tokens. Logits exist for LOGIT_ROWS tokens at a time, and only for scored ones.

    Of a family that models/families.py does not know, the model's own forward makes the logits, of a whole batch.
    """
    import torch
    from torch.nn.functional import cross_entropy

    plain = model.get_base_model() if hasattr(model, "get_base_model") else model
    longest = max(len(window.ids) for window in batch) - 1
    ids = torch.zeros(len(batch), longest, dtype=torch.long)  # (rows, seq); padding on the right, never attended to
    labels, real, counts = torch.zeros_like(ids), torch.zeros_like(ids), torch.zeros_like(ids, dtype=torch.bool)
    for row, window in enumerate(batch):
        length = len(window.ids) - 1
        ids[row, :length] = torch.tensor(window.ids[:-1])
        labels[row, :length] = torch.tensor(window.ids[1:])
        real[row, :length] = 1
        counts[row, window.first_scored - 1 : length] = True
        if window.scored is not None:
            counts[row, :length] &= torch.tensor(window.scored[1:])
    device = model.device
    with torch.inference_mode():
        inputs = {"input_ids": ids.to(device), "attention_mask": real.to(device), "use_cache": False}
        values, logits = logits_of(plain, inputs)  # (rows, seq, hidden), or (rows, seq, vocab)
        values, labels = values[counts.to(device)], labels[counts].to(device)  # (scored, …), (scored,)
        losses = torch.cat(
            [
                cross_entropy(logits(some).float(), wanted, reduction="none")  # logits: (LOGIT_ROWS, vocab)
                for some, wanted in zip(values.split(LOGIT_ROWS), labels.split(LOGIT_ROWS), strict=True)
            ]
        ).double()
    owners = torch.arange(len(batch)).unsqueeze(1).expand_as(counts)[counts]
    return torch.zeros(len(batch), dtype=torch.double).index_add_(0, owners, losses.cpu()).tolist()


def logits_of(model: Any, inputs: dict[str, Any]) -> tuple[Any, Callable[[Any], Any]]:
    """(values of each token, what makes logits of some of them): hidden states and the head as its family has it."""
    from helpers.models.logits import finished

    try:
        how = families.of(model.config.to_dict()).logits
    except ValueError:  # nobody has looked at this family: its own logits are right
        return model(**inputs).logits, lambda some: some
    head = model.get_output_embeddings()
    return model.get_decoder()(**inputs).last_hidden_state, lambda some: finished(head(some).float(), how)
