"""Mixtures of experts, and other bases that people ask for, in NF4 on a GPU held to less: what trains, and the budget.

    python tests/benchmarks/bench_mixture.py OUT_DIR [--seconds 350] [--only mixtral-8x7b,…] [--layers 32]

Of each base a checkpoint of random weights in NF4 is made on the GPU, opened by the helpers' own loader and trained as
the budget plans it for a card of that size, or refused by the budget with its sentence. A line a row in
OUT_DIR/mixture.jsonl: predicted and measured GiB, tokens a second, and the first batch's loss by transformers' layers
and by ours. Mixtral's card has 31 GiB for the allocator, the others' is a T4's. --small makes toys, to try it on a CPU.
"""

import argparse
import gc
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from dataclasses import replace
from pathlib import Path

import bench_finetune
import random_model
import t4
from t4 import GIB

STEPS = 3
MINISTRAL3_8B = {
    "model_type": "ministral3", "num_hidden_layers": 34, "hidden_size": 4096, "intermediate_size": 14336,
    "num_attention_heads": 32, "num_key_value_heads": 8, "head_dim": 128, "vocab_size": 131072,
    "max_position_embeddings": 262144,
}  # fmt: skip
"""The text model of Ministral 3, 8 billion (its config.json's text_config)."""
ATTENTION = [f"seq={seq} targets=attention" for seq in (512, 1024, 2048)]
ALL = [f"seq={seq} targets=all-linear" for seq in (512, 1024, 2048)]
LEAN = " checkpointing=all keep_attention=False"
BASES: dict[str, tuple[float, list[str]]] = {
    "mixtral-8x7b": (31.0, [*ATTENTION, *ALL, ATTENTION[0] + LEAN, ALL[2] + LEAN]),
    "mistral-nemo-12b": (14.42, ["seq=1024 targets=all-linear", "seq=2048 targets=all-linear"]),
    "qwen3-8b": (14.42, ["seq=1024 targets=all-linear"]),
    "ministral-3-8b": (14.42, ["seq=1024 targets=all-linear"]),
    "phi-4": (14.42, ["seq=1024 targets=qkv_proj,o_proj,gate_up_proj,down_proj"]),
    "qwen3-14b": (14.42, ["seq=1024 targets=all-linear", "seq=512 targets=all-linear"]),
}
"""Base -> (GiB that PyTorch's allocator gets, rows), in order of importance."""
SMALL = {
    "hidden_size": 256, "intermediate_size": 512, "vocab_size": 2048, "num_hidden_layers": 2, "pad_token_id": 0,
}  # fmt: skip


def main() -> None:
    """Every base in a process of its own, or one base's rows."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("out", type=Path)
    parser.add_argument("--models", type=Path, default=Path("/tmp/models"), help="where random models are made")
    parser.add_argument("--seconds", type=float, default=350, help="until the last process is stopped")
    parser.add_argument("--only", default=",".join(BASES))
    parser.add_argument("--layers", type=int, help="only so many of each base's first layers")
    parser.add_argument("--small", action="store_true", help="toys of the same families")
    parser.add_argument("--rows", nargs="+", help=argparse.SUPPRESS)
    options = parser.parse_args()
    options.out.mkdir(parents=True, exist_ok=True)
    if options.rows:
        train(options.models, options.out / "mixture.jsonl", options.rows)
        return
    began = time.monotonic()
    for name in options.only.split(","):
        left = options.seconds - (time.monotonic() - began)
        if left < 25:
            print(f"left out: {name}", flush=True)
            continue
        folder = make(options.models / f"{name}-nf4", name, options.layers, options.small)
        print(f"{name}: made after {time.monotonic() - began:.0f} s", flush=True)
        cap, rows = BASES[name]
        left = options.seconds - (time.monotonic() - began)
        command = [sys.executable, __file__, str(options.out), "--models", str(folder), "--rows", *rows]
        try:
            subprocess.run(command, env=os.environ | {"CAP_GIB": str(cap)}, timeout=left, check=False)
        except subprocess.TimeoutExpired:
            print(f"{name}: out of time", flush=True)
        shutil.rmtree(folder)  # 25 GB of disk each, at most
        print(f"  -- {name} until {time.monotonic() - began:.0f} s", flush=True)


def make(folder: Path, name: str, layers: int | None, small: bool) -> Path:
    """A base's NF4 checkpoint."""
    import torch

    from helpers.models import KNOWN

    source = name
    if name == "ministral-3-8b" or small:
        config = random_model.config_of(name).to_dict() if name != "ministral-3-8b" else MINISTRAL3_8B
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "config.json").write_text(json.dumps(config | (SMALL if small else {})), encoding="utf-8")
        source = str(folder)
    assert small or name == "ministral-3-8b" or any(known.name == name for known in KNOWN.values())
    made = random_model.make_nf4(folder, source, layers)
    if torch.cuda.is_available():
        torch.cuda.empty_cache()  # the process that trains shares this GPU
    return made


def train(model: Path, out: Path, rows: list[str]) -> None:
    """Rows of one base through helpers.finetune, one load for all of them."""
    import recipes
    import torch

    finetune = t4.fine_tuning_in_fp16()
    from helpers import budget, hardware
    from helpers.models import profile, shape

    card = hardware.machine("t4", "server")
    card = replace(card, gpu=replace(card.gpu, vram_gib=t4.ALLOCATOR_GIB + card.gpu.context_gib))
    sizes, base = shape(str(model)), None
    for words in rows:
        row = dict(word.split("=", 1) for word in words.split()) | {"batch": "1"}
        settings = {name: bench_finetune.parse(value) for name, value in row.items() if name not in ("seq", "batch")}
        record = {"engine": "mixture", "base": model.name, "layers_of_base": sizes.layers, **row}
        config = profile(
            "mistral-7b", model=str(model), seq_len=int(row["seq"]), batch_size=1, accumulation=1, alpha=16,
            max_steps=STEPS, **settings,
        )  # fmt: skip
        plan = budget.settle(config, sizes, card)
        config, expected = plan.config, plan.budget
        record |= {
            "planned": bench_finetune.in_words(config.train),
            "fits": expected.fits,
            "predicted_allocated_gib": round(expected.vram.allocated_gib, 3),
            "predicted_reserved_gib": round(expected.vram.reserved_gib, 3),
            "predicted_step_s": round(expected.time.step_s, 3),
        }
        if not expected.fits:
            bench_finetune.emit(out, record | {"refused": expected.reasons[0]})
            continue
        trainer = adapted = None
        try:
            if base is None:
                began = time.perf_counter()
                base, tokenizer = finetune.load_base(config)
                bench_finetune.synchronize()
                record["load_s"] = round(time.perf_counter() - began, 1)
                if torch.cuda.is_available():
                    record["loaded_gib"] = round(torch.cuda.memory_allocated() / GIB, 3)
                base.config.max_position_embeddings = 10**6
            clock = bench_finetune.clock_callback(STEPS)
            trainer = recipes.own_trainer(base, tokenizer, config, [clock], STEPS, Path(tempfile.mkdtemp()))
            adapted = trainer.model
            if torch.cuda.is_available():
                torch.cuda.reset_peak_memory_stats()
            trainer.train()
            if torch.cuda.is_available():
                clock.peak = bench_finetune.peak()
            losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
            record |= {"layers": trainer.layers_reason, "loss_check": trainer.loss_check}
            record |= bench_finetune.figures(clock, row, STEPS, losses)
            base = adapted.unload()
        except Exception as error:
            import traceback

            traceback.print_exc()
            record["error"] = f"{type(error).__name__}: {str(error)[:300]}"
            base = None
        bench_finetune.emit(out, record)
        trainer = adapted = None
        if base is not None and hasattr(base, "peft_config"):
            del base.peft_config
        gc.collect()
        if torch.cuda.is_available():
            torch.cuda.empty_cache()


if __name__ == "__main__":
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    os.environ.setdefault("PYTORCH_CUDA_ALLOC_CONF", "expandable_segments:True")
    main()
