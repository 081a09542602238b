"""The set-up cell, both of them, run in a fresh interpreter as Colab, Kaggle and a laptop would run it."""

import ast
import doctest
import os
import re
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import badges
import pytest

from helpers import setup

ROOT = Path(__file__).resolve().parents[1]
NEEDED = ("helpers/__init__.py", "helpers/setup.py", "helpers/show/troubleshooting.py")


def write_recipes(folder, requirements=""):
    """What the cell needs of the recipes, in a folder; they need no package, so that pip is quick."""
    for name in NEEDED:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes((ROOT / name).read_bytes())
    (folder / "requirements").mkdir()
    (folder / "requirements.txt").write_text(requirements)
    (folder / "requirements" / "trl.txt").write_text("")
    return folder


@pytest.fixture
def machine(tmp_path):
    """A rented machine's folder for files, with its neighbours."""
    (tmp_path / "working").mkdir()
    return tmp_path / "working"


@pytest.fixture
def archive(tmp_path):
    """Writes a zip of the recipes as GitHub makes it, all under one folder."""

    def write(path, top="name-main/", extra=None, requirements=""):
        recipes = write_recipes(tmp_path / f"source-of-{path.stem}", requirements)
        with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as file:
            for source in filter(Path.is_file, recipes.rglob("*")):
                file.write(source, top + source.relative_to(recipes).as_posix())
            for name, text in (extra or {}).items():
                file.writestr(name, text)
        return path

    return write


IN_IPYTHON = """
import sys
from IPython.core.interactiveshell import InteractiveShell
shell = InteractiveShell.instance()
shell.history_manager.enabled = False
sys.exit(not shell.run_cell({source!r}).success)
"""


def stopped(*arguments, **settings):
    """What a notebook shows of a set-up cell that ends early; its sentence, and nothing of IPython around it."""
    done = run_cell(*arguments, **settings, within=IN_IPYTHON)
    assert done.returncode == 1
    assert not re.search("Traceback|Warning|Exit|%tb", done.stdout + done.stderr)
    return done.stdout


def run_cell(
    home, repository="", cloud="COLAB_RELEASE_TAG", cwd=None, times=1, before="", github="", within="{source}"
):
    """Run the set-up cell with `home` where Colab has /content; returns the finished process.

    within: the program that runs it.
    """
    source = badges.setup_source(repository, "main").replace('"/content"', repr(str(home)))
    source = source.replace('"/kaggle/working"', repr(str(home)))
    source = source.replace('"/kaggle/input"', repr(str(home.parent / "input")))
    source = source.replace("https://github.com", github or "https://github.com")
    clean = {name: value for name, value in os.environ.items() if name not in ("PYTHONPATH", *setup.RENTED)}
    last = "import helpers; print('helpers', helpers.__file__); print('path', sys.path)"
    return subprocess.run(
        [sys.executable, "-c", within.format(source="\n".join([before, *[source] * times, last]))],
        cwd=cwd or home,
        env=clean
        | ({cloud: "1"} if cloud else {})
        | {"PYTHONSAFEPATH": "1", "PIP_NO_INDEX": "1", "IPYTHONDIR": str(home.parent / "ipython")},
        capture_output=True,
        text=True,
    )


def test_examples_in_docstrings():
    assert doctest.testmod(setup).failed == 0


@pytest.mark.parametrize(("repository", "lines"), [("", 40), ("owner/name", 17)])
def test_a_set_up_cell_is_short_and_holds_only_finding_and_fetching(repository, lines):
    source = badges.setup_source(repository, "v1")
    assert len(source.splitlines()) <= lines
    assert "pip" not in re.findall(r"\w+", source)
    assert "OWNER/NAME" not in source and "REVISION" not in source
    assert ast.unparse(ast.parse(source).body[-1]) == "setup.ready(HOME)"


def test_an_uploaded_zip_is_unpacked_said_so_and_the_cell_may_run_twice(machine, archive):
    bad = ("../outside.txt", "name-main/../../outside.txt", "/outside.txt")
    archive(machine / "mine.zip", extra=dict.fromkeys(bad, "x"))
    done = run_cell(machine, times=2)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count(f"Unpacking the recipes from {machine / 'mine.zip'}") == 1
    assert f"helpers {machine / 'recipes' / 'helpers'}" in done.stdout
    assert "mine.zip" not in done.stdout.rpartition("path")[2], "nothing more is imported from the zip"
    assert not (machine / "recipes.unpacking").exists()
    assert not list(machine.parent.rglob("outside.txt"))


@pytest.mark.parametrize("top", ["", "name-main/", "a/b/"])
def test_the_newest_zip_that_holds_the_recipes_is_taken_whatever_folder_they_are_under(machine, archive, top):
    os.utime(archive(machine / "old.zip", extra={"old.txt": ""}), (1, 1))
    archive(machine / "new.zip", top=top)
    with zipfile.ZipFile(machine / "holiday.zip", "w") as other:
        other.writestr("photo.txt", "sea")
    done = run_cell(machine)
    assert done.returncode == 0, done.stderr
    assert "new.zip" in done.stdout and (machine / "recipes" / "requirements.txt").is_file()
    assert not list(machine.rglob("photo.txt"))


def test_a_zip_in_drive_is_found(machine, archive):
    (machine / "drive" / "MyDrive").mkdir(parents=True)
    archive(machine / "drive" / "MyDrive" / "recipes-of-mine.zip", top="")
    done = run_cell(machine)
    assert done.returncode == 0, done.stderr
    assert "MyDrive" in done.stdout and f"Ready: the recipes are in {machine / 'recipes'}" in done.stdout


def test_drive_is_mounted_when_the_session_has_no_zip(machine, archive):
    hidden = archive(machine.parent / "in-drive.zip")
    mounting = f"""
import sys, types, pathlib, shutil
google, colab, drive = (types.ModuleType(name) for name in ("google", "google.colab", "google.colab.drive"))
def mount(place):
    pathlib.Path(place, "MyDrive").mkdir(parents=True)
    shutil.copy({str(hidden)!r}, pathlib.Path(place, "MyDrive"))
google.colab, colab.drive, drive.mount = colab, drive, mount
sys.modules |= {{"google": google, "google.colab": colab}}
"""
    done = run_cell(machine, before=mounting)
    assert done.returncode == 0, done.stderr
    assert f"from {machine / 'drive' / 'MyDrive' / 'in-drive.zip'}" in done.stdout


def test_what_kaggle_unpacked_is_copied_to_where_it_can_be_written(machine):
    write_recipes(machine.parent / "input" / "datasets" / "recipes")
    done = run_cell(machine, cloud="KAGGLE_KERNEL_RUN_TYPE")
    assert done.returncode == 0, done.stderr
    assert f"Ready: the recipes are in {machine / 'recipes'}" in done.stdout


def test_a_folder_of_somebodys_own_that_is_called_recipes_is_not_touched(machine, archive):
    archive(machine / "mine.zip")
    (machine / "recipes").mkdir()
    (machine / "recipes" / "cake.txt").write_text("flour")
    assert "rename it" in stopped(machine)
    assert [path.name for path in (machine / "recipes").iterdir()] == ["cake.txt"]


def test_a_public_repository_is_fetched_at_its_tag_once(machine):
    home = write_recipes(machine.parent / "served" / "owner" / "name")
    git = ["git", "-c", "user.name=a", "-c", "user.email=a@b", "-c", "init.defaultBranch=main"]
    for command in (["init", "--quiet"], ["add", "."], ["commit", "--quiet", "-m", "all"], ["branch", "-M", "main"]):
        subprocess.run([*git, *command], cwd=home, check=True)
    done = run_cell(machine, "owner/name", github=f"file://{machine.parent / 'served'}", times=2)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count(f"Ready: the recipes are in {machine / 'recipes'}") == 2
    assert f"helpers {machine / 'recipes' / 'helpers'}" in done.stdout


@pytest.mark.parametrize("repository", ["", "owner/name"])
def test_without_any_recipes_it_ends_in_one_sentence(machine, repository):
    assert "turn Internet on" in stopped(machine, repository, github=f"file://{machine}/nowhere")
    assert not (machine / "recipes").exists()


def test_what_pip_could_not_install_is_named(machine, archive):
    archive(machine / "mine.zip", requirements="no-such-package-of-the-recipes==1\n")
    assert "no-such-package-of-the-recipes" in stopped(machine)


@pytest.mark.parametrize("repository", ["", "owner/name"])
@pytest.mark.parametrize("folder", [".", "notebooks", "data"])
def test_on_your_own_machine_it_finds_the_root_and_installs_nothing(folder, repository, machine):
    done = run_cell(machine, repository, cloud=None, cwd=ROOT / folder)
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith(f"Ready: the recipes are in {ROOT}\n")


@pytest.mark.parametrize("repository", ["", "owner/name"])
def test_on_your_own_machine_outside_the_repository_it_says_where_to_go(repository, tmp_path):
    assert "where it lies" in stopped(tmp_path / "no-rented-machine", repository, cloud=None, cwd=tmp_path)


@pytest.mark.parametrize("version", [(3, 10, 1), (3, 14, 0)])
def test_it_names_the_python_versions_that_work(version, machine):
    said = stopped(machine, cloud=None, cwd=ROOT, before=f"import sys; sys.version_info = {version}")
    assert f"{version[0]}.{version[1]}" in said and "3.11 to 3.13" in said


def test_a_pinned_set_is_missing_what_is_absent_or_of_another_version(tmp_path):
    wanted = tmp_path / "wanted.txt"
    wanted.write_text('# none\npackaging>=1\npackaging==0.1  # old\nno-such-package\nnever; python_version < "3"\n')
    assert setup.missing([wanted]) == ["packaging==0.1", "no-such-package"]


@pytest.mark.skipif(shutil.which("make") is None, reason="make is not installed: it is wherever `make test` runs this")
def test_make_help_has_a_line_for_every_target_and_lab_opens_the_first_notebook():
    said = subprocess.run(["make", "help"], cwd=ROOT, capture_output=True, text=True, check=True).stdout
    (phony,) = re.findall(r"^\.PHONY: (.*)$", (ROOT / "Makefile").read_text(encoding="utf-8"), re.MULTILINE)
    for target in set(phony.split()) - {"environment"}:
        assert re.search(rf"^make {target} +\w.{{8,}}", said, re.MULTILINE) or target == "help", target
    lab = subprocess.run(["make", "-n", "lab"], cwd=ROOT, capture_output=True, text=True, check=True).stdout
    (command,) = [line for line in lab.splitlines() if "jupyter lab" in line]
    assert (ROOT / command.split()[-1]).is_file()


@pytest.mark.skipif(shutil.which("make") is None, reason="make is not installed: it is wherever `make test` runs this")
@pytest.mark.parametrize("lacking", [False, True])
def test_make_builds_an_environment_only_where_something_is_missing(lacking, tmp_path):
    """Requirements that are newer than the environment say nothing yet: what they list may all be there."""
    write_recipes(tmp_path)
    shutil.copy(ROOT / "Makefile", tmp_path)
    for name in ("pins", "gptq", "gguf"):
        (tmp_path / "requirements" / f"{name}.txt").write_text("")
    (tmp_path / "requirements.txt").write_text("no-such-package\n" if lacking else "packaging\n")
    python = tmp_path / ".venv" / "bin" / "python"
    python.parent.mkdir(parents=True)
    python.write_text(f'#!/bin/sh\nexec {sys.executable} "$@"\n')
    python.chmod(0o755)
    done = subprocess.run(["make", "setup", "PYTHON=false"], cwd=tmp_path, capture_output=True, text=True)
    assert (tmp_path / ".venv" / "ready").exists() is not lacking, done.stdout + done.stderr
    assert bool(done.returncode) is lacking
