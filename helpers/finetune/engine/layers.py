"""A decoder layer of Mistral, Mixtral, Llama or Qwen2 with LoRA, as one autograd function that chooses what it saves.

PyTorch's autograd saves the inputs of every operation: 0.143 MiB a token and layer at the 7B shape. This function
saves one of three sets and recomputes the rest from the layer's input (activation checkpointing,
https://arxiv.org/abs/1604.06174, with a choice of what to store); it never recomputes attention (but in "input"), the
last matrix product, or anything that the gradients do not need.

Bytes a token that one layer saves for backward, with s bytes a value (2 in fp16 and bf16), hidden h,
kv = kv_heads × head_dim, intermediate f, heads n; and the share of the layer's matrix products that it recomputes:

    saves          bytes a token                    Mistral 7B, fp16      recomputes
    "input"        s·h                              8,192 = 0.0078 MiB    all but down_proj (73%), and attention
    "attention"    s·2h + 4n                        16,512 = 0.0157 MiB   all but down_proj (73%)
    "everything"   s·(4h + 2kv + 2f) + 4n           94,336 = 0.0900 MiB   none: only norms and SwiGLU products

Offloaded (offload.py), s·h of "input" and "attention" lie in pinned host memory instead, and two layers' worth is on
the GPU too. The MLP goes through MLP_TOKENS tokens at a time, so what is alive beside that, once, is at most

    one dequantized matrix, s·h·f (112 MiB)
    + MLP: min(tokens, MLP_TOKENS) · s·(h + 3f)                       (92 KiB a token, at most 368 MiB)
    + attention: tokens · s·(7h + 2kv) beside queries, keys and values (with the memory-efficient kernel, for which
      keys and values are repeated, s·11h: 88 KiB a token), not at the same time as the MLP's

and before the first layer's turn the last norm, which is transformers' own: tokens · 24h (96 KiB).
Dequantized weights are temporary: made for one matrix product and freed. Adapters stay in fp32 and are cast to the
activations' type a layer at a time.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch.distributed.tensor import DTensor

from helpers.budget.activations import MLP_TOKENS
from helpers.finetune.engine import kernels
from helpers.finetune.engine.mixture import Mixture
from helpers.finetune.engine.offload import Offload
from helpers.models import attention, families
from helpers.models.aqlm import AdditiveLinear

PARTS = {"self_attn", "mlp", "input_layernorm", "post_attention_layernorm"}
"""What a decoder layer of these families is made of."""
SAVED = {"input": (), "attention": ("out",), "everything": ("query", "key", "value", "out", "middle")}
"""What a layer saves for backward beside its input; "everything" has gate and up too."""


@dataclass
class Linear:
    """One frozen matrix (out, in), packed in 4 bits, as codes or dense, with bias and LoRA pair where it has them."""

    weight: torch.Tensor | AdditiveLinear
    bias: torch.Tensor | None
    down: torch.nn.Parameter | None
    """LoRA's A: (rank, in)."""
    up: torch.nn.Parameter | None
    """LoRA's B: (out, rank)."""
    scaling: float
    dequantize: Callable = kernels.dequantize
    module: torch.nn.Module | None = None
    """Where its weights are looked up anew, where they change places."""
    state: Any = None
    """bitsandbytes' QuantState of a packed weight; divided weights are plain tensors, and only the module keeps it."""

    def dense(self, dtype: torch.dtype) -> torch.Tensor:
        """The matrix in dtype: (out, in)."""
        if isinstance(self.weight, AdditiveLinear):
            return self.weight.dense(dtype)
        if self.state is None:
            return self.weight.to(dtype)
        return self.dequantize(self.weight.data.view(torch.uint8), self.state, dtype)

    def look_up(self) -> None:
        """Take the tensors that the module has now."""
        now = linear_of(self.module)
        self.weight, self.bias, self.down, self.up = now.weight, now.bias, now.down, now.up


def linear_of(module: torch.nn.Module) -> Linear:
    """What a projection, wrapped by PEFT or not, computes with."""
    base = module.get_base_layer() if hasattr(module, "get_base_layer") else module
    weight = base if isinstance(base, AdditiveLinear) else base.weight
    from_where = {"module": module, "state": getattr(weight, "quant_state", getattr(base, "quant_state", None))}
    if base is module:  # not a target of LoRA
        return Linear(weight, base.bias, None, None, 1.0, **from_where)
    (name,) = module.active_adapters
    # The parameters themselves, not copies: the optimizer changes them, and the next step reads what it wrote.
    adapters = module.lora_A[name].weight, module.lora_B[name].weight
    return Linear(weight, base.bias, *adapters, float(module.scaling[name]), **from_where)


class Projections:
    """Linear layers that read the same input: q, k and v, or gate and up. Their LoRA inputs are one product."""

    def __init__(self, linears: list[Linear]):
        self.linears = linears
        # A, B, A, B …: the order in which autograd gets the adapters and gives back their gradients.
        self.adapters = [part for linear in linears if linear.down is not None for part in (linear.down, linear.up)]
        self.ranks = [0 if linear.down is None else linear.down.shape[0] for linear in linears]
        self.rank = sum(self.ranks)

    def look_up(self) -> None:
        """Take the tensors that the modules have now."""
        for linear in self.linears:
            linear.look_up()
        self.adapters = [part for one in self.linears if one.down is not None for part in (one.down, one.up)]

    def cast(self, dtype: torch.dtype) -> None:
        """Adapters in the type of the activations, for as long as this layer computes."""
        if self.rank:
            # Every A, one below the other: (all ranks, in); each B by itself: (out, rank).
            self.down = torch.cat(self.adapters[::2]).to(dtype)
            self.ups = [None if linear.up is None else linear.up.detach().to(dtype) for linear in self.linears]

    def release(self) -> None:
        """Forget the cast adapters."""
        self.down, self.ups = None, []

    def lora_inputs(self, x: torch.Tensor) -> list[torch.Tensor | None]:
        """scaling · x Aᵀ for each linear: (tokens, rank), or None without LoRA."""
        if not self.rank:
            return [None] * len(self.linears)
        # (tokens, in) @ (in, all ranks), scaled in place: PEFT's alpha and rank are the same for every target.
        scaling = next(linear.scaling for linear in self.linears if linear.down is not None)
        return self.split((x @ self.down.T).mul_(scaling))

    def split(self, joined: torch.Tensor) -> list[torch.Tensor | None]:
        """(tokens, all ranks) -> one (tokens, rank) for each linear that has LoRA."""
        return [part if rank else None for part, rank in zip(joined.split(self.ranks, dim=-1), self.ranks, strict=True)]

    def forward(self, x: torch.Tensor) -> list[torch.Tensor]:
        """x Wᵀ + bias + scaling · x Aᵀ Bᵀ for each linear. x: (tokens, in) -> (tokens, out) each."""
        results = []
        for place, (linear, inner) in enumerate(zip(self.linears, self.lora_inputs(x), strict=True)):
            result = torch.nn.functional.linear(x, linear.dense(x.dtype), linear.bias)
            if inner is not None:  # (tokens, rank) @ (rank, out), added where the product lies: no second of its size
                result.addmm_(inner, self.ups[place].T)
            results.append(result)
        return results

    def backward(
        self, grads: list[torch.Tensor], x: torch.Tensor, wants_x: bool = True
    ) -> tuple[torch.Tensor | None, list[torch.Tensor]]:
        """Gradient for x and, A then B for each linear that has LoRA, for the adapters.

        Of y = x Wᵀ + s (x Aᵀ) Bᵀ (LoRA, section 4.1, https://arxiv.org/abs/2106.09685) with the gradient g for y:

            for B: gᵀ (s x Aᵀ)        for A: (s g B)ᵀ x        for x: g W + (s g B) A

        W and the bias are frozen: their gradients, in full fine-tuning a third of all products, are never made.
        """
        adapter_grads: list[torch.Tensor] = []
        # s g B of each linear lies beside the others', so that all A's, and x, get theirs from one product.
        inner_grads = torch.empty(x.shape[0], self.rank, dtype=x.dtype, device=x.device) if self.rank else None
        x_grad = None
        inners = self.lora_inputs(x)  # s x Aᵀ again: (tokens, rank) each, cheaper to recompute than to save
        inner_parts = self.split(inner_grads) if self.rank else inners
        up_grads = []
        for place, (linear, grad) in enumerate(zip(self.linears, grads, strict=True)):
            if inners[place] is not None:
                up_grads.append(grad.T @ inners[place])  # (out, tokens) @ (tokens, rank)
                torch.mul(grad @ self.ups[place], linear.scaling, out=inner_parts[place])
            if wants_x:  # not below the first layer, where nothing is trained
                weight = linear.dense(grad.dtype)  # (out, in): dequantized a second time rather than saved
                x_grad = grad @ weight if x_grad is None else x_grad.addmm_(grad, weight)
                del weight
        if self.rank:
            ranks = [rank for rank in self.ranks if rank]
            down_grads = (inner_grads.T @ x).split(ranks)  # (all ranks, tokens) @ (tokens, in)
            adapter_grads = [part for pair in zip(down_grads, up_grads, strict=True) for part in pair]
            if wants_x:
                x_grad.addmm_(inner_grads, self.down)
        return x_grad, adapter_grads


class Layer:
    """One decoder layer: its frozen weights, its adapters, and what it saves for backward."""

    def __init__(self, module: torch.nn.Module, saves: str, offload: Offload | None = None):
        """saves: a key of SAVED."""
        attend, mlp = module.self_attn, module.mlp
        self.mixture = None
        self.qkv = Projections([linear_of(attend.q_proj), linear_of(attend.k_proj), linear_of(attend.v_proj)])
        self.out = Projections([linear_of(attend.o_proj)])
        if hasattr(mlp, "experts"):
            self.mixture = Mixture(mlp.gate, [mlp_of(expert) for expert in mlp.experts])
            mlp_groups = self.mixture.groups
        else:
            mlp_groups = self.gate_up, self.down = mlp_of(mlp)
        # In the order in which a step computes them; adapters and their gradients go through autograd in this order.
        self.groups = [self.qkv, self.out, *mlp_groups]
        self.adapters = [adapter for group in self.groups for adapter in group.adapters]
        self.module = module
        self.norms = norms_of(module)
        self.divided = False
        """Whether its weights are there for its turns only (finetune/sharded.py), and looked up at each."""
        self.head_dim = attend.head_dim
        # None, or how many tokens attention reaches (section 2 of https://arxiv.org/abs/2310.06825)
        self.window = {
            "mistral": getattr(attend.config, "sliding_window", None),
            "mixtral": getattr(attend.config, "sliding_window", None),
            "qwen2": getattr(attend, "sliding_window", None),  # not in every layer
        }.get(attend.config.model_type)
        self.saves, self.offload = saves, offload
        self.wrapped = [part for part in module.modules() if hasattr(part, "disable_adapters")]
        self.active = [list(part.active_adapters) for part in self.wrapped[:1]]

    def look_up(self) -> None:
        """Take the tensors that are there for this turn, where weights are divided among GPUs."""
        if not self.divided:
            return
        for group in self.groups:
            group.look_up()
        self.adapters = [adapter for group in self.groups for adapter in group.adapters]
        self.norms = norms_of(self.module)

    def switched_off(self) -> bool:
        """Whether PEFT was told to compute without the adapters, or with merged ones.

        Raises ValueError where it was told to compute with another adapter, whose weights are not here.
        """
        for part, active in zip(self.wrapped, self.active, strict=False):  # PEFT switches all or none
            if list(part.active_adapters) != active:
                raise ValueError(
                    f"the custom layers compute with adapter {active[0]!r}, and {', '.join(part.active_adapters)!r} is "
                    "active now, as trl's DPOTrainer does for its reference: what it trains would be wrong; use "
                    "method=dpo, which needs no second adapter, or set kernels=plain"
                )
            return part.disable_adapters or part.merged
        return False

    def queries_keys_values(self, normed: torch.Tensor, place: "Place") -> list[torch.Tensor]:
        """Rotated queries and keys, and values: (batch, tokens, heads, head_dim) each."""
        # (tokens, heads · head_dim) -> (tokens, heads, head_dim); keys and values have fewer heads (GQA)
        query, key, value = (part.view(part.shape[0], -1, self.head_dim) for part in self.qkv.forward(normed))
        kernels.rotate_(query, place.cos, place.sin)
        kernels.rotate_(key, place.cos, place.sin)
        # Attention keeps sequences apart; everything else works on the tokens of all of them in one row.
        return [part.view(place.batch, -1, *part.shape[1:]) for part in (query, key, value)]

    def attend(self, x: torch.Tensor, out: torch.Tensor) -> torch.Tensor:
        """x + o_proj(attention's result): (tokens, hidden)."""
        return self.out.forward(out.reshape(x.shape[0], -1))[0].add_(x)

    def forward(self, x: torch.Tensor, place: "Place", save_gates: bool) -> tuple[torch.Tensor, dict[str, Any]]:
        """x: (tokens, hidden) -> the layer's result, and what may be saved for backward; save_gates: gate and up too.

        middle = x + attention(norm(x)); result = middle + mlp(norm(middle)), transformers' order (pre-norm).
        """
        self.cast(x.dtype)
        query, key, value = self.queries_keys_values(kernels.rms_norm(x, *self.norms[0]), place)
        out, stats = attention.forward(query, key, value, place.packing, self.window)
        middle = self.attend(x, out)
        result, gates = self.mlp(middle, save_gates)
        self.release()
        saved = {"query": query, "key": key, "value": value, "out": out, "middle": middle}  # some of it, in the end
        return result, saved | {"stats": stats, "gates": gates}

    def mlp(self, middle: torch.Tensor, save_gates: bool) -> tuple[torch.Tensor, list[torch.Tensor]]:
        """middle + mlp(norm(middle)): (tokens, hidden); and every gate and up, if they are to be saved."""
        if self.mixture:
            return self.mixture.forward(middle, self.norms[1], save_gates)
        # The MLP is the widest place, up to s·3f a token, and its tokens do not see each other: chunk by chunk.
        result, gates = torch.empty_like(middle), []
        for rows in chunks(middle.shape[0]):
            gate, up = self.gate_up.forward(kernels.rms_norm(middle[rows], *self.norms[1]))
            product = kernels.swiglu(gate, up, out=None if save_gates else gate)  # over gate, if nobody wants it
            gates += [gate, up] if save_gates else []
            del gate, up
            torch.add(self.down.forward(product)[0], middle[rows], out=result[rows])
            del product
        return result, gates

    def backward(
        self, grad: torch.Tensor, x: torch.Tensor, saved: dict[str, Any], place: "Place", wants_x: bool
    ) -> tuple[torch.Tensor | None, list[torch.Tensor]]:
        """Gradients for x (tokens, hidden) and, in fp32, for the adapters in their order."""
        self.cast(x.dtype)
        # The forward pass again, as far as it was not saved: the same operations on the same shapes.
        normed = kernels.rms_norm(x, *self.norms[0])
        if "query" in saved:
            query, key, value = saved["query"], saved["key"], saved["value"]
        else:
            query, key, value = self.queries_keys_values(normed, place)
        if "out" in saved:
            out, stats = saved["out"], saved["stats"]
        else:
            out, stats = attention.forward(query, key, value, place.packing, self.window)
        middle = saved["middle"] if "middle" in saved else self.attend(x, out)
        # Then backwards: the MLP, o_proj, attention, q, k and v. What is done with goes at once: each is s·h a token.
        middle_grad, mlp_grads = self.mlp_backward(grad, middle, saved.get("gates", []))
        del middle
        flat = out.reshape(x.shape[0], -1)  # (tokens, heads · head_dim): what o_proj read
        out_grad, out_grads = self.out.backward([middle_grad], flat)
        grads = attention.backward(out_grad.view(out.shape), query, key, value, out, stats, place.packing, self.window)
        del out_grad, query, key, value, out, flat
        # (batch, tokens, heads, head_dim) -> (tokens, heads, head_dim), as the rotation works on it, in place
        grads = [part.contiguous().view(x.shape[0], -1, self.head_dim) for part in grads]
        for part in grads[:2]:  # values are not rotated
            kernels.rotate_(part, place.cos, place.sin, back=True)
        normed_grad, qkv_grads = self.qkv.backward([part.view(x.shape[0], -1) for part in grads], normed, wants_x)
        x_grad = None
        if wants_x:  # the norm's gradient, and that of the residual connection around attention
            x_grad = kernels.rms_norm_backward(normed_grad, x, *self.norms[0], middle_grad, out=torch.empty_like(x))
        self.release()
        # Adapters are fp32, and autograd wants a gradient of the parameter's type to add up over micro-batches.
        return x_grad, in_fp32([*qkv_grads, *out_grads, *mlp_grads])

    def mlp_backward(
        self, grad: torch.Tensor, middle: torch.Tensor, gates: list[torch.Tensor]
    ) -> tuple[torch.Tensor, list[torch.Tensor]]:
        """Gradients for the MLP's input (tokens, hidden), residual included, and for its adapters."""
        if self.mixture:
            return self.mixture.backward(grad, middle, self.norms[1], gates)
        result, total = torch.empty_like(middle), []
        for turn, rows in enumerate(chunks(middle.shape[0])):  # the same chunks as in the forward pass
            normed = kernels.rms_norm(middle[rows], *self.norms[1])
            gate, up = gates[2 * turn : 2 * turn + 2] if gates else self.gate_up.forward(normed)
            # silu(gate)·up is made again for down_proj's A, down_proj's own result for nobody
            product_grad, down_grads = self.down.backward([grad[rows]], kernels.swiglu(gate, up))
            gate, up = kernels.swiglu_backward_(product_grad, gate, up)  # gradients from here on, in their memory
            del product_grad
            normed_grad, gate_up_grads = self.gate_up.backward([gate, up], normed)
            del gate, up, normed
            # grad goes around the MLP through the residual connection, and is added here
            kernels.rms_norm_backward(normed_grad, middle[rows], *self.norms[1], grad[rows], out=result[rows])
            parts = [*gate_up_grads, *down_grads]
            # Gradients of several chunks add up in fp32: in fp16 a sum would round at every chunk, or overflow.
            total = [before + part.float() for before, part in zip(total, parts, strict=True)] if total else parts
        return result, total

    def cast(self, dtype: torch.dtype) -> None:
        """Adapters in the activations' type, while this layer computes."""
        for group in self.groups:
            group.cast(dtype)

    def release(self) -> None:
        """Forget the cast adapters."""
        for group in self.groups:
            group.release()


def norms_of(module: torch.nn.Module) -> list[tuple[torch.Tensor, float]]:
    """(weight, epsilon) of a decoder layer's two norms."""
    return [(norm.weight, norm.variance_epsilon) for norm in (module.input_layernorm, module.post_attention_layernorm)]


def mlp_of(module: torch.nn.Module) -> tuple[Projections, Projections]:
    """(gate and up, down) of a gated MLP, or of one expert."""
    return Projections([linear_of(module.gate_proj), linear_of(module.up_proj)]), Projections(
        [linear_of(module.down_proj)]
    )


def chunks(tokens: int) -> list[slice]:
    """Near-equal runs of at most MLP_TOKENS tokens.

    >>> chunks(5000)
    [slice(0, 2500, None), slice(2500, 5000, None)]
    """
    count = -(-tokens // MLP_TOKENS)
    size = -(-tokens // count)
    return [slice(start, min(start + size, tokens)) for start in range(0, tokens, size)]


def in_fp32(grads: list[torch.Tensor]) -> list[torch.Tensor]:
    """Copies in fp32, made by one fused kernel instead of one each."""
    wide = [torch.empty_like(grad, dtype=torch.float32) for grad in grads]
    if wide:
        torch._foreach_copy_(wide, grads)
    return wide


@dataclass
class Place:
    """Where the tokens stand: shared by all layers of a forward pass."""

    batch: int
    cos: torch.Tensor
    """(rows, head_dim): one row a token, or one a position of each sequence."""
    sin: torch.Tensor
    packing: attention.Packing | None


class LayerFunction(torch.autograd.Function):
    """`Layer` in autograd's terms."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, layer: Layer, place: Place, *adapters: torch.Tensor) -> torch.Tensor:
        # Every type is chosen in Layer: autocast would cast, and save, weights and adapters of its own.
        with torch.autocast(x.device.type, enabled=False):
            result, saved = layer.forward(x.view(-1, x.shape[-1]), place, save_gates=layer.saves == "everything")
        ctx.layer, ctx.place, ctx.shape = layer, place, x.shape
        ctx.names = SAVED[layer.saves]
        ctx.stats = saved["stats"] if "out" in ctx.names else None
        ctx.slot = None
        if layer.offload is not None and layer.saves != "everything":
            ctx.slot = layer.offload.put(x.detach())
        # Tensors go through save_for_backward, which frees them after the backward pass and notices who wrote to them.
        ctx.save_for_backward(
            None if ctx.slot else x, *(saved[name] for name in ctx.names), *(saved["gates"] if ctx.names else ())
        )
        return result.view(x.shape)

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> tuple:
        x, *tensors = ctx.saved_tensors
        saved = dict(zip(ctx.names, tensors, strict=False))
        saved |= {"stats": ctx.stats, "gates": tensors[len(ctx.names) :]}
        if ctx.slot is not None:
            x = ctx.layer.offload.get(ctx.slot)
        ctx.layer.look_up()
        with torch.autocast(grad.device.type, enabled=False):
            x_grad, adapter_grads = ctx.layer.backward(
                grad.reshape(-1, ctx.shape[-1]), x.view(-1, ctx.shape[-1]), saved, ctx.place, ctx.needs_input_grad[0]
            )
        # One for each argument of forward; layer and place have none.
        return None if x_grad is None else x_grad.view(ctx.shape), None, None, *adapter_grads


def check(model: torch.nn.Module) -> None:
    """Raise ValueError when a model that models/families.py gives to these layers is none that they compute.

    That would be a fault of families.py, not of the reader: what it decides from a configuration is held here to the
    modules that are there.
    """
    # PEFT's wrappers in the decoder: what they hold beside A and B (dropout, DoRA) is nothing that Linear computes.
    adapted = [part for name, part in model.named_modules() if ".layers." in name and hasattr(part, "base_layer")]
    dropouts = [dropout for part in adapted for dropout in part.lora_dropout.values()]
    layers = [Layer(layer, "input") for layer in model.model.layers]
    weights = [linear.weight for layer in layers for group in layer.groups for linear in group.linears]
    wrong = {
        "a family of other layers": model.config.model_type not in families.OWN,
        f"attention {model.config._attn_implementation!r}": model.config._attn_implementation != attention.NAME,
        "another activation": any(
            "SiLU" not in type(getattr(part.mlp, "experts", [part.mlp])[0].act_fn).__name__
            for part in model.model.layers
        ),
        "DoRA": any(part.lora_variant for part in adapted),
        "LoRA dropout": any(not isinstance(dropout, torch.nn.Identity) for dropout in dropouts),
        "8-bit weights": any(getattr(weight, "dtype", None) == torch.int8 for weight in weights),
        "more in a layer than two norms, attention and an MLP": any(
            {name for name, _ in part.named_children()} != PARTS or hasattr(part.self_attn, "q_norm")
            for part in model.model.layers
        ),
    }
    for what in (words for words, found in wrong.items() if found):
        raise ValueError(f"the custom layers were chosen for a model that has {what}: set kernels=plain and report it")


def install(model: torch.nn.Module, saves: list[str], offload_bytes: int = 0) -> None:
    """Let the decoder layers of a causal LM train through `LayerFunction`, the i-th saving saves[i] for backward.

    offload_bytes: of host memory, for layers' inputs. Without gradients, or with a key-value cache, layers compute as
    before.
    """
    host = Offload(next(model.parameters()).device, offload_bytes) if offload_bytes else None
    places = Places(host)
    layers = [Layer(module, saved, host) for module, saved in zip(model.model.layers, saves, strict=True)]
    linears = [linear for layer in layers for group in layer.groups for linear in group.linears]
    # Which dequantization gives the right bits on this GPU is asked once, on one matrix, for all.
    packed = [linear for linear in linears if linear.state is not None]
    chosen = kernels.dequantizer(whole(packed[0].weight), packed[0].state) if packed else None
    for linear in packed:
        linear.dequantize = chosen
    for layer in layers:
        layer.divided = any(isinstance(weight, DTensor) for weight in layer.adapters)
    # On the instances: modules, their names and their weights stay transformers' and PEFT's, and so do checkpoints.
    for module, layer in zip(model.model.layers, layers, strict=True):
        module.forward = training_forward(module.forward, layer, places)


def whole(weight: torch.Tensor) -> torch.Tensor:
    """A weight as it was before it was divided among GPUs; all of them ask."""
    return weight.full_tensor() if isinstance(weight, DTensor) else weight


class Places:
    """The `Place` of the forward pass under way, made once for all layers."""

    def __init__(self, offload: Offload | None):
        self.offload, self.cos, self.place = offload, None, None

    def of(self, batch: int, embeddings: tuple[torch.Tensor, torch.Tensor], bounds: Any, longest: Any) -> Place:
        """embeddings: the model's cos and sin, (1 or batch, tokens, head_dim), new ones for every pass."""
        # The first layer of a pass is known by the tensor, not by the tuple: FSDP2's hooks pack a new one a layer.
        if embeddings[0] is not self.cos:
            if self.offload is not None:
                self.offload.begin()
            # (1 or batch, tokens, head_dim) -> (rows, head_dim): token t of the flattened batch takes row t % rows
            cos, sin = (part.reshape(-1, part.shape[-1]).contiguous() for part in embeddings)
            packing = None if bounds is None else attention.Packing(bounds, longest)
            self.cos, self.place = embeddings[0], Place(batch, cos, sin, packing)
        return self.place


def training_forward(original: Callable, layer: Layer, places: Places) -> Callable:
    """A decoder layer's forward through `LayerFunction`; with a cache, a mask or no adapters, the original.

    Training needs none of them: padding is on the right, where causal attention never looks, and packed rows come with
    their bounds. Generation and padded scoring do.
    """

    def forward(
        hidden_states: torch.Tensor,
        attention_mask: torch.Tensor | None = None,
        position_embeddings: tuple[torch.Tensor, torch.Tensor] | None = None,
        past_key_values: Any = None,
        **kwargs: Any,
    ) -> torch.Tensor:
        # asked of every pass that may be training's, also where a mask makes this one transformers' own
        if past_key_values is not None or layer.switched_off() or attention_mask is not None:
            return original(
                hidden_states,
                attention_mask=attention_mask,
                position_embeddings=position_embeddings,
                past_key_values=past_key_values,
                **kwargs,
            )
        batch, tokens, hidden = hidden_states.shape
        place = places.of(batch, position_embeddings, kwargs.get("cu_seq_lens_q"), kwargs.get("max_length_q"))
        layer.look_up()
        # Adapters are arguments, though the layer has them: autograd gives gradients to what it was handed.
        if torch.is_grad_enabled():
            return LayerFunction.apply(hidden_states, layer, place, *layer.adapters)
        with torch.autocast(hidden_states.device.type, enabled=False):
            return layer.forward(hidden_states.reshape(-1, hidden), place, save_gates=False)[0].view(
                batch, tokens, hidden
            )

    return forward
