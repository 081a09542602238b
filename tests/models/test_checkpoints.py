"""Folders as people have them: language models inside ones that see, and bases that are packed or of other families."""

import doctest
import json

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, Mistral3Config, Mistral3ForConditionalGeneration

from helpers import budget, finetune, hardware, inference, merge
from helpers.config import MergeConfig
from helpers.finetune.base import adapters
from helpers.models import TINY, loading, profile, shape, wrapped

IDS = torch.randint(5, 2000, (2, 24), generator=torch.Generator().manual_seed(1))
TEXT = {
    "model_type": "ministral3", "vocab_size": 4096, "hidden_size": 64, "intermediate_size": 128,
    "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 16,
    "max_position_embeddings": 512, "sliding_window": None, "initializer_range": 0.2,
    "rope_parameters": {
        "rope_type": "yarn", "rope_theta": 1e6, "factor": 16.0, "original_max_position_embeddings": 32,
        "beta_fast": 32.0, "beta_slow": 1.0, "mscale": 1.0, "mscale_all_dim": 1.0, "llama_4_scaling_beta": 0.1,
    },
}  # fmt: skip
"""As Ministral 3's text_config, but small."""
EYES = {
    "model_type": "pixtral", "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 1,
    "num_attention_heads": 2, "head_dim": 16, "image_size": 28, "patch_size": 14,
}  # fmt: skip


def test_examples_in_docstrings():
    assert doctest.testmod(wrapped).failed == 0


@pytest.fixture(scope="module", params=["a head of its own", "tied", "other names"])
def seeing(request, tmp_path_factory):
    """(folder as the hub has Ministral 3, transformers' own model of it); with the names of a later transformers 4."""
    folder, tied = tmp_path_factory.mktemp("seeing"), request.param == "tied"
    torch.manual_seed(0)
    config = Mistral3Config(
        text_config=TEXT | {"tie_word_embeddings": tied}, vision_config=EYES, tie_word_embeddings=tied, dtype="float32"
    )
    model = Mistral3ForConditionalGeneration(config).eval()
    model.save_pretrained(folder)
    names = {"language_model.model.": "model.language_model.", "language_model.lm_head": "lm_head"}
    tensors = load_file(folder / "model.safetensors")
    assert any(name.startswith("language_model.model.layers.1.") for name in tensors), "the hub's names"
    assert any(name.startswith("vision_tower.") for name in tensors)
    if request.param == "other names":
        for old, new in names.items():
            tensors = {name.replace(old, new): value for name, value in tensors.items()}
        save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    for file in ("tokenizer.json", "tokenizer_config.json"):
        (folder / file).write_bytes((TINY / file).read_bytes())
    return folder, model


def logits(model):
    with torch.no_grad():
        return model(input_ids=IDS).logits


def settings(folder, **values):
    return profile("tiny", model=str(folder), weights="fp16", **values)


def test_the_language_model_of_one_that_sees_is_opened_by_itself(seeing):
    folder, whole = seeing
    text = loading.causal_lm(folder, dtype=torch.float32)
    assert type(text).__name__ == "Ministral3ForCausalLM"
    assert torch.equal(logits(text), logits(whole))
    sizes = shape(str(folder))
    assert sizes.parameters == sum(value.numel() for value in text.parameters()) and sizes.model_type == "ministral3"
    assert torch.equal(logits(inference.load(folder, settings(folder)).model), logits(whole))


def test_what_is_trained_on_it_is_merged_into_a_model_of_text_alone(seeing, tmp_path):
    folder, _ = seeing
    config = settings(folder)
    model = finetune.attach_adapter(finetune.load_base(config)[0], config)
    for _, value in adapters(model):
        torch.nn.init.normal_(value, std=0.05)
    model.save_pretrained(tmp_path / "adapter")
    expected = logits(model.eval())
    assert torch.equal(logits(inference.load(tmp_path / "adapter", config).model), expected)
    merge.merge(folder, tmp_path / "adapter", tmp_path / "merged", MergeConfig(merge_base="original"))
    said = json.loads((tmp_path / "merged" / "config.json").read_text())
    assert (said["model_type"], said["architectures"]) == ("ministral3", ["Ministral3ForCausalLM"])
    stock = AutoModelForCausalLM.from_pretrained(tmp_path / "merged", dtype=torch.float32).eval()
    close = 5e-3 * expected.abs().max().item()  # fp16's rounding of every weight
    torch.testing.assert_close(logits(stock), expected, atol=close, rtol=0)
    assert not isinstance(stock, PeftModel) and (logits(stock) - logits(model.get_base_model())).abs().max() < close


def test_of_a_language_model_nothing_is_made_up_either(seeing, tmp_path, caplog):
    folder, _ = seeing
    loading.causal_lm(folder)
    assert "vision_tower" not in caplog.text, "what is left out on purpose is no warning"
    whole = load_file(folder / "model.safetensors")
    lost = next(name for name in whole if name.endswith("layers.1.mlp.up_proj.weight"))
    (tmp_path / "config.json").write_bytes((folder / "config.json").read_bytes())
    for tensors, said in (
        ({name: value for name, value in whole.items() if name != lost}, r"has no model\.layers\.1\.mlp\.up_proj"),
        (whole | {"more.weight": torch.ones(1)}, r"more weights than the model takes, such as more\.weight \(1 such"),
    ):
        save_file(tensors, tmp_path / "model.safetensors", {"format": "pt"})
        with pytest.raises(ValueError, match=said):
            loading.causal_lm(tmp_path)


def as_config(folder, **changes):
    """A folder with the tiny Mistral's config.json, changed."""
    folder.mkdir()
    config = json.loads((TINY / "config.json").read_text()) | changes
    (folder / "config.json").write_text(json.dumps(config))
    return profile("tiny", model=str(folder))


@pytest.mark.parametrize("method", ["fp8", "gptq", "awq", "compressed-tensors"])
def test_a_base_that_is_packed_otherwise_is_refused_before_it_is_read(method, tmp_path):
    config = as_config(tmp_path / "packed", quantization_config={"quant_method": method})
    for refuse in (
        lambda: finetune.load_base(config),
        lambda: budget.plan(config, shape(config.model.model), hardware.machine("t4")),
    ):
        with pytest.raises(ValueError, match=rf"is stored as {method}: .* take the same model in 16 bits"):
            refuse()


def test_a_base_in_bitsandbytes_own_4_bits_is_counted_as_it_lies_there(tmp_path):
    how = {"quant_method": "bitsandbytes", "load_in_4bit": True, "bnb_4bit_quant_type": "nf4"}
    config = as_config(tmp_path / "packed", quantization_config=how)
    sizes = shape(config.model.model)
    elsewhere = config.with_values(model="somebody/mixtral-in-4-bits")  # on the hub, so that it is downloaded
    parts = budget.budget(elsewhere, sizes, hardware.machine("cpu")).disk.parts
    assert parts["base, NF4"] < 0.6 * 2 * sizes.parameters / 2**30


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"model_type": "gpt_oss", "num_local_experts": 32}, "experts are stored in MXFP4.*; take Qwen/Qwen3-30B"),
        ({"model_type": "deepseek_v3", "n_routed_experts": 64}, "attention are compressed.*; take Qwen/Qwen3-30B"),
        ({"model_type": "qwen3_next", "num_experts": 512}, "linear attention.*; take Qwen/Qwen3-30B-A3B or"),
        ({"model_type": "jetmoe", "num_local_experts": 8}, "a mixture of 8 experts of the family jetmoe.*take one of"),
        ({"model_type": "gemma3", "text_config": {"model_type": "gemma3_text"}}, "sees or hears: of those, mistral3"),
    ],
)  # fmt: skip
def test_families_that_are_not_trained_here_are_refused_with_the_reason_and_another(changes, sentence, tmp_path):
    config = as_config(tmp_path / "other", **changes)
    with pytest.raises(ValueError, match=sentence):
        finetune.load_base(config)
