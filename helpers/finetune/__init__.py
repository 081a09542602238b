"""Fine-tuning: a RunConfig becomes a model, an adapter, a trainer, and after training an adapter on disk.

All at once: `finetune(config, prepared, output)`. Step by step, a file each:

    model, tokenizer = load_base(config)                                   # base.py
    model = attach_adapter(model, config)                                  # base.py
    trainer = build_trainer(config, model, tokenizer, prepared, saves)     # trainer.py, over data.py and engine/
    measured = train(trainer)                                              # run.py, watched by watch.py
    save(trainer, output)                                                  # run.py
"""

import shutil
from pathlib import Path
from typing import Any

from helpers import budget, hardware, workspace
from helpers.budget import planning
from helpers.config import RunConfig
from helpers.finetune.base import attach_adapter, load_base, refuse_without_gpu
from helpers.finetune.data import check_tokenizer, load_split
from helpers.finetune.notices import into_file
from helpers.finetune.run import save, train
from helpers.finetune.trainer import build_trainer, refuse_without_tracker
from helpers.finetune.watch import NotTrained
from helpers.models import gpu, shape
from helpers.workspace import checkpoints

__all__ = ["NotTrained", "attach_adapter", "build_trainer", "finetune", "load_base", "plan", "save", "train"]


@gpu.gives_back
def finetune(config: RunConfig, prepared: Path, output: Path, resume: str = "auto") -> dict[str, Any]:
    """Train an adapter on a prepared dataset: output/adapter and output/log.json; returns what was measured.

    resume: "auto" continues from the newest whole checkpoint in <output>.partial, "never" starts anew. Raises
    ValueError for what can be mended by the reader: an empty dataset, a rank too large, a model that needs a GPU.
    """
    prepared, output = Path(prepared), Path(output)
    if resume not in ("auto", "never"):
        raise ValueError(f"resume must be auto or never, not {resume!r}")
    workspace.fetch(prepared)
    # A dataset that is not there, or of another kind, is said before anything is loaded or written.
    load_split(prepared, "train", config.train.sides == 2)
    refuse_without_tracker(config.train.report_to)
    refuse_without_gpu(config)  # before a tokenizer is asked for on the hub
    check_tokenizer(prepared, config)
    with workspace.building(output, "finetune", config, {"prepared": prepared}, keep=True) as stage:
        for file in stage.folder.iterdir():  # of an end that failed
            if file.name != workspace.SCRATCH:
                shutil.rmtree(file) if file.is_dir() else file.unlink()
        saves = stage.folder / workspace.SCRATCH
        found = look(config, prepared, saves) if resume == "auto" else checkpoints.Found("none")
        config = stage.config = planned(config, found.to_continue())
        with into_file(stage.folder / "libraries.log"):
            model, tokenizer = load_base(config)
            model = attach_adapter(model, config)
            trainer = build_trainer(config, model, tokenizer, prepared, saves)
            stage.measurements.update(train(trainer, resume))
            save(trainer, stage.folder)
    return stage.measurements


def look(config: RunConfig, prepared: Path, saves: Path) -> checkpoints.Found:
    """The checkpoint that training goes on from, fetched. Raises checkpoints.ChangedRun for other settings or data."""
    wanted = checkpoints.identity(config, workspace.identify(Path(prepared))["sha256"])
    return checkpoints.fetch(checkpoints.lasting(saves), saves, wanted)


def plan(config: RunConfig, output: Path, machine: hardware.Machine | None = None, resume: str = "auto") -> budget.Plan:
    """How training into output computes its steps on a machine (this one unless said).

    As the checkpoint that it goes on from did, where there is one; else the fastest way that fits. So a run that began
    on a T4 goes on on an L4, and is predicted as it runs.
    """
    saves = workspace.beside(Path(output), "partial") / workspace.SCRATCH
    checkpoint = checkpoints.to_be_continued(saves, config) if resume == "auto" else None
    return plan_from(config, checkpoint, machine or hardware.probe())


def plan_from(config: RunConfig, checkpoint: Path | None, machine: hardware.Machine) -> budget.Plan:
    """The plan in a checkpoint's own micro-batches: laid out otherwise, its next steps would be other steps."""
    sizes = shape(config.model.model, config.model.revision)
    made = checkpoints.split_of(checkpoint) if checkpoint else {}
    if not made:
        return budget.plan(config, sizes, machine)
    return budget.plan_in(config, made["batch_size"], sizes, machine, checkpoint.name)


def planned(config: RunConfig, checkpoint: Path | None = None) -> RunConfig:
    """The configuration that trains: with a number for checkpointing="auto", in the micro-batches of a checkpoint.

    Others stay as they are, but for host memory, of which no configuration gets more than half of what is free. Says
    so when the micro-batches are others than the configuration's. Raises budget.DoesNotFit (a ValueError) when they do
    not fit this machine however much is recomputed, or when no way of training fits.
    """
    machine = hardware.probe()
    if machine.unusable:
        raise ValueError(machine.unusable)
    made = checkpoints.split_of(checkpoint) if checkpoint else {}
    same = all(getattr(config.train, name) == value for name, value in made.items())
    if same and config.train.checkpointing != "auto":
        return planning.within_host(config, machine)
    sizes = shape(config.model.model, config.model.revision)
    settled = budget.settle(config, sizes, machine, plan_from(config, checkpoint, machine))
    budget.check(settled.budget)
    if not same:
        print("; ".join(settled.plan.reasons))
    return settled.config
