"""On PYTHONPATH, a worker does something at the end of a step: AT_A_STEP="RANK STEP WHAT", for tests.

WHAT: "die" kills this process, "orphan" its launcher, both with -9; "interrupt" asks the launcher to stop; "out of
memory" raises what PyTorch raises. Every worker leaves a file named after its process id in AT_A_STEP_PIDS.
"""

import importlib.abc
import importlib.util
import os
import signal
import sys
from pathlib import Path


class Hook(importlib.abc.MetaPathFinder):
    """Changes helpers.finetune.watch when it is imported, in workers alone."""

    def find_spec(self, name, path, target=None):
        if name != "helpers.finetune.watch":
            return None
        sys.meta_path.remove(self)
        spec = importlib.util.find_spec(name)
        load = spec.loader.exec_module

        def exec_module(module):
            load(module)
            change(module.Watch)

        spec.loader.exec_module = exec_module
        return spec


def change(watch) -> None:
    on_step_end = watch.on_step_end
    rank, step, what = os.environ["AT_A_STEP"].split(" ", 2)

    def at_a_step(self, args, state, control, **kwargs):
        result = on_step_end(self, args, state, control, **kwargs)
        if os.environ["RANK"] == rank and state.global_step == int(step):
            act(what)
        return result

    watch.on_step_end = at_a_step


def act(what: str) -> None:
    if what == "out of memory":
        import torch

        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB. GPU 0 has 14.56 GiB. Of those")
    target, number = {
        "die": (os.getpid(), signal.SIGKILL),
        "orphan": (os.getppid(), signal.SIGKILL),
        "interrupt": (os.getppid(), signal.SIGTERM),
    }[what]
    os.kill(target, number)


if "AT_A_STEP" in os.environ and "RANK" in os.environ:
    (Path(os.environ["AT_A_STEP_PIDS"]) / str(os.getpid())).touch()
    sys.meta_path.insert(0, Hook())
