"""Where a run's artifacts lie: a folder a stage, a manifest in each, nothing half-written under a finished name.

A stage writes beside its place and is renamed when it is whole:

>>> import tempfile
>>> from helpers.models import profile
>>> root = Path(tempfile.mkdtemp())
>>> with building(root / "prepare", "prepare", profile("tiny")) as stage:
...     _ = (stage.folder / "rows.txt").write_text("3 rows")
...     stage.measurements["rows"] = 3
>>> require(root / "prepare", "prepare")["measurements"]
{'rows': 3}
"""

import fcntl
import hashlib
import json
import os
import platform
import shutil
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass, field
from importlib import metadata
from pathlib import Path
from typing import Any

from helpers.config import RunConfig, save_yaml

NOTEBOOKS = {
    "prepare": "02_dataset_preparation.ipynb",
    "finetune": "03_qlora_finetuning.ipynb",
    "merge": "04_gptq_quantization.ipynb",
    "quantize": "04_gptq_quantization.ipynb",
    "evaluate": "05_evaluation.ipynb",
}
MANIFEST = "manifest.json"
PACKAGES = ("torch", "transformers", "peft", "bitsandbytes", "trl", "datasets", "accelerate", "optimum", "gptqmodel")


class MissingArtifact(ValueError):
    """A stage's input is not there, or not whole; the message says which notebook makes it."""


@dataclass(frozen=True)
class Workspace:
    """One run's folder: `root/prepare`, `root/finetune`, … and `root/plots`."""

    root: Path

    def folder(self, stage: str) -> Path:
        """Where a stage's finished output lies."""
        return self.root / stage


@dataclass
class Building:
    """A stage under way: write into `folder`, put figures into `measurements`."""

    folder: Path
    measurements: dict[str, Any] = field(default_factory=dict)


@contextmanager
def building(
    output: Path, stage: str, config: RunConfig | None = None, inputs: dict[str, Path] | None = None, keep: bool = False
) -> Iterator[Building]:
    """Yield a work folder beside output; on success write its manifest and rename it, on failure remove it.

    keep: leave the work folder after a failure, for stages that continue where they stopped.
    """
    output = Path(output)
    partial = output.with_name(output.name + ".partial")
    if not keep:
        shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True, exist_ok=True)
    work = Building(partial)
    try:
        yield work
    except BaseException:
        if not keep:
            shutil.rmtree(partial, ignore_errors=True)
        raise
    if config is not None:
        save_yaml(config, partial / "config.yaml")
    write_manifest(partial, stage, config, inputs or {}, work.measurements)
    if output.exists():
        shutil.rmtree(output)
    partial.rename(output)


@contextmanager
def exclusive(folder: Path) -> Iterator[None]:
    """Hold a work folder for this process alone; the lock ends with the process, however that ends.

    Raises ValueError when another process holds it. Leaves no empty folder behind.
    """
    folder.mkdir(parents=True, exist_ok=True)
    handle = os.open(folder, os.O_RDONLY)
    try:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise ValueError(f"{folder} is in use by another process: wait for it, or choose another output") from None
        yield
    finally:
        os.close(handle)
        with suppress(OSError):  # not empty, or renamed to its finished place
            folder.rmdir()


def write_manifest(folder: Path, stage: str, config: RunConfig | None, inputs: dict, measurements: dict) -> Path:
    """Configuration, versions, inputs and outputs by checksum, measurements; written last and at once."""
    manifest = {
        "stage": stage,
        "finished": True,
        "config": asdict(config) if config else None,
        "versions": versions(),
        "inputs": {name: {"path": str(path), "sha256": manifest_checksum(Path(path))} for name, path in inputs.items()},
        "outputs": {
            str(file.relative_to(folder)): {"size_bytes": file.stat().st_size, "sha256": checksum(file)}
            for file in sorted(folder.rglob("*"))
            if file.is_file() and file.name != MANIFEST
        },
        "measurements": measurements,
    }
    return write_text(folder / MANIFEST, json.dumps(manifest, indent=1, default=str))


def require(folder: Path, stage: str) -> dict:
    """The manifest of a finished stage. Raises MissingArtifact that names the notebook which makes it."""
    path = Path(folder) / MANIFEST
    if not path.is_file():
        raise MissingArtifact(f"{folder} has no finished {stage} stage: run notebook {NOTEBOOKS[stage]} first")
    manifest = json.loads(path.read_text(encoding="utf-8"))
    for name, known in manifest["outputs"].items():
        file = Path(folder) / name
        if not file.is_file() or file.stat().st_size != known["size_bytes"]:
            raise MissingArtifact(
                f"{file} is missing or has another size than when it was written: run notebook {NOTEBOOKS[stage]} again"
            )
    return manifest


def write_text(path: Path, text: str) -> Path:
    """Write a file so that a reader sees the old one or the new one, never a part."""
    beside = path.with_name(path.name + ".tmp")
    beside.write_text(text, encoding="utf-8")
    os.replace(beside, path)
    return path


def checksum(file: Path) -> str:
    """SHA-256 of a file, read in pieces."""
    with file.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def manifest_checksum(path: Path) -> str | None:
    """What identifies an input: a finished folder by its manifest, a file by its bytes, else nothing."""
    target = path / MANIFEST if path.is_dir() else path
    return checksum(target) if target.is_file() else None


def versions() -> dict[str, str]:
    """Versions of Python and of the packages that decide a result, without importing them."""
    found = {"python": platform.python_version()}
    for package in PACKAGES:
        try:
            found[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            continue
    return found


def size_bytes(folder: Path) -> int:
    """Bytes of all files under a folder."""
    return sum(file.stat().st_size for file in Path(folder).rglob("*") if file.is_file())
