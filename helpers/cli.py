"""`python -m helpers STAGE`: the notebooks' functions without a notebook.

Every field of RunConfig is a flag (`--rank 32`), on top of `--profile` and `--config FILE.yaml`. Exit status: 0 done,
1 failed, 2 the request is wrong (the sentence says what to change), 3 it does not fit.
"""

import argparse
import ast
import inspect
import itertools
import json
import os
import shutil
import sys
import textwrap
import traceback
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stdout
from dataclasses import fields
from pathlib import Path

from helpers import budget, hardware, models
from helpers.config import DataConfig, RunConfig, field_parts, load_yaml
from helpers.models import hub
from helpers.show import troubleshooting
from helpers.workspace import StorageError, Workspace, choices, run_models

DONE, FAILED, WRONG_REQUEST, DOES_NOT_FIT = 0, 1, 2, 3
STAGE_HELP = {
    "budget": "what a run needs of VRAM, RAM, disk and hours, and a plan that fits",
    "prepare": "conversations in, checked, formatted, masked, split",
    "finetune": "QLoRA on the prepared conversations",
    "merge": "the adapter into its base, tensor by tensor",
    "quantize": "GPTQ of the merged model",
    "evaluate": "one table: base, fine-tuned, merged, GPTQ",
    "export": "a GGUF file for Ollama, llama.cpp and LM Studio",
    "serve": "a model behind OpenAI's API, and a page to chat with it",
    "run": "all stages in order",
}
AFTER_TRAINING = ("merge", "quantize", "evaluate", "export", "serve")
OWN_FLAGS = {"quantize": {"model", "calibration"}, "merge": set(), "export": {"model"}, "serve": {"model"}}
"""Fields of RunConfig whose flag a stage gives another meaning: there they name a folder or a file."""


def main(arguments: list[str] | None = None) -> int:
    """Run one stage; returns the exit status."""
    options = parser().parse_args(arguments)
    with standard_output_for_result() as result_stream:
        try:
            status, result, text = STAGES[options.stage](options, configuration(options))
        except StorageError as error:
            print(f"{options.stage}: {error}", file=sys.stderr)
            return FAILED
        except ValueError as error:
            print(f"{options.stage}: {error}", file=sys.stderr)
            if os.environ.get("RECIPES_DEBUG"):
                traceback.print_exc()
            return DOES_NOT_FIT if isinstance(error, budget.DoesNotFit) else WRONG_REQUEST
        except KeyboardInterrupt:
            print(f"{options.stage}: stopped; the same command continues where it can", file=sys.stderr)
            return FAILED
        except Exception as error:
            traceback.print_exc()
            print(f"{options.stage} failed: {type(error).__name__}: {error}", file=sys.stderr)
            known = troubleshooting.remedy(error)
            print(f"What to do: {known}" if known else "", end="\n" if known else "", file=sys.stderr)
            return FAILED
        print(json.dumps(result, indent=1, default=str) if options.json else text, file=result_stream, flush=True)
    return status


@contextmanager
def standard_output_for_result() -> Iterator:
    """Yield a stream to the real standard output; what libraries print meanwhile goes to standard error."""
    sys.stdout.flush()
    saved = os.dup(1)
    os.dup2(2, 1)
    try:
        with os.fdopen(os.dup(saved), "w", encoding="utf-8") as stream, redirect_stdout(sys.stderr):
            yield stream
    finally:
        sys.stdout.flush()
        os.dup2(saved, 1)
        os.close(saved)


def parser() -> argparse.ArgumentParser:
    """One subcommand a stage; every field of RunConfig a flag in each."""
    top = argparse.ArgumentParser(prog="python -m helpers", description=__doc__.split("\n\n")[0])
    stages = top.add_subparsers(dest="stage", required=True, metavar="STAGE")
    for stage, summary in STAGE_HELP.items():
        sub = stages.add_parser(stage, help=summary, description=summary, allow_abbrev=False)
        sub.add_argument("--profile", choices=models.PROFILES, default=None, help="tiny or mistral-7b")
        sub.add_argument("--config", type=Path, help="YAML with settings; flags go before it")
        sub.add_argument("--workspace", type=Path, help="the run's folder (default runs/PROFILE)")
        sub.add_argument("--json", action="store_true", help="one JSON object on standard output, all else on stderr")
        if stage in ("budget", "finetune", "run"):
            sub.add_argument("--gpu", default="auto", help="auto (this machine), none, or a name: t4, l4, a100-40gb, …")
        told = prepare_help() if stage == "prepare" else {}
        for field in setting_fields():
            if field.name in OWN_FLAGS.get(stage, set()) | {"profile"}:
                continue
            says = {"help": told.get(field.name, argparse.SUPPRESS)} if stage == "prepare" else {}
            flag = "--" + field.name.replace("_", "-")
            if field.type is bool:
                sub.add_argument(flag, action=argparse.BooleanOptionalAction, default=None, **says)
            else:
                sub.add_argument(flag, default=None, metavar=field.name.upper(), **says)
        for name, how in EXTRA_FLAGS[stage].items():
            sub.add_argument(name, **how)
    return top


EXTRA_FLAGS: dict[str, dict[str, dict]] = {
    "budget": {
        "--stage": {"dest": "budget_stage", "default": "train", "choices": budget.STAGES},
        "--verify": {"action": "store_true", "help": "run a few real steps on this GPU: predicted against measured"},
    },
    "prepare": {
        "--input": {"help": "a file, a folder, a zip or a hub dataset (default: the profile's)"},
        "--output": {"type": Path, "help": "folder to write (default: the run's)"},
    },
    "finetune": {
        "--prepared": {"type": Path, "help": "folder that prepare wrote (default: the run's)"},
        "--output": {"type": Path, "help": "folder to write (default: the run's)"},
        "--resume": {"default": "auto", "choices": ("auto", "never"), "help": "auto: from the newest whole checkpoint"},
    },
    "merge": {
        "--base": {"help": "folder or hub id of the base (default: the run's model)"},
        "--adapter": {"type": Path, "help": "PEFT adapter (default: the run's)"},
        "--output": {"type": Path, "help": "folder to write (default: the run's)"},
    },
    "quantize": {
        "--model": {"type": Path, "dest": "merged", "help": "16-bit model folder (default: the run's merged model)"},
        "--calibration": {"help": "own, general, both, or a file of conversations or text"},
        "--output": {"type": Path, "help": "folder to write (default: the run's)"},
    },
    "evaluate": {
        "--models": {"nargs": "+", "metavar": "NAME=DIR", "help": "models to compare (default: the run's four)"},
        "--data": {"type": Path, "help": "held-out conversations or text (default: the run's)"},
        "--output": {"type": Path, "help": "folder to write (default: the run's)"},
    },
    "export": {
        "--model": {"type": Path, "dest": "merged", "help": "16-bit model folder (default: the run's merged model)"},
        "--adapter": {"type": Path, "help": "a PEFT adapter alone, instead of a model"},
        "--to": {"default": "gguf", "choices": ("gguf",), "help": "the format"},
        "--type": {"default": "q4_k_m", "help": "f16, q8_0, q6_k, q5_k_m, q4_k_m, …; several with commas between"},
        "--modelfile": {"action": "store_true", "help": "Ollama's Modelfile and a README beside it too"},
        "--output": {"type": Path, "help": "FILE.gguf (default: export/NAME.gguf in the run's folder)"},
    },
    "serve": {
        "--model": {
            "nargs": "+",
            "dest": "served",
            "metavar": "DIR|FILE.gguf",
            "help": "a model folder, adapter, GPTQ folder or GGUF file; several; NAME=PATH (default: the run's)",
        },
        "--host": {"default": "127.0.0.1", "help": "address to listen at; any but this machine's own needs a key"},
        "--port": {"type": int, "default": 8000, "help": "default 8000; 0: any that is free"},
        "--api-key": {"help": "what clients must send (default: $RECIPES_API_KEY, which ps does not show)"},
        "--page": {"action": "store_true", "help": "a chat page at / too"},
    },
    "run": {"--resume": {"default": "auto", "choices": ("auto", "never")}},
}


def prepare_help() -> dict[str, str]:
    """Field -> help of the settings that prepare reads: the docstrings of DataConfig, and the tokenizer's two.

    >>> prepare_help()["seq_len"]
    'The context: tokens of one training sequence, at most.'
    """
    body = ast.parse(textwrap.dedent(inspect.getsource(DataConfig))).body[0].body
    told = {
        before.target.id: " ".join(after.value.value.split()).replace("%", "%%")
        for before, after in itertools.pairwise(body)
        if isinstance(before, ast.AnnAssign) and isinstance(after, ast.Expr) and isinstance(after.value, ast.Constant)
    }
    return told | {
        "model": "whose tokenizer: a hub id or a folder",
        "revision": "of the model on the hub",
        "seed": "of a sample, where max_conversations asks for one",
    }


def setting_fields() -> list:
    """All fields of RunConfig and its parts that are settings."""
    parts = {field.name: field.type for field in fields(RunConfig)}
    return [
        next(field for field in fields(parts[part] if part else RunConfig) if field.name == name)
        for name, part in field_parts().items()
    ]


def configuration(options: argparse.Namespace) -> RunConfig:
    """Profile, then what was chosen last in the run's folder, then `--config`, then flags.

    Raises ValueError naming what is wrong.
    """
    given = {field.name: getattr(options, field.name, None) for field in setting_fields() if field.name != "profile"}
    given = {name: flag_value(value) for name, value in given.items() if value is not None}
    config = starting_point(options, given)
    if options.config:
        config = load_yaml(options.config, start=config)
    return config.with_values(**given)


def starting_point(options: argparse.Namespace, given: dict[str, object]) -> RunConfig:
    """The profile with what was chosen last in the run's folder; for what comes after training, what was trained with.

    A folder in which nothing was chosen, and no profile named, starts as its last stage did. A budget is of no run
    unless `--workspace` says so.
    """
    named = options.profile or "mistral-7b"
    if options.workspace is None and options.stage == "budget":
        return models.profile(named)
    run = Workspace(options.workspace or Path("runs") / named)
    chosen = choices.last(run)
    stages = () if chosen else ("finetune", "prepare")
    if options.stage in AFTER_TRAINING:
        stages = ("finetune", *stages)
    made = [path for path in (run.folder(stage) / "config.yaml" for stage in stages) if path.is_file()]
    if made and options.profile is None:
        return load_yaml(made[0])
    return choices.start(run, models.profile(options.profile or chosen.get("profile", named)), **given)


def flag_value(text: str | bool) -> object:
    """A flag's text as the number it spells, else as it is.

    >>> flag_value("16"), flag_value("2e-4"), flag_value("auto"), flag_value("none")
    (16, 0.0002, 'auto', 'none')
    """
    for number in (int, float):
        try:
            return number(text) if isinstance(text, str) else text
        except ValueError:
            continue
    return text


def workspace_of(options: argparse.Namespace, config: RunConfig) -> Workspace:
    """The run's folder: `--workspace`, or runs/PROFILE in the current folder."""
    return Workspace(options.workspace or Path("runs") / config.profile)


def machine_of(options: argparse.Namespace) -> hardware.Machine:
    """This machine, or the one that `--gpu` names."""
    return hardware.probe() if options.gpu == "auto" else hardware.machine(options.gpu)


Outcome = tuple[int, dict, str]


def run_budget(options: argparse.Namespace, config: RunConfig) -> Outcome:
    """What it needs; exit 3 when it does not fit."""
    shape, machine = models.shape(config.model.model, config.model.revision), machine_of(options)
    plan = budget.plan(config, shape, machine)
    estimate = budget.budget(budget.requested(config, plan), shape, machine, stage=options.budget_stage)
    result = budget.to_json(estimate, plan)
    text = "\n".join([budget.table(estimate), *(f"Plan: {reason}" for reason in plan.reasons)])
    if options.verify:
        from helpers.finetune import verify

        result["verify"] = verify.verify(plan.config)
        text += "\n" + verify.table(result["verify"])
    return (DONE if estimate.fits else DOES_NOT_FIT), result, text


def run_prepare(options: argparse.Namespace, config: RunConfig) -> Outcome:
    from helpers import prepare

    run = workspace_of(options, config)
    output = options.output or run.folder("prepare")
    made = prepare.prepare(config, output, source=options.input)
    if options.output is None:
        choices.keep(run, config, "by python -m helpers prepare")
    lines = [f"  {what}: {value}" for what, value in prepare.summary(made)]
    lines += [f"  finding: {row['sentence']}" for row in made["findings"]]
    return DONE, {"output": str(output), **made}, "\n".join([f"prepare done: {output}", *lines])


def run_finetune(options: argparse.Namespace, config: RunConfig) -> Outcome:
    from helpers import finetune

    run = workspace_of(options, config)
    shape, machine = models.shape(config.model.model, config.model.revision), machine_of(options)
    output = options.output or run.folder("finetune")
    plan = finetune.plan(config, output, machine, options.resume)
    chosen = budget.requested(config, plan)
    estimate = plan.budget if chosen == plan.config else budget.budget(chosen, shape, machine)
    if not estimate.fits:
        return DOES_NOT_FIT, budget.to_json(estimate, plan), "\n".join(estimate.reasons)
    prepared = options.prepared or run.folder("prepare")
    if options.output is None:
        choices.keep(run, config, "by python -m helpers finetune")
    return done("finetune", output, finetune.finetune(chosen, prepared, output, resume=options.resume))


def run_merge(options: argparse.Namespace, config: RunConfig) -> Outcome:
    from helpers import merge

    run = workspace_of(options, config)
    output = options.output or run.folder("merge")
    adapter = options.adapter or run.folder("finetune") / "adapter"
    base = options.base or config.model.model
    revision = options.revision or (config.model.revision if base == config.model.model else None)
    return done("merge", output, merge.merge(base, adapter, output, config.merge, revision))


def run_quantize(options: argparse.Namespace, config: RunConfig) -> Outcome:
    from helpers import quantize

    run = workspace_of(options, config)
    output = options.output or run.folder("quantize")
    merged = options.merged or run.folder("merge")
    if not merged.exists() and len(merged.parts) == 2 and not merged.is_absolute():
        merged = hub.snapshot(str(merged), config.model.revision)
    try:
        figures = quantize.quantize(merged, output, config.quantize, run.folder("prepare"))
    except quantize.BrokenResult as error:
        return FAILED, {"failed": str(error)}, f"quantize: {error}"
    return done("quantize", output, figures)


def run_export(options: argparse.Namespace, config: RunConfig) -> Outcome:
    from helpers import export

    run = workspace_of(options, config)
    output = options.output or run.folder("export") / f"{Path(config.model.model).name}.gguf"
    if options.output is None:
        output.parent.mkdir(parents=True, exist_ok=True)
    if options.adapter:
        from helpers.inference import base_of

        base = Path(base_of(options.adapter, config))
        return done("export", output, export.export_adapter(options.adapter, base, output))
    model = options.merged or run.folder("merge")
    return done("export", output, export.export(model, output, options.type, options.modelfile, run.folder("prepare")))


def run_serve(options: argparse.Namespace, config: RunConfig) -> Outcome:
    from helpers import serve

    chosen = options.served or [str(serve.default_model(workspace_of(options, config)))]
    result = serve.serve(chosen, config, options.host, options.port, options.api_key, options.page)
    return DONE, result, f"serve: stopped after {result['requests']} requests"


def run_evaluate(options: argparse.Namespace, config: RunConfig) -> Outcome:
    from helpers import evaluate

    run = workspace_of(options, config)
    chosen = dict(name_and_folder(pair) for pair in options.models) if options.models else run_models(run, config)
    output = options.output or run.folder("evaluate")
    result = evaluate.evaluate(chosen, config, options.data or run.folder("prepare"), output)
    if output == run.folder("evaluate"):
        shutil.copy(output / "report.json", run.root)
    return DONE, result, evaluate.table(result) + f"\n\n{output / 'report.html'}"


def name_and_folder(pair: str) -> tuple[str, str]:
    """`NAME=DIR` in two. Raises ValueError for anything else."""
    name, separator, folder = pair.partition("=")
    if not (name and separator and folder):
        raise ValueError(f"--models takes NAME=DIR, not {pair!r}")
    return name, folder


def run_all(options: argparse.Namespace, config: RunConfig) -> Outcome:
    """Every stage in order, each from the folder that the last one wrote."""
    absent = dict.fromkeys(("input", "output", "prepared", "base", "adapter", "merged", "models", "data"))
    options = argparse.Namespace(**(absent | vars(options)))
    if config.quantize.calibration not in ("own", "general", "both"):
        from helpers import quantize

        quantize.calibration_sets(config.quantize, [])  # a file that is not there is missed now, not after the training
    outcome: Outcome = (DONE, {}, "")
    for stage in ("prepare", "finetune", "merge", "quantize", "evaluate"):
        print(f"== {stage}", file=sys.stderr, flush=True)
        outcome = STAGES[stage](options, config)
        if outcome[0] != DONE:
            break
    return outcome


def done(stage: str, output: Path, measurements: dict) -> Outcome:
    """A finished stage: where it lies and what was measured."""
    figures = "\n".join(f"  {name}: {value}" for name, value in measurements.items())
    return DONE, {"output": str(output), **measurements}, f"{stage} done: {output}\n{figures}"


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
