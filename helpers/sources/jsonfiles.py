"""JSON files: a value a line, arrays of any length, and one object with a list or a table in it.

>>> columns_of({"question": ["a", "b"], "answer": ["c", "d"]})
[{'question': 'a', 'answer': 'c'}, {'question': 'b', 'answer': 'd'}]
"""

import codecs
import io
import json
import re
from collections.abc import Iterator
from contextlib import suppress
from typing import Any

import orjson

from helpers.sources.columns import KNOWN, normal
from helpers.sources.encodings import Charset
from helpers.sources.records import ESCAPED_BYTES, MIB, ROW_LIMIT, Record, guessed, line_records, shown

OBJECT_LIMIT = 128 * MIB
BETWEEN_ELEMENTS = re.compile(r"[ \t\r\n,]*")


def read_jsonl(stream: io.BufferedReader, name: str, head: bytes = b"") -> Iterator[Record]:
    """One JSON value a line; blank lines are no rows."""
    return line_records(stream, name, json_record)


def json_record(line: bytes, place: str, charset: Charset, stream: io.BufferedReader | None = None) -> Record:
    """A line's value, or what is wrong with it."""
    try:
        return Record(place, orjson.loads(line))
    except orjson.JSONDecodeError as error:
        try:
            text = line.decode("utf-8")
        except UnicodeDecodeError:
            return guessed(line, place, charset, stream, orjson.loads)
        if text.rstrip().endswith(","):  # an array's lines without its brackets
            with suppress(orjson.JSONDecodeError):
                return Record(place, orjson.loads(text.rstrip().rstrip(",")))
        reason = "NaN and Infinity are not JSON" if re.search(r"\b(NaN|Infinity)\b", text) else error.msg
        if text.lstrip().startswith("{'"):
            reason = "a row as Python prints it, where json.dumps would write JSON"
        return Record(place, None, "broken-row", f"{reason}: {shown(line)}")


def read_array(stream: io.BufferedReader, name: str, head: bytes = b"") -> Iterator[Record]:
    """The elements of JSON arrays, objects that stand one after the other, or the list in one JSON object."""
    # surrogateescape keeps bytes that are not UTF-8 inside their element, so that the others can still be read.
    text = codecs.getreader("utf-8")(stream, errors="surrogateescape")
    buffer = text.read(MIB).lstrip()
    bare = is_stream(buffer)
    if buffer.startswith("{") and not bare:
        yield from read_object(buffer + text.read(OBJECT_LIMIT), name)
        return
    decoder, charset = json.JSONDecoder(), Charset()
    at, line, at_end, count, former = 0 if bare else 1, 1, False, 0, 0
    while True:
        start = BETWEEN_ELEMENTS.match(buffer, at).end()
        problem: Exception | str = "it ends before its closing ]"
        value, end = None, None
        if bare and start == len(buffer) and at_end:
            return
        if buffer.startswith("]", start):
            line += buffer.count("\n", at, start)
            buffer = buffer[start + 1 :].lstrip(" \t\r\n,")  # what comes behind the array: nothing, or another one
            while not buffer and not at_end:
                buffer = (more := text.read(MIB)).lstrip(" \t\r\n,")
                at_end = not more
            if not buffer:
                return
            if not buffer.startswith("["):
                raise ValueError(
                    f"{name} goes on after its closing ] at line {line} with {shown(buffer)[:40]!r}: "
                    "mend it there, or give one JSON object a line"
                )
            at = 1
            continue
        try:
            value, end = decoder.raw_decode(buffer, start)
        except RecursionError:
            problem = "a value nested too deep; in JSONL only its line would be left out"
        except ValueError as error:
            problem = error if start < len(buffer) else problem
        # A number that reaches the end of the buffer may go on behind it; a string, a list or an object does not.
        if end is None or (end == len(buffer) and not at_end and not isinstance(value, str | list | dict)):
            if at_end or len(buffer) - start > ROW_LIMIT:
                line += buffer.count("\n", at, start)
                if not at_end:
                    raise ValueError(
                        f"{name} holds at line {line} a row of more than {ROW_LIMIT // MIB} MiB or a broken one: give "
                        "one JSON object a line, where such a line is left out"
                    )
                raise ValueError(
                    f"{name} is not JSON at line {line} ({problem}): mend it there, or give one JSON object a line"
                )
            more = text.read(MIB)
            buffer, at, at_end = buffer[at:] + more, 0, not more
            continue
        line += buffer.count("\n", at, start)
        count += 1
        place = f"{name} line {line} row {count}" if line == former else f"{name} line {line}"
        former, element = line, buffer[start:end]
        if ESCAPED_BYTES.search(element):
            raw = element.encode("utf-8", "surrogateescape")
            yield guessed(raw, place, charset, stream, orjson.loads)
        else:
            yield Record(place, value)
        line += element.count("\n")
        at = end


def read_object(text: str, name: str) -> Iterator[Record]:
    """The rows of one JSON object: the list in it, its columns, or itself."""
    if len(text) >= OBJECT_LIMIT:
        raise ValueError(
            f"{name} is one JSON object of more than {OBJECT_LIMIT // MIB} MiB, which is read whole: give an array, or "
            "one JSON object a line"
        )
    try:
        value = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{name} is not JSON ({error}): mend it there, or give one JSON object a line") from None
    lists = lists_in(value)
    rows = columns_of(value) or rows_by_name(value)
    if rows is not None:
        for number, row in enumerate(rows, 1):
            yield Record(f"{name} row {number}", row)
    elif {normal(key) for key in value} & KNOWN or not lists:
        yield Record(f"{name} line 1", value)
    elif len(lists) > 1:
        raise ValueError(f"{name} holds the lists {', '.join(lists)}: give each a file of its own, and choose one")
    else:
        for number, row in enumerate(next(iter(lists.values())), 1):
            yield Record(f"{name} row {number}", row)


def is_stream(text: str) -> bool:
    """Whether objects stand one after the other, over lines as jq prints them or with nothing between.

    >>> is_stream('{"a": 1}{"a": 2}'), is_stream('{"a": [{"b": 1}]}')
    (True, False)
    """
    if not text.startswith("{"):
        return False
    try:
        _, end = json.JSONDecoder().raw_decode(text)
    except (ValueError, RecursionError):
        return False
    return text[BETWEEN_ELEMENTS.match(text, end).end() :].startswith("{")


def lists_in(value: dict[str, Any], depth: int = 4) -> dict[str, list]:
    """The lists of objects in an object and in the objects in it, by where they are: {"data.items": [...]}.

    >>> lists_in({"page": 1, "data": {"items": [{"a": 1}]}})
    {'data.items': [{'a': 1}]}
    """
    found: dict[str, list] = {}
    for key, inner in value.items():
        if isinstance(inner, list) and inner and isinstance(inner[0], dict):
            found[key] = inner
        elif isinstance(inner, dict) and depth:
            found |= {f"{key}.{place}": rows for place, rows in lists_in(inner, depth - 1).items()}
    return found


def rows_by_name(value: dict[str, Any]) -> list[dict] | None:
    """The rows of an object that keeps each under a name of its own: {"q1": {"question": ...}, "q2": {...}}."""
    rows = list(value.values())
    if len(rows) < 2 or {normal(key) for key in value} & KNOWN or not all(isinstance(row, dict) for row in rows):
        return None
    return rows if all(len({normal(key) for key in row} & KNOWN) > 1 for row in rows) else None


def columns_of(value: dict[str, Any]) -> list[dict] | None:
    """Rows of a table kept by columns, as pandas writes one: {"question": [...]} or {"question": {"0": ...}}.

    >>> columns_of({"question": {"0": "a", "1": "b"}, "answer": {"0": "c", "1": "d"}})
    [{'question': 'a', 'answer': 'c'}, {'question': 'b', 'answer': 'd'}]
    """
    columns = list(value.values())
    if len(columns) < 2 or not {normal(key) for key in value} & KNOWN:
        return None
    if all(isinstance(column, dict) and column and column.keys() == columns[0].keys() for column in columns):
        if not all(key.isdigit() for key in columns[0]):
            return None
        columns = [list(column.values()) for column in columns]
    if not all(isinstance(column, list) and len(column) == len(columns[0]) for column in columns):
        return None
    if any(isinstance(cell, dict | list) for column in columns for cell in column):
        return None
    return [dict(zip(value, cells, strict=True)) for cells in zip(*columns, strict=True)]
