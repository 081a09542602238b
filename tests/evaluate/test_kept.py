"""An evaluation that is stopped: what was measured is kept, and the same command makes the report of a whole one."""

import errno
import json
import os
import re
import shutil
from pathlib import Path

import kill_at
import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from helpers import evaluate
from helpers.evaluate import kept
from helpers.models import ROOT, TINY, profile
from helpers.workspace import LASTING, SCRATCH

HELDOUT = ROOT / "data" / "heldout_conversations.jsonl"
OF_THE_MACHINE = ("_s", "_gib", "_per_s", "_per_s_batch_8", "gpu_ms_per_token")
CONFIG = profile("tiny", max_questions=2, max_heldout=3, max_new_tokens=4)


@pytest.fixture(scope="module", autouse=True)
def one_thread():
    """As in a fork: sums of floats depend on their number."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    """A model of one layer, and one with noise."""
    root, tokenizer = tmp_path_factory.mktemp("models"), AutoTokenizer.from_pretrained(TINY)
    torch.manual_seed(0)
    for name, noise in (("base", 0.0), ("noisy", 0.3)):
        model = AutoModelForCausalLM.from_pretrained(TINY, dtype=torch.float32, num_hidden_layers=1)
        for weight in model.model.layers.parameters():
            weight.data += noise * weight.data.std() * torch.randn_like(weight)
        model.save_pretrained(root / name)
        tokenizer.save_pretrained(root / name)
    return {name: root / name for name in ("base", "noisy")}


@pytest.fixture(scope="module")
def whole(models, tmp_path_factory):
    """The report of an evaluation that nothing stopped, and its folder."""
    output = tmp_path_factory.mktemp("whole") / "evaluate"
    return evaluate.evaluate(models, CONFIG, HELDOUT, output), output


@pytest.fixture
def opened(monkeypatch):
    """Names of the models that are measured; "stop" before them stops the evaluation at the second."""
    names, one = [], evaluate.evaluate_one

    def counted(path, *rest, **more):
        if names[:1] == ["stop"] and len(names) == 2:
            raise KeyboardInterrupt
        names.append(path.rpartition("/")[2])
        return one(path, *rest, **more)

    monkeypatch.setattr(evaluate, "evaluate_one", counted)
    return names


def of_the_model(entry):
    """What an entry says of the model, and not of the machine and the moment."""
    return {name: value for name, value in entry.items() if not name.endswith(OF_THE_MACHINE)}


def same(found, output, whole):
    """Whether a report and its answers are those of an evaluation that nothing stopped."""
    report, folder = whole
    answers = [(place / "generations.jsonl").read_bytes() for place in (folder, output)]
    assert json.loads((output / "report.json").read_text(encoding="utf-8")) == found and list(found) == list(report)
    assert not (output / SCRATCH).exists() and not output.with_name("evaluate.partial").exists()
    return answers[0] == answers[1] and all(of_the_model(found[name]) == of_the_model(report[name]) for name in report)


@pytest.mark.parametrize(("kept_before", "measured"), [(0, ["base", "noisy"]), (1, ["noisy"])])
def test_killed_at_a_moment_it_goes_on_from_what_was_measured(
    models, whole, opened, tmp_path, capsys, kept_before, measured
):
    """Killed when the figures of the first, and of the second, are about to get their name."""

    def act():
        evaluate.evaluate(models, CONFIG, HELDOUT, tmp_path / "evaluate")

    assert kill_at.is_killed(act, tmp_path, kept_before + 1, counted="rename", match=f"*{SCRATCH}/*.json*")
    assert not (tmp_path / "evaluate").exists()
    found = evaluate.evaluate(models, CONFIG, HELDOUT, tmp_path / "evaluate")
    assert opened == measured and same(found, tmp_path / "evaluate", whole)
    said = re.findall(r"^(\w+): kept from \d\d:\d\d\.$", capsys.readouterr().out, re.M)
    assert said + measured == ["base", "noisy"]


def test_a_machine_that_is_gone_leaves_what_was_measured_in_the_lasting_folder(
    models, whole, opened, tmp_path, monkeypatch, capsys
):
    run, lasting = tmp_path / "run", tmp_path / "drive" / "recipes" / "run"
    run.mkdir()
    lasting.mkdir(parents=True)
    (run / LASTING).write_text(str(lasting))
    opened.append("stop")
    with pytest.raises(KeyboardInterrupt):
        evaluate.evaluate(models, CONFIG, HELDOUT, run / "evaluate")
    assert "The figures of base are kept: the same command goes on from them." in capsys.readouterr().err
    shutil.rmtree(run / "evaluate.partial")
    opened.clear()
    found = evaluate.evaluate(models, CONFIG, HELDOUT, run / "evaluate")
    assert opened == ["noisy"] and same(found, run / "evaluate", whole)
    assert [folder.name for folder in lasting.iterdir()] == ["evaluate"]


def test_what_was_measured_otherwise_is_measured_again(models, opened, tmp_path):
    opened.append("stop")
    with pytest.raises(KeyboardInterrupt):
        evaluate.evaluate(models, CONFIG, HELDOUT, tmp_path / "evaluate")
    opened.clear()
    evaluate.evaluate(models, CONFIG.with_values(max_new_tokens=5), HELDOUT, tmp_path / "evaluate")
    assert opened == ["base", "noisy"]


def test_a_file_is_named_by_all_that_its_figures_depend_on(models, tmp_path):
    model, data = shutil.copytree(models["base"], tmp_path / "model"), tmp_path / "data.jsonl"
    shutil.copy(HELDOUT, data)

    def name(config=CONFIG, asked=(), gpu="Tesla T4"):
        return kept.name_of("base", model, config, data, asked, gpu)

    first = name()
    assert first == name() == name(CONFIG.with_values(gpus=2)) and first.startswith("base-")
    others = {name(CONFIG.with_values(seed=7)), name(CONFIG.with_values(eval_context=64)), name(asked=["Who?"])}
    others |= {name(gpu="NVIDIA L4")}
    for file in (model / "model.safetensors", data):  # other bytes of the same number
        stat = file.stat()
        os.utime(file, ns=(stat.st_atime_ns, stat.st_mtime_ns + 1))
        others |= {name()}
    assert len(others) == 6 and first not in others


def test_what_is_kept_comes_back_as_it_was_and_a_torn_file_is_none(models, tmp_path):
    bar = evaluate.bars.bar("one", 1)
    some = evaluate.read_questions(CONFIG.evaluate.questions, 2)
    entry, evidence = evaluate.evaluate_one(str(models["noisy"]), CONFIG, HELDOUT, some, True, None, bar, [])
    kept.write(tmp_path / "one.json", entry, evidence)
    again, back, _ = kept.read(tmp_path / "one.json")
    assert again == entry and back["answers"] == evidence["answers"] and back["references"] == evidence["references"]
    assert evaluate.compare_models(back, evidence) == evaluate.compare_models(evidence, evidence)
    assert back["perplexity"].perplexity == evidence["perplexity"].perplexity
    text = (tmp_path / "one.json").read_text(encoding="utf-8")
    (tmp_path / "one.json").write_text(text.replace('"entry"', '"Entry"'), encoding="utf-8")
    assert kept.read(tmp_path / "one.json") is None and kept.read(tmp_path / "two.json") is None


@pytest.mark.parametrize("name", ["mine/second", ""])
def test_a_name_that_no_file_can_have_is_refused_before_the_hours(models, tmp_path, name):
    with pytest.raises(ValueError, match=f"a model cannot be called '{name}': files get that name"):
        evaluate.evaluate({name: models["base"]}, CONFIG, HELDOUT, tmp_path / "evaluate")
    assert list(tmp_path.iterdir()) == []


def test_what_was_kept_goes_also_from_a_place_where_every_first_try_fails(tmp_path, monkeypatch):
    monkeypatch.setenv("RECIPES_PATIENCE_S", "0")
    twin = tmp_path / "evaluate.partial" / SCRATCH
    twin.mkdir(parents=True)
    for name in ("base-1.json", "gptq-2.json", ".base-1.json.torn"):
        (twin / name).write_text("{}")
    failed = set()

    def once(act):
        def call(path, *arguments, **named):
            if (act, path) not in failed:
                failed.add((act, path))
                raise OSError(errno.EIO, "Input/output error")
            return act(path, *arguments, **named)

        return call

    for name in ("unlink", "rmdir"):
        monkeypatch.setattr(Path, name, once(getattr(Path, name)))
    kept.clear(twin)
    assert not twin.parent.exists() and len(failed) == 5
