"""A job for a process of its own: it goes in as one line of JSON, and messages come back as lines of JSON. No torch.

    process = start("helpers.quantize", job, log)           # here
    for message in messages(process): ...

    job, report = received(when_alone=end)                  # there, in helpers/quantize/__main__.py
    report({"said": "done"})

Never a fork: libraries that have started threads or used CUDA do not survive one. What such a process prints goes to
its log. Who started it holds its standard input open, so that the end of that tells it that nobody waits any more.
"""

import ctypes
import json
import os
import queue
import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import suppress
from io import TextIOBase
from pathlib import Path
from types import MappingProxyType
from typing import Any

from helpers.profiles import ROOT

Message = dict[str, Any]
Report = Callable[[Message], None]
PR_SET_PDEATHSIG = 1
"""Linux's prctl(2): the signal that a process gets when its parent is gone."""


def start(
    module: str, job: Message, log: Path, environment: Mapping[str, str] = MappingProxyType({}), **how: Any
) -> subprocess.Popen:
    """Start `python -m module` and hand it its job; how: Popen's, such as the folder that it stands in.

    It may be dead before it has read that: then there are no messages, and its status and its log say why.
    """
    # Wherever it stands, it must find this project from there
    paths = {"PYTHONPATH": os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))}
    with log.open("ab") as stream:
        process = subprocess.Popen(
            [sys.executable, "-m", module],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=stream,
            env=os.environ | paths | environment,
            text=True,
            encoding="utf-8",
            **how,
        )
    try:
        process.stdin.write(json.dumps(job, default=str) + "\n")
        process.stdin.flush()
    except BrokenPipeError:
        with suppress(BrokenPipeError):  # what it did not read is still there to be written
            process.stdin.close()
    return process


def messages(process: subprocess.Popen) -> Iterator[Message]:
    """What a process reports, until it ends."""
    for line in process.stdout:
        try:
            message = json.loads(line)
        except ValueError:  # cut off by its death
            continue
        yield message


def hear(worker: Any, into: queue.Queue) -> None:
    """Have a thread put (worker, message) into a queue for all that `worker.process` reports, and None at its end."""

    def listen() -> None:
        for message in messages(worker.process):
            into.put((worker, message))
        worker.process.wait()
        into.put((worker, None))

    threading.Thread(target=listen, daemon=True).start()


def how_it_ended(status: int, log: Path) -> tuple[str, str]:
    """A process's end in words, and why, as far as that is known: its last error, or that it was killed.

    >>> how_it_ended(-9, Path("/dev/null"))
    ('signal 9', 'most often because host memory ran out')
    """
    if status == -signal.SIGKILL:
        return f"signal {-status}", "most often because host memory ran out"
    lines = [line.strip() for line in log.read_text(encoding="utf-8", errors="replace").splitlines()]
    wrong = [line for line in lines if "rror" in line] or [line for line in lines if line] or [""]
    return (f"signal {-status}" if status < 0 else f"status {status}"), wrong[-1]


# ---- in the process of its own ---------------------------------------------------------------------------------------


def received(when_alone: Callable[[], None]) -> tuple[Message, Report]:
    """The job, and what reports to who gave it; when_alone: called, in a thread, when that one is gone."""
    # Libraries print where they like: messages keep the pipe under another number, and 1 becomes the log
    channel = os.fdopen(os.dup(1), "w", buffering=1, encoding="utf-8")
    os.dup2(2, 1)
    line = sys.stdin.readline()
    if not line:
        os._exit(1)

    def report(message: Message) -> None:
        with suppress(OSError):  # that nobody listens is `when_alone`'s concern
            channel.write(json.dumps(message, default=str) + "\n")

    def watch() -> None:
        os.read(0, 1)
        when_alone()

    threading.Thread(target=watch, daemon=True).start()
    return json.loads(line), report


def die_with_parent() -> None:
    """On Linux have the kernel end this process when its parent ends, whatever it is busy with by then.

    To be called first. Elsewhere, and where the parent is gone already, `end` does it, as `received`'s when_alone: a
    library that holds Python's lock for minutes delays that until then.
    """
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)


def end(status: int = 1) -> None:
    """End at once: pools and peers that libraries would wait for are of no use any more."""
    sys.stderr.flush()
    os._exit(status)


class Said(TextIOBase):
    """A text stream whose text goes to who gave the job."""

    def __init__(self, report: Report) -> None:
        self.report = report

    def write(self, text: str) -> int:
        """Send it."""
        self.report({"said": text})
        return len(text)
