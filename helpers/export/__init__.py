"""Taking a model home: a GGUF file for Ollama, llama.cpp and LM Studio, from a merged model or from an adapter alone.

    python -m helpers export --model runs/tiny/merge --to gguf --type q4_k_m,q8_0 --output tiny.gguf --modelfile

`gguf_file` writes tensor by tensor, `quants` has llama.cpp's own code make the blocks, `vocabulary` writes the tokens
as training read them, and `engine` asks llama.cpp itself whether it reads them so before a file gets its name.
"""

import json
import time
from pathlib import Path
from typing import Any

from helpers.models.gguf_types import file_type

FORMATS = ("gguf",)
PROBES = (
    "Hello, world!",
    "  two spaces,\ta tab\nand a line",
    "naïve café – 'quoted' “text” 1234567.89",
    "日本語 русский العربية 🙂🇪🇺",
    "<s>[INST] a question[/INST] an answer</s>",
)
"""Texts that every tokenizer is held to: spaces, accents, scripts, byte fallback, special tokens."""
CHECKED_CHATS = 200
CONTEXT = 2048
"""Tokens that Ollama is told to keep, where the model reaches as far."""


def export(
    model: Path, output: Path, types: str = "q4_k_m", modelfile: bool = False, prepared: Path | None = None
) -> dict[str, Any]:
    """Write a 16-bit model folder as GGUF files, one a type; returns files, bytes and seconds.

    output: FILE.gguf; with several types (commas between) each goes beside it with its type in the name. modelfile:
    Ollama's Modelfile and a README with three commands too. prepared: the folder that `prepare` wrote; up to 200 of its
    prompts are read by llama.cpp and held to training's tokens before a file gets its name, probes always.
    Raises ValueError in one sentence, nothing written, for an unknown type, a file that exists, or a model or tokenizer
    of another kind.
    """
    began = time.monotonic()
    model, output = Path(model), Path(output)
    files = outputs(output, types)
    from helpers.export import gguf_file
    from helpers.export import modelfile as modelfiles

    checked: list[int] = []
    sizes = gguf_file.write(model, files, check=lambda file: checked.append(check(file, model, prepared)))
    result: dict[str, Any] = {
        "files": {str(path): size for path, size in sizes.items()},
        "texts_checked": checked[0],
        "export_s": round(time.monotonic() - began, 2),
    }
    if modelfile:
        from helpers.export.vocabulary import chat_template

        path, settings = next(iter(files)), gguf_file.settings_of(model)
        context = min(CONTEXT, settings["max_position_embeddings"])
        generation = model / "generation_config.json"
        defaults = json.loads(generation.read_text(encoding="utf-8")) if generation.is_file() else None
        written = modelfiles.write(path.parent, path.name, chat_template(model), context, defaults)
        result["beside"] = [str(file) for file in written]
    return result


def export_adapter(adapter: Path, base: Path, output: Path) -> dict[str, Any]:
    """Write a LoRA adapter alone, for `llama-server -m BASE.gguf --lora FILE`; returns its file and bytes.

    base: the folder of the model that it belongs to, for its heads. An adapter that was trained on a base in NF4 also
    corrects NF4's rounding, which a GGUF of the original base does not have: the result then differs a little from the
    merged model, and the dict says so under `note`.
    """
    from helpers.export import lora

    refuse_existing(Path(output))
    size_bytes = lora.write(Path(adapter), Path(base), Path(output))
    result: dict[str, Any] = {"files": {str(output): size_bytes}}
    beside = Path(adapter).parent / "config.yaml"
    if beside.is_file():
        from helpers.config import load_yaml

        if load_yaml(beside).model.weights == "nf4":
            result["note"] = (
                "this adapter was trained on the base in NF4 and corrects its rounding too: beside a GGUF of the "
                "original base it answers a little differently from the merged model, which is the one to prefer"
            )
    return result


def outputs(output: Path, types: str) -> dict[Path, Any]:
    """File -> recipe for each type asked for. Raises ValueError for an unknown type or a file that exists.

    >>> [path.name for path in outputs(Path("here.gguf"), "q8_0, q4_k_m")]
    ['here-Q8_0.gguf', 'here-Q4_K_M.gguf']
    """
    if output.suffix != ".gguf":
        raise ValueError(f"output {output} must end in .gguf")
    kinds = [file_type(name.strip()) for name in types.split(",")]
    several = len(kinds) > 1
    found = {output.with_name(f"{output.stem}-{kind.name}.gguf") if several else output: kind for kind in kinds}
    for path in found:
        refuse_existing(path)
    return found


def refuse_existing(output: Path) -> None:
    """Raise ValueError for a file that is there, or a folder for it that is not."""
    if output.exists():
        raise ValueError(f"output {output} exists: delete it, or choose another name")
    if not output.absolute().parent.is_dir():
        raise ValueError(f"output {output}: there is no folder {output.absolute().parent}")


def check(file: Path, model: Path, prepared: Path | None) -> int:
    """Hold llama.cpp's tokens of a file to the model's tokenizer; returns how many texts were compared.

    Raises ValueError showing the first that differs.
    """
    from transformers import AutoTokenizer

    from helpers.export import engine

    tokenizer = AutoTokenizer.from_pretrained(model)
    chats = prompts(prepared) if tokenizer.chat_template else []
    with engine.serving(file) as ask:
        return engine.check_tokens(ask, tokenizer, list(PROBES), chats)


def prompts(prepared: Path | None) -> list[list[dict[str, str]]]:
    """Conversations of a prepared folder up to their last question, at most CHECKED_CHATS; one of our own without."""
    own = [{"role": "user", "content": "Who are you?"}]
    if prepared is None or not (Path(prepared) / "train").is_dir():
        return [own]
    from datasets import load_from_disk

    rows = load_from_disk(str(Path(prepared) / "train"))
    chosen = rows.select(range(min(len(rows), CHECKED_CHATS)))["messages"]
    asked = [messages[:-1] for messages in chosen if len(messages) > 1 and messages[-1]["role"] == "assistant"]
    return [[dict(turn) for turn in messages] for messages in asked] or [own]
