"""How models are loaded: one file decides for training and for inference; one record a method tells what is opened."""

import doctest

import pytest
import torch

from helpers import finetune, inference
from helpers.models import ROOT, TINY, loading, methods, profile


@pytest.mark.parametrize("module", [loading, methods], ids=lambda module: module.__name__)
def test_examples_in_docstrings(module):
    assert doctest.testmod(module).failed == 0


@pytest.mark.parametrize("decision", ["BitsAndBytesConfig(", "get_device_capability()", ': lambda: "sdpa"'])
def test_a_decision_about_loading_is_written_in_one_file(decision):
    sources = [path for path in (ROOT / "helpers").rglob("*.py") if decision in path.read_text(encoding="utf-8")]
    assert {path.name for path in sources} == {"loading.py"}, sources


@pytest.mark.parametrize("attention", ["efficient", "eager", "math"])
def test_training_and_inference_open_the_base_alike(attention):
    config = profile("tiny", attention=attention)
    trained, _ = finetune.load_base(config)
    opened = inference.load(TINY, config).model
    assert trained.config._attn_implementation == opened.config._attn_implementation
    assert trained.dtype == opened.dtype == loading.precision().dtype


def test_weights_are_quantized_as_asked():
    asked = {weights: profile("tiny", weights=weights, double_quant=False) for weights in ("nf4", "int8", "fp16")}
    made = {weights: loading.base_quantization(config, torch.float16) for weights, config in asked.items()}
    assert made["fp16"] is None and made["int8"].load_in_8bit
    assert made["nf4"].load_in_4bit and not made["nf4"].bnb_4bit_use_double_quant
    assert made["nf4"].bnb_4bit_compute_dtype == torch.float16
