"""Preferences in a notebook: a model that can do either, the pairs that it learns from, and plain DPO for comparison.

>>> habits("tiny").data.source == lessons("tiny", "adapter").data.source
False
"""

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from helpers import workspace
from helpers.config import RunConfig
from helpers.profiles import PAIRS, ROOT, profile

DATA = ROOT / "data"
ULTRAFEEDBACK = {
    "source": "HuggingFaceH4/ultrafeedback_binarized",
    "source_split": "train_prefs",
    "heldout_split": "test_prefs",
    "max_conversations": 2000,
}
"""Pairs for a 7B: answers of several models, the better one chosen by a larger model."""
PLAIN_STEPS = 50
"""Of plain DPO on a 7B: enough to see where it goes, and no second night."""


def habits(name: str, source: str | None = None) -> RunConfig:
    """What is trained first: for the tiny model two endings whatever was asked, for a 7B the better answers alone."""
    if name == "tiny" and not source:
        own = {"source": str(DATA / "either_ending.jsonl"), "heldout_source": None, "heldout_fraction": 0.05}
        return profile("tiny").with_values(**own, epochs=4.0, learning_rate=1e-3)
    return pairs_of(name, source).with_values(use="chosen")


def pairs_of(name: str, source: str | None) -> RunConfig:
    """A profile over a source of pairs; None: the profile's own."""
    if source:
        return profile(name, source=source)
    if name != "tiny":
        return profile(name, **ULTRAFEEDBACK)
    own = {"source": "preferences.jsonl", "heldout_source": "heldout_preferences.jsonl"}
    return profile(name, **{setting: str(DATA / file) for setting, file in own.items()})


def lessons(name: str, adapter: Path | str, source: str | None = None, **values: Any) -> RunConfig:
    """DPO on pairs, from an adapter on; values: settings that are not None."""
    small = {"batch_size": 16, "epochs": 3.0} if name == "tiny" else {}
    chosen = PAIRS[name] | small | {key: value for key, value in values.items() if value is not None}
    return pairs_of(name, source).with_values(method="dpo", start_adapter=str(adapter), **chosen)


def elsewhere(name: str, prepared: Path, source: str | None = None) -> Path:
    """What no pair is about, to see what is forgotten: for the sample pairs plain conversations, else what is held out.

    prepared: what was trained on first.
    """
    return DATA / "heldout_conversations.jsonl" if name == "tiny" and not source else prepared


def plain(config: RunConfig) -> RunConfig:
    """The same without the SFT term; on a 7B so many steps only that it is seen where it goes."""
    return config.with_values(sft_weight=0.0, max_steps=None if config.profile == "tiny" else PLAIN_STEPS)


def shown(rows: Iterable[Mapping[str, Any]], count: int = 4) -> list[dict[str, str]]:
    """A row a pair: what is asked, the better and the worse answer."""
    found = []
    for row, _ in zip(rows, range(count), strict=False):
        *prompt, better = row["messages"]
        found.append(
            {"asked": prompt[-1]["content"], "better": better["content"], "worse": row["rejected"][-1]["content"]}
        )
    return found


def open_run(name: str, folder: str | Path | None = None, use_drive: bool = False) -> workspace.Workspace:
    """The run's folder, beside that of the notebooks before: runs/<profile>-preferences, or `preferences` in a folder.

    use_drive: in Colab, mount Google Drive first. Raises and says what workspace.open_run does.
    """
    root = Path(folder) / "preferences" if folder else workspace.runs.home() / "runs" / f"{name}-preferences"
    return workspace.open_run(profile(name), root, use_drive)
