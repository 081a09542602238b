"""AQLM checkpoints in the hub's layout, opened, trained and refused; held against a twin whose matrices are dense."""

import doctest
import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import random_model
import torch
from peft import PeftModel
from safetensors.numpy import load_file

from helpers import budget, hardware, inference, merge, quantize
from helpers.budget import vram
from helpers.config import MergeConfig, QuantizeConfig
from helpers.finetune import attach_adapter, base, load_base
from helpers.finetune.engine import layers
from helpers.models import TINY, aqlm, aqlm_sizes, experts, families, profile, shape
from helpers.models.aqlm_sizes import ADDITIVE_1X16, ADDITIVE_2X8, Layout
from helpers.models.stored import UnusableModel
from helpers.quantize import additive
from helpers.workspace import Workspace, run_models

LAYOUTS = {"1x16": Layout(1, 12), "2x8": ADDITIVE_2X8, "1x16 whole": ADDITIVE_1X16}
"""The first is 1x16 but for the size of a codebook, which is 1 MiB a matrix there."""


@pytest.fixture(scope="module", params=["1x16", "2x8"])
def checkpoint(request, tmp_path_factory) -> Path:
    """Two layers of the tiny Mistral's shape, in three files."""
    return random_model.make_aqlm(tmp_path_factory.mktemp("aqlm"), str(TINY), 2, LAYOUTS[request.param])


def dense_tensors(folder: Path) -> dict[str, torch.Tensor]:
    """Every tensor of a checkpoint's dense twin, by the paper's formula in numpy."""
    stored = {name: value for file in sorted(folder.glob("*.safetensors")) for name, value in load_file(file).items()}
    tensors = {}
    for name, value in stored.items():
        module, _, part = name.rpartition(".")
        if part == "codes":
            books, scales = (stored[f"{module}.{other}"].astype(np.float32) for other in ("codebooks", "scales"))
            index = value.astype(np.int64) % books.shape[1]  # (out, groups, codebooks)
            total = sum(books[book, index[..., book], 0] for book in range(len(books)))
            tensors[f"{module}.weight"] = (total * scales[:, 0]).reshape(len(value), -1)
        elif part not in ("codebooks", "scales"):
            tensors[name] = value.astype(np.float32)
    return {name: torch.from_numpy(value) for name, value in tensors.items()}


def config_for(folder: Path, **values):
    """The tiny profile on a checkpoint; a batch without dropout has one answer."""
    return profile("tiny", model=str(folder), weights="aqlm", **values)


def twin_of(folder: Path, config, tmp_path: Path) -> PeftModel:
    """The same model from dense matrices, with the same adapters."""
    from safetensors.torch import save_file

    settings = json.loads((folder / "config.json").read_text())
    del settings["quantization_config"]
    twin = tmp_path / "twin"
    twin.mkdir()
    (twin / "config.json").write_text(json.dumps(settings | {"dtype": "float32", "torch_dtype": "float32"}))
    for file in ("tokenizer.json", "tokenizer_config.json"):
        (twin / file).write_bytes((folder / file).read_bytes())
    save_file(dense_tensors(folder), twin / "model.safetensors", {"format": "pt"})
    dense = config.with_values(model=str(twin), weights="fp16")
    return attach_adapter(load_base(dense)[0], dense)


def random_ids(rows: int = 2, tokens: int = 24) -> torch.Tensor:
    return torch.randint(3, 300, (rows, tokens), generator=torch.Generator().manual_seed(1))


def test_examples_in_docstrings():
    assert doctest.testmod(aqlm_sizes).failed == 0 == doctest.testmod(additive).failed


@pytest.mark.parametrize("layout", LAYOUTS.values(), ids=list(LAYOUTS))
def test_a_matrix_is_the_papers_formula(layout, tmp_path):
    folder = random_model.make_aqlm(tmp_path, str(TINY), 1, layout)
    model, _ = load_base(config_for(folder))
    dense = dense_tensors(folder)
    for name, module in model.named_modules():
        if isinstance(module, aqlm.AdditiveLinear):
            assert torch.equal(module.dense(torch.float32), dense[f"{name}.weight"]), name
    assert type(model.lm_head) is torch.nn.Linear, "transformers' own integration makes it a random quantized layer"
    assert torch.equal(model.lm_head.weight, dense["lm_head.weight"])


@pytest.mark.parametrize("kernels", ["own", "plain"])
def test_logits_and_lora_gradients_are_those_of_the_dense_twin(checkpoint, kernels, tmp_path):
    compare_with_twin(checkpoint, config_for(checkpoint, kernels=kernels), tmp_path)


def compare_with_twin(folder: Path, config, tmp_path: Path) -> None:
    """Logits and gradients of adapters that do something, as our own layers or transformers' compute them."""
    found, ids = [], random_ids()
    for model in (attach_adapter(load_base(config)[0], config), twin_of(folder, config, tmp_path)):
        for name, value in base.adapters(model):
            if "lora_B" in name:  # zero at the start, and then A has no gradient
                torch.nn.init.normal_(value, std=0.05, generator=torch.Generator().manual_seed(len(name)))
        if families.layers(shape(str(folder)).family, config).computes == "own":
            layers.check(model.get_base_model())
            layers.install(model.get_base_model(), ["attention", "everything"])
        output = model(input_ids=ids, labels=ids)
        output.loss.backward()
        found.append((output.logits.detach(), {name: value.grad for name, value in base.adapters(model)}))
    (logits, gradients), (expected, wanted) = found
    assert (logits - expected).abs().max() < 1e-6 * expected.abs().max().clamp(min=1)
    assert len(gradients) == len(wanted) == 2 * 2 * len(config.adapter.target_modules)
    for name, gradient in gradients.items():
        assert (gradient - wanted[name]).abs().max() < 1e-6 * wanted[name].abs().max(), name


def test_an_adapter_saved_and_opened_again_says_the_same(checkpoint, tmp_path):
    config = config_for(checkpoint, targets="attention")
    model = attach_adapter(load_base(config)[0], config)
    for _, value in base.adapters(model):
        torch.nn.init.normal_(value, std=0.05)
    model.save_pretrained(tmp_path / "adapter")
    with torch.inference_mode():
        expected = model.eval()(random_ids()).logits
        # its base's folder says that it is AQLM's, whatever the run was configured to
        opened = inference.load(tmp_path / "adapter", config.with_values(weights="nf4"))
        assert opened.kind == "adapter" and torch.equal(opened.model(random_ids()).logits, expected)
        plain = inference.load(checkpoint, config)
    assert plain.kind == "aqlm" and "AQLM" in plain.how
    assert inference.batch_generate(plain, ["<s>a"], max_new_tokens=2)[0].tokens <= 2


def test_budgeted_bytes_are_the_checkpoints(checkpoint):
    stored = sum(value.nbytes for file in checkpoint.glob("*.safetensors") for value in load_file(file).values())
    assert sum(vram.weights(config_for(checkpoint), shape(str(checkpoint))).values()) == stored


def test_a_t4_is_told_which_contexts_of_mixtral_fit():
    """12.19 GiB of weights, as the hub's shards; LoRA on attention fits up to 4,096 tokens, on experts nowhere."""
    sizes, t4 = shape("ISTA-DASLab/Mixtral-8x7b-AQLM-2Bit-1x16-hf"), hardware.machine("t4")
    config = profile("mistral-7b", model=sizes.name, weights="aqlm", targets="attention", batch_size=1)
    assert sum(vram.weights(config, sizes).values()) / 2**30 == pytest.approx(12.194, abs=0.001)
    fits = {n: budget.settle(config.with_values(seq_len=n), sizes, t4).budget.fits for n in (512, 2048, 4096, 8192)}
    assert fits == {512: True, 2048: True, 4096: True, 8192: False}
    everywhere = config.with_values(targets="all-linear", seq_len=512)
    assert not budget.settle(everywhere, sizes, t4).budget.fits
    run = budget.budget(config, sizes, t4, "run")
    assert {"download", "training", "evaluation"} <= set(run.time.parts) and not {"merging", "GPTQ"} & set(
        run.time.parts
    )
    assert run.disk.parts["base, AQLM 1x16"] == pytest.approx(12.194, abs=0.001)
    assert "merged model" not in run.disk.parts


@pytest.mark.parametrize(
    ("values", "sentence"),
    [
        ({"weights": "nf4"}, "is stored as AQLM 1x16: set weights=aqlm, not nf4"),
        ({"model": "mistral-7b-v0.3"}, "weights=aqlm needs a model that is stored so, and mistral-7b-v0.3 is not"),
        ({"dora": True}, "dora needs the norms of dense weights"),
    ],
)
def test_what_does_not_go_with_such_weights_is_a_sentence(values, sentence):
    config = profile("mistral-7b", **({"model": "mistral-7b-aqlm", "weights": "aqlm"} | values))
    with pytest.raises(ValueError, match=sentence):
        budget.plan(config, shape(config.model.model), hardware.machine("t4"))
    with pytest.raises(ValueError, match=sentence):
        load_base(config)


def changed(folder: Path, to: Path, **settings) -> Path:
    """A copy of a checkpoint whose config.json says something else of its quantization."""
    shutil.copytree(folder, to)
    config = json.loads((to / "config.json").read_text())
    config["quantization_config"] |= settings
    (to / "config.json").write_text(json.dumps(config))
    return to


def test_a_checkpoint_that_is_not_as_it_says_is_a_sentence(checkpoint, tmp_path):
    groups = changed(checkpoint, tmp_path / "groups", in_group_size=16)
    with pytest.raises(UnusableModel, match=r"codebooks of \(.*, 8\), and config.json says .* for groups of 16"):
        load_base(config_for(groups))
    books = changed(checkpoint, tmp_path / "books", num_codebooks=3)
    with pytest.raises(UnusableModel, match=r"config\.json says 3x"):
        load_base(config_for(books))
    rows = changed(checkpoint, tmp_path / "rows", out_group_size=2)
    with pytest.raises(ValueError, match="out_group_size=2: AQLM is read here with codes of at most 16 bits"):
        shape(str(rows))
    missing = changed(checkpoint, tmp_path / "missing")
    (missing / "model-00002.safetensors").unlink()
    with pytest.raises(UnusableModel, match=r"model-00002\.safetensors is missing: download or copy the folder again"):
        load_base(config_for(missing))


def test_merging_and_quantizing_are_refused_with_what_one_can_do(checkpoint, tmp_path):
    config = config_for(checkpoint, targets="attention")
    attach_adapter(load_base(config)[0], config).save_pretrained(tmp_path / "finetune" / "adapter")
    for work in (
        lambda: merge.merge(str(checkpoint), tmp_path / "finetune" / "adapter", tmp_path / "merge", MergeConfig()),
        lambda: quantize.quantize(checkpoint, tmp_path / "quantize", QuantizeConfig(calibration="general")),
    ):
        with pytest.raises(ValueError, match="use the adapter on its base, as evaluate and serve open it"):
            work()
    assert [path.name for path in tmp_path.iterdir()] == ["finetune"]


def test_a_run_of_such_a_model_misses_no_merged_one(checkpoint, tmp_path, capsys):
    assert run_models(Workspace(tmp_path), config_for(checkpoint)) == {"base": str(checkpoint)}
    said = capsys.readouterr().out
    assert "finetuned is left out" in said and "merged" not in said and "gptq" not in said


def test_a_mixture_in_the_hubs_layout_opens_and_trains(tmp_path):
    random_model.make_aqlm(tmp_path / "aqlm", str(experts.tiny_mixture(tmp_path / "dense")), 2, ADDITIVE_2X8)
    config = config_for(tmp_path / "aqlm", targets="attention")
    stored = json.loads((tmp_path / "aqlm" / "model.safetensors.index.json").read_text())["weight_map"]
    assert "model.layers.1.block_sparse_moe.experts.3.w2.codes" in stored
    parts = vram.weights(config, shape(str(tmp_path / "aqlm")))
    files = (tmp_path / "aqlm").glob("*.safetensors")
    assert sum(parts.values()) == sum(value.nbytes for file in files for value in load_file(file).values())
    compare_with_twin(tmp_path / "aqlm", config, tmp_path)


def test_what_is_listed_by_its_name_on_disk_stays_dense_and_pickles_open_too(tmp_path):
    """As the paper's own conversion writes it: one pickle, and names of a Mixtral's experts as they lie on disk."""
    folder = random_model.make_aqlm(tmp_path / "hub", str(experts.tiny_mixture(tmp_path / "dense")), 1, ADDITIVE_2X8)
    name = "model.layers.0.block_sparse_moe.experts.1.w2"
    from safetensors.torch import load_file as load_torch

    stored = {key: value for file in folder.glob("*.safetensors") for key, value in load_torch(file).items()}
    dense = dense_tensors(folder)[f"{name}.weight"].half()
    kept = {key: value for key, value in stored.items() if not key.startswith(f"{name}.")} | {f"{name}.weight": dense}
    for file in folder.glob("*.safetensors*"):
        file.unlink()
    torch.save(kept, folder / "pytorch_model.bin")
    config = json.loads((folder / "config.json").read_text())
    config["quantization_config"]["linear_weights_not_to_quantize"].append(f"{name}.weight")
    (folder / "config.json").write_text(json.dumps(config))
    layers = load_base(config_for(folder, targets="attention"))[0].model.layers[0].mlp.experts
    assert type(layers[1].down_proj) is torch.nn.Linear and torch.equal(layers[1].down_proj.weight.half(), dense)
    assert type(layers[1].up_proj) is type(layers[0].down_proj) is aqlm.AdditiveLinear
