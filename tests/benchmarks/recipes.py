"""The training recipes that are measured, each in one place: load a base, put adapters on it, build a trainer.

`own` goes through helpers/finetune, whose layers choose what they keep; `ours` is what it did before: autograd with
Liger's kernels; `baseline` is what guides do with PEFT's and trl's defaults; `fitcheck` is like t4_fitcheck.csv's rows.
"""

from dataclasses import dataclass, replace
from pathlib import Path

import t4
import torch
from random_model import write_prepared

ATTENTION = ["q_proj", "k_proj", "v_proj", "o_proj"]
ALL_LINEAR = [*ATTENTION, "gate_proj", "up_proj", "down_proj"]


@dataclass(frozen=True)
class Row:
    """One configuration to measure."""

    recipe: str
    batch: int
    seq: int
    checkpointing: str | int = "all"
    rank: int = 16
    targets: str = "all-linear"
    optimizer: str = "paged_adamw_8bit"
    attention: str = "math"
    loss: str = "chunked"
    dropout: float = 0.0
    accumulation: int = 1
    offload: bool = False
    upcast: bool = True
    fused_kernels: bool = False
    double_quant: bool = True
    keep_attention: bool = True
    kernels: str = ""


def own(batch: int, seq: int, checkpointing: str | int = "all", **values) -> Row:
    """A row of helpers/finetune itself."""
    row = Row("own", batch, seq, checkpointing, attention="efficient", upcast=False, kernels="own")
    return replace(row, **values)


def ours(batch: int, seq: int, checkpointing: str | int = "all", **values) -> Row:
    """A row of our recipe: nothing upcast, keys and values repeated before SDPA, Liger's norms, RoPE and SwiGLU."""
    row = Row("ours", batch, seq, checkpointing, attention="efficient", upcast=False, fused_kernels=True)
    return replace(row, **values)


def baseline(batch: int, seq: int, checkpointing: str | int = "all", **values) -> Row:
    """A row of the guides' recipe: prepare_model_for_kbit_training, plain kernels, SDPA that falls to math on 7.5."""
    return replace(Row("baseline", batch, seq, checkpointing), **values)


def fitcheck(batch: int, seq: int, attention: str, **values) -> Row:
    """A row like those of t4_fitcheck.csv: no double quantization, full logits, AdamW in fp32, attention only."""
    plain = {"rank": 32, "targets": "attention", "optimizer": "adamw_torch", "loss": "full", "double_quant": False}
    return Row("fitcheck", batch, seq, "all", attention=attention, **(plain | values))


def layer_count(row: Row, layers: int) -> int:
    """How many layers are checkpointed."""
    return {"all": layers, "none": 0}.get(row.checkpointing, row.checkpointing)


def load(folder: Path, row: Row):
    """helpers.finetune's base, frozen, in fp16 as on a T4, with the row's attention kernel, and its tokenizer."""
    model, tokenizer = t4.fine_tuning_in_fp16().load_base(config_of(row, folder, 1))
    model.config.max_position_embeddings = 10**6  # the memory of a long context does not depend on it
    return model, tokenizer


def adapt(base, row: Row):
    """The base with fresh adapters, its layers checkpointed as the row says."""
    from peft import LoraConfig, get_peft_model, prepare_model_for_kbit_training

    checkpointed = layer_count(row, base.config.num_hidden_layers)
    keywords = {"use_reentrant": False}
    if row.upcast:
        base = prepare_model_for_kbit_training(
            base, use_gradient_checkpointing=checkpointed > 0, gradient_checkpointing_kwargs=keywords
        )
    elif checkpointed:
        base.gradient_checkpointing_enable(keywords)
    if not checkpointed:
        base.gradient_checkpointing_disable()
    base.set_attn_implementation({"efficient": "efficient", "math": "sdpa", "eager": "eager"}[row.attention])
    targets = ALL_LINEAR if row.targets == "all-linear" else ATTENTION
    lora = LoraConfig(
        r=row.rank, lora_alpha=row.rank, lora_dropout=row.dropout, target_modules=targets, bias="none",
        task_type="CAUSAL_LM",
    )  # fmt: skip
    return get_peft_model(base, lora)


def trainer(model, tokenizer, row: Row, dataset, callbacks: list, steps: int, scratch: Path, in_fp32: bool = True):
    """trl's SFTTrainer for a row; in_fp32: its adapters, which trl casts to bf16 and fp16 training cannot unscale."""
    from trl import SFTConfig, SFTTrainer

    checkpointed = layer_count(row, model.config.num_hidden_layers)
    arguments = SFTConfig(
        output_dir=str(scratch),
        per_device_train_batch_size=row.batch,
        gradient_accumulation_steps=row.accumulation,
        max_steps=steps,
        learning_rate=2e-4,
        optim=row.optimizer,
        fp16=True,
        bf16=False,
        max_length=row.seq,
        packing=False,
        report_to="none",
        save_strategy="no",
        logging_steps=1,
        warmup_steps=1,
        gradient_checkpointing=checkpointed > 0,
        gradient_checkpointing_kwargs={"use_reentrant": False},
        activation_offloading=row.offload,
        use_liger_kernel=row.fused_kernels,
        dataset_kwargs={"skip_prepare_dataset": True},
        disable_tqdm=True,
    )
    built = SFTTrainer(
        model=model, args=arguments, train_dataset=dataset, processing_class=tokenizer, callbacks=callbacks
    )
    if in_fp32:
        from helpers.finetune.base import trainable_to_fp32

        trainable_to_fp32(built.model)
    if row.loss == "full":
        built.compute_loss = full_logits_loss
    return built


def full_logits_loss(model, inputs, return_outputs=False, num_items_in_batch=None):
    """transformers' own loss, over all logits at once."""
    outputs = model(input_ids=inputs["input_ids"], labels=inputs["labels"], use_cache=False)
    return (outputs.loss, outputs) if return_outputs else outputs.loss


def config_of(row: Row, folder: Path, steps: int):
    """The RunConfig of a row."""
    from helpers.models import profile

    return profile(
        "mistral-7b",
        model=str(folder),
        batch_size=row.batch,
        seq_len=row.seq,
        checkpointing=row.checkpointing,
        rank=row.rank,
        alpha=row.rank,
        targets=row.targets,
        attention=row.attention,
        optimizer=row.optimizer,
        loss=row.loss,
        dropout=row.dropout,
        accumulation=row.accumulation,
        offload_activations=row.offload,
        double_quant=row.double_quant,
        keep_attention=row.keep_attention,
        max_steps=steps,
        save_steps=1000,
    )


def own_trainer(base, tokenizer, config, callbacks: list, sequences: int, scratch: Path):
    """helpers.finetune's trainer over so many random sequences; nothing is saved."""
    from helpers import finetune

    for module in (base, *base.model.layers):  # an earlier row's custom layers and loss
        module.__dict__.pop("forward", None)
    prepared = write_prepared(scratch / "prepared", Path(config.model.model), sequences, config.data.seq_len)
    model = finetune.attach_adapter(base, config)
    built = finetune.build_trainer(config, model, tokenizer, prepared, scratch / "checkpoints")
    built.args.set_save(strategy="no")
    for callback in callbacks:
        built.add_callback(callback)
    return built


def without_skipped_steps(built):
    """A trainer whose loss scale starts where no step of random weights overflows: each of the few has an update."""
    built.accelerator.scaler = torch.amp.GradScaler("cuda", init_scale=16.0)
    return built
