"""A GGUF file behind the same door: llama.cpp's own server in this process, which only this process can ask.

It applies the template of the file, batches, samples, writes OpenAI's objects and knows more than is served for folders
(tools, JSON schemas, logprobs); requests pass through as they are.
"""

import asyncio
import contextlib
import functools
import http.client
import json
import os
import secrets
import socket
from collections.abc import AsyncIterator, Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from helpers import hardware
from helpers.hardware import Machine
from helpers.serve.asked import Refused
from helpers.serve.folder import Reply

GIB = 2**30
AT_ONCE = 4
"""Answers that are written at the same time, where memory has room for so many contexts; others wait."""
CACHE_SHARE = 0.5
"""Share of the RAM free beside the file that keys and values may take."""
MOST_READERS = 64
"""Threads that wait for llama.cpp's answers: one a request, or those that wait for their turn hold up the others."""
FEWEST_TOKENS = 512
LIBRARY_GIB = 0.1
"""What llama.cpp takes besides the file's tensors, and keys and values."""
NEEDS = "xllamacpp and gguf are needed to serve a GGUF file: pip install --no-deps -r requirements/gguf.txt"


class Llama:
    """A served GGUF file."""

    running = True

    def __init__(self, name: str, file: Path, machine: Machine | None = None) -> None:
        """Open the file. Raises ValueError for one that llama.cpp does not open, or that memory has no room for."""
        try:
            import xllamacpp
        except ImportError:
            raise ValueError(NEEDS) from None
        trained, token_bytes, kind = header(file)
        self.name, self.created = name, int(file.stat().st_mtime)
        machine = machine or hardware.probe()
        self.context, slots = contexts(file, trained, token_bytes, machine)
        self.how = f"gguf, {kind}, llama.cpp"
        self.key = secrets.token_urlsafe(32)
        settings = xllamacpp.CommonParams()
        settings.model.path, settings.model_alias = str(file), {name}
        settings.n_ctx, settings.n_parallel, settings.verbosity = self.context * slots, slots, 0
        settings.cpuparams.n_threads = settings.cpuparams_batch.n_threads = threads(machine)
        settings.api_keys, settings.cors_origins = [self.key], ""
        settings.ui = settings.endpoint_slots = False
        settings.n_threads_http = MOST_READERS
        try:
            self.server = xllamacpp.Server(settings)
        except RuntimeError:
            raise ValueError(
                f"llama.cpp does not open {file} ({kind}): export it again, or take another type"
            ) from None
        self.readers = ThreadPoolExecutor(MOST_READERS)
        self.address = self.server.listening_address.removeprefix("http://")

    def close(self) -> None:
        """End the server; it waits for open connections, which the door has closed by now."""
        self.readers.shutdown(wait=False)
        self.server = None

    async def reply(self, body: dict[str, Any], chat: bool) -> Reply:
        """Pass a request on. Raises Refused where llama.cpp refuses, or is not there."""
        path = "/v1/chat/completions" if chat else "/v1/completions"
        connection = http.client.HTTPConnection(self.address)
        headers = {"Content-Type": "application/json", "Authorization": f"Bearer {self.key}"}
        try:
            connection.request("POST", path, json.dumps(body), headers)  # to this process: nothing to wait for
        except OSError as error:
            raise Refused(503, f"llama.cpp's server is gone: {error}") from None
        wire = connection.sock
        wait = functools.partial(waited, self.readers, wire)
        if not body.get("stream"):
            return Reply(200, False, whole(connection, wire, wait))
        response = await wait(connection.getresponse)
        if response.status >= 400:
            body = await wait(response.read)
            hang_up(wire)
            raise refusal(response.status, body)
        return Reply(200, True, lines(response, wire, wait))


def threads(machine: Machine) -> int:
    """The cores, or what OMP_NUM_THREADS asks for: llama.cpp's threads wait actively, and more than idle cores hurt."""
    asked = os.environ.get("OMP_NUM_THREADS", "")
    return int(asked) if asked.isdigit() and int(asked) else machine.host.cpus


async def whole(connection: http.client.HTTPConnection, wire: socket.socket, wait: Callable) -> AsyncIterator[bytes]:
    """The body of an answer that is not streamed. Raises Refused where llama.cpp refuses."""
    try:
        response = await wait(connection.getresponse)
        body = await wait(response.read)
        if response.status >= 400:
            raise refusal(response.status, body)
        yield body
    finally:
        hang_up(wire)


async def lines(response: http.client.HTTPResponse, wire: socket.socket, wait: Callable) -> AsyncIterator[bytes]:
    """A stream's lines as they come."""
    try:
        while line := await wait(response.readline):
            yield line
    finally:
        hang_up(wire)


async def waited(readers: ThreadPoolExecutor, wire: socket.socket, read: Callable[[], Any]) -> Any:
    """What a blocking read gives, read in a thread; when nobody wants it any more llama.cpp is told so at once."""
    done = False
    try:
        found = await asyncio.get_running_loop().run_in_executor(readers, read)
        done = True
        return found
    except (OSError, http.client.HTTPException) as error:
        raise Refused(500, f"llama.cpp broke off: {error}") from None
    finally:
        if not done:
            hang_up(wire)


def hang_up(wire: socket.socket) -> None:
    """Close both directions, which ends a read in another thread too."""
    with contextlib.suppress(OSError):
        wire.shutdown(socket.SHUT_RDWR)


def refusal(status: int, body: bytes) -> Refused:
    """llama.cpp's error as OpenAI's."""
    try:
        error = json.loads(body)["error"]
    except (ValueError, KeyError, TypeError):
        return Refused(status, body.decode(errors="replace")[:300])
    too_long = error.get("type") == "exceed_context_size_error"
    return Refused(status, error.get("message", ""), "context_length_exceeded" if too_long else None)


def header(file: Path) -> tuple[int, int, str]:
    """(context it was trained for, bytes of a token's keys and values in fp16, its type) of a GGUF file.

    Raises ValueError for a file that is cut short, of an unknown type, or no model.
    """
    try:
        from gguf import GGUFReader, LlamaFileType
    except ImportError:
        raise ValueError(NEEDS) from None
    try:
        fields = GGUFReader(file).fields
    except (ValueError, IndexError, KeyError, OSError) as error:
        raise ValueError(
            f"{file} is no whole GGUF file, or of a type unknown here ({error}): export it again"
        ) from None

    def value(name: str, default: Any = None) -> Any:
        return fields[name].contents() if name in fields else default

    family = value("general.architecture")
    of = {name: value(f"{family}.{name}") for name in ("context_length", "block_count", "attention.head_count")}
    if value("general.type", "model") != "model" or None in of.values():
        raise ValueError(f"{file} is a GGUF file but no language model ({value('general.type', family)})")
    heads = of["attention.head_count"]
    shared = value(f"{family}.attention.head_count_kv", heads)
    width = value(f"{family}.attention.key_length") or value(f"{family}.embedding_length") // heads
    number = value("general.file_type", -1)
    known = {kind.value: kind.name.removeprefix("MOSTLY_") for kind in LlamaFileType}
    layers = of["block_count"]
    return of["context_length"], 2 * 2 * layers * shared * width, known.get(number, f"type {number}")


def contexts(file: Path, trained: int, token_bytes: int, machine: Machine) -> tuple[int, int]:
    """(tokens of a conversation, conversations at once) that RAM has room for beside the file.

    Raises ValueError when there is no room for one.
    """
    file_gib, fewest = file.stat().st_size / GIB + LIBRARY_GIB, min(FEWEST_TOKENS, trained)
    room = int((machine.host.ram_gib - file_gib) * CACHE_SHARE * GIB / token_bytes)
    if room < fewest:
        needed = file_gib + fewest * token_bytes / CACHE_SHARE / GIB
        raise ValueError(
            f"{file} needs {needed:.1f} GiB of RAM and {machine.host.ram_gib:.1f} are free: "
            "export a smaller type, such as q4_k_m, or end what else runs"
        )
    slots = next(n for n in range(AT_ONCE, 0, -1) if room // n >= min(trained, 4 * FEWEST_TOKENS) or n == 1)
    return min(trained, room // slots), slots
