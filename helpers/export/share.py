"""Taking it home: an adapter or a model to a folder (Drive), as a download, or to the hub, private by default.

Sizes are said before anything is copied; what broke off goes on where it stopped; nothing that holds an access token
leaves. `card` writes the README that goes with it: what it was made from, with which settings, and how to load it.
"""

import shutil
import zipfile
from pathlib import Path

from helpers import tokens, workspace
from helpers.config import from_tree

GIB = 2**30
CARD = "README.md"
CALM_DOWNLOAD_GIB = 1.0
"""Browsers lose larger downloads from Colab more often than not: Drive is surer."""


def to_folder(stage: Path, folder: Path) -> Path:
    """Copy a finished stage to a folder, Drive's for example; goes on where an earlier copy broke off.

    Returns folder/<stage>. Raises ValueError when it does not fit, or when it was damaged since it was made.
    """
    stage, target = Path(stage), Path(folder) / Path(stage).name
    refuse_tokens(stage)
    said_size(stage, f"to {target}")
    try:
        workspace.copy_stage(stage, target)
    except OSError as error:
        raise ValueError(
            f"{stage} could not be copied to {target}: {error}; make room there (empty Drive's bin too), run this again"
        ) from None
    workspace.check_outputs(target)
    (target / CARD).write_text(card(stage), encoding="utf-8")
    return target


def to_download(stage: Path, archive: Path | None = None) -> Path:
    """Pack a finished stage into one zip, without compressing: weights do not shrink; in Colab, start its download."""
    stage = Path(stage)
    archive = Path(archive or stage.with_suffix(".zip"))
    refuse_tokens(stage)
    size_gib = said_size(stage, f"into {archive}")
    outputs = workspace.check_outputs(stage)["outputs"]
    free = shutil.disk_usage(workspace.existing(archive.parent)).free
    if free < size_gib * GIB:
        raise ValueError(f"{archive} needs {size_gib:.2f} GiB and {free / GIB:.2f} GiB is free: choose another place")
    unfinished = archive.with_name(archive.name + ".tmp")
    with zipfile.ZipFile(unfinished, "w", zipfile.ZIP_STORED) as packed:
        for name in (*outputs, workspace.MANIFEST):
            if name != CARD:
                packed.write(stage / name, f"{stage.name}/{name}")
        packed.writestr(f"{stage.name}/{CARD}", card(stage))
    unfinished.replace(archive)
    if workspace.place() == "colab":
        from google.colab import files

        if size_gib > CALM_DOWNLOAD_GIB:
            print(f"{size_gib:.1f} GiB is much for a browser: if the download breaks off, use to_folder with Drive")
        files.download(str(archive))
    return archive


def to_hub(stage: Path, repository: str, private: bool = True) -> str:
    """Upload a finished stage to the model hub; run it again to go on where it broke off. Returns its address.

    repository: owner/name. Raises ValueError without a token, when the repository is public and private was not set to
    False, and for whatever the hub refuses, in one sentence.
    """
    from huggingface_hub import HfApi

    from helpers.models.hub import hub_sentence

    stage, token = Path(stage), tokens.hub_token()
    if not token:
        raise ValueError(
            "there is no hub token: make one with write access at huggingface.co/settings/tokens and store it as the "
            "secret HF_TOKEN (in Colab: the key in the left margin), never in a cell"
        )
    refuse_tokens(stage)
    workspace.check_outputs(stage)
    said_size(stage, f"to huggingface.co/{repository}, {'private' if private else 'public'}")
    api = HfApi(token=token)
    try:
        api.create_repo(repository, private=private, exist_ok=True)
        if private and not api.model_info(repository).private:
            raise ValueError(f"huggingface.co/{repository} is public: pass private=False, or choose another name")
        api.upload_folder(repo_id=repository, folder_path=stage, ignore_patterns=[CARD, "*.log"])
        api.upload_file(repo_id=repository, path_or_fileobj=card(stage).encode(), path_in_repo=CARD)
    except ValueError:
        raise
    except Exception as error:  # the hub's client raises many kinds
        raise ValueError(tokens.redact(hub_sentence(error, "model", repository))) from None
    return f"https://huggingface.co/{repository}"


def from_hub(repository: str, folder: Path) -> Path:
    """Fetch what `to_hub` sent, and check every file; goes on where it broke off. Raises ValueError in one sentence."""
    from huggingface_hub import snapshot_download

    from helpers.models.hub import hub_sentence

    try:
        snapshot_download(repository, local_dir=folder, token=tokens.hub_token())
    except Exception as error:  # the hub's client raises many kinds
        raise ValueError(tokens.redact(hub_sentence(error, "model", repository))) from None
    if not (Path(folder) / workspace.MANIFEST).is_file():
        raise ValueError(f"huggingface.co/{repository} was not uploaded by these recipes: it has no manifest")
    workspace.check_outputs(Path(folder))
    return Path(folder)


def unpack(archive: Path, folder: Path) -> Path:
    """Unpack what `to_download` packed, and check every file. Raises ValueError for a name that leads out of folder."""
    folder = Path(folder)
    try:
        with zipfile.ZipFile(archive) as packed:
            for name in packed.namelist():
                if Path(name).is_absolute() or not (folder / name).resolve().is_relative_to(folder.resolve()):
                    raise ValueError(f"{archive} holds {name}, which leads out of {folder}: it is not unpacked")
            packed.extractall(folder)
            inside = folder / Path(packed.namelist()[0]).parts[0]
    except zipfile.BadZipFile:
        raise ValueError(f"{archive} is not a whole zip: download it again") from None
    workspace.check_outputs(inside)
    return inside


def said_size(stage: Path, where: str) -> float:
    """Say how much goes where; GiB."""
    size_gib = workspace.size_bytes(stage) / GIB
    print(f"{stage.name}: {size_gib:.2f} GiB {where}")
    return size_gib


def refuse_tokens(stage: Path) -> None:
    """Raise ValueError when any file holds an access token; weights are not text and are not searched."""
    texts = [file for file in stage.rglob("*") if file.is_file() and file.suffix not in (".safetensors", ".arrow")]
    found = tokens.search(texts).found
    if found:
        file, kind = found[0]
        raise ValueError(f"{file} holds a {kind}: it does not leave this machine; take it out, and revoke the token")


def card(stage: Path) -> str:
    """The README of an adapter or a model: its making from the manifest, and the lines that load it."""
    stage = Path(stage)
    manifest = workspace.read_manifest(stage)
    config = from_tree(manifest["config"])
    kind = {"finetune": "LoRA adapter", "merge": "merged model", "quantize": f"{config.quantize.bits}-bit GPTQ model"}
    is_adapter = manifest["stage"] == "finetune"
    figures = {name: value for name, value in manifest["measurements"].items() if isinstance(value, int | float | str)}
    load = (
        'AutoPeftModelForCausalLM.from_pretrained("FOLDER/adapter")'
        if is_adapter
        else 'AutoModelForCausalLM.from_pretrained("FOLDER", device_map="auto")'
    )
    package = "peft import AutoPeftModelForCausalLM" if is_adapter else "transformers import AutoModelForCausalLM"
    settings = {
        "LoRA": f"rank {config.adapter.rank}, alpha {config.adapter.alpha:g}, {config.adapter.targets}",
        "training": f"{config.train.learning_rate:g} {config.train.schedule}, {config.train.batch_size} × "
        f"{config.train.accumulation} sequences a step, context {config.data.seq_len}",
        "data": Path(config.data.source).name if Path(config.data.source).exists() else config.data.source,
        "seed": config.seed,
    }
    base = Path(config.model.model).name if Path(config.model.model).exists() else config.model.model
    header = f"base_model: {base}\n" if "/" in base else ""
    header += f"library_name: {'peft' if is_adapter else 'transformers'}\npipeline_tag: text-generation"
    return "\n".join(
        [
            f"---\n{header}\n---",
            f"# {kind.get(manifest['stage'], manifest['stage'])} of {base}\n",
            "| made with | |\n|---|---|",
            *(f"| {name} | {value} |" for name, value in settings.items()),
            *(f"| {name} | {version} |" for name, version in manifest["versions"].items()),
            "\n| measured | |\n|---|---|",
            *(f"| {name} | {value} |" for name, value in figures.items()),
            f"\n```python\nfrom {package}\n\nmodel = {load}\n```\n",
            "The base model's licence holds for it, and that of the data that it was trained on.\n",
        ]
    )
