"""A file of prompts answered without a server: `python -m helpers serve --batch PROMPTS.jsonl --output ANSWERS.jsonl`.

A line is one of
    {"messages": [{"role": "user", "content": "Hi"}], "max_tokens": 64}   a chat; or {"question": "Hi"}
    {"prompt": "Once upon a time"}                                        text to go on with, without a template
    {"custom_id": "a", "method": "POST", "url": "/v1/chat/completions", "body": {…}}   OpenAI's batch, as vLLM reads it
and a chat or a text may have what OpenAI's requests have: max_tokens, temperature, top_p, stop. An answer has a line of
its own, in the order of the prompts: OpenAI's batch is answered as OpenAI does, any other line gets the field
`generated`. Answers are kept as they come, so that the same command goes on where an earlier one was stopped.

Prompts of like length share a batch, the longest first: all are known from the start, so nobody waits for a place, and
a batch is as large as the budget has room for. Every kind of model that can be opened can be asked so.
"""

import json
import os
import time
import uuid
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import count as count_from
from itertools import groupby, islice
from pathlib import Path
from typing import Any

from helpers import hardware, workspace
from helpers.config import RunConfig
from helpers.inference import Generation, batch_generate, load, open_tokenizer, pinned, prompt_ids, shape_of
from helpers.models.gpu import gives_back
from helpers.serve import asked, batching
from helpers.serve.batching import Wish
from helpers.serve.folder import choice, usage
from helpers.serve.text import cut
from helpers.show import bars

CHAT, TEXT = "/v1/chat/completions", "/v1/completions"
MOST_TOKENS = 512
"""Of an answer whose line says nothing of it, or a quarter of a shorter context."""
TOGETHER = 64
"""Answers in a batch, at most; fewer where memory has no room for their keys and values."""
GENERATED = "generated"
IDENTITY, ANSWERS = "batch.json", "answers.jsonl"


@dataclass(frozen=True)
class Row:
    """One line: what it was, and what it asks for."""

    number: int
    given: dict[str, Any]
    asks: asked.Asked
    chat: bool

    @property
    def openai(self) -> bool:
        """Whether it is a line of OpenAI's batch."""
        return "body" in self.given

    @property
    def prompt(self) -> str | list[dict[str, str]]:
        """A text, or messages as chat templates take them."""
        return [one.plain() for one in self.asks.messages or []] if self.chat else self.asks.prompt or ""


@gives_back
def answer(model: str | Path, config: RunConfig, prompts: Path, output: Path, max_tokens: int | None = None) -> dict:
    """Answer a file of prompts with a model of any kind; returns what was measured.

    max_tokens: of an answer whose line names none. Greedy where a line names no temperature. Goes on where the same
    batch was stopped. Raises ValueError in one sentence for a line that is no request, before the model is opened, and
    for an output that is there. A prompt that is too long for the model has an `error` in place of its answer.
    """
    prompts, output = Path(prompts), Path(output)
    rows = list(read(prompts))
    if output.exists():
        raise ValueError(f"{output} is there already: choose another --output, nothing was changed")
    model = pinned(model, config)
    tokenizer, context = open_tokenizer(model, config), shape_of(model, config).max_context
    longest = max_tokens or min(MOST_TOKENS, context // 4)
    wishes = {row.number: wish(row, tokens_of(tokenizer, row), longest, context) for row in rows}
    work = workspace.beside(output, "partial")
    identity = {
        "prompts": workspace.checksum(prompts),
        "model": str(model),
        "model_is": workspace.identify(Path(model)),
        "max_tokens": max_tokens,
    }
    with workspace.exclusive(work), workspace.files.room_on_disk(work, "what was answered is kept"):
        replies = earlier(work, identity)
        resumed, start = len(replies), time.monotonic()
        loaded = load(model, sized(config, wishes))
        written_s = 0.0
        left = [row for row in rows if row.number not in replies]
        with (work / ANSWERS).open("a", encoding="utf-8") as kept, bars.bar("answers", len(rows)) as bar:
            bar.update(resumed)
            tokens = 0
            for batch in batches(left, wishes, room(loaded)):
                began = time.perf_counter()
                for row, reply in zip(batch, replies_to(batch, wishes, loaded, config), strict=True):
                    replies[row.number] = reply
                    tokens += count(reply)
                    kept.write(json.dumps({"row": row.number, "reply": reply}, ensure_ascii=False) + "\n")
                kept.flush()
                os.fsync(kept.fileno())
                written_s += time.perf_counter() - began
                bar.set_postfix_str(f"{tokens / written_s:,.0f} tokens/s", refresh=False)
                bar.update(len(batch))
        lines = (json.dumps(written(row, replies[row.number], str(model)), ensure_ascii=False) for row in rows)
        workspace.write_text(output, "".join(f"{line}\n" for line in lines))
        workspace.files.erase(work)
    return {
        "answers": len(rows),
        "answered_before": resumed,
        "without_an_answer": sum("error" in reply for reply in replies.values()),
        "tokens": tokens,
        "tokens_per_s": round(tokens / written_s, 1) if written_s else None,
        "seconds": round(time.monotonic() - start, 1),
        "opened_as": loaded.how,
    }


# ---- what is asked ---------------------------------------------------------------------------------------------------


def read(file: Path) -> Iterator[Row]:
    """A file's lines as requests. Raises ValueError naming the line that is none, and for a file without any."""
    number, names = 0, {}
    try:
        # not splitlines, which also ends a line at what JSON may hold inside a text, such as U+2028
        lines = file.read_text(encoding="utf-8-sig").split("\n")
    except (OSError, UnicodeDecodeError) as error:
        raise ValueError(f"{file} cannot be read ({error}): name a JSONL file in UTF-8") from None
    for number, line in enumerate(lines, 1):
        if line.strip():
            try:
                row = request(number, asked.parsed(line))
                name = row.given.get("custom_id") if row.openai else None
                if name is not None and names.setdefault(str(name), number) != number:
                    raise ValueError(
                        f"its custom_id {name} is that of line {names[str(name)]} already: give each its own"
                    )
                yield row
            except (ValueError, RecursionError, asked.Refused) as error:
                said = "is not JSON" if isinstance(error, json.JSONDecodeError) else f"is no request: {error}"
                raise ValueError(f"{file}, line {number} {said}; nothing was answered") from None
    if not any(line.strip() for line in lines):
        raise ValueError(f"{file} holds no prompt: write one JSON object a line")


def request(number: int, given: Any) -> Row:
    """A line as a request. Raises ValueError or Refused for what it is not.

    >>> request(1, {"question": "Who has a dog?"}).prompt
    [{'role': 'user', 'content': 'Who has a dog?'}]
    >>> request(2, {"prompt": "Edith keeps a"}).prompt
    'Edith keeps a'
    """
    if not isinstance(given, dict):
        raise ValueError("it is not a JSON object")
    if GENERATED in given:
        raise ValueError(f"it has a field {GENERATED} already, which the answer would replace: rename that")
    body, chat = given, "prompt" not in given
    if "body" in given:
        body, chat = given["body"], given.get("url") == CHAT
        if given.get("url") not in (CHAT, TEXT) or not isinstance(body, dict):
            raise ValueError(f"its url is {given.get('url')}, and {CHAT} or {TEXT} is what can be answered")
    elif "question" in given and "messages" not in given:
        body, chat = given | {"messages": [{"role": "user", "content": given["question"]}]}, True
    asks = asked.read(body | {"model": str(body.get("model", ""))}, chat)
    if chat and asks.messages[-1].role == "assistant":
        raise ValueError("its last message is the assistant's: leave out what is to be answered")
    return Row(number, given, asks, chat)


def tokens_of(tokenizer: Any, row: Row) -> list[int]:
    """A prompt's tokens. Raises ValueError when the chat template does not take these roles."""
    try:
        return prompt_ids(tokenizer, row.prompt)
    except ValueError as error:
        raise ValueError(f"line {row.number}: {error}") from None


def wish(row: Row, ids: list[int], longest: int, context: int) -> Wish:
    """What a row wants of the model; as many tokens as the context has left, at most, and perhaps none."""
    most = min(row.asks.most_tokens or longest, context - len(ids))
    return Wish(ids, most, row.asks.temperature or 0.0, row.asks.top_p or 1.0)


# ---- answering -------------------------------------------------------------------------------------------------------


def sized(config: RunConfig, wishes: dict[int, Wish]) -> RunConfig:
    """The configuration with batches and lengths of these prompts, so that the model is opened with room for them."""
    answered = [one for one in wishes.values() if one.max_tokens > 0]
    return config.with_values(
        eval_batch_size=min(TOGETHER, len(wishes)),
        eval_context=max([16, *(len(one.ids) for one in answered)]),
        max_new_tokens=max([1, *(one.max_tokens for one in answered)]),
    )


def room(loaded: Any) -> int:
    """Tokens of prompts and answers that may be in a batch: what the budget planned on a GPU, else the RAM's share."""
    return loaded.batch_tokens or batching.room_tokens(loaded, hardware.probe())


def batches(rows: list[Row], wishes: dict[int, Wish], room_tokens: int) -> Iterator[list[Row]]:
    """Rows that are answered together: the same settings, the longest prompts first, no more tokens than fit."""

    def settings(row: Row) -> tuple:
        one = wishes[row.number]
        return one.max_tokens > 0, one.temperature, one.top_p, -one.max_tokens

    order = sorted(rows, key=lambda row: (settings(row), -len(wishes[row.number].ids)))
    for _, alike in groupby(order, settings):
        left = list(alike)
        while left:
            first = wishes[left[0].number]
            most = min(TOGETHER, max(1, room_tokens // (len(first.ids) + max(first.max_tokens, 1))))
            yield left[:most]
            left = left[most:]


def replies_to(batch: list[Row], wishes: dict[int, Wish], loaded: Any, config: RunConfig) -> list[dict[str, Any]]:
    """Text, reason of the end and counts of each row; an error where the prompt leaves no room for an answer."""
    first = wishes[batch[0].number]
    if first.max_tokens < 1:
        return [too_long(wishes[row.number], loaded.context) for row in batch]
    prompts = [row.prompt for row in batch]
    sampling = {"temperature": first.temperature, "top_p": first.top_p, "seed": config.seed + batch[0].number}
    found = batch_generate(loaded, prompts, first.max_tokens, len(batch), **sampling)
    return [reply(row, wishes[row.number], one) for row, one in zip(batch, found, strict=True)]


def too_long(one: Wish, context: int) -> dict[str, Any]:
    """The error of a prompt that fills the context."""
    said = f"the prompt has {len(one.ids)} tokens and this model's context is {context}: shorten it"
    return {"error": {"code": "context_length_exceeded", "message": said}}


def reply(row: Row, one: Wish, found: Generation) -> dict[str, Any]:
    """An answer cut at the row's stop texts, and why it ended."""
    text = found.text.lstrip() if row.chat else found.text
    said, stopped = cut(text, row.asks.stops)
    reason = "stop" if stopped or found.ended else "length"
    return {"text": said if stopped else text, "finish_reason": reason, "usage": usage(one, found.tokens)}


def count(reply: dict[str, Any]) -> int:
    """Tokens of an answer."""
    return reply.get("usage", {}).get("completion_tokens", 0)


# ---- on disk ---------------------------------------------------------------------------------------------------------


def earlier(work: Path, identity: dict[str, Any]) -> dict[int, dict[str, Any]]:
    """What a stopped run of this batch has answered, by line. Raises ValueError for what another one left there."""
    known = work / IDENTITY
    if not known.is_file():
        workspace.seal(known, identity)
        return {}
    try:
        before = workspace.unseal(known)
    except ValueError:
        before = {}
    if before != json.loads(json.dumps(identity)):
        raise ValueError(
            f"{work} holds the answers of another batch (other prompts, model or max_tokens): "
            "delete it if they are not wanted, or choose another --output"
        )
    file, replies = work / ANSWERS, {}
    file.touch()
    lines = file.read_bytes().splitlines(keepends=True)
    if lines and not lines[-1].endswith(b"\n"):  # cut short by a kill: that one is answered again
        lines.pop()
        os.truncate(file, sum(map(len, lines)))
    for line in lines:
        one = json.loads(line)
        replies[one["row"]] = one["reply"]
    return replies


def free(wanted: Path) -> Path:
    """The name itself, or with the first number behind it that no answers have yet: nothing is written over."""
    others = (wanted.with_stem(f"{wanted.stem}-{number}") for number in count_from(2))
    return next(path for path in (wanted, *islice(others, 10_000)) if not path.exists())


def first(answers: Path, rows: int = 5) -> list[dict[str, str]]:
    """The first lines of a file of answers, for a table: what was asked, and what was said."""
    with answers.open(encoding="utf-8") as lines:
        shown = [json.loads(line) for line in islice(lines, rows)]
    return [{"asked": asked_in(row), "answered": said_in(row)} for row in shown]


def asked_in(row: dict[str, Any]) -> str:
    """The question of a line of answers; OpenAI's lines say only their name.

    >>> asked_in({"messages": [{"role": "user", "content": "Hi"}], "generated": None})
    'Hi'
    """
    named = row.get("question") or row.get("prompt") or row.get("custom_id")
    return str(named or row["messages"][-1]["content"])


def said_in(row: dict[str, Any]) -> str:
    """The answer of a line of answers, or why there is none."""
    if row.get("error"):
        return row["error"]["message"]
    if GENERATED in row:
        return row[GENERATED]["text"]
    said = row["response"]["body"]["choices"][0]
    return said["message"]["content"] if "message" in said else said["text"]


def written(row: Row, reply: dict[str, Any], model: str) -> dict[str, Any]:
    """The line of an answer: OpenAI's for OpenAI's, else the row itself and what was generated."""
    error = reply.get("error")
    if not row.openai:
        return row.given | ({GENERATED: None, "error": error} if error else {GENERATED: reply})
    body = error or {
        "id": f"{'chatcmpl' if row.chat else 'cmpl'}-{uuid.uuid4().hex}",
        "object": "chat.completion" if row.chat else "text_completion",
        "created": int(time.time()),
        "model": row.asks.model or model,
        "choices": [choice(row.chat, "message", reply["text"], reply["finish_reason"])],
        "usage": reply["usage"],
    }
    response = None if error else {"status_code": 200, "request_id": uuid.uuid4().hex, "body": body}
    name = row.given.get("custom_id")
    return {"id": f"batch_req_{uuid.uuid4().hex}", "custom_id": name, "response": response, "error": error}
