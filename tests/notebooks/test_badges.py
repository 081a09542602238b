"""Badges: everything that depends on the repository's name is written from one place, and says so when it is stale."""

import subprocess
from pathlib import Path

import nbformat
import pytest
from badges import METADATA, between, colab_url, main, normalise, set_repository, settings, setup_source, strip

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
    assert setup.metadata.tags == ["setup"] and '"https://github.com/owner/name"' in setup.source
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


@pytest.mark.parametrize(
    ("remote", "name"),
    [
        ("https://github.com/owner/name.git", "owner/name"),
        ("https://token@github.com/owner/name", "owner/name"),
        ("git@github.com:owner/na.me.git", "owner/na.me"),
        ("ssh://git@github.com/owner/name/", "owner/name"),
        ("/srv/git/name.git", ""),
        (None, ""),
    ],
)
def test_the_home_is_read_from_gits_origin_when_that_is_on_github(remote, name, repository):
    subprocess.run(["git", "init", "--quiet", str(repository)], check=True)
    if remote:
        subprocess.run(["git", "remote", "add", "origin", remote], cwd=repository, check=True)
    assert main(["--repo", "origin"], repository) == 0
    assert settings(repository)[0] == name
    assert (f"github.com/{name}" in read(repository).cells[1].source) is bool(name)


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
