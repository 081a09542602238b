"""The flags of every stage and their help: one form for all, each setting's from its field's docstring."""

import argparse
from collections.abc import Sequence
from dataclasses import Field, fields
from difflib import get_close_matches
from functools import cache
from pathlib import Path
from typing import Any

from helpers import budget, models
from helpers.config import RunConfig, explained, field_parts, flat, values_in_words
from helpers.models.methods import METHODS
from helpers.sources.formats import FORMATS

NAMED = {"source_format": ("auto", *FORMATS), "quant_method": METHODS}
"""Settings whose values are the names in a table of what reads or makes them."""
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
OWN_FLAGS = {"quantize": {"model", "calibration"}, "merge": set(), "export": {"model"}, "serve": {"model"}}
"""Fields of RunConfig whose flag a stage gives another meaning: there they name a folder or a file."""
EXPORTS = ("gguf", "drive", "zip", "hub")
BUDGETS = (*budget.STAGES, "export")
EPILOG = """`python -m helpers run --profile tiny` does all of it on a CPU in minutes; STAGE --help explains its flags.
Exit status: 0 done, 1 failed, 2 the request is wrong (the sentence says what to change), 3 it does not fit."""


# ---- one flag --------------------------------------------------------------------------------------------------------


def told(sentence: str, values: str, default: str) -> str:
    """A flag's help in one form: what it is, what it can be, what it is unless one says.

    >>> told("Steps between checkpoints.", "a whole number", "50")
    'Steps between checkpoints (a whole number; default 50).'
    """
    return f"{sentence.rstrip('.')} ({values}; default {default}).".replace("%", "%%")


def flag(name: str, metavar: str, sentence: str, values: str, default: str, /, **more: Any) -> dict[str, dict]:
    """A flag that takes a value, as argparse wants it; more: argparse's own words, such as its type."""
    return {name: {"metavar": metavar, "help": told(sentence, values, default)} | more}


def switch(name: str, sentence: str) -> dict[str, dict]:
    """A flag that is given or not."""
    return {name: {"action": "store_true", "help": told(sentence, "on or off", "off")}}


def add_setting(group: argparse._ArgumentGroup, field: Field, shown: bool) -> None:
    """A setting's flag, whose help is the field's docstring, what it can be, and its default in each profile."""
    name = field.name
    values = " or ".join(NAMED.get(name, ())) or values_in_words(name)
    says = told(explained(name), values, default_in_words(name)) if shown else argparse.SUPPRESS
    kind = {"metavar": name.rpartition("_")[2].upper()}
    if field.type is bool:
        kind = {"action": argparse.BooleanOptionalAction}
    group.add_argument("--" + name.replace("_", "-"), default=None, help=says, **kind)


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


def setting_fields() -> list[Field]:
    """All fields of RunConfig and its parts that are settings."""
    parts = {field.name: field.type for field in fields(RunConfig)}
    return [
        next(field for field in fields(parts[part] if part else RunConfig) if field.name == name)
        for name, part in field_parts().items()
    ]


# ---- every stage's ---------------------------------------------------------------------------------------------------

RUNS = "the run's"
PROFILES = " or ".join(models.PROFILES)
COMMON = (
    flag("--profile", "NAME", "Set of defaults", PROFILES, "mistral-7b, or what the run was made with",
         choices=models.PROFILES)
    | flag("--config", "FILE", "YAML with settings; a flag outweighs it", "a file",
           "what was chosen last in the run's folder", type=Path)
    | flag("--workspace", "DIR", "The run's folder", "a folder", "runs/PROFILE", type=Path)
    | switch("--json", "One JSON object on standard output, all else on standard error")
)  # fmt: skip
GPU = flag(
    "--gpu", "NAME", "Machine to plan for", "auto: this one, none, or a name: t4, l4, a100-40, 2xt4, …", "auto",
    default="auto",
)  # fmt: skip
RESUME = flag(
    "--resume", "HOW", "Go on from the newest whole checkpoint, or start anew", "auto or never", "auto",
    default="auto", choices=("auto", "never"),
)  # fmt: skip
OUTPUT = flag("--output", "DIR", "Where to write", "a folder", RUNS, type=Path)
ADAPTER = flag("--adapter", "DIR", "PEFT adapter", "a folder", RUNS, type=Path)
OWN: dict[str, dict[str, dict]] = {
    "budget": GPU
    | flag("--stage", "STAGE", "Whose needs", ", ".join(BUDGETS), "train", dest="budget_stage", default="train",
           choices=BUDGETS)
    | switch("--verify", "Run a few real steps on this GPU: predicted against measured"),
    "prepare": OUTPUT
    | flag("--input", "WHERE", "Conversations", "a file, a folder, a zip or a hub dataset", "the setting source"),
    "finetune": GPU | OUTPUT | RESUME | flag("--prepared", "DIR", "What prepare wrote", "a folder", RUNS, type=Path),
    "merge": ADAPTER | OUTPUT | flag("--base", "MODEL", "The base", "a folder or a hub id", "the setting model"),
    "quantize": OUTPUT
    | flag("--model", "DIR", "16-bit model", "a folder or a hub id", "the run's merged model", dest="merged", type=Path)
    | flag("--calibration", "TEXT", explained("calibration"), values_in_words("calibration"),
           default_in_words("calibration")),
    "evaluate": OUTPUT
    | flag("--models", "NAME=DIR", "Models to compare", "names and folders", "the run's four", nargs="+")
    | flag("--data", "WHERE", "Held-out conversations or text", "a file or what prepare wrote", RUNS, type=Path)
    | flag("--judge", "URL", "OpenAI-compatible endpoint that says, blind, which of two models' answers is better; its "
           "key is read from RECIPES_JUDGE_KEY", "an address that usually ends in /v1", "none")
    | flag("--judge-model", "NAME", "Model that judges there", "a name", "none")
    | flag("--judged", "ONE,OTHER", "The two models whose answers are compared", "two names with a comma", "base,gptq",
           default="base,gptq"),
    "export": flag("--model", "DIR", "What to export", "a folder",
                   "the run's merged model for gguf, else its GPTQ model", dest="merged", type=Path)
    | flag("--adapter", "DIR", "A PEFT adapter alone, instead of a model", "a folder", "none", type=Path)
    | flag("--to", "WHERE", "A GGUF file, a copy in Drive or another folder, one zip, or a repository on the hub",
           ", ".join(EXPORTS), "gguf", default="gguf", choices=EXPORTS)
    | flag("--type", "NAME", "Of a GGUF file", "f16, q8_0, q6_k, q5_k_m, q4_k_m, …, or several with commas", "q4_k_m",
           default="q4_k_m")
    | switch("--modelfile", "Ollama's Modelfile and a README beside a GGUF file too")
    | flag("--imatrix", "FILE", "Importance matrix that the rounding of a GGUF file is weighed by",
           "a file, or own: collected on the run's conversations", "own where a type needs one, else none")
    | switch("--public", "Everybody may read the repository on the hub")
    | flag("--output", "WHERE", "Where to", "FILE.gguf, a folder, FILE.zip, or OWNER/NAME on the hub",
           "the run's folder, there export/ for gguf; Drive where it is mounted; none for the hub", type=Path),
    "serve": flag("--model", "MODEL", "What to serve, under its own name or as NAME=MODEL, several if need be",
                  "a model folder, an adapter, a GPTQ folder or a GGUF file", RUNS, dest="served", nargs="+")
    | flag("--host", "ADDRESS", "Where to listen", "an address; any but this machine's own needs a key", "127.0.0.1",
           default="127.0.0.1")
    | flag("--port", "PORT", "Port", "a number; 0: any that is free", "8000", default=8000, type=int)
    | flag("--api-key", "KEY", "What clients must send", "a text", "$RECIPES_API_KEY, which ps does not show, or none")
    | switch("--page", "A chat page at / too")
    | flag("--batch", "FILE", "Answer a file of prompts and end, instead of listening; goes on where it was stopped",
           "JSONL of messages, prompt or question a line, or OpenAI's batch", "none", type=Path)
    | flag("--max-tokens", "TOKENS", "Of an answer of --batch whose line names none", "a number",
           "512, at most a quarter context", type=int)
    | flag("--output", "FILE", "Answers of --batch", "a file that is not there",
           "beside the prompts, NAME.answers.jsonl", type=Path),
    "run": GPU | RESUME,
}  # fmt: skip
"""Stage -> its flags that are no settings."""


# ---- the parser ------------------------------------------------------------------------------------------------------


def parsed(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    """The command's options; ends with status 2 and one sentence for a flag or a stage that is not there."""
    top = parser()
    options, unknown = top.parse_known_args(arguments)
    if unknown:
        top.error(misunderstood(options.stage, unknown[0].partition("=")[0]))
    return options


def misunderstood(stage: str, given: str) -> str:
    """What is wrong with a word of the command that no flag of the stage takes, and what may have been meant.

    >>> misunderstood("merge", "--shard-gb"), misunderstood("budget", "7b")
    ('merge has no flag --shard-gb: did you mean --shard-gib?', "budget takes flags only, and '7b' belongs to none")
    """
    if not given.startswith("-"):
        return f"{stage} takes flags only, and {given!r} belongs to none"
    known = ["--" + field.name.replace("_", "-") for field in setting_fields()] + [*COMMON, *OWN[stage]]
    near = get_close_matches(given, known, n=1, cutoff=0.75)
    meant = f"did you mean {near[0]}?" if near else f"python -m helpers {stage} --help lists what there is"
    return f"{stage} has no flag {given}: {meant}"


def parser() -> argparse.ArgumentParser:
    """One subcommand a stage; every field of RunConfig a flag in each, those that the stage reads first."""
    top = argparse.ArgumentParser(
        prog="python -m helpers",
        description="The notebooks' functions without a notebook.",
        epilog=EPILOG,
        usage="python -m helpers STAGE [FLAG …]",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    stages = top.add_subparsers(dest="stage", required=True, metavar="STAGE", title="stages")
    for stage, summary in STAGE_HELP.items():
        later = "Later stages' settings are flags too: python -m helpers run --help." if stage == "prepare" else None
        sub = stages.add_parser(
            stage,
            help=summary,
            description=f"{summary[0].upper()}{summary[1:]}.",
            prog=f"python -m helpers {stage}",
            usage=f"python -m helpers {stage} [FLAG …]",
            epilog=later,
            allow_abbrev=False,
        )
        for name, how in (COMMON | OWN[stage]).items():
            sub.add_argument(name, **how)
        own = sub.add_argument_group(f"settings that {stage} reads")
        others = sub.add_argument_group("settings of other stages, kept with the run")
        for field in setting_fields():
            if field.name not in OWN_FLAGS.get(stage, set()) | {"profile"}:
                mine = is_read(stage, field.name)
                add_setting(own if mine else others, field, shown=mine or stage != "prepare")
    return top
