"""Access tokens: where they come from, and a search for those that leaked into what a run leaves behind.

A token is never a parameter: it comes from Colab's or Kaggle's secrets, the environment, or huggingface_hub's login.

    python -m helpers.tokens PLACE …     exits 1 when a token is found: names file and kind, never the token
    python -m helpers.tokens --staged    the same for what git is about to commit; .githooks/pre-commit calls it

>>> kinds(b"Authorization: Bearer hf_" + b"a" * 34)
['Hugging Face token']
>>> redact("token=hf_" + "a" * 34)
'token=[Hugging Face token]'
"""

import argparse
import os
import re
import subprocess
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import NamedTuple

PATTERNS = {
    "Hugging Face token": rb"\b(?:hf|api_org)_[A-Za-z0-9]{30,}",
    "GitHub token": rb"\b(?:gh[pousr]_[A-Za-z0-9]{36,}|github_pat_[A-Za-z0-9_]{50,})",
    "Google key": rb"\bAIza[A-Za-z0-9_-]{35}|\bya29\.[A-Za-z0-9_-]{50,}",
    "AWS key": rb"\bAKIA[A-Z0-9]{16}\b",
    "API key": rb"\bsk-(?:proj-|ant-)?[A-Za-z0-9_-]{40,}",
    "Weights & Biases key": rb"(?i)wandb_api_key[\"']?\s*[:=]\s*[\"']?[a-f0-9]{40}",
    "private key": rb"-----BEGIN (?:[A-Z]+ )?PRIVATE KEY-----",
}
COMPILED = {kind: re.compile(pattern) for kind, pattern in PATTERNS.items()}
PIECE_BYTES, LONGEST_BYTES = 2**24, 256


class Search(NamedTuple):
    """How many files were read, and in which of them what kind of token was found."""

    files: int
    found: list[tuple[Path, str]]


def hub_token() -> str | None:
    """The hub's token: Kaggle's secret HF_TOKEN, else Colab's, the environment's, or that of `hf auth login`; or None.

    Colab's secret is asked through huggingface_hub, which knows that it hangs outside of Colab's page.
    """
    if "KAGGLE_KERNEL_RUN_TYPE" in os.environ and "HF_TOKEN" not in os.environ:
        try:
            from kaggle_secrets import UserSecretsClient

            return UserSecretsClient().get_secret("HF_TOKEN")
        except Exception:  # no such secret, or not attached to this notebook: its client has no common error
            return None
    from huggingface_hub import get_token

    return get_token()


def kinds(text: bytes) -> list[str]:
    """The kinds of token that a text holds."""
    return [kind for kind, pattern in COMPILED.items() if pattern.search(text)]


def redact(text: str) -> str:
    """The text with every token replaced by its kind."""
    for kind, pattern in COMPILED.items():
        text = re.sub(pattern.pattern.decode(), f"[{kind}]", text)
    return text


def search(places: Iterable[Path], known: str | None = None) -> Search:
    """Look for tokens in files and folders, bytes and all. known: a token to look for besides, whatever its shape."""
    files = [
        file
        for place in places
        for file in (sorted(Path(place).rglob("*")) if Path(place).is_dir() else [Path(place)])
        if file.is_file()
    ]
    found = [(file, kind) for file in files for kind in kinds_in(file, known)]
    return Search(len(files), found)


def kinds_in(file: Path, known: str | None = None) -> list[str]:
    """The kinds of token in a file, read in pieces that overlap by more than a token's length."""
    found: dict[str, None] = {}
    with file.open("rb") as stream:
        tail = b""
        while piece := stream.read(PIECE_BYTES):
            text = tail + piece
            found |= dict.fromkeys(kinds(text))
            if known and known.encode() in text:
                found["the token in use"] = None
            tail = text[-LONGEST_BYTES:]
    return list(found)


def staged() -> Search:
    """Look for tokens in the lines that git is about to commit."""
    diff = subprocess.run(["git", "diff", "--cached", "--no-color", "-U0"], capture_output=True, check=True).stdout
    found, file, files = [], Path(), 0
    for line in diff.splitlines():
        if line.startswith(b"+++ "):
            file, files = Path(line[4:].decode(errors="replace").removeprefix("b/")), files + 1
        elif line.startswith(b"+"):
            found += [(file, kind) for kind in kinds(line)]
    return Search(files, found)


def main(arguments: list[str] | None = None) -> int:
    """Print where tokens are; returns 1 when there is one, else 0."""
    parser = argparse.ArgumentParser(prog="python -m helpers.tokens", description=__doc__.splitlines()[0])
    parser.add_argument("places", nargs="*", type=Path)
    parser.add_argument("--staged", action="store_true", help="what git is about to commit")
    options = parser.parse_args(arguments)
    result = staged() if options.staged else search(options.places)
    for file, kind in result.found:
        print(f"{file}: {kind}; take it out, and revoke it where it was made", file=sys.stderr)
    print(f"{len(result.found)} tokens in {result.files} files")
    return 1 if result.found else 0


if __name__ == "__main__":
    sys.exit(main())
