"""helpers/README.md's recipes, each done as it says: in the one or two files that it names, and nowhere else."""

import json
import os
import re
import shutil
import subprocess
import sys
from dataclasses import asdict
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import transformers
from transformers import AutoModelForCausalLM

from helpers import budget, evaluate, hardware, prepare
from helpers.cli import main
from helpers.config import ATTENTION_TARGETS, MLP_TARGETS
from helpers.evaluate import measure, metrics, report
from helpers.inference import Generation
from helpers.models import ROOT, families, profile, shape, shape_from_config
from helpers.quantize import calibration
from helpers.sources import formats
from helpers.workspace.prepared import side

README = (ROOT / "helpers" / "README.md").read_text(encoding="utf-8")


def test_every_recipe_is_done_here_and_names_files_that_are_there():
    recipes = re.findall(r"(?m)^## Add an? (.+)$", README)
    done = [name for name in globals() if name.startswith("test_add_")]
    assert len(recipes) == len(done) == 5
    for file in re.findall(r"`([a-z_/]+\.py)`", README):
        assert (ROOT / "helpers" / file).is_file() or (ROOT / file).is_file(), file


def test_every_room_of_the_house_stands_in_the_readme():
    here = {path.name for path in (ROOT / "helpers").iterdir() if path.is_dir() and (path / "__pycache__").exists()}
    for room in here - {"__pycache__"}:
        assert f"`{room}/`" in README, room


def test_add_a_gpu(monkeypatch, capfd):
    sheet = hardware.GPU("NVIDIA B200", 178.0, (10, 0), 2250.0, 2250.0, bandwidth_gb_s=8000)
    with pytest.raises(ValueError, match="gpu must be auto"):
        hardware.machine("b200")
    monkeypatch.setitem(hardware.GPUS, "b200", sheet)
    machine = hardware.machine("b200")
    assert machine.gpu.capability == (10, 0)
    assert hardware.gpu_named("NVIDIA B200", (10, 0), 178.4).bandwidth_gb_s == 8000, "found by the driver's name"
    assert budget.plan(profile("mistral-7b"), shape("mistral-7b-v0.3"), machine).budget.fits
    assert main(["budget", "--gpu", "b200", "--json"]) == 0
    assert json.loads(capfd.readouterr().out)["fits"]


HELIUM = families.Kind(
    {"num_key_value_heads": 20, "head_dim": 128, "max_position_embeddings": 4096},
    biases={"attention_bias": ("q_proj", "k_proj", "v_proj"), "mlp_bias": MLP_TARGETS},
)
"""Kyutai's: Llama's layers, but for a bias that o_proj never has."""


def test_add_a_family(monkeypatch):
    sizes = {"hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "vocab_size": 300}
    config = transformers.HeliumConfig(
        **sizes, num_attention_heads=4, num_key_value_heads=2, head_dim=16, attention_bias=True, mlp_bias=True
    )
    with pytest.raises(ValueError, match=r"the family helium.*add it to models/families\.py"):
        shape_from_config(config.to_dict(), "x")
    monkeypatch.setitem(families.KINDS, "helium", HELIUM)
    made = shape_from_config(config.to_dict(), "x")
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    assert made.parameters == sum(value.numel() for value in model.parameters())
    assert made.family.targets == ATTENTION_TARGETS + MLP_TARGETS
    computed = families.layers(made.family, profile("tiny"))
    assert computed.computes == "transformers" and "helium" in computed.reason


def from_riddle(row: formats.Row) -> list[dict]:
    """A riddle and its solution."""
    return [
        {"role": "user", "content": row.take("riddle")},
        {"role": "assistant", "content": row.take("solution")},
    ]


def test_add_a_format(monkeypatch, tmp_path):
    rows = [{"riddle": f"What has {number} legs?", "solution": f"A stool with {number}."} for number in range(40)]
    source = tmp_path / "riddles.jsonl"
    source.write_text("".join(json.dumps(row) + "\n" for row in rows))
    asked = profile("tiny", source=str(source), source_format="riddles")
    with pytest.raises(ValueError, match="source_format must be auto or one of messages"):
        prepare.prepare(asked, tmp_path / "prepare")
    assert not (tmp_path / "prepare").exists()
    new = formats.Format(from_riddle, lambda fields: {"riddle", "solution"} <= fields.keys())
    monkeypatch.setitem(formats.FORMATS, "riddles", new)
    for config in (asked, asked.with_values(source_format="auto")):
        made = prepare.prepare(config, tmp_path / "prepare")
        assert made["formats"] == {"riddles": 40}
        assert side(tmp_path / "prepare", "train")[0]["messages"][1]["content"].startswith("A stool")
    assert next(calibration.texts_of(source))[0]["content"] == "What has 0 legs?"


NF4 = '''"""NF4 as bitsandbytes stores it: no look at any text (https://arxiv.org/abs/2305.14314, section 3)."""

from pathlib import Path


def refuse(sizes, config):
    """NF4 has 4 bits."""
    if config.bits != 4:
        raise ValueError(f"bits must be 4 for NF4, not {config.bits}")


def least_tokens(sizes):
    return 0


def environment():
    return {}


def make(job, report):
    import time

    import torch
    from transformers import AutoModelForCausalLM

    from helpers.config import RunConfig
    from helpers.models import loading

    start, place = time.monotonic(), {"": loading.device()}
    how = loading.base_quantization(RunConfig(), torch.float16)
    model = AutoModelForCausalLM.from_pretrained(
        job["model"], dtype=torch.float16, device_map=place, quantization_config=how
    )
    model.save_pretrained(job["output"])
    report({"quantize_s": round(time.monotonic() - start, 1)})


def remedies(config):
    return "quant_method=gptq does better"


def dequantized(folder: Path, module: str):
    import torch
    from bitsandbytes.functional import dequantize_4bit
    from transformers import AutoModelForCausalLM

    weight = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).get_submodule(module).weight
    return dequantize_4bit(weight.data, weight.quant_state).float()
'''
USE = """
import json
from pathlib import Path
from helpers import evaluate, hardware, inference, models, quantize
from helpers.budget import placement
from helpers.export import share
from helpers.workspace import Workspace, run_models

config = models.profile("tiny", quant_method="bitsandbytes", calibration="general", calibration_tokens=192)
run = Workspace(Path("run"))
for values in ({"bits": 3}, {"quant_method": "rounding"}):
    try:
        quantize.quantize(models.TINY, run.folder("quantize"), config.with_values(**values).quantize)
    except ValueError as error:
        print(error)
assert not run.root.exists()
figures = quantize.quantize(models.TINY, run.folder("quantize"), config.quantize)
found = run_models(run, models.profile("tiny"))
loaded = inference.load(found["bitsandbytes"], config)
place = placement.place("bitsandbytes", config, models.shape("mistral-7b-v0.3"), hardware.machine("t4"))
name = "model.layers.0.self_attn.q_proj"
error = quantize.dequantized(run.folder("quantize"), name) - quantize.stored_weight(models.TINY, name)
json.dump(
    {
        "ratio": figures["perplexity_ratio"],
        "measured": sorted(figures),
        "kind": loaded.kind,
        "how": loaded.how,
        "precision": place.precision,
        "best": str(evaluate.best(found)),
        "card": share.card_of(run.folder("quantize")),
        "error": error.abs().max().item(),
        "files": sorted(file.name for file in run.folder("quantize").iterdir()),
    },
    open("found.json", "w"),
)
"""


def test_add_a_method_of_quantization(tmp_path):
    """In a copy of the package, as its process is one of its own: one file, and a line in two."""
    shutil.copytree(ROOT / "helpers", tmp_path / "helpers")
    (tmp_path / "data").symlink_to(ROOT / "data")
    (tmp_path / "helpers" / "quantize" / "bitsandbytes.py").write_text(NF4)
    added(
        tmp_path / "helpers" / "quantize" / "__init__.py",
        ("from helpers.quantize import additive,", "from helpers.quantize import additive, bitsandbytes,"),
        ('    "gptq": gptq,\n', '    "gptq": gptq,\n    "bitsandbytes": bitsandbytes,\n'),
    )
    record = '    Method("bitsandbytes", "NF4", card="Rounded to NF4, {bits} bits."),\n)\nMETHODS'
    added(tmp_path / "helpers" / "models" / "methods.py", (")\nMETHODS", record))
    environment = os.environ | {"PYTHONPATH": str(tmp_path), "HF_HUB_OFFLINE": "1"}
    done = subprocess.run(
        [sys.executable, "-c", USE], cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=900
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert "bits must be 4 for NF4, not 3" in done.stdout
    assert "quant_method must be gptq or bitsandbytes or aqlm, not 'rounding'" in done.stdout
    found = json.loads((tmp_path / "found.json").read_text())
    assert found["ratio"] < 1.1 and "perplexity_bitsandbytes" in found["measured"]
    assert (found["kind"], found["how"], found["precision"]) == ("bitsandbytes", "bitsandbytes in fp32", "nf4")
    assert found["best"].endswith("quantize") and "Rounded to NF4, 4 bits." in found["card"]
    assert 0 < found["error"] < 0.2
    assert {"bitsandbytes.log", "manifest.json", "tokenizer.json", "chat_template.jinja"} <= set(found["files"])


def added(file: Path, *lines: tuple[str, str]) -> None:
    """Put lines into a file, where it has the others."""
    text = file.read_text()
    for before, after in lines:
        assert text.count(before) == 1, (file, before)
        text = text.replace(before, after)
    file.write_text(text)


def test_add_a_metric(monkeypatch):
    scores = metrics.answer_scores

    def with_length(answers, references):
        short = [min(len(a), len(r)) / max(len(a), len(r), 1) for a, r in zip(answers, references, strict=True)]
        return scores(answers, references) | {"length": np.array(short)}

    monkeypatch.setattr(metrics, "answer_scores", with_length)
    monkeypatch.setitem(report.COLUMNS, "length", ("as long", "{:.3f}"))
    questions = [{"question": f"What is {number}?", "answer": f"It is {number}."} for number in range(40)]
    read = SimpleNamespace(losses=np.linspace(1, 2, 40), weights=np.ones(40))
    evidence, found = {}, {}
    for name, more in (("base", " Or so I was told by somebody."), ("finetuned", "")):
        answers = [Generation(row["answer"] + more, 4, 4, ended=True) for row in questions]
        references = [row["answer"] for row in questions]
        evidence[name] = evaluate.Evidence(perplexity=read, answers=answers, references=references)
        entry = {"kind": "model", "path": name, "loaded_as": "fp32", "intervals": {}, "context": 192, "stride": 96}
        found[name] = entry | measure.answer_figures(evidence[name], questions, True, entry["intervals"], 0)
    found["finetuned"]["against"] = {"base": evaluate.compare_models(evidence["finetuned"], evidence["base"])}
    assert found["finetuned"]["length"] == 1 > found["base"]["length"]
    assert len(found["base"]["intervals"]["length"]) == 2
    (row,) = [row for row in report.comparisons(found) if row["metric"] == "as long"]
    assert row["verdict"] == "better"
    assert "length" in report.measured_columns(found)
    assert "as long" in report.model_card("base", found["base"], asdict(profile("tiny")))
