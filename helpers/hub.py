"""What went wrong on the way to the model hub, in one sentence with a remedy."""


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
    if names & {"RepositoryNotFoundError", "DatasetNotFoundError", "HFValidationError", "RevisionNotFoundError"}:
        return f"{kind} {name} is neither a path here nor on the hub, or it is private: check the name, or set HF_TOKEN"
    return f"{kind} {name} could not be fetched ({type(error).__name__}): check the network, or give a local path"
