"""Rows in, messages out: the shapes in which people keep conversations, recognised from a row's fields.

>>> row = {"instruction": "Add.", "input": "1 and 2", "output": "3"}
>>> recognise(row)
'alpaca'
>>> to_messages(row, "alpaca")
[{'role': 'user', 'content': 'Add.\\n\\n1 and 2'}, {'role': 'assistant', 'content': '3'}]
"""

import ast
import json
import re
from typing import Any, NotRequired

from pydantic import TypeAdapter, ValidationError
from typing_extensions import TypedDict

FORMATS = ("messages", "sharegpt", "alpaca", "prompt-completion", "flattened-text", "plain-text")

TURN_FIELDS = ("messages", "conversations", "conversation", "dialogue", "dialog", "chat", "turns")
PAIRS = (
    ("prompt", "completion"),
    ("prompt", "response"),
    ("prompt", "chosen"),
    ("prompt", "output"),
    ("question", "answer"),
    ("question", "response"),
    ("query", "response"),
    ("query", "answer"),
    ("input", "output"),
)
ALPACA_ANSWERS = ("output", "response", "answer", "completion")
ALPACA_INPUTS = ("input", "context")
FIELDS = {*TURN_FIELDS, *ALPACA_ANSWERS, *ALPACA_INPUTS, *(name for pair in PAIRS for name in pair)}
FIELDS |= {"instruction", "system", "history", "text", "content"}
"""All field names that any format reads; a table's other columns need not be loaded."""

ROLES = {
    **dict.fromkeys(("user", "human", "prompter", "instruction", "input"), "user"),
    **dict.fromkeys(("assistant", "gpt", "chatgpt", "model", "bot", "bing", "bard", "response"), "assistant"),
    **dict.fromkeys(("system", "developer"), "system"),
}
TOOL_ROLES = {"tool", "function", "ipython", "observation", "function_call", "tool_call", "tool_response"}

HASHES = re.compile(r"###\s*(Human|User|Instruction|Input|Assistant|Response|System)\s*:\s*", re.IGNORECASE)
INST = re.compile(r"\[INST\]")
INST_SYSTEM = re.compile(r"\s*<<SYS>>(.*?)<</SYS>>\s*", re.DOTALL)
CHATML = re.compile(r"<\|im_start\|>(\w+)\n(.*?)(?:<\|im_end\|>|\Z)", re.DOTALL)
MARKED = re.compile(r"###\s*(?:Human|User|Instruction)\s*:|\[INST\]|<\|im_start\|>", re.IGNORECASE)


LITERAL_LIMIT = 1_000_000
"""Letters of a list as Python writes it: its parser takes a hundred times as much memory."""


class BadRow(ValueError):
    """A row that cannot be read; kind is the check that it failed."""

    def __init__(self, kind: str, detail: str) -> None:
        super().__init__(detail)
        self.kind = kind


class Part(TypedDict):
    """A piece of a message's content; only text can be trained on."""

    type: str
    text: NotRequired[str]


class Turn(TypedDict):
    """OpenAI's and UltraChat's message."""

    role: str
    content: NotRequired[str | list[Part] | None]
    tool_calls: NotRequired[Any]
    function_call: NotRequired[Any]


ShareTurn = TypedDict("ShareTurn", {"from": str, "value": str | None})

TURNS = TypeAdapter(list[Turn])
SHARE_TURNS = TypeAdapter(list[ShareTurn])
TEXT = TypeAdapter(str)
HISTORY = TypeAdapter(list[tuple[str, str]])


def recognise(row: Any) -> str | None:
    """The format of a row by its fields; None when it is none of FORMATS.

    >>> recognise({"conversations": [{"from": "human", "value": "Hi"}]}), recognise({"text": "[INST] Hi [/INST] Ho"})
    ('sharegpt', 'flattened-text')
    """
    if isinstance(row, list):
        row = {"messages": row}
    if isinstance(row, str):
        row = {"text": row}
    if not isinstance(row, dict):
        return None
    for name in TURN_FIELDS:
        turns = row.get(name)
        if turns:
            return "sharegpt" if "from" in (turns if isinstance(turns, str) else first_keys(turns)) else "messages"
    if "instruction" in row and any(name in row for name in ALPACA_ANSWERS):
        return "alpaca"
    if any(prompt in row and answer in row for prompt, answer in PAIRS):
        return "prompt-completion"
    text = row.get("text", row.get("content"))
    if isinstance(text, str):
        return "flattened-text" if MARKED.search(text) else "plain-text"
    return "messages" if any(name in row for name in TURN_FIELDS) else None


def first_keys(turns: Any) -> dict:
    """The first turn where it is an object, else nothing."""
    return turns[0] if isinstance(turns, list) and turns and isinstance(turns[0], dict) else {}


def to_messages(row: Any, row_format: str) -> list[dict[str, str]]:
    """A row's messages, roles named system, user and assistant (or one of role text, for plain text).

    Raises BadRow saying which field is wrong; ValueError for a format that does not exist.
    """
    if row_format in ("messages", "sharegpt"):
        return from_turns({"messages": row} if isinstance(row, list) else needs_object(row))
    if row_format == "alpaca":
        return from_alpaca(needs_object(row))
    if row_format == "prompt-completion":
        return from_pair(needs_object(row))
    if row_format in ("flattened-text", "plain-text"):
        text = row if isinstance(row, str) else needs_object(row).get("text", row.get("content"))
        text = valid(TEXT, text, "text")
        return from_flattened(text) if row_format == "flattened-text" else [{"role": "text", "content": text}]
    raise ValueError(f"source_format must be auto or one of {', '.join(FORMATS)}, not {row_format!r}")


def needs_object(row: Any) -> dict:
    """The row itself where it is an object with named fields."""
    if not isinstance(row, dict):
        raise BadRow("wrong-type", f"a row must be an object with named fields, not {named(row)}")
    return row


def from_turns(row: dict) -> list[dict[str, str]]:
    """A list of turns under one of TURN_FIELDS: role and content, from and value, or plain strings taking turns."""
    name = next((name for name in TURN_FIELDS if row.get(name)), None)
    if name is None:
        name = next((name for name in TURN_FIELDS if name in row), None)
        if name is None:
            raise BadRow("unknown-fields", f"no field {' or '.join(TURN_FIELDS[:3])}, only {', '.join(map(str, row))}")
        if row[name] == []:
            return []
    turns = parsed(row[name])
    if isinstance(turns, list) and turns and all(isinstance(turn, str) for turn in turns):
        return [{"role": ("user", "assistant")[i % 2], "content": turn} for i, turn in enumerate(turns)]
    if "from" in first_keys(turns):
        share = valid(SHARE_TURNS, turns, name)
        messages = [{"role": role(turn["from"]), "content": turn["value"] or ""} for turn in share]
    else:
        messages = [{"role": role(turn["role"]), "content": content_text(turn)} for turn in valid(TURNS, turns, name)]
    if row.get("system") and messages and messages[0]["role"] != "system":
        messages.insert(0, {"role": "system", "content": valid(TEXT, row["system"], "system")})
    return messages


def content_text(turn: dict) -> str:
    """The text of a message: a string, or OpenAI's list of parts."""
    content = turn.get("content")
    if isinstance(content, str):
        return content
    if turn.get("tool_calls") or turn.get("function_call"):
        raise BadRow("tool-calls", "a turn calls a tool instead of answering")
    if content is None:
        return ""
    other = next((part["type"] for part in content if part["type"] not in ("text", "input_text", "output_text")), None)
    if other is not None:
        raise BadRow("wrong-type", f"a turn holds {other}, and only text can be trained on")
    return "".join(part.get("text", "") for part in content)


def from_alpaca(row: dict) -> list[dict[str, str]]:
    """Instruction, optional input, output; with `history`, the pairs before it."""
    answer = next((name for name in ALPACA_ANSWERS if name in row), "output")
    more = next((row[name] for name in ALPACA_INPUTS if row.get(name)), None)
    question = valid(TEXT, row.get("instruction"), "instruction")
    if more:
        question += "\n\n" + valid(TEXT, more, "input")
    system = [{"role": "system", "content": valid(TEXT, row["system"], "system")}] if row.get("system") else []
    history = valid(HISTORY, parsed(row["history"]), "history") if row.get("history") else []
    before = [
        {"role": role, "content": text}
        for pair in history
        for role, text in zip(("user", "assistant"), pair, strict=True)
    ]
    return [*system, *before, *pair(question, valid(TEXT, row.get(answer), answer))]


def from_pair(row: dict) -> list[dict[str, str]]:
    """A prompt and its completion, each a text or a list of messages."""
    name, answer_name = next(
        ((prompt, answer) for prompt, answer in PAIRS if prompt in row and answer in row), ("prompt", "completion")
    )
    prompt, answer = turns_or_text(row.get(name)), turns_or_text(row.get(answer_name))
    if isinstance(answer, list) and "user" in [turn.get("role") for turn in answer if isinstance(turn, dict)]:
        return from_turns({"messages": answer})  # preference data: the answer is the whole conversation
    if isinstance(prompt, list) and isinstance(answer, list):
        return from_turns({"messages": prompt + answer})
    if isinstance(prompt, list):
        prompt_messages = from_turns({"messages": prompt})
        return [*prompt_messages, {"role": "assistant", "content": valid(TEXT, answer, answer_name)}]
    system = [{"role": "system", "content": valid(TEXT, row["system"], "system")}] if row.get("system") else []
    return [*system, *pair(valid(TEXT, prompt, name), valid(TEXT, answer, answer_name))]


def pair(question: str, answer: str) -> list[dict[str, str]]:
    """One exchange."""
    return [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]


def from_flattened(text: str) -> list[dict[str, str]]:
    """Messages of a text with its roles written into it; what stands before the first role is a system prompt.

    >>> from_flattened("### Human: Hi### Assistant: Hello")
    [{'role': 'user', 'content': 'Hi'}, {'role': 'assistant', 'content': 'Hello'}]
    """
    if "[INST]" in text:
        messages = []
        for turn in INST.split(text)[1:]:
            question, _, answer = turn.partition("[/INST]")
            if system := INST_SYSTEM.match(question):
                messages.append({"role": "system", "content": system[1].strip()})
                question = question[system.end() :]
            messages.append({"role": "user", "content": question.strip()})
            if answer := answer.replace("<s>", "").replace("</s>", "").strip():
                messages.append({"role": "assistant", "content": answer})
        before = text[: text.index("[INST]")].replace("<s>", "").strip()
    elif "<|im_start|>" in text:
        messages = [{"role": role(name), "content": content.strip()} for name, content in CHATML.findall(text)]
        before = text[: text.index("<|im_start|>")].strip()
    else:
        before, *parts = HASHES.split(text)
        messages = []
        for name, content in zip(parts[::2], parts[1::2], strict=True):
            if name.lower() == "input" and messages and messages[-1]["role"] == "user":
                messages[-1]["content"] += "\n\n" + content.strip()
            else:
                messages.append({"role": role(name), "content": content.strip()})
        before = before.strip()
    if not messages:
        raise BadRow("unknown-fields", "the text has no ### Human: or [INST] that opens a turn")
    return ([{"role": "system", "content": before}] if before else []) + messages


def role(name: str) -> str:
    """The role that a name stands for. Raises BadRow for tools and for names that nobody uses."""
    known = ROLES.get(name) or ROLES.get(name.strip().lower())
    if known:
        return known
    if name.strip().lower() in TOOL_ROLES:
        raise BadRow("tool-calls", f"a turn has the role {name}, and tools are not trained here")
    raise BadRow("wrong-type", f"a turn has the role {name!r:.40}; there are system, user and assistant")


def turns_or_text(value: Any) -> Any:
    """A list of turns where a table keeps one as text; an answer that only looks like a list stays a text."""
    turns = parsed(value)
    return turns if {"role", "from"} & set(first_keys(turns)) else value


def parsed(value: Any) -> Any:
    """A list that a table keeps as text, as JSON or as Python writes it; anything else as it is."""
    if not (isinstance(value, str) and value.lstrip()[:1] == "[" and value.rstrip()[-1:] == "]"):
        return value
    try:
        return json.loads(value)
    except (ValueError, RecursionError):
        pass
    if len(value) > LITERAL_LIMIT:
        return value
    try:
        found = ast.literal_eval(value.strip())
    except (ValueError, SyntaxError, RecursionError, MemoryError):
        return value
    return found if isinstance(found, list) else value


def valid(adapter: TypeAdapter, value: Any, name: str) -> Any:
    """The value, checked. Raises BadRow naming the field and what it holds."""
    try:
        return adapter.validate_python(value)
    except ValidationError as error:
        # A union reports each of its members: the longest path is the one that came nearest.
        problem = max(error.errors(include_url=False), key=lambda problem: len(problem["loc"]))
        steps = [
            step for step in problem["loc"] if isinstance(step, int) or step in ("role", "content", "from", "value")
        ]
        path = name + "".join(f"[{step}]" if isinstance(step, int) else f".{step}" for step in steps)
        if problem["type"] == "missing":
            raise BadRow("wrong-type", f"{path} is missing") from None
        raise BadRow("wrong-type", f"{path} must be text, not {named(problem['input'])}") from None


def named(value: Any) -> str:
    """What a value is, in people's words.

    >>> named(None), named(float("nan")), named([1])
    ('null', 'nan', 'a list')
    """
    if value is None or isinstance(value, bool | int | float):
        return "null" if value is None else str(value).lower()
    return {dict: "an object", list: "a list", str: f"{value!r:.40}"}.get(type(value), f"a {type(value).__name__}")
