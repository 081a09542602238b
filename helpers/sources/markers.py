"""Texts with their roles written into them: which family's markers they hold, and their messages.

>>> family("### Human: Hi### Assistant: Hello")
'hashes'
>>> turns("<|user|>\\nHi</s>\\n<|assistant|>\\nHello</s>\\n", "zephyr")
[('user', 'Hi'), ('assistant', 'Hello')]
"""

import re
from collections import Counter
from typing import NamedTuple


class Family(NamedTuple):
    """How a chat template writes turns: `opens` finds a turn's beginning, group 1 its role; `ends` is cut off."""

    opens: re.Pattern
    ends: re.Pattern
    both: bool = False
    """Words that may be prose: a chat needs the opening of a question, and behind it that of an answer."""
    leads: bool = False
    """Words that stand in articles too: a chat begins with one."""


HASHES = re.compile(r"###\s*(Human|User|Instruction|Input|Assistant|Response|System)\s*:\s*", re.IGNORECASE)
NOTHING = re.compile(r"(?!)")
END = re.compile(r"(?:</s>|<\|endoftext\|>|<\|end_of_text\|>|<eos>)\s*\Z")

FAMILIES: dict[str, Family] = {
    # The model cards and tokenizer_config.json of each family; Llama 4 renamed Llama 3's tokens.
    "llama-3": Family(
        re.compile(r"<\|(?:start_header_id|header_start)\|>(\w+)<\|(?:end_header_id|header_end)\|>\n{0,2}"),
        re.compile(r"(?:<\|(?:eot_id|eom_id|eot|eom|end_of_text)\|>\s*){1,3}\Z"),
    ),
    "chatml": Family(re.compile(r"<\|im_start\|>(\w+)\n"), re.compile(r"<\|im_end\|>\s*\Z")),
    "gemma": Family(re.compile(r"<start_of_turn>(\w+)\n"), re.compile(r"<end_of_turn>\s*\Z")),
    "zephyr": Family(
        re.compile(r"<\|(system|user|assistant|prompter)\|>\n?"), re.compile(r"(?:</s>|<\|end(?:oftext)?\|>)\s*\Z")
    ),
    "deepseek": Family(re.compile(r"<｜(User|Assistant)｜>"), re.compile(r"<｜end▁of▁sentence｜>\s*\Z")),
    "inst": Family(re.compile(r"\[(INST)\]"), NOTHING),
    "hashes": Family(HASHES, NOTHING),
    # Words: FastChat's Vicuna, INCITE's <human>, Anthropic's HH and what was written after it.
    "angle words": Family(re.compile(r"<(human|bot|user|assistant|system)>:\s?", re.IGNORECASE), END, both=True),
    "vicuna": Family(re.compile(r"(?:(?<=\s)|(?<=</s>)|\A)(SYSTEM|USER|ASSISTANT):\s?"), END, both=True),
    "words": Family(re.compile(r"^[ \t]{0,8}(Human|User|Assistant|System):[ \t]?", re.MULTILINE), END, both=True),
    "questions": Family(
        re.compile(r"^[ \t]{0,8}(Question|Q|Answer|A):[ \t]?", re.MULTILINE), END, both=True, leads=True
    ),
}
QUICK = re.compile(
    r"<\|(?:start_header_id|header_start|im_start|system|user|assistant|prompter)\|>|<start_of_turn>|<｜(?:User|Assistant)｜>"
    r"|\[INST\]|###\s*(?:Human|User|Instruction)\s*:|<(?:human|bot|user|assistant)>:|\b(?:USER|ASSISTANT|A|Answer):",
    re.IGNORECASE,
)
"""Whether a text may hold markers at all: most hold none, and are passed by at once."""
UNKNOWN = re.compile(r"<\|[A-Za-z_]{3,40}\|>|<(?:start|end)_of_turn>|\[/?INST\]")
"""What looks like a token of somebody's template."""
STAMPED = re.compile(
    r"[\u200e\u200f]?\[?(?:\d{1,2}[./-]\d{1,2}[./-]\d{2,4}|\d{4}-\d\d-\d\d),?[\sT]{1,2}\d{1,2}[:.]\d\d[^:]{0,14}(?::\d\d)?"
    r"[^:]{0,8}(?:\]|[ \u202f]-)[ \u200e\u200f]{1,3}[^:]{1,60}:"
)
"""How WhatsApp and its like begin a line of a transcript: a date, a time, a name."""
SPEAKER = re.compile(
    r"[*_#> ]{0,8}(?:(user|human|you(?: said)?|me)|(assistant|ai|bot|chatgpt(?: said)?|claude|gemini))[*_]{0,3}:",
    re.IGNORECASE,
)
"""How a chat that was copied from a page begins a turn."""
ON_LINES = "User: and Assistant: on lines of their own"

INST_SYSTEM = re.compile(r"\s*(?:<<SYS>>(.*?)<</SYS>>|\[SYSTEM_PROMPT\](.*?)\[/SYSTEM_PROMPT\])\s*", re.DOTALL)
EDGES = re.compile(r"\A(?:\s*(?:<s>|<bos>|<\|begin_of_text\|>|<｜begin▁of▁sentence｜>))+")
ASKS = {"user", "human", "prompter", "instruction", "inst", "question", "q"}
ANSWERS = {"assistant", "bot", "answer", "a"}


def strange(text: str) -> set[str]:
    """What in a text without roles looks like a chat's markers that no family here has.

    >>> strange("[21.11.26, 10:15:22] Ann: Hi") == strange("21/11/2026, 10:15 - Bob: Ho")
    True
    >>> sorted(strange("**You:** Hi") | strange("ChatGPT said: Ho")), strange("Me and you: a story")
    (['a question', 'an answer'], set())
    """
    found = set(UNKNOWN.findall(text))
    if STAMPED.match(text):
        found.add("a date, a time and a name")
    speaker = SPEAKER.match(text)
    if speaker:
        found.add("a question" if speaker[1] else "an answer")
    return found


def refused(marked: Counter, texts: int) -> tuple[str, int] | None:
    """The marker for which texts are taken for a chat, and how many hold it; None where they are texts.

    marked: what `strange` found -> texts. A token of a template, or a transcript's line: most texts. Speakers stand
    above many lines each: both sides of the talk, on a line in twenty.
    """
    asked, answered = marked["a question"], marked["an answer"]
    if asked and answered and asked + answered > 0.05 * texts and max(asked, answered) <= 2 * min(asked, answered) + 1:
        return ON_LINES, asked + answered
    others = [(count, name) for name, count in marked.items() if name not in ("a question", "an answer")]
    count, name = max(others, default=(0, ""))
    return (name, count) if count > 0.5 * texts else None


def family(text: str) -> str | None:
    """The family of a text's markers; None for a text without any, or where only one side has a marker.

    >>> family("Human: x") is None, family("Human: x\\n\\nAssistant: y")
    (True, 'words')
    """
    if not QUICK.search(text):
        return None
    for name, made in FAMILIES.items():
        first = made.opens.search(text)
        if not first or (made.leads and text[: first.start()].strip()):
            continue
        roles = [first[1].lower()] if not made.both else [found.lower() for found in made.opens.findall(text)]
        asks = [i for i, role in enumerate(roles) if role in ASKS]
        if not made.both or (asks and ANSWERS.intersection(roles[asks[0] :])):
            return name
    return None


def turns(text: str, name: str) -> list[tuple[str, str]]:
    """(role as it is written, text) of each turn; what stands before the first is a system prompt."""
    if name == "inst":
        return inst_turns(text)
    made = FAMILIES[name]
    before, *parts = made.opens.split(EDGES.sub("", text))
    found = [("system", before.strip())] if before.strip() else []
    for role, content in zip(parts[::2], parts[1::2], strict=True):
        content = made.ends.sub("", content).strip()
        if name == "hashes" and role.lower() == "input" and found and found[-1][0] != "system":
            found[-1] = (found[-1][0], f"{found[-1][1]}\n\n{content}")
        else:
            found.append((role.lower(), content))
    while found and not found[-1][1]:  # an opening for an answer that is still to be written
        found.pop()
    return found


def inst_turns(text: str) -> list[tuple[str, str]]:
    """Turns of Llama 2's and Mistral's [INST], with <<SYS>> or [SYSTEM_PROMPT]."""
    before, *parts = text.split("[INST]")
    found = []
    if system := INST_SYSTEM.search(before):
        before = before[: system.start()] + before[system.end() :]
        found.append(("system", (system[1] or system[2]).strip()))
    before = EDGES.sub("", before).strip()
    if before:
        found.insert(0, ("system", before))
    for turn in parts:
        question, _, answer = turn.partition("[/INST]")
        if system := INST_SYSTEM.match(question):
            found.append(("system", (system[1] or system[2]).strip()))
            question = question[system.end() :]
        found.append(("user", question.strip()))
        if answer := answer.replace("<s>", "").replace("</s>", "").strip():
            found.append(("assistant", answer))
    return found
