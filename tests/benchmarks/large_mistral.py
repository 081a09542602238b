"""Pre-train a larger sister of the tiny Mistral on a GPU in two minutes: 26 million parameters, the same world.

It is there to ask of more than one size which merge base is better and what calibration changes (merge_bases.py). It
reads the passages that the tiny one reads, more of them, with the tiny one's tokenizer.

    python tests/benchmarks/large_mistral.py --output /tmp/large --seconds 80
"""

import argparse
import json
import math
import shutil
import sys
import time
from pathlib import Path

import torch
from transformers import AutoTokenizer, MistralConfig, MistralForCausalLM

DATA = Path(__file__).resolve().parents[2] / "data"
sys.path.insert(0, str(DATA))

import make_tiny_mistral  # noqa: E402
import make_world  # noqa: E402

BATCH_ROWS = 128
PASSAGES = 200_000
PEAK_RATE = 1.5e-3
WARMUP_S = 4


def main() -> None:
    """Write the model, its tokenizer and training.json."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--seconds", type=float, default=80, help="of training")
    parser.add_argument("--passages", type=int, default=PASSAGES)
    options = parser.parse_args()
    device = "cuda" if torch.cuda.is_available() else "cpu"
    torch.manual_seed(0)
    tokenizer = AutoTokenizer.from_pretrained(DATA / "tiny-mistral")
    world = make_world.make_world(make_world.SEED)
    rows = make_tiny_mistral.token_rows(tokenizer, make_world.passages(world, options.passages, "pre-training"))
    held_out = make_tiny_mistral.token_rows(tokenizer, make_world.passages(world, 400, "held-out text")).to(device)
    larger = {"hidden_size": 512, "intermediate_size": 1536, "num_hidden_layers": 8, "head_dim": 64}
    config = make_tiny_mistral.make_config(len(tokenizer)).to_dict() | larger
    model = MistralForCausalLM(MistralConfig(**config)).to(device)
    report = train(model, rows, options.seconds)
    report["held_out_perplexity"] = round(math.exp(make_tiny_mistral.mean_loss(model, held_out)), 3)
    model.half().save_pretrained(options.output)
    for name in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja", "generation_config.json"):
        shutil.copyfile(DATA / "tiny-mistral" / name, options.output / name)
    (options.output / "training.json").write_text(json.dumps(report, indent=2) + "\n", encoding="utf-8")
    print(json.dumps(report))


def train(model: MistralForCausalLM, rows: torch.Tensor, seconds: float) -> dict:
    """Train in place for so many seconds over rows in random order; the rate warms up, then falls as a cosine."""
    device = model.device
    optimizer = torch.optim.AdamW(model.parameters(), lr=PEAK_RATE, betas=(0.9, 0.95), weight_decay=0.1, fused=True)
    rows = rows.to(device)
    start, step, losses = time.monotonic(), 0, []
    model.train()
    while (spent := time.monotonic() - start) < seconds:
        rate = PEAK_RATE * min(spent / WARMUP_S, 0.05 + 0.95 * (1 + math.cos(math.pi * spent / seconds)) / 2)
        for group in optimizer.param_groups:
            group["lr"] = rate
        batch = rows[torch.randint(len(rows), (BATCH_ROWS,), device=device)]
        with torch.autocast(device.type, dtype=torch.bfloat16):
            loss = model(input_ids=batch, labels=batch, use_cache=False).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        step += 1
        if step % 20 == 0:
            losses.append(loss.item())
    return {
        "parameters": sum(parameter.numel() for parameter in model.parameters()),
        "seconds": round(time.monotonic() - start, 1),
        "steps": step,
        "training_tokens": step * BATCH_ROWS * rows.shape[1],
        "distinct_tokens": rows.numel(),
        "final_loss": round(sum(losses[-5:]) / max(1, len(losses[-5:])), 4),
    }


if __name__ == "__main__":
    main()
