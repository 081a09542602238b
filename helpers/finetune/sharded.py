"""FSDP2: the weights of the decoder layers divided among the ranks, a layer gathered for each of its turns.

torch's fully_shard does it (https://arxiv.org/abs/2304.11277), a decoder layer at a time; our own layers look their
weights up at each turn. NF4's bytes pass for numbers of the compute type, which is what fully_shard moves; their
scales stay whole. What is frozen outside of the layers (embedding, head, last norm) stays whole too: gathered for a
micro-batch it would be there as well, beside its shards. Fully trained, it is divided like the rest.

A model is divided while it is read: a layer comes to the GPU, is packed and divided, then comes the next. So a model
may be larger than one GPU. Gradients are summed over ranks and divided with every micro-batch, in fp32.

    model, tokenizer = load(config)
    state = whole(parameter)          # what all ranks hold of it together
    into(parameter, value)            # and back
"""

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel
from peft.tuners.lora import LoraLayer
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor, distribute_tensor
from transformers import AutoModelForCausalLM, PreTrainedModel, PreTrainedTokenizerBase, set_seed
from transformers.quantizers.auto import AutoHfQuantizer

from helpers.config import RunConfig
from helpers.finetune import base
from helpers.models import families, hub, loading, shape
from helpers.models.stored import Stored, stored_tensors
from helpers.models.templates import load_tokenizer

Read = Callable[[str], torch.Tensor]
"""The tensor of a name, from the model's files, on this rank's device and in its type."""


def load(config: RunConfig) -> tuple[PreTrainedModel | PeftModel, PreTrainedTokenizerBase]:
    """The model that trains, with its adapter or whole, divided among the ranks; and its tokenizer.

    Raises ValueError, before anything is downloaded, for a model or targets that cannot be trained.
    """
    sizes = shape(config.model.model, config.model.revision)
    families.refuse(sizes.family, sizes.name, config.adapter.target_modules)
    if sizes.additive is not None:
        raise ValueError(f"{sizes.name}: AQLM's codes cannot be divided among GPUs: set sharding=none")
    base.refuse_without_gpu(config)
    folder = Path(config.model.model)
    folder = folder if folder.is_dir() else hub.snapshot(config.model.model, config.model.revision)
    return build(config, folder), load_tokenizer(config.model.model, config.model.revision)


def build(config: RunConfig, folder: Path, reads: Callable[..., Read] | None = None) -> PreTrainedModel | PeftModel:
    """The divided model of a folder; reads: makes what reads its tensors, default from the folder's files."""
    device, compute = device_of_rank(), base.precision().dtype
    everything = config.train.trains == "all"
    model = skeleton(config, folder, torch.float32 if everything else compute)
    read = (reads or reader)(folder, model, device)
    if not everything:
        model = base.attach_adapter(model, config)
        draw_adapters(model, config)
    causal_lm = base.causal_lm(model)
    causal_lm.is_loaded_in_4bit = False  # trl would cast what is trained to bf16, in a way that fully_shard misses
    policy = MixedPrecisionPolicy(param_dtype=compute, reduce_dtype=torch.float32) if everything else None
    divide(causal_lm, init_device_mesh(device.type, (torch.distributed.get_world_size(),)), read, policy)
    for module in model.modules():
        if hasattr(module, "support_avx512bf16_for_cpu"):
            module.support_avx512bf16_for_cpu = False  # answering once would repack the weights: no gradients after
    return model


def draw_adapters(model: PeftModel, config: RunConfig) -> None:
    """Draw the adapters again, as PEFT draws them: it has sent them after weights that are nowhere yet."""
    set_seed(config.seed)
    for module in model.modules():
        for name in module.lora_A if isinstance(module, LoraLayer) else ():
            for factors in (module.lora_A, module.lora_B):
                old = factors[name]
                factors[name] = torch.nn.Linear(old.in_features, old.out_features, bias=False)
            module.reset_lora_parameters(name, init_lora_weights=True)
            if config.model.weights == "nf4":  # trl rounds them so, on a 4-bit base: the same start on one GPU and two
                module.lora_A[name].weight.data = module.lora_A[name].weight.data.bfloat16().float()


def device_of_rank() -> torch.device:
    """This rank's GPU, or the CPU."""
    return torch.device("cuda", torch.cuda.current_device()) if torch.cuda.is_available() else torch.device("cpu")


def skeleton(config: RunConfig, folder: Path, dtype: torch.dtype) -> PreTrainedModel:
    """The model without any weight, its linear layers as bitsandbytes' where they will be packed."""
    family = shape(str(folder)).family
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(
            loading.config_of(folder)[0],
            dtype=dtype,
            attn_implementation=loading.attention_implementation(family, config.model.attention),
        )
    asked = loading.base_quantization(config, dtype, storage=dtype)
    if asked is not None:
        quantizer = AutoHfQuantizer.from_config(asked, pre_quantized=False)
        quantizer.preprocess_model(model=model, device_map=None)
        model.hf_quantizer = quantizer
        quantizer.postprocess_model(model)
    model.config.use_cache = False
    return model.requires_grad_(config.train.trains == "all")


def reader(folder: Path, model: PreTrainedModel, device: torch.device) -> Read:
    """Reads a model's tensors by the names of its parameters. Raises ValueError where the files have other names."""
    from safetensors import safe_open

    files: dict[str, Stored] = {tensor.name: tensor for tensor in stored_tensors(folder)}
    tied = set(getattr(model, "_tied_weights_keys", None) or ()) if model.config.tie_word_embeddings else set()
    missing = [name for name, _ in model.named_parameters() if name not in files and name not in tied]
    if missing:
        raise ValueError(
            f"{folder} stores its weights under other names than {missing[0]}: it cannot be read in parts, and "
            "sharding=fsdp needs that; set sharding=none"
        )
    # what is packed is rounded first to what the others compute in, as from_pretrained does
    compute = model.get_input_embeddings().weight.dtype
    types = {
        name: compute if hasattr(value, "quant_state") else value.dtype for name, value in model.named_parameters()
    }

    def read(name: str) -> torch.Tensor:
        with safe_open(files[name].file, framework="pt") as stream:
            return stream.get_tensor(files[name].in_file).to(device).to(types[name])

    return read


def divide(model: PreTrainedModel, mesh: DeviceMesh, read: Read, policy: MixedPrecisionPolicy | None) -> None:
    """Read a causal LM's weights and divide its layers; policy: of full fine-tuning, None for frozen weights."""
    how = {"mesh": mesh} | ({"mp_policy": policy} if policy else {})
    decoder = model.model
    device = torch.device(mesh.device_type, torch.cuda.current_device()) if mesh.device_type == "cuda" else "cpu"
    # angles are no weights: no file has them
    decoder.rotary_emb = type(decoder.rotary_emb)(config=model.config).to(device)
    for number, layer in enumerate(decoder.layers):
        fill(layer, f"model.layers.{number}.", read, device)
        fully_shard(layer, **how)
    outside = [(name, part) for name, part in parts_outside(model)]
    for name, part in outside:
        fill(part, name + ".", read, device)
    model.tie_weights()
    if policy is not None:
        # said, because an evaluation would leave whole weights here else, which an optimizer then updates in vain
        fully_shard(model, reshard_after_forward=True, **how)
        return
    # PEFT calls the causal LM's forward alone; hooks of gathering need a module that is called as such
    whole_ones = {value for _, part in outside for value in part.parameters()}
    fully_shard(decoder, ignored_params=whole_ones, **how)


def parts_outside(model: PreTrainedModel) -> Iterator[tuple[str, torch.nn.Module]]:
    """(name, module) of what has weights of its own beside the decoder layers."""
    for name, module in model.named_modules():
        if ".layers." not in name and next(module.parameters(recurse=False), None) is not None:
            yield name, module


def fill(module: torch.nn.Module, prefix: str, read: Read, device: Any) -> None:
    """Put weights where a module has none yet: read from the files, packed where it packs them, adapters moved."""
    for name, child in module.named_modules():
        for leaf, old in list(child.named_parameters(recurse=False)):
            path = f"{prefix}{name}.{leaf}" if name else f"{prefix}{leaf}"
            if not old.is_meta:  # an adapter, which no file has
                setattr(child, leaf, torch.nn.Parameter(old.to(device), requires_grad=old.requires_grad))
                continue
            value = read(path.replace(".base_layer", ""))
            if hasattr(old, "quant_state"):
                packed = type(old)(value, requires_grad=False, **old.__dict__).to(device)
                child.weight, child.quant_state = packed, packed.quant_state
            else:
                setattr(child, leaf, torch.nn.Parameter(value, requires_grad=old.requires_grad))


# ---- what all ranks hold together ------------------------------------------------------------------------------------


def is_divided(model: torch.nn.Module) -> bool:
    """Whether ranks hold parts of a model's weights."""
    return any(isinstance(value, DTensor) for value in model.parameters())


def here(value: torch.Tensor) -> torch.Tensor:
    """What this rank holds of a tensor."""
    return value.to_local() if isinstance(value, DTensor) else value


def whole(value: Any) -> Any:
    """A tensor as one rank alone would hold it, on the CPU; all ranks ask. Anything else as it is."""
    if isinstance(value, DTensor):
        value = value.full_tensor()
    return value.detach().cpu() if isinstance(value, torch.Tensor) else value


def on_the_first(value: Any) -> Any:
    """`whole` on rank 0; None on the others, whose host may not have room for all of them once more."""
    gathered = whole(value)
    return gathered if torch.distributed.get_rank() == 0 else None


def part_of(value: Any, like: torch.Tensor) -> Any:
    """A whole tensor divided as another is; each rank has the whole one already."""
    if not isinstance(like, DTensor) or not isinstance(value, torch.Tensor) or value.shape != like.shape:
        return value  # a count of steps, for one
    value = value.to(like.device)
    return distribute_tensor(value, like.device_mesh, like.placements, src_data_rank=None)


def into(parameter: torch.nn.Parameter, value: torch.Tensor) -> None:
    """Copy a whole tensor into a parameter, divided or not."""
    with torch.no_grad():
        here(parameter).copy_(here(part_of(value, parameter)))


def trained(model: torch.nn.Module) -> dict[str, torch.Tensor] | None:
    """Name -> trained weight, whole and on rank 0's CPU, where they are divided; else None. All ranks ask."""
    if not is_divided(model):
        return None
    return {name: on_the_first(value) for name, value in base.adapters(model)}


def take(model: torch.nn.Module, state: dict[str, torch.Tensor]) -> None:
    """Whole trained weights, by the names in a file, into a divided model."""
    for name, parameter in base.adapters(model):
        into(parameter, state[name.replace(".default.", ".")])


def optimizer_state(optimizer: torch.optim.Optimizer) -> dict[str, Any]:
    """The state of an optimizer of divided weights as one rank alone would have it, on rank 0. All ranks ask."""
    state = optimizer.state_dict()
    entries = {key: {name: on_the_first(one) for name, one in entry.items()} for key, entry in state["state"].items()}
    return state | {"state": entries}


def divides_what_it_loads(optimizer: torch.optim.Optimizer) -> None:
    """Let an optimizer of divided weights load what `optimizer_state` gave."""

    def divided(optimizer: torch.optim.Optimizer, state: dict[str, Any]) -> dict[str, Any]:
        parameters = [value for group in optimizer.param_groups for value in group["params"]]
        entries = {
            key: {name: part_of(value, parameters[key]) for name, value in entry.items()}
            for key, entry in state["state"].items()
        }
        return state | {"state": entries}

    optimizer.register_load_state_dict_pre_hook(divided)
