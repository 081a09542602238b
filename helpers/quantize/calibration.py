"""What a method calibrates on: rows of token ids out of conversations and text, and other rows to check it with."""

import functools
import math
import random
from array import array
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path

from helpers.config import QuantizeConfig
from helpers.models import ROOT
from helpers.models.templates import Template, load_tokenizer
from helpers.sources.formats import BadRow, recognise, to_messages
from helpers.sources.readers import kind_of, read
from helpers.workspace.prepared import conversations

GENERAL = ROOT / "data" / "calibration.jsonl"
"""The general set: text that is nobody's conversations."""
CHECK_ROWS = 16
"""Rows of text, none of them calibrated with, on which the result is held against the merged model."""
BLOCK_TEXTS = 256
"""Texts that are read at a time, at first; twice as many each further time."""


class CalibrationError(ValueError):
    """The calibration text is missing, unreadable or too little; the message says how much is needed."""


def draw(
    model: Path, config: QuantizeConfig, own: Sequence[Path], least_tokens: int
) -> tuple[list[list[int]], list[list[int]]]:
    """Rows of token ids to calibrate with, and other rows to check the result with.

    Texts are drawn from all over each source in an order that a seed decides, and laid end to end until a row has
    calibration_tokens tokens; every row begins with the beginning of a text. One text in 16 is kept for the check.
    Only as many are read and tokenized as are needed, however long the source is: what grows with it is 8 bytes a text.
    Raises CalibrationError when there are fewer than least_tokens.
    """
    encode = encoder(model)
    sets, _ = sources(config, own)
    parts = split_sources(sets)
    rows: list[list[int]] = []
    check: list[list[int]] = []
    for number, paths in enumerate(parts):
        # An order of all texts costs 8 bytes each, so a split of any length is drawn from evenly: the first 128 rows of
        # a file that is sorted by subject would calibrate on one subject.
        counts = [count_texts(path) for path in paths]
        order = array("Q", range(sum(counts)))
        random.Random(number).shuffle(order)
        # What is checked with must not be what was calibrated with, or overfitting to it would pass for quality.
        # What is checked with must not be what was calibrated with, or overfitting to it would pass for quality.
        kept = max(1, len(order) // 16) if len(order) > 1 else 0
        drawn = functools.partial(texts_at, paths, counts, encode)
        rows += pack(drawn(order[kept:]), config.calibration_tokens, config.calibration_samples // len(parts))
        check += pack(drawn(order[:kept] or order), config.calibration_tokens, CHECK_ROWS // len(parts))
    have = sum(map(len, rows))
    # X is (tokens, inputs): with fewer tokens than inputs XᵀX is singular whatever the text says, and GPTQ would invert
    # its damping instead.
    if have < least_tokens:
        wanted = min(config.calibration_samples, math.ceil(least_tokens / config.calibration_tokens))
        raise CalibrationError(
            f"calibration has {have} tokens and needs at least {least_tokens}, one for each input of the widest layer: "
            + (
                f"give more text than {', '.join(map(str, sets))} or take calibration=both"
                if wanted * config.calibration_tokens >= least_tokens and len(rows) < config.calibration_samples
                else f"raise calibration_samples to {math.ceil(least_tokens / config.calibration_tokens)}"
            )
        )
    return rows, check


def sources(config: QuantizeConfig, own: Sequence[Path]) -> tuple[list[Path], list[Path]]:
    """What to calibrate with, and what of it is the user's: own, general or both, or what config.calibration names.

    Raises CalibrationError for what is not there.
    """
    if config.calibration not in ("own", "general", "both"):
        own = [Path(config.calibration).expanduser()]
    sets = {"general": [GENERAL], "both": [*own, GENERAL]}.get(config.calibration, list(own))
    for path in sets:
        if not (path.is_file() or (path / "train").is_dir()):
            other = "own, general or both, nor " if path == Path(config.calibration) else ""
            raise CalibrationError(
                f"calibration {path} is neither {other}a file nor a prepared folder: give a file of conversations or "
                "text, or calibration=general"
            )
    if config.calibration != "general" and not own:
        raise CalibrationError(f"calibration={config.calibration} needs a file of text, or calibration=general")
    return sets, list(own)


def split_sources(sets: list[Path]) -> list[list[Path]]:
    """The user's own text together, and the general set by itself, so that each gives half of the rows."""
    return [
        part
        for part in ([path for path in sets if path != GENERAL], [path for path in sets if path == GENERAL])
        if part
    ]


def count_texts(path: Path) -> int:
    """How many texts a source has; a file is read once for it. Raises CalibrationError for what cannot be read."""
    if (path / "train").is_dir():
        from datasets import load_from_disk

        return len(load_from_disk(str(path / "train")))
    return sum(1 for _ in texts_of(path))


def texts_at(
    paths: Sequence[Path], counts: Sequence[int], encode: Callable[[object], list[int]], order: Sequence[int]
) -> Iterator[list[int]]:
    """Token ids of the texts at these places of all sources laid end to end, in this order, read block by block.

    A file is read through once a block, so blocks double.
    """
    start, size = 0, BLOCK_TEXTS
    while start < len(order):
        # Sorted places, so that a file is read once a block from front to back; the block keeps them until their turn.
        # Sorted places, so that a file is read once a block from front to back; the block keeps them until their turn.
        wanted = order[start : start + size]
        found: dict[int, list[int]] = {}
        first = 0
        for path, count in zip(paths, counts, strict=True):
            here = sorted(place - first for place in wanted if first <= place < first + count)
            found |= {first + place: encode(text) for place, text in chosen_texts(path, here)}
            first += count
        yield from (found[place] for place in wanted)
        start, size = start + size, 2 * size


def chosen_texts(path: Path, places: list[int]) -> Iterator[tuple[int, object]]:
    """The texts of one source at these places, which rise."""
    if not places:
        return
    if (path / "train").is_dir():
        yield from zip(places, conversations(path / "train")[places]["input_ids"], strict=True)
        return
    wanted = iter(places)
    place = next(wanted)
    for number, text in enumerate(texts_of(path)):
        if number == place:
            yield number, text
            if (place := next(wanted, None)) is None:
                return


def texts_of(path: Path) -> Iterator[object]:
    """Texts of a file, one in memory at a time: token ids, messages, or text. Raises CalibrationError in a sentence."""
    try:
        if kind_of(path.name) in ("", "text"):
            yield from paragraphs(path)
            return
        for record in read(str(path)):
            row = record.row
            if isinstance(row, dict) and isinstance(row.get("input_ids"), list):
                yield row["input_ids"]
                continue
            row_format = None if record.problem else recognise(row)
            if row_format is None:
                raise CalibrationError(f"calibration {path} must hold rows with messages or text: see {record.place}")
            yield to_messages(row, row_format)
    except BadRow as error:
        raise CalibrationError(f"calibration {path} must hold rows with messages or text: {error}") from None
    except UnicodeDecodeError:
        raise CalibrationError(f"calibration {path} is not text in UTF-8: give conversations or text") from None
    except CalibrationError:
        raise
    except ValueError as error:
        raise CalibrationError(f"calibration: {error}") from None


def paragraphs(path: Path) -> Iterator[str]:
    """Texts between blank lines.

    >>> import tempfile
    >>> file = Path(tempfile.mkdtemp()) / "poem.txt"
    >>> _ = file.write_text("one\\ntwo\\n\\n\\nthree\\n")
    >>> list(paragraphs(file))
    ['one\\ntwo', 'three']
    """
    lines: list[str] = []
    with path.open(encoding="utf-8") as stream:
        for line in stream:
            if line.strip():
                lines.append(line)
            elif lines:
                yield "".join(lines).rstrip("\n")
                lines = []
    if lines:
        yield "".join(lines).rstrip("\n")


def encoder(model: Path) -> Callable[[object], list[int]]:
    """A function from a text to its token ids: conversations as in training, through the model's own template."""
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(model)
    template = functools.cache(lambda: Template(load_tokenizer(model)))  # text alone needs none

    def encode(text: object) -> list[int]:
        # Ids of a prepared folder pass as they are. A conversation gets the template's own tokens, as the model will
        # read them: what it computes at [INST] and </s> is to be kept too.
        if isinstance(text, str):
            return tokenizer(text)["input_ids"]
        if not text or isinstance(text[0], int):
            return text
        if text[0]["role"] == "text":
            return tokenizer(text[0]["content"])["input_ids"]
        return template().encode([text])[0][0]

    return encode


def pack(texts: Iterable[list[int]], tokens: int, rows: int) -> list[list[int]]:
    """At most so many rows of at most so many tokens; what does not fit at the end of a row is left out.

    >>> pack([[1, 2], [3, 4], [5, 6]], tokens=3, rows=9)
    [[1, 2, 3], [5, 6]]
    """
    packed: list[list[int]] = []
    row: list[int] = []
    for text in texts:
        # A text that is cut here does not go on in the next row: each row starts as a text starts, at <s>.
        # A text that is cut here does not go on in the next row: each row starts as a text starts, at <s>.
        row = row + text[: tokens - len(row)]
        if len(row) == tokens:
            packed.append(row)
            row = []
        if len(packed) >= rows:
            return packed
    return [*packed, row] if len(row) > 1 else packed
