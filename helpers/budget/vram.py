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

from helpers.budget import activations
from helpers.budget.activations import FULL, HALF, stream_bytes
from helpers.config import RunConfig
from helpers.models import ModelShape

GIB = 2**30


def weights(shape: ModelShape, config: RunConfig) -> dict[str, float]:
    """Bytes of the frozen base. NF4: half a byte a weight, and a scale for each block of 64 (QLoRA, section 3).

    The scale is 4 bytes; with double quantization 1 byte, and 4 bytes for each 256 of those. The experts of a mixture
    stay in 16 bits: transformers 5 holds a layer's in one tensor, and bitsandbytes takes linear layers only.
    """
    rest = shape.embedding_parameters + shape.small_parameters
    experts = {"experts in 16 bits": shape.expert_parameters * HALF} if shape.experts > 1 else {}
    unquantized = {"32-bit weights" if config.model.upcast else "16-bit weights": rest * stream_bytes(config)}
    if config.model.weights == "fp16":
        if config.model.upcast:
            return {"16-bit weights": shape.linear_parameters * HALF, **unquantized}
        return {"16-bit weights": shape.parameters * HALF}
    quantized = shape.linear_parameters - shape.expert_parameters
    if config.model.weights == "int8":  # a scale a row (LLM.int8(), https://arxiv.org/abs/2208.07339)
        taken = [name for name in shape.linears if shape.copies(name) == 1]
        rows = shape.layers * sum(shape.linears[name][1] for name in taken)
        return {"8-bit weights": quantized, "quantization scales": rows * FULL, **unquantized, **experts}
    blocks = quantized / 64
    scales = blocks * (1 + FULL / 256) if config.model.double_quant else blocks * FULL
    return {"4-bit weights": quantized / 2, "quantization scales": scales, **unquantized, **experts}


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


def workspace(capability: tuple[int, int]) -> float:
    """Bytes of cuBLAS' work space, one for the forward and one for the backward thread: 32 MiB each from 9.0 on.

    Elsewhere 8.125 MiB each (aten/src/ATen/cuda/CublasHandlePool.cpp).
    """
    return 2 * (32 if capability >= (9, 0) else 8.125) * 2**20


def moments(shape: ModelShape, config: RunConfig, capability: tuple[int, int] = (7, 5)) -> dict[str, dict[str, float]]:
    """Moment of a training step -> component -> bytes in PyTorch's allocator; the largest sum is the peak.

    The lower layers are the checkpointed ones: they keep little, and their backward pass rebuilds what an unchecked
    layer keeps. Backward runs from the top, freeing what layers kept and adding their adapters' gradients (which are
    there all along when micro-batches accumulate).
    """
    layers, checked = shape.layers, activations.checked_layers(shape, config)
    lora = FULL * lora_parameters(shape, config)
    own = activations.way(shape, config) == "own"
    casts = 0.0 if own else activations.adapter_casts(shape, config)
    one_kept, one_input = activations.kept(shape, config), activations.kept_when_checked(shape, config)
    loss_forward, loss_backward = activations.loss_work(shape, config)
    backward = activations.backward_work(shape, config)
    always = weights(shape, config) | {
        "LoRA weights": lora,
        "optimizer states": optimizer_states(shape, config)[0],
        "cuBLAS work space": workspace(capability),
    }
    moving = activations.kept_while_offloading(shape, config)
    all_gradients = config.train.accumulation > 1

    def moment(inputs: int, unchecked: int, gradients: float, **extra: float) -> dict[str, float]:
        return always | {
            "LoRA gradients": lora if all_gradients else lora * gradients,
            "checkpoints": inputs * one_input + (moving if inputs else 0.0),
            "activations of unchecked layers": unchecked * one_kept,
            **{name.replace("_", " "): size for name, size in extra.items()},
        }

    cached = {"adapters in 16 bits": casts * checked / layers}
    above = (layers - checked) / layers
    found = {
        "the loss": moment(checked, layers - checked, 0.0, logits_and_loss=loss_forward) | cached,
        "the loss's backward pass": moment(checked, layers - checked, 0.0, logits_and_loss=loss_backward),
        "the optimizer step": moment(0, 0, 1.0, optimizer_work=optimizer_work(shape, config)),
    }
    if checked < layers:
        work = activations.forward_work(shape, config, checked=False)
        found["the top layer"] = moment(checked, layers - checked, 0.0, layer_work=work) | cached
        found["the top layer's backward pass"] = moment(checked, layers - checked, 0.0, layer_gradients=backward)
    if not checked:
        found["the lowest layer's backward pass"] = moment(0, 1, 1.0, layer_gradients=backward)
    if checked:
        again = {"a_checkpointed_layer,_rebuilt": activations.rebuilt(shape, config), "layer_gradients": backward}
        work = activations.forward_work(shape, config, checked=True)
        found["the upper checkpointed layer"] = moment(checked, 0, 0.0, layer_work=work) | cached
        found["the upper checkpointed layer's backward pass"] = moment(checked, 0, above, **again)
        found["the lowest layer's backward pass"] = moment(1, 0, 1.0, **again)
    return found


def optimizer_work(shape: ModelShape, config: RunConfig) -> float:
    """Bytes that an optimizer step needs: torch's AdamW takes all roots at once, bitsandbytes needs none."""
    return FULL * lora_parameters(shape, config) if config.train.optimizer == "adamw_torch" else 0.0


def beyond(shape: ModelShape, config: RunConfig, expandable: bool = True) -> float:
    """Bytes that the allocator reserves beyond a training step's peak: holes between tensors of different sizes.

    Fitted (quantile regression) to every other row of h200_t4_envelope.csv for expandable segments, which fine-tuning
    here switches on, and to the first T4 rows and the "segments" group for the allocator's default.
    """
    rebuilding = activations.checked_layers(shape, config) > 0
    work = max(
        activations.forward_work(shape, config, checked=rebuilding),
        activations.backward_work(shape, config),
        *activations.loss_work(shape, config),
    )
    again = activations.rebuilt(shape, config) if rebuilding else 0.0
    adam = optimizer_work(shape, config)
    if expandable:
        return 0.105 * GIB + 0.16 * work + 0.165 * again + 0.7 * adam
    return 0.18 * GIB + 0.09 * work + 0.4 * again + 0.87 * adam


def inference(
    shape: ModelShape,
    config: RunConfig,
    capability: tuple[int, int] = (7, 5),
    held: dict[str, float] | None = None,
    unpacks: bool = True,
    batch_size: int | None = None,
) -> dict[str, dict[str, float]]:
    """Moments of evaluation: weights, adapters, keys and values, and one layer's MLP while a prompt is read.

    An MLP holds its input, gate, its activation, up and their product in 16 bits; with an adapter on gate or up, PEFT's
    product of it and that scaled are there in fp32 beside the gate and the base's product. held: component -> bytes of
    the weights on the card, default the base as training saw it and its adapter; unpacks: 4-bit weights are, to 16
    bits, one matrix at a time; batch_size: default the configuration's.
    """
    asked = config.evaluate
    rows = batch_size or asked.eval_batch_size
    prompt = rows * asked.eval_context
    inner = shape.intermediate * shape.experts_per_token
    adapted = weights(shape, config) | {"LoRA weights": FULL * lora_parameters(shape, config)}
    base = (adapted if held is None else held) | {"cuBLAS work space": workspace(capability) / 2}
    unpacked = activations.largest_weight(shape) if unpacks else 0.0
    mlp = prompt * (4 * inner + shape.hidden) * HALF
    if "LoRA weights" in base and {"gate_proj", "up_proj"} & set(config.adapter.target_modules):
        mlp = prompt * (2 * inner * HALF + 2 * inner * FULL + shape.hidden * (2 * HALF + 2 * FULL))
    reading = max(mlp, prompt * 2 * inner * HALF + unpacked)
    tokens = rows * (asked.eval_context + asked.max_new_tokens)
    return {
        "reading the prompts": base
        | {"keys and values": prompt * shape.kv_cache_bytes_per_token(), "layer work": reading},
        "writing the answers": base
        | {
            "keys and values": 2 * tokens * shape.kv_cache_bytes_per_token() / shape.layers
            + tokens * shape.kv_cache_bytes_per_token(),
            "layer work": unpacked,
        },
    }


def merging(shape: ModelShape, config: RunConfig, capability: tuple[int, int] = (7, 5)) -> dict[str, dict[str, float]]:
    """The one moment of a merge: the largest adapted tensor in fp32, its adapter's product, their sum, the change."""
    widest = max(inputs * outputs for inputs, outputs in shape.linears.values())
    return {"the largest tensor": {"layer work": 4 * FULL * widest, "cuBLAS work space": workspace(capability) / 2}}


def quantization(
    shape: ModelShape, config: RunConfig, capability: tuple[int, int] = (7, 5)
) -> dict[str, dict[str, float]]:
    """Moments of GPTQ (https://arxiv.org/abs/2210.17323), one decoder layer at a time on the card.

    The widest module's Hessian, its inverse and Cholesky factor are fp32 squares of its inputs; a layer's inputs for
    the whole calibration set stay in fp16, and its outputs, made once it is quantized.
    """
    asked = config.quantize
    tokens = asked.calibration_samples * asked.calibration_tokens
    inputs, outputs = max(shape.linears.values())
    work = min(tokens, 4096) * 3 * shape.intermediate * HALF
    base = {
        "one layer": shape.layer_linear_parameters * HALF,
        "calibration activations": tokens * shape.hidden * HALF,
        "cuBLAS work space": workspace(capability),
    }
    return {
        "the widest module's sweep": base
        | {"Hessians": 3 * inputs**2 * FULL, "the module's weights in fp32": 2 * inputs * outputs * FULL},
        "the calibration set's pass": base | {"Hessians": inputs**2 * FULL, "layer work": work},
        "the quantized layer's pass": base
        | {"calibration activations": 2 * tokens * shape.hidden * HALF, "layer work": work},
    }
