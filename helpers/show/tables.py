"""Tables for people: rows in, a table at notebook width out."""

import re
from collections.abc import Mapping, Sequence
from typing import Any

LONG = 20
"""Characters; a word of more has no place in a column of a phone's width."""


def table(rows: Sequence | Mapping[str, Any], columns: Sequence[str] = ("what", "value")) -> Any:
    """A pandas Styler without an index, text to the left and escaped, numbers to four digits.

    rows: dicts with the same keys, pairs, or one dict whose items become rows; columns name the pairs. A column in
    which nothing stands is left out.

    >>> table({"steps": 135, "loss": 0.0217241}).data.shape
    (2, 2)
    """
    import pandas as pd

    rows = list(rows.items()) if isinstance(rows, Mapping) else list(rows)
    names = None if rows and isinstance(rows[0], Mapping) else list(columns)
    frame = pd.DataFrame(rows, columns=names, dtype=object)  # else None is nan beside numbers, and 4,096 is 4096.0
    frame = frame.loc[:, frame.notna().any()] if rows else frame
    left = [{"selector": "th, td", "props": "text-align: left"}]
    return frame.style.hide(axis="index").format(in_words).set_table_styles(left)


def files(outputs: Mapping[str, Mapping[str, Any]]) -> list[dict[str, str]]:
    """What a stage's manifest says of its files, for `table`.

    >>> files({"config.yaml": {"size_bytes": 1613, "sha256": "3761da85404b400dafc0"}})
    [{'file': 'config.yaml', 'bytes': '1,613', 'SHA-256 begins': '3761da85404b'}]
    """
    return [
        {"file": name, "bytes": f"{one['size_bytes']:,}", "SHA-256 begins": one["sha256"][:12]}
        for name, one in outputs.items()
    ]


def errors(modules: Sequence[Mapping[str, Any]]) -> Any:
    """GPTQ's error of each module, a row a layer, with what the figures are above it: a pandas Styler."""
    import pandas as pd

    found = pd.DataFrame(modules).pivot(index="layer", columns="module", values="error")
    found = found.rename(columns=lambda module: module.rpartition(".")[2]).rename_axis(columns=None)
    said = [{"selector": "caption", "props": "text-align: left; padding: 4px 0"}]
    caption = "squared error of each matrix's outputs; compare down a column"
    style = found.reset_index().style.hide(axis="index")  # a named index would be a line of headings by itself
    return style.format("{:.1e}", na_rep="–", subset=found.columns).set_caption(caption).set_table_styles(said)


def in_words(value: Any) -> str:
    """One cell: whole numbers with separators, others to four digits, text with its <, > and & escaped.

    Long paths and names may go on in a new line where they have a part: a narrow page has no room for them.

    >>> in_words(1234567), in_words(0.0217241), in_words("<s>"), in_words(None)
    ('1,234,567', '0.02172', '&lt;s&gt;', '')
    >>> in_words("in data/two_conversations.jsonl")
    'in data/<wbr>two_<wbr>conversations.<wbr>jsonl'
    """
    from html import escape

    if value is None:
        return ""
    words = escape(str(value) if isinstance(value, bool) else plain(value)).split(" ")
    return " ".join(re.sub(r"(?<=[/_.=])(?=\w)", "<wbr>", word) if len(word) > LONG else word for word in words)


def plain(value: Any) -> str:
    """A figure as text: whole numbers with separators, others to four digits, what is not known as a dash.

    >>> plain(1234567), plain(0.0217241), plain(10791.3), plain(True), plain(None)
    ('1,234,567', '0.02172', '10,791', 'yes', '–')
    """
    from numbers import Integral, Real

    if value is None:
        return "–"
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, Integral):
        return f"{value:,}"
    if isinstance(value, Real):
        return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.4g}"
    return str(value)


def text(figures: Mapping[str, Any]) -> str:
    """Figures for a terminal, a line each: names to the left, values below each other.

    A dict's items are lines of their own, and so are a list's; a list of dicts is a table, below the rest.

    >>> print(text({"steps": 1350, "check": {"ours": 2.5}, "seen": ["a", "b"], "rows": [{"x": 1, "y": None}]}))
    steps       1,350
    check ours  2.5
    seen        a
                b
    <BLANKLINE>
    rows
    x  y
    1  –
    """
    lines, tables = [], []
    for name, value in figures.items():
        if isinstance(value, Mapping):
            lines += [(f"{name} {key}", plain(inner)) for key, inner in value.items()]
        elif isinstance(value, Sequence) and value and isinstance(value[0], Mapping):
            tables.append(f"\n{name}\n{columns_of(value)}")
        elif isinstance(value, Sequence) and not isinstance(value, str):
            lines += [(name if i == 0 else "", plain(inner)) for i, inner in enumerate(value)]
        else:
            lines.append((name, plain(value)))
    width = max((len(name) for name, _ in lines), default=0)
    return "\n".join([*(f"{name:{width}}  {value}" for name, value in lines), *tables])


def columns_of(rows: Sequence[Mapping[str, Any]]) -> str:
    """Rows with the same keys as columns of text, under their names.

    >>> print(columns_of([{"layer": 0, "error": 0.25}, {"layer": 10, "error": 0.125}]))
    layer  error
    0      0.25
    10     0.125
    """
    cells = [[str(name) for name in rows[0]], *([plain(value) for value in row.values()] for row in rows)]
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    padded = ("  ".join(f"{cell:{width}}" for cell, width in zip(line, widths, strict=True)).rstrip() for line in cells)
    return "\n".join(padded)


LABELS = {
    "precision": "computed in",
    "layers": "layers",
    "loss_first": "loss at the first step",
    "loss_last": "loss, mean of the last ten steps",
    "heldout_loss": "loss on held-out conversations",
    "heldout_accuracy": "held-out pairs whose better answer gained more, share",
    "heldout_margin": "margin of held-out pairs, β × nats",
    "heldout_chosen_logp": "log-probability of their better answers, nats",
    "heldout_rejected_logp": "log-probability of their worse answers, nats",
    "reference_s": "the reference, seconds",
    "steps": "optimizer steps",
    "steps_applied": "of them applied",
    "adapters_changed": "trained matrices that changed",
    "text_tokens": "tokens read",
    "padding_tokens": "tokens of padding",
    "tokens_per_s": "tokens a second",
    "train_s": "training, seconds",
    "step_s": "a step, seconds",
    "before_allocated_gib": "VRAM before the first step, GiB",
    "peak_allocated_gib": "VRAM at the peak, tensors, GiB",
    "peak_reserved_gib": "VRAM at the peak, with what the allocator holds, GiB",
    "peak_anonymous_gib": "RAM at the peak, GiB",
    "resumed_from_step": "continued from step",
    "checkpoint_size_bytes": "a checkpoint, MiB",
    "checkpoint_write_s": "writing a checkpoint, seconds",
    "largest_change": "largest change of a weight",
    "merge_base": "merged into",
    "tensors": "tensors",
    "adapted_tensors": "of them with an adapter",
    "shards": "files",
    "shards_resumed": "files found from an earlier try",
    "size_bytes": "size on disk, MiB",
    "merge_s": "merging, seconds",
    "llama_cpp_prompt_tokens_per_s": "prompt, tokens a second",
    "llama_cpp_tokens_per_s": "answer, tokens a second",
}
"""How a measurement is called for people; others go by their name."""
MIB = 2**20
NOT_FOR_PEOPLE = ("run", "loss_check")
SAYS_NOTHING = ("resumed_from_step", "shards_resumed", "before_allocated_gib", "answered_before", "without_an_answer")
SAYS_NOTHING += ("peak_allocated_gib", "peak_reserved_gib")
"""Of these a zero says that it was not so, or that there is no GPU."""


def measured(figures: Mapping[str, Any]) -> list[tuple[str, Any]]:
    """What a stage measured, in words with units, for `table`; without what was not measured and what is for machines.

    >>> measured({"loss_last": 0.1234, "size_bytes": 3145728, "run": "ab12", "peak_reserved_gib": 0.0, "new_s": 2})
    [('loss, mean of the last ten steps', 0.1234), ('size on disk, MiB', 3.0), ('new s', 2)]
    """
    rows = []
    for name, value in figures.items():
        empty = value is None or isinstance(value, Mapping | list) or (name in SAYS_NOTHING and not value)
        if not (empty or name in NOT_FOR_PEOPLE):
            shown = value / MIB if name.endswith("_bytes") else value
            rows.append((LABELS.get(name, name.replace("_", " ")), shown))
    return rows
