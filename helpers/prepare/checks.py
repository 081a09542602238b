"""What is wrong with people's conversations, and what is done about it: repaired, dropped or kept, and always counted.

>>> findings = Findings(actions("leaked-template=drop"))
>>> messages = [{"role": "user", "content": " Hi"}, {"role": "assistant", "content": "Ho"}]
>>> check(messages, "chat.jsonl line 3", findings, leaks("</s>"))
[{'role': 'user', 'content': 'Hi'}, {'role': 'assistant', 'content': 'Ho'}]
>>> print(findings.sentences()[0])
edge-spaces: space around a turn's text; 1 repaired, for example chat.jsonl line 3: ' Hi'
"""

import re
from dataclasses import dataclass, field
from typing import NamedTuple

from helpers.sources.encodings import unmixed

REPAIR, DROP, KEEP = "repair", "drop", "keep"
DONE = {REPAIR: "repaired", DROP: "dropped", KEEP: "kept"}


class Check(NamedTuple):
    """What a check finds, what is done unless told otherwise, and what may be told."""

    says: str
    default: str
    choices: tuple[str, ...]


CHECKS = {
    # Rows that cannot be read as a conversation.
    "broken-row": Check("a row that is not whole", DROP, (DROP,)),
    "over-long-row": Check("a row too long to be a conversation", DROP, (DROP,)),
    "invalid-utf8": Check("bytes that are not UTF-8 (repair reads them in the charset shown)", DROP, (DROP, REPAIR)),
    "unknown-fields": Check("a row without the fields of any format", DROP, (DROP,)),
    "other-format": Check("a row in another format than the rows before it", KEEP, (KEEP, DROP)),
    "wrong-type": Check("a field that holds something else than it should", DROP, (DROP,)),
    "tool-calls": Check("a conversation with tools, which are not trained here", DROP, (DROP,)),
    "media": Check("pictures, sound or video beside the text (--columns reads the text alone)", DROP, (DROP,)),
    "classification": Check("a text with a label, and nobody asks for it", DROP, (DROP,)),
    "preference-data": Check(
        "preference data: use=chosen trains on the better answers, use=pairs keeps both", DROP, (DROP,)
    ),
    "no-pair": Check("a conversation without a second, worse answer, which a preference method needs", DROP, (DROP,)),
    "other-prompt": Check("a pair whose answers do not follow the same conversation", DROP, (DROP,)),
    "same-answer": Check("a pair whose better and worse answer are the same", DROP, (DROP,)),
    "rejected-answer": Check("an answer that the data calls bad, which use=chosen leaves out", DROP, (DROP,)),
    # What a row holds beside its conversation.
    "unused-fields": Check("fields of rows that nothing reads", KEEP, (KEEP, DROP)),
    "reasoning": Check("thoughts kept beside an answer (repair leaves them out)", REPAIR, (REPAIR, DROP)),
    "other-branches": Check("answers beside the way that is trained (repair leaves them out)", REPAIR, (REPAIR, DROP)),
    # The text of turns.
    "control-characters": Check("characters that nobody can see or type", REPAIR, (REPAIR, DROP, KEEP)),
    "leaked-template": Check("tokens of a chat template inside a turn's text", REPAIR, (REPAIR, DROP, KEEP)),
    "mojibake": Check("UTF-8 that was read as Latin-1 (repair reads it rightly)", REPAIR, (REPAIR, DROP, KEEP)),
    "edge-spaces": Check("space around a turn's text", REPAIR, (REPAIR, DROP, KEEP)),
    # The order of turns.
    "empty-turn": Check("a turn without text (repair leaves out its exchange)", DROP, (DROP, REPAIR)),
    "late-system": Check("a system prompt after the first turn (repair moves it to the front)", REPAIR, (REPAIR, DROP)),
    "same-role-twice": Check("two turns of one role in a row (repair joins them)", REPAIR, (REPAIR, DROP)),
    "answer-first": Check("an answer before any question (repair leaves it out)", REPAIR, (REPAIR, DROP)),
    "no-answer-last": Check("a question at the end without an answer (repair leaves it out)", REPAIR, (REPAIR, DROP)),
    "no-answer": Check("no assistant turn, so nothing to learn", DROP, (DROP,)),
    # The whole of the data.
    "exact-duplicate": Check("a conversation that is there already", DROP, (DROP, KEEP)),
    "repeated-piece": Check("a piece of a text that is there already (repair leaves it out)", REPAIR, (REPAIR, DROP)),
    "near-duplicate": Check(
        "a conversation that shares four fifths of its text with an earlier one, as data made from a template does "
        "(the split keeps them together)", KEEP, (KEEP, DROP)
    ),
    "also-held-out": Check("a training conversation that is, almost, in the held-out file too", DROP, (DROP, KEEP)),
    "length-outlier": Check("a conversation far longer or shorter than the others", KEEP, (KEEP, DROP)),
    "script-outlier": Check("a conversation in a script that hardly any other is in", KEEP, (KEEP, DROP)),
    "language-outlier": Check("a conversation in a language that hardly any other is in", KEEP, (KEEP, DROP)),
    # The context.
    "over-context": Check("its first exchange, or a pair's side, is too long", DROP, (DROP,)),
    "cut-to-context": Check("longer than the context (repair leaves out last turns, whole)", REPAIR, (REPAIR, DROP)),
}  # fmt: skip

# C0 and C1 controls but tab and newline (a carriage return is one), the soft hyphen, zero-width and direction marks
# that join nothing, the byte-order mark, surrogates left alone, and code points that Unicode calls no characters.
CONTROLS = re.compile(
    "[\x00-\x08\x0b-\x1f\x7f-\x9f\xad\u200b\u200e\u200f\u202a-\u202e\u2060\ufeff\ud800-\udfff\ufdd0-\ufdef\ufffe\uffff]"
)
SPACED = re.compile("[\x0b\x0c\x1c-\x1e\x85]")
"""Controls that part a text: a page break, a vertical tab, the next-line of main frames."""
TEMPLATE_TOKENS = (
    "[INST]", "[/INST]", "<<SYS>>", "<</SYS>>", "<s>", "</s>", "<|im_start|>", "<|im_end|>", "<|endoftext|>",
    "<|eot_id|>", "<|begin_of_text|>", "<|end_of_text|>", "<start_of_turn>", "<end_of_turn>",
)  # fmt: skip
SPACES = frozenset(filter(str.isspace, map(chr, range(0x3001))))
SHOWN_FIELDS = 12


@dataclass
class Finding:
    """What one check found."""

    kind: str
    action: str
    count: int = 0
    place: str = ""
    example: str = ""
    fields: dict[str, int] = field(default_factory=dict)
    """Of unused fields: name -> rows that have a value there."""
    values: dict[str, str] = field(default_factory=dict)
    """And the first value of each."""


@dataclass
class Findings:
    """All findings so far; `actions` are from `actions()`."""

    actions: dict[str, str]
    found: dict[str, Finding] = field(default_factory=dict)

    def add(self, kind: str, place: str, example: str = "") -> str:
        """Count a finding and say what to do about it."""
        action = self.actions[kind]
        finding = self.found.get(kind)
        if finding is None:
            finding = self.found[kind] = Finding(kind, action, 0, place, example)
        finding.count += 1
        return action

    def unused(self, place: str, fields: dict[str, object]) -> str:
        """Count a row with fields that nothing reads, and say what to do about it."""
        action = self.add("unused-fields", place)
        finding = self.found["unused-fields"]
        rows = finding.fields
        for name, value in fields.items():
            if name in rows:
                rows[name] += 1
            elif len(rows) < 1000:
                rows[name] = 1
                finding.values[name] = " ".join(str(value)[:200].split())[:40]
        return action

    def undo(self, kind: str) -> None:
        """Take back the last count: the row failed a worse check after all."""
        self.found[kind].count -= 1
        if not self.found[kind].count:
            del self.found[kind]

    def table(self) -> list[dict]:
        """The findings as rows, in the order of CHECKS, each with its sentence."""
        return [
            {
                "kind": kind,
                "count": finding.count,
                "action": finding.action,
                "place": finding.place,
                "example": finding.example or named_fields(finding),
                "sentence": sentence(finding),
            }
            for kind in CHECKS
            if (finding := self.found.get(kind)) is not None
        ]

    def sentences(self) -> list[str]:
        """One sentence a finding."""
        return [row["sentence"] for row in self.table()]

    def dropped(self) -> dict[str, int]:
        """Kind -> how many rows it took out."""
        return {row["kind"]: row["count"] for row in self.table() if row["action"] == DROP}


def named_fields(finding: Finding) -> str:
    """The unused fields by how many rows have them, each with its first value."""
    names = sorted(finding.fields, key=lambda name: (-finding.fields[name], name))
    told = [
        f"{name} in {count:,} row{'s' * (count > 1)}, such as {shortened(finding.values[name])}"
        for name in names[:SHOWN_FIELDS]
        for count in (finding.fields[name],)
    ]
    return "; ".join(told) + (f"; and {len(names) - len(told)} more" if len(names) > len(told) else "")


def shortened(value: str, most: int = 20) -> str:
    """A value by which a field is known, whole or its beginning.

    >>> shortened("ultrachat"), shortened("f0e37e9f7800261167ce91143f98f511f768847236f133f2d0aed60b44")
    ('ultrachat', 'f0e37e9f780026116…')
    """
    return value if len(value) <= most else value[: most - 3] + "…"


def sentence(finding: Finding) -> str:
    """Count, what it is, what was done, where for example."""
    example = f": {finding.example!r}" if finding.example else ""
    example = f": {named_fields(finding)}" if finding.fields else example
    return (
        f"{finding.kind}: {CHECKS[finding.kind].says}; {finding.count:,} {DONE[finding.action]}, "
        f"for example {finding.place}{example}"
    )


def actions(switches: str = "") -> dict[str, str]:
    """Check -> repair, drop or keep, from `check=action` with commas between. Raises ValueError naming the choices.

    >>> actions("near-duplicate=drop")["near-duplicate"]
    'drop'
    >>> actions("broken-row=keep")
    Traceback (most recent call last):
    ValueError: on_finding: broken-row can be drop, not keep
    """
    chosen = {kind: check.default for kind, check in CHECKS.items()}
    for switch in filter(None, (part.strip() for part in switches.split(","))):
        kind, _, action = (part.strip() for part in switch.partition("="))
        if kind not in CHECKS:
            raise ValueError(f"on_finding: there is no check {kind!r}; there are {', '.join(CHECKS)}")
        if action not in CHECKS[kind].choices:
            raise ValueError(f"on_finding: {kind} can be {' or '.join(CHECKS[kind].choices)}, not {action}")
        chosen[kind] = action
    return chosen


class Leaks(NamedTuple):
    """What finds tokens of chat templates: the model's own anywhere in a text, everybody's at its edges."""

    own: re.Pattern
    openers: tuple[str, ...]
    """Letters that the model's own tokens begin with."""
    head: re.Pattern
    tail: re.Pattern
    reach: int
    """Letters of the longest token, with some space behind it."""
    firsts: frozenset[str]
    lasts: frozenset[str]
    """Letters that tokens, and spaces, begin and end with: most texts do with none of them, and are passed by."""

    def at_edges(self, text: str) -> bool:
        """Whether a text may begin or end with a token or a space."""
        return bool(text) and (text[0] in self.firsts or text[-1] in self.lasts)

    def edges(self, text: str) -> tuple[int, int]:
        """Where a text begins and ends without the tokens at its edges."""
        start, end = 0, len(text)
        if not self.at_edges(text):
            return start, end
        while found := self.head.match(text, start):
            start = found.end()
        if "</s>" in text[start : len(text.rstrip()) - len("</s>")] and text[:start].strip() == "<s>":
            return 0, end  # struck text in HTML, which is closed before the end
        while end > start and (found := self.tail.search(text, max(end - self.reach, start), end)):
            end = found.start()
        return start, end


def leaks(*tokens: str) -> Leaks:
    """What finds tokens of a chat template: the model's own, and those that everybody's exports leak at their edges."""
    longest_first = sorted({*TEMPLATE_TOKENS, *filter(None, tokens)}, key=lambda token: (-len(token), token))
    known = "|".join(map(re.escape, longest_first))
    own = "|".join(re.escape(token) for token in longest_first if token in tokens) or r"(?!)"
    reach = len(longest_first[0]) + 8
    head, tail = re.compile(rf"\s{{0,8}}(?:{known})"), re.compile(rf"(?:{known})\s*\Z")
    firsts, lasts = (SPACES.union(token[place] for token in longest_first) for place in (0, -1))
    openers = tuple({token[0] for token in tokens if token})
    return Leaks(re.compile(own), openers, head, tail, reach, firsts, lasts)


def check(messages: list[dict], place: str, findings: Findings, leaked: Leaks) -> list[dict] | None:
    """Messages in order, with text in every turn and an answer at the end; None when the row is dropped."""
    if flawless(messages, leaked):
        return messages
    turns = []
    noted: set[str] = set()
    for message in messages:
        content = clean(message["content"], place, findings, leaked, noted)
        if content is None:
            return None
        turns.append({"role": message["role"], "content": content})
        if "weight" in message:
            turns[-1]["weight"] = message["weight"]
    if len(turns) == 1 and turns[0]["role"] == "text":
        return turns if turns[0]["content"] else dropped("no-answer", place, findings, "no text")
    return in_turns(turns, place, findings)


def flawless(messages: list[dict], leaked: Leaks) -> bool:
    """Whether no check would find anything: looked for in all turns at once, as most conversations have nothing."""
    if not regular([message["role"] for message in messages]):
        return False
    contents = [message["content"] for message in messages]
    for content in contents:
        if not content or leaked.at_edges(content):
            return False
    text = " ".join(contents)
    for letter in leaked.openers:
        if letter in text and leaked.own.search(text):
            return False
    return text.isprintable() or not CONTROLS.search(text)


def dropped(kind: str, place: str, findings: Findings, example: str = "") -> None:
    """Count a finding whose row goes."""
    findings.add(kind, place, example)


def clean(text: str, place: str, findings: Findings, leaked: Leaks, noted: set[str]) -> str | None:
    """A turn's text without what nobody wrote; None when the row is dropped for it.

    noted: checks that an earlier turn of the row failed; a row counts once for each.
    """
    if CONTROLS.search(text):
        text = text.replace("\r\n", "\n").replace("\r", "\n")
        right = unmixed(text)
        if right != text:
            action = note("mojibake", place, right[:60], findings, noted)
            if action == DROP:
                return None
            text = right if action == REPAIR else text
        tidy = CONTROLS.sub("", SPACED.sub("\n", text))
        action = KEEP if tidy == text else note("control-characters", place, excerpt(text, CONTROLS), findings, noted)
        if action == DROP:
            return None
        # Half a surrogate pair is no character at all: no file and no tokenizer would take it.
        text = text.encode("utf-8", "ignore").decode() if action == KEEP else tidy
    start, end = leaked.edges(text)
    if end - start < len(text) or leaked.own.search(text):
        shown = excerpt(text, leaked.own) if leaked.own.search(text) else text[:40] if start else text[-40:]
        action = note("leaked-template", place, shown, findings, noted)
        if action == DROP:
            return None
        text = without_leaks(text, leaked, text[start:end]) if action == REPAIR else text
    tidy = text.strip()
    if tidy != text and tidy:
        action = note("edge-spaces", place, text[:40], findings, noted)
        if action == DROP:
            return None
        tidy = text if action == KEEP else tidy
    return tidy


def without_leaks(text: str, leaked: Leaks, rest: str) -> str:
    """The rest of a text between the tokens at its edges, the model's own inside of it taken apart by a space.

    A text that is nothing but such tokens is about them: it stays, taken apart.
    """
    return leaked.own.sub(lambda token: f"{token[0][0]} {token[0][1:]}", rest if rest.strip() else text)


def note(kind: str, place: str, example: str, findings: Findings, noted: set[str]) -> str:
    """Count a finding once a row, and say what to do about it."""
    if kind in noted:
        return findings.actions[kind]
    noted.add(kind)
    return findings.add(kind, place, example)


def excerpt(text: str, pattern: re.Pattern) -> str:
    """The text around the first match."""
    start = pattern.search(text).start()
    return text[max(start - 20, 0) : start + 40]


def in_turns(turns: list[dict], place: str, findings: Findings) -> list[dict] | None:
    """System prompt first, then questions and answers by turns, an answer last; None when the row is dropped."""
    roles = [turn["role"] for turn in turns]
    if regular(roles) and all(turn["content"] for turn in turns):
        return turns
    if "assistant" not in roles:
        return dropped("no-answer", place, findings, ", ".join(roles))
    empty = [i for i, turn in enumerate(turns) if not turn["content"]]
    if any(roles[i] != "system" for i in empty):
        if findings.add("empty-turn", place, f"turn {empty[0] + 1} ({roles[empty[0]]})") == DROP:
            return None
        # An exchange goes as a whole: its question with its answer.
        gone = {j for i in empty for j in (i, i + 1 if roles[i] == "user" else i - 1) if 0 <= j < len(roles)}
        turns = [turn for i, turn in enumerate(turns) if i not in gone or (roles[i] == "system" and i not in empty)]
    turns = [turn for turn in turns if turn["content"]]
    systems = [turn["content"] for turn in turns if turn["role"] == "system"]
    if any(turn["role"] == "system" for turn in turns[1:]) and findings.add("late-system", place) == DROP:
        return None
    turns = [turn for turn in turns if turn["role"] != "system"]
    joined: list[dict] = []
    for turn in turns:
        if joined and joined[-1]["role"] == turn["role"]:
            # An answer that is not to be trained makes what it is joined with one.
            joined[-1] = joined[-1] | turn | {"content": joined[-1]["content"] + "\n\n" + turn["content"]}
        else:
            joined.append(turn)
    if len(joined) < len(turns) and findings.add("same-role-twice", place) == DROP:
        return None
    if joined and joined[0]["role"] == "assistant":
        if findings.add("answer-first", place, joined[0]["content"][:40]) == DROP:
            return None
        joined = joined[1:]
    if joined and joined[-1]["role"] == "user":
        if findings.add("no-answer-last", place, joined[-1]["content"][:40]) == DROP:
            return None
        joined = joined[:-1]
    if not joined:
        return dropped("no-answer", place, findings, ", ".join(roles))
    return ([{"role": "system", "content": "\n\n".join(systems)}] if systems else []) + joined


def regular(roles: list[str]) -> bool:
    """An optional system prompt, then user and assistant by turns, the assistant last.

    >>> regular(["system", "user", "assistant"]), regular(["user", "user", "assistant"])
    (True, False)
    """
    start = 1 if roles[:1] == ["system"] else 0
    turns = roles[start:]
    half = len(turns) // 2
    return half > 0 and len(turns) % 2 == 0 and turns == ["user", "assistant"] * half
