"""DeepSpeed's ZeRO-2 between two processes (gloo, on a CPU): one process's training, saved whole, gone on with by any.

DeepSpeed is no dependency: `make test-deepspeed` installs it aside and runs these.
"""

import os
import socket
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as processes
from datasets import Dataset, load_from_disk
from kill_and_resume import make_inputs
from test_sharded import fine_tuned, logged, weights_of

from helpers import models
from helpers.finetune import zero

needs_deepspeed = pytest.mark.skipif(
    find_spec("deepspeed") is None, reason="DeepSpeed is not installed: `make test-deepspeed` runs this"
)
LORA = {"weights": "fp16", "save_steps": 2, "eval_steps": 2}
ALL = {"weights": "fp16", "trains": "all", "learning_rate": 1e-4, "save_steps": 2}
RUNS = {"LoRA": LORA | {"sharding": "zero2"}, "all": ALL | {"sharding": "zero2"}}
STOPPED = {"stopped, then alone": RUNS["LoRA"], "stopped, then by two": RUNS["all"]}


def one_rank(rank: int, port: int, folder: Path) -> None:
    """A process of the two: all trainings, one after the other."""
    os.environ |= {"RANK": str(rank), "WORLD_SIZE": "2", "LOCAL_RANK": str(rank), "DS_ACCELERATOR": "cpu"}
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    for run, values in RUNS.items():
        fine_tuned(folder, run, gpus=2, **values)
    for run, values in STOPPED.items():
        with pytest.raises(KeyboardInterrupt):
            fine_tuned(folder, run, stop_at=3, gpus=2, **values)
    fine_tuned(folder, "stopped, then by two", gpus=2, **STOPPED["stopped, then by two"])
    dist.barrier()
    dist.destroy_process_group()


@pytest.fixture(scope="module")
def divided(tmp_path_factory) -> Path:
    """The folder in which two processes have trained."""
    folder = tmp_path_factory.mktemp("divided")
    make_inputs(folder)
    for split, count in (("train", 25), ("heldout", 5)):
        rows = load_from_disk(str(folder / "prepared" / split)).select(range(count))
        Dataset.from_dict(rows.to_dict()).save_to_disk(str(folder / "few" / split))
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    processes.spawn(one_rank, (port, folder), nprocs=2)
    for name, values in (("LoRA", LORA), ("all", ALL)):
        fine_tuned(folder, f"{name} alone", **values)
    return folder


@needs_deepspeed
@pytest.mark.parametrize("run", RUNS)
def test_a_training_divided_by_deepspeed_is_the_training_of_one_process(run, divided):
    alone = f"{run} alone"
    for name in ("loss", "eval_loss", "grad_norm"):
        torch.testing.assert_close(logged(divided, run, name), logged(divided, alone, name), rtol=1e-4, atol=1e-4)
    same_weights(divided, run, alone)


@needs_deepspeed
def test_a_training_that_was_stopped_goes_on_with_one_process_or_two(divided):
    done = fine_tuned(divided, "stopped, then alone", **LORA)
    assert done["resumed_from_step"] == 3
    same_weights(divided, "stopped, then alone", "LoRA alone")
    same_weights(divided, "stopped, then by two", "all alone")


def same_weights(folder: Path, run: str, alone: str) -> None:
    ours, theirs = weights_of(folder, run), weights_of(folder, alone)
    assert ours.keys() == theirs.keys() and len(ours) > 4
    for name, value in ours.items():
        torch.testing.assert_close(value, theirs[name], rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize(
    ("values", "sentence"),
    [
        ({"weights": "nf4"}, "of a 7B in 4 bits two H200 made 7,656 tokens/s by zero2 .* set sharding=none"),
        ({"sharding": "zero3"}, "sharding=zero3 is not run here: what it divides, fsdp divides too"),
        ({"patience": 2}, "patience goes back"),
        ({"method": "dpo"}, "method=dpo was never tried with sharding=zero2"),
    ],
)
def test_what_deepspeed_is_not_asked_to_do(values, sentence):
    with pytest.raises(ValueError, match=sentence):
        zero.refuse(models.profile("tiny", **({"weights": "fp16", "sharding": "zero2"} | values)))


def test_where_deepspeed_is_not_installed_the_line_that_installs_it_is_said(monkeypatch):
    monkeypatch.setattr(zero, "find_spec", lambda name: None)
    with pytest.raises(ValueError, match=r"needs DeepSpeed, which is not installed: DS_BUILD_OPS=0 pip install .*fsdp"):
        zero.refuse(models.profile("tiny", weights="fp16", sharding="zero2"))


def test_deepspeeds_buckets_are_not_its_own():
    found = zero.settings(models.profile("tiny", weights="fp16", sharding="zero2"), 2)["zero_optimization"]
    assert found["stage"] == 2 and found["reduce_bucket_size"] == found["allgather_bucket_size"] == 2**24
