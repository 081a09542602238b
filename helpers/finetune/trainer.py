"""trl's trainer as it is used here: its arguments, its loss, its layers, its optimizer and its checkpoints.

With several ranks it trains through PyTorch's DistributedDataParallel (DDP, https://arxiv.org/abs/2006.15704), which
averages gradients over GPUs once a step, while the backward pass of the step's last micro-batch still runs: in buckets
of 25 MiB, each sent when the last of its gradients is there. LayerFunction hands over the adapter gradients of one
decoder layer at a time, the last layer first, so a bucket leaves every few layers. What cannot overlap is the bucket
of the first layers, for nothing is computed after it; a 7B's adapters of rank 16 are 160 MiB in fp32, seven buckets.
"""

import importlib.util
import math
import os
import tempfile
from collections.abc import Iterator
from functools import partial
from pathlib import Path

import torch
from datasets import Dataset
from peft import PeftModel
from safetensors.torch import load_file
from torch.nn.parallel import DistributedDataParallel
from transformers import PreTrainedTokenizerBase, PrinterCallback, Trainer
from trl import SFTConfig, SFTTrainer

from helpers import workspace
from helpers.budget import vram
from helpers.budget.step import host_room
from helpers.config import RunConfig
from helpers.finetune import base, batches, ranks, sharded, zero
from helpers.finetune.base import adapters, trainable_to_fp32
from helpers.finetune.data import check_rows, gather, label_count, load_split
from helpers.finetune.engine import layers as decoder
from helpers.finetune.engine import losses
from helpers.finetune.engine.optimizers import FlatOptimizer
from helpers.finetune.watch import Watch
from helpers.models import attention, families
from helpers.workspace import checkpoints


class FineTuner(SFTTrainer):
    """trl's trainer with the model's own loss, checkpoints that are whole or not there, and a watch on the updates."""

    send = staticmethod(lambda checkpoint: None)
    """Called with each checkpoint that was written."""
    origin: checkpoints.Origin | None = None
    """Whose its checkpoints are."""
    recipe: RunConfig = RunConfig()
    """What it was asked for."""
    told_of_pairs: tuple[str, ...] = ()
    """Figures beside the loss that its evaluations give."""
    whole: dict | None = None
    """Of divided weights, while it saves: what is trained and the optimizer's state as one rank alone has them."""

    def begin(self, checkpoint: Path | None) -> None:
        """What must be known before the first step, or be read from the checkpoint that training goes on from."""

    def keep_with(self, checkpoint: Path) -> None:
        """Write into a checkpoint what `begin` reads."""

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        """The model's loss, summed over labels and divided by those of the whole step (held out: of the mean batch)."""
        if not model.training:
            # transformers multiplies by the number of ranks, because DDP averages gradients; this is no gradient
            num_items_in_batch = self.heldout_labels_per_batch * ranks.count()
        return Trainer.compute_loss(self, model, inputs, return_outputs, num_items_in_batch)

    def floating_point_ops(self, inputs):
        """0: counting them walks all modules at every step."""
        return 0

    def store_flos(self):
        """Nothing: there are none to sum over ranks, which transformers would do at every step and in a checkpoint."""

    def _wrap_model(self, model, training=True, dataloader=None):
        """With several ranks: gradients lie in DDP's buckets, not beside them, and frozen weights are not sent about.

        Each rank has read those from disk itself; for a 7B in NF4 it would be 3.9 GB. What is trained is made equal.
        """
        wrapped = super()._wrap_model(
            model, training, dataloader
        )  # older versions of transformers make ddp_handler there
        if ranks.count() > 1 and training and not self.divides():
            self.accelerator.ddp_handler.gradient_as_bucket_view = True
            frozen = [name for name, value in model.named_parameters() if not value.requires_grad]
            own = [*frozen, *(name for name, _ in model.named_buffers())]
            DistributedDataParallel._set_params_and_buffers_to_ignore_for_model(model, own)
        return wrapped

    def _save_checkpoint(self, model, trial):
        """Whole or not there: transformers writes straight into the final place, where a killed write would be found.

        https://github.com/huggingface/transformers/issues/35782. Rank 0 writes all of it, the others' random states
        too, and meets them at no barrier meanwhile: when its disk is full they would wait there for ever.
        """
        states = ranks.gathered(None if ranks.is_first() else self.random_state())
        if sharded.is_divided(self.model):
            self.whole = {
                "weights": sharded.trained(self.model),
                "optimizer": sharded.optimizer_state(self.optimizer.optimizer),
            }
        elif self.divides():
            self.whole = {"weights": dict(self.trained()), "optimizer": self.optimizer.optimizer.state_dict()}
        if not ranks.is_first():
            return
        folder, best = Path(self.args.output_dir), self.state.best_global_step
        keep, spared = self.recipe.train.keep_checkpoints, [best] if best else []
        with checkpoints.writing(
            folder, self.state.global_step, self.identity, keep, spared, self.send, origin=self.origin
        ) as beside:
            self._beside = beside.parent
            try:
                self.state.best_global_step = None  # which would have transformers wait at a barrier
                Trainer._save_checkpoint(self, model, trial)
                self.keep_with(beside)
            finally:
                self._beside, self.state.best_global_step = None, best
            self.state.save_to_json(str(beside / "trainer_state.json"))
            for rank, state in enumerate(states[1:], start=1):
                (beside / f"rng_state_{rank}.pth").write_bytes(state)

    def create_optimizer(self, *arguments, **named):
        """Of divided weights one that takes whole states and divides them."""
        optimizer = super().create_optimizer(*arguments, **named)
        if sharded.is_divided(self.model):
            sharded.divides_what_it_loads(optimizer)
        elif self.divides():
            optimizer = self.optimizer = zero.Optimizer(
                self.model, optimizer, self.recipe, self.args.gradient_accumulation_steps
            )
            accelerator = self.accelerator
            accelerator.backward = lambda loss, **named: optimizer.backward(loss, accelerator.sync_gradients)
            accelerator.clip_grad_norm_ = lambda *values, **named: optimizer.update()
        return optimizer

    def divides(self) -> bool:
        """Whether ranks hold parts of what trains, or of its optimizer's states."""
        return sharded.is_divided(self.model) or zero.is_used(self.recipe)

    def trained(self) -> Iterator[tuple[str, torch.Tensor]]:
        """(name, what this rank can see of it on the CPU) of what trains. All ranks ask."""
        see = zero.whole if zero.is_used(self.recipe) else lambda value: sharded.here(value).detach().cpu()
        return ((name, see(value)) for name, value in adapters(self.model))

    def _save(self, output_dir=None, state_dict=None):
        """With the whole weights, where ranks hold parts of them."""
        super()._save(output_dir, self.whole["weights"] if self.whole else state_dict)

    def _save_optimizer_and_scheduler(self, output_dir):
        """The whole states, where ranks hold parts of them."""
        if not self.whole:
            super()._save_optimizer_and_scheduler(output_dir)
            return
        torch.save(self.whole["optimizer"], Path(output_dir) / "optimizer.pt")
        torch.save(self.lr_scheduler.state_dict(), Path(output_dir) / "scheduler.pt")
        self.whole = None

    def _load_from_checkpoint(self, resume_from_checkpoint, model=None):
        """Each rank's part of the whole weights, where they are divided."""
        if not sharded.is_divided(self.model):
            super()._load_from_checkpoint(resume_from_checkpoint, model)
            return
        sharded.take(self.model, saved_weights(Path(resume_from_checkpoint)))

    def random_state(self) -> bytes:
        """Of this rank's generators, as the file that transformers reads."""
        with tempfile.TemporaryDirectory() as folder:
            self._save_rng_state(folder)
            (file,) = Path(folder).iterdir()
            return file.read_bytes()

    def _get_output_dir(self, trial):
        return str(getattr(self, "_beside", None) or self.args.output_dir)


def saved_weights(folder: Path) -> dict[str, torch.Tensor]:
    """What was trained, of a checkpoint or a result: an adapter's tensors, or all of a model's."""
    files = sorted(folder.glob("*.safetensors"))
    return {name: value for file in files for name, value in load_file(str(file)).items()}


def build_trainer(
    config: RunConfig, model: PeftModel, tokenizer: PreTrainedTokenizerBase, prepared: Path, saves: Path
) -> FineTuner:
    """trl's trainer over micro-batches laid out beforehand; nothing has run yet.

    prepared: folder with train/ and heldout/ as `prepare` writes them. saves: where checkpoints go while it trains.
    """
    from helpers.finetune import preferences  # whose trainer is one of these

    asked, pairs = config.train, config.train.sides == 2
    rows, heldout = (load_split(prepared, name, pairs) for name in ("train", "heldout"))
    check_rows(rows, config, model)
    lengths = [len(ids) for ids in rows["input_ids"]]
    plan = batches.micro_batches(
        preferences.units(lengths, asked.packing) if pairs else lengths,
        batch_size=asked.batch_size,
        seq_len=config.data.seq_len * asked.sides,
        epochs=asked.epochs,
        seed=config.seed,
        packing=asked.packing,
        micro_batch_limit=asked.max_steps and asked.max_steps * asked.accumulation,
    )
    shared, accumulation = batches.dealt(plan, asked.accumulation, ranks.count())
    examples = len(heldout) // asked.sides
    heldout_plan = batches.grouped(list(range(examples)), [0] * examples, asked.batch_size)
    heldout_plan += [[]] * (-len(heldout_plan) % ranks.count())  # else the first ones would count twice
    if pairs:
        plan, shared = (preferences.both_sides(each, len(rows) // 2) for each in (plan, shared))
        heldout_plan = preferences.both_sides(heldout_plan, examples)
    evaluates = asked.eval_steps is not None and len(heldout) > 0
    if asked.patience and not evaluates:
        raise ValueError("patience needs eval_steps and held-out conversations: set eval_steps, or leave patience out")
    # One row's loss as transformers computes it, before anything here is put in its place.
    causal_lm, dtype = base.causal_lm(model), base.precision().dtype
    sample = max(rows[:32]["input_ids"], key=len)
    with losses.transformers_attention(causal_lm):
        theirs = losses.forward_loss(causal_lm, sample, dtype)
    losses.install(causal_lm, asked.loss, preferences.objective(asked) if pairs else None)
    custom_layers, layers_reason = choose_layers(model, config)
    routed = getattr(causal_lm.config, "output_router_logits", None)
    arguments = training_arguments(config, saves, math.ceil(len(plan) / asked.accumulation), accumulation, evaluates)
    # transformers computes no expert that gets no token: its adapters have no gradient then, and DDP would wait for one
    arguments.ddp_find_unused_parameters = routed is not None and not custom_layers
    if routed and ranks.count() > 1:
        raise ValueError(
            f"{config.model.model} adds a loss to each micro-batch that balances its experts (output_router_logits), "
            "and several GPUs share the micro-batches out anew: train it on one GPU"
        )
    arguments.activation_offloading = asked.offload_activations and not custom_layers and torch.cuda.is_available()
    reference: dict[str, torch.Tensor] = {}
    collate = partial(preferences.collate, reference=reference) if pairs else gather
    trainer = (preferences.PreferenceTuner if pairs else FineTuner)(
        model=model,
        args=arguments,
        train_dataset=Dataset.from_dict({"split": ["train"] * len(shared), "rows": shared}),
        eval_dataset=Dataset.from_dict({"split": ["heldout"] * len(heldout_plan), "rows": heldout_plan})
        if heldout_plan
        else None,
        processing_class=tokenizer,
        data_collator=partial(
            collate,
            splits={"train": rows, "heldout": heldout},
            pad_id=tokenizer.pad_token_id or 0,
            packing=asked.packing,
            by_bounds=causal_lm.config._attn_implementation == attention.NAME,
        ),
    )
    if sharded.is_divided(trainer.model) or zero.is_used(config):  # accelerate prepares all but DistributedDataParallel
        trainer.accelerator.prepare_model = partial(trainer.accelerator.prepare_model, evaluation_mode=True)
    if not sharded.is_divided(trainer.model):
        trainable_to_fp32(trainer.model)  # trl has just cast them
    if routed is not None:  # trl asks every mixture for its router's logits; here config.json decides
        causal_lm.config.output_router_logits = routed
    if torch.cuda.is_available() and "8bit" in asked.optimizer:
        trainer.optimizer = eight_bit_optimizer(trainer.model, config)
    trainer.remove_callback(PrinterCallback)
    trainer.loss_check = losses.check(theirs, losses.forward_loss(causal_lm, sample, dtype), dtype, len(sample))
    if torch.cuda.is_available():
        torch.cuda.empty_cache()  # what the two passes held is not training's
    # What the trainer's own methods, `run.train` and the watch read.
    trainer.recipe = config
    trainer.layers_reason = layers_reason
    trainer.token_counts = batches.token_counts(plan, lengths, asked.packing)
    trainer.reference = reference
    heldout_labels = preferences.counts(heldout) if pairs else label_count(heldout)
    trainer.heldout_labels_per_batch = heldout_labels / max(1, len(heldout_plan))
    trainer.identity = checkpoints.identity(config, workspace.identify(Path(prepared))["sha256"])
    trainer.watch = Watch(trainer, config)
    trainer.add_callback(trainer.watch)
    return trainer


def refuse_without_tracker(name: str) -> None:
    """Raise ValueError where the tracker's package is not installed."""
    if name != "none" and importlib.util.find_spec(name) is None:
        raise ValueError(f"report_to={name} needs its package: pip install {name}, or leave report_to at none")


def tracker(name: str, saves: Path) -> str:
    """The tracker for the trainer's `report_to`; TensorBoard's files go beside the stage's folder, where they stay."""
    if name == "tensorboard":
        os.environ["TENSORBOARD_LOGGING_DIR"] = str(saves.parent.parent / "tensorboard")
    return name


def training_arguments(config: RunConfig, saves: Path, steps: int, accumulation: int, evaluates: bool) -> SFTConfig:
    """The trainer's arguments for so many optimizer steps of so many micro-batches a rank."""
    asked, dtype, on_gpu = config.train, base.precision().dtype, torch.cuda.is_available()
    arguments = SFTConfig(
        output_dir=str(saves),
        per_device_train_batch_size=1,  # an item of the dataset is a micro-batch already
        per_device_eval_batch_size=1,
        gradient_accumulation_steps=accumulation,
        num_train_epochs=1,  # the plan holds all epochs
        max_steps=steps,
        learning_rate=asked.learning_rate,
        lr_scheduler_type=asked.schedule,
        warmup_steps=round(asked.warmup_fraction * steps),
        weight_decay=asked.weight_decay,
        max_grad_norm=asked.max_grad_norm,
        optim=optimizer_name(config) if on_gpu else "adamw_torch",  # the others need a GPU
        neftune_noise_alpha=asked.neftune_alpha or None,
        fp16=dtype == torch.float16,
        bf16=dtype == torch.bfloat16,
        use_cpu=not on_gpu,
        gradient_checkpointing=False,  # `choose_layers` decides layer by layer
        logging_steps=1,
        logging_nan_inf_filter=False,  # a NaN must be seen
        save_strategy="steps",
        save_steps=asked.save_steps,
        eval_strategy="steps" if evaluates else "no",
        eval_steps=asked.eval_steps,
        prediction_loss_only=True,
        seed=config.seed + ranks.rank(),  # of dropout: ranks must not leave out the same values of other rows
        data_seed=config.seed,
        train_sampling_strategy="sequential",
        remove_unused_columns=False,
        dataset_kwargs={"skip_prepare_dataset": True},
        dataloader_pin_memory=on_gpu,
        disable_tqdm=True,
        report_to=tracker(asked.report_to, saves),
        max_length=None,
        # No static graph: it breaks where gradients are averaged only once in several micro-batches.
        ddp_broadcast_buffers=False,
        average_tokens_across_devices=True,  # the loss is divided by the tokens of the whole step
    )
    # A process trains on one GPU, however many it sees: with more the Trainer would split batches over all of them
    # (nn.DataParallel), which trl refuses. Setting CUDA_VISIBLE_DEVICES here would be too late in a notebook.
    arguments._n_gpu = min(arguments.n_gpu, 1)
    return arguments


def optimizer_name(config: RunConfig) -> str:
    """transformers' name of the configured optimizer; PyTorch's fused one where the budget counts on that."""
    return "adamw_torch_fused" if vram.fused(config) else config.train.optimizer


def eight_bit_optimizer(model: PeftModel, config: RunConfig) -> FlatOptimizer:
    """AdamW with states in 8 bits (https://arxiv.org/abs/2110.02861), in paged memory if so configured."""
    from bitsandbytes.optim import AdamW

    # States are quantized in blocks with a scale each (section 2.1 there; of 256 values in bitsandbytes), so that one
    # joined parameter is updated as its matrices would be. The driver moves paged states to the host where VRAM ends.
    make = partial(
        AdamW,
        lr=config.train.learning_rate,
        weight_decay=config.train.weight_decay,
        optim_bits=8,
        is_paged=config.train.optimizer == "paged_adamw_8bit",
    )
    return FlatOptimizer((value for _, value in adapters(model)), make)


def choose_layers(model: PeftModel, config: RunConfig) -> tuple[bool, str]:
    """Checkpoint exactly as many decoder layers as configured: (whether the custom layers compute, that in words)."""
    causal_lm = base.causal_lm(model)
    layers, wanted = causal_lm.model.layers, config.train.checkpointing
    count = {"all": len(layers), "auto": len(layers), "none": 0}.get(wanted, wanted)  # auto: nobody planned
    if count > len(layers):
        raise ValueError(f"checkpointing={count} layers, but this model has {len(layers)}: choose 0 to {len(layers)}")
    for layer in layers:  # as an earlier run on this base may have left them: ours would be recomputed a second time
        layer.gradient_checkpointing = False
    decided = families.layers(families.of(causal_lm.config.to_dict()), config)
    if decided.computes == "own":
        decoder.check(causal_lm)
        # The first layers are the checkpointed ones. The backward pass starts at the last, when all that was saved is
        # there still: what is recomputed for the first layers then takes the room of what the last ones have freed.
        checkpointed = "attention" if config.train.keep_attention else "input"
        saves = [checkpointed] * count + ["everything"] * (len(layers) - count)
        decoder.install(causal_lm, saves, host_room(config) if config.train.offload_activations else 0)
        return True, f"{count} of {len(layers)} layers are checkpointed; our own layers compute"
    if count:
        causal_lm.gradient_checkpointing_enable({"use_reentrant": False})  # of all; transformers knows no number
        for place, layer in enumerate(layers):
            layer.gradient_checkpointing = place < count
    return False, f"{count} of {len(layers)} layers are checkpointed; transformers' layers compute: {decided.reason}"
