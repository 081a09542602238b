"""Where a run's artifacts lie: a folder a stage, a manifest in each, nothing half-written under a finished name.

A stage writes beside its place and is renamed when it is whole; the next one checks every byte before it starts:

>>> import tempfile
>>> from helpers.profiles import profile
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

import errno
import hashlib
import json
import os
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext, suppress
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

try:
    import fcntl
except ImportError:
    raise ImportError("the recipes need Linux or macOS: in Windows, run them in WSL 2") from None

from helpers.config import RunConfig, from_tree, save_yaml
from helpers.profiles import ROOT
from helpers.workspace import files
from helpers.workspace.files import StorageError as StorageError
from helpers.workspace.files import checksum as checksum
from helpers.workspace.files import checksums as checksums
from helpers.workspace.files import existing as existing
from helpers.workspace.files import is_file, is_folder, reached
from helpers.workspace.files import size_bytes as size_bytes
from helpers.workspace.files import write_text as write_text
from helpers.workspace.versions import version_table as version_table
from helpers.workspace.versions import versions

NOTEBOOKS = {
    "prepare": "02_dataset_preparation.ipynb",
    "finetune": "03_qlora_finetuning.ipynb",
    "merge": "04_gptq_quantization.ipynb",
    "quantize": "04_gptq_quantization.ipynb",
    "evaluate": "05_evaluation.ipynb",
    "export": "06_export.ipynb",
}
BEFORE = {"finetune": ("prepare",), "merge": ("finetune",), "quantize": ("merge",)}
"""What a stage is made from."""
MANIFEST = "manifest.json"
LASTING = "lasting.txt"
"""In a run's folder: the path of its lasting twin, when there is one."""
SCRATCH = "checkpoints"
"""In a work folder: what is there until the stage has its finished name, and is no part of it."""
CARD = "README.md"
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
    there; says where both are. Finished stages that are not whole there yet are copied now.
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
        for stage in NOTEBOOKS:
            if unkept(run.folder(stage)).is_file() and (run.folder(stage) / MANIFEST).is_file():
                keep_copy(run.folder(stage))
    return run


def place() -> str:
    """colab, kaggle or own: whose machine this is."""
    if "COLAB_RELEASE_TAG" in os.environ:
        return "colab"
    return "kaggle" if "KAGGLE_KERNEL_RUN_TYPE" in os.environ else "own"


def home() -> Path:
    """Where this machine keeps files: the repository, or the rented machine's disk.

    On Kaggle not what it keeps, /kaggle/working: that holds 20 GB, and a 7B's run is more.
    """
    return {"colab": Path("/content"), "kaggle": Path("/kaggle/temp"), "own": ROOT}[place()]


def lasting_store() -> Path | None:
    """A folder that outlives this machine: RECIPES_LASTING, else Colab's mounted Drive, or what Kaggle keeps."""
    store = lasting_place()
    if store is None:
        return None
    with reached(store, "nothing was started"):
        return store if is_folder(store) else None


def lasting_place() -> Path | None:
    """Where such a folder is on this machine, mounted or not."""
    usual = {"colab": "/content/drive/MyDrive", "kaggle": "/kaggle/working"}.get(place())
    named = os.environ.get("RECIPES_LASTING") or usual
    return Path(named) if named else None


def lasting_twin(folder: Path) -> Path | None:
    """Where a stage's folder is kept for good, when its run has such a place.

    Raises StorageError when this machine had it mounted as the run was opened, and has no more: "there is nothing"
    would be the wrong answer then.
    """
    note = Path(folder).parent / LASTING
    if not note.is_file():
        return None
    run = Path(note.read_text(encoding="utf-8"))
    store = run.parent.parent
    with reached(store, "nothing was changed"):
        if is_folder(store):
            return run / Path(folder).name
        if store == lasting_place():
            raise FileNotFoundError(errno.ENOENT, "it is no longer mounted", str(store))
    return None  # noted on another machine


def run_config(run: Workspace, stage: str) -> RunConfig:
    """The configuration that a finished stage was made with; fetches it, and what lies before it, from the twin."""
    for earlier in (*BEFORE.get(stage, ()), stage):
        fetch(run.folder(earlier))
    return from_tree(require(run.folder(stage), stage)["config"])


def run_models(run: Workspace, config: RunConfig) -> dict[str, str | Path]:
    """The run's models by name, those that are there; says what is not and which notebook makes it."""
    fetch(run.folder("quantize"))
    fetch(run.folder("export"))
    models: dict[str, str | Path] = {"base": config.model.model}
    for name, stage in (("finetuned", "finetune"), ("merged", "merge"), ("gptq", "quantize")):
        folder = run.folder(stage)
        if (folder / MANIFEST).is_file():
            models[name] = folder / "adapter" if stage == "finetune" else folder
        else:
            print(f"{name} is left out: {folder} is not there; notebook {NOTEBOOKS[stage]} makes it")
    if (run.folder("export") / MANIFEST).is_file():
        kind_of = {file: file.stem.rpartition("-")[2].lower() for file in sorted(run.folder("export").glob("*.gguf"))}
        models |= {f"gguf_{kind}": file for file, kind in kind_of.items()}
    return models


@dataclass
class Building:
    """A stage under way: write into `folder`, put figures into `measurements`."""

    folder: Path
    config: RunConfig | None = None
    """What is written beside the result; a stage that settles a setting on its way puts the settled one here."""
    measurements: dict[str, Any] = field(default_factory=dict)


@contextmanager
def building(
    output: Path,
    stage: str,
    config: RunConfig | None = None,
    inputs: dict[str, Path] | None = None,
    keep: bool = False,
    held: bool = False,
) -> Iterator[Building]:
    """Yield a work folder beside output; on success write its manifest and rename it, on failure remove it.

    Inputs that another stage finished are checked first, every byte. keep: leave the work folder after a failure, for
    stages that continue where they stopped. The former output stays until the new one is whole. The work folder is
    locked meanwhile (held: the caller has locked it). Raises ValueError when another process makes the same output, or
    output holds something else; StorageError when the disk is full.
    """
    output, inputs = Path(output), inputs or {}
    refuse_output(output, list(inputs.values()), stage)
    partial = beside(output, "partial")
    with nullcontext() if held else exclusive(partial):
        recover(output)
        for path in inputs.values():
            check_input(Path(path), output, config)
        if not keep:
            empty_folder(partial)
        work = Building(partial, config)
        try:
            with files.room_on_disk(partial, "it goes on where it stopped" if keep else "nothing half-written is left"):
                yield work
                if work.config is not None:
                    save_yaml(work.config, partial / "config.yaml")
                write_manifest(partial, stage, work.config, inputs, work.measurements)
        except BaseException:
            if not keep:
                empty_folder(partial)
            raise
        if (output.parent / LASTING).is_file():
            unkept(output).touch()
        replace(partial, output)
        files.remove(output / SCRATCH)
        keep_copy(output)


def refuse_output(output: Path, inputs: list[Path], stage: str) -> None:
    """Raise ValueError, with nothing touched, for an output that would take something along that is not this stage's.

    That is the folder one works in and those above it, a folder that holds an input or lies in one, and whatever
    `refuse_foreign` finds.
    """
    here = output.resolve()
    if here == Path.cwd() or here in Path.cwd().parents:
        raise ValueError(f"output {output} holds the working folder: choose a folder of its own, nothing was changed")
    for source in (Path(path).resolve() for path in inputs if Path(path).exists()):
        if here == source or here in source.parents or (source.is_dir() and source in here.parents):
            raise ValueError(f"output {output} and input {source} lie in each other: choose another output folder")
    former = beside(here, "former")
    if is_folder(former) and any(former.iterdir()) and not (former / MANIFEST).is_file():
        raise ValueError(f"output {output} would be put aside as {former}, which no stage made: move that away")
    try:
        refuse_foreign(output, stage)
        check_writable(here)
    except OSError as error:
        raise ValueError(f"output {output} cannot be written ({error.strerror}): choose another folder") from None


def check_writable(folder: Path) -> None:
    """Raise PermissionError for a folder that is not there and cannot be made."""
    above = existing(folder)
    if not os.access(above, os.W_OK | os.X_OK) or above.is_relative_to("/proc"):
        raise PermissionError(errno.EACCES, "nothing can be made there", str(above))


def refuse_foreign(output: Path, stage: str) -> None:
    """Raise ValueError for an output folder that holds something else than this stage's former result."""
    if output.is_file():
        raise ValueError(f"output {output} is a file: choose a folder")
    if output.is_dir() and any(output.iterdir()):
        try:
            made_by = read_manifest(output)["stage"] if (output / MANIFEST).is_file() else None
        except DamagedArtifact:
            made_by = stage  # this is how it is mended
        if made_by != stage:
            raise ValueError(
                f"output {output} is in use by something else: choose an empty folder, nothing was changed"
            )


def beside(output: Path, what: str) -> Path:
    """The folder `<output>.<what>`."""
    return output.with_name(f"{output.name}.{what}")


def unkept(output: Path) -> Path:
    """The note that says: finished here, and not known to be whole in the lasting twin."""
    return beside(output, "unkept")


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


@contextmanager
def exclusive(folder: Path) -> Iterator[None]:
    """Hold a work folder for this process alone; the lock ends with the process, however that ends.

    Raises ValueError when another process holds it. Leaves no empty folder behind. It holds among the processes of one
    machine: two machines that share a Drive have work folders of their own, and checkpoints there say whose they are.
    """
    handle = locked(folder)
    try:
        yield
    finally:
        with suppress(OSError):  # not empty, or renamed to its finished place
            folder.rmdir()
        os.close(handle)


def locked(folder: Path) -> int:
    """The handle of a folder that is locked for this process. Raises ValueError when another process holds it."""
    while True:
        folder.mkdir(parents=True, exist_ok=True)
        try:
            handle = os.open(folder, os.O_RDONLY)
        except FileNotFoundError:  # another process is done with it at this moment
            continue
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            if error.errno in (errno.ENOTSUP, errno.ENOSYS, errno.EINVAL, errno.ENOLCK):
                return handle  # a file system without locks
            os.close(handle)
            if error.errno not in (errno.EWOULDBLOCK, errno.EACCES):
                raise
            raise ValueError(f"{folder} is in use by another process: wait for it, or choose another output") from None
        with suppress(FileNotFoundError):
            if os.path.samestat(os.fstat(handle), folder.stat()):
                return handle
        os.close(handle)  # what was locked has its finished name by now


def empty_folder(folder: Path) -> None:
    """Delete what lies in a folder that this process holds."""
    for name in files.names(folder):
        path = folder / name
        with suppress(OSError):
            if path.is_dir() and not path.is_symlink():
                files.erase(path)
            else:
                path.unlink(missing_ok=True)


# ---- manifests -------------------------------------------------------------------------------------------------------


def write_manifest(folder: Path, stage: str, config: RunConfig | None, inputs: dict, measurements: dict) -> Path:
    """Configuration, versions, inputs and outputs by checksum, measurements, and its own checksum; written last."""
    parts = [file for file in sorted(folder.rglob("*")) if file.is_file() and file.name != MANIFEST]
    parts = [file for file in parts if file.relative_to(folder).parts[0] != SCRATCH]
    manifest = {
        "stage": stage,
        "finished": True,
        "config": asdict(config) if config else None,
        "versions": versions(),
        "inputs": {name: {"path": str(path)} | identify(Path(path)) for name, path in inputs.items()},
        "outputs": {
            str(file.relative_to(folder)): {"size_bytes": file.stat().st_size, "sha256": sha256}
            for file, sha256 in zip(parts, checksums(parts), strict=True)
        },
        "measurements": measurements,
    }
    manifest = json.loads(json.dumps(manifest, default=str))
    return write_text(folder / MANIFEST, json.dumps(manifest | {"sha256": text_checksum(manifest)}, indent=1))


def read_manifest(folder: Path) -> dict:
    """A finished stage's manifest. Raises DamagedArtifact when it is not what was written."""
    path = folder / MANIFEST
    try:
        manifest = json.loads(files.read_text(path))
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
    parts = [confined(folder, name) for name in known]
    total_gib = sum(entry["size_bytes"] for entry in known.values()) / GIB
    if total_gib > 1:
        print(f"checking {total_gib:.1f} GiB in {folder} against its checksums …")
    remedy = f"run notebook {NOTEBOOKS.get(manifest['stage'], 'that made it')} again"
    for file, entry in zip(parts, known.values(), strict=True):
        if not file.is_file():
            raise DamagedArtifact(f"{file} is missing: {remedy}")
        if file.stat().st_size != entry["size_bytes"]:
            sizes = f"{file.stat().st_size} bytes and was written with {entry['size_bytes']}"
            raise DamagedArtifact(f"{file} has {sizes}: {remedy}")
    for file, entry, sha256 in zip(parts, known.values(), checksums(parts), strict=True):
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
        counted = manifest["measurements"]
        cut = counted.get("cut_share", 0) or counted.get("dropped", {}).get("over-context", 0)
        if cut and had["seq_len"] < wanted["seq_len"]:
            raise StaleArtifact(
                f"{folder} was cut to {had['seq_len']} tokens and training asks {wanted['seq_len']}: prepare again "
                f"(python -m helpers prepare --workspace {folder.parent} --seq-len {wanted['seq_len']}, or notebook "
                f"{NOTEBOOKS['prepare']}), or set seq_len={had['seq_len']}"
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


def confined(folder: Path, name: str) -> Path:
    """A file inside a folder by its listed name. Raises DamagedArtifact for a name that leads out of it."""
    path = folder / name
    if Path(name).is_absolute() or not path.resolve().is_relative_to(folder.resolve()):
        raise DamagedArtifact(f"{folder / MANIFEST} lists {name}, which is outside of {folder}: do not use this folder")
    return path


# ---- the lasting twin ------------------------------------------------------------------------------------------------


def keep_copy(folder: Path) -> bool:
    """Copy a finished stage to its lasting twin; returns whether it is whole there.

    Says so when it is not, and leaves a note for the next `open_run`: a copy that fails ends nothing. When an adapter
    is whole there, its run's checkpoints there go.
    """
    twin = None
    try:
        twin = lasting_twin(folder)
        if twin is None:
            unkept(folder).unlink(missing_ok=True)
            return False
        manifest = read_manifest(folder)
        if manifest["stage"] == "merge":
            print(f"{folder} stays here: {size_bytes(folder) / GIB:.1f} GiB that the adapter and its base make again")
            unkept(folder).unlink(missing_ok=True)
            return False
        copy_stage(folder, twin)
        unkept(folder).unlink(missing_ok=True)
    except (OSError, StorageError, files.Torn) as error:
        print(
            f"NOT KEPT: {folder} is finished, but only on this machine. It could not be copied to "
            f"{twin or 'the lasting folder'} ({files.reason(error)}): mount Drive again, or make room there (empty its "
            "bin too, deleted files go on using the quota), and run the cell with open_run again, which copies it"
        )
        return False
    if manifest["stage"] == "finetune":
        from helpers.workspace import checkpoints  # it is built on this file

        with suppress(OSError):  # they are in nobody's way
            checkpoints.clear(beside(twin, "partial") / SCRATCH, manifest["measurements"].get("run"))
    return True


def fetch(folder: Path) -> None:
    """Copy a finished stage from its lasting twin when it is not here.

    Raises DamagedArtifact when it is not whole there, StorageError when it cannot be read, or does not fit here.
    """
    if is_file(folder / MANIFEST):
        return
    twin = lasting_twin(folder)
    if twin is None:
        return
    with reached(twin, "nothing there or here was changed"):
        files.recover(twin)
        if not is_file(twin / MANIFEST):
            return
        print(f"fetching {folder.name}, {size_bytes(twin) / GIB:.2f} GiB, from {twin}")
        try:
            with files.room_on_disk(folder, f"{twin} stays as it is"):
                copy_stage(twin, folder)
        except files.Torn as error:
            again = NOTEBOOKS.get(folder.name, "that makes it")
            raise DamagedArtifact(f"{error}: run notebook {again} again") from None


def copy_stage(source: Path, target: Path) -> Path:
    """Copy a finished stage beside target, its manifest last, then give it that name. Raises OSError or files.Torn.

    What had the name stays until the copy is whole there. Goes on where an earlier copy broke off.
    """
    files.recover(target)
    known = read_manifest(source)["outputs"]
    mark = checksum(source / MANIFEST)
    wanted = known | {MANIFEST: {"size_bytes": files.patiently((source / MANIFEST).stat).st_size, "sha256": mark}}
    if all(same(confined(target, name), entry) for name, entry in reversed(wanted.items())):
        return target
    sending = beside(target, "sending")
    lacking = [name for name, entry in wanted.items() if not same(confined(sending, name), entry)]
    needed, free = sum(wanted[name]["size_bytes"] for name in lacking), files.free_bytes(target)
    if needed > free:
        raise OSError(errno.ENOSPC, f"it needs {needed / GIB:.2f} GiB and {free / GIB:.2f} GiB is free")
    for file in files.files_under(sending):
        if str(file.relative_to(sending)) not in wanted:  # of another copy that broke off
            files.empty(file)
            files.patiently(lambda file=file: file.unlink(missing_ok=True))
    for name in lacking:
        files.copy_verified(confined(source, name), sending / name, wanted[name]["sha256"])
    replace(sending, target)
    return target


def same(file: Path, entry: dict) -> bool:
    """Whether a file has the size and the checksum of a manifest's entry."""
    return (
        is_file(file)
        and files.patiently(file.stat).st_size == entry["size_bytes"]
        and checksum(file) == entry["sha256"]
    )
