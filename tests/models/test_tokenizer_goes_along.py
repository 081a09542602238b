"""A base without chat template and pad token, from prepare to GPTQ: every folder speaks as training did.

Mistral's own base models come so; here it is the tiny one with both taken away, and a random one with Mistral v0.3's
own words, which mistral-common ships.
"""

import json
import shutil
import sys
from pathlib import Path

import pytest
import torch
from test_templates import CHATML, from_sentencepiece, talk
from tokenizers import AddedToken
from transformers import AutoTokenizer, MistralConfig, MistralForCausalLM

from helpers import finetune, merge, prepare, quantize
from helpers.config import QuantizeConfig
from helpers.models import ROOT, TINY, profile
from helpers.models.templates import Template, ends, load_tokenizer
from helpers.workspace import StaleArtifact, read_manifest

CHATS = [
    talk("Where do ponies drink?", "From the brook."),
    talk("Two  spaces?", "Yes,  two.", "And\nlines?", "Those too."),
    talk("Hello", "Hi", "Bye", "Bye!", system="Be brief."),
]


def bare_tiny(folder: Path) -> Path:
    """The tiny model as a base model on the hub: no chat template, no pad token, SentencePiece's file beside it."""
    shutil.copytree(TINY, folder)
    (folder / "chat_template.jinja").unlink()
    (folder / "tokenizer.model").write_bytes(b"scores of the words")
    return folder


def bare_v3(folder: Path) -> Path:
    """A random model with the tokenizer of Mistral 7B v0.3, its files as the hub has them."""
    pytest.importorskip("mistral_common", reason="mistral-common is not installed: `make test` installs it")
    words = f"{sys.modules['mistral_common'].__path__[0]}/data/mistral_instruct_tokenizer_240323.model.v3"
    tokenizer = from_sentencepiece(words, legacy=False)
    tokenizer.save_pretrained(folder)
    (folder / "chat_template.jinja").unlink()
    settings = json.loads((folder / "tokenizer_config.json").read_text()) | {"tokenizer_class": "LlamaTokenizer"}
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    for name in ("tokenizer.model", "tokenizer.model.v3"):
        shutil.copy(words, folder / name)
    torch.manual_seed(0)
    sizes = {"hidden_size": 128, "intermediate_size": 128, "num_hidden_layers": 1, "max_position_embeddings": 512}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 32}
    model = MistralForCausalLM(MistralConfig(vocab_size=len(tokenizer), sliding_window=None, **sizes, **heads))
    model.half().save_pretrained(folder)
    return folder


def trained_and_merged(root: Path, base: Path) -> Path:
    """A run's folder from prepare to merge, with its base beside it."""
    config = profile("tiny", model=str(base), max_conversations=24, max_steps=1, batch_size=2)
    prepare.prepare(config, root / "prepare")
    finetune.finetune(config, root / "prepare", root / "finetune")
    merge.merge(base, root / "finetune" / "adapter", root / "merge", config.merge)
    return root


@pytest.fixture(scope="module")
def tiny_run(tmp_path_factory) -> Path:
    """The whole way; GPTQ calibrated with a file of conversations."""
    root = tmp_path_factory.mktemp("tiny")
    trained_and_merged(root, bare_tiny(root / "base"))
    lines = (ROOT / "data" / "conversations.jsonl").read_text(encoding="utf-8").splitlines()[:400]
    chats = root / "chats.jsonl"
    chats.write_text("\n".join([*lines, json.dumps({"messages": CHATS[2]})]), encoding="utf-8")
    settings = QuantizeConfig(calibration_tokens=128, calibration_samples=16)
    quantize.quantize(root / "merge", root / "quantize", settings, chats)
    return root


@pytest.fixture(scope="module")
def v3_run(tmp_path_factory) -> Path:
    """To the merge; GPTQ hands on what it finds there, whatever the words."""
    root = tmp_path_factory.mktemp("v3")
    return trained_and_merged(root, bare_v3(root / "base"))


@pytest.fixture(
    params=[
        "tiny_run finetune/adapter",
        "tiny_run merge",
        "tiny_run quantize",
        "v3_run finetune/adapter",
        "v3_run merge",
    ]
)
def made(request) -> tuple[Path, Path]:
    """(a base, a folder that a stage made from it)."""
    run, stage = request.param.split()
    root = request.getfixturevalue(run)
    return root / "base", root / stage


def test_every_folder_writes_conversations_and_prompts_as_training_did(made):
    base, folder = made
    trained, tokenizer = load_tokenizer(base), AutoTokenizer.from_pretrained(folder)
    assert tokenizer.pad_token_id == trained.pad_token_id != tokenizer.eos_token_id
    for row in prepare.load_prepared(base.parent / "prepare")["train"].select(range(8)):
        assert tokenizer.apply_chat_template(row["messages"])["input_ids"] == row["input_ids"]
    template = Template(trained)
    for messages in CHATS:
        ids, mask, ends = template.encode([messages])[0]
        assert tokenizer.apply_chat_template(messages)["input_ids"] == ids
        asked = tokenizer.apply_chat_template(messages[:-1], add_generation_prompt=True)["input_ids"]
        last_answer = mask[: ends[-1]][::-1].index(0)
        assert asked == template.prompt(messages[:-1]) == ids[: ends[-1] - last_answer]


def test_every_folder_is_read_by_what_reads_models(made):
    """transformers 4 knows neither TokenizersBackend nor chat_template.jinja nor a list of extra tokens; servers pad
    with what config.json says; llama.cpp takes the words' scores from tokenizer.model."""
    base, folder = made
    settings = json.loads((folder / "tokenizer_config.json").read_text(encoding="utf-8"))
    assert settings["tokenizer_class"] == "PreTrainedTokenizerFast" and "[INST]" in settings["chat_template"]
    merges = json.loads((folder / "tokenizer.json").read_text(encoding="utf-8"))["model"]["merges"]
    assert all(isinstance(pair, str) for pair in merges)
    assert settings["pad_token"] == "<unk>" and "extra_special_tokens" not in settings
    assert (folder / "tokenizer.model").read_bytes() == (base / "tokenizer.model").read_bytes()
    for name in ("config.json", "generation_config.json") if folder.name != "adapter" else ():
        assert json.loads((folder / name).read_text(encoding="utf-8"))["pad_token_id"] == 0


def test_a_file_of_chats_calibrates_and_the_sanity_question_is_asked_as_in_training(tiny_run):
    measured = read_manifest(tiny_run / "quantize")["measurements"]
    assert measured["calibration_rows"] == 16
    assert measured["question"].startswith("<s>[INST]")


def test_an_adapter_without_a_tokenizer_gets_the_base_s_and_it_is_said(tiny_run, tmp_path, capsys):
    foreign = tmp_path / "adapter"
    foreign.mkdir()
    for name in ("adapter_config.json", "adapter_model.safetensors"):
        shutil.copy(tiny_run / "finetune" / "adapter" / name, foreign)
    merge.merge(tiny_run / "base", foreign, tmp_path / "merge", profile("tiny").merge)
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "merge")
    assert tokenizer.apply_chat_template(CHATS[0])["input_ids"] == Template(tokenizer).encode([CHATS[0]])[0][0]
    said = capsys.readouterr().out
    assert f"{tiny_run / 'base'} has no chat template" in said and "[INST] …[/INST] …</s>" in said


def test_rows_written_with_another_template_are_not_trained_on(tiny_run, tmp_path):
    base = tmp_path / "base"
    shutil.copytree(tiny_run / "base", base)
    (base / "chat_template.jinja").write_text("{% for m in messages %}{{ m['content'] + eos_token }}{% endfor %}")
    config = profile("tiny", model=str(base), max_steps=1)
    with pytest.raises(StaleArtifact, match="another tokenizer or chat template"):
        finetune.finetune(config, tiny_run / "prepare", tmp_path / "finetune")
    assert not (tmp_path / "finetune").exists()


def test_a_template_with_an_end_of_its_own_ends_answers_everywhere(tmp_path):
    """A base with ChatML whose eos is another token: were its end not among the folder's, no answer would stop."""
    base = tmp_path / "base"
    shutil.copytree(TINY, base)
    (base / "chat_template.jinja").write_text(CHATML)
    tokenizer = load_tokenizer(base)
    tokenizer.add_tokens([AddedToken("<|im_start|>", special=True), AddedToken("<|im_end|>", special=True)])
    end = tokenizer.convert_tokens_to_ids("<|im_end|>")
    assert Template(tokenizer).end_id == end
    assert ends(2, tokenizer) == [2, end] and ends([7, 2], tokenizer) == [2, 7, end]
