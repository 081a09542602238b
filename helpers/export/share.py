"""Export of an adapter or a model as it is: to a folder (Drive), as a download, or to the hub, private by default.

    python -m helpers export --to drive                                     the run's GPTQ model
    python -m helpers export --to hub --adapter runs/tiny/finetune --output me/mine

Sizes are said before anything is copied; what broke off goes on where it stopped; nothing that holds an access token
leaves; nothing is written over. A model card goes along.
"""

import shutil
import zipfile
from pathlib import Path

from helpers import tokens, workspace
from helpers.show import card, tables

GIB = 2**30
CARD = "README.md"
CALM_DOWNLOAD_GIB = 1.0
"""Browsers lose larger downloads from Colab more often than not: Drive is surer."""


def stage_of(folder: Path) -> Path:
    """The finished stage that a folder of a model is, or is in: an adapter lies in its stage. Raises ValueError."""
    folder = Path(folder)
    found = next((place for place in (folder, folder.parent) if (place / workspace.MANIFEST).is_file()), None)
    if found is None:
        raise ValueError(
            f"model {folder} is no finished stage of a run (it has no {workspace.MANIFEST}): name the folder that "
            "finetune, merge or quantize wrote"
        )
    return found


def drive() -> Path:
    """Where an export goes that no folder is named for. Raises ValueError when no Drive is mounted."""
    store = workspace.lasting_store()
    if store is None:
        raise ValueError("output must name a folder: no Drive is mounted here")
    return store / "mistral-t4-recipes" / "exported"


def repository(output: Path | None) -> str:
    """A repository's name on the hub from `--output`. Raises ValueError when it is not OWNER/NAME.

    >>> repository(Path("me/mistral-of-mine"))
    'me/mistral-of-mine'
    """
    if output is None or output.is_absolute() or len(output.parts) != 2:
        raise ValueError(f"output must be OWNER/NAME for the hub, not {output}")
    return output.as_posix()


def to_folder(stage: Path, folder: Path) -> Path:
    """Copy a finished stage to a folder, Drive's for example; goes on where an earlier copy broke off.

    Returns folder/<stage>. Raises ValueError when it does not fit, or when it was damaged since it was made.
    """
    stage, target = Path(stage), Path(folder) / Path(stage).name
    refuse_tokens(stage)
    mark = stage / workspace.MANIFEST
    if target.exists() and any(target.iterdir()):
        there = target / workspace.MANIFEST
        if not there.is_file() or there.read_bytes() != mark.read_bytes():
            raise ValueError(f"output {target} holds something else: name another folder")
    said_size(stage, f"to {target}")
    try:
        workspace.copy_stage(stage, target)
    except OSError as error:
        raise ValueError(
            f"{stage} could not be copied to {target}: {error}; make room there (empty Drive's bin too), run this again"
        ) from None
    workspace.check_outputs(target)
    (target / CARD).write_text(card_of(stage), encoding="utf-8")
    return target


def to_download(stage: Path, archive: Path | None = None) -> Path:
    """Pack a finished stage into one zip, without compressing: weights do not shrink; in Colab, start its download."""
    stage = Path(stage)
    archive = Path(archive or stage.with_suffix(".zip"))
    if archive.exists():
        raise ValueError(f"output {archive} is there already: name another file")
    archive.parent.mkdir(parents=True, exist_ok=True)
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
        packed.writestr(f"{stage.name}/{CARD}", card_of(stage))
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
            raise ValueError(
                f"huggingface.co/{repository} is public: pass private=False (--public), or choose another name"
            )
        api.upload_folder(repo_id=repository, folder_path=stage, ignore_patterns=[CARD, "*.log"])
        api.upload_file(repo_id=repository, path_or_fileobj=card_of(stage).encode(), path_in_repo=CARD)
    except ValueError:
        raise
    except Exception as error:  # the hub's client raises many kinds
        raise ValueError(tokens.redact(hub_sentence(error, "model", repository))) from None
    return f"https://huggingface.co/{repository}"


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


def card_of(stage: Path) -> str:
    """The README that goes along: the one with an evaluation's figures where there is one, else from the manifest."""
    stage = Path(stage)
    if (stage / CARD).is_file():
        return (stage / CARD).read_text(encoding="utf-8")
    manifest = workspace.read_manifest(stage)
    kind = card.kind_of(manifest)
    figures = {name: value for name, value in manifest["measurements"].items() if isinstance(value, int | float | str)}
    rows = [*((name, tables.plain(value)) for name, value in figures.items()), *manifest["versions"].items()]
    return card.card(stage.name, kind, manifest["config"], "While it was made, with these versions.", rows)
