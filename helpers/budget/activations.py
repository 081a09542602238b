"""What a decoder layer and the loss save for the backward pass, and the buffers they need beside it, in bytes.

Two ways of computing a layer are known here (`Step.backend`):

- own: engine/layers.py, one autograd function a layer that chooses what it saves. Its docstring has the formulas.
- transformers' layers with PEFT's, plain or with Liger's kernels. What autograd saves was read in PyTorch's
  derivatives.yaml, bitsandbytes' MatMul4Bit, PEFT's LoRA layers and modeling_mistral.py, and agrees with measured rows
  to 1% a layer. The factors in front of attention scores were calibrated on those rows: data/measurements/README.md.
"""

from helpers.budget import step as steps
from helpers.budget.step import FULL, HALF, Step
from helpers.models import ModelShape

MLP_TOKENS = 4096
"""Tokens that go through our own MLP at once (engine/layers.py): enough to keep matrix products at full rate."""
LOGITS_AT_ONCE = 2**24
"""Logits that our own chunked loss (finetune/engine/losses.py) makes at once."""
LOSS_TOKENS, LOSS_WORDS = 4096, 32768
"""Tile of trl's chunked loss (trl/kernels/chunked_logprob.py): tokens by words of the vocabulary."""


def largest_weight(shape: ModelShape) -> int:
    """Bytes of the largest linear layer's weight, dequantized to 16 bits for a product."""
    return HALF * max(inputs * outputs for inputs, outputs in shape.linears.values())


def mlp_at_once(step: Step) -> tuple[int, int]:
    """(tokens that go through our own MLP at once, its intermediate size).

    Of a mixture an expert's: twice an even share, as routers are not even, but no more than there are.
    """
    shape, tokens = step.shape, step.tokens
    if shape.experts > 1:
        tokens = min(tokens, -(-2 * tokens * shape.experts_per_token // shape.experts))
    return min(tokens, MLP_TOKENS), shape.intermediate


def score_bytes(step: Step) -> float:
    """Bytes of one layer's attention scores in fp32, heads × seq² a sequence; 0 where they are never in memory."""
    config = step.config
    materialised = step.attention != "efficient"
    return FULL * step.tokens * step.shape.heads * config.data.seq_len if materialised else 0


# ---- saved for backward ----------------------------------------------------------------------------------------------


def saved_by_layer(step: Step) -> dict[str, float]:
    """Component -> bytes a token that one layer saves, its input included; attention scores are not among them."""
    hidden, queries, keys, inner = step.hidden, step.queries, step.keys, step.inner
    statistics = FULL * step.shape.heads  # the log-sum-exp of each query, from which backward makes the scores again
    if step.backend == "own":
        # norms and the SwiGLU product are cheap elementwise work: backward makes them again from these
        return {
            "layer's input and middle": HALF * 2 * hidden,
            "queries, keys, values, output": HALF * (2 * queries + 2 * keys) + statistics,
            "gate and up": HALF * 2 * inner,
        }
    dense, fused, experts = step.stream_bytes, step.backend == "liger", step.shape.experts_per_token
    # keys and values are repeated for all heads, so all three are as wide as queries; math's are in fp32
    attention = 3 * queries * (FULL if step.attention == "math" else HALF)
    normed = step.shape.family.norms * hidden + (queries + keys if step.shape.family.head_norms else 0)
    return {
        # Liger's norm saves its input; transformers' the fp32 copy beside it, which an fp32 stream already is
        "norm inputs": normed * (dense if fused else FULL) + (0 if fused or dense == FULL else normed * HALF),
        "adapter inputs": adapter_inputs(step),
        "adapter products": HALF * step.config.adapter.rank * len(step.config.adapter.target_modules),
        "queries, keys, values, output": attention + queries * HALF + statistics,
        # SwiGLU: gate, up and silu(gate); Liger's kernel makes the last again
        "SwiGLU": inner * (2 * dense if fused else 3 * dense),
        # what experts read and answer, a copy for each that a token meets
        "experts' inputs and answers": 2 * dense * hidden * (experts if experts > 1 else 0),
    }


def adapter_inputs(step: Step) -> float:
    """Bytes a token that PEFT's adapters save of their inputs, in one layer of transformers'."""
    hidden, queries, inner = step.hidden, step.queries, step.inner
    targets = step.config.adapter.target_modules
    read = {"down_proj": inner, "c_proj": inner, "o_proj": queries}
    inputs = {name: read.get(name, hidden) for name in targets}
    if step.config.adapter.dropout:  # a mask of one byte and the dropped input, for each adapter
        return sum(inputs.values()) * (HALF + 1)
    if step.stream_bytes == FULL:  # an fp16 copy each; o_proj shares attention's output
        return HALF * sum(size for name, size in inputs.items() if name != "o_proj")
    # q, k and v read the same tensor, gate and up too: it is saved once
    groups = (("q_proj", "k_proj", "v_proj", "qkv_proj"), ("gate_proj", "up_proj", "gate_up_proj", "c_fc"))
    groups += (("down_proj", "c_proj"),)
    return HALF * sum(max((inputs.get(n, 0) for n in group), default=0) for group in groups)


def saved(step: Step) -> float:
    """Bytes that one layer saves of a micro-batch: activations, scores and adapters cast to 16 bits.

    Scores: math saves a softmax in fp32, eager that and its fp16 copy, and where scores are capped a tanh in fp16.
    """
    scores = {"efficient": 0.0, "math": 1.0, "eager": 1.5}[step.attention]
    scores += 0.5 if step.shape.family.attention_cap else 0.0
    casts = 0.0 if step.backend == "own" else adapter_casts(step) / step.shape.layers
    return step.tokens * sum(saved_by_layer(step).values()) + scores * score_bytes(step) + casts


def saved_when_checkpointed(step: Step) -> float:
    """Bytes on the GPU that one checkpointed layer saves: its input, and with keep_attention attention's result.

    Offloaded inputs are not on the GPU; of those that the host has no room for, each layer gets its share.
    """
    stream = step.tokens * step.hidden * step.stream_bytes
    if step.checkpointed:
        stream *= (step.checkpointed - step.offloaded) / step.checkpointed
    if step.backend == "own" and step.config.train.keep_attention:
        stream += step.tokens * (step.queries * HALF + FULL * step.shape.heads)
    return stream


def offloaded_bytes(step: Step) -> int:
    """Bytes of host memory that offloaded inputs take: by our own layers in whole chunks, one after another."""
    size = step.offloaded * step.tokens * step.hidden * step.stream_bytes
    return -(-size // steps.CHUNK_BYTES) * steps.CHUNK_BYTES if step.backend == "own" else size


def offload_buffers(step: Step) -> float:
    """Bytes of inputs that are on their way to or from host memory: two layers' (finetune/engine/layers.py).

    Those that the host has no room for are the upper ones; while they are on the GPU, fewer are on their way.
    """
    if not step.offloaded:
        return 0.0
    copies = max(2 - (step.checkpointed - step.offloaded), 0) if step.backend == "own" else 4
    return copies * step.tokens * step.hidden * step.stream_bytes


def adapter_casts(step: Step) -> float:
    """Bytes of A and B of all adapters in 16 bits: autocast caches a copy of each until its forward pass ends."""
    return HALF * step.shape.lora_parameters(step.config.adapter.rank, step.config.adapter.target_modules)


# ---- temporary buffers -----------------------------------------------------------------------------------------------


def forward_buffers(step: Step, checkpointed: bool) -> float:
    """Bytes that a layer's forward pass needs at its fullest, beside what is saved of it in the end."""
    hidden, queries, keys, inner = step.hidden, step.queries, step.keys, step.inner
    tokens, dense, weight = step.tokens, step.stream_bytes, largest_weight(step.shape)
    if step.backend == "own":
        # a checkpointed layer holds its queries, keys and values as temporaries, the MLP goes a chunk at a time
        chunk, inner = mlp_at_once(step)
        alive = tokens * HALF * (2 * queries + 2 * keys + 2 * hidden) if checkpointed else tokens * HALF * hidden
        if step.shape.experts > 1:  # every token's norm, and an expert's tokens gathered and answered
            alive += HALF * hidden * (tokens + chunk)
        return alive + chunk * HALF * (hidden + (2 * inner if checkpointed else inner)) + weight
    if not checkpointed:  # the last product of the last layer: everything else is saved already
        return weight + tokens * dense * hidden
    # three places can be the fullest: down_proj's product, adding an adapter's product to gate or up, attention
    products = weight + tokens * dense * (2 * hidden + 2 * inner)
    adapted = {"gate_proj", "up_proj", "gate_up_proj", "c_fc"} & set(step.config.adapter.target_modules)
    wide = (4 * HALF if dense == HALF else 3 * FULL + HALF) if adapted else 3 * dense
    adding = tokens * (2 * hidden * dense + wide * inner)
    factor = {"efficient": 0.0, "math": 2.29, "eager": 1.84}[step.attention]
    attending = factor * score_bytes(step) + (tokens * (22 * hidden + 34 * keys) if factor else 0.0)
    return max(products, adding, attending)


def backward_buffers(step: Step) -> float:
    """Bytes that a layer's backward pass needs at its fullest, beside what was saved, or recomputed, of it."""
    if step.backend == "own":
        return max(own_backward(step))
    tokens, inner, weight = step.tokens, step.inner, largest_weight(step.shape)
    if step.stream_bytes == FULL:
        mlp = tokens * inner
        mlp = max(weight + 6 * mlp, 10 * mlp)
    else:
        mlp = max(weight + tokens * inner * HALF, tokens * inner * 2 * HALF)
    factor = {"efficient": 0.0, "math": 3.34, "eager": 2.9}[step.attention]
    if not factor:
        return mlp
    # attention comes after the MLP, whose activations are freed by then
    freed = tokens * (3.5 * step.stream_bytes * inner + 22.5 * step.hidden)
    return max(mlp, factor * score_bytes(step) - freed)


def own_backward(step: Step) -> tuple[float, float]:
    """Bytes that our own layer's backward pass needs beside what was saved or recomputed: (in the MLP, in attention).

    Both hold the gradients of the layer's result and of its middle, and the first norm's result. Attention holds its
    result's gradient, keys and values repeated for all heads, three gradients as large, and the memory-efficient
    kernel's fp32 accumulator of the queries' gradient (PyTorch's mem_eff_attention/kernel_backward.h).
    """
    hidden, queries, tokens = step.hidden, step.queries, step.tokens
    chunk, inner = mlp_at_once(step)
    mlp = tokens * HALF * 3 * hidden + chunk * HALF * (hidden + 2 * inner) + largest_weight(step.shape)
    if step.shape.experts > 1:  # the norm and its gradient, an expert's gathered gradient, and its product weighed
        mlp += tokens * HALF * 2 * hidden + chunk * HALF * (hidden + inner)
    attention = tokens * (HALF * (3 * hidden + 6 * queries) + FULL * queries)
    return mlp, attention


def recomputed(step: Step) -> float:
    """Bytes that a checkpointed layer's backward pass recomputes, beside what was saved of it, at its fullest.

    Our own layers: queries, keys and values, and while the MLP is done its input, gate and up.
    """
    if step.backend != "own":
        return saved(step)
    tokens, (chunk, inner) = step.tokens, mlp_at_once(step)
    again = 0 if step.config.train.keep_attention else step.queries  # attention's result
    attending = HALF * tokens * (step.queries + 2 * step.keys + again)
    # MLP and attention are done one after the other: what counts is the larger sum, less the buffers alone
    mlp, attention = own_backward(step)
    in_mlp = attending + HALF * (tokens * step.hidden + chunk * 2 * inner)
    return max(in_mlp + mlp, attending + attention) - max(mlp, attention)


def loss_buffers(step: Step) -> tuple[float, float]:
    """Bytes of logits and loss at their fullest: (in the forward pass, in the backward pass).

    full: logits in fp16, in fp32 and their log-softmax; backward: two gradients in fp32 and the log-softmax. chunked:
    a tile at a time.
    """
    tokens, dense, hidden, words = step.tokens, step.stream_bytes, step.hidden, step.shape.vocab
    if step.config.train.loss == "full" or step.config.train.trains == "all":
        head = words * hidden * HALF if dense == FULL else 0  # autocast's fp16 copy of an fp32 head
        forward = tokens * (words * (HALF + 2 * FULL) + 2 * hidden * dense)
        return head + forward, head + tokens * (words * 3 * FULL + hidden * dense)
    if step.backend == "own":
        # bytes a logit of a chunk (finetune/engine/losses.py); a cap keeps its slope in fp32, 4 more
        chunk = min(tokens * words, LOGITS_AT_ONCE)
        both = (14 if step.shape.family.logits.cap else 10) * chunk + tokens * hidden * 4 * HALF
        return both, max(both, final_norm_buffers(step))
    # trl's tiles; of an fp32 head a tile's words are copied to 16 bits for their product
    tile = min(tokens, LOSS_TOKENS) * min(words, LOSS_WORDS) * HALF
    head = min(words, LOSS_WORDS) * hidden * HALF if dense == FULL else 0
    both = tile + head + tokens * hidden * (13 if dense == FULL else 6)
    return both, both


def final_norm_buffers(step: Step) -> float:
    """Bytes of the last norm's backward pass, which is transformers' own unless Liger's is asked for.

    Six tensors in fp32: its input, that one's gradient through the product, and in the square's derivative the
    gradient, the input to the power of one, twice that, and the product (PyTorch's pow_backward).
    """
    return 0.0 if step.backend == "liger" else 6.0 * FULL * step.tokens * step.hidden
