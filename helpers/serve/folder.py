"""A merged, adapter or GPTQ folder behind OpenAI's two endpoints: tokens of the engine as chat and text completions."""

import json
import time
import uuid
from collections.abc import AsyncIterator
from dataclasses import dataclass
from typing import Any

from helpers.inference import Loaded, prompt_ids
from helpers.serve.asked import Asked, Refused, read
from helpers.serve.batching import Engine, Wish
from helpers.serve.text import Text

TEMPERATURE = 1.0
"""OpenAI's default, where a request names none."""


@dataclass
class Reply:
    """What goes back: pieces of a stream of events, or of one JSON body."""

    status: int
    streaming: bool
    chunks: AsyncIterator[bytes]


class Folder:
    """A served folder."""

    def __init__(self, name: str, loaded: Loaded, engine: Engine) -> None:
        self.name, self.loaded, self.engine = name, loaded, engine
        self.context, self.how = engine.context, f"{loaded.kind}, {loaded.how}"
        self.created = int(time.time())

    @property
    def running(self) -> bool:
        """Whether it answers."""
        return self.engine.running

    def close(self) -> None:
        """End the loop."""
        self.engine.close()

    async def reply(self, body: dict[str, Any], chat: bool) -> Reply:
        """Answer a request. Raises Refused (400) for what cannot be answered; before anything is generated."""
        asked = read(body, chat)
        ids = self.prompt(asked)
        left = self.context - len(ids)
        if left < 1:
            raise Refused(
                400,
                f"the prompt has {len(ids)} tokens and this model's context is {self.context}: shorten it",
                "context_length_exceeded",
                "messages" if chat else "prompt",
            )
        temperature = TEMPERATURE if asked.temperature is None else asked.temperature
        wish = Wish(ids, min(asked.most_tokens or left, left), temperature, asked.top_p or 1.0)
        answer = self.answer(wish, Text(self.loaded.tokenizer, asked.stops, strip=chat))
        head = {"id": f"{'chatcmpl' if chat else 'cmpl'}-{uuid.uuid4().hex}", "created": int(time.time())}
        shape = (events if asked.stream else whole)(answer, head | {"model": self.name}, chat, asked.with_usage)
        return Reply(200, bool(asked.stream), shape)

    def prompt(self, asked: Asked) -> list[int]:
        """A request's tokens. Raises Refused (400) when the chat template does not take these roles."""
        try:
            return prompt_ids(self.loaded.tokenizer, asked.prompt or [one.plain() for one in asked.messages or []])
        except ValueError as error:
            raise Refused(400, str(error), "invalid_messages", "messages") from None

    async def answer(self, wish: Wish, text: Text) -> AsyncIterator[tuple[str, str | None, dict[str, int]]]:
        """(text, reason of the end or None, token counts so far), piece by piece."""
        count, ended = 0, False
        tokens = self.engine.tokens(wish)
        try:
            async for new in tokens:
                count += len(new)
                ended = new[-1] in self.engine.ends
                said = text.add(new)
                if said or text.stopped:
                    yield said, None, usage(wish, count)
                if text.stopped:
                    break
        finally:
            await tokens.aclose()  # a generator that is only dropped would cancel its request some time later
        yield text.rest(), "stop" if ended or text.stopped else "length", usage(wish, count)


def usage(wish: Wish, answered: int) -> dict[str, int]:
    """OpenAI's counts."""
    read_tokens = len(wish.ids)
    return {"prompt_tokens": read_tokens, "completion_tokens": answered, "total_tokens": read_tokens + answered}


def choice(chat: bool, field: str, said: str, reason: str | None) -> dict[str, Any]:
    """One choice of an answer or of a piece of it; field: message or delta, in a chat."""
    held = {field: {"role": "assistant", "content": said}} if chat else {"text": said}
    return {"index": 0, **held, "logprobs": None, "finish_reason": reason}


async def whole(answer: AsyncIterator, head: dict, chat: bool, with_usage: bool) -> AsyncIterator[bytes]:
    """One JSON body."""
    text, reason, counts = "", None, {}
    try:
        async for said, reason, counts in answer:  # noqa: B007 - the last ones are needed after the loop
            text += said
    finally:
        await answer.aclose()
    kind = "chat.completion" if chat else "text_completion"
    body = head | {"object": kind, "choices": [choice(chat, "message", text, reason)], "usage": counts}
    yield json.dumps(body).encode()


async def events(answer: AsyncIterator, head: dict, chat: bool, with_usage: bool) -> AsyncIterator[bytes]:
    """Server-sent events; a failure in the middle is the last of them."""
    head = head | {"object": "chat.completion.chunk" if chat else "text_completion"}
    counts: dict[str, int] = {}
    try:
        if chat:
            yield event(head | {"choices": [choice(chat, "delta", "", None)]})
        async for said, reason, counts in answer:  # noqa: B007 - the last counts are needed after the loop
            if said:
                yield event(head | {"choices": [choice(chat, "delta", said, None)]})
            if reason:
                last = {"index": 0, "delta": {}, "finish_reason": reason} if chat else choice(chat, "", "", reason)
                yield event(head | {"choices": [last]})
        if with_usage:
            yield event(head | {"choices": [], "usage": counts})
        yield b"data: [DONE]\n\n"
    except Refused as error:
        yield event(error.body())
    finally:
        await answer.aclose()


def event(body: dict[str, Any]) -> bytes:
    """One server-sent event."""
    return b"data: " + json.dumps(body).encode() + b"\n\n"
