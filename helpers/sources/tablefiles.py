"""Tables: CSV in whatever charset and with whatever separator, and Parquet.

>>> column_names(["", "answer", "answer"], Charset(), b"")
['column 1', 'answer', 'answer (2)']
"""

import csv
import io
import re
import tempfile
from collections.abc import Iterator
from contextlib import suppress
from typing import Any

from helpers.sources.columns import KNOWN, MEDIA, normal
from helpers.sources.encodings import Charset
from helpers.sources.records import ESCAPED_BYTES, MIB, ROW_LIMIT, Record, guessed

SEPARATOR_LINE = re.compile(rb'(?:\xef\xbb\xbf)?"?sep=(.)"?\r?\n')
"""How Excel says what separates the cells."""
QUOTED = re.compile(r'"(?:[^"]|"")*"')
BATCH_BYTES = 8 * MIB
"""Of a Parquet file, unpacked at a time."""


def read_csv(stream: io.BufferedReader, name: str, head: bytes) -> Iterator[Record]:
    """A table with a header line; the separator is the one that the header holds most of."""
    excel = SEPARATOR_LINE.match(head)
    if excel:
        stream.readline()
        head = head[excel.end() :]
    header = head.partition(b"\n")[0].decode("utf-8", "replace")
    separator = excel[1].decode("latin-1") if excel else max("\t,;|", key=QUOTED.sub("", header).count)
    csv.field_size_limit(ROW_LIMIT)
    text = io.TextIOWrapper(stream, encoding="utf-8", errors="surrogateescape", newline="")
    reader = csv.reader(text, delimiter=separator, strict=True)
    charset, skipped = Charset(), 1 if excel else 0
    try:
        names = column_names(next(reader, []), charset, head)
    except csv.Error as error:
        raise ValueError(f"{name} has no header line that could be read ({error}): name its columns there") from None
    while True:
        first = reader.line_num + skipped + 1
        place = f"{name} line {first}"
        try:
            cells = next(reader)
        except StopIteration:
            return
        except csv.Error as error:
            last = reader.line_num + skipped
            lost = f"lines {first} to {last} went with it" if last > first else "the row is left out"
            reason = "a quotation mark that nothing closes" if "unexpected end" in str(error) else str(error)
            yield Record(place, None, "broken-row", f"{reason}: {lost}")
            continue
        if not cells:
            continue
        if len(cells) != len(names):
            detail = f"a row with another number of columns than the header's {len(names)}: {len(cells)}"
            yield Record(place, None, "broken-row", detail)
        elif any(map(ESCAPED_BYTES.search, cells)):
            raw = "\0".join(cells).encode("utf-8", "surrogateescape")
            yield guessed(raw, place, charset, None, lambda text: dict(zip(names, text.split("\0"), strict=True)))
        else:
            yield Record(place, dict(zip(names, cells, strict=True)))


def column_names(cells: list[str], charset: Charset, head: bytes) -> list[str]:
    """A header's names: in the charset of the file, each once, and one for a column that has none.

    >>> column_names(["", "answer", "answer"], Charset(), b"")
    ['column 1', 'answer', 'answer (2)']
    """
    names: list[str] = []
    for i, cell in enumerate(cells, 1):
        if ESCAPED_BYTES.search(cell):
            cell = charset.text(cell.encode("utf-8", "surrogateescape"), head)
        cell = cell if cell.strip() else f"column {i}"
        names.append(cell if cell not in names else f"{cell} ({i - 1})")
    return names


def read_parquet(stream: io.BufferedReader, name: str, inside: bool) -> Iterator[Record]:
    """Rows of a Parquet file; columns that hold no text are not unpacked, only told of."""
    import pyarrow
    from pyarrow import parquet

    with tempfile.TemporaryFile() as seekable:
        if inside:
            while piece := stream.read(MIB):
                seekable.write(piece)
        try:
            table = parquet.ParquetFile(seekable if inside else stream)
            number = 0
            metadata = table.metadata
            size_bytes = sum(metadata.row_group(i).total_byte_size for i in range(metadata.num_row_groups))
            rows = max(1, min(256, BATCH_BYTES * metadata.num_rows // max(size_bytes, 1)))
            for batch in table.iter_batches(batch_size=rows):
                columns = [cells(batch.column(i), field.name) for i, field in enumerate(batch.schema)]
                for row in zip(*columns, strict=True):
                    number += 1
                    yield Record(f"{name} row {number}", dict(zip(batch.schema.names, row, strict=True)))
        except (pyarrow.ArrowException, OSError, UnicodeDecodeError, OverflowError) as error:
            raise ValueError(f"{name} is not a whole Parquet file: {str(error).splitlines()[0]}") from None


def cells(column: Any, name: str) -> list[Any]:
    """A column's values; of one that no format reads and that holds no text, what it holds, where it holds anything.

    Bytes of pictures stay packed, and dates that Python has no number for do no harm.
    """
    from pyarrow import types

    kind = column.type
    readable = types.is_string(kind) or types.is_large_string(kind) or types.is_boolean(kind) or types.is_integer(kind)
    readable = readable or types.is_floating(kind) or types.is_null(kind)
    if not readable and types.is_dictionary(kind):
        readable = types.is_string(kind.value_type) or types.is_large_string(kind.value_type)
    if readable or (normal(name) in KNOWN and normal(name) not in MEDIA):
        with suppress(OverflowError, ValueError):
            return column.to_pylist()
    told = f"<{kind!s:.60}>"
    if types.is_list(kind) or types.is_large_list(kind):
        return [told if length else None for length in column.value_lengths().to_pylist()]
    return [told if there else None for there in column.is_valid().to_pylist()]
