"""Mixtures in a notebook: what fits is what the budget says, and every token that an expert reads is counted."""

import doctest
from dataclasses import replace

import pytest
import torch

from helpers import budget, hardware
from helpers.models import TINY, experts, loading, profile, shape
from helpers.show import mixture, plots


def test_examples_in_docstrings():
    assert doctest.testmod(mixture).failed == 0


def test_the_table_has_a_row_a_mixture_and_target_and_says_what_fits_where():
    rows = mixture.fitting(hardware.machine("4090"))
    assert [(row["mixture"], row["adapters on"]) for row in rows] == [
        ("Mixtral-8x7B-v0.1", "attention"), ("Mixtral-8x7B-v0.1", "all-linear"), ("Qwen3-30B-A3B", "attention"),
        ("Mixtral-8x7b-AQLM-2Bit-1x16-hf", "attention"),
    ]  # fmt: skip
    attention, everything, qwen, two_bits = rows
    assert attention["this machine"] == attention["Tesla T4"] == "–" and attention["weights"] == "22.8 GiB, NF4"
    assert attention["GeForce RTX 5090"] == 8192 and attention["NVIDIA A100 40 GB"] == 8192
    assert everything["GeForce RTX 5090"] <= attention["GeForce RTX 5090"]
    assert qwen["this machine"] == 8192
    assert two_bits["weights"] == "12.2 GiB, AQLM" and two_bits["Tesla T4"] == 4096


def test_a_row_says_of_a_card_what_a_run_there_would_do():
    t4 = hardware.machine("t4")
    config, sizes = mixture.settings("mixtral-8x7b-aqlm", targets="attention", batch_size=1), shape("mixtral-8x7b-aqlm")
    runs = [n for n in mixture.CONTEXTS if budget.settle(config.with_values(seq_len=n), sizes, t4).budget.fits]
    assert mixture.longest("mixtral-8x7b-aqlm", "attention", t4) == max(runs) == 4096
    no_room = replace(t4, host=replace(t4.host, disk_gib=10.0))  # a download of 12 GiB
    assert mixture.longest("mixtral-8x7b-aqlm", "attention", no_room) == 0


def test_the_mixture_that_fits_is_taken_else_a_toy_with_a_word(tmp_path, capsys):
    assert mixture.start("mistral-7b", hardware.machine("a100-40"), tmp_path).model.model.endswith("Mixtral-8x7B-v0.1")
    assert mixture.start("mistral-7b", hardware.machine("4090"), tmp_path).model.model == "Qwen/Qwen3-30B-A3B"
    two_bits = mixture.start("mistral-7b", hardware.machine("t4"), tmp_path)
    assert (two_bits.model.weights, two_bits.data.seq_len) == ("aqlm", 1024)
    assert set(mixture.compared(two_bits, tmp_path, hardware.machine("t4"))) == {"base", "finetuned"}
    small = replace(hardware.machine("t4"), free_vram_gib=11.0)
    toy = mixture.start("mistral-7b", small, tmp_path)
    assert (
        toy.model.model == str(tmp_path / "tiny-mixture") and "DEMO: a toy of four experts" in capsys.readouterr().out
    )
    assert mixture.start("tiny", hardware.machine("cpu"), tmp_path).model.model == toy.model.model
    big = hardware.machine("h200")
    assert set(mixture.compared(toy, tmp_path, big)) == {"base", "finetuned"}
    assert set(
        mixture.compared(profile("mistral-7b", model="mixtral-8x7b"), tmp_path, replace(big, free_vram_gib=40))
    ) == {"finetuned"}


def test_every_token_is_counted_for_each_of_its_experts(tmp_path):
    model = loading.causal_lm(experts.tiny_mixture(tmp_path / "mixture"), dtype=torch.float32)
    shares = experts.shares(model, [[5, 6, 7], [8, 9]])
    assert [sum(layer) for layer in shares] == pytest.approx([2.0] * 4)
    assert not any(part._forward_hooks for part in model.modules())
    assert plots.alt_text(mixture.routing(shares)).startswith("Who reads what: tokens of each expert")
    with pytest.raises(ValueError, match="no router"):
        experts.shares(loading.causal_lm(TINY), [[5]])
