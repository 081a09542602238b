"""Ollama's Modelfile beside a GGUF file: the chat template in Go's words, stops, context and sampling defaults.

Ollama reads the Jinja template inside the file since 0.30; earlier versions guess one, mostly wrongly for Mistral. A
TEMPLATE is right in every version. It has no <s>: Ollama's tokenizer writes that itself.

>>> print(write_text("model-Q4_K_M.gguf", MISTRAL_V3, 2048).splitlines()[0])
FROM ./model-Q4_K_M.gguf
"""

from pathlib import Path
from typing import Any

from helpers.export.vocabulary import GENERATION_TAGS
from helpers.models import TINY
from helpers.models.templates import MISTRAL_V1, MISTRAL_V3

LAST_USER = """\
{{- $last := -1 }}
{{- range $i, $m := .Messages }}{{ if eq $m.Role "user" }}{{ $last = $i }}{{ end }}{{ end }}
"""
FIRST_USER = """\
{{- $first := -1 }}
{{- range $i, $m := .Messages }}{{ if and (eq $m.Role "user") (eq $first -1) }}{{ $first = $i }}{{ end }}{{ end }}
"""
GO_V3 = (
    LAST_USER
    + """\
{{- range $i, $m := .Messages }}
{{- if eq $m.Role "user" }}[INST] {{ if and $.System (eq $i $last) }}{{ $.System }}

{{ end }}{{ $m.Content }}[/INST]
{{- else if eq $m.Role "assistant" }} {{ $m.Content }}</s>
{{- end }}
{{- end }}"""
)
"""v0.3 and the tiny model: a system prompt stands at the head of the last user turn."""
GO_V1 = (
    FIRST_USER
    + """\
{{- range $i, $m := .Messages }}
{{- if eq $m.Role "user" }} [INST] {{ if and $.System (eq $i $first) }}{{ $.System }}

{{ end }}{{ $m.Content }} [/INST]
{{- else if eq $m.Role "assistant" }} {{ $m.Content }}</s>
{{- end }}
{{- end }}"""
)
"""v0.1 and v0.2: spaces inside and before the brackets, a system prompt in the first user turn."""
SAMPLING = {"temperature": "temperature", "top_p": "top_p", "top_k": "top_k", "repetition_penalty": "repeat_penalty"}
"""transformers' name of a generation default -> Ollama's."""


def go_template(jinja: str | None) -> str | None:
    """The same template in Go's text/template, for those that are known here; None for a foreign one."""
    if jinja is None:
        return None
    known = {MISTRAL_V1: GO_V1, MISTRAL_V3: GO_V3}
    tiny = TINY / "chat_template.jinja"
    if tiny.is_file():  # somebody's own small base may lie in its place
        known |= {tiny.read_text(encoding="utf-8"): GO_V3}
    plain = {GENERATION_TAGS.sub("", text).strip(): go for text, go in known.items()}
    return plain.get(GENERATION_TAGS.sub("", jinja).strip())


def write_text(gguf: str, jinja: str | None, context: int, generation: dict[str, Any] | None = None) -> str:
    """A Modelfile's text. gguf: the file's name, which lies beside it. context: tokens that Ollama keeps.

    generation: the model's generation_config.json; its sampling defaults become Ollama's where it samples.
    """
    lines = [f"FROM ./{gguf}"]
    template = go_template(jinja)
    if template is None:
        lines.append(
            "# This model's chat template is not one that is known here in Go's words, so none is written: Ollama 0.30"
        )
        lines.append("# and later use the template inside the GGUF file; do not use an earlier version with it.")
    else:
        lines += [f'TEMPLATE """{template}"""', 'PARAMETER stop "[INST]"', 'PARAMETER stop "[/INST]"']
    lines.append(f"PARAMETER num_ctx {context}")
    defaults = generation or {}
    if defaults.get("do_sample"):
        lines += [f"PARAMETER {theirs} {defaults[ours]}" for ours, theirs in SAMPLING.items() if defaults.get(ours)]
    return "\n".join(lines) + "\n"


def guide(files: list[str], context: int) -> str:
    """A README's three commands: Ollama, llama-server, LM Studio; of the first of several files."""
    first, name = files[0], Path(files[0]).stem.lower()
    more = [f"Also here: `{file}` (`-f {Path(file).stem}.Modelfile`)." for file in files[1:]]
    return f"""# {name}

`{first}` opens in everything that llama.cpp drives. In this folder:

    ollama create {name} -f Modelfile && ollama run {name}
    llama-server -m {first} -c {context}  # then http://127.0.0.1:8080
    lms import {first}  # LM Studio; or drop the file onto its window

Chats are read as in training: the chat template is inside the file. Raw completion without a template misses the
space that Mistral's tokenizer puts before a text's first word; write it yourself.
{"".join(f"{chr(10)}{line}" for line in more)}"""


def write(
    folder: Path, files: list[str], jinja: str | None, context: int, generation: dict[str, Any] | None
) -> list[Path]:
    """A Modelfile a GGUF file, and README.md, into a folder; what the user wrote under those names is not touched.

    files: names of GGUF files there; the first one's is Modelfile itself, the others' have the file's name before it.
    """
    texts = {f"{Path(file).stem}.Modelfile": write_text(file, jinja, context, generation) for file in files}
    texts = {"Modelfile": texts.pop(f"{Path(files[0]).stem}.Modelfile"), **texts}
    texts["README.md"] = guide(files, context)
    written = []
    for name, text in texts.items():
        path = folder / name
        if path.exists() and path.read_text(encoding="utf-8", errors="replace") != text:
            path = folder / f"{Path(files[0]).stem}.{name}"
        path.write_text(text, encoding="utf-8")
        written.append(path)
    return written
