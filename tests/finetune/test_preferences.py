"""Learning from pairs: trl's losses and autograd's gradients, a reference that a resumed run keeps, and what it learns.

On a GPU in fp16, with the 7B's shape and pairs of 2 × 1,024 tokens, `tests/benchmarks/bench_preferences.py` measures
memory and speed beside trl's own trainer.
"""

import random
from pathlib import Path

import pytest
import torch
from datasets import Dataset, Features, List, Value, load_from_disk
from safetensors.torch import load_file, save_file
from transformers import AutoTokenizer, MistralConfig, MistralForCausalLM, TrainerCallback
from trl import DPOConfig, DPOTrainer

from helpers import finetune
from helpers.config import TrainConfig
from helpers.finetune import preferences
from helpers.finetune.base import trainable_to_fp32
from helpers.finetune.batches import IGNORE
from helpers.finetune.engine import losses
from helpers.finetune.trainer import choose_layers
from helpers.models import TINY, profile

STEPS, PAIRS_A_STEP = 6, 4


@pytest.fixture(scope="module", autouse=True)
def one_thread():
    torch.set_num_threads(1)


@pytest.fixture(scope="module")
def small(tmp_path_factory) -> Path:
    """A 2-layer cut of Mistral's shape with the tiny model's tokenizer."""
    folder = tmp_path_factory.mktemp("small")
    torch.manual_seed(1)
    shape = {"vocab_size": 300, "hidden_size": 64, "intermediate_size": 192, "num_hidden_layers": 2, "head_dim": 16}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 128}
    config = MistralConfig(**shape, **heads, sliding_window=None, initializer_range=0.1)
    MistralForCausalLM(config).save_pretrained(folder)
    AutoTokenizer.from_pretrained(TINY).save_pretrained(folder)
    return folder


def write_pairs(folder: Path, count: int, heldout: int = 5) -> Path:
    """Pairs of random tokens in a prepared folder: one prompt, two answers of different lengths."""
    draw = random.Random(0)

    def tokens(length: int) -> list[int]:
        return [draw.randrange(3, 300) for _ in range(length)]

    rows = []
    for _ in range(count):
        prompt, sides = [1, *tokens(draw.randrange(3, 9))], {}
        for ids, masks in (("input_ids", "assistant_masks"), ("rejected_ids", "rejected_masks")):
            answer = tokens(draw.randrange(2, 12))
            sides[ids], sides[masks] = prompt + answer, [0] * len(prompt) + [1] * len(answer)
        rows.append(sides)
    for name, part in (("train", rows), ("heldout", rows[:heldout])):
        Dataset.from_list(part, Features(dict.fromkeys(part[0], List(Value("int32"))))).save_to_disk(str(folder / name))
    return folder


@pytest.fixture(scope="module")
def pairs(tmp_path_factory) -> Path:
    return write_pairs(tmp_path_factory.mktemp("pairs"), STEPS * PAIRS_A_STEP)


def settings(model: Path, **values):
    values = {"seq_len": 64, "batch_size": PAIRS_A_STEP, "epochs": 1.0, "rank": 4, "alpha": 8} | values
    return profile("tiny", model=str(model), **({"learning_rate": 1e-2, "method": "dpo"} | values))


def our_trainer(config, prepared: Path, folder: Path):
    model, tokenizer = finetune.load_base(config)
    return finetune.build_trainer(
        config, finetune.attach_adapter(model, config), tokenizer, prepared, folder / "checkpoints"
    )


def logged(trainer, name: str = "loss") -> list[float]:
    return [entry[name] for entry in trainer.state.log_history if "loss" in entry]


class Prepared(DPOTrainer):
    """trl's trainer, fed with token ids."""

    def _prepare_dataset(self, dataset, *_):
        return dataset


def trl_trainer(config, prepared: Path, folder: Path, plan: list[list[int]], own_layers: bool = False):
    """trl's DPOTrainer over the same pairs in the same order; an adapter that is there gets a second one, "ref"."""
    asked = config.train
    model, tokenizer = finetune.load_base(config)
    model = finetune.attach_adapter(model, config)
    if own_layers:
        choose_layers(model, config)
    rows = load_from_disk(str(prepared / "train"))
    order = [row for batch in plan for row in batch[: len(batch) // 2]]
    made = [
        {
            "prompt_ids": row["input_ids"][: row["assistant_masks"].index(1)],
            "chosen_ids": row["input_ids"][row["assistant_masks"].index(1) :],
            "rejected_ids": row["rejected_ids"][row["rejected_masks"].index(1) :],
        }
        for row in (rows[place] for place in order)
    ]
    weights = {"loss_type": ["sigmoid", "sft"], "loss_weights": [1.0, asked.sft_weight]} if asked.sft_weight else {}
    arguments = DPOConfig(
        output_dir=str(folder), per_device_train_batch_size=asked.batch_size, max_steps=STEPS, beta=asked.beta,
        learning_rate=asked.learning_rate, lr_scheduler_type=asked.schedule, logging_steps=1, use_cpu=True,
        warmup_steps=round(asked.warmup_fraction * STEPS), fp16=False, bf16=False, gradient_checkpointing=False,
        report_to="none", disable_tqdm=True, save_strategy="no", max_length=None,
        train_sampling_strategy="sequential", **weights,
    )  # fmt: skip
    trainer = Prepared(model=model, args=arguments, train_dataset=Dataset.from_list(made), processing_class=tokenizer)
    trainable_to_fp32(trainer.model)
    return trainer


@pytest.mark.parametrize("values", [{}, {"sft_weight": 0.0, "beta": 0.3}])
def test_losses_are_trls(values, small, pairs, tmp_path):
    config = settings(small, **values)
    ours = our_trainer(config, pairs, tmp_path / "ours")
    finetune.train(ours)
    theirs = trl_trainer(config, pairs, tmp_path / "trl", ours.train_dataset["rows"])
    theirs.train()
    assert len(logged(ours)) == STEPS and abs(logged(ours)[0] - logged(ours)[-1]) > 0.01
    assert logged(ours) == pytest.approx(logged(theirs), abs=5e-4)
    assert logged(ours, "margin") == pytest.approx(logged(theirs, "rewards/margins"), abs=2e-3)


def test_trls_trainer_over_the_custom_layers_is_refused(small, pairs, tmp_path):
    # Its second adapter, "ref", would not be seen: all margins stay 0, the loss at log 2, and nothing is said.
    trainer = trl_trainer(settings(small), pairs, tmp_path, [[0, 1, 2, 3]], own_layers=True)
    with pytest.raises(ValueError, match=r"'ref' is active now.*method=dpo"):
        trainer.train()


def test_the_gradient_of_each_log_probability_is_autograds():
    torch.manual_seed(0)
    hidden, head = torch.randn(3, 7, 16, requires_grad=True), torch.nn.Linear(16, 50, bias=False).requires_grad_(False)
    labels = torch.randint(0, 50, (3, 7)).masked_fill(torch.rand(3, 7) < 0.4, IGNORE)
    counts, weights = (labels[:, 1:] != IGNORE).sum(1), torch.tensor([0.3, -2.0, 1.5])
    ours = losses.log_probabilities(losses.label_losses(hidden, head, labels, "chunked"), counts)
    (gradient,) = torch.autograd.grad((weights * ours).sum(), hidden)
    exact = hidden.detach().double().requires_grad_()
    logp = torch.log_softmax(exact[:, :-1] @ head.weight.double().T, dim=-1)
    picked = logp.gather(2, labels[:, 1:, None].clamp(min=0))[..., 0] * (labels[:, 1:] != IGNORE)
    (wanted,) = torch.autograd.grad((weights.double() * picked.sum(1)).sum(), exact)
    assert ours.tolist() == pytest.approx(picked.sum(1).tolist(), abs=1e-5)
    assert torch.allclose(gradient.double(), wanted, atol=1e-6)


def test_what_the_losses_are_of_two_pairs():
    sums, counts = torch.tensor([-4.0, -6.0, -5.0, -3.0]), torch.tensor([2, 3, 5, 1])
    reference = torch.tensor([-5.0, -5.0, -4.0, -4.0])
    judged = preferences.objective(TrainConfig(method="dpo", label_smoothing=0.25))(sums, counts, reference, None)
    margins = 0.1 * torch.tensor([(1.0 - -1.0), (-1.0 - 1.0)])
    smoothed = -0.75 * torch.sigmoid(margins).log() - 0.25 * torch.sigmoid(-margins).log()
    assert judged.loss.item() == pytest.approx(smoothed.mean().item() + 10 / 5, abs=1e-6)
    assert judged.figures.tolist() == pytest.approx([2, 1, 0, -10, -8], abs=1e-6)
    judged = preferences.objective(TrainConfig(method="orpo"))(sums, counts, None, None)
    odds = [torch.tensor(logp).exp() / (1 - torch.tensor(logp).exp()) for logp in (-2.0, -2.0, -1.0, -3.0)]
    ratios = torch.stack([odds[0] / odds[2], odds[1] / odds[3]])
    penalty = -torch.sigmoid(ratios.log()).log().mean()
    assert judged.loss.item() == pytest.approx(0.1 * penalty.item() + 10 / 5, abs=1e-6)


def test_a_pair_without_labels_counts_for_nothing():
    # what fills up the last step of several GPUs
    judge = preferences.objective(TrainConfig(method="dpo"))
    sums, reference = torch.tensor([-4.0, -5.0]), torch.tensor([-5.0, -4.0])
    alone = judge(sums, torch.tensor([2, 3]), reference, torch.tensor([1, 2]))
    assert alone.loss > 0
    for rows in (1, 2):
        nothing = torch.zeros(rows, dtype=torch.long)
        empty = judge(nothing.float(), nothing, reference[:rows], torch.tensor([1, 2]))
        assert empty.loss == 0 and empty.figures.tolist() == [0] * 5


@pytest.mark.parametrize("values", [{"method": "orpo"}, {"packing": True}, {"loss": "full"}, {"kernels": "plain"}])
def test_other_ways_of_computing_pairs(values, small, pairs, tmp_path):
    trainer = our_trainer(settings(small, eval_steps=3, epochs=4.0, **values), pairs, tmp_path)
    measured = finetune.train(trainer)
    first, last = (
        {name: sum(logged(trainer, name)[epoch]) for name in ("margin", "chosen_logp")}
        for epoch in (slice(STEPS), slice(-STEPS, None))
    )
    assert last["margin"] > first["margin"] + 0.05 and last["chosen_logp"] > first["chosen_logp"] + 0.05
    assert measured["heldout_accuracy"] > 0.5 and measured["heldout_loss"] < 10
    assert all("eval_margin" in entry for entry in trainer.state.log_history if "eval_loss" in entry)


def test_packed_pairs_have_the_log_probabilities_of_padded_ones(small, pairs, tmp_path):
    found = []
    for packing in (False, True):
        trainer = our_trainer(settings(small, packing=packing), pairs, tmp_path / str(packing))
        trainer.begin(None)
        found.append(trainer.reference["train"])
    assert found[0].max() < -1 and torch.allclose(found[0], found[1], atol=1e-4)


def test_micro_batches_add_up_to_one_step(small, pairs, tmp_path):
    one, two = (
        our_trainer(settings(small, batch_size=size, accumulation=times), pairs, tmp_path / str(size))
        for size, times in ((4, 1), (2, 2))
    )
    order = [row for batch in one.train_dataset["rows"] for row in batch[:4]]
    plan = preferences.both_sides([order[start : start + 2] for start in range(0, len(order), 2)], len(order))
    two.train_dataset = Dataset.from_dict({"split": ["train"] * len(plan), "rows": plan})
    for trainer in (one, two):
        finetune.train(trainer)
    assert logged(one) == pytest.approx(logged(two), abs=1e-5)
    assert logged(one, "margin") == pytest.approx(logged(two, "margin"), abs=1e-5)


def test_a_resumed_run_has_the_reference_of_its_start(small, pairs, tmp_path, monkeypatch):
    config = settings(small, save_steps=3)
    whole, broken, resumed = (our_trainer(config, pairs, tmp_path / name) for name in ("whole", "broken", "broken"))
    finetune.train(whole)
    broken.add_callback(StopAt(broken, 3))
    with pytest.raises(KeyboardInterrupt, match="after step 3"):
        finetune.train(broken)
    kept = load_file(tmp_path / "broken" / "checkpoints" / "checkpoint-3" / preferences.REFERENCE)
    monkeypatch.setattr(preferences.PreferenceTuner, "answers", None)  # computing it again would be an error
    finetune.train(resumed)
    for split, reference in whole.reference.items():
        assert torch.equal(kept[split], reference) and torch.equal(resumed.reference[split], reference)
    assert logged(resumed) == pytest.approx(logged(whole), abs=1e-6)


class StopAt(TrainerCallback):
    """A stop button that is pressed in the middle of a step."""

    def __init__(self, trainer, step: int):
        self.trainer, self.step = trainer, step

    def on_step_begin(self, args, state, control, **kwargs):
        if state.global_step == self.step - 1:
            self.trainer.watch.interrupted = 2


def test_a_reference_outlives_the_checkpoint_that_it_was_read_from(tmp_path):
    """A checkpoint that goes is emptied first: who then reads a file's own pages is killed, without a word."""
    known, file = torch.arange(4096.0), tmp_path / preferences.REFERENCE
    save_file({"train": known}, file)
    trainer = object.__new__(preferences.PreferenceTuner)
    trainer.recipe, trainer.reference = profile("tiny", method="dpo"), {}
    trainer.begin(tmp_path)
    with file.open("r+b") as stream:  # emptied, it would end this process
        stream.write(bytes(file.stat().st_size))
    assert torch.equal(trainer.reference["train"], known)


def test_an_adapter_to_start_from_is_its_own_reference(small, pairs, tmp_path):
    first = our_trainer(settings(small, learning_rate=5e-3), pairs, tmp_path / "first")
    finetune.train(first)
    adapter = finetune.save(first, tmp_path / "first")
    second = our_trainer(settings(small, start_adapter=str(adapter), sft_weight=0.0), pairs, tmp_path / "second")
    finetune.train(second)
    assert logged(second)[0] == pytest.approx(0.693147, abs=1e-4)
    assert (second.reference["train"] - first.reference["train"]).abs().mean() > 0.1  # not the base's
    model, _ = finetune.load_base(config := settings(small, rank=8, start_adapter=str(adapter)))
    with pytest.raises(ValueError, match="trained with rank=4, and here rank is 8: set rank=4"):
        finetune.attach_adapter(model, config)


def test_requests_that_cannot_be_trained(small, pairs, tmp_path):
    with pytest.raises(ValueError, match="holds pairs for a preference method: train with method=dpo"):
        our_trainer(settings(small, method="sft"), pairs, tmp_path)
    with pytest.raises(ValueError, match="label_smoothing is of method=dpo"):
        our_trainer(settings(small, method="orpo", label_smoothing=0.1), pairs, tmp_path)
    conversations = Dataset.from_dict({"input_ids": [[1, 4, 5]], "assistant_masks": [[0, 1, 1]]})
    for name in ("train", "heldout"):
        conversations.save_to_disk(str(tmp_path / "sft" / name))
    with pytest.raises(ValueError, match="pairs of a better and a worse answer: prepare again with use=pairs"):
        finetune.finetune(settings(small), tmp_path / "sft", tmp_path / "out")
    with pytest.raises(ValueError, match="is no adapter: give a folder"):
        our_trainer(settings(small, start_adapter=str(tmp_path)), pairs, tmp_path)
