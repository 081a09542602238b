"""Which base to merge into, and what GPTQ and its calibration then cost: perplexity and exact match of every way.

The adapter was trained on NF4 weights. Merged into the original 16-bit weights it meets others than it was trained
on; merged into the dequantized NF4 weights it meets its own, and the base keeps NF4's rounding. Both are measured
before quantization, after rounding to nearest and after GPTQ, calibrated with the training conversations, with general
text, or both.

    python tests/benchmarks/merge_bases.py --work /tmp/bases        # the tiny model, on a CPU
    python tests/benchmarks/merge_bases.py --work /tmp/bases --base /tmp/large --name large --jobs 5   # on a GPU
"""

import argparse
import csv
import json
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict
from functools import partial
from pathlib import Path

from t4 import ROOT

from helpers import inference, quantize
from helpers.config import MergeConfig, QuantizeConfig, RunConfig
from helpers.evaluate.metrics import token_f1
from helpers.evaluate.perplexity import perplexity, read_prepared
from helpers.models import profile, shape

GROUP_SIZE = 128
BASES = ("original", "nf4")
WAYS = [(bits, calibration) for bits in (4, 3) for calibration in ("own", "general", "both")]
COLUMNS = (
    *("model", "seed", "merge_base", "bits", "method", "calibration", "perplexity", "perplexity_low"),
    *("perplexity_high", "kl_from_trained", "exact_match", "f1", "questions", "tokens"),
)


def main() -> None:
    """Fine-tune, merge, quantize, measure; a CSV row a way, written as soon as it is known."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--work", type=Path, required=True)
    parser.add_argument("--base", type=Path, help="default: the tiny model")
    parser.add_argument("--name", default="tiny", help="of the model, in the table")
    parser.add_argument("--output", type=Path, default=ROOT / "data" / "measurements" / "merge_bases.csv")
    parser.add_argument("--jobs", type=int, default=1, help="quantizations at once")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--set", nargs="*", default=[], metavar="NAME=VALUE", help="settings of the profile tiny")
    options = parser.parse_args()
    values = {name: json.loads(value) for name, value in (pair.split("=", 1) for pair in options.set)}
    config = profile("tiny", **({"model": str(options.base)} if options.base else {}), seed=options.seed, **values)
    started = time.monotonic()
    merged = make_models(config, options.work)
    from transformers import AutoTokenizer  # noqa: F401 - imported lazily, and two threads at once would fail at it

    say(started, "fine-tuned and merged")
    with ThreadPoolExecutor(options.jobs) as pool:
        jobs = {
            pool.submit(gptq, merged[base], options.work, base, bits, calibration): (base, bits, calibration)
            for base in BASES
            for bits, calibration in WAYS
        }
        folders = {way: job.result() for job, way in jobs.items()}
    say(started, "quantized")
    with options.output.open("a", newline="", encoding="utf-8") as stream:
        table = csv.DictWriter(stream, COLUMNS)
        if stream.tell() == 0:
            table.writeheader()
        for row in measured(config, options.work, merged, folders):
            table.writerow({"model": options.name, "seed": options.seed} | row)
            stream.flush()
            say(started, str(row))


def say(started: float, text: str) -> None:
    """A line of progress with the time."""
    print(f"{time.monotonic() - started:6.1f} s  {text}", flush=True)


def make_models(config: RunConfig, work: Path) -> dict[str, Path]:
    """Prepare, fine-tune with QLoRA, and merge into both bases; what is there already is kept."""
    from helpers import merge

    prepared, tuned = work / "prepare", work / "finetune"
    if not (prepared / "manifest.json").is_file():
        from helpers import prepare

        prepare.prepare(config, prepared)
    if not (tuned / "manifest.json").is_file():
        from helpers import finetune

        print(finetune.finetune(config, prepared, tuned))
    merged = {}
    for base in BASES:
        merged[base] = work / f"merged-{base}"
        if not (merged[base] / "manifest.json").is_file():
            merge.merge(config.model.model, tuned / "adapter", merged[base], MergeConfig(merge_base=base))
    return merged


def gptq(model: Path, work: Path, base: str, bits: int, calibration: str) -> Path:
    """GPTQ of a merged model with one setting; the folder of the result."""
    config = QuantizeConfig(
        bits=bits, group_size=GROUP_SIZE, calibration=calibration, calibration_samples=128, calibration_tokens=192
    )
    output = work / f"gptq-{base}-{bits}-{calibration}"
    if (output / "quantize_config.json").is_file():
        return output
    output.mkdir(parents=True, exist_ok=True)
    sizes = shape(str(model))
    rows, _ = quantize.calibration.draw(model, config, [work / "prepare"], quantize.gptq.least_tokens(sizes))
    job = {"model": str(model.resolve()), "output": str(output.resolve()), "config": asdict(config), "rows": rows}
    quantize.process.run(job, quantize.gptq, sizes, output.with_name(output.name + ".log"))
    return output


def measured(config: RunConfig, work: Path, merged: dict[str, Path], folders: dict) -> Iterator[dict]:
    """Rows of the table: the base, the model that was trained, then each way from it. Everything computes in fp32."""
    import torch

    prepared = work / "prepare"
    trained = open_model(config, work / "finetune" / "adapter", trained=True)
    reference = log_probabilities(trained, prepared)
    row = partial(row_of, config, prepared, reference)
    yield row(open_model(config, Path(config.model.model)), "none", 16, "base", "")
    yield row(trained, "none", 16, "as trained", "")
    del trained
    for base in BASES:
        loaded = open_model(config, merged[base])
        linears = {
            name: module.weight
            for name, module in loaded.model.named_modules()
            if isinstance(module, torch.nn.Linear) and ".layers." in name
        }
        dense = {name: weight.detach().clone() for name, weight in linears.items()}
        yield row(loaded, base, 16, "merged", "")
        for bits in sorted({bits for bits, _ in WAYS}, reverse=True):
            for name, weight in linears.items():
                weight.data = quantize.rounded(dense[name], bits, GROUP_SIZE)
            yield row(loaded, base, bits, "round to nearest", "")
            for calibration in [calibration for width, calibration in WAYS if width == bits]:
                for name, weight in linears.items():
                    weight.data = quantize.dequantized(folders[base, bits, calibration], name).to(weight.device)
                yield row(loaded, base, bits, "GPTQ", calibration)


def open_model(config: RunConfig, folder: Path, trained: bool = False) -> inference.Loaded:
    """A 16-bit model computing in fp32; trained: an adapter on its NF4 base, as training had it."""
    import torch
    from peft import PeftModel
    from transformers import AutoModelForCausalLM, AutoTokenizer, BitsAndBytesConfig

    place = {"device_map": {"": "cuda" if torch.cuda.is_available() else "cpu"}, "dtype": torch.float32}
    if trained:
        place["quantization_config"] = BitsAndBytesConfig(
            load_in_4bit=True,
            bnb_4bit_quant_type="nf4",
            bnb_4bit_use_double_quant=config.model.double_quant,
            bnb_4bit_compute_dtype=torch.float32,
        )
    source = config.model.model if trained else str(folder)
    model = AutoModelForCausalLM.from_pretrained(source, **place)
    if trained:
        model = PeftModel.from_pretrained(model, str(folder))
    tokenizer = AutoTokenizer.from_pretrained(source)
    return inference.Loaded(
        model=model.eval(), tokenizer=tokenizer, kind="model", how="fp32", path=str(folder), base=source, load_s=0.0
    )


def log_probabilities(loaded: inference.Loaded, prepared: Path) -> list:
    """What a model expects at every place of the held-out conversations: a (tokens, words) tensor each."""
    import torch
    from datasets import load_from_disk

    with torch.inference_mode():
        return [
            torch.log_softmax(loaded.model(torch.tensor([ids], device=loaded.model.device)).logits[0].float(), dim=-1)
            for ids in load_from_disk(str(prepared / "heldout"))["input_ids"]
        ]


def divergence(reference: list, other: list) -> float:
    """Mean Kullback-Leibler divergence a token of other from reference, in nats: how far the trained model was left."""
    sums = [(p.exp() * (p - q)).sum().item() for p, q in zip(reference, other, strict=True)]
    return sum(sums) / sum(len(p) for p in reference)


def row_of(
    config: RunConfig, prepared: Path, reference: list, loaded: inference.Loaded, base: str, bits: int, *way: str
) -> dict:
    """Perplexity of the held-out answers with its interval, divergence, exact match on the questions."""
    settings = config.evaluate
    items = read_prepared(prepared, loaded.tokenizer)
    result = perplexity(loaded, items, settings.eval_context, settings.eval_stride, settings.eval_batch_size)
    questions = [json.loads(line) for line in Path(settings.questions).read_text(encoding="utf-8").splitlines()]
    prompts = [[{"role": "user", "content": question["question"]}] for question in questions]
    answers = inference.batch_generate(loaded, prompts, settings.max_new_tokens, batch_size=128)
    pairs = [(got.text.strip(), question["answer"].strip()) for got, question in zip(answers, questions, strict=True)]
    return {
        "merge_base": base,
        "bits": bits,
        "method": way[0],
        "calibration": way[1],
        "perplexity": round(result.perplexity.value, 4),
        "perplexity_low": round(result.perplexity.low, 4),
        "perplexity_high": round(result.perplexity.high, 4),
        "kl_from_trained": round(divergence(reference, log_probabilities(loaded, prepared)), 6),
        "exact_match": round(sum(one == other for one, other in pairs) / len(pairs), 4),
        "f1": round(sum(token_f1(*pair) for pair in pairs) / len(pairs), 4),
        "questions": len(questions),
        "tokens": result.tokens,
    }


if __name__ == "__main__":
    main()
