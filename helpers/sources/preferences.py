"""Preference data: a better and a worse answer, or one that was labelled good or bad, in the shapes that people use.

>>> pair = judged(Row({"prompt": "Where?", "chosen": "There.", "rejected": "No."}))
>>> pair.chosen, pair.rejected
([{'role': 'assistant', 'content': 'There.'}], [{'role': 'assistant', 'content': 'No.'}])
"""

from typing import Any, NamedTuple

from helpers.sources import markers
from helpers.sources.columns import Row, is_empty

CHOSEN = ("chosen", "chosen_response", "preferred_output", "preferred", "response_j")
REJECTED = ("rejected", "rejected_response", "non_preferred_output", "dispreferred", "response_k")
GOOD_OR_BAD = ("label", "kto_tag")
SCORES = ("overall_score", "fine-grained_score", "fine_grained_score", "score", "rating")
PROMPTS = ("prompt", "question", "instruction", "query", "input")
TURNS = ("messages", "conversations", "conversation")

HINTS = {*CHOSEN, *GOOD_OR_BAD, "completions", "output"}


class Judged(NamedTuple):
    """One prompt and what was thought of its answers; an answer that is not there is empty.

    Values are as the row has them: a text, or turns in whatever shape.
    """

    prompt: Any
    chosen: Any
    rejected: Any


def is_preference(fields: dict[str, Any]) -> bool:
    """Whether a row judges answers: pairs, scored completions, or a good-or-bad label beside an answer."""
    if HINTS.isdisjoint(fields):
        return False
    if any(name in fields for name in CHOSEN) and any(name in fields for name in REJECTED):
        return True
    if any(isinstance(fields.get(name), bool) for name in GOOD_OR_BAD):
        return "completion" in fields or any(name in fields for name in TURNS) or "response" in fields
    if isinstance(fields.get("completions"), list) and any(isinstance(part, dict) for part in fields["completions"]):
        return any(name in fields for name in PROMPTS)
    both = fields.get("output")  # LLaMA-Factory's older files: the better output, then the worse
    return "instruction" in fields and isinstance(both, list) and len(both) == 2 and "input" in fields


def judged(row: Row) -> Judged | None:
    """Prompt, chosen and rejected of a row; None where the judgement cannot be told (completions of equal score)."""
    fields = row.fields
    label = next((name for name in GOOD_OR_BAD if isinstance(fields.get(name), bool)), None)
    if label and not row.first(REJECTED):
        good = row.take(label)
        answer = row.first(("completion", "response"))
        if answer:
            prompt, reply = prompt_of(row), row.take(answer)
        else:
            turns = list(row.take(row.first(TURNS) or TURNS[0]) or [])
            prompt, reply = turns[:-1], turns[-1:]
        reply = answer_turns(reply)
        return Judged(prompt, reply if good else [], [] if good else reply)
    if row.first(CHOSEN) is None and isinstance(fields.get("completions"), list):
        return scored(row)
    if row.first(CHOSEN) is None:
        better, worse = row.take("output")
        return Judged(prompt_of(row), answer_turns(better), answer_turns(worse))
    chosen, rejected = row.take(row.first(CHOSEN)), row.take(row.first(REJECTED) or REJECTED[0])
    if isinstance(chosen, str) and isinstance(rejected, str) and prompt_name(row) is None:
        return from_texts(chosen, rejected)
    prompt = prompt_of(row)
    if isinstance(chosen, list) and isinstance(rejected, list) and is_conversation(chosen):
        shared = common(chosen, rejected)
        return Judged(chosen[:shared], chosen[shared:], rejected[shared:])
    return Judged(prompt, answer_turns(chosen), answer_turns(rejected))


def prompt_name(row: Row) -> str | None:
    """The field that holds the prompt."""
    return row.first((*TURNS, *PROMPTS))


def prompt_of(row: Row) -> Any:
    """The prompt: turns, OpenAI's {"messages": …}, or a text with the alpaca shape's `input` behind it."""
    name = prompt_name(row)
    if name is None:
        return ""
    prompt = row.take(name)
    if isinstance(prompt, dict):
        if not is_empty(prompt.get("tools")):
            row.extras["tools"] = prompt["tools"]
        prompt = prompt.get("messages")
    if name == "instruction" and isinstance(row.fields.get("input"), str):
        more = row.take("input")
        prompt = f"{prompt}\n\n{more}" if more and isinstance(prompt, str) else prompt
    return prompt


def scored(row: Row) -> Judged | None:
    """UltraFeedback: the best against the worst of several completions by their scores."""
    marked = []
    for part in row.take("completions"):
        score = next((part[name] for name in SCORES if isinstance(part.get(name), int | float)), None)
        text = part.get("response", part.get("text"))
        if score is not None and isinstance(text, str) and text.strip():
            marked.append((score, text))
    if len(marked) < 2 or max(marked)[0] == min(marked)[0]:
        return None
    best, worst = (chooser(marked, key=lambda pair: pair[0])[1] for chooser in (max, min))
    return Judged(prompt_of(row), answer_turns(best), answer_turns(worst))


def from_texts(chosen: str, rejected: str) -> Judged:
    """HH: two transcripts with the roles written into them and the same beginning."""
    talks = []
    for text in (chosen, rejected):
        name = markers.family(text)
        turns = markers.turns(text, name) if name else [("assistant", text)]
        talks.append([{"role": role, "content": content} for role, content in turns])
    shared = common(*talks)
    return Judged(talks[0][:shared], talks[0][shared:], talks[1][shared:])


def common(one: list, other: list) -> int:
    """Turns in common at the beginning, of which the last is a question: an answer of each side is left."""
    same = 0
    while same < min(len(one), len(other)) - 1 and one[same] == other[same]:
        same += 1
    return same


def is_conversation(answer: list) -> bool:
    """Whether an answer is the whole conversation, with its question."""
    roles = [turn.get("role", turn.get("from")) for turn in answer if isinstance(turn, dict)]
    return bool(set(roles) & {"user", "human", "prompter", "system"})


def answer_turns(answer: Any) -> Any:
    """An answer as turns, where it is a text or one turn."""
    if isinstance(answer, dict):
        return [answer]
    return [{"role": "assistant", "content": answer}] if isinstance(answer, str) else answer
