"""A model folder into GGUF files, tensor by tensor and in pieces of rows: no 16-bit file between, little memory.

Each piece is read once from its safetensors shard, and written in every type that was asked for. Names and metadata
are llama.cpp's for the architecture llama, which Mistral is there; rows of q_proj and k_proj change places, because
llama.cpp rotates neighbouring values where transformers rotates halves.
"""

import io
import json
import os
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
from gguf import MODEL_ARCH, GGMLQuantizationType, GGUFWriter, get_tensor_name_map
from gguf.gguf_writer import WriterState
from safetensors import SafetensorError, safe_open

from helpers.export import quants, vocabulary
from helpers.models.gguf_sizes import ALIGNMENT, aligned, refuse_family
from helpers.models.gguf_types import FileType, recipe, row_bytes
from helpers.workspace.files import set_aside

PIECE_VALUES = 2**22
"""Numbers read at once: 16 MiB in fp32, and as much again for each thread."""


@dataclass(frozen=True)
class Tensor:
    """A tensor of the folder, as it will stand in the file."""

    name: str
    """GGUF's."""
    source: str
    """safetensors'."""
    shard: Path
    shape: tuple[int, ...]
    heads: int = 0
    """Heads whose rows change places; 0: rows stay."""

    @property
    def columns(self) -> int:
        """Values a row."""
        return self.shape[-1]


def settings_of(folder: Path) -> dict[str, Any]:
    """config.json of a model that can be exported. Raises ValueError in one sentence for any other."""
    path = Path(folder) / "config.json"
    if not path.is_file():
        raise ValueError(f"{folder} is no model folder: it has no config.json")
    found = json.loads(path.read_text(encoding="utf-8"))
    if quantization := found.get("quantization_config"):
        method = quantization.get("quant_method", "an unknown method")
        raise ValueError(f"{folder} is already quantized ({method}): export the merged model in 16 bits")
    refuse_family(str(folder), found.get("model_type"))
    scaling = (found.get("rope_parameters") or found.get("rope_scaling") or {}).get("rope_type", "default")
    if scaling != "default" or found.get("attention_bias") or found.get("mlp_bias"):
        odd = f"rope_type {scaling}" if scaling != "default" else "biases"
        raise ValueError(f"{folder} has {odd}, which is not written here: use llama.cpp's convert_hf_to_gguf.py")
    return found


def tensors_of(folder: Path, settings: dict[str, Any]) -> list[Tensor]:
    """Every tensor in the order of the layers. Raises ValueError for a missing shard or a tensor without a place."""
    folder, layers = Path(folder), settings["num_hidden_layers"]
    index = folder / "model.safetensors.index.json"
    if index.is_file():
        names = sorted(set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()))
    else:
        names = ["model.safetensors"]
    places = get_tensor_name_map(MODEL_ARCH.LLAMA, layers)
    heads = settings["num_attention_heads"]
    turned = {"attn_q": heads, "attn_k": settings.get("num_key_value_heads") or heads}
    found: dict[str, Tensor] = {}
    for shard in (folder / name for name in names):
        if not shard.is_file():
            raise ValueError(f"{shard} is missing: download or copy the folder again")
        try:
            with safe_open(str(shard), framework="pt") as stored:
                shapes = {name: tuple(stored.get_slice(name).get_shape()) for name in stored.keys()}  # noqa: SIM118
        except SafetensorError as error:
            raise ValueError(f"{shard} is not whole ({error}): download or copy it again") from None
        for source, shape in shapes.items():
            name = places.get_name(source, try_suffixes=(".weight",))
            if name is None:
                raise ValueError(f"{folder} has a tensor {source}, which has no place in a llama file")
            part = name.removesuffix(".weight").rsplit(".", 1)[-1]
            found[name] = Tensor(name, source, shard, shape, turned.get(part, 0))
    if settings.get("tie_word_embeddings"):
        found.pop("output.weight", None)
    elif "output.weight" not in found:
        raise ValueError(f"{folder} has no lm_head.weight and its config.json does not tie it to the embedding")
    return sorted(found.values(), key=lambda tensor: place(tensor.name))


def place(name: str) -> tuple:
    """Sorts tensors as layers follow each other: embedding, blocks, last norm, head."""
    if name.startswith("blk."):
        return 1, int(name.split(".")[1]), name
    return (0, 0, name) if name.startswith("token_embd") else (2, 0, name)


def kind_of(tensor: Tensor, file: FileType, settings: dict[str, Any], importance: bool) -> str:
    """The type that a tensor takes in a file; vectors, which are norms, stay F32."""
    if len(tensor.shape) == 1:
        return "F32"
    heads = settings["num_attention_heads"]
    grouping = heads // (settings.get("num_key_value_heads") or heads)
    return recipe(tensor.name, tensor.columns, file, settings["num_hidden_layers"], grouping, importance)


def size_of(tensor: Tensor, kind: str) -> int:
    """Bytes of a tensor in a type, without the padding behind it."""
    rows = tensor.shape[0] if len(tensor.shape) == 2 else 1
    return rows * row_bytes(tensor.columns, kind)


def header(
    name: str, settings: dict[str, Any], words: vocabulary.Vocabulary, tensors: list[Tensor],
    file: FileType, importance: bool,
) -> GGUFWriter:  # fmt: skip
    """A writer with everything that stands before the weights, nothing written yet."""
    writer = GGUFWriter(None, "llama")
    writer.add_name(name)
    writer.add_block_count(settings["num_hidden_layers"])
    writer.add_context_length(settings["max_position_embeddings"])
    writer.add_embedding_length(settings["hidden_size"])
    writer.add_feed_forward_length(settings["intermediate_size"])
    heads = settings["num_attention_heads"]
    writer.add_head_count(heads)
    writer.add_head_count_kv(settings.get("num_key_value_heads") or heads)
    head_dim = settings.get("head_dim") or settings["hidden_size"] // heads
    writer.add_key_length(head_dim)
    writer.add_value_length(head_dim)
    writer.add_rope_dimension_count(head_dim)
    rope = settings.get("rope_parameters") or settings
    writer.add_rope_freq_base(float(rope.get("rope_theta", 10000.0)))
    writer.add_layer_norm_rms_eps(settings["rms_norm_eps"])
    writer.add_vocab_size(settings["vocab_size"])
    writer.add_file_type(file.number)
    writer.add_quantization_version(2)
    vocabulary.add_to(writer, words)
    for tensor in tensors:
        kind = kind_of(tensor, file, settings, importance)
        writer.add_tensor_info(
            tensor.name, tensor.shape, np.dtype(np.float32), size_of(tensor, kind),
            raw_dtype=GGMLQuantizationType[kind],
        )  # fmt: skip
    return writer


def write(
    folder: Path,
    outputs: dict[Path, FileType],
    importance: dict[str, np.ndarray] | None = None,
    threads: int = 2,
    progress: Callable[[int], None] = lambda values: None,
    check: Callable[[Path], None] = lambda file: None,
    name: str | None = None,
) -> dict[Path, int]:
    """Write a model folder as GGUF files, one pass over its shards for all; returns each file's bytes.

    outputs: file -> its type. importance: GGUF name of a matrix -> (columns,), where types need or may use one.
    Each file is written as <name>.partial, given to `check` once (all of them hold the same tokens) and renamed.
    name: of the model, in the header; default the folder's. Raises ValueError before anything is written, for a folder
    that cannot be exported.
    """
    folder = Path(folder)
    settings = settings_of(folder)
    tensors = tensors_of(folder, settings)
    words = vocabulary.read(folder, settings["vocab_size"])
    kinds = {
        path: {tensor.name: kind_of(tensor, file, settings, importance is not None) for tensor in tensors}
        for path, file in outputs.items()
    }
    for file in outputs.values():
        if file.needs_importance and importance is None:
            raise ValueError(f"{file.name} needs an importance matrix: collect one, or choose a larger type")
    writers = {
        path: header(name or folder.name, settings, words, tensors, file, importance is not None)
        for path, file in outputs.items()
    }
    with ThreadPoolExecutor(threads) as pool, writing(writers, check) as streams:
        for tensor in tensors:
            for rows in pieces(tensor):
                for path, stream in streams.items():
                    weights = (importance or {}).get(tensor.name)
                    kind = kinds[path][tensor.name]
                    stream.write(quants.quantize_in_threads(pool, rows, kind, weights).tobytes())
                progress(rows.size)
            for stream in streams.values():
                pad(stream)
    return {path: path.stat().st_size for path in outputs}


def sizes(
    folder: Path, outputs: dict[Path, FileType], importance: bool = False, name: str | None = None
) -> dict[Path, int]:
    """Bytes that each file will have, to the byte, nothing written; arguments and errors as of `write`."""
    folder = Path(folder)
    settings = settings_of(folder)
    tensors = tensors_of(folder, settings)
    words = vocabulary.read(folder, settings["vocab_size"])
    found = {}
    for path, file in outputs.items():
        before = head_of(header(name or folder.name, settings, words, tensors, file, importance))
        weights = (size_of(tensor, kind_of(tensor, file, settings, importance)) for tensor in tensors)
        found[path] = len(before) + sum(map(aligned, weights))
    return found


@contextmanager
def writing(
    writers: Mapping[Path, GGUFWriter], check: Callable[[Path], None] = lambda file: None
) -> Iterator[dict[Path, BinaryIO]]:
    """Streams of files that are whole or not there, in which everything that stands before the weights is written.

    Each is <name>.partial until the block ends and `check` has seen the first. Something else under that name, a
    browser's unfinished download perhaps, is renamed before and kept.
    """
    heads = {path: head_of(writer) for path, writer in writers.items()}
    partial = {path: path.with_name(path.name + ".partial") for path in writers}
    for path, head in heads.items():
        claim(partial[path], head)
    try:
        with ExitStack() as stack:
            streams = {path: stack.enter_context(partial[path].open("wb")) for path in writers}
            for path, stream in streams.items():
                stream.write(heads[path])
            yield streams
            for stream in streams.values():
                stream.flush()
                os.fsync(stream.fileno())
        check(next(iter(partial.values())))
        for path in writers:
            partial[path].rename(path)
    finally:
        for path in partial.values():
            path.unlink(missing_ok=True)


def claim(partial: Path, head: bytes) -> None:
    """Set aside what lies under a name that is to be written, unless it begins like that: then an ended export's."""
    if partial.exists():
        with suppress(IsADirectoryError), partial.open("rb") as stream:
            if head.startswith(stream.read(len(head))):
                return
        set_aside(partial, "a file is written under this name until it is whole, and no such export left this one")


def head_of(writer: GGUFWriter) -> bytes:
    """What stands before the weights, padded."""
    stream = io.BytesIO()
    writer.fout, writer.state = [stream], WriterState.EMPTY
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()
    pad(stream)
    return stream.getvalue()


def finish(writer: GGUFWriter, output: Path) -> None:
    """Write a small file, whose tensors the writer holds; whole or not there."""
    with writing({output: writer}) as streams:
        for tensor in writer.tensors[0].values():
            tensor.tensor.tofile(streams[output])
            pad(streams[output])


def pad(stream: Any) -> None:
    """Zeros up to the next multiple of the file's alignment."""
    stream.write(bytes(-stream.tell() % ALIGNMENT))


def pieces(tensor: Tensor) -> Iterator[np.ndarray]:
    """A tensor's rows, some at a time, in fp32 and in llama.cpp's order: (rows, columns).

    A vector is one row. A piece of q_proj or k_proj holds whole heads, so that a head's rows can change places in it.
    """
    with safe_open(str(tensor.shard), framework="pt") as stored:
        values = stored.get_slice(tensor.source)
        if len(tensor.shape) == 1:
            yield values[:].float().numpy()[None]
            return
        rows, columns = tensor.shape
        unit = rows // tensor.heads if tensor.heads else 1
        step = max(PIECE_VALUES // columns // unit, 1) * unit
        for start in range(0, rows, step):
            piece = values[start : min(start + step, rows)].float().numpy()
            yield turned(piece, unit) if tensor.heads else piece


def turned(rows: np.ndarray, head_dim: int) -> np.ndarray:
    """Rows of whole heads, (heads × head_dim, columns), with each head's halves interleaved.

    >>> turned(np.arange(4.0)[:, None], 4)[:, 0]
    array([0., 2., 1., 3.])
    """
    return rows.reshape(-1, 2, head_dim // 2, rows.shape[1]).swapaxes(1, 2).reshape(rows.shape)
