"""Families: what is budgeted is what runs, and losses are transformers' own, over tiny random models of every one."""

import doctest
import json
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
import transformers
from datasets import Dataset
from transformers import AutoModelForCausalLM, AutoTokenizer
from transformers.masking_utils import (
    bidirectional_mask_function,
    causal_mask_function,
    chunked_causal_mask_function,
    sdpa_mask,
    sliding_window_causal_mask_function,
)

from helpers import budget, finetune, hardware, inference
from helpers.budget import vram
from helpers.budget.step import Step
from helpers.evaluate.perplexity import Window, window_losses
from helpers.finetune.base import adapters, check_targets
from helpers.finetune.engine import losses
from helpers.finetune.trainer import choose_layers
from helpers.models import TINY, attention, families, profile, shape, shape_from_config
from helpers.models.families import KINDS
from helpers.models.loading import Precision

WORDS, TOKENS = 300, 24
T4 = hardware.machine("t4")
SWITCHES = {
    "attention_bias", "mlp_bias", "use_bias", "use_qkv_bias", "qkv_bias", "attention_out_bias", "use_qk_norm",
    "qk_layernorm",
}  # fmt: skip
SIZES = {
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": WORDS,
    "max_position_embeddings": 128,
    "initializer_range": 0.2,
    "pad_token_id": 0,
    "eos_token_id": 2,
    "bos_token_id": 1,
}
MORE = {
    "sliding_window": 8,
    "use_sliding_window": True,
    "logits_scaling": 4.0,
    "attention_multiplier": 0.2,
    "logit_scale": 0.25,
    "final_logit_softcapping": 5.0,
    "attn_logit_softcapping": 3.0,
    "num_local_experts": 4,
    "num_experts": 4,
    "n_routed_experts": 4,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 48,
    "shared_expert_intermediate_size": 80,
    "attention_dropout": 0.0,
    "residual_dropout": 0.0,
}
"""Set in every configuration class that has the field, so that nothing special is switched off."""


@pytest.fixture(scope="session", autouse=True)
def one_thread():
    torch.set_num_threads(1)


def tiny_config(name: str, **values):
    """A small configuration of a family, everything special in use."""
    kind = transformers.CONFIG_MAPPING[name]
    has = kind().to_dict()
    some = {field: value for field, value in MORE.items() if field in has or field in kind.attribute_map}
    if "head_dim" in has:
        some["head_dim"] = 32 if KINDS[name].own or KINDS[name].head_norms == "each" else 16
    return kind(**(SIZES | some | values))


@pytest.fixture(scope="session")
def tiny_model(tmp_path_factory):
    """family -> the folder of a small random model of it."""
    folders = {}

    def make(name: str, **values):
        place = (name, *values.items())
        if place not in folders:
            folder = tmp_path_factory.mktemp(name)
            torch.manual_seed(3)
            model = AutoModelForCausalLM.from_config(tiny_config(name, **values))
            for parameter in model.parameters():
                if parameter.dim() == 1:  # a norm of ones or a bias of zeros would hide one that is left out
                    parameter.data += 0.1 * torch.randn_like(parameter)
            model.save_pretrained(folder)
            AutoTokenizer.from_pretrained(TINY).save_pretrained(folder)
            folders[place] = folder
        return folders[place]

    return make


def tiny_run(folder, **values):
    """Settings that train a small model of any family: its own linear layers as targets, weights as they are."""
    targets = ",".join(shape(str(folder)).family.targets)
    asked = {"seq_len": 64, "rank": 4, "alpha": 8, "weights": "fp16", "targets": targets, "max_steps": 2}
    return profile("tiny", model=str(folder), **(asked | values))


def adapted(config):
    """Base with adapters that do something."""
    model = finetune.attach_adapter(finetune.load_base(config)[0], config)
    draw = torch.Generator().manual_seed(5)
    for _, value in adapters(model):
        value.data = torch.randn(value.shape, generator=draw) / 10
    return model


def row(tokens: int = TOKENS) -> list[int]:
    return torch.randint(3, WORDS, (tokens,), generator=torch.Generator().manual_seed(1)).tolist()


def test_examples_in_docstrings():
    assert doctest.testmod(families).failed == 0


# ---- every family ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("switched", [False, True], ids=["without biases", "with biases"])
@pytest.mark.parametrize("name", KINDS)
def test_weights_are_as_many_as_transformers_makes(name, switched):
    has = transformers.CONFIG_MAPPING[name]().to_dict()
    layers = {"num_hidden_layers": 3} | ({"mlp_only_layers": [1]} if "mlp_only_layers" in has else {})
    config = tiny_config(name, **layers, **dict.fromkeys(SWITCHES & set(has), switched))
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    assert shape_from_config(config.to_dict(), "x").parameters == sum(p.numel() for p in model.parameters())


@pytest.mark.parametrize("name", KINDS)
def test_a_config_json_that_leaves_defaults_out_means_what_transformers_takes(name):
    kind = transformers.CONFIG_MAPPING[name]
    whole = kind().to_dict()
    needed = ("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "vocab_size")
    sparse = {"model_type": name} | {field: whole[field] for field in needed}
    assert shape_from_config(sparse, "x") == shape_from_config(whole, "x")


@pytest.mark.parametrize("name", KINDS)
def test_what_is_budgeted_runs_and_its_loss_and_perplexity_are_transformers(name, tiny_model):
    folder = tiny_model(name)
    config, ids = tiny_run(folder), row()
    sizes = shape(str(folder))
    model = adapted(config)
    base = model.get_base_model()
    with losses.transformers_attention(base):
        theirs = losses.forward_loss(base, ids, torch.float32)
        with torch.no_grad():
            logits = model.eval()(input_ids=torch.tensor([ids]), use_cache=False).logits[0].float()
    window = Window(ids, 1)
    nats = torch.nn.functional.cross_entropy(logits[:-1], torch.tensor(ids[1:]), reduction="sum").item()
    assert nats / (TOKENS - 1) == pytest.approx(theirs, abs=1e-4)
    assert window_losses(model, [window, window])[1] / (TOKENS - 1) == pytest.approx(theirs, abs=1e-4)

    losses.install(base, config.train.loss)
    own, said = choose_layers(model, config)
    runs = {"training_forward" in layer.forward.__qualname__ for layer in base.model.layers}
    assert runs == {own} == {Step.of(config, sizes).backend == "own"} == {KINDS[name].own}, said
    used = {"efficient": attention.NAME, "math": "sdpa", "eager": "eager"}
    kernel = families.attention(sizes.family, config.model.attention).kernel
    assert base.config._attn_implementation == used[kernel]
    assert Step.of(config, sizes).attention == kernel
    assert losses.forward_loss(base, ids, torch.float32) == pytest.approx(theirs, abs=1e-4)
    model.train()
    labels = torch.tensor([ids])
    trained = model(input_ids=labels, labels=labels)
    assert trained.loss.item() == pytest.approx(theirs, abs=1e-4)
    trained.loss.backward()
    assert all(value.grad is not None for _, value in adapters(model))


@pytest.mark.parametrize("name", ["granite", "cohere", "gemma2", "gemma3_text"])
def test_inference_opens_a_family_with_the_attention_that_is_right(name, tiny_model):
    folder = tiny_model(name)
    loaded = inference.load(folder, tiny_run(folder))
    plain = AutoModelForCausalLM.from_pretrained(folder, attn_implementation="eager").eval()
    ids = torch.tensor([row()])
    with torch.no_grad():
        torch.testing.assert_close(loaded.model(ids).logits, plain(ids).logits, atol=1e-4, rtol=1e-4)


# ---- the loss --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("how", [families.Logits(), families.Logits(0.25), families.Logits(2.0, 1.5)], ids=str)
def test_the_chunked_losss_gradient_is_autograds(how, monkeypatch):
    monkeypatch.setattr(losses, "LOGITS_AT_ONCE", 150)  # three rows a piece
    torch.manual_seed(0)
    head, labels = torch.nn.Linear(16, 50, bias=False).requires_grad_(False), torch.randint(0, 50, (2, 6))
    hidden = torch.randn(2, 6, 16, requires_grad=True)
    found = [losses.label_loss(hidden, head, labels, None, kind, how) for kind in ("full", "chunked")]
    grads = [torch.autograd.grad(loss, hidden)[0] for loss in found]
    assert found[0].item() == pytest.approx(found[1].item(), abs=1e-6)
    torch.testing.assert_close(grads[0], grads[1], atol=1e-6, rtol=1e-5)


def test_an_fp32_head_is_multiplied_in_16_bits_some_words_at_a_time(monkeypatch):
    torch.manual_seed(0)
    head, labels = torch.nn.Linear(16, 50, bias=False).requires_grad_(False), torch.randint(0, 50, (2, 6))
    hidden = torch.randn(2, 6, 16, requires_grad=True)
    found = []
    for words in (7, 50):
        monkeypatch.setattr(losses, "LOSS_WORDS", words)
        assert len(list(losses.parts(head.weight, torch.bfloat16))) == -(-50 // words)
        with torch.autocast("cpu", torch.bfloat16):
            loss = losses.label_loss(hidden, head, labels, None, "chunked")
        found.append((loss.item(), torch.autograd.grad(loss, hidden)[0]))
    assert next(part for _, part in losses.parts(head.weight, torch.float32)).data_ptr() == head.weight.data_ptr()
    assert found[0][0] == pytest.approx(found[1][0], abs=1e-6)
    torch.testing.assert_close(found[0][1], found[1][1], atol=2e-3, rtol=2e-2)


@pytest.fixture(scope="session")
def prepared(tmp_path_factory):
    folder = tmp_path_factory.mktemp("prepared")
    ids = row(24)
    columns = {"input_ids": [ids] * 8, "assistant_masks": [[0] + [1] * 23] * 8}
    Dataset.from_dict(columns).save_to_disk(str(folder / "train"))
    Dataset.from_dict(columns).select(range(2)).save_to_disk(str(folder / "heldout"))
    return folder


def trainer_of(config, prepared, folder):
    model, tokenizer = finetune.load_base(config)
    model = finetune.attach_adapter(model, config)
    return finetune.build_trainer(config, model, tokenizer, prepared, folder / "checkpoints")


def test_a_loss_that_is_not_transformers_is_refused_with_both_numbers(tiny_model, prepared, tmp_path, monkeypatch):
    config = tiny_run(tiny_model("granite"))
    right = trainer_of(config, prepared, tmp_path).loss_check
    assert abs(right["transformers"] - right["ours"]) < 1e-4 and right["tokens"] == 24
    monkeypatch.setitem(KINDS, "granite", replace(KINDS["granite"], logit_divisor=""))  # as it was trained once
    said = rf"one batch is {right['transformers']:.4f} .* own forward and \d+\.\d{{4}} as it would be trained"
    with pytest.raises(ValueError, match=said):
        trainer_of(config, prepared, tmp_path)


def test_the_check_is_made_before_every_training_and_again_when_it_goes_on(tiny_model, prepared, tmp_path):
    config = tiny_run(tiny_model("mistral"), weights="nf4", save_steps=1)
    first = finetune.train(trainer_of(config, prepared, tmp_path))
    again = finetune.train(trainer_of(config, prepared, tmp_path))
    assert again["resumed_from_step"] == 2
    for measured in (first, again):
        assert measured["loss_check"]["ours"] == pytest.approx(measured["loss_check"]["transformers"], abs=1e-4)


@pytest.mark.parametrize(("dtype", "share"), [(torch.float32, 1e-4), (torch.float16, 0.008), (torch.bfloat16, 0.063)])
def test_the_bound_allows_rounding_and_no_more(dtype, share):
    assert losses.bound(dtype, 5.0) == pytest.approx(5 * share, rel=0.02)
    for other in (5.0 * (1 + 1.1 * share), float("nan")):
        with pytest.raises(ValueError, match=r"one batch is 5\.0000"):
            losses.check(5.0, other, dtype, 100)
    assert losses.check(5.0, 5.0 * (1 + 0.9 * share), dtype, 300)["tokens"] == losses.CHECKED_TOKENS


# ---- attention -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("function", "local_size", "skips"),
    [
        (causal_mask_function, None, True),
        (sliding_window_causal_mask_function(4), 4, True),
        (chunked_causal_mask_function(4, torch.zeros(1, dtype=torch.long)), 4, False),
        (bidirectional_mask_function, None, False),
        (lambda batch, head, query, key: (key <= query) | (key < 3), None, False),
    ],
    ids=["causal", "window", "chunks", "both ways", "prefix"],
)
@pytest.mark.parametrize("allowed", [True, False])
def test_only_causal_masks_and_windows_are_left_out(function, local_size, skips, allowed):
    sizes = {"batch_size": 1, "q_length": 10, "kv_length": 10, "mask_function": function, "device": "cpu"}
    asked = sizes | {"local_size": local_size, "allow_is_causal_skip": allowed, "allow_is_bidirectional_skip": True}
    found = attention.mask(**asked, config=SimpleNamespace(model_type="mistral"))
    for silent in ("qwen2_moe", "unheard"):  # their layers do not say which window they have
        left_out = attention.mask(**asked, config=SimpleNamespace(model_type=silent)) is None
        assert left_out == (found is None and function is causal_mask_function)
    whole = sdpa_mask(**sizes, local_size=local_size, allow_is_causal_skip=False)
    assert (found is None) == (skips and allowed)
    assert found is None or torch.equal(found, whole)


def test_what_attention_cannot_compute_is_an_error():
    q = torch.randn(1, 2, 5, 8)
    module = SimpleNamespace(is_causal=True)
    attention.attention(module, q, q, q, None, softcap=None, position_ids=torch.arange(5))
    for unknown in ({"softcap": 30.0}, {"s_aux": torch.zeros(2)}, {"position_bias": q}):
        with pytest.raises(ValueError, match=f"knows no {next(iter(unknown))}.*attention=eager"):
            attention.attention(module, q, q, q, None, **unknown)
    with pytest.raises(ValueError, match="looks ahead"):
        attention.attention(SimpleNamespace(is_causal=False), q, q, q, None)


# ---- decided before training -----------------------------------------------------------------------------------------

QWEN3_8B = shape_from_config(
    {
        "model_type": "qwen3",
        "hidden_size": 4096,
        "intermediate_size": 12288,
        "num_hidden_layers": 36,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
        "vocab_size": 151936,
    },
    "Qwen/Qwen3-8B",
)
QWEN3_30B = shape_from_config(
    {
        "model_type": "qwen3_moe",
        "hidden_size": 2048,
        "intermediate_size": 6144,
        "moe_intermediate_size": 768,
        "num_hidden_layers": 48,
        "num_attention_heads": 32,
        "num_key_value_heads": 4,
        "num_experts": 128,
        "num_experts_per_tok": 8,
        "head_dim": 128,
        "vocab_size": 151936,
    },
    "Qwen/Qwen3-30B-A3B",
)


def test_a_family_without_own_layers_is_budgeted_so_and_the_plan_says_so():
    config = profile("mistral-7b", batch_size=2, seq_len=1024, checkpointing=0)
    found = budget.budget(config, QWEN3_8B, T4)
    assert found == budget.budget(config.with_values(kernels="plain"), QWEN3_8B, T4)
    assert not found.fits and found.vram.process_gib > 19  # 12.5 GiB, had our own layers computed it
    plan = budget.plan(profile("mistral-7b", seq_len=1024), QWEN3_8B, T4)
    assert plan.budget.fits and plan.config.train.checkpointing > 0
    assert "layers compute through transformers" in plan.reasons[-1] and "not of qwen3" in plan.reasons[-1]
    quiet = budget.plan(profile("mistral-7b", seq_len=1024), shape("mistral-7b-v0.3"), T4).reasons
    assert not any("transformers" in reason for reason in quiet)
    dropout = budget.plan(profile("mistral-7b", dropout=0.05), shape("mistral-7b-v0.3"), T4).reasons
    assert "LoRA dropout needs PEFT's own layers" in dropout[-1]


def test_experts_are_counted_and_those_of_nobody_known_are_refused():
    assert round(QWEN3_30B.parameters / 1e9, 1) == 30.5
    assert round(QWEN3_30B.active_parameters / 1e9, 2) == 3.35
    assert 15.5 < sum(vram.weights(profile("mistral-7b"), QWEN3_30B).values()) / 2**30 < 15.6
    rest = {field: SIZES[field] for field in SIZES if field.startswith(("num", "hidden", "inter", "vocab"))}
    for unknown in (
        {"model_type": "deepseek_v3", "n_routed_experts": 256},
        {"model_type": "gpt_oss", "num_local_experts": 32},
        {"model_type": "ernie4_5_moe", "moe_num_experts": 64},
        {"model_type": "llama", "num_local_experts": 8},
    ):
        with pytest.raises(ValueError, match=f"a mixture of .* experts of the family {unknown['model_type']}"):
            shape_from_config(rest | unknown, "x")
    with pytest.raises(ValueError, match="the family falcon_h1, whose weights and loss nobody has compared"):
        shape_from_config(rest | {"model_type": "falcon_h1"}, "x")


@pytest.mark.parametrize("name", ["granitemoe", "qwen2_moe", "phi3", "starcoder2"])
def test_budget_and_training_refuse_the_same_targets_in_the_same_words(name, tiny_model):
    folder = tiny_model(name)
    config = tiny_run(folder, targets="all-linear")
    said = []
    for attempt in (
        lambda: budget.plan(config, shape(str(folder)), T4),
        lambda: finetune.load_base(config),
        lambda: check_targets(AutoModelForCausalLM.from_pretrained(folder), config),
    ):
        with pytest.raises(ValueError, match="targets must be among") as caught:
            attempt()
        said.append(str(caught.value))
    assert len(set(said)) == 1
    assert ("one tensor holds all 4 experts" in said[0]) == (name == "granitemoe")
    assert ("PEFT takes that name of a qwen2_moe" in said[0]) == (name == "qwen2_moe")


@pytest.mark.parametrize("name", ["mixtral", "qwen3_moe", "granitemoe"])
def test_a_mixture_trains_on_attention_with_the_weights_that_are_budgeted(name, tiny_model, prepared, tmp_path):
    folder = tiny_model(name)
    config = tiny_run(folder, weights="nf4", targets="attention")
    trainer = trainer_of(config, prepared, tmp_path)
    held = {True: 0, False: 0}  # is packed: bytes
    for key, value in trainer.model.named_parameters():
        if "lora" not in key:
            held[value.dtype == torch.uint8] += value.nbytes
    parts = vram.weights(config, shape(str(folder)))
    assert held[True] == parts["4-bit weights"]
    assert held[False] == 2 * (parts["16-bit weights"] + parts.get("experts in 16 bits", 0))  # fp32 here
    assert ("experts in 16 bits" in parts) == (name == "granitemoe")
    measured = finetune.train(trainer)
    assert measured["steps_applied"] == 2
    assert ("our own layers compute" in measured["layers"]) == (name == "mixtral")


@pytest.mark.parametrize("switch", [{"is_causal": False}, {"use_bidirectional_attention": True}])
def test_attention_that_looks_ahead_is_refused(switch, tiny_model, tmp_path):
    name = "gemma3_text" if "use_bidirectional_attention" in switch else "mistral"
    written = json.loads((tiny_model(name) / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(written | switch))
    config = tiny_run(tmp_path)
    for attempt in (lambda: finetune.load_base(config), lambda: budget.plan(config, shape(str(tmp_path)), T4)):
        with pytest.raises(ValueError, match="looks ahead"):
            attempt()


@pytest.mark.parametrize(
    ("switch", "said"), [({"attention_dropout": 0.1}, "attention_dropout"), ({"hidden_act": "gelu"}, "hidden_act=gelu")]
)
def test_a_llama_that_our_layers_would_compute_wrong_goes_through_transformers(switch, said):
    config = tiny_config("llama", **switch).to_dict()
    decided = families.layers(families.of(config), profile("tiny"))
    assert decided.computes == "transformers" and said in decided.reason


def test_layers_chosen_for_a_model_that_they_are_not_made_for_are_an_error(tiny_model, monkeypatch):
    monkeypatch.setitem(KINDS, "qwen3", replace(KINDS["qwen3"], own=True))
    monkeypatch.setattr(families, "OWN", (*families.OWN, "qwen3"))
    config = tiny_run(tiny_model("qwen3"))
    with pytest.raises(ValueError, match="more in a layer than two norms"):
        choose_layers(adapted(config), config)


# ---- upcast ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("weights", ["nf4", "fp16"])
def test_upcast_computes_in_16_bits_through_transformers_and_weighs_what_is_budgeted(weights, tiny_model, monkeypatch):
    monkeypatch.setattr("helpers.finetune.base.precision", lambda: Precision(torch.bfloat16, "as on an L4"))
    folder = tiny_model("mistral")
    config = tiny_run(folder, weights=weights, upcast=True)
    sizes, model = shape(str(folder)), adapted(config)
    base = model.get_base_model()
    own, said = choose_layers(model, config)
    assert not own and "upcast" in said and Step.of(config, sizes).backend == "plain"
    held = sum(value.nbytes for name, value in model.named_parameters() if "lora" not in name)
    parts = vram.weights(config, sizes)
    assert held == sum(size for name, size in parts.items() if name != "quantization scales")
    assert base.lm_head.weight.dtype == base.model.norm.weight.dtype == torch.float32
    computed = {}
    for name in ("self_attn.q_proj", "mlp.down_proj"):
        base.model.layers[0].get_submodule(name).register_forward_hook(
            lambda _, inputs, result, name=name: computed.update({name: result.dtype})
        )
    base.model.layers[0].register_forward_hook(lambda _, inputs, result: computed.update(stream=result.dtype))
    losses.install(base, "chunked")
    ids = torch.tensor([row()])
    with torch.autocast("cpu", torch.bfloat16):
        loss = model(input_ids=ids, labels=ids).loss
    if weights == "nf4":  # bitsandbytes computes in 16 bits, and answers in what it was asked in
        matrices = [part for part in base.modules() if hasattr(part, "compute_dtype")]
        assert {part.compute_dtype for part in matrices} == {torch.bfloat16}
    result = torch.float32 if weights == "nf4" else torch.bfloat16
    assert computed == {"self_attn.q_proj": result, "mlp.down_proj": result, "stream": torch.float32}
    loss.backward()
