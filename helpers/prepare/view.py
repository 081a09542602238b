"""What prepared data looks like: its numbers, its findings, and a row as the model sees it."""

import math
import re
from html import escape
from typing import Any

import numpy as np

from helpers.budget.hours import duration
from helpers.config import RunConfig
from helpers.show.words import steps_of

SHOWN_TOKENS = 2000
"""A longer row would slow the browser, and shows nothing new."""

BYTE = re.compile("<0x([0-7][0-9A-F])>")
STYLE = """<style>
.tokens {font: 13px/1.9 ui-monospace, monospace; white-space: pre-wrap; overflow-wrap: anywhere; color: inherit}
.tokens span {padding: 1px 0; border-radius: 3px}
.tokens .read {opacity: .62}
.tokens .trained {background: rgba(46, 160, 67, .30)}
.tokens .trained:nth-of-type(even) {background: rgba(46, 160, 67, .42)}
.tokens .end {background: rgba(210, 120, 0, .55); font-weight: 700}
.tokens .special {border-bottom: 1px dotted currentColor}
</style>"""


def summary(made: dict[str, Any]) -> list[tuple[str, str]]:
    """(what, value) of what prepare counted, for a table; warnings last."""
    dropped = sum(made["dropped"].values())
    share = made["trained_tokens"] / max(made["train_tokens"], 1)
    formats = ", ".join(f"{name} ({count:,})" for name, count in made["formats"].items())
    rows = [
        ("source", made["source"]),
        ("format", formats),
        ("fields read", ", ".join(made.get("fields", []))),
        ("template", made["template"]["shown"]),
        ("conversations in", f"{made['in']:,}"),
        ("kept", f"{made['kept']:,}"),
        ("dropped", f"{dropped:,}" + "".join(f"; {name} {count:,}" for name, count in made["dropped"].items())),
        ("training rows", f"{made['train_rows']:,} with {made['train_tokens']:,} tokens, {share:.0%} of them trained"),
        ("held-out rows", f"{made['heldout_rows']:,} with {made['heldout_tokens']:,} tokens"),
        ("context", f"{made['context']:,} tokens; the longest conversation has {made['longest_tokens']:,}"),
        ("cut to the context", f"{made['cut_share']:.1%} of rows, {made['cut_token_share']:.1%} of tokens"),
    ]
    return rows + [("warning", warning) for warning in made["warnings"]]


def findings(made: dict[str, Any]) -> list[dict[str, Any]]:
    """One row a finding, for a table: what it is, how many, what was done, where for example, how to change it."""
    from helpers.prepare.checks import CHECKS, DONE

    return [
        {
            "finding": CHECKS[row["kind"]].says,
            "rows": row["count"],
            "done": DONE[row["action"]],
            "for example": f"{row['place']}: {row['example']}" if row["example"] else row["place"],
            "to change it": " or ".join(
                f"{row['kind']}={action}" for action in CHECKS[row["kind"]].choices if action != row["action"]
            ),
        }
        for row in made["findings"]
    ]


def lengths(rows: Any) -> np.ndarray:
    """Tokens of each row before it was cut to the context, (rows,)."""
    return np.array(rows["full_tokens"], dtype=np.int64)


def epoch(made: dict[str, Any], config: RunConfig, budget: Any) -> list[tuple[str, str]]:
    """(what, value) of one pass over the training rows: tokens, steps, and time by the budget's step where a GPU is."""
    rows_a_step = config.train.batch_size * config.train.accumulation
    steps = math.ceil(made["train_rows"] / rows_a_step)
    total = steps_of(config, made["train_rows"])
    seconds = budget.time.step_s if budget.machine.gpu else 0  # steps are timed on GPUs; a CPU's would be a guess
    timed = f", {duration(total * seconds / 3600)}" if seconds else ""
    rows = [
        ("tokens an epoch", f"{made['train_tokens']:,}, {made['trained_tokens']:,} of them trained"),
        (
            "rows a step",
            f"{rows_a_step} (micro-batch {config.train.batch_size} × accumulation {config.train.accumulation})",
        ),
        ("steps an epoch", f"{steps:,}"),
        ("this run", f"{total:,} steps{timed}"),
    ]
    if seconds:
        rows.insert(3, ("time an epoch", f"{duration(steps * seconds / 3600)} at {seconds:.2g} s a step"))
    if available := made.get("available"):
        every = math.ceil(made["train_rows"] * available / made["in"] / rows_a_step)
        timed = f", {duration(every * seconds / 3600)}" if seconds else ""
        rows.append((f"all {available:,} rows", f"some {every:,} steps an epoch{timed}: max_conversations=all"))
    return rows


def text_of(name: str, token: int, tokenizer: Any) -> str:
    """What an ordinary token writes; a byte that is only part of a letter stays <0xE6>."""
    if byte := BYTE.fullmatch(name):
        return chr(int(byte[1], 16))
    return name.replace("▁", " ") if "▁" in name or name.startswith("<0x") else tokenizer.decode([token])


def token_view(row: dict[str, Any], tokenizer: Any) -> str:
    """HTML of a row's tokens: trained ones coloured, ends of turns in orange, what is only read pale.

    row: input_ids and assistant_masks of the same length. It inherits the page's colours, so light and dark both do.
    """
    ids, masks = list(row["input_ids"]), list(row["assistant_masks"])
    special = set(tokenizer.all_special_ids) | set(tokenizer.added_tokens_decoder)
    spans = []
    for token, trained in zip(ids[:SHOWN_TOKENS], masks, strict=False):
        name = tokenizer.convert_ids_to_tokens(token)
        text = name if token in special else text_of(name, token, tokenizer)
        kind = "end" if trained and token in special else "trained" if trained else "read"
        kind += " special" if token in special else ""
        title = f"{token} {name} · {'trained' if trained else 'read, not trained'}"
        shown = escape(text).replace("\n", "⏎\n")
        spans.append(f'<span class="{kind}" title="{escape(title, quote=True)}">{shown}</span>')
    count = sum(masks)
    more = f" … and {len(ids) - SHOWN_TOKENS:,} more tokens" if len(ids) > SHOWN_TOKENS else ""
    legend = (
        f"<div>{len(ids):,} tokens: <span class='trained'>{count:,} trained</span> "
        f"(<span class='end'>an end</span> among them), <span class='read'>{len(ids) - count:,} only read</span></div>"
    )
    return f"{STYLE}<div class='tokens'>{legend}{''.join(spans)}{more}</div>"
