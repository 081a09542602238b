"""Where a run's artifacts lie: a folder a stage, a manifest in each, nothing half-written under a finished name.

A stage writes beside its place and is renamed when it is whole; the next one checks every byte before it starts:

>>> import tempfile
>>> from helpers.models import profile
>>> root = Path(tempfile.mkdtemp())
>>> with building(root / "prepare", "prepare", profile("tiny")) as stage:
...     _ = (stage.folder / "rows.txt").write_text("3 rows")
...     stage.measurements["rows"] = 3
>>> require(root / "prepare", "prepare")["measurements"]
{'rows': 3}
>>> _ = (root / "prepare" / "rows.txt").write_text("4 rows")
>>> require(root / "prepare", "prepare")  # doctest: +ELLIPSIS
Traceback (most recent call last):
helpers.workspace.DamagedArtifact: .../prepare/rows.txt has another checksum than when it was written: ...

A rented machine's disk vanishes with it, so a run there has a second, lasting folder (Google Drive): finished stages
are copied to it, and a new machine fetches from it what it lacks.
"""

import fcntl
import hashlib
import json
import os
import re
import shutil
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from helpers.config import RunConfig, from_tree, save_yaml
from helpers.models import ROOT
from helpers.versions import version_table as version_table
from helpers.versions import versions

NOTEBOOKS = {
    "prepare": "02_dataset_preparation.ipynb",
    "finetune": "03_qlora_finetuning.ipynb",
    "merge": "04_gptq_quantization.ipynb",
    "quantize": "04_gptq_quantization.ipynb",
    "evaluate": "05_evaluation.ipynb",
}
BEFORE = {"finetune": ("prepare",), "merge": ("finetune",), "quantize": ("merge",)}
"""What a stage is made from."""
MANIFEST = "manifest.json"
LASTING = "lasting.txt"
"""In a run's folder: the path of its lasting twin, when there is one."""
DATA_FILES = (".safetensors", ".arrow", ".jsonl")
"""What makes an artifact what it is; logs, figures and notes beside it may differ."""
GIB = 2**30


class MissingArtifact(ValueError):
    """A stage's input is not there, or not whole; the message says which notebook makes it."""


class DamagedArtifact(MissingArtifact):
    """A file of a finished stage is missing or is not what was written."""


class StaleArtifact(MissingArtifact):
    """A stage was made from something else than what lies there now, or with other settings."""


@dataclass(frozen=True)
class Workspace:
    """One run's folder: `root/prepare`, `root/finetune`, … and `root/plots`."""

    root: Path

    def folder(self, stage: str) -> Path:
        """Where a stage's finished output lies."""
        return self.root / stage


def open_run(config: RunConfig, workspace: str | Path | None = None) -> Workspace:
    """The run's folder: `workspace`, or runs/<profile> on this machine's disk.

    On Colab with Drive mounted, or with RECIPES_LASTING=folder in the environment, the run also gets a lasting twin
    there; says where both are.
    """
    run = Workspace(Path(workspace) if workspace else home() / "runs" / config.profile)
    run.root.mkdir(parents=True, exist_ok=True)
    store = lasting_store()
    if store is None or run.root.resolve().is_relative_to(store.resolve()):
        (run.root / LASTING).unlink(missing_ok=True)
        if place() == "colab":
            print(
                f"{run.root} vanishes with this session. To keep the run, mount Drive and run this cell again: "
                "from google.colab import drive; drive.mount('/content/drive')"
            )
    else:
        twin = store / "mistral-t4-recipes" / run.root.name
        write_text(run.root / LASTING, str(twin))
        print(f"{run.root}; finished stages and checkpoints are also kept in {twin}")
    return run


def place() -> str:
    """colab, kaggle or own: whose machine this is."""
    if "COLAB_RELEASE_TAG" in os.environ:
        return "colab"
    return "kaggle" if "KAGGLE_KERNEL_RUN_TYPE" in os.environ else "own"


def home() -> Path:
    """Where this machine keeps files: the repository, or the rented machine's working folder."""
    return {"colab": Path("/content"), "kaggle": Path("/kaggle/working"), "own": ROOT}[place()]


def lasting_store() -> Path | None:
    """A folder that outlives this machine: RECIPES_LASTING, or Colab's mounted Drive; Kaggle keeps its own."""
    named = os.environ.get("RECIPES_LASTING")
    drive = Path(named) if named else Path("/content/drive/MyDrive")
    return drive if drive.is_dir() and (named or place() == "colab") else None


def lasting_twin(folder: Path) -> Path | None:
    """Where a stage's folder is kept for good, when its run has such a place."""
    note = Path(folder).parent / LASTING
    if not note.is_file():
        return None
    run = Path(note.read_text(encoding="utf-8"))
    return run / Path(folder).name if run.parent.parent.is_dir() else None  # else: noted on another machine


def run_config(run: Workspace, stage: str) -> RunConfig:
    """The configuration that a finished stage was made with; fetches it, and what lies before it, from the twin."""
    for earlier in (*BEFORE.get(stage, ()), stage):
        fetch(run.folder(earlier))
    return from_tree(require(run.folder(stage), stage)["config"])


def run_models(run: Workspace, config: RunConfig) -> dict[str, str | Path]:
    """The run's models by name, those that are there; says what is not and which notebook makes it."""
    fetch(run.folder("quantize"))
    models: dict[str, str | Path] = {"base": config.model.model}
    for name, stage in (("finetuned", "finetune"), ("merged", "merge"), ("gptq", "quantize")):
        folder = run.folder(stage)
        if (folder / MANIFEST).is_file():
            models[name] = folder / "adapter" if stage == "finetune" else folder
        else:
            print(f"{name} is left out: {folder} is not there; notebook {NOTEBOOKS[stage]} makes it")
    return models


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

    Inputs that another stage finished are checked first, every byte. keep: leave the work folder after a failure, for
    stages that continue where they stopped. The former output stays until the new one is whole.
    Raises ValueError when output holds anything that this stage did not make (`refuse_output`).
    """
    output, inputs = Path(output), inputs or {}
    refuse_output(output, list(inputs.values()), stage)
    recover(output)
    for path in inputs.values():
        check_input(Path(path), output, config)
    partial, former = beside(output, "partial"), beside(output, "former")
    if not keep:
        shutil.rmtree(partial, ignore_errors=True)
    try:
        partial.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ValueError(f"output {output} cannot be written ({error.strerror}): choose another folder") from None
    work = Building(partial)
    try:
        yield work
    except BaseException:
        if not keep:
            shutil.rmtree(partial, ignore_errors=True)
        raise
    if config is not None:
        save_yaml(config, partial / "config.yaml")
    write_manifest(partial, stage, config, inputs, work.measurements)
    replaced = output.exists()
    if replaced:
        output.rename(former)
    partial.rename(output)
    if replaced:
        shutil.rmtree(former, ignore_errors=True)
    keep_copy(output)


def refuse_output(output: Path, inputs: list[Path], stage: str) -> None:
    """Raise ValueError, with nothing touched, unless output is new, empty, or made by this stage and by nobody else.

    A finished stage replaces its output whole, so whatever else lies there would be lost: files that the manifest does
    not list, another stage's result, the inputs themselves, the folder that one works in.
    """
    try:
        here = output.resolve()
        recover(here)
        is_file, is_folder = here.is_file(), here.is_dir()
        listed = [path for path in here.rglob("*") if not path.is_dir()] if is_folder else []
    except OSError as error:
        raise ValueError(f"output {output} cannot be used ({error.strerror}): choose another folder") from None
    if here == Path.cwd() or here in Path.cwd().parents:
        raise ValueError(f"output {output} holds the working folder: choose a folder of its own, nothing was changed")
    for source in (Path(path).resolve() for path in inputs if Path(path).exists()):
        if here == source or here in source.parents or (source.is_dir() and source in here.parents):
            raise ValueError(f"output {output} and input {source} lie in each other: choose another output folder")
    if is_file:
        raise ValueError(f"output {output} is a file: choose a folder, nothing was changed")
    if is_folder and beside(here, "former").exists():
        raise ValueError(f"{beside(output, 'former')} stands where output {output} would be put aside: move it away")
    if not listed:
        return
    if not (here / MANIFEST).is_file():
        raise ValueError(
            f"output {output} is in use by something else, it holds {listed[0].relative_to(here)}: choose a new or "
            f"empty folder, nothing was changed"
        )
    made_by, names = listing_of(here)
    if made_by != stage:
        raise ValueError(
            f"output {output} is in use by something else, {made_by or 'with a manifest that is not ours'}: choose a "
            f"new or empty folder, nothing was changed"
        )
    ours = {here / name for name in (*names, MANIFEST)}
    added = [path.relative_to(here) for path in listed if path not in ours and not is_by_product(path)]
    if added:
        raise ValueError(
            f"output {output} is in use by something else, {added[0]} is not of its {stage} stage: move it away, or "
            f"choose another folder, nothing was changed"
        )


def listing_of(folder: Path) -> tuple[str, list[str]]:
    """The stage that a manifest names, and its files; also of a damaged one, whose stage must be run again."""
    try:
        manifest = json.loads((folder / MANIFEST).read_text(encoding="utf-8"))
        return str(manifest["stage"]), list(manifest["outputs"])
    except (OSError, ValueError, KeyError, TypeError):
        return "", []


def is_by_product(path: Path) -> bool:
    """Whether a file is what systems and libraries leave in any folder: nobody's work."""
    return path.name in (".DS_Store", "Thumbs.db", "desktop.ini", LASTING) or bool(
        {"__pycache__", ".ipynb_checkpoints"} & set(path.parts) or re.fullmatch(r"cache-\w+\.arrow", path.name)
    )


def beside(output: Path, what: str) -> Path:
    """The folder `<output>.<what>`."""
    return output.with_name(f"{output.name}.{what}")


def recover(output: Path) -> None:
    """Finish what a kill between two renames left: the former output is still the output."""
    if not output.name:  # the root of a file system has nothing beside it
        return
    former = beside(output, "former")
    if not (former / MANIFEST).is_file():  # somebody's own folder of that name
        return
    if not output.exists():
        former.rename(output)
    shutil.rmtree(former, ignore_errors=True)


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


# ---- manifests -------------------------------------------------------------------------------------------------------


def write_manifest(folder: Path, stage: str, config: RunConfig | None, inputs: dict, measurements: dict) -> Path:
    """Configuration, versions, inputs and outputs by checksum, measurements, and its own checksum; written last."""
    files = [file for file in sorted(folder.rglob("*")) if file.is_file() and file.name != MANIFEST]
    manifest = {
        "stage": stage,
        "finished": True,
        "config": asdict(config) if config else None,
        "versions": versions(),
        "inputs": {name: {"path": str(path)} | identify(Path(path)) for name, path in inputs.items()},
        "outputs": {
            str(file.relative_to(folder)): {"size_bytes": file.stat().st_size, "sha256": sha256}
            for file, sha256 in zip(files, checksums(files), strict=True)
        },
        "measurements": measurements,
    }
    manifest = json.loads(json.dumps(manifest, default=str))
    return write_text(folder / MANIFEST, json.dumps(manifest | {"sha256": text_checksum(manifest)}, indent=1))


def read_manifest(folder: Path) -> dict:
    """A finished stage's manifest. Raises DamagedArtifact when it is not what was written."""
    path = folder / MANIFEST
    try:
        manifest = json.loads(path.read_text(encoding="utf-8"))
        sound = manifest.pop("sha256") == text_checksum(manifest)
    except (ValueError, KeyError, AttributeError):
        sound = False
    if not sound:
        raise DamagedArtifact(f"{path} is not what was written: run the stage that made {folder} again")
    return manifest


def require(folder: Path, stage: str) -> dict:
    """The manifest of a finished stage, every file checked; one that is only in the lasting twin is fetched first.

    Raises MissingArtifact that names the file and the notebook which makes it.
    """
    folder = Path(folder)
    recover(folder)
    fetch(folder)
    if not (folder / MANIFEST).is_file():
        raise MissingArtifact(f"{folder} has no finished {stage} stage: run notebook {NOTEBOOKS[stage]} first")
    return check_outputs(folder)


def check_outputs(folder: Path) -> dict:
    """Hold every file of a finished folder to its manifest, which is returned. Raises DamagedArtifact naming the file.

    Reads all of it, at 0.4 to 1.5 GiB/s (SHA-256 on two cores): a merged 7B takes 10 to 40 s, and says so.
    """
    manifest = read_manifest(folder)
    known = manifest["outputs"]
    files = [confined(folder, name) for name in known]
    total_gib = sum(entry["size_bytes"] for entry in known.values()) / GIB
    if total_gib > 1:
        print(f"checking {total_gib:.1f} GiB in {folder} against its checksums …")
    remedy = f"run notebook {NOTEBOOKS.get(manifest['stage'], 'that made it')} again"
    for file, entry in zip(files, known.values(), strict=True):
        if not file.is_file():
            raise DamagedArtifact(f"{file} is missing: {remedy}")
        if file.stat().st_size != entry["size_bytes"]:
            sizes = f"{file.stat().st_size} bytes and was written with {entry['size_bytes']}"
            raise DamagedArtifact(f"{file} has {sizes}: {remedy}")
    for file, entry, sha256 in zip(files, known.values(), checksums(files), strict=True):
        if sha256 != entry["sha256"]:
            raise DamagedArtifact(f"{file} has another checksum than when it was written: {remedy}")
    return manifest


def check_input(path: Path, output: Path, config: RunConfig | None) -> None:
    """Check an input that a stage of this project finished; folders from elsewhere pass as they are.

    Raises DamagedArtifact for a changed byte, and within one run's folder StaleArtifact for what no longer belongs
    together: an input made from something that has since been made anew, or with settings that this run lacks.
    """
    fetch(path)
    folder = next((place for place in (path, path.parent) if (place / MANIFEST).is_file()), None)
    if folder is None:
        return
    manifest = check_outputs(folder)
    if folder.resolve().parent != output.resolve().parent:
        return
    for known in manifest["inputs"].values():
        source = folder.parent / Path(known["path"]).name
        if (source / MANIFEST).is_file() and known.get("sha256") not in (None, identify(source)["sha256"]):
            raise StaleArtifact(
                f"{folder} was made from another {source.name} than the one that lies there now: run notebook "
                f"{NOTEBOOKS[manifest['stage']]} again, or use another workspace for the new one"
            )
    made = manifest["config"]
    if manifest["stage"] == "prepare" and config is not None and made is not None:
        wanted = {"model": config.model.model, "seq_len": config.data.seq_len}
        had = {"model": made["model"]["model"], "seq_len": made["data"]["seq_len"]}
        other_model = Path(had["model"]).name != Path(wanted["model"]).name  # the same one may lie in another folder
        if other_model or had["seq_len"] > wanted["seq_len"]:
            changed = "model" if other_model else "seq_len"
            raise StaleArtifact(
                f"{folder} was prepared with {changed} = {had[changed]} and this run says {wanted[changed]}: run "
                f"notebook {NOTEBOOKS['prepare']} again with the new value, or set {changed} back"
            )


def identify(path: Path) -> dict[str, Any]:
    """What identifies an input: a finished folder by its data, a file by its bytes, any other folder by its listing."""
    if (path / MANIFEST).is_file():
        outputs = read_manifest(path)["outputs"]
        data = {name: known["sha256"] for name, known in outputs.items() if name.endswith(DATA_FILES)}
        data = data or {name: known["sha256"] for name, known in outputs.items()}
        return {"sha256": text_checksum(data), "of": "the finished stage's data"}
    if path.is_file():
        return {"sha256": checksum(path), "of": "the file"}
    if path.is_dir():
        listing = {
            str(file.relative_to(path)): file.stat().st_size for file in sorted(path.rglob("*")) if file.is_file()
        }
        return {"sha256": text_checksum(listing), "of": "names and sizes"}
    return {"sha256": None, "of": "not on this disk"}


def text_checksum(value: Any) -> str:
    """SHA-256 of a value's JSON."""
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()


def checksum(file: Path) -> str:
    """SHA-256 of a file, read in pieces."""
    with file.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def checksums(files: list[Path]) -> list[str]:
    """SHA-256 of many files, two at a time: a free Colab has two cores."""
    with ThreadPoolExecutor(max_workers=2) as threads:
        return list(threads.map(checksum, files))


def confined(folder: Path, name: str) -> Path:
    """A file inside a folder by its listed name. Raises DamagedArtifact for a name that leads out of it."""
    path = folder / name
    if Path(name).is_absolute() or not path.resolve().is_relative_to(folder.resolve()):
        raise DamagedArtifact(f"{folder / MANIFEST} lists {name}, which is outside of {folder}: do not use this folder")
    return path


# ---- the lasting twin ------------------------------------------------------------------------------------------------


def keep_copy(folder: Path) -> None:
    """Copy a finished stage to its lasting twin; says why when it cannot: a copy that fails ends nothing."""
    try:
        twin = lasting_twin(folder)
        if twin is None:
            return
        if read_manifest(folder)["stage"] == "merge":
            print(f"{folder} stays here: {size_bytes(folder) / GIB:.1f} GiB that the adapter and its base make again")
            return
        copy_stage(folder, twin)
    except OSError as error:
        print(
            f"{folder} could not be copied to the run's lasting folder ({error}): make room there (empty Drive's bin "
            "too, deleted files go on using the quota), then copy it with helpers.share.to_folder"
        )


def fetch(folder: Path) -> None:
    """Copy a finished stage from its lasting twin when it is not here. Raises DamagedArtifact when it is not whole."""
    twin = lasting_twin(folder)
    if twin is not None and not (folder / MANIFEST).is_file() and (twin / MANIFEST).is_file():
        print(f"fetching {folder.name}, {size_bytes(twin) / GIB:.2f} GiB, from {twin}")
        try:
            copy_stage(twin, folder)
        except OSError as error:
            again = NOTEBOOKS.get(folder.name, "that makes it")
            raise DamagedArtifact(f"{twin} could not be fetched ({error}): run notebook {again} again") from None


def copy_stage(source: Path, target: Path) -> Path:
    """Copy a finished stage, its manifest last; goes on where an earlier copy broke off. Raises OSError.

    A file that is already there with the right checksum is not copied again; files of an older stage are removed.
    """
    known = read_manifest(source)["outputs"]
    lacking = [name for name, entry in known.items() if not same(confined(target, name), entry)]
    needed = sum(known[name]["size_bytes"] for name in lacking)
    free = shutil.disk_usage(existing(target)).free
    if needed > free:
        raise OSError(f"it needs {needed / GIB:.2f} GiB and {free / GIB:.2f} GiB is free")
    target.mkdir(parents=True, exist_ok=True)
    (target / MANIFEST).unlink(missing_ok=True)
    for file in [path for path in target.rglob("*") if path.is_file()]:
        if str(file.relative_to(target)) not in known:
            empty(file)
            file.unlink()
    for name in lacking:
        copy_verified(confined(source, name), target / name, known[name]["sha256"])
    copy_verified(source / MANIFEST, target / MANIFEST, checksum(source / MANIFEST))
    return target


def same(file: Path, entry: dict) -> bool:
    """Whether a file has the size and the checksum of a manifest's entry."""
    return file.is_file() and file.stat().st_size == entry["size_bytes"] and checksum(file) == entry["sha256"]


def copy_verified(source: Path, target: Path, sha256: str, tries: int = 3) -> None:
    """Copy a file and read the copy back. Raises OSError after so many tries that failed: Drive's mount hiccups."""
    target.parent.mkdir(parents=True, exist_ok=True)
    for attempt in range(1, tries + 1):
        try:
            shutil.copyfile(source, target)
            if checksum(target) != sha256:
                raise OSError(f"the copy of {source} has another checksum")
            return
        except OSError:
            if attempt == tries or not source.is_file():
                raise


def existing(folder: Path) -> Path:
    """The folder, or the nearest one above it that is there."""
    return next(path for path in (folder, *folder.absolute().parents) if path.is_dir())


def remove(folder: Path, marker: str = MANIFEST) -> None:
    """Delete a folder, its marker first, so that a half-deleted one never looks whole.

    Files are emptied before they are unlinked: Google Drive moves what is deleted to its bin, where it goes on using
    the quota for 30 days (transformers#14922), and an empty file uses none of it.
    """
    (folder / marker).unlink(missing_ok=True)
    for file in [path for path in folder.rglob("*") if path.is_file()]:
        empty(file)
    shutil.rmtree(folder, ignore_errors=True)


def empty(file: Path) -> None:
    """Let a file that is about to be deleted use no space in Drive's bin; one with a second name keeps its bytes."""
    if not file.is_symlink() and file.stat().st_nlink == 1:
        with suppress(OSError):
            os.truncate(file, 0)


# ---- small things ----------------------------------------------------------------------------------------------------


def write_text(path: Path, text: str) -> Path:
    """Write a file so that a reader sees the old one or the new one, never a part."""
    unfinished = path.with_name(path.name + ".tmp")
    unfinished.write_text(text, encoding="utf-8")
    return unfinished.replace(path)


def size_bytes(folder: Path) -> int:
    """Bytes of all files under a folder."""
    return sum(file.stat().st_size for file in Path(folder).rglob("*") if file.is_file())
