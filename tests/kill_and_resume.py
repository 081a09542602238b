"""Training killed at random moments, and resumed, against the same training left alone.

    python tests/kill_and_resume.py FOLDER none=20 rot=20 disk=20 drive=20

Makes a tiny random model and a few rows of data in FOLDER, trains it once without a break, then kills (-9) the same
training so many times, half of them inside a checkpoint write, and resumes it until it ends: without other trouble,
with bits flipped in checkpoints, with a disk that is full at times, with a Drive that fails six of ten copies.
Prints one JSON object: for each, the kills, where they resumed from, the largest difference of a loss and of an
adapter weight, and how many checkpoints were skipped, not written, not sent, fetched.

Libraries are imported once; every life of the training is a fork, so that 20 of them take a minute.
"""

import argparse
import contextlib
import json
import os
import random
import resource
import shutil
import signal
import sys
import threading
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
os.environ["HF_HUB_OFFLINE"] = "1"  # no thread for trl's telemetry in a process that forks

import torch  # noqa: E402
import tqdm  # noqa: E402
from datasets import Dataset  # noqa: E402
from safetensors.torch import load_file  # noqa: E402
from transformers import MistralConfig, MistralForCausalLM  # noqa: E402

from helpers import checkpoints, finetune, models  # noqa: E402

STEPS, SAVE_STEPS = 40, 2
LIMIT_S = 600
"""For the kills of one trouble; 20 take 10 s on an idle machine."""


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


def life(model: Path, prepared: Path, output: Path, trouble: str, seed: float) -> int:
    """One life of the training, in a fork; returns its process id."""
    process = os.fork()
    if process:
        return process
    status = 1
    try:
        with (output.parent / "lives.log").open("a", encoding="utf-8") as log:
            os.dup2(log.fileno(), 1)
            os.dup2(log.fileno(), 2)
            make_trouble(trouble, random.Random(seed))
            train(model, prepared, output)
            status = 0
    except BaseException:
        import traceback

        with (output.parent / "lives.log").open("a", encoding="utf-8") as log:
            traceback.print_exc(file=log)
    finally:
        os._exit(status)


def train(model: Path, prepared: Path, output: Path) -> None:
    """The training: 40 steps of QLoRA with dropout, computed in fp32, a checkpoint every two."""
    config = models.profile("tiny", model=str(model), rank=4, dropout=0.1, seq_len=32)
    steps = {"batch_size": 2, "accumulation": 2, "epochs": 1.0, "max_steps": STEPS, "save_steps": SAVE_STEPS}
    finetune.finetune(config.with_values(**steps), prepared, output)


def make_trouble(kind: str, chance: random.Random) -> None:
    """disk: no file grows beyond 20 kB, as on a full disk. drive: six of ten copies to Drive fail."""
    if kind == "disk":
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, resource.RLIM_INFINITY))
    if kind == "drive":
        copy = shutil.copyfile

        def fails_at_times(source, target, **options):
            if "drive_store" in str(target) and chance.random() < 0.6:
                Path(target).write_bytes(Path(source).read_bytes()[: chance.randrange(1, 4000)])
                raise OSError(5, "Input/output error")
            return copy(source, target, **options)

        shutil.copyfile = fails_at_times


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


def kill_and_resume(folder: Path, trouble: str, kills: int, undisturbed: tuple[Path, Path, Path]) -> dict:
    """Train with so many kills, and compare with the undisturbed run."""
    chance, began = random.Random(kills), time.monotonic()
    model, prepared, expected = undisturbed
    output = folder / trouble / "finetune"
    output.parent.mkdir()
    if trouble == "drive":
        (folder / "drive_store" / "recipes").mkdir(parents=True)
        (output.parent / "lasting.txt").write_text(str(folder / "drive_store" / "recipes" / "run"))
    saves = output.with_name("finetune.partial") / "checkpoints"
    resumed_from, differences, inside, log = [], [], 0, output.parent / "lives.log"
    log.touch()
    while len(resumed_from) < kills:
        number = len(resumed_from)
        whole = [path for path in checkpoints.all_of(saves) if checkpoints.problem(path) is None]
        full = trouble == "disk" and number % 4 == 2
        said = log.read_text().count("could not be written")
        process = life(model, prepared, output, "none" if trouble == "disk" and not full else trouble, chance.random())
        while full and not has_ended(process) and log.read_text().count("could not be written") == said:
            time.sleep(0.01)
        wait_for_moment(process, saves, number, chance)
        in_a_write = (saves / checkpoints.BESIDE).exists()
        os.kill(process, signal.SIGKILL)
        _, status = os.waitpid(process, 0)
        if os.WIFEXITED(status):  # it ended before the blow, which so does not count: compare, and train anew
            assert status == 0, log.read_text()
            differences.append(compare(expected, output))
            shutil.rmtree(output)
            shutil.rmtree(folder / "drive_store" / "recipes" / "run", ignore_errors=True)
            continue
        inside += in_a_write
        resumed_from.append(checkpoints.step_of(whole[-1]) if whole else 0)
        whole = [path for path in checkpoints.all_of(saves) if checkpoints.problem(path) is None]
        if trouble == "rot" and len(whole) > 1 and chance.random() < 0.5:
            flip_bit(chance.choice([file for file in whole[-1].iterdir() if file.stat().st_size]), chance)
        if trouble == "drive" and chance.random() < 0.3:
            shutil.rmtree(saves, ignore_errors=True)  # the machine is gone: only Drive is left
    last = life(model, prepared, output, trouble if trouble == "drive" else "none", 1)
    while not has_ended(last):
        assert time.monotonic() - began < LIMIT_S, f"the last life of {trouble} does not end: {log.read_text()}"
        time.sleep(0.01)
    _, status = os.waitpid(last, 0)
    said = log.read_text()
    assert status == 0, said
    differences.append(compare(expected, output))
    return {
        "kills": len(resumed_from),
        "inside_a_write": inside,
        "resumed_from": resumed_from,
        "skipped": said.count("is skipped"),
        "not_written": said.count("could not be written"),
        "not_sent": said.count("was not copied"),
        "fetched": said.count("fetching checkpoint"),
        "trainings_ended": len(differences),
        "loss_difference": max(loss for loss, _ in differences),
        "adapter_difference": max(adapter for _, adapter in differences),
        "total_s": round(time.monotonic() - began, 1),
    }


def wait_for_moment(process: int, saves: Path, number: int, chance: random.Random) -> None:
    """Until a random moment of this life: inside a checkpoint write every second time, else anywhere."""
    begin, patience_s = time.monotonic(), 20.0
    writes, inside, enough = 0, False, chance.randrange(3)
    while time.monotonic() - begin < patience_s and not has_ended(process):
        was_inside, inside = inside, (saves / checkpoints.BESIDE).exists()
        writes += inside and not was_inside
        if number % 2 and inside and writes > enough:
            time.sleep(chance.uniform(0, 0.02))
            return
        if not number % 2 and writes >= enough:
            time.sleep(chance.uniform(0, 0.05))
            return
        time.sleep(0.0005)


def has_ended(process: int) -> bool:
    """Whether a child has ended; it stays to be waited for."""
    return os.waitid(os.P_PID, process, os.WEXITED | os.WNOHANG | os.WNOWAIT) is not None


def flip_bit(file: Path, chance: random.Random) -> None:
    """Change one bit of a file, in place."""
    content = bytearray(file.read_bytes())
    content[chance.randrange(len(content))] ^= 1 << chance.randrange(8)
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
    parser.add_argument("troubles", nargs="+", metavar="TROUBLE=KILLS", help="none, rot, disk or drive")
    options = parser.parse_args()
    options.folder.mkdir(parents=True, exist_ok=True)
    alone = calm(options.folder)
    wanted = dict(trouble.split("=") for trouble in options.troubles)
    results = {name: kill_and_resume(options.folder, name, int(kills), alone) for name, kills in wanted.items()}
    print(json.dumps(results, indent=1))
