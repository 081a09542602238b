"""Types of weights in a GGUF file: which tensor gets which, and its bytes; plain arithmetic, for export and budget.

A file type such as Q4_K_M is a recipe: most matrices take its base type, those that matter most take more bits.
`recipe` follows llama.cpp's `llama_tensor_get_type` (src/llama-quant.cpp) for dense models, to the letter.

>>> recipe("blk.0.ffn_down.weight", 14336, file_type("q4_k_m"), layers=32, grouping=4)
'Q6_K'
>>> row_bytes(4096, "Q4_K")
2304
"""

from dataclasses import dataclass

BLOCKS = {
    "F32": (1, 4),
    "F16": (1, 2),
    "Q8_0": (32, 34),
    "Q5_1": (32, 24),
    "Q5_0": (32, 22),
    "Q4_0": (32, 18),
    "IQ4_NL": (32, 18),
    "Q6_K": (256, 210),
    "Q5_K": (256, 176),
    "Q4_K": (256, 144),
    "IQ4_XS": (256, 136),
    "Q3_K": (256, 110),
    "IQ3_S": (256, 110),
    "Q2_K": (256, 84),
    "IQ2_XXS": (256, 66),
}
"""Type of a tensor -> (values, bytes) of one of its blocks; `gguf.GGML_QUANT_SIZES` says the same (a test holds it)."""
FALLBACK = {
    "Q6_K": "Q8_0",
    "Q5_K": "Q5_1",
    "Q4_K": "Q5_0",
    "Q3_K": "Q4_0",
    "Q2_K": "Q4_0",
    "IQ4_XS": "IQ4_NL",
    "IQ3_S": "IQ4_NL",
    "IQ2_XXS": "IQ4_NL",
}
"""What llama.cpp takes where a row is no whole number of blocks of 256: a type in blocks of 32."""


@dataclass(frozen=True)
class FileType:
    """A recipe: its name, the type that most matrices take, and the number that a file's header carries."""

    name: str
    base: str
    number: int
    """llama.cpp's LLAMA_FTYPE_MOSTLY_…"""
    needs_importance: bool = False
    """Types of 2 bits choose their grid by an importance matrix; llama.cpp refuses them without one."""


FILE_TYPES = {
    found.name.lower(): found
    for found in (
        FileType("F16", "F16", 1),
        FileType("Q8_0", "Q8_0", 7),
        FileType("Q6_K", "Q6_K", 18),
        FileType("Q5_K_M", "Q5_K", 17),
        FileType("Q4_K_M", "Q4_K", 15),
        FileType("Q3_K_M", "Q3_K", 12),
        FileType("IQ4_XS", "IQ4_XS", 30),
        FileType("IQ3_S", "IQ3_S", 26),
        FileType("IQ2_XXS", "IQ2_XXS", 19, needs_importance=True),
    )
}


def file_type(name: str) -> FileType:
    """The recipe of that name, in any case. Raises ValueError listing the names."""
    if name.lower() not in FILE_TYPES:
        raise ValueError(f"type must be one of {', '.join(FILE_TYPES)}, not {name!r}")
    return FILE_TYPES[name.lower()]


def recipe(name: str, columns: int, file: FileType, layers: int, grouping: int, importance: bool = False) -> str:
    """The type of a matrix; norms, which are vectors, stay F32.

    name: as GGUF names it, such as blk.0.attn_v.weight. columns: values a row. layers: decoder layers of the model.
    grouping: query heads that share a key-value head. importance: whether an importance matrix is at hand.
    """
    kind = preferred(name, columns, file, layers, grouping, importance)
    if columns % BLOCKS[kind][0]:
        kind = FALLBACK.get(kind, "F16")
    return "F16" if columns % BLOCKS[kind][0] else kind


def preferred(name: str, columns: int, file: FileType, layers: int, grouping: int, importance: bool) -> str:
    """The type that the recipe gives a matrix whose rows are whole blocks."""
    part = name.removesuffix(".weight").rsplit(".", 1)[-1]
    layer = int(name.split(".")[1]) if name.startswith("blk.") else 0
    if file.name in ("F16", "Q8_0"):
        return file.base
    if part == "output":  # the head: the one matrix whose errors nothing after it can mend
        if columns % BLOCKS[file.base][0]:
            return "Q8_0"
        return "Q5_K" if file.name == "IQ2_XXS" else "Q6_K"
    shared = grouping >= 4  # keys and values that four query heads read are few, and cheap to keep well
    more = "Q6_K" if more_bits(layer, layers) else file.base
    exceptions = {
        "Q5_K_M": {"attn_v": more, "ffn_down": more},
        "Q4_K_M": {"attn_v": more, "ffn_down": more},
        "Q3_K_M": {
            "attn_v": "Q5_K" if layer < 2 else "Q4_K",
            "ffn_down": "Q5_K" if layer < layers // 16 else "Q4_K",
            "attn_output": "Q4_K",
        },
        "IQ4_XS": {
            "attn_v": "Q5_K" if shared else file.base,
            "ffn_down": "Q5_K" if layer < layers // 8 and not importance else file.base,
        },
        "IQ3_S": {"attn_v": "Q4_K" if shared else file.base},
        "IQ2_XXS": {
            "token_embd": "Q2_K",
            "attn_v": "Q4_K" if shared else "Q2_K",
            "ffn_down": "Q2_K" if layer < layers // 8 else file.base,
        },
    }
    return exceptions.get(file.name, {}).get(part, file.base)


def more_bits(layer: int, layers: int) -> bool:
    """llama.cpp's use_more_bits: the first and the last eighth of the layers, and each third one between."""
    return layer < layers // 8 or layer >= 7 * layers // 8 or (layer - layers // 8) % 3 == 2


def row_bytes(columns: int, kind: str) -> int:
    """Bytes of a row of so many values."""
    values, size = BLOCKS[kind]
    return columns // values * size
