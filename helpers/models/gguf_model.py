"""A GGUF file opened as a transformers model whose matrices stay in llama.cpp's blocks (models/packed.py).

transformers dequantizes such a file whole when it opens it: 14.5 GB for a 7B. Here Q4_K_M of a 7B takes 4.1 GiB.
The file says the shape; its tokens come from the tokenizer of the model that was exported, which made them.
"""

from pathlib import Path

import numpy as np
import torch

from helpers.models import gguf_header
from helpers.models.packed import PackedEmbedding, PackedLinear, dequantize

MODULES = {
    "token_embd": "model.embed_tokens",
    "output_norm": "model.norm",
    "output": "lm_head",
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}
"""GGUF's name of a tensor -> transformers' module."""


def load(file: Path, dtype: torch.dtype, device: str, attention: str) -> torch.nn.Module:
    """The model of a GGUF file on a device, computing in dtype. Raises ValueError for a file that is cut short."""
    from accelerate import init_empty_weights
    from transformers import AutoModelForCausalLM, LlamaConfig

    reader = gguf_header.reader(file)
    config = LlamaConfig(**gguf_header.settings(reader, file))
    with init_empty_weights():
        model = AutoModelForCausalLM.from_config(config, dtype=dtype, attn_implementation=attention)
    heads = {"attn_q": config.num_attention_heads, "attn_k": config.num_key_value_heads}
    for tensor in reader.tensors:
        name = tensor.name.removesuffix(".weight")
        part = name.rsplit(".", 1)[-1]
        if part not in MODULES:
            raise ValueError(f"{file} has a tensor {tensor.name}, which this model has no place for")
        layer = f"model.layers.{name.split('.')[1]}." if name.startswith("blk.") else ""
        blocks, kind = np.array(tensor.data), tensor.tensor_type.name
        if blocks.ndim == 2:
            blocks = blocks.view(np.uint8).reshape(len(blocks), -1)
        if part in heads:
            blocks = unturned(blocks, heads[part])
        place(model, layer + MODULES[part], torch.from_numpy(blocks), kind, dtype, device)
    if config.tie_word_embeddings:
        packed = model.model.embed_tokens
        model.lm_head = PackedLinear(packed.packed, packed.kind)
    model.model.rotary_emb = type(model.model.rotary_emb)(config).to(device)  # its table is computed, not stored
    return model.eval()


def place(model: torch.nn.Module, path: str, values: torch.Tensor, kind: str, dtype: torch.dtype, device: str) -> None:
    """Put a tensor where its module is: blocks into packed layers, vectors as they are."""
    parent, _, leaf = path.rpartition(".")
    owner = model.get_submodule(parent)
    values = values.to(device)
    if values.dim() == 1:
        getattr(owner, leaf).weight = torch.nn.Parameter(values.to(dtype), requires_grad=False)
    elif leaf == "embed_tokens":
        setattr(owner, leaf, PackedEmbedding(values, kind, dtype))
    elif kind in ("F16", "F32"):
        weight = torch.nn.Parameter(dequantize(values, kind).to(dtype), requires_grad=False)
        getattr(owner, leaf).weight = weight
    else:
        setattr(owner, leaf, PackedLinear(values, kind))


def unturned(rows: np.ndarray, heads: int) -> np.ndarray:
    """Rows of q_proj or k_proj in transformers' order again: halves of a head, not neighbours. Rows are whole blocks.

    >>> unturned(np.array([[0], [2], [1], [3]]), heads=1)[:, 0]
    array([0, 1, 2, 3])
    """
    return rows.reshape(heads, len(rows) // heads // 2, 2, -1).swapaxes(1, 2).reshape(rows.shape)
