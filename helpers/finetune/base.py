"""What trains: the frozen base in few bits, and LoRA's matrices on it."""

import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, PeftModel, get_peft_model, set_peft_model_state_dict
from safetensors.torch import load_file
from transformers import PreTrainedModel, PreTrainedTokenizerBase, set_seed

from helpers.config import RunConfig
from helpers.models import aqlm_sizes, families, loading, refuse_packed, shape
from helpers.models.loading import precision
from helpers.models.templates import load_tokenizer
from helpers.workspace.versions import forget_old_torchao


def load_base(config: RunConfig) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """The frozen base in the configured weights, and its tokenizer. Nothing is upcast to fp32 unless config asks.

    Raises ValueError, before anything is downloaded, for a model or targets that cannot be trained.
    """
    sizes = shape(config.model.model, config.model.revision)
    families.refuse(sizes.family, sizes.name, config.adapter.target_modules)
    aqlm_sizes.refuse(sizes.additive, sizes.name, config)
    refuse_packed(sizes)
    refuse_without_gpu(config)
    dtype = torch.float32 if config.train.trains == "all" else precision().dtype  # what is trained is in fp32
    model = loading.causal_lm(
        config.model.model,
        revision=config.model.revision,
        device_map={"": 0} if torch.cuda.is_available() else "cpu",
        dtype=dtype,
        attn_implementation=loading.attention_implementation(sizes.family, config.model.attention),
        quantization_config=loading.base_quantization(config, dtype),
    )
    model.config.use_cache = False
    # PEFT's prepare_model_for_kbit_training freezes too, but makes embeddings and head fp32 as well: 0.5 GiB more at
    # 32,768 words of 4,096. Here that is an option (upcast).
    model.requires_grad_(config.train.trains == "all")
    for module in model.modules():
        if hasattr(module, "support_avx512bf16_for_cpu"):
            module.support_avx512bf16_for_cpu = False  # answering once would repack the weights: no gradients after
    if config.model.upcast:
        for name, parameter in model.named_parameters():
            matrix = ".layers." in name and parameter.dim() > 1  # left in 16 bits where they are not quantized either
            if parameter.dtype in (torch.float16, torch.bfloat16) and not matrix:
                parameter.data = parameter.data.float()
    return model, load_tokenizer(config.model.model, config.model.revision)


def refuse_without_gpu(config: RunConfig) -> None:
    """Raise ValueError where a CPU would train for weeks."""
    billions = shape(config.model.model, config.model.revision).parameters / 1e9
    if billions > 1 and not torch.cuda.is_available():
        raise ValueError(
            f"{config.model.model} has {billions:.1f}e9 parameters and this machine has no GPU that PyTorch sees: "
            "choose a GPU (in Colab: Runtime > Change runtime type > T4), or the profile tiny, made for a CPU"
        )


def attach_adapter(model: PreTrainedModel, config: RunConfig) -> PeftModel:
    """LoRA on the target modules, trainable weights in fp32, the same start for the same seed; none where all train."""
    if config.train.trains == "all":
        return model
    check_targets(model, config)
    set_seed(config.seed)  # A is drawn, B is zero: the first forward pass is the base's
    lora = LoraConfig(
        r=config.adapter.rank,
        lora_alpha=config.adapter.alpha,
        lora_dropout=config.adapter.dropout,
        target_modules=list(config.adapter.target_modules),
        use_rslora=config.adapter.rslora,
        use_dora=config.adapter.dora,
        bias="none",
        task_type="CAUSAL_LM",
        revision=config.model.revision,
    )
    forget_old_torchao()
    model = get_peft_model(model, lora)
    if config.adapter.start_adapter:
        load_start(model, lora, config.adapter.start_adapter)
    trainable_to_fp32(model)
    return model


def load_start(model: PeftModel, lora: LoraConfig, folder: str) -> None:
    """The weights of an adapter of the same kind. Raises ValueError naming what of it is another than configured."""
    if not (Path(folder) / "adapter_config.json").is_file():
        raise ValueError(f"start_adapter={folder} is no adapter: give a folder with adapter_config.json in it")
    theirs = LoraConfig.from_pretrained(folder)
    settings = {"rank": "r", "alpha": "lora_alpha", "targets": "target_modules", "rslora": "use_rslora"}
    for name, field in (settings | {"dora": "use_dora"}).items():
        own, other = (plain(getattr(config, field)) for config in (lora, theirs))
        if own != other:
            raise ValueError(
                f"start_adapter={folder} was trained with {name}={other}, and here {name} is {own}: set {name}={other}"
            )
    set_peft_model_state_dict(model, load_file(str(Path(folder) / "adapter_model.safetensors")))


def plain(value: Any) -> Any:
    """A setting as one writes it: a set of names with commas between."""
    return ",".join(sorted(value)) if isinstance(value, set) else value


def check_targets(model: PreTrainedModel, config: RunConfig) -> None:
    """Raise ValueError for a target that the model lacks, or a rank larger than the smallest target."""
    family = families.of(model.config.to_dict())
    families.refuse(family, config.model.model, config.adapter.target_modules)
    linears: dict[str, int] = {}  # name -> its smaller side, above which a rank is no longer a low one
    for name, module in model.named_modules():
        if isinstance(module, torch.nn.Linear) and ".layers." in name:
            leaf = name.rsplit(".", 1)[-1]
            linears[leaf] = min(linears.get(leaf, math.inf), module.in_features, module.out_features)
    for target in config.adapter.target_modules:
        if config.adapter.rank > linears[target]:
            raise ValueError(
                f"rank={config.adapter.rank} is larger than {target}, whose smaller side is {linears[target]}: "
                f"choose a rank of at most {linears[target]}"
            )


def trainable_to_fp32(model: torch.nn.Module) -> None:
    """Adapters in fp32: trl casts them to bf16 where a base has 4 bits, and fp16's loss scaling cannot unscale that."""
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data = parameter.data.float()


def causal_lm(model: torch.nn.Module) -> PreTrainedModel:
    """The model that has the adapters, or that trains whole."""
    return model.get_base_model() if isinstance(model, PeftModel) else model


def adapters(model: torch.nn.Module) -> Iterator[tuple[str, torch.nn.Parameter]]:
    """Trainable parameters by name."""
    return ((name, value) for name, value in model.named_parameters() if value.requires_grad)
