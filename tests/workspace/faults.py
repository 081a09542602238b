"""Faults of a mounted Drive, and blows at counted moments, for any process of this project.

A shim in C (faults.c) stands between a process and the C library, so that what Python, PyTorch and Rust's readers do
under one folder can fail as a mounted Drive fails: "Input/output error" or "Transport endpoint is not connected".

    subprocess.run(command, env=os.environ | faults.environment(drive, seed=1, log=log))  # and its children
    with faults.injecting(drive, seed=1, log=log): ...  # this process, and what it forks
    assert faults.injected(log)  # [Event(pid, "fault", 5, "read", path)]

seed: of the first tries of each (operation, path) a quarter fail, the same ones for the same seed; a kind of operations
(read, write, rename, unlink, mkdir) fails at most once a path and process, so whoever tries again gets through. A
write that fails leaves half of its bytes. Links fail, as Drive has none.
broken: these operations or kinds always fail; "all" for all. broken_from: from that counted moment on.
kill_at, raise_at: `kill -9`, or an error, at the n-th counted moment, before it takes place (half a write does).
counted: operations that count, of those that change something; match: only under names like this pattern, relative to
the folder ("*" goes through slashes). `len(faults.moments(log))` says how many a run has.

Not reached: bytes that are read through a memory map once it stands, and the C library's own files (`fread`), whose
opening is reached. In `injecting`, neither are libraries that are loaded inside of the block: import them before.
"""

import ctypes
import hashlib
import os
import shutil
import subprocess
import tempfile
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

import pytest

SOURCE = Path(__file__).with_name("faults.c")
CHANGES = "create,write,truncate,fsync,rename,unlink,mkdir"
OPERATIONS = ("stat", "open", "read", "list", "map", "close", "touch", "link", *CHANGES.split(","))


class Event(NamedTuple):
    """One line of the log: a `fault` with its errno, a counted `moment` with its number, or the `kill`."""

    pid: int
    what: str
    value: int
    operation: str
    path: str


def settings(
    folder: Path,
    seed: int | None = None,
    share: float = 0.25,
    broken: str = "",
    broken_from: int = 0,
    kill_at: int = 0,
    raise_at: int = 0,
    errno: int = 0,
    counted: str = CHANGES,
    match: str = "*",
    log: Path | None = None,
) -> list[str]:
    """The shim's settings in its order. errno: the one error that all faults have; 0: EIO or ENOTCONN.

    Nothing of `broken` fails where it is empty; `seed=None` fails nothing at random.
    """
    assert set(counted.split(",")) <= set(OPERATIONS), counted
    numbers = [broken_from, kill_at, raise_at, errno]
    place = str(log.resolve()) if log else ""
    chance = [str(-1 if seed is None else seed), str(share)]
    return [str(Path(folder).resolve()), *chance, broken, *map(str, numbers), counted, match, place]


def environment(folder: Path, **options) -> dict[str, str]:
    """What to add to a process's environment; its children inherit it and count for themselves. See `settings`."""
    return {"LD_PRELOAD": str(library()), "RECIPES_FAULTS": "\n".join(settings(folder, **options))}


@contextmanager
def injecting(folder: Path, **options) -> Iterator[None]:
    """Faults in this process and in what it forks, until the block ends. See `settings`."""
    shim = ctypes.CDLL(str(library()))
    shim.faults_patch()
    arm(shim, settings(folder, **options))
    try:
        yield
    finally:
        shim.faults_arm(b"", -1, ctypes.c_double(0), b"", 0, 0, 0, 0, b"", b"", b"")


def arm(shim: ctypes.CDLL, options: list[str]) -> None:
    """Set the shim of this process; its count of moments begins anew."""
    folder, seed, share, broken, *numbers, counted, match, log = options
    words = [text.encode() for text in (counted, match, log)]
    whole = [ctypes.c_long(int(number)) for number in numbers]
    chance = ctypes.c_long(int(seed)), ctypes.c_double(float(share))
    shim.faults_arm(folder.encode(), *chance, broken.encode(), *whole, *words)


def library() -> Path:
    """The shim, built once for its source; skips the test where it cannot be."""
    compiler = next(filter(None, map(shutil.which, ("cc", "gcc", "clang"))), None)
    if compiler is None or os.uname().sysname != "Linux":
        pytest.skip("faults are injected by a shim in C: Linux and a C compiler (apt-get install gcc) build it")
    digest = hashlib.sha256(SOURCE.read_bytes()).hexdigest()[:16]
    built = Path(tempfile.gettempdir()) / f"recipes-faults-{os.getuid()}-{digest}.so"
    if not built.is_file():
        unfinished = built.with_suffix(f".{os.getpid()}.{threading.get_ident()}")
        command = [
            compiler,
            "-O1",
            "-w",
            "-shared",
            "-fPIC",
            "-pthread",
            "-Wl,-Bsymbolic",
            "-o",
            str(unfinished),
            str(SOURCE),
            "-ldl",
        ]
        subprocess.run(command, check=True)
        unfinished.replace(built)
    return built


def events(log: Path) -> list[Event]:
    """All that was written down, in order."""
    if not log.is_file():
        return []
    rows = [line.split("\t") for line in log.read_text(encoding="utf-8").splitlines()]
    return [Event(int(pid), what, int(value), operation, path) for pid, what, value, operation, path in rows]


def injected(log: Path) -> list[Event]:
    """The faults."""
    return [event for event in events(log) if event.what == "fault"]


def moments(log: Path) -> list[Event]:
    """The counted moments."""
    return [event for event in events(log) if event.what == "moment"]
