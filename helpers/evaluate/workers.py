"""Several GPUs: models evaluated at once, a process and a GPU each, and the figures of one after the other.

    for name, why in at_once(tasks, gpus=2, ram_gib=30.0): ...      # "", or why there are no figures

A process takes one model and ends, so that the next one finds the GPU and the host as empty as the first. A model
waits while the host's memory is short beside those that are open. One that fails leaves the others alone.
"""

import pickle
import queue
import traceback
from collections.abc import Callable, Iterator
from contextlib import ExitStack, redirect_stdout
from dataclasses import dataclass, replace
from pathlib import Path
from subprocess import Popen
from tempfile import TemporaryDirectory
from types import SimpleNamespace
from typing import Any

from helpers import hardware, jobs
from helpers.config import RunConfig
from helpers.evaluate import kept
from helpers.hardware import Host
from helpers.models import gpu
from helpers.show import bars

OUT_OF_MEMORY = "out of memory"


@dataclass(frozen=True)
class Task:
    """One model to evaluate."""

    name: str
    title: str
    """Of its bar."""
    steps: int
    """Of its bar: texts and questions."""
    ram_gib: float
    """Host memory that it takes."""
    file: Path
    """Where its figures are kept (kept.py)."""
    arguments: dict[str, Any]
    """What `evaluate.evaluate_one` is called with, but for the bar; and `host`, what was free before any was opened."""


@dataclass
class Worker:
    """The process that evaluates a task."""

    task: Task
    gpu: int
    process: Popen
    files: Path
    """Its job and its log: this path with a suffix each."""
    bar: Any
    failure: str = ""


def count(config: RunConfig, models: int) -> int:
    """How many models are evaluated at once: as many as GPUs are asked for, are there, and have something to do.

    Fewer than asked for is said, not refused: a run that was trained on two GPUs is evaluated on one as well. Raises
    ValueError for GPUs of different kinds, whose figures could not be compared.
    """
    import torch

    asked, there = config.train.gpus, torch.cuda.device_count()
    if gpu.on_cpu():
        there = 1 if asked == "all" else asked
    asked = there if asked == "all" else asked
    if asked > max(there, 1):
        seen = f"{there} GPU{'s' * (there > 1)}" if there else "no GPU"
        print(f"gpus={asked}, and PyTorch sees {seen} here: as many models are evaluated at once as there are GPUs.")
    several = min(asked, there, models)
    names = [torch.cuda.get_device_name(card) for card in range(several)] if several > 1 and not gpu.on_cpu() else []
    other = next((card for card, name in enumerate(names) if name != names[0]), None)
    if other is not None:
        raise ValueError(
            f"GPU 0 is a {names[0]} and GPU {other} a {names[other]}, whose figures cannot be compared: set gpus=1, or "
            "choose GPUs of one kind with CUDA_VISIBLE_DEVICES"
        )
    return max(several, 1)


def at_once(tasks: list[Task], gpus: int, ram_gib: float) -> Iterator[tuple[str, str]]:
    """Each task's name when it has ended, with "" or why it has no figures; ram_gib: of the host, free.

    Leaves no process behind, whatever happens.
    """
    gpu.free_memory()
    waiting, running, said = list(tasks), [], set()
    messages: queue.Queue = queue.Queue()
    with TemporaryDirectory(prefix="evaluation-") as folder, ExitStack() as ended:
        while waiting or running:
            while (task := next_one(waiting, running, gpus, ram_gib)) is not None:
                waiting.remove(task)
                free = next(card for card in range(gpus) if card not in {worker.gpu for worker in running})
                files = Path(folder) / str(len(tasks) - len(waiting) - 1)
                running.append(started(task, free, gpus, files, ended))
                jobs.hear(running[-1], messages)
            if waiting and len(running) < gpus and waiting[0].name not in said:
                said.add(waiting[0].name)
                print(f"{waiting[0].name} waits: {waiting[0].ram_gib:.1f} GiB of RAM are not free beside what is open.")
            worker, message = messages.get()
            if message is not None:
                show(worker, message)
                continue
            running.remove(worker)
            worker.bar.close()
            yield worker.task.name, outcome(worker)


def next_one(waiting: list[Task], running: list[Worker], gpus: int, ram_gib: float) -> Task | None:
    """The first task that finds a GPU and room in the host's memory; of none that runs, the first in any case."""
    left_gib = ram_gib - sum(worker.task.ram_gib for worker in running)
    fitting = [task for task in waiting if task.ram_gib <= left_gib or not running]
    return fitting[0] if fitting and len(running) < gpus else None


def started(task: Task, card: int, gpus: int, files: Path, ended: ExitStack) -> Worker:
    """A task's process, which is killed and buried when `ended` closes."""
    job = {"arguments": str(files.with_suffix(".job")), "file": str(task.file)}
    Path(job["arguments"]).write_bytes(pickle.dumps(task.arguments))
    environment, log = gpu.of_worker(card, gpus), files.with_suffix(".log")
    # Of a session of its own: a Ctrl-C of the terminal reaches this process alone, which ends them
    process = jobs.start("helpers.evaluate", job, log, environment, start_new_session=True)
    ended.callback(process.wait)
    ended.callback(process.kill)
    return Worker(task, card, process, files, ended.enter_context(bars.bar(task.title, task.steps)))


def show(worker: Worker, message: jobs.Message) -> None:
    """What a worker reports: words, and how far it is; its failure is kept."""
    if "said" in message:
        worker.bar.write(message["said"], end="")
    if "read" in message:
        worker.bar.update(message["read"])
    if "doing" in message:
        worker.bar.set_postfix_str(message["doing"])
    worker.failure = message.get("failed", worker.failure)


def outcome(worker: Worker) -> str:
    """Why an ended worker left no figures; "" when it did."""
    if worker.failure or not worker.process.returncode:
        return worker.failure
    how, why = jobs.how_it_ended(worker.process.returncode, worker.files.with_suffix(".log"))
    return f"its process ended with {how}{', ' * bool(why)}{why}"


def in_words(error: Exception) -> str:
    """Why a model has no figures, in one sentence, for the table.

    >>> in_words(ValueError("the loss is not a number")), in_words(KeyError("x"))
    ('the loss is not a number', "KeyError: 'x'")
    """
    text = str(error).strip()
    if OUT_OF_MEMORY in text:
        return (
            f"it ran out of memory ({'. '.join(text.split('. ')[:2])}): set a smaller eval_batch_size or eval_context"
        )
    return text if isinstance(error, ValueError) else f"{type(error).__name__}: {text.partition(chr(10))[0]}"


def came_from(error: Exception) -> str:
    """Where an error comes from, for who mends this project; "" of what its reader can mend."""
    mended = isinstance(error, ValueError) or OUT_OF_MEMORY in str(error)
    return "" if mended else "".join(traceback.format_exception(error))


# ---- in a worker -----------------------------------------------------------------------------------------------------


def main(evaluate_one: Callable[..., tuple[dict[str, Any], Any]]) -> None:
    """Do the job."""
    jobs.die_with_parent()
    job, report = jobs.received(when_alone=jobs.end)
    bar = SimpleNamespace(
        update=lambda items=1: report({"read": items}), set_postfix_str=lambda text: report({"doing": text})
    )
    try:
        with redirect_stdout(jobs.Said(report)):
            arguments = pickle.loads(Path(job["arguments"]).read_bytes())
            host = arguments.pop("host")
            arguments["machine"] = arguments["machine"] or on_this_gpu(host)
            kept.write(Path(job["file"]), *evaluate_one(**arguments, bar=bar))
    except Exception as error:
        report({"said": came_from(error), "failed": in_words(error)})
    jobs.end(0)


def on_this_gpu(host: Host) -> hardware.Machine:
    """This process's GPU, in the host as it was before others opened models there, whose share is counted already."""
    return replace(hardware.probe(), host=host)
