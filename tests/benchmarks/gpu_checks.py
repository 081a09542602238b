"""What only a GPU can show, each check in a process of its own; a line of JSON each, exit status 1 if one fails.

    python tests/benchmarks/gpu_checks.py [--only packing,offload] [--models FOLDER]

packing   losses with flash attention, packing and a sliding window within 4e-4 of transformers' and PEFT's own
cards     with two visible GPUs a run trains, and nothing of it is on the second
again     a 7B's run under a T4's 14.42 GiB is stopped, started again as a notebook would, and continues
offload   pinned host memory is what the budget counts, whatever the contexts were, and inputs come back as they were
waiting   a 16-bit model half of whose layers wait in host memory or on disk computes the same bits, and leaves nothing

The 7B's shape has random weights; it is made in FOLDER (13.5 GiB) where it is not there yet.
"""

import argparse
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import random_model
import t4
from t4 import GIB, ROOT

TOLERANCE = 4e-4
LEFT_GIB = 0.25
"""Of the 7B's 4 to 14 GiB, at most this much after a run: what libraries keep for the process."""
VARIANTS = ["plain", "packed", "flash", "flash, packed", "plain, window", "window", "packed, window", "flash, window"]
VARIANTS += ["flash, packed, window"]


class Skipped(Exception):
    """A check that this machine cannot make; the message says why."""


def main() -> int:
    """Run the checks that are asked for, one after another."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--only", default=",".join(CHECKS))
    parser.add_argument("--models", type=Path, default=Path(tempfile.gettempdir()) / "models")
    parser.add_argument("--check", choices=CHECKS, help="in this very process")
    options = parser.parse_args()
    if options.check:
        print(json.dumps(result_of(options.check, options.models)), flush=True)
        return 0
    failed = 0
    for name in options.only.split(","):
        command = [sys.executable, __file__, "--check", name, "--models", str(options.models)]
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
        lines = [line for line in done.stdout.splitlines() if line.startswith('{"check"')]
        said = json.loads(lines[-1]) if lines else {"check": name, "passed": False, "error": done.stderr[-2000:]}
        failed += said["passed"] is False
        print(json.dumps(said), flush=True)
        if said["passed"] is False:
            print(done.stderr[-4000:], file=sys.stderr)
    return int(failed > 0)


def result_of(name: str, models: Path) -> dict:
    """A check's line: passed is True, False, or None where it was skipped."""
    began = time.perf_counter()
    try:
        figures = CHECKS[name](models)
    except Skipped as reason:
        return {"check": name, "passed": None, "skipped": str(reason)}
    except BaseException as error:
        import traceback

        traceback.print_exc()
        figures = {"passed": False, "error": f"{type(error).__name__}: {str(error)[:500]}"}
    return {"check": name, **figures, "seconds": round(time.perf_counter() - began, 1)}


def made(models: Path, name: str, layers: int) -> Path:
    """A random model of the 7B's shape, or of its first layers."""
    if not (models / name / "tokenizer.json").is_file():
        command = [sys.executable, random_model.__file__, str(models / name), "--layers", str(layers)]
        subprocess.run(command, check=True)
    return models / name


def need_gpus(count: int) -> None:
    """Raise Skipped where fewer are visible."""
    import torch

    if torch.cuda.device_count() < count:
        raise Skipped(f"{torch.cuda.device_count()} GPUs are visible and it needs {count}")


def packing(models: Path) -> dict:
    """The worst difference in 20 losses, by variant."""
    need_gpus(1)
    import bench_finetune

    out = Path(tempfile.mkdtemp()) / "check.jsonl"
    bench_finetune.check("check", made(models, "cut", 2), out, [{"only": VARIANTS}])
    rows = [json.loads(line) for line in out.read_text(encoding="utf-8").splitlines()]
    worst = {row["variant"]: row.get("worst_difference", row.get("error")) for row in rows}
    ours = {
        row["variant"]: "our own layers compute" in row.get("layers", "")
        for row in rows
        if "plain" not in row["variant"]
    }
    close = all(not isinstance(value, str) and value <= TOLERANCE for value in worst.values())
    return {"passed": close and all(ours.values()) and len(rows) == len(VARIANTS), "worst": worst, "ours": ours}


def cards(models: Path) -> dict:
    """Four steps of the tiny model."""
    need_gpus(2)
    return train_tiny()


def train_tiny() -> dict:
    """Four steps of the tiny model on whatever is visible: what they measured, and what lies on every GPU after."""
    import torch

    from helpers import finetune
    from helpers.models import TINY, profile

    folder = Path(tempfile.mkdtemp())
    config = profile("tiny", batch_size=2, accumulation=1, max_steps=4, seq_len=64, epochs=1.0)
    prepared = random_model.write_prepared(folder / "prepared", TINY, 8, 64)
    measured = finetune.finetune(config, prepared, folder / "finetune")
    used = [torch.cuda.max_memory_reserved(number) for number in range(torch.cuda.device_count())]
    passed = measured["steps_applied"] > 0 and not any(used[1:])
    return {"passed": passed, "visible": len(used), "reserved_bytes": used, "loss_last": measured["loss_last"]}


def again(models: Path) -> dict:
    """Memory before, in and after a run that is stopped, and the run that continues it."""
    need_gpus(1)
    from helpers.models import profile

    model, folder = made(models, "7b", 32), Path(tempfile.mkdtemp())
    t4.limit()
    prepared = random_model.write_prepared(folder / "prepared", model, 6, 2048)
    config = profile("mistral-7b", model=str(model), seq_len=2048, batch_size=1, accumulation=2, max_steps=3)
    return stopped_and_continued(config, prepared, folder / "finetune")


def stopped_and_continued(config, prepared: Path, output: Path) -> dict:
    """Train, stop in the second step, keep the traceback as IPython does, train again."""
    from helpers import finetune, hardware
    from helpers.finetune.trainer import FineTuner

    loss = FineTuner.compute_loss

    def stop_in_second_step(trainer, *arguments, **named):
        found = loss(trainer, *arguments, **named)
        if trainer.state.global_step == 1:
            signal.raise_signal(signal.SIGINT)
        return found

    found: dict = {"before": memory()}
    FineTuner.compute_loss = stop_in_second_step
    try:
        finetune.finetune(config, prepared, output)
    except KeyboardInterrupt as stopped:
        sys.last_traceback, sys.last_value = stopped.__traceback__, stopped
        found["said"] = str(stopped)
    finally:
        FineTuner.compute_loss = loss
    found["stopped"] = memory()
    probed = hardware.probe()
    found["probed_gib"] = round(probed.vram_gib, 2)
    measured = finetune.finetune(config, prepared, output)
    found["continued"] = memory()
    names = ("resumed_from_step", "steps", "layers", "peak_allocated_gib", "peak_reserved_gib", "loss_last")
    found |= {name: measured[name] for name in names}
    left = max(found[when].get("allocated_gib", 0.0) for when in ("stopped", "continued"))
    found["passed"] = "run again" in found.get("said", "") and found["resumed_from_step"] > 0 and left <= LEFT_GIB
    return found


def memory() -> dict:
    """What PyTorch holds of the GPU, and of the host's page-locked memory."""
    import torch

    if not torch.cuda.is_available():
        return {}
    found = {"allocated": torch.cuda.memory_allocated(), "reserved": torch.cuda.memory_reserved()}
    found["free"] = torch.cuda.mem_get_info()[0]
    return {f"{name}_gib": round(size / GIB, 3) for name, size in found.items()} | pinned()


def pinned() -> dict:
    """Page-locked host memory of PyTorch's allocator, its cache included; nothing where this PyTorch does not say."""
    import torch

    size = torch.cuda.host_memory_stats().get("allocated_bytes.current") if torch.cuda.is_available() else None
    return {} if size is None else {"pinned_gib": round(size / GIB, 4)}


def offload(models: Path) -> dict:
    """32 layers' inputs of a 7B at contexts that vary up to 24,576."""
    need_gpus(1)
    import torch

    return drive_offload(
        torch.device("cuda"), hidden=4096, layers=32, contexts=[12288, 20000, 3000, 24576, 8192, 24576]
    )


def drive_offload(device, hidden: int, layers: int, contexts: list[int]) -> dict:
    """Put and get as a step does; pinned, as PyTorch and as the arena say, beside what the budget counts so far."""
    from dataclasses import replace

    import torch

    from helpers.budget.activations import offloaded_bytes
    from helpers.budget.step import Step, host_room
    from helpers.finetune.engine.offload import Offload
    from helpers.models import gpu, profile, shape

    sizes = replace(shape("mistral-7b-v0.3"), hidden=hidden, layers=layers)
    asked = profile("mistral-7b", batch_size=1, checkpointing="all", offload_activations=True)
    host, rows, counted, right = Offload(device, host_room(asked)), [], 0, True
    for seq_len in contexts:
        host.begin()
        counted = max(counted, offloaded_bytes(Step.of(asked.with_values(seq_len=seq_len), sizes)))
        slots = []
        for layer in range(layers):
            slots.append(host.put(torch.full((1, seq_len, hidden), float(layer), dtype=torch.float16, device=device)))
        for layer in reversed(range(layers)):
            back = host.get(slots[layer])
            right &= bool((back == layer).all())
            del back
        slots.clear()
        row = {"seq_len": seq_len, "counted_gib": round(counted / GIB, 4)}
        row["arena_gib"] = round(len(host.arena.chunks) * host.arena.size / GIB, 4)
        rows.append(row | pinned())
    del host
    gpu.free_memory()
    exact = all(row["arena_gib"] == row["counted_gib"] >= row.get("pinned_gib", 0.0) for row in rows)
    return {"passed": exact and right, "came_back": right, "contexts": rows, "after": memory()}


def waiting(models: Path) -> dict:
    """The tiny model's logits and answers with two of four layers away, beside all of it on the GPU."""
    need_gpus(1)
    import torch

    from helpers import hardware, inference
    from helpers.models import TINY, gpu, profile
    from helpers.models import offload as parked

    memory_once = torch.empty(2**20, dtype=torch.uint8)
    locked = [parked.lock(memory_once), parked.lock(memory_once)]  # the second time CUDA refuses
    parked.unlock(memory_once)
    config = profile("tiny", eval_batch_size=2, eval_context=64, eval_stride=64, max_new_tokens=8)
    ids = torch.randint(3, 2000, (2, 48), generator=torch.Generator().manual_seed(0)).cuda()
    prompts = ["Mira lives in", "The owl"]
    found, passed, before = {}, locked == [True, False], memory()["allocated_gib"]
    for name, machine in {
        "whole": None,
        "host memory": small_gpu(config, 100.0),
        "disk": small_gpu(config, 0.0),
    }.items():
        loaded = inference.load(TINY, config, machine)
        with torch.inference_mode():
            logits = loaded.model(ids).logits.cpu()
        answers = [answer.text for answer in inference.batch_generate(loaded, prompts, 8, 2)]
        expected = found.setdefault("whole", {"logits": logits, "answers": answers})
        same = torch.equal(expected["logits"], logits) and expected["answers"] == answers
        passed &= same and (machine is None or loaded.how.endswith(f"2 of 4 layers from {name}"))
        found[name] = {"how": loaded.how, "same": same} | (expected if machine is None else {})
        del loaded
        gpu.free_memory()
    found["whole"] = {"how": found["whole"]["how"]}
    left_gib = memory()["allocated_gib"] - before
    return {"passed": passed and left_gib < 0.05, "left_gib": left_gib, "gpu": hardware.probe().name, **found}


def small_gpu(config, ram_gib: float):
    """A machine whose GPU keeps two of the tiny model's layers away."""
    from dataclasses import replace

    from helpers import hardware
    from helpers.budget import placement, planning
    from helpers.models import TINY, shape

    two_away = placement.Placement("model", "fp16", config.evaluate.eval_batch_size, away=2)
    machine = hardware.machine("t4")
    needed_gib = placement.needed_gib(two_away, config, shape(str(TINY)), machine)
    usable_gib = 1.00001 * needed_gib / (1 - planning.MARGIN["other"])
    gpu = replace(machine.gpu, vram_gib=usable_gib, context_gib=0.0)
    return hardware.Machine(gpu, replace(machine.host, ram_gib=ram_gib))


CHECKS = {"packing": packing, "cards": cards, "again": again, "offload": offload, "waiting": waiting}

if __name__ == "__main__":
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    os.environ.setdefault("PYTORCH_CUDA_ALLOC_CONF", "expandable_segments:True")
    sys.exit(main())
