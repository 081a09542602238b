"""A process that is killed at a counted moment: what it did until then is what a machine that went away leaves."""

import os
import re
import signal
import sys
import traceback
from collections.abc import Callable
from pathlib import Path

import faults


def is_killed(act: Callable[[], object], folder: Path, moment: int, **options) -> bool:
    """Do something in a fork that is killed at its so-manieth change under a folder; False when it has fewer.

    options: of `faults.injecting`, which says what counts as a change.
    """
    process = os.fork()
    if not process:
        try:
            # A fork has no thread but one: PyTorch's pool, once the parent has started it, would wait for the others.
            if "torch" in sys.modules:
                sys.modules["torch"].set_num_threads(1)
            with faults.injecting(folder, kill_at=moment, **options):
                act()
            os._exit(0)
        except BaseException:
            traceback.print_exc(file=sys.__stderr__)
            os._exit(1)
    _, status = os.waitpid(process, 0)
    if os.WIFSIGNALED(status):
        assert os.WTERMSIG(status) == signal.SIGKILL
        return True
    assert status == 0
    return False


def each_kind(moments: list[faults.Event]) -> list[faults.Event]:
    """Of the moments of a whole run: each operation on each kind of name, numbers aside, at its first and its last.

    For work that is too long to be killed at every moment.
    """
    kinds: dict[tuple[str, str], list[faults.Event]] = {}
    for moment in moments:
        kinds.setdefault((moment.operation, re.sub(r"\d+", "", moment.path)), []).append(moment)
    return sorted({moment for found in kinds.values() for moment in (found[0], found[-1])}, key=lambda one: one.value)
