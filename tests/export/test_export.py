"""GGUF: blocks as llama.cpp makes them, tokens as training read them, adapters, the file opened again, bad input."""

import doctest
import hashlib
import json
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

import helpers.export
import helpers.models.gguf_types
from helpers import cli
from helpers.models import TINY, gguf_types

gguf = pytest.importorskip("gguf", reason="gguf is not installed: `make setup` installs requirements/gguf.txt")
pytest.importorskip("xllamacpp", reason="xllamacpp is not installed: `make setup` installs requirements/gguf.txt")

from helpers.export import engine, gguf_file, lora, modelfile, quants, vocabulary  # noqa: E402
from helpers.models import attention, gguf_model, packed  # noqa: E402

QUESTION = [{"role": "user", "content": "Which animal does Edith keep?"}]
# Of the tiny model's tensors, sorted by name, as llama.cpp's own llama_model_quantize writes them from its F16 file
# (cyllama 0.2.18, 39 of 39 equal for each type).
DIGESTS = json.loads(Path(__file__).with_name("gguf_digests.json").read_text(encoding="utf-8"))
TYPES = [name for name, kind in gguf_types.FILE_TYPES.items() if not kind.needs_importance]


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """The tiny model in every type that needs no importance matrix, through the command."""
    folder = tmp_path_factory.mktemp("gguf")
    command = ["export", "--profile", "tiny", "--model", str(TINY), "--type", ",".join(TYPES), "--modelfile"]
    assert cli.main([*command, "--output", str(folder / "tiny.gguf")]) == 0
    return {name: folder / f"tiny-{gguf_types.FILE_TYPES[name].name}.gguf" for name in TYPES}


def digest(file):
    """SHA-256 of types and bytes of all tensors, by name."""
    found = hashlib.sha256()
    for tensor in sorted(gguf.GGUFReader(file).tensors, key=lambda tensor: tensor.name):
        found.update(f"{tensor.name} {tensor.tensor_type.name} ".encode() + tensor.data.tobytes())
    return found.hexdigest()


@pytest.mark.parametrize(
    "module", [helpers.export, helpers.models.gguf_types, gguf_file, vocabulary, quants, modelfile, lora]
)
def test_examples_in_docstrings(module):
    assert doctest.testmod(module).failed == 0


@pytest.mark.parametrize("name", TYPES)
def test_every_tensor_is_what_llama_cpp_writes(files, name):
    assert digest(files[name]) == DIGESTS[name]


def test_types_have_the_blocks_that_gguf_says():
    for kind, sizes in gguf_types.BLOCKS.items():
        assert gguf.GGML_QUANT_SIZES[gguf.GGMLQuantizationType[kind]] == sizes
    for kind in gguf_types.FILE_TYPES.values():
        assert gguf.LlamaFileType[f"MOSTLY_{kind.name}"] == kind.number


def test_a_width_that_no_block_of_256_fits_falls_back_as_llama_cpp_does():
    kinds = {
        name: gguf_types.recipe("blk.1.attn_q.weight", 96, kind, 4, 4) for name, kind in gguf_types.FILE_TYPES.items()
    }
    assert kinds["q4_k_m"] == "Q5_0" and kinds["q5_k_m"] == "Q5_1" and kinds["q6_k"] == kinds["q8_0"] == "Q8_0"
    assert kinds["q3_k_m"] == "Q4_0" and kinds["iq4_xs"] == kinds["iq3_s"] == "IQ4_NL"
    assert gguf_types.recipe("blk.1.attn_q.weight", 80, gguf_types.file_type("q4_k_m"), 4, 4) == "F16"


@pytest.mark.parametrize("kind", packed.DEQUANTIZERS)
def test_dequantizing_gives_the_bits_of_gguf(kind):
    rng = np.random.default_rng(0)
    size = gguf_types.BLOCKS[kind][1]
    blocks = rng.integers(0, 256, (64, size), dtype=np.uint8)
    scales = {"Q6_K": [208], "Q3_K": [108], "Q2_K": [80, 82], "Q4_K": [0, 2], "Q5_K": [0, 2], "Q5_1": [0, 2]}
    for at in scales.get(kind, [0]):
        blocks[:, at + 1] &= 0x3B  # no infinity and no NaN among the fp16 scales
    expected = gguf.quants.dequantize(blocks, gguf.GGMLQuantizationType[kind])
    assert np.array_equal(packed.dequantize(torch.from_numpy(blocks), kind).numpy(), expected)


def test_a_file_opened_again_computes_what_transformers_computes_from_it(files, monkeypatch):
    ids = torch.tensor([AutoTokenizer.from_pretrained(TINY)(QUESTION[0]["content"])["input_ids"]])
    whole = AutoModelForCausalLM.from_pretrained(TINY, dtype=torch.float32)
    divergence = {}
    with torch.no_grad():
        expected = torch.log_softmax(whole(ids).logits, -1)
        for name in ("f16", "q8_0", "q6_k", "q4_k_m", "q3_k_m"):
            model = gguf_model.load(files[name], torch.float32, "cpu", attention.register())
            found = model(ids).logits
            theirs = AutoModelForCausalLM.from_pretrained(
                files[name].parent, gguf_file=files[name].name, dtype=torch.float32
            )
            assert torch.equal(found, theirs(ids).logits), name
            kept = expected.exp() * (expected - torch.log_softmax(found, -1))
            divergence[name] = kept.sum(-1).mean().item()
    assert divergence["f16"] < 1e-6
    assert divergence["q8_0"] < divergence["q6_k"] < divergence["q4_k_m"] < divergence["q3_k_m"]


def test_a_file_answers_like_the_model_it_was_made_of(files):
    from helpers import inference
    from helpers.models import profile

    opened = [inference.load(name, profile("tiny")) for name in (TINY, files["f16"])]
    answers = [inference.batch_generate(one, [QUESTION], 12)[0].text for one in opened]
    assert answers[0] == answers[1] and opened[1].kind == "gguf"


def test_llama_cpp_reads_the_tokens_of_training_and_says_which_it_does_not(files):
    tokenizer = AutoTokenizer.from_pretrained(TINY)
    rows = (TINY.parent / "heldout_conversations.jsonl").read_text(encoding="utf-8").splitlines()
    chats = [json.loads(row)["messages"][:-1] for row in rows]
    with engine.serving(files["q4_k_m"]) as ask:
        assert engine.check_tokens(ask, tokenizer, list(helpers.export.PROBES), chats) == len(chats) + 5
        tokenizer.add_tokens(["Edith"])
        with pytest.raises(ValueError, match=r"where training read .*Edith"):
            engine.check_tokens(ask, tokenizer, [QUESTION[0]["content"]], [])


def test_llama_cpp_answers_as_transformers_does(files):
    tokenizer = AutoTokenizer.from_pretrained(TINY)
    model = AutoModelForCausalLM.from_pretrained(TINY, dtype=torch.float32)
    ids = tokenizer.apply_chat_template(QUESTION, add_generation_prompt=True, return_dict=False)
    answer = model.generate(torch.tensor([ids]), max_new_tokens=12, do_sample=False)[0, len(ids) :]
    with engine.serving(files["f16"]) as ask:
        said = ask("/completion", {"prompt": ids, "n_predict": 12, "temperature": 0, "return_tokens": True})
    expected = answer.tolist()
    if expected[-1] == tokenizer.eos_token_id:
        expected = expected[:-1]
    assert said["tokens"][: len(expected)] == expected


@pytest.mark.parametrize("rslora", [False, True])
def test_an_adapter_alone_gives_llama_cpp_what_peft_computes(files, tmp_path, rslora):
    from peft import LoraConfig, get_peft_model

    base = AutoModelForCausalLM.from_pretrained(TINY, dtype=torch.float32)
    torch.manual_seed(0)
    targets = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
    alphas = {"v_proj": 4} if rslora else {}
    model = get_peft_model(
        base, LoraConfig(r=8, lora_alpha=16, use_rslora=rslora, target_modules=targets, alpha_pattern=alphas)
    )
    for name, weight in model.named_parameters():
        if "lora_B" in name:
            weight.data.normal_(0, 0.02)
    model.save_pretrained(tmp_path / "adapter")
    helpers.export.export_adapter(tmp_path / "adapter", TINY, tmp_path / "adapter.gguf")
    tokenizer = AutoTokenizer.from_pretrained(TINY)
    ids = tokenizer.apply_chat_template(QUESTION, add_generation_prompt=True, return_dict=False)
    with torch.no_grad():
        expected = torch.log_softmax(model.eval()(torch.tensor([ids])).logits[0, -1], -1)
    with engine.serving(files["f16"], lora=tmp_path / "adapter.gguf") as ask:
        said = ask("/completion", {"prompt": ids, "n_predict": 1, "n_probs": 5, "temperature": 0})
    for entry in said["completion_probabilities"][0]["top_logprobs"]:
        assert abs(entry["logprob"] - expected[entry["id"]].item()) < 0.02  # keys and values are fp16 there


def test_the_modelfile_stands_beside_its_file(files):
    folder = files["f16"].parent
    text = (folder / "Modelfile").read_text(encoding="utf-8")
    named = text.splitlines()[0].removeprefix("FROM ./")
    assert (folder / named).is_file() and "<s>" not in text and "[INST]" in text
    assert "none is written" in modelfile.write_text("x.gguf", "{{ foreign }}", 512)


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        (["--type", "q9"], "type must be one of f16"),
        (["--type", "iq2_xxs"], "IQ2_XXS needs an importance matrix"),
        (["--model", "nowhere"], "no config.json"),
        (["--output", "there.gguf"], "exists: delete it"),
        (["--output", "model.bin"], "must end in .gguf"),
        (["--output", "no/such/folder/m.gguf"], "there is no folder"),
    ],
)
def test_what_cannot_be_exported_is_one_sentence_and_leaves_nothing(tmp_path, monkeypatch, capsys, flags, said):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "there.gguf").write_text("mine")
    command = ["export", "--profile", "tiny", "--model", str(TINY), "--output", "new.gguf", *flags]
    assert cli.main(command) == cli.WRONG_REQUEST
    assert said in capsys.readouterr().err
    assert [path.name for path in tmp_path.iterdir()] == ["there.gguf"]
    assert (tmp_path / "there.gguf").read_text() == "mine"


def test_a_tokenizer_of_another_kind_and_a_quantized_model_are_refused_by_name(tmp_path):
    tokenizer = json.loads((TINY / "tokenizer.json").read_text(encoding="utf-8"))
    tokenizer["model"]["byte_fallback"] = False
    (tmp_path / "tokenizer.json").write_text(json.dumps(tokenizer))
    with pytest.raises(ValueError, match="BPE without byte fallback"):
        vocabulary.read(tmp_path, 2048)
    (tmp_path / "config.json").write_text(json.dumps({"quantization_config": {"quant_method": "gptq"}}))
    with pytest.raises(ValueError, match=r"already quantized \(gptq\)"):
        gguf_file.settings_of(tmp_path)
