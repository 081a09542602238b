"""What a decoder layer and the loss keep and need beside it, in bytes, while a micro-batch goes through.

Two ways of computing a layer are known here:

- own: engine/layers.py, one autograd function a layer that chooses what it keeps. Its docstring has the formulas.
- autograd: transformers' layers with PEFT's, plain or with Liger's kernels. What is kept was read in PyTorch's
  derivatives.yaml, bitsandbytes' MatMul4Bit, PEFT's LoRA layers and modeling_mistral.py, and agrees with measured rows
  to 1% a layer. The factors in front of scores, and WEIGHTS_SEEN, were read off those rows: see
  data/measurements/README.md.
"""

from helpers.config import RunConfig
from helpers.models import ModelShape, families

HALF, FULL = 2, 4
"""Bytes of an fp16 (or bf16) and of an fp32 value."""
MLP_TOKENS = 4096
"""Tokens that go through our own MLP at once (engine/layers.py): enough to keep matrix products at full rate."""
CHUNK_BYTES = 64 * 2**20
"""Pinned host memory is taken in pieces of so many bytes: PyTorch rounds each up to a power of two, and keeps it."""
LOGITS_AT_ONCE = 2**24
"""Logits that our own chunked loss (finetune/engine/losses.py) makes at once."""
LOSS_TOKENS, LOSS_WORDS = 4096, 32768
"""Tile of trl's chunked loss (trl/kernels/chunked_logprob.py)."""


def checked_layers(shape: ModelShape, config: RunConfig) -> int:
    """How many layers are checkpointed; "auto" counts as all, the safe side.

    Raises ValueError naming the allowed range.
    """
    asked = config.train.checkpointing
    layers = {"all": shape.layers, "auto": shape.layers, "none": 0}.get(asked, asked)
    if layers > shape.layers:
        raise ValueError(f"checkpointing must be all, none, auto or a number from 0 to {shape.layers}, not {asked}")
    return layers


def way(shape: ModelShape, config: RunConfig) -> str:
    """How layers compute, as models/families.py decides: "own", or transformers' layers, "liger" or "plain".

    Liger's kernels were measured on layers like Llama's; on others they are counted as plain, the safe side.
    """
    if families.layers(shape.family, config).computes == "own":
        return "own"
    return "liger" if config.train.kernels == "liger" and not shape.family.not_own else "plain"


def attention_kernel(shape: ModelShape, config: RunConfig) -> str:
    """efficient, math or eager. SDPA falls to math only where queries share keys and values."""
    asked = families.attention(shape.family, config.model.attention).kernel
    return "efficient" if asked == "math" and shape.kv_heads == shape.heads else asked


def tokens_of(config: RunConfig) -> int:
    """Tokens of a full micro-batch."""
    return config.train.batch_size * config.data.seq_len


def stream_bytes(config: RunConfig) -> int:
    """Bytes of a value of the residual stream: it has the embedding's dtype."""
    return FULL if config.model.upcast else HALF


def sizes(shape: ModelShape) -> tuple[int, int, int, int]:
    """(hidden, queries, keys, intermediate of the experts that a token meets): values a token."""
    return (
        shape.hidden,
        shape.heads * shape.head_dim,
        shape.kv_heads * shape.head_dim,
        shape.intermediate * shape.experts_per_token,
    )


def largest_weight(shape: ModelShape) -> int:
    """Bytes of the largest linear layer's weight, dequantized to 16 bits for a product."""
    return HALF * max(inputs * outputs for inputs, outputs in shape.linears.values())


def score_bytes(shape: ModelShape, config: RunConfig) -> float:
    """Bytes of one layer's attention scores in fp32, heads × seq² a sequence; 0 where they are not materialised."""
    materialised = attention_kernel(shape, config) != "efficient"
    return FULL * config.train.batch_size * shape.heads * config.data.seq_len**2 if materialised else 0


# ---- what is kept until the backward pass ----------------------------------------------------------------------------


def kept_by_layer(shape: ModelShape, config: RunConfig) -> dict[str, float]:
    """Component -> bytes a token that one unchecked layer keeps, its input included; attention scores are not here."""
    hidden, queries, keys, inner = sizes(shape)
    statistics = FULL * shape.heads  # the log-sum-exp of each query
    if way(shape, config) == "own":
        return {
            "layer's input and middle": HALF * 2 * hidden,
            "queries, keys, values, output": HALF * (2 * queries + 2 * keys) + statistics,
            "gate and up": HALF * 2 * inner,
        }
    dense, fused = stream_bytes(config), way(shape, config) == "liger"
    targets = config.adapter.target_modules
    read = {"down_proj": inner, "c_proj": inner, "o_proj": queries}
    inputs = {name: read.get(name, hidden) for name in targets}
    if config.adapter.dropout:  # a mask of one byte and the dropped input, for each adapter
        adapters = sum(inputs.values()) * (HALF + 1)
    elif dense == FULL:  # an fp16 copy each; o_proj shares attention's output
        adapters = HALF * sum(size for name, size in inputs.items() if name != "o_proj")
    else:  # q, k and v share theirs, gate and up too
        groups = (("q_proj", "k_proj", "v_proj", "qkv_proj"), ("gate_proj", "up_proj", "gate_up_proj", "c_fc"))
        groups += (("down_proj", "c_proj"),)
        adapters = HALF * sum(max((inputs.get(n, 0) for n in group), default=0) for group in groups)
    attention = 3 * queries * (FULL if attention_kernel(shape, config) == "math" else HALF)
    normed = shape.family.norms * hidden + (queries + keys if shape.family.head_norms else 0)
    return {
        "norm inputs": normed * (dense if fused else FULL) + (0 if fused or dense == FULL else normed * HALF),
        "adapter inputs": adapters,
        "adapter products": HALF * config.adapter.rank * len(targets),
        "queries, keys, values, output": attention + queries * HALF + statistics,
        "SwiGLU": inner * (2 * dense if fused else 3 * dense),
    }


def kept(shape: ModelShape, config: RunConfig) -> float:
    """Bytes that one unchecked layer keeps of a micro-batch: activations, scores and adapters cast to 16 bits.

    Scores: math keeps a softmax in fp32, eager that and its fp16 copy, and where scores are capped a tanh in fp16.
    """
    scores = {"efficient": 0.0, "math": 1.0, "eager": 1.5}[attention_kernel(shape, config)]
    scores += 0.5 if shape.family.attention_cap else 0.0
    casts = 0.0 if way(shape, config) == "own" else adapter_casts(shape, config) / shape.layers
    return tokens_of(config) * sum(kept_by_layer(shape, config).values()) + scores * score_bytes(shape, config) + casts


def kept_when_checked(shape: ModelShape, config: RunConfig) -> float:
    """Bytes on the card that one checkpointed layer keeps: its input, and with keep_attention attention's result.

    Offloaded inputs are not on the card; of those that the host has no room for, each layer gets its share.
    """
    hidden, queries, _, _ = sizes(shape)
    stream, own = tokens_of(config) * hidden * stream_bytes(config), way(shape, config) == "own"
    if layers := checked_layers(shape, config):
        stream *= (layers - offloaded_layers(shape, config)) / layers
    if own and config.train.keep_attention:
        stream += tokens_of(config) * (queries * HALF + FULL * shape.heads)
    return stream


def offloaded_layers(shape: ModelShape, config: RunConfig) -> int:
    """How many checkpointed layers' inputs lie in host memory: all, or as many as our own layers find room for."""
    layers = checked_layers(shape, config) if config.train.offload_activations else 0
    if way(shape, config) != "own":
        return layers
    return min(layers, host_room(config) // input_bytes(shape, config))


def input_bytes(shape: ModelShape, config: RunConfig) -> int:
    """Bytes of one layer's input."""
    return tokens_of(config) * shape.hidden * stream_bytes(config)


def host_room(config: RunConfig) -> int:
    """Bytes of host memory that offloaded inputs may take: as many whole chunks as config.train.offload_gib holds.

    >>> from helpers.models import profile
    >>> host_room(profile("mistral-7b", offload_gib=0.2)) // CHUNK_BYTES
    3
    """
    return int(config.train.offload_gib * 2**30) // CHUNK_BYTES * CHUNK_BYTES


def offloaded_bytes(shape: ModelShape, config: RunConfig) -> int:
    """Bytes of host memory that offloaded inputs take: by our own layers in whole chunks, one after another."""
    size = offloaded_layers(shape, config) * input_bytes(shape, config)
    return -(-size // CHUNK_BYTES) * CHUNK_BYTES if way(shape, config) == "own" else size


def kept_while_offloading(shape: ModelShape, config: RunConfig) -> float:
    """Bytes of inputs that are on their way to or from host memory: two layers' (finetune/engine/layers.py).

    Those that the host has no room for are the upper ones; while they are on the card, fewer are on their way.
    """
    away = offloaded_layers(shape, config)
    if not away:
        return 0.0
    copies = max(2 - (checked_layers(shape, config) - away), 0) if way(shape, config) == "own" else 4
    return copies * tokens_of(config) * shape.hidden * stream_bytes(config)


def adapter_casts(shape: ModelShape, config: RunConfig) -> float:
    """Bytes of all adapters in 16 bits: autocast keeps a copy of each until its forward pass ends."""
    return HALF * shape.lora_parameters(config.adapter.rank, config.adapter.target_modules)


# ---- what is needed beside it, for a while ---------------------------------------------------------------------------


def forward_work(shape: ModelShape, config: RunConfig, checked: bool) -> float:
    """Bytes that a layer's forward pass needs at its fullest, beside what is kept of it in the end."""
    hidden, queries, keys, inner = sizes(shape)
    tokens, dense, weight = tokens_of(config), stream_bytes(config), largest_weight(shape)
    if way(shape, config) == "own":
        piece = min(tokens, MLP_TOKENS)
        alive = tokens * HALF * (2 * queries + 2 * keys + 2 * hidden) if checked else tokens * HALF * hidden
        return alive + piece * HALF * (hidden + (2 * inner if checked else inner)) + weight
    if not checked:  # the last product of the last layer
        return weight + tokens * dense * hidden
    products = weight + tokens * dense * (2 * hidden + 2 * inner)
    adapted = {"gate_proj", "up_proj", "gate_up_proj", "c_fc"} & set(config.adapter.target_modules)
    wide = (4 * HALF if dense == HALF else 3 * FULL + HALF) if adapted else 3 * dense
    adding = tokens * (2 * hidden * dense + wide * inner)
    factor = {"efficient": 0.0, "math": 2.29, "eager": 1.84}[attention_kernel(shape, config)]
    attending = factor * score_bytes(shape, config) + (tokens * (22 * hidden + 34 * keys) if factor else 0.0)
    return max(products, adding, attending)


def backward_work(shape: ModelShape, config: RunConfig) -> float:
    """Bytes that a layer's backward pass needs at its fullest, beside what is kept, or rebuilt, of it."""
    hidden, _, _, inner = sizes(shape)
    tokens, dense, weight = tokens_of(config), stream_bytes(config), largest_weight(shape)
    if way(shape, config) == "own":
        return max(own_backward(shape, config))
    if dense == FULL:
        mlp = tokens * inner
        mlp = max(weight + 6 * mlp, 10 * mlp)
    else:
        mlp = max(weight + tokens * inner * HALF, tokens * inner * 2 * HALF)
    factor = {"efficient": 0.0, "math": 3.34, "eager": 2.9}[attention_kernel(shape, config)]
    if not factor:
        return mlp
    # attention comes after the MLP, whose activations are gone by then
    gone = tokens * (3.5 * dense * inner + 22.5 * hidden)
    return max(mlp, factor * score_bytes(shape, config) - gone)


def own_backward(shape: ModelShape, config: RunConfig) -> tuple[float, float]:
    """Bytes that our own layer's backward pass needs beside what was kept or rebuilt: (in the MLP, in attention).

    Both hold the gradients of the layer's result and of its middle, and the first norm's result. Attention holds its
    result's gradient, keys and values repeated for all heads, three gradients as large, and the memory-efficient
    kernel's fp32 accumulator of the queries' gradient (PyTorch's mem_eff_attention/kernel_backward.h).
    """
    hidden, queries, _, inner = sizes(shape)
    tokens, piece = tokens_of(config), min(tokens_of(config), MLP_TOKENS)
    mlp = tokens * HALF * 3 * hidden + piece * HALF * (hidden + 2 * inner) + largest_weight(shape)
    attention = tokens * (HALF * (3 * hidden + 6 * queries) + FULL * queries)
    return mlp, attention


def rebuilt(shape: ModelShape, config: RunConfig) -> float:
    """Bytes that a checkpointed layer's backward pass rebuilds, beside what was kept of it, at its fullest.

    Our own layers: queries, keys and values, and while the MLP is done its input, gate and up.
    """
    if way(shape, config) != "own":
        return kept(shape, config)
    hidden, queries, keys, inner = sizes(shape)
    tokens, piece = tokens_of(config), min(tokens_of(config), MLP_TOKENS)
    again = 0 if config.train.keep_attention else queries
    attending = HALF * tokens * (queries + 2 * keys + again)
    mlp, attention = own_backward(shape, config)
    in_mlp = attending + HALF * (tokens * hidden + piece * 2 * inner)
    return max(in_mlp + mlp, attending + attention) - max(mlp, attention)


def loss_work(shape: ModelShape, config: RunConfig) -> tuple[float, float]:
    """Bytes of logits and loss at their fullest: (in the forward pass, in the backward pass).

    full: logits in fp16, in fp32 and their log-softmax; backward: two gradients in fp32 and the log-softmax. chunked:
    a tile at a time. fused: Liger's fused linear cross-entropy (https://arxiv.org/abs/2410.10989). An fp32 head is
    copied to 16 bits for its products (chunked: so many words at a time); a cap keeps its slope of a piece in fp32.
    """
    tokens, dense, hidden, words = tokens_of(config), stream_bytes(config), shape.hidden, shape.vocab
    if config.train.loss == "full":
        head = words * hidden * HALF if dense == FULL else 0  # autocast's fp16 copy
        forward = tokens * (words * (HALF + 2 * FULL) + 2 * hidden * dense)
        return head + forward, head + tokens * (words * 3 * FULL + hidden * dense)
    if way(shape, config) == "own" or config.train.loss == "fused":
        piece = min(tokens * words, LOGITS_AT_ONCE)
        both = (14 if shape.family.logits.cap else 10) * piece + tokens * hidden * 4 * HALF
        return both, max(both, final_norm_work(shape, config))
    tile = min(tokens, LOSS_TOKENS) * min(words, LOSS_WORDS) * HALF
    head = min(words, LOSS_WORDS) * hidden * HALF if dense == FULL else 0
    both = tile + head + tokens * hidden * (13 if dense == FULL else 6)
    return both, both


def final_norm_work(shape: ModelShape, config: RunConfig) -> float:
    """Bytes of the last norm's backward pass, which is transformers' own unless Liger's is asked for.

    Six tensors in fp32: its input, that one's gradient through the product, and in the square's derivative the
    gradient, the input to the power of one, twice that, and the product (PyTorch's pow_backward).
    """
    return 0.0 if way(shape, config) == "liger" else 6.0 * FULL * tokens_of(config) * shape.hidden
