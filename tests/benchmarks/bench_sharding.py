"""Weights divided among GPUs by our own code: tokens/s and memory of each GPU beside what the budget says.

    python tests/benchmarks/bench_sharding.py --out rows.jsonl            # two GPUs, some four minutes
    python tests/benchmarks/bench_sharding.py --toy --out rows.jsonl      # a tiny shape, two gloo processes on a CPU

A 7B and a 24B shape (Mistral Small) with random weights, made on the GPU layer by layer: nothing is read or downloaded.
A mode runs in two processes of its own. The 24B's two GPUs are held to a T4's allocator each (14.42 GiB, fp16, no flash
attention), and its context grows until it does not fit.
"""

import argparse
import json
import os
import socket
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from t4 import ALLOCATOR_GIB, GIB, ROOT  # noqa: F401 - and with it the path to helpers

SEVEN, SMALL = "mistral-7b-v0.3", "mistral-small-24b"
MODES = {
    "qlora": (SEVEN, {"checkpointing": "none"}, (2048,)),
    "lora16": (SEVEN, {"weights": "fp16", "checkpointing": "none"}, (2048,)),
    "24b on two T4s": (SMALL, {"checkpointing": "auto"}, (1024, 2048, 4096, 8192, 12288)),
    "lora16 on two T4s": (SEVEN, {"weights": "fp16", "checkpointing": "auto"}, (2048, 4096)),
    "full": (SEVEN, {"weights": "fp16", "trains": "all", "checkpointing": "all", "loss": "full"}, (2048,)),
    "qlora, transformers' layers": (SEVEN, {"checkpointing": "all", "kernels": "plain"}, (2048,)),
}
"""Mode -> model, settings, tokens of one sequence a GPU."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=Path("sharding.jsonl"))
    parser.add_argument("--modes", default=None, help="some of them, with semicolons between")
    parser.add_argument("--seconds", type=float, default=280, help="start no further mode after so long")
    parser.add_argument("--each", type=float, default=120, help="end a mode after so long")
    parser.add_argument("--toy", action="store_true")
    parser.add_argument("--worker", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.worker:
        return worker(options)
    began = time.time()
    for mode in options.modes.split(";") if options.modes else MODES:
        if time.time() - began > options.seconds:
            print(f"{mode}: not started, {options.seconds:.0f} s are over", flush=True)
            continue
        launch(mode, options)
    print(f"{time.time() - began:.0f} s in all")
    return None


def launch(mode: str, options: argparse.Namespace) -> None:
    """Two processes of a mode, ended when one fails or time is over; its log's end where it failed."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [sys.executable, __file__, "--worker", mode, "--out", str(options.out), *["--toy"] * options.toy]
    logs, processes = [Path(tempfile.mkdtemp(), "log") for _ in range(2)], []
    for rank, log in enumerate(logs):
        environment = os.environ | {
            "RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1",
            "MASTER_PORT": str(port), "OMP_NUM_THREADS": "1" if options.toy else "8",
            "PYTORCH_CUDA_ALLOC_CONF": "expandable_segments:True", "NCCL_NVLS_ENABLE": "0",
        }  # fmt: skip
        environment |= {"CUDA_VISIBLE_DEVICES": ""} if options.toy else {}
        with log.open("w") as stream:
            stdout = None if rank == 0 else stream
            processes.append(subprocess.Popen(command, stdout=stdout, stderr=stream, env=environment))
    deadline = time.time() + options.each
    while any(one.poll() is None for one in processes) and time.time() < deadline:
        if any(one.poll() not in (None, 0) for one in processes):
            break
        time.sleep(0.2)
    for rank, (process, log) in enumerate(zip(processes, logs, strict=True)):
        if process.poll() is None:
            time.sleep(3)
            process.kill()
        if process.wait():
            print(f"{mode}, GPU {rank}: exit {process.returncode}\n{log.read_text()[-1500:]}", flush=True)


def worker(options: argparse.Namespace) -> None:
    """One process of a mode: a row for each context that fits."""
    import torch
    import torch.distributed as dist

    from helpers import finetune  # noqa: F401 - sets PyTorch up as a training does
    from helpers.finetune import base
    from helpers.models.loading import Precision

    rank, on_gpu, small = int(os.environ["RANK"]), not options.toy, "T4" in options.worker
    dtype = torch.float32 if options.toy else torch.float16 if small else torch.bfloat16
    base.precision = lambda *_: Precision(dtype, "as asked")
    if on_gpu:
        torch.cuda.set_device(rank)
    if small and on_gpu:
        torch.cuda.set_per_process_memory_fraction(
            ALLOCATOR_GIB * GIB / torch.cuda.get_device_properties(rank).total_memory, rank
        )
        torch.backends.cuda.enable_flash_sdp(False)
        torch.backends.cuda.enable_cudnn_sdp(False)
    dist.init_process_group("nccl" if on_gpu else "gloo", device_id=torch.device("cuda", rank) if on_gpu else None)
    name, values, contexts = MODES[options.worker]
    with tempfile.TemporaryDirectory() as folder:
        for context in (16, 32) if options.toy else contexts:
            row = measured(options, name, values, context, Path(folder), dtype, small)
            if rank == 0:
                print(json.dumps(row), flush=True)
                with options.out.open("a") as out:
                    out.write(json.dumps(row) + "\n")
            if "stopped" in row:
                break
    dist.destroy_process_group()


def measured(options, name: str, values: dict, context: int, folder: Path, dtype, small: bool) -> dict:
    """One context of a mode: built anew, trained for a few steps; `stopped` where it does not fit."""
    import gc

    import torch
    import torch.distributed as dist

    row = {"mode": options.worker, "model": name, "context": context, "gpus": 2, "sharding": "fsdp"}
    try:
        row |= trained(options, name, values, context, folder, dtype, small)
    except torch.OutOfMemoryError as error:
        row["stopped"] = f"out of memory: {str(error)[:120]}"
    except ValueError as error:
        row["stopped"] = str(error)
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
    everyone = [None, None]
    dist.all_gather_object(everyone, row)
    both = [one for one in everyone if "stopped" in one]
    sizes = {key: max(one[key] for one in everyone) for key in row if key.endswith("_gib") and not both}
    return row | sizes | ({"stopped": both[0]["stopped"]} if both else {})


def trained(options, name: str, values: dict, context: int, folder: Path, dtype, small: bool) -> dict:
    """A few steps of one sequence a GPU."""
    import torch
    import torch.distributed as dist
    from random_model import config_of

    from helpers import budget, hardware, models
    from helpers.finetune import sharded
    from helpers.finetune.engine import losses
    from helpers.finetune.trainer import choose_layers

    on_gpu, rank = torch.cuda.is_available(), dist.get_rank()
    name = str(models.TINY) if options.toy else name
    shape = models.shape(name)
    config = models.profile(
        "mistral-7b", model=name, seq_len=context, accumulation=2, gpus=2, sharding="fsdp", source="random",
        max_steps=8, **values,
    )  # fmt: skip
    place = hardware.machine("2xt4" if small else "2xh200")
    if values["checkpointing"] == "auto":
        budget.check((settled := budget.settle(config, shape, place)).budget)
        config = settled.config
    predicted = budget.vram_of(config, shape, hardware.machine("2xh200"), "train")
    config_of(name).save_pretrained(folder)
    if on_gpu:
        torch.cuda.reset_peak_memory_stats()
    before_gib = used_gib()
    began = time.time()
    model = sharded.build(config, folder, random_tensors)
    build_s = time.time() - began
    loaded_gib = torch.cuda.max_memory_reserved() / GIB if on_gpu else 0.0
    causal_lm = model.get_base_model() if hasattr(model, "get_base_model") else model
    losses.install(causal_lm, config.train.loss)
    _, layers = choose_layers(model, config)
    held = sum(sharded.here(value).nbytes for value in model.parameters())
    trainable = [value for value in model.parameters() if value.requires_grad]
    optimizer = torch.optim.AdamW(trainable, lr=1e-4, fused=on_gpu)
    scaler = torch.amp.GradScaler("cuda" if on_gpu else "cpu", enabled=dtype == torch.float16)
    device = sharded.device_of_rank()
    generator = torch.Generator().manual_seed(rank)
    model.train()
    step_s, seen = [], []
    for step in range(8):
        ids = torch.randint(300, shape.vocab, (1, context), generator=generator).to(device)
        if on_gpu and step == 3:
            torch.cuda.reset_peak_memory_stats()
        began = moment()
        with torch.autocast(device.type, dtype, enabled=dtype != torch.float32):
            loss = model(input_ids=ids, labels=ids, num_items_in_batch=context - 1).loss
        scaler.scale(loss).backward()
        scaler.unscale_(optimizer)
        torch.nn.utils.clip_grad_norm_(trainable, 1.0)
        scaler.step(optimizer)
        scaler.update()
        optimizer.zero_grad(set_to_none=True)
        step_s.append(moment() - began)
        seen.append(float(loss.detach()))
    took = statistics.median(step_s[3:])
    peaks = {"allocated_gib": 0.0, "reserved_gib": 0.0}
    if on_gpu:
        peaks = {
            "allocated_gib": torch.cuda.max_memory_allocated() / GIB,
            "reserved_gib": torch.cuda.max_memory_reserved() / GIB,
        }
    outside = used_gib() - before_gib - (torch.cuda.memory_reserved() / GIB if on_gpu else 0.0)
    return {
        "layers": layers,
        "tokens_s": round(2 * context / took, 1),
        "step_s": round(took, 4),
        "build_s": round(build_s, 1),
        "held_gib": round(held / GIB, 3),
        "loaded_gib": round(loaded_gib, 3),
        **{key: round(value, 3) for key, value in peaks.items()},
        "predicted_allocated_gib": round(predicted.allocated_gib, 3),
        "predicted_reserved_gib": round(predicted.reserved_gib, 3),
        "predicted_phase": predicted.phase,
        "outside_gib": round(outside, 3),
        "losses": [round(loss, 4) for loss in seen],
        "torch": torch.__version__,
    }


def random_tensors(folder: Path, model, device):
    """Weights as transformers draws them, on the GPU; norms of one; the same on both ranks."""
    import torch

    drawn = torch.Generator(device).manual_seed(0)
    compute = model.get_input_embeddings().weight.dtype
    sizes = {name: (value.shape, compute) for name, value in model.named_parameters()}

    def read(name: str):
        size, dtype = sizes[name]
        if len(size) == 1:
            return torch.ones(size, dtype=dtype, device=device)
        return torch.randn(unpacked(model, name, size), generator=drawn, device=device).mul_(0.02).to(dtype)

    return read


def unpacked(model, name: str, size):
    """The size of a matrix whose place is made for packed bytes."""
    module = model.get_submodule(name.rpartition(".")[0].replace("base_model.model.", ""))
    return (module.out_features, module.in_features) if hasattr(module, "quant_type") else size


def moment() -> float:
    """Now, when the GPU has done what it was given."""
    import torch

    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter()


def used_gib() -> float:
    """What the GPU has given away: to this process and others."""
    import torch

    if not torch.cuda.is_available():
        return 0.0
    free, total = torch.cuda.mem_get_info()
    return (total - free) / GIB


if __name__ == "__main__":
    main()
