"""A run: where its folder lies on this machine, what it was configured with, and which models it has made."""

from dataclasses import dataclass
from pathlib import Path

from helpers.config import RunConfig, from_tree
from helpers.profiles import ROOT
from helpers.workspace.files import write_text
from helpers.workspace.lasting import LASTING, fetch, keep_copy, lasting_store, mount_drive, place, unkept
from helpers.workspace.stages import require
from helpers.workspace.whole import MANIFEST, NOTEBOOKS, maker, read_manifest

BEFORE = {"finetune": ("prepare",), "merge": ("finetune",), "quantize": ("merge",)}
"""What a stage is made from."""


@dataclass(frozen=True)
class Workspace:
    """One run's folder: `root/prepare`, `root/finetune`, … and `root/plots`."""

    root: Path

    def folder(self, stage: str) -> Path:
        """Where a stage's finished output lies."""
        return self.root / stage


def open_run(config: RunConfig, workspace: str | Path | None = None, use_drive: bool = False) -> Workspace:
    """The run's folder: `workspace`, or runs/<profile> on this machine's disk.

    use_drive: in Colab, mount Google Drive first. On Colab with Drive mounted, or with RECIPES_LASTING=folder in the
    environment, the run also gets a lasting twin there; says where both are. Finished stages that are not whole there
    yet are copied now.
    """
    if use_drive and place() == "colab":
        mount_drive()
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


def home() -> Path:
    """Where this machine keeps files: the repository, or the rented machine's disk.

    On Kaggle not what it keeps, /kaggle/working: that holds 20 GB, and a 7B's run is more.
    """
    return {"colab": Path("/content"), "kaggle": Path("/kaggle/temp"), "own": ROOT}[place()]


def run_config(run: Workspace, stage: str) -> RunConfig:
    """The configuration that a finished stage was made with; fetches it, and what lies before it, from the twin."""
    for earlier in (*BEFORE.get(stage, ()), stage):
        fetch(run.folder(earlier))
    return from_tree(require(run.folder(stage), stage)["config"])


def run_models(run: Workspace, config: RunConfig) -> dict[str, str | Path]:
    """The run's models by name, those that are there; says what is not and what makes it."""
    fetch(run.folder("quantize"))
    fetch(run.folder("export"))
    models: dict[str, str | Path] = {"base": config.model.model}
    quantized = run.folder("quantize")
    made = (read_manifest(quantized)["config"] if (quantized / MANIFEST).is_file() else None) or {}
    method = made.get("quantize", {}).get("quant_method", "gptq")  # earlier manifests name none: there was one
    stages = [("finetuned", "finetune"), ("merged", "merge"), (method, "quantize")]
    if config.model.weights == "aqlm":  # no such base is merged or quantized: nothing of it is missing
        stages = [pair for pair in stages if pair[1] == "finetune" or (run.folder(pair[1]) / MANIFEST).is_file()]
    for name, stage in stages:
        folder = run.folder(stage)
        if (folder / MANIFEST).is_file():
            models[name] = folder / "adapter" if stage == "finetune" else folder
        else:
            print(f"{name} is left out: {folder} is not there; {maker(stage)} makes it")
    if (run.folder("export") / MANIFEST).is_file():
        kind_of = {file: file.stem.rpartition("-")[2].lower() for file in sorted(run.folder("export").glob("*.gguf"))}
        models |= {f"gguf_{kind}": file for file, kind in kind_of.items()}
    return models
