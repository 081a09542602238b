"""An export to GGUF measured: core seconds a type, anonymous memory, bytes; predicted beside them.

    python tests/benchmarks/bench_export.py --rates                          # million values a core and second, by type
    python tests/benchmarks/bench_export.py --layers 2 --types q8_0 q4_k_m   # of a 7B's shape with random weights

Prints a JSON line each. A process an export, so that one's memory is not another's; seconds are of its CPU time, which
other work on the machine does not lengthen much.
"""

import argparse
import json
import os
import platform
import shutil
import subprocess
import sys
import tempfile
import threading
import time
from dataclasses import replace
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))

from helpers import models  # noqa: E402
from helpers.budget import export as budget  # noqa: E402
from helpers.models import TINY, gguf_sizes, gguf_types  # noqa: E402

GIB = 2**30


def rates(seconds: float = 2.0) -> dict[str, float]:
    """Million values that one core quantizes a second, by tensor type: rows of 4,096 normal numbers."""
    import numpy as np

    from helpers.export import quants

    found, even = {}, np.ones(4096, np.float32)
    rows = np.random.default_rng(0).normal(0, 0.02, (64, 4096)).astype(np.float32)
    for kind in gguf_types.BLOCKS:
        weights = even if kind.startswith("IQ2") else None
        quants.library()
        if kind not in ("F16", "F32"):
            quants.start(kind)
        count, began = 0, time.process_time()
        while time.process_time() - began < seconds:
            quants.quantize(rows, kind, weights)
            count += 1
        found[kind] = round(count * rows.size / 1e6 / (time.process_time() - began), 2)
    return found


def slice_of_7b(folder: Path, layers: int) -> Path:
    """A folder with Mistral 7B v0.3's shape but for its layers, random fp16 weights, and the tiny model's tokenizer."""
    import torch
    from safetensors.torch import save_file

    seven = replace(models.shape("mistral-7b-v0.3"), layers=layers)
    shapes = {"model.embed_tokens": (seven.vocab, seven.hidden), "lm_head": (seven.vocab, seven.hidden)}
    norms = ["model.norm"]
    for layer in range(layers):
        for name, (inputs, outputs) in seven.linears.items():
            room = "self_attn" if name in ("q_proj", "k_proj", "v_proj", "o_proj") else "mlp"
            shapes[f"model.layers.{layer}.{room}.{name}"] = (outputs, inputs)
        norms += [f"model.layers.{layer}.{name}" for name in ("input_layernorm", "post_attention_layernorm")]
    generator = torch.Generator().manual_seed(0)
    folder.mkdir(parents=True)
    tensors = {f"{n}.weight": (torch.randn(s, generator=generator) * 0.02).half() for n, s in shapes.items()}
    save_file(tensors | {f"{n}.weight": torch.ones(seven.hidden).half() for n in norms}, folder / "model.safetensors")
    settings = json.loads((TINY / "config.json").read_text(encoding="utf-8")) | {
        "hidden_size": seven.hidden, "intermediate_size": seven.intermediate, "num_hidden_layers": layers,
        "num_attention_heads": seven.heads, "num_key_value_heads": seven.kv_heads, "head_dim": seven.head_dim,
        "vocab_size": seven.vocab, "max_position_embeddings": seven.max_context,
    }  # fmt: skip
    (folder / "config.json").write_text(json.dumps(settings), encoding="utf-8")
    for name in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja"):
        shutil.copyfile(TINY / name, folder / name)
    return folder


def measure(folder: Path, types: str, output: Path) -> dict[str, float]:
    """Export in this process; its peak of anonymous memory, CPU seconds, seconds by the clock and bytes."""
    highest, ended = [0], threading.Event()

    def watch() -> None:
        while not ended.wait(0.02):
            status = Path("/proc/self/status").read_text(encoding="ascii")
            highest[0] = max(highest[0], 1024 * int(status.split("RssAnon:")[1].split()[0]))

    watcher = threading.Thread(target=watch, daemon=True)
    watcher.start()
    cpu, clock = time.process_time(), time.monotonic()
    from helpers import export

    made = export.export(folder, output, types)
    figures = {"cpu_s": time.process_time() - cpu, "clock_s": time.monotonic() - clock}
    ended.set()
    watcher.join()
    return (
        figures
        | {"anonymous_gib": highest[0] / GIB, "bytes": sum(made["files"].values())}
        | {"predicted_bytes": sum(made["predicted_bytes"].values())}
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rates", action="store_true")
    parser.add_argument("--layers", type=int, default=2)
    parser.add_argument("--types", nargs="+", default=["q8_0", "q4_k_m"])
    parser.add_argument("--folder", type=Path, help="of an earlier slice, instead of a new one")
    parser.add_argument("--one", nargs=3, metavar=("FOLDER", "TYPES", "OUTPUT"), help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.one:
        print(json.dumps(measure(Path(options.one[0]), options.one[1], Path(options.one[2]))))
        return
    machine = {"cpu": platform.processor() or platform.machine(), "cores": os.cpu_count()}
    found = rates()
    print(json.dumps({"what": "million values a core and second", **machine, **found}), flush=True)
    if options.rates:
        return
    seven = replace(models.shape("mistral-7b-v0.3"), layers=options.layers)
    with tempfile.TemporaryDirectory() as scratch:
        folder = options.folder or slice_of_7b(Path(scratch) / "model", options.layers)
        for types in options.types:
            output = Path(scratch) / "out.gguf"
            command = [sys.executable, __file__, "--one", str(folder), types, str(output)]
            said = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True).stdout.splitlines()[-1]
            files = [gguf_types.file_type(name) for name in types.split(",")]
            predicted = {
                "predicted_core_s": budget.core_seconds(seven, files, rates=found) + budget.FIXED_S,
                "predicted_gib": budget.PROCESS_GIB,
                "shape_bytes": sum(gguf_sizes.file_bytes(seven, file) for file in files),
            }
            row = {"what": f"export of {options.layers} layers", "types": types, **json.loads(said), **predicted}
            print(json.dumps({name: round(v, 3) if isinstance(v, float) else v for name, v in row.items()}), flush=True)
            for file in Path(scratch).glob("*.gguf"):
                file.unlink()


if __name__ == "__main__":
    main()
