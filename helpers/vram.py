"""VRAM of a training step and of inference, tensor by tensor: sizes from the shape, no torch.

A step's memory rises in the forward pass (each layer saves what its backward pass will read), is highest somewhere in
the backward pass, and falls as layers are done. So the peak is the largest of a few moments, each a sum of components:

>>> from helpers.config import RunConfig
>>> from helpers.models import shape
>>> parts = weights(shape("mistral-7b-v0.3"), RunConfig())
>>> {name: round(size / GIB, 2) for name, size in parts.items()}
{'4-bit weights': 3.25, 'quantization scales': 0.1, '16-bit weights': 0.5}

Sources: QLoRA (https://arxiv.org/abs/2305.14314) for the weights; what autograd saves was read in PyTorch's
derivatives.yaml, bitsandbytes' MatMul4Bit, PEFT's LoRA layers, Liger's kernels and transformers' modeling_mistral.py.
"""

from helpers.config import RunConfig
from helpers.models import ModelShape

GIB = 2**30
HALF, FULL = 2, 4
"""Bytes of an fp16 (or bf16) and of an fp32 value."""


def checked_layers(shape: ModelShape, config: RunConfig) -> int:
    """How many layers are checkpointed; "auto" counts as all, the safe side.

    Raises ValueError naming the allowed range.
    """
    asked = config.train.checkpointing
    layers = {"all": shape.layers, "auto": shape.layers, "none": 0}.get(asked, asked)
    if layers > shape.layers:
        raise ValueError(f"checkpointing must be all, none, auto or a number from 0 to {shape.layers}, not {asked}")
    return layers


def stream_bytes(config: RunConfig) -> int:
    """Bytes of a value of the residual stream: it has the embedding's dtype."""
    return FULL if config.model.upcast else HALF


def weights(shape: ModelShape, config: RunConfig) -> dict[str, float]:
    """Bytes of the frozen base. NF4: half a byte a weight, and a scale for each block of 64 (QLoRA, section 3).

    The scale is 4 bytes; with double quantization 1 byte, and 4 bytes for each 256 of those.
    """
    rest = shape.embedding_parameters + shape.small_parameters
    unquantized = {"32-bit weights" if config.model.upcast else "16-bit weights": rest * stream_bytes(config)}
    if config.model.weights == "fp16":
        return {"16-bit weights": shape.parameters * HALF}
    if config.model.weights == "int8":  # a scale a row (LLM.int8(), https://arxiv.org/abs/2208.07339)
        rows = shape.layers * sum(outputs * shape.copies(name) for name, (_, outputs) in shape.linears.items())
        return {"8-bit weights": shape.linear_parameters, "quantization scales": rows * FULL, **unquantized}
    blocks = shape.linear_parameters / 64
    scales = blocks * (1 + FULL / 256) if config.model.double_quant else blocks * FULL
    return {"4-bit weights": shape.linear_parameters / 2, "quantization scales": scales, **unquantized}


def lora_parameters(shape: ModelShape, config: RunConfig) -> int:
    """Trained weights, DoRA's magnitudes (one an output) among them."""
    targets = config.adapter.target_modules
    magnitudes = sum(shape.linears[name][1] * shape.copies(name) for name in targets) * shape.layers
    return shape.lora_parameters(config.adapter.rank, targets) + (magnitudes if config.adapter.dora else 0)


def optimizer_states(shape: ModelShape, config: RunConfig) -> tuple[float, float]:
    """Bytes of Adam's two moments: (in the allocator, paged: in managed memory beside it).

    8-bit states take a byte and an fp32 scale each 256 (https://arxiv.org/abs/2110.02861). bitsandbytes pages only
    tensors of at least 100,000 values, and keeps those under 4,096 in fp32 (bitsandbytes/optim/optimizer.py).
    """
    if config.train.optimizer == "adamw_torch":
        return 2 * FULL * lora_parameters(shape, config), 0.0
    here = paged = 0.0
    for name in config.adapter.target_modules:
        for features in shape.linears[name]:
            values, tensors = features * config.adapter.rank, shape.copies(name) * shape.layers
            each = 2 * values * (1 if values >= 4096 else FULL)
            scales = 2 * FULL * values / 256 if values >= 4096 else 0
            in_pages = config.train.optimizer == "paged_adamw_8bit" and values >= 100_000
            paged += tensors * each if in_pages else 0
            here += tensors * (scales + (0 if in_pages else each))
    return here, paged


def saved_by_layer(shape: ModelShape, config: RunConfig) -> dict[str, float]:
    """Bytes a token that the backward pass of one unchecked layer reads, its input included.

    With Liger's kernels and an fp16 stream each norm saves its input, the adapters their inputs and inner products,
    attention its queries, keys, values and output, SwiGLU its two factors and, for down_proj's adapter, their product.
    An fp32 stream (upcast) makes the norms, RoPE and SwiGLU save fp32, and autocast gives each adapter an fp16 copy of
    its own.
    """
    hidden, queries, inner, dense = shape.hidden, shape.heads * shape.head_dim, shape.intermediate, stream_bytes(config)
    targets = config.adapter.target_modules
    inputs = {name: shape.linears[name][0] for name in targets}
    fused, attended = config.train.fused_kernels, {"o_proj": queries}
    parts = {"norm inputs": 2 * hidden * (dense if fused else FULL) + (0 if fused or dense == FULL else 2 * hidden * 2)}
    if config.adapter.dropout:  # a mask of one byte and the dropped input, for each adapter
        parts["adapter inputs"] = sum(inputs.values()) * (HALF + 1)
    elif dense == FULL:  # an fp16 copy each; o_proj shares attention's output
        parts["adapter inputs"] = HALF * sum(size for name, size in inputs.items() if name not in attended)
    else:  # q, k and v share theirs, gate and up too
        groups = (("q_proj", "k_proj", "v_proj"), ("gate_proj", "up_proj"), ("down_proj",))
        parts["adapter inputs"] = HALF * sum(max((inputs.get(n, 0) for n in group), default=0) for group in groups)
    parts["adapter products"] = HALF * config.adapter.rank * len(targets)
    attention_values = FULL if config.model.attention == "math" else HALF
    parts["queries, keys, values"] = 3 * queries * attention_values
    parts["attention output"] = queries * HALF
    parts["SwiGLU"] = inner * (2 * dense if fused else 3 * dense)
    return parts


def score_bytes(shape: ModelShape, config: RunConfig) -> float:
    """Bytes of one layer's saved attention scores for a micro-batch: heads × seq², where they are materialised.

    math: the softmax in fp32; eager: that, and its fp16 copy. The memory-efficient kernel recomputes them
    (https://arxiv.org/abs/2112.05682).
    """
    each = {"efficient": 0, "math": FULL, "eager": FULL + HALF}[config.model.attention]
    return each * config.train.batch_size * shape.heads * config.data.seq_len**2


def layer_work(shape: ModelShape, config: RunConfig) -> float:
    """Bytes that one layer's backward pass holds beside what it saved: gradients, and the dequantized weight.

    The largest moment is down_proj's input gradient: the base's and the adapter's part, each (tokens, intermediate),
    and the fp16 copy of the weight that bitsandbytes makes.
    """
    tokens, dense = config.train.batch_size * config.data.seq_len, stream_bytes(config)
    weight = max(inputs * outputs for inputs, outputs in shape.linears.values()) * HALF
    return 2 * tokens * shape.intermediate * dense + weight + 2 * score_bytes(shape, config)


def loss_work(shape: ModelShape, config: RunConfig) -> float:
    """Bytes of logits and loss: full holds all logits in fp16 and in fp32 thrice; chunked a tile of them at a time.

    chunked: trl's ChunkedLogProbFunction (4,096 tokens by 8,192 words at a time; fp32 gradient of the hidden states).
    fused: Liger's fused linear cross-entropy (https://arxiv.org/abs/2410.10989).
    """
    tokens, dense = config.train.batch_size * config.data.seq_len, stream_bytes(config)
    hidden = tokens * shape.hidden
    if config.train.loss == "full":
        return tokens * shape.vocab * (HALF + 3 * FULL) + hidden * dense
    tile = min(tokens, 4096) * min(8192, shape.vocab) * HALF
    return tile + hidden * (FULL + 2 * dense)


def moments(shape: ModelShape, config: RunConfig) -> dict[str, dict[str, float]]:
    """Moment of a training step -> component -> bytes in PyTorch's allocator; the largest sum is the peak.

    The lower layers are the checkpointed ones: they keep their input only, and their backward pass rebuilds what an
    unchecked layer saves. Backward runs from the top, freeing what layers saved and adding their adapters' gradients
    (which are there all along when micro-batches accumulate).
    """
    tokens, layers, checked = config.train.batch_size * config.data.seq_len, shape.layers, checked_layers(shape, config)
    lora = lora_parameters(shape, config) * FULL
    each_saved = saved_by_layer(shape, config)
    one_layer = tokens * sum(each_saved.values()) + score_bytes(shape, config) + lora / FULL * HALF / layers
    one_input = 0.0 if config.train.offload_activations else tokens * shape.hidden * stream_bytes(config)
    work = layer_work(shape, config)
    always = weights(shape, config) | {"LoRA weights": lora, "optimizer states": optimizer_states(shape, config)[0]}
    whole_gradient = config.train.accumulation > 1

    def moment(inputs: int, unchecked: int, rebuilt: bool, gradients: float, **extra: float) -> dict[str, float]:
        return always | {
            "LoRA gradients": lora if whole_gradient else lora * gradients,
            "checkpoints": inputs * one_input,
            "activations of unchecked layers": unchecked * one_layer,
            "a checkpointed layer, rebuilt": one_layer if rebuilt else 0.0,
            **{name.replace("_", " "): size for name, size in extra.items()},
        }

    found = {
        "the loss": moment(checked, layers - checked, False, 0.0, logits_and_loss=loss_work(shape, config)),
        "the optimizer step": moment(0, 0, False, 1.0, optimizer_work=optimizer_work(shape, config)),
    }
    if checked < layers:
        found["the top layer's backward pass"] = moment(checked, layers - checked, False, 0.0, layer_gradients=work)
    if checked:
        above = (layers - checked) / layers
        found["the upper checkpointed layer's backward pass"] = moment(checked, 0, True, above, layer_gradients=work)
        found["the lowest layer's backward pass"] = moment(1, 0, True, 1.0, layer_gradients=work)
    return found


def optimizer_work(shape: ModelShape, config: RunConfig) -> float:
    """Bytes that an optimizer step needs: torch's AdamW takes all roots at once, bitsandbytes needs none."""
    return FULL * lora_parameters(shape, config) if config.train.optimizer == "adamw_torch" else 0.0


def inference(shape: ModelShape, config: RunConfig) -> dict[str, dict[str, float]]:
    """Moments of evaluation and generation: weights, adapter in fp16, keys and values, one layer's work, logits."""
    asked = config.evaluate
    tokens = asked.eval_batch_size * (asked.eval_context + asked.max_new_tokens)
    base = weights(shape, config) | {
        "LoRA weights": lora_parameters(shape, config) * FULL,
        "keys and values": tokens * shape.kv_cache_bytes_per_token(),
    }
    prefill = asked.eval_batch_size * asked.eval_context
    weight = max(inputs * outputs for inputs, outputs in shape.linears.values()) * HALF
    layer = prefill * (3 * shape.intermediate + 2 * shape.hidden) * HALF + weight
    logits = prefill * shape.vocab * (HALF + FULL)
    return {
        "reading the prompt": base | {"one layer": layer},
        "the loss": base | {"keys and values": 0.0, "logits and loss": min(logits, 4 * 2**30)},
    }


def quantization(shape: ModelShape, config: RunConfig) -> dict[str, dict[str, float]]:
    """Moments of GPTQ (https://arxiv.org/abs/2210.17323), one decoder layer at a time on the card.

    The widest module's Hessian, its inverse and Cholesky factor are fp32 squares of its inputs; a layer's inputs and
    outputs for the whole calibration set stay in fp16.
    """
    asked = config.quantize
    tokens = asked.calibration_samples * asked.calibration_tokens
    inputs, outputs = max(shape.linears.values())
    work = min(tokens, 4096) * 3 * shape.intermediate * HALF
    base = {
        "one layer": shape.layer_linear_parameters * HALF,
        "calibration activations": 2 * tokens * shape.hidden * HALF,
    }
    return {
        "the widest module's sweep": base
        | {"Hessians": 3 * inputs**2 * FULL, "the module's weights in fp32": 2 * inputs * outputs * FULL},
        "the calibration set's pass": base | {"Hessians": inputs**2 * FULL, "layer work": work},
    }
