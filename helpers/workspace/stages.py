"""A stage under way: it writes beside its place, and gets its name when it is whole; the next one checks every byte.

A kill at any moment leaves the former result or the new one under the name, and beside it a work folder that the next
run of the stage goes on from, or empties.
"""

import errno
import os
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

try:
    import fcntl
except ImportError:
    raise ImportError("the recipes need Linux or macOS: in Windows, run them in WSL 2") from None

from helpers.config import RunConfig, save_yaml
from helpers.workspace import files
from helpers.workspace.files import existing, is_file, is_folder
from helpers.workspace.lasting import LASTING, fetch, keep_copy, unkept
from helpers.workspace.whole import (
    MANIFEST,
    SCRATCH,
    DamagedArtifact,
    MissingArtifact,
    StaleArtifact,
    beside,
    check_outputs,
    identify,
    maker,
    read_manifest,
    recover,
    replace,
    write_manifest,
)

MARK = Path(SCRATCH) / ".work"
"""In a work folder: says that a stage made it."""


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


@contextmanager
def exclusive(folder: Path) -> Iterator[None]:
    """Hold a work folder for this process alone; the lock ends with the process, however that ends.

    Raises ValueError when another process holds it, or something lies in it that no stage put there. Leaves no empty
    folder behind. It holds among the processes of one machine: two machines that share a Drive have work folders of
    their own, and checkpoints there say whose they are.
    """
    handle = locked(folder)
    try:
        claim(folder)
        yield
    finally:
        with suppress(OSError):  # renamed to its finished place, or not empty
            if os.path.samestat(os.fstat(handle), folder.stat()):
                if files.files_under(folder) == [folder / MARK]:
                    files.erase(folder / SCRATCH)
                folder.rmdir()
        os.close(handle)


def claim(folder: Path) -> None:
    """Mark a folder as one that stages work in and may empty. Raises ValueError when it holds what is not theirs.

    The mark survives a kill; checkpoints without one are an earlier version's, or were fetched.
    """
    if not is_file(folder / MARK):
        inside = (file.relative_to(folder) for file in files.files_under(folder))
        foreign = next((file for file in inside if not str(file).startswith(f"{SCRATCH}/checkpoint-")), None)
        if foreign is not None:
            raise ValueError(
                f"{folder} is where the result would be made, and holds {foreign}, which no stage put there: move that "
                "folder away, or choose another output; nothing was changed"
            )
        files.make_folder(folder / SCRATCH)
        files.patiently((folder / MARK).touch)


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


def empty_folder(folder: Path, scratch_too: bool = True) -> None:
    """Delete what lies in a folder that this process holds, but for the mark that it is a stage's."""
    scratch = folder / SCRATCH
    inside = [scratch / name for name in files.names(scratch)] if scratch_too else []
    for path in (*(folder / name for name in files.names(folder) if name != SCRATCH), *inside):
        with suppress(OSError):
            if path == folder / MARK:
                continue
            if path.is_dir() and not path.is_symlink():
                files.erase(path)
            else:
                path.unlink(missing_ok=True)


def require(folder: Path, stage: str) -> dict:
    """The manifest of a finished stage, every file checked; one that is only in the lasting twin is fetched first.

    Raises MissingArtifact that names the folder and what makes it.
    """
    folder = Path(folder)
    recover(folder)
    fetch(folder)
    if not (folder / MANIFEST).is_file():
        raise MissingArtifact(f"{folder} has no finished {stage} stage: run {maker(stage)} first")
    return check_outputs(folder)


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
                f"{folder} was made from another {source.name} than the one that lies there now: run "
                f"{maker(manifest['stage'])} again, or use another workspace for the new one"
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
                f"{maker('prepare')} again with the new value, or set {changed} back"
            )
        counted = manifest["measurements"]
        cut = counted.get("cut_share", 0) or counted.get("dropped", {}).get("over-context", 0)
        if cut and had["seq_len"] < wanted["seq_len"]:
            raise StaleArtifact(
                f"{folder} was cut to {had['seq_len']} tokens and training asks {wanted['seq_len']}: run "
                f"{maker('prepare', seq_len=wanted['seq_len'])} again, or set seq_len={had['seq_len']}"
            )
