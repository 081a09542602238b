"""The 7B's whole way, prepare to report, inside a free Colab: 14.42 GiB for the allocator, 12.7 GB of RAM, two cores.

    python tests/benchmarks/whole_way.py --work /tmp/way --output OUT       # about 8 minutes on an H200, 40 GB of disk

Random weights in the shape of Mistral-7B-v0.3, a base without chat template and pad token. Every stage is a process of
its own, `python -m helpers STAGE`, started by t4.python, which lets it see nothing else. Writes
whole_way.jsonl, a line a stage: seconds, peaks of anonymous memory and of the allocator beside the budget's, what the
limit did; and whole_way.log with all that the stages printed. Exits with 1 at the first stage that fails.
"""

import argparse
import json
import re
import shutil
import subprocess
import sys
import time
from contextlib import suppress
from itertools import chain
from pathlib import Path

import random_model
import t4
from t4 import GIB, ROOT

from helpers import models

SETTINGS = {
    "seq-len": 1024, "max-steps": 4, "save-steps": 2, "heldout-fraction": 0.1,
    "max-heldout": 16, "max-questions": 16, "max-new-tokens": 32, "eval-context": 1024,
}  # fmt: skip
BUDGETS = {"finetune": "train", "merge": "merge", "quantize": "quantize", "evaluate": "inference"}


def main() -> int:
    """Make the base and the data, run the stages; returns the exit status."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--work", type=Path, default=Path("/tmp/way"))
    parser.add_argument("--output", type=Path, default=Path("/tmp/way"))
    parser.add_argument("--layers", type=int, help="fewer, to try the script")
    parser.add_argument("--shape", default=random_model.SHAPE, help="another model's, or a folder's, to try the script")
    parser.add_argument(
        "--made", action="store_true", help="random models for the stages' own: check and evaluate only"
    )
    parser.add_argument("--tokenizer", type=Path, default=models.TINY, help="folder of the base's tokenizer")
    options = parser.parse_args()
    base, run = options.work / "base", options.work / "run"
    options.output.mkdir(parents=True, exist_ok=True)
    print(f"base: {make_base(base, options.shape, options.layers, options.tokenizer):.0f} s", flush=True)
    conversations = long_conversations(options.work / "conversations.jsonl")
    common = ["--profile", "mistral-7b", "--workspace", str(run), "--model", str(base)]
    common += [part for name, value in SETTINGS.items() for part in (f"--{name}", str(value))]
    stages = {
        "prepare": ["--input", str(conversations)],
        "finetune": ["--gpu", "auto"],
        "merge": ["--base", str(base)],
        "quantize": [],
        "evaluate": ["--questions", str(ROOT / "data" / "questions.jsonl")],
    }
    if options.made:
        stages = {"evaluate": [*stages["evaluate"], *made_models(options.work, base, options.shape, options.layers)]}
    limited = t4.host_limit()
    for stage, flags in stages.items():
        arguments = [part for part in common if stage != "quantize" or part not in ("--model", str(base))]
        row = t4.about("torch", "transformers", "peft", "bitsandbytes", "gptqmodel") | {"stage": stage}
        row |= in_colab([stage, "--json", *arguments, *flags], options.output, limited)
        if stage in BUDGETS:
            row |= predicted([*common, "--gpu", "t4", "--stage", BUDGETS[stage]])
        with (options.output / "whole_way.jsonl").open("a", encoding="utf-8") as stream:
            stream.write(json.dumps(row) + "\n")
        print(row, flush=True)
        if row["status"]:
            return 1
    return 0 if (run / "report.json").is_file() else 1


def made_models(work: Path, base: Path, shape: str, layers: int | None) -> list[str]:
    """The flags that name the base, an adapter, the base once more as the merged model, and a GPTQ model."""
    random_model.make_gptq(work / "gptq", shape, layers)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copyfile(base / name, work / "gptq" / name)
    adapter = work / "finetune" / "adapter"
    folders = {"base": base, "finetuned": adapter, "merged": base, "gptq": work / "gptq"}
    heldout = ROOT / "data" / "heldout_conversations.jsonl"
    return ["--data", str(heldout), "--models", *(f"{name}={folder}" for name, folder in folders.items())]


def make_base(folder: Path, shape: str, layers: int | None, tokenizer: Path) -> float:
    """A base of random weights, its tokenizer without chat template and pad token; returns the seconds."""
    start = time.monotonic()
    random_model.make(folder, shape, layers, adapter=folder.parent / "finetune" / "adapter")
    for file in (*folder.glob("tokenizer*"), *folder.glob("*special_tokens*"), *folder.glob("chat_template*")):
        file.unlink()
    for name in ("tokenizer.json", "tokenizer.model"):
        if (tokenizer / name).is_file():
            shutil.copyfile(tokenizer / name, folder / name)
    settings = json.loads((tokenizer / "tokenizer_config.json").read_text(encoding="utf-8"))
    settings = {name: value for name, value in settings.items() if name not in ("chat_template", "pad_token")}
    (folder / "tokenizer_config.json").write_text(json.dumps(settings), encoding="utf-8")
    return time.monotonic() - start


def long_conversations(path: Path) -> Path:
    """The sample's conversations, twelve to one, so that contexts are filled as a T4's budget expects them."""
    rows = [json.loads(line) for line in (ROOT / "data" / "conversations.jsonl").read_text().splitlines()]
    turns = [[turn for turn in row["messages"] if turn["role"] != "system"] for row in rows]
    joined = [list(chain.from_iterable(turns[start : start + 12])) for start in range(0, len(turns), 12)]
    path.write_text("".join(json.dumps({"messages": messages}) + "\n" for messages in joined), encoding="utf-8")
    return path


def in_colab(arguments: list[str], output: Path, limited: str) -> dict:
    """Run one command of ours under the limits: status, seconds, peaks, what the limit did, and its result."""
    before = t4.events(limited)
    start, anonymous = time.monotonic(), 0
    printed = output / "result.json"
    with (output / "whole_way.log").open("a", encoding="utf-8") as log, printed.open("w", encoding="utf-8") as stream:
        log.write(f"==== {' '.join(arguments)}\n")
        log.flush()
        extensions = {"TORCH_CUDA_ARCH_LIST": "7.5;9.0"}
        process = t4.python(["-m", "helpers", *arguments], limited, extensions, stdout=stream, stderr=log)
        while process.poll() is None:
            anonymous = max(anonymous, anonymous_bytes(process.pid, limited))
            time.sleep(0.1)
    row = {"status": process.returncode, "wall_s": round(time.monotonic() - start, 1)}
    row |= {"anonymous_gib": round(anonymous / GIB, 2)}
    row |= {name: count - before[name] for name, count in t4.events(limited).items()}
    text = printed.read_text(encoding="utf-8")
    printed.unlink()
    return row | ({"said": text} if row["status"] else figures(json.loads(text)))


def figures(result: dict) -> dict:
    """A stage's figures by name; of an evaluation those of each model, which is a dictionary of them."""
    kept = {name: value for name, value in result.items() if isinstance(value, str | int | float)}
    opened = {name: value for name, value in result.items() if isinstance(value, dict) and "kind" in value}
    return kept | {name: figures(row) for name, row in opened.items()}


def anonymous_bytes(process: int, limited: str) -> int:
    """Anonymous memory of the group, or of the process where there is none."""
    with suppress(OSError, TypeError):
        if limited == "cgroup":
            return int(re.search(r"^anon (\d+)", (t4.GROUPS[limited][0] / "memory.stat").read_text(), re.M)[1])
        rollup = Path(f"/proc/{process}/smaps_rollup").read_text()
        return 1024 * int(re.search(r"^Anonymous:\s+(\d+)", rollup, re.M)[1])
    return 0


def predicted(arguments: list[str]) -> dict:
    """The budget's peaks of a stage on a free T4."""
    done = subprocess.run(
        [sys.executable, "-m", "helpers", "budget", "--json", *arguments], cwd=ROOT, capture_output=True, text=True
    )
    found = json.loads(done.stdout)
    sizes = {f"predicted_{name}": round(found["vram"][name], 2) for name in ("allocated_gib", "reserved_gib")}
    return sizes | {"predicted_ram_gib": round(found["ram"]["peak_gib"], 2), "predicted_fits": found["fits"]}


if __name__ == "__main__":
    sys.exit(main())
