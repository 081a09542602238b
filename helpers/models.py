"""Shapes of models, from a name or a config.json, and the two profiles: tiny and mistral-7b.

>>> shape("mistral-7b-v0.3").parameters
7248023552
>>> shape("mistral-7b-v0.3").kv_cache_bytes_per_token(bytes_per_value=2)
131072
"""

import json
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from helpers.config import ATTENTION_TARGETS, RunConfig

ROOT = Path(__file__).resolve().parent.parent
TINY = ROOT / "data" / "tiny-mistral"


@dataclass(frozen=True)
class ModelShape:
    """The sizes of a Llama-like decoder; every byte and every FLOP of the budget follows from them."""

    name: str
    layers: int
    hidden: int
    intermediate: int
    heads: int
    kv_heads: int
    head_dim: int
    vocab: int
    max_context: int
    sliding_window: int | None = None
    tied: bool = False
    """The output head is the embedding."""
    attention_bias: bool = False
    """Biases on q, k and v, as Qwen2 has."""
    experts: int = 1
    experts_per_token: int = 1

    @property
    def linears(self) -> dict[str, tuple[int, int]]:
        """Linear layer of a decoder layer -> (in features, out features); each expert has its own MLP."""
        queries, keys = self.heads * self.head_dim, self.kv_heads * self.head_dim
        return {
            "q_proj": (self.hidden, queries),
            "k_proj": (self.hidden, keys),
            "v_proj": (self.hidden, keys),
            "o_proj": (queries, self.hidden),
            "gate_proj": (self.hidden, self.intermediate),
            "up_proj": (self.hidden, self.intermediate),
            "down_proj": (self.intermediate, self.hidden),
        }

    def copies(self, linear: str) -> int:
        """How many of a linear layer one decoder layer holds."""
        return 1 if linear in ATTENTION_TARGETS else self.experts

    @property
    def layer_linear_parameters(self) -> int:
        """Weights of one decoder layer that are quantized."""
        return sum(inputs * outputs * self.copies(name) for name, (inputs, outputs) in self.linears.items())

    @property
    def active_linear_parameters(self) -> int:
        """Weights of one decoder layer that a token meets: two experts of Mixtral's eight."""
        return sum(
            inputs * outputs * (1 if name in ATTENTION_TARGETS else self.experts_per_token)
            for name, (inputs, outputs) in self.linears.items()
        )

    @property
    def linear_parameters(self) -> int:
        """Weights of all decoder layers that are quantized to 4 bits."""
        return self.layers * self.layer_linear_parameters

    @property
    def embedding_parameters(self) -> int:
        """Embedding, and output head where it is not the same tensor."""
        return self.vocab * self.hidden * (1 if self.tied else 2)

    @property
    def small_parameters(self) -> int:
        """Norms, biases and the router of a mixture of experts: never quantized."""
        biases = (self.heads + 2 * self.kv_heads) * self.head_dim if self.attention_bias else 0
        router = self.hidden * self.experts if self.experts > 1 else 0
        return self.layers * (2 * self.hidden + biases + router) + self.hidden

    @property
    def parameters(self) -> int:
        """All of them.

        >>> round(shape("mixtral-8x7b").parameters / 1e9, 1)
        46.7
        """
        return self.linear_parameters + self.embedding_parameters + self.small_parameters

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


MISTRAL_V01 = ModelShape("mistral-7b-v0.1", 32, 4096, 14336, 32, 8, 128, 32000, 32768, sliding_window=4096)
KNOWN = {
    "mistralai/Mistral-7B-v0.1": MISTRAL_V01,
    "mistralai/Mistral-7B-Instruct-v0.1": MISTRAL_V01,
    "mistralai/Mistral-7B-Instruct-v0.2": replace(MISTRAL_V01, name="mistral-7b-v0.2", sliding_window=None),
    "mistralai/Mistral-7B-v0.3": replace(MISTRAL_V01, name="mistral-7b-v0.3", vocab=32768, sliding_window=None),
    "mistralai/Mistral-7B-Instruct-v0.3": replace(
        MISTRAL_V01, name="mistral-7b-v0.3", vocab=32768, sliding_window=None
    ),
    "mistralai/Mixtral-8x7B-v0.1": ModelShape(
        "mixtral-8x7b", 32, 4096, 14336, 32, 8, 128, 32000, 32768, experts=8, experts_per_token=2
    ),
    "meta-llama/Llama-2-7b-hf": ModelShape("llama-2-7b", 32, 4096, 11008, 32, 32, 128, 32000, 4096),
    "meta-llama/Llama-3.1-8B": ModelShape("llama-3.1-8b", 32, 4096, 14336, 32, 8, 128, 128256, 131072),
    "meta-llama/Llama-3.2-1B": ModelShape("llama-3.2-1b", 16, 2048, 8192, 32, 8, 64, 128256, 131072, tied=True),
    "meta-llama/Llama-3.2-3B": ModelShape("llama-3.2-3b", 28, 3072, 8192, 24, 8, 128, 128256, 131072, tied=True),
    "Qwen/Qwen2.5-0.5B": ModelShape(
        "qwen2.5-0.5b", 24, 896, 4864, 14, 2, 64, 151936, 32768, tied=True, attention_bias=True
    ),
    "Qwen/Qwen2.5-1.5B": ModelShape(
        "qwen2.5-1.5b", 28, 1536, 8960, 12, 2, 128, 151936, 131072, tied=True, attention_bias=True
    ),
    "Qwen/Qwen2.5-7B": ModelShape("qwen2.5-7b", 28, 3584, 18944, 28, 4, 128, 152064, 131072, attention_bias=True),
    "HuggingFaceTB/SmolLM2-1.7B": ModelShape("smollm2-1.7b", 24, 2048, 8192, 32, 32, 64, 49152, 8192, tied=True),
    "TinyLlama/TinyLlama-1.1B-Chat-v1.0": ModelShape("tinyllama-1.1b", 22, 2048, 5632, 32, 4, 64, 32000, 2048),
}


def shape(name: str) -> ModelShape:
    """The shape of a model: a hub id, a short name such as mistral-7b-v0.3, a config.json, or a folder that has one.

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
        return shape_from_config(hub_config(name), name)
    raise ValueError(
        f"model must be a folder with config.json, a config.json, a hub id, or one of "
        f"{', '.join(sorted({known.name for known in KNOWN.values()}))}; {name!r} is none of these"
    )


def hub_config(name: str) -> dict:
    """config.json of a hub model: a few kB, all that a budget downloads. Raises ValueError with the remedy."""
    from huggingface_hub import hf_hub_download
    from huggingface_hub.errors import GatedRepoError, RepositoryNotFoundError

    try:
        return json.loads(Path(hf_hub_download(name, "config.json")).read_text(encoding="utf-8"))
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


def shape_from_config(config: dict, name: str) -> ModelShape:
    """The shape that a Hugging Face config.json describes. Raises ValueError naming what is missing."""
    wanted = ("num_hidden_layers", "hidden_size", "intermediate_size", "num_attention_heads", "vocab_size")
    missing = [key for key in wanted if not isinstance(config.get(key), int) or config[key] < 1]
    if missing or config.get("is_encoder_decoder"):
        reason = f"its config.json has no positive {', '.join(missing)}" if missing else "it is an encoder-decoder"
        raise ValueError(f"model {name} is not a Llama-like decoder: {reason}")
    heads, model_type = config["num_attention_heads"], config.get("model_type", "")
    windowed = config.get("use_sliding_window", True)  # Qwen2 names a window that it does not use
    return ModelShape(
        name=name,
        layers=config["num_hidden_layers"],
        hidden=config["hidden_size"],
        intermediate=config["intermediate_size"],
        heads=heads,
        kv_heads=config.get("num_key_value_heads") or heads,
        head_dim=config.get("head_dim") or config["hidden_size"] // heads,
        vocab=config["vocab_size"],
        max_context=config.get("max_position_embeddings") or 2048,
        sliding_window=config.get("sliding_window") if windowed else None,
        tied=bool(config.get("tie_word_embeddings", False)),
        attention_bias=bool(config.get("attention_bias", model_type == "qwen2")),
        experts=config.get("num_local_experts") or 1,
        experts_per_token=config.get("num_experts_per_tok") or 1,
    )


def describe(model: ModelShape) -> dict[str, str]:
    """The configuration table of a model, in the words of the papers.

    >>> describe(shape("mistral-7b-v0.1"))["sliding window"]
    '4,096 tokens'
    """
    return {
        "model": Path(model.name).name,
        "parameters": f"{model.parameters:,}",
        "decoder layers": f"{model.layers}",
        "hidden size": f"{model.hidden:,}",
        "MLP size": f"{model.intermediate:,}",
        "query heads": f"{model.heads} of {model.head_dim}",
        "key and value heads": f"{model.kv_heads}, each shared by {model.heads // model.kv_heads} query heads",
        "vocabulary": f"{model.vocab:,} tokens",
        "context": f"{model.max_context:,} tokens",
        "sliding window": f"{model.sliding_window:,} tokens" if model.sliding_window else "none",
        "KV cache a token, 16 bits": f"{model.kv_cache_bytes_per_token() / 2**10:g} KiB",
    }


PROFILES: dict[str, dict[str, Any]] = {
    # RunConfig's own defaults are chosen for a 7B on a T4.
    "mistral-7b": {},
    "tiny": {
        "model": str(TINY),
        "source": str(ROOT / "data" / "conversations.jsonl"),
        "heldout_source": str(ROOT / "data" / "heldout_conversations.jsonl"),
        "questions": str(ROOT / "data" / "questions.jsonl"),
        "seq_len": 192,
        "batch_size": 8,
        "accumulation": 1,
        "learning_rate": 5e-4,
        "epochs": 2.0,
        "optimizer": "adamw_torch",
        "checkpointing": "none",
        "calibration_samples": 128,
        "calibration_tokens": 192,
        "eval_context": 192,
        "eval_stride": 96,
        "eval_batch_size": 32,
        "max_new_tokens": 32,
    },
}


def profile(name: str, **values: Any) -> RunConfig:
    """The configuration of a profile, with some fields changed; None keeps the profile's own value.

    Raises ValueError naming field and range.

    >>> profile("tiny", rank=8).adapter.rank
    8
    """
    if name not in PROFILES:
        raise ValueError(f"profile must be {' or '.join(PROFILES)}, not {name!r}")
    return RunConfig(profile=name).with_values(
        **(PROFILES[name] | {key: value for key, value in values.items() if value is not None})
    )
