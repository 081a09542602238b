"""Conversations that are almost the same, found in memory that grows by 64 bytes a conversation.

MinHash with one permutation (https://arxiv.org/abs/1208.1259) over windows of 8 bytes: the hashes of a text's windows
are dealt into 32 bins, and each bin keeps its smallest. Two texts agree in a bin about as often as they share windows
(Jaccard). Eight bands of four bins find the candidates; whether a conversation belongs to the group of an earlier one
is decided by the windows themselves, against that group's first member alone: so no group wanders from its beginning.
In numpy, because the libraries for this keep Python objects, which at some millions of conversations fill a free
Colab's memory.

>>> text = "The kettle had been on the stove for an hour before anyone noticed that there was no water in it."
>>> texts = [text, text.replace("The kettle", "A kettle"), "No."]
>>> groups(sketches(texts), lambda i, k: jaccard(windows(texts[i]), windows(texts[k]))).tolist()
[0, 0, 2]
"""

import re
from collections.abc import Callable

import numpy as np

BINS, BAND = 32, 4
WINDOW = 8
EMPTY = np.uint16(0xFFFF)
SIMILAR = 0.8
"""Share of windows in common from which two conversations count as near duplicates."""
LOOSE = 0.6
"""Estimated share from which the windows themselves are compared: 32 bins err by 0.07, one time in three."""
TRIES = 3
"""First members that a conversation is compared with, window by window: the likeliest."""
BUCKET = 64
"""First members that one key of a band remembers: data made from a template would fill it without end."""
LONGEST_BYTES = 200_000
"""Of a text, from its beginning, when windows are compared."""

SPACES = re.compile(r"\s+")


def plain(text: str) -> bytes:
    """A text as its windows are cut from: case and the amount of space do not count."""
    return SPACES.sub(" ", text).lower().encode().replace(b"\0", b"") + bytes(WINDOW - 1)


def sketches(texts: list[str]) -> np.ndarray:
    """Sketch of each text, (texts, BINS) of uint16; case and the amount of space do not count."""
    codes = [plain(text) for text in texts]
    joined = b"".join(codes) + bytes(WINDOW)
    # The window at each byte, read as one number; those that begin at a zero lie between two texts.
    numbers = np.ndarray(len(joined) - WINDOW, dtype="<u8", buffer=joined, strides=(1,))
    hashes = numbers[np.frombuffer(joined, dtype=np.uint8)[: len(numbers)] != 0]
    owners = np.repeat(np.arange(len(texts)), [len(code) - WINDOW + 1 for code in codes])
    # SplitMix64's last step spreads the 8 bytes over the whole number.
    hashes = (hashes ^ (hashes >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    hashes = (hashes ^ (hashes >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    hashes ^= hashes >> np.uint64(31)
    cells = owners * BINS + (hashes >> np.uint64(59)).astype(np.int64)
    found = np.full(len(texts) * BINS, EMPTY)
    np.minimum.at(found, cells, (hashes & np.uint64(0xFFFE)).astype(np.uint16))
    return found.reshape(len(texts), BINS)


def similarity(one: np.ndarray, other: np.ndarray) -> np.ndarray:
    """Estimated share of windows in common, pair by pair: (pairs, BINS), (pairs, BINS) -> (pairs,)."""
    filled = (one != EMPTY) | (other != EMPTY)
    return ((one == other) & filled).sum(1) / np.maximum(filled.sum(1), 1)


def windows(text: str) -> np.ndarray:
    """The windows of a text, each once, as sorted numbers."""
    code = plain(text[:LONGEST_BYTES])
    return np.unique(np.ndarray(max(len(code) - WINDOW + 1, 0), dtype="<u8", buffer=code, strides=(1,)))


def jaccard(one: np.ndarray, other: np.ndarray) -> float:
    """Share of windows in common: those of both by those of either."""
    common = len(np.intersect1d(one, other, assume_unique=True))
    return common / max(len(one) + len(other) - common, 1)


def groups(sketched: np.ndarray, share: Callable[[int, int], float] | None = None) -> np.ndarray:
    """The first member of the group that each conversation belongs to, itself where none is like it: (conversations,).

    share: the share of windows that two conversations have in common, by their numbers; without it, the estimate.
    A conversation's group hangs on earlier ones alone: what is added behind it changes nothing.
    """
    first = np.arange(len(sketched))
    bands = np.ascontiguousarray(sketched).view(np.uint64)
    leaders: dict[tuple[int, int], list[int]] = {}
    for i in meeting(bands).tolist():
        keys = [(band, key) for band, key in enumerate(bands[i].tolist()) if key != 2**64 - 1]
        candidates = np.array(sorted({leader for key in keys for leader in leaders.get(key, ())}), dtype=np.int64)
        if len(candidates):
            near = similarity(sketched[candidates], sketched[i][None])
            order = np.argsort(-near, kind="stable")[:TRIES]
            for place in order.tolist():
                likeness, leader = near[place], int(candidates[place])
                if share is not None and LOOSE <= likeness < 1:
                    likeness = share(i, leader)
                if likeness >= SIMILAR:
                    first[i] = leader
                    break
        if first[i] == i:
            for key in keys:
                held = leaders.setdefault(key, [])
                if len(held) < BUCKET:
                    held.append(i)
    return first


def meeting(bands: np.ndarray) -> np.ndarray:
    """Conversations that share a band's key with another, in their order: (conversations, bands) -> (some,)."""
    meets = np.zeros(len(bands), dtype=bool)
    for band in range(bands.shape[1]):
        order = np.argsort(bands[:, band], kind="stable")
        ordered = bands[order, band]
        same = (ordered[1:] == ordered[:-1]) & (ordered[1:] != np.uint64(2**64 - 1))
        meets[order[1:][same]] = True
        meets[order[:-1][same]] = True
    return np.flatnonzero(meets)
