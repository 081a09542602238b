"""A list of turns, in whatever words its keys are, as messages of system, user and assistant.

>>> row = Row({})
>>> messages(row, [{"from": "human", "value": "Hi"}, {"from": "gpt", "value": "Ho", "weight": 0}], "conversations")
[{'role': 'user', 'content': 'Hi'}, {'role': 'assistant', 'content': 'Ho', 'weight': 0}]
>>> messages(row, [{"human": "Hi", "assistant": "Ho"}], "conversation")
[{'role': 'user', 'content': 'Hi'}, {'role': 'assistant', 'content': 'Ho'}]
"""

from typing import Any

from helpers.sources.columns import MEDIA, REASONING, TOOLS, Row, is_empty

ROLES = {
    **dict.fromkeys(
        ("user", "human", "prompter", "instruction", "input", "customer", "question", "query", "q"), "user"
    ),
    **dict.fromkeys(("assistant", "gpt", "chatgpt", "model", "bot", "bing", "bard", "response"), "assistant"),
    **dict.fromkeys(("chatbot", "output", "answer", "a", "ai", "claude", "agent"), "assistant"),
    "q": "user",
    **dict.fromkeys(("system", "developer"), "system"),
}
TOOL_ROLES = {"tool", "function", "ipython", "observation", "function_call", "tool_call", "tool_response"}
ROLE_KEYS = ("role", "from", "sender", "speaker", "author")
TEXT_KEYS = ("content", "value", "text", "parts", "message", "mes", "utterance")
WEIGHTS = ("weight", "loss_weight", "loss", "train")
"""Keys that say whether an answer is trained: OpenAI's, LLaMA-Factory's, ms-swift's, axolotl's."""
USUAL = ("user", "assistant", "system")
SHARED = {"from", "value"}
TEXT_PARTS = {"text", "input_text", "output_text", None}
THOUGHT_PARTS = {"thinking", "redacted_thinking", "think", "reasoning", "reasoning_content", "reasoning_text"}
TOOL_PARTS = {"tool_use", "tool_result", "tool_call", "function", "server_tool_use", "web_search_tool_result"}


class BadRow(ValueError):
    """A row that cannot be read; kind is the check that it failed."""

    def __init__(self, kind: str, detail: str) -> None:
        super().__init__(detail)
        self.kind = kind


def messages(row: Row, turns: Any, name: str) -> list[dict[str, Any]]:
    """Messages of a list of turns; an answer that is not to be trained has weight 0.

    Fields of turns that nothing reads go into row.extras. Raises BadRow naming the place in the list.
    """
    if not isinstance(turns, list):
        raise BadRow("wrong-type", f"{name} must be text or a list of turns, not {named(turns)}")
    first = turns[0] if turns else None
    if isinstance(first, str) and all(isinstance(turn, str) for turn in turns):
        raise BadRow(
            "wrong-type", f"{name} is a list of texts without roles: source_format=alternating lets them take turns"
        )
    if isinstance(first, list | tuple) and all(isinstance(turn, list | tuple) and len(turn) == 2 for turn in turns):
        return pairs(turns, name)
    found: list[dict[str, Any]] = []
    for i, turn in enumerate(turns):
        if not isinstance(turn, dict):
            raise BadRow("wrong-type", f"{name}[{i}] must be an object with role and content, not {named(turn)}")
        if len(turn) == 2 and "content" in turn and "role" in turn:
            known, content = turn["role"], turn["content"]
            if known in USUAL and isinstance(content, str):
                found.append(turn)
                continue
            found.append({"role": role(known, name, i), "content": text_of(row, content, name, i)})
        elif turn.keys() == SHARED:
            found.append(
                {"role": role(turn["from"], name, i), "content": text_of(row, turn["value"], name, i, "value")}
            )
        else:
            found += unusual(row, turn, name, i)
    return found


def unusual(row: Row, turn: dict[str, Any], name: str, i: int) -> list[dict[str, Any]]:
    """The message of a turn with other keys than role and content, or the two of one that holds a whole exchange."""
    speaks = next((key for key in ROLE_KEYS if not is_empty(turn.get(key))), None)
    if speaks is None:
        spoken = [key for key in turn if key.lower() in ROLES]
        if spoken and "role" not in turn and "from" not in turn:
            note_extras(row, turn, set(spoken), name)
            return [{"role": ROLES[key.lower()], "content": text_of(row, turn[key], name, i, key)} for key in spoken]
        if "role" in turn:
            raise BadRow("wrong-type", f"{name}[{i}].role must be text, not {named(turn['role'])}")
        raise BadRow(
            "wrong-type",
            f"{name}[{i}].role is missing: it has {', '.join(map(str, turn))[:80]}; a turn needs role and content, or "
            "from and value",
        )
    calls = next((key for key in turn if key in TOOLS and not is_empty(turn[key])), None)
    if calls:
        raise BadRow("tool-calls", f"a turn calls a tool instead of answering ({calls})")
    media = next((key for key in turn if (key in MEDIA or key == "files") and not is_empty(turn[key])), None)
    if media:
        raise BadRow("media", f"{name}[{i}] has {media}")
    says = next((key for key in TEXT_KEYS if not is_empty(turn.get(key))), None)
    says = says or next((key for key in TEXT_KEYS if key in turn), "content")
    message = {"role": role(turn[speaks], name, i), "content": text_of(row, turn.get(says), name, i, says)}
    attached = [part.get("extracted_content") for part in turn.get("attachments") or [] if isinstance(part, dict)]
    if attached:  # Claude keeps a long text that was pasted beside what was typed
        message["content"] = "\n\n".join(filter(None, [message["content"], *map(str, filter(None, attached))]))
    used = {speaks, says, "attachments", *(key for key in TEXT_KEYS if turn.get(key) == turn.get(says))}
    if isinstance(turn.get("text"), str) and turn["text"] and turn["text"] in message["content"]:
        used.add("text")
    weight = next((key for key in WEIGHTS if key in turn), None)
    if weight and turn[weight] in (0, 1):
        used.add(weight)
        if turn[weight] == 0 and message["role"] == "assistant":
            message["weight"] = 0
    thought = next((key for key in turn if key in REASONING and not is_empty(turn[key])), None)
    if thought:
        used.add(thought)
        row.notes["reasoning"] = f"{name}[{i}].{thought}"
    note_extras(row, turn, used, name)
    return [message]


def note_extras(row: Row, turn: dict[str, Any], used: set[str], name: str) -> None:
    """Remember the fields of a turn that nothing reads."""
    for key, value in turn.items():
        if key not in used and not is_empty(value):
            row.extras.setdefault(f"{name}[].{key}", value)


def text_of(row: Row, content: Any, name: str, i: int, key: str = "content") -> str:
    """The text of a turn: a text, null, or a list of parts of which only text can be trained on."""
    if isinstance(content, str):
        return content
    if content is None:
        return ""
    if isinstance(content, dict) and isinstance(content.get("parts"), list):  # ChatGPT's content of one message
        content = content["parts"]
    if not isinstance(content, list):
        raise BadRow("wrong-type", f"{name}[{i}].{key} must be text, not {named(content)}")
    texts = []
    for part in content:
        if isinstance(part, str):
            if key == "value":
                raise BadRow("wrong-type", f"{name}[{i}].{key} must be text, not a list")
            texts.append(part)
            continue
        if not isinstance(part, dict):
            raise BadRow("wrong-type", f"{name}[{i}].{key} must be text or a list of parts, not of {named(part)}")
        what = part.get("type")
        if what in THOUGHT_PARTS or (what is None and part.get("thought") is True):
            row.notes["reasoning"] = f"{name}[{i}] {what or 'thought'}"
        elif what in TEXT_PARTS:
            text = next((part[key] for key in ("text", "value", "content") if isinstance(part.get(key), str)), None)
            if text is None and what is None and (set(part) & MEDIA or "inlineData" in part or "fileData" in part):
                raise BadRow("media", f"{name}[{i}] holds {', '.join(part)}")
            if text is None:
                raise BadRow("wrong-type", f"{name}[{i}] has a part of {', '.join(part) or 'nothing'} without text")
            texts.append(text)
        elif what in TOOL_PARTS:
            raise BadRow("tool-calls", f"a turn holds {what}, and tools are not trained here")
        elif any(word in str(what) for word in ("image", "video", "audio", "file", "document", "media")):
            raise BadRow("media", f"{name}[{i}] holds {what}, and only text can be trained on")
        else:
            raise BadRow(
                "wrong-type", f"a turn holds {what!s:.40} ({', '.join(part)}), and only text can be trained on"
            )
    return "".join(texts)


def pairs(turns: list, name: str) -> list[dict[str, str]]:
    """Messages of [question, answer] pairs, as a history is kept."""
    for i, pair in enumerate(turns):
        if not all(isinstance(text, str) for text in pair):
            raise BadRow("wrong-type", f"{name}[{i}] must be a question and an answer, both text")
    return [
        {"role": speaker, "content": text}
        for pair in turns
        for speaker, text in zip(("user", "assistant"), pair, strict=True)
    ]


def role(value: Any, name: str = "", i: int = 0) -> str:
    """The role that a name stands for. Raises BadRow for tools and for names that nobody uses."""
    if isinstance(value, dict):
        value = value.get("role") or value.get("name") or value
    if not isinstance(value, str):
        raise BadRow("wrong-type", f"{name}[{i}].role must be text, not {named(value)}")
    known = ROLES.get(value) or ROLES.get(value.strip().lower())
    if known:
        return known
    if value.strip().lower() in TOOL_ROLES:
        raise BadRow("tool-calls", f"a turn has the role {value}, and tools are not trained here")
    raise BadRow(
        "wrong-type",
        f"a turn has the role {value!r:.40}; there are system, user and assistant: rename who is to be learned",
    )


def named(value: Any) -> str:
    """What a value is, in people's words.

    >>> named(None), named(float("nan")), named([1])
    ('null', 'nan', 'a list')
    """
    if value is None or isinstance(value, bool | int | float):
        return "null" if value is None else str(value).lower()
    return {dict: "an object", list: "a list", str: f"{value!r:.40}"}.get(type(value), f"a {type(value).__name__}")
