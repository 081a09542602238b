"""Language models inside ones that see, such as Ministral 3: their text is trained, their eyes are left out. No torch.

On disk, the language model's tensors have a prefix, and its sizes lie in config.json's text_config. Here both are read
as if it were saved by itself, and a merge writes it so.

>>> text_name("language_model.model.layers.0.mlp.up_proj.weight"), text_name("language_model.lm_head.weight")
('model.layers.0.mlp.up_proj.weight', 'lm_head.weight')
>>> text_name("model.language_model.norm.weight"), text_name("vision_tower.patch_conv.weight")
('model.norm.weight', None)
"""

from collections.abc import Mapping
from typing import Any

KINDS = ("mistral3",)
"""model_type of those that are opened so."""
CLASSES = {"mistral": "MistralForCausalLM", "ministral3": "Ministral3ForCausalLM"}
"""model_type of the language model -> transformers' class."""
RENAMED = {"model.language_model.": "model.", "language_model.": ""}
"""Start of a name on disk -> start of the language model's own: of a later transformers 4, and the hub's."""
EYES = ("vision_tower.", "multi_modal_projector.", "model.vision_tower.", "model.multi_modal_projector.")
WHOLE = ("quantization_config", "tie_word_embeddings", "bos_token_id", "eos_token_id", "pad_token_id", "dtype")
"""What config.json says of the whole model and its language model too."""


def is_wrapped(config: Mapping[str, Any]) -> bool:
    """Whether a config.json is of a language model inside one that sees."""
    return config.get("model_type") in KINDS and (config.get("text_config") or {}).get("model_type") in CLASSES


def text_config(config: Mapping[str, Any]) -> Mapping[str, Any]:
    """config.json of the language model by itself; of any other model as it is."""
    if not is_wrapped(config):
        return config
    inner = config["text_config"]
    outer = {name: config[name] for name in WHOLE if config.get(name) is not None}
    return outer | inner | {"architectures": [CLASSES[inner["model_type"]]]}


def text_name(name: str) -> str | None:
    """What a tensor is called in the language model by itself; None for one of the eyes."""
    if name.startswith(EYES):
        return None
    start = next((start for start in RENAMED if name.startswith(start)), "")
    return RENAMED.get(start, "") + name.removeprefix(start)
