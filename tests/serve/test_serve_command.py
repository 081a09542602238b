"""`python -m helpers serve`: what it refuses, how it stops; and the parts beneath that need no server."""

import concurrent.futures
import contextlib
import http.client
import io
import json
import logging
import os
import signal
import socket
import subprocess
import sys
from collections import Counter
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

pytest.importorskip("starlette", reason="starlette is not installed: `make setup` installs requirements/pins.txt")
pytest.importorskip("uvicorn", reason="uvicorn is not installed: `make setup` installs requirements/pins.txt")

from helpers import cli, hardware
from helpers.models import TINY, profile, shape
from helpers.models.templates import load_tokenizer
from helpers.serve import batching, llama
from helpers.serve.text import Text

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="module")
def gguf(tmp_path_factory):
    """The tiny model as a GGUF file."""
    pytest.importorskip("xllamacpp", reason="xllamacpp is not installed: `make setup` installs requirements/gguf.txt")
    file = tmp_path_factory.mktemp("gguf") / "tiny.gguf"
    assert cli.main(["export", "--profile", "tiny", "--model", str(TINY), "--type", "f16", "--output", str(file)]) == 0
    return file


def refused(capsys, *arguments):
    """The sentence that a command of status 2 ends with."""
    assert cli.main(["serve", "--profile", "tiny", *map(str, arguments)]) == cli.WRONG_REQUEST
    return capsys.readouterr().err.splitlines()[-1]


def test_what_cannot_be_served_is_one_sentence(tmp_path, capsys, gguf):
    (tmp_path / "notes.txt").write_text("no model")
    (tmp_path / "cut.gguf").write_bytes(gguf.read_bytes()[:200_000])
    (tmp_path / "empty").mkdir()
    assert "there is no model folder" in refused(capsys, "--model", tmp_path / "nowhere")
    assert "is not a GGUF file" in refused(capsys, "--model", tmp_path / "notes.txt")
    assert "is not a model folder" in refused(capsys, "--model", tmp_path / "empty")
    assert "no whole GGUF file" in refused(capsys, "--model", tmp_path / "cut.gguf")
    assert "two models are called tiny" in refused(capsys, "--model", gguf, gguf)
    assert "has no model to serve" in refused(capsys, "--workspace", tmp_path / "no-run")


def test_nobody_elses_log_is_closed(tmp_path, capsys, monkeypatch):
    log = logging.StreamHandler(io.StringIO())
    closed = []
    monkeypatch.setattr(log, "close", lambda: closed.append(True))  # absl's closes its stream here
    (tmp_path / "empty").mkdir()
    assert "is not a model folder" in refused(capsys, "--model", tmp_path / "empty")
    assert not closed


@pytest.mark.parametrize("host", ["0.0.0.0", "::"])
def test_a_public_address_without_a_key_is_refused(capsys, host, monkeypatch):
    monkeypatch.delenv("RECIPES_API_KEY", raising=False)
    assert "give --api-key too" in refused(capsys, "--model", TINY, "--host", host)


def test_an_address_that_cannot_be_had_is_refused_before_anything_is_opened(capsys):
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        assert f"port {port} of 127.0.0.1 cannot be had" in refused(capsys, "--model", TINY, "--port", port)
    assert "--port 99999 is none" in refused(capsys, "--model", TINY, "--port", 99999)
    assert "no address of this machine" in refused(capsys, "--model", TINY, "--host", "no.such.host.invalid")


def test_what_memory_has_no_room_for_is_refused_with_figures_and_the_remedy(gguf, tmp_path):
    config, seven = profile("mistral-7b"), shape("mistral-7b-v0.3")
    with pytest.raises(ValueError, match=r"needs .* GiB of RAM .* take a machine with a GPU, or serve its GPTQ"):
        batching.refuse_what_does_not_fit("merged", "model", config, seven, hardware.machine("none"))
    with pytest.raises(ValueError, match=r"layers from .* copied to the card for every token"):
        batching.refuse_what_does_not_fit("merged", "model", config, seven, hardware.machine("t4"))
    batching.refuse_what_does_not_fit("quantized", "gptq", config, seven, hardware.machine("t4"))
    batching.refuse_what_does_not_fit("merged", "model", config, seven, hardware.machine("l4"))
    small = hardware.machine("none")
    small = replace(small, host=replace(small.host, ram_gib=0.05))
    with pytest.raises(ValueError, match=r"needs .* GiB of RAM and 0\.1 are free"):
        llama.Llama("tiny", gguf, small)


def test_a_context_is_what_ram_has_room_for_and_fewer_wait_at_once_before_it_gets_short(tmp_path):
    file = tmp_path / "seven.gguf"
    file.touch()
    os.truncate(file, int(4.07 * 2**30))  # Q4_K_M of a 7B: 131,072 bytes of keys and values a token
    colab = hardware.machine("t4")
    tokens, slots = llama.contexts(file, 32768, 131072, colab)
    assert slots == llama.AT_ONCE and 4.17 + slots * tokens * 131072 / 2**30 < colab.host.ram_gib
    tight = replace(colab, host=replace(colab.host, ram_gib=5.2))
    assert llama.contexts(file, 32768, 131072, tight)[1] == 2
    assert llama.contexts(file, 512, 131072, colab) == (512, 4)


def test_keys_and_values_take_what_is_asked_for_or_what_is_free():
    from types import SimpleNamespace

    import torch
    from transformers import AutoConfig

    config = AutoConfig.from_pretrained(TINY)
    model = SimpleNamespace(config=config, dtype=torch.float16, device=torch.device("cuda"))
    loaded = SimpleNamespace(model=model, context=32768, path="somewhere")
    token_bytes = 2 * config.num_hidden_layers * config.num_key_value_heads * config.head_dim * 2
    assert batching.bytes_a_token(model) == token_bytes
    card = hardware.machine("t4")
    assert batching.blocks_for(loaded, 256, card) == batching.AT_ONCE * 128
    little = replace(card, free_vram_gib=card.gpu.context_gib + 3000 * token_bytes / 2**30 / 0.8)
    assert batching.blocks_for(loaded, 256, little) == 3000 // 256
    none = replace(card, free_vram_gib=card.gpu.context_gib)
    with pytest.raises(ValueError, match=r"somewhere leaves 0\.00 GiB for keys and values"):
        batching.blocks_for(loaded, 256, none)


def test_text_comes_in_whole_characters_and_stops_where_it_is_told():
    tokenizer = load_tokenizer(TINY)
    said = "Édith’s 🐿️ eats nuts.\n\nUser: and then"
    ids = tokenizer(said, add_special_tokens=False)["input_ids"]
    plain = Text(tokenizer)
    pieces = [plain.add([one]) for one in ids]
    assert "".join(pieces) + plain.rest() == said and "�" not in "".join(pieces)
    rng = np.random.default_rng(0)
    for stop in ("\n\nUser:", "🐿️", "nuts", "É", "then", "not there"):
        text, shown = Text(tokenizer, ("never", stop)), ""
        for part in np.split(np.array(ids), sorted(rng.integers(0, len(ids), 5))):
            shown += text.add(part.tolist())
            if text.stopped:
                break
        assert shown + text.rest() == said.split(stop)[0] and text.stopped == (stop in said)


def test_an_answer_that_only_spaces_begin_does_not_show_them():
    tokenizer = load_tokenizer(TINY)
    ids = tokenizer("  Hello", add_special_tokens=False)["input_ids"]
    assert "".join(Text(tokenizer).add([one]) for one in ids) == "Hello"
    assert "".join(Text(tokenizer, strip=False).add([one]) for one in ids).endswith("  Hello")


@contextlib.contextmanager
def running(model):
    """(process, address) of the command, once it listens; it is killed if a test leaves it running."""
    command = [sys.executable, "-m", "helpers", "serve", "--profile", "tiny", "--model", f"it={model}", "--json"]
    process = subprocess.Popen(
        [*command, "--port", "0"], cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    try:
        line = next((line for line in process.stderr if "/v1" in line), None)
        assert line, f"it never listened, status {process.wait()}"
        yield process, line.split("http://")[1].split("/v1")[0]
    finally:
        process.kill()


def post(connection, **body):
    """Send a chat."""
    body = {"model": "it", "messages": [{"role": "user", "content": "Hi"}]} | body
    connection.request("POST", "/v1/chat/completions", json.dumps(body), {"Content-Type": "application/json"})
    return connection.getresponse()


@pytest.mark.parametrize(
    ("what", "number"), [("folder", signal.SIGTERM), ("gguf", signal.SIGTERM), ("gguf", signal.SIGINT)]
)
def test_a_signal_in_the_middle_of_a_stream_ends_it_cleanly(what, number, gguf):
    with running(TINY if what == "folder" else gguf) as (process, address):
        assert post(http.client.HTTPConnection(address), stream=True, max_tokens=490).readline().startswith(b"data: ")
        process.send_signal(number)
        out, err = process.communicate(timeout=60)
    assert process.returncode == 0, err
    assert json.loads(out)["requests"] == 1 and "Traceback" not in err
    with pytest.raises(ConnectionRefusedError):
        socket.create_connection(address.split(":"))
    assert not Path(f"/proc/{process.pid}").exists()


@pytest.mark.parametrize("what", ["folder", "gguf"])
def test_memory_is_flat_over_a_thousand_requests_and_warnings_are_readable(what, gguf):
    """Every tenth request is refused, every tenth hangs up in the middle of its stream; 100 beforehand fill caches."""

    def one(number):
        connection = http.client.HTTPConnection(address)
        streamed = number % 10 == 3
        answer = post(connection, model="it" if number % 10 else "none", max_tokens=1 + 4 * streamed, stream=streamed)
        answer.readline() if streamed else answer.read()
        connection.close()
        return answer.status

    def anonymous_mib():
        status = Path(f"/proc/{process.pid}/status").read_text()
        return int(status.split("RssAnon:")[1].split()[0]) / 1024

    with running(TINY if what == "folder" else gguf) as (process, address):
        with concurrent.futures.ThreadPoolExecutor(8) as pool:
            list(pool.map(one, range(100)))
            before = anonymous_mib()
            assert Counter(pool.map(one, range(1000))) == {200: 900, 404: 100}
        grown = anonymous_mib() - before
        assert len(list(Path(f"/proc/{process.pid}/fd").iterdir())) < 40
        with socket.create_connection(address.split(":")) as wire:
            wire.sendall(b"what is this\r\n\r\n")
            assert b"400" in wire.recv(4096)
        process.terminate()
        _, err = process.communicate(timeout=60)
    assert grown < 4, f"{grown:.1f} MiB: {grown * 1024 / 1000:.1f} KiB a request"
    assert "Invalid HTTP request received." in err.splitlines() and "Traceback" not in err
