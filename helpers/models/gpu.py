"""The GPU of this process: which one it is, and giving its memory back whatever ends the work.

A call that fails or is stopped leaves its frames in the exception's traceback, and they hold a model, an optimizer and
activations, in their variables and in the closures that they ran; IPython keeps that traceback until the next error.

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
...     print("stopped in", traceback.extract_tb(stopped.__traceback__)[-1].name)
freed
stopped in work
"""

import ast
import gc
import os
import sys
import traceback
from collections.abc import Callable, Iterator
from contextlib import suppress
from functools import wraps
from types import TracebackType


def gives_back(work: Callable) -> Callable:
    """Decorate a function that brings a model to the GPU: when it ends, however it does, it has left none there.

    Exceptions pass on with the same text, files and lines in their traceback, but frames that hold nothing, so a
    debugger finds no variables in them.
    """

    @wraps(work)
    def call(*arguments, **named):
        before = sys.exc_info()[1]  # what the caller is handling stays as it is
        try:
            return work(*arguments, **named)
        except BaseException as error:
            for part in chain(error, before):
                part.__traceback__ = without_variables(traceback.extract_tb(part.__traceback__))
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


def without_variables(entries: traceback.StackSummary) -> TracebackType | None:
    """A traceback that reads as the given one; only names and numbers go in, for its frames refer back to this one."""
    made = None
    for entry in reversed(entries):
        stand_in = empty_frame(entry)
        made = TracebackType(made, stand_in.tb_frame, stand_in.tb_lasti, stand_in.tb_lineno)
    return made


def empty_frame(entry: traceback.FrameSummary) -> TracebackType:
    """The traceback of code that has no variables and stops under an entry's name, at its line of its file."""
    tree, line = ast.parse("raise StopIteration"), entry.lineno or 1
    for node in ast.walk(tree):  # at its columns too, which Python underlines and IPython looks for
        node.lineno, node.end_lineno = line, entry.end_lineno or line
        node.col_offset, node.end_col_offset = entry.colno or 0, entry.end_colno or 0
    code = compile(tree, entry.filename, "exec").replace(co_name=entry.name, co_qualname=entry.name)
    try:
        exec(code, {"__name__": entry.name})
    except StopIteration as stopped:
        return stopped.__traceback__.tb_next


def free_memory() -> None:
    """Give back what nobody holds: dead cycles, PyTorch's cached GPU memory, and pinned host memory."""
    gc.collect()
    torch = sys.modules.get("torch")  # where nobody imported it there is nothing to free
    if torch is not None and torch.cuda.is_available() and torch.cuda.is_initialized():
        with suppress(RuntimeError):  # a broken context answers everything with its error, which is on its way already
            torch.cuda.empty_cache()
            # PyTorch keeps pinned blocks for the process; what gives them back has no public name yet
            getattr(torch._C, "_host_emptyCache", lambda: None)()


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
