"""Evaluation of Mistral 7B's shape (random weights) on a GPU held to a T4's memory: peak against the budget, and speed.

    python data/measurements/bench_evaluate.py OUT.json            # about 3 minutes on an H200; 15 GB of disk

200 texts of 1,024 tokens are scored and 32 answers of 128 tokens are written, in batches of 8, with the allocator
capped at 14.42 GiB, flash and cuDNN SDPA off and fp16, as on a T4. The weights lie on disk in 16 bits, which do not
fit there, and are opened in NF4. Then decoding with and without torch.compile on a static cache.
"""

import argparse
import json
import sys
import tempfile
import time
from datetime import date
from importlib import metadata
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from helpers import card, cost, evaluate, inference
from helpers.config import RunConfig
from helpers.models import TINY
from helpers.perplexity import Item, perplexity

GIB = 2**30
CAP_GIB = 14.42
TEXTS, TOKENS, ANSWERS, NEW_TOKENS, BATCH = 200, 1024, 32, 128, 8


def main() -> None:
    """Measure, print and write the figures."""
    options = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    options.add_argument("output", type=Path)
    options.add_argument("--layers", type=int, default=32, help="fewer, to try it out")
    options = options.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        figures = measure(make(Path(folder), options.layers))
    options.output.write_text(json.dumps(figures, indent=1), encoding="utf-8")
    print(json.dumps(figures, indent=1))


def make(folder: Path, layers: int) -> Path:
    """A model folder of the shape with random fp16 weights, and the sample's tokenizer."""
    from transformers import AutoTokenizer, MistralConfig, MistralForCausalLM

    config = MistralConfig(
        vocab_size=32768, num_hidden_layers=layers, max_position_embeddings=32768, sliding_window=None, rope_theta=1e6
    )
    torch.set_default_dtype(torch.float16)
    with torch.device("cuda"):
        model = MistralForCausalLM(config)
    torch.set_default_dtype(torch.float32)
    model.save_pretrained(folder, max_shard_size="2GB")
    AutoTokenizer.from_pretrained(TINY).save_pretrained(folder)
    del model
    card.free_memory()
    return folder


def measure(folder: Path) -> dict:
    """Peak of scoring and answering, predicted and measured, seconds of each; decoding rates."""
    hold_to_t4()
    config = RunConfig().with_values(
        weights="nf4", eval_context=TOKENS, eval_stride=TOKENS // 2, eval_batch_size=BATCH, max_new_tokens=NEW_TOKENS
    )
    rows = torch.randint(300, 2000, (TEXTS + ANSWERS, TOKENS), generator=torch.Generator().manual_seed(0)).tolist()
    with cost.peak_memory() as peaks:
        loaded = inference.load(folder, config)
        started = time.perf_counter()
        read = perplexity(loaded, (Item(row, None, 4 * TOKENS) for row in rows[:TEXTS]), TOKENS, TOKENS // 2, BATCH)
        scoring_s = time.perf_counter() - started
        scoring_gib = torch.cuda.max_memory_allocated() / GIB
        started = time.perf_counter()
        answer(loaded, rows[TEXTS:])
        answering_s = time.perf_counter() - started
    predicted = evaluate.predicted_gib(loaded, config)
    return {
        "date": date.today().isoformat(),
        "gpu": torch.cuda.get_device_name(),
        "versions": {name: metadata.version(name) for name in ("torch", "transformers", "bitsandbytes")},
        "loaded_as": loaded.how,
        "load_s": loaded.load_s,
        "cap_gib": CAP_GIB,
        "predicted_allocated_gib": predicted,
        **peaks,
        "scoring_peak_gib": scoring_gib,
        "difference": predicted / peaks["peak_allocated_gib"] - 1,
        "scored_tokens": read.tokens,
        "scoring_s": scoring_s,
        "answering_s": answering_s,
        "speed": cost.speed(loaded),
        "compiled": compiled(loaded),
    }


def hold_to_t4() -> None:
    """The allocator's cap, and the kernels and precision of compute capability 7.5."""
    total_gib = torch.cuda.get_device_properties(0).total_memory / GIB
    torch.cuda.set_per_process_memory_fraction(CAP_GIB / total_gib)
    torch.backends.cuda.enable_flash_sdp(False)
    torch.backends.cuda.enable_cudnn_sdp(False)
    real = torch.cuda.mem_get_info
    torch.cuda.mem_get_info = lambda device=None: (min(real(device)[0], int(CAP_GIB * GIB)), int(CAP_GIB * GIB))
    torch.cuda.get_device_capability = lambda device=None: (7, 5)


def answer(loaded: inference.Loaded, rows: list[list[int]]) -> None:
    """Answers of NEW_TOKENS to prompts of TOKENS; none ends by itself."""
    settings = inference.generation_config(loaded, NEW_TOKENS, temperature=0.0, top_p=1.0)
    settings.min_new_tokens = NEW_TOKENS
    for start in range(0, len(rows), BATCH):
        prompts = rows[start : start + BATCH]
        with torch.inference_mode():
            loaded.model.generate(
                **inference.pad_left(prompts, settings.pad_token_id, loaded.model.device), generation_config=settings
            )


def compiled(loaded: inference.Loaded) -> dict:
    """Decoding with a static cache, which transformers compiles, against without: rates, and the first call's cost."""
    found = {}
    for name in (None, "static"):
        settings = inference.generation_config(loaded, 64, temperature=0.0, top_p=1.0)
        settings.min_new_tokens, settings.cache_implementation = 64, name
        rows = inference.pad_left([[1] * 128], settings.pad_token_id, loaded.model.device)
        seconds = []
        try:
            for _ in range(3):
                torch.cuda.synchronize()
                started = time.perf_counter()
                with torch.inference_mode():
                    loaded.model.generate(**rows, generation_config=settings)
                torch.cuda.synchronize()
                seconds.append(time.perf_counter() - started)
        except Exception as error:  # whatever the compiler raises is the finding
            found[name or "dynamic"] = {"error": f"{type(error).__name__}: {str(error)[:200]}"}
            continue
        found[name or "dynamic"] = {"first_s": seconds[0], "then_s": min(seconds[1:]), "new_tokens": 64}
    return found


if __name__ == "__main__":
    main()
