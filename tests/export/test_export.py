"""GGUF: blocks as llama.cpp makes them, tokens as training read them, adapters, the file opened again, bad input."""

import doctest
import json

import faults
import kill_at
import numpy as np
import odd_shape
import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

import helpers.budget.export
import helpers.export
from helpers import cli
from helpers.models import TINY, gguf_types

gguf = pytest.importorskip("gguf", reason="gguf is not installed: `make setup` installs requirements/gguf.txt")
pytest.importorskip("xllamacpp", reason="xllamacpp is not installed: `make setup` installs requirements/gguf.txt")

import their_digests  # noqa: E402

from helpers.export import check, gguf_file, importance, lora, modelfile, quants, vocabulary  # noqa: E402
from helpers.models import attention, gguf_engine, gguf_model, packed  # noqa: E402
from helpers.show import gguf as show  # noqa: E402

QUESTION = [{"role": "user", "content": "Which animal does Edith keep?"}]
DIGESTS = json.loads(their_digests.DIGESTS.read_text(encoding="utf-8"))
TYPES = [name for name, kind in gguf_types.FILE_TYPES.items() if not kind.needs_importance]


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """The tiny model in every type that needs no importance matrix, through the command."""
    folder = tmp_path_factory.mktemp("gguf")
    command = ["export", "--profile", "tiny", "--model", str(TINY), "--type", ",".join(TYPES), "--modelfile"]
    assert cli.main([*command, "--output", str(folder / "tiny.gguf")]) == 0
    return {name: folder / f"tiny-{gguf_types.FILE_TYPES[name].name}.gguf" for name in TYPES}


@pytest.fixture(scope="module")
def odd(tmp_path_factory):
    """A folder with the model of odd_shape.py in every type that needs no importance matrix."""
    folder = tmp_path_factory.mktemp("odd")
    gguf_file.write(odd_shape.write(folder / "model"), helpers.export.outputs(folder / "odd.gguf", ",".join(TYPES)))
    return folder


@pytest.mark.parametrize(
    "module",
    [
        helpers.export,
        gguf_types,
        gguf_file,
        vocabulary,
        quants,
        modelfile,
        lora,
        importance,
        helpers.budget.export,
        show,
    ],
)
def test_examples_in_docstrings(module):
    assert doctest.testmod(module).failed == 0


@pytest.mark.parametrize("name", TYPES)
def test_every_tensor_is_what_llama_cpp_writes(files, name):
    assert their_digests.digest(files[name]) == DIGESTS["tiny"][name]


@pytest.mark.parametrize("name", TYPES)
def test_widths_that_no_block_of_256_fits_are_written_as_llama_cpp_does(odd, name):
    assert their_digests.digest(odd / f"odd-{gguf_types.FILE_TYPES[name].name}.gguf") == DIGESTS["odd"][name]


@pytest.mark.parametrize("model", ["tiny", "odd"])
def test_what_an_importance_matrix_weighs_is_what_llama_cpp_writes(odd, tmp_path, model):
    """IQ2_XXS, which is nothing without one, and three that round otherwise with one."""
    folder, plain, weighed = {"tiny": TINY, "odd": odd / "model"}[model], DIGESTS[model], DIGESTS[f"{model} weighed"]
    made = {name: tmp_path / f"{name}.gguf" for name in ("iq2_xxs", "q6_k", "q4_k_m", "q3_k_m")}
    kinds = {path: gguf_types.file_type(name) for name, path in made.items()}
    gguf_file.write(folder, kinds, their_digests.importance(folder))
    for name, path in made.items():
        assert their_digests.digest(path) == weighed[name] != plain.get(name)


def test_the_digests_are_of_what_llama_cpp_writes(odd, tmp_path):
    """Where its binding is installed, which no part of the project needs: their_digests.py says how."""
    pytest.importorskip("cyllama", reason="cyllama is not installed; the digests that it gave are kept")
    weights, number = their_digests.importance(odd / "model"), gguf_types.file_type("iq2_xxs").number
    found = their_digests.theirs(odd / "odd-F16.gguf", tmp_path / "theirs.gguf", number, weights)
    assert found == DIGESTS["odd weighed"]["iq2_xxs"]


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
    with gguf_engine.serving(files["q4_k_m"]) as server:
        assert check.check_tokens(server, tokenizer, list(check.PROBES), chats) == len(chats) + len(check.PROBES)
        tokenizer.add_tokens(["Edith"])
        with pytest.raises(ValueError, match=r"where training read .*Edith"):
            check.check_tokens(server, tokenizer, [QUESTION[0]["content"]], [])


@pytest.fixture(scope="module")
def questions():
    """40 held-out conversations up to their last question, as token ids."""
    tokenizer = AutoTokenizer.from_pretrained(TINY)
    rows = (TINY.parent / "heldout_conversations.jsonl").read_text(encoding="utf-8").splitlines()[:40]
    chats = [json.loads(row)["messages"][:-1] for row in rows]
    return [tokenizer.apply_chat_template(chat, add_generation_prompt=True, return_dict=False) for chat in chats]


def divergence(server, model, ids):
    """KL divergence of llama.cpp's next token from the model's, over all words; they agree on the likeliest."""
    with torch.no_grad():
        expected = torch.log_softmax(model(torch.tensor([ids])).logits[0, -1], -1).double()
    one = {"prompt": ids, "n_predict": 1, "temperature": 0, "n_probs": len(expected)}
    said = server.ask("/completion", one)["completion_probabilities"][0]["top_logprobs"]
    found = torch.full_like(expected, -torch.inf)
    found[[entry["id"] for entry in said]] = torch.tensor([entry["logprob"] for entry in said]).double()
    assert found.argmax() == expected.argmax()
    found -= found.logsumexp(0)  # the server adds up in fp32: to 1.00002
    likely = expected > -30  # below it a probability is no number in the server's JSON any more
    return (expected.exp() * (expected - found))[likely].sum().item()


def test_sixteen_bits_in_llama_cpp_say_what_transformers_says(files, questions):
    """Next token of 40 conversations: the whole distribution, and its likeliest word; and 40 greedy answers."""
    model = AutoModelForCausalLM.from_pretrained(TINY, dtype=torch.float32)
    divergences = []
    with gguf_engine.serving(files["f16"], exact=True) as server, torch.no_grad():
        for ids in questions:
            divergences.append(divergence(server, model, ids))
            answer = model.generate(torch.tensor([ids]), max_new_tokens=12, do_sample=False)[0, len(ids) :].tolist()
            asked = {"prompt": ids, "n_predict": 12, "temperature": 0, "return_tokens": True}
            written = server.ask("/completion", asked)["tokens"]
            end = answer[-1] == model.generation_config.eos_token_id
            assert [token for token in written if token != answer[-1] or not end] == answer[: len(answer) - end]
    assert sum(divergences) / len(divergences) < 2e-6  # 0.93e-6 here; llama.cpp rounds activations to 16 bits


def test_more_bits_are_nearer_to_the_whole_model(files, questions):
    """KL divergence over every token of 20 held-out questions, PyTorch on the files' blocks."""
    whole = AutoModelForCausalLM.from_pretrained(TINY, dtype=torch.float32)
    found = {}
    with torch.no_grad():
        expected = [torch.log_softmax(whole(torch.tensor([ids])).logits[0], -1) for ids in questions[:20]]
        for name in ("f16", "q8_0", "q6_k", "q5_k_m", "q4_k_m", "q3_k_m"):
            model, parts = gguf_model.load(files[name], torch.float32, "cpu", attention.register()), []
            for ids, known in zip(questions[:20], expected, strict=True):
                parts.append(
                    (known.exp() * (known - torch.log_softmax(model(torch.tensor([ids])).logits[0], -1))).sum(-1)
                )
            found[name] = torch.cat(parts).mean().item()
    assert found["f16"] < 1e-6
    assert found["q8_0"] < found["q6_k"] <= found["q5_k_m"] < found["q4_k_m"] < found["q3_k_m"]


def adapted(folder, strength, **settings):
    """The tiny model with a random adapter on every matrix, which is written to folder."""
    from peft import LoraConfig, get_peft_model

    torch.manual_seed(0)
    base = AutoModelForCausalLM.from_pretrained(TINY, dtype=torch.float32)
    model = get_peft_model(base, LoraConfig(r=8, lora_alpha=16, target_modules="all-linear", **settings)).eval()
    for name, weight in model.named_parameters():
        if "lora_B" in name:
            weight.data.normal_(0, strength)
    model.save_pretrained(folder)
    return model


@pytest.mark.parametrize(
    "settings",
    [{}, {"use_rslora": True, "alpha_pattern": {"v_proj": 4, "1.mlp.up_proj": 32}, "rank_pattern": {"o_proj": 3}}],
    ids=["plain", "rsLoRA, ranks and alphas of their own"],
)
def test_an_adapter_alone_gives_llama_cpp_what_peft_computes(files, questions, tmp_path, settings):
    """What is left, 1e-6, is the base's: before F16 matrices llama.cpp rounds activations to 16 bits. Its default of
    keys and values in F16 would add several times that.
    """
    model = adapted(tmp_path / "adapter", 0.05, **settings)
    helpers.export.export_adapter(tmp_path / "adapter", TINY, tmp_path / "adapter.gguf")
    with gguf_engine.serving(files["f16"], lora=tmp_path / "adapter.gguf", exact=True) as server:
        found = [divergence(server, model, ids) for ids in questions]
    assert sum(found) / len(found) < 2e-6


def test_an_adapter_that_a_gguf_file_cannot_hold_is_refused_by_name(tmp_path):
    adapted(tmp_path / "dora", 0.07, use_dora=True)
    with pytest.raises(ValueError, match="was trained with DoRA, which a GGUF adapter cannot hold: export the merged"):
        helpers.export.export_adapter(tmp_path / "dora", TINY, tmp_path / "adapter.gguf")
    assert [path.name for path in tmp_path.iterdir()] == ["dora"]


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


def test_a_foreign_file_under_the_name_of_the_unfinished_one_is_kept(tmp_path, capsys):
    mine = {name: tmp_path / f"{name}.gguf.partial" for name in ("model", "adapter", "odd")}
    for path in mine.values():
        path.write_bytes(b"GGUF, as a browser left it")
    gguf_file.write(TINY, {tmp_path / "model.gguf": gguf_types.file_type("q8_0")})
    assert "is kept as model.gguf.partial.damaged" in capsys.readouterr().out
    (tmp_path / "odd.gguf.partial").unlink()
    (tmp_path / "odd.gguf.partial").mkdir()
    writer = gguf.GGUFWriter(None, "llama")
    writer.add_tensor("one", np.ones(3, np.float32))
    for name in ("adapter", "odd"):
        gguf_file.finish(writer, tmp_path / f"{name}.gguf")
    assert gguf.GGUFReader(tmp_path / "adapter.gguf").tensors[0].data.tolist() == [1, 1, 1]
    kept = [tmp_path / f"{name}.gguf.partial.damaged" for name in ("model", "adapter")]
    assert all(path.read_bytes() == b"GGUF, as a browser left it" for path in kept)
    assert sorted(path.name for path in tmp_path.glob("*.partial*")) == sorted(
        f"{name}.gguf.partial.damaged" for name in mine
    )


def test_a_tokenizer_of_another_kind_and_a_quantized_model_are_refused_by_name(tmp_path):
    tokenizer = json.loads((TINY / "tokenizer.json").read_text(encoding="utf-8"))
    tokenizer["model"]["byte_fallback"] = False
    (tmp_path / "tokenizer.json").write_text(json.dumps(tokenizer))
    with pytest.raises(ValueError, match="BPE without byte fallback"):
        vocabulary.read(tmp_path, 2048)
    (tmp_path / "config.json").write_text(json.dumps({"quantization_config": {"quant_method": "gptq"}}))
    with pytest.raises(ValueError, match=r"already quantized \(gptq\)"):
        gguf_file.settings_of(tmp_path)


def test_a_file_under_its_name_is_whole_whenever_the_export_is_killed(tmp_path):
    """Killed at the first and the last of each kind of change, of two files in one pass."""
    names = ("q8_0", "f16")
    whole = {name: tmp_path / f"whole-{name}.gguf" for name in names}
    gguf_file.write(TINY, {file: gguf_types.file_type(name) for name, file in whole.items()})

    def act(folder):
        files = {folder / f"{name}.gguf": gguf_types.file_type(name) for name in names}
        gguf_file.write(TINY, files, check=lambda file: gguf.GGUFReader(file), name="tiny-mistral")

    scene, log = tmp_path / "scene", tmp_path / "log"
    scene.mkdir()
    assert not kill_at.is_killed(lambda: act(scene), scene, moment=10**6, log=log)
    moments = [event.value for event in faults.moments(log)]
    chosen = {event.value for event in kill_at.each_kind(faults.moments(log))} | set(moments[:: len(moments) // 6])
    assert len(chosen) >= 10
    for moment in sorted(chosen):
        for file in scene.iterdir():
            file.unlink()
        assert kill_at.is_killed(lambda: act(scene), scene, moment)
        for name in names:
            left = scene / f"{name}.gguf"
            assert not left.exists() or left.read_bytes() == whole[name].read_bytes()
    act(scene)  # over whatever the last one left
    assert {file.name for file in scene.iterdir()} == {f"{name}.gguf" for name in names}
