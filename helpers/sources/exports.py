"""What chat apps export of themselves: a tree of messages, of which one way is the conversation that was read.

ChatGPT's conversations.json, LibreChat's and Open WebUI's files and OASST's trees keep every answer that was asked for
again. Trained is the way that was last seen (ChatGPT, LibreChat, Open WebUI) or the best-ranked one (OASST); how many
messages lie beside it is a finding.

>>> tree = {"prompt": {"role": "prompter", "text": "Hi", "replies": [{"role": "assistant", "text": "Ho", "rank": 0}]}}
>>> way(Row(tree), kind({"message_tree_id": 1} | tree))
[{'role': 'prompter', 'text': 'Hi'}, {'role': 'assistant', 'text': 'Ho', 'rank': 0}]
"""

from typing import Any

from helpers.sources.columns import Row

HINTS = {"mapping", "messagestree", "messagesTree", "messages", "chat", "prompt", "chunkedprompt", "chunkedPrompt"}
"""Fields of which each export has one."""
OTHER_HINTS = HINTS - {"messages"}
DEPTH = 10_000
"""Messages of one way through a tree, at most: a tree that leads back into itself has no end."""


def kind(row: dict[str, Any]) -> str | None:
    """Whose export a row is: chatgpt, librechat, open-webui, oasst-tree, ai-studio; None for none of them."""
    if HINTS.isdisjoint(row):
        return None
    messages = row.get("messages")
    if (
        messages
        and len(row) <= 3
        and isinstance(messages, list)
        and not (isinstance(messages[0], dict) and "isCreatedByUser" in messages[0])
        and OTHER_HINTS.isdisjoint(row)
    ):
        return None  # the usual, at once
    if isinstance(row.get("mapping"), dict):
        return "chatgpt"
    tree = row.get("messagestree", row.get("messagesTree"))
    messages = tree if isinstance(tree, list) else row.get("messages")
    if isinstance(messages, list) and messages and isinstance(messages[0], dict) and "isCreatedByUser" in messages[0]:
        return "librechat"
    if isinstance(row.get("chat"), dict):
        return "open-webui"
    if isinstance(row.get("prompt"), dict) and isinstance(row["prompt"].get("replies"), list):
        return "oasst-tree"
    if isinstance(row.get("chunkedprompt", row.get("chunkedPrompt")), dict):
        return "ai-studio"
    return None


def way(row: Row, name: str) -> list[dict[str, Any]]:
    """The turns of the conversation that was read, as the app keeps them; notes in row how many lie beside it."""
    turns, others = WAYS[name](row)
    if others:
        row.notes["other-branches"] = f"{others} beside the way"
    return turns


def chatgpt(row: Row) -> tuple[list[dict], int]:
    """conversations.json: nodes with a parent each; the last one seen is current_node."""
    nodes = {key: node for key, node in row.take("mapping").items() if isinstance(node, dict)}
    children = {key for node in nodes.values() for key in node.get("children") or []}
    at = row.take("current_node")
    if at not in nodes:
        at = next((key for key in reversed(nodes) if not nodes[key].get("children")), None)
    path = upwards(nodes, at, "parent")
    turns = [turn for key in path if (turn := chatgpt_turn(nodes[key].get("message")))]
    beside = [key for key in nodes if key not in set(path) and key in children]
    return turns, sum(bool(chatgpt_turn(nodes[key].get("message"))) for key in beside)


def chatgpt_turn(message: Any) -> dict[str, Any] | None:
    """A message as role and content; None for what the app keeps for itself and nobody saw."""
    if not isinstance(message, dict):
        return None
    metadata, content = message.get("metadata") or {}, message.get("content") or {}
    name = (message.get("author") or {}).get("role")
    if metadata.get("is_visually_hidden_from_conversation") or name == "system":
        return None
    what = content.get("content_type", "text")
    if what in ("user_editable_context", "model_editable_context"):
        return None
    if what in ("thoughts", "reasoning_recap"):
        return {"role": name, "content": [{"type": "thinking"}]}
    if name == "tool" or message.get("recipient", "all") != "all":
        return {"role": "tool", "content": ""}
    parts = [part for part in content.get("parts") or [content.get("text")] if part]
    parts = [part if isinstance(part, str) else {"type": str(part.get("content_type", "object"))} for part in parts]
    return {"role": name, "content": [{"type": "text", "text": p} if isinstance(p, str) else p for p in parts]}


def librechat(row: Row) -> tuple[list[dict], int]:
    """Its JSON export: a list of messages with their parents, or a tree of children where it was exported as one."""
    tree = row.first(("messagestree", "messagesTree")) or "messages"
    listed = flattened(row.take(tree), "children")
    nodes = {message.get("messageId", str(i)): message for i, message in enumerate(listed)}
    linked = any(message.get("parentMessageId") in nodes for message in listed)
    path = upwards(nodes, next(reversed(nodes), None), "parentMessageId") if linked else list(nodes)
    turns = [librechat_turn(nodes[key]) for key in path]
    return turns, len(nodes) - len(path)


def librechat_turn(message: dict) -> dict[str, Any]:
    """A message as role and content: `sender` is a model's name, isCreatedByUser says who wrote."""
    content = message.get("content") or message.get("text")
    if isinstance(content, list):
        content = [
            part if not isinstance(part, dict) else {"type": part.get("type")} | text_part(part) for part in content
        ]
    turn = {"role": "user" if message.get("isCreatedByUser") else "assistant", "content": content}
    files = message.get("files") or message.get("image_urls")
    return turn | ({"images": files} if files else {})


def text_part(part: dict) -> dict[str, Any]:
    """LibreChat's {"type": "text", "text": {"value": …}} as others write it."""
    text = part.get("text")
    return {"text": text.get("value") if isinstance(text, dict) else text} if text is not None else {}


def open_webui(row: Row) -> tuple[list[dict], int]:
    """Its export: chat.history.messages with parents and currentId, or only the chat.messages that were shown."""
    chat = row.take("chat")
    history = chat.get("history") if isinstance(chat.get("history"), dict) else {}
    nodes = history.get("messages") if isinstance(history.get("messages"), dict) else {}
    path = upwards(nodes, history.get("currentId"), "parentId")
    turns = [nodes[key] for key in path] or chat.get("messages") or []
    turns = [turn for turn in turns if isinstance(turn, dict)]
    system = [{"role": "system", "content": chat["system"]}] if isinstance(chat.get("system"), str) else []
    return system + [
        {name: turn[name] for name in ("role", "content", "files") if turn.get(name)} for turn in turns
    ], max(len(nodes) - len(path), 0)


def oasst(row: Row) -> tuple[list[dict], int]:
    """A message tree: of each message's replies the one that people ranked first."""
    node, turns = row.take("prompt"), []
    every = len(flattened([node], "replies"))
    while isinstance(node, dict) and len(turns) < DEPTH:
        turns.append({name: node[name] for name in ("role", "text", "rank") if node.get(name) is not None})
        replies = [reply for reply in node.get("replies") or [] if isinstance(reply, dict) and not reply.get("deleted")]
        node = min(replies, key=rank, default=None)
    return turns, every - len(turns)


def rank(message: dict) -> float:
    """A reply's place among its siblings; one that nobody ranked comes last."""
    value = message.get("rank")
    return value if isinstance(value, int | float) and value == value else 1e9


def ai_studio(row: Row) -> tuple[list[dict], int]:
    """Google AI Studio's prompt file: chunks of the user and the model, its thoughts marked."""
    name = "chunkedprompt" if "chunkedprompt" in row.fields else "chunkedPrompt"
    chunks = [chunk for chunk in row.take(name).get("chunks") or [] if isinstance(chunk, dict)]
    spoken = []
    for chunk in chunks:
        if chunk.get("isThought"):
            spoken.append({"role": chunk.get("role"), "content": [{"type": "thinking"}]})
        else:
            rest = {key: value for key, value in chunk.items() if key.startswith("drive")}
            spoken.append({"role": chunk.get("role"), "text": chunk.get("text")} | ({"images": rest} if rest else {}))
    return spoken, 0


def upwards(nodes: dict[str, dict], at: Any, parent: str) -> list[str]:
    """Keys from the first message down to `at`, by their parents; a circle of parents ends where it closes."""
    path: dict[str, None] = {}
    while at in nodes and at not in path and isinstance(nodes[at], dict):
        path[at] = None
        at = nodes[at].get(parent)
        at = at if isinstance(at, str) else None
    return list(reversed(path))


def flattened(nodes: Any, below: str) -> list[dict]:
    """All messages of a tree of lists, each before those below it; the last of siblings last."""
    found, waiting = [], [node for node in reversed(nodes or []) if isinstance(node, dict)]
    while waiting and len(found) < DEPTH:
        node = waiting.pop()
        found.append(node)
        waiting += [child for child in reversed(node.get(below) or []) if isinstance(child, dict)]
    return found


WAYS = {
    "chatgpt": chatgpt,
    "librechat": librechat,
    "open-webui": open_webui,
    "oasst-tree": oasst,
    "ai-studio": ai_studio,
}
