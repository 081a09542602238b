"""Conversations unlike the others: far longer or shorter, or in a script or language that hardly any other is in.

The script can be told of any text, and without a model; the language only of those that py3langid is sure about
(langid.py's naive Bayes over byte n-grams of 97 languages, https://aclanthology.org/P12-3005).

>>> [SCRIPTS[script] for script in scripts(["Good morning", "Доброе утро", "12 + 3"])]
['Latin', 'Cyrillic', 'none']
>>> [language_name(number) for number in languages(["Wie geht es dir heute, mein alter Freund?", "x = f(3)"])]
['de', 'not sure']
"""

from functools import cache
from typing import Any

import numpy as np

FAR = 20
"""Times the median length, or a part of it, from which a conversation is an outlier."""
RARE = 0.01
"""Share of conversations under which a script or a language is an outlier."""
ENOUGH = 100
"""Conversations under which there is no telling what is usual."""
SURE = 0.7
"""Probability from which a language counts: program code, sums and lists of names stay below it."""
HEAD = 200
"""Characters of a conversation by which its language is told."""

CLOSE = {"wuu": "zh", "yue": "zh", "pcm": "en"}
"""Languages that short texts in another are taken for: of 24 flags on real data 15 were these."""

SCRIPTS = (
    "none", "Latin", "Greek", "Cyrillic", "Armenian", "Hebrew", "Arabic", "Indic", "Thai or Lao", "Georgian", "Hangul",
    "Ethiopic", "Khmer", "Han or kana", "other",
)  # fmt: skip
NONE, LATIN = 0, 1
BLOCKS = (  # first code point of a block, its script (https://www.unicode.org/Public/UNIDATA/Blocks.txt)
    (0x0000, 0), (0x0041, 1), (0x005B, 0), (0x0061, 1), (0x007B, 0), (0x00C0, 1), (0x02B0, 0), (0x0370, 2), (0x0400, 3),
    (0x0530, 4), (0x0590, 5), (0x0600, 6), (0x0780, 14), (0x08A0, 6), (0x0900, 7), (0x0E00, 8), (0x0F00, 14),
    (0x10A0, 9), (0x1100, 10), (0x1200, 11), (0x13A0, 14), (0x1780, 12), (0x1800, 14), (0x1C80, 3), (0x1C90, 9),
    (0x1CC0, 14), (0x1E00, 1), (0x1F00, 2), (0x2000, 0), (0x2C00, 14), (0x2E00, 0), (0x2E80, 13), (0x3000, 0),
    (0x3040, 13), (0x3130, 10), (0x3190, 13), (0xA000, 14), (0xAC00, 10), (0xD800, 0), (0xF900, 13), (0xFB00, 14),
    (0xFE00, 0), (0xFE70, 6), (0xFF00, 0), (0xFF66, 13), (0xFFE0, 0), (0x10000, 14), (0x1D400, 0), (0x1E000, 14),
    (0x1F000, 0), (0x20000, 13), (0xE0000, 0),
)  # fmt: skip
STARTS = np.array([start for start, _ in BLOCKS], dtype=np.uint32)
SCRIPT_OF = np.array([script for _, script in BLOCKS])


def scripts(texts: list[str]) -> list[int]:
    """The script, an index of SCRIPTS, that most letters of each text are in."""
    return [script(text) for text in texts]


def script(text: str) -> int:
    """The script of one text."""
    if text.isascii():
        return LATIN if text.lower() != text.upper() else NONE
    points = np.frombuffer(text.encode("utf-32-le", "replace"), dtype=np.uint32)
    counts = np.bincount(SCRIPT_OF[np.searchsorted(STARTS, points, side="right") - 1], minlength=len(SCRIPTS))
    counts[NONE] = 0
    return int(counts.argmax()) if counts.any() else NONE


@cache
def identifier() -> Any:
    """py3langid's model, which takes half a second to read; it answers "und" when it is not SURE."""
    from py3langid.langid import MODEL_FILE, LanguageIdentifier

    return LanguageIdentifier.from_model_file(MODEL_FILE, norm_probs=True, min_confidence=SURE)


def languages(texts: list[str]) -> list[int]:
    """The language that each text begins in, a number for `language_name`; NONE where that is not sure."""
    model = identifier()
    number = {label: place for place, label in enumerate(model.labels, 1)}
    number |= {name: number[usual] for name, usual in CLOSE.items() if usual in number}
    return [number.get(model.classify(text[:HEAD])[0], NONE) for text in texts]


def language_name(number: int) -> str:
    """The ISO 639 code of one of `languages`' numbers."""
    return identifier().labels[number - 1] if number else "not sure"


def rare(kinds: np.ndarray) -> np.ndarray:
    """Which conversations are of a kind, other than NONE, that fewer than RARE of all are of: (conversations,)."""
    counts = np.bincount(kinds)
    return (counts < RARE * len(kinds))[kinds] & (kinds != NONE) & (len(kinds) >= ENOUGH)


def far_lengths(letters: np.ndarray) -> np.ndarray:
    """Which conversations are FAR from the median length: (conversations,) -> (conversations,)."""
    median = np.median(letters)
    return ((letters > FAR * median) | (letters * FAR < median)) & (len(letters) >= ENOUGH)
