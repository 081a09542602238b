"""Checkpoints that can be trusted: written beside their place, verified, marked last, then renamed.

transformers' Trainer writes straight into `checkpoint-N` and resumes from the highest N, whole or not
(transformers#35782, #35525). Here a folder counts only with its marker, `whole.json`: every file's size and SHA-256,
and what the run was made of. A trainer writes through it by saving into another folder for a moment:

    def _save_checkpoint(self, model, trial):
        with checkpoints.writing(Path(self.args.output_dir), self.state.global_step, identity, keep=2) as beside:
            self._beside = beside.parent          # what its _get_output_dir returns while this is set
            try:
                super()._save_checkpoint(model, trial)
            finally:
                self._beside = None

and resumes with `trainer.train(resume_from_checkpoint=checkpoints.newest(folder, identity))`; helpers/finetune.py does.

>>> import tempfile
>>> folder = Path(tempfile.mkdtemp())
>>> for step in (5, 10):
...     with writing(folder, step) as beside:
...         _ = (beside / "adapter.txt").write_text(f"weights of step {step}")
>>> _ = (folder / "checkpoint-10" / "adapter.txt").write_text("torn")
>>> problem(folder / "checkpoint-10")
'adapter.txt has 4 bytes and not 18'
>>> newest(folder, say=lambda text: None).name
'checkpoint-5'
"""

import errno
import json
import os
import re
import shutil
import time
import zipfile
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any

from helpers.config import RunConfig
from helpers.workspace import (
    checksum,
    confined,
    copy_verified,
    existing,
    lasting_twin,
    remove,
    text_checksum,
    write_text,
)

MARKER = "whole.json"
BESIDE = "writing"
GIB = 2**30
ANY_TIME = ("save_steps", "keep_checkpoints", "eval_steps", "patience", "checkpointing", "offload_activations")
ANY_TIME += ("offload_gib",)
"""Settings that may change between a run and its continuation: they do not decide what is learned."""


class ChangedRun(ValueError):
    """The checkpoints were made with another configuration or other data; the message says which."""


def identity(config: RunConfig, data: str | None = None) -> dict[str, Any]:
    """What a checkpoint must share with the run that continues it: flat names and values.

    data: what identifies the prepared data, `workspace.identify(prepared)["sha256"]`.

    >>> from helpers.models import profile
    >>> identity(profile("tiny"))["rank"]
    16
    """
    parts = asdict(config)
    flat = {"seed": config.seed} | parts["model"] | parts["adapter"] | parts["train"] | {"seq_len": config.data.seq_len}
    flat = {name: value for name, value in flat.items() if name not in ANY_TIME}
    return flat | ({"prepared data": data} if data else {})


@contextmanager
def writing(
    folder: Path,
    step: int,
    identity: dict[str, Any] | None = None,
    keep: int | None = None,
    spared: Iterable[int] = (),
    send: Callable[[Path], None] = lambda checkpoint: None,
    say: Callable[[str], None] = print,
) -> Iterator[Path]:
    """Yield an empty folder to fill; afterwards it is `folder/checkpoint-<step>`, whole, or it is not there.

    keep: afterwards delete all but the newest so many, and the steps spared. send: called with what was written.
    A write that fails (disk full, Drive gone) is said and does not end the training: hours of work matter more than one
    checkpoint, and older ones stay.
    """
    beside = folder / BESIDE / f"checkpoint-{step}"
    final = folder / beside.name
    began = time.perf_counter()
    try:
        remove(beside.parent, MARKER)
        beside.mkdir(parents=True)
        yield beside
        seal(beside, {"step": step, "identity": identity or {}}, began)
        remove(final, MARKER)
        beside.rename(final)
        sync(folder)
        send(final)
    except Exception as error:
        if not is_write_error(error):
            raise
        kept, free_gib = newest(folder, say=lambda text: None), shutil.disk_usage(existing(folder)).free / GIB
        say(
            f"{final.name} could not be written ({error}; {free_gib:.2f} GiB free): training goes on, and the newest "
            f"whole checkpoint stays {kept.name if kept else 'none so far'}"
        )
    finally:
        remove(beside.parent, MARKER)
    if keep is not None:
        forget(folder, keep, spared)


def seal(folder: Path, about: dict[str, Any], began: float) -> None:
    """Flush every file to the disk, read it back, and write the marker last. Raises OSError for a file that is torn."""
    files = {}
    for file in sorted(path for path in folder.rglob("*") if path.is_file()):
        sync(file)
        torn = unreadable(file)
        if torn:
            raise OSError(f"{file.name} cannot be read back: {torn}")
        files[str(file.relative_to(folder))] = {"size_bytes": file.stat().st_size, "sha256": checksum(file)}
    size_bytes = sum(entry["size_bytes"] for entry in files.values())
    marker = about | {"size_bytes": size_bytes, "write_s": round(time.perf_counter() - began, 3), "files": files}
    marker = plain(marker)
    sync(write_text(folder / MARKER, json.dumps(marker | {"sha256": text_checksum(marker)}, indent=1)))
    sync(folder)


def unreadable(file: Path) -> str | None:
    """Why a file that was just written is no whole safetensors or PyTorch file; None when it is one, or neither."""
    if file.suffix == ".safetensors":
        from safetensors import SafetensorError, safe_open

        try:
            with safe_open(str(file), framework="numpy") as tensors:
                tensors.keys()
        except SafetensorError as error:
            return str(error)
    if file.suffix in (".pt", ".pth", ".bin"):
        try:
            with zipfile.ZipFile(file) as archive:
                bad = archive.testzip()
        except zipfile.BadZipFile as error:
            return str(error)
        return f"{bad} inside it has another checksum" if bad else None
    return None


def problem(folder: Path) -> str | None:
    """Why a checkpoint is not whole; None when every file has the size and the SHA-256 of the marker."""
    try:
        known = about(folder)["files"]
        for name, entry in known.items():
            file = confined(folder, name)
            if file.stat().st_size != entry["size_bytes"]:
                return f"{name} has {file.stat().st_size} bytes and not {entry['size_bytes']}"
            if checksum(file) != entry["sha256"]:
                return f"{name} has another checksum than when it was written"
    except FileNotFoundError as error:
        return f"{Path(error.filename).name} is missing"
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        return f"{MARKER} cannot be read ({type(error).__name__})"
    return None if known else f"{MARKER} lists no files"


def newest(folder: Path, identity: dict[str, Any] | None = None, say: Callable[[str], None] = print) -> Path | None:
    """The newest whole checkpoint of a folder, or None; broken ones are skipped with a word.

    Raises ChangedRun when it was made with other settings than `identity` says, naming them.
    """
    for checkpoint in reversed(all_of(folder)):
        reason = problem(checkpoint)
        if reason:
            say(f"{checkpoint.name} is skipped: {reason}")
            continue
        changes = differences(about(checkpoint).get("identity") or {}, identity) if identity else []
        if changes:
            raise ChangedRun(
                f"{checkpoint} was made with other settings ({'; '.join(changes)}): set them back to continue it, "
                "or start anew with --resume never (resume='never' in the notebook)"
            )
        return checkpoint
    return None


def differences(before: dict[str, Any], now: dict[str, Any]) -> list[str]:
    """What changed, a phrase a setting.

    >>> differences({"rank": 16, "alpha": 32}, {"rank": 8, "alpha": 32.0})
    ['rank was 16 and is now 8']
    """
    return [
        f"{name} was {before[name]} and is now {now[name]}"
        for name in before
        if name in now and plain(before[name]) != plain(now[name])
    ]


def plain(value: Any) -> Any:
    """A value as JSON gives it back, so that tuples and lists compare equal."""
    return json.loads(json.dumps(value, default=str))


def all_of(folder: Path) -> list[Path]:
    """Every checkpoint-N folder, whole or not, by rising N."""
    found = [path for path in folder.glob("checkpoint-*") if path.is_dir() and path.name.split("-")[1].isdecimal()]
    return sorted(found, key=step_of)


def step_of(checkpoint: Path) -> int:
    """N of checkpoint-N."""
    return int(checkpoint.name.split("-")[1])


def about(checkpoint: Path) -> dict[str, Any]:
    """The marker of a checkpoint. Raises ValueError when it is not what was written."""
    marker = json.loads((checkpoint / MARKER).read_text(encoding="utf-8"))
    if marker.pop("sha256") != text_checksum(marker):
        raise ValueError(f"{checkpoint / MARKER} is not what was written")
    return marker


def summary(folder: Path) -> dict[str, Any]:
    """Of the newest checkpoint: its size in bytes, and the seconds that writing and checking it took."""
    marked = [checkpoint for checkpoint in all_of(folder) if (checkpoint / MARKER).is_file()]
    return {f"checkpoint_{name}": about(marked[-1])[name] for name in ("size_bytes", "write_s")} if marked else {}


def forget(folder: Path, keep: int, spared: Iterable[int] = ()) -> None:
    """Delete all but the newest `keep` whole checkpoints, the steps spared, and whatever is newer than those.

    Only whole ones count, so that broken ones never push the last good one out.
    """
    whole = [checkpoint for checkpoint in all_of(folder) if (checkpoint / MARKER).is_file()]
    oldest_kept = step_of(whole[-keep:][0]) if whole else 0
    for checkpoint in all_of(folder):
        if step_of(checkpoint) < oldest_kept and step_of(checkpoint) not in spared:
            remove(checkpoint, MARKER)


def sync(path: Path) -> None:
    """Ask the operating system to put a file or a folder's entries on the disk; Drive's mount may not know how."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    except OSError as error:
        if error.errno not in (errno.EINVAL, errno.ENOTSUP):
            raise
    finally:
        os.close(handle)


def is_write_error(error: Exception) -> bool:
    """Whether an error says that a file could not be written; PyTorch, safetensors and tokenizers have their own kinds.

    >>> is_write_error(Exception("No space left on device (os error 28)")), is_write_error(ValueError("rank"))
    (True, False)
    """
    said = str(error)
    torch_writer = isinstance(error, RuntimeError) and ("Writer" in said or "inline_container" in said)
    return isinstance(error, OSError) or torch_writer or re.search(r"\(os error \d+\)|I/O error", said) is not None


@contextmanager
def sending(to: Path | None, keep: int, say: Callable[[str], None] = print) -> Iterator[Callable[[Path], None]]:
    """While it trains, copy checkpoints to a lasting folder (Drive) in the background, one at a time.

    Yields what is called after each checkpoint was written; of several that wait, only the newest is copied. The end
    waits for the last copy. A copy that fails is said and does not end the training. to=None: does nothing.
    """
    if to is None:
        yield lambda checkpoint: None
        return
    waiting: list[Future] = []
    with ThreadPoolExecutor(max_workers=1, thread_name_prefix="checkpoints") as thread:

        def enqueue(checkpoint: Path) -> None:
            for earlier in waiting:
                earlier.cancel()
            waiting.append(thread.submit(send, checkpoint, to, keep, say))

        yield enqueue


def send(checkpoint: Path, to: Path, keep: int, say: Callable[[str], None] = print) -> Path | None:
    """Copy a whole checkpoint, its marker last; says why and returns None when it cannot be."""
    try:
        marker = about(checkpoint)
        free = shutil.disk_usage(existing(to)).free
        if free < marker["size_bytes"]:
            raise OSError(f"it has {marker['size_bytes'] / GIB:.2f} GiB, and {to} has {free / GIB:.2f} GiB free")
        target = to / checkpoint.name
        (target / MARKER).unlink(missing_ok=True)
        for name, entry in (marker["files"] | {MARKER: {"sha256": checksum(checkpoint / MARKER)}}).items():
            copy_verified(checkpoint / name, target / name, entry["sha256"])
        forget(to, keep)
        return target
    except OSError as error:
        say(
            f"{checkpoint.name} was not copied to {to} ({error}): training goes on; the next one is tried again. "
            "If Drive is full, empty its bin too: deleted files go on using the quota there"
        )
        return None


def lasting(folder: Path) -> Path | None:
    """Where the checkpoints in `<run>/finetune.partial/checkpoints` are kept for good, if the run has such a place."""
    twin = lasting_twin(folder.parent)
    return twin / folder.name if twin else None


def fetch(
    source: Path | None,
    folder: Path,
    identity: dict[str, Any] | None = None,
    say: Callable[[str], None] = print,
) -> Path | None:
    """The newest whole checkpoint of a folder, after fetching it from its lasting place when that has a newer one.

    Raises ChangedRun as `newest` does.
    """
    here = newest(folder, identity, say)
    there = newest(source, identity, say) if source and source.is_dir() else None
    if there is None or (here is not None and step_of(here) >= step_of(there)):
        return here
    say(f"fetching {there.name} from {source}")
    return send(there, folder, keep=len(all_of(folder)) + 1, say=say) or here


def clear(folder: Path | None) -> None:
    """Delete all checkpoints of a folder; nothing for None."""
    for checkpoint in all_of(folder) if folder else ():
        remove(checkpoint, MARKER)
