"""The GPU of this process: which one it is, and giving its memory back whatever ends the work.

A call that fails or is stopped leaves its frames in the exception's traceback, and they hold a model, an optimizer and
activations, in their variables and in the closures that they ran; IPython keeps that traceback until the next error.
So the traceback becomes text, as multiprocessing does with one that comes from another process: the exception is the
same, and what it came through is its cause.

>>> class Model:
...     def __del__(self):
...         print("freed")
>>> @gives_back
... def work():
...     model = Model()
...     raise KeyboardInterrupt
>>> try:
...     work()
... except KeyboardInterrupt as stopped:  # still held here, as a notebook holds it
...     print("stopped in", str(stopped.__cause__).split()[-4])
freed
stopped in work
"""

import gc
import os
import sys
import traceback
from collections.abc import Callable, Iterator
from contextlib import suppress
from functools import wraps

ON_CPU = "RECIPES_WORKERS_ON_CPU"
"""Set to 1, processes that work at once do so on the CPU: to try several GPUs out without any, and for the tests."""


class CameThrough(Exception):
    """The traceback of its effect: as text what Python would have shown, and its entries without their frames."""

    def __init__(self, error: BaseException) -> None:
        super().__init__("\n\n" + "".join(traceback.format_exception(error)))
        self.entries = came_through(error)
        # Between an error and its own causes: who looks for those finds them, and none is shown a second time
        self.__context__, self.__suppress_context__ = error.__cause__ or error.__context__, True


def came_through(error: BaseException) -> list[traceback.FrameSummary]:
    """Files and lines that an error came through, the last one where it was raised, also where its frames are gone."""
    gone = error.__cause__.entries if isinstance(error.__cause__, CameThrough) else []
    return [*traceback.extract_tb(error.__traceback__), *gone]


def gives_back(work: Callable) -> Callable:
    """Decorate a function that brings a model to the GPU: when it ends, however it does, it has left none there.

    Exceptions pass on, caused by the text of their traceback; a debugger finds none of the frames below this one.
    """

    @wraps(work)
    def call(*arguments, **named):
        before = sys.exc_info()[1]  # what the caller is handling stays as it is
        try:
            return work(*arguments, **named)
        except BaseException as error:
            text = CameThrough(error)
            # Clearing the frames would not do: each holds its function, and that its closure, and one frame of the
            # Trainer's is a closure over the trainer. Frames hold those that called them too. So all of them go.
            for part in chain(error, before):
                part.__traceback__ = None
            error.__cause__ = text
            raise
        finally:
            free_memory()

    return call


def chain(error: BaseException, spared: BaseException | None) -> Iterator[BaseException]:
    """An exception and those that it was raised from, or while handling, but for one."""
    seen, waiting = {id(spared)}, [error]
    while waiting:
        found = waiting.pop()
        if found is None or id(found) in seen:
            continue
        seen.add(id(found))
        yield found
        waiting += [found.__cause__, found.__context__]


def free_memory() -> None:
    """Give back what nobody holds: dead cycles, PyTorch's cached GPU memory, and pinned host memory."""
    forget_frames()
    gc.collect()
    torch = sys.modules.get("torch")  # where nobody imported it there is nothing to free
    if torch is not None and torch.cuda.is_available() and torch.cuda.is_initialized():
        with suppress(RuntimeError):  # a broken context answers everything with its error, which is on its way already
            torch.cuda.empty_cache()
            # PyTorch keeps pinned blocks for the process; what gives them back has no public name yet
            getattr(torch._C, "_host_emptyCache", lambda: None)()


def forget_frames() -> None:
    """Take the tracebacks of errors that modules keep, most often of an optional import that failed.

    Their frames hold all that called them: GPTQModel keeps one of llama_cpp's, PEFT imports GPTQModel while it attaches
    a 16-bit adapter, and so the first model of a process was never let go. Your own variables, and Python's last error,
    keep theirs.
    """
    for name, module in list(sys.modules.items()):
        if name in ("__main__", "sys"):
            continue
        for value in list(getattr(module, "__dict__", {}).values()):
            if issubclass(type(value), Exception):  # isinstance would ask objects that warn, or import, when asked
                for part in chain(value, None):
                    part.__traceback__ = None


def seeing(cards: int = 1) -> dict[str, str]:
    """Environment for a process that is to see only the first so many of the GPUs that this one sees.

    Libraries take every card that they see (GPTQModel spreads a model, transformers' Trainer splits batches), and
    what a run needs is counted for one.

    >>> os.environ["CUDA_VISIBLE_DEVICES"] = "3,1"
    >>> seeing(), seeing(2)
    ({'CUDA_VISIBLE_DEVICES': '3'}, {'CUDA_VISIBLE_DEVICES': '3,1'})
    >>> del os.environ["CUDA_VISIBLE_DEVICES"]
    >>> seeing(2)
    {'CUDA_VISIBLE_DEVICES': '0,1'}
    """
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    names = [str(card) for card in range(cards)] if visible is None else visible.split(",")[:cards]
    return {"CUDA_VISIBLE_DEVICES": ",".join(names)}


def seeing_one(card: int) -> dict[str, str]:
    """Environment for a process that is to see one of the GPUs that this one sees; of fewer, the last.

    >>> seeing_one(2)
    {'CUDA_VISIBLE_DEVICES': '2'}
    """
    return {"CUDA_VISIBLE_DEVICES": seeing(card + 1)["CUDA_VISIBLE_DEVICES"].split(",")[-1]}


def on_cpu() -> bool:
    """Whether processes that work at once do so on the CPU, whatever GPUs there are."""
    return os.environ.get(ON_CPU) == "1"


def of_worker(number: int, count: int) -> dict[str, str]:
    """Environment for one of several processes that work at once: one GPU of its own, or its share of the cores.

    Its GPU is the only one that it sees, and so GPU 0, from its first import on: imports alone make CUDA look.
    """
    if not on_cpu():
        return seeing_one(number)
    cores = max(1, (os.cpu_count() or 1) // count)
    return {"CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": str(cores)}


def is_first() -> bool:
    """Whether this process speaks for all that were started together, by a launcher's environment variables."""
    return int(os.environ.get("RANK", 0)) == 0


def claim_card() -> None:
    """Where a launcher started several processes on this machine, have this one see its own card alone, as card 0.

    So all that says "the GPU" means the right one, and no process makes a CUDA context on another's. To be called
    before CUDA is used.

    >>> os.environ |= {"WORLD_SIZE": "4", "LOCAL_RANK": "1", "CUDA_VISIBLE_DEVICES": "3,2"}
    >>> claim_card()
    >>> os.environ["CUDA_VISIBLE_DEVICES"], os.environ["LOCAL_RANK"]
    ('2', '0')
    >>> for name in ("WORLD_SIZE", "LOCAL_RANK", "CUDA_VISIBLE_DEVICES"):
    ...     del os.environ[name]
    """
    if int(os.environ.get("WORLD_SIZE", 1)) == 1 or "LOCAL_RANK" not in os.environ:
        return
    os.environ |= seeing_one(int(os.environ["LOCAL_RANK"])) | {"LOCAL_RANK": "0"}
