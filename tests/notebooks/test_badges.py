"""Badges and the set-up cell: written from one place, and the cell run as Colab and Kaggle would run it."""

import functools
import http.server
import os
import subprocess
import sys
import threading
import zipfile
from pathlib import Path

import nbformat
import pytest

from helpers.badges import METADATA, between, colab_url, main, normalise, set_repository, settings, setup_source, strip

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture
def repository(tmp_path):
    """A small copy of the repository: one notebook as a person leaves it, with outputs and widget state."""
    root = tmp_path / "repository"
    (root / "notebooks").mkdir(parents=True)
    (root / "pyproject.toml").write_bytes((ROOT / "pyproject.toml").read_bytes())
    (root / "README.md").write_text("# Recipes\n<!-- notebooks -->\n<!-- /notebooks -->\nend\n")
    notebook = nbformat.v4.new_notebook(
        metadata={"widgets": {"state": 1}, "kernelspec": {"name": "conda-x", "display_name": "x"}}
    )
    notebook.cells = [
        nbformat.v4.new_markdown_cell("# 1 · Environment\n\nYou know what fits.\n\nFree T4: 2 minutes"),
        nbformat.v4.new_code_cell("rank = 16", metadata={"tags": ["parameters"], "scrolled": True}),
        nbformat.v4.new_code_cell(
            "rank", execution_count=7, outputs=[nbformat.v4.new_output("stream", text="16")], metadata={"outputId": "x"}
        ),
    ]
    nbformat.write(notebook, root / "notebooks" / "01_environment_setup.ipynb")
    return root


def read(root):
    return nbformat.read(root / "notebooks" / "01_environment_setup.ipynb", as_version=4)


def test_writes_badge_setup_metadata_table_and_is_then_current(repository):
    assert main(["--check"], repository) == 1
    assert main(["--repo", "owner/name"], repository) == 0
    assert settings(repository) == ("owner/name", settings()[1])
    notebook = read(repository)
    nbformat.validate(notebook)
    url = (
        f"https://colab.research.google.com/github/owner/name/blob/{settings()[1]}/notebooks/01_environment_setup.ipynb"
    )
    assert f"({url})" in notebook.cells[0].source and "You know what fits." in notebook.cells[0].source
    assert notebook.metadata == METADATA
    setup, parameters, last = notebook.cells[1:]
    assert setup.metadata.tags == ["setup"] and 'REPOSITORY, TAG = "owner/name"' in setup.source
    assert parameters.metadata == {"tags": ["parameters"]}
    assert (last.outputs, last.execution_count, last.metadata) == ([], None, {})
    readme = (repository / "README.md").read_text()
    assert "| [1 · Environment](notebooks/01_environment_setup.ipynb) | You know what fits. | [![" in readme
    assert readme.endswith("<!-- /notebooks -->\nend\n")
    assert url in (repository / "colab_badges.md").read_text()
    assert main(["--check"], repository) == 0


def test_writing_twice_changes_nothing_and_ids_stay(repository):
    main([], repository)
    before = (repository / "notebooks" / "01_environment_setup.ipynb").read_bytes()
    ids = [cell.id for cell in read(repository).cells]
    main([], repository)
    assert (repository / "notebooks" / "01_environment_setup.ipynb").read_bytes() == before
    assert len(set(ids)) == len(ids)


def test_a_new_name_replaces_the_old_one_everywhere(repository):
    main(["--repo", "old/old"], repository)
    main(["--repo", "new/new"], repository)
    text = "".join(path.read_text() for path in repository.rglob("*") if path.is_file())
    assert "old/old" not in text
    assert text.count("new/new") >= 4  # pyproject, notebook twice, README, list of badges


def test_without_a_repository_it_says_how_to_open_instead_of_a_dead_badge(repository):
    set_repository("owner/name", repository)
    text = (repository / "pyproject.toml").read_text()
    (repository / "pyproject.toml").write_text(text.replace("owner/name", ""))
    main([], repository)
    title = read(repository).cells[0].source
    assert "upload `01_environment_setup.ipynb`" in title and "zip of this repository" in title
    assert "colab.research" not in title + (repository / "README.md").read_text()


@pytest.mark.parametrize("name", ["owner", "owner/na me", "https://github.com/owner/name", "", 'o/n"\nx = 1'])
def test_a_wrong_repository_name_is_refused_and_writes_nothing(repository, name, capsys):
    before = (repository / "pyproject.toml").read_bytes()
    assert main(["--repo", name], repository) == 2
    assert "owner/name" in capsys.readouterr().err
    assert (repository / "pyproject.toml").read_bytes() == before


def test_a_readme_without_a_place_for_the_table_is_named(repository, capsys):
    (repository / "README.md").write_text("# Recipes\n")
    assert main([], repository) == 2
    assert "<!-- notebooks -->" in capsys.readouterr().err


def test_strip_drops_injected_parameters_and_gives_lost_ids_back():
    notebook = nbformat.v4.new_notebook()
    notebook.cells = [
        nbformat.v4.new_code_cell("a = 1", id="same"),
        nbformat.v4.new_code_cell("a = 2", metadata={"tags": ["injected-parameters"]}),
        nbformat.v4.new_code_cell("a = 3", id="same"),
    ]
    cells = strip(notebook).cells
    assert [cell.source for cell in cells] == ["a = 1", "a = 3"]
    assert cells[0].id == "same" and cells[1].id != "same"


def test_setup_cell_is_put_before_the_first_code_and_replaced_where_it_stands():
    notebook = nbformat.v4.new_notebook()
    notebook.cells = [nbformat.v4.new_markdown_cell("# T"), nbformat.v4.new_code_cell("1")]
    once = normalise(notebook, "a.ipynb", "", "main", ["a.ipynb"])
    assert [bool(cell.metadata.get("tags")) for cell in once.cells] == [False, True, False]
    once.cells[1].source = "old"
    assert normalise(once, "a.ipynb", "", "main", ["a.ipynb"]).cells[1].source == setup_source("", "main")
    assert len(once.cells) == 3


def test_the_last_cell_links_the_neighbours_in_colab_once_there_is_a_repository():
    names = ["01_a.ipynb", "02_b.ipynb", "03_c.ipynb"]
    notebook = nbformat.v4.new_notebook()
    notebook.cells = [nbformat.v4.new_markdown_cell(text) for text in ("# T", "Next: [3](03_c.ipynb)")]
    notebook.cells.insert(1, nbformat.v4.new_code_cell("1"))
    assert normalise(notebook, names[1], "", "main", names).cells[-1].source == "Next: [3](03_c.ipynb)"
    for repository in ("old/old", "owner/name", "owner/name"):
        last = normalise(notebook, names[1], repository, "main", names).cells[-1].source
    assert last.count("In Colab:") == 1 and "old/old" not in last
    assert colab_url("owner/name", "main", names[0]) in last and colab_url("owner/name", "main", names[2]) in last


def test_between_leaves_backslashes_alone_and_reports_missing_marks():
    assert between("<!-- a -->x<!-- /a -->", "a", r"\1\g<0>") == r"<!-- a -->\1\g<0><!-- /a -->"
    assert between("nothing", "a", "x") is None


# --- the set-up cell itself, run in a fresh interpreter as a rented machine would run it ---


@pytest.fixture
def archive():
    """Writes a zip of the recipes as GitHub makes it, all under one folder; they need nothing, so that pip is quick."""

    def write(path, top="name-main/", extra=None, requirements=""):
        with zipfile.ZipFile(path, "w") as file:
            for source in (ROOT / "pyproject.toml", *(ROOT / "helpers").glob("*.py")):
                file.write(source, top + str(source.relative_to(ROOT)))
            file.writestr(top + "requirements.txt", requirements)
            file.writestr(top + "requirements-nodeps.txt", "")
            for name, text in (extra or {}).items():
                file.writestr(name, text)
        return path

    return write


def run_setup(home, repository="", cloud="COLAB_RELEASE_TAG", cwd=None, times=1, **replaced):
    """Run the set-up cell with `home` where Colab has /content; returns the finished process."""
    source = setup_source(repository, "main").replace('"/content"', repr(str(home)))
    source = source.replace('"/kaggle/working"', repr(str(home))).replace('"/kaggle/input"', repr(str(home / "input")))
    for old, new in replaced.items():
        source = source.replace({"github": "https://github.com"}[old], new)
    clean = {name: value for name, value in os.environ.items() if name not in ("PYTHONPATH", "COLAB_RELEASE_TAG")}
    return subprocess.run(
        [sys.executable, "-c", "\n".join([source] * times) + "\nimport helpers; print('helpers', helpers.__file__)"],
        cwd=cwd or home,
        env=clean | ({cloud: "1"} if cloud else {}) | {"PYTHONSAFEPATH": "1", "PIP_NO_INDEX": "1"},
        capture_output=True,
        text=True,
        timeout=60,
    )


def test_setup_unpacks_an_uploaded_zip_says_so_and_may_run_twice(tmp_path, archive):
    home = tmp_path / "home"
    home.mkdir()
    archive(home / "mine.zip", extra={"../outside.txt": "x", "name-main/../../outside.txt": "x", "/outside.txt": "x"})
    done = run_setup(home, times=2)
    assert done.returncode == 0, done.stderr
    assert "no public repository yet" in done.stdout
    assert done.stdout.count(f"Unpacking the recipes from {home / 'mine.zip'}") == 1
    assert f"helpers {home / 'recipes' / 'helpers'}" in done.stdout
    assert not (home / "recipes.unpacking").exists()
    assert not list(tmp_path.rglob("outside.txt"))


def test_setup_finds_the_zip_in_drive_beside_an_unrelated_one(tmp_path, archive):
    drive = tmp_path / "drive" / "MyDrive"
    drive.mkdir(parents=True)
    archive(drive / "recipes-of-mine.zip", top="")
    with zipfile.ZipFile(tmp_path / "holiday.zip", "w") as other:
        other.writestr("photo.txt", "sea")
    done = run_setup(tmp_path)
    assert done.returncode == 0, done.stderr
    assert "MyDrive" in done.stdout and not (tmp_path / "photo.txt").exists()


def test_setup_fetches_the_repository_at_its_tag(tmp_path, archive):
    served, home = tmp_path / "served", tmp_path / "home"
    (served / "owner/name/archive").mkdir(parents=True)
    home.mkdir()
    archive(served / "owner/name/archive/main.zip")
    handler = functools.partial(http.server.SimpleHTTPRequestHandler, directory=served)
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        done = run_setup(home, "owner/name", github=f"http://127.0.0.1:{server.server_port}")
        server.shutdown()
    assert done.returncode == 0, done.stderr
    assert f"Ready: the recipes are in {home / 'recipes'}" in done.stdout


def test_setup_says_that_the_repository_is_out_of_reach_and_takes_the_zip(tmp_path, archive):
    archive(tmp_path / "mine.zip")
    done = run_setup(tmp_path, "owner/name", github="http://127.0.0.1:9")
    assert done.returncode == 0, done.stderr
    assert "cannot be fetched" in done.stdout and "mine.zip" in done.stdout


def test_setup_copies_the_recipes_that_kaggle_unpacked(tmp_path, archive):
    with zipfile.ZipFile(archive(tmp_path / "mine.zip", top="")) as file:
        file.extractall(tmp_path / "input" / "datasets" / "recipes")
    (tmp_path / "mine.zip").unlink()
    done = run_setup(tmp_path, cloud="KAGGLE_KERNEL_RUN_TYPE")
    assert done.returncode == 0, done.stderr
    assert f"Ready: the recipes are in {tmp_path / 'recipes'}" in done.stdout


def test_setup_without_any_recipes_ends_in_one_sentence(tmp_path):
    done = run_setup(tmp_path)
    assert done.returncode == 1
    assert "no zip of the repository" in done.stderr and "Traceback" not in done.stderr


def test_setup_names_what_pip_could_not_install(tmp_path, archive):
    archive(tmp_path / "mine.zip", requirements="no-such-package-of-the-recipes==1\n")
    done = run_setup(tmp_path)
    assert done.returncode == 1
    assert "no-such-package-of-the-recipes" in done.stderr and "Traceback" not in done.stderr


@pytest.mark.parametrize("folder", [".", "notebooks", "data"])
def test_setup_on_your_own_machine_finds_the_root_and_installs_nothing(folder, tmp_path):
    done = run_setup(tmp_path, cloud=None, cwd=ROOT / folder)
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith(f"Ready: the recipes are in {ROOT}\n")


def test_setup_on_your_own_machine_outside_the_repository_says_where_to_go(tmp_path):
    done = run_setup(tmp_path, cloud=None)
    assert done.returncode == 1
    assert "notebooks" in done.stderr and "Traceback" not in done.stderr


@pytest.mark.parametrize("version", [(3, 10, 1), (3, 14, 0)])
def test_setup_names_the_python_versions_that_work(version):
    source = f"import sys; sys.version_info = {version}\n" + setup_source("", "main")
    done = subprocess.run([sys.executable, "-c", source], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 1
    assert f"{version[0]}.{version[1]}" in done.stderr and "3.11 to 3.13" in done.stderr
    assert "Traceback" not in done.stderr
