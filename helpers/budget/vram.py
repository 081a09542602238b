"""VRAM of a training step and of inference, tensor by tensor: sizes from the shape, no torch.

A step's memory rises in the forward pass (each layer saves what its backward pass will read), is highest somewhere in
the backward pass, and falls as layers are done. So the peak is the largest of a few phases, each a sum of components:

>>> from helpers.config import RunConfig
>>> from helpers.models import shape
>>> parts = weights(RunConfig(), shape("mistral-7b-v0.3"))
>>> {name: round(size / GIB, 2) for name, size in parts.items()}
{'4-bit weights': 3.25, 'quantization scales': 0.1, '16-bit weights': 0.5}

Sources: QLoRA (https://arxiv.org/abs/2305.14314) for the weights; what autograd saves was read in PyTorch's
derivatives.yaml, bitsandbytes' MatMul4Bit, PEFT's LoRA layers, Liger's kernels and transformers' modeling_mistral.py.
"""

from helpers.budget import activations
from helpers.budget.step import FULL, HALF, Step, lora_parameters, trained_parameters
from helpers.config import RunConfig
from helpers.models import ModelShape
from helpers.models.aqlm_sizes import Layout

GIB = 2**30

Parts = dict[str, float]
"""Component -> bytes in PyTorch's allocator."""


def weights(config: RunConfig, shape: ModelShape) -> Parts:
    """Bytes of the frozen base, or in full fine-tuning of all weights, which are trained in fp32.

    NF4: half a byte a weight, and a scale for each block of 64 (QLoRA, section 3).
    The scale is 4 bytes; with double quantization 1 byte, and 4 bytes for each 256 of those. Experts that are no linear
    layers (models/experts.py takes most families' apart) stay in 16 bits: bitsandbytes takes linear layers only.
    """
    if config.train.trains == "all":
        return {"32-bit weights": FULL * shape.parameters}
    rest = shape.embedding_parameters + shape.small_parameters
    if shape.additive is not None:
        return additive_weights(config, shape)
    experts = {"experts in 16 bits": shape.expert_parameters * HALF} if shape.expert_parameters else {}
    name, width = ("32-bit weights", FULL) if config.model.upcast else ("16-bit weights", HALF)
    unquantized = {name: rest * width}
    if config.model.weights == "fp16":
        if config.model.upcast:
            return {"16-bit weights": shape.linear_parameters * HALF, **unquantized}
        return {"16-bit weights": shape.parameters * HALF}
    quantized = shape.linear_parameters - shape.expert_parameters
    if config.model.weights == "int8":  # a scale a row (LLM.int8(), https://arxiv.org/abs/2208.07339)
        taken = [name for name in shape.linears if shape.copies(name) == 1 or shape.family.apart]
        rows = shape.layers * sum(shape.linears[name][1] * shape.copies(name) for name in taken)
        return {"8-bit weights": quantized, "quantization scales": rows * FULL, **unquantized, **experts}
    blocks = quantized / 64
    scales = blocks * (1 + FULL / 256) if config.model.double_quant else blocks * FULL
    return {"4-bit weights": quantized / 2, "quantization scales": scales, **unquantized, **experts}


def fused(config: RunConfig) -> bool:
    """Whether it is PyTorch's fused AdamW in fp32 that updates, whatever is configured.

    bitsandbytes' is given the adapters' matrices joined to one tensor, which divided or fully trained weights are not.
    """
    return config.train.trains == "all" or config.train.sharding != "none"


def optimizer(config: RunConfig) -> str:
    """The optimizer by what its states take."""
    return "adamw_torch" if fused(config) else config.train.optimizer


def another_optimizer(config: RunConfig) -> tuple[str, ...]:
    """A sentence where another optimizer computes than is set; () where the set one does."""
    if optimizer(config) == config.train.optimizer:
        return ()
    why = "all weights are trained" if config.train.trains == "all" else f"{config.train.sharding} divides the weights"
    return (f"the optimizer is PyTorch's AdamW with states in fp32, not {config.train.optimizer}: {why}",)


def additive_weights(config: RunConfig, shape: ModelShape) -> Parts:
    """Bytes of an AQLM checkpoint: codes, codebooks and scales of every matrix, and what is not quantized."""
    layout = shape.additive
    codes = shape.linear_parameters * layout.bits_per_weight / 8
    rest = shape.parameters - shape.linear_parameters
    name, width = ("32-bit weights", FULL) if config.model.upcast else ("16-bit weights", HALF)
    beside = additive_bytes(layout, shape) - codes
    return {"AQLM codes": codes, "codebooks and scales": beside, name: rest * width}


def additive_bytes(layout: Layout, shape: ModelShape) -> float:
    """Bytes of all matrices of the decoder in a layout of AQLM's."""
    each = ((shape.copies(name), layout.bytes_of(*size)) for name, size in shape.linears.items())
    return shape.layers * sum(copies * size for copies, size in each)


def optimizer_states(config: RunConfig, shape: ModelShape) -> tuple[float, float]:
    """Bytes of Adam's two moments: (in the allocator, paged: in managed memory beside it).

    8-bit states take a byte and an fp32 scale each 256 (https://arxiv.org/abs/2110.02861). bitsandbytes pages only
    tensors of at least 100,000 values, and keeps those under 4,096 in fp32 (bitsandbytes/optim/optimizer.py).
    """
    if optimizer(config) == "adamw_torch":
        return 2 * FULL * trained_parameters(config, shape), 0.0
    here = paged = 0.0
    for name in config.adapter.target_modules:
        for features in shape.linears[name]:  # A is rank × in, B is out × rank
            values, tensors = features * config.adapter.rank, shape.copies(name) * shape.layers
            each = 2 * values * (1 if values >= 4096 else FULL)
            scales = 2 * FULL * values / 256 if values >= 4096 else 0
            in_pages = config.train.optimizer == "paged_adamw_8bit" and values >= 100_000
            paged += tensors * each if in_pages else 0
            here += tensors * (scales + (0 if in_pages else each))
    return here, paged


def cublas_workspace(capability: tuple[int, int]) -> float:
    """Bytes of cuBLAS' workspace, one for the forward and one for the backward thread: 32 MiB each from 9.0 on.

    Elsewhere 8.125 MiB each (aten/src/ATen/cuda/CublasHandlePool.cpp).
    """
    return 2 * (32 if capability >= (9, 0) else 8.125) * 2**20


def phases(step: Step, capability: tuple[int, int] = (7, 5)) -> dict[str, Parts]:
    """Phase of a training step -> component -> bytes in PyTorch's allocator; the largest sum is the peak.

    The lower layers are the checkpointed ones: they save little, and their backward pass recomputes what the others
    saved. Backward runs from the top, freeing what layers saved and adding their adapters' gradients.
    """
    config, layers, checkpointed = step.config, step.shape.layers, step.checkpointed
    full = layers - checkpointed  # layers that save everything
    trained, lora = (FULL * count(config, step.shape) for count in (trained_parameters, lora_parameters))
    always = weights(config, step.shape) | {
        "LoRA weights": lora,
        "optimizer states": optimizer_states(config, step.shape)[0],
        "cuBLAS workspace": cublas_workspace(capability),
    }
    one_saved, one_checkpoint = activations.saved(step), activations.saved_when_checkpointed(step)
    moving = activations.offload_buffers(step)

    def phase(checkpoints: int, saving: int, gradients: float, beside: Parts) -> Parts:
        # gradients: share of the adapters' that is there; all of them all along when micro-batches accumulate
        return always | {
            gradients_name(config): trained if config.train.accumulation > 1 else trained * gradients,
            "checkpointed activations": checkpoints * one_checkpoint + (moving if checkpoints else 0.0),
            "saved activations": saving * one_saved,
            **beside,
        }

    # autocast caches 16-bit copies of the adapters until the forward pass ends; those of layers that save everything
    # are among what these saved
    casts = 0.0 if step.backend == "own" else activations.adapter_casts(step)
    cached = {"adapters in 16 bits": casts * checkpointed / layers}
    if config.train.trains == "all":  # of every weight, and in the backward pass of those that are recomputed
        cached = {"weights in 16 bits": HALF * step.shape.parameters}
    loss_forward, loss_backward = activations.loss_buffers(step)
    gradients = {"layer gradients": activations.backward_buffers(step)}
    found = {
        "the loss": phase(checkpointed, full, 0.0, {"logits and loss": loss_forward} | cached),
        "the loss's backward pass": phase(checkpointed, full, 0.0, {"logits and loss": loss_backward}),
        "the optimizer step": phase(0, 0, 1.0, {"optimizer buffers": optimizer_buffers(config, step.shape)}),
    }
    if full:  # nothing is freed yet when the top layer begins
        work = {"temporary buffers": activations.forward_buffers(step, checkpointed=False)}
        found["the top layer"] = phase(checkpointed, full, 0.0, work | cached)
        found["the top layer's backward pass"] = phase(checkpointed, full, 0.0, gradients)
    if not checkpointed:
        found["the lowest layer's backward pass"] = phase(0, 1, 1.0, gradients)
    else:  # from here on only checkpoints are left, and one layer at a time is recomputed
        again = {"recomputed activations (one layer)": activations.recomputed(step)} | gradients
        work = {"temporary buffers": activations.forward_buffers(step, checkpointed=True)}
        found["the upper checkpointed layer"] = phase(checkpointed, 0, 0.0, work | cached)
        found["the upper checkpointed layer's backward pass"] = phase(checkpointed, 0, full / layers, again)
        found["the lowest layer's backward pass"] = phase(1, 0, 1.0, again)
    return found


def gradients_name(config: RunConfig) -> str:
    """What a budget calls the gradients of what is trained."""
    return "gradients" if config.train.trains == "all" else "LoRA gradients"


def optimizer_buffers(config: RunConfig, shape: ModelShape) -> float:
    """Bytes that an optimizer step needs: torch's AdamW takes all roots at once, bitsandbytes needs none."""
    if fused(config):  # a tensor at a time, in place
        return 0.0
    return FULL * lora_parameters(config, shape) if config.train.optimizer == "adamw_torch" else 0.0


def allocator_overhead(step: Step, expandable: bool = True) -> float:
    """Bytes that the allocator reserves beyond a training step's peak: holes between tensors of different sizes.

    Calibrated (quantile regression) on every other row of h200_t4_envelope.csv for expandable segments, which
    fine-tuning here switches on, and on the first T4 rows and the "segments" group for the allocator's default.
    """
    recomputes = step.checkpointed > 0
    buffers = max(
        activations.forward_buffers(step, checkpointed=recomputes),
        activations.backward_buffers(step),
        *activations.loss_buffers(step),
    )
    again = activations.recomputed(step) if recomputes else 0.0
    adam = optimizer_buffers(step.config, step.shape)
    if expandable:
        return 0.105 * GIB + 0.16 * buffers + 0.165 * again + 0.7 * adam
    return 0.18 * GIB + 0.09 * buffers + 0.4 * again + 0.87 * adam


def inference(
    config: RunConfig,
    shape: ModelShape,
    capability: tuple[int, int] = (7, 5),
    held: Parts | None = None,
    dequantizes: bool = True,
    batch_size: int | None = None,
) -> dict[str, Parts]:
    """Phases of evaluation: weights, adapters, keys and values, and one layer's MLP while a prompt is read.

    held: component -> bytes of the weights on the GPU, default the base as training saw it and its adapter;
    dequantizes: 4-bit weights are, to 16 bits, one matrix at a time; batch_size: default the configuration's.
    """
    asked = config.evaluate
    rows = batch_size or asked.eval_batch_size
    prompt = rows * asked.eval_context
    inner = shape.intermediate * shape.experts_per_token
    adapted = weights(config, shape) | {"LoRA weights": FULL * lora_parameters(config, shape)}
    base = (adapted if held is None else held) | {"cuBLAS workspace": cublas_workspace(capability) / 2}
    dequantized = activations.largest_weight(shape) if dequantizes else 0.0
    # an MLP holds its input, gate, its activation, up and their product in 16 bits; with an adapter on gate or up,
    # PEFT's product of it and that scaled are there in fp32, beside the gate and the base's product
    mlp = prompt * (4 * inner + shape.hidden) * HALF
    if "LoRA weights" in base and {"gate_proj", "up_proj"} & set(config.adapter.target_modules):
        mlp = prompt * (2 * inner * HALF + 2 * inner * FULL + shape.hidden * (2 * HALF + 2 * FULL))
    reading = max(mlp, prompt * 2 * inner * HALF + dequantized)
    # the cache grows by concatenation: while one layer's is copied, it is there twice
    tokens, a_token = rows * (asked.eval_context + asked.max_new_tokens), shape.kv_cache_bytes_per_token()
    cache = 2 * tokens * a_token / shape.layers + tokens * a_token
    return {
        "reading the prompts": base | {"keys and values": prompt * a_token, "temporary buffers": reading},
        "writing the answers": base | {"keys and values": cache, "temporary buffers": dequantized},
    }


def merging(shape: ModelShape, capability: tuple[int, int] = (7, 5)) -> dict[str, Parts]:
    """The one phase of a merge: the largest adapted tensor in fp32, its adapter's product, their sum, the change."""
    widest = max(inputs * outputs for inputs, outputs in shape.linears.values())
    workspace = {"cuBLAS workspace": cublas_workspace(capability) / 2}
    return {"the largest tensor": {"temporary buffers": 4 * FULL * widest} | workspace}


def quantization(config: RunConfig, shape: ModelShape, capability: tuple[int, int] = (7, 5)) -> dict[str, Parts]:
    """Phases of GPTQ (https://arxiv.org/abs/2210.17323), one decoder layer at a time on the GPU.

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
        "cuBLAS workspace": cublas_workspace(capability),
    }
    return {
        "the widest module's sweep": base
        | {"Hessians": 3 * inputs**2 * FULL, "the module's weights in fp32": 2 * inputs * outputs * FULL},
        "the calibration set's pass": base | {"Hessians": inputs**2 * FULL, "temporary buffers": work},
        "the quantized layer's pass": base
        | {"calibration activations": 2 * tokens * shape.hidden * HALF, "temporary buffers": work},
    }
