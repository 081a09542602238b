"""A 7B's GGUF file evaluated through PyTorch on a GPU held to a T4's memory: predicted beside measured. Needs a GPU.

    PYTORCH_CUDA_ALLOC_CONF=expandable_segments:True,per_process_memory_fraction:0.1032 \\
        python tests/benchmarks/bench_gguf_row.py --types q4_k_m      # 0.1032 of an H200 are 14.42 GiB

Random weights in Mistral 7B v0.3's shape and the tiny model's words: figures of quality mean nothing here. Exports
first (core seconds, memory), which takes four minutes for q4_k_m on two threads; prints a JSON line for each.
"""

import argparse
import json
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT), str(ROOT / "tests" / "benchmarks")]

from bench_export import slice_of_7b  # noqa: E402

from helpers import hardware, models  # noqa: E402
from helpers.evaluate import evaluate_one, llama_cpp_speed, read_questions  # noqa: E402
from helpers.models import TINY, gguf_header  # noqa: E402
from helpers.show import bars  # noqa: E402

PAIRS = ("allocated_gib", "reserved_gib", "anonymous_gib")
FIGURES = (
    "loaded_as",
    "load_s",
    *(f"{which}_{what}" for what in PAIRS for which in ("peak", "predicted")),
    "evaluation_s",
    "predicted_evaluation_s",
    "first_token_s",
    "tokens_per_s",
    "tokens_per_s_batch_8",
    "gpu_ms_per_token",
    "llama_cpp_tokens_per_s",
)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--types", nargs="+", default=["q4_k_m"])
    parser.add_argument("--layers", type=int, default=32)
    parser.add_argument("--questions", type=int, default=16)
    parser.add_argument("--texts", type=int, default=32)
    options = parser.parse_args()
    config = models.profile("mistral-7b", max_questions=options.questions, max_heldout=options.texts)
    questions = read_questions(TINY.parent / "questions.jsonl", options.questions)
    data = TINY.parent / "heldout_conversations.jsonl"
    machine = hardware.machine("t4")  # what is decided for; computed is on the GPU that is here
    with tempfile.TemporaryDirectory() as scratch:
        folder = slice_of_7b(Path(scratch) / "model", options.layers)
        for types in options.types:
            file = folder / f"seven-{types}.gguf"  # beside its tokenizer
            command = [sys.executable, str(ROOT / "tests/benchmarks/bench_export.py"), "--one"]
            said = subprocess.run(
                [*command, str(folder), types, str(file)], stdout=subprocess.PIPE, text=True, check=True
            )
            print(
                json.dumps({"what": "export", "types": types, **json.loads(said.stdout.splitlines()[-1])}), flush=True
            )
            with bars.bar(types, options.texts + options.questions) as bar:
                row, _ = evaluate_one(file, config, data, questions, True, machine, bar, pairs=[])
            row |= llama_cpp_speed(file)
            found = {name: row.get(name) for name in FIGURES} | {"weight_bytes": gguf_header.weight_bytes(file)}
            print(json.dumps({"what": "evaluation", "types": types, **found}), flush=True)
            file.unlink()


if __name__ == "__main__":
    main()
