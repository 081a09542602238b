"""Bytes of a GGUF file, from a model's shape and a type alone: for budgets, before there is a file. No torch.

>>> from helpers.models import shape
>>> file_bytes(shape("mistral-7b-v0.3"), file_type("q4_k_m")) // 10**6
4372
"""

from collections.abc import Iterable

from helpers.models import ModelShape
from helpers.models.gguf_types import FileType, file_type, recipe, row_bytes

MODEL_TYPES = ("mistral", "llama")
ALIGNMENT = 32
"""Of tensors in a file, in bytes."""
PIECE_VALUES = 2**24
"""Weights that models/packed.py dequantizes at once."""
DEQUANTIZING_BYTES = 20
"""What PyTorch's steps hold of each of them: fields and scales in 32 bits, their product, the result."""


def refuse_family(name: str, model_type: str | None) -> None:
    """Raise ValueError for a family whose layers llama.cpp's architecture llama does not have."""
    if model_type not in MODEL_TYPES:
        raise ValueError(
            f"{name} is a {model_type} model, and {' and '.join(MODEL_TYPES)} are written here: convert it with "
            "llama.cpp's convert_hf_to_gguf.py"
        )


def matrices(shape: ModelShape) -> Iterable[tuple[str, int, int]]:
    """(GGUF name, rows, columns) of every matrix."""
    yield "token_embd.weight", shape.vocab, shape.hidden
    for layer in range(shape.layers):
        for linear, part in PARTS.items():
            inputs, outputs = shape.linears[linear]
            yield f"blk.{layer}.{part}.weight", outputs, inputs
    if not shape.tied:
        yield "output.weight", shape.vocab, shape.hidden


PARTS = {
    "q_proj": "attn_q", "k_proj": "attn_k", "v_proj": "attn_v", "o_proj": "attn_output",
    "gate_proj": "ffn_gate", "up_proj": "ffn_up", "down_proj": "ffn_down",
}  # fmt: skip
"""transformers' linear layers -> GGUF's."""


def kinds(shape: ModelShape, file: FileType, importance: bool = False) -> Iterable[tuple[str, int, int]]:
    """(type, rows, columns) of every matrix of a file."""
    grouping = shape.heads // shape.kv_heads
    for name, rows, columns in matrices(shape):
        yield recipe(name, columns, file, shape.layers, grouping, importance), rows, columns


def weight_bytes(shape: ModelShape, file: FileType, importance: bool = False) -> int:
    """Bytes of all weights, each tensor filled up to the file's alignment; norms are fp32."""
    found = sum(aligned(rows * row_bytes(columns, kind)) for kind, rows, columns in kinds(shape, file, importance))
    return found + (2 * shape.layers + 1) * aligned(4 * shape.hidden)


def aligned(size: int) -> int:
    """The next multiple of the alignment."""
    return size + -size % ALIGNMENT


def header_bytes(shape: ModelShape) -> int:
    """Bytes before the weights, roughly: a word takes 22 (Mistral's, with score and kind), a tensor some 70.

    `export.gguf_file.sizes` has it to the byte, from a model's folder.
    """
    return aligned(22 * shape.vocab + 70 * (9 * shape.layers + 3) + 3000)


def file_bytes(shape: ModelShape, file: FileType, importance: bool = False) -> int:
    """Bytes of a GGUF file."""
    return weight_bytes(shape, file, importance) + header_bytes(shape)


def dequantizing_bytes(shape: ModelShape) -> int:
    """Bytes of the work that PyTorch does on the weights of the largest matrix, or as many as are taken at once."""
    largest = max(rows * columns for _, rows, columns in matrices(shape))
    return DEQUANTIZING_BYTES * min(largest, PIECE_VALUES)


def default_bytes(shape: ModelShape) -> int:
    """Bytes of the weights of a file that is not there yet: what most people take, Q4_K_M."""
    return weight_bytes(shape, file_type("q4_k_m"))
