"""Writes what every notebook shares: its Colab badge, its set-up cell, its metadata, and README's table of notebooks.

`python notebooks/badges.py` rewrites them from pyproject.toml, which names the public repository and tag in one place;
`--repo owner/name` puts a name there first, `--repo origin` that of this clone's origin, where that is on GitHub;
`--check` writes nothing and exits 1 when something is stale. Outputs, execution counts and widget state are stripped on
the way, so that a notebook in the repository is only its source.

>>> colab_url("owner/name", "v1", "01_environment_setup.ipynb")
'https://colab.research.google.com/github/owner/name/blob/v1/notebooks/01_environment_setup.ipynb'
"""

import argparse
import hashlib
import re
import subprocess
import sys
import tomllib
from pathlib import Path

import nbformat

HERE = Path(__file__).resolve().parent
ROOT = HERE.parent
METADATA = {
    "accelerator": "GPU",
    "colab": {"gpuType": "T4", "provenance": [], "toc_visible": True},
    "kernelspec": {"display_name": "Python 3", "language": "python", "name": "python3"},
    "language_info": {"name": "python"},
}
SETUP_METADATA = {"cellView": "form", "jupyter": {"source_hidden": True}, "tags": ["setup"]}
SETUP_CELLS = {True: "setup_cell_public.py", False: "setup_cell.py"}
"""With a public repository, which is fetched, and without one. Real files, so that they are linted and tested."""


def settings(root: Path = ROOT) -> tuple[str, str]:
    """Repository ("" while there is none) and tag, from pyproject.toml's [tool.recipes]."""
    recipes = tomllib.loads((root / "pyproject.toml").read_text(encoding="utf-8"))["tool"]["recipes"]
    return recipes["repository"], recipes["tag"]


def set_repository(repository: str, root: Path = ROOT) -> None:
    """Write the public repository's name into pyproject.toml. Raises ValueError when it is not owner/name."""
    if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9-]*/[A-Za-z0-9._-]+", repository):
        raise ValueError(f"--repo must be owner/name, as GitHub writes it, not {repository!r}")
    path = root / "pyproject.toml"
    text = path.read_text(encoding="utf-8")
    path.write_text(re.sub(r'(?m)^repository = ".*"$', f'repository = "{repository}"', text), encoding="utf-8")


def origin(root: Path = ROOT) -> str | None:
    """owner/name of the GitHub repository that a clone came from; None for any other origin, or none."""
    asked = subprocess.run(["git", "remote", "get-url", "origin"], cwd=root, capture_output=True, text=True)
    found = re.search(r"github\.com[:/]([^/\s]+/[^/\s]+?)(?:\.git)?/?$", asked.stdout.strip())
    return found[1] if found else None


def colab_url(repository: str, tag: str, name: str) -> str:
    """Where Colab opens a notebook of a public repository."""
    return f"https://colab.research.google.com/github/{repository}/blob/{tag}/notebooks/{name}"


def badge(repository: str, tag: str, name: str) -> str:
    """Markdown of a notebook's badge, or a sentence that says how to open it while there is no repository.

    >>> badge("", "main", "02_dataset_preparation.ipynb")[:30]
    'Open it in Colab: upload `02_d'
    """
    if not repository:
        return f"Open it in Colab: upload `{name}` there, and a zip of this repository to the same session or to Drive."
    image = "https://colab.research.google.com/assets/colab-badge.svg"
    return f"[![Open in Colab]({image})]({colab_url(repository, tag, name)})"


def setup_source(repository: str, tag: str) -> str:
    """The set-up cell: the same bytes in every notebook. It fetches a public repository, or looks for a zip of it."""
    text = (HERE / SETUP_CELLS[bool(repository)]).read_text(encoding="utf-8").strip()
    return text.replace("OWNER/NAME", repository).replace("REVISION", tag)


def between(text: str, marker: str, content: str) -> str | None:
    """Replace what stands between <!-- marker --> and <!-- /marker -->; None when the marks are not there.

    >>> between("a <!-- x -->old<!-- /x --> b", "x", "new")
    'a <!-- x -->new<!-- /x --> b'
    """
    pattern = re.compile(rf"(<!-- {marker} -->).*?(<!-- /{marker} -->)", re.DOTALL)
    if not pattern.search(text):
        return None
    return pattern.sub(lambda found: found[1] + content + found[2], text)


def with_badge(title: str, text: str) -> str:
    """The title cell with this badge between its marks; without marks it goes below the heading."""
    text = f"\n\n{text}\n\n"  # Markdown reads a line that begins with a comment as HTML: the badge has its own
    replaced = between(title, "badge", text)
    if replaced is not None:
        return replaced
    heading, _, rest = title.partition("\n")
    return f"{heading}\n\n<!-- badge -->{text}<!-- /badge -->\n\n{rest.lstrip()}".rstrip()


def with_neighbours(last: str, text: str) -> str:
    """The last cell with these links between their marks; without marks they go below, where there are links."""
    replaced = between(last, "colab", text)
    if replaced is not None:
        return replaced
    return f"{last}\n\n<!-- colab -->{text}<!-- /colab -->" if text else last


def neighbours(repository: str, tag: str, names: list[str], name: str) -> str:
    """Markdown for Colab, where a link from one notebook's file to another's leads nowhere; "" without a repository."""
    index = names.index(name)
    beside = [*names[max(index - 1, 0) : index], *names[index + 1 : index + 2]]
    links = [f"[{other.removesuffix('.ipynb')}]({colab_url(repository, tag, other)})" for other in beside]
    return f"In Colab: {' · '.join(links)}" if repository and links else ""


def strip(notebook: nbformat.NotebookNode) -> nbformat.NotebookNode:
    """Only the source: no outputs, counts, injected cells or widget state; the metadata every notebook carries.

    Cells keep their ids; one without gets its own from its text, so that a second run changes nothing.
    """
    notebook.nbformat, notebook.nbformat_minor = 4, 5
    notebook.metadata = nbformat.from_dict(METADATA)
    notebook.cells = [cell for cell in notebook.cells if "injected-parameters" not in cell.metadata.get("tags", [])]
    used = set()
    for cell in notebook.cells:
        tags = cell.metadata.get("tags", [])
        cell.metadata = nbformat.from_dict({"tags": tags} if tags else {})
        cell.source = cell.source.strip("\n")
        cell_id = cell.get("id") or hashlib.sha256(cell.source.encode()).hexdigest()[:8]
        while cell_id in used:
            cell_id += "x"
        used.add(cell_id)
        cell["id"] = cell_id
        if cell.cell_type == "code":
            cell.outputs, cell.execution_count = [], None
    return notebook


def normalise(
    notebook: nbformat.NotebookNode, name: str, repository: str, tag: str, names: list[str]
) -> nbformat.NotebookNode:
    """Strip a notebook and write its badge, its set-up cell (before the first code where there is none) and its links.

    names: all notebooks in their order, this one among them.
    """
    strip(notebook)
    title, last = notebook.cells[0], [cell for cell in notebook.cells if cell.cell_type == "markdown"][-1]
    title.source = with_badge(title.source, badge(repository, tag, name))
    last.source = with_neighbours(last.source, neighbours(repository, tag, names, name))
    found = [cell for cell in notebook.cells if "setup" in cell.metadata.get("tags", [])]
    if not found:
        codes = [index for index, cell in enumerate(notebook.cells) if cell.cell_type == "code"]
        found = [nbformat.v4.new_code_cell(id="setup")]
        notebook.cells.insert(codes[0] if codes else len(notebook.cells), found[0])
    found[0].source = setup_source(repository, tag)
    found[0].metadata = nbformat.from_dict(SETUP_METADATA)
    return notebook


def summary(notebook: nbformat.NotebookNode) -> tuple[str, str]:
    """Title and sentence of result, from the first cell."""
    title = between(notebook.cells[0].source, "badge", "") or notebook.cells[0].source
    blocks = [block.strip() for block in re.sub(r"<!--.*?-->", "", title).split("\n\n") if block.strip()]
    return blocks[0].lstrip("# "), " ".join(blocks[1].split()) if len(blocks) > 1 else ""


def rendered(root: Path = ROOT) -> dict[Path, str]:
    """Every file that depends on the repository's name -> what it should hold.

    Raises ValueError when README.md has no place for the table.
    """
    repository, tag = settings(root)
    files, rows, badges = {}, [], []
    paths = sorted((root / "notebooks").glob("*.ipynb"))
    for path in paths:
        names = [other.name for other in paths]
        notebook = normalise(nbformat.read(path, as_version=4), path.name, repository, tag, names)
        files[path] = nbformat.writes(notebook, version=4) + "\n"
        title, sentence = summary(notebook)
        link = f"[{title}](notebooks/{path.name})"
        rows.append(f"| {link} | {sentence} |" + (f" {badge(repository, tag, path.name)} |" if repository else ""))
        badges.append(f"- {link}: {badge(repository, tag, path.name)}")
    head = "| notebook | what you get |" + (" open |\n|---|---|---|" if repository else "\n|---|---|")
    how = (
        f"Each badge opens its notebook at `{tag}` of {repository}."
        if repository
        else "There is no public repository yet, so no badge either: `make badges` makes them once git's origin is on "
        "GitHub, or with REPO=owner/name."
    )
    files[root / "colab_badges.md"] = f"# Open in Colab\n\n{how}\n\n" + "\n".join(badges) + "\n"
    readme = root / "README.md"
    if readme.is_file():
        text = between(readme.read_text(encoding="utf-8"), "notebooks", "\n" + "\n".join([head, *rows]) + "\n")
        if text is None:
            raise ValueError(f"{readme} has no place for the table: add <!-- notebooks --><!-- /notebooks -->")
        files[readme] = text
    return files


def main(arguments: list[str] | None = None, root: Path = ROOT) -> int:
    """Write, or check, everything that depends on the repository's name. Returns the exit status."""
    parser = argparse.ArgumentParser(prog="python notebooks/badges.py", description=__doc__.splitlines()[0])
    parser.add_argument("--repo", metavar="OWNER/NAME", help="the public repository, or origin; put in pyproject.toml")
    parser.add_argument("--check", action="store_true", help="write nothing; exit 1 when something is stale")
    chosen = parser.parse_args(arguments)
    try:
        repository = origin(root) if chosen.repo == "origin" else chosen.repo
        if repository is not None and not chosen.check:
            set_repository(repository, root)
        files = rendered(root)
    except ValueError as error:
        print(error, file=sys.stderr)
        return 2
    stale = [path for path, text in files.items() if not path.is_file() or path.read_text(encoding="utf-8") != text]
    for path in stale:
        if not chosen.check:
            path.write_text(files[path], encoding="utf-8")
        print(f"{'stale' if chosen.check else 'wrote'} {path.relative_to(root)}", file=sys.stderr)
    if chosen.check and stale:
        print("run `python notebooks/badges.py` and commit what it writes", file=sys.stderr)
    return 1 if chosen.check and stale else 0


if __name__ == "__main__":
    sys.exit(main())
