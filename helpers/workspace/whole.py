"""A folder that is whole, or is not there: every file's size and SHA-256 in one sealed file, which is written last.

Finished stages have manifest.json, checkpoints have whole.json; what seals them, holds a folder to its list and copies
it to another disk is the same, and is here.

>>> import tempfile
>>> folder = Path(tempfile.mkdtemp())
>>> _ = (folder / "rows.txt").write_text("3 rows")
>>> _ = seal(folder / "list.json", {"files": entries(folder)})
>>> _ = (folder / "rows.txt").write_text("4 rows")
>>> harm(folder, unseal(folder / "list.json")["files"])
('rows.txt', 'has another checksum than when it was written')
"""

import errno
import hashlib
import json
import sys
from collections.abc import Collection, Mapping
from contextlib import suppress
from dataclasses import asdict
from pathlib import Path
from typing import Any

from helpers.config import RunConfig
from helpers.workspace import files
from helpers.workspace.files import GIB, checksum, checksums, is_file, is_folder, write_text
from helpers.workspace.versions import versions

NOTEBOOKS = {
    "prepare": "02_dataset_preparation.ipynb",
    "finetune": "03_qlora_finetuning.ipynb",
    "merge": "04_gptq_quantization.ipynb",
    "quantize": "04_gptq_quantization.ipynb",
    "evaluate": "05_evaluation.ipynb",
    "export": "06_export.ipynb",
}
"""Stage -> the notebook that runs it."""
MANIFEST = "manifest.json"
SCRATCH = "checkpoints"
"""In a work folder: what is there until the stage has its finished name, and is no part of it."""
CARD = "README.md"
DATA_FILES = (".safetensors", ".arrow", ".jsonl")
"""What makes an artifact what it is; logs, figures and notes beside it may differ."""
FINISHED = "the finished stage's data"
"""What an input is known by that a stage of ours finished."""
Entries = Mapping[str, dict[str, Any]]
"""A file's name in its folder -> its size_bytes and sha256."""


class MissingArtifact(ValueError):
    """A stage's input is not there, or not whole; the message says which notebook makes it."""


class DamagedArtifact(MissingArtifact):
    """A file of a finished stage is missing or is not what was written."""


class StaleArtifact(MissingArtifact):
    """A stage was made from something else than what lies there now, or with other settings."""


# ---- any folder ------------------------------------------------------------------------------------------------------


def entries(folder: Path, but: Collection[str] = ()) -> dict[str, dict[str, Any]]:
    """Size and SHA-256 of every file under a folder, but for those whose path begins with one of these names."""
    parts = [file for file in files.files_under(folder) if file.relative_to(folder).parts[0] not in but]
    return {
        str(file.relative_to(folder)): {"size_bytes": file.stat().st_size, "sha256": sha256}
        for file, sha256 in zip(parts, checksums(parts), strict=True)
    }


def seal(path: Path, content: Mapping[str, Any]) -> Path:
    """Write what a folder is and holds, with the checksum of that; it is the last file that a whole folder gets."""
    content = json.loads(json.dumps(content, default=str))  # as it is read again: the checksum is of that
    return write_text(path, json.dumps(content | {"sha256": text_checksum(content)}, indent=1))


def unseal(path: Path) -> dict[str, Any]:
    """What `seal` wrote. Raises ValueError when it is something else, OSError when it cannot be read."""
    try:
        content = json.loads(files.read_text(path))  # a flipped bit may leave no UTF-8, which is a ValueError too
        sound = content.pop("sha256") == text_checksum(content)
    except (ValueError, KeyError, AttributeError, TypeError):
        sound = False
    if not sound:
        raise ValueError(f"{path} is not what was written")
    return content


def harm(folder: Path, known: Entries) -> tuple[str, str] | None:
    """A file that is not what was written, and what is wrong with it; None when all are whole.

    Raises OSError when that cannot be known: a file that cannot be read may be whole.
    """
    parts = {name: confined(folder, name) for name in known}
    # Sizes first: they cost nothing, and what was cut short need not be read to its end
    for name, file in parts.items():
        if not is_file(file):
            return name, "is missing"
        size_bytes = files.patiently(file.stat).st_size
        if size_bytes != known[name]["size_bytes"]:
            return name, f"has {size_bytes} bytes and not {known[name]['size_bytes']}"
    for name, sha256 in zip(parts, checksums([*parts.values()]), strict=True):
        if sha256 != known[name]["sha256"]:
            return name, "has another checksum than when it was written"
    return None


def copy_files(source: Path, beside: Path, wanted: Entries) -> None:
    """Copy files of a whole folder into another, each read back; what is there already and right is not copied again.

    Raises OSError, for too little room before the first byte, and files.Torn when the source is not whole.
    """
    lacking = [name for name, entry in wanted.items() if not same(confined(beside, name), entry)]
    needed, free = sum(wanted[name]["size_bytes"] for name in lacking), files.free_bytes(beside)
    if needed > free:
        raise OSError(errno.ENOSPC, f"it needs {needed / GIB:.2f} GiB and {free / GIB:.2f} GiB is free")
    for name in lacking:
        files.copy_verified(confined(source, name), beside / name, wanted[name]["sha256"])


def entry_of(file: Path) -> dict[str, Any]:
    """Size and SHA-256 of one file."""
    return {"size_bytes": files.patiently(file.stat).st_size, "sha256": checksum(file)}


def same(file: Path, entry: dict) -> bool:
    """Whether a file has the size and the checksum of a manifest's entry."""
    return (
        is_file(file)
        and files.patiently(file.stat).st_size == entry["size_bytes"]
        and checksum(file) == entry["sha256"]
    )


def text_checksum(value: Any) -> str:
    """SHA-256 of a value's JSON."""
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()


def confined(folder: Path, name: str) -> Path:
    """A file inside a folder by its listed name. Raises DamagedArtifact for a name that leads out of it."""
    path = folder / name
    if Path(name).is_absolute() or not path.resolve().is_relative_to(folder.resolve()):
        raise DamagedArtifact(f"{folder / MANIFEST} lists {name}, which is outside of {folder}: do not use this folder")
    return path


# ---- a finished stage ------------------------------------------------------------------------------------------------


def write_manifest(folder: Path, stage: str, config: RunConfig | None, inputs: dict, measurements: dict) -> Path:
    """Configuration, versions, inputs and outputs by checksum, measurements, and its own checksum; written last."""
    manifest = {
        "stage": stage,
        "finished": True,
        "config": asdict(config) if config else None,
        "versions": versions(),
        "inputs": {name: {"path": str(path)} | identify(Path(path)) for name, path in inputs.items()},
        "outputs": entries(folder, but=(MANIFEST, SCRATCH)),
        "measurements": measurements,
    }
    return seal(folder / MANIFEST, manifest)


def read_manifest(folder: Path) -> dict:
    """A finished stage's manifest. Raises DamagedArtifact when it is not what was written."""
    try:
        return unseal(folder / MANIFEST)
    except ValueError as error:
        raise DamagedArtifact(f"{error}: run the stage that made {folder} again") from None


def check_outputs(folder: Path) -> dict:
    """Hold every file of a finished folder to its manifest, which is returned. Raises DamagedArtifact naming the file.

    Reads all of it, at 0.4 to 1.5 GiB/s (SHA-256 on two cores): a merged 7B takes 10 to 40 s, and says so.
    """
    manifest = read_manifest(folder)
    total_gib = sum(entry["size_bytes"] for entry in manifest["outputs"].values()) / GIB
    if total_gib > 1:
        print(f"checking {total_gib:.1f} GiB in {folder} against its checksums …")
    if found := harm(folder, manifest["outputs"]):
        remedy = f"run {maker(manifest['stage'])} again"
        raise DamagedArtifact(f"{folder / found[0]} {found[1]}: {remedy}")
    return manifest


def maker(stage: str, **values: Any) -> str:
    """What a person runs to make a stage where they are: a notebook in a notebook, the command anywhere else.

    >>> maker("prepare", seq_len=256)
    'python -m helpers prepare --seq-len 256'
    """
    if in_notebook():
        given = " and ".join(f"{name} = {value}" for name, value in values.items())
        return f"notebook {NOTEBOOKS.get(stage, 'that made it')}" + (f" with {given}" if given else "")
    return " ".join(
        [f"python -m helpers {stage}", *(f"--{name.replace('_', '-')} {value}" for name, value in values.items())]
    )


def in_notebook() -> bool:
    """Whether a page shows what is displayed; IPython is not imported for the question."""
    shell = getattr(sys.modules.get("IPython"), "get_ipython", lambda: None)()
    return hasattr(shell, "kernel")


def identify(path: Path) -> dict[str, Any]:
    """What identifies an input: a finished folder by its data, a file by its bytes, any other folder by its listing."""
    if (path / MANIFEST).is_file():
        outputs = read_manifest(path)["outputs"]
        data = {name: known["sha256"] for name, known in outputs.items() if name.endswith(DATA_FILES)}
        data = data or {name: known["sha256"] for name, known in outputs.items()}
        return {"sha256": text_checksum(data), "of": FINISHED}
    if path.is_file():
        return {"sha256": checksum(path), "of": "the file"}
    if path.is_dir():
        listing = {
            str(file.relative_to(path)): file.stat().st_size for file in sorted(path.rglob("*")) if file.is_file()
        }
        return {"sha256": text_checksum(listing), "of": "names and sizes"}
    return {"sha256": None, "of": "not on this disk"}


# ---- giving it its name ----------------------------------------------------------------------------------------------


def beside(output: Path, what: str) -> Path:
    """The folder `<output>.<what>`."""
    return output.with_name(f"{output.name}.{what}")


def recover(output: Path) -> None:
    """Finish what a kill between two renames left: the former output is still the output."""
    files.recover(output)
    if (output / MANIFEST).is_file():
        files.remove(output / SCRATCH)


def replace(new: Path, output: Path) -> None:
    """Give a finished stage its name. A former one goes after that; one with files that no stage wrote is kept."""
    files.recover(output)
    if files.mode(output):
        strange = strange_file(output)
        if strange is not None:
            files.set_aside(output, f"a new one takes its place, and no stage made {strange}")
    files.publish(new, output)


def strange_file(output: Path) -> str | None:
    """What lies in a stage's folder and does not come from a stage; None when all of it does."""
    if not is_folder(output):
        return "it"
    listed = {CARD, MANIFEST}
    with suppress(DamagedArtifact):
        listed |= set(read_manifest(output)["outputs"]) if is_file(output / MANIFEST) else set()
    inside = (file.relative_to(output) for file in files.files_under(output))
    return next((str(file) for file in inside if str(file) not in listed and file.parts[0] != SCRATCH), None)
