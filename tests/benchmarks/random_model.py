"""Models with random weights in a known shape, an adapter and rows of tokens for them: neither memory nor time cares.

    python tests/benchmarks/random_model.py FOLDER [--shape mistral-7b-v0.3] [--layers 32]

Tensors are written a decoder layer at a time, so a 7B needs 0.5 GiB of memory and, on a GPU, seconds.
"""

import argparse
import json
from collections.abc import Callable
from itertools import groupby
from pathlib import Path

from t4 import ROOT  # noqa: F401 - and with it the path to helpers

SHAPE = "mistral-7b-v0.3"
GROUP = 128
"""Weights that share a scale in `make_gptq`."""


def config_of(name: str = SHAPE, layers: int | None = None):
    """transformers' configuration of a shape that helpers.models knows, or a folder has; layers: only the first."""
    from transformers import AutoConfig

    from helpers.models import shape

    sizes = shape(name)
    window = {"sliding_window": None} if sizes.family.model_type in ("mistral", "mixtral") else {}
    if sizes.experts > 1:
        window |= {"num_local_experts": sizes.experts, "num_experts_per_tok": sizes.experts_per_token}
    return AutoConfig.for_model(
        sizes.family.model_type, vocab_size=sizes.vocab, hidden_size=sizes.hidden, head_dim=sizes.head_dim,
        intermediate_size=sizes.intermediate, num_hidden_layers=layers or sizes.layers, rms_norm_eps=1e-5,
        num_attention_heads=sizes.heads, num_key_value_heads=sizes.kv_heads, tie_word_embeddings=sizes.tied,
        max_position_embeddings=32768, rope_theta=1e6, bos_token_id=1, eos_token_id=2,
        pad_token_id=0, dtype="float16", **window,
    )  # fmt: skip


def tensors_of(config) -> dict[str, tuple[int, ...]]:
    """Tensor -> its shape, as the modules that are trained here name them: (out, in) of matrices."""
    import torch

    from helpers.models import loading

    with torch.device("meta"):
        model = loading.opener(config).from_config(config)
    config.architectures = [type(model).__name__.removeprefix("Apart")]
    return {name: tuple(value.shape) for name, value in model.named_parameters()}


def normal(size: tuple[int, ...]):
    """Numbers in fp16 with a spread of 0.02, as transformers starts a model with; on the GPU where there is one."""
    import torch

    return torch.randn(size, device="cuda" if torch.cuda.is_available() else "cpu").mul_(0.02).half()


def plain(name: str, size: tuple[int, ...]) -> dict:
    """A tensor as a 16-bit model stores it: random matrices, norms of one, biases of zero."""
    import torch

    if len(size) > 1:
        return {name: normal(size)}
    return {name: torch.full(size, float(not name.endswith("bias")), dtype=torch.float16)}


def make(folder: Path | str, name: str = SHAPE, layers: int | None = None, adapter: Path | str | None = None) -> Path:
    """A checkpoint in fp16 with a tokenizer, once; adapter: where a LoRA adapter of rank 16 for it goes."""
    folder, config = Path(folder), config_of(name, layers)
    if not (folder / "tokenizer.json").is_file():
        write(folder, config, plain)
        config.save_pretrained(folder)
        make_tokenizer(folder, config.vocab_size)
    if adapter:
        make_adapter(Path(adapter), folder, config)
    return folder


def write(folder: Path, config, stored: Callable[[str, tuple[int, ...]], dict]) -> None:
    """Every tensor of a model as `stored` gives it, a file a decoder layer, and their index."""
    import torch
    from safetensors.torch import save_file

    from helpers.models.experts import stored_name

    folder.mkdir(parents=True, exist_ok=True)
    torch.manual_seed(0)
    places: dict[str, str] = {}
    for number, (_, group) in enumerate(groupby(tensors_of(config).items(), key=lambda item: layer_of(item[0])), 1):
        made = {key: value for item in group for key, value in stored(*item).items()}
        tensors = {stored_name(key, config.model_type): value.cpu().contiguous() for key, value in made.items()}
        places |= dict.fromkeys(tensors, file := f"model-{number:05}.safetensors")
        save_file(tensors, folder / file, {"format": "pt"})
    index = {"metadata": {}, "weight_map": places}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index), encoding="utf-8")


def layer_of(tensor: str) -> str:
    """The decoder layer that a tensor belongs to, or itself.

    >>> layer_of("model.layers.3.mlp.up_proj.weight"), layer_of("lm_head.weight")
    ('model.layers.3', 'lm_head.weight')
    """
    return ".".join(tensor.split(".")[:3]) if ".layers." in tensor else tensor


def matrices(config) -> dict[str, tuple[int, int]]:
    """Linear layer of the decoder -> (out, in)."""
    sizes = tensors_of(config)
    return {name.removesuffix(".weight"): sizes[name] for name in sizes if ".layers." in name and len(sizes[name]) == 2}


def lora_factors(config) -> dict:
    """Random factors of rank 16 for all linear layers, in fp32 and by PEFT's names."""
    factors = {}
    for module, (outputs, inputs) in matrices(config).items():
        factors[f"base_model.model.{module}.lora_A.weight"] = normal((16, inputs)).float().cpu()
        factors[f"base_model.model.{module}.lora_B.weight"] = normal((outputs, 16)).float().cpu() / 4
    return factors


def make_adapter(folder: Path, base: Path, config) -> None:
    """A random adapter of rank 16 on all linear layers, as PEFT saves it."""
    from safetensors.torch import save_file

    folder.mkdir(parents=True, exist_ok=True)
    save_file(lora_factors(config), folder / "adapter_model.safetensors", metadata={"format": "pt"})
    targets = sorted({module.rpartition(".")[2] for module in matrices(config)})
    settings = {"peft_type": "LORA", "task_type": "CAUSAL_LM", "r": 16, "lora_alpha": 32, "target_modules": targets}
    settings |= {"base_model_name_or_path": str(base)}
    (folder / "adapter_config.json").write_text(json.dumps(settings), encoding="utf-8")


def make_tokenizer(folder: Path, vocabulary: int) -> None:
    """A tokenizer of single bytes and made-up words: it is never asked for more than its ids."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    names = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256))]
    names += [f"▁w{number}" for number in range(vocabulary - len(names))]
    bpe = models.BPE(vocab={name: i for i, name in enumerate(names)}, merges=[], unk_token="<unk>", byte_fallback=True)
    tokenizer = Tokenizer(bpe)
    tokenizer.pre_tokenizer, tokenizer.decoder = pre_tokenizers.Metaspace(), decoders.Metaspace()
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>", unk_token="<unk>", pad_token="<unk>"
    ).save_pretrained(folder)


def make_gptq(folder: Path, name: str = SHAPE, layers: int | None = None) -> Path:
    """A GPTQ folder of the shape: random codes, scales that give weights a spread of 0.02, the zero in the middle."""
    import torch

    config = config_of(name, layers)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    settings = {
        "bits": 4, "group_size": GROUP, "desc_act": False, "sym": True, "lm_head": False, "quant_method": "gptq",
        "checkpoint_format": "gptq", "pack_dtype": "int32", "meta": {"quantizer": ["gptqmodel:7.6.0"]},
    }  # fmt: skip

    def packed(name: str, size: tuple[int, ...]) -> dict:
        """Eight codes of 1 … 15 in each int32, their mean is the zero of 8: a shift would add up in products."""
        if ".layers." not in name or len(size) == 1:
            return plain(name, size)
        (outputs, inputs), module = size, name.removesuffix(".weight")
        drawn = torch.randint(1, 16, (8, inputs // 8, outputs), dtype=torch.int64, device=device)
        codes = sum(drawn[place] << 4 * place for place in range(8))
        spread = 0.5 + torch.rand((inputs // GROUP, outputs), device=device)
        return {
            f"{module}.qweight": torch.where(codes < 2**31, codes, codes - 2**32).int(),
            f"{module}.qzeros": torch.full((inputs // GROUP, outputs // 8), 0x77777777, dtype=torch.int32),
            f"{module}.scales": (spread * 0.02 / 4.3).half(),  # codes of 1..15 less 8 spread by 4.3
            f"{module}.g_idx": torch.arange(inputs, dtype=torch.int32) // GROUP,
        }

    write(folder, config, packed)
    (folder / "quantize_config.json").write_text(json.dumps(settings), encoding="utf-8")
    whole = config.to_dict() | {"quantization_config": settings, "torch_dtype": "float16"}
    (folder / "config.json").write_text(json.dumps(whole), encoding="utf-8")
    make_tokenizer(folder, config.vocab_size)
    return folder


def make_aqlm(folder: Path, name: str = SHAPE, layers: int | None = None, layout=None) -> Path:
    """An AQLM folder of the shape in the hub's layout: random codes, codebooks and scales, weights spread by 0.02."""
    import torch

    from helpers.models.aqlm_sizes import ADDITIVE_1X16, settings_of
    from helpers.models.experts import stored_name

    config, layout = config_of(name, layers), layout or ADDITIVE_1X16
    device = "cuda" if torch.cuda.is_available() else "cpu"
    kind = torch.int8 if layout.code_bytes == 1 else torch.int16

    def coded(name: str, size: tuple[int, ...]) -> dict:
        """All codes are used, also those that are stored as negative numbers."""
        if ".layers." not in name or len(size) == 1 or is_router(name):
            return plain(name, size)
        (outputs, inputs), module, low = size, name.removesuffix(".weight"), -(2 ** (layout.bits - 1))
        shape = (outputs, inputs // layout.group, layout.codebooks)
        books = (layout.codebooks, 2**layout.bits, 1, layout.group)
        return {
            f"{module}.codes": torch.randint(low, -low, shape, dtype=kind, device=device),
            f"{module}.codebooks": torch.randn(books, device=device).div_(layout.codebooks**0.5).half(),
            f"{module}.scales": (0.02 * (0.5 + torch.rand((outputs, 1, 1, 1), device=device))).half(),
        }

    write(folder, config, coded)
    # what the paper's own conversion lists: every parameter that it does not quantize, norms too, by its name on disk
    quantized = {f"{name}.weight" for name in matrices(config) if not name.endswith(".gate")}
    kept = [stored_name(name, config.model_type) for name in tensors_of(config) if name not in quantized]
    whole = config.to_dict() | {"quantization_config": settings_of(layout, kept), "torch_dtype": "float16"}
    (folder / "config.json").write_text(json.dumps(whole), encoding="utf-8")
    make_tokenizer(folder, config.vocab_size)
    return folder


def make_nf4(folder: Path, name: str = SHAPE, layers: int | None = None) -> Path:
    """A folder of the shape in NF4 with double quantization, as bitsandbytes stores it: no 16-bit model is needed."""
    import torch
    from bitsandbytes.functional import quantize_4bit

    config = config_of(name, layers)

    def packed(name: str, size: tuple[int, ...]) -> dict:
        """Codes and scales of a matrix of a decoder layer; a router stays as it is."""
        tensors = plain(name, size)
        if ".layers." not in name or len(size) == 1 or name.endswith(".gate.weight"):
            return tensors
        codes, state = quantize_4bit(tensors[name], quant_type="nf4", compress_statistics=True)
        return {name: codes} | {f"{name}.{key}": value for key, value in state.as_dict(packed=True).items()}

    write(folder, config, packed)
    how = {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4", "bnb_4bit_use_double_quant": True}
    how |= {"bnb_4bit_compute_dtype": "float16", "quant_method": "bitsandbytes"}
    dtype = "float16" if torch.cuda.is_available() else "float32"
    whole = config.to_dict() | {"quantization_config": how, "dtype": dtype}
    (folder / "config.json").write_text(json.dumps(whole), encoding="utf-8")
    make_tokenizer(folder, config.vocab_size)
    return folder


def is_router(name: str) -> bool:
    """Whether a tensor is what chooses the experts, which no method quantizes."""
    return name.endswith(".gate.weight")


def write_prepared(folder: Path, model: Path, sequences: int, seq: int, distinct: int | None = None) -> Path:
    """A prepared folder of random tokens, each of them trained on; distinct: so many rows, again and again."""
    import torch
    from datasets import Dataset

    words = json.loads((model / "config.json").read_text())["vocab_size"]
    ids = torch.randint(300, words, (distinct or sequences, seq), generator=torch.Generator().manual_seed(0))
    ids = ids.repeat(-(-sequences // len(ids)), 1)[:sequences].tolist()
    rows = {"id": [str(place) for place in range(len(ids))], "messages": [[{"role": "user", "content": ""}]] * len(ids)}
    rows |= {"input_ids": ids, "assistant_masks": [[1] * seq] * len(ids)}
    Dataset.from_dict(rows).save_to_disk(str(folder / "train"))
    Dataset.from_dict({name: values[:1] for name, values in rows.items()}).save_to_disk(str(folder / "heldout"))
    return folder


def write_pairs(folder: Path, model: Path, pairs: int, seq: int) -> Path:
    """A prepared folder of pairs of random tokens: a prompt of a fourth of seq, two answers that fill it."""
    import torch
    from datasets import Dataset, Features, List, Value

    words = json.loads((model / "config.json").read_text())["vocab_size"]
    ids = torch.randint(300, words, (2, pairs, seq), generator=torch.Generator().manual_seed(0))
    ids[1, :, : seq // 4] = ids[0, :, : seq // 4]
    mask = [0] * (seq // 4) + [1] * (seq - seq // 4)
    rows = {"input_ids": ids[0].tolist(), "rejected_ids": ids[1].tolist()}
    rows |= dict.fromkeys(("assistant_masks", "rejected_masks"), [mask] * pairs)
    features = Features(dict.fromkeys(rows, List(Value("int32"))))
    for name, part in (("train", pairs), ("heldout", 1)):
        columns = {column: values[:part] for column, values in rows.items()}
        Dataset.from_dict(columns, features).save_to_disk(str(folder / name))
    return folder


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder", type=Path)
    parser.add_argument("--shape", default=SHAPE, help="a name that helpers.models knows, or a folder")
    parser.add_argument("--layers", type=int, help="only so many of its first layers")
    options = parser.parse_args()
    print(make(options.folder, options.shape, options.layers))
