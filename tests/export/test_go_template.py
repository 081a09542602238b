"""A Modelfile's TEMPLATE in Go's own text/template, which Ollama uses, against the Jinja that training used."""

import json
import os
import shutil
import subprocess
from pathlib import Path

import pytest

pytest.importorskip("gguf", reason="gguf is not installed: `make setup` installs requirements/gguf.txt")

from test_templates import conversations
from transformers import AutoTokenizer

from helpers.export import modelfile
from helpers.models import TINY
from helpers.models.templates import MISTRAL_V1, MISTRAL_V3

TINY_TEMPLATE = (TINY / "chat_template.jinja").read_text(encoding="utf-8")


@pytest.fixture(scope="module")
def renderer(tmp_path_factory):
    """The program of render.go, built once."""
    if shutil.which("go") is None:
        pytest.skip("there is no Go on this machine: .ci/run installs golang-go")
    folder = tmp_path_factory.mktemp("go")
    program = folder / "render"
    shutil.copy(Path(__file__).with_name("render.go"), folder)
    environment = os.environ | {"GOCACHE": str(folder / "cache"), "GO111MODULE": "off", "HOME": str(folder)}
    subprocess.run(["go", "build", "-o", str(program), "render.go"], cwd=folder, env=environment, check=True)
    return program


@pytest.mark.parametrize("jinja", [MISTRAL_V1, MISTRAL_V3, TINY_TEMPLATE], ids=["v1", "v3", "tiny"])
def test_go_renders_what_jinja_renders(renderer, jinja):
    tokenizer = AutoTokenizer.from_pretrained(TINY)
    tokenizer.chat_template = jinja
    chats = [messages[:-1] for messages in conversations(300)]  # up to the last question, as they are asked
    asked = [
        {
            "System": "".join(turn["content"] for turn in messages if turn["role"] == "system"),
            "Messages": [{"Role": turn["role"], "Content": turn["content"]} for turn in messages],
        }
        for messages in chats
    ]
    question = json.dumps({"template": modelfile.go_template(jinja), "chats": asked})
    rendered = json.loads(subprocess.run([renderer], input=question, capture_output=True, text=True, check=True).stdout)
    for messages, found in zip(chats, rendered, strict=True):
        expected = tokenizer.apply_chat_template(messages, add_generation_prompt=True, tokenize=False)
        assert found == expected.removeprefix("<s>"), messages  # Ollama's tokenizer writes <s> itself
    assert len(chats) == 300
