"""A model's figures, kept as soon as they are measured: an evaluation that was stopped goes on from them.

    file = folder / name_of("base", path, made_of)      # in the work folder, until the table is whole
    write(file, entry, evidence)
    entry, evidence, at = read(file)

A file is named by all that its figures depend on, so what was measured of another model, with other data or settings or
on another GPU, is never taken for it. Sealed JSON: floats come back as they were, and a torn file is none.
"""

import json
import time
from contextlib import suppress
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np

from helpers.config import RunConfig
from helpers.evaluate import cost
from helpers.evaluate.metrics import Estimate
from helpers.evaluate.perplexity import Perplexity
from helpers.inference import Generation, base_of, kind
from helpers.workspace import MANIFEST, SCRATCH, beside, files, lasting_twin
from helpers.workspace.versions import versions
from helpers.workspace.whole import identify, seal, text_checksum, unseal

Evidence = dict[str, Any]
"""What comparisons need of one model: items' scores by metric, BLEU's counts, answers."""
ARRAYS = ("losses", "weights")
ANY_TIME = ("gpus",)
"""Settings of the training that no figure depends on."""


def name_of(name: str, path: str | Path, config: RunConfig, data: Path, asked: Any, gpu: str) -> str:
    """The file's name: the model's, and a checksum of its files, the data, the settings, what is asked, GPU, versions.

    asked: anything that JSON can hold.
    """
    settings = asdict(config)
    settings["train"] = {key: value for key, value in settings["train"].items() if key not in ANY_TIME}
    read = [path, data, *([base_of(Path(path), config)] if kind(path) == "adapter" else [])]
    read += [config.evaluate.preferences] if config.evaluate.preferences else []
    made_of = [settings, [identity(one) for one in read], asked, gpu, versions()]
    return f"{name}-{text_checksum(json.loads(json.dumps(made_of, default=str)))[:24]}.json"


def identity(path: str | Path) -> Any:
    """What tells a model or data from what lay there before: a finished stage's checksums, a hub model's commit.

    Of any other folder or file the name, size and time of change of each file: nobody waits for gigabytes to be read.
    """
    path = Path(path)
    stage = next((folder for folder in (path, path.parent) if (folder / MANIFEST).is_file()), None)
    if stage is not None:
        return [path.name, identify(stage)]
    if not path.exists():
        return str(cost.on_disk(str(path)) or path)
    parts = sorted(path.rglob("*")) if path.is_dir() else [path]
    stats = [(str(file.relative_to(path)), file.stat()) for file in parts if file.is_file()]
    return [str(path.resolve()), [[name, stat.st_size, stat.st_mtime_ns] for name, stat in stats]]


def write(file: Path, entry: dict[str, Any], evidence: Evidence) -> None:
    """Keep a model's entry in the report and its evidence; whole or not there."""
    read, plain = evidence["perplexity"], dict(evidence)
    plain["perplexity"] = asdict(read) | {name: getattr(read, name).tolist() for name in ARRAYS}
    plain["answers"] = [asdict(answer) for answer in evidence["answers"]]
    plain["scores"] = {name: values.tolist() for name, values in evidence.get("scores", {}).items()}
    plain |= {"bleu": evidence["bleu"].tolist()} if "bleu" in evidence else {}
    seal(file, {"at": time.time(), "entry": entry, "evidence": plain})


def read(file: Path) -> tuple[dict[str, Any], Evidence, float] | None:
    """What was kept, and when in seconds since 1970; None where nothing is, or what is there is torn."""
    if not files.is_file(file):
        return None
    try:
        content = unseal(file)
    except ValueError:
        return None
    evidence = content["evidence"]
    told = evidence["perplexity"] | {name: np.array(evidence["perplexity"][name]) for name in ARRAYS}
    evidence["perplexity"] = Perplexity(
        **told | {name: Estimate(**told[name]) for name in ("perplexity", "bits_per_byte")}
    )
    evidence["answers"] = [Generation(**answer) for answer in evidence["answers"]]
    evidence["scores"] = {name: np.array(values) for name, values in evidence["scores"].items()}
    evidence |= {"bleu": np.array(evidence["bleu"])} if "bleu" in evidence else {}
    return content["entry"], evidence, content["at"]


def when(at: float) -> str:
    """A time of day, with the day where that is not today."""
    then = time.localtime(at)
    return time.strftime("%H:%M" if then[:3] == time.localtime()[:3] else "%d %B, %H:%M", then)


# ---- on a disk that outlives this machine ----------------------------------------------------------------------------


def lasting(output: Path) -> Path | None:
    """The work folder's twin, when the run has such a place. Raises StorageError when it is no longer mounted."""
    twin = lasting_twin(output)
    return twin and beside(twin, "partial") / SCRATCH


def send(file: Path, twin: Path | None) -> None:
    """Keep a file there too; says so when that fails, which ends nothing."""
    if twin is not None:
        try:
            files.write_text(files.make_folder(twin) / file.name, files.read_text(file))
        except OSError as error:
            print(f"NOT KEPT: {file.name} is only on this machine ({files.reason(error)})")


def fetch(file: Path, twin: Path | None) -> None:
    """Bring a file that is only there."""
    if twin is not None and not files.is_file(file) and files.is_file(twin / file.name):
        files.write_text(file, files.read_text(twin / file.name))


def clear(twin: Path | None) -> None:
    """The table is whole: what was kept there goes. It is in nobody's way if that fails."""
    if twin is not None:
        for path in (twin / name for name in files.names(twin) if ".json" in name):  # a torn write's, too
            files.empty(path)
            with suppress(OSError):
                files.patiently(lambda path=path: path.unlink(missing_ok=True))
        files.erase_empty(twin, twin.parent)
