"""A model whose widths are no multiples of 256, the same numbers everywhere: what falls back to other types in a file.

Rows of 320 and 672 values fall back to types in blocks of 32; rows of 512 are whole blocks of 256.
"""

import json
import shutil
from pathlib import Path

import numpy as np
from safetensors.numpy import save_file

from helpers.models import TINY

HIDDEN, INNER, HEADS, KV_HEADS, HEAD_DIM, LAYERS, WORDS = 320, 672, 8, 2, 64, 8, 2048


def write(folder: Path) -> Path:
    """A mistral folder in fp16 with the tiny model's tokenizer."""
    folder.mkdir(parents=True)
    rng = np.random.default_rng(2026)
    queries, keys = HEADS * HEAD_DIM, KV_HEADS * HEAD_DIM
    shapes = {
        "self_attn.q_proj": (queries, HIDDEN), "self_attn.k_proj": (keys, HIDDEN), "self_attn.v_proj": (keys, HIDDEN),
        "self_attn.o_proj": (HIDDEN, queries), "mlp.gate_proj": (INNER, HIDDEN), "mlp.up_proj": (INNER, HIDDEN),
        "mlp.down_proj": (HIDDEN, INNER),
    }  # fmt: skip
    tensors = {"model.embed_tokens": (WORDS, HIDDEN), "lm_head": (WORDS, HIDDEN)}
    norms = ["model.norm"]
    for layer in range(LAYERS):
        tensors |= {f"model.layers.{layer}.{name}": shape for name, shape in shapes.items()}
        norms += [f"model.layers.{layer}.{name}" for name in ("input_layernorm", "post_attention_layernorm")]
    weights = {f"{name}.weight": rng.integers(-999, 999, shape) / 2**15 for name, shape in tensors.items()}
    weights |= {f"{name}.weight": 1 + rng.integers(-99, 99, HIDDEN) / 2**10 for name in norms}
    save_file({name: values.astype(np.float16) for name, values in weights.items()}, folder / "model.safetensors")
    settings = json.loads((TINY / "config.json").read_text(encoding="utf-8")) | {
        "hidden_size": HIDDEN, "intermediate_size": INNER, "num_attention_heads": HEADS, "head_dim": HEAD_DIM,
        "num_key_value_heads": KV_HEADS, "num_hidden_layers": LAYERS, "vocab_size": WORDS,
    }  # fmt: skip
    (folder / "config.json").write_text(json.dumps(settings), encoding="utf-8")
    for name in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja"):
        shutil.copyfile(TINY / name, folder / name)
    return folder
