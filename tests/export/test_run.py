"""A run taken home: its export folder, importance matrices, what was predicted, and a row in evaluation's table."""

import json
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

gguf = pytest.importorskip("gguf", reason="gguf is not installed: `make setup` installs requirements/gguf.txt")
pytest.importorskip("xllamacpp", reason="xllamacpp is not installed: `make setup` installs requirements/gguf.txt")

from helpers import budget, cli, export, hardware, models, workspace  # noqa: E402
from helpers.budget import export as export_budget  # noqa: E402
from helpers.budget import placement  # noqa: E402
from helpers.export import gguf_file, importance, quants  # noqa: E402
from helpers.models import TINY, gguf_engine, gguf_header, gguf_sizes, gguf_types  # noqa: E402
from helpers.show import gguf as show  # noqa: E402
from helpers.workspace import Workspace  # noqa: E402

QUESTION = [{"role": "user", "content": "Which animal does Edith keep?"}]
EVERY = ",".join(gguf_types.FILE_TYPES)
SEVEN = models.shape("mistral-7b-v0.3")


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A run's folder with prepared conversations, an adapter that does nothing yet, and its merged model, the base."""
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM

    from helpers import prepare

    run = Workspace(tmp_path_factory.mktemp("runs") / "tiny")
    rows = (TINY.parent / "conversations.jsonl").read_text(encoding="utf-8").splitlines()[:40]
    run.root.mkdir()
    (run.root / "rows.jsonl").write_text("\n".join(rows), encoding="utf-8")
    prepare.prepare(config(), run.folder("prepare"), source=str(run.root / "rows.jsonl"))
    base = AutoModelForCausalLM.from_pretrained(TINY, dtype=torch.float32)
    get_peft_model(base, LoraConfig(target_modules="all-linear")).save_pretrained(run.folder("finetune") / "adapter")
    shutil.copytree(TINY, run.folder("merge"))
    return run


def config():
    return models.profile("tiny", weights="fp16", heldout_source=None)


@pytest.fixture(scope="module")
def weights(run):
    """The run's own importance matrix, which a type of 2 bits asks for."""
    return importance.for_run(run, config(), "iq2_xxs")


@pytest.fixture(scope="module")
def exported(run, weights):
    return export.export_run(run, config(), "q4_k_m,iq2_xxs", weights)


def test_the_export_is_a_finished_stage_that_opens_by_itself(run, exported):
    manifest = workspace.require(run.folder("export"), "export")
    inside = set(manifest["outputs"])
    assert {
        "tiny-mistral-Q4_K_M.gguf",
        "tiny-mistral-IQ2_XXS.gguf",
        "Modelfile",
        "README.md",
        "tokenizer.json",
    } <= inside
    assert set(exported["files"]) == {str(file) for file in run.folder("export").glob("*.gguf")}
    assert all(Path(path).stat().st_size == size for path, size in exported["files"].items())
    for file in run.folder("export").glob("*Modelfile"):
        assert (file.parent / file.read_text(encoding="utf-8").splitlines()[0].removeprefix("FROM ./")).is_file()
    assert "ollama create tiny-mistral-q4_k_m" in (run.folder("export") / "README.md").read_text(encoding="utf-8")
    assert all("in " in line for line in export.take_home(run))


def test_sizes_are_predicted_to_the_byte(run, exported, weights, tmp_path):
    assert exported["files"] == exported["predicted_bytes"]
    files = export.outputs(tmp_path / "all.gguf", EVERY)
    predicted = gguf_file.sizes(TINY, files, importance=True)
    assert gguf_file.write(TINY, files, importance.read(weights, TINY)) == predicted
    shape = models.shape(str(TINY))
    for path, size in predicted.items():
        stored = gguf_header.weight_bytes(path)
        headless = size - gguf_sizes.weight_bytes(shape, files[path], importance=True)
        assert stored <= size - headless < stored + 32 * 40  # the rest is padding
        assert abs(gguf_sizes.header_bytes(shape) / headless - 1) < 0.1


def test_sizes_of_a_7b_are_the_known_ones():
    known = {"q8_0": 7.70, "q6_k": 5.95, "q5_k_m": 5.14, "q4_k_m": 4.37, "q3_k_m": 3.52, "iq4_xs": 3.95, "iq3_s": 3.19}
    for name, gigabytes in known.items():
        assert round(gguf_sizes.file_bytes(SEVEN, gguf_types.file_type(name)) / 1e9, 2) == gigabytes


def test_an_importance_matrix_is_the_mean_square_of_what_meets_a_matrix(run, weights):
    rows = list(importance.rows_of(run.folder("prepare")))
    from transformers import AutoModelForCausalLM

    base = AutoModelForCausalLM.from_pretrained(TINY, dtype=torch.float32)
    seen = []
    base.model.layers[1].mlp.down_proj.register_forward_pre_hook(lambda _, args: seen.append(args[0][0]))
    with torch.no_grad():
        for ids in rows:
            base(torch.tensor([ids]))
    expected = torch.cat(seen).double().square().mean(0).numpy()
    found = importance.read(weights, TINY)
    assert len(found) == 7 * 4 and "output.weight" not in found
    assert np.allclose(found["blk.1.ffn_down.weight"], expected, rtol=1e-4)
    assert np.array_equal(found["blk.2.ffn_gate.weight"], found["blk.2.ffn_up.weight"])  # they see the same


@pytest.mark.parametrize("kind", ["IQ2_XXS", "Q3_K", "Q4_K"])
def test_an_importance_matrix_brings_every_matrix_nearer_to_what_it_computed(weights, kind):
    """What a matrix gives to the inputs that it meets, against rounding with even weights."""
    settings, means = gguf_file.settings_of(TINY), importance.read(weights, TINY)
    for tensor in gguf_file.tensors_of(TINY, settings):
        if tensor.name not in means:
            continue
        rows, mean = next(gguf_file.pieces(tensor))[:64], means[tensor.name]
        errors = []
        for used in (mean, np.ones_like(mean)):
            blocks = quants.quantize(rows, kind, used)
            difference = gguf.quants.dequantize(blocks, gguf.GGMLQuantizationType[kind]) - rows
            errors.append((np.square(difference) * mean).sum())
        assert errors[0] < errors[1], tensor.name


def test_an_importance_matrix_of_another_model_is_refused(run, weights, tmp_path):
    other = shutil.copytree(TINY, tmp_path / "other")
    from safetensors.torch import load_file, save_file

    stored = load_file(other / "model.safetensors")
    save_file(stored | {"model.norm.weight": stored["model.norm.weight"] * 2}, other / "model.safetensors")
    with pytest.raises(ValueError, match="of another model of the same shape"):
        importance.read(weights, other)
    settings = json.loads((other / "config.json").read_text())
    save_file({k: v for k, v in stored.items() if ".layers.3." not in k}, other / "model.safetensors")
    (other / "config.json").write_text(json.dumps(settings | {"num_hidden_layers": 3}))
    with pytest.raises(ValueError, match=r"it has \d+ columns for blk\.3.*and .*other has none"):
        importance.read(weights, other)
    with pytest.raises(ValueError, match="there is no importance matrix"):
        importance.read(tmp_path / "nowhere.gguf", TINY)
    (tmp_path / "cut.gguf").write_bytes(weights.read_bytes()[:5000])
    with pytest.raises(ValueError, match="no whole importance matrix"):
        importance.read(tmp_path / "cut.gguf", TINY)


def test_no_importance_matrix_is_collected_without_need(run):
    assert importance.for_run(run, config(), "q4_k_m,q8_0") is None


def test_the_command_takes_a_matrix_and_says_when_one_is_missing(weights, tmp_path, capsys):
    command = ["export", "--profile", "tiny", "--workspace", str(tmp_path), "--model", str(TINY), "--type", "iq2_xxs"]
    command += ["--output", str(tmp_path / "two.gguf")]
    assert cli.main(command) == cli.WRONG_REQUEST and "needs an importance matrix" in capsys.readouterr().err
    assert cli.main([*command, "--imatrix", str(weights)]) == cli.stages.DONE
    assert gguf_header.type_name(tmp_path / "two.gguf") == "IQ2_XXS"


def test_a_gguf_file_has_a_row_in_the_same_table(run, exported, tmp_path):
    asked = replace(config(), evaluate=replace(config().evaluate, max_questions=4, max_heldout=4))
    chosen = {"merged": run.folder("merge")} | {
        name: path for name, path in workspace.run_models(run, config()).items() if name == "gguf_q4_k_m"
    }
    from helpers import evaluate
    from helpers.evaluate import report

    found = evaluate.evaluate(chosen, asked, TINY.parent / "heldout_conversations.jsonl", tmp_path / "evaluate")
    row = found["gguf_q4_k_m"]
    assert row["kind"] == "gguf" and row["loaded_as"] == "Q4_K_M in blocks, PyTorch in fp32"
    assert row["size_bytes"] == exported["files"][row["path"]]
    assert row["llama_cpp_tokens_per_s"] > 0 and row["tokens_per_s"] > 0
    assert row["perplexity"] == pytest.approx(found["merged"]["perplexity"], rel=0.1)
    assert row["predicted_anonymous_gib"] < 1.0
    assert "llama.cpp" in " ".join(report.table(found).index)
    readme = (run.folder("export") / "README.md").read_text(encoding="utf-8")
    assert "ollama" in readme  # a card does not take the place of the three commands
    workspace.require(run.folder("export"), "export")


def test_llama_cpp_answers_in_pieces_as_in_one(exported, capsys):
    file = Path(next(iter(exported["files"])))
    with gguf_engine.serving(file) as server:
        asked = {"messages": QUESTION, "max_tokens": 12, "temperature": 0}
        whole = server.ask("/v1/chat/completions", asked)["choices"][0]["message"]["content"]
        pieces = list(server.pieces(QUESTION, max_tokens=12))
    assert "".join(pieces) == whole and len(pieces) > 3
    gguf_engine.stream(file, QUESTION, max_tokens=12)
    assert capsys.readouterr().out.strip() == whole.strip()


def test_a_gguf_of_a_7b_is_placed_whole_on_a_t4_by_its_bytes():
    seven, t4 = models.profile("mistral-7b"), hardware.machine("t4")
    size = gguf_sizes.weight_bytes(SEVEN, gguf_types.file_type("q4_k_m"))
    found = placement.place("gguf", seven, SEVEN, t4, size)
    assert not found.problem and not found.away and found.precision == "gguf"
    assert 4.07 < placement.needed_gib(found, seven, SEVEN, t4) < placement.room_gib(t4)
    large = placement.place("gguf", seven, SEVEN, t4, 14 * 2**30)
    assert "GiB of VRAM" in large.problem
    assert budget.budget(seven, SEVEN, t4, stage="inference", evaluated={"gguf": "gguf"}).fits


@pytest.mark.parametrize(("name", "gib"), [("q8_0", 7.17), ("q4_k_m", 4.07), ("iq2_xxs", 1.86)])
def test_the_budget_of_an_export_counts_file_ram_and_disk(name, gib):
    needs = export_budget.needs(models.profile("mistral-7b"), SEVEN, hardware.machine("t4"), name)
    assert needs.fits and round(needs.disk.parts[f"{name.upper()} file"], 2) == gib
    assert needs.ram.peak_gib < 0.6 and needs.time.total_h > 0


def test_an_export_that_does_not_fit_is_refused_with_number_and_remedy(monkeypatch, tmp_path, run):
    t4 = hardware.machine("t4")
    small = replace(t4, host=replace(t4.host, disk_gib=15.0, ram_gib=0.3))
    needs = export_budget.needs(models.profile("mistral-7b"), SEVEN, small)
    assert not needs.fits
    assert "0.5 GiB of RAM, free Colab has 0.3 free: close" in needs.reasons[0]
    assert "17.6 GiB of disk, free Colab has 15.0 free: choose fewer or smaller types" in needs.reasons[1]
    monkeypatch.setattr(shutil, "disk_usage", lambda _: shutil._ntuple_diskusage(10**6, 10**6 - 1000, 1000))
    with pytest.raises(budget.DoesNotFit, match=r"the files need 0\.00 GiB at .*, and 0\.00 are free"):
        export.export(TINY, tmp_path / "x.gguf")
    assert not list(tmp_path.iterdir())


def test_a_laptop_of_8_gb_runs_what_the_table_says():
    rows = {row["type"]: row for row in export_budget.runs_on(SEVEN, ram_gib=8, vram_gib=6)}
    assert rows["Q4_K_M"]["on 8 GB"] == "yes" and rows["Q8_0"]["on 8 GB"] == "no"
    assert rows["Q4_K_M"]["layers on a 6 GB GPU"] == "all" and rows["F16"]["layers on a 6 GB GPU"] != "all"
    larger = {row["type"]: row["longest context, tokens"] for row in export_budget.runs_on(SEVEN, ram_gib=16)}
    assert all(larger[name] >= rows[name]["longest context, tokens"] for name in rows)
    assert export_budget.kv_cache_gib(SEVEN, 8192) == 1.0  # 32 layers, 8 heads of 128 values, keys and values, 2 bytes


def test_what_is_ticked_is_what_is_exported():
    boxes = show.choice(SEVEN, hardware.machine("t4"), "q4_k_m")
    assert show.types_of(boxes) == "q4_k_m" and "4.07 GiB" in boxes.words
    boxes.boxes["IQ2_XXS"].value = True
    assert show.types_of(boxes) == "q4_k_m,iq2_xxs" and "importance matrix" in boxes.words
    for box in boxes.boxes.values():
        box.value = False
    with pytest.raises(ValueError, match="tick at least one"):
        show.types_of(boxes)


def test_each_type_keeps_less_than_the_one_with_more_bits():
    found = export.kept(TINY)
    errors = [found[name]["error"] for name in ("Q8_0", "Q6_K", "Q5_K_M", "Q4_K_M", "Q3_K_M", "IQ2_XXS")]
    assert errors == sorted(errors) and found["F16"]["error"] < errors[0] < 0.01
    assert show.kept(found, "q4_k_m").axes


def test_what_was_measured_is_what_is_predicted():
    """Exports of two layers of a 7B: memory within 11 %, core seconds within 25 %, the weights to the byte."""
    lines = (models.ROOT / "data" / "measurements" / "gguf_export.jsonl").read_text(encoding="utf-8").splitlines()
    two = replace(SEVEN, layers=2)
    for row in map(json.loads, lines[1:]):
        file = gguf_types.file_type(row["types"])
        assert pytest.approx(row["anonymous_gib"], rel=0.11) == export_budget.PROCESS_GIB
        assert export_budget.core_seconds(two, [file]) + export_budget.FIXED_S == pytest.approx(row["cpu_s"], rel=0.25)
        assert row["bytes"] == row["predicted_bytes"] and row["anonymous_gib"] < 0.6
        assert gguf_sizes.file_bytes(two, file) == pytest.approx(row["bytes"], rel=1e-3)
