"""Models served as OpenAI's clients expect it: merged, adapter and GPTQ folders, and GGUF files.

    python -m helpers serve --model runs/tiny/quantize --page

and any OpenAI client takes http://127.0.0.1:8000/v1 as its base URL. `door` is the HTTP, `folder` and `batching` answer
for folders, `llama` for GGUF files, `asked` says what requests may ask for.
"""

import asyncio
import contextlib
import ipaddress
import logging
import os
import signal
import socket
import sys
import threading
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

from helpers import inference
from helpers.config import RunConfig
from helpers.models import gguf_header
from helpers.workspace import Workspace

STOP_S = 2
"""Answers under way are cut off so many seconds after the signal to stop."""
KEY_VARIABLE = "RECIPES_API_KEY"
NEEDS = "starlette and uvicorn are needed to serve a model: pip install -r requirements.txt"


def serve(
    models: Sequence[str],
    config: RunConfig,
    host: str = "127.0.0.1",
    port: int = 8000,
    api_key: str | None = None,
    page: bool = False,
    ready: Callable[[Any, str], None] = lambda server, address: None,
) -> dict[str, Any]:
    """Serve models, each a path or NAME=PATH, until Ctrl-C or SIGTERM; returns the address and what was served.

    api_key: default the environment's RECIPES_API_KEY, which other users of the machine do not see in its process list.
    ready: called with uvicorn's server and the address once clients may come. Raises ValueError with one sentence for
    what cannot be served, an address that is taken, or a public one without a key; RuntimeError when a model stopped.
    """
    try:
        import uvicorn

        from helpers.serve.door import door
    except ImportError as error:
        raise ValueError(f"{NEEDS} ({error})") from None
    api_key = api_key or os.environ.get(KEY_VARIABLE) or None
    paths = names(models)
    with contextlib.ExitStack() as opened:
        wire = opened.enter_context(bound(host, port, api_key))
        # log_config=None: uvicorn's own closes every handler of the process, and absl's closes its stream with it
        options = {"log_config": None, "log_level": "warning", "access_log": False, "lifespan": "off", "ws": "none"}
        options["timeout_graceful_shutdown"] = STOP_S
        server = uvicorn.Server(uvicorn.Config(lambda: None, **options))
        died: list[str] = []
        served: dict[str, Any] = {}
        for name, path in paths.items():
            print(f"serve: opening {path}", file=sys.stderr, flush=True)
            served[name] = model = one(name, path, config, lambda name=name: stop(server, died, name))
            opened.callback(model.close)
        api = door(served, api_key, page)
        server.config = uvicorn.Config(api, **options)
        logging.getLogger("uvicorn.error").addFilter(no_answer_cut_off)
        address = f"http://{f'[{host}]' if ':' in host else host}:{wire.getsockname()[1]}"
        wire.listen(128)  # who comes from now on waits for uvicorn
        say(served, address, page, api_key)
        with quiet_signals():
            ready(server, address)
            server.run(sockets=[wire])
        if died:
            raise RuntimeError(f"{', '.join(died)} stopped while it answered: see the error above")
        about = {name: {"path": str(paths[name]), "how": model.how} for name, model in served.items()}
        return {"address": address, "models": about, "requests": api.state.places.served}


def no_answer_cut_off(record: logging.LogRecord) -> bool:
    """Whether a line of uvicorn's log is anything but the trace of an answer that did not end in STOP_S.

    uvicorn has said before, in one line, that it cancels it.

    >>> no_answer_cut_off(logging.makeLogRecord({"exc_info": (asyncio.CancelledError, None, None)}))
    False
    """
    return not (record.exc_info and record.exc_info[0] is asyncio.CancelledError)


def stop(server: Any, died: list[str], name: str) -> None:
    """End the server, because a model ended."""
    died.append(name)
    server.should_exit = True


def say(served: dict[str, Any], address: str, page: bool, api_key: str | None) -> None:
    """Where to reach what, on standard error."""
    for model in served.values():
        print(f"serve: {model.name} ({model.how}), context {model.context}", file=sys.stderr)
    key = "with the key" if api_key else "without a key, from this machine only"
    print(f"serve: {address}/v1 {key}; Ctrl-C stops", file=sys.stderr, flush=True)
    if page:
        print(f"serve: the page is {address}/", file=sys.stderr, flush=True)


def names(models: Sequence[str]) -> dict[str, Path]:
    """Name -> path of each, given as PATH or NAME=PATH; a path's own name otherwise.

    Raises ValueError for two of one name, and for what is not there.

    >>> names(["mine=data/tiny-mistral", "data/tiny-mistral"])
    {'mine': PosixPath('data/tiny-mistral'), 'tiny-mistral': PosixPath('data/tiny-mistral')}
    """
    found: dict[str, Path] = {}
    for given in models:
        name, separator, path = str(given).partition("=")
        if not separator or Path(given).exists():
            path = str(given)
            name = Path(path).stem if path.endswith(".gguf") else Path(path).absolute().name
        if name in found:
            raise ValueError(f"two models are called {name}: name them, --model first={found[name]} second={path}")
        found[name] = Path(path)
    return found


def default_model(run: Workspace) -> Path:
    """What a run has to serve: its GPTQ model, else the merged one, else the adapter. Raises ValueError for none."""
    ways = [run.folder("quantize"), run.folder("merge"), run.folder("finetune") / "adapter"]
    found = next(
        (way for way in ways if (way / "config.json").is_file() or (way / inference.ADAPTER_CONFIG).is_file()), None
    )
    if found is None:
        raise ValueError(f"{run.root} has no model to serve: name one, --model DIR|FILE.gguf, or run finetune first")
    return found


def one(name: str, path: Path, config: RunConfig, on_death: Callable[[], None]) -> Any:
    """A model opened, that can reply. Raises ValueError with one sentence."""
    if gguf_header.is_gguf(path):
        from helpers.serve.llama import Llama

        return Llama(name, path)
    if path.is_file():
        raise ValueError(f"{path} is not a GGUF file: name a .gguf file, or the folder that holds a model")
    from helpers.serve.batching import Engine, opened
    from helpers.serve.folder import Folder

    loaded = opened(str(path), config)
    return Folder(name, loaded, Engine(loaded, on_death=on_death))


@contextlib.contextmanager
def bound(host: str, port: int, api_key: str | None) -> Iterator[socket.socket]:
    """Yield a socket that holds the address. Raises ValueError when it is taken, unknown, or public without a key."""
    if not 0 <= port <= 65535:
        raise ValueError(f"--port {port} is none: take one between 1024 and 65535")
    try:
        family, kind, _, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
    except OSError as error:
        raise ValueError(f"--host {host} is no address of this machine ({error}): take 127.0.0.1") from None
    if not ipaddress.ip_address(address[0]).is_loopback and not api_key:
        raise ValueError(
            f"--host {host} lets everyone in who reaches this machine: give --api-key too, or take 127.0.0.1"
        )
    with socket.socket(family, kind) as wire:
        wire.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            wire.bind(address)
        except OSError as error:
            raise ValueError(f"port {port} of {host} cannot be had ({error.strerror}): take another, --port") from None
        yield wire


@contextlib.contextmanager
def quiet_signals() -> Iterator[None]:
    """SIGINT and SIGTERM stop uvicorn and nothing more: it raises them again when it is done.

    In a thread that is not the main one signals are not ours.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    kinds = (signal.SIGINT, signal.SIGTERM)
    before = [signal.signal(kind, lambda number, frame: None) for kind in kinds]
    try:
        yield
    finally:
        for kind, handler in zip(kinds, before, strict=True):
            signal.signal(kind, handler)
