"""The answers to the notebooks' exercises, computed: each bold number stands in its notebook as it comes out here."""

import math
import re
from pathlib import Path

import nbformat
import pytest
from scipy.stats import binomtest

from helpers import budget, hardware, models, prepare
from helpers.budget import nf4, vram
from helpers.models import ROOT, TINY, profile
from helpers.show import figures

T4, SEVEN = hardware.machine("t4"), models.shape("mistral-7b-v0.3")
TEXT = (ROOT / "data" / "evaluation.txt").read_text(encoding="utf-8")


def answers(number):
    """The bold numbers under "Try it", in their order."""
    (path,) = Path(ROOT / "notebooks").glob(f"0{number}_*.ipynb")
    cells = [cell.source for cell in nbformat.read(path, as_version=4).cells if cell.source.startswith("## Try it")]
    (text,) = cells
    asked, _, answered = text.partition("<summary>Answers</summary>")
    assert len(re.findall(r"^\d\. ", asked, re.MULTILINE)) == len(re.findall(r"^\d\. ", answered, re.MULTILINE)) == 2
    return re.findall(r"\*\*(.+?)\*\*", answered)


def test_notebook_1_rank_64_and_a_gib_of_keys_and_values():
    trained = [profile("mistral-7b", rank=rank, checkpointing="all", optimizer="paged_adamw_8bit") for rank in (16, 64)]
    small, large = (budget.budget(config, SEVEN, T4).vram.process_gib for config in trained)
    tokens = 2**30 / SEVEN.kv_cache_bytes_per_token()
    assert answers(1) == [f"{large - small:.1f} GiB", f"{tokens:,.0f}"]
    targets = trained[0].adapter.target_modules
    more = SEVEN.lora_parameters(64, targets) - SEVEN.lora_parameters(16, targets)
    assert round(more / 1e6) == 126


def test_notebook_2_a_short_context_and_a_masked_end(tmp_path):
    made = prepare.prepare(profile("tiny", seq_len=64), tmp_path / "prepare")
    touched = made["cut_share"] * (made["train_rows"] + made["heldout_rows"]) + made["dropped"].get("over-context", 0)
    assert answers(2) == [f"{touched / made['in']:.1%}", "10"]


def test_notebook_3_ranks_and_blocks():
    shape, config = models.shape(str(TINY)), profile("tiny")
    trained = [shape.lora_parameters(rank, config.adapter.target_modules) for rank in (4, 64)]
    assert nf4.bits_per_weight(double_quant=False) == 4 + 32 / nf4.BLOCK
    assert answers(3) == [*(f"{count:,}" for count in trained), f"{4 + 32 / 32:.1f}"]


def test_notebook_4_groups_of_32_and_two_bits():
    def gptq_gib(group_size):
        config = profile("mistral-7b", group_size=group_size)
        return budget.budget(config, SEVEN, T4, stage="quantize").disk.parts["GPTQ model"]

    found = figures.sample_sweep(TINY, TEXT, bits=2)
    assert answers(4) == [f"{gptq_gib(32):.1f} GiB", f"{found.rounding_error / found.gptq_error:.1f} times"]
    assert f"{gptq_gib(128):.1f}" == "3.9"
    in_three = figures.sample_sweep(TINY, TEXT)
    assert f"{in_three.rounding_error / in_three.gptq_error:.1f}" == "1.7"


def test_notebook_5_votes_and_questions():
    enough = next(wins for wins in range(5, 11) if binomtest(wins, 10).pvalue < 0.05)
    assert [round(binomtest(wins, 10).pvalue, 2) for wins in (8, 9)] == [0.11, 0.02]
    assert answers(5) == [str(enough), f"{math.ceil(0.25 * (1.96 / 0.02) ** 2):,}"]


@pytest.mark.parametrize("number", range(1, 6))
def test_every_notebook_has_two_exercises_and_names_what_to_read(number):
    (path,) = Path(ROOT / "notebooks").glob(f"0{number}_*.ipynb")
    text = "\n".join(cell.source for cell in nbformat.read(path, as_version=4).cells)
    assert answers(number)
    assert len(re.findall(r"\]\(https://", text.partition("## Further reading")[2])) >= 3


def test_notebook_7_a_mixtures_weights_and_its_experts_adapters():
    shape = models.shape("mixtral-8x7b")
    parts = vram.weights(profile("mistral-7b"), shape)
    trained = [profile("tiny", targets=targets).adapter.target_modules for targets in ("attention", "all-linear")]
    assert answers(7) == [
        f"{sum(parts.values()) / 2**30:.1f}",
        *(f"{shape.lora_parameters(16, one):,}" for one in trained),
    ]
