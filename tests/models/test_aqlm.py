"""AQLM checkpoints in the hub's layout, opened, trained and refused; held against a twin whose matrices are dense."""

import json
from pathlib import Path

import numpy as np
import pytest
import random_model
import torch
from peft import PeftModel
from safetensors.numpy import load_file

from helpers import inference
from helpers.budget import vram
from helpers.finetune import attach_adapter, base, load_base
from helpers.models import TINY, aqlm, profile, shape
from helpers.models.aqlm_sizes import ADDITIVE_1X16, ADDITIVE_2X8, Layout

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
    config = config_for(checkpoint, kernels=kernels)
    models = [attach_adapter(load_base(config)[0], config), twin_of(checkpoint, config, tmp_path)]
    ids, found = random_ids(), []
    for model in models:
        for name, value in base.adapters(model):
            if "lora_B" in name:  # zero at the start, and then A has no gradient
                torch.nn.init.normal_(value, std=0.05, generator=torch.Generator().manual_seed(len(name)))
        if kernels == "own":
            from helpers.finetune.engine import layers

            layers.check(model.get_base_model())
            layers.install(model.get_base_model(), ["attention", "everything"])
        output = model(input_ids=ids, labels=ids)
        output.loss.backward()
        found.append((output.logits.detach(), {name: value.grad for name, value in base.adapters(model)}))
    (logits, gradients), (expected, wanted) = found
    assert (logits - expected).abs().max() < 1e-6 * expected.abs().max().clamp(min=1)
    assert len(gradients) == len(wanted) == 2 * 7 * 2
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
