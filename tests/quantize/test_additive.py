"""The additive quantizer: what each of its steps lowers, the folder it writes, and a mixture that trains on it."""

import math
from itertools import pairwise
from pathlib import Path

import pytest
import torch

from helpers import finetune, inference, prepare, quantize
from helpers.budget import host
from helpers.config import QuantizeConfig
from helpers.models import TINY, experts, profile, shape
from helpers.models.aqlm_sizes import ADDITIVE_2X8
from helpers.quantize import additive

MIB = 2**20
QUICK = {"quant_method": "aqlm", "bits": 2, "calibration_samples": 24, "calibration_tokens": 192}
"""A fifth of the tiny profile's text."""


def a_matrix() -> tuple[torch.Tensor, torch.Tensor]:
    """Weights (64, 96) and the gram of inputs that are correlated, as activations are."""
    draw = torch.Generator().manual_seed(0)
    inputs = torch.randn(512, 96, generator=draw) @ torch.randn(96, 96, generator=draw)
    return torch.randn(64, 96, generator=draw) / 8, inputs.T @ inputs


def test_every_step_of_every_round_lowers_the_outputs_error():
    weight, gram = a_matrix()
    scales = weight.square().mean(1).sqrt()
    codes, books = additive.residual_kmeans((weight / scales[:, None]).reshape(-1, 8), ADDITIVE_2X8)
    codes = codes.reshape(64, 12, 2)

    def error() -> float:
        return additive.output_error(weight, scales[:, None] * additive.rebuilt(codes, books), gram)

    found = [error()]
    for _ in range(3):
        codes = additive.better_codes(weight, gram, codes, books, scales)
        found.append(error())
        books = additive.better_books(weight, gram, codes, books, scales)
        found.append(error())
        scales = additive.better_scales(weight, gram, codes, books, scales)
        found.append(error())
    assert all(later <= earlier * (1 + 1e-4) for earlier, later in pairwise(found)), found
    assert found[-1] < found[0] / 3


def test_codes_are_the_best_that_one_run_can_take():
    """Against trying every vector in every place, for the last run: no other one is better."""
    weight, gram = a_matrix()
    codes, books, scales = additive.fit(weight, gram, ADDITIVE_2X8, rounds=1)
    codes = additive.better_codes(weight, gram, codes, books, scales)
    best = additive.output_error(weight[:1], scales[:1, None] * additive.rebuilt(codes[:1], books), gram)
    for code in range(256):  # of the run and book that were chosen last
        other = codes[:1].clone()
        other[0, -1, -1] = code
        assert additive.output_error(weight[:1], scales[:1, None] * additive.rebuilt(other, books), gram) >= best - 1e-6


@pytest.fixture(scope="module")
def mixture(tmp_path_factory) -> tuple[Path, dict]:
    """The tiny mixture in AQLM 2x8, and what quantizing it measured."""
    folder = tmp_path_factory.mktemp("mixture")
    experts.tiny_mixture(folder / "dense")
    config = profile("tiny", **QUICK, calibration=str(TINY.parent / "conversations.jsonl"))
    return folder / "aqlm", quantize.quantize(folder / "dense", folder / "aqlm", config.quantize)


def test_the_tiny_mixture_is_small_and_says_nearly_the_same(mixture):
    folder, figures = mixture
    assert figures["size_bytes"] == (folder / "model.safetensors").stat().st_size <= 5.1 * MIB
    assert 0.99 < figures["perplexity_ratio"] < 1.1 and figures["within_bound"]
    sizes = shape(str(folder))
    assert sizes.additive == ADDITIVE_2X8 and sizes.experts == 4
    config = profile("tiny", **QUICK).with_values(model=str(folder))
    assert host.quantized_bytes(config, sizes) == pytest.approx(figures["size_bytes"], rel=0.01)
    module = "model.layers.0.block_sparse_moe.experts.0.w1"
    opened = inference.load(folder, profile("tiny", weights="aqlm", model=str(folder)))
    layer = opened.model.model.layers[0].mlp.experts[0].gate_proj
    assert opened.kind == "aqlm" and torch.equal(quantize.dequantized(folder, module), layer.dense(torch.float32))
    error = quantize.dequantized(folder, module) - quantize.stored_weight(folder.with_name("dense"), module)
    assert 0 < error.std() < 0.5 * quantize.stored_weight(folder.with_name("dense"), module).std()


def test_lora_on_attention_teaches_the_tiny_mixture_in_two_bits(mixture, tmp_path):
    config = profile(
        "tiny", model=str(mixture[0]), weights="aqlm", targets="attention", max_steps=48, learning_rate=2.5e-3
    )
    prepare.prepare(config, tmp_path / "prepare")
    measured = finetune.finetune(config, tmp_path / "prepare", tmp_path / "finetune")
    assert "our own layers compute" in measured["layers"] and measured["adapters_changed"] == 4 * 4 * 2
    assert math.exp(measured["heldout_loss"]) < 1.3


@pytest.mark.parametrize(
    ("model", "values", "sentence"),
    [
        (str(TINY), {"bits": 8}, "bits must be 2, 3 or 4 for aqlm, one codebook each, not 8: quant_method=gptq has 8"),
        ("mistral-7b-v0.3", {}, "models up to 1e9 weights, and mistral-7b-v0.3 has 7.2e9: quant_method=gptq"),
    ],
)
def test_what_it_cannot_do_is_a_sentence(model, values, sentence):
    with pytest.raises(ValueError, match=sentence):
        additive.refuse(shape(model), QuantizeConfig(**({"quant_method": "aqlm", "bits": 2} | values)))
