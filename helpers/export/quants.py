"""Blocks of llama.cpp's types, made by llama.cpp's own code: `ggml_quantize_chunk`, from the wheel of xllamacpp.

>>> import numpy as np
>>> rows = np.linspace(-1, 1, 512, dtype=np.float32).reshape(2, 256)
>>> quantize(rows, "Q6_K").shape
(2, 210)
"""

import ctypes
from concurrent.futures import ThreadPoolExecutor
from functools import cache

import numpy as np
from gguf import GGMLQuantizationType
from gguf.quants import dequantize

from helpers.models.gguf_types import row_bytes

RAMP = np.linspace(-1, 1, 256, dtype=np.float32)
"""What the library is tried on before it is believed."""
ERRORS = {"Q8_0": 0.005, "Q6_K": 0.05, "Q4_K": 0.08}
"""The most by which a type may miss a value of the ramp: its step, and the search for it."""


def number(kind: str) -> int:
    """llama.cpp's number of a tensor's type."""
    return int(GGMLQuantizationType[kind])


def quantize(rows: np.ndarray, kind: str, importance: np.ndarray | None = None) -> np.ndarray:
    """rows: (rows, columns) of any float -> (rows, bytes of a row), uint8.

    importance: (columns,) mean square of the inputs that meet each column, or None. Raises RuntimeError when the
    library does not give what its own format says.
    """
    if kind in ("F16", "F32"):
        return np.ascontiguousarray(rows, np.float16 if kind == "F16" else np.float32).view(np.uint8)
    values = np.ascontiguousarray(rows, np.float32)
    blocks = np.empty((len(values), row_bytes(values.shape[1], kind)), np.uint8)
    weights = None if importance is None else np.ascontiguousarray(importance, np.float32)
    written = library().ggml_quantize_chunk(
        number(kind), values.ctypes.data, blocks.ctypes.data, 0, len(values), values.shape[1],
        None if weights is None else weights.ctypes.data,
    )  # fmt: skip
    if written != blocks.nbytes:
        raise RuntimeError(f"llama.cpp wrote {written} bytes of {kind} and not {blocks.nbytes}")
    return blocks


def quantize_in_threads(
    pool: ThreadPoolExecutor, rows: np.ndarray, kind: str, importance: np.ndarray | None = None
) -> np.ndarray:
    """`quantize` with the rows dealt to a pool's threads: ctypes lets go of Python's lock while llama.cpp computes."""
    library()
    start(kind)
    parts = np.array_split(rows, min(pool._max_workers, len(rows)))
    return np.concatenate(list(pool.map(lambda part: quantize(part, kind, importance), parts)))


@cache
def library() -> ctypes.CDLL:
    """llama.cpp's own library inside the wheel of xllamacpp, checked on a block whose result is known.

    Its C functions are exported by accident, not by promise: so the version is pinned, and a library that does not
    quantize a ramp to within its type's step is refused. Raises ValueError with the line that installs it.
    """
    try:
        from xllamacpp import xllamacpp
    except ImportError:
        raise ValueError("GGUF needs the package xllamacpp: pip install --no-deps -r requirements/gguf.txt") from None
    found = ctypes.CDLL(xllamacpp.__file__)
    try:
        found.ggml_quantize_chunk.restype = ctypes.c_size_t
        found.ggml_quantize_chunk.argtypes = [
            ctypes.c_int, ctypes.c_void_p, ctypes.c_void_p, ctypes.c_int64, ctypes.c_int64, ctypes.c_int64,
            ctypes.c_void_p,
        ]  # fmt: skip
        found.ggml_quantize_init.argtypes = [ctypes.c_int]
    except AttributeError as error:
        raise ValueError(
            f"this xllamacpp does not carry {error}: install the version of requirements/gguf.txt"
        ) from None
    for kind, error in ERRORS.items():
        blocks = np.empty(row_bytes(len(RAMP), kind), np.uint8)
        found.ggml_quantize_init(number(kind))
        found.ggml_quantize_chunk(number(kind), RAMP.ctypes.data, blocks.ctypes.data, 0, 1, len(RAMP), None)
        off = np.abs(dequantize(blocks[None], GGMLQuantizationType[kind])[0] - RAMP).max()
        if not off < error:
            raise ValueError(
                f"this xllamacpp quantizes a ramp to {kind} with an error of {off:.3f} and not below {error}: "
                "install the version of requirements/gguf.txt"
            )
    return found


@cache
def start(kind: str) -> None:
    """Build a type's tables, once and before threads use them (the IQ types' take up to 5 s)."""
    library().ggml_quantize_init(number(kind))
