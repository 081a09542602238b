"""Whether llama.cpp reads a file's tokens as training did: asked of llama.cpp itself, before the file gets its name."""

from pathlib import Path
from typing import Any

from helpers.models.gguf_engine import Server, serving
from helpers.models.templates import Template

PROBES = (
    "Hello, world!",
    "  two spaces,\ta tab\nand a line",
    "naïve café – 'quoted' “text” 1234567.89",
    "日本語 русский العربية 🙂🇪🇺",
)
"""Texts that every tokenizer is held to: spaces, accents, scripts, byte fallback."""
CHECKED_CHATS = 200


def check(file: Path, model: Path, prepared: Path | None) -> int:
    """Hold llama.cpp's tokens of a file to the model's tokenizer; returns how many texts were compared.

    Raises ValueError showing the first that differs.
    """
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(model)
    texts, chats = list(PROBES), []
    if tokenizer.chat_template:
        texts, chats = [], [[{"role": "user", "content": text}] for text in PROBES] + prompts(prepared)
    with serving(file, as_stored=True) as server:
        return check_tokens(server, tokenizer, texts, chats)


def prompts(prepared: Path | None) -> list[list[dict[str, str]]]:
    """Conversations of a prepared folder up to their last question, at most CHECKED_CHATS; one of our own without."""
    own = [{"role": "user", "content": "Who are you?"}]
    if prepared is None or not (Path(prepared) / "train").is_dir():
        return [own]
    from datasets import load_from_disk

    rows = load_from_disk(str(Path(prepared) / "train"))
    chosen = rows.select(range(min(len(rows), CHECKED_CHATS)))["messages"]
    asked = [messages[:-1] for messages in chosen if len(messages) > 1 and messages[-1]["role"] == "assistant"]
    return [[dict(turn) for turn in messages] for messages in asked] or [own]


def check_tokens(server: Server, tokenizer: Any, texts: list[str], chats: list[list[dict[str, str]]]) -> int:
    """Hold llama.cpp's tokens and template to the tokenizer's own; returns how many were compared.

    chats: conversations that end with a user turn, read as training reads them (models/templates.py). Texts by
    themselves: Mistral's tokenizer puts a space before one's first word, llama.cpp is told not to, since it would do
    so behind each special token of a chat; so it may need that space with the text. Raises ValueError showing the
    first that differs.
    """
    template = Template(tokenizer) if chats else None
    for text in texts:
        expected = tokenizer(text, add_special_tokens=False)["input_ids"]
        for content in (text, f" {text}"):
            found = server.ask("/tokenize", {"content": content, "add_special": False, "parse_special": True})["tokens"]
            if found == expected:
                break
        refuse_difference(text, found, expected, tokenizer)
    for messages in chats:
        rendered = server.ask("/apply-template", {"messages": messages})["prompt"]
        found = server.ask("/tokenize", {"content": rendered, "add_special": True, "parse_special": True})
        refuse_difference(rendered, found["tokens"], template.prompt(messages), tokenizer)
    return len(texts) + len(chats)


def refuse_difference(text: str, found: list[int], expected: list[int], tokenizer: Any) -> None:
    """Raises ValueError naming the first token that differs."""
    if found == expected:
        return
    pairs = zip([*found, None], [*expected, None], strict=False)
    at = next(i for i, (one, other) in enumerate(pairs) if one != other)
    shown = [tokenizer.convert_ids_to_tokens(ids[max(at - 2, 0) : at + 3]) for ids in (found, expected)]
    raise ValueError(
        f"llama.cpp reads {shown[0]} where training read {shown[1]}, at token {at} of {text[:60]!r}: this tokenizer "
        "cannot be exported without changing what the model sees"
    )
