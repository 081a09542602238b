"""DPO of the 7B's shape on a GPU held to a T4's envelope: ours beside trl's own DPOTrainer, and the longest pair.

    python tests/benchmarks/bench_preferences.py OUT_DIR [--seconds 235] [--seq 1024] [--shape mistral-7b-v0.3]

Three processes on the same random weights, pairs of 2 × seq tokens, one a step, r = 16 on all linear layers, fp16, no
flash, paged 8-bit AdamW, the same loss (DPO + 1.0 · SFT): ours, as helpers.budget plans it for a T4; trl over
transformers' own layers, all of them checkpointed, with its reference (a second adapter) computed at each step, and
beforehand; and ours at the longest pair that the budget lets through. A row's figures are bench_finetune's: median
seconds of a step by the clock, the GPU's own time, the allocator's peak.
"""

import argparse
import gc
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import bench_finetune
import random_model
import t4
from t4 import GIB

STEPS, LONGEST_STEPS = 6, 2
PROCESSES = ("ours", "trl", "longest")


def main() -> None:
    """Run the three processes, or one of them."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("out", type=Path, help="folder for preferences.jsonl and a log a process")
    parser.add_argument("--models", type=Path, default=Path("/tmp/models"), help="where the random model is made")
    parser.add_argument("--shape", default=random_model.SHAPE, help="a name that helpers.models knows, or a folder")
    parser.add_argument("--layers", type=int, help="only so many of its first layers")
    parser.add_argument("--seq", type=int, default=1024, help="tokens of each side of a pair")
    parser.add_argument("--reach", type=int, default=32768, help="the longest side that is looked at")
    parser.add_argument("--seconds", type=float, default=235, help="until the last process is stopped")
    parser.add_argument("--only", choices=PROCESSES, help="one process, in this one")
    options = parser.parse_args()
    model = options.models / ("7b" if options.layers is None else f"{Path(options.shape).name}-{options.layers}")
    if options.only:
        if options.only == "longest":
            longest(model, options.out, options.reach)
        else:
            (ours if options.only == "ours" else rival)(model, options.out, options.seq)
        return
    began = time.monotonic()
    options.out.mkdir(parents=True, exist_ok=True)
    random_model.make(model, options.shape, options.layers)
    for name in PROCESSES:
        left = options.seconds - (time.monotonic() - began)
        command = [sys.executable, __file__, *sys.argv[1:], "--only", name]
        with (options.out / f"{name}.log").open("w") as log:
            try:
                done = subprocess.run(command, stdout=subprocess.PIPE, stderr=log, text=True, timeout=max(left, 1))
                log.write(done.stdout)
                shown = [line for line in done.stdout.splitlines() if line.startswith('{"')]
                print("\n".join(shown) or f"{name}: exit {done.returncode}, see {log.name}", flush=True)
            except subprocess.TimeoutExpired:
                print(f"{name}: out of time", flush=True)
        print(f"  -- {name} until {time.monotonic() - began:.0f} s", flush=True)


def configured(model: Path, seq: int, steps: int, **values):
    """The configuration of a row."""
    from helpers.models import profile

    return profile(
        "mistral-7b", model=str(model), method="dpo", seq_len=seq, batch_size=1, accumulation=1, alpha=16,
        max_steps=steps, **values,
    )  # fmt: skip


def ours(model: Path, out: Path, seq: int, steps: int = STEPS, engine: str = "ours") -> None:
    """One row through helpers.finetune, as planned for a T4; the reference's pass is timed too."""
    import torch

    finetune = t4.fine_tuning_in_fp16()
    from helpers import budget, hardware
    from helpers.models import shape

    profiled = bench_finetune.PROFILED if steps == STEPS else 0
    config = configured(model, seq, steps + profiled)
    plan = budget.plan(config, shape(str(model)), hardware.machine("t4"))
    config, needed = plan.config, plan.budget.vram
    record = {"engine": engine, "seq": seq, "batch": 2, "planned": bench_finetune.in_words(config.train)}
    record |= {"predicted_allocated_gib": round(needed.allocated_gib, 3)}
    record |= {"predicted_reserved_gib": round(needed.reserved_gib, 3)}
    clock, scratch = bench_finetune.clock_callback(steps), Path(tempfile.mkdtemp())
    try:
        base, tokenizer = finetune.load_base(config)
        base.config.max_position_embeddings = 10**6  # the memory of a long context does not depend on it
        prepared = random_model.write_pairs(scratch / "prepared", model, steps + profiled, seq)
        trainer = finetune.build_trainer(
            config, finetune.attach_adapter(base, config), tokenizer, prepared, scratch / "checkpoints"
        )
        trainer.args.set_save(strategy="no")
        trainer.add_callback(clock)
        bench_finetune.synchronize()
        began = time.perf_counter()
        trainer.begin(None)
        record["reference_s_a_pair"] = round((time.perf_counter() - began) / (steps + profiled + 1), 3)
        if torch.cuda.is_available():
            torch.cuda.reset_peak_memory_stats()
        trainer.train()
        if not clock.peak and torch.cuda.is_available():
            clock.peak = bench_finetune.peak()
        losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
        record |= {"layers": trainer.layers_reason, "applied": trainer.watch.applied}
        record |= bench_finetune.figures(clock, record, steps, losses)
        if "allocated_gib" in record:
            record["prediction_off"] = round(record["predicted_allocated_gib"] / record["allocated_gib"] - 1, 4)
    except torch.OutOfMemoryError as error:
        record["error"] = str(error)[:200]
    bench_finetune.emit(out / "preferences.jsonl", record)


def longest(model: Path, out: Path, reach: int) -> None:
    """The longest pair, in steps of 256 tokens a side, for which a plan fits a T4 without cutting it."""
    from helpers import budget, hardware
    from helpers.models import shape

    sizes, machine = shape(str(model)), hardware.machine("t4")

    def fits(length: int) -> bool:
        plan = budget.plan(configured(model, length, 1), sizes, machine)
        return plan.budget.fits and plan.config.data.seq_len == length

    low, high = 0, min(reach, sizes.max_context) // 256
    while low < high:
        middle = (low + high + 1) // 2
        low, high = (middle, high) if fits(256 * middle) else (low, middle - 1)
    ours(model, out, 256 * low, LONGEST_STEPS, "longest")


def rival(model: Path, out: Path, seq: int) -> None:
    """trl's DPOTrainer by its own documentation: transformers' layers, all of them checkpointed, on an adapter."""
    import recipes
    import torch
    from datasets import Dataset, load_from_disk
    from trl import DPOConfig, DPOTrainer

    from helpers.finetune.base import trainable_to_fp32

    class Prepared(DPOTrainer):
        """Fed with token ids."""

        def _prepare_dataset(self, dataset, *_):
            return dataset

    t4.limit()
    on_gpu = torch.cuda.is_available()
    prompt = seq // 4
    for beforehand in (False, True):
        record = {"engine": f"trl{', reference beforehand' if beforehand else ''}", "seq": seq, "batch": 2}
        steps, scratch = STEPS + bench_finetune.PROFILED, Path(tempfile.mkdtemp())
        try:
            row = recipes.baseline(1, seq)
            base, tokenizer = recipes.load(model, row)
            adapted = recipes.adapt(base, row)
            pairs = load_from_disk(str(random_model.write_pairs(scratch / "prepared", model, steps, seq) / "train"))
            columns = {"prompt_ids": [ids[:prompt] for ids in pairs["input_ids"]]}
            for side, name in (("chosen_ids", "input_ids"), ("rejected_ids", "rejected_ids")):
                columns[side] = [ids[prompt:] for ids in pairs[name]]
            arguments = DPOConfig(
                output_dir=str(scratch), per_device_train_batch_size=1, gradient_accumulation_steps=1, max_steps=steps,
                learning_rate=2e-4, optim="paged_adamw_8bit" if on_gpu else "adamw_torch", fp16=on_gpu, bf16=False,
                use_cpu=not on_gpu, loss_type=["sigmoid", "sft"], loss_weights=[1.0, 1.0], max_length=None,
                precompute_ref_log_probs=beforehand, gradient_checkpointing=True,
                gradient_checkpointing_kwargs={"use_reentrant": False}, report_to="none", save_strategy="no",
                logging_steps=1, warmup_steps=1, disable_tqdm=True,
            )  # fmt: skip
            clock = bench_finetune.clock_callback(STEPS)
            # precomputed while it is built; peak counts training alone, as it does for ours
            trainer = Prepared(
                model=adapted, args=arguments, train_dataset=Dataset.from_dict(columns), processing_class=tokenizer,
                callbacks=[clock],
            )  # fmt: skip
            trainable_to_fp32(trainer.model)
            if on_gpu:
                torch.cuda.reset_peak_memory_stats()
                record["ready_gib"] = round(torch.cuda.memory_allocated() / GIB, 3)
            trainer.train()
            losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
            record |= bench_finetune.figures(clock, record, STEPS, losses)
        except Exception as error:
            record["error"] = f"{type(error).__name__}: {str(error)[:300]}"
            if not isinstance(error, torch.OutOfMemoryError):
                import traceback

                traceback.print_exc()
        bench_finetune.emit(out / "preferences.jsonl", record)
        trainer = adapted = base = None
        gc.collect()
        if on_gpu:
            torch.cuda.empty_cache()


if __name__ == "__main__":
    main()
