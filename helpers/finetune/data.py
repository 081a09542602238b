"""The prepared rows that train: opened, held to the model and its tokenizer, and made into tensors."""

from pathlib import Path
from typing import Any

from datasets import Dataset, concatenate_datasets, load_from_disk
from transformers import PreTrainedModel

from helpers import workspace
from helpers.config import RunConfig
from helpers.finetune import batches
from helpers.models.templates import load_tokenizer, tokenizer_identity


def load_split(prepared: Path, name: str, pairs: bool = False) -> Dataset:
    """One split of a prepared folder; of pairs all chosen rows, then all rejected ones.

    Raises ValueError when it is not there, or holds pairs where there should be none, or the other way round.
    """
    folder = Path(prepared) / name
    if not folder.is_dir():
        raise workspace.MissingArtifact(f"{folder} is not there: run {workspace.maker('prepare')} first")
    if not any(folder.glob("*.arrow")):  # an empty one has no file, and load_from_disk cannot read it
        return Dataset.from_dict({"input_ids": [], "assistant_masks": []})
    rows = load_from_disk(str(folder))
    found = "rejected_ids" in rows.column_names
    if found and not pairs:
        raise ValueError(
            f"{prepared} holds pairs for a preference method: train with method=dpo, or prepare again with use=chosen "
            "to train on the better answers"
        )
    if pairs and not found:
        raise ValueError(
            f"{prepared} holds conversations, and method=dpo and method=orpo learn from pairs of a better and a worse "
            "answer: prepare again with use=pairs, or train with method=sft"
        )
    return in_rows(rows) if pairs else rows


def in_rows(pairs: Dataset) -> Dataset:
    """Pairs as rows, still on disk: all chosen ones, then all rejected ones in the same order."""
    better = pairs.select_columns(["input_ids", "assistant_masks"])
    worse = pairs.select_columns(["rejected_ids", "rejected_masks"])
    return concatenate_datasets(
        [better, worse.rename_columns({"rejected_ids": "input_ids", "rejected_masks": "assistant_masks"})]
    )


def check_tokenizer(prepared: Path, config: RunConfig) -> None:
    """Raise ValueError when the rows were written with another tokenizer or template than the adapter will carry."""
    manifest = prepared / workspace.MANIFEST
    made = workspace.read_manifest(prepared)["measurements"].get("tokenizer") if manifest.is_file() else None
    if made not in (None, tokenizer_identity(load_tokenizer(config.model.model, config.model.revision))):
        raise workspace.StaleArtifact(
            f"{prepared} was written with another tokenizer or chat template than that of {config.model.model} now: "
            f"run {workspace.maker('prepare')} again"
        )


def check_rows(rows: Dataset, config: RunConfig, model: PreTrainedModel) -> None:
    """Raise ValueError for a dataset that cannot train anything, or rows longer than the model reads."""
    if len(rows) == 0:
        raise ValueError("the prepared training split has 0 conversations: prepare some that pass the checks first")
    masked = sum(1 for mask in rows["assistant_masks"] if not any(mask[1:]))
    if masked == len(rows):
        raise ValueError(
            f"all {masked} conversations have no token to train on (every assistant mask is 0): "
            "look at the masks in notebook 02; seq_len may cut every answer off"
        )
    longest, reach = max(len(ids) for ids in rows["input_ids"]), model.config.max_position_embeddings
    if config.data.seq_len > reach:
        raise ValueError(
            f"seq_len={config.data.seq_len} is more than the {reach} tokens that this model was made for: "
            f"prepare again with seq_len={reach} or less"
        )
    if longest > config.data.seq_len:  # memory is planned for seq_len
        raise ValueError(
            f"the longest prepared conversation has {longest} tokens, more than seq_len={config.data.seq_len}: "
            f"prepare again with seq_len={config.data.seq_len}, or train with seq_len={longest}"
        )


def label_count(rows: Dataset) -> int:
    """Tokens that a loss is computed for."""
    return sum(sum(mask[1:]) for mask in rows["assistant_masks"]) if len(rows) else 0


def gather(
    items: list[dict], splits: dict[str, Dataset], pad_id: int, packing: bool, by_bounds: bool
) -> dict[str, Any]:
    """The tensors of one planned micro-batch; an empty one has a row without labels."""
    (item,) = items
    rows = splits[item["split"]]
    return batches.collate([rows[row] for row in item["rows"]] or [batches.NOTHING], pad_id, packing, by_bounds)
