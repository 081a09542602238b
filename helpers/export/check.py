"""Whether llama.cpp reads a file's tokens as training did: asked of llama.cpp itself, before the file gets its name."""

from pathlib import Path
from typing import Any

from helpers.models.gguf_engine import Server, serving
from helpers.models.templates import Template
from helpers.workspace.prepared import conversations

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
        chats += whole(prepared, Template(tokenizer))
    with serving(file, as_stored=True) as server:
        return check_tokens(server, tokenizer, texts, chats)


def prompts(prepared: Path | None) -> list[list[dict[str, str]]]:
    """Conversations of a prepared folder up to their last question, at most CHECKED_CHATS; one of our own without."""
    own = [{"role": "user", "content": "Who are you?"}]
    if prepared is None or not (Path(prepared) / "train").is_dir():
        return [own]
    rows = conversations(Path(prepared) / "train")
    chosen = rows.select(range(min(len(rows), CHECKED_CHATS)))["messages"]
    asked = [messages[:-1] for messages in chosen if len(messages) > 1 and messages[-1]["role"] == "assistant"]
    return [[dict(turn) for turn in messages] for messages in asked] or [own]


def whole(prepared: Path | None, template: Template) -> list[list[dict[str, str]]]:
    """A held-out conversation to its end, with one more question behind it; none where there is none.

    Its answers and the end of each are read as well. It is one whose tokens in the prepared folder, those that training
    goes by, are how the template begins: a template may write the past of a conversation otherwise.
    """
    place = Path(prepared or "") / "heldout"
    if prepared is None or not any(place.glob("*.arrow")):
        return []
    rows = conversations(place)
    for row in rows.select(range(min(len(rows), CHECKED_CHATS))):
        messages = [{"role": turn["role"], "content": turn["content"]} for turn in row["messages"]]
        longer = [*messages, {"role": "user", "content": "Why?"}]
        if messages[-1]["role"] != "assistant" or len(row["input_ids"]) < row["full_tokens"]:
            continue
        if template.prompt(longer)[: len(row["input_ids"])] == row["input_ids"]:
            return [longer]
    return []


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
