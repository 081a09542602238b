"""One GPU a process, and nothing of a run left on it, however the run ends."""

import doctest
import gc
import json
import re
import signal
import subprocess
import sys
import weakref

import gpu_checks
import pytest
import torch
import trl
from test_finetune import prepared, small, small_config  # noqa: F401 - fixtures

from helpers import finetune, inference
from helpers.finetune.trainer import FineTuner
from helpers.models import ROOT, TINY, gpu


def test_what_its_docstrings_say():
    assert doctest.testmod(gpu).failed == 0


def stop(trainer):
    signal.raise_signal(signal.SIGINT)


def stop_at_once(trainer):
    stop(trainer), stop(trainer)


def run_out(trainer):
    raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 MiB")


def spoil(trainer):
    trainer.model.get_base_model().lm_head.weight.data[0] = float("nan")


ENDS = {
    "stopped": (stop, KeyboardInterrupt),
    "stopped twice": (stop_at_once, KeyboardInterrupt),
    "out of memory": (run_out, torch.OutOfMemoryError),
    "not trained": (spoil, finetune.NotTrained),
}


@pytest.mark.parametrize(("end", "error"), ENDS.values(), ids=ENDS.keys())
def test_whatever_ends_training_no_part_of_the_model_stays(end, error, small, prepared, tmp_path, monkeypatch):  # noqa: F811
    """IPython keeps the last traceback as this test keeps `caught`; both reach finetune's frames."""
    parts, build, loss = [], finetune.build_trainer, FineTuner.compute_loss

    def build_and_note(*arguments):
        trainer = build(*arguments)
        parts.extend(weakref.ref(part) for part in (trainer, *trainer.model.modules(), *trainer.model.parameters()))
        return trainer

    def loss_and_end(trainer, *arguments, **named):
        found = loss(trainer, *arguments, **named)  # activations are there by now
        parts.append(weakref.ref(trainer.optimizer))
        if trainer.state.global_step == 1:
            end(trainer)
        return found

    monkeypatch.setattr(finetune, "build_trainer", build_and_note)
    monkeypatch.setattr(FineTuner, "compute_loss", loss_and_end)
    gc.disable()  # what is freed was freed by the run, not by chance
    try:
        with pytest.raises(error) as caught:
            finetune.finetune(small_config(small, max_steps=4), prepared, tmp_path / "finetune")
        left = [type(part()).__name__ for part in parts if part() is not None]
    finally:
        gc.enable()
    assert len(parts) > 50 and caught.tb is not None
    assert not left, f"{len(left)} of {len(parts)} parts are held, {sorted(set(left))}"


def test_a_model_that_cannot_be_opened_to_its_end_is_let_go(monkeypatch):
    parts = []

    def no_tokenizer(*arguments):
        frame = sys._getframe(1)
        parts.extend(weakref.ref(part) for part in frame.f_locals["model"].modules())
        raise OSError("Transport endpoint is not connected")

    monkeypatch.setattr(inference, "open_tokenizer", no_tokenizer)
    with pytest.raises(OSError) as caught:
        inference.load(TINY)
    assert parts and caught.tb is not None
    assert all(part() is None for part in parts)


def test_a_module_that_keeps_the_error_of_an_import_keeps_no_model(tmp_path, monkeypatch):
    """As GPTQModel does with llama_cpp, which PEFT makes it look for while an adapter is attached."""
    (tmp_path / "keeps_its_error.py").write_text(
        "try:\n    import no_such_library\nexcept ImportError as error:\n    kept = error\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    held = []

    @gpu.gives_back
    def work():
        model = torch.nn.Linear(2, 2)
        held.append(weakref.ref(model))
        import keeps_its_error

        return keeps_its_error.kept

    kept = work()
    assert held[0]() is None
    assert isinstance(kept, ModuleNotFoundError) and kept.name == "no_such_library"


def test_what_the_caller_was_handling_keeps_its_variables():
    def earlier():
        kept = "a user's own"
        raise ValueError(kept)

    @gpu.gives_back
    def work():
        raise RuntimeError("ours")

    try:
        earlier()
    except ValueError as first:
        with pytest.raises(RuntimeError) as caught:
            work()
        assert caught.value.__context__ is first
        assert first.__traceback__.tb_next.tb_frame.f_locals["kept"] == "a user's own"


CELL = """
import weakref
from helpers.models import gpu
from helpers.sources import readers

class Model:
    pass

@gpu.gives_back
def work():
    model = Model()
    held.append(weakref.ref(model))
    try:
        list(readers.read("nothing.there"))
    except Exception as error:
        raise RuntimeError("it broke") from error

held = []
work()
"""


MEANT = "from helpers import inference; inference.load('no/such/folder/here')"
NOT_MEANT = "gpu.gives_back(gpu.gives_back(lambda: int('twelve')))()"


def test_a_notebook_shows_the_lines_that_an_error_came_through():
    """IPython shows a cell's error and keeps it; a ValueError that a helper raises on purpose is its one sentence."""
    source = f"""
import sys
from IPython.core.interactiveshell import InteractiveShell
from helpers.show import troubleshooting
shell = InteractiveShell.instance()
troubleshooting.plain_errors()
for cell in ({CELL!r}, {MEANT!r}, {NOT_MEANT!r}):
    print("CELL")
    shell.run_cell(cell)
print("CELL HELD", shell.user_ns["held"][0]())
"""
    command = [sys.executable, "-c", source]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True, timeout=300)
    said = re.sub(r"\x1b\[[0-9;]*m", "", done.stdout)  # without its colours
    _, broke, meant, not_meant, held = said.split("CELL")
    for shown in ("readers.py", "raise RuntimeError", "direct cause", "nothing.there", "RuntimeError: it broke"):
        assert shown in broke, broke
    assert meant.strip().startswith("ValueError: there is no model folder no/such") and "Traceback" not in meant, meant
    assert "int('twelve')" in not_meant and "Traceback" in not_meant, not_meant
    assert "HELD None" in held.replace("  ", " ")


def test_what_caused_an_error_is_found_behind_its_text():
    @gpu.gives_back
    @gpu.gives_back
    def work():
        try:
            raise KeyError("first")
        except KeyError as error:
            raise RuntimeError("second") from error

    with pytest.raises(RuntimeError) as caught:
        work()
    seen = []
    link = caught.value
    while link is not None:
        seen.append(type(link).__name__)
        assert link is caught.value or link.__traceback__ is None
        link = link.__cause__ or link.__context__
    assert seen == ["RuntimeError", "CameThrough", "CameThrough", "KeyError"]
    assert gpu.came_through(caught.value)[-1].line == 'raise RuntimeError("second") from error'


def test_two_visible_cards_and_one_of_them_trains(small, prepared, tmp_path, monkeypatch):  # noqa: F811
    # As TrainingArguments counts them, with everything else on the CPU
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    arguments = trl.SFTConfig
    monkeypatch.setattr("helpers.finetune.trainer.SFTConfig", lambda **values: arguments(**values | {"use_cpu": False}))
    settings = small_config(small, max_steps=2)
    model, tokenizer = finetune.load_base(settings)
    model = finetune.attach_adapter(model, settings)
    trainer = finetune.build_trainer(settings, model, tokenizer, prepared, tmp_path / "checkpoints")
    assert finetune.train(trainer)["steps_applied"] == 2
    assert not isinstance(trainer.model_wrapped, torch.nn.DataParallel)


def test_gptq_runs_in_a_process_that_sees_one_card(tmp_path, monkeypatch):
    from helpers import jobs
    from helpers.quantize import process

    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "1,0")
    started = []

    def popen(command, **settings):
        started.append(settings["env"])
        return subprocess_popen([sys.executable, "-c", "print('{}')"], **settings)

    subprocess_popen = subprocess.Popen
    monkeypatch.setattr(jobs.subprocess, "Popen", popen)
    assert list(process.worker({"output": str(tmp_path)}, tmp_path / "log")) == [json.loads("{}")]
    assert started[0]["CUDA_VISIBLE_DEVICES"] == "1"


def test_the_gpu_checks_find_nothing_amiss_where_they_can_run(small, prepared, tmp_path):  # noqa: F811
    settings = small_config(small, max_steps=3)
    found = gpu_checks.stopped_and_continued(settings, prepared, tmp_path / "finetune")
    assert found["passed"] and found["resumed_from_step"] == 2 and found["steps"] == 3
    found = gpu_checks.drive_offload(torch.device("cpu"), 64, 32, [1024, 20000, 16, 24576])
    assert found["passed"], found


@pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has a GPU; runs where there is none")
def test_the_gpu_checks_skip_with_a_reason():
    for name in gpu_checks.CHECKS:
        said = gpu_checks.result_of(name, ROOT)
        assert said["passed"] is None and "0 GPUs are visible" in said["skipped"]
