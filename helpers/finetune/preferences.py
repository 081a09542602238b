"""Learning from pairs of a better and a worse answer: DPO and ORPO on the layers, loss and checkpoints of SFT.

A pair is two rows, padded on the right or packed like any others; a micro-batch holds its chosen rows, then its
rejected ones, so a pair of 2 × 1,024 tokens takes what one row of 2,048 does. Logits are never whole: the loss's chunks
give log p of every answer token, and what is left of an answer is one number, their sum.

DPO (https://arxiv.org/abs/2305.18290, equation 7) compares these sums with those of a reference: the model as it stands
before the first step, whose sums are computed once, kept in every checkpoint, and never again. With

    margin = beta · ((log p(chosen) - reference) - (log p(rejected) - reference))

    loss = -(1 - s) · log sigmoid(margin) - s · log sigmoid(-margin) + sft_weight · (-log p a token, chosen answers)

s being label_smoothing. The last term is why the default is not plain DPO: a margin also grows when both answers lose
probability, the worse one faster, and then neither is what the model says (https://arxiv.org/abs/2404.19733 adds the
same term). ORPO (https://arxiv.org/abs/2403.07691, equation 6) needs no reference: its margin is the logarithm of the
ratio of both answers' odds, from the mean log p of their tokens, and beta weighs its loss beside the answers' own.
"""

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from safetensors.torch import load_file, save_file
from torch.nn.functional import logsigmoid
from tqdm import tqdm
from transformers.utils import ModelOutput

from helpers.config import TrainConfig
from helpers.finetune import base, batches, ranks
from helpers.finetune.data import gather
from helpers.finetune.trainer import FineTuner

REFERENCE = "reference.safetensors"
FIGURES = ("accuracy", "margin", "chosen_logp", "rejected_logp")
"""Means over pairs that a step's log holds beside its loss; log p in nats an answer."""


@dataclass
class Judgement(ModelOutput):
    """What a micro-batch of pairs gives."""

    loss: torch.Tensor | None = None
    sums: torch.Tensor | None = None
    """log p of each answer: (sequences,)."""
    figures: torch.Tensor | None = None
    """Number of pairs, and the sums of FIGURES over them: (1 + figures,)."""


def objective(asked: TrainConfig) -> Callable[..., Judgement]:
    """The loss of a configuration, as `losses.install` takes it. Raises ValueError for what a method does not have."""
    if asked.method == "orpo" and asked.label_smoothing:
        raise ValueError("label_smoothing is of method=dpo: leave it out with method=orpo")

    def judge(
        sums: torch.Tensor, label_counts: torch.Tensor, reference: torch.Tensor | None, count: torch.Tensor | None
    ) -> Judgement:
        """sums, label_counts, reference: (sequences,), chosen ones first; count: (pairs, labels of chosen ones)."""
        pairs = len(sums) // 2
        # What only fills up a step of several GPUs is one row without labels, half a pair: it counts for nothing.
        chosen, rejected = sums[:pairs], sums[pairs : 2 * pairs]
        counted = (label_counts[:pairs] > 0).to(sums.dtype)
        if count is None:
            count = totals(label_counts)
        if asked.method == "orpo":
            margin = log_odds(chosen / label_counts[:pairs].clamp(min=1)) - log_odds(
                rejected / label_counts[pairs : 2 * pairs].clamp(min=1)
            )
            preferred = asked.beta * -logsigmoid(margin)
        else:
            before = sums.detach() if reference is None else reference
            margin = asked.beta * ((chosen - before[:pairs]) - (rejected - before[pairs:]))
            preferred = -(1 - asked.label_smoothing) * logsigmoid(margin)
            if asked.label_smoothing:
                preferred = preferred - asked.label_smoothing * logsigmoid(-margin)
        loss = (preferred * counted).sum() / count[0] - asked.sft_weight * chosen.sum() / count[1].clamp(min=1)
        told = torch.stack([counted, (margin > 0) * counted, margin * counted, chosen, rejected])
        return Judgement(loss=loss, sums=sums.detach(), figures=told.detach().sum(1))

    return judge


def log_odds(logp: torch.Tensor) -> torch.Tensor:
    """log(p / (1 - p)) of log p; a probability within 1e-6 of 1 counts as that."""
    logp = logp.clamp(max=-1e-6)
    return logp - torch.log(-torch.expm1(logp))


def totals(label_counts: torch.Tensor) -> torch.Tensor:
    """(pairs, labels of their chosen answers) of a micro-batch: what its loss is a mean over."""
    chosen = label_counts[: len(label_counts) // 2]
    return torch.stack([(chosen > 0).sum(), chosen.sum()])


def counts(rows: Dataset) -> torch.Tensor:
    """`totals` of all rows of a split."""
    return totals(torch.tensor([sum(mask[1:]) for mask in rows["assistant_masks"]], dtype=torch.long))


def units(lengths: list[int], packing: bool) -> list[int]:
    """Tokens that a pair takes beside others: its longer side's when padded, both sides' when packed.

    lengths: of rows, all chosen ones, then all rejected ones.

    >>> units([5, 2, 3, 4], packing=False), units([5, 2, 3, 4], packing=True)
    ([5, 4], [8, 6])
    """
    pairs, join = len(lengths) // 2, sum if packing else max
    return [join(pair) for pair in zip(lengths[:pairs], lengths[pairs:], strict=True)]


def both_sides(plan: list[list[int]], pairs: int) -> list[list[int]]:
    """Micro-batches of pairs as rows, of which there are twice as many as pairs: chosen ones, then rejected ones.

    >>> both_sides([[0, 2]], pairs=3)
    [[0, 2, 3, 5]]
    """
    return [batch + [pairs + pair for pair in batch] for batch in plan]


def collate(
    items: list[dict], reference: dict[str, torch.Tensor], splits: dict[str, Any], **how: Any
) -> dict[str, Any]:
    """The tensors of one planned micro-batch of pairs: a conversation's, label_counts, and the reference's log p."""
    (item,) = items
    made = gather(items, splits, **how)
    ends = made.get("cu_seq_lens_q")
    trained = made["labels"] != batches.IGNORE
    # of a packed row the sequences between its bounds
    sequences = trained if ends is None else trained[0].tensor_split(ends[1:-1].tolist())
    made["label_counts"] = torch.stack([part.sum() for part in sequences])
    if item["split"] in reference:
        made["reference"] = reference[item["split"]][item["rows"]]
    return made


class PreferenceTuner(FineTuner):
    """The trainer of pairs: their loss, counts and log, and a reference that every checkpoint keeps."""

    told_of_pairs = FIGURES

    def begin(self, checkpoint: Path | None) -> None:
        """The reference: a checkpoint's, or where training starts, this model's own, in one pass over all pairs."""
        self.seen: dict[bool, torch.Tensor | None] = {True: None, False: None}
        if self.recipe.train.method == "orpo":
            return
        if checkpoint is not None:
            # Copied: what safetensors reads is the file itself, and a checkpoint that goes is emptied first
            self.reference.update({name: value.clone() for name, value in load_file(checkpoint / REFERENCE).items()})
            return
        for split, plan in (("train", self.train_dataset), ("heldout", self.eval_dataset)):
            if plan is not None:
                self.reference[split] = self.answers(split, plan["rows"])

    def answers(self, split: str, plan: Iterable[list[int]]) -> torch.Tensor:
        """log p of the answer of every row that a plan has, by this model as it stands: (rows,), 0 for others.

        Each is read once, whatever the number of epochs, and by one rank; one that has none left reads others again,
        because where weights are divided a pass is a step that all ranks take together.
        """
        rows, device = self.data_collator.keywords["splits"][split], self.model.device
        lengths, size = [len(ids) for ids in rows["input_ids"]], 2 * self.recipe.train.batch_size
        met = sorted({row for batch in plan for row in batch}, key=lambda row: -lengths[row])
        found, dtype, was_training = torch.zeros(len(rows)), base.precision().dtype, self.model.training
        self.model.eval()
        together = size * ranks.count()
        starts = range(size * ranks.rank(), together * -(-len(met) // together), together)
        try:
            with torch.no_grad(), torch.autocast(device.type, dtype, enabled=dtype != torch.float32):
                for start in tqdm(starts, desc=f"reference, {split}", unit=" batches", disable=None):
                    batch = met[start : start + size]
                    made = self.data_collator([{"split": split, "rows": batch or met[:size]}])
                    made = {name: part.to(device) if torch.is_tensor(part) else part for name, part in made.items()}
                    sums = self.model(**made).sums.float().cpu()
                    if batch:
                        found[batch] = sums
        finally:
            self.model.train(was_training)
        return torch.stack(ranks.gathered(found)).sum(0)

    def keep_with(self, checkpoint: Path) -> None:
        """The reference into a checkpoint that is being written."""
        if self.reference:
            save_file(self.reference, checkpoint / REFERENCE)

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        loss, outputs = super().compute_loss(model, inputs, True, num_items_in_batch)
        before = self.seen[model.training]
        self.seen[model.training] = outputs.figures if before is None else before + outputs.figures
        return (loss, outputs) if return_outputs else loss

    def _get_num_items_in_batch(self, batch_samples, device):
        """(pairs, labels of their chosen answers) of the step, on all GPUs."""
        if not batch_samples:
            return None
        here = sum(totals(batch["label_counts"]) for batch in batch_samples).to(device)
        return self.accelerator.reduce(here, "sum")

    def log(self, logs, start_time=None):
        """With FIGURES of what the entry is about: a step, or an evaluation."""
        if "loss" in logs or "eval_loss" in logs:
            logs.update(self.told("eval_" if "eval_loss" in logs else ""))
        super().log(logs, start_time)

    def told(self, prefix: str) -> dict[str, float]:
        """FIGURES of the pairs seen since they were last told."""
        seen, self.seen[not prefix] = self.seen[not prefix], None
        if seen is None:
            return {}
        pairs, *sums = self.accelerator.reduce(seen, "sum").tolist()
        return {prefix + name: total / max(pairs, 1) for name, total in zip(FIGURES, sums, strict=True)}
