"""A training from its newest checkpoint, or from its start, to the adapter on disk, and what it measured."""

import json
import time
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel, set_peft_model_state_dict
from safetensors.torch import load_file

from helpers import workspace
from helpers.finetune import base, ranks, sharded, zero
from helpers.finetune.trainer import FineTuner, saved_weights
from helpers.finetune.watch import NotTrained, interrupts
from helpers.models.stored import for_all_readers
from helpers.models.templates import save_tokenizer
from helpers.workspace import checkpoints, files

GIB = 2**30


def train(trainer: FineTuner, resume: str = "auto") -> dict[str, Any]:
    """Train, from the newest whole checkpoint unless resume is "never"; returns what was measured.

    An interrupt (Ctrl-C, a notebook's stop button, SIGTERM) lets the step finish, saves a checkpoint and stops. Raises
    NotTrained when the loss is NaN, no update was applied, or no adapter differs from its start; StorageError when
    there may be a checkpoint and it cannot be read or fetched. Checkpoints of an earlier run, here and in the lasting
    place, go when the first one of this run is whole there, not before.
    """
    # Where to go on from, and whose checkpoints lie there: asked before anything is written.
    folder, keep = Path(trainer.args.output_dir), trainer.recipe.train.keep_checkpoints
    lasting = checkpoints.lasting(folder) if ranks.is_first() else None
    checkpoint, trainer.origin = ranks.from_first(lambda: where_from(trainer, folder, lasting, resume))
    began = time.perf_counter()
    trainer.begin(checkpoint)
    reference_s = time.perf_counter() - began
    watch, on_gpu = trainer.watch, torch.cuda.is_available()
    if on_gpu:
        torch.cuda.reset_peak_memory_stats()
    before_gib = torch.cuda.memory_allocated() / GIB if on_gpu else 0.0
    started = time.perf_counter()
    with interrupts(watch), checkpoints.sending(lasting, keep) as trainer.send:
        trainer.train(resume_from_checkpoint=str(checkpoint) if checkpoint else None)
    train_s = time.perf_counter() - started
    ranks.from_first(lambda: None)  # nobody goes before rank 0 has written and sent the last checkpoint
    if watch.interrupted is not None:
        raise KeyboardInterrupt(f"stopped after step {trainer.state.global_step}; run again to continue from there")
    # fp16 skips the first steps while it looks for its scale: a short run can end without one update and raise nothing.
    changed = sum(not torch.equal(watch.start[name], value) for name, value in trainer.trained())
    if (not watch.applied and watch.step_s) or not changed:
        raise NotTrained(
            f"{watch.applied} of {len(watch.step_s)} optimizer steps were applied and {changed} adapter weights differ "
            "from their start: raise learning_rate or max_steps (fp16 skips the first steps while it finds its scale)"
        )
    load_best(trainer)
    looked = heldout_figures(trainer)
    peaks_gib = ranks.gathered(peak_gib())
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    # Tokens a second are of this session's steps only: the share of all steps that it made.
    busy_s = sum(watch.step_s)
    share = len(watch.step_s) / trainer.state.max_steps
    return {
        "precision": base.precision().reason,
        "layers": trainer.layers_reason,
        "loss_check": trainer.loss_check,
        "loss_first": losses[0],
        "loss_last": sum(losses[-10:]) / len(losses[-10:]),
        "steps": trainer.state.global_step,
        "steps_applied": trainer.state.global_step - (len(watch.step_s) - watch.applied),
        "adapters_changed": changed,
        "text_tokens": trainer.token_counts["text"],
        "padding_tokens": trainer.token_counts["padding"],
        "tokens_per_s": round(share * trainer.token_counts["text"] / busy_s, 1) if busy_s else None,
        "train_s": round(train_s, 2),
        "step_s": round(sorted(watch.step_s)[len(watch.step_s) // 2], 4) if watch.step_s else None,
        "before_allocated_gib": round(before_gib, 3),
        "peak_allocated_gib": max(allocated for allocated, _ in peaks_gib),
        "peak_reserved_gib": max(reserved for _, reserved in peaks_gib),
        **({"gpus": ranks.count()} if ranks.count() > 1 else {}),
        "reference_s": round(reference_s, 2) if trainer.reference else None,
        **looked,
        "resumed_from_step": checkpoints.step_of(checkpoint) if checkpoint else 0,
        "run": trainer.origin["run"],
        **(checkpoints.summary(folder) if ranks.is_first() else {}),
    }


def heldout_figures(trainer: FineTuner) -> dict[str, float | None]:
    """The loss on held-out data, None without any, and of pairs what else was seen of them."""
    if trainer.eval_dataset is None:
        return {"heldout_loss": None}
    names = {f"eval_{name}": f"heldout_{name}" for name in ("loss", *trainer.told_of_pairs)}
    return {names[name]: value for name, value in trainer.evaluate().items() if name in names}


def where_from(
    trainer: FineTuner, folder: Path, lasting: Path | None, resume: str
) -> tuple[Path | None, checkpoints.Origin]:
    """(the checkpoint to go on from, fetched, whose the next ones are). Raises StorageError where that is not known."""
    found = checkpoints.fetch(lasting, folder, trainer.identity) if resume == "auto" else checkpoints.Found("none")
    checkpoint = found.to_continue()
    with files.reached(lasting or folder, "nothing was changed or deleted"):
        origin = checkpoints.origin(checkpoint, folder, lasting)
    if checkpoint is not None:
        print(f"continuing from {checkpoint.name}")
    return checkpoint, origin


def peak_gib() -> tuple[float, float]:
    """Most that this process's allocator has held at once: allocated, reserved."""
    if not torch.cuda.is_available():
        return 0.0, 0.0
    peaks = torch.cuda.max_memory_allocated(), torch.cuda.max_memory_reserved()
    return tuple(round(peak / GIB, 3) for peak in peaks)


def load_best(trainer: FineTuner) -> None:
    """With patience, the adapter of the best evaluation, unless it is the last one's anyway."""
    best = Path(trainer.args.output_dir) / f"checkpoint-{trainer.state.best_global_step}"
    if not trainer.recipe.train.patience or trainer.state.best_global_step is None:
        return
    # Rank 0 has written it before it answers here
    if ranks.from_first(best.is_dir):
        if isinstance(trainer.model, PeftModel) and not sharded.is_divided(trainer.model):
            set_peft_model_state_dict(trainer.model, load_file(str(best / "adapter_model.safetensors")))
        else:
            sharded.take(trainer.model, saved_weights(best))
    elif ranks.is_first():
        print(f"{best.name}, the best on held-out conversations, is no longer there: the last adapter is kept instead")


def save(trainer: FineTuner, output: Path) -> Path:
    """output/adapter (PEFT's format, its tokenizer) and output/log.json (the trainer's log); returns the adapter's.

    Of full fine-tuning output/model, a model in 16 bits. All ranks call it where weights are divided; rank 0 writes.
    """
    whole, model = sharded.trained(trainer.model), trainer.model
    if zero.is_used(trainer.recipe):
        whole = dict(trainer.trained())
    everything = not isinstance(model, PeftModel)
    folder = Path(output) / ("model" if everything else "adapter")
    if not ranks.is_first():
        return folder
    if everything:
        state = whole or model.state_dict()
        whole = {name: value.detach().cpu().half() for name, value in state.items()}
    named = {} if whole is None else {"state_dict": whole}
    model.save_pretrained(str(folder), **named)
    if everything:
        settings = json.loads((folder / "config.json").read_text(encoding="utf-8"))
        workspace.write_text(folder / "config.json", json.dumps(for_all_readers(settings), indent=1))
    save_tokenizer(trainer.processing_class, folder)
    workspace.write_text(Path(output) / "log.json", json.dumps(trainer.state.log_history, indent=1))
    return folder
