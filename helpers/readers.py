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
from collections.abc import Iterator
from pathlib import Path, PurePosixPath
from typing import Any, BinaryIO, NamedTuple

import orjson

from helpers.formats import FIELDS
from helpers.hub import hub_sentence

MIB = 2**20
ROW_LIMIT = 16 * MIB
"""A longer row is no conversation but a file in another format, and must not fill the memory."""
RATIO_LIMIT = 200
"""Text packs 3 to 20 times; more than this, and beyond BOMB_FLOOR, is an archive made to fill a disk."""
BOMB_FLOOR = 64 * MIB
MEMBER_LIMIT = 10_000

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
    (b"version https://git-lfs", "a pointer of Git LFS, not the data (run git lfs pull)"),
    (b"\xff\xfe", "text in UTF-16"),
    (b"\xfe\xff", "text in UTF-16"),
)
WEB_PAGE = re.compile(rb"\s*(<!doctype html|<html)", re.IGNORECASE)
KINDS = {
    ".jsonl": "jsonl", ".ndjson": "jsonl", ".json": "json", ".csv": "csv", ".tsv": "csv", ".parquet": "parquet",
    ".txt": "text", ".text": "text", ".md": "text",
}  # fmt: skip
BETWEEN_ELEMENTS = re.compile(r"[ \t\r\n,]*")
ESCAPED_BYTES = re.compile("[\udc80-\udcff]")
HUB_NAME = re.compile(r"[\w][\w.-]*/[\w][\w.-]*")


class Record(NamedTuple):
    """A row, or what is wrong with it: problem is a check's name, detail says more; raw is what could be repaired."""

    place: str
    row: Any
    problem: str | None = None
    detail: str = ""
    raw: bytes = b""


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


def read(source: str, split: str = "train") -> Iterator[Record]:
    """Rows of a file, of every data file in a folder, or of a hub dataset's split.

    Raises ValueError with one sentence when there is nothing to read; a bad row is a Record with a problem.
    """
    path = Path(source).expanduser()
    if path.is_dir():
        files = sorted(file for file in path.rglob("*") if file.is_file() and kind_of(file.name) != "")
        if not files:
            raise ValueError(f"the folder {source} holds no data file ({', '.join(KINDS)}, .gz or .zip)")
        for file in files:
            yield from read_file(file)
    elif path.is_file():
        yield from read_file(path)
    elif HUB_NAME.fullmatch(source) and not kind_of(source):
        yield from read_hub(source, split)
    elif path.exists():
        raise ValueError(f"{source} is not a regular file")
    else:
        raise ValueError(f"there is no file {source}, and a dataset on the hub is named owner/name")


def kind_of(name: str) -> str:
    """jsonl, json, csv, parquet, text, gz or zip, by a file's ending; "" for others.

    >>> kind_of("a.jsonl.gz"), kind_of("b.CSV"), kind_of("c.exe")
    ('gz', 'csv', '')
    """
    suffix = PurePosixPath(name.lower()).suffix
    return {".gz": "gz", ".zip": "zip"}.get(suffix) or KINDS.get(suffix, "")


def read_file(path: Path) -> Iterator[Record]:
    """Rows of one file, by its ending and its first bytes."""
    try:
        with path.open("rb") as stream:
            yield from read_stream(stream, path.name, path.stat().st_size)
    except OSError as error:
        raise ValueError(f"{path} cannot be read: {error.strerror or error}") from None


def read_stream(stream: BinaryIO, name: str, size_bytes: int, inside: bool = False) -> Iterator[Record]:
    """Rows of a stream. inside: it comes out of an archive, which must not hold another."""
    buffered = stream if isinstance(stream, io.BufferedReader) else io.BufferedReader(stream, MIB)
    head = buffered.peek(8192)[:8192]
    what = not_data(head)
    if what:
        raise ValueError(f"{name} is {what}, not data: give JSON, JSONL, CSV, Parquet or text in UTF-8")
    packed = "gz" if head.startswith(b"\x1f\x8b") else "zip" if head.startswith(b"PK\x03\x04") else ""
    if packed and inside:
        raise ValueError(f"{name} is an archive inside an archive: unpack it first")
    if packed == "gz":
        inner = name[:-3] if name.lower().endswith(".gz") else name
        unpacked = Guarded(gzip.GzipFile(fileobj=buffered), name, size_bytes)
        yield from read_stream(io.BufferedReader(unpacked, MIB), inner, 0, inside=True)
    elif packed == "zip" or kind_of(name) == "zip":
        yield from read_zip(buffered, name)
    elif head.startswith(b"PAR1") or kind_of(name) == "parquet":
        yield from read_parquet(buffered, name, inside)
    elif b"\x00" in head:
        raise ValueError(f"{name} is a binary file, not data: give JSON, JSONL, CSV, Parquet or text in UTF-8")
    else:
        if head.startswith(codecs.BOM_UTF8):
            buffered.read(3)
            head = head[3:]
        if not head.strip() and len(head) < 8192:
            raise ValueError(f"{name} is empty")
        kind = kind_of(name)
        start = head.lstrip()[:1]
        if kind == "csv":
            yield from read_csv(buffered, name, head)
        elif kind == "text" or (kind not in ("json", "jsonl") and start not in (b"{", b"[")):
            yield from read_text(buffered, name)
        elif one_value(head, kind):
            yield from read_array(buffered, name)
        else:
            yield from read_jsonl(buffered, name)


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


def read_jsonl(stream: io.BufferedReader, name: str) -> Iterator[Record]:
    """One JSON value a line; blank lines are no rows."""
    for number, line in lines(stream):
        place = f"{name} line {number}"
        if line is None:
            yield Record(place, None, "over-long-row", f"a line of more than {ROW_LIMIT // MIB} MiB")
        elif line and not line.isspace():
            yield json_record(line, place)


def json_record(line: bytes, place: str) -> Record:
    """A line's value, or what is wrong with it."""
    try:
        return Record(place, orjson.loads(line))
    except orjson.JSONDecodeError as error:
        try:
            text = line.decode("utf-8")
        except UnicodeDecodeError:
            return Record(place, None, "invalid-utf8", shown(line), line)
        reason = "NaN and Infinity are not JSON" if re.search(r"\b(NaN|Infinity)\b", text) else error.msg
        return Record(place, None, "broken-row", f"{reason}: {shown(line)}")


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


def read_text(stream: io.BufferedReader, name: str) -> Iterator[Record]:
    """One text a line; blank lines are no rows."""
    for number, line in lines(stream):
        place = f"{name} line {number}"
        if line is None:
            yield Record(place, None, "over-long-row", f"a line of more than {ROW_LIMIT // MIB} MiB")
        elif line and not line.isspace():
            try:
                yield Record(place, line.decode("utf-8").strip())
            except UnicodeDecodeError:
                yield Record(place, None, "invalid-utf8", shown(line), orjson.dumps(line.decode("cp1252", "replace")))


def read_array(stream: io.BufferedReader, name: str) -> Iterator[Record]:
    """The elements of one JSON array, or of the list in one JSON object, one after the other."""
    # surrogateescape keeps bytes that are not UTF-8 inside their element, so that the others can still be read.
    text = codecs.getreader("utf-8")(stream, errors="surrogateescape")
    buffer = text.read(MIB).lstrip()
    if buffer.startswith("{"):
        yield from read_object(buffer + text.read(8 * ROW_LIMIT), name)
        return
    decoder = json.JSONDecoder()
    at, line, at_end = 1, 1, False
    while True:
        start = BETWEEN_ELEMENTS.match(buffer, at).end()
        problem: Exception | str = "it ends before its closing ]"
        value, end = None, None
        if buffer.startswith("]", start):
            return
        try:
            value, end = decoder.raw_decode(buffer, start)
        except (ValueError, RecursionError) as error:
            problem = error if start < len(buffer) else problem
        # A number that reaches the end of the buffer may go on behind it; a string, a list or an object does not.
        if end is None or (end == len(buffer) and not at_end and not isinstance(value, str | list | dict)):
            if at_end or len(buffer) - start > ROW_LIMIT:
                problem = problem if at_end else f"no end of an element within {ROW_LIMIT // MIB} MiB"
                line += buffer.count("\n", at, start)
                raise ValueError(
                    f"{name} is not JSON at line {line} ({problem}): mend it there, or give one JSON object a line"
                )
            more = text.read(MIB)
            buffer, at, at_end = buffer[at:] + more, 0, not more
            continue
        line += buffer.count("\n", at, start)
        place, element = f"{name} line {line}", buffer[start:end]
        if ESCAPED_BYTES.search(element):
            raw = element.encode("utf-8", "surrogateescape")
            yield Record(place, None, "invalid-utf8", shown(raw), raw)
        else:
            yield Record(place, value)
        line += element.count("\n")
        at = end


def read_object(text: str, name: str) -> Iterator[Record]:
    """The rows of one JSON object: the list in it, or itself."""
    try:
        value = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{name} is not JSON ({error}): mend it there, or give one JSON object a line") from None
    lists = [key for key, rows in value.items() if isinstance(rows, list) and rows and isinstance(rows[0], dict)]
    if FIELDS & set(value) or not lists:
        yield Record(f"{name} line 1", value)
    elif len(lists) > 1:
        raise ValueError(f"{name} holds the lists {', '.join(lists)}: give each a file of its own, and choose one")
    else:
        for number, row in enumerate(value[lists[0]], 1):
            yield Record(f"{name} row {number}", row)


def read_csv(stream: io.BufferedReader, name: str, head: bytes) -> Iterator[Record]:
    """A table with a header line; the separator is the one that the header holds most of."""
    header = head.partition(b"\n")[0].decode("utf-8", "replace")
    separator = max("\t,;|", key=header.count)
    text = io.TextIOWrapper(stream, encoding="utf-8", errors="surrogateescape", newline="")
    reader = csv.DictReader(text, delimiter=separator, strict=True)
    while True:
        place = f"{name} line {reader.line_num + 1}"
        try:
            row = next(reader)
        except StopIteration:
            return
        except csv.Error as error:
            yield Record(place, None, "broken-row", f"not CSV from here on: {error}")
            continue
        if None in row or None in row.values():
            columns = len(reader.fieldnames or [])
            yield Record(place, None, "broken-row", f"a row with another number of columns than the header's {columns}")
        elif any(map(ESCAPED_BYTES.search, row.values())):
            raw = {
                field: value.encode("utf-8", "surrogateescape").decode("cp1252", "replace")
                for field, value in row.items()
            }
            yield Record(place, None, "invalid-utf8", shown(" ".join(raw.values())), orjson.dumps(raw))
        else:
            yield Record(place, row)


def read_parquet(stream: io.BufferedReader, name: str, inside: bool) -> Iterator[Record]:
    """Rows of a Parquet file, only the columns that a format reads."""
    import pyarrow
    from pyarrow import parquet

    with tempfile.TemporaryFile() as seekable:
        if inside:
            while piece := stream.read(MIB):
                seekable.write(piece)
        try:
            table = parquet.ParquetFile(seekable if inside else stream)
            known = [column for column in table.schema_arrow.names if column in FIELDS]
            number = 0
            for batch in table.iter_batches(batch_size=256, columns=known or None):
                for row in batch.to_pylist():
                    number += 1
                    yield Record(f"{name} row {number}", row)
        except (pyarrow.ArrowException, OSError, UnicodeDecodeError) as error:
            raise ValueError(f"{name} is not a whole Parquet file: {str(error).splitlines()[0]}") from None


def read_zip(stream: io.BufferedReader, name: str) -> Iterator[Record]:
    """Rows of every data file in a zip, in the order of their names; other files are passed over."""
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
    data = [
        member
        for member in members
        if kind_of(member.filename) and not member.filename.startswith("__MACOSX") and "/." not in f"/{member.filename}"
    ]
    if not data:
        raise ValueError(f"{name} holds no data file ({', '.join(KINDS)}), only {', '.join(names[:5]) or 'nothing'}")
    for member in data:
        place = f"{name}/{member.filename}"
        refuse_bomb(place, member.file_size, member.compress_size)
        try:
            opened = archive.open(member)
        except (RuntimeError, NotImplementedError, zipfile.BadZipFile) as error:
            raise ValueError(f"{place} cannot be unpacked ({error}): unpack it yourself") from None
        guarded = Guarded(opened, place, member.compress_size)
        yield from read_stream(io.BufferedReader(guarded, MIB), place, member.file_size, inside=True)


def read_hub(name: str, split: str) -> Iterator[Record]:
    """Rows of a hub dataset, streamed: nothing is downloaded that is not read, and none of its code is run."""
    from datasets import load_dataset

    try:
        splits = load_dataset(name, streaming=True)
        chosen = split if split in splits else "train" if "train" in splits else next(iter(splits))
        for number, row in enumerate(splits[chosen], 1):
            yield Record(f"{name} {chosen} row {number}", row)
    except Exception as error:  # the hub's client raises many kinds for "not there" and "no network"
        raise ValueError(hub_sentence(error, "dataset", name)) from None
