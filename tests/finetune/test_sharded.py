"""Weights divided between two processes (gloo, on a CPU): the steps, the gradients and the weights of one process."""

import os
import socket

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as processes
from transformers import AutoModelForCausalLM

from helpers import models
from helpers.finetune import base, sharded
from helpers.finetune.engine import losses
from helpers.finetune.trainer import choose_layers

CASES = {
    "NF4, our own layers": {"checkpointing": 2},
    "NF4, transformers' layers": {"checkpointing": 2, "kernels": "plain"},
    "16 bits, our own layers": {"weights": "fp16", "keep_attention": False, "checkpointing": "all"},
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
    if rank == 0:
        torch.save(found, answer)
    dist.barrier()
    dist.destroy_process_group()


@pytest.fixture(scope="module")
def divided(tmp_path_factory) -> dict[str, dict]:
    """What two processes with divided weights came to, case by case."""
    answer = tmp_path_factory.mktemp("divided") / "answer.pt"
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    processes.spawn(one_rank, (port, answer), nprocs=2)
    return torch.load(answer)


@pytest.mark.parametrize("case", CASES)
def test_two_processes_with_divided_weights_train_as_one_does(case, divided):
    config, found = configured(case), divided[case]
    if config.train.trains == "all":
        model = AutoModelForCausalLM.from_pretrained(config.model.model, dtype=torch.float32)
    else:
        model = base.attach_adapter(base.load_base(config)[0], config)
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


def test_a_model_whose_files_name_its_weights_otherwise_is_refused_with_what_to_do(tmp_path):
    config = models.profile("tiny")
    model = AutoModelForCausalLM.from_pretrained(config.model.model)
    model.config.num_hidden_layers += 1
    with torch.device("meta"):
        larger = AutoModelForCausalLM.from_config(model.config)
    with pytest.raises(ValueError, match="set sharding=none"):
        sharded.reader(models.TINY, larger, torch.device("cpu"))
