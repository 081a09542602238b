"""The training recipes that are measured, each in one place: load a base, put adapters on it, build a trainer.

`own` goes through helpers/finetune, whose layers choose what they keep; `ours` is what it did before: autograd with
Liger's kernels; `baseline` is what guides do with PEFT's and trl's defaults; `fitcheck` is like t4_fitcheck.csv's rows.
"""

import importlib.util
import sys
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch.nn.functional import scaled_dot_product_attention

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


def register_repeated_attention() -> None:
    """SDPA over repeated keys and values, which keeps its memory-efficient kernel on 7.5 (FACTS' trap 2)."""
    from transformers import AttentionInterface
    from transformers.integrations.sdpa_attention import repeat_kv

    def attend(module, query, key, value, attention_mask, dropout=0.0, scaling=None, **_):
        groups = module.num_key_value_groups
        causal = query.shape[2] > 1 and attention_mask is None
        key, value = repeat_kv(key, groups), repeat_kv(value, groups)
        out = scaled_dot_product_attention(
            query, key, value, attn_mask=attention_mask, dropout_p=dropout, scale=scaling, is_causal=causal
        )
        return out.transpose(1, 2).contiguous(), None

    AttentionInterface.register("measured_repeat_kv", attend)


def attention_name(row: Row) -> str:
    """The attention implementation of a row, as transformers names it; "math" is what sdpa falls to on 7.5."""
    return {"efficient": "measured_repeat_kv", "math": "sdpa", "eager": "eager"}[row.attention]


def load(folder: Path, row: Row):
    """An NF4 base on the GPU: (model, tokenizer)."""
    from transformers import AutoModelForCausalLM, AutoTokenizer, BitsAndBytesConfig

    register_repeated_attention()
    quantization = BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=row.double_quant,
        bnb_4bit_compute_dtype=torch.float16,
    )
    model = AutoModelForCausalLM.from_pretrained(
        folder,
        quantization_config=quantization,
        device_map={"": 0},
        dtype=torch.float16,
        attn_implementation=attention_name(row),
    )
    return model, AutoTokenizer.from_pretrained(folder)


def adapt(base, row: Row):
    """The base with fresh adapters, its layers checkpointed as the row says."""
    from peft import LoraConfig, get_peft_model, prepare_model_for_kbit_training

    checked = layer_count(row, base.config.num_hidden_layers)
    keywords = {"use_reentrant": False}
    if row.upcast:
        base = prepare_model_for_kbit_training(
            base, use_gradient_checkpointing=checked > 0, gradient_checkpointing_kwargs=keywords
        )
    else:
        for parameter in base.parameters():
            parameter.requires_grad_(False)
        if checked:
            base.gradient_checkpointing_enable(keywords)
    if not checked:
        base.gradient_checkpointing_disable()
    base.config.use_cache = False
    base.set_attn_implementation(attention_name(row))
    lora = LoraConfig(
        r=row.rank,
        lora_alpha=row.rank,
        lora_dropout=row.dropout,
        target_modules=ALL_LINEAR if row.targets == "all-linear" else ATTENTION,
        bias="none",
        task_type="CAUSAL_LM",
    )
    return get_peft_model(base, lora)


def trainer(model, tokenizer, row: Row, dataset, callbacks: list, steps: int, layers: int, scratch: Path):
    """trl's SFTTrainer for a row; its adapters in fp32 (FACTS' trap 1) and a loss scale that skips no step."""
    from trl import SFTConfig, SFTTrainer

    checked = layer_count(row, layers)
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
        gradient_checkpointing=checked > 0,
        gradient_checkpointing_kwargs={"use_reentrant": False},
        activation_offloading=row.offload,
        use_liger_kernel=row.fused_kernels,
        dataset_kwargs={"skip_prepare_dataset": True},
        disable_tqdm=True,
    )
    built = SFTTrainer(
        model=model, args=arguments, train_dataset=dataset, processing_class=tokenizer, callbacks=callbacks
    )
    for parameter in built.model.parameters():
        if parameter.requires_grad:
            parameter.data = parameter.data.float()
    built.accelerator.scaler = torch.amp.GradScaler("cuda", init_scale=16.0)
    if row.loss == "full":
        built.compute_loss = full_logits_loss
    return built


def full_logits_loss(model, inputs, return_outputs=False, num_items_in_batch=None):
    """transformers' own loss, over all logits at once."""
    outputs = model(input_ids=inputs["input_ids"], labels=inputs["labels"], use_cache=False)
    return (outputs.loss, outputs) if return_outputs else outputs.loss


def config_of(row: Row, folder: Path, steps: int):
    """The RunConfig of an own row."""
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


def load_own(folder: Path, row: Row):
    """helpers.finetune's base, in fp16 as on a T4, and its tokenizer."""
    from helpers import finetune

    finetune.precision = lambda *_: finetune.Precision(torch.float16, "as on a T4")
    model, tokenizer = finetune.load_base(config_of(row, folder, 1))
    model.config.max_position_embeddings = 10**6  # the memory of a long context does not depend on it
    return model, tokenizer


def own_trainer(base, tokenizer, row: Row, folder: Path, callbacks: list, steps: int, scratch: Path):
    """helpers.finetune's trainer for a row, with a loss scale that skips no step."""
    from helpers import finetune
    from helpers.finetune import verify

    for layer in base.model.layers:  # an earlier row's own layers and loss
        layer.__dict__.pop("forward", None)
    base.__dict__.pop("forward", None)
    config = config_of(row, folder, steps)
    verify.write_rows(scratch / "prepared", steps * row.batch * row.accumulation, row.seq, base.config.vocab_size)
    model = finetune.attach_adapter(base, config)
    built = finetune.build_trainer(config, model, tokenizer, scratch / "prepared", scratch / "checkpoints")
    built.args.set_save(strategy="no")
    for callback in callbacks:
        built.add_callback(callback)
    built.accelerator.scaler = torch.amp.GradScaler("cuda", init_scale=16.0)
    return built


def find_helpers() -> None:
    """The project's own helpers, when this script is run from anywhere."""
    if importlib.util.find_spec("helpers") is None:
        sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
