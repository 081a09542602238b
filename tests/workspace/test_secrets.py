"""No token is left behind, none is committed, nothing foreign is executed."""

import ast
import re
import subprocess
import sys
from pathlib import Path

import pytest

from helpers import tokens

ROOT = Path(__file__).resolve().parents[2]
FAKES = {
    "Hugging Face token": "hf_" + "A1b2" * 9,
    "GitHub token": "ghp_" + "A1b2" * 9,
    "Google key": "AIza" + "A1b2C" * 7,
    "AWS key": "AKIA" + "A1B2" * 4,
    "API key": "sk-" + "proj-" + "A1b2" * 12,
    "private key": "-----BEGIN " + "RSA PRIVATE KEY-----",
}


def tracked() -> list[Path]:
    """The files of the repository, as git knows them; all but what git ignores where there is no git."""
    listed = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, text=True)
    names = [name for name in listed.stdout.split("\0") if name]
    return [ROOT / name for name in names if (ROOT / name).is_file()] or sorted((ROOT / "helpers").glob("*.py"))


@pytest.mark.parametrize("kind", FAKES)
def test_every_kind_is_found_in_bytes_and_redacted(tmp_path, kind):
    (tmp_path / "weights.bin").write_bytes(b"\0\xff" * 99 + b"=" + FAKES[kind].encode() + b"\n\0")
    assert tokens.search([tmp_path]).found == [(tmp_path / "weights.bin", kind)]
    assert FAKES[kind] not in tokens.redact(f"token={FAKES[kind]}")


def test_a_token_across_two_pieces_is_found(tmp_path, monkeypatch):
    monkeypatch.setattr(tokens, "PIECE_BYTES", 500)
    (tmp_path / "log").write_text("x" * 480 + " " + FAKES["Hugging Face token"] + " " + "y" * 600)
    assert len(tokens.search([tmp_path]).found) == 1


def test_words_are_no_tokens():
    assert tokens.kinds(b"hf_hub_download sk-learn hf_home AKIA api_org_name -----BEGIN CERTIFICATE-----") == []


def test_nothing_in_the_repository_holds_a_token():
    result = tokens.search(tracked())
    assert result.found == [] and result.files > 20


def test_the_commit_guard_refuses_a_token(tmp_path):
    def git(*arguments: str) -> subprocess.CompletedProcess:
        return subprocess.run(["git", *arguments], cwd=tmp_path, capture_output=True, text=True)

    git("init", "-q")
    git("config", "user.email", "nobody@example.org")
    git("config", "user.name", "nobody")
    (tmp_path / "helpers").symlink_to(ROOT / "helpers")
    git("config", "core.hooksPath", str(ROOT / ".githooks"))
    (tmp_path / ".venv" / "bin").mkdir(parents=True)
    (tmp_path / ".venv" / "bin" / "python").symlink_to(sys.executable)
    (tmp_path / "notes.txt").write_text("no token")
    git("add", "notes.txt")
    assert git("commit", "-qm", "fine").returncode == 0
    (tmp_path / "notes.txt").write_text(f"token = {FAKES['Hugging Face token']}")
    git("add", "notes.txt")
    refused = git("commit", "-qm", "leak")
    assert refused.returncode != 0 and "notes.txt: Hugging Face token" in refused.stderr
    assert FAKES["Hugging Face token"] not in refused.stderr


def test_the_notebooks_leave_no_token_behind(executed_run, fake_token):
    result = tokens.search([executed_run], known=fake_token)
    print(f"{len(result.found)} tokens in {result.files} files")
    assert result.found == [] and result.files > 20


def calls(name: str) -> list[tuple[Path, ast.Call]]:
    """Every call of a function of that name in the helpers and notebooks' scripts."""
    return [
        (path, node)
        for path in [*ROOT.glob("helpers/**/*.py"), *ROOT.glob("notebooks/*.py"), *ROOT.glob("data/*.py")]
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8")))
        if isinstance(node, ast.Call) and ast.unparse(node.func).endswith(name)
    ]


def test_no_foreign_code_is_trusted():
    sources = [*ROOT.glob("helpers/**/*.py"), *ROOT.glob("notebooks/*"), *ROOT.glob("data/*.py")]
    trusting = [path for path in sources if path.is_file() and re.search(r"trust_remote_code\W+True", path.read_text())]
    assert trusting == []


def test_nothing_is_unpickled():
    for path, call in calls("torch.load"):
        weights_only = [keyword for keyword in call.keywords if keyword.arg == "weights_only"]
        assert weights_only and ast.unparse(weights_only[0].value) == "True", f"{path}:{call.lineno}"
    # What a process and the one it started hand each other, in a temporary folder that is this user's alone
    own = {"helpers/evaluate/workers.py"}
    unpickled = calls("pickle.load") + calls("pickle.loads") + calls("joblib.load")
    assert {path.relative_to(ROOT).as_posix() for path, _ in unpickled} <= own


def test_archives_are_unpacked_in_one_confined_place():
    assert {path.name for path, _ in calls("extractall")} <= {"setup.py"}
