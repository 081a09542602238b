"""Models evaluated at once, as two processes on a CPU: the report of one process, and no model lost for another's sake.

On two GPUs: tests/benchmarks/bench_gpus.py.
"""

import doctest
import json
import os
import re
import subprocess
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from helpers import evaluate, hardware, jobs
from helpers.evaluate import workers
from helpers.models import ROOT, TINY, gpu, profile

HELDOUT = ROOT / "data" / "heldout_conversations.jsonl"
CONFIG = profile("tiny", max_questions=5, max_heldout=9, max_new_tokens=6)
OF_THE_MACHINE = ("_s", "_gib", "_per_s", "_per_s_batch_8", "gpu_ms_per_token")
KILLED = """
import os, sys
if sys.orig_argv[1:3] == ["-m", "helpers.evaluate"]:
    from helpers.evaluate import measure
    load = measure.load
    def opened(path, *rest):
        if str(path).endswith("killed"):
            os.kill(os.getpid(), 9)
        print("a word of", os.path.basename(path))
        return load(path, *rest)
    measure.load = opened
"""
"""In a worker: a model that takes more host memory than there is."""


@pytest.fixture(scope="module")
def models(tmp_path_factory) -> dict[str, Path]:
    """A model of one layer, one with noise, one with a weight that is no number; and one whose process is killed."""
    root, tokenizer = tmp_path_factory.mktemp("models"), AutoTokenizer.from_pretrained(TINY)
    torch.manual_seed(0)
    for name, spoil in (("base", 0.0), ("noisy", 0.3), ("broken", float("nan")), ("killed", 0.0)):
        model = AutoModelForCausalLM.from_pretrained(TINY, dtype=torch.float32, num_hidden_layers=1)
        for weight in model.model.layers.parameters():
            weight.data += spoil * weight.data.std() * torch.randn_like(weight)
        model.save_pretrained(root / name)
        tokenizer.save_pretrained(root / name)
    return {name: root / name for name in ("base", "broken", "killed", "noisy")}


@pytest.fixture
def two_on_a_cpu(tmp_path, monkeypatch):
    (tmp_path / "site").mkdir()
    (tmp_path / "site" / "sitecustomize.py").write_text(KILLED, encoding="utf-8")
    paths = [str(tmp_path / "site"), str(ROOT), os.environ.get("PYTHONPATH", "")]
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join(filter(None, paths)))
    monkeypatch.setenv(gpu.ON_CPU, "1")
    monkeypatch.setattr(os, "cpu_count", lambda: 2)  # a thread each, as this process has
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # sums of floats depend on their number
    yield CONFIG.with_values(gpus=2)
    torch.set_num_threads(threads)


def of_the_model(entry: dict) -> dict:
    """What an entry says of the model, and not of the machine and the moment."""
    return {name: value for name, value in entry.items() if not name.endswith(OF_THE_MACHINE)}


def test_two_at_once_make_the_report_of_one_process_and_what_fails_takes_nothing_along(
    models, two_on_a_cpu, tmp_path, capfd
):
    found = evaluate.evaluate(models, two_on_a_cpu, HELDOUT, tmp_path / "two")
    said = capfd.readouterr()
    assert list(found) == ["base", "broken", "killed", "noisy"]
    assert "is not a number on 9 of 9 texts" in found["broken"]["left_out"]
    assert found["killed"]["left_out"] == ("its process ended with signal 9, most often because host memory ran out")
    page = (tmp_path / "two" / "report.html").read_text(encoding="utf-8")
    assert "illed is not evaluated: its process ended" in page and "roken is not evaluated: the loss of" in page
    for number, name in ((1, "base"), (4, "noisy")):
        assert re.search(rf"{name}, {number} of 4: 100%.* 14/14 ", said.err) and f"a word of {name}" in said.out
    sound = {name: models[name] for name in ("base", "noisy")}
    alone = evaluate.evaluate(sound, CONFIG, HELDOUT, tmp_path / "one")
    for name in sound:
        assert of_the_model(found[name]) == of_the_model(alone[name])
        assert set(alone[name]) == set(found[name]), "the same figures"
    two, one = ((tmp_path / which / "generations.jsonl").read_bytes() for which in ("two", "one"))
    assert two == one
    assert json.loads((tmp_path / "two" / "report.json").read_text(encoding="utf-8")) == found


def test_one_after_the_other_a_model_that_fails_leaves_the_others_and_the_first_is_an_error(models, tmp_path, capfd):
    sound_first = {name: models[name] for name in ("base", "broken")}
    found = evaluate.evaluate(sound_first, CONFIG, HELDOUT, tmp_path / "kept")
    assert found["base"]["perplexity"] > 1 and "is not a number" in found["broken"]["left_out"]
    said = capfd.readouterr().err
    assert "broken is not evaluated: the loss of" in said and "Traceback" not in said
    with pytest.raises(ValueError, match="is not a number"):
        evaluate.evaluate({"broken": models["broken"], "base": models["base"]}, CONFIG, HELDOUT, tmp_path / "none")
    assert [path.name for path in tmp_path.iterdir()] == ["kept"], "nothing half-written"


def test_when_all_fail_that_is_an_error_that_names_each(models, two_on_a_cpu, tmp_path, monkeypatch):
    monkeypatch.setattr(workers, "at_once", lambda tasks, gpus, ram_gib: [(task.name, "it fell") for task in tasks])
    both = {name: models[name] for name in ("broken", "killed")}
    with pytest.raises(ValueError, match=r"^broken is not evaluated: it fell; killed is not evaluated: it fell$"):
        evaluate.evaluate(both, two_on_a_cpu, HELDOUT, tmp_path / "none")
    assert not (tmp_path / "none").exists() and not (tmp_path / "none.partial").exists()


# ---- who runs when ---------------------------------------------------------------------------------------------------


def task(name: str, ram_gib: float) -> workers.Task:
    return workers.Task(name, name, 1, ram_gib, Path(name), {})


@pytest.mark.parametrize(
    ("open_gib", "waiting_gib", "first"),
    [
        ([], [9.0, 1.0], 0),
        ([6.0], [3.0, 1.0], 0),
        ([6.0], [9.0, 1.0], 1),  # the second waits, and the third does not wait for it
        ([6.0], [9.0, 5.0], None),
        ([], [40.0], 0),  # alone it gets its chance
        ([1.0, 1.0], [1.0], None),  # no GPU is free
    ],
)
def test_a_model_waits_for_a_gpu_and_for_host_memory(open_gib, waiting_gib, first):
    running = [SimpleNamespace(task=task("open", size)) for size in open_gib]
    waiting = [task(str(number), size) for number, size in enumerate(waiting_gib)]
    found = workers.next_one(waiting, running, gpus=2, ram_gib=10.0)
    assert found is (None if first is None else waiting[first])


def test_each_worker_has_a_gpu_that_no_other_has_and_a_model_waits_where_memory_is_short(monkeypatch, capsys):
    """Three models of 12, 12 and 4 GiB on two GPUs and 20 GiB: the first and the third, then the second."""
    events = []

    def started(job, card, gpus, files, ended):
        events.append(("opens", job.name, card, files.name))
        return SimpleNamespace(task=job, gpu=card, bar=SimpleNamespace(close=lambda: None))

    def hear(worker, messages):
        messages.put((worker, None))

    def outcome(worker):
        events.append(("ends", worker.task.name))
        return f"{worker.task.name}'s"

    for module, name, fake in ((workers, "started", started), (jobs, "hear", hear), (workers, "outcome", outcome)):
        monkeypatch.setattr(module, name, fake)
    found = list(workers.at_once([task("a", 12.0), task("b", 12.0), task("c", 4.0)], gpus=2, ram_gib=20.0))
    assert capsys.readouterr().out == ""  # a GPU is never idle: the third takes it
    assert found == [("a", "a's"), ("c", "c's"), ("b", "b's")]
    assert events == [
        ("opens", "a", 0, "0"),
        ("opens", "c", 1, "1"),
        ("ends", "a"),
        ("opens", "b", 0, "2"),
        ("ends", "c"),
        ("ends", "b"),
    ]


def test_a_stop_ends_every_process_and_a_gpu_that_memory_leaves_idle_is_said(monkeypatch, capsys):
    processes = []

    def start(*job, **how):
        processes.append(subprocess.Popen(["sleep", "600"], stdout=subprocess.PIPE, text=True))
        return processes[-1]

    def stop():
        raise KeyboardInterrupt

    monkeypatch.setattr(jobs, "start", start)
    monkeypatch.setattr(workers.queue, "Queue", lambda: SimpleNamespace(get=stop, put=lambda message: None))
    with pytest.raises(KeyboardInterrupt):
        list(workers.at_once([task("a", 1.0), task("b", 1.0), task("c", 9.0)], gpus=3, ram_gib=10.0))
    assert [process.returncode for process in processes] == [-9, -9]
    assert capsys.readouterr().out == "c waits: 9.0 GiB of RAM are not free beside what is open.\n"


def test_as_many_at_once_as_there_are_gpus_of_one_kind(monkeypatch, capsys):
    monkeypatch.delenv(gpu.ON_CPU, raising=False)
    names = ["Tesla T4", "Tesla T4", "GeForce RTX 3090"]
    monkeypatch.setattr(torch.cuda, "device_count", lambda: len(names))
    monkeypatch.setattr(torch.cuda, "get_device_name", names.__getitem__)
    asked = [workers.count(CONFIG.with_values(gpus=gpus), models) for gpus, models in ((1, 4), (2, 4), (2, 1))]
    assert asked == [1, 2, 1] and capsys.readouterr().out == ""
    with pytest.raises(ValueError, match=r"GPU 0 is a Tesla T4 and GPU 2 a GeForce RTX 3090, whose figures .* gpus=1"):
        workers.count(CONFIG.with_values(gpus="all"), 4)
    names.clear()
    assert workers.count(CONFIG.with_values(gpus="all"), 4) == 1 and capsys.readouterr().out == ""
    assert workers.count(CONFIG.with_values(gpus=2), 4) == 1
    assert capsys.readouterr().out.startswith("gpus=2, and PyTorch sees no GPU here: ")


def test_a_worker_reads_its_own_gpu_in_the_host_as_it_was_before_others_opened_models(monkeypatch):
    here = hardware.machine("t4")
    now = replace(here, free_vram_gib=9.0, host=replace(here.host, ram_gib=3.0))
    monkeypatch.setattr(hardware, "probe", lambda: now)
    found = workers.on_this_gpu(here.host)
    assert (found.vram_gib, found.host) == (9.0, here.host)


def test_an_error_is_a_sentence_with_what_to_do():
    error = torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB. GPU 0 has 14.56 GiB. Of those")
    assert workers.in_words(error) == (
        "it ran out of memory (CUDA out of memory. Tried to allocate 2.00 GiB): set a smaller eval_batch_size or "
        "eval_context"
    )
    assert workers.came_from(error) == "" and "KeyError: 'x'" in workers.came_from(KeyError("x"))


def test_examples_in_docstrings():
    assert doctest.testmod(workers).failed == 0
