"""Several GPUs, as two processes that meet through gloo on a CPU: the same run as one process's, whatever ends it.

On two GPUs: tests/benchmarks/bench_gpus.py.
"""

import doctest
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from dataclasses import asdict, replace
from pathlib import Path

import pytest
import torch
from datasets import Dataset, Features, load_from_disk
from kill_and_resume import make_inputs
from safetensors.torch import load_file
from transformers import MixtralConfig, MixtralForCausalLM

from helpers import budget, cli, finetune, hardware, jobs
from helpers.finetune import batches, ranks, workers
from helpers.finetune.trainer import FineTuner
from helpers.finetune.watch import Watch
from helpers.models import gpu, profile, shape
from helpers.workspace import checkpoints

ROOT = Path(__file__).resolve().parents[2]
QUIET = {"HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
CASES = {
    "even": {"accumulation": 4},
    "odd": {"accumulation": 2, "batch_size": 3, "eval_steps": 2},
    "an accumulation that two do not divide": {"accumulation": 3, "checkpointing": "all"},
    "one micro-batch a step": {"accumulation": 1, "batch_size": 6, "loss": "full"},
    "pairs": {"accumulation": 3, "method": "dpo", "eval_steps": 2},
    "packing": {"accumulation": 2, "batch_size": 1, "packing": True, "seq_len": 48},
    "patience": {"accumulation": 2, "learning_rate": 0.02, "eval_steps": 1, "patience": 1, "epochs": 4.0},
    "a mixture": {"accumulation": 2, "model": "mixture"},
    "a mixture, some of whose experts get no token": {"accumulation": 3, "model": "mixture", "kernels": "plain"},
}
ROAD = {"accumulation": 2, "max_steps": 14, "epochs": 9.0, "save_steps": 2, "keep_checkpoints": 3}
STOPPED = "asked to stop at different steps"


@pytest.fixture(scope="session", autouse=True)
def one_thread():
    torch.set_num_threads(1)


@pytest.fixture(scope="module")
def inputs(tmp_path_factory) -> tuple[Path, Path]:
    """A model of two layers, and 25 rows to train and 5 held out: odd numbers of micro-batches of most sizes."""
    folder = tmp_path_factory.mktemp("inputs")
    model, _ = make_inputs(folder)
    for split, count in (("train", 25), ("heldout", 5)):
        rows = load_from_disk(str(folder / "prepared" / split)).select(range(count))
        Dataset.from_dict(rows.to_dict()).save_to_disk(str(folder / "few" / split))
        columns, kinds = rows.to_dict(), dict(rows.features)
        for name, other in (("rejected_ids", "input_ids"), ("rejected_masks", "assistant_masks")):
            columns[name], kinds[name] = columns[other][::-1], kinds[other]
        Dataset.from_dict(columns, Features(kinds)).save_to_disk(str(folder / "pairs" / split))
    mixture(model, folder / "mixture")
    return model, folder / "few"


def mixture(model: Path, folder: Path) -> None:
    """A mixture of eight experts with the model's tokenizer."""
    shutil.copytree(model, folder)
    sizes = {"vocab_size": json.loads((model / "config.json").read_text())["vocab_size"], "intermediate_size": 32}
    sizes |= {"hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2, "num_key_value_heads": 1}
    torch.manual_seed(0)
    MixtralForCausalLM(MixtralConfig(**sizes, num_local_experts=8)).save_pretrained(folder)


def settings(folder: Path, model: str = "model", **values):
    usual = {"rank": 4, "seq_len": 32, "batch_size": 2, "epochs": 1.0, "learning_rate": 2e-3, "save_steps": 1000}
    return profile("tiny", model=str(folder.with_name(model)), **(usual | values))


@pytest.fixture(scope="module")
def two_ranks(inputs, tmp_path_factory) -> tuple[Path, list[dict]]:
    """Every case trained by two ranks: (the folder of the cases, each rank's facts)."""
    folder, (model, prepared) = tmp_path_factory.mktemp("two"), inputs
    cases = {name: {"config": asdict(settings(model, **values))} for name, values in CASES.items()}
    cases[STOPPED] = {"config": asdict(settings(model, **ROAD)), "stop_at": 3}
    cases = {name: case | {"prepared": str(data_of(name, prepared))} for name, case in cases.items()}
    (folder / "cases.json").write_text(json.dumps(cases), encoding="utf-8")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    processes = [
        subprocess.Popen(
            [sys.executable, str(Path(__file__).with_name("two_ranks.py")), str(folder)],
            env=os.environ | QUIET | by_hand(rank, port),
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for rank in range(2)
    ]
    try:
        said = [process.communicate(timeout=600)[0] for process in processes]
    finally:
        for process in processes:  # one that waits for the other for ever
            process.kill()
    assert [process.returncode for process in processes] == [0, 0], "\n".join(said)
    return folder, json.loads((folder / "facts.json").read_text(encoding="utf-8"))


def data_of(case: str, prepared: Path) -> Path:
    """What a case trains on: the rows, or pairs of them."""
    return prepared.with_name("pairs") if case == "pairs" else prepared


def by_hand(rank: int, port: int) -> dict[str, str]:
    """The environment that torchrun and others give."""
    names = {"RANK": rank, "WORLD_SIZE": 2, "LOCAL_RANK": rank, "LOCAL_WORLD_SIZE": 2, "MASTER_PORT": port}
    return {name: str(value) for name, value in names.items()} | {"MASTER_ADDR": "127.0.0.1"}


def same_run(one: Path, two: Path) -> None:
    """The same loss at each step, the same held-out losses, the same adapter."""
    logs = [json.loads((folder / "log.json").read_text(encoding="utf-8")) for folder in (one, two)]
    for name, apart in (("loss", 1e-6), ("eval_loss", 1e-6)):
        first, second = ({entry["step"]: entry[name] for entry in log if name in entry} for log in logs)
        assert first == pytest.approx(second, abs=apart) and len(first) >= (name == "loss")
    first, second = (load_file(folder / "adapter" / "adapter_model.safetensors") for folder in (one, two))
    assert first.keys() == second.keys()
    assert max((first[name] - second[name]).abs().max().item() for name in first) <= 1e-5


@pytest.mark.parametrize("name", CASES)
def test_two_ranks_make_the_run_of_one(name, two_ranks, inputs, tmp_path):
    model, prepared = inputs
    measured = finetune.finetune(settings(model, **CASES[name]), data_of(name, prepared), tmp_path / "finetune")
    same_run(tmp_path / "finetune", two_ranks[0] / name / "finetune")
    made = json.loads((two_ranks[0] / name / "finetune" / "manifest.json").read_text())["measurements"]
    assert made["gpus"] == 2
    assert made["heldout_loss"] == pytest.approx(measured["heldout_loss"], abs=1e-6)
    assert [made[what] for what in ("steps", "steps_applied", "text_tokens")] == [
        measured[what] for what in ("steps", "steps_applied", "text_tokens")
    ]
    if name == "patience":
        assert measured["steps"] < 4 * 7, "it ended early, or this says nothing of patience"


def test_gradients_are_averaged_once_a_step_in_their_buckets_and_frozen_weights_are_not_sent(two_ranks):
    for facts in two_ranks[1]:
        even = facts["even"]
        assert even["ddp"] == "DistributedDataParallel" and even["bucket_view"] and not even["find_unused"]
        assert even["sent"] == even["trained"] and even["sent"]
        # 13 micro-batches of two rows are four steps of four, the last one filled up: two a rank, one without a sum
        assert (even["steps"], even["micro_batches"], even["unsynced"]) == (4, 2, 4)


def test_dropout_differs_from_rank_to_rank(two_ranks):
    assert [facts["even"]["seed"] for facts in two_ranks[1]] == [0, 1]


def test_a_stop_that_reaches_one_rank_stops_all_at_the_same_step_with_a_checkpoint(two_ranks):
    for facts in two_ranks[1]:
        assert facts[STOPPED]["stopped"] == "stopped after step 3; run again to continue from there"
    saved = two_ranks[0] / STOPPED / "finetune.partial" / "checkpoints"
    assert checkpoints.newest(saved).name == "checkpoint-3"
    assert (saved / "checkpoint-3" / "rng_state_1.pth").is_file()
    assert two_ranks[1][0]["left before the checkpoint was whole"] is False, "its launcher ends who stays behind"


# ---- started and ended -----------------------------------------------------------------------------------------------


@pytest.fixture
def at_a_step(monkeypatch, tmp_path):
    """Have a worker do something at a step; returns what gives the workers that were started."""
    (tmp_path / "pids").mkdir()
    paths = [str(Path(__file__).with_name("at_a_step")), os.environ.get("PYTHONPATH", "")]
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join(filter(None, paths)))
    monkeypatch.setenv("AT_A_STEP_PIDS", str(tmp_path / "pids"))
    monkeypatch.setenv(gpu.ON_CPU, "1")

    def at(rank: int, step: int, what: str) -> None:
        for file in (tmp_path / "pids").iterdir():
            file.unlink()
        monkeypatch.setenv("AT_A_STEP", f"{rank} {step} {what}")

    at.workers = lambda: [int(file.name) for file in (tmp_path / "pids").iterdir()]
    return at


def alive(process: int) -> bool:
    """Whether a process runs; one that has ended and is not yet buried does not."""
    try:
        return Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()[0] not in "ZX"
    except OSError:
        return False


def ended(processes: list[int], within_s: float) -> bool:
    until = time.monotonic() + within_s
    while any(map(alive, processes)) and time.monotonic() < until:
        time.sleep(0.05)
    return not any(map(alive, processes))


def command(config, prepared: Path, output: Path, *more: str) -> subprocess.Popen:
    """`python -m helpers finetune --gpus 2`."""
    file = output.parent / "settings.yaml"
    file.write_text(json.dumps(asdict(config)), encoding="utf-8")
    flags = ["--config", str(file), "--prepared", str(prepared), "--output", str(output), "--gpus", "2", *more]
    return subprocess.Popen(
        [sys.executable, "-m", "helpers", "finetune", "--json", *flags],
        env=os.environ | QUIET,
        cwd=ROOT,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def test_two_one_two_one_processes_and_every_way_to_end_make_the_run_of_one(at_a_step, inputs, tmp_path, monkeypatch):
    model, prepared = inputs
    config, output = settings(model, **ROAD), tmp_path / "finetune"
    finetune.finetune(config, prepared, tmp_path / "calm" / "finetune")
    # Two, until one is killed between two checkpoints
    at_a_step(1, 5, "die")
    with pytest.raises(workers.WorkerLost, match=r"process of GPU 1 of 2 ended with signal 9, .* goes on from it"):
        finetune.finetune(config.with_values(gpus=2), prepared, output)
    assert len(at_a_step.workers()) == 2 and not any(map(alive, at_a_step.workers()))
    # One, until it is stopped
    on_step_end = Watch.on_step_end

    def stop_at_7(watch, args, state, control, **kwargs):
        watch.interrupted = 2 if state.global_step == 7 else None
        on_step_end(watch, args, state, control, **kwargs)

    with monkeypatch.context() as patched, pytest.raises(KeyboardInterrupt, match="stopped after step 7"):
        patched.setattr(Watch, "on_step_end", stop_at_7)
        finetune.finetune(config, prepared, output)
    # Two, until their launcher is asked to stop
    at_a_step(1, 9, "interrupt")
    launcher = command(config, prepared, output)
    result, said = launcher.communicate()
    assert launcher.returncode == 1 and result == "" and "Traceback" not in said
    assert "continuing from checkpoint-7" in said and "stopped; the same command continues" in said
    stopped = checkpoints.step_of(checkpoints.newest(output.with_name("finetune.partial") / "checkpoints"))
    assert stopped >= 9 and not any(map(alive, at_a_step.workers()))
    # Two, until their launcher is killed
    at_a_step(0, stopped + 1, "orphan")
    launcher = command(config, prepared, output)
    launcher.communicate()
    assert launcher.returncode == -signal.SIGKILL
    assert len(at_a_step.workers()) == 2 and ended(at_a_step.workers(), within_s=60)
    assert checkpoints.step_of(checkpoints.newest(output.with_name("finetune.partial") / "checkpoints")) > stopped
    # One
    assert finetune.finetune(config, prepared, output)["resumed_from_step"] > stopped
    same_run(tmp_path / "calm" / "finetune", output)
    assert {path.name for path in tmp_path.iterdir()} == {"calm", "finetune", "pids", "settings.yaml"}


def test_a_rank_out_of_memory_is_a_sentence_and_progress_and_words_of_rank_0_are_shown_here(
    at_a_step, inputs, tmp_path, capsys
):
    model, prepared = inputs
    at_a_step(1, 3, "out of memory")
    with pytest.raises(workers.WorkerLost) as caught:
        finetune.finetune(settings(model, gpus=2, max_steps=4, accumulation=2), prepared, tmp_path / "finetune")
    assert str(caught.value).startswith("GPU 1 of 2 ran out of memory (CUDA out of memory. Tried to allocate 2.00 GiB)")
    assert "\n" not in str(caught.value) and not any(map(alive, at_a_step.workers()))
    assert "/4" in capsys.readouterr().err, "a bar"


def test_a_worker_that_dies_before_it_reads_its_job_is_a_sentence(inputs, tmp_path, monkeypatch):
    model, prepared = inputs
    monkeypatch.setenv(gpu.ON_CPU, "1")
    monkeypatch.setenv("PYTHONHASHSEED", "no number")  # Python itself refuses to start
    longer_than_a_pipe_holds = settings(model, gpus=2, accumulation=2, columns="a" * 200_000)
    with pytest.raises(workers.WorkerLost, match=r"the process of GPU [01] of 2 ended with status 1, .*PYTHONHASHSEED"):
        workers.launch(longer_than_a_pipe_holds, prepared, tmp_path / "finetune", "auto", 2)


# ---- what is refused -------------------------------------------------------------------------------------------------


def test_of_ranks_that_have_met_the_first_says_what_is_wrong_and_another_what_it_alone_has_met(two_ranks):
    first, second = (facts["said"] for facts in two_ranks[1])
    assert (first["status"], second["status"]) == (2, 2)
    assert first["together"].startswith("finetune: ") and "is not there" in first["together"]
    assert first["together"].count("\n") == 1 and second["together"] == ""
    assert (first["alone"], second["alone"]) == ("", "a disk that is not shared\n")


@pytest.mark.parametrize(
    ("rank", "says"), [({"RANK": "0"}, True), ({"RANK": "1"}, False), ({"RANK": "8", "LOCAL_RANK": "0"}, True)]
)
def test_before_they_meet_the_first_of_each_machine_says_what_is_wrong(rank, says, monkeypatch, capsys):
    monkeypatch.delenv("LOCAL_RANK", raising=False)
    for name, value in rank.items():
        monkeypatch.setenv(name, value)
    assert cli.main(["finetune", "--profile", "tiny", "--rank", "0"]) == 2
    assert ("rank" in capsys.readouterr().err) == says


@pytest.mark.parametrize(
    ("there", "asked", "sentence"),
    [
        (0, 2, "gpus=2, and PyTorch sees no GPU here: leave gpus out, and one process trains on the CPU"),
        (1, 2, "gpus=2, and PyTorch sees 1 GPU here: choose at most 1, or all"),
        (2, 3, "gpus=3, and PyTorch sees 2 GPUs here: choose at most 2, or all"),
    ],
)
def test_more_gpus_than_there_are(there, asked, sentence, inputs, tmp_path, monkeypatch):
    model, prepared = inputs
    monkeypatch.setattr(torch.cuda, "device_count", lambda: there)
    with pytest.raises(ValueError) as caught:
        finetune.finetune(settings(model, gpus=asked), prepared, tmp_path / "finetune")
    assert str(caught.value) == sentence
    assert workers.count(settings(model, gpus="all")) == max(there, 1)


def test_more_gpus_than_a_step_has_sequences(inputs, monkeypatch):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 4)
    with pytest.raises(
        ValueError, match=r"a step has 2 sequences .* too few for 4 GPUs .* set accumulation=4, or gpus=2"
    ):
        workers.count(settings(inputs[0], gpus=4, batch_size=1, accumulation=2))


def test_a_mixture_that_balances_its_experts_by_micro_batch_is_refused(inputs, tmp_path, monkeypatch):
    config = settings(inputs[0], model="mixture")
    file = Path(config.model.model) / "config.json"
    balanced = tmp_path / "mixture"
    shutil.copytree(file.parent, balanced)
    (balanced / "config.json").write_text(
        file.read_text().replace('"output_router_logits": false', '"output_router_logits": true')
    )
    monkeypatch.setattr(ranks, "count", lambda: 2)
    config = config.with_values(model=str(balanced))
    model, tokenizer = finetune.load_base(config)
    with pytest.raises(ValueError, match=r"balances its experts .* train it on one GPU"):
        finetune.build_trainer(config, finetune.attach_adapter(model, config), tokenizer, inputs[1], tmp_path / "saves")


def test_a_worker_sees_its_own_card_alone_from_its_first_import_on(monkeypatch, tmp_path):
    seen = []
    monkeypatch.setattr(jobs, "start", lambda module, job, log, environment, **how: seen.append(environment))
    monkeypatch.delenv(gpu.ON_CPU, raising=False)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "5,3")
    for rank in range(2):
        workers.started(rank, 2, 1234, tmp_path, {})
    names = ("RANK", "LOCAL_RANK", "CUDA_VISIBLE_DEVICES", "WORLD_SIZE")
    assert [tuple(env[name] for name in names) for env in seen] == [("0", "0", "5", "2"), ("1", "0", "3", "2")]


FAILURES = {
    "ValueError": ({"error": "ValueError", "text": "rank=33 is too large"}, ValueError, "rank=33 is too large"),
    "NotTrained": ({"error": "NotTrained", "text": "the loss is NaN"}, finetune.NotTrained, "the loss is NaN"),
    "a bug": ({"error": "KeyError", "text": "'x'", "trace": "in line 7"}, RuntimeError, "GPU 1 of 2: KeyError: 'x'"),
    "an import": (
        {"died": 1},
        workers.WorkerLost,
        "ended with status 1, ImportError: no such module: all have been ended",
    ),
}


@pytest.mark.parametrize(("failure", "kind", "sentence"), FAILURES.values(), ids=FAILURES.keys())
def test_a_workers_error_is_the_launchers(failure, kind, sentence, tmp_path):
    (tmp_path / "1.log").write_text("Traceback\nImportError: no such module\n")
    failed, work = workers.Worker(1, None, tmp_path / "1.log", failure), tmp_path / "finetune.partial"
    assert "its log" not in str(workers.error_of(failed, 2, work)), "nothing is written where nothing was"
    work.mkdir()
    error = workers.error_of(failed, 2, work)
    assert type(error) is kind and sentence in str(error)
    kept = [(file.name, file.read_text()) for file in work.iterdir()]
    assert kept == ([("gpu-1.log", "Traceback\nImportError: no such module\n")] if "died" in failure else [])
    assert (f"; its log is {work / 'gpu-1.log'}" in str(error)) == ("died" in failure)
    assert kind is not RuntimeError or "in line 7" in str(error.__cause__)


def test_sharding_that_only_costs_is_refused_before_anything_is_loaded(inputs, tmp_path):
    with pytest.raises(ValueError, match="sharding=zero3 with weights=nf4: of a 7B in 4 bits two H200 made"):
        finetune.finetune(settings(inputs[0], sharding="zero3"), inputs[1], tmp_path / "finetune")


def test_another_optimizer_than_is_set_is_said_once_by_rank_0(inputs, tmp_path, monkeypatch, capsys):
    config = settings(inputs[0], sharding="fsdp", optimizer="paged_adamw_8bit")
    for rank, said in (
        (0, "the optimizer is PyTorch's AdamW with states in fp32, not paged_adamw_8bit: fsdp"),
        (1, ""),
    ):
        monkeypatch.setenv("RANK", str(rank))
        with pytest.raises(ValueError, match="is not there"):  # it says this before anything is read
            finetune.finetune(config, tmp_path / "nowhere", tmp_path / "finetune")
        heard = capsys.readouterr().out
        assert heard.startswith(said) and heard.count("\n") == bool(said)


def test_a_port_in_use(monkeypatch):
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        for name, value in by_hand(0, taken.getsockname()[1]).items():
            monkeypatch.setenv(name, value)
        with (
            pytest.raises(ValueError, match=r"could not meet at .* \(the port is in use\): choose another") as caught,
            ranks.joined(),
        ):
            pass
    assert "\n" not in str(caught.value)


def test_gpus_of_unequal_memory_are_planned_for_the_smallest_and_of_other_kinds_refused(monkeypatch, capsys):
    monkeypatch.setattr(ranks, "count", lambda: 2)
    t4 = hardware.machine("t4")
    fuller = replace(t4, free_vram_gib=9.0)
    monkeypatch.setattr(ranks, "gathered", lambda mine: [mine, replace(fuller, host=mine.host)])
    planned = ranks.smallest(t4)
    assert planned.vram_gib == 9.0
    assert planned.host.ram_gib == t4.host.ram_gib / 2, "two processes share it"
    said = capsys.readouterr().out
    assert said == "GPU 1 has 9.0 GiB free and GPU 0 14.6: the run is planned for the smaller one\n"
    monkeypatch.setattr(ranks, "gathered", lambda mine: [mine, hardware.machine("3090")])
    with pytest.raises(
        ValueError, match="GPU 0 is a Tesla T4 and GPU 1 a GeForce RTX 3090, which compute in different"
    ):
        ranks.smallest(t4)


def test_a_plan_for_a_gpu_that_has_less_room_than_the_notebook_saw_recomputes_more(monkeypatch, capsys):
    t4, asked = hardware.machine("t4"), profile("mistral-7b", model="mistral-7b-v0.3", gpus=2)
    seen = budget.plan(asked, shape("mistral-7b-v0.3"), t4).config
    monkeypatch.setattr(ranks, "smallest", lambda machine: replace(t4, free_vram_gib=7.0))
    assert finetune.planned(seen) == seen, "one GPU: as asked"
    monkeypatch.setattr(ranks, "count", lambda: 2)
    planned = finetune.planned(seen)
    assert planned.train.checkpointing > seen.train.checkpointing
    assert budget.budget(planned, shape("mistral-7b-v0.3"), replace(t4, free_vram_gib=7.0)).fits
    assert "layers are checkpointed" in capsys.readouterr().out


def test_a_full_disk_while_two_train_costs_a_checkpoint_and_nobody_waits(monkeypatch):
    """The others meet rank 0 at no barrier while it writes."""
    calls = []
    monkeypatch.setattr(ranks, "is_first", lambda: False)
    monkeypatch.setattr(ranks, "gathered", lambda state: calls.append(type(state)) or [None, state])
    monkeypatch.setattr(torch.distributed, "barrier", lambda *group: calls.append("barrier"))
    trainer = object.__new__(FineTuner)
    trainer.model, trainer.random_state = torch.nn.Linear(1, 1), lambda: b"state"
    FineTuner._save_checkpoint(trainer, None, None)
    assert calls == [bytes]


@pytest.mark.parametrize("module", [ranks, workers, batches], ids=lambda module: module.__name__)
def test_examples_in_docstrings(module):
    assert doctest.testmod(module).failed == 0
