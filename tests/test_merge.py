"""The merge: PEFT's numbers, whole folders or none, one sentence for what cannot be merged."""

import doctest
import hashlib
import json
import shutil
import struct
from pathlib import Path

import faults
import kill_at
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoTokenizer, BitsAndBytesConfig, MistralConfig, MistralForCausalLM

import helpers.merge
import helpers.models.adapters
import helpers.models.stored
from helpers.config import MergeConfig, RunConfig, load_yaml, save_yaml
from helpers.merge import disk_needed_bytes, merge, merged, plan_shards
from helpers.models import TINY
from helpers.models.adapters import PARTS, PREFIX
from helpers.models.stored import SafetensorsWriter, Stored, stored_tensors
from helpers.workspace import Workspace, building, exclusive, require
from helpers.workspace.stages import MARK

SMALL_SHARDS = MergeConfig(shard_gib=0.001, merge_base="original")
TARGETS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
KINDS = {
    "plain": {},
    "rslora": {"use_rslora": True},
    "dora": {"use_dora": True},
    "patterns": {"rank_pattern": {"q_proj": 2}, "alpha_pattern": {"layers.1.mlp.up_proj": 40}},
}


@pytest.fixture(scope="module")
def base(tmp_path_factory) -> Path:
    """A small Mistral in fp16 shards, with the tiny model's tokenizer."""
    folder = tmp_path_factory.mktemp("base")
    torch.manual_seed(0)
    sizes = {"hidden_size": 96, "intermediate_size": 160, "num_attention_heads": 4, "num_key_value_heads": 2}
    model = MistralForCausalLM(MistralConfig(vocab_size=2048, num_hidden_layers=2, head_dim=24, **sizes))
    model.half().save_pretrained(folder, max_shard_size="300KB")
    for name in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja"):
        shutil.copyfile(TINY / name, folder / name)
    assert len(list(folder.glob("*.safetensors"))) > 2
    return folder


@pytest.fixture(scope="module")
def adapters(base, tmp_path_factory) -> dict[str, Path]:
    """An adapter of each kind, as PEFT saves it, with weights that are not zero."""
    from peft import LoraConfig, get_peft_model

    folders = {}
    for kind, values in KINDS.items():
        torch.manual_seed(1)
        model = MistralForCausalLM.from_pretrained(base, dtype=torch.float32)
        model = get_peft_model(model, LoraConfig(r=4, lora_alpha=16, target_modules=TARGETS, **values))
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.data += 0.02 * torch.randn_like(parameter)
        folders[kind] = tmp_path_factory.mktemp(kind) / "adapter"
        model.save_pretrained(str(folders[kind]))
    return folders


def tensors(folder: Path) -> dict[str, torch.Tensor]:
    """Everything in a folder's safetensors."""
    return {name: value for file in folder.glob("*.safetensors") for name, value in load_file(file).items()}


def contents(folder: Path) -> dict[str, str]:
    """Path -> checksum of everything under a folder but its manifest, which holds times."""
    return {
        str(file.relative_to(folder)): hashlib.sha256(file.read_bytes()).hexdigest()
        for file in sorted(folder.rglob("*"))
        if file.is_file() and file.name != "manifest.json"
    }


def copied(source: Path, target: Path) -> Path:
    """A folder of its own, to break."""
    return Path(shutil.copytree(source, target))


def edited(folder: Path, **values) -> Path:
    """An adapter with other settings."""
    path = folder / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | values))
    return folder


# ---- what it computes ------------------------------------------------------------------------------------------------


def test_examples_in_docstrings():
    for module in (helpers.merge, helpers.models.adapters, helpers.models.stored):
        assert doctest.testmod(module).failed == 0


@pytest.mark.parametrize("kind", KINDS)
def test_every_tensor_equals_pefts_merge_rounded_once(kind, base, adapters, tmp_path):
    from peft import PeftModel

    measured = merge(base, adapters[kind], tmp_path / "merged", SMALL_SHARDS)
    model = MistralForCausalLM.from_pretrained(base, dtype=torch.float32)
    wanted = PeftModel.from_pretrained(model, str(adapters[kind])).merge_and_unload().state_dict()
    got = tensors(tmp_path / "merged")
    assert got.keys() == wanted.keys()
    assert all(torch.equal(got[name], wanted[name].half()) for name in wanted)
    assert measured["adapted_tensors"] == 14
    assert measured["largest_change"] > 0.01


def test_nf4_base_is_what_training_saw(base, adapters, tmp_path):
    merge(base, adapters["plain"], tmp_path / "merged", MergeConfig(merge_base="nf4"))
    quantization = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True)
    trained = AutoModelForCausalLM.from_pretrained(base, quantization_config=quantization, dtype=torch.float32)
    factors = load_file(adapters["plain"] / "adapter_model.safetensors")
    got = tensors(tmp_path / "merged")
    from bitsandbytes.functional import dequantize_4bit

    checked = 0
    for name, module in trained.named_modules():
        if type(module).__name__ == "Linear4bit":
            seen = dequantize_4bit(module.weight.data, module.weight.quant_state).float()
            delta = 4 * factors[f"{PREFIX}{name}{PARTS[1]}"] @ factors[f"{PREFIX}{name}{PARTS[0]}"]
            torch.testing.assert_close(got[f"{name}.weight"].float(), seen + delta, atol=1e-4, rtol=1e-3)
            checked += 1
    assert checked == 14
    assert torch.equal(got["lm_head.weight"], tensors(base)["lm_head.weight"])


@pytest.mark.parametrize(("weights", "seen"), [("nf4", "nf4"), ("fp16", "original"), (None, "original")])
def test_an_adapter_goes_into_the_weights_that_its_training_saw(weights, seen, base, adapters, tmp_path):
    adapter = copied(adapters["plain"], tmp_path / "finetune" / "adapter")
    if weights:
        save_yaml(RunConfig().with_values(weights=weights, double_quant=False), adapter.parent / "config.yaml")
    assert merge(base, adapter, tmp_path / "merged", MergeConfig())["merge_base"] == seen
    merge(base, adapter, tmp_path / "named", MergeConfig(merge_base=seen))
    got, wanted = tensors(tmp_path / "merged"), tensors(tmp_path / "named")
    assert all(torch.equal(got[name], wanted[name]) for name in wanted)
    assert load_yaml(tmp_path / "merged" / "config.yaml").merge.merge_base == seen


def test_result_is_a_folder_that_transformers_opens(base, adapters, tmp_path):
    output = tmp_path / "merged"
    merge(base, adapters["plain"], output, SMALL_SHARDS)
    model = AutoModelForCausalLM.from_pretrained(output)
    assert model.dtype == torch.float16
    assert model.generation_config.eos_token_id == 2
    text = "a pony eats oats"
    tokenizer = AutoTokenizer.from_pretrained(output)
    assert tokenizer(text)["input_ids"] == AutoTokenizer.from_pretrained(TINY)(text)["input_ids"]
    assert tokenizer.chat_template
    shards = list(output.glob("*.safetensors"))
    assert len(shards) > 1
    # a tensor larger than the limit has a shard of its own
    assert all(sum(v.numel() for v in load_file(shard).values()) * 2 <= 0.001 * 2**30 for shard in shards)
    index = json.loads((output / "model.safetensors.index.json").read_text())
    assert index["weight_map"] == {name: shard.name for shard in shards for name in load_file(shard)}
    assert require(output, "merge")["measurements"]["merge_base"] == "original"
    assert not [*tmp_path.glob("*.partial"), *tmp_path.glob("*.progress.json")]


def test_free_base_leaves_the_result_and_no_base_shard(base, adapters, tmp_path):
    merge(base, adapters["plain"], tmp_path / "kept", SMALL_SHARDS)
    copy = copied(base, tmp_path / "base")
    merge(copy, adapters["plain"], tmp_path / "freed", MergeConfig(shard_gib=0.001, free_base=True))
    assert tensors(tmp_path / "freed").keys() == tensors(tmp_path / "kept").keys()
    assert all(torch.equal(v, tensors(tmp_path / "kept")[n]) for n, v in tensors(tmp_path / "freed").items())
    assert not list(copy.glob("*.safetensors"))
    assert (copy / "config.json").is_file()


@given(st.lists(st.integers(1, 40), min_size=1, max_size=30), st.integers(1, 120))
def test_plan_holds_each_tensor_once_in_order_and_within_the_limit(sizes, limit):
    stored = [Stored(f"t{i}", Path(f"f{i % 3}"), (size,), "F16") for i, size in enumerate(sizes)]
    plan = plan_shards(stored, limit)
    assert [tensor for shard in plan.values() for tensor in shard] == stored
    assert all(len(shard) == 1 or sum(2 * t.values for t in shard) <= limit for shard in plan.values())
    total = sum(2 * size for size in sizes)
    assert disk_needed_bytes(plan, set(), free_base=False) == total
    assert disk_needed_bytes(plan, set(plan), free_base=False) == 0


@settings(deadline=None)
@given(st.lists(st.lists(st.integers(0, 5), max_size=3), min_size=1, max_size=5))
def test_writer_writes_what_safetensors_reads(tmp_path_factory, shapes):
    file = tmp_path_factory.mktemp("writer") / "x.safetensors"
    values = {f"t{i}": torch.randn(shape).half() for i, shape in enumerate(shapes)}
    with SafetensorsWriter(file, {name: tuple(value.shape) for name, value in values.items()}) as writer:
        for value in values.values():
            writer.add(value)
    read = load_file(file)
    assert read.keys() == values.keys()
    assert all(torch.equal(read[name], value) for name, value in values.items())
    assert writer.sha256 == hashlib.sha256(file.read_bytes()).hexdigest()


# ---- what it refuses -------------------------------------------------------------------------------------------------


def without(file: Path, name: str) -> None:
    """Take a tensor out of a safetensors file."""
    save_file({key: value for key, value in load_file(file).items() if key != name}, file, metadata={"format": "pt"})


def add_unknown_key(adapter: Path) -> None:
    file = adapter / "adapter_model.safetensors"
    save_file(load_file(file) | {"base_model.model.extra": torch.zeros(1)}, file, metadata={"format": "pt"})


def rename_layers(adapter: Path) -> None:
    file = adapter / "adapter_model.safetensors"
    renamed = {key.replace("layers.1.", "layers.7."): value for key, value in load_file(file).items()}
    save_file(renamed, file, metadata={"format": "pt"})


def widen(adapter: Path) -> None:
    file = adapter / "adapter_model.safetensors"
    grown = load_file(file)
    name = f"{PREFIX}model.layers.0.self_attn.q_proj{PARTS[0]}"
    grown[name] = torch.zeros(4, 128)
    save_file(grown, file, metadata={"format": "pt"})


def truncate(base: Path) -> None:
    shard = sorted(base.glob("*.safetensors"))[1]
    with shard.open("r+b") as stream:
        stream.truncate(shard.stat().st_size - 100)


def say_quantized(base: Path) -> None:
    path = base / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"quantization_config": {"quant_method": "gptq"}}))


def claim_a_tebibyte(base: Path) -> None:
    """A sparse file with a good header: it takes no room, and its merge would."""
    for shard in base.glob("*.safetensors"):
        shard.unlink()
    (base / "model.safetensors.index.json").unlink()
    end = 2 * 2**20 * 2**21
    header = {"model.big.weight": {"dtype": "F16", "shape": [2**20, 2**21], "data_offsets": [0, end]}}
    text = json.dumps(header).encode()
    with (base / "model.safetensors").open("wb") as stream:
        stream.write(struct.pack("<Q", len(text)) + text)
        stream.truncate(8 + len(text) + end)


BROKEN_ADAPTERS = {
    "other kind": (lambda a: edited(a, peft_type="LOHA"), "LOHA"),
    "modules to save": (lambda a: edited(a, modules_to_save=["lm_head"]), "modules_to_save"),
    "biases": (lambda a: edited(a, bias="all"), "bias=all"),
    "pissa": (lambda a: edited(a, init_lora_weights="pissa_niter_4"), "pissa"),
    "no config": (lambda a: (a / "adapter_config.json").unlink(), "adapter_config.json"),
    "no weights": (lambda a: (a / "adapter_model.safetensors").unlink(), "missing"),
    "a key too many": (add_unknown_key, "base_model.model.extra"),
    "a key too few": (
        lambda a: without(a / "adapter_model.safetensors", f"{PREFIX}model.layers.0.mlp.up_proj{PARTS[1]}"),
        "up_proj.lora_B.weight",
    ),
    "other names": (rename_layers, "layers.7."),
    "other shapes": (widen, "96 × 128"),
}
BROKEN_BASES = {
    "missing shard": (lambda b: sorted(b.glob("*.safetensors"))[1].unlink(), "is missing"),
    "truncated": (truncate, "cut short"),
    "not safetensors": (lambda b: sorted(b.glob("*.safetensors"))[0].write_bytes(b"no"), "not a safetensors file"),
    "no config": (lambda b: (b / "config.json").unlink(), "config.json"),
    "quantized": (say_quantized, "already quantized (gptq)"),
}


def refusal(tmp_path: Path, *arguments) -> str:
    """The sentence that merge refuses with, after making sure that it wrote and left nothing."""
    before = contents(tmp_path)
    with pytest.raises(ValueError) as caught:
        merge(*arguments)
    assert contents(tmp_path) == before
    assert not [*tmp_path.glob("*.partial"), *tmp_path.glob("*.progress.json")]
    sentence = str(caught.value)
    assert "\n" not in sentence
    return sentence


@pytest.mark.parametrize("how", BROKEN_ADAPTERS)
def test_refuses_an_adapter(how, base, adapters, tmp_path):
    adapter = copied(adapters["plain"], tmp_path / "adapter")
    breaking, words = BROKEN_ADAPTERS[how]
    breaking(adapter)
    assert words in refusal(tmp_path, base, adapter, tmp_path / "merged", MergeConfig())


@pytest.mark.parametrize("how", BROKEN_BASES)
def test_refuses_a_base(how, base, adapters, tmp_path):
    copy = copied(base, tmp_path / "base")
    breaking, words = BROKEN_BASES[how]
    breaking(copy)
    assert words in refusal(tmp_path, copy, adapters["plain"], tmp_path / "merged", MergeConfig())


def test_refuses_too_little_disk_with_both_numbers(adapters, base, tmp_path):
    copy = copied(base, tmp_path / "base")
    claim_a_tebibyte(copy)
    adapter = copied(adapters["plain"], tmp_path / "adapter")
    edited(adapter, r=1)
    thin = {
        f"{PREFIX}model.big{PARTS[0]}": torch.zeros(1, 2**21),
        f"{PREFIX}model.big{PARTS[1]}": torch.zeros(2**20, 1),
    }
    save_file({name: value.half() for name, value in thin.items()}, adapter / "adapter_model.safetensors")
    with pytest.raises(ValueError, match=r"needs 4096\.06 GiB of disk .* are free; free_base=True needs 4096\.06$"):
        merge(copy, adapter, tmp_path / "merged", MergeConfig(shard_gib=1))
    assert {path.name for path in tmp_path.iterdir()} == {"base", "adapter"}


def test_refuses_an_output_in_use(base, adapters, tmp_path):
    mine = tmp_path / "mine"
    mine.mkdir()
    (mine / "thesis.txt").write_text("do not lose this")
    assert "in use" in refusal(tmp_path, base, adapters["plain"], mine, MergeConfig())
    assert "is a file" in refusal(tmp_path, base, adapters["plain"], mine / "thesis.txt", MergeConfig())
    assert "lie in each other" in refusal(tmp_path, base, adapters["plain"], base, MergeConfig())
    with exclusive(tmp_path / "merged.partial"), pytest.raises(ValueError, match="in use by another process"):
        merge(base, adapters["plain"], tmp_path / "merged", MergeConfig())
    assert not (tmp_path / "merged").exists()


def test_refuses_values_that_fp16_cannot_hold(base, adapters, tmp_path):
    copy = copied(base, tmp_path / "base")
    shard = next(s for s in copy.glob("*.safetensors") if "model.norm.weight" in load_file(s))
    values = load_file(shard)
    values["model.norm.weight"] = torch.full((96,), 1e6)
    save_file(values, shard, metadata={"format": "pt"})
    assert "65504" in refusal(tmp_path, copy, adapters["plain"], tmp_path / "merged", SMALL_SHARDS)


# ---- what it survives ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("free_base", [False, True])
def test_killed_at_each_kind_of_moment_it_ends_in_the_same_bytes(free_base, base, adapters, tmp_path):
    """Each operation on each kind of file, at its first and at its last; with a base that is freed, at its deletions.

    Of the small files beside the shards no write: that they are half-written is as good as that they lack their name.
    """
    scene, config = tmp_path / "scene", MergeConfig(shard_gib=0.001, free_base=free_base)
    output = scene / "merged"

    def act() -> dict:
        torch.set_num_threads(1)  # a fork has no thread but one
        return merge(scene / "base", adapters["dora"], output, config)

    def result() -> dict[str, str]:
        """Everything but the configuration, which says whether the base was freed."""
        return {name: digest for name, digest in contents(output).items() if name != "config.yaml"}

    threads = torch.get_num_threads()
    copied(base, scene / "base")
    counted = "write,fsync,rename,unlink,mkdir"
    assert not kill_at.is_killed(act, scene, 10**9, counted=counted, log=tmp_path / "log")
    whole = result()
    resumed = []
    moments = [one for one in faults.moments(tmp_path / "log") if one.operation != "write" or "safetensors" in one.path]
    moments = [moment for moment in moments if not free_base or moment.path.startswith("base/")]
    for moment in kill_at.each_kind(moments):
        shutil.rmtree(scene)
        copied(base, scene / "base")
        assert kill_at.is_killed(act, scene, moment.value, counted=counted), moment
        if not output.exists():
            resumed.append(act()["shards_resumed"])
        assert require(output, "merge"), moment
        assert result() == whole, moment
        assert {path.name for path in scene.iterdir()} <= {"base", "merged", "merged.partial"}
        assert not [path for path in scene.rglob("*") if "progress" in path.name or "partial" in path.name]
    torch.set_num_threads(threads)
    assert max(resumed) > 0 and len(resumed) >= (2 if free_base else 15)


def test_what_an_interrupted_merge_left_is_trusted_only_when_whole(base, adapters, tmp_path):
    whole, output, work = tmp_path / "whole", tmp_path / "merged", tmp_path / "merged.partial"
    merge(base, adapters["plain"], whole, SMALL_SHARDS)
    shards = sorted(file.name for file in whole.glob("*.safetensors"))
    good = {name: (whole / name).read_bytes() for name in shards[:1]}
    flipped = {name: data[:-1] + bytes([data[-1] ^ 1]) for name, data in good.items()}
    other = MergeConfig(shard_gib=0.001, merge_base="nf4")
    for left, config, resumed in ((good, SMALL_SHARDS, 1), (flipped, SMALL_SHARDS, 0), (good, other, 0)):
        work.mkdir()
        for name, data in left.items():
            (work / name).write_bytes(data)
        (work / f"{shards[1]}.tmp").write_bytes(b"half a shard")
        identity = helpers.merge.fingerprint(stored_tensors(base), adapters["plain"], config, {})
        finished = {name: hashlib.sha256(data).hexdigest() for name, data in good.items()}
        state = {"identity": identity, "tensors": [], "finished": finished}
        helpers.merge.progress_file(output).parent.mkdir()
        helpers.merge.progress_file(output).write_text(json.dumps(state))
        (work / MARK).touch()
        assert merge(base, adapters["plain"], output, SMALL_SHARDS)["shards_resumed"] == resumed
        assert contents(output) == contents(whole)


# ---- what is there already -------------------------------------------------------------------------------------------


def trained(run: Workspace, adapter: Path, config: RunConfig) -> Path:
    """A run whose training ended in this adapter."""
    with building(run.folder("finetune"), "finetune", config) as stage:
        copied(adapter, stage.folder / "adapter")
    return run.folder("finetune") / "adapter"


def test_a_finished_merge_is_found_again_and_any_other_is_made_anew(base, adapters, tmp_path, capsys):
    run = Workspace(tmp_path / "run")
    config = RunConfig().with_values(model=str(base), shard_gib=0.001, merge_base="original")
    trained(run, adapters["plain"], config)
    first = merged(run, config)
    made = (run.folder("merge") / "manifest.json").read_bytes()
    assert merged(run, config) == first, "what the budget is held to is the measurement of the merge itself"
    assert "used as it is" in capsys.readouterr().out
    assert (run.folder("merge") / "manifest.json").read_bytes() == made

    def made_anew(now: RunConfig) -> bool:
        before = (run.folder("merge") / "manifest.json").stat().st_ino
        merged(run, now)
        return (run.folder("merge") / "manifest.json").stat().st_ino != before

    assert made_anew(config.with_values(shard_gib=0.002))
    trained(run, adapters["dora"], config)
    assert made_anew(config), "another training"
    shard = next(run.folder("merge").glob("*.safetensors"))
    shard.write_bytes(shard.read_bytes()[:-1] + b"?")
    assert made_anew(config), "a damaged byte"
    assert not made_anew(config)


def test_a_finished_merge_needs_no_base_any_more(base, adapters, tmp_path):
    run, copy = Workspace(tmp_path / "run"), copied(base, tmp_path / "base")
    config = RunConfig().with_values(model=str(copy), merge_base="original", free_base=True)
    trained(run, adapters["plain"], config)
    first = merged(run, config)
    assert not list(copy.glob("*.safetensors"))
    assert merged(run, config) == first
