"""Files that keep one message a row: put together again, by conversation, by parent, or as the one that the file is.

>>> rows = [("line 1", {"role": "user", "content": "Hi"}), ("line 2", {"role": "assistant", "content": "Ho"})]
>>> [(talk.place, [turn["content"] for turn in talk.turns]) for talk in joined(rows)]
[('line 1', ['Hi', 'Ho'])]
"""

from typing import Any, NamedTuple

from helpers.sources.columns import PAIRS, TURN_FIELDS, is_empty, normal
from helpers.sources.exports import rank
from helpers.sources.turns import ROLE_KEYS

TEXTS = ("content", "value", "text", "mes", "message")
IDS = (
    "conversation_id", "conversationid", "thread_id", "session_id", "chat_id", "dialog_id", "dialogue_id",
    "message_tree_id", "conversation_hash", "ticket_id",
)  # fmt: skip
BY_USER = ("is_user", "iscreatedbyuser")
NODES, PARENTS = ("message_id", "messageid", "uuid", "id"), ("parent_id", "parentmessageid", "parent_message_id")
MESSAGES_LIMIT = 2_000_000
"""Messages of one file, which are all held in memory until its end."""


class Talk(NamedTuple):
    """A conversation that was put together, and how many messages of it lie beside the way that was taken."""

    place: str
    turns: list[dict[str, Any]]
    others: int


def is_message(row: Any) -> bool:
    """Whether a row is one message: somebody who speaks, a text, and no conversation.

    >>> is_message({"role": "user", "content": "Hi"}), is_message({"text": "Hi"})
    (True, False)
    """
    if not isinstance(row, dict) or len(row) < 2:
        return False
    fields = {normal(name): value for name, value in row.items()}
    if any(name in fields for name in TURN_FIELDS) or "mapping" in fields:
        return False
    if any(prompt in fields and answer in fields for prompt, answer in PAIRS):
        return False
    speaks = any(isinstance(fields.get(name), str) for name in ROLE_KEYS) or any(name in fields for name in BY_USER)
    return speaks and any(isinstance(fields.get(name), str | list) for name in TEXTS)


def is_heading(row: Any) -> bool:
    """Whether a row heads a chat of SillyTavern: whose it is, and no message."""
    return isinstance(row, dict) and "user_name" in row and "character_name" in row


def joined(rows: list[tuple[str, dict[str, Any]]]) -> list[Talk]:
    """Conversations of (place, message) rows: by parent where messages name one, by an id where they have one."""
    made = [(place, turn_of(row)) for place, row in rows]
    fields = {key for _, turn in made for key in turn}
    node = next((name for name in NODES if name in fields), None)
    parent = next((name for name in PARENTS if name in fields), None)
    if node and parent:
        return by_parent(made, node, parent)
    key = next((name for name in IDS if name in fields), None)
    if key:
        groups: dict[Any, list] = {}
        for place, turn in made:
            groups.setdefault(str(turn.pop(key, "")), []).append((place, turn))
        return [Talk(group[0][0], [turn for _, turn in group], 0) for group in groups.values()]
    starts = [i for i, (_, turn) in enumerate(made) if str(turn.get("role", "")).lower() == "system"]
    if len(starts) < 2 or starts[0] != 0:
        starts = [0]
    ends = [*starts[1:], len(made)]
    return [
        Talk(made[start][0], [turn for _, turn in made[start:end]], 0)
        for start, end in zip(starts, ends, strict=True)
    ]  # fmt: skip


def by_parent(made: list[tuple[str, dict]], node: str, parent: str) -> list[Talk]:
    """One way through each tree: the best-ranked reply, or without ranks the last one that was written."""
    below: dict[Any, list[tuple[str, dict]]] = {}
    names = {turn.get(node) for _, turn in made}
    roots = []
    for place, turn in made:
        above = turn.get(parent)
        if is_empty(above) or above not in names:
            roots.append((place, turn))
        else:
            below.setdefault(above, []).append((place, turn))
    talks = []
    for place, root in roots:
        path, seen, at, every = [], set(), root, 0
        while at is not None and at.get(node) not in seen:
            seen.add(at.get(node))
            path.append(at)
            replies = [turn for _, turn in below.get(at.get(node), []) if not turn.get("deleted")]
            every += max(len(replies) - 1, 0)
            ranked = any("rank" in turn and not is_empty(turn["rank"]) for turn in replies)
            at = min(replies, key=rank) if ranked else replies[-1] if replies else None
        bare = [{key: value for key, value in turn.items() if key not in (node, parent, *IDS)} for turn in path]
        talks.append(Talk(place, bare, every))
    return talks


def turn_of(row: dict[str, Any]) -> dict[str, Any]:
    """A message with a role: LibreChat and SillyTavern say only whether the user wrote it."""
    fields = {normal(name): value for name, value in row.items()}
    by_user = next((name for name in BY_USER if name in fields), None)
    if by_user is None:
        return fields
    mine = fields.pop(by_user)
    text = next((fields.pop(name) for name in TEXTS if isinstance(fields.get(name), str | list)), "")
    speaker = {"role": "user" if str(mine).lower() in ("true", "1") else "assistant", "content": text}
    return speaker | {key: value for key, value in fields.items() if key not in ("sender", "name")}
