"""Families of models: the one place that knows how they differ and decides what computes them. No torch.

A family is transformers' model_type. From its entry in KINDS and a config.json follow the number of weights, the
function of the logits, the attention that is right, and for a RunConfig whether our own layers (finetune/engine)
compute it, transformers' layers, or nothing. The planner, fine-tuning, the loss, perplexity and inference all ask here.

>>> from helpers.models import profile
>>> layers(of({"model_type": "mistral", "hidden_size": 64, "num_attention_heads": 4}), profile("tiny"))
Layers(computes='own', reason='')
>>> granite = of({"model_type": "granite", "hidden_size": 64, "num_attention_heads": 4, "logits_scaling": 8.0})
>>> granite.logits
Logits(scale=0.125, cap=None)
>>> layers(granite, profile("tiny"))
Layers(computes='transformers', reason='our own layers are those of mistral, llama, qwen2, mixtral, not of granite')

To add a family, add its line to KINDS: what differs from a Llama layer (two norms of the hidden size, seven matrices
without biases, SiLU) and what its configuration class takes where a config.json says nothing. For example

    "qwen3": Kind(head_norms="each", biases={"attention_bias": QKVO}, defaults={"num_key_value_heads": 32})

tests/models/test_families.py then compares it with transformers' own model by itself: weights, loss, perplexity, and
that what is budgeted is what runs. A family that is not in KINDS is refused: nobody has made that comparison. A mixture
says experts=True, and apart=True where transformers holds a layer's experts in gate_up_proj and down_proj, as most do.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from helpers.config import ATTENTION_TARGETS, MLP_TARGETS, RunConfig

QKV, QKVO, GATED = ATTENTION_TARGETS[:3], ATTENTION_TARGETS, ATTENTION_TARGETS + MLP_TARGETS
FUSED = ("qkv_proj", "o_proj", "gate_up_proj", "down_proj")
HALF_FUSED = (*QKVO, "gate_up_proj", "down_proj")
UNGATED = (*QKVO, "up_proj", "down_proj")
MLP = ("gate_proj", "up_proj", "gate_up_proj", "down_proj", "c_fc", "c_proj")
EXPERTS = ("num_local_experts", "num_experts", "n_routed_experts", "moe_num_experts")
"""Names that configurations have for the number of experts of a layer."""


@dataclass(frozen=True)
class Kind:
    """How a family differs from Llama's; strings name fields of its config.json."""

    defaults: Mapping[str, Any] = field(default_factory=dict)
    """What its configuration class takes where config.json says nothing."""
    own: bool = False
    """finetune/engine/layers.py computes its decoder layer."""
    linears: tuple[str, ...] = GATED
    biases: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    """Field -> linear layers that have a bias when it is true; "" for those that always have."""
    norms: int = 2
    """Norms of the hidden size in a layer; one more stands behind the last layer."""
    norm_bias: bool = False
    """Norms have a bias beside their weight."""
    head_norms: str = ""
    """Norms of queries and keys: "each" over a head, "all" over all heads together."""
    head_norms_if: str = ""
    """The field that switches them on; "" where they are always there."""
    window: bool = False
    """A sliding_window in its configuration is used."""
    hands_window: bool = True
    """Its layers tell the attention function their window; where not, only the mask knows it."""
    logit_factor: str = ""
    logit_divisor: str = ""
    logit_cap: str = ""
    attention_cap: str = ""
    experts: bool = False
    """A mixture of experts."""
    apart: bool = False
    """Its experts are opened as linear layers (models/experts.py); where not, one tensor a layer holds them all."""
    adapted: bool = False
    """Adapters on experts, too: PEFT rewrites targets of the names that other families have, and attaches nothing."""
    expert_size: str = "intermediate_size"
    shared_size: str = ""
    shared_experts: str = ""
    shared_gate: bool = False


LLAMA = {"attention_bias": QKVO, "mlp_bias": MLP_TARGETS}
CAPPED = {"logit_cap": "final_logit_softcapping", "attention_cap": "attn_logit_softcapping"}
CAPS = {"final_logit_softcapping": 30.0, "attn_logit_softcapping": 50.0}
GEMMA = {"tie_word_embeddings": True, "head_dim": 256, "hidden_act": "gelu_pytorch_tanh"}
GEMMA2 = GEMMA | {"num_key_value_heads": 4, "sliding_window": 4096}
COHERE = {"tie_word_embeddings": True, "logit_scale": 0.0625, "max_position_embeddings": 8192}

KINDS: dict[str, Kind] = {
    "mistral": Kind(
        {"num_key_value_heads": 8, "sliding_window": 4096, "max_position_embeddings": 131072}, own=True, window=True
    ),
    "llama": Kind(own=True, biases=LLAMA),
    "qwen2": Kind(
        {"num_key_value_heads": 32, "use_sliding_window": False, "max_position_embeddings": 32768},
        own=True,
        biases={"": QKV},
        window=True,
    ),
    "ministral": Kind(
        {"num_key_value_heads": 8, "sliding_window": 4096, "max_position_embeddings": 131072}, window=True
    ),
    "ministral3": Kind({"num_key_value_heads": 8, "head_dim": 128, "max_position_embeddings": 262144}, window=True),
    "qwen3": Kind(
        {"num_key_value_heads": 32, "head_dim": 128, "use_sliding_window": False, "max_position_embeddings": 32768},
        biases={"attention_bias": QKVO},
        head_norms="each",
        window=True,
    ),
    "gemma": Kind(
        GEMMA | {"num_key_value_heads": 16, "max_position_embeddings": 8192}, biases={"attention_bias": QKVO}
    ),
    "gemma2": Kind(
        GEMMA2 | CAPS | {"max_position_embeddings": 8192},
        biases={"attention_bias": QKVO},
        norms=4,
        window=True,
        **CAPPED,
    ),
    "gemma3_text": Kind(
        GEMMA2 | {"max_position_embeddings": 131072},
        biases={"attention_bias": QKVO},
        norms=4,
        head_norms="each",
        window=True,
        **CAPPED,
    ),
    "vaultgemma": Kind(
        GEMMA2 | CAPS | {"max_position_embeddings": 8192}, biases={"attention_bias": QKVO}, window=True, **CAPPED
    ),
    "granite": Kind(biases=LLAMA, logit_divisor="logits_scaling"),
    "cohere": Kind(
        COHERE,
        biases={"attention_bias": QKVO},
        norms=1,
        head_norms="all",
        head_norms_if="use_qk_norm",
        logit_factor="logit_scale",
    ),
    "cohere2": Kind(
        COHERE | {"sliding_window": 4096},
        biases={"attention_bias": QKVO},
        norms=1,
        window=True,
        logit_factor="logit_scale",
    ),
    "olmo2": Kind(biases={"attention_bias": QKVO}, head_norms="all"),
    "olmo3": Kind({"sliding_window": 4096}, biases={"attention_bias": QKVO}, head_norms="all", window=True),
    "phi3": Kind({"max_position_embeddings": 4096}, linears=FUSED, window=True),
    "glm": Kind(
        {"num_key_value_heads": 2, "head_dim": 128, "attention_bias": True, "max_position_embeddings": 131072},
        linears=HALF_FUSED,
        biases={"attention_bias": QKV},
    ),
    "glm4": Kind(
        {"num_key_value_heads": 2, "head_dim": 128, "attention_bias": True, "max_position_embeddings": 131072},
        linears=HALF_FUSED,
        biases={"attention_bias": QKV},
        norms=4,
    ),
    "stablelm": Kind(
        {"num_key_value_heads": 32, "max_position_embeddings": 4096},
        biases={"use_qkv_bias": QKV},
        norm_bias=True,
        head_norms="all",
        head_norms_if="qk_layernorm",
    ),
    "starcoder2": Kind(
        {
            "num_key_value_heads": 2,
            "use_bias": True,
            "tie_word_embeddings": True,
            "hidden_act": "gelu_pytorch_tanh",
            "max_position_embeddings": 4096,
        },
        linears=(*QKVO, "c_fc", "c_proj"),
        biases={"use_bias": (*QKVO, "c_fc", "c_proj")},
        norm_bias=True,
        window=True,
    ),
    "nemotron": Kind(
        {"hidden_act": "relu2", "max_position_embeddings": 4096},
        linears=UNGATED,
        biases={"attention_bias": QKVO, "mlp_bias": ("up_proj", "down_proj")},
        norm_bias=True,
    ),
    "arcee": Kind(
        {"hidden_act": "relu2", "max_position_embeddings": 4096},
        linears=UNGATED,
        biases={"attention_bias": QKVO, "mlp_bias": ("up_proj", "down_proj")},
    ),
    "smollm3": Kind(
        {
            "num_key_value_heads": 4,
            "tie_word_embeddings": True,
            "use_sliding_window": False,
            "max_position_embeddings": 32768,
        },
        biases=LLAMA,
        window=True,
    ),
    "exaone4": Kind({"num_key_value_heads": 32, "sliding_window": 4096}, head_norms="each", window=True),
    "seed_oss": Kind(
        {
            "num_key_value_heads": 8,
            "head_dim": 128,
            "attention_bias": True,
            "attention_dropout": 0.1,
            "max_position_embeddings": 524288,
        },
        biases={"attention_bias": QKV, "attention_out_bias": ("o_proj",), "mlp_bias": MLP_TARGETS},
    ),
    "ernie4_5": Kind(
        {"num_key_value_heads": 2, "head_dim": 128, "tie_word_embeddings": True, "max_position_embeddings": 131072},
        biases={"use_bias": GATED},
    ),
    "hunyuan_v1_dense": Kind(biases={"attention_bias": QKVO}, head_norms="each"),
    "mixtral": Kind(
        {
            "num_key_value_heads": 8,
            "num_local_experts": 8,
            "num_experts_per_tok": 2,
            "max_position_embeddings": 131072,
        },
        own=True,
        window=True,
        experts=True,
        apart=True,
        adapted=True,
    ),
    "qwen3_moe": Kind(
        {
            "num_key_value_heads": 4,
            "num_local_experts": 128,
            "num_experts_per_tok": 8,
            "moe_intermediate_size": 768,
            "use_sliding_window": False,
            "max_position_embeddings": 32768,
        },
        biases={"attention_bias": QKVO},
        head_norms="each",
        window=True,
        experts=True,
        apart=True,
        expert_size="moe_intermediate_size",
    ),
    "qwen2_moe": Kind(
        {
            "num_key_value_heads": 16,
            "num_experts": 60,
            "num_experts_per_tok": 4,
            "moe_intermediate_size": 1408,
            "shared_expert_intermediate_size": 5632,
            "qkv_bias": True,
            "use_sliding_window": False,
            "max_position_embeddings": 32768,
        },
        biases={"qkv_bias": QKV},
        window=True,
        hands_window=False,
        experts=True,
        apart=True,
        expert_size="moe_intermediate_size",
        shared_size="shared_expert_intermediate_size",
        shared_gate=True,
    ),
    "olmoe": Kind(
        {"num_experts": 64, "num_experts_per_tok": 8, "max_position_embeddings": 4096},
        biases={"attention_bias": QKVO},
        head_norms="all",
        experts=True,
        apart=True,
    ),
    "granitemoe": Kind(
        {"num_local_experts": 8, "num_experts_per_tok": 2},
        biases={"attention_bias": QKVO},
        logit_divisor="logits_scaling",
        experts=True,
    ),
    "glm4_moe": Kind(
        {
            "num_key_value_heads": 8,
            "n_routed_experts": 128,
            "num_experts_per_tok": 8,
            "moe_intermediate_size": 1408,
            "n_shared_experts": 1,
            "first_k_dense_replace": 1,
            "max_position_embeddings": 131072,
        },
        biases={"attention_bias": QKV},
        head_norms="each",
        head_norms_if="use_qk_norm",
        experts=True,
        apart=True,
        expert_size="moe_intermediate_size",
        shared_size="moe_intermediate_size",
        shared_experts="n_shared_experts",
    ),
}
OWN = tuple(name for name, kind in KINDS.items() if kind.own)
LATENT = "keys and values of its attention are compressed, and its layers have other matrices"
LINEAR = "most of its layers have linear attention or a state space, whose states are not counted here"
NOT_HERE = {
    "gpt_oss": "its experts are stored in MXFP4, all of a layer in one tensor with biases, and its attention has sinks",
    "deepseek_v2": LATENT,
    "deepseek_v3": LATENT,
    "mistral4": LATENT,
    "qwen3_next": LINEAR,
    "qwen3_5_text": LINEAR,
    "qwen3_5_moe_text": LINEAR,
    "granitemoehybrid": LINEAR,
}
"""Families that people ask for -> why none of their models is trained here."""


@dataclass(frozen=True)
class Logits:
    """What a model does to its head's result: cap · tanh(scale · logits / cap)."""

    scale: float = 1.0
    cap: float | None = None


PLAIN = Logits()


@dataclass(frozen=True)
class Family:
    """A family as one config.json has it: what of it decides sizes, and what computes them."""

    model_type: str
    linears: tuple[str, ...] = GATED
    targets: tuple[str, ...] = GATED
    """Linear layers that an adapter can change."""
    norms: int = 2
    head_norms: bool = False
    layer_vectors: int = 0
    """Weights of norms and biases in one layer."""
    last_vectors: int = 0
    """Those behind the last layer."""
    experts: int = 1
    apart: bool = False
    """Experts are linear layers, each by itself."""
    experts_per_token: int = 1
    expert_size: int = 0
    shared_size: int = 0
    """Intermediate size of the experts that every token meets, together."""
    shared_gate: bool = False
    dense_layers: int = 0
    """Layers of a mixture that have an ordinary MLP instead."""
    logits: Logits = PLAIN
    attention_cap: float | None = None
    not_own: str = ""
    """Why our own layers cannot compute it whatever is asked for; "" when they can."""
    refused: str = ""
    """Why nothing here may compute it; "" when it may be."""


class Layers(NamedTuple):
    """What computes decoder layers: "own" (finetune/engine), "transformers" or "refused"; and why not our own."""

    computes: str
    reason: str


class Attention(NamedTuple):
    """What computes attention, as RunConfig names it (efficient, math, eager); and why not what was asked for."""

    kernel: str
    reason: str


def complete(config: Mapping[str, Any]) -> dict[str, Any]:
    """A config.json with what its family's configuration class takes where it says nothing.

    >>> complete({"model_type": "cohere"})["logit_scale"]
    0.0625
    """
    kind = KINDS.get(config.get("model_type") or "")
    said = dict(config)
    if said.get("hidden_activation"):  # Gemma's name
        said["hidden_act"] = said["hidden_activation"]
    found = (dict(kind.defaults) if kind else {}) | said
    count = next((said[name] for name in EXPERTS if said.get(name)), None)
    if count is not None:  # under whatever name, once
        found |= {name: count for name in EXPERTS if name in found}
    return found


def of(config: Mapping[str, Any]) -> Family:
    """The family of a config.json. Raises ValueError with one sentence for one that is not in KINDS."""
    model_type = config.get("model_type") or ""
    kind, config = KINDS.get(model_type), complete(config)
    count = next((config[name] for name in EXPERTS if config.get(name)), 1)
    what = f"a mixture of {count} experts of the family" if count > 1 else "of the family"
    if model_type in NOT_HERE:
        instead = "Qwen/Qwen3-30B-A3B or mistralai/Mixtral-8x7B-v0.1" if count > 1 else "a model of another family"
        why = NOT_HERE[model_type]
        raise ValueError(f"it is {what} {model_type}, none of which is trained here: {why}; take {instead}")
    if kind is None or (count > 1 and not kind.experts):
        raise ValueError(
            f"it is {what} {model_type or '(its config.json has no model_type)'}, whose weights and loss nobody has "
            f"compared with transformers' yet: take one of {', '.join(KINDS)}, or add it to models/families.py"
        )
    hidden, heads = config.get("hidden_size") or 0, config.get("num_attention_heads") or 1
    norm = hidden * (2 if kind.norm_bias else 1)
    sizes = matrices(config)
    queries, keys = heads * head_dim(config), (config.get("num_key_value_heads") or heads) * head_dim(config)
    biases = {name for switch, names in kind.biases.items() if not switch or config.get(switch) for name in names}
    normed = bool(kind.head_norms and (not kind.head_norms_if or config.get(kind.head_norms_if)))
    head_norms = {"each": 2 * head_dim(config), "all": queries + keys, "": 0}[kind.head_norms] if normed else 0
    bidirectional = config.get("use_bidirectional_attention") or config.get("is_causal") is False
    shared = (config.get(kind.shared_size) or 0) if kind.shared_size else 0
    return Family(
        model_type=model_type,
        linears=kind.linears,
        targets=kind.linears if kind.adapted or not kind.experts else QKVO,
        norms=kind.norms,
        head_norms=normed,
        layer_vectors=kind.norms * norm + head_norms + sum(sizes[name][1] for name in biases),
        last_vectors=norm,
        experts=count,
        apart=kind.apart,
        experts_per_token=(config.get("num_experts_per_tok") or 1) if kind.experts else 1,
        expert_size=(config.get(kind.expert_size) or 0) if kind.experts else 0,
        shared_size=shared * ((config.get(kind.shared_experts) or 0) if kind.shared_experts else 1),
        shared_gate=kind.shared_gate,
        dense_layers=dense_layers(config) if kind.experts else 0,
        logits=Logits(
            scale=(config.get(kind.logit_factor) or 1.0) / (config.get(kind.logit_divisor) or 1.0),
            cap=config.get(kind.logit_cap) or None,
        ),
        attention_cap=config.get(kind.attention_cap) or None,
        not_own=not_own(kind, config),
        refused=f"attention of this {model_type} looks ahead (is_causal or use_bidirectional_attention in its "
        "config.json): it is no language model that predicts the next token"
        if bidirectional
        else "",
    )


def not_own(kind: Kind, config: Mapping[str, Any]) -> str:
    """Why finetune/engine/layers.py cannot compute a family's layers, "" when it can."""
    if not kind.own:
        return f"our own layers are those of {', '.join(OWN)}, not of {config['model_type']}"
    if config.get("hidden_act", "silu") != "silu":
        return f"our own layers know SiLU, and config.json says hidden_act={config['hidden_act']}"
    if config.get("router_jitter_noise"):
        return f"our own layers know no router_jitter_noise, and config.json says {config['router_jitter_noise']}"
    if config.get("output_router_logits"):
        return (
            "the router's auxiliary loss (output_router_logits in config.json) needs logits that ours do not give out"
        )
    if config.get("attention_dropout"):
        return f"our own layers know no attention_dropout, and config.json says {config['attention_dropout']}"
    return ""


def head_dim(config: Mapping[str, Any]) -> int:
    """Size of one attention head."""
    return config.get("head_dim") or (config.get("hidden_size") or 0) // (config.get("num_attention_heads") or 1)


def matrices(config: Mapping[str, Any]) -> dict[str, tuple[int, int]]:
    """Every linear layer that some family's decoder layer has -> (in features, out features)."""
    heads = config.get("num_attention_heads") or 1
    queries, keys = heads * head_dim(config), (config.get("num_key_value_heads") or heads) * head_dim(config)
    return sizes_of(config.get("hidden_size") or 0, queries, keys, config.get("intermediate_size") or 0)


def sizes_of(hidden: int, queries: int, keys: int, inner: int) -> dict[str, tuple[int, int]]:
    """Linear layer -> (in features, out features); fused ones are as wide as their parts."""
    return {
        "q_proj": (hidden, queries),
        "k_proj": (hidden, keys),
        "v_proj": (hidden, keys),
        "qkv_proj": (hidden, queries + 2 * keys),
        "o_proj": (queries, hidden),
        "gate_proj": (hidden, inner),
        "up_proj": (hidden, inner),
        "gate_up_proj": (hidden, 2 * inner),
        "c_fc": (hidden, inner),
        "down_proj": (inner, hidden),
        "c_proj": (inner, hidden),
    }


def dense_layers(config: Mapping[str, Any]) -> int:
    """How many layers of a mixture have no experts."""
    only, step = config.get("mlp_only_layers") or (), config.get("decoder_sparse_step") or 1
    first = config.get("first_k_dense_replace") or 0
    places = range(config.get("num_hidden_layers") or 0)
    return sum(1 for place in places if place in only or (place + 1) % step or place < first)


def layers(family: Family, config: RunConfig) -> Layers:
    """What computes the decoder layers of a run, and why it is not finetune/engine/layers.py."""
    if family.refused:
        return Layers("refused", family.refused)
    asked, model = config.train.kernels, config.model
    reason = ""  # the planner asks thousands of times: nothing is made up that is not said
    if asked != "own":
        reason = "Liger's kernels are asked for" if asked == "liger" else "plain kernels are asked for"
    elif family.not_own:
        reason = family.not_own
    elif config.train.trains == "all":
        reason = "full fine-tuning needs gradients of every weight, and ours make those of adapters"
    elif config.train.sharding == "zero3":
        reason = "DeepSpeed gathers weights where a module is called, and ours call a layer's whole"
    elif config.adapter.dropout or config.adapter.dora:
        reason = f"{'DoRA' if config.adapter.dora else 'LoRA dropout'} needs PEFT's own layers"
    elif model.weights == "int8":
        reason = "8-bit weights are multiplied by bitsandbytes' own layers"
    elif model.upcast:
        reason = "upcast keeps embeddings, norms and what passes between layers in fp32"
    elif model.attention != "efficient":
        reason = f"attention={model.attention} is asked for"
    return Layers("transformers" if reason else "own", reason)


def attention(family: Family, asked: str) -> Attention:
    """What computes attention where `asked` (efficient, math or eager) is configured."""
    if family.attention_cap and asked != "eager":
        return Attention(
            "eager", f"{family.model_type} caps attention's scores at {family.attention_cap:g}, as only eager can"
        )
    return Attention(asked, "")


def fallbacks(family: Family, config: RunConfig) -> tuple[str, ...]:
    """Sentences for what computes otherwise than the defaults promise; () when nothing does."""
    said, decided = [], layers(family, config)
    if decided.computes == "transformers" and config.train.kernels == "own":
        said.append(f"layers compute through transformers, slower and with more memory than our own: {decided.reason}")
    if reason := attention(family, config.model.attention).reason:
        said.append(f"attention keeps heads × context² scores: {reason}")
    return tuple(said)


def refuse(family: Family, name: str, targets: tuple[str, ...]) -> None:
    """Raise ValueError for a model that cannot be trained, or targets that its adapters cannot have.

    name: of the model, for the sentence. targets: names of linear layers.
    """
    if family.refused:
        raise ValueError(f"{name} cannot be trained: {family.refused}; take another model")
    unknown = [target for target in targets if target not in family.targets]
    if not unknown:
        return
    groups = {"all-linear": GATED, "attention": QKVO} | ({"experts": MLP_TARGETS} if family.experts > 1 else {})
    words = [word for word, group in groups.items() if {*group} <= {*family.targets}]
    *some, last = [*family.targets, *words]
    why = ""
    if family.experts > 1 and unknown[0] in family.linears:
        why = f": one tensor holds all {family.experts} experts of a layer, and no adapter changes a part of it"
        if family.apart:
            why = f": PEFT takes that name of a {family.model_type} for another tensor, and would attach nothing"
    raise ValueError(f"targets must be among {', '.join(some)} or {last} for {name}, not {unknown[0]}{why}")
