"""What two, three and four bits of one's own model cost, by divergence from the model in 16 bits.

GPTQ and AQLM as they are made here, NF4 as it is trained on, and auto-round (https://arxiv.org/abs/2309.05516), which
writes GPTQ's format and is no part of the project:  pip install --no-deps --target DIR auto-round py-cpuinfo, and
PYTHONPATH=DIR behind the project's own.

    python tests/benchmarks/bench_bits.py OUT.csv [--model data/tiny-mistral] [--only aqlm-2,gptq-3]

A row a way: bits a weight of the decoder's matrices as stored, scales and codebooks included; mean KL divergence a
token, in nats, from the 16-bit model on held-out conversations; and perplexity there. All calibrate on the training
conversations. An adapter trains on each of them in transformers and PEFT but for GPTQ on a CPU (GPTQModel's kernels).
"""

import argparse
import math
import tempfile
from pathlib import Path

import t4
from keep import keep

WAYS = {
    "nf4": {},
    "gptq-4": {"bits": 4}, "gptq-3": {"bits": 3}, "gptq-2": {"bits": 2},
    "gptq-3-g32": {"bits": 3, "group_size": 32}, "gptq-2-g32": {"bits": 2, "group_size": 32},
    "aqlm-2": {"bits": 2, "quant_method": "aqlm"}, "aqlm-3": {"bits": 3, "quant_method": "aqlm"},
    "aqlm-4": {"bits": 4, "quant_method": "aqlm"},
    "auto-round-4": {"bits": 4}, "auto-round-3": {"bits": 3}, "auto-round-2": {"bits": 2},
    "auto-round-3-g32": {"bits": 3, "group_size": 32}, "auto-round-2-g32": {"bits": 2, "group_size": 32},
}  # fmt: skip
"""Name -> settings of helpers.config.QuantizeConfig."""
STEPS = 200
"""Of auto-round, for each layer: its own default."""


def main() -> None:
    """Every way that is asked for, one after another."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("out", type=Path, metavar="OUT.csv")
    parser.add_argument("--model", type=Path, default=Path(t4.ROOT) / "data" / "tiny-mistral")
    parser.add_argument("--only", default=",".join(WAYS))
    options = parser.parse_args()
    from helpers import prepare
    from helpers.models import profile
    from helpers.workspace.prepared import side

    with tempfile.TemporaryDirectory() as folder:
        config = profile("tiny", model=str(options.model))
        prepare.prepare(config, Path(folder) / "prepare")
        rows = [row["input_ids"] for row in side(Path(folder) / "prepare", "heldout")]
        reference = log_probabilities(options.model, config.with_values(weights="fp16"), rows)
        for name in options.only.split(","):
            made = options.model
            if WAYS[name]:
                made = Path(folder) / name
                make = rounded if name.startswith("auto-round") else quantized
                make(options.model, made, config.with_values(**WAYS[name]), Path(folder) / "prepare")
            found = log_probabilities(made, config, rows, nf4=not WAYS[name])
            row = {
                "model": options.model.name,
                "way": name,
                "bits_per_weight": round(stored_bits(made, config, nf4=not WAYS[name]), 3),
            }
            row |= t4.about("torch", "transformers", "gptqmodel") | divergence(reference, found, rows)
            print({name: row[name] for name in ("way", "bits_per_weight", "kl_nats", "perplexity")}, flush=True)
            if not options.out.is_file():
                options.out.write_text(",".join(row) + "\n", encoding="utf-8")
            keep(options.out, [row], ("model", "way"))


def quantized(model: Path, output: Path, config, prepared: Path) -> None:
    """A way's folder; one that is broken by the stage's own measure is a row too."""
    from helpers import quantize

    try:
        quantize.quantize(model, output, config.quantize, prepared)
    except quantize.BrokenResult as error:
        print(error, flush=True)
        output.with_name(output.name + ".rejected").rename(output)


def rounded(model: Path, output: Path, config, prepared: Path) -> None:
    """A folder that auto-round makes of the rows that GPTQ calibrates on."""
    import torch
    from auto_round import AutoRound
    from transformers import AutoTokenizer

    from helpers.models import loading
    from helpers.quantize import calibration

    asked = config.quantize
    rows, _ = calibration.draw(model, asked, [prepared], 0)
    parts = [{"input_ids": torch.tensor([row]), "attention_mask": torch.ones(1, len(row))} for row in rows]
    opened = loading.causal_lm(model, dtype=torch.float32)
    whole = output.with_name(output.name + ".written")  # it names a folder of its own in the one that is given
    AutoRound(
        opened, AutoTokenizer.from_pretrained(model), bits=asked.bits, group_size=asked.group_size, sym=True,
        dataset=parts, nsamples=len(parts), seqlen=min(map(len, rows)), iters=STEPS, batch_size=8, device_map="cpu",
        enable_torch_compile=False, disable_opt_rtn=False,
    ).quantize_and_save(str(whole), format="auto_gptq")  # fmt: skip
    next(whole.rglob("config.json")).parent.rename(output)


def log_probabilities(folder: Path, config, rows: list[list[int]], nf4: bool = False) -> list:
    """(tokens - 1, words) of each row, in fp32."""
    import torch

    from helpers import inference
    from helpers.models import loading

    if nf4:
        how = loading.base_quantization(config, torch.float32)
        model = loading.causal_lm(folder, dtype=torch.float32, quantization_config=how)
    else:
        model = inference.load(folder, config).model
    with torch.inference_mode():
        ids = (torch.tensor([row], device=model.device) for row in rows)
        return [model(one).logits[0, :-1].float().log_softmax(-1).cpu() for one in ids]


def divergence(reference: list, found: list, rows: list[list[int]]) -> dict[str, float]:
    """Mean KL(16 bits ‖ few bits) a token, and perplexity of both."""
    import torch

    tokens = sum(map(len, found))
    kl = sum((ours.exp() * (ours - theirs)).sum().item() for ours, theirs in zip(reference, found, strict=True))
    loss = {
        name: -sum(
            part.gather(1, torch.tensor(row[1:])[:, None]).sum().item() for part, row in zip(parts, rows, strict=True)
        )
        for name, parts in {"perplexity": found, "perplexity_16_bits": reference}.items()
    }
    return {"kl_nats": round(kl / tokens, 5)} | {
        name: round(math.exp(value / tokens), 4) for name, value in loss.items()
    }


def stored_bits(folder: Path, config, nf4: bool) -> float:
    """Bits a weight of the decoder's matrices, with all that is stored for them."""
    from helpers.budget import nf4 as four_bits
    from helpers.models import shape
    from helpers.models.stored import read_header

    if nf4:
        return four_bits.bits_per_weight(double_quant=config.model.double_quant)
    sizes = {"I32": 4, "I8": 1, "F16": 2, "BF16": 2, "F32": 4}
    tensors = [tensor for file in folder.glob("*.safetensors") for tensor in read_header(file)]
    of_matrices = [one for one in tensors if ".layers." in one.name and not one.name.endswith((".weight", ".g_idx"))]
    return 8 * sum(sizes[one.kind] * one.values for one in of_matrices) / shape(str(folder)).linear_parameters


if __name__ == "__main__":
    main()
