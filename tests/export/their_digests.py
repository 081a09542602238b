"""What llama.cpp's own `llama_model_quantize` writes, as digests: makes gguf_digests.json anew.

    pip install cyllama==0.2.18 --target DIR && PYTHONPATH=DIR python tests/export/their_digests.py

Of the tiny model and of odd_shape.py's, from an F16 file, in every type: as it is, and weighed by an importance matrix.
The binding has no way to give one, so it is written where C has its pointer: 24 bytes into the parameters.
"""

import ctypes
import hashlib
import json
import tempfile
from collections.abc import Mapping
from pathlib import Path

import gguf
import numpy as np
import odd_shape

from helpers.export import gguf_file
from helpers.models import TINY, gguf_types

DIGESTS = Path(__file__).with_name("gguf_digests.json")
IMPORTANCE_AT = 24
"""Bytes before the pointer: four numbers of 32 bits, six flags and their padding (llama.h)."""


class Row(ctypes.Structure):
    """llama_model_imatrix_data of llama.h; a list of them ends with one without a name."""

    _fields_ = (("name", ctypes.c_char_p), ("data", ctypes.POINTER(ctypes.c_float)), ("size", ctypes.c_size_t))


def digest(file: Path) -> str:
    """SHA-256 of types and bytes of all tensors, by name."""
    found = hashlib.sha256()
    for tensor in sorted(gguf.GGUFReader(file).tensors, key=lambda tensor: tensor.name):
        found.update(f"{tensor.name} {tensor.tensor_type.name} ".encode() + tensor.data.tobytes())
    return found.hexdigest()


def importance(folder: Path) -> dict[str, np.ndarray]:
    """An importance matrix of a model in numbers that are the same everywhere, by GGUF name: (columns,) each."""
    tensors = gguf_file.tensors_of(folder, gguf_file.settings_of(folder))
    layers = (tensor for tensor in tensors if tensor.name.startswith("blk.") and len(tensor.shape) == 2)
    return {tensor.name: (1 + np.arange(tensor.columns) % 7).astype(np.float32) for tensor in layers}


def theirs(source: Path, output: Path, number: int, weights: Mapping[str, np.ndarray]) -> str:
    """Have llama.cpp quantize a file; returns the digest of what it wrote."""
    from cyllama.llama import llama_cpp

    asked = llama_cpp.LlamaModelQuantizeParams()
    asked.ftype, asked.nthread = number, 1
    pointer = ctypes.POINTER(ctypes.c_float)
    rows = [Row(name.encode(), values.ctypes.data_as(pointer), values.size) for name, values in weights.items()]
    listed = (Row * (len(rows) + 1))(*rows)
    if rows:
        words = (ctypes.c_int32 * (type(asked).__basicsize__ // 4)).from_address(id(asked))
        (first,) = (at for at in range(len(words) - 1) if list(words[at : at + 2]) == [1, number])
        place = id(asked) + 4 * first + IMPORTANCE_AT
        ctypes.c_void_p.from_address(place).value = ctypes.addressof(listed)
    llama_cpp.model_quantize(str(source), str(output), asked)
    return digest(output)


def main() -> None:
    """Write gguf_digests.json: model, with " weighed" behind it where it was, -> type -> digest."""
    found: dict[str, dict[str, str]] = {}
    with tempfile.TemporaryDirectory() as scratch:
        folders = {"tiny": TINY, "odd": odd_shape.write(Path(scratch) / "odd")}
        for name, folder in folders.items():
            whole = Path(scratch) / f"{name}.gguf"
            gguf_file.write(folder, {whole: gguf_types.file_type("f16")})
            found[name] = {"f16": digest(whole)}
            found[f"{name} weighed"] = {}
            for kind, file in gguf_types.FILE_TYPES.items():
                output = Path(scratch) / f"{name}-{kind}.gguf"
                if kind != "f16":
                    weighed = theirs(whole, output, file.number, importance(folder))
                    found[f"{name} weighed"][kind] = weighed
                if kind != "f16" and not file.needs_importance:
                    found[name][kind] = theirs(whole, output, file.number, {})
    DIGESTS.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
