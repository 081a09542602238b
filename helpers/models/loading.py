"""How a model is loaded: dtype, device, the base's quantization, attention. Training and inference both ask here.

>>> from helpers.models import profile
>>> import torch
>>> precision((7, 5)).dtype, precision((8, 0)).dtype
(torch.float16, torch.bfloat16)
>>> base_quantization(profile("tiny"), torch.float16).bnb_4bit_quant_type
'nf4'
"""

import re
from pathlib import Path
from typing import Any, NamedTuple

from helpers.config import RunConfig
from helpers.models import aqlm_sizes, families, stored, wrapped
from helpers.models.families import Family


class Precision(NamedTuple):
    """What the frozen weights are computed in, and why."""

    dtype: Any
    """A torch.dtype."""
    reason: str


def device() -> str:
    """cuda where PyTorch sees a GPU, else cpu."""
    import torch

    return "cuda" if torch.cuda.is_available() else "cpu"


def precision(capability: tuple[int, int] | None = None) -> Precision:
    """fp16 below compute capability 8, bf16 from there on, fp32 without a GPU; of this machine unless said."""
    import torch

    if capability is None and device() == "cpu":
        return Precision(torch.float32, "fp32: there is no GPU, and a CPU computes 16 bits slower than 32")
    major, minor = capability or torch.cuda.get_device_capability()
    # torch.cuda.is_bf16_supported() says True on a T4 (7.5), because it counts emulation
    # (https://github.com/unslothai/unsloth/issues/501): the capability is what tells whether there is hardware for it.
    if major < 8:
        return Precision(torch.float16, f"fp16: compute capability {major}.{minor} has no bf16 hardware")
    return Precision(torch.bfloat16, f"bf16: compute capability {major}.{minor} has it, and it needs no loss scaling")


def base_quantization(config: RunConfig, dtype: Any, storage: Any = None) -> Any:
    """from_pretrained's quantization_config for a base in config.model.weights; None for 16 bits and AQLM.

    dtype: what the dequantized weights are multiplied in; storage: what packed bytes pass for, bytes unless said.
    NF4 with double quantization is QLoRA's (https://arxiv.org/abs/2305.14314, section 3).
    """
    from transformers import BitsAndBytesConfig

    if config.model.weights in ("fp16", aqlm_sizes.NAME):
        return None
    if config.model.weights == "int8":
        return BitsAndBytesConfig(load_in_8bit=True)
    return BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=config.model.double_quant,
        bnb_4bit_compute_dtype=dtype,
        bnb_4bit_quant_storage=storage,
    )


def config_of(source: str | Path, revision: str | None = None) -> tuple[Any, bool]:
    """(transformers' config of a folder or a hub id, whether it is a language model's inside one that sees)."""
    from transformers import AutoConfig, PreTrainedConfig

    config = AutoConfig.from_pretrained(source, revision=revision)
    if config.model_type not in wrapped.KINDS:
        return config, False
    said, _ = PreTrainedConfig.get_config_dict(source, revision=revision)
    return AutoConfig.for_model(**wrapped.text_config(said)), True


def opener(config: Any) -> Any:
    """The class whose from_pretrained opens a model of a transformers config: a mixture's has linear experts."""
    from transformers import AutoModelForCausalLM

    from helpers.models import experts

    return experts.class_of(config.model_type) or AutoModelForCausalLM


def without_eyes(config: Any) -> Any:
    """The class of a language model inside one that sees: it passes over tensors of the eyes, and warns of no other."""
    import transformers

    theirs = getattr(transformers, wrapped.CLASSES[config.model_type])
    ignored = [f"^{re.escape(start)}" for start in wrapped.EYES]
    return type(theirs.__name__, (theirs,), {"_keys_to_ignore_on_load_unexpected": ignored})


def causal_lm(source: str | Path, **options: Any) -> Any:
    """The causal LM of a folder or a hub id, every weight from its files; options as from_pretrained's.

    Raises ValueError naming the first weight that is missing, too many or of another shape: transformers makes up what
    it misses at random, and says so in a table among others.
    """
    config, inside = config_of(source, options.get("revision"))
    theirs = opener(config)
    if inside:
        theirs, options["config"] = without_eyes(config), config
        options["key_mapping"] = {f"^{re.escape(start)}": ours for start, ours in wrapped.RENAMED.items()}
    if aqlm_sizes.layout_of(config.to_dict()):  # its folder says how it is stored, and None would make it forget that
        from helpers.models import aqlm

        aqlm.register()
        options.pop("quantization_config", None)
    if Path(source).is_dir():
        stored.refuse_missing(Path(source))
    model, found = theirs.from_pretrained(
        source, output_loading_info=True, ignore_mismatched_sizes=True, **options
    )  # transformers' own error for sizes is a table
    wrong = {
        "has no": found["missing_keys"],
        "has more weights than the model takes, such as": found["unexpected_keys"],
        "has another shape of": {name for name, *_ in found["mismatched_keys"]},
    }
    for words, names in wrong.items():
        if names:
            raise ValueError(
                f"{source} {words} {min(names)} ({len(names)} such): it is not what its config.json says, and would "
                "compute something else; download or make the folder again"
            )
    return in_one_dtype(model, options.get("dtype"))


def in_one_dtype(model: Any, dtype: Any) -> Any:
    """The model, with all weights that are not packed in the dtype that was asked for; fp32 stays where it is.

    transformers 5.15 to 5.17 leave what they rename of a packed checkpoint, such as Mixtral's router, in the file's
    dtype, and then it meets activations of another.
    """
    import torch

    if getattr(model, "hf_quantizer", None) is not None and isinstance(dtype, torch.dtype):
        for value in model.parameters():
            if value.dtype in (torch.float16, torch.bfloat16) and value.dtype != dtype:
                value.data = value.data.to(dtype)
    return model


def attention_implementation(family: Family, asked: str) -> str:
    """from_pretrained's attn_implementation for config.model.attention, or for what the family needs instead.

    "efficient" is our own function, registered under its name on the way; "math" leaves the choice to PyTorch's SDPA.
    """
    from helpers.models import attention

    kernel = families.attention(family, asked).kernel
    return {"efficient": attention.register, "eager": lambda: "eager", "math": lambda: "sdpa"}[kernel]()
