"""Files and hub datasets in, rows out: streamed, each with its place, and nothing unpacked to disk.

>>> import tempfile
>>> file = Path(tempfile.mkdtemp()) / "two.jsonl"
>>> _ = file.write_text('{"text": "one"}\\n{"text": NaN}\\n')
>>> [(record.place, record.row, record.problem) for record in read(str(file))]
[('two.jsonl line 1', {'text': 'one'}, None), ('two.jsonl line 2', None, 'broken-row')]
"""

import codecs
import gzip
import io
import re
import zipfile
import zlib
from collections.abc import Iterator
from pathlib import Path, PurePosixPath
from typing import Any, BinaryIO

import orjson

from helpers.models.hub import hub_sentence
from helpers.sources import threads
from helpers.sources.columns import KNOWN, normal
from helpers.sources.encodings import Charset
from helpers.sources.folders import KINDS, Split, choose, kind_of
from helpers.sources.jsonfiles import is_stream, read_array, read_jsonl
from helpers.sources.records import MIB, Record, guessed, line_records
from helpers.sources.records import ROW_LIMIT as ROW_LIMIT
from helpers.sources.tablefiles import read_csv, read_parquet

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
    (b"<?xml", "XML"),
    (b"#separator:", "an Anki export, which names no columns (question, a tab, answer in place of its first lines)"),
    (b"version https://git-lfs", "a pointer of Git LFS (git lfs pull fetches the data)"),
)
WEB_PAGE = re.compile(rb"\s*(<!doctype html|<html)", re.IGNORECASE)
HUB_NAME = re.compile(r"[\w][\w.-]*/[\w][\w.-]*(?::[\w.-]+)?")
SNIFFED_BYTES = 8192
OTHER_KIND = re.compile(r"\.[A-Za-z][A-Za-z0-9]{0,9}$")


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


class FromUtf16(io.RawIOBase):
    """The UTF-8 of a stream in UTF-16, which is what PowerShell and Excel's "Unicode text" write."""

    def __init__(self, stream: BinaryIO) -> None:
        self.stream, self.waiting = stream, b""
        self.decoder = codecs.getincrementaldecoder("utf-16")("replace")

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        while not self.waiting and (data := self.stream.read(len(buffer))):
            # half of a surrogate pair at the end of a part waits in the decoder for its other half
            self.waiting = self.decoder.decode(data).encode()
        count = min(len(buffer), len(self.waiting))
        buffer[:count], self.waiting = self.waiting[:count], self.waiting[count:]
        return count


def refuse_bomb(name: str, unpacked_bytes: int, packed_bytes: int) -> None:
    """Raise ValueError for an archive that is made to fill a disk."""
    if unpacked_bytes > max(BOMB_FLOOR, RATIO_LIMIT * packed_bytes):
        raise ValueError(
            f"{name} unpacks to more than {RATIO_LIMIT} times its {packed_bytes:,} bytes: "
            f"it is made to fill a disk; unpack it yourself if you trust it"
        )


def read(source: str, split: Split | str = "train", notes: list[str] | None = None) -> Iterator[Record]:
    """Rows of a file, of the data files of one split in a folder, or of a hub dataset's split.

    source: a path, or owner/name or owner/name:configuration on the hub. notes: takes a sentence about files left out.
    Raises ValueError with one sentence when there is nothing to read; a bad row is a Record with a problem.
    """
    path, notes = Path(source).expanduser(), [] if notes is None else notes
    split = Split(split) if isinstance(split, str) else split
    if path.is_dir():
        listed = [file.relative_to(path).as_posix() for file in path.rglob("*") if file.is_file()]
        taken, said = choose(listed, split)
        if not taken and split.strictly:
            raise ValueError(split.missing(source))
        if not taken:
            raise ValueError(f"the folder {source} holds no data file ({', '.join(KINDS)}, .gz or .zip)")
        notes += said
        for name in taken:
            yield from read_file(path / name, split, notes)
    elif path.is_file() and split.strictly and kind_of(path.name) != "zip":
        raise ValueError(split.missing(source))
    elif path.is_file():
        yield from read_file(path, split, notes)
    elif HUB_NAME.fullmatch(source) and not kind_of(source) and not Path(source.partition("/")[0]).is_dir():
        yield from read_hub(source, split)
    elif path.exists():
        raise ValueError(f"{source} is not a regular file")
    else:
        raise ValueError(f"there is no file {source}, and a dataset on the hub is named owner/name")


def read_file(path: Path, split: Split, notes: list[str]) -> Iterator[Record]:
    """Rows of one file, by its ending and its first bytes."""
    try:
        with path.open("rb", buffering=MIB) as stream:
            yield from read_stream(stream, path.name, path.stat().st_size, split, notes)
    except OSError as error:
        raise ValueError(f"{path} cannot be read: {error.strerror or error}") from None


def read_stream(
    stream: BinaryIO, name: str, size_bytes: int, split: Split, notes: list[str], inside: bool = False
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
    elif head.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)):
        notes.append(f"{name} is in UTF-16 and is read as that")
        text = io.BufferedReader(FromUtf16(buffered), MIB)
        yield from read_stream(text, name, size_bytes, split, notes, inside=True)
    elif b"\x00" in head:
        raise ValueError(f"{name} is a binary file, not data: give JSON, JSONL, CSV, Parquet or text in UTF-8")
    else:
        if head.startswith(codecs.BOM_UTF8):
            buffered.read(3)
            head = head[3:]
        if not head.strip() and len(head) < SNIFFED_BYTES:
            raise ValueError(f"{name} is empty")
        kind = text_kind(head, kind_of(name))
        if kind == "text" and not kind_of(name) and OTHER_KIND.search(name):
            raise ValueError(
                f"{name} is of a kind that is not known here: give JSON, JSONL, CSV or Parquet, or name it .txt where "
                "each of its lines is a text"
            )
        yield from together(READERS[kind](buffered, name, head))


def text_kind(head: bytes, kind: str) -> str:
    """csv, text, array or jsonl: how a text is read, by its beginning where its ending does not say."""
    start = head.lstrip()[:1]
    if kind == "csv" or (kind == "text" and is_table(head)):
        return "csv"
    if (kind == "text" and not is_json_line(head)) or (kind not in ("json", "jsonl") and start not in (b"{", b"[")):
        return "text"
    return "array" if one_value(head, kind) else "jsonl"


def is_json_line(head: bytes) -> bool:
    """Whether the first line of a text is a JSON object (with an array's comma): somebody named a JSONL .txt."""
    try:
        return isinstance(orjson.loads(head.lstrip().partition(b"\n")[0].rstrip().removesuffix(b",")), dict)
    except orjson.JSONDecodeError:
        return False


def is_table(head: bytes) -> bool:
    """Whether a text is a table with tabs: its first line names columns, or every line has as many tabs."""
    lines = head.decode("utf-8", "replace").splitlines()
    cells = lines[0].split("\t")
    if len(cells) > 1 and sum(normal(cell.strip().strip('"')) in KNOWN for cell in cells) > 1:
        return True
    whole = lines[:-1] if len(head) == SNIFFED_BYTES else lines
    return len(whole) > 1 and len(cells) > 1 and {line.count("\t") for line in whole if line} == {len(cells) - 1}


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
    head = head.removeprefix(codecs.BOM_UTF8)
    if head[257:262] == b"ustar":
        return "a tar archive"
    if WEB_PAGE.match(head):
        return "a web page (a download link often leads to a page about the file)"
    return next((what for magic, what in MAGIC if head.startswith(magic)), "")


def one_value(head: bytes, kind: str) -> bool:
    """Whether JSON is one value over the whole file rather than one value a line."""
    line, end, rest = head.lstrip().partition(b"\n")
    printed = line.strip() == b"{" and (kind != "jsonl" or rest.lstrip().startswith(b'"'))
    if (printed or not rest.strip()) and is_stream(head.decode("utf-8", "ignore").lstrip()):
        return True
    try:
        orjson.loads(line)
    except orjson.JSONDecodeError:
        # Not whole on its line: a value over many lines, or a line that is broken or longer than the head.
        return line.startswith(b"[") or (kind != "jsonl" and not end) or printed
    return not rest.strip() and line.startswith((b"[", b"{")) and kind != "jsonl"


def read_text(stream: io.BufferedReader, name: str, head: bytes = b"") -> Iterator[Record]:
    """One text a line; blank lines are no rows."""
    return line_records(stream, name, text_record)


def text_record(line: bytes, place: str, charset: Charset, stream: io.BufferedReader) -> Record:
    """A line's text, or what its bytes seem to say."""
    try:
        return Record(place, line.decode("utf-8").strip())
    except UnicodeDecodeError:
        return guessed(line, place, charset, stream, str.strip)


def read_zip(stream: io.BufferedReader, name: str, split: Split, notes: list[str]) -> Iterator[Record]:
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
    if not taken and split.strictly:
        raise ValueError(split.missing(name))
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


def read_hub(name: str, split: Split) -> Iterator[Record]:
    """Rows of a hub dataset, streamed: nothing is downloaded that is not read, and none of its code is run."""
    from datasets import load_dataset

    repository, _, configuration = name.partition(":")
    try:
        splits = load_dataset(repository, configuration or None, streaming=True)
        if split.strictly and split.name not in splits:
            raise LookupError(split.missing(name))
        chosen = split.name if split.name in splits else "train" if "train" in splits else next(iter(splits))
        for number, row in enumerate(splits[chosen], 1):
            yield Record(f"{name} {chosen} row {number}", row)
    except LookupError as error:
        if not split.strictly:
            raise
        raise ValueError(str(error)) from None
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
