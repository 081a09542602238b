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

and resumes with `trainer.train(resume_from_checkpoint=checkpoints.newest(folder, identity))`; helpers/finetune does.

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
import time
import uuid
import zipfile
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

from helpers.config import RunConfig
from helpers.workspace import files, whole
from helpers.workspace.files import GIB, StorageError, is_write_error, sync
from helpers.workspace.lasting import lasting_twin
from helpers.workspace.whole import text_checksum

MARKER = "whole.json"
BESIDE = "writing"
ANY_TIME = (
    *("save_steps", "keep_checkpoints", "eval_steps", "patience", "report_to"),
    *("checkpointing", "keep_attention", "offload_activations", "offload_gib", "gpus", "sharding"),
)
"""Settings that may change between a run and its continuation: they do not decide what is learned."""
SPLIT = ("batch_size", "accumulation")
"""Their product decides what a step is; how it is split may differ, and the run goes on in the checkpoint's split."""
Origin = dict[str, Any]
"""Whose a checkpoint is: `run`, an identifier made when its run began, and `supersedes`, the markers' checksums of what
lay there then and was not continued."""


class ChangedRun(ValueError):
    """The checkpoints were made with another configuration or other data; the message says which."""


@dataclass(frozen=True)
class Found:
    """What a look for a checkpoint to continue from gave; "there is none" is only one of the four answers."""

    answer: Literal["whole", "none", "unreadable", "not fetched"]
    checkpoint: Path | None = None
    """A whole one on this machine."""
    reason: str = ""

    def to_continue(self) -> Path | None:
        """The checkpoint, or None where there certainly is none. Raises StorageError for the other two answers."""
        if self.answer in ("unreadable", "not fetched"):
            raise StorageError(self.reason)
        return self.checkpoint


def identity(config: RunConfig, data: str | None = None) -> dict[str, Any]:
    """What a checkpoint must share with the run that continues it: flat names and values.

    data: what identifies the prepared data, `workspace.identify(prepared)["sha256"]`.

    >>> from helpers.profiles import profile
    >>> identity(profile("tiny"))["rank"]
    16
    """
    parts = asdict(config)
    flat = {"seed": config.seed} | parts["model"] | parts["adapter"] | parts["train"] | {"seq_len": config.data.seq_len}
    flat = {name: value for name, value in flat.items() if name not in ANY_TIME}
    return flat | ({"prepared data": data} if data else {})


def origin(continued: Path | None, *places: Path | None) -> Origin:
    """Whose the next checkpoints are: the continued one's run, or a new run that supersedes what lies in the places."""
    if continued is not None:
        return origin_of(about(continued))
    lying = [about(checkpoint) for place in places if place for checkpoint in readable(place)]
    return {"run": uuid.uuid4().hex[:12], "supersedes": sorted({text_checksum(marker) for marker in lying})}


def origin_of(marker: dict[str, Any]) -> Origin:
    """Whose a checkpoint is, by its marker; those of earlier versions of this file belong to the run ""."""
    return {"run": marker.get("run", ""), "supersedes": marker.get("supersedes", [])}


@contextmanager
def writing(
    folder: Path,
    step: int,
    identity: dict[str, Any] | None = None,
    keep: int | None = None,
    spared: Iterable[int] = (),
    send: Callable[[Path], None] = lambda checkpoint: None,
    say: Callable[[str], None] = print,
    origin: Origin | None = None,
) -> Iterator[Path]:
    """Yield an empty folder to fill; afterwards it is `folder/checkpoint-<step>`, whole, or it is not there.

    keep: afterwards delete all of its run but the newest so many, and the steps spared, and what its run supersedes.
    send: called with what was written. A write that fails (disk full, Drive gone) is said and does not end the
    training: hours of work matter more than one checkpoint, and older ones stay.
    """
    beside, final = folder / BESIDE / f"checkpoint-{step}", folder / f"checkpoint-{step}"
    began = time.perf_counter()
    try:
        files.remove(beside.parent)
        files.make_folder(beside)
        yield beside
        marker = {"step": step, "identity": identity or {}, "spared": list(spared)} | (origin or origin_of({}))
        seal(beside, marker, began)
        files.publish(beside, final)
        send(final)
    except Exception as error:
        if not is_write_error(error):
            raise
        kept = [checkpoint.name for checkpoint in readable(folder, say=lambda text: None)]
        say(
            f"{final.name} could not be written ({error}; {files.free_bytes(folder) / GIB:.2f} GiB free): training "
            f"goes on, and the newest whole checkpoint stays {kept[-1] if kept else 'none so far'}"
        )
    else:
        if keep is not None:
            forget(final, keep)
    finally:
        files.remove(beside.parent)


def seal(folder: Path, about: dict[str, Any], began: float) -> None:
    """Flush every file to the disk, read it back, and write the marker last. Raises OSError for a file that is torn."""
    for file in files.files_under(folder):
        sync(file)
        if torn := unreadable(file):
            raise OSError(f"{file.name} cannot be read back: {torn}")
    known = whole.entries(folder)
    size_bytes = sum(entry["size_bytes"] for entry in known.values())
    marker = about | {"size_bytes": size_bytes, "write_s": round(time.perf_counter() - began, 3), "files": known}
    sync(whole.seal(folder / MARKER, marker))
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
    """Why a checkpoint is not whole; None when every file has the size and the SHA-256 of the marker.

    Raises OSError when that cannot be known: a file that cannot be read may be whole.
    """
    try:
        known = about(folder)["files"]
        found = whole.harm(folder, known)
    except FileNotFoundError as error:
        return f"{Path(error.filename).name} is missing"
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        return f"{MARKER} cannot be read ({type(error).__name__})"
    if found:
        return " ".join(found)
    return None if known else f"{MARKER} lists no files"


def newest(folder: Path, identity: dict[str, Any] | None = None, say: Callable[[str], None] = print) -> Path | None:
    """The newest whole checkpoint of a folder, or None where there certainly is none; broken ones are said.

    Raises ChangedRun when those there were made with other settings than `identity` says, naming them, and OSError for
    one that cannot be read.
    """
    for checkpoint in reversed(fitting(readable(folder, say), identity)):
        harm = problem(checkpoint)
        if harm is None:
            return checkpoint
        say(f"{checkpoint.name} is skipped: {harm}")
    return None


def readable(folder: Path, say: Callable[[str], None] = print, aside: bool = False) -> list[Path]:
    """Checkpoints with a sound marker, by rising step; others are said, and with `aside` renamed: nothing of them goes.

    Also finishes what a kill left of a replacement or a deletion.
    """
    for name in files.names(folder):
        if name.endswith((files.FORMER, files.DELETED)):
            files.recover(folder / name.removesuffix(files.DELETED).removesuffix(files.FORMER))
    sound = []
    for checkpoint in all_of(folder):
        try:
            about(checkpoint)
            sound.append(checkpoint)
        except FileNotFoundError:
            harm = f"{MARKER} is missing"
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            harm = f"{MARKER} cannot be read ({type(error).__name__})"
        if checkpoint in sound:
            continue
        if aside:
            files.set_aside(checkpoint, harm, say)
        else:
            say(f"{checkpoint.name} is skipped: {harm}")
    return sound


def fitting(lying: list[Path], identity: dict[str, Any] | None) -> list[Path]:
    """Those that a run with this identity continues, by rising step. Raises ChangedRun when there are only others.

    What a later run superseded is none of them.
    """
    markers = standing(lying)
    changes = {path: differences(marker["identity"], identity) if identity else [] for path, marker in markers.items()}
    same = [path for path in markers if not changes[path]]
    if markers and not same:
        latest = max(markers, key=step_of)
        raise ChangedRun(
            f"{latest} was made with other settings ({'; '.join(changes[latest])}): set them back to continue it, "
            "or start anew with --resume never (resume='never' in the notebook)"
        )
    return sorted(same, key=step_of)


def standing(lying: list[Path]) -> dict[Path, dict[str, Any]]:
    """Checkpoints and their markers, without those that a later run superseded."""
    markers = {checkpoint: about(checkpoint) for checkpoint in lying}
    superseded = {mark for marker in markers.values() for mark in origin_of(marker)["supersedes"]}
    return {path: marker for path, marker in markers.items() if text_checksum(marker) not in superseded}


def split_of(checkpoint: Path) -> dict[str, int]:
    """The micro-batches of a checkpoint's run: batch_size and accumulation; {} when it does not say."""
    made = about(checkpoint)["identity"]
    return {name: made[name] for name in SPLIT if name in made}


def to_be_continued(folder: Path, config: RunConfig) -> Path | None:
    """The checkpoint that training into a work folder's checkpoints would go on from, by the markers alone; or None.

    For planning: whether its bytes are whole is seen when it is fetched.
    """
    lying: list[Path] = []
    for place in filter(None, (folder, lasting(folder))):
        with files.reached(place, "nothing was changed"):
            lying += readable(place, say=lambda text: None)
    same = [path for path, made in standing(lying).items() if not differences(made["identity"], identity(config))]
    return max(same, key=step_of, default=None)


def differences(before: dict[str, Any], now: dict[str, Any]) -> list[str]:
    """What changed, a phrase a setting.

    >>> differences({"rank": 16, "alpha": 32}, {"rank": 8, "alpha": 32.0})
    ['rank was 16 and is now 8']
    >>> differences({"batch_size": 2, "accumulation": 4}, {"batch_size": 4, "accumulation": 2})
    []
    """
    before, now = a_step(before), a_step(now)
    return [
        f"{name} was {before[name]} and is now {now[name]}"
        for name in before
        if name in now and plain(before[name]) != plain(now[name])
    ]


def a_step(identity: dict[str, Any]) -> dict[str, Any]:
    """The identity with the sequences of a step instead of their split."""
    if not all(name in identity for name in SPLIT):
        return identity
    rest = {name: value for name, value in identity.items() if name not in SPLIT}
    return rest | {" × ".join(SPLIT): identity["batch_size"] * identity["accumulation"]}


def plain(value: Any) -> Any:
    """A value as JSON gives it back, so that tuples and lists compare equal."""
    return json.loads(json.dumps(value, default=str))


def all_of(folder: Path) -> list[Path]:
    """Every checkpoint-N folder, whole or not, by rising N. Raises OSError when that cannot be known."""
    named = [name for name in files.names(folder) if name.startswith("checkpoint-") and name[11:].isdecimal()]
    return sorted((folder / name for name in named if files.is_folder(folder / name)), key=step_of)


def step_of(checkpoint: Path) -> int:
    """N of checkpoint-N."""
    return int(checkpoint.name.split("-")[1])


def about(checkpoint: Path) -> dict[str, Any]:
    """The marker of a checkpoint. Raises ValueError when it is not what was written, OSError when it cannot be read."""
    return whole.unseal(checkpoint / MARKER)


def summary(folder: Path) -> dict[str, Any]:
    """Of the newest checkpoint: its size in bytes, and the seconds that writing and checking it took."""
    marked = readable(folder, say=lambda text: None)
    return {f"checkpoint_{name}": about(marked[-1])[name] for name in ("size_bytes", "write_s")} if marked else {}


def forget(latest: Path, keep: int) -> None:
    """Delete what a checkpoint that is whole makes superfluous in its folder, and nothing else.

    That is: of its own run all but the newest `keep`, the steps that it spares, and what its run supersedes. Other
    runs' checkpoints stay (another machine may write them), and so does what is not understood: only whole ones count.
    """
    marker = about(latest)
    lying = {checkpoint: about(checkpoint) for checkpoint in readable(latest.parent, say=lambda text: None)}
    own = [checkpoint for checkpoint, other in lying.items() if other.get("run", "") == origin_of(marker)["run"]]
    for checkpoint in own[:-keep]:
        if step_of(checkpoint) not in marker.get("spared", ()):
            files.remove(checkpoint)
    for checkpoint, other in lying.items():
        if text_checksum(other) in origin_of(marker)["supersedes"]:
            files.remove(checkpoint)


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
    """Copy a whole checkpoint beside its place and give it its name there; only then older ones go.

    Says why and returns None when it cannot be, with everything there as it was.
    """
    try:
        target = copied(checkpoint, to, say)
        if target is not None:
            forget(target, keep)
        return target
    except (OSError, files.Torn) as error:
        if not checkpoint.is_dir():
            return None  # training has gone on, and a newer one waits
        say(
            f"{checkpoint.name} was not copied to {to} ({files.reason(error)}): training goes on; the next one is "
            "tried again. If Drive is full, empty its bin too: deleted files go on using the quota there"
        )
        return None


def copied(checkpoint: Path, to: Path, say: Callable[[str], None]) -> Path | None:
    """Copy a whole checkpoint into a folder, byte for byte; one that lies there already is the answer.

    Returns None, and says why, where another run's checkpoint has the name. Raises OSError, or files.Torn when the
    checkpoint itself is not whole.
    """
    marker, target = about(checkpoint), to / checkpoint.name
    beside = to / BESIDE / f"{checkpoint.name}-{uuid.uuid4().hex[:8]}"  # another machine may copy the same one
    for name in files.names(to / BESIDE):
        files.remove(to / BESIDE / name)  # of a copy that broke off
    files.erase_empty(to / BESIDE)
    taken = {path.name: about(path) for path in readable(to, say, aside=True)}.get(checkpoint.name)
    if taken == marker:
        harm = problem(target)
        if harm is None:
            return target
        files.set_aside(target, harm, say)
    whose = origin_of(marker)
    if taken and origin_of(taken)["run"] != whose["run"] and text_checksum(taken) not in whose["supersedes"]:
        say(
            f"{checkpoint.name} was not copied to {to}: another training's checkpoint lies there under that name and "
            "stays. Do two notebooks train in the same workspace? Give one of them another workspace"
        )
        return None
    whole.copy_files(checkpoint, beside, marker["files"] | {MARKER: whole.entry_of(checkpoint / MARKER)})
    if {str(file.relative_to(beside)) for file in files.files_under(beside)} != {*marker["files"], MARKER}:
        raise OSError(errno.ESTALE, f"another process changes {beside.parent}")
    files.publish(beside, target)
    files.erase_empty(beside.parent)
    return target


def lasting(folder: Path) -> Path | None:
    """Where the checkpoints in `<run>/finetune.partial/checkpoints` are kept for good, if the run has such a place."""
    twin = lasting_twin(folder.parent)
    return twin / folder.name if twin else None


def fetch(
    source: Path | None,
    folder: Path,
    identity: dict[str, Any] | None = None,
    say: Callable[[str], None] = print,
) -> Found:
    """The newest whole checkpoint of a folder and its lasting place, on this machine; of equally new ones the local.

    What is damaged is renamed aside, in both. Raises ChangedRun as `newest` does.
    """
    checkpoint = place = folder
    try:
        lying = readable(folder, say, aside=True)
        place = source or folder
        there = readable(source, say, aside=True) if source else []
        for checkpoint in reversed(fitting([*there, *lying], identity)):
            place = checkpoint.parent
            harm, target = None, checkpoint
            try:
                if place == folder:
                    harm = problem(checkpoint)
                else:
                    say(f"fetching {checkpoint.name} from {source}")
                    target = copied(checkpoint, folder, say)
                    for step in about(checkpoint).get("spared", ()):  # the best one so far
                        if (other := checkpoint.with_name(f"checkpoint-{step}")) in there:
                            copied(other, folder, say)
            except (files.Torn, FileNotFoundError) as error:
                harm = str(error)
            if harm is None:
                return Found("whole", target)
            files.set_aside(checkpoint, harm, say)
    except OSError as error:
        if files.is_full(error):
            size_gib, free_gib = about(checkpoint)["size_bytes"] / GIB, files.free_bytes(folder) / GIB
            sizes = f"it has {size_gib:.2f} GiB, and {folder} has {free_gib:.2f} GiB free"
            remedy = "delete what is not needed on this machine's disk and run this once more; nothing was changed"
            return Found("not fetched", reason=f"{checkpoint} is whole and was not fetched: {sizes}; {remedy}")
        why = f"checkpoints in {place} cannot be read ({files.stayed(error)})"
        again = "mount Drive again" if place == source else "see to that disk"
        return Found("unreadable", reason=f"{why}: nothing was changed or deleted; {again} and run this once more")
    return Found("none")


def clear(folder: Path | None, run: str | None) -> None:
    """Delete a run's checkpoints and what it supersedes, because what it trained is whole there; nothing else goes."""
    lying = {checkpoint: about(checkpoint) for checkpoint in readable(folder)} if folder else {}
    own = {checkpoint: marker for checkpoint, marker in lying.items() if marker.get("run", "") == run}
    superseded = {mark for marker in own.values() for mark in origin_of(marker)["supersedes"]}
    for checkpoint, marker in lying.items():
        if checkpoint in own or text_checksum(marker) in superseded:
            files.remove(checkpoint)
    if own:
        files.erase_empty(folder / BESIDE, folder, folder.parent)
