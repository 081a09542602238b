"""llama.cpp's own server on a GGUF file, in this process: the engine that Ollama, LM Studio and llama-server run.

>>> with serving(Path("model.gguf")) as server:        # doctest: +SKIP
...     server.ask("/tokenize", {"content": "Hello"})
...     server.stream([{"role": "user", "content": "Hello"}])
"""

import json
import os
import urllib.error
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

SMALL_BYTES = 2**26
"""Below this one thread is fastest: llama.cpp's threads wait actively, and a core that others use holds all of them."""
SPEED_TOKENS = (128, 32)
"""Tokens of the prompt and of the answer that a speed is measured with, as evaluation does with PyTorch."""


@dataclass(frozen=True)
class Server:
    """A llama-server that listens on this machine alone."""

    address: str

    def ask(self, path: str, question: dict[str, Any]) -> dict[str, Any]:
        """What the server answers to JSON at a path. Raises ValueError with what it said when it refuses."""
        with self.open(path, question) as answer:
            return json.load(answer)

    def open(self, path: str, question: dict[str, Any]) -> Any:
        """The server's answer as a stream of bytes."""
        request = urllib.request.Request(
            self.address + path, json.dumps(question).encode(), {"Content-Type": "application/json"}
        )
        try:
            return urllib.request.urlopen(request)
        except urllib.error.HTTPError as error:
            raise ValueError(f"llama-server refused {path}: {error.read().decode(errors='replace')[:300]}") from None

    def pieces(self, messages: list[dict[str, str]], max_tokens: int = 128, temperature: float = 0.0) -> Iterator[str]:
        """The answer to a conversation, piece by piece as llama.cpp writes it, through the template in the file."""
        asked = {"messages": messages, "max_tokens": max_tokens, "temperature": temperature, "stream": True}
        with self.open("/v1/chat/completions", asked) as answer:
            for line in answer:  # server-sent events: "data: {…}", then "data: [DONE]"
                event = line.decode("utf-8").strip().removeprefix("data: ")
                if event.startswith("{"):
                    for choice in json.loads(event).get("choices", []):
                        yield choice["delta"].get("content") or ""


@contextmanager
def serving(
    file: Path,
    context: int = 512,
    threads: int | None = None,
    lora: Path | None = None,
    as_stored: bool = False,
    exact: bool = False,
) -> Iterator[Server]:
    """Yield llama-server on a file while the block runs.

    threads: default one for a small file, else a core each. as_stored: weights stay the file's pages, which the
    system can drop, instead of a copy in the order that this CPU multiplies fastest; and nothing is computed at the
    start. exact: keys and values in fp32 and plain attention, for comparisons. Raises ValueError for a file that
    llama.cpp does not open.
    """
    try:
        import xllamacpp
    except ImportError:
        raise ValueError("llama.cpp is not here: pip install --no-deps -r requirements/gguf.txt") from None

    settings = xllamacpp.CommonParams()
    settings.model.path = str(file)
    settings.n_ctx, settings.n_parallel, settings.verbosity = context, 1, 0
    settings.no_extra_bufts, settings.warmup = as_stored, not as_stored
    settings.cpuparams.n_threads = settings.cpuparams_batch.n_threads = threads or threads_for(Path(file))
    if exact:
        settings.cache_type_k = settings.cache_type_v = type(settings.cache_type_k)(0)  # GGML_TYPE_F32
        settings.flash_attn_type = type(settings.flash_attn_type)(0)  # LLAMA_FLASH_ATTN_TYPE_DISABLED
    if lora is not None:
        settings.lora_adapters = [xllamacpp.CommonAdapterLoraInfo(str(lora), 1.0)]
    try:
        server = xllamacpp.Server(settings)
    except RuntimeError as error:
        raise ValueError(f"llama.cpp does not open {file}: {error}") from None
    try:
        yield Server(server.listening_address)
    finally:
        del server


def threads_for(file: Path) -> int:
    """One for a small file, else a core each."""
    return 1 if file.stat().st_size < SMALL_BYTES else os.cpu_count() or 1


def stream(file: Path, messages: list[dict[str, str]], max_tokens: int = 128, context: int = 1024) -> None:
    """Print llama.cpp's answer to a conversation as it is written."""
    with serving(file, context) as server:
        begun = False
        for piece in server.pieces(messages, max_tokens):
            print(piece if begun else piece.lstrip(), end="", flush=True)  # templates leave a space before the answer
            begun = begun or bool(piece.strip())
    print()


def speed(file: Path) -> dict[str, float]:
    """Tokens a second of llama.cpp on this machine's CPU: of a prompt that is read, of an answer that is written."""
    prompt, new = SPEED_TOKENS
    with serving(file, context=2 * (prompt + new)) as server:
        asked = {"prompt": [5 + i % 200 for i in range(prompt)], "n_predict": new, "temperature": 0}
        timed = server.ask("/completion", asked | {"ignore_eos": True, "cache_prompt": False})["timings"]
    return {
        "llama_cpp_prompt_tokens_per_s": timed["prompt_per_second"],
        "llama_cpp_tokens_per_s": timed["predicted_per_second"],
    }
