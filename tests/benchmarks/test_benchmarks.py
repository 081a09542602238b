"""The benchmarks' parts, without a GPU: what they are called with, the models that they make, the rows they keep."""

import csv
import doctest
import json
import runpy
from pathlib import Path

import keep
import pytest
import random_model
import torch
from transformers import AutoModelForCausalLM

from helpers.budget import vram
from helpers.models import TINY, experts, loading, profile, shape
from helpers.models.templates import Template, load_tokenizer

SCRIPTS = [path for path in sorted(Path(keep.__file__).parent.glob("*.py")) if "ArgumentParser" in path.read_text()]


@pytest.mark.parametrize("script", [path for path in SCRIPTS if path.name != Path(__file__).name], ids=lambda p: p.stem)
def test_a_script_says_how_it_is_called(script, monkeypatch, capsys):
    monkeypatch.setattr("sys.argv", [str(script), "--help"])
    with pytest.raises(SystemExit) as ended:
        runpy.run_path(str(script), run_name="__main__")
    assert ended.value.code == 0 and f"usage: {script.name}" in capsys.readouterr().out


@pytest.mark.parametrize(("name", "layers", "kind"), [(str(TINY), 2, "Mistral"), ("qwen2.5-0.5b", 1, "Qwen2")])
def test_a_random_model_opens_as_its_family_with_nothing_missing(name, layers, kind, tmp_path):
    config = random_model.config_of(name, layers)
    config.vocab_size = 300  # of a Qwen, whose embeddings would take a gigabyte
    random_model.write(tmp_path / "base", config, random_model.plain)
    config.save_pretrained(tmp_path / "base")
    model, found = AutoModelForCausalLM.from_pretrained(tmp_path / "base", output_loading_info=True)
    assert type(model).__name__ == f"{kind}ForCausalLM" and not found["missing_keys"] | found["unexpected_keys"]
    assert model.dtype == torch.float16 and model.lm_head.weight.std().item() == pytest.approx(0.02, rel=0.1)
    random_model.make_adapter(tmp_path / "adapter", tmp_path / "base", config)
    targets = json.loads((tmp_path / "adapter" / "adapter_config.json").read_text())["target_modules"]
    assert set(targets) == set(profile("tiny").adapter.target_modules)


def test_a_random_models_tokenizer_is_one_that_answers_can_end_with(tmp_path):
    random_model.make(tmp_path, str(TINY), 1)
    assert Template(load_tokenizer(str(tmp_path))).end_id is not None


def test_a_random_gptq_folder_has_the_tensors_that_gptq_has(tmp_path):
    from helpers import quantize

    random_model.make_gptq(tmp_path, str(TINY), 1)
    weight = quantize.dequantized(tmp_path, "model.layers.0.mlp.down_proj")
    assert weight.shape == (256, 768) and weight.mean().abs() < 1e-3
    assert weight.std().item() == pytest.approx(0.02, rel=0.1)


def test_a_row_measured_again_takes_the_place_of_the_earlier(tmp_path):
    path = tmp_path / "rows.csv"
    path.write_text("variant,worst,error\nplain,0.1,\nwindow,0.2,\n")
    keep.keep(path, [keep.flat({"variant": "plain", "worst": 0.3, "kernels": {"a": 1}})], ("variant",))
    with path.open() as stream:
        rows = {row["variant"]: row["worst"] for row in csv.DictReader(stream)}
    assert rows == {"plain": "0.3", "window": "0.2"} and path.read_text().startswith("variant,worst,error\n")


def test_docstrings():
    assert doctest.testmod(random_model).failed == 0


def test_a_random_mixture_in_nf4_opens_in_4_bits_as_it_is_budgeted(tmp_path):
    from bitsandbytes.nn import Params4bit

    source = experts.tiny_mixture(tmp_path / "mixture", experts=8)
    folder = random_model.make_nf4(tmp_path / "nf4", str(source), layers=1)
    model = loading.causal_lm(folder, dtype=torch.float32)
    packed = [value for value in model.parameters() if isinstance(value, Params4bit)]
    parts = vram.weights(profile("tiny", model=str(folder)), shape(str(folder)))
    assert sum(value.nbytes for value in packed) == parts["4-bit weights"]
    states = [value.quant_state for value in packed]
    assert sum(state.absmax.nbytes + state.state2.absmax.nbytes for state in states) == parts["quantization scales"]
