"""The chat page from a notebook: a server in a thread, shown as the place can show it, and no thread left behind."""

import json
import sys
import threading
import urllib.request

import pytest

pytest.importorskip("starlette", reason="starlette is not installed: `make setup` installs requirements/pins.txt")
pytest.importorskip("uvicorn", reason="uvicorn is not installed: `make setup` installs requirements/pins.txt")

from helpers.models import TINY, profile
from helpers.serve import page


@pytest.fixture(autouse=True)
def nowhere(monkeypatch):
    for name in ("COLAB_RELEASE_TAG", "KAGGLE_KERNEL_RUN_TYPE"):
        monkeypatch.delenv(name, raising=False)


@pytest.fixture
def colab(tmp_path, monkeypatch):
    """A package google.colab, on disk because accelerate looks for it there, that keeps what it is asked to show."""
    output = tmp_path / "google" / "colab" / "output.py"
    output.parent.mkdir(parents=True)
    (output.parent / "__init__.py").touch()
    output.write_text(
        "shown = []\n"
        'def serve_kernel_port_as_iframe(port, path="/", width="100%", height="400", cache_in_notebook=False):\n'
        "    shown.append((port, path, height))\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    for name in [name for name in sys.modules if name.partition(".")[0] == "google"]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setenv("COLAB_RELEASE_TAG", "release-colab")
    yield
    for name in [name for name in sys.modules if name.partition(".")[0] == "google"]:
        del sys.modules[name]


def test_the_page_answers_while_the_notebook_goes_on_and_ends_when_told(colab):
    before = threading.active_count()
    talk = page.open_page(TINY, profile("tiny"))
    from google.colab.output import shown

    ((port, path, height),) = shown
    assert talk.address == f"http://127.0.0.1:{port}" and path == "/" and int(height) > 400
    with urllib.request.urlopen(f"{talk.address}/") as answer:
        assert "<title>Chat</title>" in answer.read().decode()
    body = {"model": "tiny-mistral", "messages": [{"role": "user", "content": "Hi"}], "max_tokens": 2}
    asked = urllib.request.Request(f"{talk.address}/v1/chat/completions", json.dumps(body).encode())
    asked.add_header("Content-Type", "application/json")
    with urllib.request.urlopen(asked) as answer:
        assert json.load(answer)["usage"]["completion_tokens"] == 2
    assert talk.address in repr(talk)
    talk.stop()
    with pytest.raises(OSError, match="refused"):
        urllib.request.urlopen(f"{talk.address}/")
    assert threading.active_count() == before


def test_what_cannot_be_opened_is_the_sentence_of_the_command_line(tmp_path, monkeypatch, capsys):
    before = threading.active_count()
    with pytest.raises(ValueError, match="is not a model folder"):
        page.open_page(tmp_path, profile("tiny"))
    assert page.open_page(tmp_path, profile("tiny"), wanted=False) is None
    assert "set chat_page at the top" in capsys.readouterr().out
    monkeypatch.setenv("KAGGLE_KERNEL_RUN_TYPE", "Interactive")
    with pytest.raises(ValueError, match="Kaggle lets nobody reach a port"):
        page.open_page(TINY, profile("tiny"))
    assert threading.active_count() == before
