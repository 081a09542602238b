"""A mixture's layers: gradients of every kind of adapter are those of transformers' layers, whatever is saved."""

from dataclasses import replace

import pytest
import torch
from peft import PeftModel
from transformers import AutoTokenizer, MixtralConfig, MixtralForCausalLM

from helpers import finetune, merge
from helpers.budget import step as budget_step
from helpers.config import MergeConfig, RunConfig
from helpers.export import gguf_file
from helpers.finetune.base import adapters
from helpers.finetune.engine import layers, losses, mixture
from helpers.finetune.trainer import choose_layers
from helpers.models import TINY, families, loading, profile, shape
from helpers.models.loading import Precision
from helpers.quantize import gptq

IDS = torch.randint(3, 300, (2, 24), generator=torch.Generator().manual_seed(1))
SIZES = {
    "vocab_size": 300,
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "num_local_experts": 4,
    "num_experts_per_tok": 2,
    "max_position_embeddings": 128,
    "initializer_range": 0.2,
    "sliding_window": 16,
}


@pytest.fixture(scope="session", autouse=True)
def one_thread():
    torch.set_num_threads(1)


@pytest.fixture(scope="session")
def small(tmp_path_factory):
    """A Mixtral of four different experts."""
    folder = tmp_path_factory.mktemp("small")
    torch.manual_seed(1)
    MixtralForCausalLM(MixtralConfig(**SIZES)).half().save_pretrained(folder)
    AutoTokenizer.from_pretrained(TINY).save_pretrained(folder)
    return folder


def settings(folder, **values):
    return profile("tiny", model=str(folder), seq_len=64, **({"rank": 4, "alpha": 8, "weights": "fp16"} | values))


def adapted(config):
    """Base with adapters that do something."""
    model = finetune.attach_adapter(finetune.load_base(config)[0], config)
    draw = torch.Generator().manual_seed(5)
    for _, value in adapters(model):
        value.data = torch.randn(value.shape, generator=draw) / 10
    return model.train()


def gradients(model, ids=IDS):
    """(loss, name -> gradient) of one batch."""
    model.zero_grad()
    loss = model(input_ids=ids, labels=ids).loss
    loss.backward()
    return loss.item(), {name: value.grad for name, value in adapters(model)}


@pytest.mark.parametrize("weights", ["fp16", "nf4"])
@pytest.mark.parametrize("targets", ["attention", "experts", "all-linear", "v_proj,down_proj"])
def test_gradients_are_autograds_whatever_is_adapted_and_saved(targets, weights, small, monkeypatch):
    config = settings(small, targets=targets, weights=weights)
    theirs, expected = gradients(adapted(config))
    assert expected, "nothing is trained"
    for saves in layers.SAVED:
        for tokens in (4096, 5):  # an expert's tokens at once, or in pieces
            monkeypatch.setattr(mixture, "MLP_TOKENS", tokens)
            model = adapted(config)
            causal_lm = model.get_base_model()
            losses.install(causal_lm, "chunked")
            layers.check(causal_lm)
            layers.install(causal_lm, [saves] * 2)
            loss, found = gradients(model)
            assert loss == pytest.approx(theirs, abs=2e-5)
            for name, grad in expected.items():
                wanted = torch.zeros_like(found[name]) if grad is None else grad
                torch.testing.assert_close(found[name], wanted, atol=2e-5, rtol=2e-4, msg=lambda m, n=name: f"{n}: {m}")


def test_in_fp16_gradients_are_those_of_fp32_but_for_rounding(small, monkeypatch):
    config, found = settings(small, weights="nf4"), []
    for dtype in (torch.float32, torch.float16):
        monkeypatch.setattr("helpers.finetune.base.precision", lambda dtype=dtype: Precision(dtype, "as on a T4"))
        model = adapted(config)
        losses.install(model.get_base_model(), "chunked")
        layers.install(model.get_base_model(), ["everything", "input"])
        with torch.autocast("cpu", dtype, enabled=dtype == torch.float16):
            found.append(gradients(model)[1])
    whole, half = found
    apart = [((half[name] - grad).norm() / grad.norm()).item() for name, grad in whole.items() if grad.norm() > 0]
    assert 0 < sorted(apart)[len(apart) // 2] < 0.02
    assert {grad.dtype for grad in half.values()} == {torch.float32}


def test_experts_that_no_token_meets_get_gradients_of_zero(small):
    model = adapted(settings(small, targets="experts"))
    layers.install(model.get_base_model(), ["input"] * 2)
    losses.install(model.get_base_model(), "chunked")
    _, found = gradients(model, IDS[:1, :2])
    norms = [grad.abs().max().item() for grad in found.values()]
    assert min(norms) == 0 < max(norms)


@pytest.mark.parametrize(("targets", "matrices"), [("attention", 4), ("experts", 12), ("all-linear", 16)])
def test_adapters_are_as_many_as_counted_and_plain_peft_opens_them(targets, matrices, small, tmp_path):
    config = settings(small, targets=targets, weights="nf4")
    model = adapted(config)
    trained = [value for _, value in adapters(model)]
    assert len(trained) == 2 * 2 * matrices
    assert sum(value.numel() for value in trained) == budget_step.lora_parameters(config, shape(str(small)))
    model.save_pretrained(tmp_path)
    how = loading.base_quantization(config, torch.float32)
    base = loading.causal_lm(small, quantization_config=how, dtype=torch.float32, attn_implementation="efficient")
    again = PeftModel.from_pretrained(base, tmp_path).train()  # a CPU's answers round to bf16 in evaluation
    with torch.no_grad():
        assert torch.equal(again(IDS).logits, model(IDS).logits)


def test_targets_that_would_attach_nothing_are_refused_with_those_there_are(small):
    for names in ("w1,w2,w3", "gate", "qkv_proj"):
        with pytest.raises(ValueError, match=r"among q_proj, .*down_proj, all-linear, attention or experts for .*not"):
            finetune.load_base(settings(small, targets=names))


def test_the_auxiliary_loss_is_trained_through_transformers_layers(small, tmp_path):
    from helpers.models import experts

    folder = experts.tiny_mixture(tmp_path / "mixture")
    said = (folder / "config.json").read_text()
    (folder / "config.json").write_text(said.replace('"output_router_logits": false', '"output_router_logits": true'))
    config = settings(folder, targets="attention")
    model = adapted(config)
    causal_lm = model.get_base_model()
    causal_lm.config.router_aux_loss_coef = causal_lm.router_aux_loss_coef = 0.5
    theirs, expected = gradients(model)
    losses.install(causal_lm, "chunked")
    own, said = choose_layers(model, config)
    assert not own and "auxiliary loss" in said
    loss, found = gradients(model)
    assert loss == pytest.approx(theirs, abs=2e-5)
    name = next(iter(expected))
    torch.testing.assert_close(found[name], expected[name], atol=2e-5, rtol=2e-4)
    causal_lm.config.output_router_logits = False
    assert gradients(model)[0] < theirs - 0.5


def test_a_router_that_adds_noise_goes_through_transformers(small):
    family = families.of(MixtralConfig(**SIZES, router_jitter_noise=0.1).to_dict())
    decided = families.layers(family, settings(small))
    assert decided.computes == "transformers" and "router_jitter_noise" in decided.reason
    assert families.layers(replace(family, not_own=""), settings(small)).computes == "own"


@pytest.mark.parametrize("merge_base", ["original", "nf4"])
def test_a_mixture_and_its_adapter_merge_into_what_was_trained(merge_base, small, tmp_path):
    config = settings(small, targets="all-linear", weights="nf4")
    model = adapted(config)
    model.save_pretrained(tmp_path / "adapter")
    measured = merge.merge(small, tmp_path / "adapter", tmp_path / "merged", MergeConfig(merge_base=merge_base))
    assert measured["adapted_tensors"] == 2 * 16
    found = loading.causal_lm(tmp_path / "merged", dtype=torch.float32)
    if merge_base == "original":
        model = PeftModel.from_pretrained(loading.causal_lm(small, dtype=torch.float32), tmp_path / "adapter")
    with torch.no_grad():
        torch.testing.assert_close(
            found(IDS).logits, model.train()(IDS).logits, atol=0.1, rtol=0
        )  # fp16, of logits around 10
    stock = MixtralForCausalLM.from_pretrained(tmp_path / "merged", dtype=torch.float32)
    with torch.no_grad():
        torch.testing.assert_close(stock(IDS).logits, found(IDS).logits, atol=1e-5, rtol=0)


def test_gptq_and_gguf_of_a_mixture_are_refused_with_what_one_can_do(small, tmp_path):
    for refuse, said in (
        (lambda: gptq.refuse(shape(str(small)), RunConfig().quantize), "mixture of 4 experts.*adapter on its base"),
        (lambda: gguf_file.settings_of(small), "is a mixtral model, and .* are written here: convert"),
    ):
        with pytest.raises(ValueError, match=said):
            refuse()
