"""How fast Mistral 7B's shape answers in 16 bits, in NF4 and in GPTQ with each kernel: GPU time a token, and the clock.

The weights are random; the GPTQ folder is written as such, code by code, which takes seconds where quantizing takes
minutes. ExLlamaV2's kernel is built on two cores into an empty cache, and opened in another process with another empty
cache from the folder that stands for Drive. A row a model: milliseconds of the GPU's kernels for a decoding step at
batch 1 and 8 (profiler), tokens a second by the clock, peak memory; for GPTQ also how far one matrix product is from
fp32's (relative, Frobenius; MATRIX_BOUND), and the logits from those of PyTorch's operators (LOGITS_BOUND, for one
token and for 512).

    python tests/benchmarks/bench_decode.py --work /tmp/decode --output OUT      one GPU with nvcc, under 4 minutes
    python tests/benchmarks/bench_decode.py --work /tmp/toy --output OUT --toy   the script on a CPU, a minute
"""

import argparse
import csv
import os
import resource
import subprocess
import time
from functools import partial
from pathlib import Path

import random_model
import tasks
from t4 import GIB, ROOT

TINY = ROOT / "data" / "tiny-mistral"
MATRIX_BOUND, LOGITS_BOUND = 0.01, 0.05
KERNELS = ("gptq_exllama_v2", "gptq_triton", "gptq_torch")
COLUMNS = (
    "model", "device", "torch", "gptqmodel", "gpu_ms_per_token", "gpu_ms_per_step_batch_8", "tokens_per_s",
    "tokens_per_s_batch_8", "first_token_s", "peak_allocated_gib", "peak_reserved_gib", "ready_s", "build_s",
    "compiler_peak_gib", "library_mib", "load_s", "matrix_error_1", "matrix_error_512", "logits_error_1",
    "logits_error_512", "same_choice_512", "within_bounds", "failed",
)  # fmt: skip


def main() -> None:
    """Make the folder, run each task in a process of its own, and write the rows."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--work", type=Path, default=Path("/tmp/decode"))
    parser.add_argument("--output", type=Path, default=Path("/tmp/decode"))
    parser.add_argument("--layers", type=int, default=32, help="fewer to try the script")
    parser.add_argument("--toy", action="store_true", help="a small shape, PyTorch's operators only")
    parser.add_argument("--limit-s", type=float, default=150, help="of one task")
    parser.add_argument("--task", help="internal: one task, its job as JSON on standard input")
    options = parser.parse_args()
    if options.task:
        tasks.answer(partial(rows_of, options.task))
    options.work = options.work.resolve()
    for folder in (options.work, options.output, options.work / "drive"):
        folder.mkdir(parents=True, exist_ok=True)
    shape = {"name": str(TINY), "layers": 2} if options.toy else {"name": random_model.SHAPE, "layers": options.layers}
    job = {"work": str(options.work), "shape": shape}
    begun = time.monotonic()
    building = None if options.toy else start("build", job, options.work, cache="first")  # beside the next: 2 cores
    rows = finish(start("dense", job, options.work), options.limit_s)
    built = [] if building is None else finish(building, options.limit_s)
    print(built, flush=True)
    for kernel in ("gptq_torch",) if options.toy else KERNELS:
        rows += finish(start("gptq", job | {"kernel": kernel}, options.work, cache="second"), options.limit_s)
    compare(rows, options.work)
    for row in rows:
        row |= {k: v for one in built for k, v in one.items() if "exllama" in row.get("model", "") and k not in row}
    with (options.output / "decode.csv").open("w", encoding="utf-8", newline="") as stream:
        table = csv.DictWriter(stream, COLUMNS, extrasaction="ignore", lineterminator="\n")
        table.writeheader()
        table.writerows(rows)
    print((options.output / "decode.csv").read_text(encoding="utf-8"))
    print(f"{time.monotonic() - begun:.0f} s in all")


def start(task: str, job: dict, work: Path, cache: str = "second") -> subprocess.Popen:
    """A process for one task; its caches are the run's own, and `drive` is its lasting folder."""
    environment = {
        "GPTQMODEL_TORCH_EXTENSIONS_DIR": str(work / "cache" / cache),
        "RECIPES_LASTING": str(work / "drive"),
    }
    name = job.get("kernel", task)
    process = tasks.start(__file__, task, job, work / f"log-{name}.txt", environment)
    process.log, process.name = work / f"log-{name}.txt", name
    return process


def finish(process: subprocess.Popen, limit_s: float) -> list[dict]:
    """A process's rows; one that says why when it failed."""
    rows = tasks.finish(process, limit_s)
    if rows is None:
        print(process.log.read_text(errors="replace")[-3000:])
        return [{"model": process.name, "failed": process.returncode}]
    print(rows, flush=True)
    return rows


# ---- in a task's process ---------------------------------------------------------------------------------------------


def rows_of(task: str, job: dict) -> list[dict]:
    """One task's rows."""
    return [row | about() for row in {"build": build, "dense": dense, "gptq": gptq}[task](job)]


def about() -> dict:
    """Device and versions."""
    import torch

    from helpers.workspace.versions import installed

    return {
        "device": torch.cuda.get_device_name(0) if torch.cuda.is_available() else "cpu",
        "torch": torch.__version__,
        "gptqmodel": installed(("gptqmodel",)).get("gptqmodel"),
    }


def build(job: dict) -> list[dict]:
    """ExLlamaV2's kernel, built on two cores as on a free Colab, and kept in the folder that stands for Drive."""
    os.sched_setaffinity(0, set(sorted(os.sched_getaffinity(0))[-2:]))
    from helpers.models.gptq_kernels import EXTENSION, make_ready

    began = time.monotonic()
    trouble = make_ready(EXTENSION)
    libraries = [*(Path(job["work"]) / "drive").rglob("*.so")]
    return [
        {
            "build_s": round(time.monotonic() - began, 1),
            "compiler_peak_gib": round(resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss / 2**20, 2),
            "library_mib": round(sum(file.stat().st_size for file in libraries) / 2**20, 2),
            **({"failed": trouble} if trouble else {}),
        }
    ]


def dense(job: dict) -> list[dict]:
    """The shape in 16 bits, then the same model's linear layers in NF4; and the GPTQ folder for the other tasks."""
    import torch
    from transformers import AutoModelForCausalLM

    from helpers.models.templates import load_tokenizer

    random_model.make_gptq(Path(job["work"]) / "gptq", **job["shape"])
    device, dtype = ("cuda", torch.float16) if torch.cuda.is_available() else ("cpu", torch.float32)
    torch.manual_seed(0)
    torch.set_default_dtype(dtype)
    with torch.device(device):
        model = AutoModelForCausalLM.from_config(random_model.config_of(**job["shape"]), dtype=dtype).eval()
    torch.set_default_dtype(torch.float32)
    tokenizer = load_tokenizer(str(Path(job["work"]) / "gptq"))
    rows = [{"model": "fp16"} | measured(model, tokenizer, "model")]
    into_nf4(model, dtype)
    return [*rows, {"model": "nf4"} | measured(model, tokenizer, "model")]


def into_nf4(model, dtype) -> None:
    """Each linear layer of the decoder in NF4 with double quantization, as bitsandbytes makes it."""
    import bitsandbytes
    import torch

    for layer in model.model.layers:
        for block in (layer.self_attn, layer.mlp):
            for name, linear in list(block.named_children()):
                if isinstance(linear, torch.nn.Linear):
                    small = bitsandbytes.nn.Linear4bit(
                        linear.in_features, linear.out_features, bias=False, compute_dtype=dtype, quant_type="nf4"
                    )
                    small.weight = bitsandbytes.nn.Params4bit(
                        linear.weight.data, requires_grad=False, quant_type="nf4", module=small
                    ).to(linear.weight.device)
                    setattr(block, name, small)


def gptq(job: dict) -> list[dict]:
    """The GPTQ folder opened with one kernel, as helpers.inference does."""
    import torch
    from transformers import AutoModelForCausalLM

    from helpers import quantize
    from helpers.inference import read_config
    from helpers.models.gptq_kernels import TORCH, gptq_kernel, why_not
    from helpers.models.templates import load_tokenizer

    folder = Path(job["work"]) / "gptq"
    device, dtype = ("cuda", torch.float16) if torch.cuda.is_available() else ("cpu", torch.float32)
    said: list[str] = []
    began = time.monotonic()
    settings = read_config(folder)["quantization_config"]
    trouble = "" if job["kernel"] == TORCH else why_not(job["kernel"], settings, dtype, device, said.append)
    ready_s = time.monotonic() - began
    if trouble or said:  # the kernel is here already: nothing must be built, and nothing said
        return [{"model": job["kernel"], "failed": " ".join([trouble, *said])}]
    chosen = gptq_kernel(settings, dtype, device, kernels=(job["kernel"],))
    began = time.monotonic()
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype, device_map={"": device}, **chosen).eval()
    load_s = time.monotonic() - began
    row = {"model": job["kernel"], "ready_s": round(ready_s, 2), "load_s": round(load_s, 1)}
    row |= measured(model, load_tokenizer(str(folder)), "gptq")
    generator = torch.Generator().manual_seed(1)
    ids = torch.randint(300, 700, (1, 512), generator=generator).to(device)
    module = "model.layers.0.mlp.down_proj"
    weight = quantize.dequantized(folder, module).to(device)  # (out, in), fp32
    inputs = torch.randn((512, weight.shape[1]), generator=generator).to(device, dtype)
    torch.backends.cuda.matmul.allow_tf32 = False
    with torch.inference_mode():
        for count in (1, 512):
            exact = inputs[:count].float() @ weight.T
            found = model.get_submodule(module)(inputs[None, :count])[0].float()
            row[f"matrix_error_{count}"] = round(((found - exact).norm() / exact.norm()).item(), 6)
        read = model(ids[:, :-1], use_cache=True)
        one = model(ids[:, -1:], past_key_values=read.past_key_values).logits
    torch.save({"1": one.float().cpu(), "512": read.logits.float().cpu()}, Path(job["work"]) / f"{job['kernel']}.pt")
    return [row]


def measured(model, tokenizer, kind: str) -> dict:
    """What helpers.evaluate.cost measures, with a step at batch 8, and the allocator's peak over all of it."""
    import torch

    from helpers.evaluate import cost
    from helpers.inference import Loaded

    if torch.cuda.is_available():
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
    loaded = Loaded(model, tokenizer, kind, "", "", "", 0.0)
    found = cost.speed(loaded)
    prompt = int(found["prompt_tokens"])
    found |= {"gpu_ms_per_step_batch_8": cost.gpu_ms_per_token(loaded, prompt, batch=8)}
    if torch.cuda.is_available():
        found |= {
            f"peak_{what}_gib": getattr(torch.cuda, f"max_memory_{what}")() / GIB for what in ("allocated", "reserved")
        }
    return {name: None if value is None else round(value, 3) for name, value in found.items()}


def compare(rows: list[dict], work: Path) -> None:
    """Each kernel's logits beside those of PyTorch's operators; into its row."""
    import torch

    if not (work / "gptq_torch.pt").is_file():
        return
    reference = torch.load(work / "gptq_torch.pt")
    for row in rows:
        path = work / f"{row['model']}.pt"
        if row.get("failed") or not path.is_file():
            continue
        for count, found in torch.load(path).items():
            error = (found - reference[count]).norm() / reference[count].norm()
            row[f"logits_error_{count}"] = round(error.item(), 6)
            if count == "512":
                same = found.argmax(-1) == reference[count].argmax(-1)
                row["same_choice_512"] = round(same.float().mean().item(), 4)
        row["within_bounds"] = all(
            row[f"{what}_error_{count}"] <= bound
            for what, bound in (("matrix", MATRIX_BOUND), ("logits", LOGITS_BOUND))
            for count in (1, 512)
        )


if __name__ == "__main__":
    main()
