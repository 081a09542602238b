"""A training step as it will be computed: the few facts that every formula about it reads, decided once.

>>> from helpers.models import profile, shape
>>> step = Step.of(profile("mistral-7b", checkpointing=8, batch_size=2), shape("mistral-7b-v0.3"))
>>> step.tokens, step.backend, step.attention, step.checkpointed
(2048, 'own', 'efficient', 8)
"""

from dataclasses import dataclass

from helpers.config import RunConfig
from helpers.models import ModelShape, families

HALF, FULL = 2, 4
"""Bytes of an fp16 (or bf16) and of an fp32 value."""
CHUNK_BYTES = 64 * 2**20
"""Pinned host memory is taken in chunks of so many bytes: PyTorch rounds each up to a power of two, and keeps it."""


@dataclass(frozen=True)
class Step:
    """One micro-batch of a configuration through a model's layers; sizes in values a token, or bytes where said."""

    config: RunConfig
    shape: ModelShape
    tokens: int
    """Of a full micro-batch."""
    backend: str
    """What computes the layers, as models/families.py decides: own, or transformers' layers, liger or plain."""
    attention: str
    """The kernel: efficient, math or eager. The last two write every score to memory."""
    checkpointed: int
    """Layers that save their input alone and recompute the rest in the backward pass."""
    offloaded: int
    """How many of those have their input in host memory meanwhile."""
    stream_bytes: int
    """Bytes of a value of the residual stream, which has the embedding's dtype."""
    hidden: int
    queries: int
    """All query heads together."""
    keys: int
    """All key heads together, and as many values."""
    inner: int
    """Intermediate size, of all the experts that a token meets."""

    @classmethod
    def of(cls, config: RunConfig, shape: ModelShape) -> "Step":
        """Raises ValueError naming the range where more layers are to be checkpointed than there are."""
        tokens = config.train.batch_size * config.train.sides * config.data.seq_len
        stream = FULL if config.model.upcast else HALF
        backend = backend_of(config, shape)
        checkpointed = checkpointed_layers(config, shape)
        offloaded = checkpointed if config.train.offload_activations else 0
        if backend == "own":  # ours leave on the GPU what the host has no room for; transformers' offload everything
            offloaded = min(offloaded, host_room(config) // (tokens * shape.hidden * stream))
        return cls(
            config,
            shape,
            tokens,
            backend,
            attention_of(config, shape),
            checkpointed,
            offloaded,
            stream,
            shape.hidden,
            shape.heads * shape.head_dim,
            shape.kv_heads * shape.head_dim,
            shape.intermediate * shape.experts_per_token,
        )


def checkpointed_layers(config: RunConfig, shape: ModelShape) -> int:
    """How many layers are checkpointed; "auto" counts as all, the safe side. Raises ValueError naming the range."""
    asked = config.train.checkpointing
    layers = {"all": shape.layers, "auto": shape.layers, "none": 0}.get(asked, asked)
    if layers > shape.layers:
        raise ValueError(f"checkpointing must be all, none, auto or a number from 0 to {shape.layers}, not {asked}")
    return layers


def backend_of(config: RunConfig, shape: ModelShape) -> str:
    """own, liger or plain. Liger's kernels were measured on layers like Llama's; others count as plain, the safe side.

    >>> from helpers.models import profile, shape
    >>> backend_of(profile("mistral-7b", dropout=0.1), shape("mistral-7b-v0.3"))
    'plain'
    """
    if families.layers(shape.family, config).computes == "own":
        return "own"
    return "liger" if config.train.kernels == "liger" and not shape.family.not_own else "plain"


def attention_of(config: RunConfig, shape: ModelShape) -> str:
    """efficient, math or eager. SDPA falls to math only where queries share keys and values."""
    asked = families.attention(shape.family, config.model.attention).kernel
    return "efficient" if asked == "math" and shape.kv_heads == shape.heads else asked


def host_room(config: RunConfig) -> int:
    """Bytes of host memory that offloaded inputs may take: as many whole chunks as config.train.offload_gib holds.

    >>> from helpers.models import profile
    >>> host_room(profile("mistral-7b", offload_gib=0.2)) // CHUNK_BYTES
    3
    """
    return int(config.train.offload_gib * 2**30) // CHUNK_BYTES * CHUNK_BYTES


def lora_parameters(config: RunConfig, shape: ModelShape) -> int:
    """Weights of the adapters, DoRA's magnitudes (one an output) among them; 0 in full fine-tuning."""
    if config.train.trains == "all":
        return 0
    targets = config.adapter.target_modules
    magnitudes = sum(shape.linears[name][1] * shape.copies(name) for name in targets) * shape.layers
    return shape.lora_parameters(config.adapter.rank, targets) + (magnitudes if config.adapter.dora else 0)


def trained_parameters(config: RunConfig, shape: ModelShape) -> int:
    """Weights that change: the adapters', or in full fine-tuning all."""
    return shape.parameters if config.train.trains == "all" else lora_parameters(config, shape)
