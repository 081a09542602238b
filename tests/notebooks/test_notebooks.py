"""The notebooks' structure: what each of them promises a reader, cell by cell, without running them."""

import ast
import importlib
import inspect
import io
import json
import re
import tokenize
from pathlib import Path

import badges
import nbformat
import pytest

from helpers.config import flat
from helpers.models import profile

FOLDER = Path(__file__).resolve().parents[2] / "notebooks"
NAMES = [
    "01_environment_setup.ipynb",
    "02_dataset_preparation.ipynb",
    "03_qlora_finetuning.ipynb",
    "04_gptq_quantization.ipynb",
    "05_evaluation.ipynb",
    "06_export.ipynb",
    "07_mixture.ipynb",
    "08_preferences.ipynb",
]
PROSE_WORDS = 120
STATEMENTS = (ast.Assign, ast.AugAssign, ast.Import, ast.ImportFrom, ast.For, ast.With, ast.If, ast.Delete, ast.Assert)


@pytest.fixture(params=NAMES)
def name(request):
    return request.param


@pytest.fixture
def notebook(name):
    return nbformat.read(FOLDER / name, as_version=4)


def code(notebook):
    return [cell.source for cell in notebook.cells if cell.cell_type == "code"]


def prose(notebook):
    return [cell.source for cell in notebook.cells if cell.cell_type == "markdown"]


def nodes(notebook):
    """Every syntax node of every code cell; a %magic line would not parse, and there is none."""
    return [node for source in code(notebook) for node in ast.walk(ast.parse(source))]


def tagged(notebook, tag):
    return [cell for cell in notebook.cells if tag in cell.metadata.get("tags", [])]


def test_there_are_these_eight_notebooks_and_no_other():
    assert sorted(path.name for path in FOLDER.glob("*.ipynb")) == NAMES


def test_everything_generated_is_current(capsys):
    assert badges.main(["--check"]) == 0, capsys.readouterr().err


def test_the_set_up_cell_is_the_same_in_every_notebook_and_comes_before_any_other_code():
    sources = set()
    for name in NAMES:
        notebook = nbformat.read(FOLDER / name, as_version=4)
        (setup,) = tagged(notebook, "setup")
        assert code(notebook)[0] == setup.source, name
        sources.add(setup.source)
    assert sources == {badges.setup_source(*badges.settings())}


def test_it_is_a_valid_notebook_with_only_its_source(notebook):
    nbformat.validate(notebook)
    assert notebook.metadata == badges.METADATA
    assert all(not cell.outputs and cell.execution_count is None for cell in notebook.cells if "outputs" in cell)
    assert len({cell.id for cell in notebook.cells}) == len(notebook.cells)


def test_its_title_cell_has_a_heading_a_result_and_its_own_badge(name, notebook):
    title = prose(notebook)[0]
    assert notebook.cells[0].cell_type == "markdown" and title.startswith("# ")
    assert badges.badge(*badges.settings(), name) in title
    assert all(
        link.endswith(f"/notebooks/{name}") for link in re.findall(r"https://colab\.research[^)\s]+ipynb", title)
    )
    heading, sentence = badges.summary(notebook)
    assert len(heading.split()) >= 2 and sentence.endswith((".", "!")), "title, then one sentence of result"


def test_its_parameters_are_plain_variables_right_after_set_up(name, notebook):
    (cell,) = tagged(notebook, "parameters")
    assert code(notebook)[1] == cell.source
    values = {}
    for statement in ast.parse(cell.source).body:
        assert isinstance(statement, ast.Assign) and isinstance(statement.targets[0], ast.Name), ast.unparse(statement)
        values[statement.targets[0].id] = ast.literal_eval(statement.value)
    assert {"profile", "workspace"} <= set(values), "what a headless run sets"
    if name.startswith("03"):
        assert {"rank", "alpha", "learning_rate"} <= set(values), "where the sliders start"


COLAB_FIELDS = {'"boolean"': bool, '"string"': str, '"raw"': object, '"integer"': int, '"number"': int | float}
"""Of those that Colab's notebook on forms shows, what is used here, and what such a field writes."""


def test_its_parameters_are_a_form_in_colab_that_can_hold_what_stands_there(name, notebook):
    """`# @param`, a list or a type or both: `["a", "b"] {type: "raw", allow-input: true}`.

    A raw field writes what is chosen as it is, None or a number; any other writes it in quotes.
    """
    (cell,) = tagged(notebook, "parameters")
    first, *lines = cell.source.splitlines()
    assert first.startswith("# @title ")
    fields = [line for line in lines if not line.startswith("# @markdown ")]
    for line in fields:
        form = re.fullmatch(r"(\w+) = (.+?)  # @param ?(\[.*?\])? ?(?:{(.*)})?", line)
        assert form, f"{line}: every parameter is a field of the form"
        _, value, choices, settings = form.groups()
        settings = dict(one.split(": ") for one in (settings or "").split(", ") if one)
        assert set(settings) <= {"type", "allow-input"} and settings.get("allow-input", "true") == "true", line
        raw, kind = settings.get("type") == '"raw"', COLAB_FIELDS[settings.get("type", '"string"')]
        assert isinstance(ast.literal_eval(value), kind), line
        for offered in json.loads(choices or "[]"):
            assert isinstance(offered, str), f"{line}: Colab's lists hold strings"
            written = offered if raw else json.dumps(offered)
            ast.literal_eval(written)
        assert not choices or (value if raw else ast.literal_eval(value)) in json.loads(choices), line


def test_what_its_form_writes_is_read(name, notebook):
    (cell,) = tagged(notebook, "parameters")
    written = {node.targets[0].id for node in ast.parse(cell.source).body}
    after = [source for source in code(notebook) if source not in (cell.source, code(notebook)[0])]
    read = {node.id for source in after for node in ast.walk(ast.parse(source)) if isinstance(node, ast.Name)}
    assert written <= read, f"{sorted(written - read)}: a field that nothing reads"
    for field, choices in re.findall(r"(\w+) = .*?# @param (\[.*?\]) {type: \"raw\"", cell.source):
        for value in map(ast.literal_eval, json.loads(choices)):
            if value is not None:  # as chosen last
                assert flat(profile("tiny", **{field: value}))[field] == value


def test_it_defines_nothing_and_branches_on_no_constant(notebook):
    for node in nodes(notebook):
        assert not isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef), ast.unparse(node)
        if isinstance(node, ast.If | ast.While | ast.IfExp):
            assert not isinstance(node.test, ast.Constant), ast.unparse(node)


def test_it_has_no_commented_out_code(notebook):
    for source in code(notebook):
        for token in tokenize.generate_tokens(io.StringIO(source).readline):
            if token.type == tokenize.COMMENT:
                assert not is_code(token.string.lstrip("#! ")), token.string


def is_code(text):
    """Whether a comment's text is a statement that could run: `x = 1`, `f(x)`, `import y`, `if z:`."""
    try:
        body = ast.parse(text + " pass" if text.endswith(":") else text).body
    except SyntaxError:
        return False
    return any(
        isinstance(node, STATEMENTS) or (isinstance(node, ast.Expr) and isinstance(node.value, ast.Call))
        for node in body
    )


@pytest.mark.parametrize(
    ("comment", "expected"),
    [
        ("rank = 32", True),
        ("train(x)", True),
        ("if True:", True),
        ("import os", True),
        ("tokens a step", False),
        ("rank", False),
        ("W + (alpha / rank) BA", False),
        ("(batch, seq, hidden)", False),
    ],
)
def test_the_search_for_commented_out_code_tells_code_from_prose(comment, expected):
    assert is_code(comment) == expected


def test_its_prose_is_short(notebook):
    for text in prose(notebook):
        text = re.sub(r"```.*?```", "", re.sub(r"<!--.*?-->", "", text), flags=re.DOTALL)
        words = [word for line in text.splitlines() if not line.lstrip().startswith("|") for word in line.split()]
        assert len(words) <= PROSE_WORDS, f"{len(words)} words: {text[:80]} ..."


def test_code_follows_a_reason(notebook):
    kinds = [
        cell.cell_type for cell in notebook.cells if not {"setup", "parameters"} & set(cell.metadata.get("tags", []))
    ]
    runs = "".join("c" if kind == "code" else "m" for kind in kinds)
    assert "cccc" not in runs, "never four code cells without a word between them"


def test_it_links_the_notebooks_before_and_after(name, notebook):
    index = NAMES.index(name)
    last = prose(notebook)[-1]
    assert notebook.cells[-1].cell_type == "markdown"
    for neighbour in NAMES[max(index - 1, 0) : index] + NAMES[index + 1 : index + 2]:
        assert f"{neighbour})" in last, neighbour


def test_its_links_to_files_of_the_repository_lead_somewhere(notebook):
    for text in prose(notebook):
        for target in re.findall(r"\]\((?!https?:|#|mailto:)([^)\s]+)\)", text):
            assert (FOLDER / target.split("#")[0]).exists(), target


def test_every_helper_it_uses_exists_and_takes_these_arguments(notebook):
    known = {}
    for node in nodes(notebook):
        if isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] == "helpers":
            module = importlib.import_module(node.module)
            for alias in node.names:
                found = getattr(module, alias.name, None)
                known[alias.asname or alias.name] = found or importlib.import_module(f"{node.module}.{alias.name}")
        elif isinstance(node, ast.Import):
            for alias in node.names:
                assert alias.name.split(".")[0] != "helpers", "say `from helpers import …`"
    for node in nodes(notebook):
        if (
            isinstance(node, ast.Attribute)
            and isinstance(node.value, ast.Name)
            and inspect.ismodule(known.get(node.value.id))
        ):
            assert hasattr(known[node.value.id], node.attr), ast.unparse(node)
        if isinstance(node, ast.Call):
            check_arguments(node, called(node.func, known))


def called(function, known):
    """The helper that a call names, or None when it is not one."""
    if isinstance(function, ast.Name):
        return known.get(function.id)
    if isinstance(function, ast.Attribute) and isinstance(function.value, ast.Name):
        module = known.get(function.value.id)
        return getattr(module, function.attr, None) if inspect.ismodule(module) else None
    return None


def check_arguments(call, function):
    """Bind a call's arguments to the helper's signature, where the call spells them all out."""
    spelled = not any(isinstance(value, ast.Starred) for value in call.args) and all(word.arg for word in call.keywords)
    if callable(function) and spelled:
        try:
            inspect.signature(function).bind(*call.args, **{word.arg: word.value for word in call.keywords})
        except TypeError as error:
            pytest.fail(f"{ast.unparse(call)}: {error}")
