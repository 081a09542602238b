"""GPTQ: what it makes is sound and better than rounding; what it cannot do is refused before anything is written."""

import doctest
import json
import os
import shutil
import signal
import subprocess
import sys
import threading
import tracemalloc
from dataclasses import asdict
from pathlib import Path

import faults
import numpy as np
import pyarrow as pa
import pytest
import torch
from datasets import Dataset
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer, MistralConfig, MistralForCausalLM

from helpers.budget import host
from helpers.cli import configuration, main
from helpers.cli.flags import parser
from helpers.config import QuantizeConfig, RunConfig
from helpers.inference import read_config
from helpers.models import TINY, methods, shape
from helpers.models.gptq_kernels import KERNELS, gptq_kernel
from helpers.quantize import (
    METHODS,
    calibration,
    check,
    dequantized,
    gptq,
    process,
    quantize,
    rounded,
    set_aside,
    weights,
)
from helpers.quantize.calibration import BLOCK_TEXTS, draw, pack, texts_at
from helpers.quantize.check import PERPLEXITY_BOUND, PERPLEXITY_LIMIT, loss_of, standing_out
from helpers.quantize.gptq import remedies, unpack
from helpers.workspace import exclusive, require

ROOT = Path(__file__).resolve().parents[2]
SPOILER = """
from pathlib import Path
from safetensors.torch import load_file, save_file
import helpers.workspace

def spoil(path, text, write=helpers.workspace.write_text):
    if path.name == "quantize_config.json":  # the last file of the result, before it is checked
        for file in path.parent.glob("*.safetensors"):
            tensors = load_file(file)
            codes = {name: ~value if name.endswith("qweight") else value for name, value in tensors.items()}
            save_file(codes, file, {"format": "pt"})
    return write(path, text)

helpers.workspace.write_text = spoil
"""
"""In the process that quantizes: turns every code over before the result is checked."""
GENERAL_SET = QuantizeConfig(calibration="general", calibration_tokens=192)


def linears(model) -> dict[str, torch.nn.Linear]:
    """The layers that GPTQ quantizes."""
    modules = model.named_modules()
    return {name: module for name, module in modules if isinstance(module, torch.nn.Linear) and ".layers." in name}


def tree(folder: Path) -> dict[str, int]:
    """Every path under a folder with its size."""
    return {str(path.relative_to(folder)): path.stat().st_size for path in folder.rglob("*") if path.is_file()}


def copied(target: Path) -> Path:
    """The tiny model, to break."""
    return Path(shutil.copytree(TINY, target))


# ---- what it makes ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "module", [calibration, check, gptq, process, weights], ids=lambda module: module.__name__.rpartition(".")[2]
)
def test_examples_in_docstrings(module):
    assert doctest.testmod(module, optionflags=doctest.ELLIPSIS).failed == 0


def test_each_method_has_its_functions_and_a_record():
    wanted = ("refuse", "least_tokens", "environment", "make", "remedies", "dequantized")
    for name, method in METHODS.items():
        assert name in methods.METHODS
        assert all(callable(getattr(method, function, None)) for function in wanted)


def test_result_is_checked_measured_and_whole(gptq_model):
    measured = require(gptq_model, "quantize")["measurements"]
    assert measured["perplexity_ratio"] < 1.05
    assert measured["within_bound"]
    assert measured["answer"].strip()
    assert set(measured["layer_errors"]) == {"0", "1", "2", "3"}
    assert len(measured["modules"]) == 28
    assert all(module["error"] > 0 for module in measured["modules"])
    assert measured["size_bytes"] == pytest.approx(host.quantized_bytes(RunConfig(), shape(str(TINY))), rel=0.05)
    names = {path.name for path in gptq_model.iterdir()}
    assert {"model.safetensors", "quantize_config.json", "tokenizer.json", "chat_template.jinja", "gptq.log"} <= names
    assert not names & {"logs", "offload"}
    assert [path.name for path in gptq_model.parent.iterdir()] == [gptq_model.name]


def test_result_is_fp16_and_names_no_folder_of_this_machine(gptq_model):
    kinds = {str(value.dtype) for value in load_file(gptq_model / "model.safetensors").values()}
    assert kinds == {"torch.float16", "torch.int32"}
    for name in ("config.json", "quantize_config.json"):
        assert str(gptq_model.parent.parent) not in (gptq_model / name).read_text()
    settings = json.loads((gptq_model / "config.json").read_text())
    assert settings["dtype"] == settings["torch_dtype"] == "float16"
    assert settings["rope_theta"] == settings["rope_parameters"]["rope_theta"] == 1e6
    format_ = {"bits": 4, "group_size": 128, "desc_act": False, "sym": True, "checkpoint_format": "gptq"}
    assert format_.items() <= settings["quantization_config"].items()


def test_transformers_computes_what_the_checkpoint_says(gptq_model):
    kernel = AutoModelForCausalLM.from_pretrained(gptq_model, dtype=torch.float32)
    dense = AutoModelForCausalLM.from_pretrained(TINY, dtype=torch.float32)
    for name, module in linears(dense).items():
        module.weight.data = dequantized(gptq_model, name)
    ids = torch.tensor(
        [AutoTokenizer.from_pretrained(gptq_model)("A pony eats oats and drinks from the brook.")["input_ids"]]
    )
    with torch.inference_mode():
        got, wanted = kernel(ids).logits.float(), dense(ids).logits
    assert (got - wanted).abs().max() < 0.02 * wanted.abs().max()
    assert torch.equal(got.argmax(-1), wanted.argmax(-1))


def test_the_kernel_that_is_chosen_reaches_the_layers(gptq_model, capsys):
    settings = read_config(gptq_model)["quantization_config"]
    chosen = gptq_kernel(settings, torch.float32, device="cpu")  # only the last of the list is for a CPU
    if not torch.cuda.is_available():
        gptq_kernel(settings, torch.float32, device="cpu", kernels=("gptq_marlin", "gptq_torch"))
        assert "gptq_marlin cannot be had: Marlin kernel requires CUDA." in capsys.readouterr().out
    model = AutoModelForCausalLM.from_pretrained(gptq_model, dtype=torch.float32, **chosen)
    assert {type(module).__name__ for name, module in model.named_modules() if name.endswith("q_proj")} == {
        "TorchLinear"
    }
    assert model.config.quantization_config.bits == 4
    assert not {"gptq_machete", "gptq_swordfish", "gptq_marlin", "auto"} & set(KERNELS)


def quantized_to(bits: int, folder: Path) -> Path:
    """GPTQ of the tiny model with general text, without the checks at the end."""
    config = QuantizeConfig(bits=bits, calibration="general", calibration_tokens=192)
    rows, _ = draw(TINY, config, [], 768)
    folder.mkdir()
    job = {"model": str(TINY), "output": str(folder), "config": asdict(config), "rows": rows}
    process.run(job, gptq, shape(str(TINY)), folder / "gptq.log")
    return folder


def test_perplexity_rises_at_most_half_as_much_as_by_rounding(gptq_model, tmp_path):
    # 36 thousand tokens: on the 7 thousand of data/evaluation.txt chance is as large as what 4 bits do to this model
    sys.path.insert(0, str(ROOT / "data"))
    import make_world

    model = AutoModelForCausalLM.from_pretrained(TINY, dtype=torch.float32)
    tokenizer = AutoTokenizer.from_pretrained(TINY)
    text = make_world.passages(make_world.make_world(make_world.SEED), 700, "rounding against GPTQ")
    rows = torch.tensor(pack(tokenizer(text)["input_ids"], tokens=256, rows=140))
    weights = {name: module.weight.detach().clone() for name, module in linears(model).items()}

    @torch.inference_mode()
    def measured() -> float:
        losses = [model(input_ids=batch, labels=batch).loss for batch in rows.split(8)]
        return torch.stack(losses).mean().exp().item()

    before = measured()
    for bits, folder in ((4, gptq_model), (3, quantized_to(3, tmp_path / "three"))):
        rises = []
        for way in (
            lambda name, bits=bits: rounded(weights[name], bits, 128),
            lambda name, f=folder: dequantized(f, name),
        ):
            for name, module in linears(model).items():
                module.weight.data = way(name)
            rises.append(measured() - before)
        print(f"{bits} bits: perplexity {before:.4f}, rounding +{rises[0]:.4f}, GPTQ +{rises[1]:.4f}")
        assert rises[1] <= rises[0] / 2


@given(st.sampled_from([2, 3, 4, 8]), st.integers(1, 4), st.integers(1, 3), st.randoms(use_true_random=False))
def test_unpack_undoes_packing(bits, rows, groups_of_32, rng):
    codes = np.array([[rng.randrange(2**bits) for _ in range(32 * groups_of_32)] for _ in range(rows)])
    words = np.zeros((rows, bits * groups_of_32), dtype=np.uint32)
    for row, values in enumerate(codes):
        number = sum(int(value) << (bits * i) for i, value in enumerate(values))
        words[row] = [(number >> (32 * i)) & 0xFFFFFFFF for i in range(words.shape[1])]
    assert unpack(torch.from_numpy(words.view(np.int32)), bits).tolist() == codes.tolist()


@given(
    st.lists(st.lists(st.integers(1, 9), min_size=1, max_size=12), max_size=12), st.integers(2, 9), st.integers(1, 6)
)
def test_packed_rows_are_full_but_the_last_and_begin_with_a_text(texts, tokens, rows):
    packed = pack(texts, tokens, rows)
    assert len(packed) <= rows
    assert all(len(row) == tokens for row in packed[:-1])
    assert all(1 < len(row) <= tokens for row in packed)
    starts = {tuple(text[:1]) for text in texts}
    assert all(tuple(row[:1]) in starts for row in packed)


def test_calibration_takes_own_general_or_both(tmp_path):
    own = tmp_path / "own.jsonl"
    text = "What does a pony eat? A pony eats oats, and hay in winter. "
    own.write_text("".join(json.dumps({"text": text * n}) + "\n" for n in range(1, 60)))
    rows = {
        kind: draw(TINY, QuantizeConfig(calibration=kind, calibration_samples=8, calibration_tokens=128), [own], 768)[0]
        for kind in ("own", "general", "both")
    }
    assert rows["both"][:4] == rows["own"][:4]
    assert all(len(row) == 128 for kind in rows for row in rows[kind])
    assert rows["general"] != rows["own"]
    conversation = [{"role": "user", "content": "Hello"}, {"role": "assistant", "content": text * 20}]
    own.write_text((json.dumps({"messages": conversation}) + "\n") * 20)
    row = draw(TINY, QuantizeConfig(calibration_tokens=128), [own], 768)[0][0]
    assert AutoTokenizer.from_pretrained(TINY).decode(row).startswith("<s>[INST] Hello[/INST]")


def test_calibration_is_drawn_from_all_of_a_long_split_without_reading_it(tmp_path):
    """40 MB in lists; drawn, what grows with the split is 8 bytes a text."""
    rows, tokens = 20_000, 60
    ids = np.arange(rows * tokens, dtype=np.int32) // tokens + 1000  # every token says which row it is of
    column = pa.ListArray.from_arrays(np.arange(0, rows * tokens + 1, tokens, dtype=np.int32), ids)
    Dataset(pa.table({"input_ids": column})).save_to_disk(tmp_path / "train")
    config = QuantizeConfig(calibration_samples=8, calibration_tokens=128)
    draw(TINY, config, [tmp_path], 768)  # imports and the tokenizer
    tracemalloc.start()
    try:
        drawn, check = draw(TINY, config, [tmp_path], 768)
        _, peak_bytes = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert peak_bytes < 10e6
    assert [len(row) for row in drawn] == [128] * 8
    sources = {token for row in drawn for token in row}
    assert min(sources) < 1000 + rows // 4 and max(sources) > 1000 + 3 * rows // 4
    assert not sources & {token for row in check for token in row}


def test_calibration_reads_a_long_file_block_by_block(tmp_path):
    own = tmp_path / "own.jsonl"
    with own.open("w") as stream:
        for number in range(3000):
            stream.write(json.dumps({"text": f"Pony {number} eats oats."}) + "\n")
    tokenized = []
    texts = texts_at([own], [3000], lambda text: tokenized.append(text) or [len(tokenized)], range(2999, -1, -1))
    next(texts)
    assert len(tokenized) == BLOCK_TEXTS  # so many, not all
    assert len(list(texts)) == 2999
    assert len(tokenized) == 3000


def test_a_module_whose_error_stands_out_is_named():
    modules = [{"layer": layer, "module": "mlp.up_proj", "error": 1.0 + layer} for layer in range(8)]
    assert standing_out(modules) == []
    modules[5]["error"] = 100.0
    assert standing_out(modules) == ["layer 5 mlp.up_proj: 100 where its neighbours have 4.5"]
    modules[6] |= {"error": None, "note": "rtn fallback"}
    assert len(standing_out(modules)) == 1


def test_worker_is_told_of_two_cpu_workers_before_the_import():
    # with one, GPTQModel's loader finds no thread for itself on two cores, and nothing starts
    assert int(gptq.environment()["GPTQMODEL_CPU_WORKERS"]) >= 2


# ---- what it refuses -------------------------------------------------------------------------------------------------


def refusal(tmp_path: Path, *arguments) -> str:
    """The sentence that quantize refuses with, after making sure that it wrote and left nothing."""
    before = tree(tmp_path)
    with pytest.raises(ValueError) as caught:
        quantize(*arguments)
    assert tree(tmp_path) == before
    assert not [*tmp_path.glob("*.partial"), *tmp_path.glob("*.log")]
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_refuses_a_model_that_is_already_quantized(gptq_model, tmp_path):
    assert "already quantized (gptq)" in refusal(tmp_path, gptq_model, tmp_path / "again", GENERAL_SET)


def test_refuses_a_model_that_is_not_whole(tmp_path):
    model = copied(tmp_path / "model")
    with (model / "model.safetensors").open("r+b") as stream:
        stream.truncate(4_000_000)
    assert "cut short" in refusal(tmp_path, model, tmp_path / "out", GENERAL_SET)
    (model / "model.safetensors").unlink()
    assert "is missing" in refusal(tmp_path, model, tmp_path / "out", GENERAL_SET)
    assert "not a model" in refusal(tmp_path, tmp_path / "nothing", tmp_path / "out", GENERAL_SET)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("", "own.jsonl is empty"),
        ('{"text": "too short"}\n', "needs at least 768, one for each input of the widest layer"),
        ('{"text": 7}\n', "with messages or text"),
        ('{"question": "?"}\n', "with messages or text"),
        ("no json\n", "with messages or text"),
    ],
)
def test_refuses_calibration_text(text, words, tmp_path):
    own = tmp_path / "own.jsonl"
    own.write_text(text)
    assert words in refusal(tmp_path, TINY, tmp_path / "out", QuantizeConfig(), own)


def test_refuses_missing_calibration_and_too_few_samples(tmp_path):
    named = QuantizeConfig(calibration="genral")
    assert "genral is neither own, general or both, nor a file" in refusal(tmp_path, TINY, tmp_path / "out", named)
    picture = tmp_path / "own.txt"
    picture.write_bytes(b"\xff\xfe\x00\x81")
    assert "not text in UTF-8" in refusal(tmp_path, TINY, tmp_path / "out", QuantizeConfig(), picture)
    assert "neither a file" in refusal(tmp_path, TINY, tmp_path / "out", QuantizeConfig(), tmp_path / "no.jsonl")
    assert "calibration=general" in refusal(tmp_path, TINY, tmp_path / "out", QuantizeConfig())
    few = QuantizeConfig(calibration="general", calibration_samples=2, calibration_tokens=128)
    assert "raise calibration_samples to 6" in refusal(tmp_path, TINY, tmp_path / "out", few)


def test_refuses_a_group_size_that_does_not_divide(tmp_path):
    model = copied(tmp_path / "model")
    settings = json.loads((model / "config.json").read_text())
    (model / "config.json").write_text(json.dumps(settings | {"intermediate_size": 800}))
    sentence = refusal(tmp_path, model, tmp_path / "out", GENERAL_SET)
    assert "group_size=128 does not divide the 800 inputs of down_proj; group_size=32 does" in sentence


def test_refuses_an_output_in_use(tmp_path):
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.txt").write_text("do not lose this")
    assert "in use" in refusal(tmp_path, TINY, tmp_path / "mine", GENERAL_SET)
    with exclusive(tmp_path / "out.partial"), pytest.raises(ValueError, match="in use by another process"):
        quantize(TINY, tmp_path / "out", GENERAL_SET)
    assert not (tmp_path / "out").exists()


def test_refuses_too_little_disk_with_both_numbers(tmp_path):
    model = copied(tmp_path / "model")
    settings = json.loads((model / "config.json").read_text())
    (model / "config.json").write_text(json.dumps(settings | {"num_hidden_layers": 1_000_000}))
    sentence = refusal(tmp_path, model, tmp_path / "out", GENERAL_SET)
    assert "quantizing needs" in sentence
    assert "GiB of disk" in sentence


# ---- what it survives ------------------------------------------------------------------------------------------------


@pytest.fixture
def one_layer(tmp_path) -> Path:
    """A model of one layer: its quantization is over soon, most of it start-up."""
    folder = tmp_path / "one-layer"
    config = MistralConfig.from_pretrained(TINY)
    config.num_hidden_layers = 1
    MistralForCausalLM(config).half().save_pretrained(folder)
    for name in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja"):
        shutil.copyfile(TINY / name, folder / name)
    return folder


def test_a_calibration_file_is_named_by_flag_or_setting_and_missed_before_anything_is_done(tmp_path, capfd):
    command = ["quantize", "--model", str(TINY), "--output", str(tmp_path / "out")]
    assert configuration(parser().parse_args([*command, "--calibration", "general"])).quantize.calibration == "general"
    missing = tmp_path / "missing.json"
    assert main([*command, "--calibration", str(missing), "--json"]) == 2
    assert f"{missing} is neither own, general or both, nor a file" in capfd.readouterr().err
    (own := tmp_path / "chats.json").write_text("[]")
    settings = tmp_path / "settings.yaml"
    settings.write_text(f"calibration: {own}\n")
    assert configuration(parser().parse_args([*command, "--config", str(settings)])).quantize.calibration == str(own)


def test_a_run_misses_its_calibration_file_before_it_trains(tmp_path, capfd):
    assert main(["run", "--profile", "tiny", "--workspace", str(tmp_path / "run"), "--calibration", "chats.json"]) == 2
    assert "chats.json is neither own, general or both, nor a file" in capfd.readouterr().err
    assert not (tmp_path / "run").exists()


def test_a_broken_result_takes_no_place_and_is_kept_beside(gptq_model, tmp_path, monkeypatch, capfd):
    output = Path(shutil.copytree(gptq_model, tmp_path / "out"))
    before = tree(output)
    spoilt = tmp_path / "spoilt"
    spoilt.mkdir()
    (spoilt / "sitecustomize.py").write_text(SPOILER)
    monkeypatch.setenv("PYTHONPATH", str(spoilt))
    command = ["quantize", "--model", str(TINY), "--output", str(output), "--calibration", "general"]
    assert main([*command, "--calibration-tokens", "192", "--calibration-samples", "8"]) == 1
    sentence = capfd.readouterr().out
    assert "that is broken" in sentence and "% of perplexity" in sentence and "act_order" in sentence
    assert tree(output) == before
    rejected = tmp_path / "out.rejected"
    assert f"lies in {rejected}" in sentence
    assert require(rejected, "quantize")["measurements"]["within_bound"] is False
    shutil.rmtree(output)
    rejected.rename(output)  # what the sentence says
    assert require(output, "quantize")
    assert {path.name for path in tmp_path.iterdir()} == {"out", "spoilt"}


def test_what_somebody_put_where_broken_results_go_is_kept(tmp_path, capsys):
    work, output = tmp_path / "out.partial", tmp_path / "out"
    (tmp_path / "out.rejected").mkdir()
    (tmp_path / "out.rejected" / "thesis.txt").write_text("mine")
    figures = {"perplexity_merged": 5.0, "perplexity_gptq": 50.0, "perplexity_ratio": 10.0, "standing_out": []}
    with exclusive(work):
        said = set_aside(work, output, QuantizeConfig(), figures, "try 8 bits")
    assert "that is broken" in said and (tmp_path / "out.rejected").is_dir()
    assert [file.read_text() for file in tmp_path.rglob("thesis.txt")] == ["mine"]
    assert "no stage made it" in capsys.readouterr().out


def test_a_result_that_is_worse_than_usual_says_what_to_try():
    figures = {"perplexity_merged": 5.0, "perplexity_gptq": 5.2, "perplexity_ratio": 1.04, "standing_out": []}
    assert figures["perplexity_ratio"] > PERPLEXITY_BOUND[4]
    assert "4.0 % of perplexity (5.000 before, 5.200 after" in loss_of(QuantizeConfig(), figures)
    assert (
        remedies(QuantizeConfig())
        == "calibration_samples=256, calibration=both, act_order, group_size=64 or 8 bits do better"
    )
    assert all(PERPLEXITY_BOUND[bits] < PERPLEXITY_LIMIT[bits] <= 1.5 for bits in (8, 4, 3))


def test_killed_at_counted_moments_the_next_run_finishes(one_layer, tmp_path, monkeypatch, capfd):
    """A foreign folder without a chat template, calibrated with a file of conversations."""
    output, folder, own = tmp_path / "run" / "out", tmp_path / "run", tmp_path / "chats.json"
    folder.mkdir()
    talk = [{"from": "human", "value": "What does a pony eat?"}, {"from": "gpt", "value": "Oats, and hay. " * 40}]
    own.write_text(json.dumps([{"conversations": talk}] * 40))
    (one_layer / "chat_template.jinja").unlink()
    command = ["quantize", "--model", str(one_layer), "--output", str(output), "--bits", "4", "--group-size", "128"]
    command += ["--calibration", str(own), "--calibration-tokens", "192", "--profile", "tiny", "--json"]

    in_worker = {"kill_at": 1, "counted": "create", "match": "out.partial/*.safetensors", "log": tmp_path / "log"}
    with monkeypatch.context() as patched:  # of what is started from here, not of this process
        for name, value in faults.environment(folder, **in_worker).items():
            patched.setenv(name, value)
        assert main(command) == 1
    assert "GPTQ was killed, most often because host memory ran out" in capfd.readouterr().err
    assert {path.name for path in folder.iterdir()} == {"out.log"}, "only what says why"

    environment = faults.environment(folder, kill_at=1, counted="rename", match="out", log=tmp_path / "log")
    publishing = subprocess.run(
        [sys.executable, "-m", "helpers", *command],
        cwd=ROOT,
        env=os.environ | environment,
        capture_output=True,
        text=True,
    )
    assert publishing.returncode == -signal.SIGKILL, publishing.stderr
    assert [event.path for event in faults.events(tmp_path / "log") if event.what == "kill"][1:] == ["out"]
    assert {path.name for path in folder.iterdir()} == {"out.partial"}

    assert main(command) == 0
    answer = json.loads(capfd.readouterr().out)
    assert answer["calibration"] == str(own) and answer["calibration_tokens"] >= 768
    manifest = require(output, "quantize")
    assert manifest["measurements"]["within_bound"]
    assert manifest["config"]["quantize"]["calibration"] == str(own)
    assert {path.name for path in folder.iterdir()} == {"out"}


def test_a_process_that_dies_before_it_read_its_job_says_why(tmp_path):
    job = {"output": str(tmp_path), "config": {"quant_method": "gptq"}, "rows": [[1] * 100_000]}
    with pytest.raises(process.QuantizationFailed, match=r"exit status 1.*its log is"):
        list(process.worker(job, tmp_path / "log", {"PYTHONHASHSEED": "no number"}))


def test_the_check_frees_the_merged_model_before_it_opens_the_quantized_one(gptq_model, monkeypatch):
    """On a small card layers of the merged model wait in host memory, and hooks that fetch them make cycles of it."""
    import weakref

    opened, alive = [], []
    real = check.opened

    def in_a_cycle(folder, **options):
        alive.append(sum(model() is not None for model in opened))
        loaded = real(folder, **options)
        object.__setattr__(loaded.model, "cycle", [loaded.model])  # as hooks leave one in each module they wrap
        opened.append(weakref.ref(loaded.model))
        return loaded

    monkeypatch.setattr(check, "opened", in_a_cycle)
    said = []
    rows = [list(range(5, 40))]
    job = {"model": str(TINY), "output": str(gptq_model), "config": {"quant_method": "gptq"}, "check_rows": rows}
    check.measure(job, said.append)
    assert alive == [0, 0] and said[-1]["perplexity_ratio"] > 0


def test_a_parent_that_is_killed_takes_the_process_that_quantizes_along(tmp_path):
    """Whatever a library is busy with there: here it holds Python's lock, so that no thread of ours could end it."""
    (tmp_path / "sitecustomize.py").write_text(
        "import ctypes, os, sys\n"
        "if sys.orig_argv[1:3] == ['-m', 'helpers.quantize']:\n"
        "    from helpers.quantize import gptq\n"
        "    gptq.make = lambda job, report: (report({'said': 'busy'}), ctypes.PyDLL(None).sleep(90))\n"
    )
    parent = (
        "import sys; from pathlib import Path; from helpers.quantize import process\n"
        "job = {'output': sys.argv[1], 'config': {'quant_method': 'gptq'}}\n"
        "for message in process.worker(job, Path(sys.argv[2])): print(message, flush=True)\n"
    )
    os.mkfifo(tmp_path / "log")  # its end comes when nobody writes any more: parent and worker are both gone
    path = os.pathsep.join([str(tmp_path), str(ROOT)])
    process_ = subprocess.Popen(
        [sys.executable, "-c", parent, str(tmp_path), str(tmp_path / "log")],
        env=os.environ | {"PYTHONPATH": path},
        stdout=subprocess.PIPE,
    )
    with (tmp_path / "log").open("rb") as log:
        assert b"busy" in process_.stdout.readline()
        process_.kill()
        process_.wait()
        ends = threading.Event()
        threading.Thread(target=lambda: (log.read(), ends.set()), daemon=True).start()
        assert ends.wait(60), "the worker outlives its parent"
