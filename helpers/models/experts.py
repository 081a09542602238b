"""Mixtures of experts whose experts are linear layers, so that NF4, LoRA and 2-bit weights see what they know.

transformers 5 holds the experts of a layer in one tensor: bitsandbytes then leaves them in 16 bits without a word
(85 GiB for Mixtral-8x7B instead of 23), and no adapter changes a part of it. Here a subclass of transformers' own model
has a module for each expert in their place. Names on disk are the hub's; transformers' conversion mapping renames them.

    model = class_of("mixtral").from_pretrained(folder)      # models/loading.py's causal_lm asks for it

>>> stored_name("model.layers.0.mlp.experts.3.gate_proj.weight", "mixtral")
'model.layers.0.block_sparse_moe.experts.3.w1.weight'
>>> stored_name("model.layers.0.mlp.experts.3.gate_proj.weight", "qwen3_moe")
'model.layers.0.mlp.experts.3.gate_proj.weight'
"""

import json
import shutil
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import nn

from helpers.models import families
from helpers.models.stored import SafetensorsWriter, for_all_readers, stored_tensors, unquantized_config
from helpers.profiles import TINY
from helpers.workspace import files

RENAMED = {
    "mixtral": {".block_sparse_moe.": ".mlp.", ".w1.": ".gate_proj.", ".w3.": ".up_proj.", ".w2.": ".down_proj."}
}
"""model_type -> part of a name on disk -> part of a module's name. Not w1 to w3 here: of a Mixtral PEFT 0.20 and 0.21
rewrite targets of those names to the fused tensors, and then attach nothing."""


def stored_name(name: str, model_type: str) -> str:
    """The name on disk of a module's parameter, as the hub's checkpoints have it."""
    for stored, ours in RENAMED.get(model_type, {}).items():
        name = name.replace(ours, stored)
    return name


class Expert(nn.Module):
    """One gated MLP: down(activation(gate(x)) · up(x))."""

    def __init__(self, hidden: int, inner: int, activation: nn.Module):
        super().__init__()
        self.gate_proj = nn.Linear(hidden, inner, bias=False)
        self.up_proj = nn.Linear(hidden, inner, bias=False)
        self.down_proj = nn.Linear(inner, hidden, bias=False)
        self.act_fn = activation

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """x: (tokens, hidden) -> (tokens, hidden)."""
        return self.down_proj(self.act_fn(self.gate_proj(x)) * self.up_proj(x))


class Experts(nn.ModuleList):
    """The experts of a layer, each by itself: what stands in the place of transformers' fused ones."""

    def forward(self, hidden: torch.Tensor, index: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
        """Every token's experts, weighed and added up.

        hidden: (tokens, hidden); index, weights: (tokens, experts a token), which ones and how much of each.
        """
        result = torch.zeros_like(hidden)
        for expert, rows, slots in turns(index, len(self)):
            # an expert reads all of its tokens at once: one product a matrix, dequantized once
            answer = self[expert](hidden[rows]) * weights[rows, slots, None]
            result.index_add_(0, rows, answer.to(result.dtype))
        return result


def turns(index: torch.Tensor, experts: int) -> Iterator[tuple[int, torch.Tensor, torch.Tensor]]:
    """(expert, its tokens, which of their choices it is) of each expert that some token has chosen.

    index: (tokens, experts a token). Tokens of an expert stand in their order, and no token twice.

    >>> [(one, rows.tolist(), slots.tolist()) for one, rows, slots in turns(torch.tensor([[2, 0], [0, 3]]), 4)]
    [(0, [0, 1], [1, 0]), (2, [0], [0]), (3, [1], [1])]
    """
    chosen = index.reshape(-1)
    order = chosen.argsort(stable=True)
    counts = torch.bincount(chosen, minlength=experts).tolist()  # the one time that the host waits for the GPU
    for expert, places in enumerate(order.split(counts)):
        if len(places):
            yield expert, places // index.shape[1], places % index.shape[1]


def take_apart(decoder: nn.Module) -> None:
    """Put `Experts` in the place of every fused ones of a decoder, with weights of no value yet.

    Raises ValueError for a decoder that has none, or others than gate, up and down in two tensors.
    """
    found = 0
    for block in [part for part in decoder.modules() if hasattr(part, "experts")]:
        fused = block.experts
        shapes = {name: tuple(value.shape) for name, value in fused.named_parameters()}
        if set(shapes) != {"gate_up_proj", "down_proj"}:
            raise ValueError(
                f"the experts of {type(decoder).__name__} are {', '.join(sorted(shapes))}, not gate_up_proj and "
                "down_proj: this mixture cannot be taken apart into linear layers here"
            )
        count, hidden, inner = shapes["down_proj"]
        block.experts = Experts(Expert(hidden, inner, fused.act_fn) for _ in range(count))
        found += 1
    if not found:
        raise ValueError(f"{type(decoder).__name__} has no experts: it is opened as any other model")


@cache
def class_of(model_type: str) -> type | None:
    """transformers' causal LM of a family, with linear experts; None for a family without, or that keeps them fused.

    One class a family and process: transformers finds the names on disk by a class's name.
    """
    kind = families.KINDS.get(model_type)
    if kind is None or not kind.apart:
        return None
    import transformers
    from transformers.conversion_mapping import register_checkpoint_conversion_mapping
    from transformers.core_model_loading import WeightRenaming
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES, MODEL_MAPPING_NAMES

    whole = getattr(transformers, MODEL_FOR_CAUSAL_LM_MAPPING_NAMES[model_type])
    inner = getattr(transformers, MODEL_MAPPING_NAMES[model_type])

    class Decoder(inner):
        def __init__(self, config: Any) -> None:
            super().__init__(config)
            take_apart(self)

    class CausalLM(whole):
        def __init__(self, config: Any) -> None:
            super().__init__(config)
            self.model = Decoder(config)
            self.post_init()

        @classmethod
        def from_config(cls, config: Any, **options: Any) -> Any:  # what AutoModelForCausalLM has
            return cls._from_config(config, **options)

        def save_pretrained(self, save_directory: str | Path, **options: Any) -> None:
            super().save_pretrained(save_directory, **options)
            file = Path(save_directory) / "config.json"  # it names this class, which nobody else has
            said = json.loads(file.read_text(encoding="utf-8")) | {"architectures": [whole.__name__]}
            files.write_text(file, json.dumps(said, indent=2) + "\n")

    # transformers chooses the loss by "ForCausalLM" in a class's name, and the renames by the whole of it. Without a
    # mapping of its own the decoder would get its family's, which fuses experts.
    for made, theirs in ((Decoder, inner), (CausalLM, whole)):
        made.__name__ = made.__qualname__ = f"Apart{theirs.__name__}"
    renames = [WeightRenaming(stored, ours) for stored, ours in RENAMED.get(model_type, {}).items()]
    register_checkpoint_conversion_mapping(CausalLM.__name__, renames, overwrite=True)
    register_checkpoint_conversion_mapping(Decoder.__name__, [], overwrite=True)
    return CausalLM


# ---- a mixture for a machine without a hub ---------------------------------------------------------------------------


def tiny_mixture(folder: str | Path, source: Path = TINY, experts: int = 4, seed: int = 0) -> Path:
    """A Mixtral of the same function as a dense Mistral: its MLP in every expert, two a token. Returns the folder.

    The weights of a token's experts add up to one, so it does not matter which ones the router chooses, until training
    makes them differ. source: a folder with a Mistral's safetensors. A folder that is there already is left as it is.
    """
    folder = Path(folder)
    if (folder / "config.json").is_file():
        return folder
    tensors = stored_tensors(source)
    settings = unquantized_config(source)
    work = files.make_folder(files.with_suffix(folder, ".partial"))
    shapes, origins = {}, {}
    for tensor in tensors:
        for name in names_in_mixture(tensor.name, experts):
            shapes[name], origins[name] = tensor.shape, tensor
        if tensor.name.endswith("mlp.down_proj.weight"):
            router = tensor.name.replace("mlp.down_proj", "block_sparse_moe.gate")
            shapes[router], origins[router] = (experts, settings["hidden_size"]), None
    draw = torch.Generator().manual_seed(seed)
    with SafetensorsWriter(work / "model.safetensors", shapes) as writer:
        for name, tensor in origins.items():
            if tensor is None:  # wide enough apart that tokens of different kinds go to different experts
                writer.add((torch.randn(shapes[name], generator=draw) / 10).half())
            else:
                with safe_open(tensor.file, "pt") as shard:
                    writer.add(shard.get_tensor(tensor.name).half().contiguous())
    mixture = {
        "architectures": ["MixtralForCausalLM"],
        "model_type": "mixtral",
        "num_local_experts": experts,
        "num_experts_per_tok": 2,
        "router_aux_loss_coef": 0.001,
        "output_router_logits": False,
    }
    for file in source.iterdir():
        if "token" in file.name or file.suffix == ".jinja" or file.name == "generation_config.json":
            shutil.copy2(file, work / file.name)
    files.write_text(work / "config.json", json.dumps(for_all_readers(settings | mixture), indent=2) + "\n")
    files.publish(work, folder)
    return folder


def names_in_mixture(name: str, experts: int) -> list[str]:
    """The names that a dense model's tensor has in a Mixtral, one an expert where it belongs to the MLP."""
    if ".mlp." not in name:
        return [name]
    before, after = name.split(".mlp.")
    return [stored_name(f"{before}.mlp.experts.{expert}.{after}", "mixtral") for expert in range(experts)]


# ---- who reads what --------------------------------------------------------------------------------------------------


def shares(model: nn.Module, rows: list[list[int]]) -> list[list[float]]:
    """Layer -> expert -> share of the tokens that it reads; each token has several, so a layer's sum is that many.

    model: open, with or without an adapter. rows: token ids of texts, read one by one.
    """
    routers = [part for part in model.modules() if type(part).__name__.endswith("Router") and hasattr(part, "top_k")]
    if not routers:
        raise ValueError("the model has no router: shares are those of a mixture's experts")
    counts = [torch.zeros(router.num_experts) for router in routers]

    def counting(place: int) -> Any:
        def hook(router: nn.Module, arguments: Any, answer: tuple[torch.Tensor, ...]) -> None:
            counts[place] += torch.bincount(answer[2].reshape(-1), minlength=len(counts[place])).cpu()

        return hook

    hooks = [router.register_forward_hook(counting(place)) for place, router in enumerate(routers)]
    try:
        with torch.inference_mode():
            for ids in rows:
                model(input_ids=torch.tensor([ids], device=model.device), use_cache=False)
    finally:
        for hook in hooks:
            hook.remove()
    tokens = sum(len(ids) for ids in rows)
    return [(count / tokens).tolist() for count in counts]
