"""Standard tasks: lm-evaluation-harness on an open model where it is installed, multiple choice from a local file else.

A local task is JSONL, a row each: {"question": "The sky is", "choices": [" blue", " loud"], "answer": 0}. A choice
counts by the log-likelihood of its tokens after the question; accuracy is the share of rows whose right choice is the
likeliest, accuracy_norm that by likelihood a byte, as the harness has it.
"""

from pathlib import Path
from typing import Any

import numpy as np

from helpers.evaluate.metrics import mean_interval
from helpers.evaluate.perplexity import Window, batches, read_jsonl, window_losses
from helpers.inference import Loaded


def run_tasks(loaded: Loaded, names: str, batch_size: int = 8) -> dict[str, dict[str, Any]]:
    """Figures of each task in `names` (commas between): a .jsonl file, or a task of lm-evaluation-harness.

    Raises ValueError with one sentence when the harness or a task's data cannot be had.
    """
    wanted = [name.strip() for name in names.split(",") if name.strip()]
    local = [name for name in wanted if name.endswith(".jsonl")]
    found = {Path(name).stem: multiple_choice(loaded, Path(name), batch_size) for name in local}
    return found | harness(loaded, [name for name in wanted if name not in local], batch_size)


def multiple_choice(loaded: Loaded, path: Path, batch_size: int = 8) -> dict[str, Any]:
    """Accuracy on a local task, with its 95% interval. Raises ValueError naming the row that is none."""
    if not path.is_file():
        raise ValueError(f"there is no task file {path}: give JSONL of question, choices and answer")
    rows = list(read_jsonl(path))
    if not rows:
        raise ValueError(f"{path} holds no row: give JSONL of question, choices and answer")
    for number, row in enumerate(rows, 1):
        choices, answer = row.get("choices"), row.get("answer")
        if not (isinstance(row.get("question"), str) and isinstance(choices, list) and choices):
            raise ValueError(f"{path}, row {number} lacks question or choices")
        if answer not in range(len(choices)):
            raise ValueError(f"{path}, row {number}: answer must be the number of a choice, 0 to {len(choices) - 1}")
    stream = [
        choice_window(loaded, row["question"], choice, at)
        for at, row, choice in ((at, row, choice) for at, row in enumerate(rows) for choice in row["choices"])
    ]
    numbered = [Window(one.ids, one.first_scored, None, at) for at, one in enumerate(stream)]
    losses = np.zeros(len(stream))
    for batch in batches(iter(numbered), batch_size):
        losses[[window.item for window in batch]] = window_losses(loaded.model, batch)
    right, right_norm, start = [], [], 0
    for row in rows:
        nats = losses[start : start + len(row["choices"])]
        start += len(row["choices"])
        sizes = [len(choice.encode()) for choice in row["choices"]]
        right.append(float(np.argmin(nats) == row["answer"]))
        right_norm.append(float(np.argmin(nats / sizes) == row["answer"]))
    estimate = mean_interval(np.array(right))
    return {
        "accuracy": estimate.value,
        "accuracy_interval": [estimate.low, estimate.high],
        "accuracy_norm": float(np.mean(right_norm)),
        "rows": len(rows),
    }


def choice_window(loaded: Loaded, question: str, choice: str, item: int) -> Window:
    """Question and choice as one text; the choice's tokens are scored. Raises ValueError when it is too long.

    The question's trailing space belongs to the choice's first token, as in the harness.
    """
    tokenizer, stripped = loaded.tokenizer, question.rstrip()
    first = [tokenizer.bos_token_id] if tokenizer.bos_token_id is not None else []
    whole = tokenizer(stripped + question[len(stripped) :] + choice, add_special_tokens=False)["input_ids"]
    known = len(tokenizer(stripped, add_special_tokens=False)["input_ids"])
    if len(first) + len(whole) > loaded.context:
        raise ValueError(
            f"row {item + 1} has {len(first) + len(whole)} tokens with a choice, but the model's context is "
            f"{loaded.context}: shorten it"
        )
    return Window(first + whole, len(first) + known, None, item)


def harness(loaded: Loaded, names: list[str], batch_size: int = 8) -> dict[str, dict[str, Any]]:
    """Tasks of lm-evaluation-harness on a model that is open already."""
    if not names:
        return {}
    try:
        import lm_eval
        from lm_eval.models.huggingface import HFLM
    except ImportError:
        raise ValueError(
            f"{', '.join(names)} need lm-evaluation-harness: pip install lm_eval, or give a local .jsonl task"
        ) from None
    try:
        model = HFLM(
            pretrained=loaded.model, tokenizer=loaded.tokenizer, batch_size=batch_size, max_length=loaded.context
        )
        results = lm_eval.simple_evaluate(model=model, tasks=names, bootstrap_iters=1000)["results"]
    except Exception as error:  # unknown tasks and unreachable data come as many kinds
        raise ValueError(
            f"lm-evaluation-harness could not run {', '.join(names)} ({type(error).__name__}: {str(error)[:200]}): "
            "check the names and the network, or give a local .jsonl task"
        ) from None
    return {name: {key: value for key, value in found.items() if key != "alias"} for name, found in results.items()}
