"""The names of fields: which mean a question, an answer, a system prompt; and those that a person names.

>>> chosen = parse("user=Question,assistant=Answer")
>>> chosen
{'user': 'Question', 'assistant': 'Answer'}
>>> of("Title+Question", {"title": "", "question": ""})
('title', 'question')
>>> normal(" Question")
'question'
"""

import csv
from functools import lru_cache
from typing import Any

TURN_FIELDS = (
    "messages", "conversations", "conversation", "dialogue", "dialog", "chat", "turns", "chat_messages", "contents",
)  # fmt: skip
PAIRS = (
    ("prompt", "completion"),
    ("prompt", "response"),
    ("prompt", "chosen"),
    ("prompt", "output"),
    ("prompt", "answer"),
    ("prompt", "solution"),
    ("question", "answer"),
    ("question", "response"),
    ("question", "output"),
    ("question", "answers"),
    ("question", "solution"),
    ("question", "answerkey"),
    ("problem", "solution"),
    ("query", "response"),
    ("query", "answer"),
    ("query", "output"),
    ("input", "output"),
    ("input", "target"),
    ("input", "response"),
    ("inputs", "targets"),
    ("user", "assistant"),
    ("human", "assistant"),
    ("content", "summary"),
    ("document", "summary"),
    ("article", "summary"),
    ("article", "highlights"),
    ("dialogue", "summary"),
    ("prompt", "text"),
)
ALPACA_ANSWERS = ("output", "response", "answer", "completion", "target")
CONTEXTS = ("input", "context")
CHOICES = ("choices", "options")
"""What a question of an exam lets choose between."""
SYSTEMS = ("system", "system_prompt", "system_message", "sys_prompt", "system_instruction", "systeminstruction")
MEDIA = {
    "image", "images", "image_path", "image_url", "image_urls", "picture", "pictures", "video", "videos", "audio",
    "audios", "pixel_values",
}  # fmt: skip
TOOLS = {"tools", "functions", "tool_calls", "function_call", "available_tools", "tool_definitions"}
LABELS = ("label", "labels", "category", "class", "intent", "sentiment", "label_text", "topic", "target", "rating")
"""What names the class of a text in a table for classifiers."""
REASONING = {"reasoning", "reasoning_content", "thinking", "thought", "thoughts", "cot"}
SINGLE_FIELDS = {name for pair in PAIRS for name in pair} | {*ALPACA_ANSWERS, *CONTEXTS, *SYSTEMS, "instruction"}
KNOWN = {
    *TURN_FIELDS,
    *SINGLE_FIELDS,
    *CHOICES,
    *LABELS,
    *MEDIA,
    *TOOLS,
    "history",
    "text",
    "content",
    "role",
    "from",
    "sender",
}
KNOWN |= {*CHOICES, "chosen", "rejected", "response_j", "response_k", "completions", "mapping", "preferred_output"}
KNOWN |= {
    "messagestree",
    "chunkedprompt",
    "non_preferred_output",
    "kto_tag",
    "value",
    "message_id",
    "parent_id",
    "rank",
    "message_tree_id",
}
"""All field names that some format reads."""
ASKED = ("user", "assistant", "system", "context", "history", "messages", "text")
"""What --columns can name."""
NAMES_THAT_DO = "messages, conversations, instruction + output, prompt + completion, question + answer, or text"


@lru_cache(4096)
def normal(name: str) -> str:
    """A field's name without what does not count: letter case, spaces around, hyphens, a byte-order mark."""
    return name.strip("\ufeff \t").lower().replace(" ", "_").replace("-", "_")


@lru_cache(1024)
def renamed(names: tuple[str, ...]) -> dict[str, str] | None:
    """Field -> its normal name; None where all are normal. Two that would be the same keep their own names.

    >>> renamed(("Question", "answer", "Answer"))
    {'Question': 'question', 'answer': 'answer', 'Answer': 'Answer'}
    """
    found = {name: normal(name) for name in names if isinstance(name, str)}
    if all(name == short for name, short in found.items()):
        return None
    taken = {name for name in names if name == found.get(name)}
    for name, short in found.items():
        if name != short:
            found[name] = name if short in taken or not short else short
            taken.add(found[name])
    return found


class Row:
    """A row's fields under their normal names; `used` are those that were read."""

    __slots__ = ("extras", "fields", "notes", "used")

    def __init__(self, fields: dict[str, Any]) -> None:
        names = renamed(tuple(fields))
        self.fields = fields if names is None else {names.get(name, name): value for name, value in fields.items()}
        self.used: set[str] = set()
        self.extras: dict[str, Any] = {}
        """Fields inside of turns that nothing reads."""
        self.notes: dict[str, str] = {}
        """Findings about what was read, each with an example."""

    def take(self, name: str) -> Any:
        """A field's value, None where there is none; it counts as read."""
        self.used.add(name)
        return self.fields.get(name)

    def first(self, names: tuple[str, ...]) -> str | None:
        """The first of the names that the row has a value for."""
        return next((name for name in names if not is_empty(self.fields.get(name))), None)

    def unused(self) -> dict[str, Any]:
        """Fields with a value that nothing read."""
        rest = {name: value for name, value in self.fields.items() if name not in self.used and not is_empty(value)}
        return self.extras | rest if self.extras else rest


def is_empty(value: Any) -> bool:
    """Whether a field holds nothing: null, an empty text or list, NaN as pandas writes a missing cell.

    >>> is_empty("[]"), is_empty(0), is_empty(float("nan"))
    (True, False, True)
    """
    if isinstance(value, str):
        return not value or value in ("[]", "{}", "null") or value.isspace()
    return value is None or value != value or (isinstance(value, list | dict) and not value)


def parse(text: str) -> dict[str, str]:
    """`user=Title+Question,assistant=Answer` -> role and its column. Raises ValueError with what may be named.

    Names with a comma stand in quotation marks, with what they are for: "user=Question, in full",assistant=Answer.
    """
    chosen: dict[str, str] = {}
    for part in next(csv.reader([text], skipinitialspace=True), []):
        asked, equals, name = part.partition("=")
        asked = normal(asked)
        if asked not in ASKED or not equals or not name.strip():
            raise ValueError(
                f"columns is user=COLUMN,assistant=COLUMN, and {part!r} is not: there are {', '.join(ASKED)}"
            )
        chosen[asked] = name.strip()
    if chosen and not ({"user", "assistant"} <= set(chosen) or {"messages", "text"} & set(chosen)):
        raise ValueError("columns must name a user's and an assistant's, or messages, or text")
    return chosen


def of(name: str, fields: dict[str, Any]) -> tuple[str, ...]:
    """The fields that a person named: one, or several with + between."""
    whole = normal(name)
    return (whole,) if whole in fields else tuple(normal(part) for part in name.split("+"))


def told(fields: dict[str, Any]) -> str:
    """What a row has and what it would need, for the sentence of a refusal."""
    names = ", ".join(map(str, fields))
    return (
        f"it has the fields {names[:160]}; {NAMES_THAT_DO} would do, or say --columns user=…,assistant=… with its names"
    )
