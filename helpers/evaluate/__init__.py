"""One table that says whether the model got better, what the 4 bits cost, and whether it is fast enough.

    report = evaluate({"base": base, "finetuned": adapter, "merged": merged, "gptq": gptq}, config, prepared, output)
    print(table(report))

One model is in memory at a time, or one on each of several GPUs (workers.py). Every figure is from the same held-out
texts and questions for all of them, so that each pair of models is compared item by item; and each model is what its
folder holds, never rounded again to fit a small GPU (budget/placement.py). What cannot be opened so has no figures and
no verdict, and a sentence says why.
"""

import json
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from helpers import hardware
from helpers.budget import host, placement
from helpers.budget.placement import Evaluation, Placement
from helpers.config import RunConfig
from helpers.evaluate import cost, kept, metrics, preferences, workers
from helpers.evaluate import report as report_pages
from helpers.evaluate.kept import Evidence
from helpers.evaluate.measure import evaluate_one, llama_cpp_speed
from helpers.evaluate.perplexity import read_items, read_jsonl, rows_in
from helpers.hardware import Machine
from helpers.inference import kind, open_tokenizer, pinned, shape_of
from helpers.models import gguf_header
from helpers.models.gpu import gives_back
from helpers.models.methods import METHODS
from helpers.show import bars, plots
from helpers.workspace import MANIFEST, SCRATCH, Building, building, empty_folder, maker, read_manifest, write_text
from helpers.workspace.prepared import scored, with_own_questions


@dataclass(frozen=True)
class Asked:
    """What an evaluation is about, read and planned before anything is loaded."""

    models: dict[str, str | Path]
    config: RunConfig
    """As planned: with fewer questions than were asked for where time demands it."""
    data: Path
    prompts: list[dict[str, Any]]
    pairs: list[preferences.Pair]
    texts: int
    machine: Machine | None
    """What the caller says; None: what each process finds."""
    here: Machine
    planned: Evaluation

    @property
    def exact(self) -> bool:
        """Whether answers can be right word for word."""
        return self.config.evaluate.questions is not None

    def answered(self, name: str) -> list[dict[str, Any]]:
        """The questions that a model answers: none where that would take too long."""
        return self.prompts if self.planned.places[name].answers else []

    def compared(self, name: str) -> list[preferences.Pair]:
        """The pairs that a model reads."""
        return self.pairs if self.planned.places[name].answers else []


@gives_back
def evaluate(
    models: dict[str, str | Path], config: RunConfig, data: Path, output: Path, machine: Machine | None = None
) -> dict[str, dict[str, Any]]:
    """Evaluate models by name (a folder or a hub id each) on held-out data; returns and writes report.json.

    data: a folder that prepare wrote (its held-out split), a JSONL of messages or text, or a text file. Questions come
    from config.evaluate.questions; without them the first turns of the held-out conversations are asked, and scored
    against what was answered there. An entry holds perplexity, bits_per_byte, exact_match (0..1; None without
    questions), f1, rouge_l, chrf, bleu, ended_share, size_bytes, load_s, first_token_s, tokens_per_s …, the 95%
    `intervals`, how it was opened (`loaded_as`), what was predicted, and under `against` its comparison with every
    model before it; with pairs (config.evaluate.preferences, or data itself) the figures of preferences.py too. An
    entry with `left_out` has no figures; that sentence says why. With config.train.gpus above 1 so many models are
    evaluated at once. What is measured is kept: stopped, the same call goes on with the models that are missing.
    machine: whose VRAM and RAM decide how models are opened; default this one.
    Raises ValueError with one sentence for what the reader can mend. A model that fails when there are figures of
    others is left out.
    """
    asked = read_and_plan(models, config, Path(data), machine)
    inputs = {name: Path(path) for name, path in asked.models.items()} | {"data": asked.data}
    with building(output, "evaluate", asked.config, inputs, keep=True) as stage:
        empty_folder(stage.folder, scratch_too=False)  # a report that was stopped while it was written
        twin = kept.lasting(output)
        tasks = tasks_of(asked, stage.folder / SCRATCH)
        failed = measured(tasks, asked, twin)
        report, evidence = compared(asked, {task.name: task.file for task in tasks}, failed)
        write_report(stage, asked, report, evidence, failed)
    kept.clear(twin)
    return report


def read_and_plan(models: dict[str, str | Path], config: RunConfig, data: Path, machine: Machine | None) -> Asked:
    """Everything that is asked, and how each model is opened. Raises ValueError for what cannot be."""
    config = with_own_questions(config, data)
    asked = config.evaluate
    models = {name: pinned(path, config) for name, path in models.items()}
    check_models(models, config)
    questions = read_questions(asked.questions, asked.max_questions) if asked.questions else None
    tokenizer = open_tokenizer(next(iter(models.values())), config)
    next(read_items(data, tokenizer, asked.max_heldout))  # an empty file is found here, before anything is loaded
    pairs = preferences.read(Path(asked.preferences or data), asked.max_heldout, asked.preferences is not None)
    prompts = questions or conversation_starts(data, asked.max_questions or host.UNASKED_PROMPTS)
    texts = min(rows_in(data, asked.eval_context), asked.max_heldout or 10**9)
    here = machine or hardware.probe()
    planned = plan(models, config, here, host.Counts(texts, len(prompts), len(pairs)))
    prompts = prompts[: planned.config.evaluate.max_questions]
    return Asked(models, planned.config, data, prompts, pairs, texts, machine, here, planned)


def tasks_of(asked: Asked, folder: Path) -> list[workers.Task]:
    """A task for each model that can be opened; folder: where its figures are kept."""
    tasks = []
    for number, (name, path) in enumerate(asked.models.items(), 1):
        place = asked.planned.places[name]
        if place.problem:
            continue
        some, pairs = asked.answered(name), asked.compared(name)
        arguments = {"path": path, "config": asked.config, "data": asked.data, "prompts": some, "exact": asked.exact}
        arguments |= {"machine": asked.machine, "pairs": pairs, "host": asked.here.host}
        ram_gib = sum(placement.ram(place, asked.config, shape_of(path, asked.config), asked.here).values())
        steps = asked.texts + len(some) + preferences.steps(pairs, asked.config)
        file = kept.name_of(name, path, asked.config, asked.data, [some, len(pairs)], asked.here.name)
        title = f"{name}, {number} of {len(asked.models)}"
        tasks.append(workers.Task(name, title, steps, ram_gib, folder / file, arguments))
    return tasks


def measured(tasks: list[workers.Task], asked: Asked, twin: Path | None) -> dict[str, str]:
    """Measure the models whose figures are not kept; returns why some have none. twin: where they are kept for good.

    Raises ValueError when no model has figures.
    """
    for task in tasks:
        kept.fetch(task.file, twin)
    times = {task.name: known[2] for task in tasks if (known := kept.read(task.file))}
    for name, at in times.items():
        print(f"{name}: kept from {kept.when(at)}.")
    missing = [task for task in tasks if task.name not in times]
    gpus, files = workers.count(asked.config, len(missing)), {task.name: task.file for task in missing}
    alone = one_by_one(missing, alone=not times)
    failed: dict[str, str] = {}
    try:
        for name, why in workers.at_once(missing, gpus, asked.here.host.ram_gib) if gpus > 1 else alone:
            if why:
                failed[name] = why
            else:
                times[name] = time.time()
                kept.send(files[name], twin)
    except BaseException:
        if times:
            print(f"The figures of {', '.join(times)} are kept: the same command goes on from them.", file=sys.stderr)
        raise
    if not times:
        raise ValueError("; ".join(reasons(failed)))
    return failed


def reasons(failed: dict[str, str]) -> list[str]:
    """Why models have no figures, a sentence each."""
    return [f"{name} is not evaluated: {why}" for name, why in failed.items()]


def compared(
    asked: Asked, files: dict[str, Path], failed: dict[str, str]
) -> tuple[dict[str, dict[str, Any]], dict[str, Evidence]]:
    """(an entry a model, each with its comparison with those before it; their evidence)."""
    report: dict[str, dict[str, Any]] = {}
    evidence: dict[str, Evidence] = {}
    for name, path in asked.models.items():
        place = asked.planned.places[name]
        if why := failed.get(name, place.problem):
            report[name] = left_out(path, place, why)
            continue
        report[name], evidence[name], _ = kept.read(files[name])
        if place.kind == "gguf" and asked.answered(name):  # beside PyTorch, the engine it is made for
            report[name] |= llama_cpp_speed(path)
        report[name]["against"] = {
            other: compare_models(evidence[name], evidence[other]) for other in evidence if other != name
        }
    return report, evidence


def write_report(
    stage: Building,
    asked: Asked,
    report: dict[str, dict[str, Any]],
    evidence: dict[str, Evidence],
    failed: dict[str, str],
) -> None:
    """Cards, report.json, answers, plots and the page."""
    write_cards(report, asked.config, stage.folder / "cards")
    stage.measurements.update(report)
    write_text(stage.folder / "report.json", json.dumps(report, indent=1))
    generations = write_generations(stage.folder / "generations.jsonl", asked.prompts, evidence)
    if said := {name: found["said"] for name, found in evidence.items() if found["said"]}:
        preferences.write(stage.folder / "pairs.jsonl", asked.pairs, said)
    drawn = report_pages.figures(report, training_log(asked.models))
    for name, figure in drawn.items():
        plots.save(figure, stage.folder / "plots" / f"{name}.png")
    notes = [*asked.planned.notes, *reasons(failed)]
    about = describe(report, asked.data, len(asked.prompts), asked.config.evaluate.questions, notes)
    made = report_pages.made_with(trained_with(asked.models) or asdict(asked.config), asked.here.name)
    report_pages.write_html(stage.folder / "report.html", report, generations, drawn, about, made)


def plan(models: dict[str, str | Path], config: RunConfig, machine: Machine, counts: host.Counts) -> Evaluation:
    """How the models are opened and what is read; prints what is not as asked. Raises ValueError when none can be."""
    planned = placement.plan(
        config,
        {name: (kind(path), shape_of(path, config), stored_bytes(path)) for name, path in models.items()},
        machine,
        counts,
    )
    if all(place.problem for place in planned.places.values()):
        raise ValueError("; ".join(planned.notes))
    for note in planned.notes:
        print(f"{note}.")
    return planned


def stored_bytes(path: str | Path) -> int:
    """Bytes of a GGUF file's tensors; 0 of anything else, whose shape says them."""
    return gguf_header.weight_bytes(Path(path)) if kind(path) == "gguf" else 0


def one_by_one(tasks: list[workers.Task], alone: bool) -> Iterator[tuple[str, str]]:
    """Each task's name when it is done in this process, with "" or why it has no figures.

    alone: raise the first model's error, since as yet there is nothing to keep.
    """
    for task in tasks:
        arguments = {name: value for name, value in task.arguments.items() if name != "host"}
        why = ""
        with bars.bar(task.title, task.steps) as bar:
            try:
                kept.write(task.file, *evaluate_one(**arguments, bar=bar))
            except Exception as error:
                if alone and task is tasks[0]:
                    raise
                why = workers.in_words(error)
                print(f"{workers.came_from(error)}{task.name} is not evaluated: {why}.", file=sys.stderr)
        yield task.name, why


def left_out(path: str | Path, place: Placement, why: str) -> dict[str, Any]:
    """The entry of a model that is not evaluated."""
    return {"path": str(path), "kind": place.kind, "loaded_as": "not evaluated", "left_out": why}


def best(models: dict[str, str | Path]) -> str | Path:
    """The model to take home and to talk to: the quantized one, else the fine-tuned one, else the merged one.

    Raises ValueError when there is only the base.
    """
    for name in (*METHODS, "finetuned", "merged"):
        if name in models:
            return models[name]
    raise ValueError(f"there is no model of yours yet, only the base: run {maker('finetune')} first")


def write_cards(report: dict[str, dict[str, Any]], config: RunConfig, folder: Path) -> None:
    """A model card each: into folder, and as README.md beside the models that a run made; sizes count it."""
    folder.mkdir()
    for name, entry in report_pages.evaluated(report).items():
        made_with = run_configuration(Path(entry["path"])) or asdict(config)
        card = report_pages.model_card(name, entry, made_with)
        write_text(folder / f"{name}.md", card)
        if entry["kind"] != "gguf" and report_pages.put_card(card, Path(entry["path"])):
            grown = cost.disk_bytes(entry["path"]) - entry["size_bytes"]
            for key in {"size_bytes", "size_with_base_bytes"} & set(entry):
                entry[key] += grown


def run_configuration(folder: Path) -> dict[str, Any] | None:
    """What the manifest of a model's own stage holds; None for models from elsewhere."""
    for place in (folder, folder.parent):
        if (place / MANIFEST).is_file():
            return read_manifest(place)["config"]
    return None


def trained_with(models: dict[str, str | Path]) -> dict[str, Any] | None:
    """The configuration that one of the models was trained with; None when no run made any of them."""
    found = (run_configuration(Path(path)) for path in models.values())
    return next((config for config in found if config), None)


def training_log(models: dict[str, str | Path]) -> list[dict[str, Any]] | None:
    """The trainer's log history beside an adapter, when there is one."""
    logs = [Path(path).parent / "log.json" for path in models.values() if kind(path) == "adapter"]
    return next((json.loads(log.read_text(encoding="utf-8")) for log in logs if log.is_file()), None)


def describe(
    report: dict[str, dict[str, Any]], data: Path, prompts: int, questions: str | None, notes: Sequence[str] = ()
) -> str:
    """How the figures came about, in two sentences, and what was not as asked, one sentence each."""
    first = next(iter(report_pages.evaluated(report).values()))
    asked = f"the questions of {Path(questions).name}" if questions else f"the first turns of {data.name}"
    read = (
        f"Perplexity of {first['scored_tokens']:,} tokens of {first['scored_items']} texts ({data.name}), in windows "
        f"of {first['context']} tokens with stride {first['stride']}. {prompts} greedy answers, to {asked}."
    )
    return " ".join([read, *(f"{note[0].upper()}{note[1:]}." for note in notes)])


def check_models(models: dict[str, str | Path], config: RunConfig) -> None:
    """Raises ValueError for no model, a folder that is none, or models whose tokenizers differ."""
    if not models:
        raise ValueError("there is no model to evaluate: give at least one NAME=FOLDER")
    for name, path in models.items():
        kind(path)
        if not name or Path(name).name != name:
            raise ValueError(f"a model cannot be called {name!r}: files get that name; choose letters and digits")
    first, *others = models
    words = open_tokenizer(models[first], config).get_vocab()
    for name in others:
        theirs = open_tokenizer(models[name], config).get_vocab()
        if theirs != words:
            different = len(set(words.items()) ^ set(theirs.items()))
            raise ValueError(
                f"{first} and {name} have different tokenizers ({len(words)} and {len(theirs)} words, {different} of "
                "them differ), so their perplexities a token cannot be compared: evaluate them apart, and compare "
                "bits_per_byte"
            )


def read_questions(path: str | Path, limit: int | None = None) -> list[dict[str, Any]]:
    """Rows of question and answer, and choices where it is a classification. Raises ValueError with one sentence."""
    if not Path(path).is_file():
        raise ValueError(f"there is no questions file {path}: give a JSONL of question and answer, or none")
    rows = list(read_jsonl(Path(path)))
    for number, row in enumerate(rows, 1):
        if not (isinstance(row.get("question"), str) and isinstance(row.get("answer"), str)):
            raise ValueError(f"{path}, row {number} lacks question or answer: both are needed, as text")
    if not rows:
        raise ValueError(f"{path} holds no question: give a JSONL of question and answer, or none")
    return rows[:limit]


def conversation_starts(data: Path, limit: int) -> list[dict[str, Any]]:
    """First user turn and first answer of held-out conversations, as questions; none when data is plain text."""
    if data.is_dir():
        rows = scored(data)
    elif data.suffix in (".jsonl", ".json"):
        rows = read_jsonl(data)
    else:
        return []
    starts = []
    for row in rows:
        turns = {turn["role"]: turn["content"] for turn in reversed(row.get("messages") or [])}
        if "user" in turns and "assistant" in turns:
            starts.append({"question": turns["user"], "answer": turns["assistant"]})
        if len(starts) == limit:
            break
    return starts


def compare_models(one: Evidence, other: Evidence) -> dict[str, dict[str, Any]]:
    """Metric -> verdict, difference (one − other), its interval and p; of perplexity the difference is in log."""
    ours, theirs = one["perplexity"], other["perplexity"]
    found = {"perplexity": metrics.compare(ours.losses, theirs.losses, ours.weights, lower_is_better=True)}
    for name in one.get("scores", {}).keys() & other.get("scores", {}).keys():
        found[name] = metrics.compare(one["scores"][name], other["scores"][name])
    if "bleu" in one and "bleu" in other:
        found["bleu"] = metrics.compare_bleu(one["bleu"], other["bleu"])
    return {name: asdict(comparison) for name, comparison in found.items()}


def write_generations(path: Path, prompts: list[dict[str, Any]], evidence: dict[str, Evidence]) -> list[dict[str, Any]]:
    """A line a prompt: question, answer, and under `models` each model's text, tokens, ended. Returns the rows."""
    answers = {name: found["answers"] for name, found in evidence.items() if found["answers"]}
    rows = [
        row | {"models": {name: asdict(found[i]) for name, found in answers.items()}} for i, row in enumerate(prompts)
    ]
    write_text(path, "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))
    return rows


def table(report: dict[str, dict[str, Any]]) -> str:
    """The most wanted figures as text, and each model against the one before it in words."""
    return report_pages.text_table(report)


__all__ = ["evaluate", "table"]
