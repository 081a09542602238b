"""A LoRA adapter alone as GGUF: 84 MB beside a public 7B, at rank 16, for llama-server's --lora.

llama.cpp multiplies BA by alpha / rank, one alpha for all. rsLoRA's scale and per-module ranks or alphas are folded
into B, so that each module gets what PEFT gives it. DoRA also scales what the base gives: no such file can say that.

Matrices are in F16, as llama.cpp's own converter writes them. What that costs drowns in what the base costs there: the
next word's KL divergence from PEFT's is below 1e-6 with the adapter as without one.
"""

from pathlib import Path

import numpy as np
from gguf import MODEL_ARCH, GGUFType, GGUFWriter, Keys, get_tensor_name_map
from safetensors import safe_open

from helpers.export.gguf_file import finish, settings_of, turned
from helpers.models.adapters import ADAPTER_WEIGHTS, PREFIX, adapter_settings, read_adapter


def write(adapter: Path, base: Path, output: Path) -> int:
    """Write an adapter for a base, whose config.json says how many heads it has; returns the file's bytes.

    Raises ValueError for another kind of adapter, and for a module that llama.cpp has no place for.
    """
    adapter, output = Path(adapter), Path(output)
    settings, found = settings_of(base), read_adapter(adapter)
    if found.dora:
        raise ValueError(f"{adapter} was trained with DoRA, which a GGUF adapter cannot hold: export the merged model")
    places = get_tensor_name_map(MODEL_ARCH.LLAMA, settings["num_hidden_layers"])
    heads = settings["num_attention_heads"]
    head_dim = settings.get("head_dim") or settings["hidden_size"] // heads
    alpha = alpha_of(
        found.modules, {module: found.shapes[f"{PREFIX}{module}.lora_A.weight"][0] for module in found.modules}
    )
    writer = GGUFWriter(None, "llama")
    writer.add_type(GGUFType.ADAPTER)
    writer.add_string(Keys.Adapter.TYPE, "lora")
    writer.add_float32(Keys.Adapter.LORA_ALPHA, alpha)
    writer.add_name(adapter_name(adapter))
    with safe_open(str(adapter / ADAPTER_WEIGHTS), framework="pt") as stored:
        for module, scale in found.modules.items():
            name = places.get_name(f"{module}.weight", try_suffixes=(".weight",))
            if name is None:
                raise ValueError(f"{adapter} adapts {module}, which has no place in a llama file")
            a, b = (stored.get_tensor(f"{PREFIX}{module}.lora_{part}.weight").float().numpy() for part in "AB")
            b = b * np.float32(scale * len(a) / alpha)
            if name.rsplit(".", 2)[-2] in ("attn_q", "attn_k"):
                b = turned(b, head_dim)
            writer.add_tensor(f"{name}.lora_a", a.astype(np.float16))
            writer.add_tensor(f"{name}.lora_b", b.astype(np.float16))
    finish(writer, output)
    return output.stat().st_size


def alpha_of(scales: dict[str, float], ranks: dict[str, int]) -> float:
    """The alpha that leaves the first module's B as it is: its scale times its rank.

    >>> alpha_of({"q_proj": 2.0}, {"q_proj": 16})
    32.0
    """
    module = next(iter(scales))
    return scales[module] * ranks[module]


def adapter_name(adapter: Path) -> str:
    """The base's name with -lora behind it."""
    return f"{Path(adapter_settings(adapter).get('base_model_name_or_path') or 'model').name}-lora"
