"""Fine-tuning: a RunConfig becomes a model, an adapter, a trainer, and after training an adapter on disk.

The notebook's way, one function a cell:

    model, tokenizer = load_base(config)
    model = attach_adapter(model, config)
    trainer = build_trainer(config, model, tokenizer, prepared, saves)
    measured = train(trainer)
    save(trainer, output)

and all of it at once: `finetune(config, prepared, output)`.
"""

import importlib.util
import json
import logging
import math
import shutil
import signal
import sys
import time
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
from datasets import Dataset, load_from_disk
from peft import LoraConfig, PeftModel, get_peft_model, set_peft_model_state_dict
from transformers import (
    AutoModelForCausalLM,
    BitsAndBytesConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    PrinterCallback,
    Trainer,
    TrainerCallback,
    set_seed,
)
from trl import SFTConfig, SFTTrainer

from helpers import budget, hardware, workspace
from helpers.budget import planning
from helpers.budget.step import host_room
from helpers.config import RunConfig
from helpers.finetune import batches
from helpers.finetune.engine import layers as decoder
from helpers.finetune.engine import losses
from helpers.finetune.engine.optimizers import FlatOptimizer
from helpers.models import attention, families, gpu, shape
from helpers.models.templates import load_tokenizer, save_tokenizer, tokenizer_identity
from helpers.workspace import checkpoints, files
from helpers.workspace.versions import forget_old_torchao

GIB = 2**30
CHATTY = ("transformers", "trl", "peft", "accelerate", "bitsandbytes", "datasets", "py.warnings")


class NotTrained(ValueError):
    """Training ran and made nothing of use; the message says why and what to change."""


class Precision(NamedTuple):
    """What the frozen weights are computed in, and why."""

    dtype: torch.dtype
    reason: str


def precision(capability: tuple[int, int] | None = None) -> Precision:
    """fp16 below compute capability 8, bf16 from there on, fp32 without a GPU; of this machine unless said.

    >>> precision((7, 5)).dtype, precision((8, 0)).dtype
    (torch.float16, torch.bfloat16)
    """
    if capability is None and not torch.cuda.is_available():
        return Precision(torch.float32, "fp32: there is no GPU, and a CPU computes 16 bits slower than 32")
    major, minor = capability or torch.cuda.get_device_capability()
    if major < 8:  # torch.cuda.is_bf16_supported() says True here: it counts emulation
        return Precision(torch.float16, f"fp16: compute capability {major}.{minor} has no bf16 hardware")
    return Precision(torch.bfloat16, f"bf16: compute capability {major}.{minor} has it, and it needs no loss scaling")


@gpu.gives_back
def finetune(config: RunConfig, prepared: Path, output: Path, resume: str = "auto") -> dict[str, Any]:
    """Train an adapter on a prepared dataset: output/adapter and output/log.json; returns what was measured.

    resume: "auto" continues from the newest whole checkpoint in <output>.partial, "never" starts anew. Raises
    ValueError for what can be mended by the reader: an empty dataset, a rank too large, a model that needs a GPU.
    """
    prepared, output = Path(prepared), Path(output)
    if resume not in ("auto", "never"):
        raise ValueError(f"resume must be auto or never, not {resume!r}")
    workspace.fetch(prepared)
    load_split(prepared, "train")  # a dataset that is not there is said before anything is loaded or written
    refuse_without_gpu(config)  # before a tokenizer is asked for on the hub
    check_tokenizer(prepared, config)
    with workspace.building(output, "finetune", config, {"prepared": prepared}, keep=True) as stage:
        for file in stage.folder.iterdir():  # of an end that failed
            if file.name != workspace.SCRATCH:
                shutil.rmtree(file) if file.is_dir() else file.unlink()
        saves = stage.folder / workspace.SCRATCH
        found = look(config, prepared, saves) if resume == "auto" else checkpoints.Found("none")
        config = stage.config = planned(config, found.to_continue())
        with quiet(stage.folder / "libraries.log"):
            model, tokenizer = load_base(config)
            model = attach_adapter(model, config)
            trainer = build_trainer(config, model, tokenizer, prepared, saves)
            stage.measurements.update(train(trainer, resume))
            save(trainer, stage.folder)
    return stage.measurements


def look(config: RunConfig, prepared: Path, saves: Path) -> checkpoints.Found:
    """The checkpoint that training goes on from, fetched. Raises checkpoints.ChangedRun for other settings or data."""
    wanted = checkpoints.identity(config, workspace.identify(Path(prepared))["sha256"])
    return checkpoints.fetch(checkpoints.lasting(saves), saves, wanted)


def plan(config: RunConfig, output: Path, machine: hardware.Machine | None = None, resume: str = "auto") -> budget.Plan:
    """How training into output computes its steps on a machine (this one unless said).

    As the checkpoint that it goes on from did, where there is one; else the fastest way that fits. So a run that began
    on a T4 goes on on an L4, and is predicted as it runs.
    """
    saves = workspace.beside(Path(output), "partial") / workspace.SCRATCH
    checkpoint = checkpoints.to_be_continued(saves, config) if resume == "auto" else None
    return plan_from(config, checkpoint, machine or hardware.probe())


def plan_from(config: RunConfig, checkpoint: Path | None, machine: hardware.Machine) -> budget.Plan:
    """The plan in a checkpoint's own micro-batches: laid out otherwise, its next steps would be other steps."""
    sizes = shape(config.model.model, config.model.revision)
    made = checkpoints.split_of(checkpoint) if checkpoint else {}
    if not made:
        return budget.plan(config, sizes, machine)
    return budget.plan_in(config, made["batch_size"], sizes, machine, checkpoint.name)


def planned(config: RunConfig, checkpoint: Path | None = None) -> RunConfig:
    """The configuration that trains: with a number for checkpointing="auto", in the micro-batches of a checkpoint.

    Others stay as they are, but for host memory, of which no configuration gets more than half of what is free. Says
    so when the micro-batches are others than the configuration's. Raises budget.DoesNotFit (a ValueError) when they do
    not fit this machine however much is recomputed, or when no way of training fits.
    """
    machine = hardware.probe()
    if machine.unusable:
        raise ValueError(machine.unusable)
    made = checkpoints.split_of(checkpoint) if checkpoint else {}
    same = all(getattr(config.train, name) == value for name, value in made.items())
    if same and config.train.checkpointing != "auto":
        return planning.within_host(config, machine)
    sizes = shape(config.model.model, config.model.revision)
    settled = budget.settle(config, sizes, machine, plan_from(config, checkpoint, machine))
    budget.check(settled.budget)
    if not same:
        print("; ".join(settled.plan.reasons))
    return settled.config


def load_base(config: RunConfig) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """The frozen base in the configured weights, and its tokenizer. Nothing is upcast to fp32 unless config asks.

    Raises ValueError, before anything is downloaded, for a model or targets that cannot be trained.
    """
    sizes = shape(config.model.model, config.model.revision)
    families.refuse(sizes.family, sizes.name, config.adapter.target_modules)
    refuse_without_gpu(config)
    dtype = precision().dtype
    quantization = {
        "nf4": lambda: BitsAndBytesConfig(
            load_in_4bit=True,
            bnb_4bit_quant_type="nf4",
            bnb_4bit_use_double_quant=config.model.double_quant,
            bnb_4bit_compute_dtype=dtype,
        ),
        "int8": lambda: BitsAndBytesConfig(load_in_8bit=True),
        "fp16": lambda: None,
    }[config.model.weights]()
    implementation = {"efficient": attention.register, "eager": lambda: "eager", "math": lambda: "sdpa"}
    model = AutoModelForCausalLM.from_pretrained(
        config.model.model,
        revision=config.model.revision,
        quantization_config=quantization,
        device_map={"": 0} if torch.cuda.is_available() else "cpu",
        dtype=dtype,
        attn_implementation=implementation[families.attention(sizes.family, config.model.attention).kernel](),
    )
    model.config.use_cache = False
    model.requires_grad_(False)
    for module in model.modules():
        if hasattr(module, "support_avx512bf16_for_cpu"):
            module.support_avx512bf16_for_cpu = False  # answering once would repack the weights: no gradients after
    if config.model.upcast:
        for name, parameter in model.named_parameters():
            matrix = ".layers." in name and parameter.dim() > 1  # left in 16 bits where they are not quantized either
            if parameter.dtype in (torch.float16, torch.bfloat16) and not matrix:
                parameter.data = parameter.data.float()
    return model, load_tokenizer(config.model.model, config.model.revision)


def check_tokenizer(prepared: Path, config: RunConfig) -> None:
    """Raise ValueError when the rows were written with another tokenizer or template than the adapter will carry."""
    manifest = prepared / workspace.MANIFEST
    made = workspace.read_manifest(prepared)["measurements"].get("tokenizer") if manifest.is_file() else None
    if made not in (None, tokenizer_identity(load_tokenizer(config.model.model, config.model.revision))):
        raise workspace.StaleArtifact(
            f"{prepared} was written with another tokenizer or chat template than that of {config.model.model} now: "
            f"run notebook {workspace.NOTEBOOKS['prepare']} again"
        )


def refuse_without_gpu(config: RunConfig) -> None:
    """Raise ValueError where a CPU would train for weeks."""
    billions = shape(config.model.model, config.model.revision).parameters / 1e9
    if billions > 1 and not torch.cuda.is_available():
        raise ValueError(
            f"{config.model.model} has {billions:.1f}e9 parameters and this machine has no GPU that PyTorch sees: "
            "choose a GPU (in Colab: Runtime > Change runtime type > T4), or the profile tiny, made for a CPU"
        )


def attach_adapter(model: PreTrainedModel, config: RunConfig) -> PeftModel:
    """LoRA on the target modules, trainable weights in fp32, the same start for the same seed."""
    check_targets(model, config)
    set_seed(config.seed)
    lora = LoraConfig(
        r=config.adapter.rank,
        lora_alpha=config.adapter.alpha,
        lora_dropout=config.adapter.dropout,
        target_modules=list(config.adapter.target_modules),
        use_rslora=config.adapter.rslora,
        use_dora=config.adapter.dora,
        bias="none",
        task_type="CAUSAL_LM",
        revision=config.model.revision,
    )
    forget_old_torchao()
    model = get_peft_model(model, lora)
    trainable_to_fp32(model)
    return model


def check_targets(model: PreTrainedModel, config: RunConfig) -> None:
    """Raise ValueError for a target that the model lacks, or a rank larger than the smallest target."""
    family = families.of(model.config.to_dict())
    families.refuse(family, config.model.model, config.adapter.target_modules)
    linears: dict[str, int] = {}
    for name, module in model.named_modules():
        if isinstance(module, torch.nn.Linear) and ".layers." in name:
            leaf = name.rsplit(".", 1)[-1]
            linears[leaf] = min(linears.get(leaf, math.inf), module.in_features, module.out_features)
    for target in config.adapter.target_modules:
        if config.adapter.rank > linears[target]:
            raise ValueError(
                f"rank={config.adapter.rank} is larger than {target}, whose smaller side is {linears[target]}: "
                f"choose a rank of at most {linears[target]}"
            )


def trainable_to_fp32(model: torch.nn.Module) -> None:
    """Adapters in fp32: trl casts those of a 4-bit model to bf16, which fp16's loss scaling cannot unscale."""
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data = parameter.data.float()


def build_trainer(
    config: RunConfig, model: PeftModel, tokenizer: PreTrainedTokenizerBase, prepared: Path, saves: Path
) -> "FineTuner":
    """trl's trainer over micro-batches laid out beforehand; nothing has run yet.

    prepared: folder with train/ and heldout/ as `prepare` writes them. saves: where checkpoints go while it trains.
    """
    refuse_without_liger(config)
    asked, rows, heldout = config.train, load_split(prepared, "train"), load_split(prepared, "heldout")
    check_rows(rows, config, model)
    lengths = [len(ids) for ids in rows["input_ids"]]
    plan = batches.micro_batches(
        lengths,
        batch_size=asked.batch_size,
        seq_len=config.data.seq_len,
        epochs=asked.epochs,
        seed=config.seed,
        packing=asked.packing,
        micro_batch_limit=asked.max_steps and asked.max_steps * asked.accumulation,
    )
    heldout_plan = batches.grouped(list(range(len(heldout))), [0] * len(heldout), asked.batch_size)
    evaluates = asked.eval_steps is not None and len(heldout) > 0
    if asked.patience and not evaluates:
        raise ValueError("patience needs eval_steps and held-out conversations: set eval_steps, or leave patience out")
    base, dtype = model.get_base_model(), precision().dtype
    sample = max(rows[:32]["input_ids"], key=len)
    with losses.transformers_attention(base):
        theirs = losses.own_forward_loss(base, sample, dtype)
    losses.install(base, asked.loss)
    own_layers, layers_reason = choose_layers(model, config)
    arguments = training_arguments(config, saves, math.ceil(len(plan) / asked.accumulation), evaluates)
    arguments.activation_offloading = asked.offload_activations and not own_layers and torch.cuda.is_available()
    trainer = FineTuner(
        model=model,
        args=arguments,
        train_dataset=Dataset.from_dict({"split": ["train"] * len(plan), "rows": plan}),
        eval_dataset=Dataset.from_dict({"split": ["heldout"] * len(heldout_plan), "rows": heldout_plan})
        if heldout_plan
        else None,
        processing_class=tokenizer,
        data_collator=partial(
            gather,
            splits={"train": rows, "heldout": heldout},
            pad_id=tokenizer.pad_token_id or 0,
            packing=asked.packing,
            by_bounds=base.config._attn_implementation == attention.NAME,
        ),
    )
    trainable_to_fp32(trainer.model)
    if torch.cuda.is_available() and "8bit" in asked.optimizer:
        trainer.optimizer = eight_bit_optimizer(trainer.model, config)
    trainer.remove_callback(PrinterCallback)
    trainer.loss_check = losses.check(theirs, losses.own_forward_loss(base, sample, dtype), dtype, len(sample))
    if torch.cuda.is_available():
        torch.cuda.empty_cache()  # what the two passes held is not training's
    trainer.recipe = config
    trainer.layers_reason = layers_reason
    trainer.token_counts = batches.token_counts(plan, lengths, asked.packing)
    trainer.heldout_labels_per_batch = label_count(heldout) / max(1, len(heldout_plan))
    trainer.identity = checkpoints.identity(config, workspace.identify(Path(prepared))["sha256"])
    trainer.watch = Watch(trainer, config)
    trainer.add_callback(trainer.watch)
    return trainer


def training_arguments(config: RunConfig, saves: Path, steps: int, evaluates: bool) -> SFTConfig:
    """The trainer's arguments for so many optimizer steps."""
    asked, dtype, on_gpu = config.train, precision().dtype, torch.cuda.is_available()
    arguments = SFTConfig(
        output_dir=str(saves),
        per_device_train_batch_size=1,  # an item of the dataset is a micro-batch already
        per_device_eval_batch_size=1,
        gradient_accumulation_steps=asked.accumulation,
        num_train_epochs=1,  # the plan holds all epochs
        max_steps=steps,
        learning_rate=asked.learning_rate,
        lr_scheduler_type=asked.schedule,
        warmup_steps=round(asked.warmup_fraction * steps),
        weight_decay=asked.weight_decay,
        max_grad_norm=asked.max_grad_norm,
        optim=asked.optimizer if on_gpu else "adamw_torch",  # the 8-bit optimizers need a GPU
        neftune_noise_alpha=asked.neftune_alpha or None,
        fp16=dtype == torch.float16,
        bf16=dtype == torch.bfloat16,
        use_cpu=not on_gpu,
        gradient_checkpointing=False,  # helpers decide layer by layer
        use_liger_kernel=asked.kernels == "liger",
        logging_steps=1,
        logging_nan_inf_filter=False,  # a NaN must be seen
        save_strategy="steps",
        save_steps=asked.save_steps,
        eval_strategy="steps" if evaluates else "no",
        eval_steps=asked.eval_steps,
        prediction_loss_only=True,
        seed=config.seed,
        data_seed=config.seed,
        train_sampling_strategy="sequential",
        remove_unused_columns=False,
        dataset_kwargs={"skip_prepare_dataset": True},
        dataloader_pin_memory=on_gpu,
        disable_tqdm=True,
        report_to="none",
        max_length=None,
    )
    # A process trains on one card, however many it sees: with more the Trainer would split batches over all of them
    # (nn.DataParallel), which trl refuses. Setting CUDA_VISIBLE_DEVICES here would be too late in a notebook.
    arguments._n_gpu = min(arguments.n_gpu, 1)
    return arguments


def load_split(prepared: Path, name: str) -> Dataset:
    """One split of a prepared folder. Raises ValueError when it is not there."""
    folder = Path(prepared) / name
    if not folder.is_dir():
        raise workspace.MissingArtifact(f"{folder} is not there: run notebook {workspace.NOTEBOOKS['prepare']} first")
    if not any(folder.glob("*.arrow")):  # an empty one has no file, and load_from_disk cannot read it
        return Dataset.from_dict({"input_ids": [], "assistant_masks": []})
    rows = load_from_disk(str(folder))
    if "chosen_ids" in rows.column_names:
        raise ValueError(
            f"{prepared} holds pairs for a preference method: prepare again with use=chosen to train on them"
        )
    return rows


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
    """The tensors of one planned micro-batch."""
    (item,) = items
    rows = splits[item["split"]]
    return batches.collate([rows[row] for row in item["rows"]], pad_id, packing, by_bounds)


def eight_bit_optimizer(model: PeftModel, config: RunConfig) -> FlatOptimizer:
    """AdamW with states in 8 bits (https://arxiv.org/abs/2110.02861), in paged memory if so configured."""
    from bitsandbytes.optim import AdamW

    make = partial(
        AdamW,
        lr=config.train.learning_rate,
        weight_decay=config.train.weight_decay,
        optim_bits=8,
        is_paged=config.train.optimizer == "paged_adamw_8bit",
    )
    return FlatOptimizer((value for _, value in adapters(model)), make)


def refuse_without_liger(config: RunConfig) -> None:
    """Raise ValueError where Liger's kernels are asked for and cannot run."""
    asked = {"kernels=liger": config.train.kernels == "liger", "loss=fused": config.train.loss == "fused"}
    there = torch.cuda.is_available() and importlib.util.find_spec("liger_kernel") is not None
    for setting in (name for name, wanted in asked.items() if wanted and not there):
        raise ValueError(
            f"{setting} needs a GPU and the package liger-kernel (pip install liger-kernel): the defaults kernels=own "
            "and loss=chunked need neither and are as fast"
        )


def choose_layers(model: PeftModel, config: RunConfig) -> tuple[bool, str]:
    """Let exactly as many decoder layers recompute as configured: (whether our own layers compute, that in words)."""
    base = model.get_base_model()
    layers, wanted = base.model.layers, config.train.checkpointing
    count = {"all": len(layers), "auto": len(layers), "none": 0}.get(wanted, wanted)  # auto: nobody planned
    if count > len(layers):
        raise ValueError(f"checkpointing={count} layers, but this model has {len(layers)}: choose 0 to {len(layers)}")
    decided = families.layers(families.of(base.config.to_dict()), config)
    if decided.computes == "own":
        decoder.check(base)
        checked = "attention" if config.train.keep_attention else "input"
        keeps = [checked] * count + ["everything"] * (len(layers) - count)
        decoder.install(base, keeps, host_room(config) if config.train.offload_activations else 0)
        return True, f"{count} of {len(layers)} layers recompute, through helpers.finetune.engine.layers"
    if count:
        base.gradient_checkpointing_enable({"use_reentrant": False})
        for place, layer in enumerate(layers):
            layer.gradient_checkpointing = place < count
    return False, f"{count} of {len(layers)} layers recompute, through transformers' layers: {decided.reason}"


class FineTuner(SFTTrainer):
    """trl's trainer with the model's own loss, checkpoints that are whole or not there, and a watch on the updates."""

    send = staticmethod(lambda checkpoint: None)
    """Called with each checkpoint that was written."""
    origin: checkpoints.Origin | None = None
    """Whose its checkpoints are."""

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        """The model's loss, summed over labels and divided by those of the whole step (held out: of the mean batch)."""
        if not model.training:
            num_items_in_batch = self.heldout_labels_per_batch
        return Trainer.compute_loss(self, model, inputs, return_outputs, num_items_in_batch)

    def floating_point_ops(self, inputs):
        """0: counting them walks all modules at every step."""
        return 0

    def _save_checkpoint(self, model, trial):
        """Whole or not there: transformers writes into the final place (trap 17)."""
        folder, best = Path(self.args.output_dir), self.state.best_global_step
        keep, spared = self.recipe.train.keep_checkpoints, [best] if best else []
        with checkpoints.writing(
            folder, self.state.global_step, self.identity, keep, spared, self.send, origin=self.origin
        ) as beside:
            self._beside = beside.parent
            try:
                Trainer._save_checkpoint(self, model, trial)
            finally:
                self._beside = None

    def _get_output_dir(self, trial):
        return str(getattr(self, "_beside", None) or self.args.output_dir)


class Watch(TrainerCallback):
    """Looks on while it trains: shows progress, counts updates that were applied, stops what goes wrong."""

    patience_for_overflow = 20
    """Optimizer steps in a row that fp16's loss scaling may skip; from 65,536 down to 1 takes 16."""

    def __init__(self, trainer: FineTuner, config: RunConfig):
        self.trainer, self.config = trainer, config
        self.start = {name: value.detach().to("cpu", copy=True) for name, value in adapters(trainer.model)}
        self.applied = self.skipped_in_a_row = 0
        self.step_s: list[float] = []
        self.interrupted: int | None = None

    def on_train_begin(self, args, state, control, **kwargs):
        from tqdm.auto import tqdm

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
                f"lower learning_rate (now {self.config.train.learning_rate:g}) or alpha, or use a card with bf16"
            )

    def on_step_end(self, args, state, control, **kwargs):
        self.step_s.append(time.perf_counter() - self.began)
        self.bar.update(state.global_step - self.bar.n)
        if self.interrupted is not None:
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
        if worse == 0:
            state.best_global_step, state.best_metric = state.global_step, found[-1]
            control.should_save = True
        elif worse >= self.config.train.patience:
            control.should_training_stop = True

    def on_train_end(self, args, state, control, **kwargs):
        self.bar.close()


def adapters(model: torch.nn.Module) -> Iterator[tuple[str, torch.nn.Parameter]]:
    """Trainable parameters by name."""
    return ((name, value) for name, value in model.named_parameters() if value.requires_grad)


def train(trainer: FineTuner, resume: str = "auto") -> dict[str, Any]:
    """Train, from the newest whole checkpoint unless resume is "never"; returns what was measured.

    An interrupt (Ctrl-C, a notebook's stop button, SIGTERM) lets the step finish, saves a checkpoint and stops. Raises
    NotTrained when the loss is NaN, no update was applied, or no adapter differs from its start; StorageError when
    there may be a checkpoint and it cannot be read or fetched. Checkpoints of an earlier run, here and in the lasting
    place, go when the first one of this run is whole there, not before.
    """
    folder, keep = Path(trainer.args.output_dir), trainer.recipe.train.keep_checkpoints
    lasting = checkpoints.lasting(folder)
    found = checkpoints.fetch(lasting, folder, trainer.identity) if resume == "auto" else checkpoints.Found("none")
    checkpoint = found.to_continue()
    with files.reached(lasting or folder, "nothing was changed or deleted"):
        trainer.origin = checkpoints.origin(checkpoint, folder, lasting)
    if checkpoint is not None:
        print(f"continuing from {checkpoint.name}")
    watch, on_gpu = trainer.watch, torch.cuda.is_available()
    if on_gpu:
        torch.cuda.reset_peak_memory_stats()
    before_gib = torch.cuda.memory_allocated() / GIB if on_gpu else 0.0
    started = time.perf_counter()
    with interrupts(watch), checkpoints.sending(lasting, keep) as trainer.send:
        trainer.train(resume_from_checkpoint=str(checkpoint) if checkpoint else None)
    train_s = time.perf_counter() - started
    if watch.interrupted is not None:
        raise KeyboardInterrupt(f"stopped after step {trainer.state.global_step}; run again to continue from there")
    changed = sum(not torch.equal(watch.start[name], value.detach().cpu()) for name, value in adapters(trainer.model))
    if (not watch.applied and watch.step_s) or not changed:
        raise NotTrained(
            f"{watch.applied} of {len(watch.step_s)} optimizer steps were applied and {changed} adapter weights differ "
            "from their start: raise learning_rate or max_steps (fp16 skips the first steps while it finds its scale)"
        )
    load_best(trainer)
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    busy_s = sum(watch.step_s)
    share = len(watch.step_s) / trainer.state.max_steps
    return {
        "precision": precision().reason,
        "layers": trainer.layers_reason,
        "loss_check": trainer.loss_check,
        "loss_first": losses[0],
        "loss_last": sum(losses[-10:]) / len(losses[-10:]),
        "steps": trainer.state.global_step,
        "steps_applied": trainer.state.global_step - (len(watch.step_s) - watch.applied),
        "adapters_changed": changed,
        "text_tokens": trainer.token_counts["text"],
        "padding_tokens": trainer.token_counts["padding"],
        "tokens_per_s": round(share * trainer.token_counts["text"] / busy_s, 1) if busy_s else None,
        "train_s": round(train_s, 2),
        "step_s": round(sorted(watch.step_s)[len(watch.step_s) // 2], 4) if watch.step_s else None,
        "before_allocated_gib": round(before_gib, 3),
        "peak_allocated_gib": round(torch.cuda.max_memory_allocated() / GIB, 3) if on_gpu else 0.0,
        "peak_reserved_gib": round(torch.cuda.max_memory_reserved() / GIB, 3) if on_gpu else 0.0,
        "heldout_loss": trainer.evaluate()["eval_loss"] if trainer.eval_dataset is not None else None,
        "resumed_from_step": checkpoints.step_of(checkpoint) if checkpoint else 0,
        "run": trainer.origin["run"],
        **checkpoints.summary(folder),
    }


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


def load_best(trainer: FineTuner) -> None:
    """With patience, the adapter of the best evaluation, unless it is the last one's anyway."""
    from safetensors.torch import load_file

    kept = Path(trainer.args.output_dir) / f"checkpoint-{trainer.state.best_global_step}"
    if not trainer.recipe.train.patience or trainer.state.best_global_step is None:
        return
    if kept.is_dir():
        set_peft_model_state_dict(trainer.model, load_file(str(kept / "adapter_model.safetensors")))
    else:
        print(f"{kept.name}, the best on held-out conversations, is no longer there: the last adapter is kept instead")


def save(trainer: FineTuner, output: Path) -> Path:
    """output/adapter (PEFT's format, its tokenizer) and output/log.json (the trainer's log); returns the adapter's."""
    output = Path(output)
    trainer.model.save_pretrained(str(output / "adapter"))
    save_tokenizer(trainer.processing_class, output / "adapter")
    workspace.write_text(output / "log.json", json.dumps(trainer.state.log_history, indent=1))
    return output / "adapter"


@contextmanager
def quiet(log: Path) -> Iterator[None]:
    """Let the libraries write their notices and warnings to a file instead of the notebook."""
    handler = logging.FileHandler(log, encoding="utf-8")
    handler.setFormatter(logging.Formatter("%(asctime)s %(name)s %(levelname)s %(message)s"))
    loggers = [logging.getLogger(name) for name in CHATTY]
    before = [(logger, logger.handlers[:], logger.propagate) for logger in loggers]
    for logger in loggers:
        logger.handlers, logger.propagate = [handler], False
    logging.captureWarnings(True)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("default")
            yield
    finally:
        logging.captureWarnings(False)
        for logger, handlers, propagate in before:
            logger.handlers, logger.propagate = handlers, propagate
        handler.close()
