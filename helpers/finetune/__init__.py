"""Fine-tuning: a RunConfig becomes a model, an adapter, a trainer, and after training an adapter on disk.

All at once: `finetune(config, prepared, output)`, on as many GPUs as config says (workers.py starts a process each, and
ranks.py is how those talk). Step by step, a file each:

    model, tokenizer = load_base(config)                                   # base.py
    model = attach_adapter(model, config)                                  # base.py
    trainer = build_trainer(config, model, tokenizer, prepared, saves)     # trainer.py, over data.py and engine/
    measured = train(trainer)                                              # run.py, watched by watch.py
    save(trainer, output)                                                  # run.py
"""

import shutil
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any

from peft import PeftModel
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from helpers import budget, hardware, workspace
from helpers.budget import planning, vram
from helpers.config import RunConfig
from helpers.finetune import ranks, sharded, workers, zero
from helpers.finetune.base import attach_adapter, load_base, refuse_without_gpu
from helpers.finetune.data import check_tokenizer, load_split
from helpers.finetune.notices import into_file
from helpers.finetune.run import save, train
from helpers.finetune.trainer import build_trainer, refuse_without_tracker
from helpers.finetune.watch import NotTrained
from helpers.models import gpu, shape
from helpers.show import live
from helpers.workspace import checkpoints

__all__ = ["NotTrained", "attach_adapter", "build_trainer", "finetune", "load_base", "plan", "save", "train"]


@gpu.gives_back
def finetune(
    config: RunConfig,
    prepared: Path,
    output: Path,
    resume: str = "auto",
    begin: Callable[..., live.Progress] = live.begin,
) -> dict[str, Any]:
    """Train an adapter on a prepared dataset: output/adapter and output/log.json; returns what was measured.

    resume: "auto" continues from the newest whole checkpoint in <output>.partial, "never" starts anew. begin: shows
    the training. With config.train.gpus above 1 the training runs in workers and is shown here. Raises ValueError for
    what can be mended by the reader: an empty dataset, a rank too large, a model that needs a GPU.
    """
    prepared, output = Path(prepared), Path(output)
    if resume not in ("auto", "never"):
        raise ValueError(f"resume must be auto or never, not {resume!r}")
    workers.refuse(config)
    if gpu.is_first():
        print(*(f"{said}\n" for said in vram.another_optimizer(config)), sep="", end="")
    config = planning.with_train(config, optimizer=vram.optimizer(config))
    gpus = workers.count(config)
    with ranks.joined():
        ranks.from_first(lambda: workspace.fetch(prepared))
        # a dataset that is not there, or of another kind, is said before anything is loaded or written
        load_split(prepared, "train", config.train.sides == 2)
        refuse_without_tracker(config.train.report_to)
        refuse_without_gpu(config)  # before a tokenizer is asked for on the hub
        check_tokenizer(prepared, config)
        if gpus > 1:
            return workers.launch(config, prepared, output, resume, gpus)
        config = planning.with_train(config, gpus=ranks.count())
        with built(config, prepared, output) as stage:
            saves = stage.folder / workspace.SCRATCH
            found = ranks.from_first(lambda: look(config, prepared, saves, resume))
            config = stage.config = planned(config, found)
            with into_file(stage.folder / "libraries.log") if ranks.is_first() else nullcontext():
                model, tokenizer = load(config)
                trainer = build_trainer(config, model, tokenizer, prepared, saves)
                trainer.watch.begin = begin if ranks.is_first() else live.unseen
                stage.measurements.update(train(trainer, resume))
                save(trainer, stage.folder)
        return stage.measurements


def load(config: RunConfig) -> tuple[PreTrainedModel | PeftModel, PreTrainedTokenizerBase]:
    """What trains, whole or divided among the ranks, and its tokenizer."""
    if config.train.sharding == "fsdp" and ranks.count() > 1:
        return sharded.load(config)
    if zero.is_used(config):
        zero.refuse_fp16()
    model, tokenizer = load_base(config)
    return attach_adapter(model, config), tokenizer


def built(config: RunConfig, prepared: Path, output: Path) -> AbstractContextManager[workspace.Building]:
    """The stage under way, which rank 0 makes; the others know where it lies, and write nothing."""
    if not ranks.is_first():
        return nullcontext(workspace.Building(workspace.beside(output, "partial"), config))
    return workspace.building(output, "finetune", config, {"prepared": prepared}, keep=True)


def look(config: RunConfig, prepared: Path, saves: Path, resume: str) -> Path | None:
    """The checkpoint that training goes on from, fetched; what else an end that failed has left here is deleted.

    Raises checkpoints.ChangedRun for other settings or data, StorageError where that cannot be known.
    """
    for file in saves.parent.iterdir():
        if file != saves:
            shutil.rmtree(file) if file.is_dir() else file.unlink()
    if resume == "never":
        return None
    wanted = checkpoints.identity(config, workspace.identify(prepared)["sha256"])
    return checkpoints.fetch(checkpoints.lasting(saves), saves, wanted).to_continue()


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

    Others stay as they are, but for host memory, of which no configuration gets more than half of what is free, and
    where several GPUs train and one has no room for them. Says so when something is computed otherwise. Raises
    budget.DoesNotFit (a ValueError) when they do not fit this machine however much is recomputed, or when no way of
    training fits.
    """
    machine = ranks.smallest(hardware.probe())
    if machine.unusable:
        raise ValueError(machine.unusable)
    made = checkpoints.split_of(checkpoint) if checkpoint else {}
    sizes = shape(config.model.model, config.model.revision)
    same = all(getattr(config.train, name) == value for name, value in made.items())
    if same and config.train.checkpointing != "auto":
        config = planning.within_host(config, machine)
        # Planned for the first GPU as a notebook saw it, which takes some of it itself: others may have less
        if ranks.count() == 1 or budget.budget(config, sizes, machine).fits:
            return config
        config, same = config.with_values(checkpointing="auto"), False
    settled = budget.settle(config, sizes, machine, plan_from(config, checkpoint, machine))
    budget.check(settled.budget)
    if not same and ranks.is_first():
        print("; ".join(settled.plan.reasons))
    return settled.config
