"""Which files of a folder or an archive are data, and of which split: train is trained, the others are not mixed in.

>>> taken, said = choose(["README.md", "data/train.jsonl", "data/test.jsonl", ".git/x.json"])
>>> taken
['data/train.jsonl']
>>> print(said[0])
left out: data/test.jsonl, the test split; README.md, no data
"""

import re
from pathlib import PurePosixPath
from typing import NamedTuple

KINDS = {
    ".jsonl": "jsonl", ".ndjson": "jsonl", ".json": "json", ".csv": "csv", ".tsv": "csv", ".parquet": "parquet",
    ".txt": "text", ".text": "text", ".md": "text",
}  # fmt: skip
SPLITS = {
    "train": {"train", "training"},
    "validation": {"validation", "valid", "val", "dev", "eval", "heldout"},
    "test": {"test", "testing"},
}
NOT_DATA = {
    "dataset_info.json", "dataset_infos.json", "dataset_dict.json", "state.json", "config.json", "package.json",
    "manifest.json", "tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "requirements.txt",
    "generation_config.json", "package-lock.json",
}  # fmt: skip
SHOWN = 6


class Split(NamedTuple):
    """Which split of a source is read."""

    name: str = "train"
    strictly: bool = False
    """No other split stands in for one that is not there."""
    beside: str | None = None
    """The one that is read beside it, to be held out: it is not left out."""

    def missing(self, source: str) -> str:
        """The sentence for a source that has no such split."""
        return f"{source} has no {self.name} split: leave heldout_split empty, or name a file as heldout_source"


TRAIN = Split()


def kind_of(name: str) -> str:
    """jsonl, json, csv, parquet, text, gz or zip, by a file's ending; "" for others.

    >>> kind_of("a.jsonl.gz"), kind_of("b.CSV"), kind_of("c.exe")
    ('gz', 'csv', '')
    """
    suffix = PurePosixPath(name.lower()).suffix
    return {".gz": "gz", ".zip": "zip"}.get(suffix) or KINDS.get(suffix, "")


def split_of(name: str) -> str:
    """The split that a file's path names, "" for none.

    >>> split_of("data/train-00000-of-00002.parquet"), split_of("validation/a.jsonl"), split_of("latest.jsonl")
    ('train', 'validation', '')
    """
    words = set(re.split(r"[-_. /\\]+", name.lower()))
    return next((split for split, names in SPLITS.items() if words & names), "")


def is_hidden(name: str) -> bool:
    """Whether systems and editors left a file: .ipynb_checkpoints, ._x and __MACOSX of macOS, .git."""
    return any(part.startswith(".") or part == "__MACOSX" for part in PurePosixPath(name).parts)


def choose(names: list[str], split: Split = TRAIN) -> tuple[list[str], list[str]]:
    """(files to read, a sentence about those left out) of the files of a folder, by their relative names.

    Text is data only where there is nothing else, and a split only where files are named after one, as on the hub.
    """
    seen = [name for name in sorted(names) if not is_hidden(name) and kind_of(name)]
    data = [name for name in seen if not is_prose(name)]
    tables = [name for name in data if kind_of(name) != "text" and kind_of(inner(name)) != "text"]
    data = tables or data
    wanted = split_of(split.name) or ("" if split.strictly else "train")
    by_split: dict[str, list[str]] = {}
    for name in data:
        by_split.setdefault(split_of(name), []).append(name)
    if split.strictly:
        return by_split.get(wanted, []) if wanted else [], []
    taken = by_split.get(wanted) or by_split.get("") or by_split.get("train") or data
    beside = by_split.get(split_of(split.beside), []) if split.beside else []
    if beside:
        data = [name for name in data if name not in beside or name in taken]
    left = [f"{name}, {'the ' + split_of(name) + ' split' if split_of(name) else 'no split'}" for name in data
            if name not in taken]  # fmt: skip
    left += [f"{name}, no data" for name in seen if name not in (*data, *beside)]
    return taken, [f"left out: {listed(left)}{offer(data, taken)}"] if left else []


def is_prose(name: str) -> bool:
    """Whether a file is written for people or programs about the data: README, LICENSE, docs, dataset_info.json."""
    path = PurePosixPath(name.lower())
    stem = path.stem.replace("-", "_")
    return (
        path.name in NOT_DATA
        or stem.startswith(("readme", "license", "licence", "changelog", "contributing", "requirements", "citation"))
        or (kind_of(name) == "text" and bool({"docs", "doc"} & set(path.parts)))
    )


def inner(name: str) -> str:
    """The name of what a .gz holds."""
    return name[:-3] if name.lower().endswith(".gz") else name


def offer(data: list[str], taken: list[str]) -> str:
    """How a validation split that was left out can be held out."""
    found = [name for name in data if split_of(name) == "validation" and name not in taken]
    return f"; --heldout-split validation holds {found[0]} out" if found else ""


def listed(names: list[str]) -> str:
    """Some names, and how many more."""
    more = len(names) - SHOWN
    return "; ".join(names[:SHOWN]) + (f"; and {more} more" if more > 0 else "")
