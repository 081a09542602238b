"""What was chosen last: one small file in a run's folder, where each notebook starts and which it leaves behind.

plan.yaml holds the settings that differ from the profile, who chose them and when; `--config plan.yaml` reads it too.
It also lies in the run's lasting twin, because every notebook opens on another machine and only that is shared.

>>> import tempfile
>>> from helpers.profiles import profile
>>> run = Workspace(Path(tempfile.mkdtemp()))
>>> kept = keep(run, profile("tiny", rank=32, alpha=64, seq_len=128), "in notebook 1")
>>> start(run, profile("tiny"), alpha=16) == kept.with_values(alpha=16)  # doctest: +ELLIPSIS
rank 32 and a context of 128 tokens, as chosen in notebook 1 (.../plan.yaml)
True
"""

from collections.abc import Callable
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, TypeVar

import yaml

from helpers.config import CHOSEN, RunConfig, flat, with_settings, yaml_tree
from helpers.profiles import PROFILES, profile
from helpers.workspace import StaleArtifact, Workspace, files, lasting_twin, maker

PLAN = "plan.yaml"
CUT = ("seq_len", "rank", "alpha", "optimizer")
"""What a plan changes where nothing that was asked fits; how it computes the rest depends on the machine."""
Result = TypeVar("Result")
WORDS = {
    "rank": "rank {}",
    "alpha": "alpha {:g}",
    "learning_rate": "a learning rate of {:g}",
    "seq_len": "a context of {:,} tokens",
    "source": "the data {}",
    "batch_size": "micro-batches of {}",
    "accumulation": "{} accumulated",
}
"""How a sentence says a setting; others go by name and value."""


def start(run: Workspace, config: RunConfig, where: str = "", **given: Any) -> RunConfig:
    """Where a notebook starts: the profile's configuration, then what was chosen last, then what is given.

    where: who asks. What it gives comes first, unless a slider was moved there while it gave the same: the slider is
    the later word. given: settings by name; None, and a form's empty line, leave a setting as it was. Says what comes
    from the last choice. Raises ValueError for a setting or a file that cannot be used, StorageError when the file may
    be there and cannot be read.
    """
    given = {name: value for name, value in given.items() if value not in (None, "")}
    path, content = newest(run)
    if content and content.get("profile", config.profile) == config.profile:
        over = overruled(content, where)
        given = {name: value for name, value in given.items() if over.get(name) != value}
        chosen = changes(mendable(lambda: with_settings(content, path, config)), config)
        taken = {name: value for name, value in chosen.items() if name not in given}
        if taken:
            print(f"{words(taken)}, as chosen {origin(content).get('where', 'last')} ({path})")
        config = config.with_values(**taken)
    return config.with_values(**given)


def last(run: Workspace) -> dict[str, Any]:
    """What was chosen last, by name, with its profile; {} when nothing was."""
    return newest(run)[1]


def keep(run: Workspace, config: RunConfig, where: str, planned: RunConfig | None = None) -> RunConfig:
    """Leave what was chosen for the next notebook; returns it.

    where: who chose, such as "in notebook 1". planned: what the plan made of it; where no way of training fits with
    what was asked, the plan cuts context or rank, and what is prepared and trained next is that.
    """
    cut = {name: value for name, value in changes(planned or config, config).items() if name in CUT}
    if {"seq_len", "rank"} & set(cut):
        print(f"{words(cut)} instead of what was asked: no way of training more fits here")
        config = config.with_values(**cut)
    now, before = settings(config), last(run)
    known = CHOSEN in before and {name: value for name, value in before.items() if name != CHOSEN} == now
    content = before if known else {CHOSEN: by(where)} | now
    for path in places(run):
        write(path, content)
    return config


def keeper(run: Workspace, where: str, given: dict[str, Any] | None = None) -> Callable[[RunConfig], None]:
    """What a panel calls with each configuration that its sliders show: noted here, so that Run All starts there.

    given: what `start` was given there, which the sliders overrule until it is changed.
    """
    over = {name: value for name, value in (given or {}).items() if value is not None}
    return lambda config: write(
        run.root / PLAN, {CHOSEN: by(where) | ({"over": over} if over else {})} | settings(config)
    )


def overruled(content: dict[str, Any], where: str) -> dict[str, Any]:
    """What was given, in the same place, when a slider was moved there."""
    chosen = origin(content)
    over = chosen.get("over") if where and chosen.get("where") == where else None
    return over if isinstance(over, dict) else {}


def check_prepared(manifest: dict[str, Any], config: RunConfig) -> None:
    """Raises StaleArtifact when the data was prepared for another context than the one that will be trained.

    That is: for a longer one, or for a shorter one that cut conversations.
    """
    prepared, trained = manifest["config"]["data"]["seq_len"], config.data.seq_len
    cut_share = manifest.get("measurements", {}).get("cut_share", 0)
    if prepared > trained or (prepared < trained and cut_share):
        cut = f", which cut {cut_share:.1%} of the rows," if prepared < trained else ""
        raise StaleArtifact(
            f"the data was prepared for a context of {prepared:,} tokens{cut} and {trained:,} will be trained: run "
            f"{maker('prepare')} again, which starts with {trained:,} now, and then this one"
        )


# ---- the file --------------------------------------------------------------------------------------------------------


def places(run: Workspace) -> list[Path]:
    """Where the file lies: in the run's folder and in its lasting twin."""
    return [path for path in (run.root / PLAN, lasting_twin(run.root / PLAN)) if path is not None]


def newest(run: Workspace) -> tuple[Path | None, dict[str, Any]]:
    """(path, content) of the last choice, wherever it was made; (None, {}) when there is none.

    Raises StorageError when a place cannot be read, ValueError for a file that is no YAML.
    """
    found = []
    for path in places(run):
        with files.reached(path.parent, "nothing was started"):
            if files.is_file(path):
                text = files.read_text(path)
                found.append((path, mendable(lambda text=text, path=path: yaml_tree(text, path))))
    return max(found, key=lambda one: str(origin(one[1]).get("at", "")), default=(None, {}))


def mendable(read: Callable[[], Result]) -> Result:
    """What a reader of the file gives; its ValueError says what to do about the file."""
    try:
        return read()
    except ValueError as error:
        raise ValueError(f"{error}; mend it, or delete it to start from the profile") from None


def origin(content: dict[str, Any]) -> dict[str, Any]:
    """Who chose, and when; {} when the file does not say, or not in this way."""
    return chosen if isinstance(chosen := content.get(CHOSEN), dict) else {}


def write(path: Path, content: dict[str, Any]) -> None:
    """Write the file unless it holds the same already; says so when the lasting folder does not take it."""
    text = yaml.safe_dump(content, sort_keys=False)
    try:
        if not (files.is_file(path) and files.read_text(path) == text):
            files.make_folder(path.parent)
            files.write_text(path, text)
    except OSError as error:
        print(f"NOT KEPT: {path} could not be written ({files.reason(error)}): the next notebook may not know of this")


def by(where: str) -> dict[str, str]:
    """Who chose, and when."""
    return {"where": where, "at": datetime.now(UTC).isoformat(timespec="milliseconds")}


def settings(config: RunConfig) -> dict[str, Any]:
    """The profile, and what differs from it."""
    own = profile(config.profile) if config.profile in PROFILES else RunConfig(profile=config.profile)
    return {"profile": config.profile} | changes(config, own)


def changes(config: RunConfig, other: RunConfig) -> dict[str, Any]:
    """Settings of a configuration that differ from another's, by name."""
    before = flat(other)
    return {name: value for name, value in flat(config).items() if value != before[name]}


def words(settings: dict[str, Any]) -> str:
    """Settings as a sentence lists them.

    >>> words({"rank": 32, "targets": "attention", "seq_len": 1536})
    'rank 32, a context of 1,536 tokens and targets attention'
    """
    order = sorted(settings, key=lambda name: (*WORDS, name).index(name))
    *others, last = (WORDS.get(name, f"{name} {{}}").format(settings[name]) for name in order)
    return f"{', '.join(others)} and {last}" if others else last
