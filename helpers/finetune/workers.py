"""Several GPUs: a worker process each, started, followed and ended here; and what such a worker does.

    measured = launch(config, prepared, output, resume, gpus=2)

The process that starts them trains nothing and uses no GPU. It shows what rank 0 reports (progress, prints, the
result) as if that ran here, in a terminal as in a notebook, and raises a worker's error as its own. One that dies ends
the others; when the launcher itself is gone, its workers finish the step, save and end, within eight seconds. Ctrl-C, a
notebook's stop button or SIGTERM let the step finish and save; twice is at once.

torchrun's workers outlive a killed agent, accelerate's notebook launcher forks a process that has imported what must
not be forked: so a worker here is a plain new process with a job (jobs.py). Where torchrun, accelerate launch or Slurm
have started several processes already, they join as they are (ranks.py).
"""

import os
import queue
import shutil
import signal
import subprocess
import sys
import time
import traceback
from collections.abc import Callable
from contextlib import redirect_stdout, suppress
from dataclasses import asdict, dataclass, field
from multiprocessing.pool import RemoteTraceback
from pathlib import Path
from tempfile import TemporaryDirectory
from types import SimpleNamespace
from typing import Any

import torch

from helpers import budget, jobs, workspace
from helpers.budget import sharding
from helpers.config import RunConfig, from_tree
from helpers.finetune import ranks, zero
from helpers.finetune.watch import NotTrained, interrupts
from helpers.models import gpu
from helpers.show import live
from helpers.workspace import DamagedArtifact, MissingArtifact, StaleArtifact, StorageError
from helpers.workspace.checkpoints import ChangedRun

GRACE_S = 3.0
"""After the first worker failed, the others, which wait for it, get so long to say something themselves."""
ORPHAN_S = 8
"""A worker whose launcher is gone ends after so many seconds, whatever it does."""
KNOWN = {
    kind.__name__: kind
    for kind in (
        *(ValueError, StorageError, KeyboardInterrupt, NotTrained, budget.DoesNotFit, ChangedRun),
        *(MissingArtifact, DamagedArtifact, StaleArtifact),
    )
}
"""Errors that are raised here as in the worker: their message is a sentence for whoever started the training."""


class WorkerLost(StorageError):
    """A worker ended early, for want of memory or killed; the message is a sentence."""


def refuse(config: RunConfig) -> None:
    """Raise ValueError for a way of using several GPUs that there is not, before anything is loaded."""
    sharding.refuse(config)
    zero.refuse(config)


def count(config: RunConfig) -> int:
    """How many workers to start: 1 where one process trains, or this one was started with others already.

    Raises ValueError for more GPUs than there are, or than a step has sequences.
    """
    asked, there = config.train.gpus, torch.cuda.device_count()
    if ranks.expected() > 1:
        return 1
    if asked == "all":
        asked = max(there, 1)
    if asked == 1:
        return 1
    if not gpu.on_cpu() and asked > there:
        seen = f"{there} GPU{'s' if there > 1 else ''}" if there else "no GPU"
        remedy = f"choose at most {there}, or all" if there else "leave gpus out, and one process trains on the CPU"
        raise ValueError(f"gpus={asked}, and PyTorch sees {seen} here: {remedy}")
    sequences = config.train.batch_size * config.train.accumulation
    if sequences < asked:
        raise ValueError(
            f"a step has {sequences} sequence{'s' * (sequences > 1)} (batch_size × accumulation), too few for {asked} "
            f"GPUs to share: set accumulation={-(-asked // config.train.batch_size)}, or gpus={sequences}"
        )
    return asked


@dataclass
class Worker:
    """One rank's process, as its launcher sees it."""

    rank: int
    process: subprocess.Popen
    log: Path
    """Its standard error."""
    failure: dict[str, Any] | None = field(default=None)
    killed: bool = False
    """Ended by the launcher."""


def launch(config: RunConfig, prepared: Path, output: Path, resume: str, gpus: int) -> dict[str, Any]:
    """Train in a process a GPU; returns what rank 0 measured. Raises what one raised, WorkerLost for a dead one.

    Frees this process's own GPU memory first. Leaves no process behind, whatever happens.
    """
    gpu.free_memory()
    # The store by which ranks find each other lies here, on a port that is free because it is held already.
    store = torch.distributed.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    job = {"config": asdict(config), "prepared": str(prepared), "output": str(output), "resume": resume}
    workers: list[Worker] = []
    with TemporaryDirectory(prefix="workers-") as logs:
        try:
            for rank in range(gpus):
                workers.append(started(rank, gpus, store.port, Path(logs), job))
            return followed(workers, workspace.beside(output, "partial"))
        finally:
            for worker in workers:
                kill(worker)
                worker.process.wait()


def started(rank: int, gpus: int, port: int, logs: Path, job: dict[str, Any]) -> Worker:
    """A worker's process with its job."""
    environment = {
        **gpu.of_worker(rank, gpus),
        **{"RANK": str(rank), "WORLD_SIZE": str(gpus), "LOCAL_RANK": "0", "LOCAL_WORLD_SIZE": str(gpus)},
        **{"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)},
        # torch.distributed's word for: the store is there, be its client
        **{"TORCHELASTIC_USE_AGENT_STORE": "True", "TORCHELASTIC_RESTART_COUNT": "0"},
        "GLOO_SOCKET_IFNAME": "lo" if sys.platform == "linux" else "lo0",  # the machine's name may lead nowhere
    }
    log = logs / f"{rank}.log"
    # Of a session of its own: a Ctrl-C of the terminal reaches the launcher alone, which passes it on
    return Worker(rank, jobs.start("helpers.finetune", job, log, environment, start_new_session=True), log)


def followed(workers: list[Worker], work: Path) -> dict[str, Any]:
    """Show what workers report until all have ended; returns rank 0's result. Raises the first failure.

    work: the folder that the stage works in, where the log of one that died is kept.
    """
    messages: queue.Queue = queue.Queue()
    for worker in workers:
        jobs.hear(worker, messages)
    shown, stop = Shown(), SimpleNamespace(interrupted=None)
    failed: list[Worker] = []
    ended, deadline, passed_on = 0, None, False
    with interrupts(stop):
        while ended < len(workers):
            if stop.interrupted is not None and not passed_on:
                passed_on = True
                for worker in workers:
                    with suppress(ProcessLookupError):
                        worker.process.terminate()
            if deadline is not None and time.monotonic() > deadline:
                for worker in workers:
                    kill(worker)
            with suppress(queue.Empty):
                worker, message = messages.get(timeout=0.1)
                shown.take(message or {})
                ended += message is None
                if message is None and worker.process.returncode and not worker.failure and not worker.killed:
                    message = {"died": worker.process.returncode, "said": ""}
                if message and ("error" in message or "died" in message):
                    worker.failure = message
                    failed.append(worker)
                    deadline = deadline or time.monotonic() + GRACE_S
    if stop.interrupted is not None and failed:
        said = [worker.failure["text"] for worker in failed if worker.failure.get("error") == "KeyboardInterrupt"]
        raise KeyboardInterrupt(next(filter(None, said), "stopped"))
    if failed:
        # Who waits for a killed process fails too, and may be heard first.
        raise error_of(min(failed, key=lambda worker: worker.failure.get("died", 0)), len(workers), work)
    return shown.result


def kill(worker: Worker) -> None:
    """End a worker that still runs, at once."""
    if worker.process.poll() is None:
        worker.killed = True
        worker.process.kill()


class Shown:
    """What is made of rank 0's messages: prints, progress in the form that fits this process, the result."""

    def __init__(self) -> None:
        self.progress: live.Progress | None = None
        self.result: dict[str, Any] = {}

    def take(self, message: dict[str, Any]) -> None:
        """One message."""
        if "said" in message:
            print(message["said"], end="", flush=True)
        if "begin" in message:
            self.progress = live.begin(*message["begin"])
        if "call" in message and self.progress is not None:
            getattr(self.progress, message["call"])(*message["with"])
        self.result = message.get("result", self.result)


def error_of(worker: Worker, count: int, work: Path) -> BaseException:
    """A worker's failure as the error that is raised in its place; work: where the log of one that died is kept."""
    name, failure = f"GPU {worker.rank} of {count}", worker.failure
    if "died" in failure:
        how, why = jobs.how_it_ended(failure["died"], worker.log)
        return WorkerLost(
            f"the process of {name} ended with {how}{', ' * bool(why)}{why}: all have been ended; the newest "
            f"checkpoint is kept, and the same command goes on from it{kept_log(worker, work)}"
        )
    if failure["error"] in KNOWN:
        return KNOWN[failure["error"]](failure["text"])
    if "out of memory" in failure["text"]:
        what = ". ".join(failure["text"].split(". ")[:2])
        return WorkerLost(
            f"{name} ran out of memory ({what}): end what else uses it (nvidia-smi shows that), or set "
            "checkpointing=all or a shorter seq_len; checkpoints are kept"
        )
    error = RuntimeError(f"{name}: {failure['error']}: {failure['text']}")
    error.__cause__ = RemoteTraceback(failure["trace"])
    return error


def kept_log(worker: Worker, work: Path) -> str:
    """Keep a dead worker's log in the folder of the stage until that goes on; says where, as the end of a sentence."""
    if not work.is_dir() or not worker.log.stat().st_size:
        return ""
    return f"; its log is {shutil.copy(worker.log, work / f'gpu-{worker.rank}.log')}"


# ---- in a worker -----------------------------------------------------------------------------------------------------


def main() -> None:
    """Do the job."""
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    job, report = jobs.received(when_alone=save_and_end)
    status = 0
    try:
        from helpers import finetune

        config = from_tree(job["config"])
        first = int(os.environ["RANK"]) == 0
        with redirect_stdout(jobs.Said(report) if first else sys.stderr):
            measured = finetune.finetune(
                config, Path(job["prepared"]), Path(job["output"]), job["resume"], begin=relay(report)
            )
        if first:
            report({"result": measured})
    except BaseException as error:
        trace = "".join(traceback.format_exception(error))
        report({"error": kind_of(error), "text": str(error), "trace": trace})
        status = 1
    jobs.end(status)  # libraries wait for peers that may be gone


def kind_of(error: BaseException) -> str:
    """The name by which the launcher knows an error: its own, or that of the nearest kind in KNOWN.

    >>> kind_of(UnicodeError()), kind_of(ZeroDivisionError())
    ('ValueError', 'ZeroDivisionError')
    """
    names = [kind.__name__ for kind in type(error).__mro__]
    return next((name for name in names if name in KNOWN), names[0])


def save_and_end() -> None:
    """The launcher is gone: ask for a checkpoint, and end in ORPHAN_S in any case."""
    signal.alarm(ORPHAN_S)  # the kernel's, whatever holds Python's lock by then
    os.kill(os.getpid(), signal.SIGTERM)


def relay(report: jobs.Report) -> Callable[..., Any]:
    """`live.begin` for a worker: the figure or the bar is the launcher's."""

    def begin(total_steps: int, limit_gib: float | None = None, history: Any = ()) -> SimpleNamespace:
        report({"begin": [total_steps, limit_gib, list(history)]})

        def call(name: str) -> Callable[..., None]:
            return lambda *values: report({"call": name, "with": values})

        return SimpleNamespace(step=call("step"), heldout=call("heldout"), close=call("close"))

    return begin
