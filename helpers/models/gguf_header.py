"""What a GGUF file says of itself: its model's sizes and its type. No torch.

A file of gigabytes is mapped, not read; the header of a 7B, with 32,768 words, takes about a second.
"""

from functools import lru_cache
from pathlib import Path
from typing import Any

NAMED = {
    "vocab_size": "vocab_size",
    "hidden_size": "embedding_length",
    "intermediate_size": "feed_forward_length",
    "num_hidden_layers": "block_count",
    "num_attention_heads": "attention.head_count",
    "num_key_value_heads": "attention.head_count_kv",
    "head_dim": "attention.key_length",
    "max_position_embeddings": "context_length",
    "rms_norm_eps": "attention.layer_norm_rms_epsilon",
}
"""transformers' name of a size -> GGUF's."""


def is_gguf(name: str | Path) -> bool:
    """Whether a name is a GGUF file, by its first bytes."""
    if not Path(name).is_file():
        return False
    with Path(name).open("rb") as stream:
        return stream.read(4) == b"GGUF"


def reader(file: Path) -> Any:
    """gguf's reader of a file. Raises ValueError for a file that is cut short, or where gguf is not installed."""
    try:
        from gguf import GGUFReader
    except ImportError:
        raise ValueError("GGUF needs the package gguf: pip install --no-deps -r requirements/gguf.txt") from None
    try:
        return GGUFReader(file)
    except (ValueError, IndexError, OSError) as error:
        raise ValueError(f"{file} is no whole GGUF file ({error}): export it again") from None


def config(file: Path) -> dict[str, Any]:
    """A file's model as config.json says it. Raises ValueError for another architecture."""
    return dict(described(Path(file), Path(file).stat().st_mtime_ns)["config"])


def weight_bytes(file: Path) -> int:
    """Bytes of all tensors."""
    return described(Path(file), Path(file).stat().st_mtime_ns)["weight_bytes"]


def type_name(file: Path) -> str:
    """The file's type, such as Q4_K_M."""
    return described(Path(file), Path(file).stat().st_mtime_ns)["type"]


@lru_cache(maxsize=8)
def described(file: Path, _modified: int) -> dict[str, Any]:
    """config, weight_bytes and type of a file, read once while it does not change."""
    found = reader(file)
    return {
        "config": settings(found, file),
        "weight_bytes": int(sum(tensor.n_bytes for tensor in found.tensors)),
        "type": file_type_of(found),
    }


def file_type_of(found: Any) -> str:
    """The name of a header's file type; GGUF where it has none."""
    from gguf import LlamaFileType

    field = found.fields.get("general.file_type")
    return LlamaFileType(field.contents()).name.removeprefix("MOSTLY_") if field else "GGUF"


def settings(found: Any, file: Path) -> dict[str, Any]:
    """config.json of a reader's file. Raises ValueError for another architecture."""
    fields = {name: field.contents() for name, field in found.fields.items() if not name.startswith("tokenizer.")}
    architecture = fields.get("general.architecture")
    if architecture != "llama" or fields.get("general.type", "model") != "model":
        what = architecture if architecture != "llama" else fields["general.type"]
        raise ValueError(f"{file} is a GGUF file of kind {what}: models of the architecture llama are opened here")
    sizes = {ours: fields[f"llama.{theirs}"] for ours, theirs in NAMED.items()}
    rope = {"rope_type": "default", "rope_theta": float(fields.get("llama.rope.freq_base", 10000.0))}
    tied = not any(tensor.name == "output.weight" for tensor in found.tensors)
    return sizes | {"model_type": "llama", "rope_parameters": rope, "tie_word_embeddings": tied}
