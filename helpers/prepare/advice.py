"""What to know of prepared data before a training is paid for: a sentence for each, with the number that mends it.

>>> worth(10)
'31'
"""

import math
from typing import Any

import numpy as np

MANY = 0.5
"""Share of rows from which a warning is due before training."""
ENOUGH_HELD_OUT = 30
NINE_IN_TEN = 0.9
TOLD_BY_LENGTH = 0.75
"""Share of pairs whose better answer is the longer (or shorter) one from which a warning is due."""


def warnings(made: dict[str, Any], rows: Any, kept: np.ndarray, fraction: float | None, notes: list[str]) -> list[str]:
    """What to know before training. rows: helpers.prepare.rows.Rows; notes: what was said while the source was read.

    fraction: what was to be held out; None: what a file of its own holds.
    """
    served = rows.template.served_otherwise()
    said = [*([served] if served else []), *dict.fromkeys(notes), *about_context(made, rows, kept)]
    over = made["dropped"].get("over-context", 0)
    if sum(made["dropped"].values()) > MANY * made["in"] and over <= MANY * made["in"]:
        worst = max(made["dropped"], key=made["dropped"].__getitem__)
        said.append(f"{made['in'] - made['kept']:,} of {made['in']:,} rows were dropped, most of them for {worst}")
    if made["train_tokens"] and made["trained_tokens"] < 0.05 * made["train_tokens"]:
        share = made["trained_tokens"] / made["train_tokens"]
        said.append(f"only {share:.1%} of the tokens are trained: the answers are far shorter than their prompts")
    said += about_length(made)
    said += about_held_out(made, fraction)
    if rows.unfaithful and rows.unfaithful[0]:
        wrong, of, example = rows.unfaithful
        said.append(f"{wrong} of {of} answers do not come back from this tokenizer as they were written: {example!r}")
    return said


def about_context(made: dict[str, Any], rows: Any, kept: np.ndarray) -> list[str]:
    """Whether the context is too short, and the length that would hold nine conversations in ten."""
    full = np.array(rows.full, dtype=np.int64)[kept[np.array(rows.owner, dtype=np.int64)]]
    enough = int(np.quantile(np.concatenate([full, np.array(rows.misfits, dtype=np.int64)]), NINE_IN_TEN)) + 1
    over = made["dropped"].get("over-context", 0)
    cut = round(made["cut_share"] * (made["train_rows"] + made["heldout_rows"]))
    remedy = f"seq_len={enough} would hold nine in ten whole"
    if over > MANY * made["in"]:
        return [f"{over:,} of {made['in']:,} conversations do not fit {rows.seq_len:,} tokens at all: {remedy}"]
    if made["cut_share"] > MANY:
        longer = f"{made['cut_share']:.0%} of the rows are longer than the context of {rows.seq_len:,} tokens"
        return [f"{longer} and lose their last turns: {remedy}"]
    if over + cut > 0.1 * made["in"]:
        return [f"{over:,} conversations do not fit {rows.seq_len:,} tokens and {cut:,} were cut: {remedy}"]
    return []


def about_length(made: dict[str, Any]) -> list[str]:
    """Whether length alone tells the better answers of pairs from the worse: then length is what is learned."""
    share, tokens = made.get("chosen_longer_share", 0.5), made.get("chosen_answer_tokens", 0.0)
    ratio = tokens / max(made.get("rejected_answer_tokens", tokens), 1)
    for words, told, times in (("longer", share, ratio), ("shorter", 1 - share, 1 / max(ratio, 1e-9))):
        if told > TOLD_BY_LENGTH and times > 1.2:
            return [
                f"the better answer is the {words} one in {told:.0%} of the pairs, {times:.1f} times on average: the "
                "model may learn the length alone; look at the length of its answers before and after in the evaluation"
            ]
    return []


def about_held_out(made: dict[str, Any], fraction: float | None) -> list[str]:
    """Whether enough is held out, and as much as was asked."""
    held, total = made["heldout_conversations"], made["kept"]
    if not made["train_rows"]:
        return ["everything is held out and nothing left to train on: lower heldout_fraction"]
    if not held:
        return ["nothing is held out: there will be no held-out loss and no perplexity; set heldout_fraction"]
    said = []
    share = held / total
    groups = next((row["count"] for row in made["findings"] if row["kind"] == "near-duplicate"), 0)
    if (
        fraction
        and abs(share - fraction) > fraction / 2
        and abs(held - fraction * total) > 3 * math.sqrt(fraction * total)
    ):
        why = f", because {groups:,} are almost like others and stay with them" if groups else ""
        said.append(f"{share:.1%} of the conversations are held out where {fraction:.1%} was asked{why}")
    if held < ENOUGH_HELD_OUT:
        more = f"; heldout_fraction={ENOUGH_HELD_OUT / total:.2g} would hold {ENOUGH_HELD_OUT} out" if (
            fraction is not None and total > 3 * ENOUGH_HELD_OUT) else ""  # fmt: skip
        said.append(
            f"only {held:,} held-out conversations: a share of right answers on so few is known to ±{worth(held)} "
            f"points (95%){more}"
        )
    return said


def worth(count: int) -> str:
    """Half the 95% interval of a share of one half that was counted on so many, in points: 1.96 √(0.25 / n)."""
    return f"{min(100 * 1.96 * math.sqrt(0.25 / count), 100):.0f}"
