"""Shapes of models, from a name or a config.json. `models.profile` is helpers.profiles' own.

>>> shape("mistral-7b-v0.3").parameters
7248023552
>>> shape("mistral-7b-v0.3").kv_cache_bytes_per_token(bytes_per_value=2)
131072
"""

import json
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

from helpers.models import aqlm_sizes, families, wrapped
from helpers.models.aqlm_sizes import Layout
from helpers.models.families import Family
from helpers.profiles import PROFILES as PROFILES
from helpers.profiles import ROOT as ROOT
from helpers.profiles import TINY as TINY
from helpers.profiles import profile as profile


@dataclass(frozen=True)
class ModelShape:
    """The sizes of a Llama-like decoder; every byte and every FLOP of the budget follows from them."""

    name: str
    layers: int
    hidden: int
    intermediate: int
    """Of a mixture: one expert's."""
    heads: int
    kv_heads: int
    head_dim: int
    vocab: int
    max_context: int
    family: Family
    """What computes it, and what differs from Llama (models/families.py)."""
    sliding_window: int | None = None
    tied: bool = False
    """The output head is the embedding."""
    dense_intermediate: int = 0
    """Of a mixture: the MLP of layers without experts."""
    additive: Layout | None = None
    """How its matrices are stored, of an AQLM checkpoint."""
    packed: str = ""
    """transformers' quant_method of how its weights are stored otherwise than in 16 bits or by AQLM."""

    @property
    def model_type(self) -> str:
        """transformers' name of the family."""
        return self.family.model_type

    @property
    def adapter_only(self) -> str:
        """Why a whole run of it ends with the adapter, which is neither merged nor quantized; "" where it goes on."""
        if self.additive is not None:
            return aqlm_sizes.NO_MERGE
        use = "use the adapter on its base, as evaluate and serve open it"
        if self.packed:
            return f"its weights are stored as {self.packed}, and an adapter is merged into 16 bits: {use}"
        if self.experts > 1:
            whole_gib = 2 * self.parameters / 2**30
            return f"GPTQ of a mixture is not made here, and merged it takes {whole_gib:.1f} GiB in 16 bits: {use}"
        return ""

    @property
    def experts(self) -> int:
        """Experts of a layer; 1 without a mixture."""
        return self.family.experts

    @property
    def experts_per_token(self) -> int:
        """Experts that a token meets, shared ones aside."""
        return self.family.experts_per_token

    @cached_property
    def linears(self) -> dict[str, tuple[int, int]]:
        """Linear layer of a decoder layer -> (in features, out features); each expert has its own MLP."""
        queries, keys = self.heads * self.head_dim, self.kv_heads * self.head_dim
        sizes = families.sizes_of(self.hidden, queries, keys, self.intermediate)
        return {name: sizes[name] for name in self.family.linears}

    def copies(self, linear: str) -> int:
        """How many of a linear layer one decoder layer holds."""
        return self.experts if linear in families.MLP else 1

    @property
    def layer_linear_parameters(self) -> int:
        """Weights of the linear layers of one decoder layer: of a mixture, one with experts."""
        every = sum(inputs * outputs * self.copies(name) for name, (inputs, outputs) in self.linears.items())
        return every + self.shared_parameters

    @property
    def active_linear_parameters(self) -> int:
        """Those that a token meets: two experts of Mixtral's eight."""
        return self.shared_parameters + sum(
            inputs * outputs * (self.experts_per_token if name in families.MLP else 1)
            for name, (inputs, outputs) in self.linears.items()
        )

    @property
    def shared_parameters(self) -> int:
        """Weights of one layer's experts that every token meets."""
        return 3 * self.hidden * self.family.shared_size

    @property
    def expert_parameters(self) -> int:
        """Weights of experts that one tensor a layer holds: bitsandbytes leaves them in 16 bits; 0 where none does."""
        if self.experts == 1 or self.family.apart:
            return 0
        each = sum(inputs * outputs for name, (inputs, outputs) in self.linears.items() if name in families.MLP)
        return (self.layers - self.family.dense_layers) * self.experts * each

    @property
    def linear_parameters(self) -> int:
        """Weights of the linear layers of all decoder layers."""
        return self.layers * self.layer_linear_parameters - self.family.dense_layers * (
            self.layer_linear_parameters - self.dense_layer_parameters
        )

    @property
    def dense_layer_parameters(self) -> int:
        """Weights of the linear layers of one decoder layer without experts."""
        attention = sum(
            inputs * outputs for name, (inputs, outputs) in self.linears.items() if name not in families.MLP
        )
        return attention + 3 * self.hidden * self.dense_intermediate

    @property
    def embedding_parameters(self) -> int:
        """Embedding, and output head where it is not the same tensor."""
        return self.vocab * self.hidden * (1 if self.tied else 2)

    @property
    def small_parameters(self) -> int:
        """Norms, biases and the router of a mixture of experts: never quantized."""
        family = self.family
        router = self.hidden * (self.experts + family.shared_gate) if self.experts > 1 else 0
        sparse = self.layers - family.dense_layers
        return self.layers * family.layer_vectors + sparse * router + family.last_vectors

    @property
    def parameters(self) -> int:
        """All of them.

        >>> round(shape("mixtral-8x7b").parameters / 1e9, 1)
        46.7
        """
        return self.linear_parameters + self.embedding_parameters + self.small_parameters

    @property
    def active_parameters(self) -> int:
        """Those that a token meets; all of them where there are no experts.

        >>> round(shape("mixtral-8x7b").active_parameters / 1e9, 1)
        12.9
        """
        resting = self.layer_linear_parameters - self.active_linear_parameters
        return self.parameters - (self.layers - self.family.dense_layers) * resting

    def lora_parameters(self, rank: int, targets: tuple[str, ...]) -> int:
        """Weights of A (rank × in) and B (out × rank) over all layers (https://arxiv.org/abs/2106.09685).

        >>> shape("mistral-7b-v0.3").lora_parameters(16, ("q_proj", "v_proj"))
        6815744
        """
        return self.layers * sum(
            rank * sum(size) * self.copies(name) for name, size in self.linears.items() if name in targets
        )

    def kv_cache_bytes_per_token(self, bytes_per_value: int = 2) -> int:
        """Keys and values of one token in all layers; grouped queries share them (https://arxiv.org/abs/2305.13245)."""
        return 2 * self.layers * self.kv_heads * self.head_dim * bytes_per_value


def shape_from_config(config: dict, name: str) -> ModelShape:
    """The shape that a Hugging Face config.json describes. Raises ValueError naming what is missing or unknown."""
    config = wrapped.text_config(config)
    if "text_config" in config:
        raise ValueError(
            f"model {name} is a {config.get('model_type')}, a language model inside one that sees or hears: of "
            f"those, {' and '.join(wrapped.KINDS)} with a language model of {' or '.join(wrapped.CLASSES)} is trained "
            "here; save this one's language model by itself, or take a model of text alone"
        )
    config = families.complete(config)
    wanted = ("num_hidden_layers", "hidden_size", "intermediate_size", "num_attention_heads", "vocab_size")
    missing = [key for key in wanted if not isinstance(config.get(key), int) or config[key] < 1]
    if missing or config.get("is_encoder_decoder"):
        reason = f"its config.json has no positive {', '.join(missing)}" if missing else "it is an encoder-decoder"
        raise ValueError(f"model {name} is not a Llama-like decoder: {reason}")
    try:
        family, additive = families.of(config), aqlm_sizes.layout_of(config)
    except ValueError as error:
        raise ValueError(f"model {name} is not known here: {error}") from None
    heads = config["num_attention_heads"]
    windowed = families.KINDS[family.model_type].window and config.get("use_sliding_window", True)
    return ModelShape(
        name=name,
        layers=config["num_hidden_layers"],
        hidden=config["hidden_size"],
        intermediate=family.expert_size or config["intermediate_size"],
        heads=heads,
        kv_heads=config.get("num_key_value_heads") or heads,
        head_dim=families.head_dim(config),
        vocab=config["vocab_size"],
        max_context=config.get("max_position_embeddings") or 2048,
        family=family,
        sliding_window=config.get("sliding_window") if windowed else None,  # Qwen2 names one that it does not use
        tied=bool(config.get("tie_word_embeddings", False)),
        dense_intermediate=config["intermediate_size"],
        additive=additive,
        packed="" if additive else (config.get("quantization_config") or {}).get("quant_method") or "",
    )


def refuse_packed(shape: ModelShape) -> None:
    """Raise ValueError for a base that adapters are not trained on here as it is stored.

    bitsandbytes' own 4 bits are opened as they are.
    """
    if shape.packed not in ("", "bitsandbytes"):
        raise ValueError(
            f"{shape.name} is stored as {shape.packed}: adapters are trained on a base of 16 bits, rounded to 4 while "
            "it is read; take the same model in 16 bits (of Mistral's own a name that ends in -BF16 or holds Base)"
        )


def known(name: str, model_type: str, sizes: tuple[int, ...], **more: Any) -> ModelShape:
    """A shape from sizes alone: layers, hidden, intermediate, heads, kv heads, head_dim, words, context."""
    fields = (
        "num_hidden_layers",
        "hidden_size",
        "intermediate_size",
        "num_attention_heads",
        "num_key_value_heads",
        "head_dim",
        "vocab_size",
        "max_position_embeddings",
    )
    config = {"model_type": model_type, **dict(zip(fields, sizes, strict=True))}
    return shape_from_config(config | {"sliding_window": None} | more, name)


TIED = {"tie_word_embeddings": True}
V01 = known("mistral-7b-v0.1", "mistral", (32, 4096, 14336, 32, 8, 128, 32000, 32768), sliding_window=4096)
V02 = replace(V01, name="mistral-7b-v0.2", sliding_window=None)
V03 = replace(V02, name="mistral-7b-v0.3", vocab=32768)
MIXTRAL = known("mixtral-8x7b", "mixtral", (32, 4096, 14336, 32, 8, 128, 32000, 32768))
MINISTRAL_3B = known("ministral-3-3b", "ministral3", (26, 3072, 9216, 32, 8, 128, 131072, 262144), **TIED)
MINISTRAL_8B = known("ministral-3-8b", "ministral3", (34, 4096, 14336, 32, 8, 128, 131072, 262144))
NEMO = known("mistral-nemo-12b", "mistral", (40, 5120, 14336, 32, 8, 128, 131072, 131072))
KNOWN = {
    "mistralai/Mistral-7B-v0.1": V01,
    "mistralai/Mistral-7B-Instruct-v0.1": V01,
    "mistralai/Mistral-7B-Instruct-v0.2": V02,
    "mistralai/Mistral-7B-v0.3": V03,
    "mistralai/Mistral-7B-Instruct-v0.3": V03,
    "mistralai/Mistral-Small-24B-Base-2501": known(
        "mistral-small-24b", "mistral", (40, 5120, 32768, 32, 8, 128, 131072, 32768)
    ),
    **dict.fromkeys(
        ("mistralai/Ministral-3-3B-Base-2512", "mistralai/Ministral-3-3B-Instruct-2512-BF16"), MINISTRAL_3B
    ),
    **dict.fromkeys(
        ("mistralai/Ministral-3-8B-Base-2512", "mistralai/Ministral-3-8B-Instruct-2512-BF16"), MINISTRAL_8B
    ),
    "mistralai/Mixtral-8x7B-v0.1": MIXTRAL,
    "mistralai/Mixtral-8x7B-Instruct-v0.1": MIXTRAL,
    "mistralai/Mistral-Nemo-Base-2407": NEMO,
    "mistralai/Mistral-Nemo-Instruct-2407": NEMO,
    "Qwen/Qwen3-8B": known("qwen3-8b", "qwen3", (36, 4096, 12288, 32, 8, 128, 151936, 40960)),
    "Qwen/Qwen3-14B": known("qwen3-14b", "qwen3", (40, 5120, 17408, 40, 8, 128, 151936, 40960)),
    "Qwen/Qwen3-30B-A3B": known(
        "qwen3-30b-a3b",
        "qwen3_moe",
        (48, 2048, 6144, 32, 4, 128, 151936, 40960),
        num_experts=128,
        num_experts_per_tok=8,
        moe_intermediate_size=768,
    ),
    "microsoft/phi-4": known("phi-4", "phi3", (40, 5120, 17920, 40, 10, 128, 100352, 16384)),
    "meta-llama/Llama-2-7b-hf": known("llama-2-7b", "llama", (32, 4096, 11008, 32, 32, 128, 32000, 4096)),
    "meta-llama/Llama-3.1-8B": known("llama-3.1-8b", "llama", (32, 4096, 14336, 32, 8, 128, 128256, 131072)),
    "meta-llama/Llama-3.2-1B": known("llama-3.2-1b", "llama", (16, 2048, 8192, 32, 8, 64, 128256, 131072), **TIED),
    "meta-llama/Llama-3.2-3B": known("llama-3.2-3b", "llama", (28, 3072, 8192, 24, 8, 128, 128256, 131072), **TIED),
    "Qwen/Qwen2.5-0.5B": known("qwen2.5-0.5b", "qwen2", (24, 896, 4864, 14, 2, 64, 151936, 32768), **TIED),
    "Qwen/Qwen2.5-1.5B": known("qwen2.5-1.5b", "qwen2", (28, 1536, 8960, 12, 2, 128, 151936, 131072), **TIED),
    "Qwen/Qwen2.5-7B": known("qwen2.5-7b", "qwen2", (28, 3584, 18944, 28, 4, 128, 152064, 131072)),
    "HuggingFaceTB/SmolLM2-1.7B": known("smollm2-1.7b", "llama", (24, 2048, 8192, 32, 32, 64, 49152, 8192), **TIED),
    "TinyLlama/TinyLlama-1.1B-Chat-v1.0": known("tinyllama-1.1b", "llama", (22, 2048, 5632, 32, 4, 64, 32000, 2048)),
    **dict(
        zip(
            aqlm_sizes.CHECKPOINTS,
            (
                replace(V01, name="mistral-7b-aqlm", additive=aqlm_sizes.ADDITIVE_1X16),
                replace(MIXTRAL, name="mixtral-8x7b-aqlm", additive=aqlm_sizes.ADDITIVE_1X16),
            ),
            strict=True,
        )
    ),
}


def shape(name: str, revision: str | None = None) -> ModelShape:
    """The shape of a model: a hub id, a short name such as mistral-7b-v0.3, a config.json, or a folder that has one.

    revision: of a hub id whose shape is not known here; no revision of the known ones ever changed it.
    Raises ValueError when it is none of these, or not a Llama-like decoder.
    """
    for hub_id, known in KNOWN.items():
        if name.lower() in (hub_id.lower(), hub_id.split("/")[1].lower(), known.name):
            return replace(known, name=name)
    path = Path(name)
    path = path / "config.json" if path.is_dir() else path
    if path.is_file():
        try:
            return shape_from_config(json.loads(path.read_text(encoding="utf-8")), name)
        except (json.JSONDecodeError, UnicodeDecodeError):
            raise ValueError(f"model: {path} is not JSON") from None
    if name.count("/") == 1 and not name.startswith((".", "/")) and path.suffix != ".json":
        return shape_from_config(hub_config(name, revision), name)
    raise ValueError(
        f"model must be a folder with config.json, a config.json, a hub id, or one of "
        f"{', '.join(sorted({known.name for known in KNOWN.values()}))}; {name!r} is none of these"
    )


def hub_config(name: str, revision: str | None = None) -> dict:
    """config.json of a hub model: a few kB, all that a budget downloads. Raises ValueError with the remedy."""
    from huggingface_hub import hf_hub_download
    from huggingface_hub.errors import GatedRepoError, RepositoryNotFoundError, RevisionNotFoundError

    try:
        return json.loads(Path(hf_hub_download(name, "config.json", revision=revision)).read_text(encoding="utf-8"))
    except RevisionNotFoundError:
        raise ValueError(
            f"model {name} has no revision {revision}: choose a branch, a tag or a commit of huggingface.co/{name}"
        ) from None
    except GatedRepoError:
        raise ValueError(
            f"model {name} is gated: accept its terms at huggingface.co/{name} and set HF_TOKEN (in Colab: Secrets)"
        ) from None
    except RepositoryNotFoundError:
        raise ValueError(f"model {name} is not on the hub, or private: check the name, or set HF_TOKEN") from None
    except Exception as error:  # the hub's client raises many kinds for "no network"
        raise ValueError(
            f"model {name} is not in the list of known shapes and its config.json could not be fetched "
            f"({type(error).__name__}): check the network, or give the path of a config.json"
        ) from None


def describe(model: ModelShape) -> dict[str, str]:
    """The configuration table of a model, in the words of the papers.

    >>> describe(shape("mistral-7b-v0.1"))["sliding window"]
    '4,096 tokens'
    """
    active = f", of which a token meets {model.active_parameters:,}" if model.experts > 1 else ""
    return {
        "model": Path(model.name).name,
        "parameters": f"{model.parameters:,}{active}",
        "decoder layers": f"{model.layers}",
        "hidden size": f"{model.hidden:,}",
        "MLP size": f"{model.intermediate:,}",
        "query heads": f"{model.heads}, each {model.head_dim} wide",
        "key and value heads": f"{model.kv_heads}, each shared by {model.heads // model.kv_heads} query heads",
        "vocabulary": f"{model.vocab:,} tokens",
        "context": f"{model.max_context:,} tokens",
        "sliding window": f"{model.sliding_window:,} tokens" if model.sliding_window else "none",
        "KV cache a token, 16 bits": f"{model.kv_cache_bytes_per_token() / 2**10:g} KiB",
    }
