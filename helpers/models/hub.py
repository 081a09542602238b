"""The model hub: a model's files at a revision, and what went wrong on the way there in one sentence with a remedy."""

from pathlib import Path

MODEL_FILES = ("*.json", "*.jinja", "tokenizer.model*", "*.txt", "model*.safetensors")
"""Of a repository that may also hold the weights in other formats."""


def snapshot(name: str, revision: str | None = None) -> Path:
    """The folder of a hub model's config, tokenizer and safetensors at a revision, downloaded where it is not yet.

    Raises ValueError with one sentence.
    """
    from huggingface_hub import snapshot_download

    try:
        return Path(snapshot_download(name, revision=revision, allow_patterns=list(MODEL_FILES)))
    except Exception as error:  # the hub's client raises many kinds for "not there" and "no network"
        raise ValueError(hub_sentence(error, "model", name)) from None


def hub_sentence(error: BaseException, kind: str, name: str) -> str:
    """One sentence for an error of the hub's client, told by the exceptions that led to it. kind: model or dataset.

    >>> hub_sentence(ConnectionError("no route"), "model", "mistralai/Mistral-7B-v0.3")
    'model mistralai/Mistral-7B-v0.3 could not be fetched (ConnectionError): check the network, or give a local path'
    """
    names = set()
    link: BaseException | None = error
    while link is not None and len(names) < 50:
        names |= {kin.__name__ for kin in type(link).__mro__}
        link = link.__cause__ or link.__context__
    address = f"huggingface.co/{'datasets/' if kind == 'dataset' else ''}{name}"
    if "GatedRepoError" in names or ("DatasetNotFoundError" in names and "gated" in str(error)):
        return (
            f"{kind} {name} is gated: accept its terms at {address}, then set HF_TOKEN to a token from "
            f"huggingface.co/settings/tokens (in Colab: Secrets, the key in the left margin)"
        )
    if "RevisionNotFoundError" in names:
        return f"{kind} {name} has no such revision: choose a branch, a tag or a commit that {address} lists"
    if names & {"RepositoryNotFoundError", "DatasetNotFoundError", "HFValidationError"}:
        return f"{kind} {name} is neither a path here nor on the hub, or it is private: check the name, or set HF_TOKEN"
    return f"{kind} {name} could not be fetched ({type(error).__name__}): check the network, or give a local path"
