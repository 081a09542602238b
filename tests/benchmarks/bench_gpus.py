"""One GPU and two, each held to a T4's envelope: tokens a second, memory a GPU; and a run that is killed and goes on.

    python tests/benchmarks/bench_gpus.py speed OUT_DIR           # the 7B shape, random weights: OUT_DIR/h200x2.csv
    python tests/benchmarks/bench_gpus.py road OUT_DIR            # the tiny model: python -m helpers finetune --gpus 2
    python tests/benchmarks/bench_gpus.py evaluate OUT_DIR        # four models on one GPU, and on two at once
    python tests/benchmarks/bench_gpus.py speed OUT_DIR --toy     # without a GPU, to try this script; the others too

speed: our layers as planned for a T4 and transformers' layers (kernels=plain), through helpers.finetune's own trainer,
in one process, then in two under PyTorch's DistributedDataParallel. A row's micro-batch is a GPU's, accumulation is a
GPU's too; bucket is DDP's in MiB (25 unless said; 400 averages once, after the backward pass). Median seconds of 5
steps after 3 by the clock; scaling is tokens a second over those of the same row on one GPU.
road: trained by one GPU; by two, one of which is killed at step 5 with -9; gone on with by two whose launcher is killed
at step 9; gone on with by one. Losses and adapter against the first, and whether anything is left on the GPUs.
evaluate: `python -m helpers evaluate` of four models of the 7B shape with --gpus 1, then 2: minutes by the clock,
whether the figures are the same, and what host memory all processes held at once. A model that fails is an error.
"""

import argparse
import csv
import gc
import json
import os
import shutil
import signal
import socket
import statistics
import subprocess
import sys
import tempfile
import time
from contextlib import suppress
from pathlib import Path
from typing import Any

import t4
from t4 import GIB, ROOT

WARM, TIMED = 3, 5
PACKAGES = ("torch", "transformers", "peft", "accelerate", "trl", "bitsandbytes")
ROWS = [
    {"engine": "plain", "batch": 4, "seq": 1024},
    {"engine": "plain", "batch": 1, "seq": 2048},
    {"engine": "ours", "batch": 4, "seq": 1024},
    {"engine": "ours", "batch": 1, "seq": 2048},
    {"engine": "ours", "batch": 1, "seq": 2048, "accumulation": 4},
]
ONLY_TWO = [
    {"engine": "ours", "batch": 4, "seq": 1024, "bucket": 400},
    {"engine": "ours", "batch": 1, "seq": 2048, "bucket": 400},
]
COLUMNS = [
    *("date", "gpu", "cap_gib", *PACKAGES, "engine", "gpus", "batch", "seq", "accumulation", "bucket"),
    *("checkpointing", "tokens_s", "scaling", "step_s", "allocated_gib", "reserved_gib"),
    *("predicted_allocated_gib", "predicted_reserved_gib", "loss_first", "loss_last", "error"),
]


def main() -> None:
    """The driver, or one of its processes."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("what", choices=("speed", "road", "evaluate", "rank"))
    parser.add_argument("out", type=Path)
    parser.add_argument("--models", type=Path, default=Path("/tmp/models"), help="where the random model is made")
    parser.add_argument("--toy", action="store_true", help="the tiny model on a CPU, to try this script")
    options = parser.parse_args()
    options.out.mkdir(parents=True, exist_ok=True)
    {"speed": speed, "road": road, "evaluate": evaluation, "rank": measure}[options.what](options)


# ---- how fast, and how much memory -----------------------------------------------------------------------------------


def speed(options: argparse.Namespace) -> None:
    """Both numbers of processes, one after the other; the rows as a CSV and as a table."""
    began = time.monotonic()
    seven(options)
    rows = []
    for count in (1, 2):
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        processes = [started(rank, count, port, options) for rank in range(count)]
        await_all(processes)
        file = options.out / f"{count}.jsonl"
        rows += [json.loads(line) for line in file.read_text().splitlines()] if file.is_file() else []
        print(f"  -- {count} GPU until {time.monotonic() - began:.0f} s, exit {[p.returncode for p in processes]}")
    alone = {key(row): row["tokens_s"] for row in rows if row["gpus"] == 1 and "tokens_s" in row}
    for row in rows:
        if row["gpus"] > 1 and "tokens_s" in row and key(row) in alone:
            row["scaling"] = round(row["tokens_s"] / alone[key(row)], 3)
    with (options.out / "h200x2.csv").open("w", encoding="utf-8", newline="") as stream:
        table = csv.DictWriter(stream, COLUMNS, extrasaction="ignore", lineterminator="\n")
        table.writeheader()
        table.writerows(rows)
    shown = ("engine", "gpus", "batch", "seq", "accumulation", "bucket", "checkpointing", "tokens_s", "scaling")
    shown += ("allocated_gib", "reserved_gib", "predicted_allocated_gib", "loss_first", "error")
    for row in rows:
        print("  ".join(f"{name} {row[name]}" for name in shown if row.get(name) is not None))


def seven(options: argparse.Namespace) -> Path:
    """The folder of the model: a random 7B, made where it is missing, or the tiny one."""
    if options.toy:
        return ROOT / "data" / "tiny-mistral"
    began, folder = time.monotonic(), options.models / "7b"
    if not (folder / "tokenizer.json").is_file():
        subprocess.run([sys.executable, str(ROOT / "tests/benchmarks/random_model.py"), str(folder)], check=True)
        print(f"7b made after {time.monotonic() - began:.0f} s", flush=True)
    return folder


def await_all(processes: list[subprocess.Popen], limit_s: float = 170) -> None:
    """Wait until all have ended; one that failed, or the time, ends the others, which would wait for it."""
    began = time.monotonic()
    while any(process.poll() is None for process in processes):
        time.sleep(0.2)
        if any(process.returncode for process in processes) or time.monotonic() - began > limit_s:
            time.sleep(3)
            for process in processes:
                process.kill()


def key(row: dict) -> tuple:
    """What must be the same for scaling to say something."""
    return tuple(row.get(name) for name in ("engine", "batch", "seq", "accumulation"))


def started(rank: int, count: int, port: int, options: argparse.Namespace) -> subprocess.Popen:
    """One of count processes, which measures ROWS."""
    names = {"RANK": rank, "WORLD_SIZE": count, "LOCAL_RANK": rank, "LOCAL_WORLD_SIZE": count, "MASTER_PORT": port}
    environment = {name: str(value) for name, value in names.items()} if count > 1 else {"CUDA_VISIBLE_DEVICES": "0"}
    environment |= {"MASTER_ADDR": "127.0.0.1", "HF_HUB_OFFLINE": "1"}
    if options.toy:
        environment |= {"CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1"}
    command = [sys.executable, __file__, "rank", str(options.out), "--models", str(options.models)]
    with (options.out / f"{count}-{rank}.log").open("w") as log:
        return subprocess.Popen(
            command + ["--toy"] * options.toy, env=os.environ | environment, stdout=log, stderr=subprocess.STDOUT
        )


def measure(options: argparse.Namespace) -> None:
    """In a process: every row, with one load of the base."""
    from helpers.models import gpu

    gpu.claim_card()
    finetune = t4.fine_tuning_in_fp16()
    from helpers.finetune import ranks
    from helpers.models import TINY

    model, base = TINY if options.toy else options.models / "7b", None
    out = options.out / f"{max(ranks.expected(), 1)}.jsonl"
    with ranks.joined():
        for row in ROWS + ONLY_TWO * (ranks.count() > 1):
            row = {"accumulation": 1} | row | ({"batch": 2, "seq": 32} if options.toy else {})
            record, config = planned(row, model, ranks.count())
            if base is None:
                base, tokenizer = finetune.load_base(config)
            base, figures = trained(base, tokenizer, config, row)
            record = t4.about(*PACKAGES) | {"gpus": ranks.count()} | row | record | figures
            if ranks.is_first():
                with out.open("a") as stream:
                    stream.write(json.dumps(record) + "\n")
                print(json.dumps(record), flush=True)
            if base is None:  # the others may be fine: none of them goes on
                os._exit(1)
    os._exit(0)


def planned(row: dict, model: Path, count: int) -> tuple[dict, object]:
    """(what the budget predicts for one T4, the configuration) of a row on so many GPUs."""
    from helpers import budget, hardware
    from helpers.models import profile, shape

    sizes, each = shape(str(model)), {"seq_len": row["seq"], "batch_size": row["batch"], "max_steps": WARM + TIMED}
    each |= {"alpha": 16, "kernels": "own" if row["engine"] == "ours" else "plain"}
    one = profile("mistral-7b", model=str(model), accumulation=1, **each)
    one = budget.plan_in(one, row["batch"], sizes, hardware.machine("t4"), "").config
    one = one.with_values(accumulation=row["accumulation"])
    if row["engine"] == "plain":
        one = one.with_values(checkpointing="all")  # as the guides have it
    needs = budget.budget(one, sizes, hardware.machine("t4")).vram
    predicted = {
        "checkpointing": one.train.checkpointing,
        "predicted_allocated_gib": round(needs.allocated_gib, 3),
        "predicted_reserved_gib": round(needs.reserved_gib, 3),
    }
    return predicted, one.with_values(accumulation=row["accumulation"] * count)


def trained(base, tokenizer, config, row: dict) -> tuple[object, dict]:
    """(the base without adapters, or None after an error; the figures) of a few steps."""
    import recipes
    import torch
    from transformers import TrainerCallback

    from helpers.finetune import ranks

    class Clock(TrainerCallback):
        seconds: list[float]

        def on_step_begin(self, args, state, control, **kwargs):
            synchronize()
            self.began = time.perf_counter()

        def on_step_end(self, args, state, control, **kwargs):
            synchronize()
            self.seconds.append(time.perf_counter() - self.began)

    clock, trainer, figures = Clock(), None, {}
    clock.seconds = []
    sequences = (WARM + TIMED) * config.train.batch_size * config.train.accumulation
    folder = Path(tempfile.mkdtemp())
    try:
        trainer = recipes.own_trainer(base, tokenizer, config, [clock], sequences, folder)
        trainer.args.ddp_bucket_cap_mb = row.get("bucket", 25)
        if trainer.accelerator.ddp_handler is not None:  # made here already by newer versions of transformers
            trainer.accelerator.ddp_handler.bucket_cap_mb = row.get("bucket", 25)
        if torch.cuda.is_available():
            recipes.without_skipped_steps(trainer)
            torch.cuda.reset_peak_memory_stats()
        trainer.train()
        step_s = statistics.median(clock.seconds[WARM:])
        losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
        figures = {
            "layers": trainer.layers_reason,
            "tokens_s": round(config.train.batch_size * config.train.accumulation * config.data.seq_len / step_s),
            "step_s": round(step_s, 4),
            "loss_first": round(losses[0], 5),
            "loss_last": round(losses[-1], 5),
        }
        if torch.cuda.is_available():
            peaks = torch.cuda.max_memory_allocated() / GIB, torch.cuda.max_memory_reserved() / GIB
            everyone = [max(peak) for peak in zip(*ranks.gathered(peaks), strict=True)]
            figures |= {"allocated_gib": round(everyone[0], 3), "reserved_gib": round(everyone[1], 3)}
        adapted, trainer.model_wrapped = trainer.model, None
        base = adapted.unload()
        base.__dict__.pop("peft_config", None)
    except Exception as error:
        import traceback

        traceback.print_exc()
        return None, {"error": f"{type(error).__name__}: {str(error)[:300]}"}
    finally:
        shutil.rmtree(folder, ignore_errors=True)
    trainer = adapted = None
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
    return base, figures


def synchronize() -> None:
    """Wait for the GPU."""
    import torch

    if torch.cuda.is_available():
        torch.cuda.synchronize()


# ---- killed, and gone on with ----------------------------------------------------------------------------------------


def road(options: argparse.Namespace) -> None:
    """Four commands of the tiny model, and what came of them."""
    work = options.out / "road"
    shutil.rmtree(work, ignore_errors=True)
    (work / "pids").mkdir(parents=True)
    flags = ["--profile", "tiny", "--max-steps", "14", "--save-steps", "2", "--eval-steps", "7"]
    helpers_of(["prepare", "--profile", "tiny", "--workspace", str(work / "calm")], options, "")
    prepared = ["--prepared", str(work / "calm" / "prepare")]
    report, before = {}, used_mib()
    turns = {
        "one": (["--workspace", str(work / "calm")], ""),
        "a rank is killed": (["--workspace", str(work / "road"), "--gpus", "2"], "1 5 die"),
        "the launcher is killed": (["--workspace", str(work / "road"), "--gpus", "2"], "0 9 orphan"),
        "two to the end": (["--workspace", str(work / "road"), "--gpus", "2"], "0 999 nothing"),
    }
    for name, (more, at) in turns.items():
        for file in (work / "pids").iterdir():
            file.unlink()
        began = time.monotonic()
        done = helpers_of(["finetune", "--json", *flags, *prepared, *more], options, at)
        workers = [int(file.name) for file in (work / "pids").iterdir()]
        ended_s = time.monotonic() - began
        while any(alive(process) for process in workers) and time.monotonic() - began < ended_s + 60:
            time.sleep(0.1)
        lines = [line for line in done.stderr.splitlines() if line.strip()]
        report[name] = {
            "status": done.returncode,
            "s": round(ended_s, 1),
            "workers_after_it_s": round(time.monotonic() - began - ended_s, 1),
            "workers": len(workers),
            "still_running": sum(map(alive, workers)),
            "said": lines[-1][-400:] if lines else "",
            "resumed_from": json.loads(done.stdout)["resumed_from_step"] if done.returncode == 0 else None,
            "gpu_mib_more_than_before": [now - then for now, then in zip(used_mib(), before, strict=True)],
        }
        print(name, json.dumps(report[name]), flush=True)
    report |= differences(work / "calm" / "finetune", work / "road" / "finetune")
    assert report["a rank is killed"]["status"] == 1 and report["two to the end"]["status"] == 0
    assert report["the launcher is killed"]["status"] == -signal.SIGKILL
    assert report["two to the end"]["resumed_from"] >= 8 and not any(
        turn["still_running"] for turn in report.values() if isinstance(turn, dict)
    )
    (options.out / "road.json").write_text(json.dumps(report, indent=1) + "\n")
    print(json.dumps({name: value for name, value in report.items() if not isinstance(value, dict)}))


# ---- four models, on one GPU and on two ------------------------------------------------------------------------------


def evaluation(options: argparse.Namespace) -> None:
    """The same command with one GPU and with two, each held to a T4's envelope."""
    import threading

    model, report, found = seven(options), {}, {}
    data = [
        "--data",
        str(ROOT / "data" / "heldout_conversations.jsonl"),
        "--questions",
        str(ROOT / "data/questions.jsonl"),
    ]
    few = ["--max-heldout", "40", "--max-questions", "16", "--max-new-tokens", "32"]
    chosen = ["--profile", "tiny" if options.toy else "mistral-7b", "--model", str(model)]
    chosen += ["--models", *(f"{name}={model}" for name in ("one", "two", "three", "four"))]
    for gpus in (1, 2):
        output, ended, most_gib = options.out / f"evaluate-{gpus}", threading.Event(), [0.0]
        shutil.rmtree(output, ignore_errors=True)
        watch = threading.Thread(target=watch_memory, args=(ended, most_gib), daemon=True)
        watch.start()
        began = time.monotonic()
        flags = ["evaluate", *chosen, *data, *few, "--gpus", str(gpus), "--output", str(output), "--json"]
        done = helpers_of(flags, options, "", held_to_a_t4=not options.toy)
        ended.set()
        watch.join()
        assert done.returncode == 0, done.stderr
        found[gpus] = json.loads(done.stdout)
        assert all("left_out" not in entry for entry in found[gpus].values()), found[gpus]
        report[f"{gpus} GPUs"] = {
            "minutes": round((time.monotonic() - began) / 60, 2),
            "anonymous_gib_of_all_processes": round(most_gib[0], 2),
            **{
                f"{what} of each": [round(entry[what], 2) for entry in found[gpus].values()]
                for what in ("evaluation_s", "load_s", "tokens_per_s", "peak_anonymous_gib")
            },
            "loaded_as": found[gpus]["one"]["loaded_as"],
        }
        print(json.dumps(report[f"{gpus} GPUs"]), flush=True)
    report["largest difference"] = {
        what: max(abs(found[2][name][what] - found[1][name][what]) for name in found[1])
        for what in ("perplexity", "f1", "rouge_l", "chrf", "ended_share")
    }
    report["times as fast"] = round(report["1 GPUs"]["minutes"] / report["2 GPUs"]["minutes"], 2)
    (options.out / "evaluate.json").write_text(json.dumps(report, indent=1) + "\n")
    print(json.dumps({name: report[name] for name in ("times as fast", "largest difference")}))


def watch_memory(ended: Any, most_gib: list[float]) -> None:
    """Keep in most_gib[0] the most anonymous memory that this process's descendants held together."""
    import psutil

    here = psutil.Process()
    while not ended.wait(0.2):
        held = 0
        for process in here.children(recursive=True):
            with suppress(OSError, IndexError):
                status = Path(f"/proc/{process.pid}/status").read_text(encoding="ascii")
                held += 1024 * int(status.split("RssAnon:")[1].split()[0])
        most_gib[0] = max(most_gib[0], held / GIB)


def helpers_of(
    arguments: list[str], options: argparse.Namespace, at: str, held_to_a_t4: bool = False
) -> subprocess.CompletedProcess:
    """`python -m helpers`, whose workers do something at a step (tests/finetune/at_a_step)."""
    environment = {"HF_HUB_OFFLINE": "1"}
    if held_to_a_t4:
        share = f"per_process_memory_fraction:{t4.allocator_share():.5f}"
        environment["PYTORCH_CUDA_ALLOC_CONF"] = f"expandable_segments:True,{share}"
        environment["PYTHONPATH"] = str(ROOT / "tests" / "benchmarks" / "t4_envelope")
    if at:
        paths = [str(ROOT / "tests" / "finetune" / "at_a_step"), os.environ.get("PYTHONPATH", "")]
        environment |= {"AT_A_STEP": at, "AT_A_STEP_PIDS": str(options.out.absolute() / "road" / "pids")}
        environment["PYTHONPATH"] = os.pathsep.join(filter(None, paths))
    if options.toy:
        environment |= {"RECIPES_WORKERS_ON_CPU": "1", "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    command = [sys.executable, "-m", "helpers", *arguments]
    done = subprocess.run(command, cwd=ROOT, env=os.environ | environment, capture_output=True, text=True)
    if done.returncode == 2:
        print(done.stderr)
    return done


def alive(process: int) -> bool:
    """Whether a process runs; one that has ended and is not yet buried does not."""
    try:
        return Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()[0] not in "ZX"
    except OSError:
        return False


def used_mib() -> list[int]:
    """Memory that is taken on each GPU."""
    query = ["nvidia-smi", "--query-gpu=memory.used", "--format=csv,noheader,nounits"]
    try:
        return [int(line) for line in subprocess.run(query, capture_output=True, text=True).stdout.split()]
    except OSError:
        return []


def differences(one: Path, two: Path) -> dict[str, float]:
    """The largest difference of a loss, of a held-out loss and of an adapter weight between two runs."""
    from safetensors.torch import load_file

    logs = [json.loads((folder / "log.json").read_text(encoding="utf-8")) for folder in (one, two)]
    found = {}
    for name in ("loss", "eval_loss"):
        first, second = ({entry["step"]: entry[name] for entry in log if name in entry} for log in logs)
        found[f"{name}_difference"] = max(abs(first[step] - second[step]) for step in first)
    first, second = (load_file(folder / "adapter" / "adapter_model.safetensors") for folder in (one, two))
    found["adapter_difference"] = max((first[name] - second[name]).abs().max().item() for name in first)
    found["adapter_largest"] = max(value.abs().max().item() for value in first.values())
    return found


if __name__ == "__main__":
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    os.environ.setdefault("PYTORCH_CUDA_ALLOC_CONF", "expandable_segments:True")
    main()
