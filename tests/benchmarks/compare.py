"""Ours, fitcheck-llm's and accelerate's estimate on the same measured rows: writes comparison.csv.

    python3 -m venv fitcheck && fitcheck/bin/pip install fitcheck-llm==0.3.1
    python tests/benchmarks/compare.py --fitcheck fitcheck/bin/python

fitcheck knows layers that are all or not at all checkpointed, so rows in between are left out; it is told the row's
attention kernel, double quantization and 8-bit optimizer. accelerate's estimate is of the weights alone.
"""

import argparse
import csv
import json
import subprocess
from pathlib import Path

import rows
from rows import GIB, MEASURED, Measured

from helpers.budget import vram
from helpers.budget.step import attention_of

OUT = MEASURED / "comparison.csv"
COLUMNS = [
    *("source", "recipe", "model", "row", "attention", "status", "measured_allocated_gib", "measured_reserved_gib"),
    *("ours_allocated_gib", "ours_reserved_gib", "fitcheck_allocated_gib", "fitcheck_reserved_gib", "accelerate_gib"),
]
ASK_FITCHECK = """
import json, sys
from fitcheck.config_parser import ModelConfig
from fitcheck.estimator import TrainingConfig, estimate
from fitcheck.gpu_db import get_gpu
for model, training in json.load(sys.stdin):
    found = estimate(ModelConfig(**model), TrainingConfig(**training), get_gpu("t4"))
    print(json.dumps([found.total_mib - found.overhead_mib, found.total_mib]))
"""


def comparable() -> list[Measured]:
    """All measured rows that fitcheck can express, those that ran out of memory too."""
    found = [*rows.h200("h200_t4_envelope.csv"), *rows.facts(), *rows.t4("first"), *rows.t4("unseen")]
    found = [row for row in found if row.config.train.checkpointing in ("all", "none")]
    return [row for row in found if not row.config.train.offload_activations and row.source != "segments"]


def for_fitcheck(row: Measured) -> tuple[dict, dict]:
    """fitcheck's ModelConfig and TrainingConfig of a row."""
    shape, config = row.shape, row.config
    model = {
        "name": shape.name,
        "num_params": shape.parameters,
        "hidden_size": shape.hidden,
        "num_layers": shape.layers,
        "num_attention_heads": shape.heads,
        "num_kv_heads": shape.kv_heads,
        "intermediate_size": shape.intermediate,
        "vocab_size": shape.vocab,
        "head_dim": shape.head_dim,
        "tie_word_embeddings": shape.tied,
    }
    training = {
        "precision": "fp16",
        "quantization": "nf4",
        "double_quant": config.model.double_quant,
        "optimizer": "adamw" if config.train.optimizer == "adamw_torch" else "adam8bit",
        "batch_size": config.train.batch_size,
        "seq_len": config.data.seq_len,
        "lora_rank": config.adapter.rank,
        "lora_targets": list(config.adapter.target_modules),
        "grad_checkpoint": config.train.checkpointing == "all",
        "flash_attn": attention_of(config, shape) == "efficient",
        "grad_accum_steps": config.train.accumulation,
    }
    return model, training


def accelerate_gib(row: Measured) -> float:
    """What `accelerate estimate-memory --dtypes int4` says: an eighth of the fp32 weights."""
    from accelerate import init_empty_weights
    from accelerate.utils import calculate_maximum_sizes
    from transformers import LlamaConfig, LlamaForCausalLM

    shape = row.shape
    with init_empty_weights():
        model = LlamaForCausalLM(
            LlamaConfig(
                vocab_size=shape.vocab,
                hidden_size=shape.hidden,
                intermediate_size=shape.intermediate,
                num_hidden_layers=shape.layers,
                num_attention_heads=shape.heads,
                num_key_value_heads=shape.kv_heads,
                head_dim=shape.head_dim,
                tie_word_embeddings=shape.tied,
            )
        )
    return calculate_maximum_sizes(model)[0] / 8 / GIB


def main() -> None:
    """Ask all three, write the CSV."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--fitcheck", type=Path, required=True, help="a Python that has fitcheck-llm 0.3.1")
    options = parser.parse_args()
    measured = comparable()
    asked = json.dumps([for_fitcheck(row) for row in measured])
    answers = subprocess.run(
        [options.fitcheck, "-c", ASK_FITCHECK], input=asked, capture_output=True, text=True, check=True
    ).stdout.splitlines()
    weights = {row.shape.name: accelerate_gib(row) for row in {row.shape.name: row for row in measured}.values()}
    with OUT.open("w", newline="", encoding="utf-8") as stream:
        writer = csv.writer(stream)
        writer.writerow(COLUMNS)
        for row, answer in zip(measured, answers, strict=True):
            tensors, total = (float(size) * 2**20 / GIB for size in json.loads(answer))
            ours = rows.allocated_gib(row)[0]
            overhead = vram.allocator_overhead(row.step, row.expandable) / GIB
            context = 0.1376  # a T4's, which fitcheck counts into its overhead
            sizes = [row.allocated_gib, row.reserved_gib, ours, ours + overhead, tensors, total - context]
            writer.writerow(
                [row.source, row.recipe, row.shape.name, row.label, row.config.model.attention, row.status]
                + ["" if size is None else round(size, 3) for size in [*sizes, weights[row.shape.name]]]
            )
    print(f"{OUT}: {len(measured)} rows")


if __name__ == "__main__":
    main()
