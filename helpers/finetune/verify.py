"""Predicted against measured: a few real steps of fine-tuning on this machine, on text of random tokens."""

import tempfile
from pathlib import Path

from helpers import budget, hardware
from helpers.config import RunConfig
from helpers.finetune import base, notices, run, trainer
from helpers.models import gpu, shape

STEPS = 3


@gpu.gives_back
def verify(config: RunConfig) -> list[dict]:
    """Train STEPS steps of full contexts; rows of quantity, predicted, measured and difference %.

    The base is downloaded when it is not here. Raises ValueError when the run does not fit this machine.
    """
    sizes, machine = shape(config.model.model, config.model.revision), hardware.probe()
    few = config.with_values(
        max_steps=STEPS,
        epochs=1.0,
        max_conversations=None,
        packing=False,
        eval_steps=None,
        save_steps=1000,
        patience=None,
    )
    few = budget.plan(few, sizes, machine).config
    predicted = budget.budget(few, sizes, machine, tokens_in_dataset=10**12)  # every context is full
    budget.check(predicted)
    rows = STEPS * few.train.batch_size * few.train.accumulation
    with tempfile.TemporaryDirectory() as folder:
        work = Path(folder)
        write_rows(work / "prepared", rows, few.data.seq_len, sizes.vocab)
        with notices.into_file(work / "libraries.log"):
            model, tokenizer = base.load_base(few)
            model = base.attach_adapter(model, few)
            tuner = trainer.build_trainer(few, model, tokenizer, work / "prepared", work / "checkpoints")
            measured = run.train(tuner, resume="never")
    return [row for row in budget.against_measured(predicted, measured) if row["quantity"] != "training, s"]


def write_rows(folder: Path, rows: int, seq_len: int, words: int) -> None:
    """A prepared folder of random tokens, every context full and every token trained."""
    import numpy as np
    from datasets import Dataset

    tokens = np.random.default_rng(0).integers(3, words, (rows, seq_len))
    chat = [[{"role": "user", "content": ""}, {"role": "assistant", "content": ""}]] * rows
    columns = {
        "id": [str(row) for row in range(rows)],
        "messages": chat,
        "input_ids": tokens.tolist(),
        "assistant_masks": [[1] * seq_len] * rows,
    }
    data = Dataset.from_dict(columns)
    data.save_to_disk(str(folder / "train"))
    data.select([0]).save_to_disk(str(folder / "heldout"))
