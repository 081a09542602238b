"""The eye on a training while it runs: progress, updates that were applied, what must stop it, and interrupts."""

import math
import signal
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from transformers import Trainer, TrainerCallback

from helpers.config import RunConfig
from helpers.finetune import ranks, sharded
from helpers.finetune.base import adapters
from helpers.show import live

GIB = 2**30


class NotTrained(ValueError):
    """Training ran and made nothing of use; the message says why and what to change."""


class Watch(TrainerCallback):
    """Looks on while it trains: shows progress, counts updates that were applied, stops what goes wrong."""

    begin = staticmethod(live.begin)
    """Shows the training."""
    patience_for_overflow = 20
    """Optimizer steps in a row that fp16's loss scaling may skip; from 65,536 down to 1 takes 16."""

    def __init__(self, trainer: Trainer, config: RunConfig):
        self.trainer, self.config = trainer, config
        # On the CPU: what trained is held against it at the end, and a GPU has better to do with 160 MiB.
        self.start = {
            name: sharded.here(value).detach().to("cpu", copy=True) for name, value in adapters(trainer.model)
        }
        self.applied = self.skipped_in_a_row = 0
        self.step_s: list[float] = []
        self.interrupted: int | None = None
        self.progress: live.Progress | None = None

    def on_train_begin(self, args, state, control, **kwargs):
        limit_gib = torch.cuda.get_device_properties(0).total_memory / GIB if torch.cuda.is_available() else None
        self.progress = self.begin(state.max_steps, limit_gib, state.log_history)

    def on_step_begin(self, args, state, control, **kwargs):
        self.began = time.perf_counter()

    def on_optimizer_step(self, args, state, control, **kwargs):
        skipped = self.trainer.accelerator.optimizer_step_was_skipped
        self.applied += not skipped
        self.skipped_in_a_row = self.skipped_in_a_row + 1 if skipped else 0
        if self.skipped_in_a_row >= self.patience_for_overflow:
            raise NotTrained(
                f"the last {self.skipped_in_a_row} optimizer steps were skipped because fp16 gradients overflowed: "
                f"lower learning_rate (now {self.config.train.learning_rate:g}) or alpha, or use a GPU with bf16"
            )

    def on_step_end(self, args, state, control, **kwargs):
        self.step_s.append(time.perf_counter() - self.began)
        self.interrupted = ranks.agreed(self.interrupted)  # else one would stop, and the others wait for it
        if self.interrupted is not None:  # between two steps, where a checkpoint is whole
            control.should_save = control.should_training_stop = True

    def on_log(self, args, state, control, logs=None, **kwargs):
        if "loss" not in logs:
            return
        if not math.isfinite(logs["loss"]):
            raise NotTrained(
                f"the loss became {logs['loss']} at step {state.global_step}: lower learning_rate "
                f"(now {self.config.train.learning_rate:g}), and look for broken rows in notebook 02"
            )
        per_step = sum(self.step_s[-20:]) / len(self.step_s[-20:])
        tokens_per_step = self.trainer.token_counts["text"] / state.max_steps
        peak_gib = torch.cuda.max_memory_reserved() / GIB if torch.cuda.is_available() else None
        self.progress.step(state.global_step, logs, tokens_per_step / per_step, per_step, peak_gib)

    def on_evaluate(self, args, state, control, metrics=None, **kwargs):
        if self.progress is not None and "eval_loss" in (metrics or {}):
            self.progress.heldout(state.global_step, metrics["eval_loss"])
        if not self.config.train.patience:
            return
        found = [entry["eval_loss"] for entry in state.log_history if "eval_loss" in entry]
        worse = len(found) - 1 - found.index(min(found))
        if worse == 0:  # saved, so that run.load_best finds the adapter
            state.best_global_step, state.best_metric = state.global_step, found[-1]
            control.should_save = True
        elif worse >= self.config.train.patience:
            control.should_training_stop = True

    def on_train_end(self, args, state, control, **kwargs):
        self.progress.close()


@contextmanager
def interrupts(watch: Watch) -> Iterator[None]:
    """While it trains, SIGINT and SIGTERM ask for a checkpoint and a stop at the end of the step; twice is at once."""

    def ask(number: int, frame: Any) -> None:
        if watch.interrupted is not None:
            raise KeyboardInterrupt
        watch.interrupted = number

    try:
        before = {number: signal.signal(number, ask) for number in (signal.SIGINT, signal.SIGTERM)}
    except ValueError:  # only the main thread may; elsewhere an interrupt stays what it is
        before = {}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
