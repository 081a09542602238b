"""Tables for people: rows in, a table at notebook width out."""

from collections.abc import Mapping, Sequence
from typing import Any


def table(rows: Sequence | Mapping[str, Any], columns: Sequence[str] = ("what", "value")) -> Any:
    """A pandas Styler without an index, text to the left and escaped, numbers to four digits.

    rows: dicts with the same keys, pairs, or one dict whose items become rows; columns name the pairs.

    >>> table({"steps": 135, "loss": 0.0217241}).data.shape
    (2, 2)
    """
    import pandas as pd

    rows = list(rows.items()) if isinstance(rows, Mapping) else list(rows)
    frame = pd.DataFrame(rows) if rows and isinstance(rows[0], Mapping) else pd.DataFrame(rows, columns=list(columns))
    left = [{"selector": "th, td", "props": "text-align: left"}]
    return frame.style.hide(axis="index").format(in_words).set_table_styles(left)


def in_words(value: Any) -> str:
    """One cell: whole numbers with separators, others to four digits, text with its <, > and & escaped.

    >>> in_words(1234567), in_words(0.0217241), in_words("<s>"), in_words(None)
    ('1,234,567', '0.02172', '&lt;s&gt;', '')
    """
    from html import escape
    from numbers import Integral, Real

    if value is None:
        return ""
    if isinstance(value, Integral) and not isinstance(value, bool):
        return f"{value:,}"
    return f"{value:.4g}" if isinstance(value, Real) and not isinstance(value, bool) else escape(str(value))
