"""The eye on a training while it runs: progress, updates that were applied, what must stop it, and interrupts."""

import math
import signal
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from tqdm.auto import tqdm
from transformers import Trainer, TrainerCallback

from helpers.config import RunConfig
from helpers.finetune.base import adapters

GIB = 2**30


class NotTrained(ValueError):
    """Training ran and made nothing of use; the message says why and what to change."""


class Watch(TrainerCallback):
    """Looks on while it trains: shows progress, counts updates that were applied, stops what goes wrong."""

    patience_for_overflow = 20
    """Optimizer steps in a row that fp16's loss scaling may skip; from 65,536 down to 1 takes 16."""

    def __init__(self, trainer: Trainer, config: RunConfig):
        self.trainer, self.config = trainer, config
        # On the CPU: what trained is held against it at the end, and a GPU has better to do with 160 MiB.
        self.start = {name: value.detach().to("cpu", copy=True) for name, value in adapters(trainer.model)}
        self.applied = self.skipped_in_a_row = 0
        self.step_s: list[float] = []
        self.interrupted: int | None = None

    def on_train_begin(self, args, state, control, **kwargs):
        seldom_s = 0.1 if sys.stderr.isatty() else 2.0  # elsewhere every state of the bar is kept
        self.bar = tqdm(
            total=state.max_steps, initial=state.global_step, desc="training", unit="step", mininterval=seldom_s
        )

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
        self.bar.update(state.global_step - self.bar.n)
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
        shown = {"loss": f"{logs['loss']:.3f}", "tokens/s": f"{tokens_per_step / per_step:.0f}"}
        if torch.cuda.is_available():
            shown["peak GiB"] = f"{torch.cuda.max_memory_reserved() / GIB:.2f}"
        shown["hours left"] = f"{(state.max_steps - state.global_step) * per_step / 3600:.2f}"
        self.bar.set_postfix(shown, refresh=False)

    def on_evaluate(self, args, state, control, metrics=None, **kwargs):
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
        self.bar.close()


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
