"""Mistral's own vocabularies through llama.cpp's server: mistral-common's tokens, chat by chat and text by text."""

import json
import shutil
import sys
from pathlib import Path

import pytest

pytest.importorskip("gguf", reason="gguf is not installed: `make setup` installs requirements/gguf.txt")
pytest.importorskip("xllamacpp", reason="xllamacpp is not installed: `make setup` installs requirements/gguf.txt")
pytest.importorskip("mistral_common", reason="mistral-common is not installed: `make test` installs it")

import numpy as np
from safetensors.numpy import save_file
from test_templates import conversations, from_sentencepiece
from tokenizers.processors import TemplateProcessing
from transformers import AutoTokenizer

from helpers.export import check, gguf_file
from helpers.models import TINY, gguf_engine, gguf_types
from helpers.models.templates import Template

WORDS = {"v1": "tokenizer.model.v1", "v3": "mistral_instruct_tokenizer_240323.model.v3"}
"""v1 is the vocabulary of Mistral 7B v0.1 and v0.2, v3 that of v0.3."""
WIDTH = 32
STYLES = [("v1", False), ("v1", True), ("v3", False), ("v3", True)]


@pytest.fixture(scope="module", params=STYLES, ids=["v1", "v1, legacy file", "v3", "v3, legacy file"])
def exported(request, tmp_path_factory):
    """(version, tokenizer, GGUF file) of a model of one narrow layer with Mistral's words."""
    version, legacy = request.param
    folder = tmp_path_factory.mktemp("words") / "model"
    words = Path(sys.modules["mistral_common"].__path__[0]) / "data" / WORDS[version]
    tokenizer = from_sentencepiece(words, legacy)
    bos = [(tokenizer.bos_token, tokenizer.bos_token_id)]
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing("<s> $A", "<s> $A <s>:1 $B:1", bos)
    tokenizer.save_pretrained(folder)
    layer = {"input_layernorm": (WIDTH,), "post_attention_layernorm": (WIDTH,)}
    layer |= {f"self_attn.{name}_proj": (WIDTH, WIDTH) for name in "qkvo"}
    layer |= {f"mlp.{name}_proj": (WIDTH, WIDTH) for name in ("gate", "up", "down")}
    shapes = {"model.embed_tokens": (len(tokenizer), WIDTH), "lm_head": (len(tokenizer), WIDTH), "model.norm": (WIDTH,)}
    shapes |= {f"model.layers.0.{name}": shape for name, shape in layer.items()}
    save_file({f"{name}.weight": np.ones(s, np.float16) for name, s in shapes.items()}, folder / "model.safetensors")
    settings = json.loads((TINY / "config.json").read_text(encoding="utf-8")) | {
        "hidden_size": WIDTH, "intermediate_size": WIDTH, "num_attention_heads": 1, "num_key_value_heads": 1,
        "head_dim": WIDTH, "num_hidden_layers": 1, "vocab_size": len(tokenizer),
    }  # fmt: skip
    (folder / "config.json").write_text(json.dumps(settings), encoding="utf-8")
    file = folder.parent / "words.gguf"
    gguf_file.write(folder, {file: gguf_types.file_type("f16")}, check=lambda made: check.check(made, folder, None))
    yield version, AutoTokenizer.from_pretrained(folder), file
    shutil.rmtree(folder.parent)


def test_chats_are_read_as_mistral_common_reads_them(exported):
    from mistral_common.protocol.instruct.messages import AssistantMessage, SystemMessage, UserMessage
    from mistral_common.protocol.instruct.request import ChatCompletionRequest
    from mistral_common.protocol.instruct.validator import ValidationMode
    from mistral_common.tokens.tokenizers.mistral import MistralTokenizer

    version, _, file = exported
    words = Path(sys.modules["mistral_common"].__path__[0]) / "data" / WORDS[version]
    reference = MistralTokenizer.from_file(str(words), mode=ValidationMode.test)
    kinds = {"system": SystemMessage, "user": UserMessage, "assistant": AssistantMessage}
    chats = [messages[:-1] for messages in conversations(66)]
    with gguf_engine.serving(file) as server:
        for messages in chats:
            request = ChatCompletionRequest(
                messages=[kinds[turn["role"]](content=turn["content"]) for turn in messages]
            )
            rendered = server.ask("/apply-template", {"messages": messages})["prompt"]
            asked = {"content": rendered, "add_special": True, "parse_special": True}
            found = server.ask("/tokenize", asked)["tokens"]
            assert found == reference.encode_chat_completion(request).tokens, messages
    assert len(chats) == 66


def test_texts_inside_a_turn_are_read_as_training_reads_them(exported):
    """300 pieces of prose, blanks and odd signs, each behind [INST], where text stands in a chat."""
    _, tokenizer, file = exported
    prose = (TINY.parent / "prose.txt").read_text(encoding="utf-8")
    texts = [prose[at : at + 37 + at % 90] for at in range(0, len(prose), max(len(prose) // 280, 1))][:280]
    texts += [sign * count for sign in ("  ", "\t", "\n", "é", "🙂", "ß", "日", "0", "'", "[") for count in (1, 3)]
    with gguf_engine.serving(file) as server:
        for text in texts:
            chat = [{"role": "user", "content": text}]
            rendered = server.ask("/apply-template", {"messages": chat})["prompt"]
            asked = {"content": rendered, "add_special": True, "parse_special": True}
            assert server.ask("/tokenize", asked)["tokens"] == Template(tokenizer).prompt(chat), text
    assert len(texts) == 300


def test_a_text_by_itself_needs_the_space_that_mistral_puts_before_it(exported):
    """So a model without a chat template is checked too, and the README says what to write."""
    _, tokenizer, file = exported
    with gguf_engine.serving(file) as server:
        assert check.check_tokens(server, tokenizer, list(check.PROBES), []) == len(check.PROBES)
