"""Pairs of a better and a worse answer: which of them a model likes, and which it says.

Three things that are told apart here, because preference tuning moves them apart: a model may give the better answer
more probability than the worse one and say neither (plain DPO does that), or say the better one and forget the rest,
which perplexity and exact match beside these columns show.

    preference_accuracy   share of pairs whose better answer has more log-probability, summed over its tokens
    preference_margin     how much more, in nats a pair: of two models the difference is DPO's margin without its beta
    nearer_chosen         share of greedy answers that are nearer to the better answer than the worse one is, by chrF
    answer_tokens         length of these answers: liking longer ones is what preference data teach most easily
"""

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from helpers.config import RunConfig
from helpers.evaluate import perplexity
from helpers.evaluate.perplexity import Item
from helpers.inference import Loaded, batch_generate
from helpers.workspace import write_text
from helpers.workspace.prepared import scored


class Pair(NamedTuple):
    """One held-out pair."""

    prompt: list[dict[str, Any]]
    chosen: Item
    rejected: Item
    chosen_text: str
    rejected_text: str


def read(folder: Path, limit: int | None, asked_for: bool) -> list[Pair]:
    """Pairs held out of a prepared folder, or nothing where there are none.

    asked_for: raise ValueError with one sentence where there are none.
    """
    try:
        rows = scored(folder) if Path(folder).is_dir() else []
    except FileNotFoundError:
        rows = []
    if len(rows) and "rejected_ids" in rows.column_names:
        return [pair_of(row) for row in rows.select(range(min(limit or len(rows), len(rows))))]
    if asked_for:
        raise ValueError(f"preferences={folder} holds no pairs: give a folder that prepare wrote with use=pairs")
    return []


def pair_of(row: dict[str, Any]) -> Pair:
    """A pair from a prepared row."""
    *prompt, better = row["messages"]
    sides = (("input_ids", "assistant_masks"), ("rejected_ids", "rejected_masks"))
    # bytes are for bits a byte, which nobody asks of a pair
    chosen, rejected = (Item(row[ids], [bool(one) for one in row[masks]], bytes=1) for ids, masks in sides)
    return Pair(prompt, chosen, rejected, better["content"], row["rejected"][-1]["content"])


def answered(pairs: list[Pair], config: RunConfig) -> list[Pair]:
    """The pairs that are answered too: as many as questions may be."""
    return pairs[: config.evaluate.max_questions or len(pairs)]


def steps(pairs: list[Pair], config: RunConfig) -> int:
    """What `scores` moves a bar by."""
    return 2 * len(pairs) + len(answered(pairs, config))


def scores(
    loaded: Loaded, pairs: list[Pair], config: RunConfig, bar: Any = None
) -> tuple[dict[str, np.ndarray], list[str]]:
    """(figure -> a number a pair, of the answers a number each; the answers).

    bar: moves with every answer that is read or written.
    """
    each = bar.update if bar is not None else lambda count=1: None
    asked = config.evaluate
    context = min(asked.eval_context, loaded.context)
    stride = min(asked.eval_stride, context)
    batch = loaded.placement.batch_size
    chosen, rejected = (
        -perplexity.perplexity(loaded, told(pairs, side, each), context, stride, batch).losses
        for side in ("chosen", "rejected")
    )
    found = {"preference_accuracy": (chosen > rejected).astype(float), "preference_margin": chosen - rejected}
    some = answered(pairs, config)
    written = batch_generate(loaded, [pair.prompt for pair in some], asked.max_new_tokens, batch, each=each)
    asked_for = zip(written, some, strict=True)
    found["nearer_chosen"] = np.array([preferred(one.text, *pair[3:]) for one, pair in asked_for])
    found["answer_tokens"] = np.array([float(one.tokens) for one in written])
    return found, [one.text for one in written]


def told(pairs: list[Pair], side: str, each: Callable[[int], Any]) -> Iterator[Item]:
    """One side of the pairs; each: called after every one."""
    for pair in pairs:
        yield getattr(pair, side)
        each(1)


def write(path: Path, pairs: list[Pair], answers: dict[str, list[str]]) -> None:
    """A line a pair that was answered: prompt, both answers, and under `models` what each model said."""
    count = min(map(len, answers.values()))
    rows = [
        {"prompt": pair.prompt, "chosen": pair.chosen_text, "rejected": pair.rejected_text}
        | {"models": {name: said[place] for name, said in answers.items()}}
        for place, pair in enumerate(pairs[:count])
    ]
    write_text(path, "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))


def preferred(answer: str, chosen: str, rejected: str) -> float:
    """1 where an answer is nearer to the better one, by chrF, than to the worse and than these are to each other.

    Without the last, an answer that has nothing to do with either would count as half a good one.

    >>> preferred("By the river.", "By the river!", "No."), preferred("Seven.", "By the river!", "No.")
    (1.0, 0.0)
    """
    from sacrebleu.metrics import CHRF

    chrf = CHRF()
    better, worse, apart = (
        chrf.sentence_score(one, [other]).score
        for one, other in ((answer.strip(), chosen), (answer.strip(), rejected), (rejected, chosen))
    )
    return float(better > max(worse, apart))
