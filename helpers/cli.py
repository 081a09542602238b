"""`python -m helpers STAGE`: the notebooks' functions without a notebook.

Every field of RunConfig is a flag (`--rank 32`), on top of `--profile` and `--config FILE.yaml`. Exit status: 0 done,
1 failed, 2 the request is wrong (the sentence says what to change), 3 it does not fit.
"""

import argparse
import json
import os
import shutil
import sys
import traceback
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stdout
from dataclasses import Field, asdict, fields
from functools import cache
from pathlib import Path

from helpers import budget, hardware, models
from helpers.budget import sharding, ways
from helpers.config import RunConfig, explained, field_parts, flat, load_yaml, values_in_words
from helpers.models import gpu, hub
from helpers.models.methods import METHODS
from helpers.show import tables, troubleshooting
from helpers.sources.formats import FORMATS
from helpers.workspace import StorageError, Workspace, choices, run_models

NAMED = {"source_format": ("auto", *FORMATS), "quant_method": METHODS}
"""Settings whose values are the names in a table of what reads or makes them."""
DONE, FAILED, WRONG_REQUEST, DOES_NOT_FIT = 0, 1, 2, 3
STAGE_HELP = {
    "budget": "what a run needs of VRAM, RAM, disk and hours, and a plan that fits",
    "prepare": "conversations in, checked, formatted, masked, split",
    "finetune": "QLoRA on the prepared conversations",
    "merge": "the adapter into its base, tensor by tensor",
    "quantize": "GPTQ of the merged model",
    "evaluate": "one table: base, fine-tuned, merged, GPTQ",
    "export": "a GGUF file for Ollama, llama.cpp and LM Studio; or a model as it is to Drive, a zip or the hub",
    "serve": "a model behind OpenAI's API, and a page to chat with it",
    "run": "all stages in order",
}
READS: dict[str, tuple[set[str], set[str]]] = {
    "budget": ({"model", "adapter", "train"}, {"seq_len", "max_conversations"}),
    "prepare": ({"data"}, {"model", "revision", "seed", "method"}),
    "finetune": ({"model", "adapter", "train"}, {"seq_len", "seed"}),
    "merge": ({"merge"}, {"model", "revision"}),
    "quantize": ({"quantize"}, {"revision", "seed"}),
    "evaluate": ({"model", "evaluate"}, {"seed", "gpus"}),
    "export": (set(), {"model"}),
    "serve": ({"model"}, set()),
    "run": ({"model", "adapter", "data", "train", "merge", "quantize", "evaluate"}, {"seed"}),
}
"""Stage -> parts of RunConfig, and single settings, that it reads."""
EXPORTS = ("gguf", "drive", "zip", "hub")
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
        if gpu.is_first():
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
    """One subcommand a stage; every field of RunConfig a flag in each, those that the stage reads first."""
    top = argparse.ArgumentParser(prog="python -m helpers", description=__doc__.split("\n\n")[0])
    stages = top.add_subparsers(dest="stage", required=True, metavar="STAGE")
    for stage, summary in STAGE_HELP.items():
        sub = stages.add_parser(
            stage,
            help=summary,
            description=f"{summary[0].upper()}{summary[1:]}.",
            usage=f"python -m helpers {stage} [FLAG …]",
            epilog=None
            if stage != "prepare"
            else "Later stages' settings are flags too: python -m helpers run --help.",
            allow_abbrev=False,
        )
        for name, how in (COMMON_FLAGS | EXTRA_FLAGS[stage]).items():
            sub.add_argument(name, **how)
        own = sub.add_argument_group(f"settings that {stage} reads")
        others = sub.add_argument_group("settings of other stages, kept with the run")
        for field in setting_fields():
            if field.name not in OWN_FLAGS.get(stage, set()) | {"profile"}:
                mine = is_read(stage, field.name)
                add_setting(own if mine else others, field, shown=mine or stage != "prepare")
    return top


def add_setting(group: argparse._ArgumentGroup, field: Field, shown: bool) -> None:
    """A setting's flag, whose help is the field's docstring, what it can be, and its default in each profile."""
    name, flag = field.name, "--" + field.name.replace("_", "-")
    values = " or ".join(NAMED.get(name, ())) or values_in_words(name)
    says = told(explained(name), values, default_in_words(name)) if shown else argparse.SUPPRESS
    if field.type is bool:
        group.add_argument(flag, action=argparse.BooleanOptionalAction, default=None, help=says)
    else:
        group.add_argument(flag, default=None, metavar=name.rpartition("_")[2].upper(), help=says)


def told(sentence: str, values: str, default: str) -> str:
    """A flag's help in one form: what it is, what it can be, what it is unless one says.

    >>> told("Steps between checkpoints.", "a whole number", "50")
    'Steps between checkpoints (a whole number; default 50).'
    """
    return f"{sentence.rstrip('.')} ({values}; default {default}).".replace("%", "%%")


def default_in_words(name: str) -> str:
    """A setting's default for a 7B, and tiny's where that is another.

    >>> default_in_words("seq_len"), default_in_words("dora"), default_in_words("model")
    ('1024, tiny 192', 'off', 'mistralai/Mistral-7B-v0.3, tiny data/tiny-mistral')
    """

    def words(value: object) -> str:
        if value is None or value == "":
            return "none"
        return ("on" if value else "off") if isinstance(value, bool) else str(value).removeprefix(f"{models.ROOT}/")

    usual, tiny = (words(values[name]) for values in profile_values())
    return usual if usual == tiny else f"{usual}, tiny {tiny}"


@cache
def profile_values() -> tuple[dict[str, object], ...]:
    """Setting -> value in the profile for a 7B, and in tiny."""
    return tuple(flat(models.profile(profile)) for profile in ("mistral-7b", "tiny"))


def is_read(stage: str, name: str) -> bool:
    """Whether a stage reads a setting.

    >>> is_read("merge", "shard_gib"), is_read("merge", "rank")
    (True, False)
    """
    parts, names = READS[stage]
    return name in names or field_parts()[name] in parts


IN_THE_RUN = "the run's"
COMMON_FLAGS: dict[str, dict] = {
    "--profile": {
        "choices": models.PROFILES,
        "default": None,
        "metavar": "NAME",
        "help": told("Set of defaults", " or ".join(models.PROFILES), "mistral-7b, or what the run was made with"),
    },
    "--config": {
        "type": Path,
        "metavar": "FILE",
        "help": told("YAML with settings; flags go before it", "a file", "what was chosen last in the run's folder"),
    },
    "--workspace": {"type": Path, "metavar": "DIR", "help": told("The run's folder", "a folder", "runs/PROFILE")},
    "--json": {
        "action": "store_true",
        "help": told("One JSON object on standard output, all else on standard error", "on or off", "off"),
    },
}
GPU_FLAG = {
    "--gpu": {
        "default": "auto",
        "metavar": "NAME",
        "help": told("Machine to plan for", "auto: this one, none, or a name: t4, l4, a100-40gb, …", "auto"),
    }
}
RESUME_FLAG = {
    "--resume": {
        "default": "auto",
        "choices": ("auto", "never"),
        "metavar": "HOW",
        "help": told("Go on from the newest whole checkpoint, or start anew", "auto or never", "auto"),
    }
}
OUTPUT_FLAG = {"--output": {"type": Path, "metavar": "DIR", "help": told("Where to write", "a folder", IN_THE_RUN)}}
EXTRA_FLAGS: dict[str, dict[str, dict]] = {
    "budget": GPU_FLAG
    | {
        "--stage": {
            "dest": "budget_stage",
            "default": "train",
            "choices": (*budget.STAGES, "export"),
            "metavar": "STAGE",
            "help": told("Whose needs", ", ".join((*budget.STAGES, "export")), "train"),
        },
        "--verify": {
            "action": "store_true",
            "help": told("Run a few real steps on this GPU: predicted against measured", "on or off", "off"),
        },
    },
    "prepare": {
        "--input": {
            "metavar": "WHERE",
            "help": told("Conversations", "a file, a folder, a zip or a hub dataset", "the setting source"),
        },
        **OUTPUT_FLAG,
    },
    "finetune": GPU_FLAG
    | {
        "--prepared": {
            "type": Path,
            "metavar": "DIR",
            "help": told("What prepare wrote", "a folder", IN_THE_RUN),
        },
        **OUTPUT_FLAG,
        **RESUME_FLAG,
    },
    "merge": {
        "--base": {"metavar": "MODEL", "help": told("The base", "a folder or a hub id", "the setting model")},
        "--adapter": {"type": Path, "metavar": "DIR", "help": told("PEFT adapter", "a folder", IN_THE_RUN)},
        **OUTPUT_FLAG,
    },
    "quantize": {
        "--model": {
            "type": Path,
            "dest": "merged",
            "metavar": "DIR",
            "help": told("16-bit model", "a folder or a hub id", "the run's merged model"),
        },
        "--calibration": {
            "metavar": "TEXT",
            "help": told(explained("calibration"), values_in_words("calibration"), default_in_words("calibration")),
        },
        **OUTPUT_FLAG,
    },
    "evaluate": {
        "--models": {
            "nargs": "+",
            "metavar": "NAME=DIR",
            "help": told("Models to compare", "names and folders", "the run's four"),
        },
        "--data": {
            "type": Path,
            "metavar": "WHERE",
            "help": told("Held-out conversations or text", "a file or what prepare wrote", IN_THE_RUN),
        },
        **OUTPUT_FLAG,
        "--judge": {
            "metavar": "URL",
            "help": told(
                "OpenAI-compatible endpoint that says, blind, which of two models' answers is better; its key is read "
                "from RECIPES_JUDGE_KEY",
                "an address that usually ends in /v1",
                "none",
            ),
        },
        "--judge-model": {"metavar": "NAME", "help": told("Model that judges there", "a name", "none")},
        "--judged": {
            "metavar": "ONE,OTHER",
            "default": "base,gptq",
            "help": told("The two models whose answers are compared", "two names with a comma", "base,gptq"),
        },
    },
    "export": {
        "--model": {
            "type": Path,
            "dest": "merged",
            "metavar": "DIR",
            "help": told("What to export", "a folder", "the run's merged model for gguf, else its GPTQ model"),
        },
        "--adapter": {
            "type": Path,
            "metavar": "DIR",
            "help": told("A PEFT adapter alone, instead of a model", "a folder", "none"),
        },
        "--to": {
            "default": "gguf",
            "choices": EXPORTS,
            "metavar": "WHERE",
            "help": told(
                "A GGUF file, a copy in Drive or another folder, one zip, or a repository on the hub",
                ", ".join(EXPORTS),
                "gguf",
            ),
        },
        "--type": {
            "default": "q4_k_m",
            "metavar": "NAME",
            "help": told("Of a GGUF file", "f16, q8_0, q6_k, q5_k_m, q4_k_m, …, or several with commas", "q4_k_m"),
        },
        "--modelfile": {
            "action": "store_true",
            "help": told("Ollama's Modelfile and a README beside a GGUF file too", "on or off", "off"),
        },
        "--imatrix": {
            "metavar": "FILE",
            "help": told(
                "Importance matrix that the rounding of a GGUF file is weighed by",
                "a file, or own: collected on the run's conversations",
                "own where a type needs one, else none",
            ),
        },
        "--public": {
            "action": "store_true",
            "help": told("Everybody may read the repository on the hub", "on or off", "off"),
        },
        "--output": {
            "type": Path,
            "metavar": "WHERE",
            "help": told(
                "Where to",
                "FILE.gguf, a folder, FILE.zip, or OWNER/NAME on the hub",
                "the run's folder, there export/ for gguf; Drive where it is mounted; none for the hub",
            ),
        },
    },
    "serve": {
        "--model": {
            "nargs": "+",
            "dest": "served",
            "metavar": "MODEL",
            "help": told(
                "What to serve, under its own name or as NAME=MODEL, several if need be",
                "a model folder, an adapter, a GPTQ folder or a GGUF file",
                IN_THE_RUN,
            ),
        },
        "--host": {
            "default": "127.0.0.1",
            "metavar": "ADDRESS",
            "help": told("Where to listen", "an address; any but this machine's own needs a key", "127.0.0.1"),
        },
        "--port": {"type": int, "default": 8000, "help": told("Port", "a number; 0: any that is free", "8000")},
        "--api-key": {
            "metavar": "KEY",
            "help": told("What clients must send", "a text", "$RECIPES_API_KEY, which ps does not show, or none"),
        },
        "--page": {"action": "store_true", "help": told("A chat page at / too", "on or off", "off")},
        "--batch": {
            "type": Path,
            "metavar": "FILE",
            "help": told(
                "Answer a file of prompts and end, instead of listening; goes on where it was stopped",
                "JSONL of messages, prompt or question a line, or OpenAI's batch",
                "none",
            ),
        },
        "--max-tokens": {
            "type": int,
            "metavar": "TOKENS",
            "help": told("Of an answer of --batch whose line names none", "a number", "512, at most a quarter context"),
        },
        "--output": {
            "type": Path,
            "metavar": "FILE",
            "help": told("Answers of --batch", "a file that is not there", "beside the prompts, NAME.answers.jsonl"),
        },
    },
    "run": GPU_FLAG | RESUME_FLAG,
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
        return models.profile(named, method=given.get("method"))
    run = Workspace(options.workspace or Path("runs") / named)
    chosen = choices.last(run)
    stages = () if chosen else ("finetune", "prepare")
    if options.stage in AFTER_TRAINING:
        stages = ("finetune", *stages)
    made = [path for path in (run.folder(stage) / "config.yaml" for stage in stages) if path.is_file()]
    if made and options.profile is None:
        return load_yaml(made[0])
    profile = models.profile(options.profile or chosen.get("profile", named), method=given.get("method"))
    return choices.start(run, profile, **given)


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
        text += "\n" + verify.table(result["verify"])
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
    for stage in stages_of_run(config):
        print(f"== {stage}", file=sys.stderr, flush=True)
        outcome = STAGES[stage](options, config)
        if outcome[0] != DONE:
            break
    return outcome


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
