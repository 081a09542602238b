"""Fine-tuning speaks the field's words: a GPU, chunks, checkpointed layers, what is saved for backward."""

import io
import re
import tokenize

import pytest

from helpers.models import ROOT

FILES = [*sorted((ROOT / "helpers" / "finetune").rglob("*.py"))]
FILES += [ROOT / "helpers" / "models" / name for name in ("attention.py", "offload.py")]
OLD = {
    r"\bcards?\b": "GPU",
    r"\bpieces?\b": "chunk",
    r"\b(un)?checked layers?\b|\blayers? recomputes?\b": "checkpointed",
    r"\bunpack\w*\b": "dequantize",
    r"\b(one|a) launch\b": "fused",
    r"\bkeeps? (for|until) (the |its )?backward\b|\bkept (for|until)\b": "saved for backward",
    r"\bFACTS\b|\bDESIGN\b|\btrap \d+": "the reason itself",
}


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_words_of_the_field_in_comments_and_sentences(path):
    code = path.read_text(encoding="utf-8")
    said = tokenize.generate_tokens(io.StringIO(code).readline)
    kinds = {tokenize.COMMENT, tokenize.STRING, getattr(tokenize, "FSTRING_MIDDLE", None)}
    for token in (token for token in said if token.type in kinds):
        for old, better in OLD.items():
            found = re.search(old, token.string, re.IGNORECASE)
            assert not found, f"line {token.start[0]}: {found[0]!r}; say {better}"
