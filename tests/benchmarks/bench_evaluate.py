"""Evaluation of Mistral 7B's shape (random weights) inside a free Colab's limits: memory and time against the budget.

    python tests/benchmarks/bench_evaluate.py OUT.json     # about 2 minutes on an H200; 15 GB of disk
    python tests/benchmarks/bench_evaluate.py OUT.json --layers 2 --only merged      # to try it out, without a GPU too

Two models in one process that is held to 14.42 GiB in the allocator, 12.7 GB of host memory (a cgroup, where the system
lets us) and two cores, and sees a T4 (t4_envelope/): the merged one in 16 bits, some of whose layers wait in host
memory, and an adapter on its base in NF4. Each scores texts of 1,024 tokens and answers prompts of that length in
batches of 8, then decodes at batch 1 and 8. Beside what was measured stands what budget/placement.py and
budget/hours.py give for it: memory for a T4, seconds for the GPU that really computes.

--compiled measures decoding with and without torch.compile on a static cache besides, some two minutes more.
"""

import argparse
import json
import os
import tempfile
import time
from dataclasses import replace
from datetime import date
from importlib import metadata
from pathlib import Path

import random_model
import t4
from t4 import GIB

TEXTS, TOKENS, ANSWERS, NEW_TOKENS, BATCH = 64, 1024, 16, 48, 8
MODELS = ("merged", "finetuned")


def main() -> None:
    """Make the models, measure them in a process under the limits, print and write the figures."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("output", type=Path)
    parser.add_argument("--layers", type=int, help="fewer, to try it out")
    parser.add_argument("--shape", default=random_model.SHAPE, help="another model's, or a folder's, to try it out")
    parser.add_argument("--only", choices=MODELS, help="one of the two models")
    parser.add_argument("--compiled", action="store_true", help="static cache and torch.compile too")
    parser.add_argument("--folder", type=Path, help="of models that are there already: the process under the limits")
    options = parser.parse_args()
    if options.folder:
        options.output.write_text(json.dumps(measure(options)), encoding="utf-8")
        return
    with tempfile.TemporaryDirectory() as folder:
        make(Path(folder), options.shape, options.layers)
        found = under_limits(options, Path(folder))
    options.output.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
    print(json.dumps(found, indent=1))


def make(folder: Path, shape: str, layers: int | None) -> None:
    """A 16-bit model of the shape and an adapter for it, both of random weights, with the sample's tokenizer."""
    from transformers import AutoTokenizer

    from helpers.models import TINY

    random_model.make(folder / "merged", shape, layers, adapter=folder / "finetuned")
    AutoTokenizer.from_pretrained(TINY).save_pretrained(folder / "merged")


def under_limits(options: argparse.Namespace, folder: Path) -> dict:
    """The figures of a process of its own, and what the limit on host memory did."""
    import torch

    limited = t4.host_limit()
    before = t4.events(limited)
    real = {"REAL_CARD": torch.cuda.get_device_name(0) if torch.cuda.is_available() else "cpu"}
    result = folder / "figures.json"
    flags = ["--folder", str(folder), *(["--only", options.only] if options.only else [])]
    flags += ["--compiled"] if options.compiled else []
    if t4.python([__file__, str(result), *flags], limited, real).wait():
        raise SystemExit("the process under the limits failed")
    found = json.loads(result.read_text(encoding="utf-8"))
    return found | {name: count - before[name] for name, count in t4.events(limited).items()}


def measure(options: argparse.Namespace) -> dict:
    """Each model's figures, by name."""
    from helpers import hardware
    from helpers.config import RunConfig
    from helpers.models import gpu

    config = RunConfig().with_values(
        eval_context=TOKENS, eval_stride=TOKENS // 2, eval_batch_size=BATCH, max_new_tokens=NEW_TOKENS
    )
    found = {
        "date": date.today().isoformat(),
        "gpu": os.environ["REAL_CARD"],
        "versions": {name: metadata.version(name) for name in ("torch", "transformers", "accelerate", "bitsandbytes")},
        "limits": {"allocator_gib": t4.ALLOCATOR_GIB, "host_bytes": t4.HOST_BYTES, "cores": t4.CORES},
    }
    for name in [options.only] if options.only else MODELS:
        machine = hardware.probe()
        ram_gib = min(machine.host.ram_gib, t4.HOST_BYTES / GIB - 1.5)
        machine = replace(machine, host=replace(machine.host, ram_gib=ram_gib))
        found[name] = measure_one(options.folder / name, config, machine, options.compiled)
        gpu.free_memory()
    return found


def measure_one(folder: Path, config, machine, compiled: bool) -> dict:
    """Peaks of scoring and answering, predicted and measured, seconds of each; decoding rates."""
    import torch

    from helpers import evaluate, hardware, inference
    from helpers.budget import hours
    from helpers.evaluate import cost
    from helpers.evaluate.perplexity import Item, perplexity

    rows = torch.randint(300, 2000, (TEXTS + ANSWERS, TOKENS), generator=torch.Generator().manual_seed(0)).tolist()
    with cost.peak_memory() as peaks:
        loaded = inference.load(folder, config, machine)
        batch = loaded.placement.batch_size
        started = time.perf_counter()
        read = perplexity(loaded, (Item(row, None, 4 * TOKENS) for row in rows[:TEXTS]), TOKENS, TOKENS // 2, batch)
        scoring_s = time.perf_counter() - started
        scoring_gib = torch.cuda.max_memory_allocated() / GIB if torch.cuda.is_available() else None
        started = time.perf_counter()
        answer(loaded, rows[TEXTS:], batch)
        answering_s = time.perf_counter() - started
    counts = (TEXTS, ANSWERS)
    known = hardware.gpu_named(os.environ["REAL_CARD"], (9, 0), machine.vram_gib) if machine.gpu else None
    real = replace(machine, gpu=known)
    shape = evaluate.shape_of(folder, config)
    seconds = hours.evaluation_s(config, shape, real, loaded.placement, counts)
    figures = {
        "loaded_as": loaded.how,
        "load_s": loaded.load_s,
        **peaks,
        **evaluate.predictions(loaded, config, machine, counts, peaks),
        "scoring_peak_gib": scoring_gib,
        "scored_tokens": read.tokens,
        "scoring_s": scoring_s,
        "predicted_scoring_s": seconds["reading"],
        "answering_s": answering_s,
        "predicted_answering_s": seconds["answers"],
        "answered_tokens_per_s": ANSWERS * NEW_TOKENS / answering_s,
    }
    for count in (1, BATCH):
        cost.decode_times(loaded, count, 128, 4)
        times = cost.decode_times(loaded, count, 128, 16)
        figures[f"tokens_per_s_batch_{count}"] = count * (len(times) - 1) / (times[-1] - times[0])
    return figures | ({"compiled": both_caches(loaded)} if compiled else {})


def answer(loaded, rows: list[list[int]], batch: int) -> None:
    """Answers of NEW_TOKENS to prompts of TOKENS; none ends by itself."""
    import torch

    from helpers import inference

    settings = inference.generation_config(loaded, NEW_TOKENS, temperature=0.0, top_p=1.0)
    settings.min_new_tokens = NEW_TOKENS
    for start in range(0, len(rows), batch):
        prompts = rows[start : start + batch]
        with torch.inference_mode():
            loaded.model.generate(
                **inference.pad_left(prompts, settings.pad_token_id, loaded.model.device), generation_config=settings
            )


def both_caches(loaded) -> dict:
    """Decoding with a static cache, which transformers compiles, against without: rates, and the first call's cost."""
    import torch

    from helpers import inference
    from helpers.evaluate import cost

    found = {}
    for name in (None, "static"):
        settings = inference.generation_config(loaded, 64, temperature=0.0, top_p=1.0)
        settings.min_new_tokens, settings.cache_implementation = 64, name
        rows = inference.pad_left([[1] * 128], settings.pad_token_id, loaded.model.device)
        seconds = []
        try:
            for _ in range(3):
                cost.wait(loaded.model.device)
                started = time.perf_counter()
                with torch.inference_mode():
                    loaded.model.generate(**rows, generation_config=settings)
                cost.wait(loaded.model.device)
                seconds.append(time.perf_counter() - started)
        except Exception as error:  # whatever the compiler raises is the finding
            found[name or "dynamic"] = {"error": f"{type(error).__name__}: {str(error)[:200]}"}
            continue
        found[name or "dynamic"] = {"first_s": seconds[0], "then_s": min(seconds[1:]), "new_tokens": 64}
    return found


if __name__ == "__main__":
    main()
