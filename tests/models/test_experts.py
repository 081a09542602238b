"""Mixtures of experts: opened as linear layers they compute what transformers' do, and nothing is made up."""

import doctest
import json

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from helpers.models import TINY, experts, loading

IDS = torch.randint(5, 2000, (2, 40), generator=torch.Generator().manual_seed(1))


@pytest.fixture(scope="session")
def tiny_mixture(tmp_path_factory):
    return experts.tiny_mixture(tmp_path_factory.mktemp("mixture") / "tiny")


def logits(model):
    with torch.no_grad():
        return model.eval()(IDS).logits


def test_examples_in_docstrings():
    assert doctest.testmod(experts).failed == 0


def test_the_tiny_mixture_is_the_dense_model_and_apart_it_is_the_fused_one(tiny_mixture):
    dense, fused = (
        logits(AutoModelForCausalLM.from_pretrained(one, dtype=torch.float32)) for one in (TINY, tiny_mixture)
    )
    apart = loading.causal_lm(tiny_mixture, dtype=torch.float32)
    torch.testing.assert_close(fused, dense, atol=5e-5, rtol=0)
    torch.testing.assert_close(logits(apart), fused, atol=1e-6, rtol=0)
    chosen = apart.model.layers[0].mlp.gate(torch.randn(500, 256))[2]
    assert set(chosen.reshape(-1).tolist()) == {0, 1, 2, 3}


def test_the_auxiliary_loss_is_transformers(tiny_mixture):
    found = []
    for model in (
        AutoModelForCausalLM.from_pretrained(tiny_mixture, dtype=torch.float32),
        loading.causal_lm(tiny_mixture, dtype=torch.float32),
    ):
        out = model(IDS, labels=IDS, output_router_logits=True)
        found.append((out.loss.item(), out.aux_loss.item()))
    assert found[0] == pytest.approx(found[1], abs=1e-6) and found[0][1] > 1


@pytest.mark.parametrize("weights", ["nf4", "fp16"])
def test_a_mixture_saved_is_what_transformers_opens_under_the_hubs_names(weights, tiny_mixture, tmp_path):
    from helpers.models import profile

    how = loading.base_quantization(profile("tiny", weights=weights), torch.float32)
    model = loading.causal_lm(tiny_mixture, dtype=torch.float32, quantization_config=how)
    model.save_pretrained(tmp_path)
    assert json.loads((tmp_path / "config.json").read_text())["architectures"] == ["MixtralForCausalLM"]
    assert "model.layers.3.block_sparse_moe.experts.3.w2.weight" in load_file(tmp_path / "model.safetensors")
    again = loading.causal_lm(tmp_path) if weights == "nf4" else AutoModelForCausalLM.from_pretrained(tmp_path)
    assert torch.equal(logits(again), logits(model))


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda tensors: tensors.pop("model.layers.1.block_sparse_moe.experts.2.w1.weight"), "has no .*experts.2"),
        (lambda tensors: tensors.update({"model.layers.1.mlp.experts.9.w1.weight": torch.ones(1)}), "more .*experts.9"),
        (lambda tensors: tensors.update({"lm_head.weight": torch.ones(3, 3)}), "another shape of lm_head"),
    ],
    ids=["missing", "unexpected", "of another shape"],
)
def test_weights_that_do_not_fit_are_an_error_and_never_made_up(change, said, tiny_mixture, tmp_path):
    tensors = load_file(tiny_mixture / "model.safetensors")
    change(tensors)
    save_file(tensors, tmp_path / "model.safetensors", {"format": "pt"})
    (tmp_path / "config.json").write_text((tiny_mixture / "config.json").read_text())
    with pytest.raises(ValueError, match=said):
        loading.causal_lm(tmp_path)


def test_experts_of_another_kind_are_refused_by_their_names():
    class Odd(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.experts = torch.nn.Linear(2, 2)

    with pytest.raises(ValueError, match="bias, weight, not gate_up_proj and down_proj"):
        experts.take_apart(torch.nn.Sequential(Odd()))
    with pytest.raises(ValueError, match="has no experts"):
        experts.take_apart(torch.nn.Sequential())


def test_a_tiny_mixture_that_is_there_is_left_as_it_is(tiny_mixture):
    before = (tiny_mixture / "model.safetensors").stat().st_mtime_ns
    experts.tiny_mixture(tiny_mixture)
    assert (tiny_mixture / "model.safetensors").stat().st_mtime_ns == before
