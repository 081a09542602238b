"""Rows in, messages out: the shapes in which people keep conversations, recognised from a row's fields.

>>> row = {"instruction": "Add.", "input": "1 and 2", "output": "3"}
>>> recognise(row)
'alpaca'
>>> to_messages(row, "alpaca")
[{'role': 'user', 'content': 'Add.\\n\\n1 and 2'}, {'role': 'assistant', 'content': '3'}]
"""

import ast
import json
import string
from collections.abc import Callable
from typing import Any, NamedTuple

from helpers.sources import columns, exports, markers, preferences
from helpers.sources.columns import (
    ALPACA_ANSWERS,
    CHOICES,
    CONTEXTS,
    LABELS,
    MEDIA,
    PAIRS,
    SYSTEMS,
    TOOLS,
    TURN_FIELDS,
    Row,
    is_empty,
    normal,
    told,
)
from helpers.sources.turns import BadRow, messages, named, role

LITERAL_LIMIT = 1_000_000
"""Letters of a list as Python writes it: its parser takes a hundred times as much memory."""
HAS_SYSTEM = set(SYSTEMS)
REFUSED = MEDIA | TOOLS
SHORT = 80
"""Letters of a label, at most."""


class Format(NamedTuple):
    """How a format is read, and what tells it."""

    read: Callable[[Row], list[dict[str, Any]]]
    """A row's messages; takes from the row what it uses, so that the rest can be told."""
    knows: Callable[[dict[str, Any]], object] | None = None
    """Whether a row's fields are of this format and of no other; None: `recognise` tells it from its neighbours."""


class Parsed(NamedTuple):
    """A row's conversation, and of preference data the worse one too."""

    messages: list[dict[str, Any]]
    row: Row
    rejected: list[dict[str, Any]] | None = None


def as_row(value: Any) -> Row | None:
    """A row by its fields: a bare list is one of turns, a bare text a text; None for what has no fields."""
    if isinstance(value, dict):
        return Row(value)
    if isinstance(value, list):
        return Row({"messages": value})
    return Row({"text": value}) if isinstance(value, str) else None


def recognise(value: Any) -> str | None:
    """The format of a row by its fields; None when it is none of FORMATS, "classification" for a text with a label.

    >>> recognise({"conversations": [{"from": "human", "value": "Hi"}]}), recognise({"text": "[INST] Hi [/INST] Ho"})
    ('sharegpt', 'flattened-text')
    """
    row = value if isinstance(value, Row) else as_row(value)
    if row is None:
        return None
    fields = row.fields
    # What is told by its own fields comes first: the rest is a row of prompts, answers, turns or text, and fields of
    # several of those stand in one row (alpaca's beside the text that was rendered from them).
    for name, known in FORMATS.items():
        if known.knows and known.knows(fields):
            return name
    turned = turns_name(fields)
    if turned and fields[turned]:
        return shape_of_turns(fields[turned])
    text = fields.get("text", fields.get("content"))
    if isinstance(text, str) and holds_the_rest(text, fields):
        return "flattened-text" if markers.family(text) else "plain-text"
    if "instruction" in fields and any(name in fields for name in ALPACA_ANSWERS):
        return "alpaca"
    if any(prompt in fields and answer in fields for prompt, answer in PAIRS):
        return "prompt-completion"
    if isinstance(text, str) and not single_message(fields):
        if markers.family(text):
            return "flattened-text"
        return "classification" if label_of(fields) else "plain-text"
    return "messages" if turned else None


def turns_name(fields: dict[str, Any]) -> str | None:
    """The field that holds turns: a list, or a list that a table keeps as text."""
    if fields.get("messages") and isinstance(fields["messages"], list):
        return "messages"
    listed = [name for name in TURN_FIELDS if name in fields]
    told_by_kind = [name for name in listed if isinstance(parsed(fields[name]), list) and fields[name]]
    if told_by_kind or not listed:
        return told_by_kind[0] if told_by_kind else None
    others = any(prompt in fields and answer in fields for prompt, answer in PAIRS)
    return None if others or isinstance(fields.get("text"), str) else listed[0]


def shape_of_turns(turns: Any) -> str:
    """sharegpt or messages, by the first turn."""
    if isinstance(turns, str):
        return "sharegpt" if "from" in turns else "messages"
    first = turns[0] if isinstance(turns, list) and turns and isinstance(turns[0], dict) else {}
    return "sharegpt" if "from" in first else "messages"


def holds_the_rest(text: str, fields: dict[str, Any]) -> bool:
    """Whether `text` is the whole conversation, rendered, whose pieces the other fields repeat."""
    if len(fields) < 3:
        return "prompt" in fields and isinstance(fields["prompt"], str) and bool(fields["prompt"]) and (
            fields["prompt"].strip() in text and fields["prompt"].strip() != text.strip()
        )  # fmt: skip
    pair = next(((p, a) for p, a in (*PAIRS, ("instruction", "output")) if p in fields and a in fields), None)
    if pair is None or "text" in pair or "content" in pair:
        return False
    values = [fields[name] for name in pair]
    return all(isinstance(value, str) and value.strip() and value.strip() in text for value in values)


def label_of(fields: dict[str, Any]) -> str | None:
    """The field that labels a text for a classifier: a short text or a whole number under a name for labels."""
    for name in LABELS:
        value = fields.get(name)
        if (isinstance(value, str) and 0 < len(value) <= SHORT) or (isinstance(value, int) and value is not None):
            return name
    return None


def single_message(fields: dict[str, Any]) -> bool:
    """Whether a row is one message of a conversation that goes on in other rows."""
    return isinstance(fields.get("role"), str) and bool({"content", "text"} & set(fields))


def to_messages(value: Any, row_format: str) -> list[dict[str, Any]]:
    """A row's messages, roles named system, user and assistant (or one of role text, for plain text)."""
    return read_row(value, row_format).messages


def read_row(value: Any, row_format: str, named_columns: dict[str, str] | None = None, use: str = "auto") -> Parsed:
    """A row's conversation by its format, or by the columns that a person named; use is for preference data.

    Raises BadRow saying which field is wrong; ValueError for a format that does not exist.
    """
    row = value if isinstance(value, Row) else as_row(value)
    if row is None:
        raise BadRow("wrong-type", f"a row must be an object with named fields, not {named(value)}")
    if named_columns:
        return Parsed(from_columns(row, named_columns), row)
    if asked_for(row_format) == "preference":
        return from_preference(row, use)
    found = FORMATS[row_format].read(row)
    if row.extras or not REFUSED.isdisjoint(row.fields):
        refuse_media(row)
    return Parsed(found, row)


def asked_for(source_format: str) -> str | None:
    """The format that a configuration names; None for "auto". Raises ValueError with those that there are.

    >>> asked_for("auto"), asked_for("alpaca")
    (None, 'alpaca')
    """
    if source_format not in (*FORMATS, "auto"):
        raise ValueError(f"source_format must be auto or one of {', '.join(FORMATS)}, not {source_format!r}")
    return None if source_format == "auto" else source_format


def refuse_media(row: Row) -> None:
    """Raise BadRow for a row whose pictures or tools nothing reads: its text alone would mean something else."""
    for name, value in row.unused().items():
        short = name.rpartition(".")[2]
        if short in MEDIA:
            raise BadRow("media", f"{name}: {value!s:.40}")
        if short in TOOLS:
            raise BadRow("tool-calls", f"{name}: {value!s:.40}")


def from_turns(row: Row) -> list[dict[str, Any]]:
    """A list of turns under one of TURN_FIELDS, with a system prompt that may stand beside it."""
    fields = row.fields
    name = turns_name(fields) or next((name for name in TURN_FIELDS if name in fields), None)
    if name is None:
        raise BadRow("unknown-fields", told(fields))
    turns = parsed(row.take(name))
    if turns is None or (isinstance(turns, str) and not turns.strip()):
        raise BadRow("wrong-type", f"{name} must be text or a list of turns, not {named(turns)}")
    found = messages(row, turns, name)
    if len(fields) > 1:
        first = found[0]["role"] if found else ""
        system = "" if HAS_SYSTEM.isdisjoint(fields) else system_of(row, strict=first != "system")
        if system and first and first != "system":
            found.insert(0, {"role": "system", "content": system})
    return found


def system_of(row: Row, strict: bool = True) -> str:
    """The system prompt that stands in a field of its own, "" where there is none."""
    name = row.first(SYSTEMS)
    if name is None or not strict:
        return ""
    value = row.take(name)
    if isinstance(value, dict | list):  # Gemini's {"parts": [{"text": …}]}, Bedrock's and Anthropic's list of parts
        parts = value.get("parts") if isinstance(value, dict) else value
        texts = [part.get("text") for part in parts or [] if isinstance(part, dict)]
        if texts and all(isinstance(text, str) for text in texts):
            return "\n\n".join(texts)
    return text_in(value, name)


def from_alternating(row: Row) -> list[dict[str, Any]]:
    """A list of texts that take turns, the user first; only where somebody says that it is one."""
    fields = row.fields
    name = next((name for name in (*TURN_FIELDS, "data", "text") if isinstance(parsed(fields.get(name)), list)), None)
    turns = parsed(row.take(name)) if name else None
    if not turns or not all(isinstance(turn, str) for turn in turns):
        raise BadRow("wrong-type", "alternating needs a list of texts")
    return [{"role": ("user", "assistant")[i % 2], "content": turn} for i, turn in enumerate(turns)]


def from_exchange(row: Row) -> list[dict[str, Any]]:
    """A question and its answer, each a text or a list of messages; with context, history and a system prompt."""
    fields = row.fields
    if "instruction" in fields and any(name in fields for name in ALPACA_ANSWERS):
        name, contexts = "instruction", CONTEXTS
        answer_name = next(answer for answer in ALPACA_ANSWERS if answer in fields)
    else:
        name, answer_name = next(
            ((prompt, answer) for prompt, answer in PAIRS if prompt in fields and answer in fields),
            ("instruction", "output") if "instruction" in fields else ("prompt", "completion"),
        )
        contexts = ("context",)
    prompt, answer = turns_or_text(fields.get(name)), turns_or_text(fields.get(answer_name))
    if isinstance(prompt, list) and isinstance(answer, list) and all(isinstance(t, str) for t in [*prompt, *answer]):
        row.take(name), row.take(answer_name)
        if len(prompt) != len(answer):
            raise BadRow("wrong-type", f"{name} has {len(prompt)} texts and {answer_name} {len(answer)}")
        return with_before(row, messages(row, [list(pair) for pair in zip(prompt, answer, strict=True)], name))
    row.take(answer_name)
    if isinstance(answer, list) and is_turns(answer):
        return from_completion(row, name, prompt, messages(row, answer, answer_name))
    row.take(name)
    options = lettered(row)
    if isinstance(answer, int) and not isinstance(answer, bool) and 0 <= answer < len(options):
        answer = options[answer]
    reply = {"role": "assistant", "content": answer_text(row, answer, answer_name)}
    if isinstance(prompt, list) and is_turns(prompt):
        return with_before(row, [*messages(row, prompt, name), reply])
    question = text_in(prompt, name)
    for more in contexts:
        if more != answer_name and more != name and not is_empty(fields.get(more)):
            question += "\n\n" + text_in(row.take(more), more)
    if options and not all(option.partition(". ")[2] in question for option in options):
        question += "\n\n" + "\n".join(options)
    return with_before(row, [{"role": "user", "content": question}, reply])


def lettered(row: Row) -> list[str]:
    """What an exam's question lets choose between, a letter before each; [] where there is nothing or no text.

    >>> lettered(Row({"choices": ["red", "blue"]})), lettered(Row({"options": {"A": "red", "B": "blue"}}))
    (['A. red', 'B. blue'], ['A. red', 'B. blue'])
    """
    name = row.first(CHOICES)
    value = parsed(row.fields[name]) if name else None
    if isinstance(value, dict) and isinstance(value.get("text"), list) and isinstance(value.get("label"), list):
        value = dict(zip(value["label"], value["text"], strict=False))  # ARC's
    if isinstance(value, list) and len(value) <= len(string.ascii_uppercase):
        value = dict(zip(string.ascii_uppercase, value, strict=False))
    if not isinstance(value, dict) or not all(isinstance(text, str) and text for text in value.values()):
        return []
    row.take(name)
    return [text if text.startswith((f"{key}.", f"{key})", f"({key})")) else f"{key}. {text}"
            for key, text in value.items()]  # fmt: skip


def from_completion(row: Row, name: str, prompt: Any, answer: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """A prompt and an answer of several turns: one after the other, unless the answer repeats the prompt."""
    if isinstance(prompt, list) and is_turns(prompt):
        before = messages(row, prompt, name)
        row.take(name)
        return with_before(row, answer if answer[: len(before)] == before else before + answer)
    text = text_in(prompt, name)
    first = next((turn["content"] for turn in answer if turn["role"] == "user"), None)
    if answer[0]["role"] == "assistant":
        row.take(name)
        return with_before(row, [{"role": "user", "content": text}, *answer])
    if first is not None and text.strip() in first:  # else the prompt is not in it, and a finding will say so
        row.take(name)
    return with_before(row, answer)


def with_before(row: Row, found: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Messages with what comes before them: a system prompt, and a history of pairs or of turns."""
    fields = row.fields
    if not is_empty(fields.get("history")):
        history = parsed(fields["history"])
        if isinstance(history, list):
            row.take("history")
            start = 1 if found and found[0]["role"] == "system" else 0
            found = [*found[:start], *messages(row, history, "history"), *found[start:]]
    system = system_of(row, strict=not (found and found[0]["role"] == "system"))
    return [{"role": "system", "content": system}, *found] if system else found


def answer_text(row: Row, answer: Any, name: str) -> str:
    """An answer's text; of SQuAD's several answers the first."""
    if isinstance(answer, dict) and isinstance(answer.get("text"), list):
        answer = answer["text"]
    if name == "answers" and isinstance(answer, list) and answer and all(isinstance(text, str) for text in answer):
        if len(set(answer)) > 1:
            row.extras["answers after the first"] = answer[1]
        answer = answer[0]
    return text_in(answer, name)


def from_preference(row: Row, use: str = "auto") -> Parsed:
    """The conversation with the better answer and, for pairs, that with the worse one."""
    pair = preferences.judged(row)
    if pair is None:
        raise BadRow("preference-data", "its answers are judged alike, so that none is better")
    if use == "auto":
        kinds = "a good-or-bad label" if not (pair.chosen and pair.rejected) else "a better and a worse answer"
        raise BadRow("preference-data", f"{kinds}: {', '.join(map(str, row.fields))[:80]}")
    if use == "chosen" and not pair.chosen:
        raise BadRow("rejected-answer", "labelled bad")
    if use == "pairs" and not (pair.chosen and pair.rejected):
        raise BadRow("preference-data", "an answer with a label and no second one to compare it with: use=chosen")
    prompt = parsed(pair.prompt)
    if isinstance(prompt, str):
        turns_of_text = from_marked(prompt) if markers.family(prompt) else [{"role": "user", "content": prompt}]
        prompt = turns_of_text if prompt.strip() else []
    before = messages(row, prompt or [], "prompt")
    before = with_before(row, before)
    better = before + messages(row, pair.chosen, "chosen")
    worse = before + messages(row, pair.rejected, "rejected") if use == "pairs" else None
    refuse_media(row)
    return Parsed(better, row, worse)


def from_export(row: Row) -> list[dict[str, Any]]:
    """A chat app's own export."""
    name = exports.kind(row.fields)
    if name is None:
        raise BadRow("unknown-fields", told(row.fields))
    found = messages(row, exports.way(row, name), name)
    return with_before(row, [turn for turn in found if turn["content"] or "reasoning" not in row.notes])


def from_columns(row: Row, named: dict[str, str]) -> list[dict[str, Any]]:
    """The conversation of the columns that a person named; the others are not read."""
    chosen = {asked: columns.of(name, row.fields) for asked, name in named.items()}
    lacking = [name for names in chosen.values() for name in names if name not in row.fields]
    if lacking:
        has = ", ".join(map(str, row.fields))[:160]
        raise BadRow("unknown-fields", f"there is no column {lacking[0]!r}; there are {has}")

    def text(asked: str) -> str:
        texts = [row.take(name) for name in chosen.get(asked, ())]
        return "\n\n".join(text_in(text, asked) for text in texts if not is_empty(text))

    if "messages" in chosen:
        return messages(row, parsed(row.take(chosen["messages"][0])), chosen["messages"][0])
    if "text" in chosen:
        return (
            from_marked(text("text")) if markers.family(text("text")) else [{"role": "text", "content": text("text")}]
        )
    system = [{"role": "system", "content": text("system")}] if text("system") else []
    history = parsed(row.take(chosen["history"][0])) if "history" in chosen else None
    before = messages(row, history, "history") if isinstance(history, list) else []
    question = "\n\n".join(filter(None, (text("user"), text("context"))))
    return [
        *system,
        *before,
        {"role": "user", "content": question},
        {"role": "assistant", "content": text("assistant")},
    ]


def from_labelled(row: Row) -> list[dict[str, Any]]:
    """A text with a label, which is no conversation until somebody says what is asked of it."""
    name = "text" if "text" in row.fields else "content"
    raise BadRow(
        "classification",
        f"{', '.join(map(str, row.fields))[:80]}: say --columns user={name},assistant={label_of(row.fields)} to learn "
        "the label, or --source-format plain-text to learn the text",
    )


def from_text(row: Row) -> list[dict[str, Any]]:
    """Messages of a text with its roles written into it."""
    name = "text" if "text" in row.fields else "content"
    text = text_in(row.take(name), name)
    row.used |= {field for field, value in row.fields.items() if isinstance(value, str) and value.strip() in text}
    return from_marked(text)


def from_plain(row: Row) -> list[dict[str, Any]]:
    """A text without roles."""
    name = "text" if "text" in row.fields else "content"
    text = text_in(row.take(name), name)
    if len(row.fields) > 1 and isinstance(row.fields.get("prompt"), str) and row.fields["prompt"].strip() in text:
        row.take("prompt")
    return [{"role": "text", "content": text}]


def from_flattened(text: str) -> list[dict[str, Any]]:
    """Messages of a text with its roles written into it; what stands before the first role is a system prompt.

    >>> from_flattened("### Human: Hi### Assistant: Hello")
    [{'role': 'user', 'content': 'Hi'}, {'role': 'assistant', 'content': 'Hello'}]
    """
    return from_marked(text)


def from_marked(text: str) -> list[dict[str, Any]]:
    """Messages of a marked text."""
    name = markers.family(text)
    if name is None:
        raise BadRow("unknown-fields", "the text has no ### Human: or [INST] that opens a turn")
    return [{"role": "user" if r == "inst" else role(r), "content": c} for r, c in markers.turns(text, name)]


def is_turns(value: list) -> bool:
    """Whether a list is one of turns."""
    return bool(value) and isinstance(value[0], dict) and bool({"role", "from"} & set(value[0]))


def turns_or_text(value: Any) -> Any:
    """A list of turns or of texts where a table keeps one as text; an answer that only looks like a list stays one."""
    if isinstance(value, list):
        return value
    turns = parsed(value)
    return turns if isinstance(turns, list) and is_turns(turns) else value


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


def text_in(value: Any, name: str) -> str:
    """The value, a text. Raises BadRow naming the field and what it holds."""
    if not isinstance(value, str):
        raise BadRow("wrong-type", f"{name} must be text, not {named(value)}")
    return value


__all__ = ["FORMATS", "BadRow", "as_row", "from_flattened", "normal", "read_row", "recognise", "to_messages"]


FORMATS = {
    "messages": Format(from_turns),
    "sharegpt": Format(from_turns),
    "alternating": Format(from_alternating),
    "alpaca": Format(from_exchange),
    "prompt-completion": Format(from_exchange),
    "flattened-text": Format(from_text),
    "plain-text": Format(from_plain),
    "classification": Format(from_labelled),
    "export": Format(from_export, exports.kind),
    "preference": Format(from_preference, preferences.is_preference),
}
"""Name -> how it is read and told: the one list of them. What is added here can be named, and is recognised."""
