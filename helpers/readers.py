"""Files and hub datasets in, rows out: streamed, each with its place, and nothing unpacked to disk.

>>> import tempfile
>>> file = Path(tempfile.mkdtemp()) / "two.jsonl"
>>> _ = file.write_text('{"text": "one"}\\n{"text": NaN}\\n')
>>> [(record.place, record.row, record.problem) for record in read(str(file))]
[('two.jsonl line 1', {'text': 'one'}, None), ('two.jsonl line 2', None, 'broken-row')]
"""

import codecs
import csv
import gzip
import io
import itertools
import json
import re
import tempfile
import zipfile
import zlib
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path, PurePosixPath
from typing import Any, BinaryIO, NamedTuple

import orjson

from helpers import threads
from helpers.columns import KNOWN, MEDIA, normal
from helpers.encodings import Charset
from helpers.folders import KINDS, choose, kind_of
from helpers.hub import hub_sentence

MIB = 2**20
ROW_LIMIT = 16 * MIB
"""A longer row is no conversation but a file in another format, and must not fill the memory."""
RATIO_LIMIT = 200
"""Text packs 3 to 20 times; more than this, and beyond BOMB_FLOOR, is an archive made to fill a disk."""
BOMB_FLOOR = 64 * MIB
MEMBER_LIMIT = 10_000
OBJECT_LIMIT = 128 * MIB
BATCH_BYTES = 8 * MIB
"""Of a Parquet file, unpacked at a time."""

MAGIC = (
    (b"%PDF", "a PDF"),
    (b"\x89PNG", "a picture"),
    (b"\xff\xd8\xff", "a picture"),
    (b"GIF8", "a picture"),
    (b"\x7fELF", "a program"),
    (b"MZ\x90", "a program"),
    (b"SQLite format 3", "an SQLite database"),
    (b"BZh", "a bzip2 archive"),
    (b"\xfd7zXZ", "an xz archive"),
    (b"\x28\xb5\x2f\xfd", "a Zstandard archive"),
    (b"7z\xbc\xaf", "a 7z archive"),
    (b"Rar!", "a RAR archive"),
    (b"ARROW1", "an Arrow file"),
    (b"\x80\x04\x95", "a Python pickle"),
    (b"\xd0\xcf\x11\xe0", "an old Office document"),
    (b"{\\rtf", "a Word document"),
    (b"version https://git-lfs", "a pointer of Git LFS (git lfs pull fetches the data)"),
    (b"\xff\xfe", "text in UTF-16"),
    (b"\xfe\xff", "text in UTF-16"),
)
WEB_PAGE = re.compile(rb"\s*(<!doctype html|<html)", re.IGNORECASE)
BETWEEN_ELEMENTS = re.compile(r"[ \t\r\n,]*")
ESCAPED_BYTES = re.compile("[\udc80-\udcff]")
HUB_NAME = re.compile(r"[\w][\w.-]*/[\w][\w.-]*(?::[\w.-]+)?")
SEPARATOR_LINE = re.compile(rb'(?:\xef\xbb\xbf)?"?sep=(.)"?\r?\n')
"""How Excel says what separates the cells."""
SNIFFED_BYTES = 8192


class Record(NamedTuple):
    """A row, or what is wrong with it: problem names a check, detail says more; mended is what it may have meant."""

    place: str
    row: Any
    problem: str | None = None
    detail: str = ""
    mended: Any = None
    others: int = 0
    """Messages of a tree beside the way that was taken."""


class Guarded(io.RawIOBase):
    """An unpacking stream that stops at an archive made to fill a disk. packed_bytes: what lies in the archive."""

    def __init__(self, stream: BinaryIO, name: str, packed_bytes: int) -> None:
        self.stream, self.name, self.packed_bytes, self.unpacked_bytes = stream, name, packed_bytes, 0

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        try:
            data = self.stream.read(len(buffer))
        except (OSError, EOFError, zlib.error, zipfile.BadZipFile, RuntimeError, NotImplementedError) as error:
            raise ValueError(
                f"{self.name} is damaged after {self.unpacked_bytes:,} unpacked bytes ({error}): download it again"
            ) from None
        self.unpacked_bytes += len(data)
        refuse_bomb(self.name, self.unpacked_bytes, self.packed_bytes)
        buffer[: len(data)] = data
        return len(data)


def refuse_bomb(name: str, unpacked_bytes: int, packed_bytes: int) -> None:
    """Raise ValueError for an archive that is made to fill a disk."""
    if unpacked_bytes > max(BOMB_FLOOR, RATIO_LIMIT * packed_bytes):
        raise ValueError(
            f"{name} unpacks to more than {RATIO_LIMIT} times its {packed_bytes:,} bytes: "
            f"it is made to fill a disk; unpack it yourself if you trust it"
        )


def read(source: str, split: str = "train", notes: list[str] | None = None) -> Iterator[Record]:
    """Rows of a file, of the data files of one split in a folder, or of a hub dataset's split.

    source: a path, or owner/name or owner/name:configuration on the hub. notes: takes a sentence about files left out.
    Raises ValueError with one sentence when there is nothing to read; a bad row is a Record with a problem.
    """
    path, notes = Path(source).expanduser(), [] if notes is None else notes
    if path.is_dir():
        listed = [file.relative_to(path).as_posix() for file in path.rglob("*") if file.is_file()]
        taken, said = choose(listed, split)
        if not taken:
            raise ValueError(f"the folder {source} holds no data file ({', '.join(KINDS)}, .gz or .zip)")
        notes += said
        for name in taken:
            yield from read_file(path / name, split, notes)
    elif path.is_file():
        yield from read_file(path, split, notes)
    elif HUB_NAME.fullmatch(source) and not kind_of(source) and not Path(source.partition("/")[0]).is_dir():
        yield from read_hub(source, split)
    elif path.exists():
        raise ValueError(f"{source} is not a regular file")
    else:
        raise ValueError(f"there is no file {source}, and a dataset on the hub is named owner/name")


def read_file(path: Path, split: str, notes: list[str]) -> Iterator[Record]:
    """Rows of one file, by its ending and its first bytes."""
    try:
        with path.open("rb", buffering=MIB) as stream:
            yield from read_stream(stream, path.name, path.stat().st_size, split, notes)
    except OSError as error:
        raise ValueError(f"{path} cannot be read: {error.strerror or error}") from None


def read_stream(
    stream: BinaryIO, name: str, size_bytes: int, split: str, notes: list[str], inside: bool = False
) -> Iterator[Record]:
    """Rows of a stream. inside: it comes out of an archive, which must not hold another."""
    buffered = stream if isinstance(stream, io.BufferedReader) else io.BufferedReader(stream, MIB)
    head = buffered.peek(SNIFFED_BYTES)[:SNIFFED_BYTES]
    what = not_data(head)
    if what:
        raise ValueError(f"{name} is {what}: give JSON, JSONL, CSV, Parquet or text in UTF-8")
    packed = "gz" if head.startswith(b"\x1f\x8b") else "zip" if head.startswith(b"PK\x03\x04") else ""
    if packed and inside:
        raise ValueError(f"{name} is an archive inside an archive: unpack it first")
    if packed == "gz":
        inner = name[:-3] if name.lower().endswith(".gz") else name
        unpacked = Guarded(gzip.GzipFile(fileobj=buffered), name, size_bytes)
        yield from read_stream(io.BufferedReader(unpacked, MIB), inner, 0, split, notes, inside=True)
    elif packed == "zip" or kind_of(name) == "zip":
        yield from read_zip(buffered, name, split, notes)
    elif head.startswith(b"PAR1") or kind_of(name) == "parquet":
        yield from read_parquet(buffered, name, inside)
    elif b"\x00" in head:
        raise ValueError(f"{name} is a binary file, not data: give JSON, JSONL, CSV, Parquet or text in UTF-8")
    else:
        if head.startswith(codecs.BOM_UTF8):
            buffered.read(3)
            head = head[3:]
        if not head.strip() and len(head) < SNIFFED_BYTES:
            raise ValueError(f"{name} is empty")
        yield from together(READERS[text_kind(head, kind_of(name))](buffered, name, head))


def text_kind(head: bytes, kind: str) -> str:
    """csv, text, array or jsonl: how a text is read, by its beginning where its ending does not say."""
    start = head.lstrip()[:1]
    if kind == "csv" or (kind == "text" and is_table(head)):
        return "csv"
    if (kind == "text" and not is_json_line(head)) or (kind not in ("json", "jsonl") and start not in (b"{", b"[")):
        return "text"
    return "array" if one_value(head, kind) else "jsonl"


def is_json_line(head: bytes) -> bool:
    """Whether the first line of a text is a JSON object: somebody named a JSONL .txt."""
    try:
        return isinstance(orjson.loads(head.lstrip().partition(b"\n")[0]), dict)
    except orjson.JSONDecodeError:
        return False


def is_table(head: bytes) -> bool:
    """Whether the first line of a text names columns, with tabs between, that some format reads."""
    cells = head.partition(b"\n")[0].decode("utf-8", "replace").split("\t")
    return len(cells) > 1 and sum(normal(cell.strip().strip('"')) in KNOWN for cell in cells) > 1


def together(records: Iterator[Record]) -> Iterator[Record]:
    """Records as they are, or, of a file that keeps one message a row, its conversations."""
    first = None
    for record in records:
        if not record.problem:
            first = record
            break
        yield record
    if first is None:
        return
    heads = threads.is_heading(first.row)
    if not (heads or threads.is_message(first.row)):
        yield first
        yield from records
        return
    rows = [] if heads else [(first.place, first.row)]
    for record in records:
        if record.problem or not threads.is_message(record.row):
            yield record
        elif len(rows) == threads.MESSAGES_LIMIT:
            raise ValueError(
                f"{record.place}: more than {len(rows):,} messages, one a row; give one conversation a row"
            )
        else:
            rows.append((record.place, record.row))
    for talk in threads.joined(rows) if rows else []:
        yield Record(talk.place, {"messages": talk.turns}, others=talk.others)


def not_data(head: bytes) -> str:
    """What a file is by its first bytes, when it is certainly not data."""
    if head[257:262] == b"ustar":
        return "a tar archive"
    if WEB_PAGE.match(head):
        return "a web page (a download link often leads to a page about the file)"
    return next((what for magic, what in MAGIC if head.startswith(magic)), "")


def one_value(head: bytes, kind: str) -> bool:
    """Whether JSON is one value over the whole file rather than one value a line."""
    line, end, rest = head.lstrip().partition(b"\n")
    try:
        orjson.loads(line)
    except orjson.JSONDecodeError:
        # Not whole on its line: a value over many lines, or a line that is broken or longer than the head.
        return line.startswith(b"[") or (kind != "jsonl" and (not end or line.strip() == b"{"))
    return not rest.strip() and line.startswith((b"[", b"{")) and kind != "jsonl"


def read_jsonl(stream: io.BufferedReader, name: str, head: bytes = b"") -> Iterator[Record]:
    """One JSON value a line; blank lines are no rows."""
    charset = Charset()
    for number, line in lines(stream):
        place = f"{name} line {number}"
        if line is None:
            yield Record(place, None, "over-long-row", f"a line of more than {ROW_LIMIT // MIB} MiB")
        elif line and not line.isspace():
            yield json_record(line, place, charset, stream)


def json_record(line: bytes, place: str, charset: Charset, stream: io.BufferedReader | None = None) -> Record:
    """A line's value, or what is wrong with it."""
    try:
        return Record(place, orjson.loads(line))
    except orjson.JSONDecodeError as error:
        try:
            text = line.decode("utf-8")
        except UnicodeDecodeError:
            return guessed(line, place, charset, stream, orjson.loads)
        reason = "NaN and Infinity are not JSON" if re.search(r"\b(NaN|Infinity)\b", text) else error.msg
        return Record(place, None, "broken-row", f"{reason}: {shown(line)}")


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


def shown(line: bytes | str) -> str:
    """The beginning of a line, to show."""
    text = line[:120].decode("utf-8", "replace") if isinstance(line, bytes) else line[:120]
    return " ".join(text.split())


def read_text(stream: io.BufferedReader, name: str, head: bytes = b"") -> Iterator[Record]:
    """One text a line; blank lines are no rows."""
    charset = Charset()
    for number, line in lines(stream):
        place = f"{name} line {number}"
        if line is None:
            yield Record(place, None, "over-long-row", f"a line of more than {ROW_LIMIT // MIB} MiB")
        elif line and not line.isspace():
            try:
                yield Record(place, line.decode("utf-8").strip())
            except UnicodeDecodeError:
                yield guessed(line, place, charset, stream, str.strip)


def read_array(stream: io.BufferedReader, name: str, head: bytes = b"") -> Iterator[Record]:
    """The elements of JSON arrays, or of the list in one JSON object, one after the other."""
    # surrogateescape keeps bytes that are not UTF-8 inside their element, so that the others can still be read.
    text = codecs.getreader("utf-8")(stream, errors="surrogateescape")
    buffer = text.read(MIB).lstrip()
    if buffer.startswith("{"):
        yield from read_object(buffer + text.read(OBJECT_LIMIT), name)
        return
    decoder, charset = json.JSONDecoder(), Charset()
    at, line, at_end, count, former = 1, 1, False, 0, 0
    while True:
        start = BETWEEN_ELEMENTS.match(buffer, at).end()
        problem: Exception | str = "it ends before its closing ]"
        value, end = None, None
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
    lists = [key for key, rows in value.items() if isinstance(rows, list) and rows and isinstance(rows[0], dict)]
    rows = columns_of(value)
    if rows is not None:
        for number, row in enumerate(rows, 1):
            yield Record(f"{name} row {number}", row)
    elif {normal(key) for key in value} & KNOWN or not lists:
        yield Record(f"{name} line 1", value)
    elif len(lists) > 1:
        raise ValueError(f"{name} holds the lists {', '.join(lists)}: give each a file of its own, and choose one")
    else:
        for number, row in enumerate(value[lists[0]], 1):
            yield Record(f"{name} row {number}", row)


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


def read_csv(stream: io.BufferedReader, name: str, head: bytes) -> Iterator[Record]:
    """A table with a header line; the separator is the one that the header holds most of."""
    excel = SEPARATOR_LINE.match(head)
    if excel:
        stream.readline()
        head = head[excel.end() :]
    header = head.partition(b"\n")[0].decode("utf-8", "replace")
    separator = excel[1].decode("latin-1") if excel else max("\t,;|", key=header.count)
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


def read_zip(stream: io.BufferedReader, name: str, split: str, notes: list[str]) -> Iterator[Record]:
    """Rows of the data files of one split in a zip, in the order of their names; other files are passed over."""
    try:
        archive = zipfile.ZipFile(stream)
    except (zipfile.BadZipFile, OSError, ValueError) as error:
        raise ValueError(f"{name} is a damaged zip archive ({error}): download it again") from None
    members = sorted((member for member in archive.infolist() if not member.is_dir()), key=lambda info: info.filename)
    names = [member.filename for member in members]
    for member in names:
        if (
            PurePosixPath(member).is_absolute()
            or ".." in PurePosixPath(member.replace("\\", "/")).parts
            or ":" in member
        ):
            raise ValueError(f"{name} holds {member!r}, a path outside the archive: do not trust it")
    if any(member.startswith(("xl/", "word/", "ppt/")) for member in names):
        raise ValueError(f"{name} is an Office document: save it as CSV in UTF-8")
    if len(members) > MEMBER_LIMIT:
        raise ValueError(f"{name} holds {len(members):,} files; at most {MEMBER_LIMIT:,} are read")
    taken, said = choose(names, split)
    if not taken:
        raise ValueError(f"{name} holds no data file ({', '.join(KINDS)}), only {', '.join(names[:5]) or 'nothing'}")
    notes += [f"{name}: {sentence}" for sentence in said]
    data = [member for member in members if member.filename in set(taken)]
    for member in data:
        place = f"{name}/{member.filename}"
        refuse_bomb(place, member.file_size, member.compress_size)
        try:
            opened = archive.open(member)
        except (RuntimeError, NotImplementedError, zipfile.BadZipFile) as error:
            raise ValueError(f"{place} cannot be unpacked ({error}): unpack it yourself") from None
        guarded = Guarded(opened, place, member.compress_size)
        yield from read_stream(io.BufferedReader(guarded, MIB), place, member.file_size, split, notes, inside=True)


def read_hub(name: str, split: str) -> Iterator[Record]:
    """Rows of a hub dataset, streamed: nothing is downloaded that is not read, and none of its code is run."""
    from datasets import load_dataset

    repository, _, configuration = name.partition(":")
    try:
        splits = load_dataset(repository, configuration or None, streaming=True)
        chosen = split if split in splits else "train" if "train" in splits else next(iter(splits))
        for number, row in enumerate(splits[chosen], 1):
            yield Record(f"{name} {chosen} row {number}", row)
    except Exception as error:  # the hub's client raises many kinds for "not there" and "no network"
        raise ValueError(several(error, repository) or hub_sentence(error, "dataset", repository)) from None


def several(error: Exception, repository: str) -> str:
    """The sentence for a dataset of several configurations, "" for other errors.

    >>> several(ValueError("Config name is missing.\\nPlease pick one among the available configs: ['a', 'b']"), "o/n")
    "dataset o/n has several configurations, ['a', 'b']: say which as o/n:NAME"
    """
    found = re.search(r"(?:available configs|Available): (\[.*?\])", str(error))
    if "onfig" not in str(error) or not found:
        return ""
    return f"dataset {repository} has several configurations, {found[1]:.200}: say which as {repository}:NAME"


READERS = {"csv": read_csv, "text": read_text, "array": read_array, "jsonl": read_jsonl}
