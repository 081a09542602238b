"""A prepared folder's two sides, as datasets; one that is empty is a dataset too.

>>> import tempfile
>>> len(side(Path(tempfile.mkdtemp()), "heldout"))
0
"""

import json
from pathlib import Path
from typing import Any

from helpers.config import RunConfig
from helpers.profiles import PROFILES

SIDES = ("train", "heldout")


def side(folder: Path, name: str) -> Any:
    """Rows of train or heldout; of an empty side, which has no file that `load_from_disk` could open, none."""
    from datasets import Dataset

    place = Path(folder) / name
    if not any(place.glob("*.arrow")):
        return Dataset.from_dict({"messages": [], "input_ids": [], "assistant_masks": [], "full_tokens": []})
    return load(place)


def scored(folder: Path) -> Any:
    """Rows to evaluate on: those held out of a prepared folder, or a dataset's own.

    Where nothing was held out, the training rows, and a sentence that says what that is worth. Raises FileNotFoundError
    for a folder that is neither.
    """
    folder = Path(folder)
    if not (folder / "heldout").is_dir():
        return conversations(folder)
    if len(side(folder, "heldout")):
        return conversations(folder / "heldout")
    print(
        f"nothing is held out in {folder}: what was trained is scored, which tells how well it was learned and not how "
        "well anything else is answered; prepare with heldout_fraction above 0 for that"
    )
    return conversations(folder / "train") if len(side(folder, "train")) else side(folder, "train")


def with_own_questions(config: RunConfig, folder: Path) -> RunConfig:
    """The configuration without its profile's questions when the data is somebody's own: they are about other things.

    Then the first turns of the held-out conversations are asked, and scored against what was answered there.
    """
    own = PROFILES.get(config.profile, {})
    if not own.get("questions") or config.evaluate.questions != own["questions"]:
        return config
    try:
        made = json.loads((Path(folder) / "manifest.json").read_text(encoding="utf-8"))["measurements"]
        source = Path(made["source"]).expanduser().resolve()
    except (OSError, ValueError, KeyError, TypeError):
        return config
    if source == Path(own["source"]).resolve():
        return config
    print(f"the questions of the profile are not about {made['source']}: held-out conversations are asked instead")
    return config.with_values(questions=None)


def conversations(place: Path) -> Any:
    """Rows of a dataset on disk as conversations: of preference pairs, the prompt with the answer that was chosen.

    What reads or continues text does not care which answer was rejected: calibration, perplexity, checks of tokens.
    """
    rows = load(place)
    if "chosen_ids" not in rows.column_names:
        return rows
    rows = rows.rename_columns({"chosen_ids": "input_ids", "chosen_masks": "assistant_masks"})
    return rows.map(lambda row: {"messages": [*row["prompt"], *row["chosen"]]}, keep_in_memory=True)


def load(folder: Path) -> Any:
    """A dataset on disk. Raises FileNotFoundError when there is none."""
    from datasets import load_from_disk

    return load_from_disk(str(folder))
