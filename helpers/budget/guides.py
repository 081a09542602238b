"""What guides to fine-tuning say a 7B needs, held against the formulas."""

from dataclasses import replace
from typing import Any

from helpers import hardware
from helpers.budget import estimate, hours, nf4, vram
from helpers.budget.step import Step
from helpers.config import RunConfig
from helpers.models import ModelShape, gguf_sizes, profile, shape
from helpers.models.gguf_types import file_type

GIB = 2**30
GB_IN_GIB = 1e9 / GIB


def figures() -> list[dict[str, str]]:
    """Rows of claim, says, formula gives, verdict; Mistral 7B v0.3 at 1×1024 tokens on a T4 unless said."""
    seven, config, t4 = shape("mistral-7b-v0.3"), profile("mistral-7b", accumulation=1), hardware.machine("t4")
    usual_recipe = config.with_values(upcast=True, kernels="plain", attention="math", checkpointing="all")
    ours = estimate.plan(config.with_values(batch_size=1), seven, t4).budget.vram
    leanest = training_gib(config, seven, checkpointing="all", seq_len=512)
    usual = training_gib(usual_recipe, seven)
    without, with_all = (training_gib(usual_recipe, seven, checkpointing=how) for how in ("none", "all"))
    half, quarter = 2 * seven.parameters / GIB, sum(vram.weights(config, seven).values()) / GIB
    saved_by_double = sum(vram.weights(config.with_values(double_quant=False), seven).values()) / GIB - quarter
    lora_16 = training_gib(usual_recipe, seven, weights="fp16")
    whole = config.with_values(weights="fp16", trains="all")
    full = training_gib(whole, seven, checkpointing="all")
    eighth = estimate.vram_of(
        whole.with_values(checkpointing="all", gpus=8, sharding="fsdp"), seven, hardware.machine("8xh100"), "train"
    ).process_gib
    per_weight = nf4.bits_per_weight(double_quant=True)
    article = article_step_s()
    eight, four = (gguf_sizes.file_bytes(seven, file_type(name)) / 1e9 for name in ("q8_0", "q4_k_m"))
    llama_cpp = " and ".join(dict.fromkeys((verdict(eight, 7.7, 7.7), verdict(four, 4.4, 4.4))))
    rows_an_hour = 8 * 3600 / estimate.plan(config.with_values(accumulation=8), seven, t4).budget.time.step_s
    return [
        row(
            "QLoRA of Mistral 7B",
            "6–8 GB",
            f"{leanest / GB_IN_GIB:.1f} GB at least, {usual / GB_IN_GIB:.1f} the guides' way",
            f"{verdict(usual / GB_IN_GIB, 6, 8)} for that, {verdict(leanest / GB_IN_GIB, 6, 8)} for the least",
        ),
        row(
            "QLoRA, all linear layers",
            "8–10 GB",
            f"{ours.process_gib / GB_IN_GIB:.1f} GB with no layer computed twice",
            verdict(ours.process_gib / GB_IN_GIB, 8, 10),
        ),
        row("LoRA in 16 bits", "16–18 GB", f"{lora_16 / GB_IN_GIB:.1f} GB", verdict(lora_16 / GB_IN_GIB, 16, 18)),
        row(
            "full fine-tuning",
            "28 GB",
            f"{full:.0f} GiB with Adam in fp32, {eighth:.0f} on each of eight; 28 GB hold 16-bit weights and gradients",
            "wrong: four times as much",
        ),
        row(
            "inference in fp16",
            "14.5 GB",
            f"{half:.1f} GiB = {half / GB_IN_GIB:.1f} GB of weights",
            "right, plus KV cache",
        ),
        row(
            "4 bits save",
            "75 %",
            f"{1 - quarter / half:.0%}: embeddings stay in 16 bits, and a weight costs {per_weight:.2f} bits",
            "nearly",
        ),
        row(
            "double quantization saves",
            "0.4 GB more",
            f"{saved_by_double / GB_IN_GIB:.2f} GB: 0.37 bits a quantized weight",
            "a little less",
        ),
        row(
            "gradient checkpointing saves",
            "30–50 % of training memory",
            f"{1 - with_all / without:.0%} at 1,024 tokens: {without:.1f} to {with_all:.1f} GiB",
            "too careful, and the saving grows with the context",
        ),
        row(
            "> 200 h an epoch of 100,000 rows on a T4",
            "2,000 steps in about two days",
            f"200 h / 6,250 steps = 115 s a step, two days / 2,000 = 86 s; our formula for its recipe: {article:.0f} s",
            "its numbers agree within a third; today's libraries need less",
        ),
        row("Q8_0 and Q4_K_M of llama.cpp", "7.7 and 4.4 GB", f"{eight:.1f} and {four:.1f} GB", llama_cpp),
        row(
            "5 to 50 thousand rows take",
            "1–3 h",
            f"{5000 / rows_an_hour:.0f} to {50_000 / rows_an_hour:.0f} h of full 1,024-token rows on a T4",
            "right for short rows or faster GPUs",
        ),
    ]


def row(claim: str, says: str, gives: str, verdict: str) -> dict[str, str]:
    """One line of the table."""
    return {"claim": claim, "says": says, "formula gives": gives, "verdict": verdict}


def training_gib(config: RunConfig, shape: ModelShape, **values: Any) -> float:
    """GiB of a training process on a large GPU, with some settings changed."""
    large = replace(hardware.machine("a100-80"), gpu=replace(hardware.GPUS["t4"], vram_gib=80.0))
    return estimate.vram_of(config.with_values(**values), shape, large, "train").process_gib


def verdict(value: float, low: float, high: float) -> str:
    """Whether a figure lies in a range, 5 % either way."""
    return "right" if 0.95 * low <= value <= 1.05 * high else "too low" if value > high else "too high"


def article_step_s() -> float:
    """Seconds of a step of the 2023 recipe on a T4: 16 sequences of 512, all layers checkpointed, eager attention."""
    config = profile("mistral-7b", batch_size=4, accumulation=4, seq_len=512, dropout=0.05, checkpointing="all")
    config = config.with_values(upcast=True, kernels="plain", attention="eager", loss="full")
    return hours.step_s(Step.of(config, shape("mistral-7b-v0.1")), hardware.machine("t4"))
