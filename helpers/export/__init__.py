"""Taking a model home: a GGUF file for Ollama, llama.cpp and LM Studio, from a merged model or from an adapter alone.

    python -m helpers export --model runs/tiny/merge --to gguf --type q4_k_m,q8_0 --output tiny.gguf --modelfile

`gguf_file` writes tensor by tensor, `quants` has llama.cpp's own code make the blocks, `vocabulary` writes the tokens
as training read them, and `check` asks llama.cpp itself whether it reads them so before a file gets its name.
"""

import json
import shutil
import time
from pathlib import Path
from typing import Any

from helpers.budget import export as budget
from helpers.config import RunConfig
from helpers.models.gguf_types import FILE_TYPES, FileType, file_type, row_bytes
from helpers.workspace import Workspace, building, lasting_twin, maker, place, refuse_output
from helpers.workspace.files import is_file

FORMATS = ("gguf",)
CONTEXT = 2048
"""Tokens that Ollama is told to keep, where the model reaches as far."""
TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja")
"""Beside a run's GGUF files, so that the folder opens again by itself."""


def export(
    model: Path,
    output: Path,
    types: str = "q4_k_m",
    modelfile: bool = False,
    prepared: Path | None = None,
    importance: Path | None = None,
    name: str | None = None,
) -> dict[str, Any]:
    """Write a 16-bit model folder as GGUF files, one a type; returns files, bytes and seconds.

    output: FILE.gguf; with several types (commas between) each goes beside it with its type in the name. modelfile:
    Ollama's Modelfile and a README with three commands too. prepared: the folder that `prepare` wrote; up to 200 of its
    prompts are read by llama.cpp and held to training's tokens before a file gets its name, probes always. importance:
    a file that `importance.collect` or llama-imatrix wrote. name: of the model, for the header; default the folder's.
    Raises ValueError in one sentence, nothing written, for an unknown type, a file that exists, an importance matrix of
    another model, or a model or tokenizer of another kind; DoesNotFit where there is too little memory or disk.
    """
    began = time.monotonic()
    model, output = Path(model), Path(output)
    files = outputs(output, types)
    from helpers.export import check, gguf_file
    from helpers.export import importance as importances
    from helpers.export import modelfile as modelfiles

    settings = gguf_file.settings_of(model)
    weights = importances.read(importance, model) if importance else None
    planned = gguf_file.sizes(model, files, weights is not None, name)
    budget.refuse_memory()
    budget.refuse_disk({path.parent: sum(planned.values()) for path in files})
    checked: list[int] = []
    sizes = gguf_file.write(
        model,
        files,
        importance=weights,
        check=lambda file: checked.append(check.check(file, model, prepared)),
        name=name,
    )
    result: dict[str, Any] = {
        "files": {str(path): size for path, size in sizes.items()},
        "predicted_bytes": {str(path): size for path, size in planned.items()},
        "texts_checked": checked[0],
        "export_s": round(time.monotonic() - began, 2),
    }
    if modelfile:
        from helpers.export.vocabulary import chat_template

        context = min(CONTEXT, settings["max_position_embeddings"])
        generation = model / "generation_config.json"
        defaults = json.loads(generation.read_text(encoding="utf-8")) if generation.is_file() else None
        names = [path.name for path in files]
        written = modelfiles.write(output.parent, names, chat_template(model), context, defaults)
        result["beside"] = [str(file) for file in written]
    return result


def export_run(
    run: Workspace, config: RunConfig, types: str = "q4_k_m", importance: Path | None = None
) -> dict[str, Any]:
    """A run's merged model as GGUF files in its `export` folder, with Modelfile, README and tokenizer.

    The folder is made like every stage's: whole or not there, with a manifest, and copied to the lasting twin.
    """
    output, merged, files = run.folder("export"), run.folder("merge"), types.split(",")
    stem = Path(config.model.model).name
    kinds = [file_type(kind.strip()) for kind in files]
    if len(kinds) == 1:
        stem = f"{stem}-{kinds[0].name}"
    refuse_output(output, [merged], "export")
    if not (merged / "config.json").is_file():
        raise ValueError(f"{merged} is not there: {maker('merge')} makes it")
    with building(output, "export", config, {"model": merged}) as stage:
        made = export(
            merged,
            stage.folder / f"{stem}.gguf",
            types,
            modelfile=True,
            prepared=run.folder("prepare"),
            importance=importance,
            name=Path(config.model.model).name,
        )
        for file in TOKENIZER_FILES:
            if (merged / file).is_file():
                shutil.copyfile(merged / file, stage.folder / file)
        moved = {
            what: {str(output / Path(path).name): size for path, size in made[what].items()}
            for what in ("files", "predicted_bytes")
        }
        made |= moved | {"beside": [str(output / Path(path).name) for path in made["beside"]]}
        stage.measurements |= made
    return made


def importance_matrix(run: Workspace, config: RunConfig, types: str, asked: str | None = None) -> Path | None:
    """A file that was named, or the run's own: collected when that is asked for ("own"), or when a type needs one."""
    if asked not in (None, "own"):
        return Path(asked)
    from helpers.export import importance

    if asked is None and not (run.folder("finetune") / "adapter").is_dir():
        return None  # of a type that needs one the export says so
    return importance.for_run(run, config, types, wanted=asked == "own")


def take_home(run: Workspace) -> list[str]:
    """Where a run's GGUF files are to be had, in sentences; in Colab without Drive their download starts.

    Browsers lose downloads of gigabytes more often than not, so what is in Drive is taken from there.
    """
    folder, said = run.folder("export"), []
    twin = lasting_twin(folder)
    for file in sorted(folder.glob("*.gguf")):
        size = budget.size(file.stat().st_size)
        if twin is not None and is_file(twin / file.name):
            said.append(f"{file.name}, {size}: kept in {twin}; from Drive, drive.google.com downloads it")
        elif place() == "colab":
            from google.colab import files

            files.download(str(file))
            said.append(f"{file.name}, {size}: the browser downloads it now; it vanishes here with this session")
        else:
            said.append(f"{file.name}, {size}: in {folder}")
    return said


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


def outputs(output: Path, types: str) -> dict[Path, FileType]:
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


def kept(model: Path, layer: int = 0, part: str = "ffn_up", values: int = 2**20) -> dict[str, dict[str, Any]]:
    """What each type keeps of one matrix: type -> bits a weight, error (RMS, as a share of the weights'), difference.

    Every tensor type that the files use is tried on the matrix's first rows, through llama.cpp's own code and back.
    """
    import numpy as np
    from gguf import GGMLQuantizationType
    from gguf.quants import dequantize

    from helpers.export import gguf_file, quants

    settings = gguf_file.settings_of(model)
    name = f"blk.{layer}.{part}.weight"
    tensor = next((one for one in gguf_file.tensors_of(model, settings) if one.name == name), None)
    if tensor is None:
        raise ValueError(f"{model} has no {name}: layers go from 0 to {settings['num_hidden_layers'] - 1}")
    rows = next(gguf_file.pieces(tensor))[: max(values // tensor.columns, 1)]
    found = {}
    for file in FILE_TYPES.values():
        kind = gguf_file.kind_of(tensor, file, settings, importance=False)
        even = np.ones(tensor.columns, np.float32) if file.needs_importance else None
        blocks = quants.quantize(rows, kind, even)
        difference = dequantize(blocks, GGMLQuantizationType[kind]) - rows
        error = float(np.sqrt(np.square(difference).mean() / np.square(rows).mean()))
        bits = 8 * row_bytes(tensor.columns, kind) / tensor.columns
        found[file.name] = {"bits": bits, "error": error, "difference": difference}
    return found
