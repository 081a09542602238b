"""Merge and GPTQ of Mistral 7B's shape (random weights) on a GPU held to a T4's memory: time, VRAM, host memory.

Every task runs in a process of its own, with the allocator capped at 14.42 GiB and, where the system lets us, a hard
limit of 12 GiB on its host memory. First GPTQ of two layers with each variant of settings, then all 32 layers with the
fastest; the result is opened with each of GPTQModel's kernels on two cores. A row a task is appended to
merge_quantize.jsonl as soon as it is known; --rows puts such a file's rows into merge_quantize.csv, a task's newest.

    python tests/benchmarks/bench_merge_quantize.py --work /tmp/bench --output OUT --deadline-s 540
    python tests/benchmarks/bench_merge_quantize.py --rows OUT/merge_quantize.jsonl
"""

import argparse
import csv
import json
import os
import re
import resource
import shutil
import subprocess
import sys
import threading
import time
from contextlib import suppress
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))

from helpers.config import MergeConfig, QuantizeConfig  # noqa: E402
from helpers.models import ModelShape, shape  # noqa: E402

GIB = 2**30
VRAM_GIB = 14.42
HOST_GIB = 12
SAMPLES, TOKENS = 128, 512
LIMITS = (
    ("cgroup", Path("/sys/fs/cgroup/recipes-bench"), "memory.max"),
    ("cgroup-v1", Path("/sys/fs/cgroup/memory/recipes-bench"), "memory.limit_in_bytes"),
)
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
    parser.add_argument("--rows", type=Path, help="measure nothing: this file's rows into merge_quantize.csv")
    parser.add_argument("--deadline-s", type=float, default=540)
    parser.add_argument("--layers", type=int, default=32, help="of the full model; fewer to try the script")
    parser.add_argument("--name", default="mistral-7b-v0.3", help="the model whose shape it has")
    parser.add_argument("--candidates", nargs="*", choices=VARIANTS, default=CANDIDATES, help="tried on two layers")
    parser.add_argument("--task", help="internal: one task, its job as JSON on standard input")
    options = parser.parse_args()
    if options.rows:
        keep_rows(options.rows)
        return
    if options.task:
        child(options.task, json.loads(sys.stdin.read()))
        return
    Bench(options).run()


def keep_rows(source: Path) -> None:
    """The file's rows into merge_quantize.csv; a task measured again takes the place of the earlier row."""
    path = Path(__file__).with_name("merge_quantize.csv")
    with path.open(encoding="utf-8", newline="") as stream:
        reader = csv.DictReader(stream)
        columns, latest = list(reader.fieldnames or ()), {row["task"]: row for row in reader}
    for line in source.read_text(encoding="utf-8").splitlines():
        row = json.loads(line)
        row |= {"layer_times_s": " ".join(map(str, row["layer_times_s"]))} if "layer_times_s" in row else {}
        row |= {"oom_kill": row.get("limit_events", {}).get("oom_kill", "")}
        latest[row["task"]] = row
        columns += [name for name in row if name not in (*columns, "limit_events", "modules")]
    with path.open("w", encoding="utf-8", newline="") as stream:
        table = csv.DictWriter(stream, columns, extrasaction="ignore", lineterminator="\n")
        table.writeheader()
        table.writerows(latest.values())


class Bench:
    """Work folder, output and deadline of one call."""

    def __init__(self, options: argparse.Namespace) -> None:
        self.work, self.output, self.options = options.work, options.output, options
        self.end = time.monotonic() + options.deadline_s
        self.work.mkdir(parents=True, exist_ok=True)
        self.output.mkdir(parents=True, exist_ok=True)
        self.limit = make_limit()

    def run(self) -> None:
        """Everything, most important first."""
        name = self.options.name
        base, adapter, merged = self.work / "base", self.work / "finetune" / "adapter", self.work / "merged"
        self.task(
            "make",
            "make",
            {"name": name, "folder": str(base), "adapter": str(adapter), "layers": self.options.layers},
            limit=False,
        )
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
        with log.open("w") as stream:
            process = subprocess.Popen(
                [sys.executable, __file__, "--work", str(self.work), "--task", task],
                stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=stream, text=True,
                env=os.environ | {"GPTQMODEL_CPU_WORKERS": "2", "HF_HUB_OFFLINE": "1"} | (env or {}), cwd=self.work,
            )  # fmt: skip
            try:
                out, _ = process.communicate(json.dumps(job), timeout=self.left_s() - 5)
            except subprocess.TimeoutExpired:
                process.kill()
                out, _ = process.communicate()
        with (self.output / "merge_quantize_logs.txt").open("a") as stream:
            stream.write(f"==== {name}\n{end_of(log)}\n")
        result = json.loads(out.splitlines()[-1]) if process.returncode == 0 else {"failed": process.returncode}
        row = (
            {"task": name, "wall_s": round(time.monotonic() - start, 1)}
            | result
            | {"limit": job["limit"]}
            | pressure(job["limit"])
        )
        with (self.output / "merge_quantize.jsonl").open("a") as stream:
            stream.write(json.dumps(row) + "\n")
        print({key: value for key, value in row.items() if key not in ("modules", "layer_times_s")}, flush=True)
        return row if process.returncode == 0 else None


def end_of(log: Path, keep: int = 30_000) -> str:
    """The end of a log without what was redrawn: GPTQModel draws its bars thousands of times."""
    return re.sub(r"\x1b\[[0-9;]*[A-Za-z]|[^\n]*\r", "", log.read_text(errors="replace"))[-keep:]


# ---- a hard limit on host memory -------------------------------------------------------------------------------------


def make_limit() -> str:
    """What can hold a process to HOST_GIB here: a cgroup, which counts everything, else RLIMIT_DATA."""
    for kind, folder, file in LIMITS:
        with suppress(OSError):
            if kind == "cgroup" and (folder.parent / "cgroup.subtree_control").exists():
                (folder.parent / "cgroup.subtree_control").write_text("+memory")
            folder.mkdir(exist_ok=True)
            if (folder / file).exists() and (folder / "cgroup.procs").exists():
                (folder / file).write_text(str(HOST_GIB * GIB))
                return kind
            folder.rmdir()
    return "rlimit-data"


def enter_limit(kind: str) -> None:
    """Put this process under the limit."""
    folders = {name: folder for name, folder, _ in LIMITS}
    if kind in folders:
        (folders[kind] / "cgroup.procs").write_text(str(os.getpid()))
    elif kind == "rlimit-data":
        resource.setrlimit(resource.RLIMIT_DATA, (HOST_GIB * GIB, HOST_GIB * GIB))


def pressure(kind: str) -> dict:
    """What the limit did so far: `max` and failcnt count file cache taken back, `oom_kill` processes killed."""
    if kind == "cgroup":
        events = (LIMITS[0][1] / "memory.events").read_text()
        return {"limit_events": dict(line.split() for line in events.splitlines())}
    if kind == "cgroup-v1":
        return {"limit_events": {"failcnt": (LIMITS[1][1] / "memory.failcnt").read_text().strip()}}
    return {}


# ---- in a task's process ---------------------------------------------------------------------------------------------


def child(task: str, job: dict) -> None:
    """Do one task under the limits and print its row as the last line of standard output."""
    out = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    enter_limit(job["limit"])
    if job["cores"]:
        os.sched_setaffinity(0, set(range(job["cores"])))
    peak = {"anon_gib": 0.0, "rss_gib": 0.0}
    threading.Thread(target=watch, args=(peak,), daemon=True).start()
    import torch

    gpu = torch.cuda.is_available()
    if gpu and task != "make":
        torch.cuda.set_per_process_memory_fraction(VRAM_GIB * GIB / torch.cuda.get_device_properties(0).total_memory)
    row = {"make": make, "merge": run_merge, "gptq": run_gptq, "open": run_open, "check": run_check}[task](job)
    memory = (
        {
            f"vram_{kind}_gib": round(getattr(torch.cuda, f"max_memory_{kind}")() / GIB, 3)
            for kind in ("allocated", "reserved")
        }
        if gpu
        else {}
    )
    device = {"device": torch.cuda.get_device_name(0) if gpu else "cpu", "cores": len(os.sched_getaffinity(0))}
    out.write("\n" + json.dumps(row | peak | memory | device) + "\n")
    out.flush()
    os._exit(0)


def watch(peak: dict) -> None:
    """Highest anonymous and resident memory of this process, five times a second."""
    while True:
        rollup = Path("/proc/self/smaps_rollup").read_text()
        for key, field in (("anon_gib", "Anonymous"), ("rss_gib", "Rss")):
            peak[key] = max(peak[key], round(int(re.search(rf"^{field}:\s+(\d+)", rollup, re.M)[1]) / 2**20, 3))
        time.sleep(0.2)


def make(job: dict) -> dict:
    """A checkpoint of the shape with random weights, and a random LoRA adapter for it."""
    import torch
    from safetensors.torch import save_file
    from transformers import MistralConfig

    from helpers.models.stored import SafetensorsWriter

    sizes, folder = shape(job["name"]), Path(job["folder"])
    torch.manual_seed(0)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    MistralConfig(
        vocab_size=sizes.vocab, hidden_size=sizes.hidden, intermediate_size=sizes.intermediate,
        num_hidden_layers=job["layers"], num_attention_heads=sizes.heads, num_key_value_heads=sizes.kv_heads,
        head_dim=sizes.head_dim, max_position_embeddings=sizes.max_context, sliding_window=None, rms_norm_eps=1e-5,
        rope_theta=1e6, bos_token_id=1, eos_token_id=2, dtype="float16", architectures=["MistralForCausalLM"],
    ).save_pretrained(folder)  # fmt: skip
    make_tokenizer(folder, sizes.vocab)
    groups = [{"model.embed_tokens.weight": (sizes.vocab, sizes.hidden)}]
    groups += [layer_tensors(sizes, layer) for layer in range(job["layers"])]
    groups += [{"model.norm.weight": (sizes.hidden,), "lm_head.weight": (sizes.vocab, sizes.hidden)}]
    place = {}
    for number, group in enumerate(groups, 1):
        name = f"model-{number:05}-of-{len(groups):05}.safetensors"
        with SafetensorsWriter(folder / name, group) as writer:
            for tensor, size in group.items():
                value = torch.ones(size) if len(size) == 1 else torch.randn(size, device=device).mul_(0.02)
                writer.add(value.half().cpu())
                place[tensor] = name
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": place}))
    if "adapter" in job:
        adapter = Path(job["adapter"])
        adapter.mkdir(parents=True)
        factors = {}
        for layer in range(job["layers"]):
            for tensor, (outputs, inputs) in (
                item for item in layer_tensors(sizes, layer).items() if len(item[1]) == 2
            ):
                module = "base_model.model." + tensor.removesuffix(".weight")
                factors[f"{module}.lora_A.weight"] = torch.randn(16, inputs) * 0.02
                factors[f"{module}.lora_B.weight"] = torch.randn(outputs, 16) * 0.005
        save_file(factors, adapter / "adapter_model.safetensors", metadata={"format": "pt"})
        settings = {"peft_type": "LORA", "r": 16, "lora_alpha": 32, "base_model_name_or_path": str(folder)}
        (adapter / "adapter_config.json").write_text(json.dumps(settings))
    return {"layers": job["layers"]}


def layer_tensors(sizes: ModelShape, layer: int) -> dict[str, tuple[int, ...]]:
    """Tensor -> shape of one decoder layer, as Mistral names them."""
    tensors: dict[str, tuple[int, ...]] = {}
    for name, (inputs, outputs) in sizes.linears.items():
        block = "self_attn" if name in ("q_proj", "k_proj", "v_proj", "o_proj") else "mlp"
        tensors[f"model.layers.{layer}.{block}.{name}.weight"] = (outputs, inputs)
    for norm in ("input_layernorm", "post_attention_layernorm"):
        tensors[f"model.layers.{layer}.{norm}.weight"] = (sizes.hidden,)
    return tensors


def make_tokenizer(folder: Path, vocab_size: int) -> None:
    """A tokenizer of single bytes and made-up words: it is never asked for more than its ids."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    names = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256))]
    names += [f"▁w{number}" for number in range(vocab_size - len(names))]
    bpe = models.BPE(vocab={name: i for i, name in enumerate(names)}, merges=[], unk_token="<unk>", byte_fallback=True)
    tokenizer = Tokenizer(bpe)
    tokenizer.pre_tokenizer, tokenizer.decoder = pre_tokenizers.Metaspace(), decoders.Metaspace()
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>", unk_token="<unk>", pad_token="<unk>"
    ).save_pretrained(folder)


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
    from dataclasses import asdict

    settings = QuantizeConfig(calibration_samples=SAMPLES, calibration_tokens=TOKENS)
    gptq.make(
        job | {"config": asdict(settings), "rows": rows},
        report,
        variant["batch_tokens"],
        **{"pack_impl": "cpu"} | variant.get("library", {}),
    )
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
    result = {
        "kernel": job["kernel"],
        "open_s": round(time.monotonic() - start, 1),
        "perplexity": perplexity(model, rows),
    }
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
    from helpers.quantize.check import open_model, perplexity

    start = time.monotonic()
    model = open_model(Path(job["model"]), Path(job["output"]) / "offload", gpu_gib=VRAM_GIB)
    result = {
        "open_s": round(time.monotonic() - start, 1),
        "perplexity": perplexity(model, random_rows(4, job["vocab"])),
    }
    return result | {"seconds": round(time.monotonic() - start, 1)}


if __name__ == "__main__":
    main()
