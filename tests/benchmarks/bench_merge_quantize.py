"""Merge and GPTQ of Mistral 7B's shape (random weights) on a GPU held to a T4's memory: time, VRAM, host memory.

Every task runs in a process of its own, with the allocator capped at 14.42 GiB and, where the system lets us, a hard
limit of 12 GiB on its host memory. First GPTQ of two layers with each variant of settings, then all 32 layers with the
fastest; the result is opened with each of GPTQModel's kernels on two cores. A row a task is appended to
merge_quantize.jsonl as soon as it is known; keep.py puts such a file's rows into merge_quantize.csv.

    python tests/benchmarks/bench_merge_quantize.py --work /tmp/bench --output OUT --deadline-s 540
"""

import argparse
import json
import os
import re
import shutil
import threading
import time
from dataclasses import asdict
from functools import partial
from pathlib import Path

import random_model
import t4
import tasks
from t4 import GIB

from helpers.config import MergeConfig, QuantizeConfig
from helpers.models import shape

HOST_BYTES = 12 * GIB
SAMPLES, TOKENS = 128, 512
# Name -> settings of GPTQModel, environment, cores. The default is what GPTQModel does when it is left alone.
VARIANTS = {
    "python-pack": {"batch_tokens": 4096, "env": {"GPTQMODEL_DISABLE_PACK_EXT": "1"}},
    "gpu-pack": {"batch_tokens": 4096, "library": {"pack_impl": "gpu"}},
    "compiled-pack": {"batch_tokens": 4096},
    "default": {"batch_tokens": 512},
    "no-compiler": {
        "batch_tokens": 4096,
        "env": {"GPTQMODEL_DISABLE_PACK_EXT": "1", "GPTQMODEL_DISABLE_GPTQ_CUDA": "1"},
    },
    "two-cores": {"batch_tokens": 4096, "cores": 2},
}
CANDIDATES = ("python-pack", "gpu-pack", "compiled-pack")
OPENED = ("gptq_triton", "gptq_torch", "gptq_marlin")
NEW_TOKENS = 64


def main() -> None:
    """Run the tasks in order of importance until the deadline."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--work", type=Path, default=Path("/tmp/bench"))
    parser.add_argument("--output", type=Path, default=Path("/tmp/bench"))
    parser.add_argument("--deadline-s", type=float, default=540)
    parser.add_argument("--layers", type=int, default=32, help="of the full model; fewer to try the script")
    parser.add_argument("--name", default="mistral-7b-v0.3", help="the model whose shape it has, or a folder")
    parser.add_argument("--candidates", nargs="*", choices=VARIANTS, default=CANDIDATES, help="tried on two layers")
    parser.add_argument("--task", help="internal: one task, its job as JSON on standard input")
    options = parser.parse_args()
    if options.task:
        tasks.answer(partial(under_limits, options.task))
    Bench(options).run()


class Bench:
    """Work folder, output and deadline of one call."""

    def __init__(self, options: argparse.Namespace) -> None:
        self.work, self.output, self.options = options.work.resolve(), options.output, options
        self.end = time.monotonic() + options.deadline_s
        self.work.mkdir(parents=True, exist_ok=True)
        self.output.mkdir(parents=True, exist_ok=True)
        self.limit = t4.host_limit(HOST_BYTES)

    def run(self) -> None:
        """Everything, most important first."""
        name = self.options.name
        base, adapter, merged = self.work / "base", self.work / "finetune" / "adapter", self.work / "merged"
        whole = {"name": name, "folder": str(base), "adapter": str(adapter), "layers": self.options.layers}
        self.task("make", "make", whole, limit=False)
        self.task("make", "make-2-layers", {"name": name, "folder": str(self.work / "two"), "layers": 2}, limit=False)
        self.task("merge", "merge-original", {"base": str(base), "adapter": str(adapter), "output": str(merged)})
        tried = self.options.candidates
        steady = {name: self.gptq(name, self.work / "two") for name in tried}
        best = min((name for name in tried if steady[name]), key=lambda name: steady[name], default="gpu-pack")
        expected_s = 60 + (steady.get(best) or 3) * self.options.layers
        if self.left_s() > expected_s:
            self.gptq(best, merged, "full-")
            quantized = {"output": str(self.work / f"full-{best}"), "vocab": shape(name).vocab}
            for kernel in OPENED:
                self.task("open", f"open-{kernel}", quantized | {"kernel": kernel}, cores=2)
            self.task("check", "check", quantized | {"model": str(merged)})
        else:
            print(f"no time for all layers: {expected_s:.0f} s expected, {self.left_s():.0f} s left")
        for variant in VARIANTS:
            if variant not in tried:
                self.gptq(variant, self.work / "two")
        nf4 = {"base": str(base), "adapter": str(adapter), "output": str(self.work / "merged-nf4"), "merge_base": "nf4"}
        self.task("merge", "merge-nf4", nf4)
        print(f"{self.left_s():.0f} s left")

    def left_s(self) -> float:
        """Seconds until the deadline."""
        return self.end - time.monotonic()

    def gptq(self, variant: str, model: Path, prefix: str = "gptq-") -> float | None:
        """GPTQ with a variant's settings; returns the seconds a layer takes when it runs steadily."""
        output = self.work / f"{prefix}{variant}"
        job = {"model": str(model), "output": str(output), "variant": variant, "vocab": shape(self.options.name).vocab}
        row = self.task("gptq", f"{prefix}{variant}", job, **{k: VARIANTS[variant].get(k) for k in ("env", "cores")})
        return row and row.get("layer_s")

    def task(
        self, task: str, name: str, job: dict, limit: bool = True, env: dict | None = None, cores: int | None = None
    ):
        """Run one task in a process and append its row; None when there was no time, or it failed."""
        if self.left_s() < 20:
            print(f"no time for {name}")
            return None
        start = time.monotonic()
        job |= {"limit": self.limit if limit else "none", "cores": cores}
        log = self.work / f"log-{name}.txt"
        process = tasks.start(__file__, task, job, log, env)
        result = tasks.finish(process, self.left_s() - 5)
        with (self.output / "merge_quantize_logs.txt").open("a") as stream:
            stream.write(f"==== {name}\n{end_of(log)}\n")
        row = {"task": name, "wall_s": round(time.monotonic() - start, 1)}
        row |= result or {"failed": process.returncode}
        row |= {"limit": job["limit"], "limit_events": t4.events(job["limit"])}
        with (self.output / "merge_quantize.jsonl").open("a") as stream:
            stream.write(json.dumps(row) + "\n")
        print({key: value for key, value in row.items() if key not in ("modules", "layer_times_s")}, flush=True)
        return row if result else None


def end_of(log: Path, keep: int = 30_000) -> str:
    """The end of a log without what was redrawn: GPTQModel draws its bars thousands of times."""
    return re.sub(r"\x1b\[[0-9;]*[A-Za-z]|[^\n]*\r", "", log.read_text(errors="replace"))[-keep:]


# ---- in a task's process ---------------------------------------------------------------------------------------------


def under_limits(task: str, job: dict) -> dict:
    """Do one task under the limits; its row."""
    t4.enter(job["limit"], HOST_BYTES)
    if job["cores"]:
        os.sched_setaffinity(0, set(range(job["cores"])))
    peak = {"anon_gib": 0.0, "rss_gib": 0.0}
    threading.Thread(target=watch, args=(peak,), daemon=True).start()
    import torch

    if task != "make":
        t4.limit()
    row = {"make": make, "merge": run_merge, "gptq": run_gptq, "open": run_open, "check": run_check}[task](job)
    gpu = torch.cuda.is_available()
    for kind in ("allocated", "reserved") if gpu else ():
        row[f"vram_{kind}_gib"] = round(getattr(torch.cuda, f"max_memory_{kind}")() / GIB, 3)
    device = {"device": torch.cuda.get_device_name(0) if gpu else "cpu", "cores": len(os.sched_getaffinity(0))}
    return row | peak | device


def make(job: dict) -> dict:
    """A checkpoint of the shape with random weights, and a random LoRA adapter for it."""
    random_model.make(job["folder"], job["name"], job["layers"], job.get("adapter"))
    return {"layers": job["layers"]}


def watch(peak: dict) -> None:
    """Highest anonymous and resident memory of this process, five times a second."""
    while True:
        rollup = Path("/proc/self/smaps_rollup").read_text()
        for key, field in (("anon_gib", "Anonymous"), ("rss_gib", "Rss")):
            peak[key] = max(peak[key], round(int(re.search(rf"^{field}:\s+(\d+)", rollup, re.M)[1]) / 2**20, 3))
        time.sleep(0.2)


def run_merge(job: dict) -> dict:
    """helpers.merge with its defaults, manifest and checksums included."""
    from helpers.merge import merge

    config = MergeConfig(merge_base=job.get("merge_base", "original"))
    start = time.monotonic()
    figures = merge(job["base"], Path(job["adapter"]), Path(job["output"]), config)
    return {"seconds": round(time.monotonic() - start, 1)} | figures


def run_gptq(job: dict) -> dict:
    """helpers.quantize's own task on random tokens, with the seconds a layer takes when it runs steadily."""
    import torch

    from helpers.quantize import gptq

    generator = torch.Generator().manual_seed(0)
    rows = torch.randint(300, job["vocab"], (SAMPLES, TOKENS), generator=generator).tolist()
    variant, modules, result, start = VARIANTS[job["variant"]], [], {}, time.monotonic()

    def report(message: dict) -> None:
        if "module" in message:
            modules.append(message | {"at_s": round(time.monotonic() - start, 2)})
        else:
            result.update(message)

    shutil.rmtree(job["output"], ignore_errors=True)
    Path(job["output"]).mkdir(parents=True)
    settings = asdict(QuantizeConfig(calibration_samples=SAMPLES, calibration_tokens=TOKENS))
    library = {"pack_impl": "cpu"} | variant.get("library", {})
    gptq.make(job | {"config": settings, "rows": rows}, report, variant["batch_tokens"], **library)
    seconds = time.monotonic() - start
    ends = [
        max(module["at_s"] for module in modules if module["layer"] == layer)
        for layer in sorted({module["layer"] for module in modules})
    ]
    size = sum(file.stat().st_size for file in Path(job["output"]).glob("*.safetensors"))
    return result | {
        "seconds": round(seconds, 1),
        "layer_s": round((ends[-1] - ends[0]) / (len(ends) - 1), 2),
        "layer_times_s": ends,
        "samples": SAMPLES,
        "tokens": TOKENS,
        "size_gib": round(size / GIB, 3),
    }


def run_open(job: dict) -> dict:
    """Open the quantized model with one of GPTQModel's kernels: seconds, perplexity on random tokens, tokens/s."""
    import torch
    from transformers import AutoModelForCausalLM

    from helpers.inference import read_config
    from helpers.models.gptq_kernels import gptq_kernel
    from helpers.quantize.check import perplexity

    rows, start = random_rows(4, job["vocab"]), time.monotonic()
    settings = read_config(job["output"])["quantization_config"]
    kernel = gptq_kernel(settings, torch.float16, kernels=(job["kernel"],))
    model = AutoModelForCausalLM.from_pretrained(job["output"], dtype=torch.float16, device_map="cuda", **kernel)
    result = {"kernel": job["kernel"], "open_s": round(time.monotonic() - start, 1)}
    result |= {"perplexity": perplexity(model, rows)}
    ids, took = torch.tensor([rows[0][:128]], device="cuda"), []
    for new in (1, NEW_TOKENS, NEW_TOKENS):  # the first two compile and try variants
        start = time.monotonic()
        lengths = {"max_new_tokens": new, "min_new_tokens": new}
        model.generate(ids, attention_mask=torch.ones_like(ids), do_sample=False, **lengths)
        torch.cuda.synchronize()
        took.append(time.monotonic() - start)
    return result | {"first_token_s": round(took[0], 2), "tokens_per_s": round(NEW_TOKENS / took[2], 1)}


def random_rows(count: int, vocab: int) -> list[list[int]]:
    """Rows of TOKENS random tokens."""
    import torch

    return torch.randint(300, vocab, (count, TOKENS), generator=torch.Generator().manual_seed(1)).tolist()


def run_check(job: dict) -> dict:
    """Open the merged model in less VRAM than it needs; perplexity on random tokens, beside the quantized one's."""
    from helpers import hardware
    from helpers.quantize.check import opened, perplexity

    start = time.monotonic()
    model = opened(Path(job["model"]), hardware.machine("t4")).model
    result = {"open_s": round(time.monotonic() - start, 1)}
    result |= {"perplexity": perplexity(model, random_rows(4, job["vocab"]))}
    return result | {"seconds": round(time.monotonic() - start, 1)}


if __name__ == "__main__":
    main()
