"""Ours, the baseline recipe and Unsloth side by side on a GPU held to a T4's envelope; and ours against plain PEFT.

    python tests/benchmarks/bench_finetune.py all OUT_DIR [--seconds 590] [--only check,ours-2048,…]   # PROCESSES
    python tests/benchmarks/bench_finetune.py plan OUT_DIR [--seconds 240]                             # POINTS alone
    python tests/benchmarks/bench_finetune.py ENGINE MODEL OUT.jsonl ROW…                              # one process

ENGINE is ours, planned (ours, as helpers.budget plans it for a T4), baseline, unsloth, check (losses against plain
PEFT's) or kernels (dequantization beside bitsandbytes'). A ROW is words as name=value: seq, batch, and for ours any
setting of helpers.config.RunConfig. Each process is held to a T4 by t4.limit; the weights are random. A row's figures:
median seconds of a step by the clock (5 after 3), the summed time of the GPU's kernels in a step (profiler, 2 more
steps; without copies to and from the host, which run beside them), and the allocator's peak. keep.py puts them into
the CSVs.
"""

import argparse
import gc
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path

import random_model
import t4
from t4 import GIB

WARM, TIMED, PROFILED = 3, 5, 2
PACKAGES = ("torch", "triton", "transformers", "peft", "trl", "bitsandbytes", "liger-kernel")

LEAN = "checkpointing=all keep_attention=False offload_activations=True"
KEPT = "checkpointing=all offload_activations=True"
PLAN_STEPS = 3
POINTS = [
    f"seq={seq} batch={batch} steps={PLAN_STEPS}"
    for seq, batches in {
        16384: (1,),
        12288: (1,),
        8192: (1, 2),
        4096: (1, 4),
        2048: (1, 2, 4, 8),
        1024: (1, 2, 8),
        512: (1, 4, 16),
        256: (1, 4, 16, 64),
    }.items()
    for batch in batches
]
# Name -> (engine, its rows), in order of importance; each is a process.
PROCESSES = {
    "kernels": ("kernels", []),
    "check": ("check", []),
    "ours-2048": (
        "ours",
        [f"seq={seq} batch={2048 // seq} checkpointing=none" for seq in (2048, 1024, 512)],
    ),
    "unsloth-1x2048": ("unsloth", ["seq=2048 batch=1"]),
    "ours-more": ("ours", ["seq=2048 batch=4 checkpointing=26", f"seq=16384 batch=1 {KEPT}"]),
    "unsloth-4x2048": ("unsloth", ["seq=2048 batch=4"]),
    "unsloth-1x16384": ("unsloth", ["seq=16384 batch=1"]),
    "baseline": ("baseline", ["seq=2048 batch=1", "seq=512 batch=4"]),
    "ours-lean": ("ours", [f"seq={seq} batch={batch} {LEAN}" for seq, batch in ((2048, 1), (2048, 4), (16384, 1))]),
    "ours-longest": ("ours", [f"seq=40960 batch=1 {LEAN} steps=2"]),
    "unsloth-2x1024": ("unsloth", ["seq=1024 batch=2"]),
    "ours-8x1024": ("ours", ["seq=1024 batch=8 checkpointing=26"]),
    "plan": ("planned", POINTS),
}


def main() -> None:
    """Run everything, or one engine's rows."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("what", choices=("all", "plan", *ENGINES))
    parser.add_argument("arguments", nargs="+", help="OUT_DIR of all and plan; MODEL OUT.jsonl ROW… of an engine")
    parser.add_argument("--models", type=Path, default=Path("/tmp/models"), help="where random models are made")
    parser.add_argument("--seconds", type=float, default=590, help="until the last process is stopped")
    parser.add_argument("--only", default=",".join(PROCESSES), help="processes of all")
    options = parser.parse_args()
    if options.what in ENGINES:
        model, out, *rows = options.arguments
        parsed = [dict(word.split("=", 1) for word in row.split()) for row in rows]
        ENGINES[options.what](options.what, Path(model), Path(out), parsed)
        return
    names = ["plan"] if options.what == "plan" else options.only.split(",")
    run_all(Path(options.arguments[0]), options.models, options.seconds, names)


def run_all(out: Path, models: Path, seconds: float, names: list[str]) -> None:
    """One process after the other until the time is up; OUT/finetune.jsonl gets a line a row, OUT/*.log the rest."""
    began = time.monotonic()
    out.mkdir(parents=True, exist_ok=True)
    for name in names:
        engine, rows = PROCESSES[name]
        model, layers = (models / "cut", 2) if engine in ("check", "kernels") else (models / "7b", 32)
        if not (model / "tokenizer.json").is_file():
            subprocess.run([sys.executable, random_model.__file__, str(model), "--layers", str(layers)], check=True)
            print(f"{model.name} made after {time.monotonic() - began:.0f} s", flush=True)
        left = seconds - (time.monotonic() - began)
        if left < 20:
            print(f"left out: {name}", flush=True)
            continue
        command = [sys.executable, __file__, engine, str(model), str(out / "finetune.jsonl"), *rows]
        with (out / f"{name}.log").open("w") as log:
            try:
                done = subprocess.run(command, stdout=subprocess.PIPE, stderr=log, text=True, timeout=left)
                log.write(done.stdout)
                shown = [line for line in done.stdout.splitlines() if line.startswith("{")]
                print("\n".join(shown) or f"{name}: exit {done.returncode}, see {log.name}", flush=True)
            except subprocess.TimeoutExpired:
                print(f"{name}: out of time; its finished rows are in finetune.jsonl", flush=True)
        print(f"  -- {name} until {time.monotonic() - began:.0f} s", flush=True)


def clock_callback(steps: int):
    """A trainer callback that times steps, then reads the peak, then profiles two steps more."""
    import torch
    from transformers import TrainerCallback

    class Clock(TrainerCallback):
        def __init__(self):
            self.seconds, self.peak, self.profiler, self.busy_s, self.kernels = [], {}, None, None, {}

        def on_step_begin(self, args, state, control, **kwargs):
            if state.global_step == steps and torch.cuda.is_available():
                self.peak = peak()
                self.profiler = torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA])
                self.profiler.__enter__()
            synchronize()
            self.began = time.perf_counter()

        def on_step_end(self, args, state, control, **kwargs):
            synchronize()
            self.seconds.append(time.perf_counter() - self.began)

        def on_train_end(self, args, state, control, **kwargs):
            if self.profiler is None:
                return
            synchronize()
            self.profiler.__exit__(None, None, None)
            spent = Counter()
            for event in self.profiler.events():
                if event.device_type == torch.autograd.DeviceType.CUDA:
                    spent[event.name] += event.device_time / 1e6 / PROFILED
            copies = sum(value for name, value in spent.items() if name.startswith(("Memcpy HtoD", "Memcpy DtoH")))
            self.busy_s = sum(spent.values()) - copies  # copies to and from the host run beside the kernels
            self.kernels = {name[:70]: round(value, 4) for name, value in spent.most_common(14)}

    return Clock()


def peak() -> dict[str, float]:
    """What the allocator took at most, in GiB."""
    import torch

    sizes = {"allocated": torch.cuda.max_memory_allocated(), "reserved": torch.cuda.max_memory_reserved()}
    return {f"{name}_gib": round(size / GIB, 3) for name, size in sizes.items()}


def synchronize() -> None:
    """Wait for the GPU."""
    import torch

    if torch.cuda.is_available():
        torch.cuda.synchronize()


def figures(clock, row: dict, steps: int, losses: list[float]) -> dict:
    """What a row measured."""
    step_s = statistics.median(clock.seconds[min(WARM, steps - 1) : steps])
    tokens = int(row["seq"]) * int(row["batch"])
    busy = (
        {} if clock.busy_s is None else {"busy_s": round(clock.busy_s, 4), "busy_tok_s": round(tokens / clock.busy_s)}
    )
    return {
        "step_s": round(step_s, 4),
        "tok_s": round(tokens / step_s),
        **busy,
        **clock.peak,
        "losses": [round(loss, 3) for loss in losses[-2:]],
        "kernels": clock.kernels,
    }


def emit(out: Path, record: dict) -> None:
    """One line to the file, with date, machine and versions, and to standard output without those and the kernels."""
    about = t4.about(*PACKAGES, *(["unsloth"] if record["engine"] == "unsloth" else []))
    about = {name.replace("-", "_"): value for name, value in about.items()}
    with out.open("a") as stream:
        stream.write(json.dumps(about | record) + "\n")
    shown = {name: value for name, value in record.items() if name != "kernels"}
    print(json.dumps(shown, ensure_ascii=False), flush=True)


def ours(engine: str, model: Path, out: Path, rows: list[dict]) -> None:
    """Rows through helpers.finetune, one load of the base for all of them; planned: as a T4's plan has them."""
    import recipes
    import torch

    finetune = t4.fine_tuning_in_fp16()
    from helpers import budget, hardware
    from helpers.models import profile, shape

    base, machine = None, hardware.machine("t4")
    for row in rows:
        record = {"engine": engine, **row}
        settings = {name: parse(value) for name, value in row.items() if name not in ("seq", "batch", "steps")}
        steps = WARM + TIMED if "steps" not in row else int(row["steps"])
        profiled = PROFILED if "steps" not in row else 0
        config = profile(
            "mistral-7b",
            model=str(model),
            seq_len=int(row["seq"]),
            batch_size=int(row["batch"]),
            accumulation=1,
            alpha=16,
            max_steps=steps + profiled,
            **settings,
        )
        if engine == "planned":
            plan = budget.plan(config, shape(str(model)), machine)
            config, expected = plan.config, plan.budget
            record |= {
                "planned": in_words(config.train),
                "predicted_allocated_gib": round(expected.vram.allocated_gib, 3),
                "predicted_reserved_gib": round(expected.vram.reserved_gib, 3),
                "predicted_tok_s": round(int(row["seq"]) * int(row["batch"]) / expected.time.step_s),
            }
        trainer = None
        try:
            if base is None:
                base, tokenizer = finetune.load_base(config)
                base.config.max_position_embeddings = 10**6  # the memory of a long context does not depend on it
            clock, sequences = clock_callback(steps), (steps + profiled) * int(row["batch"])
            trainer = recipes.own_trainer(base, tokenizer, config, [clock], sequences, Path(tempfile.mkdtemp()))
            adapted = trainer.model
            if torch.cuda.is_available():
                torch.cuda.reset_peak_memory_stats()
                record["ready_gib"] = round(torch.cuda.memory_allocated() / GIB, 3)
            trainer.train()
            if not clock.peak and torch.cuda.is_available():
                clock.peak = peak()
            losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
            record |= {"layers": trainer.layers_reason, "applied": trainer.watch.applied}
            record |= figures(clock, row, steps, losses)
            if engine == "planned" and "reserved_gib" in record:
                record["card_share"] = round(record["reserved_gib"] / t4.ALLOCATOR_GIB, 3)
            base = adapted.unload()
        except Exception as error:
            record["error"] = f"{type(error).__name__}: {str(error)[:300]}"
            if "out of memory" not in str(error):
                import traceback

                traceback.print_exc()
            base = None
        emit(out, record)
        trainer = adapted = None
        if base is not None and hasattr(base, "peft_config"):
            del base.peft_config
        gc.collect()
        if torch.cuda.is_available():
            torch.cuda.empty_cache()


def in_words(train) -> str:
    """How a configuration computes a step: micro-batches, checkpointed layers, and where their inputs lie."""
    words = [f"{train.batch_size} × {train.accumulation}", f"{train.checkpointing} layers are checkpointed"]
    words += ["attention recomputed"] if train.checkpointing and not train.keep_attention else []
    return ", ".join(words + (["offloaded"] if train.offload_activations else []))


def parse(value: str):
    """A setting's value from its word."""
    try:
        return json.loads(value.lower() if value in ("True", "False") else value)
    except json.JSONDecodeError:
        return value


def rival(engine: str, model: Path, out: Path, rows: list[dict]) -> None:
    """Unsloth by its own documentation, or the guides' recipe: prepare_model_for_kbit_training and SFTTrainer."""
    os.environ["UNSLOTH_DISABLE_STATISTICS"] = "1"
    if engine == "unsloth":
        from unsloth import FastLanguageModel
    import recipes
    import torch
    from datasets import Dataset

    t4.limit()
    for words in rows:
        row, steps = recipes.baseline(int(words["batch"]), int(words["seq"])), WARM + TIMED
        record = {"engine": engine, **words}
        try:
            if engine == "unsloth":
                base, tokenizer = FastLanguageModel.from_pretrained(
                    str(model), max_seq_length=row.seq, dtype=torch.float16, load_in_4bit=True
                )
                adapted = FastLanguageModel.get_peft_model(
                    base, r=16, target_modules=recipes.ALL_LINEAR, lora_alpha=16, lora_dropout=0, bias="none",
                    use_gradient_checkpointing="unsloth", random_state=0,
                )  # fmt: skip
            else:
                base, tokenizer = recipes.load(model, row)
                adapted = recipes.adapt(base, row)
            generator = torch.Generator().manual_seed(0)
            ids = torch.randint(300, 32000, (row.batch * (steps + PROFILED), row.seq), generator=generator).tolist()
            columns = {"input_ids": ids}
            if engine == "unsloth":
                columns["attention_mask"] = [[1] * row.seq] * len(ids)
            clock = clock_callback(steps)
            scratch = Path(tempfile.mkdtemp())
            trainer = recipes.trainer(
                adapted, tokenizer, row, Dataset.from_dict(columns), [clock], steps + PROFILED, scratch,
                in_fp32=engine == "baseline",
            )  # fmt: skip
            torch.cuda.reset_peak_memory_stats()
            trainer.train()
            losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
            record |= figures(clock, words, steps, losses)
        except Exception as error:
            record["error"] = f"{type(error).__name__}: {str(error)[:300]}"
        emit(out, record)
        trainer = adapted = base = None
        gc.collect()
        torch.cuda.empty_cache()


def check(engine: str, model: Path, out: Path, rows: list[dict]) -> None:
    """20 steps of a 2-layer cut in fp16: our layers against transformers', whatever is saved, offloaded and packed.

    rows: [{"only": names of variants}], or none for all of them.
    """
    import torch

    finetune = t4.fine_tuning_in_fp16()
    from helpers.models import profile

    lengths = {"seq": 256, "batch": 4}
    prepared = random_model.write_prepared(Path(tempfile.mkdtemp()), model, 80, lengths["seq"], distinct=8)
    variants = {
        "plain": {"kernels": "plain", "loss": "full"},
        "everything kept": {"checkpointing": "none"},
        "attention kept": {"checkpointing": "all"},
        "nothing kept": {"checkpointing": "all", "keep_attention": False},
        "offloaded": {"checkpointing": "all", "keep_attention": False, "offload_activations": True},
        "offloaded, attention kept": {"checkpointing": "all", "offload_activations": True},
        "packed": {"packing": True, "seq_len": 1024, "batch_size": 1},
        "full loss": {"loss": "full"},
        "flash": {"flash": True},
        "flash, packed": {"flash": True, "packing": True, "seq_len": 1024, "batch_size": 1},
        "plain, window": {"kernels": "plain", "window": 100},
        "window": {"window": 100},
        "packed, window": {"window": 100, "packing": True, "seq_len": 1024, "batch_size": 1},
        "flash, window": {"flash": True, "window": 100},
        "flash, packed, window": {"flash": True, "window": 100, "packing": True, "seq_len": 1024, "batch_size": 1},
    }
    if rows:
        variants = {name: values for name, values in variants.items() if name in rows[0]["only"]}
    known: dict[str, list[float]] = {}
    for name, values in variants.items():
        record = {"engine": engine, "variant": name}
        try:
            window = values.pop("window", None)
            torch.backends.cuda.enable_flash_sdp(values.pop("flash", False))
            settings = {"seq_len": lengths["seq"], "batch_size": lengths["batch"], **values}
            config = profile(
                "mistral-7b", model=str(model), accumulation=1, learning_rate=1e-3, optimizer="adamw_torch", **settings
            )
            base, tokenizer = finetune.load_base(config)
            base.config.sliding_window = window
            folder = Path(tempfile.mkdtemp())
            trainer = finetune.build_trainer(
                config, finetune.attach_adapter(base, config), tokenizer, prepared, folder / "checkpoints"
            )
            trainer.args.set_save(strategy="no")
            began = time.perf_counter()
            trainer.train()
            losses = known[name] = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
            reference = known["plain, window" if window else "plain"]
            record |= {"layers": trainer.layers_reason, "steps": len(losses), "first": losses[0], "last": losses[-1]}
            record["worst_difference"] = max(abs(a - b) for a, b in zip(losses, reference, strict=True))
            record["seconds"] = round(time.perf_counter() - began, 2)
        except Exception as error:
            import traceback

            traceback.print_exc()
            record["error"] = f"{type(error).__name__}: {str(error)[:300]}"
        emit(out, record)
        trainer = base = None
        gc.collect()
        if torch.cuda.is_available():
            torch.cuda.empty_cache()


def kernels(engine: str, model: Path, out: Path, rows: list[dict]) -> None:
    """Dequantization of the 7B shape's matrices: ours and bitsandbytes', milliseconds (median of 50) and equality."""
    import torch
    from bitsandbytes.functional import dequantize_4bit, quantize_4bit

    from helpers.finetune.engine.kernels import dequantize

    def milliseconds(call) -> float:
        times = []
        for _ in range(55):
            began, ended = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            began.record()
            call()
            ended.record()
            ended.synchronize()
            times.append(began.elapsed_time(ended))
        return round(statistics.median(times[5:]), 4)

    for outputs, inputs in ((4096, 4096), (1024, 4096), (14336, 4096)):
        dense = torch.randn(outputs, inputs, dtype=torch.float16, device="cuda") / 64
        packed, state = quantize_4bit(dense, quant_type="nf4", compress_statistics=True)
        ours, theirs = dequantize(packed, state, torch.float16), dequantize_4bit(packed, state)
        record = {"engine": engine, "matrix": f"{outputs}×{inputs}", "different": int((ours != theirs).sum())}
        record["ours_ms"] = milliseconds(lambda: dequantize(packed, state, torch.float16))  # noqa: B023
        record["bitsandbytes_ms"] = milliseconds(lambda: dequantize_4bit(packed, state))  # noqa: B023
        emit(out, record)


ENGINES = {"ours": ours, "planned": ours, "baseline": rival, "unsloth": rival, "check": check, "kernels": kernels}

if __name__ == "__main__":
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    os.environ.setdefault("PYTORCH_CUDA_ALLOC_CONF", "expandable_segments:True")
    main()
