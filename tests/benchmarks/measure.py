"""Measures peak memory and step times on a GPU held to a T4's envelope, a CSV row a configuration.

    python tests/benchmarks/measure.py OUT.csv                 # everything, in a process a group and model
    python tests/benchmarks/measure.py OUT.csv --groups own    # one group

Each process is held to a T4 by t4.limit; the weights are random: memory and time do not depend on them. Needs torch
with CUDA, transformers, peft, trl, bitsandbytes, datasets, liger-kernel; 16 GB of disk.
"""

import argparse
import csv
import gc
import json
import os
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from dataclasses import asdict
from pathlib import Path

import random_model
import t4
from t4 import GIB

STEPS = 3
COLUMNS = [
    *("group", "date", "gpu", "cap_gib", "expandable"),
    *("torch", "transformers", "peft", "trl", "bitsandbytes", "liger"),
    *("model", "recipe", "batch", "seq", "checkpointing", "rank", "targets", "optimizer", "attention", "loss"),
    *("dropout", "accumulation", "offload", "upcast", "fused_kernels", "double_quant", "prompt", "new_tokens"),
    *("kernels", "keep_attention"),
    *("status", "allocated_gib", "reserved_gib", "process_gib", "outside_gib", "paged_gib", "loaded_gib", "ready_gib"),
    *("forward_peak_gib", "saved_gib", "backward_peak_gib", "step_peak_gib", "after_step_gib", "steps_applied"),
    *("step_s", "tokens_s", "load_s", "load_peak_gib", "rss_gib", "error"),
]


def groups() -> dict[str, list]:
    """Group -> (model, rows); each of them is a process, since Liger patches its model's module for good."""
    from recipes import baseline, fitcheck, ours, own

    big, small = "mistral-7b-v0.3", ("tinyllama-1.1b", "smollm2-1.7b", "qwen2.5-1.5b")
    attention = {"targets": "attention"}
    ours_big = [
        ours(1, 256), ours(1, 256, "none"), ours(4, 256, 16), ours(1, 512), ours(2, 512, "none"), ours(4, 512),
        ours(8, 512), ours(1, 1024, rank=8), ours(1, 1024), ours(1, 1024, 16), ours(1, 1024, "none"),
        ours(1, 1024, "none", rank=64), ours(1, 1024, "none", **attention), ours(1, 1024, "none", dropout=0.05),
        ours(1, 1024, rank=256), ours(1, 1024, rank=256, optimizer="adamw_torch"),
        ours(1, 1024, 16, rank=128, optimizer="adamw_8bit"), ours(1, 1024, "none", accumulation=2),
        ours(1, 1024, accumulation=2, rank=64), ours(2, 1024, rank=64, **attention), ours(2, 1024, 8),
        ours(8, 1024, rank=32), ours(1, 2048), ours(1, 2048, 16), ours(1, 2048, "none"),
        ours(1, 2048, rank=64, optimizer="adamw_torch"), ours(1, 2048, loss="full"), ours(2, 2048),
        ours(2, 2048, 20, rank=8), ours(1, 3072, 24), ours(1, 4096), ours(1, 4096, 24, rank=32, **attention),
        ours(1, 8192), ours(1, 8192, rank=64, optimizer="adamw_torch"), ours(8, 2048), ours(4, 4096, rank=32),
        ours(1, 16384), ours(1, 16384, rank=64), ours(1, 8192, offload=True), ours(1, 4096, "none"), ours(4, 1024, 2),
        ours(1, 32768),
    ]  # fmt: skip
    baseline_big = [
        baseline(1, 256), baseline(1, 512, "none"), baseline(1, 512, 16), baseline(4, 512), baseline(8, 512),
        baseline(1, 1024), baseline(1, 1024, rank=8), baseline(1, 1024, rank=256),
        baseline(1, 1024, rank=64, **attention), baseline(1, 1024, optimizer="adamw_torch"), baseline(1, 1024, 16),
        baseline(1, 1024, accumulation=2), baseline(1, 1024, dropout=0.05), baseline(1, 1024, loss="full"),
        baseline(1, 1024, attention="eager"), baseline(2, 1024), baseline(4, 1024, rank=32), baseline(1, 2048),
        baseline(1, 2048, attention="eager"), baseline(1, 2048, attention="efficient"),
        baseline(1, 4096, attention="efficient"), baseline(2, 2048), baseline(1, 3072, **attention),
        baseline(1, 1024, "none"), baseline(1, 4096),
    ]  # fmt: skip
    own_big = [
        own(1, 1024, "none"), own(2, 1024, "none"), own(1, 2048), own(1, 2048, keep_attention=False),
        own(1, 8192, 24), own(1, 512), own(1, 256, "none"), own(4, 512, 16), own(8, 1024), own(4, 1024, 8),
        own(1, 4096, "none"), own(1, 1024, rank=64), own(1, 1024, "none", rank=128, optimizer="adamw_8bit"),
        own(1, 1024, 16, rank=256), own(1, 2048, "none", rank=8, **attention), own(1, 4096, 16, rank=32, **attention),
        own(1, 2048, "none", accumulation=2), own(1, 2048, rank=64, optimizer="adamw_torch"),
        own(1, 2048, loss="full"), own(8, 2048), own(1, 16384), own(1, 16384, keep_attention=False, offload=True),
        own(1, 8192, offload=True), own(1, 1024, "none", dropout=0.05), own(2, 2048, "none", rank=32),
        own(4, 2048, "none"), own(1, 32768),
    ]  # fmt: skip
    own_small = [own(2, 1024), own(2, 1024, "none"), own(4, 512, 10, rank=64), own(1, 4096, keep_attention=False)]
    ours_small = [ours(2, 1024), ours(2, 1024, "none"), ours(4, 512, 10, rank=64), ours(1, 4096, **attention)]
    like_t4 = [fitcheck(2, 1024, "eager"), fitcheck(2, 1024, "efficient"), fitcheck(2, 512, "math", rank=64)]
    baseline_small = [baseline(2, 1024), baseline(2, 1024, 10), baseline(4, 512, "none", rank=64)]
    return {
        "own": [(big, own_big), *((name, own_small) for name in small)],
        "ours": [(big, ours_big), *((name, ours_small) for name in small)],
        "baseline": [(big, baseline_big), *((name, baseline_small) for name in small)],
        "fitcheck": [(name, like_t4) for name in small],
        "segments": [(big, [baseline(1, 1024), baseline(1, 2048), baseline(4, 512), baseline(1, 512, 16)])],
        "inference": [(big, [(1, 512, 32), (1, 4096, 32), (1, 16384, 16), (8, 1024, 32), (4, 4096, 16)])],
    }


class Phases:
    """Peaks of forward, backward and optimizer step, kept apart."""

    def __init__(self):
        self.figures, self.times, self.reserved, self.outside, self.started = {}, [], 0, 0, 0.0

    def close(self, phase: str) -> None:
        """End a phase: keep its peak, start the next one's."""
        import torch

        torch.cuda.synchronize()
        peak = torch.cuda.max_memory_allocated() / GIB
        self.figures[phase] = max(self.figures.get(phase, 0.0), peak)
        self.reserved = max(self.reserved, torch.cuda.max_memory_reserved() / GIB)
        free, total = torch.cuda.mem_get_info()
        self.outside = max(self.outside, (total - free - torch.cuda.memory_reserved()) / GIB)
        torch.cuda.reset_peak_memory_stats()

    def keep(self, name: str) -> None:
        """Keep what is allocated now."""
        import torch

        self.figures[name] = max(self.figures.get(name, 0.0), torch.cuda.memory_allocated() / GIB)


def watching(phases: Phases, row, layers):
    """The callback that closes phases, and sets which layers are checkpointed."""
    from recipes import layer_count
    from transformers import TrainerCallback

    class Watch(TrainerCallback):
        def on_step_begin(self, *_, **__):
            import torch

            for index, layer in enumerate(layers):
                layer.gradient_checkpointing = index < layer_count(row, len(layers))
            torch.cuda.synchronize()
            phases.started = time.perf_counter()

        def on_pre_optimizer_step(self, *_, **__):
            phases.close("backward_peak_gib")

        def on_step_end(self, *_, **__):
            phases.close("step_peak_gib")
            phases.keep("after_step_gib")
            phases.times.append(time.perf_counter() - phases.started)

    return Watch()


def split_phases(trainer, phases: Phases) -> None:
    """Close the forward phase after each loss, the backward phase after each backward pass."""
    compute_loss, backward = trainer.compute_loss, trainer.accelerator.backward

    def loss_then_close(*arguments, **keywords):
        result = compute_loss(*arguments, **keywords)
        phases.keep("saved_gib")
        phases.close("forward_peak_gib")
        return result

    def backward_then_close(*arguments, **keywords):
        backward(*arguments, **keywords)
        phases.close("backward_peak_gib")

    trainer.compute_loss, trainer.accelerator.backward = loss_then_close, backward_then_close


def paged_bytes(optimizer) -> int:
    """Bytes of optimizer states in managed memory, which PyTorch's allocator does not see."""
    states = getattr(optimizer, "optimizer", optimizer).state.values()
    return sum(
        tensor.nbytes for state in states for tensor in state.values() if getattr(tensor, "is_paged", False) is True
    )


def measure_training(base, tokenizer, row, folder: Path, leaked_bytes: int) -> tuple[dict, object, int]:
    """Three steps of a row: (figures, the base without adapters, bytes of managed memory that stay behind)."""
    import recipes
    import torch
    from datasets import Dataset

    figures, phases = {}, Phases()
    watch = watching(phases, row, base.model.layers)
    if row.recipe == "own":
        config, sequences = recipes.config_of(row, folder, STEPS), STEPS * row.batch * row.accumulation
        trainer = recipes.own_trainer(base, tokenizer, config, [watch], sequences, Path(tempfile.mkdtemp()))
        model = trainer.model
    else:
        model = recipes.adapt(base, row)
        generator = torch.Generator().manual_seed(0)
        rows = row.batch * row.accumulation * STEPS
        ids = torch.randint(300, 31000, (rows, row.seq), generator=generator).tolist()
        dataset = Dataset.from_dict({"input_ids": ids})
        trainer = recipes.trainer(model, tokenizer, row, dataset, [watch], STEPS, Path(tempfile.mkdtemp()))
    recipes.without_skipped_steps(trainer)
    figures["ready_gib"] = torch.cuda.memory_allocated() / GIB
    split_phases(trainer, phases)
    torch.cuda.reset_peak_memory_stats()
    paged = 0
    try:
        trainer.train()
        paged = paged_bytes(trainer.optimizer)
        step_s = statistics.median(phases.times[1:])
        states = getattr(trainer.optimizer, "optimizer", trainer.optimizer).state.values()
        steps = [int(state["step"]) for state in states if "step" in state]
        figures |= phases.figures | {
            "status": "ok",
            "steps_applied": max(steps, default=0),
            "allocated_gib": max(value for name, value in phases.figures.items() if name.endswith("peak_gib")),
            "reserved_gib": phases.reserved,
            "outside_gib": phases.outside - leaked_bytes / GIB,
            "paged_gib": paged / GIB,
            "process_gib": phases.reserved + phases.outside - leaked_bytes / GIB,
            "step_s": step_s,
            "tokens_s": row.batch * row.seq * row.accumulation / step_s,
        }
    except torch.OutOfMemoryError as error:
        figures |= {"status": "oom", "error": str(error)[:160]}
        paged = paged_bytes(trainer.optimizer) if trainer.optimizer is not None else 0
    trainer.model = trainer.model_wrapped = None
    del trainer
    base = model.unload()
    del watch, model
    if hasattr(base, "peft_config"):
        del base.peft_config
    return figures, base, leaked_bytes + paged


def measure_inference(base, prompt: tuple[int, int, int]) -> dict:
    """Prefill and decode with a KV cache: prompt is (batch, tokens, new tokens)."""
    import torch

    batch, tokens, new = prompt
    ids = torch.randint(300, 31000, (batch, tokens), device="cuda")
    base.config.use_cache = True
    base.eval()
    torch.cuda.reset_peak_memory_stats()
    try:
        with torch.inference_mode():
            start = time.perf_counter()
            base.generate(ids, max_new_tokens=new, min_new_tokens=new, do_sample=False, pad_token_id=0)
            torch.cuda.synchronize()
    except torch.OutOfMemoryError as error:
        return {"status": "oom", "error": str(error)[:160]}
    free, total = torch.cuda.mem_get_info()
    reserved = torch.cuda.max_memory_reserved() / GIB
    outside = (total - free) / GIB - torch.cuda.memory_reserved() / GIB
    return {
        "status": "ok",
        "allocated_gib": torch.cuda.max_memory_allocated() / GIB,
        "reserved_gib": reserved,
        "outside_gib": outside,
        "process_gib": reserved + outside,
        "step_s": time.perf_counter() - start,
    }


def run_group(group: str, model: str, out: Path, models: Path, seconds: float) -> None:
    """All rows of a group and model in this process; rows after the deadline are left out, and said to be."""
    import torch

    deadline = time.monotonic() + seconds
    import recipes

    random_model.make(models / model, model)
    t4.limit()
    common = t4.about("torch", "transformers", "peft", "trl", "bitsandbytes", "liger-kernel")
    common |= {"group": group, "liger": common.get("liger-kernel", "")}
    common["expandable"] = "expandable_segments:True" in os.environ.get("PYTORCH_CUDA_ALLOC_CONF", "")
    leaked = 0
    for name, rows in groups()[group]:
        if name != model:
            continue
        base = None
        for row in rows:
            figures = {"model": name} | (asdict(row) if not isinstance(row, tuple) else {})
            if isinstance(row, tuple):
                figures |= {"recipe": "inference", "batch": row[0], "prompt": row[1], "new_tokens": row[2]}
                figures |= {"seq": row[1] + row[2]}
            if time.monotonic() > deadline:
                write(out, common | figures | {"status": "left out: time"})
                continue
            try:
                if base is None:
                    gc.collect()
                    torch.cuda.empty_cache()
                    torch.cuda.reset_peak_memory_stats()
                    start = time.perf_counter()
                    loaded_as = recipes.ours(1, 512) if isinstance(row, tuple) else row
                    base, tokenizer = recipes.load(models / name, loaded_as)
                    figures["load_s"] = time.perf_counter() - start
                    figures["load_peak_gib"] = torch.cuda.max_memory_allocated() / GIB
                figures["loaded_gib"] = torch.cuda.memory_allocated() / GIB
                if isinstance(row, tuple):
                    figures |= measure_inference(base, row)
                else:
                    measured, base, leaked = measure_training(base, tokenizer, row, models / name, leaked)
                    figures |= measured
            except Exception as error:  # one row's failure must not cost the others
                figures |= {"status": "failed", "error": f"{type(error).__name__}: {str(error)[:200]}"}
                base = None
            figures["rss_gib"] = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
            gc.collect()
            torch.cuda.empty_cache()
            write(out, common | figures)


def write(out: Path, figures: dict) -> None:
    """Append a row; the header comes with the first."""
    fresh = not out.exists()
    with out.open("a", newline="", encoding="utf-8") as stream:
        writer = csv.DictWriter(stream, COLUMNS, extrasaction="ignore")
        if fresh:
            writer.writeheader()
        writer.writerow({key: round(value, 4) if isinstance(value, float) else value for key, value in figures.items()})
    shown = {key: figures.get(key) for key in ("model", "recipe", "batch", "seq", "checkpointing", "rank", "status")}
    shown |= {key: round(figures[key], 2) for key in ("allocated_gib", "reserved_gib", "step_s") if key in figures}
    print(json.dumps(shown | ({"error": figures["error"]} if figures.get("error") else {})), flush=True)


def main() -> None:
    """A process a group, one after the other."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("out", type=Path)
    parser.add_argument("--groups", nargs="+", default=["own", "ours", "baseline", "fitcheck", "segments", "inference"])
    parser.add_argument("--models", type=Path, default=Path("/tmp/measured-models"), help="where checkpoints are made")
    parser.add_argument("--seconds", type=float, default=520, help="stop measuring after so long")
    parser.add_argument("--here", metavar="MODEL", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.here:
        run_group(options.groups[0], options.here, options.out, options.models, options.seconds)
        return
    deadline = time.monotonic() + options.seconds
    options.out.parent.mkdir(parents=True, exist_ok=True)
    for group in options.groups:
        environment = os.environ | {"HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}
        environment |= {"PYTORCH_CUDA_ALLOC_CONF": f"expandable_segments:{group != 'segments'}"}
        for name, _ in groups()[group]:
            left = max(deadline - time.monotonic(), 0)
            command = [sys.executable, __file__, str(options.out), "--here", name, "--groups", group]
            command += ["--models", str(options.models), "--seconds", str(left)]
            start = time.monotonic()
            code = subprocess.run(command, env=environment, check=False).returncode
            print(f"# {group}, {name}: exit {code} after {time.monotonic() - start:.0f} s", flush=True)


if __name__ == "__main__":
    main()
