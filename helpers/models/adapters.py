"""A LoRA adapter's folder as PEFT writes it: its modules, their scales and shapes; kinds that are something else."""

import json
import math
import re
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path

from helpers.models.stored import UnusableModel, read_header

ADAPTER_CONFIG, ADAPTER_WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
PREFIX = "base_model.model."
PARTS = (".lora_A.weight", ".lora_B.weight", ".lora_magnitude_vector")
# What PEFT can put into a LoRA adapter beside A, B and DoRA's magnitudes. Each changes the merge, so each is refused.
OTHER_KINDS = (
    "fan_in_fan_out",
    "modules_to_save",
    "trainable_token_indices",
    "target_parameters",
    "layer_replication",
    "lora_bias",
    "use_qalora",
    "use_bdlora",
    "alora_invocation_tokens",
    "arrow_config",
    "kasa_config",
    "velora_config",
    "monteclora_config",
)
# These initialisations replace the base's weights, so that the adapter is not a difference to the original ones.
OTHER_BASES = ("pissa", "olora", "corda", "loftq", "lora_ga")


@dataclass(frozen=True)
class Adapter:
    """A LoRA adapter, its factors still on disk."""

    folder: Path
    modules: dict[str, float]
    """Module, as its base's files name it -> what multiplies BA."""
    dora: bool
    shapes: dict[str, tuple[int, ...]]
    """Key in the adapter's file -> shape."""
    named: dict[str, str] = field(default_factory=dict)
    """Module, as the base's files name it -> as the adapter's does, where that differs."""

    def key(self, module: str, part: str) -> str:
        """The key in the adapter's file of a module's A, B or magnitudes (`PARTS`)."""
        return PREFIX + self.named.get(module, module) + part

    def as_stored(self, stored: Callable[[str], str]) -> "Adapter":
        """The same, its modules by other names."""
        named = {stored(f"{module}.weight").removesuffix(".weight"): module for module in self.modules}
        return replace(self, modules={name: self.modules[module] for name, module in named.items()}, named=named)


def adapter_settings(folder: Path) -> dict:
    """An adapter's adapter_config.json. Raises UnusableModel where there is none, or none that can be read."""
    path = folder / ADAPTER_CONFIG
    if not path.is_file():
        raise UnusableModel(f"{folder} is not an adapter: it has no {ADAPTER_CONFIG}")
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except ValueError:
        raise UnusableModel(f"{path} is not JSON: make the adapter again") from None


def read_adapter(folder: Path) -> Adapter:
    """The adapter's modules and scales. Raises UnusableModel for a kind that this merge would get wrong."""
    settings = adapter_settings(folder)
    kind = settings.get("peft_type")
    if kind != "LORA":
        raise UnusableModel(f"{folder} holds a {kind} adapter: only LoRA, rsLoRA and DoRA can be merged here")
    extra = [name for name in OTHER_KINDS if settings.get(name)]
    if settings.get("bias", "none") != "none":
        extra.append(f"bias={settings['bias']}")
    start = str(settings.get("init_lora_weights", True)).lower()
    if start.startswith(OTHER_BASES):
        extra.append(f"init_lora_weights={start}")
    if extra:
        raise UnusableModel(
            f"{folder} was trained with {', '.join(extra)}: merge it with PEFT, this merge knows A and B"
        )
    keys = {tensor.name: tensor for tensor in read_header(folder / ADAPTER_WEIGHTS)}
    modules: dict[str, float] = {}
    used = set()
    for key in keys:
        if key.startswith(PREFIX) and key.endswith(".lora_A.weight"):
            module = key.removeprefix(PREFIX).removesuffix(".lora_A.weight")
            modules[module] = scaling(settings, module)
            used |= {PREFIX + module + part for part in PARTS[: 3 if settings.get("use_dora") else 2]}
    unknown, missing = sorted(set(keys) - used), sorted(used - set(keys))
    if not modules or unknown or missing:
        reason = f"does not know {unknown[0]}" if unknown else f"misses {missing[0]}" if missing else "found no lora_A"
        raise UnusableModel(f"{folder / ADAPTER_WEIGHTS} is not a whole LoRA adapter: the merge {reason}")
    return Adapter(folder, modules, bool(settings.get("use_dora")), {name: keys[name].shape for name in used})


def scaling(settings: dict, module: str) -> float:
    """What multiplies BA of a module: alpha / rank, or alpha / sqrt(rank) of rsLoRA (https://arxiv.org/abs/2312.03732).

    >>> scaling({"r": 16, "lora_alpha": 32}, "model.layers.0.self_attn.q_proj")
    2.0
    """
    rank = of_module(settings.get("rank_pattern"), module, settings["r"])
    alpha = of_module(settings.get("alpha_pattern"), module, settings["lora_alpha"])
    return alpha / (math.sqrt(rank) if settings.get("use_rslora") else rank)


def of_module(patterns: dict | None, module: str, default: float) -> float:
    """A module's own rank or alpha, by PEFT's rule: the first pattern that matches the end of its name."""
    return next((value for key, value in (patterns or {}).items() if re.match(rf"(.*\.)?({key})$", module)), default)
