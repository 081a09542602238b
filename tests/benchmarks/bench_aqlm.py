"""Mixtral 8x7B in two bits (AQLM) on a free Colab's T4: its true shape, random codes, measured beside the budget.

    python tests/benchmarks/bench_aqlm.py OUT_DIR [--contexts 512,1024,2048,4096,8192] [--shape mixtral-8x7b]

Three processes: one makes the checkpoint in the hub's layout, a shard a layer (13 GB for Mixtral, in --models); one
times the Triton kernel beside PyTorch's gather, on matrices of both layouts; one, held to a T4 by t4.python (allocator
14.42 GiB, fp16, no flash, 12.7 GB of host memory, two cores), loads it and trains LoRA of rank 16 on attention a few
steps of one row for each context, as helpers.budget plans it. OUT_DIR/aqlm.jsonl gets a line a matrix and a context;
the line of a context that does not fit has the budget's reasons instead.
"""

import argparse
import gc
import json
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path

import random_model
import t4
from t4 import GIB, ROOT

STEPS = 4
MATRICES = ((4096, 4096), (1024, 4096), (14336, 4096), (4096, 14336))
"""(out, in) of Mistral's and Mixtral's."""
LOG = "aqlm.jsonl"


def main() -> None:
    """All of it, or with --part one process's."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("out", type=Path, metavar="OUT_DIR")
    parser.add_argument("--shape", default="mixtral-8x7b", help="a name that helpers.models knows, or a folder")
    parser.add_argument("--layers", type=int, help="only so many of its first layers")
    parser.add_argument("--contexts", default="512,1024,2048,4096,8192")
    parser.add_argument("--models", type=Path, default=Path(tempfile.gettempdir()) / "models")
    parser.add_argument("--part", choices=("make", "kernels", "train"), help="in this very process")
    options = parser.parse_args()
    if options.part:
        {"make": make, "kernels": kernels, "train": train}[options.part](options)
        return
    options.out.mkdir(parents=True, exist_ok=True)
    limited = t4.host_limit()
    for part in ("make", "kernels", "train"):
        began, command = time.monotonic(), [__file__, *sys.argv[1:], "--part", part]
        if part == "train":
            process = t4.python(command, limited)
        else:
            process = subprocess.Popen([sys.executable, *command], cwd=ROOT)
        status = process.wait()
        print(json.dumps({"part": part, "exit": status, "seconds": round(time.monotonic() - began, 1)}), flush=True)
    print(json.dumps({"host_limit": limited, **t4.events(limited)}), flush=True)


def folder_of(options: argparse.Namespace) -> Path:
    """Where the checkpoint lies."""
    return options.models / f"aqlm-{Path(options.shape).name}-{options.layers or 'all'}"


def make(options: argparse.Namespace) -> None:
    """The checkpoint, once."""
    if not (folder_of(options) / "config.json").is_file():
        random_model.make_aqlm(folder_of(options), options.shape, options.layers)


def emit(options: argparse.Namespace, record: dict) -> None:
    """A line to the file, with the machine's versions, and to standard output without."""
    with (options.out / LOG).open("a") as stream:
        stream.write(json.dumps(t4.about("torch", "triton", "transformers", "peft", "trl") | record) + "\n")
    print(json.dumps(record), flush=True)


def kernels(options: argparse.Namespace) -> None:
    """Milliseconds of rebuilding a matrix in fp16 by kernel and by gather, and in how many weights they differ."""
    import torch

    from helpers.models import aqlm
    from helpers.models.aqlm_sizes import ADDITIVE_1X16, ADDITIVE_2X8

    if not torch.cuda.is_available():
        print("no GPU: the kernel is not timed", flush=True)
        return
    for layout in (ADDITIVE_1X16, ADDITIVE_2X8):
        for outputs, inputs in MATRICES:
            codes = torch.randint(
                -(2 ** (layout.bits - 1)), 2 ** (layout.bits - 1),
                (outputs, inputs // layout.group, layout.codebooks), dtype=aqlm.code_type(layout), device="cuda",
            )  # fmt: skip
            books = torch.randn(aqlm.books_shape(layout), dtype=torch.float16, device="cuda")
            scales = torch.rand(outputs, 1, 1, 1, dtype=torch.float16, device="cuda")
            parts = (codes, books, scales, torch.float16)
            different = int((aqlm.on_triton(*parts) != aqlm.gathered(*parts)).sum())
            record = {"matrix": f"{outputs}×{inputs}", "layout": layout.name, "different": different}
            record |= {
                "triton_ms": milliseconds(aqlm.on_triton, parts),
                "gather_ms": milliseconds(aqlm.gathered, parts),
            }
            emit(options, record)


def milliseconds(work, parts: tuple) -> float:
    """The median of 20 calls after 5, by the GPU's clock."""
    import torch

    times = []
    for _ in range(25):
        began, ended = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        began.record()
        work(*parts)
        ended.record()
        ended.synchronize()
        times.append(began.elapsed_time(ended))
    return round(statistics.median(times[5:]), 4)


def train(options: argparse.Namespace) -> None:
    """Load under the limits, then a few steps for each context."""
    sys.path[:0] = [] if str(ROOT) in sys.path else [str(ROOT)]  # t4.pretend takes it away from what is measured
    import recipes
    import torch
    from bench_finetune import clock_callback, peak

    from helpers import budget, finetune, hardware
    from helpers.models import aqlm, profile, shape

    on_gpu, folder, machine = torch.cuda.is_available(), folder_of(options), hardware.machine("t4")
    highest, base, ended = [0], None, threading.Event()
    threading.Thread(target=watch, args=(highest, ended), daemon=True).start()
    for seq in map(int, options.contexts.split(",")):
        config = profile(
            "mistral-7b", model=str(folder), weights="aqlm", targets="attention", seq_len=seq, batch_size=1,
            accumulation=1, max_steps=STEPS, **({} if on_gpu else {"optimizer": "adamw_torch"}),
        )  # fmt: skip
        settled = budget.settle(config, shape(str(folder)), machine)
        record = {"model": folder.name, "seq": seq, "batch": 1, "fits": settled.budget.fits}
        if not settled.budget.fits:
            emit(options, record | {"reasons": settled.budget.reasons})
            continue
        train, expected = settled.config.train, settled.budget
        record |= {"checkpointing": train.checkpointing, "offload": train.offload_activations}
        record |= {"keep_attention": train.keep_attention}
        record |= {"predicted_allocated_gib": round(expected.vram.allocated_gib, 3)}
        record |= {"predicted_reserved_gib": round(expected.vram.reserved_gib, 3)}
        if base is None:
            began = time.perf_counter()
            base, tokenizer = finetune.load_base(config)
            record |= {
                "load_s": round(time.perf_counter() - began, 1),
                "load_anonymous_gib": round(highest[0] / GIB, 2),
            }
            used = {part.rebuild.__name__ for part in base.modules() if isinstance(part, aqlm.AdditiveLinear)}
            record |= {"rebuilt": sorted(used)}
            record |= {"loaded_gib": round(torch.cuda.memory_allocated() / GIB, 3)} if on_gpu else {}
        try:
            clock = clock_callback(STEPS)
            trainer = recipes.own_trainer(base, tokenizer, settled.config, [clock], STEPS, Path(tempfile.mkdtemp()))
            if on_gpu:
                recipes.without_skipped_steps(trainer)
                torch.cuda.empty_cache()
                torch.cuda.reset_peak_memory_stats()
            trainer.train()
            record |= peak() if on_gpu else {}
            step_s = statistics.median(clock.seconds[1:])
            losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
            record |= {"step_s": round(step_s, 3), "tok_s": round(seq / step_s), "applied": trainer.watch.applied}
            record |= {"layers": trainer.layers_reason, "losses": [round(loss, 3) for loss in losses]}
            base = trainer.model.unload()
            if hasattr(base, "peft_config"):
                del base.peft_config
        except Exception as error:
            import traceback

            traceback.print_exc()
            record["error"] = f"{type(error).__name__}: {str(error)[:300]}"
            base = None
        trainer = None
        gc.collect()
        emit(options, record | {"anonymous_gib": round(highest[0] / GIB, 2)})
    ended.set()


def watch(highest: list[int], ended: threading.Event) -> None:
    """The most anonymous memory of this process so far, looked at twenty times a second."""
    from helpers.evaluate.cost import anonymous_bytes

    while not ended.wait(0.05):
        highest[0] = max(highest[0], anonymous_bytes())


if __name__ == "__main__":
    main()
