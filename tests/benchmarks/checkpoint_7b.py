"""A checkpoint of a 7B's QLoRA: bytes, seconds to write and to check, and its share of training time on a T4.

    python tests/benchmarks/checkpoint_7b.py [--folder FOLDER] [--repeats 3]

Needs no GPU: writes what the trainer would write, an adapter of rank 16 on all linear layers of Mistral-7B-v0.3 in fp32
and the two 8-bit moments of its optimizer with their block scales, through workspace/checkpoints.py. A T4's step of
1 × 1024 tokens takes 4 s. Prints JSON.
"""

import argparse
import json
import shutil
import tempfile
import time
from pathlib import Path
from statistics import median

import random_model
import torch
from safetensors.torch import save_file

from helpers import models
from helpers.workspace import checkpoints

MICRO_STEP_S = 4.0
"""1 × 1024 tokens of a 7B's QLoRA on a T4 (published, not measured here)."""
BLOCK = 256
"""Values that share a scale in bitsandbytes' 8-bit optimizers."""
DISK_SLOWDOWN = 5
"""A rented machine's disk and two slow cores against this machine, at worst."""


def optimizer_state(tensors: dict[str, torch.Tensor]) -> dict:
    """What torch.save gets of a paged 8-bit AdamW: two bytes a weight, two scales a block, two code books a tensor."""
    state = {}
    for number, tensor in enumerate(tensors.values()):
        blocks = -(-tensor.numel() // BLOCK)
        state[number] = {"step": number}
        for moment in (1, 2):
            state[number][f"state{moment}"] = torch.randint(0, 255, tensor.shape, dtype=torch.uint8)
            state[number][f"qmap{moment}"] = torch.randn(256)
            state[number][f"absmax{moment}"] = torch.randn(blocks)
    return {"state": state, "param_groups": [{"lr": 2e-4, "params": list(state)}]}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--folder", type=Path, help="on the disk to measure; default: a temporary one")
    parser.add_argument("--repeats", type=int, default=3)
    options = parser.parse_args()
    torch.set_num_threads(1)
    config, tensors = models.profile("mistral-7b"), random_model.lora_factors(random_model.config_of())
    state = optimizer_state(tensors)
    folder = options.folder or Path(tempfile.mkdtemp())
    write_s, check_s = [], []
    for step in range(1, options.repeats + 1):
        began = time.perf_counter()
        with checkpoints.writing(folder, step, keep=config.train.keep_checkpoints) as beside:
            save_file(tensors, beside / "adapter_model.safetensors")
            torch.save(state, beside / "optimizer.pt")
        write_s.append(time.perf_counter() - began)
        began = time.perf_counter()
        assert checkpoints.newest(folder).name == f"checkpoint-{step}"
        check_s.append(time.perf_counter() - began)
    sizes = {file.name: file.stat().st_size for file in checkpoints.newest(folder).iterdir()}
    if options.folder is None:
        shutil.rmtree(folder)
    step_s = MICRO_STEP_S * config.train.accumulation * config.train.batch_size
    between_s = step_s * config.train.save_steps
    share = 100 * median(write_s) / between_s
    found = {"weights": sum(tensor.numel() for tensor in tensors.values())}
    found |= {"adapter_mib": round(sizes["adapter_model.safetensors"] / 2**20, 1)}
    found |= {"optimizer_mib": round(sizes["optimizer.pt"] / 2**20, 1)}
    found |= {"checkpoint_mib": round(sum(sizes.values()) / 2**20, 1), "kept": config.train.keep_checkpoints}
    found |= {"write_and_check_s": round(median(write_s), 2), "check_again_s": round(median(check_s), 2)}
    found |= {"t4_step_s": step_s, "save_steps": config.train.save_steps, "share_percent": round(share, 3)}
    print(json.dumps(found | {"share_percent_if_five_times_slower": round(DISK_SLOWDOWN * share, 3)}, indent=1))


if __name__ == "__main__":
    main()
