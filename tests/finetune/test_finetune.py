"""Fine-tuning: the same losses as plain PEFT and trl whatever is checkpointed, offloaded or packed.

On a GPU in fp16, with the 7B's widths and memory-efficient attention, `tests/benchmarks/bench_finetune.py` checks the
same (its engine `check`).
"""

import json
import random
import re
import shutil
from dataclasses import replace
from pathlib import Path

import faults
import pytest
import torch
from datasets import Dataset
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    BitsAndBytesConfig,
    MistralConfig,
    MistralForCausalLM,
    set_seed,
)
from trl import SFTConfig, SFTTrainer

from helpers import budget, config, finetune, hardware, workspace
from helpers.budget import activations
from helpers.budget import step as budget_step
from helpers.budget.step import Step
from helpers.finetune import batches
from helpers.finetune.base import adapters
from helpers.finetune.data import load_split
from helpers.finetune.engine import kernels, layers, losses
from helpers.finetune.engine.offload import Offload
from helpers.finetune.engine.optimizers import FlatOptimizer
from helpers.finetune.trainer import FineTuner, choose_layers
from helpers.finetune.watch import Watch
from helpers.models import TINY, profile, shape
from helpers.workspace import checkpoints

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


COLUMNS = ("id", "messages", "input_ids", "assistant_masks")


def write_prepared(folder: Path, lengths: list[int], masked: bool = False, heldout: int = 6) -> Path:
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
    for name, part in (("train", rows), ("heldout", rows[:heldout])):
        columns = {column: [row[column] for row in part] for column in COLUMNS}
        Dataset.from_dict(columns).save_to_disk(str(folder / name))
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
    start = {name: value.detach().clone() for name, value in adapters(model)}
    rows = load_split(prepared, "train")
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
    for name, value in adapters(trainer.model):
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
    "all layers checkpointed": {"checkpointing": "all"},
    "attention recomputed too": {"checkpointing": "all", "keep_attention": False},
    "one layer checkpointed": {"checkpointing": 1, "keep_attention": False},
    "offloaded": {"checkpointing": "all", "keep_attention": False, "offload_activations": True},
    "offloaded, attention saved": {"checkpointing": "all", "offload_activations": True},
    "full loss": {"loss": "full"},
    "packed": {"packing": True, "batch_size": 1, "equal": True},
    "packed, all checkpointed, offloaded": {
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


def test_offloaded_inputs_come_back_where_a_hook_packs_arguments_anew(small, plain_losses, prepared, tmp_path):
    # as FSDP2's does before each layer, in PyTorch 2.11 on a GPU: the same cos and sin in another tuple
    def packed_anew(layer, arguments, named):
        cos, sin = named["position_embeddings"]
        return arguments, named | {"position_embeddings": (cos, sin)}

    values = {"checkpointing": "all", "keep_attention": False, "offload_activations": True}
    trainer = our_trainer(small_config(small, **values), prepared, tmp_path)
    for layer in trainer.model.get_base_model().model.layers:
        layer.register_forward_pre_hook(packed_anew, with_kwargs=True)
    trainer.train()
    assert logged_losses(trainer) == pytest.approx(plain_losses, abs=1e-3)


@pytest.mark.parametrize("kind", ["chunked", "full"])
def test_loss_of_hidden_states_wider_than_the_head(kind):
    # DoRA's layers answer in fp32 under autocast, whatever the head's type
    torch.manual_seed(0)
    head, hidden = torch.nn.Linear(16, 50, bias=False), torch.randn(2, 6, 16, requires_grad=True)
    labels = torch.randint(0, 50, (2, 6))
    exact = losses.label_loss(hidden, head, labels, None, "full")
    wide = losses.label_loss(hidden, head.to(torch.bfloat16).requires_grad_(False), labels, None, kind)
    assert wide.item() == pytest.approx(exact.item(), abs=0.02)
    (gradient,) = torch.autograd.grad(wide, hidden)
    assert gradient.dtype == hidden.dtype and gradient.abs().sum() > 0


def test_losses_on_the_tiny_model(prepared, tmp_path):
    settings = small_config(TINY, learning_rate=2e-3, checkpointing=2, offload_activations=True)
    trainer = our_trainer(settings, prepared, tmp_path)
    trainer.train()
    assert logged_losses(trainer) == pytest.approx(reference_losses(settings, prepared, tmp_path / "plain"), abs=1e-3)


@pytest.mark.parametrize(
    "values",
    [
        {"rslora": True},
        {"dora": True},
        {"dropout": 0.1},
        {"neftune_alpha": 5.0},
        {"weights": "int8"},
        {"weights": "fp16"},
        {"upcast": True, "attention": "eager"},
        {"targets": "q_proj,down_proj", "schedule": "linear", "weight_decay": 0.1, "double_quant": False},
    ],
    ids=str,
)
def test_options_train_and_plain_peft_reads_the_adapter(values, small, prepared, tmp_path):
    settings = small_config(small, max_steps=4, **values)
    trainer = our_trainer(settings, prepared, tmp_path)
    measured = finetune.train(trainer)
    assert measured["steps_applied"] == 4
    assert measured["loss_last"] < 1.1 * measured["loss_first"]
    base, _ = finetune.load_base(settings.with_values(attention="math"))
    plain = PeftModel.from_pretrained(base, finetune.save(trainer, tmp_path)).eval()
    ids = torch.tensor([[1, 5, 9, 12, 7, 3]])
    with torch.no_grad():
        ours, theirs = trainer.model.eval()(input_ids=ids).logits, plain(input_ids=ids).logits
        untrained = plain.get_base_model().lm_head(plain.get_base_model().model(ids).last_hidden_state)
        with plain.disable_adapter():
            without = plain(input_ids=ids).logits
    torch.testing.assert_close(ours, theirs, atol=1e-4, rtol=1e-4)
    assert torch.equal(theirs, untrained)
    assert (theirs - without).abs().max() > 1e-2


def test_all_at_once_resolves_auto_and_writes_its_folder(small, prepared, tmp_path, capsys):
    settings = small_config(small, checkpointing="auto", max_steps=4, eval_steps=2)
    measured = finetune.finetune(settings, prepared, tmp_path / "finetune")
    written = config.load_yaml(tmp_path / "finetune" / "config.yaml")
    assert written.train.checkpointing == ("none" if not torch.cuda.is_available() else 0)
    assert sorted(path.name for path in (tmp_path / "finetune" / "adapter").glob("adapter*")) == [
        "adapter_config.json",
        "adapter_model.safetensors",
    ]
    log = json.loads((tmp_path / "finetune" / "log.json").read_text())
    assert [entry["step"] for entry in log if "loss" in entry] == [1, 2, 3, 4]
    assert measured["heldout_loss"] == [entry["eval_loss"] for entry in log if "eval_loss" in entry][-1]
    assert measured["text_tokens"] > 0 and measured["padding_tokens"] < measured["text_tokens"]
    shown = capsys.readouterr()
    assert shown.out == "" and "arning" not in shown.err


def test_the_same_seed_gives_the_same_losses(small, prepared, tmp_path):
    runs = []
    for seed in (3, 3, 4):
        trainer = our_trainer(small_config(small, seed=seed, max_steps=5), prepared, tmp_path)
        trainer.train()
        runs.append(logged_losses(trainer))
    assert runs[0] == pytest.approx(runs[1], abs=1e-4)
    assert runs[0] != pytest.approx(runs[2], abs=1e-4)


def test_stops_early_with_the_best_adapter(small, prepared, tmp_path):
    rising = {"learning_rate": 0.3, "schedule": "constant_with_warmup", "warmup_fraction": 0.0}
    settings = small_config(small, eval_steps=1, patience=2, save_steps=1000, **rising)
    trainer = our_trainer(settings, prepared, tmp_path)
    measured = finetune.train(trainer)
    found = [entry["eval_loss"] for entry in trainer.state.log_history if "eval_loss" in entry]
    assert measured["steps"] < STEPS and found[measured["steps"] - 1] > min(found)
    assert measured["steps"] == 3 + found.index(min(found))
    assert measured["heldout_loss"] == pytest.approx(min(found), abs=1e-5)


def test_a_save_that_falls_on_an_evaluation_is_made(small, prepared, tmp_path):
    trainer = our_trainer(small_config(small, eval_steps=2, save_steps=2, max_steps=3), prepared, tmp_path)
    finetune.train(trainer)
    assert (tmp_path / "checkpoints" / "checkpoint-2" / "adapter_model.safetensors").is_file()


def test_progress_is_not_told_at_every_step(small, prepared, tmp_path, capsys):
    finetune.train(our_trainer(small_config(small), prepared, tmp_path))
    states = capsys.readouterr().err
    assert "20/20, loss " in states
    assert states.count("\r") < STEPS / 2


# ---- what goes on ----------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def stopped(small, prepared, tmp_path_factory) -> tuple[Path, Path]:
    """A run of 8 steps stopped after 5 on a machine that is gone: (Drive, the whole run's output left alone)."""
    folder = tmp_path_factory.mktemp("stopped")
    settings = small_config(small, **LONG)
    finetune.finetune(settings, prepared, folder / "calm" / "finetune")
    (folder / "drive").mkdir()
    with pytest.MonkeyPatch.context() as patched:
        patched.setenv("RECIPES_LASTING", str(folder / "drive"))
        run = workspace.open_run(settings, folder / "gone" / "run")
        stop = Watch.on_step_end

        def stop_at_5(watch, args, state, control, **kwargs):
            watch.interrupted = 2 if state.global_step == 5 else None
            stop(watch, args, state, control, **kwargs)

        patched.setattr(Watch, "on_step_end", stop_at_5)
        with pytest.raises(KeyboardInterrupt, match="stopped after step 5"):
            finetune.finetune(settings, prepared, run.folder("finetune"))
    shutil.rmtree(folder / "gone")
    return folder / "drive", folder / "calm" / "finetune"


LONG = {"batch_size": 4, "accumulation": 2, "max_steps": 8, "save_steps": 2}


@pytest.fixture
def another_machine(stopped, small, tmp_path, monkeypatch):
    """(the run's folder on it, a copy of Drive, the whole run's output left alone)."""
    shutil.copytree(stopped[0], tmp_path / "drive")
    monkeypatch.setenv("RECIPES_LASTING", str(tmp_path / "drive"))
    run = workspace.open_run(small_config(small, **LONG), tmp_path / "new" / "run")
    return run.folder("finetune"), tmp_path / "drive", stopped[1]


def bytes_of(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def same_training(one: Path, other: Path) -> None:
    """The same losses, step by step, and the same adapter."""
    logs = [json.loads((folder / "log.json").read_text()) for folder in (one, other)]
    losses = [{entry["step"]: entry["loss"] for entry in log if "loss" in entry} for log in logs]
    assert losses[0] == pytest.approx(losses[1], abs=1e-6)
    first, second = (load_file(folder / "adapter" / "adapter_model.safetensors") for folder in (one, other))
    assert max((first[name] - second[name]).abs().max().item() for name in first) <= 1e-6


@pytest.mark.parametrize(
    "trouble",
    [{"counted": "open", "match": "*-5/whole.json", "raise_at": 1, "errno": 5}, {"seed": 1, "share": 1.0}],
    ids=["one read error", "every first try fails"],
)
def test_errors_of_drive_that_pass_do_not_send_training_back(trouble, another_machine, small, prepared, capsys):
    output, drive, calm = another_machine
    with faults.injecting(drive, log=output.parent / "faults.log", **trouble):
        measured = finetune.finetune(small_config(small, **LONG), prepared, output)
    assert faults.injected(output.parent / "faults.log")
    assert measured["resumed_from_step"] == 5
    same_training(output, calm)
    twin = drive / "mistral-t4-recipes" / "run"
    assert workspace.check_outputs(twin / "finetune") and not (twin / "finetune.partial").exists()


def test_an_error_of_drive_that_stays_is_a_sentence_and_changes_nothing(another_machine, small, prepared):
    output, drive, _ = another_machine
    before = bytes_of(drive)
    assert len({Path(name).parent.name for name in before}) == 2, "two checkpoints"
    for broken in ("read", "list", "open"):
        with (
            faults.injecting(drive / "mistral-t4-recipes", broken=broken, errno=5),
            pytest.raises(workspace.StorageError, match="Input/output error, also after a minute of trying") as caught,
        ):
            finetune.finetune(small_config(small, **LONG), prepared, output)
        assert "\n" not in str(caught.value) and "nothing was changed" in str(caught.value)
        assert bytes_of(drive) == before


def test_what_does_not_reach_drive_at_the_end_leaves_its_checkpoints(another_machine, small, prepared, capsys):
    output, drive, calm = another_machine
    lying = drive / "mistral-t4-recipes" / "run" / "finetune.partial" / "checkpoints"
    with faults.injecting(drive, counted="mkdir,create", match="*/run/finetune.sending*", broken="all", broken_from=1):
        finetune.finetune(small_config(small, **LONG), prepared, output)
    same_training(output, calm)
    assert "NOT KEPT" in capsys.readouterr().out
    assert checkpoints.newest(lying).name == "checkpoint-8"
    workspace.open_run(small_config(small, **LONG), output.parent)
    assert workspace.check_outputs(lying.parent.parent / "finetune") and not lying.exists()


def test_a_fresh_start_leaves_what_is_in_drive_until_its_first_checkpoint_is_there(
    another_machine, small, prepared, monkeypatch
):
    output, drive, _ = another_machine
    lying = drive / "mistral-t4-recipes" / "run" / "finetune.partial" / "checkpoints"
    before = bytes_of(lying)
    monkeypatch.setattr(FineTuner, "training_step", lambda *inputs, **named: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        finetune.finetune(small_config(small, **LONG), prepared, output, resume="never")
    assert bytes_of(lying) == before


@pytest.mark.parametrize(
    "values",
    [
        {"batch_size": 2, "accumulation": 4, "checkpointing": "auto"},
        {"batch_size": 8, "accumulation": 1, "checkpointing": 1, "keep_attention": False},
    ],
    ids=str,
)
def test_on_another_gpu_training_goes_on_in_the_checkpoints_split(values, another_machine, small, prepared, capsys):
    output, _, calm = another_machine
    other = small_config(small, **(LONG | values))
    assert finetune.plan(other, output).config.train.batch_size == 4
    measured = finetune.finetune(other, prepared, output)
    assert measured["resumed_from_step"] == 5
    assert "checkpoint-5 was made in micro-batches of 4 × 2, and training goes on in them" in capsys.readouterr().out
    same_training(output, calm)
    written = config.load_yaml(output / "config.yaml").train
    assert (written.batch_size, written.accumulation) == (4, 2)


def test_a_disk_that_is_full_at_the_end_is_a_sentence_and_only_the_end_is_repeated(small, prepared, tmp_path):
    settings = small_config(small, max_steps=2, save_steps=2)
    for full in ("adapter", "log.json", "manifest.json"):
        counted = {"counted": "mkdir,create", "match": f"*finetune.partial/{full}*"}
        with (
            faults.injecting(tmp_path, **counted, broken="write", broken_from=1, errno=28),
            pytest.raises(workspace.StorageError, match=r"GiB free\): delete what is not needed") as caught,
        ):
            finetune.finetune(settings, prepared, tmp_path / "finetune")
        assert "\n" not in str(caught.value) and "No space left on device" in str(caught.value)
        assert not (tmp_path / "finetune").exists()
    assert finetune.finetune(settings, prepared, tmp_path / "finetune")["resumed_from_step"] == 2
    assert [path.name for path in tmp_path.iterdir()] == ["finetune"]


# ---- what cannot be trained ------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("values", "sentence"),
    [
        ({"rank": 33}, "rank=33 is larger than k_proj, whose smaller side is 32: choose a rank of at most 32"),
        (
            {"targets": "q_proj,query"},
            "up_proj, down_proj, all-linear or attention for",
        ),
        ({"seq_len": 129}, "seq_len=129 is more than the 128 tokens that this model was made for"),
        ({"seq_len": 16}, "has 39 tokens, more than seq_len=16: prepare again"),
        ({"patience": 2}, "patience needs eval_steps"),
        ({"kernels": "liger"}, "kernels=liger is no longer there: it needed the package liger-kernel"),
        ({"loss": "fused"}, "no faster than loss=chunked, which needs none; leave loss out"),
        ({"checkpointing": 3}, "checkpointing=3 layers, but this model has 2: choose 0 to 2"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_settings_that_cannot_be_trained(values, sentence, small, prepared, tmp_path):
    with pytest.raises(ValueError, match=re.escape(sentence)):
        our_trainer(small_config(small, **values), prepared, tmp_path)


def test_nothing_held_out_is_no_obstacle(small, tmp_path):
    trainer = our_trainer(small_config(small, max_steps=2), write_prepared(tmp_path, [9, 9, 9], heldout=0), tmp_path)
    assert finetune.train(trainer)["heldout_loss"] is None


@pytest.mark.parametrize(
    ("lengths", "masked", "sentence"),
    [([], False, "has 0 conversations"), ([5, 6], True, "all 2 conversations have no token to train on")],
)
def test_data_that_cannot_be_trained(lengths, masked, sentence, small, tmp_path):
    with pytest.raises(ValueError, match=sentence):
        our_trainer(small_config(small), write_prepared(tmp_path, lengths, masked), tmp_path)


def test_data_that_is_not_there_and_a_way_to_resume_that_is_none(small, tmp_path):
    with pytest.raises(ValueError, match="run python -m helpers prepare"):
        our_trainer(small_config(small), tmp_path, tmp_path)
    with pytest.raises(ValueError, match="auto or never, not 'sometimes'"):
        finetune.finetune(small_config(small), tmp_path, tmp_path / "out", resume="sometimes")


@pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has a GPU; runs where there is none")
@pytest.mark.parametrize("checkpointing", ["auto", "all"])
def test_a_7b_without_a_gpu(checkpointing, prepared, tmp_path):
    with pytest.raises(ValueError, match=r"7\.2e9 parameters.*Runtime > Change runtime type > T4.*profile tiny"):
        finetune.finetune(profile("mistral-7b", checkpointing=checkpointing), prepared, tmp_path / "out")


def test_a_loss_that_is_no_number_stops_it(small, prepared, tmp_path):
    trainer = our_trainer(small_config(small), prepared, tmp_path)
    trainer.model.get_base_model().lm_head.weight.data[0] = float("nan")
    with pytest.raises(finetune.NotTrained, match=r"loss became nan at step 1: lower learning_rate \(now 0\.01\)"):
        finetune.train(trainer)


def test_training_that_changes_nothing_is_an_error(small, prepared, tmp_path):
    settings = small_config(small, max_steps=1, warmup_fraction=0.9)  # its one step has the warm-up's rate, 0
    with pytest.raises(finetune.NotTrained, match=r"1 of 1 optimizer steps .* 0 adapter weights differ"):
        finetune.train(our_trainer(settings, prepared, tmp_path))


# ---- attention, packing, padding -------------------------------------------------------------------------------------


def adapted(small: Path, window: int | None = None, **values):
    """The small model with adapters that do something, its layers installed."""
    settings = small_config(small, **values)
    base, _ = finetune.load_base(settings)
    base.config.sliding_window = window
    model = finetune.attach_adapter(base, settings)
    generator = torch.Generator().manual_seed(5)
    for _, value in adapters(model):
        value.data = torch.randn(value.shape, generator=generator) / 10
    choose_layers(model, settings)
    return model.get_base_model()


def test_a_run_after_a_checkpointed_one_on_the_same_base_recomputes_nothing(small):
    """transformers' layers keep their switch: with it ours would be run twice, and their memory not be the budget's."""
    plain = small_config(small, kernels="plain", checkpointing="all")
    model = finetune.attach_adapter(finetune.load_base(plain)[0], plain)
    decoders = model.get_base_model().model.layers
    said = f"{len(decoders)} of {len(decoders)} layers are checkpointed; transformers' layers compute: "
    assert choose_layers(model, plain) == (False, said + "plain kernels are asked for")
    assert all(layer.gradient_checkpointing for layer in decoders)
    ours = choose_layers(model, small_config(small, checkpointing="none"))
    assert ours == (True, f"0 of {len(decoders)} layers are checkpointed; our own layers compute")
    assert not any(layer.gradient_checkpointing for layer in decoders)


def hidden_states(model, embedded: torch.Tensor, batch: dict) -> torch.Tensor:
    """The last layer's output for embeddings (batch, tokens, hidden)."""
    rest = {name: value for name, value in batch.items() if name not in ("input_ids", "labels")}
    return model.model(inputs_embeds=embedded, **rest).last_hidden_state


@pytest.mark.parametrize("window", [None, 4])
@pytest.mark.parametrize(
    "values",
    [{}, {"checkpointing": "all", "keep_attention": False}, {"dropout": 1e-9}, {"attention": "math"}],
    ids=["custom layers", "checkpointed", "transformers' layers, no mask", "transformers' layers"],
)
def test_packed_conversations_do_not_see_each_other(values, window, small):
    model = adapted(small, window, **values)
    rows = [{"input_ids": list(range(3, 3 + size)), "assistant_masks": [1] * size} for size in (7, 12, 5)]
    by_bounds = values.get("attention") is None
    together = batches.collate(rows, 0, packing=True, by_bounds=by_bounds)
    embedded = model.model.embed_tokens(together["input_ids"]).detach().requires_grad_()
    packed = hidden_states(model, embedded, together)
    alone = [model.model(torch.tensor([row["input_ids"]])).last_hidden_state for row in rows]
    torch.testing.assert_close(packed, torch.cat(alone, dim=1), atol=2e-5, rtol=1e-4)
    packed[:, 7:19].sum().backward()
    reached = embedded.grad.abs().sum(-1)[0]
    assert reached[:7].sum() == 0 and reached[19:].sum() == 0 and reached[7:19].min() > 0


def test_a_sliding_window_is_transformers(small):
    losses, grads = [], []
    ids = torch.tensor([list(range(3, 23)), list(range(22, 2, -1))])
    for values in ({}, {"attention": "eager"}, {"attention": "eager", "window": None}):
        model = adapted(small, **({"window": 6} | values))
        loss = model(input_ids=ids, labels=ids).loss
        loss.backward()
        losses.append(loss.item())
        grads.append(torch.cat([value.grad.reshape(-1) for _, value in adapters(model)]))
    assert losses[0] == pytest.approx(losses[1], abs=1e-5)
    torch.testing.assert_close(grads[0], grads[1], atol=1e-5, rtol=1e-3)
    assert losses[1] != pytest.approx(losses[2], abs=1e-3)


@pytest.mark.parametrize("window", [None, 4])
@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("train", [True, False])
def test_padding_on_either_side_changes_nothing(train, side, window, small):
    model = adapted(small, window).train(train)
    short, long = [5, 6, 7, 8, 9], list(range(3, 14))
    pad = [0] * (len(long) - len(short))
    ids = torch.tensor([pad + short if side == "left" else short + pad, long])
    with torch.set_grad_enabled(train):
        padded = model(input_ids=ids, attention_mask=(ids != 0).long()).logits
        alone = model(input_ids=torch.tensor([short])).logits[0]
    where = slice(len(pad), None) if side == "left" else slice(len(short))
    torch.testing.assert_close(padded[0, where], alone, atol=1e-4, rtol=1e-4)


# ---- what the budget counts on ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "values",
    [
        {"checkpointing": "none"},
        {"checkpointing": "all"},
        {"checkpointing": "all", "keep_attention": False},
        {"checkpointing": "all", "keep_attention": False, "offload_activations": True},
    ],
    ids=str,
)
def test_a_layer_saves_for_backward_what_the_budget_says(values, small):
    settings, model = small_config(small, seq_len=32, batch_size=2, **values), adapted(small, **values)
    step, saved = Step.of(settings, shape(str(small))), []

    def note(tensor):
        saved.append(tensor.nbytes)
        return tensor

    layer = model.model.layers[0]
    x = torch.randn(2, 32, step.hidden, requires_grad=True)
    positions = model.model.rotary_emb(x, torch.arange(32)[None])
    with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
        layer(x, position_embeddings=positions)
    counts = activations.saved_when_checkpointed if values["checkpointing"] == "all" else activations.saved
    statistics = 4 * 64 * step.shape.heads * (values.get("keep_attention", True))  # SDPA on a CPU has none
    assert sum(saved) == 2 * (counts(step) - statistics)  # fp32 here, 16 bits there


def test_host_memory_that_is_full_leaves_inputs_on_the_device(small, prepared, tmp_path, monkeypatch):
    monkeypatch.setattr(budget_step, "CHUNK_BYTES", 3_000)  # an input lies across several
    values = {"checkpointing": "all", "max_steps": 3, "offload_gib": 20_000 / 2**30}
    on_gpu, offloaded = (
        our_trainer(small_config(small, offload_activations=offload, **values), prepared, tmp_path)
        for offload in (False, True)
    )
    on_gpu.train()
    offloaded.train()
    assert logged_losses(offloaded) == pytest.approx(logged_losses(on_gpu), abs=1e-6)


@pytest.mark.parametrize("room", [1_000, 50_000, 10**9])
def test_offloaded_inputs_come_back_and_take_what_is_counted(room, monkeypatch):
    monkeypatch.setattr(budget_step, "CHUNK_BYTES", 4096)
    sizes, offload = shape("mistral-7b-v0.3"), Offload(torch.device("cpu"), room)
    draw, most = random.Random(room), 0
    for turn in range(12):
        tokens, depth = draw.randrange(16, 700), draw.randrange(1, 6)
        offload.begin()
        inputs = [torch.randn(1, tokens, 8) for _ in range(depth)]
        slots = [offload.put(x.clone()) for x in inputs]
        assert all(slot["x"] is None for slot in slots[:-2] if slot["host"] is not None)
        if turn % 5:  # now and then a forward pass has no backward pass
            for x, slot in zip(reversed(inputs), reversed(slots), strict=True):
                assert torch.equal(offload.get(slot), x)
            assert offload.arena.top == 0 and not offload.stack
        narrow = replace(sizes, hidden=16, layers=depth)  # 16 values of 2 bytes are 8 of 4
        settings = profile("mistral-7b", seq_len=tokens, batch_size=1, checkpointing="all", offload_activations=True)
        settings = settings.with_values(offload_gib=room / 2**30)
        most = max(most, activations.offloaded_bytes(Step.of(settings, narrow)))
        assert len(offload.arena.chunks) * 4096 == most <= room


def test_offloading_is_held_to_one_number_of_the_machine():
    t4 = hardware.machine("t4")
    small_host = replace(t4, host=replace(t4.host, ram_gib=10.9))
    asked = profile("mistral-7b", seq_len=24576, batch_size=1, accumulation=1)
    for found, gib in ((t4, 6.0), (small_host, 5.4375)):
        plan = budget.plan(asked, shape("mistral-7b-v0.3"), found)
        assert plan.config.train.offload_activations and plan.config.train.offload_gib == gib
        assert gib - 0.25 < plan.budget.ram.parts["offloaded activations"] <= gib
        assert budget_step.host_room(plan.config) == gib * 2**30
        assert plan.budget.fits


def test_training_does_not_shorten_a_context_that_fits_no_way(monkeypatch):
    small = replace(hardware.machine("t4"), free_vram_gib=6.5)
    monkeypatch.setattr(hardware, "probe", lambda: small)
    with pytest.raises(budget.DoesNotFit, match=r"training needs .* GiB of VRAM, this Tesla T4 has 6\.5"):
        finetune.planned(profile("mistral-7b", seq_len=32768))


def test_one_flat_optimizer_is_bitsandbytes_on_each_matrix():
    from bitsandbytes.optim import AdamW

    def run(make):
        torch.manual_seed(0)
        matrices = [torch.nn.Parameter(torch.randn(64, 64 * size)) for size in (1, 2, 3)]
        optimizer = make(matrices)
        for turn in range(6):
            for place, matrix in enumerate(matrices):
                matrix.grad = torch.randn_like(matrix)
                if place == turn == 0:  # none is as good as zeros
                    matrix.grad = None if isinstance(optimizer, FlatOptimizer) else torch.zeros_like(matrix)
            optimizer.param_groups[0]["lr"] = 1e-2 / (turn + 1)
            optimizer.step()
            if turn == 2 and isinstance(optimizer, FlatOptimizer):
                saved = optimizer.state_dict()
                optimizer = make(matrices)  # as a resumed run does
                optimizer.load_state_dict(saved)
        return matrices

    def bitsandbytes(matrices):
        return AdamW(matrices, lr=1e-2, weight_decay=0.1, optim_bits=8)

    flat = run(lambda matrices: FlatOptimizer(matrices, bitsandbytes))
    for ours, theirs in zip(flat, run(bitsandbytes), strict=True):
        torch.testing.assert_close(ours, theirs, atol=1e-5, rtol=1e-5)


def test_a_kernel_that_dequantizes_to_other_weights_is_not_trained_with(small, monkeypatch):
    model = adapted(small, weights="nf4")
    layers.check(model)
    weight = model.model.layers[0].self_attn.q_proj.base_layer.weight
    assert kernels.dequantizer(weight) is kernels.dequantize
    right, used = kernels.dequantize, []
    monkeypatch.setattr(kernels, "dequantize", lambda *arguments: right(*arguments) * 1.001)
    assert kernels.dequantizer(weight) is kernels.bitsandbytes_dequantize
    monkeypatch.setattr(kernels, "dequantizer", lambda *_: lambda *arguments: used.append(1) or right(*arguments))
    layers.install(model, ["everything"] * len(model.model.layers))
    model(input_ids=torch.tensor([[1, 5, 9]]))
    assert len(used) == 7 * len(model.model.layers), "the layers dequantize with what was chosen"


def test_a_tracker_whose_package_is_not_there_is_said_before_anything_is_loaded(prepared, tmp_path, monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name, *rest: None)
    with pytest.raises(ValueError, match="report_to=trackio needs its package: pip install trackio"):
        finetune.finetune(profile("tiny", report_to="trackio"), prepared, tmp_path / "finetune")
