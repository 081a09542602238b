"""The two profiles, tiny and mistral-7b, and where the repository and what ships with it lie.

>>> profile("tiny", rank=8).adapter.rank
8
"""

from pathlib import Path
from typing import Any

from helpers.config import RunConfig

ROOT = Path(__file__).resolve().parent.parent
TINY = ROOT / "data" / "tiny-mistral"

PROFILES: dict[str, dict[str, Any]] = {
    # RunConfig's own defaults are chosen for a 7B on a T4.
    "mistral-7b": {},
    "tiny": {
        "model": str(TINY),
        "source": str(ROOT / "data" / "conversations.jsonl"),
        "heldout_source": str(ROOT / "data" / "heldout_conversations.jsonl"),
        "questions": str(ROOT / "data" / "questions.jsonl"),
        "seq_len": 192,
        "batch_size": 8,
        "accumulation": 1,
        "learning_rate": 5e-4,
        "epochs": 2.0,
        "optimizer": "adamw_torch",
        "checkpointing": "none",
        "calibration_samples": 128,
        "calibration_tokens": 192,
        "eval_context": 192,
        "eval_stride": 96,
        "eval_batch_size": 32,
        "max_new_tokens": 32,
    },
}
PAIRS: dict[str, dict[str, Any]] = {"mistral-7b": {"learning_rate": 5e-6}, "tiny": {"learning_rate": 5e-4}}
"""What else differs where a profile learns from pairs; for a 7B the learning rate of Zephyr's QLoRA recipe
(https://github.com/huggingface/alignment-handbook)."""


def profile(name: str, **values: Any) -> RunConfig:
    """The configuration of a profile, with some fields changed; None keeps the profile's own value.

    With another method than SFT the profile's own values are those of PAIRS. Raises ValueError naming field and range.

    >>> profile("tiny", rank=8).adapter.rank
    8
    >>> profile("mistral-7b", method="dpo").train.learning_rate
    5e-06
    """
    if name not in PROFILES:
        raise ValueError(f"profile must be {' or '.join(PROFILES)}, not {name!r}")
    given = {key: value for key, value in values.items() if value is not None}
    own = PROFILES[name] | (PAIRS[name] if given.get("method", "sft") != "sft" else {})
    return RunConfig(profile=name).with_values(**(own | given))
