"""What pages and notebooks tell people to type, to open and to look up is there: commands, settings, files, words."""

import argparse
import ast
import doctest
import json
import re
import shlex
import sys
from pathlib import Path

import pytest

from helpers import cli
from helpers.cli import flags
from helpers.config import RunConfig, field_parts
from helpers.models import families
from helpers.show import troubleshooting

ROOT = Path(__file__).resolve().parents[1]
NOTEBOOKS = sorted(ROOT.glob("notebooks/*.ipynb"))
PAGES = [
    ROOT / "README.md",
    ROOT / "colab_badges.md",
    *sorted(ROOT.glob("data/**/*.md")),
    *sorted(ROOT.glob("helpers/**/*.md")),
]
ALL = [*PAGES, *NOTEBOOKS]
OTHER_PROGRAMS = {"--dtype", "--groups", "--help", "--name", "--shape", "--tokens", "--toy"}
"""Flags of vLLM, of the command itself, and of the scripts that pages name beside them."""
EVERYDAY = """
    API AWQ AutoGPTQ CPU CSV CUDA ExLlamaV2 GB GPTQModel GPU GiB HF_TOKEN HTML JSON JSONL KiB LM MB MiB NVIDIA NaN
    OpenAI OpenDocCN PEFT PyTorch RAM RTX UTF VRAM YAML
"""
"""Capitals that a Python programmer has met, and names of programs."""


def prose(path: Path) -> str:
    """A page, or a notebook's markdown cells."""
    text = path.read_text(encoding="utf-8")
    if path.suffix == ".md":
        return text
    return "\n\n".join("".join(cell["source"]) for cell in json.loads(text)["cells"] if cell["cell_type"] == "markdown")


def typed(text: str) -> list[str]:
    """What stands in code: every line of a block, a line that ends in a backslash with the next; every inline span."""
    blocks = re.findall(r"(?ms)^```\w*\n(.*?)^```", text)
    lines = [line for block in blocks for line in re.sub(r"\\\n\s*", " ", block).splitlines()]
    spans = re.findall(r"`([^`\n]+)`", re.sub(r"(?ms)^```.*?^```", "", text))
    return [re.split(r"\s{2,}#|\s+\(", line)[0].strip() for line in lines] + spans


def command(text: str) -> list[str] | None:
    """The arguments of `python -m helpers`, where that is what is typed; a stage with a flag stands for it too.

    >>> command("RECIPES_API_KEY=… python -m helpers serve --page")
    ['serve', '--page']
    >>> command("finetune --gpus all"), command("merge"), command("vllm serve FOLDER")
    (['finetune', '--gpus', 'all'], None, None)
    """
    found = re.search(r"-m helpers ([^;]+)", text) or re.match(rf"((?:{'|'.join(cli.STAGES)}) --.+)", text)
    return shlex.split(found[1].replace("…", "")) if found else None


@pytest.fixture(scope="module")
def real_parser():
    return flags.parser()


def known_flags(parser: argparse.ArgumentParser) -> set[str]:
    """Every flag of every stage."""
    (stages,) = [action for action in parser._actions if isinstance(action, argparse._SubParsersAction)]
    return {flag for stage in stages.choices.values() for flag in stage._option_string_actions}


def fails(arguments: list[str], parser, capsys) -> str | None:
    """Why the real parser does not take it, or its settings; None where both do. STAGE stands for each stage."""
    for stage in cli.STAGES if arguments[0] == "STAGE" else [arguments[0]]:
        try:
            options = parser.parse_args([stage, *arguments[1:]])
            options.workspace = options.config = None  # what a run of this folder chose last is no page's business
            cli.configuration(options)
        except SystemExit as end:
            return capsys.readouterr().err if end.code else None
        except ValueError as error:
            return str(error)
    return None


def settings(text: str) -> dict[str, object]:
    """Names and values that a span of code gives to settings.

    >>> settings("rank = 16"), settings('config = config.with_values(free_base=True, use="chosen")')
    ({'rank': 16}, {'free_base': True, 'use': 'chosen'})
    """
    inner = re.search(r"with_values\((.*)\)", text)
    call = ast.parse(f"f({inner[1] if inner else text})", mode="eval").body
    return {word.arg: ast.literal_eval(word.value) for word in call.keywords}


def test_examples_in_docstrings():
    assert doctest.testmod(sys.modules[__name__]).failed == 0


@pytest.mark.parametrize("path", ALL, ids=lambda path: str(path.relative_to(ROOT)))
def test_every_command_on_a_page_is_one_that_the_command_line_takes(path, real_parser, capsys, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    for text in typed(prose(path)):
        arguments = command(text)
        why = fails(arguments, real_parser, capsys) if arguments else None
        assert why is None, f"{text}: {why}"


@pytest.mark.parametrize("path", ALL, ids=lambda path: str(path.relative_to(ROOT)))
def test_every_flag_and_make_target_on_a_page_is_there(path, real_parser):
    known = known_flags(real_parser) | OTHER_PROGRAMS
    targets = set(re.findall(r"(?m)^([a-z-]+):", (ROOT / "Makefile").read_text(encoding="utf-8")))
    for text in typed(prose(path)):
        if re.match(r"--[a-z]", text):
            assert text.split()[0].rstrip(".,") in known, text
        if found := re.match(r"make ([a-z-]+)", text):
            assert found[1] in targets, text
        if found := re.match(r"python ((?:data|notebooks|tests)/\S+\.py)", text):
            assert (ROOT / found[1]).is_file(), text


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_every_setting_that_a_notebook_says_to_type_takes_that_value(path):
    cells = json.loads(path.read_text(encoding="utf-8"))["cells"]
    (form,) = ["".join(cell["source"]) for cell in cells if "parameters" in cell["metadata"].get("tags", [])]
    parameters = set(re.findall(r"(?m)^(\w+) = ", form))
    text = prose(path)
    for one in typed(text):
        if "with_values(" in one:
            RunConfig().with_values(**settings(one))
        elif re.fullmatch(r"(\w+) = [^=…]+", one):
            assert set(settings(one)) <= parameters, f"{one}: no parameter of this notebook; say config.with_values(…)"
        elif re.fullmatch(r"\w+=[^=…]+", one):  # a value that is spoken of, and not to be typed
            RunConfig().with_values(**settings(one))
    for one in typed(text.partition("## If it went wrong")[2]):
        assert not re.fullmatch(r"\w+=\S+", one), f"{one}: a remedy is a line that can be typed"
        assert one not in set(field_parts()) - parameters, f"{one}: a remedy says where to put it"


DEFINED = {"codebooks", "experts", "further", "heads", "router"}
"""What is set apart where it is explained, or stressed."""


def test_every_label_that_a_notebook_names_stands_on_a_control_a_row_or_a_heading():
    """*ended*, *what if on*: what the reader is told to look for is what the helpers, or the notebooks, write."""
    sources = [path.read_text(encoding="utf-8") for path in sorted(ROOT.glob("helpers/**/*.py"))]
    written = "\n".join([*sources, *(prose(path) for path in NOTEBOOKS)])
    for path in NOTEBOOKS:
        text = re.sub(r"```.*?```|`[^`]+`|\*\*[^*]+\*\*", "", prose(path), flags=re.DOTALL)
        for label in set(re.findall(r"(?<![\w*])\*([^*\n]+)\*(?![\w*])", text)) - DEFINED:
            assert re.search(rf"[\"']{re.escape(label)}[\"':,]|^#+ {re.escape(label)}", written, re.MULTILINE), label


NO_SETTING = {"assistant", "context", "first", "force_remount", "private", "resume", "second", "user"}
"""What errors say with = that is no setting: a word of the panel, a column, a served model's name, an argument."""


def errors() -> list[tuple[str, str]]:
    """Where an error is raised, and its sentence, {} for what is filled in; and the remedies of known messages."""
    found = []
    for path in sorted(ROOT.glob("helpers/**/*.py")):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            for part in node.exc.args if isinstance(node, ast.Raise) and isinstance(node.exc, ast.Call) else ():
                pieces = part.values if isinstance(part, ast.JoinedStr) else [part]
                words = "".join(
                    getattr(piece, "value", "") if isinstance(piece, ast.Constant) else "{}"
                    for piece in pieces
                    if not isinstance(piece, ast.Constant) or isinstance(piece.value, str)
                )
                found.append((f"{path.relative_to(ROOT)}:{node.lineno}", words))
    return found + [(trouble.message, trouble.remedy) for trouble in troubleshooting.TROUBLES]


def test_every_flag_and_setting_that_an_error_names_is_there_and_takes_that_value(real_parser):
    known = known_flags(real_parser) | {"--no-deps"}
    sentences = errors()
    assert len(sentences) > 200
    for place, text in sentences:
        unknown = set(re.findall(r"(?<![\w-])--[a-z][a-z-]+", text)) - known
        assert not unknown, f"{place}: {unknown} in {text!r}"
        for name, value in re.findall(r"\b([a-z_]+)=([\w'-]+|\{\})", text):
            assert name in NO_SETTING or name in field_parts(), f"{place}: {name} in {text!r}"
            if name not in NO_SETTING and value != "{}":
                RunConfig().with_values(**{name: cli.flag_value(value.strip("'"))})
        named = re.search(r"notebook \d\d_", text)
        assert not named, f"{place}: an error says workspace.maker(stage), since it may end a command too: {text!r}"


@pytest.mark.parametrize("path", ALL, ids=lambda path: str(path.relative_to(ROOT)))
def test_every_file_and_heading_that_a_page_links_or_names_is_there(path):
    text = prose(path)
    for target in re.findall(r"\]\((?!https?:|mailto:)([^)\s]+)\)", text):
        file, _, heading = target.partition("#")
        found = (path.parent / file).resolve() if file else path
        assert found.exists(), target
        assert not heading or heading in anchors(found), target
    for name in typed(text):
        if re.fullmatch(r"(helpers|tests|data|notebooks|requirements)/[\w./-]+", name):
            assert (ROOT / name).exists(), name


def test_the_readme_counts_families_and_notebooks_as_they_are():
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    assert f"{len(families.KINDS)} families" in text
    assert text.count("(notebooks/0") == len(NOTEBOOKS)
    own = [name for name, kind in families.KINDS.items() if kind.own]
    assert own == ["mistral", "llama", "qwen2", "mixtral"], "README names them under Fewer models"


def measured(name: str) -> list[dict]:
    return [json.loads(line) for line in (ROOT / "data" / "measurements" / name).read_text().splitlines()]


def test_what_the_readme_says_beside_its_rows_is_what_was_measured():
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    tables = (ROOT / "data" / "measurements" / "README.md").read_text(encoding="utf-8")
    sides = re.findall(r"(?m)^\| (\S+) \| ([\d,]+) · ([\d.]+) \| ([\d,]+) · ([\d.]+) \| ([\d,]+) · ([\d.]+) \|", tables)
    fastest, leanest = {}, []
    for size, ours, _, lean, lean_gib, theirs, their_gib in sides:
        ours, lean, theirs = (int(figure.replace(",", "")) for figure in (ours, lean, theirs))
        fastest[size] = f"{ours / theirs:.2f}"
        leanest.append((lean / theirs, float(lean_gib), float(their_gib)))
    assert (
        f"{fastest['4×2,048']} times at 8,192 tokens a step, {fastest['1×16,384']} at 16,384 and {fastest['1×2,048']} "
        "at 2,048"
    ) in text
    (slow, fast), (low, high), (their_low, their_high) = ((min(all_), max(all_)) for all_ in zip(*leanest, strict=True))
    assert f"{slow:.2f} to {fast:.2f} times as fast, and takes {low} to {high} GiB beside its {their_low} to" in text
    assert f"{their_low} to {their_high}." in text
    trained = [row for row in measured("h200_aqlm.jsonl") if "mixtral" in row.get("model", "") and row["fits"]]
    used = [row["allocated_gib"] for row in trained]
    off = max(abs(row["predicted_allocated_gib"] / row["allocated_gib"] - 1) for row in trained)
    assert f"in {min(used):.1f} to {max(used):.1f} GiB, predicted to {off:.1%}".replace("%", " %") in text
    assert f"contexts up to {max(row['seq'] for row in trained):,} tokens" in text
    others = [row["allocated_gib"] / row["predicted_allocated_gib"] for row in measured("h200_mixture.jsonl")]
    assert f"more than {max(others) - 1:.1%} above".replace("%", " %") in text
    ours, _, beforehand, _ = measured("h200_preferences.jsonl")
    assert f"{ours['busy_tok_s'] / beforehand['busy_tok_s']:.1f} times the GPU-time speed of trl's" in text
    assert f"in {ours['reserved_gib']:.1f} GiB beside its {beforehand['reserved_gib']:.1f}" in text


def anchors(page: Path) -> set[str]:
    """What headings are linked by, as GitHub makes it of them."""
    heads = re.findall(r"(?m)^#+ (.+)$", page.read_text(encoding="utf-8"))
    return {re.sub(r"[^\w\s-]", "", head.lower()).replace(" ", "-") for head in heads}


def test_every_word_in_capitals_is_explained_before_it_is_used_or_where_it_stands():
    """In the order of reading: known from notebook 1's glossary on, or where it is bold, linked, or has parentheses."""
    known = set(re.findall(r"\w+", EVERYDAY))
    for path in NOTEBOOKS:
        text = re.sub(r"```.*?```|<!--.*?-->|`[^`]+`", "", prose(path), flags=re.DOTALL)
        glossary = re.findall(r"(?m)^\|.*\|$", text.partition("</details>")[0]) if path == NOTEBOOKS[0] else []
        told = re.findall(r"\*\*[^*]+\*\*|\[[^]]+\]\(https|(?:\S+ )?\([^)]+\)", text)
        known |= {word for part in [*glossary, *told] for word in re.findall(r"\w+", part)}
        said = {word.removesuffix("s") for word in re.findall(r"\b[A-Z][A-Za-z]*[A-Z]\w*\b", text)} - known
        assert not said, f"{path.name}: {sorted(said)}"
