"""Shapes: exact against transformers' own models, and a sentence for what is not a decoder."""

import doctest
import json

import pytest

import helpers.models
from helpers import budget, hardware
from helpers.cli import stages as cli_stages
from helpers.models import KNOWN, MIXTRAL, PROFILES, profile, shape, shape_from_config


def test_examples_in_docstrings():
    assert doctest.testmod(helpers.models).failed == 0


@pytest.mark.parametrize(
    ("kind", "extra"),
    [
        ("MistralConfig", {"num_key_value_heads": 2, "head_dim": 32}),
        ("LlamaConfig", {"num_key_value_heads": 4, "tie_word_embeddings": True}),
        ("Qwen2Config", {"num_key_value_heads": 2, "tie_word_embeddings": True}),
        ("MixtralConfig", {"num_key_value_heads": 2, "num_local_experts": 4, "num_experts_per_tok": 2}),
    ],
)
def test_parameters_equal_those_of_the_real_model(kind, extra):
    import torch
    import transformers

    config = getattr(transformers, kind)(
        hidden_size=64, intermediate_size=160, num_hidden_layers=3, num_attention_heads=4, vocab_size=300, **extra
    )
    with torch.device("meta"):
        model = transformers.AutoModelForCausalLM.from_config(config)
    assert shape_from_config(config.to_dict(), "x").parameters == sum(p.numel() for p in model.parameters())


def test_lora_parameters_equal_those_of_peft():
    import torch
    from peft import LoraConfig, get_peft_model
    from transformers import AutoConfig, AutoModelForCausalLM

    config = profile("tiny", rank=8)
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(config.model.model))
    adapted = get_peft_model(model, LoraConfig(r=8, target_modules=list(config.adapter.target_modules)))
    expected = shape(config.model.model).lora_parameters(8, config.adapter.target_modules)
    assert adapted.get_nb_trainable_parameters()[0] == expected


def test_grouped_queries_make_the_cache_four_times_smaller():
    mistral, llama = shape("mistral-7b-v0.3"), shape("llama-2-7b")
    assert llama.kv_cache_bytes_per_token() == 4 * mistral.kv_cache_bytes_per_token()


def test_sliding_window_only_in_v01():
    assert shape("mistralai/Mistral-7B-v0.1").sliding_window == 4096
    assert shape("mistralai/Mistral-7B-v0.3").sliding_window is None


@pytest.mark.parametrize("name", KNOWN)
def test_known_names_in_any_case(name):
    assert shape(name.lower()).parameters == shape(name).parameters


@pytest.mark.parametrize(
    ("config", "complaint"),
    [
        ({"model_type": "bert"}, "no positive num_hidden_layers"),
        ({"num_hidden_layers": 0, "hidden_size": 8}, "num_hidden_layers"),
        ({"hidden_size": "big"}, "hidden_size"),
        ({"model_type": "mistral3", "text_config": {}}, "inside one that sees"),
    ],
)
def test_config_that_is_not_a_decoder(tmp_path, config, complaint):
    path = tmp_path / "config.json"
    path.write_text(json.dumps(config))
    with pytest.raises(ValueError, match=complaint) as caught:
        shape(str(path))
    assert "decoder" in str(caught.value) or "text alone" in str(caught.value)


@pytest.mark.parametrize("name", ["no-such-model", "../nowhere/config.json", ""])
def test_unknown_model_says_what_may_be_given(name):
    with pytest.raises(ValueError, match=r"model must be a folder with config\.json"):
        shape(name)


def test_hub_model_without_network_is_one_sentence(monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(ValueError, match="could not be fetched") as caught:
        shape("somebody/something-that-is-not-cached")
    assert "check the network" in str(caught.value)


@pytest.mark.parametrize("name", PROFILES)
def test_profiles_are_valid_and_known(name):
    assert profile(name).profile == name


def test_unknown_profile():
    with pytest.raises(ValueError, match="mistral-7b or tiny"):
        profile("huge")


@pytest.mark.parametrize(
    ("name", "why"),
    [
        (
            "mixtral-8x7b",
            "GPTQ of a mixture is not made here, and merged it takes 87.0 GiB in 16 bits: use the adapter",
        ),
        ("mixtral-8x7b-aqlm", "use the adapter on its base"),
        ("mistral-7b-v0.3", ""),
    ],
)
def test_a_whole_run_leaves_out_what_a_model_cannot_be_made_into_and_counts_no_more(name, why, capsys):
    sizes = shape(name)
    config = profile("mistral-7b", model=name, targets="attention", weights="aqlm" if sizes.additive else "nf4")
    stages = cli_stages.stages_of_run(config)
    found = budget.budget(config, sizes, hardware.machine("a100-80"), "run")
    assert why in capsys.readouterr().err and bool(why) == bool(sizes.adapter_only)
    for stage, part, hours in (("merge", "merged model", "merging"), ("quantize", "GPTQ model", "GPTQ")):
        assert (stage in stages) == (part in found.disk.parts) == (hours in found.time.parts) == (not why)
    if sizes.additive is None:  # asked for by itself, a merge is counted as any
        assert "merged model" in budget.budget(config, sizes, hardware.machine("a100-80"), "merge").disk.parts


def test_what_no_setting_makes_fit_names_the_same_shape_in_two_bits():
    in_vram, on_disk = budget.budget(
        profile("mistral-7b", model="mixtral-8x7b"), MIXTRAL, hardware.machine("t4")
    ).reasons
    for reason in (in_vram, on_disk):
        assert "ISTA-DASLab/Mixtral-8x7b-AQLM-2Bit-1x16-hf, of the same shape in 2 bits" in reason
    assert shape("ISTA-DASLab/Mixtral-8x7b-AQLM-2Bit-1x16-hf").parameters == MIXTRAL.parameters
