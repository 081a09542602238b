"""llama.cpp's own server on a GGUF file, in this process: the engine that Ollama, LM Studio and llama-server run.

>>> with serving(Path("model.gguf")) as ask:        # doctest: +SKIP
...     ask("/tokenize", {"content": "Hello"})
"""

import json
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

Ask = Callable[[str, dict[str, Any]], dict[str, Any]]
"""(path of the server, what is asked as JSON) -> what it answers."""


@contextmanager
def serving(file: Path, context: int = 512, threads: int = 1, lora: Path | None = None) -> Iterator[Ask]:
    """Yield a function that asks llama-server, which listens on this machine alone while the block runs.

    threads: llama.cpp's wait actively, so more of them than idle cores are slower than one. Raises ValueError for a
    file that llama.cpp does not open.
    """
    import xllamacpp

    settings = xllamacpp.CommonParams()
    settings.model.path = str(file)
    settings.n_ctx, settings.n_parallel, settings.verbosity = context, 1, 0
    settings.cpuparams.n_threads = settings.cpuparams_batch.n_threads = threads
    if lora is not None:
        adapter = xllamacpp.CommonAdapterLoraInfo(str(lora), 1.0)
        settings.lora_adapters = [adapter]
    try:
        server = xllamacpp.Server(settings)
    except RuntimeError as error:
        raise ValueError(f"llama.cpp does not open {file}: {error}") from None
    address = server.listening_address

    def ask(path: str, question: dict[str, Any]) -> dict[str, Any]:
        request = urllib.request.Request(
            address + path, json.dumps(question).encode(), {"Content-Type": "application/json"}
        )
        try:
            with urllib.request.urlopen(request) as answer:
                return json.load(answer)
        except urllib.error.HTTPError as error:
            raise ValueError(f"llama-server refused {path}: {error.read().decode(errors='replace')[:300]}") from None

    try:
        yield ask
    finally:
        del server


def check_tokens(ask: Ask, tokenizer: Any, texts: list[str], chats: list[list[dict[str, str]]]) -> int:
    """Hold llama.cpp's tokens and template to the tokenizer's own; returns how many were compared.

    chats: conversations that end with a user turn. Raises ValueError showing the first that differs.
    """
    for text in texts:
        expected = tokenizer(text, add_special_tokens=False)["input_ids"]
        found = ask("/tokenize", {"content": text, "add_special": False, "parse_special": True})["tokens"]
        refuse_difference(text, found, expected, tokenizer)
    for messages in chats:
        rendered = ask("/apply-template", {"messages": messages})["prompt"]
        found = ask("/tokenize", {"content": rendered, "add_special": True, "parse_special": True})["tokens"]
        expected = tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_dict=False)
        refuse_difference(rendered, found, expected, tokenizer)
    return len(texts) + len(chats)


def refuse_difference(text: str, found: list[int], expected: list[int], tokenizer: Any) -> None:
    """Raises ValueError naming the first token that differs."""
    if found == expected:
        return
    pairs = zip([*found, None], [*expected, None], strict=False)
    at = next(i for i, (one, other) in enumerate(pairs) if one != other)
    shown = [tokenizer.convert_ids_to_tokens(ids[max(at - 2, 0) : at + 3]) for ids in (found, expected)]
    raise ValueError(
        f"llama.cpp reads {shown[0]} where training read {shown[1]}, at token {at} of {text[:60]!r}: this tokenizer "
        "cannot be exported without changing what the model sees"
    )
