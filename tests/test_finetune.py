"""Fine-tuning: the same losses as plain PEFT and trl whatever is recomputed, offloaded, packed or fused."""

import random
from pathlib import Path

import pytest
import torch
from datasets import Dataset
from peft import LoraConfig, get_peft_model
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    BitsAndBytesConfig,
    MistralConfig,
    MistralForCausalLM,
    set_seed,
)
from trl import SFTConfig, SFTTrainer

from helpers import batches, finetune
from helpers.models import TINY, profile

STEPS = 20
WORDS = 300


@pytest.fixture(scope="session", autouse=True)
def one_thread():
    torch.set_num_threads(1)


@pytest.fixture(scope="session")
def small(tmp_path_factory) -> Path:
    """A 2-layer cut of Mistral's shape, small width: grouped key-value heads, untied head."""
    folder = tmp_path_factory.mktemp("small")
    torch.manual_seed(1)
    config = MistralConfig(
        vocab_size=WORDS,
        hidden_size=64,
        intermediate_size=192,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=16,
        max_position_embeddings=128,
        sliding_window=None,
        initializer_range=0.1,
    )
    MistralForCausalLM(config).save_pretrained(folder)
    AutoTokenizer.from_pretrained(TINY).save_pretrained(folder)
    return folder


def write_prepared(folder: Path, lengths: list[int], masked: bool = False) -> Path:
    draw = random.Random(0)
    rows = [
        {
            "id": str(place),
            "messages": [{"role": "user", "content": "?"}],
            "input_ids": [1, *(draw.randrange(3, 24) for _ in range(length - 1))],
            "assistant_masks": [
                0,
                *(0 if masked else int(draw.random() < 0.7) for _ in range(length - 2)),
                int(not masked),
            ],
        }
        for place, length in enumerate(lengths)
    ]
    for name, part in (("train", rows), ("heldout", rows[:6])):
        Dataset.from_list(part).save_to_disk(str(folder / name))
    return folder


@pytest.fixture(scope="session")
def prepared(tmp_path_factory) -> Path:
    draw = random.Random(2)
    return write_prepared(tmp_path_factory.mktemp("prepared"), [draw.randrange(6, 40) for _ in range(4 * STEPS)])


@pytest.fixture(scope="session")
def equal_lengths(tmp_path_factory) -> Path:
    return write_prepared(tmp_path_factory.mktemp("equal"), [16] * (4 * STEPS))


def small_config(model: Path, **values):
    values = {"seq_len": 64, "batch_size": 4, "epochs": 1.0, "rank": 4, "alpha": 8, "learning_rate": 1e-2} | values
    return profile("tiny", model=str(model), **values)


def our_trainer(config, prepared: Path, folder: Path):
    model, tokenizer = finetune.load_base(config)
    model = finetune.attach_adapter(model, config)
    return finetune.build_trainer(config, model, tokenizer, prepared, folder / "checkpoints")


def logged_losses(trainer) -> list[float]:
    return [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]


def reference_losses(config, prepared: Path, folder: Path) -> list[float]:
    """The plain recipe: transformers, PEFT and trl with their defaults, fed the same conversations in one order."""
    quantization = BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=torch.float32,
    )
    model = AutoModelForCausalLM.from_pretrained(
        config.model.model, quantization_config=quantization, dtype=torch.float32, device_map="cpu"
    )
    set_seed(config.seed)
    lora = LoraConfig(
        r=config.adapter.rank,
        lora_alpha=config.adapter.alpha,
        target_modules=list(config.adapter.target_modules),
        use_rslora=config.adapter.rslora,
        use_dora=config.adapter.dora,
        task_type="CAUSAL_LM",
    )
    model = get_peft_model(model, lora)
    start = {name: value.detach().clone() for name, value in finetune.adapters(model)}
    rows = finetune.load_split(prepared, "train")
    lengths = [len(ids) for ids in rows["input_ids"]]
    plan = batches.micro_batches(
        lengths, config.train.batch_size, config.data.seq_len, 1.0, config.seed, packing=config.train.packing
    )
    assert all(len(batch) == 4 for batch in plan)
    trainer = SFTTrainer(
        model=model,
        args=SFTConfig(
            output_dir=str(folder),
            per_device_train_batch_size=4,
            max_steps=STEPS,
            learning_rate=config.train.learning_rate,
            lr_scheduler_type=config.train.schedule,
            warmup_steps=round(config.train.warmup_fraction * STEPS),
            optim="adamw_torch",
            bf16=False,
            use_cpu=True,
            logging_steps=1,
            save_strategy="no",
            train_sampling_strategy="sequential",
            gradient_checkpointing=False,
            report_to="none",
            disable_tqdm=True,
            max_length=None,
            dataloader_pin_memory=False,
        ),
        train_dataset=rows.select([row for batch in plan for row in batch]).remove_columns(["id", "messages"]),
        processing_class=AutoTokenizer.from_pretrained(config.model.model, pad_token="<unk>"),
    )
    for name, value in finetune.adapters(trainer.model):
        value.data = start[name]  # trl has rounded it to bf16
    trainer.train()
    return logged_losses(trainer)


@pytest.fixture(scope="session")
def plain_losses(small, prepared, tmp_path_factory):
    return reference_losses(small_config(small), prepared, tmp_path_factory.mktemp("plain"))


@pytest.fixture(scope="session")
def plain_packed_losses(small, equal_lengths, tmp_path_factory):
    config = small_config(small, batch_size=1, packing=True)
    return reference_losses(config, equal_lengths, tmp_path_factory.mktemp("plain"))


VARIANTS = {
    "defaults": {},
    "all layers recompute": {"checkpointing": "all"},
    "attention too": {"checkpointing": "all", "keep_attention": False},
    "one layer recomputes": {"checkpointing": 1, "keep_attention": False},
    "offloaded": {"checkpointing": "all", "keep_attention": False, "offload_activations": True},
    "offloaded, attention kept": {"checkpointing": "all", "offload_activations": True},
    "full loss": {"loss": "full"},
    "packed": {"packing": True, "batch_size": 1, "equal": True},
    "packed, all recompute, offloaded": {
        "packing": True,
        "batch_size": 1,
        "equal": True,
        "checkpointing": "all",
        "offload_activations": True,
    },
    "packed, transformers' layers": {"packing": True, "batch_size": 1, "equal": True, "attention": "math"},
    "packed, transformers' layers, no mask": {"packing": True, "batch_size": 1, "equal": True, "dropout": 1e-9},
    "transformers' layers": {"attention": "math"},
    "transformers' layers, checkpointed": {"attention": "math", "checkpointing": 1},
}


@pytest.mark.parametrize("values", VARIANTS.values(), ids=VARIANTS.keys())
def test_losses_are_those_of_plain_peft_and_trl(values, small, request, tmp_path):
    values = dict(values)
    packed = values.pop("equal", False)  # rows of one length, so that each pack holds as many as a plain batch
    prepared = request.getfixturevalue("equal_lengths" if packed else "prepared")
    plain_losses = request.getfixturevalue("plain_packed_losses" if packed else "plain_losses")
    trainer = our_trainer(small_config(small, **values), prepared, tmp_path)
    measured = finetune.train(trainer)
    ours = logged_losses(trainer)
    assert len(plain_losses) == STEPS
    assert plain_losses[0] - plain_losses[-1] > 0.05  # it learns, or equality would say little
    assert ours == pytest.approx(plain_losses, abs=1e-3)
    assert measured["steps_applied"] == STEPS
