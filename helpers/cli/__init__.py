"""`python -m helpers STAGE`: the notebooks' functions without a notebook.

Every field of RunConfig is a flag (`--rank 32`), on top of `--profile` and `--config FILE.yaml`: flags.py. What a stage
does with them is in stages.py. Exit status: 0 done, 1 failed, 2 the request is wrong (the sentence says what to
change), 3 it does not fit.
"""

import argparse
import json
import os
import sys
import traceback
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stdout
from pathlib import Path

from helpers import budget, models
from helpers.cli import flags
from helpers.cli.stages import DOES_NOT_FIT, FAILED, STAGES, WRONG_REQUEST
from helpers.config import RunConfig, load_yaml
from helpers.models import gpu
from helpers.show import troubleshooting
from helpers.workspace import StorageError, Workspace, choices

AFTER_TRAINING = ("merge", "quantize", "evaluate", "export", "serve")


def main(arguments: list[str] | None = None) -> int:
    """Run one stage; returns the exit status."""
    options = flags.parsed(arguments)
    with standard_output_for_result() as result_stream:
        try:
            status, result, text = STAGES[options.stage](options, configuration(options))
        except StorageError as error:
            say(f"{options.stage}: {error}")
            return FAILED
        except ValueError as error:
            say(f"{options.stage}: {error}")
            if os.environ.get("RECIPES_DEBUG"):
                traceback.print_exc()
            return DOES_NOT_FIT if isinstance(error, budget.DoesNotFit) else WRONG_REQUEST
        except KeyboardInterrupt:
            say(f"{options.stage}: stopped; the same command continues where it can")
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


def say(sentence: str) -> None:
    """A sentence on standard error; of several processes started together, once, by the first that can say it."""
    if "RANK" in os.environ:
        from helpers.finetune import ranks

        if ranks.is_said_by_the_first(sentence):
            return
    print(sentence, file=sys.stderr, flush=True)


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


def configuration(options: argparse.Namespace) -> RunConfig:
    """Profile, then what was chosen last in the run's folder, then `--config`, then flags.

    Raises ValueError naming what is wrong.
    """
    given = {
        field.name: getattr(options, field.name, None) for field in flags.setting_fields() if field.name != "profile"
    }
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
