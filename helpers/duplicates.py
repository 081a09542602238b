"""Conversations that are almost the same, found in memory that grows by 64 bytes a conversation.

MinHash with one permutation (https://arxiv.org/abs/1208.1259) over windows of 8 bytes: the hashes of a text's windows
are dealt into 32 bins, and each bin keeps its smallest. Two texts agree in a bin about as often as they share windows
(Jaccard). Eight bands of four bins find the candidates, all 32 bins decide. In numpy, because the libraries for this
keep Python objects, which at some millions of conversations fill a free Colab's memory.

>>> text = "The kettle had been on the stove for an hour before anyone noticed that there was no water in it."
>>> texts = [text, text.replace("The kettle", "A kettle"), "No."]
>>> groups(sketches(texts)).tolist()
[0, 0, 2]
"""

import re

import numpy as np

BINS, BAND = 32, 4
WINDOW = 8
EMPTY = np.uint16(0xFFFF)
SIMILAR = 0.8
"""Share of windows in common from which two conversations count as near duplicates."""

SPACES = re.compile(r"\s+")


def sketches(texts: list[str]) -> np.ndarray:
    """Sketch of each text, (texts, BINS) of uint16; case and the amount of space do not count."""
    codes = [SPACES.sub(" ", text).lower().encode().replace(b"\0", b"") + bytes(WINDOW - 1) for text in texts]
    joined = b"".join(codes) + bytes(WINDOW)
    # The window at each byte, read as one number; those that begin at a zero lie between two texts.
    windows = np.ndarray(len(joined) - WINDOW, dtype="<u8", buffer=joined, strides=(1,))
    hashes = windows[np.frombuffer(joined, dtype=np.uint8)[: len(windows)] != 0]
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


def groups(sketched: np.ndarray) -> np.ndarray:
    """The first conversation that each one is almost like, directly or through others: (conversations,)."""
    count = len(sketched)
    parents = np.arange(count)
    bands = np.ascontiguousarray(sketched).view(np.uint64)
    for band in range(bands.shape[1]):
        keys = bands[:, band]
        order = np.argsort(keys, kind="stable")
        ordered = keys[order]
        # Each is compared with the one before it and with the first of its key.
        starts = np.flatnonzero(np.r_[True, ordered[1:] != ordered[:-1]])
        first = np.repeat(order[starts], np.diff(np.r_[starts, count]))
        before = np.r_[order[:1], order[:-1]]
        usable = (ordered != np.uint64(2**64 - 1)) & (first != order)
        for left in {0: first, 1: before}.values():
            for part in np.array_split(np.flatnonzero(usable), count // 100_000 + 1):
                one, other = left[part], order[part]
                alike = similarity(sketched[one], sketched[other]) >= SIMILAR
                join(parents, one[alike], other[alike])
    while (parents[parents] != parents).any():
        parents = parents[parents]
    return parents


def join(parents: np.ndarray, ones: np.ndarray, others: np.ndarray) -> None:
    """Put each pair into one group, whose name is its first member."""
    for one, other in zip(ones.tolist(), others.tolist(), strict=True):
        one, other = root(parents, one), root(parents, other)
        parents[max(one, other)] = min(one, other)


def root(parents: np.ndarray, member: int) -> int:
    """The first member of a group."""
    while parents[member] != member:
        parents[member] = parents[parents[member]]
        member = int(parents[member])
    return member
