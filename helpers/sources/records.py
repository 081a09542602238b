"""A row of a file with its place, or what is wrong with it; and lines, none of which fills the memory."""

import io
import itertools
import re
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

from helpers.sources.encodings import Charset

MIB = 2**20
ROW_LIMIT = 16 * MIB
"""A longer row is no conversation but a file in another format, and must not fill the memory."""
ESCAPED_BYTES = re.compile("[\udc80-\udcff]")
"""Bytes that are not UTF-8, as surrogateescape keeps them."""


class Record(NamedTuple):
    """A row, or what is wrong with it: problem names a check, detail says more; mended is what it may have meant."""

    place: str
    row: Any
    problem: str | None = None
    detail: str = ""
    mended: Any = None
    others: int = 0
    """Messages of a tree beside the way that was taken."""


def guessed(
    raw: bytes, place: str, charset: Charset, stream: io.BufferedReader | None, value_of: Callable[[str], Any]
) -> Record:
    """The record of bytes that are not UTF-8: what they seem to say, and in which charset."""
    text = charset.text(raw, stream.peek(MIB) if stream is not None and not charset.name else b"")
    try:
        value = value_of(text)
    except ValueError as error:
        return Record(place, None, "broken-row", f"{error!s:.60}, and not UTF-8: {shown(text)}")
    return Record(place, None, "invalid-utf8", f"as {charset.name}: {excerpt(text)}", value)


def excerpt(text: str) -> str:
    """The text around its first letter that is not ASCII."""
    start = next((i for i, letter in enumerate(text) if not letter.isascii()), 0)
    return " ".join(text[max(start - 20, 0) : start + 60].replace("\0", " ").split())


def lines(stream: io.BufferedReader) -> Iterator[tuple[int, bytes | None]]:
    """(number, line) from 1; None stands for a line over ROW_LIMIT, which is read past and not kept."""
    for number in itertools.count(1):
        line = stream.readline(ROW_LIMIT)
        if not line:
            return
        if len(line) == ROW_LIMIT and not line.endswith(b"\n"):
            while (more := stream.readline(MIB)) and not more.endswith(b"\n"):
                pass
            yield number, None
        else:
            yield number, line


def line_records(
    stream: io.BufferedReader, name: str, record_of: Callable[[bytes, str, Charset, io.BufferedReader], Record]
) -> Iterator[Record]:
    """A record a line, as record_of(line, place, charset, stream) makes it; blank lines are no rows."""
    charset = Charset()
    for number, line in lines(stream):
        place = f"{name} line {number}"
        if line is None:
            yield Record(place, None, "over-long-row", f"a line of more than {ROW_LIMIT // MIB} MiB")
        elif line and not line.isspace():
            yield record_of(line, place, charset, stream)


def shown(line: bytes | str) -> str:
    """The beginning of a line, to show."""
    text = line[:120].decode("utf-8", "replace") if isinstance(line, bytes) else line[:120]
    return " ".join(text.split())
