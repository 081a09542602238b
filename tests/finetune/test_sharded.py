"""Weights divided between two processes (gloo, on a CPU): the steps, the gradients and the weights of one process."""

import json
import os
import socket
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as processes
from datasets import Dataset, load_from_disk
from kill_and_resume import make_inputs
from test_preferences import write_pairs
from transformers import AutoModelForCausalLM

from helpers import finetune, models
from helpers.finetune import base, sharded
from helpers.finetune.engine import losses
from helpers.finetune.trainer import choose_layers, saved_weights
from helpers.finetune.watch import Watch

CASES = {
    "NF4, our own layers": {"checkpointing": 2},
    "NF4, transformers' layers": {"checkpointing": 2, "kernels": "plain"},
    "16 bits, our own layers": {"weights": "fp16", "keep_attention": False, "checkpointing": "all"},
    "NF4, offloaded inputs": {"checkpointing": "all", "offload_activations": True},
    "full fine-tuning": {"weights": "fp16", "trains": "all"},
}


def trained(config, model, rank: int = 0, ranks: int = 1) -> dict:
    """Three steps of four micro-batches, dealt to the ranks: losses, gradients' norms, and two weights in the end."""
    causal_lm = getattr(model, "get_base_model", lambda: model)()
    losses.install(causal_lm, config.train.loss)
    choose_layers(model, config)
    trainable = [value for value in model.parameters() if value.requires_grad]
    optimizer = torch.optim.AdamW(trainable, lr=1e-3)
    rows = torch.randint(300, 2000, (3, 4, 2, 48), generator=torch.Generator().manual_seed(0))
    model.train()
    found, norms = [], []
    for step in rows:
        total = torch.zeros(())
        for micro_batch in step[rank::ranks]:
            loss = model(input_ids=micro_batch, labels=micro_batch, num_items_in_batch=4 * 2 * 47).loss
            (loss * ranks).backward()  # gradients are averaged
            total += loss.detach()
        if ranks > 1:
            dist.all_reduce(total)
        norms.append(float(sharded.whole(torch.nn.utils.clip_grad_norm_(trainable, 1.0))))
        optimizer.step()
        optimizer.zero_grad()
        found.append(float(total))
    first, last = sharded.whole(trainable[0]), sharded.whole(trainable[-1])
    return {"losses": found, "norms": norms, "first": first, "last": last}


RUNS = {
    "LoRA": {"save_steps": 2, "eval_steps": 2},
    "all weights": {"weights": "fp16", "trains": "all", "learning_rate": 1e-4},
    "pairs": {"method": "dpo", "accumulation": 2, "seq_len": 64, "save_steps": 2},
    "pairs by odds": {"method": "orpo", "accumulation": 2, "seq_len": 64, "save_steps": 2, "max_steps": 4},
}
"""Whole trainings by `finetune`."""
STOPPED = {"LoRA": 3, "pairs": 3, "pairs by odds": 1}
"""Of these the step at which somebody stops one; pairs' two processes go on then, with what the base said of them."""


def fine_tuned(folder: Path, run: str, stop_at: int | None = None, **values) -> dict:
    """A training of folder/prepared into folder/run; stop_at: of the step at which somebody presses Ctrl-C."""
    usual = {"model": str(folder / "model"), "rank": 4, "seq_len": 32, "batch_size": 2, "accumulation": 4}
    config = models.profile("tiny", **(usual | {"max_steps": 6, "learning_rate": 2e-3, "epochs": 9.0} | values))
    on_step_end = Watch.on_step_end

    def stopped(watch, args, state, control, **kwargs):
        if state.global_step == stop_at:
            watch.interrupted = 15
        return on_step_end(watch, args, state, control, **kwargs)

    Watch.on_step_end = stopped
    try:
        prepared = folder / ("few-pairs" if config.train.sides == 2 else "few")
        return finetune.finetune(config, prepared, folder / run / "finetune")
    finally:
        Watch.on_step_end = on_step_end


def logged(folder: Path, run: str, name: str) -> list[float]:
    """What a training logged of a quantity, step by step."""
    log = json.loads((folder / run / "finetune" / "log.json").read_text(encoding="utf-8"))
    return [entry[name] for entry in log if name in entry]


def weights_of(folder: Path, run: str) -> dict[str, torch.Tensor]:
    """The adapter or the model that a training left."""
    (path,) = [path for path in (folder / run / "finetune").iterdir() if path.name in ("adapter", "model")]
    return {name: value.float() for name, value in saved_weights(path).items()}


def configured(case: str):
    """The tiny model's settings of a case."""
    return models.profile("tiny", gpus=2, sharding="fsdp", **({"checkpointing": "none"} | CASES[case]))


def one_rank(rank: int, port: int, answer) -> None:
    """A process of the two: all cases, one after the other."""
    os.environ |= {"RANK": str(rank), "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    found = {}
    for case in CASES:
        model, _ = sharded.load(configured(case))
        held = sum(sharded.here(value).nbytes for value in model.parameters())
        found[case] = trained(configured(case), model, rank, ranks=2) | {"held": held}
    for run, values in RUNS.items():
        fine_tuned(answer.parent, run, gpus=2, sharding="fsdp", **values)
    for run, stop_at in STOPPED.items():
        with pytest.raises(KeyboardInterrupt):
            fine_tuned(answer.parent, f"stopped {run}", stop_at=stop_at, gpus=2, sharding="fsdp", **RUNS[run])
    fine_tuned(answer.parent, "stopped pairs", gpus=2, sharding="fsdp", **RUNS["pairs"])
    if rank == 0:
        torch.save(found, answer)
    dist.barrier()
    dist.destroy_process_group()


@pytest.fixture(scope="module")
def divided(tmp_path_factory) -> dict[str, dict]:
    """What two processes with divided weights came to, case by case."""
    answer = tmp_path_factory.mktemp("divided") / "answer.pt"
    make_inputs(answer.parent)
    for split, count in (("train", 25), ("heldout", 5)):
        rows = load_from_disk(str(answer.parent / "prepared" / split)).select(range(count))
        Dataset.from_dict(rows.to_dict()).save_to_disk(str(answer.parent / "few" / split))
    write_pairs(answer.parent / "few-pairs", 24)  # 5 are held out: one rank has less of them to read than the other
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    processes.spawn(one_rank, (port, answer), nprocs=2)
    return torch.load(answer) | {"folder": answer.parent}


@pytest.mark.parametrize("case", CASES)
def test_two_processes_with_divided_weights_train_as_one_does(case, divided):
    config, found = configured(case), divided[case]
    if config.train.trains == "all":
        model = AutoModelForCausalLM.from_pretrained(config.model.model, dtype=torch.float32)
    else:
        model = base.attach_adapter(base.load_base(config)[0], config)
    for _, value in base.adapters(model) if config.model.weights == "nf4" else ():
        value.data = value.data.bfloat16().float()  # as trl's trainer does
    alone = trained(config, model)
    assert alone["losses"][-1] < alone["losses"][0]
    for name in ("losses", "norms", "first", "last"):
        torch.testing.assert_close(torch.as_tensor(found[name]), torch.as_tensor(alone[name]), rtol=1e-4, atol=1e-4)
    # what is frozen outside of the layers is whole on both, what is trained and what lies in layers is not
    outside = (
        0
        if config.train.trains == "all"
        else sum(value.nbytes for _, part in sharded.parts_outside(model) for value in part.parameters(recurse=False))
    )
    held = sum(value.nbytes for value in model.parameters())
    assert found["held"] == pytest.approx((held - outside) / 2 + outside, rel=0.02)


@pytest.mark.parametrize("run", RUNS)
def test_a_training_with_divided_weights_is_the_training_of_one_process(run, divided):
    folder = divided["folder"]
    fine_tuned(folder, f"{run}, alone", **RUNS[run])
    for name in ("loss", "eval_loss"):
        torch.testing.assert_close(
            logged(folder, run, name), logged(folder, f"{run}, alone", name), rtol=1e-4, atol=1e-4
        )
    ours, alone = weights_of(folder, run), weights_of(folder, f"{run}, alone")
    assert ours.keys() == alone.keys() and len(ours) > 4
    for name, value in ours.items():
        torch.testing.assert_close(value, alone[name], rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("run", STOPPED)
def test_a_training_that_was_stopped_with_divided_weights_goes_on(run, divided):
    folder, stopped = divided["folder"], f"stopped {run}"
    if run != "pairs":  # alone
        assert fine_tuned(folder, stopped, **RUNS[run])["resumed_from_step"] == STOPPED[run]
    assert logged(folder, stopped, "loss") == pytest.approx(logged(folder, run, "loss"), abs=1e-4)
    ours, whole = weights_of(folder, stopped), weights_of(folder, run)
    for name, value in ours.items():
        torch.testing.assert_close(value, whole[name], rtol=1e-3, atol=1e-4)


def test_a_fully_trained_model_opens_as_any_other(divided):
    model = AutoModelForCausalLM.from_pretrained(divided["folder"] / "all weights" / "finetune" / "model")
    assert model.dtype == torch.float16 and sum(value.numel() for value in model.parameters()) > 0


def test_a_model_whose_files_name_its_weights_otherwise_is_refused_with_what_to_do(tmp_path):
    config = models.profile("tiny")
    model = AutoModelForCausalLM.from_pretrained(config.model.model)
    model.config.num_hidden_layers += 1
    with torch.device("meta"):
        larger = AutoModelForCausalLM.from_config(model.config)
    with pytest.raises(ValueError, match="set sharding=none"):
        sharded.reader(models.TINY, larger, torch.device("cpu"))
