"""Training killed at counted moments, and resumed, against the same training left alone.

    python tests/finetune/kill_and_resume.py FOLDER

Makes a tiny random model and a few rows of data in FOLDER, and trains it once without a break. Then it trains again in
many lives: each is killed (-9) at a named moment of writing, sending, fetching, forgetting, publishing or clearing, or
its machine is lost with all but Drive, and the next one goes on. Prints one JSON object: for each life where it resumed
from, the largest difference of a loss and of an adapter weight at the end, what was said.

Libraries are imported once; every life of the training is a fork.
"""

import argparse
import contextlib
import json
import os
import random
import shutil
import sys
import threading
from concurrent.futures import Future
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT), str(ROOT / "tests" / "workspace")]
os.environ["HF_HUB_OFFLINE"] = "1"  # no thread for trl's telemetry in a process that forks
os.environ["RECIPES_PATIENCE_S"] = "0"

import faults  # noqa: E402
import torch  # noqa: E402
import tqdm  # noqa: E402
from datasets import Dataset  # noqa: E402
from safetensors.torch import load_file  # noqa: E402
from transformers import MistralConfig, MistralForCausalLM  # noqa: E402

from helpers import finetune, models  # noqa: E402
from helpers.workspace import checkpoints  # noqa: E402

STEPS, SAVE_STEPS = 10, 2
HERE = "here/run/finetune.partial/checkpoints"
DRIVE = "drive/recipes/run/finetune.partial/checkpoints"
# (operation, name: the life is killed at the first such, further faults), what happens before the next life.
# The comment says what was whole then.
LIVES: list[tuple[str, str, dict[str, Any], str]] = [
    ("create", f"{HERE}/writing/*/optimizer.pt", {"raise_at": 1, "errno": 28, "kill_at": 2}, ""),  # nothing
    ("rename", f"{HERE}/writing/checkpoint-2/whole.json", {}, ""),
    ("rename", f"{HERE}/checkpoint-2", {}, ""),
    ("rename", f"{HERE}/writing.deleting", {"kill_at": 2}, ""),  # 2, here and in Drive
    ("write", f"{DRIVE}/writing/checkpoint-4-*/optimizer.pt", {}, "the machine is lost"),  # 2, in Drive
    ("rename", f"{HERE}/checkpoint-2", {}, ""),  # being fetched
    ("rename", f"{DRIVE}/checkpoint-4", {}, "the machine is lost"),  # 4 is not whole in Drive yet
    ("truncate", f"{DRIVE}/checkpoint-2.deleting/optimizer.pt", {}, "the machine is lost"),  # 4 and 6 in Drive
    ("unlink", f"{HERE}/checkpoint-6.deleting/optimizer.pt", {}, "a bit flips"),  # 8 and 10 here; 10 in Drive
    ("write", "here/run/finetune.partial/adapter/.tmp*", {}, ""),
    ("rename", "here/run/finetune", {}, ""),
    ("rename", "drive/recipes/run/finetune", {}, "the machine is lost"),
    ("rename", f"{DRIVE}/checkpoint-10.deleting", {}, "the machine is lost"),  # finished in Drive, where 10 lies too
    ("stat", "no such name", {"seed": 1, "share": 1.0}, ""),  # every first try in Drive fails, and it ends
]


def make_inputs(folder: Path) -> tuple[Path, Path]:
    """A random Mistral of 336,192 parameters with the sample model's tokenizer, and prepared rows of random tokens."""
    model, prepared = folder / "model", folder / "prepared"
    vocabulary = json.loads((models.TINY / "config.json").read_text(encoding="utf-8"))["vocab_size"]
    torch.manual_seed(0)
    sizes = {"hidden_size": 64, "intermediate_size": 128, "num_attention_heads": 2, "num_key_value_heads": 1}
    config = MistralConfig(vocab_size=vocabulary, num_hidden_layers=2, max_position_embeddings=64, **sizes)
    MistralForCausalLM(config).save_pretrained(model)
    for file in models.TINY.iterdir():
        if not (model / file.name).exists() and file.suffix != ".safetensors":
            shutil.copyfile(file, model / file.name)
    chance = random.Random(0)
    for split, count in (("train", 160), ("heldout", 8)):
        ids = [[1, *(chance.randrange(3, vocabulary) for _ in range(chance.randrange(8, 20)))] for _ in range(count)]
        masks = [[0] * 3 + [1] * (len(row) - 3) for row in ids]
        Dataset.from_dict({"input_ids": ids, "assistant_masks": masks}).save_to_disk(prepared / split)
    return model, prepared


def life(act, log: Path) -> int:
    """Do something in a fork, its words in a log; returns its exit status, negative for a signal."""
    process = os.fork()
    if process:
        return os.waitstatus_to_exitcode(os.waitpid(process, 0)[1])
    status = 1
    try:
        with log.open("a", encoding="utf-8") as words:
            os.dup2(words.fileno(), 1)
            os.dup2(words.fileno(), 2)
        act()
        status = 0
    except BaseException:
        import traceback

        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status)


def train(model: Path, prepared: Path, output: Path) -> None:
    """The training: ten steps of QLoRA with dropout, computed in fp32, a checkpoint every two."""
    config = models.profile("tiny", model=str(model), rank=4, dropout=0.1, seq_len=32)
    steps = {"batch_size": 2, "accumulation": 2, "epochs": 1.0, "max_steps": STEPS, "save_steps": SAVE_STEPS}
    measured = finetune.finetune(config.with_values(**steps), prepared, output)
    print(f"resumed from {measured['resumed_from_step']}")


class AtOnce:
    """A pool of threads that has none: copies to Drive are made between two steps, so that the order is one."""

    def __init__(self, **options) -> None:
        pass

    def __enter__(self):
        return self

    def __exit__(self, *error) -> None:
        pass

    def submit(self, act, *arguments) -> Future:
        done: Future = Future()
        done.set_result(act(*arguments))
        return done


def calm(folder: Path) -> tuple[Path, Path, Path]:
    """The training left alone, in this process, which so imports what the lives need: model, prepared rows, output."""
    torch.set_num_threads(1)
    tqdm.tqdm.monitor_interval = 0  # no thread that a fork would lose
    tqdm.tqdm.set_lock(threading.RLock())  # not its semaphore, which a killed life would hold for all later ones
    model, prepared = make_inputs(folder)
    output = folder / "calm" / "finetune"
    output.parent.mkdir()
    with contextlib.redirect_stdout(sys.stderr):
        train(model, prepared, output)
    return model, prepared, output


def kill_and_resume(folder: Path, undisturbed: tuple[Path, Path, Path]) -> dict:
    """Train in as many lives as LIVES has, and compare with the undisturbed run."""
    model, prepared, expected = undisturbed
    road, log = folder / "road", folder / "lives.log"
    output, drive = road / "here" / "run" / "finetune", road / "drive" / "recipes" / "run"
    checkpoints.ThreadPoolExecutor = AtOnce
    drive.parent.mkdir(parents=True)
    resumed_from = []
    for number, (operation, name, options, then) in enumerate(LIVES):
        output.parent.mkdir(parents=True, exist_ok=True)
        (output.parent / "lasting.txt").write_text(str(drive))
        log.write_text("")
        last = number == len(LIVES) - 1
        settings = {"counted": operation, "match": name, "kill_at": 1} | options

        def act(where=road / "drive" if last else road, settings=settings) -> None:
            with faults.injecting(where, **settings):
                train(model, prepared, output)

        status = life(act, log)
        said = log.read_text(encoding="utf-8")
        assert status == (0 if last else -9), f"life {number}, {operation} {name}: {status}\n{said}"
        began = [line for line in said.splitlines() if line.startswith("continuing from checkpoint-")]
        resumed_from.append(int(began[-1].rpartition("-")[2]) if began else 0)
        with (folder / "all.log").open("a", encoding="utf-8") as words:
            words.write(said)
        if then == "the machine is lost":
            shutil.rmtree(road / "here")
        elif then == "a bit flips":
            flip_bit(road / HERE / "checkpoint-10" / "optimizer.pt")
    said = (folder / "all.log").read_text(encoding="utf-8")
    loss, adapter = compare(expected, output)
    compare(expected, drive / "finetune")
    return {
        "lives": len(LIVES),
        "resumed_from": resumed_from,
        "set_aside": said.count("is kept as"),
        "not_written": said.count("could not be written"),
        "not_sent": said.count("was not copied"),
        "fetched": said.count("fetching checkpoint"),
        "left": {
            str(place): sorted(path.name for path in (road / place).iterdir())
            for place in ("here/run", "drive/recipes/run")
        },
        "loss_difference": loss,
        "adapter_difference": adapter,
    }


def flip_bit(file: Path) -> None:
    """Change one bit in the middle of a file, in place."""
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 1
    file.write_bytes(content)


def compare(one: Path, other: Path) -> tuple[float, float]:
    """The largest difference of a loss, step by step, and of an adapter weight, between two finished trainings."""
    logs = [json.loads((folder / "log.json").read_text(encoding="utf-8")) for folder in (one, other)]
    losses = [{entry["step"]: entry["loss"] for entry in log if "loss" in entry} for log in logs]
    assert losses[0].keys() == losses[1].keys() and len(losses[0]) == STEPS, [list(loss) for loss in losses]
    first, second = (load_file(folder / "adapter" / "adapter_model.safetensors") for folder in (one, other))
    assert first.keys() == second.keys()
    loss = max(abs(losses[0][step] - losses[1][step]) for step in losses[0])
    return loss, max((first[name] - second[name]).abs().max().item() for name in first)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder", type=Path)
    options = parser.parse_args()
    options.folder.mkdir(parents=True, exist_ok=True)
    print(json.dumps(kill_and_resume(options.folder, calm(options.folder)), indent=1))
