"""Models on a disk: config.json and safetensors files, read by their headers and written tensor by tensor."""

import hashlib
import json
import math
import os
import struct
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

from helpers.models import aqlm_sizes, wrapped

if TYPE_CHECKING:
    import torch

FLOATS = ("F64", "F32", "F16", "BF16")


class UnusableModel(ValueError):
    """A model or adapter folder that cannot be read, or does not belong to the other."""


@dataclass(frozen=True)
class Stored:
    """A tensor in a safetensors file, before any of it is read."""

    name: str
    file: Path
    shape: tuple[int, ...]
    kind: str
    """As safetensors names dtypes: F16, BF16, F32 …"""
    key: str = ""
    """Its name in the file, where that is another (models/wrapped.py)."""

    @property
    def in_file(self) -> str:
        """Its name in the file."""
        return self.key or self.name

    @property
    def values(self) -> int:
        """How many numbers it holds."""
        return math.prod(self.shape)


def unquantized_config(folder: Path) -> dict:
    """A model's config.json, of one that sees its language model's. Raises UnusableModel without, or when quantized."""
    path = folder / "config.json"
    if not path.is_file():
        raise UnusableModel(f"{folder} is not a model: it has no config.json")
    settings = json.loads(path.read_text(encoding="utf-8"))
    if quantization := settings.get("quantization_config"):
        method = quantization.get("quant_method", "an unknown method")
        if method == aqlm_sizes.NAME:
            raise UnusableModel(f"{folder}: {aqlm_sizes.NO_MERGE}")
        raise UnusableModel(f"{folder} is already quantized ({method}): give the folder of its 16-bit weights")
    return dict(wrapped.text_config(settings))


def read_header(file: Path) -> list[Stored]:
    """The tensors of a safetensors file in the order of their bytes. Raises UnusableModel for one that is not whole."""
    if not file.is_file():
        raise UnusableModel(f"{file} is missing: download or copy the folder again")
    size = file.stat().st_size
    try:
        with file.open("rb") as stream:
            (length,) = struct.unpack("<Q", stream.read(8))
            header = json.loads(stream.read(length)) if length < size else None
        tensors = [(name, about) for name, about in header.items() if name != "__metadata__"]
        end = 8 + length + max((about["data_offsets"][1] for _, about in tensors), default=0)
    except (struct.error, ValueError, AttributeError, TypeError, KeyError):
        raise UnusableModel(f"{file} is not a safetensors file: download or copy it again") from None
    if end != size:
        raise UnusableModel(f"{file} is cut short: it has {size} of {end} bytes, download or copy it again")
    tensors.sort(key=lambda item: item[1]["data_offsets"][0])
    return [Stored(name, file, tuple(about["shape"]), about["dtype"]) for name, about in tensors]


def refuse_missing(folder: Path) -> None:
    """Raise UnusableModel naming the first shard that a folder's index has and the folder has not."""
    index = folder / "model.safetensors.index.json"
    named = set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()) if index.is_file() else set()
    if missing := sorted(name for name in named if not (folder / name).is_file()):
        raise UnusableModel(f"{folder / missing[0]} is missing: download or copy the folder again")


def stored_tensors(folder: Path, freed: list[Stored] = ()) -> list[Stored]:
    """All tensors of a model folder, of one that sees its language model's, shard by shard, held to its index.

    freed: tensors of shards that an interrupted merge has deleted after it was done with them.
    """
    unquantized_config(folder)
    sees = wrapped.is_wrapped(json.loads((folder / "config.json").read_text(encoding="utf-8")))
    index = folder / "model.safetensors.index.json"
    if index.is_file():
        place = json.loads(index.read_text(encoding="utf-8"))["weight_map"]
        if sees:
            place = {name: shard for name, shard in place.items() if wrapped.text_name(name)}
        shards = sorted(set(place.values()))
    else:
        place, shards = None, ["model.safetensors"]
    gone = {tensor.file.name for tensor in freed}
    tensors = [
        tensor
        for shard in shards
        for tensor in (
            [tensor for tensor in freed if tensor.file.name == shard]
            if shard in gone and not (folder / shard).exists()
            else read_header(folder / shard)
        )
    ]
    if sees:
        tensors = [replace(one, name=name, key=one.in_file) for one in tensors if (name := wrapped.text_name(one.name))]
    if place is not None and (wrong := set(place.items()) ^ {(tensor.in_file, tensor.file.name) for tensor in tensors}):
        name, shard = sorted(wrong)[0]
        raise UnusableModel(f"{folder}: its index and its shards disagree about {name} in {shard}, download it again")
    odd = [tensor for tensor in tensors if tensor.kind not in FLOATS]
    if odd:
        raise UnusableModel(
            f"{folder}: {odd[0].name} is {odd[0].kind}, not a float: give the folder of its 16-bit weights"
        )
    return tensors


class SafetensorsWriter:
    """Writes fp16 tensors one after another: safetensors' own writer wants them all in memory at once.

    The format: 8 bytes of header length, the header as JSON, the tensors (https://github.com/huggingface/safetensors).
    The file appears under its name when it is whole and on disk; `sha256` is its checksum then.
    """

    def __init__(self, path: Path, shapes: dict[str, tuple[int, ...]]) -> None:
        self.path, self.sha256, self.digest = path, "", hashlib.sha256()
        header: dict = {"__metadata__": {"format": "pt"}}
        end = 0
        for name, shape in shapes.items():
            start, end = end, end + 2 * math.prod(shape)
            header[name] = {"dtype": "F16", "shape": list(shape), "data_offsets": [start, end]}
        text = json.dumps(header, separators=(",", ":")).encode()
        text += b" " * (-len(text) % 8)
        self.stream = path.with_name(path.name + ".tmp").open("wb")
        self.write(struct.pack("<Q", len(text)) + text)

    def write(self, data: bytes | memoryview) -> None:
        """Append bytes to file and checksum."""
        self.stream.write(data)
        self.digest.update(data)

    def add(self, tensor: "torch.Tensor") -> None:
        """Append the next tensor of the header: fp16, contiguous, on the CPU."""
        self.write(tensor.numpy().reshape(-1).data.cast("B"))

    def __enter__(self) -> "SafetensorsWriter":
        return self

    def __exit__(self, kind, *_) -> None:
        with self.stream as stream:
            stream.flush()
            os.fsync(stream.fileno())
        if kind is None:
            Path(self.stream.name).replace(self.path)
            self.sha256 = self.digest.hexdigest()


def for_all_readers(settings: dict) -> dict:
    """config.json of an fp16 model that transformers 4 reads as transformers 5 does, and so AutoGPTQ and vLLM.

    transformers 5 keeps the base of the rotary embedding inside rope_parameters; version 4 looks for rope_theta, finds
    none and silently computes with 10,000.

    >>> for_all_readers({"rope_parameters": {"rope_theta": 1e6, "rope_type": "default"}})["rope_theta"]
    1000000.0
    """
    rope = settings.get("rope_parameters") or {}
    older = {"rope_theta": rope["rope_theta"]} if "rope_theta" in rope else {}
    if rope.get("rope_type", "default") != "default":
        older["rope_scaling"] = {name: value for name, value in rope.items() if name != "rope_theta"}
    return older | settings | {"dtype": "float16", "torch_dtype": "float16"}
