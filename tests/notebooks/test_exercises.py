"""What notebooks say in numbers, computed: the bold answers to exercises, and what a title says of a free T4."""

import math
import re
from pathlib import Path

import nbformat
import pytest
import torch
from scipy.stats import binomtest

from helpers import budget, hardware, models, prepare
from helpers.budget import export as export_budget
from helpers.budget import nf4, vram
from helpers.config import TrainConfig
from helpers.finetune import preferences
from helpers.models import ROOT, TINY, gguf_types, profile
from helpers.show import figures, mixture, pairs

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


def test_notebook_6_a_blocks_bits_and_what_a_phone_opens():
    bits = 8 * gguf_types.row_bytes(32, "Q8_0") / 32
    opened = [row["type"] for row in export_budget.runs_on(SEVEN, ram_gib=6) if row["on 6 GB"] == "yes"]
    assert answers(6) == [f"{bits:.1f}", opened[0]]
    needs = {row["type"]: row["RAM at 4,096 tokens, GiB"] for row in export_budget.runs_on(SEVEN, ram_gib=6)}
    assert (needs["IQ3_S"], needs["Q3_K_M"]) == (3.8, 4.1)


@pytest.mark.parametrize("number", range(1, 9))
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


def test_notebook_8_nats_for_a_margin_and_the_loss_at_the_start():
    def judged(better_by, beta):
        sums = torch.tensor([better_by - 7.0, -7.0])
        judge = preferences.objective(TrainConfig(method="dpo", beta=beta, sft_weight=0.0))
        found = judge(sums, torch.tensor([4, 4]), torch.full((2,), -7.0), None)
        return float(found.figures[2]), float(found.loss)

    (small, _), (large, _), (_, start) = judged(10.0, 0.1), judged(1.0, 1.0), judged(0.0, 0.1)
    assert small == pytest.approx(large) == pytest.approx(1)
    assert answers(8) == ["1", f"{start:.3f}"]


def promised(number):
    """What a notebook's first cell says of the 7B on a free T4."""
    (path,) = Path(ROOT / "notebooks").glob(f"0{number}_*.ipynb")
    return nbformat.read(path, as_version=4).cells[0].source


def test_the_hours_minutes_and_gib_of_a_free_t4_are_what_the_budget_says_today():
    plan = budget.plan(profile("mistral-7b"), SEVEN, T4)
    of = {stage: budget.budget(plan.config, SEVEN, T4, stage=stage) for stage in ("merge", "quantize", "inference")}
    minutes = {stage: 60 * found.time.total_h for stage, found in of.items()}
    dpo = budget.plan(pairs.lessons("mistral-7b", "adapter"), SEVEN, T4).budget
    first = budget.plan(pairs.habits("mistral-7b"), SEVEN, T4).budget
    gguf = 60 * export_budget.needs(plan.config, SEVEN, T4).time.total_h
    vram_gib = {way: sum(vram.weights(mixture.settings(way), models.shape(way)).values()) / 2**30 for way in EXPERTS}
    says = {
        3: f"{plan.budget.time.total_h:.1f} hours and {plan.budget.vram.process_gib:.1f} GiB of VRAM",
        4: f"{minutes['merge'] + minutes['quantize']:.0f} minutes",
        5: f"{minutes['inference']:.0f} minutes and at most {of['inference'].vram.process_gib:.1f} GiB of VRAM",
        6: f"about {minutes['merge'] + gguf:.0f} minutes",
        7: f"{vram_gib['mixtral-8x7b']:.0f} GiB of weights in NF4",
        8: f"{dpo.time.total_h:.1f} hours, after {first.time.total_h:.1f} hours",
    }
    for number, words in says.items():
        assert words in promised(number), f"notebook {number} should say: {words}"
    assert f"it has {vram_gib['mixtral-8x7b-aqlm']:.0f} GiB" in promised(7)
    large, small = hardware.machine("rtx5090"), hardware.machine("rtx4090")
    trains = {name: mixture.longest("mixtral-8x7b", "attention", one) for name, one in (("32", large), ("24", small))}
    assert trains["32"] and not trains["24"], "trains on a GPU with 32 GB or more"
    assert mixture.longest("mixtral-8x7b-aqlm", "attention", T4), "in two bits, a free T4 trains it"


EXPERTS = ("mixtral-8x7b", "mixtral-8x7b-aqlm")
