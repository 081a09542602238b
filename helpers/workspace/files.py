"""Files in a folder that may be a mounted Drive: asked again after a hiccup, copied and read back, never a half.

A mounted Drive answers "Input/output error" or "Transport endpoint is not connected" now and then, on reads as well as
on writes, and works again a moment later. So every question here has three answers: yes, no, and an OSError, which is
raised only when it stayed for about a minute (RECIPES_PATIENCE_S in the environment: other seconds).

A folder is replaced by `publish`: the new one is whole before the old one goes. What is deleted is renamed first, so
that a half-deleted folder is never taken for anything else; what is not understood is renamed aside and kept.

>>> import tempfile
>>> folder = Path(tempfile.mkdtemp())
>>> for text in ("old", "new"):
...     _ = make_folder(folder / "stage.partial")
...     _ = write_text(folder / "stage.partial" / "rows.txt", text)
...     publish(folder / "stage.partial", folder / "stage")
>>> names(folder), (folder / "stage" / "rows.txt").read_text()
(['stage'], 'new')
"""

import errno
import hashlib
import os
import re
import shutil
import stat
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TypeVar

GIB = 2**30
PAUSES_S = (1, 2, 4, 8, 15, 30)
"""Between the tries of what may pass: a minute altogether."""
HICCUPS = {
    getattr(errno, name)
    for name in (
        *("EIO", "ENOTCONN", "ETIMEDOUT", "EAGAIN", "EBUSY", "ESTALE", "EREMOTEIO", "ENETDOWN", "ENETUNREACH"),
        *("ECONNABORTED", "ECONNRESET", "EHOSTDOWN", "EHOSTUNREACH", "EPIPE"),
    )
    if hasattr(errno, name)
}
"""Errors of a network's file system that may pass. Not "no such file", "permission denied" or "no space left"."""
FULL = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG}
FORMER, DELETED, ASIDE = ".former", ".deleting", ".damaged"
"""What is appended to a folder's name: while it is replaced, while it is deleted, when it is not understood."""

Result = TypeVar("Result")


class StorageError(RuntimeError):
    """Files could not be read or written, however often it was tried; the message says what to do."""


class Torn(ValueError):
    """A file can be read, and is not what was written."""


# ---- asking again ----------------------------------------------------------------------------------------------------


def patiently(ask: Callable[[], Result]) -> Result:
    """The result of ask(), asked again after growing pauses while its error may pass. Raises the OSError that stays."""
    patience = float(os.environ.get("RECIPES_PATIENCE_S", sum(PAUSES_S))) / sum(PAUSES_S)
    for pause_s in PAUSES_S:
        try:
            return ask()
        except OSError as error:
            if error.errno not in HICCUPS:
                raise
        time.sleep(pause_s * patience)
    return ask()


def is_write_error(error: BaseException) -> bool:
    """Whether an error says that a file could not be written; PyTorch, safetensors and tokenizers have their own kinds.

    >>> is_write_error(Exception("No space left on device (os error 28)")), is_write_error(ValueError("rank"))
    (True, False)
    """
    said = str(error)
    torch_writer = isinstance(error, RuntimeError) and ("Writer" in said or "inline_container" in said)
    return isinstance(error, OSError) or torch_writer or re.search(r"\(os error \d+\)|I/O error", said) is not None


def is_full(error: BaseException) -> bool:
    """Whether an error says that the disk, or one's share of it, is full.

    >>> is_full(OSError(28, "No space left on device")), is_full(OSError(5, "Input/output error"))
    (True, False)
    >>> is_full(Exception("I/O error: No space left on device (os error 28)"))
    True
    """
    numbers = [error.errno] if isinstance(error, OSError) else map(int, re.findall(r"\(os error (\d+)\)", str(error)))
    torch_writer = isinstance(error, RuntimeError) and is_write_error(error)  # it does not say why
    return torch_writer or any(number in FULL for number in numbers)


def reason(error: BaseException) -> str:
    """An error in its own words, without the path that a sentence names anyway.

    >>> reason(OSError(5, "Input/output error", "/content/drive/MyDrive/x"))
    'Input/output error'
    """
    return (isinstance(error, OSError) and error.strerror) or str(error) or type(error).__name__


def stayed(error: OSError) -> str:
    """An error in its own words, and how long it was tried again.

    >>> stayed(OSError(5, "Input/output error")), stayed(OSError(13, "Permission denied"))
    ('Input/output error, also after a minute of trying', 'Permission denied')
    """
    return reason(error) + (", also after a minute of trying" if error.errno in HICCUPS else "")


@contextmanager
def reached(folder: Path, unharmed: str) -> Iterator[None]:
    """Turn an OSError that stayed into a StorageError of one sentence. unharmed: what was left as it was."""
    try:
        yield
    except OSError as error:
        again = "mount Drive again" if "/drive/" in str(folder) else "see that it can be reached"
        raise StorageError(
            f"{folder} cannot be reached ({stayed(error)}): {unharmed}; {again} and run this once more"
        ) from error


@contextmanager
def room_on_disk(folder: Path, kept: str) -> Iterator[None]:
    """Turn whatever a library raises on a full disk into a StorageError of one sentence. kept: what need not be redone.

    Other errors pass.
    """
    try:
        yield
    except StorageError:
        raise
    except Exception as error:
        if not is_full(error):
            raise
        raise StorageError(
            f"{folder} could not be written ({reason(error)}; {free_bytes(folder) / GIB:.2f} GiB free): delete what is "
            f"not needed on that disk and run this once more; {kept}"
        ) from error


# ---- looking ---------------------------------------------------------------------------------------------------------


def mode(path: Path) -> int:
    """st_mode of what lies there, 0 for nothing. Unlike Path.is_file, an unreadable place is an OSError."""

    def ask() -> int:
        try:
            return Path(path).stat().st_mode
        except (FileNotFoundError, NotADirectoryError):
            return 0

    return patiently(ask)


def is_file(path: Path) -> bool:
    """Whether a file lies there."""
    return stat.S_ISREG(mode(path))


def is_folder(path: Path) -> bool:
    """Whether a folder lies there."""
    return stat.S_ISDIR(mode(path))


def names(folder: Path) -> list[str]:
    """What a folder holds, sorted; nothing when it is not there. Path.glob hides what it cannot read, this does not."""

    def ask() -> list[str]:
        try:
            return sorted(path.name for path in Path(folder).iterdir())
        except (FileNotFoundError, NotADirectoryError):
            return []

    return patiently(ask)


def files_under(folder: Path) -> list[Path]:
    """All files under a folder, links to files too."""
    found = []
    for name in names(folder):
        path, kind = folder / name, mode(folder / name)
        if stat.S_ISDIR(kind) and not path.is_symlink():
            found += files_under(path)
        elif stat.S_ISREG(kind):
            found.append(path)
    return found


def read_text(file: Path) -> str:
    """A file's text."""
    return patiently(lambda: file.read_text(encoding="utf-8"))


def size_bytes(folder: Path) -> int:
    """Bytes of all files under a folder."""
    return sum(patiently(file.stat).st_size for file in files_under(Path(folder)))


def checksum(file: Path) -> str:
    """SHA-256 of a file, read in pieces."""

    def ask() -> str:
        with file.open("rb") as stream:
            return hashlib.file_digest(stream, "sha256").hexdigest()

    return patiently(ask)


def checksums(files: list[Path]) -> list[str]:
    """SHA-256 of many files, two at a time: a free Colab has two cores."""
    with ThreadPoolExecutor(max_workers=2) as threads:
        return list(threads.map(checksum, files))


def existing(folder: Path) -> Path:
    """The folder, or the nearest one above it that is there."""
    return next(path for path in (folder, *folder.absolute().parents) if is_folder(path))


def free_bytes(folder: Path) -> int:
    """Free space where a folder lies, or would."""
    return patiently(lambda: shutil.disk_usage(existing(folder)).free)


# ---- writing ---------------------------------------------------------------------------------------------------------


def make_folder(folder: Path) -> Path:
    """Make a folder and those above it."""
    patiently(lambda: folder.mkdir(parents=True, exist_ok=True))
    return folder


def write_text(path: Path, text: str) -> Path:
    """Write a file so that a reader sees the old one or the new one, never a part."""
    unfinished = path.with_name(path.name + ".tmp")
    try:
        patiently(lambda: unfinished.write_text(text, encoding="utf-8"))
        return move(unfinished, path)
    except OSError:
        with suppress(OSError):
            unfinished.unlink(missing_ok=True)
        raise


def copy_verified(source: Path, target: Path, sha256: str) -> None:
    """Copy a file and read the copy back. Raises Torn when the source is not what it should be, OSError for the rest.

    A file that is there already and right is not copied again.
    """

    def copy() -> None:
        shutil.copyfile(source, target)
        if checksum(target) != sha256:
            if checksum(source) != sha256:
                raise Torn(f"{source} has another checksum than when it was written")
            raise OSError(errno.EIO, f"the copy of {source} reads back with another checksum")

    make_folder(target.parent)
    if not (is_file(target) and checksum(target) == sha256):
        patiently(copy)


def sync(path: Path) -> None:
    """Ask the operating system to put a file or a folder's entries on the disk; Drive's mount may not know how."""

    def ask() -> None:
        handle = os.open(path, os.O_RDONLY)
        try:
            os.fsync(handle)
        except OSError as error:
            if error.errno not in (errno.EINVAL, errno.ENOTSUP, errno.ENOSYS):
                raise
        finally:
            os.close(handle)

    patiently(ask)


def move(source: Path, target: Path) -> Path:
    """Rename, replacing a file. A rename that happened although it was answered with an error counts as done."""
    tries = 0

    def ask() -> None:
        nonlocal tries
        tries += 1
        try:
            source.replace(target)
        except FileNotFoundError:
            if tries == 1 or not mode(target):
                raise

    patiently(ask)
    return target


# ---- replacing and deleting ------------------------------------------------------------------------------------------


def with_suffix(path: Path, suffix: str) -> Path:
    """The same name with something appended, in the same folder."""
    return path.with_name(path.name + suffix)


def publish(new: Path, final: Path) -> None:
    """Give a whole folder its finished name; the one that had it is deleted after that, not before."""
    recover(final)
    if mode(final):
        move(final, with_suffix(final, FORMER))
    move(new, final)
    sync(final.parent)
    recover(final)


def recover(final: Path) -> None:
    """Finish what a kill inside `publish` or `remove` left: without a new folder, the former one has its name again."""
    former = with_suffix(final, FORMER)
    if mode(former) and not mode(final):
        move(former, final)
    for leftover in (former, with_suffix(final, DELETED), with_suffix(former, DELETED)):
        remove(leftover)


def remove(folder: Path) -> None:
    """Delete a folder that is certainly superseded; what cannot be deleted now is the next time.

    It is renamed before, so that a half-deleted one never looks like a whole one, or like one that was damaged. Files
    are emptied before they are unlinked: Google Drive moves what is deleted to its bin, where it goes on using the
    quota for 30 days (transformers#14922), and an empty file uses none of it.
    """
    going = folder if folder.name.endswith(DELETED) else with_suffix(folder, DELETED)
    with suppress(OSError):
        if mode(going):
            erase(going)  # a kill left it
        if going != folder and mode(folder):
            move(folder, going)
            erase(going)


def erase(folder: Path) -> None:
    """Empty and delete all files of a folder, and the folder. Raises the OSError that stays."""
    for name in names(folder):
        path = folder / name
        if is_folder(path) and not path.is_symlink():
            erase(path)
        else:
            empty(path)
            patiently(lambda path=path: path.unlink(missing_ok=True))
    erase_empty(folder)


def erase_empty(*folders: Path) -> None:
    """Delete those folders that hold nothing."""
    for folder in folders:
        with suppress(OSError):
            patiently(folder.rmdir)


def empty(file: Path) -> None:
    """Let a file that is about to be deleted use no space in Drive's bin; one with a second name keeps its bytes."""
    with suppress(OSError):
        if not file.is_symlink() and file.stat().st_nlink == 1:
            os.truncate(file, 0)


def set_aside(path: Path, why: str, say: Callable[[str], None] = print) -> Path:
    """Rename what is not understood, so that it is in nobody's way and nothing of it is lost; says so."""
    taken = set(names(path.parent))
    suffixes = (ASIDE, *(f"{ASIDE}-{number}" for number in range(2, len(taken) + 3)))
    aside = next(with_suffix(path, suffix) for suffix in suffixes if path.name + suffix not in taken)
    move(path, aside)
    say(f"{path} is not used: {why}. It is kept as {aside.name}; delete it when nothing in it is wanted")
    return aside
