"""One model's figures: opened, read with, asked, timed, and its memory given back."""

import time
from collections.abc import Callable, Iterable, Iterator
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np

from helpers import hardware
from helpers.budget import host, placement
from helpers.config import RunConfig
from helpers.evaluate import cost, metrics, perplexity, preferences
from helpers.evaluate.kept import Evidence
from helpers.evaluate.perplexity import Item, Perplexity, read_items
from helpers.evaluate.tasks import run_tasks
from helpers.hardware import Machine
from helpers.inference import Generation, Loaded, batch_generate, load, shape_of
from helpers.models import gguf_engine
from helpers.models.gpu import free_memory, gives_back


@gives_back
def evaluate_one(
    path: str | Path,
    config: RunConfig,
    data: Path,
    prompts: list[dict[str, Any]],
    exact: bool,
    machine: Machine | None,
    bar: Any,
    pairs: list[preferences.Pair],
) -> tuple[dict[str, Any], Evidence]:
    """Load one model, measure everything, give its memory back; without prompts no answers and no speed.

    bar: moves with all that is read or answered; pairs: of answers, if any.
    """
    asked = config.evaluate
    entry: dict[str, Any] = {"path": str(path)}
    with cost.peak_memory() as peaks:
        bar.set_postfix_str("opening")
        loaded = load(path, config, machine)
        started = time.perf_counter()
        bar.set_postfix_str("perplexity")
        read = perplexity.perplexity(
            loaded,
            counted(read_items(data, loaded.tokenizer, asked.max_heldout), bar),
            min(asked.eval_context, loaded.context),
            min(asked.eval_stride, asked.eval_context),
            loaded.placement.batch_size,
            config.seed,
        )
        bar.set_postfix_str("answers")
        answers = ask(loaded, prompts, config, bar.update)
        if pairs:
            bar.set_postfix_str("pairs")
        liked, said = preferences.scores(loaded, pairs, config, bar) if pairs else ({}, [])
        bar.set_postfix_str("")
    entry |= {"kind": loaded.kind, "loaded_as": loaded.how, "load_s": loaded.load_s} | peaks
    entry |= sizes(path, loaded) | (cost.speed(loaded) if prompts else {})
    if loaded.placement.away:  # its copies from the host are no kernels, but nothing runs beside them
        entry["gpu_ms_per_token"] = None
    entry["evaluation_s"] = time.perf_counter() - started
    counts = host.Counts(len(read.losses), len(prompts), len(pairs))
    entry |= predictions(loaded, config, machine or hardware.probe(), counts, peaks)
    if asked.tasks:
        entry["tasks"] = run_tasks(loaded, asked.tasks, loaded.placement.batch_size)
    del loaded
    free_memory()
    references = [row["answer"] for row in prompts]
    evidence: Evidence = {"perplexity": read, "answers": answers, "references": references}
    entry |= perplexity_figures(read)
    entry |= answer_figures(evidence, prompts, exact, entry["intervals"], config.seed)
    entry |= preference_figures(evidence, liked, entry["intervals"], config.seed)
    evidence["said"] = said
    return entry, evidence


def llama_cpp_speed(path: str | Path) -> dict[str, float]:
    """Tokens a second of llama.cpp itself on a GGUF file, on this CPU; nothing where llama.cpp is not installed."""
    if find_spec("xllamacpp") is None:
        return {}
    return gguf_engine.speed(Path(path))


def predictions(
    loaded: Loaded, config: RunConfig, machine: Machine, counts: host.Counts, peaks: dict[str, float]
) -> dict[str, float]:
    """What the budget gives for a model as it was opened: `predicted_` and the name of the figure; VRAM with a GPU.

    No precision that it was opened in, or none of its shape: nothing.
    """
    place, shape = loaded.placement, shape_of(loaded.path, config)
    needs = placement.needs(place, config, shape, machine, counts)
    unmeasured = set() if "peak_allocated_gib" in peaks else {"allocated_gib", "reserved_gib"}
    return {f"predicted_{name}": size for name, size in needs.items() if name not in unmeasured}


def counted(items: Iterable[Item], bar: Any) -> Iterator[Item]:
    """The items; a bar moves on with each."""
    for item in items:
        yield item
        bar.update()


def ask(
    loaded: Loaded, prompts: list[dict[str, Any]], config: RunConfig, each: Callable[[int], Any]
) -> list[Generation]:
    """Greedy answers, each to its question in a conversation of its own; each: called with how many came."""
    asked = config.evaluate
    chats = [[{"role": "user", "content": row["question"]}] for row in prompts]
    batch_size = loaded.placement.batch_size
    return batch_generate(loaded, chats, asked.max_new_tokens, batch_size, each=each) if chats else []


def sizes(path: str | Path, loaded: Loaded) -> dict[str, Any]:
    """size_bytes of the model's own folder; an adapter's with its base beside it."""
    own = cost.disk_bytes(path)
    if loaded.kind != "adapter":
        return {"size_bytes": own}
    base = cost.disk_bytes(loaded.base)
    return {"size_bytes": own, "size_with_base_bytes": None if base is None else own + base}


def perplexity_figures(read: Perplexity) -> dict[str, Any]:
    """The entry's part about held-out texts."""
    return {
        "perplexity": read.perplexity.value,
        "bits_per_byte": read.bits_per_byte.value,
        "scored_tokens": read.tokens,
        "scored_items": len(read.losses),
        "context": read.context,
        "stride": read.stride,
        "intervals": {
            "perplexity": [read.perplexity.low, read.perplexity.high],
            "bits_per_byte": [read.bits_per_byte.low, read.bits_per_byte.high],
        },
    }


def answer_figures(
    evidence: Evidence, prompts: list[dict[str, Any]], exact: bool, intervals: dict[str, list[float]], seed: int
) -> dict[str, Any]:
    """The entry's part about answers; fills evidence with items' scores, and intervals."""
    answers: list[Generation] = evidence["answers"]
    figures: dict[str, Any] = {"exact_match": None, "answers": len(answers)}
    if not answers:
        return figures
    texts = [answer.text for answer in answers]
    scores = metrics.answer_scores(texts, evidence["references"])
    if not exact:  # an open answer is never the same word for word
        del scores["exact_match"]
    evidence["scores"] = scores | {"ended_share": np.array([float(answer.ended) for answer in answers])}
    for name, values in evidence["scores"].items():
        estimate = metrics.mean_interval(values, seed)
        figures[name], intervals[name] = estimate.value, [estimate.low, estimate.high]
    evidence["bleu"] = metrics.bleu_counts(texts, evidence["references"])
    estimate = metrics.bleu_interval(evidence["bleu"], seed)
    figures["bleu"], intervals["bleu"] = estimate.value, [estimate.low, estimate.high]
    labelled = [i for i, row in enumerate(prompts) if row.get("choices")]
    if labelled:
        figures["classification"] = metrics.classification(
            [texts[i] for i in labelled], [evidence["references"][i] for i in labelled]
        )
    return figures


def preference_figures(
    evidence: Evidence, liked: dict[str, np.ndarray], intervals: dict[str, list[float]], seed: int
) -> dict[str, float]:
    """The entry's part about pairs; fills evidence and intervals. The length of answers is no better or worse."""
    figures = {}
    for name, values in liked.items():
        estimate = metrics.mean_interval(values, seed)
        figures[name], intervals[name] = estimate.value, [estimate.low, estimate.high]
    compared = {name: values for name, values in liked.items() if name != "answer_tokens"}
    evidence["scores"] = evidence.get("scores", {}) | compared
    return figures
