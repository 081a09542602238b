"""What each stage of the command line does: options and settings in, exit status, result and text out."""

import argparse
import os
import shutil
import sys
from dataclasses import asdict
from pathlib import Path

from helpers import budget, hardware, models
from helpers.budget import sharding, ways
from helpers.config import RunConfig
from helpers.models import gpu, hub
from helpers.show import tables
from helpers.workspace import MissingArtifact, Workspace, choices, fetch, run_models
from helpers.workspace.whole import maker

DONE, FAILED, WRONG_REQUEST, DOES_NOT_FIT = 0, 1, 2, 3
Outcome = tuple[int, dict, str]


def workspace_of(options: argparse.Namespace, config: RunConfig) -> Workspace:
    """The run's folder: `--workspace`, or runs/PROFILE in the current folder."""
    return Workspace(options.workspace or Path("runs") / config.profile)


def earlier(run: Workspace, stage: str) -> Path:
    """The folder that an earlier stage of the run wrote, fetched where only lasting storage has it.

    Raises MissingArtifact, which says what makes it.
    """
    folder = run.folder(stage)
    fetch(folder)
    if not folder.exists():
        raise MissingArtifact(f"{folder} is not there: run {maker(stage)} first")
    return folder


def machine_of(options: argparse.Namespace) -> hardware.Machine:
    """This machine, or the one that `--gpu` names."""
    return hardware.probe() if options.gpu == "auto" else hardware.machine(options.gpu)


def run_budget(options: argparse.Namespace, config: RunConfig) -> Outcome:
    """What it needs; exit 3 when it does not fit."""
    shape, machine = models.shape(config.model.model, config.model.revision), machine_of(options)
    if options.budget_stage == "export":
        return budget_of_export(config, shape, machine)
    sharding.refuse_more_than_there_are(config, machine)
    settled = budget.settle(config, shape, machine, stage=options.budget_stage)
    found = ways.every(config, shape, machine) if options.budget_stage in ("train", "run") else ()
    result = budget.to_json(settled) | ({"ways": [asdict(way) for way in found]} if found else {})
    text = "\n".join([budget.table(settled.budget), *(f"Plan: {reason}" for reason in settled.plan.reasons)])
    text += f"\n{ways.table(found)}" if found else ""
    if options.verify:
        from helpers.finetune import verify

        result["verify"] = verify.verify(settled.plan.config)
        text += "\n" + tables.columns_of(result["verify"])
    return (DONE if settled.budget.fits else DOES_NOT_FIT), result, text


def budget_of_export(config: RunConfig, shape: models.ModelShape, machine: hardware.Machine) -> Outcome:
    """What every type of a GGUF file takes to make, and what runs on a laptop of 8 GB, with and without a GPU."""
    from helpers.budget import export

    estimate, types = export.needs(config, shape, machine), export.choices(shape, machine.host.cpus)
    laptop = export.runs_on(shape, ram_gib=8, vram_gib=6)
    result = asdict(estimate) | {"plan": asdict(config), "types": [asdict(one) for one in types], "laptop_8_gb": laptop}
    text = f"{budget.table(estimate)}\n\n{export.table(types, laptop)}"
    return (DONE if estimate.fits else DOES_NOT_FIT), result, text


def run_prepare(options: argparse.Namespace, config: RunConfig) -> Outcome:
    from helpers import prepare

    run = workspace_of(options, config)
    output = options.output or run.folder("prepare")
    made = prepare.prepare(config, output, source=options.input)
    if options.output is None:
        choices.keep(run, config, "by python -m helpers prepare")
    told = dict(prepare.summary(made)) | {"finding": [row["sentence"] for row in made["findings"]]}
    return DONE, {"output": str(output), **made}, f"prepare done: {output}\n{tables.text(told)}"


def run_finetune(options: argparse.Namespace, config: RunConfig) -> Outcome:
    gpu.claim_card()
    from helpers import finetune

    run = workspace_of(options, config)
    output = options.output or run.folder("finetune")
    prepared = options.prepared or run.folder("prepare")
    runs = config
    if config.train.gpus == 1 and finetune.ranks.expected() == 1:  # several are planned where they run, on each GPU
        shape, machine = models.shape(config.model.model, config.model.revision), machine_of(options)
        settled = budget.settle(config, shape, machine, finetune.plan(config, output, machine, options.resume))
        if not settled.budget.fits:
            return DOES_NOT_FIT, budget.to_json(settled), "\n".join(settled.budget.reasons)
        runs = settled.config
    if options.output is None and gpu.is_first():
        choices.keep(run, config, "by python -m helpers finetune")
    return done("finetune", output, finetune.finetune(runs, prepared, output, resume=options.resume))


def run_merge(options: argparse.Namespace, config: RunConfig) -> Outcome:
    from helpers import merge

    run = workspace_of(options, config)
    output = options.output or run.folder("merge")
    adapter = options.adapter or earlier(run, "finetune") / "adapter"
    base = options.base or config.model.model
    revision = options.revision or (config.model.revision if base == config.model.model else None)
    return done("merge", output, merge.merge(base, adapter, output, config.merge, revision))


def run_quantize(options: argparse.Namespace, config: RunConfig) -> Outcome:
    from helpers import quantize

    run = workspace_of(options, config)
    output = options.output or run.folder("quantize")
    merged = options.merged or earlier(run, "merge")
    if not merged.exists() and len(merged.parts) == 2 and not merged.is_absolute():
        merged = hub.snapshot(str(merged), config.model.revision)
    try:
        figures = quantize.quantize(merged, output, config.quantize, run.folder("prepare"))
    except quantize.BrokenResult as error:
        return FAILED, {"failed": str(error)}, f"quantize: {error}"
    _, result, _ = done("quantize", output, figures)
    return DONE, result, f"quantize done: {output}\n{tables.text(by_layer(figures))}"


def by_layer(figures: dict) -> dict:
    """Figures of GPTQ with the modules' errors as one row a layer.

    >>> rows = [{"layer": 0, "module": "self_attn.q_proj", "error": 0.5}]
    >>> by_layer({"bits": 4, "layer_errors": {"0": 0.5}, "modules": rows})
    {'bits': 4, 'errors': [{'layer': 0, 'all': 0.5, 'q_proj': 0.5}]}
    """
    rows = {int(layer): {"layer": int(layer), "all": error} for layer, error in figures["layer_errors"].items()}
    for row in figures["modules"]:
        rows[row["layer"]][row["module"].rpartition(".")[2]] = row["error"]
    rest = {name: value for name, value in figures.items() if name not in ("modules", "layer_errors")}
    names = sorted({name for row in rows.values() for name in row} - {"layer", "all"})
    return rest | {"errors": [{name: row.get(name) for name in ("layer", "all", *names)} for row in rows.values()]}


def run_export(options: argparse.Namespace, config: RunConfig) -> Outcome:
    from helpers import export

    run, output = workspace_of(options, config), options.output
    if options.to != "gguf":
        return run_share(options, run)
    if options.adapter:
        from helpers.inference import base_of

        base, output = Path(base_of(options.adapter, config)), output or run.root / "adapter.gguf"
        return done("export", output, export.export_adapter(options.adapter, base, output))
    weights = export.importance_matrix(run, config, options.type, options.imatrix)
    if output is None and options.merged is None:
        return done("export", run.folder("export"), export.export_run(run, config, options.type, weights))
    model, output = options.merged or run.folder("merge"), output or Path(f"{options.merged.name}.gguf")
    made = export.export(model, output, options.type, options.modelfile, run.folder("prepare"), weights)
    return done("export", output, made)


def run_serve(options: argparse.Namespace, config: RunConfig) -> Outcome:
    from helpers import serve

    chosen = options.served or [str(serve.default_model(workspace_of(options, config)))]
    if options.batch:
        return run_batch(options, config, chosen)
    result = serve.serve(chosen, config, options.host, options.port, options.api_key, options.page)
    return DONE, result, f"serve: stopped after {result['requests']} requests"


def run_batch(options: argparse.Namespace, config: RunConfig, chosen: list[str]) -> Outcome:
    """A file of prompts answered by one model, without a server."""
    from helpers.serve import batch, names

    if len(chosen) > 1:
        raise ValueError(f"--batch is answered by one model, and --model names {len(chosen)}: run it once for each")
    if options.max_tokens is not None and options.max_tokens < 1:
        raise ValueError(f"--max-tokens {options.max_tokens} leaves nothing to answer with: take at least 1")
    output = options.output or options.batch.with_suffix(".answers.jsonl")
    (model,) = names(chosen).values()
    return done("serve", output, batch.answer(str(model), config, options.batch, output, options.max_tokens))


def run_share(options: argparse.Namespace, run: Workspace) -> Outcome:
    """A finished stage as it is: to Drive or another folder, into one zip, to the hub."""
    from helpers.export import share

    stage = share.stage_of(options.adapter or options.merged or run.folder("quantize"))
    if options.to == "hub":
        where = share.to_hub(stage, share.repository(options.output), private=not options.public)
    elif options.to == "zip":
        where = share.to_download(stage, options.output or run.root / f"{stage.name}.zip")
    else:
        where = share.to_folder(stage, options.output or share.drive())
    return DONE, {"output": str(where)}, f"export done: {where}"


def run_evaluate(options: argparse.Namespace, config: RunConfig) -> Outcome:
    from helpers import evaluate
    from helpers.evaluate import judge

    run = workspace_of(options, config)
    chosen = dict(name_and_folder(pair) for pair in options.models) if options.models else run_models(run, config)
    output = options.output or run.folder("evaluate")
    key = os.environ.get("RECIPES_JUDGE_KEY", "")
    if options.judge:
        judge.check(options.judged, chosen, options.judge_model)
        judge.reply("Reply with TIE.", options.judge, options.judge_model, key)  # known before the hours, not after
    result = evaluate.evaluate(chosen, config, options.data or run.folder("prepare"), output)
    if output == run.folder("evaluate"):
        shutil.copy(output / "report.json", run.root)
    text = evaluate.table(result) + f"\n\n{output / 'report.html'}"
    if not options.judge:
        return DONE, result, text
    try:
        judged = judge.ask(output, options.judged, options.judge, options.judge_model, key)
    except ValueError as error:
        return FAILED, result | {"judged": {"failed": str(error)}}, f"{text}\n\nnot judged: {error}"
    return DONE, result | {"judged": judged}, f"{text}\n\njudged\n{tables.text(judged)}"


def name_and_folder(pair: str) -> tuple[str, str]:
    """`NAME=DIR` in two. Raises ValueError for anything else."""
    name, separator, folder = pair.partition("=")
    if not (name and separator and folder):
        raise ValueError(f"--models takes NAME=DIR, not {pair!r}")
    return name, folder


def run_all(options: argparse.Namespace, config: RunConfig) -> Outcome:
    """Every stage in order, each from the folder that the last one wrote."""
    if int(os.environ.get("WORLD_SIZE", 1)) > 1:
        raise ValueError("run is started once, and finetune takes its GPUs itself: python -m helpers run --gpus all")
    absent = dict.fromkeys(("input", "output", "prepared", "base", "adapter", "merged", "models", "data", "judge"))
    options = argparse.Namespace(**(absent | vars(options)))
    if config.quantize.calibration not in ("own", "general", "both"):
        from helpers import quantize

        # a file that is not there is missed now, not after the training
        quantize.calibration.sources(config.quantize, [])
    if config.train.trains == "all":
        raise ValueError(
            "trains=all leaves a whole model and no adapter to merge: run finetune, then quantize --model and "
            "evaluate --models on its finetune/model"
        )
    outcome: Outcome = (DONE, {}, "")
    refuse_what_no_stage_could_end(options, config)
    for stage in stages_of_run(config):
        print(f"== {stage}", file=sys.stderr, flush=True)
        outcome = STAGES[stage](options, config)
        if outcome[0] != DONE:
            break
    return outcome


def refuse_what_no_stage_could_end(options: argparse.Namespace, config: RunConfig) -> None:
    """Raise before the first download what a later stage would raise: no GPU, or too little of something.

    A run that has trained has its base, and part of what it needs of the disk, already.
    """
    from helpers.finetune.base import refuse_without_gpu

    if workspace_of(options, config).folder("finetune").exists():
        return
    refuse_without_gpu(config)
    if config.train.gpus == 1:  # several are planned where they run, on each GPU
        shape, machine = models.shape(config.model.model, config.model.revision), machine_of(options)
        budget.check(budget.settle(config, shape, machine, stage="run").budget)


def stages_of_run(config: RunConfig) -> list[str]:
    """The stages of a whole run; says which are left out, and why."""
    if why := models.shape(config.model.model, config.model.revision).adapter_only:
        print(f"merge and quantize are left out: {why}", file=sys.stderr, flush=True)
        return ["prepare", "finetune", "evaluate"]
    return ["prepare", "finetune", "merge", "quantize", "evaluate"]


def done(stage: str, output: Path, measurements: dict) -> Outcome:
    """A finished stage: where it lies and what was measured."""
    return DONE, {"output": str(output), **measurements}, f"{stage} done: {output}\n{tables.text(measurements)}"


STAGES = {
    "budget": run_budget,
    "prepare": run_prepare,
    "finetune": run_finetune,
    "merge": run_merge,
    "quantize": run_quantize,
    "evaluate": run_evaluate,
    "export": run_export,
    "serve": run_serve,
    "run": run_all,
}
