"""The lasting twin: a rented machine's disk vanishes with it, so a run there has a second folder that stays (Drive).

Finished stages are copied to it, and a new machine fetches from it what it lacks. A twin that cannot be read is not an
empty one: that is said, and nothing is changed.
"""

import errno
import os
from contextlib import suppress
from pathlib import Path

from helpers.workspace import files
from helpers.workspace.files import GIB, StorageError, is_file, is_folder, reached, size_bytes
from helpers.workspace.whole import (
    MANIFEST,
    SCRATCH,
    DamagedArtifact,
    beside,
    confined,
    copy_files,
    entry_of,
    maker,
    read_manifest,
    replace,
    same,
)

LASTING = "lasting.txt"
"""In a run's folder: the path of its lasting twin, when there is one."""


def place() -> str:
    """colab, kaggle or own: whose machine this is."""
    if "COLAB_RELEASE_TAG" in os.environ:
        return "colab"
    return "kaggle" if "KAGGLE_KERNEL_RUN_TYPE" in os.environ else "own"


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


def mount_drive() -> None:
    """Mount Google Drive in Colab, which asks the reader for leave; says so when there was none, and goes on."""
    if lasting_store() is not None:
        return
    try:
        from google.colab import drive

        drive.mount("/content/drive")
    except Exception as error:  # Colab's own kinds, and none of them is a reason not to train
        print(f"Drive was not mounted ({files.reason(error)})")


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


def unkept(output: Path) -> Path:
    """The note that says: finished here, and not known to be whole in the lasting twin."""
    return beside(output, "unkept")


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
            raise DamagedArtifact(f"{error}: run {maker(folder.name)} again") from None


def copy_stage(source: Path, target: Path) -> Path:
    """Copy a finished stage beside target, its manifest last, then give it that name. Raises OSError or files.Torn.

    What had the name stays until the copy is whole there. Goes on where an earlier copy broke off.
    """
    files.recover(target)
    wanted = read_manifest(source)["outputs"] | {MANIFEST: entry_of(source / MANIFEST)}
    # The manifest is looked at first: where it differs, nothing else needs to be read
    if all(same(confined(target, name), entry) for name, entry in reversed(wanted.items())):
        return target
    sending = beside(target, "sending")
    for file in files.files_under(sending):
        if str(file.relative_to(sending)) not in wanted:  # of another copy that broke off
            files.empty(file)
            files.patiently(lambda file=file: file.unlink(missing_ok=True))
    copy_files(source, sending, wanted)
    replace(sending, target)
    return target
