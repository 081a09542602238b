"""The field's words, which a reader of papers and of other libraries knows, in code, notebooks and pages."""

import io
import json
import re
import tokenize
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
INSTEAD = {
    r"\bFACTS\b|\bDESIGN('s)?\b|\b[Tt]rap \d": "the reason itself, with its public source",
    r"\breserved beyond\b": "allocator overhead",
    r"\bone[- ]launch\b|\bin one launch\b": "fused AdamW",
    r"\blayer work\b": "temporary buffers",
    r"\bunchecked layers?\b|\bchecked layers?\b": "layers without / with activation checkpointing",
    r"\bread off\b": "calibrated on",
    r"\bunpack(ing|ed|s)? (the )?(weights|layers?|NF4)": "dequantization",
    r"\b[Tt]h(e|is|at) card('s)? (has|is|holds|runs|computes|memory)\b": "GPU",
    r"\b(small|fast|second|other|graphics) cards?\b": "GPU",
}
"""What is not said here -> what is."""
PROSE = [ROOT / "README.md", *sorted(ROOT.glob("data/**/*.md")), *sorted(ROOT.glob("helpers/**/*.md"))]
CODE = sorted([*ROOT.glob("helpers/**/*.py"), *ROOT.glob("notebooks/*.py"), *ROOT.glob("tests/benchmarks/*.py")])
NOTEBOOKS = sorted(ROOT.glob("notebooks/*.ipynb"))


def said(path: Path) -> str:
    """What a file says to a reader: all of a page, a notebook's cells, a program's comments and texts."""
    text = path.read_text(encoding="utf-8")
    if path.suffix == ".ipynb":
        return "\n".join("".join(cell["source"]) for cell in json.loads(text)["cells"])
    if path.suffix == ".py":
        kinds = {tokenize.COMMENT, tokenize.STRING, getattr(tokenize, "FSTRING_MIDDLE", tokenize.STRING)}
        parts = tokenize.generate_tokens(io.StringIO(text).readline)
        return "\n".join(part.string for part in parts if part.type in kinds)
    return text


@pytest.mark.parametrize("path", [*PROSE, *CODE, *NOTEBOOKS], ids=lambda path: str(path.relative_to(ROOT)))
def test_the_words_are_the_field_s(path):
    text = said(path)
    for pattern, better in INSTEAD.items():
        found = re.search(pattern, text)
        assert found is None, f"{found[0]!r}: say {better}"
