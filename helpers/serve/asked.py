"""What a request asks for, checked: OpenAI's fields that are served, and those that are refused rather than ignored.

>>> Asked.model_validate({"model": "m", "messages": [{"role": "user", "content": "Hi"}], "stop": "."}).stops
('.',)
"""

import json
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError

MOST_STOPS, LONGEST_STOP = 4, 200
NEUTRAL = {
    "n": (1,),
    "best_of": (1,),
    "logprobs": (False, 0),
    "top_logprobs": (0,),
    "presence_penalty": (0,),
    "frequency_penalty": (0,),
    "logit_bias": ({},),
    "tools": ([],),
    "tool_choice": ("none", "auto"),
    "functions": ([],),
    "response_format": ({"type": "text"},),
    "echo": (False,),
    "suffix": ("",),
    "seed": (),
}
"""Field that is not served -> values that change nothing and so are let through, None always among them."""


class Refused(Exception):
    """A request that is not answered: HTTP status, a sentence, and OpenAI's type, code and param."""

    def __init__(self, status: int, message: str, code: str | None = None, param: str | None = None) -> None:
        super().__init__(message)
        self.status, self.code, self.param = status, code, param

    @property
    def kind(self) -> str:
        """OpenAI's name of the kind of error."""
        names = {401: "authentication_error", 429: "rate_limit_error"}
        return names.get(self.status, "server_error" if self.status >= 500 else "invalid_request_error")

    def body(self) -> dict[str, Any]:
        """OpenAI's error object."""
        return {"error": {"message": str(self), "type": self.kind, "param": self.param, "code": self.code}}


class Part(BaseModel):
    """A part of a message."""

    type: Literal["text"]
    text: str


class Message(BaseModel):
    """One turn."""

    role: Literal["system", "developer", "user", "assistant"]
    content: str | list[Part]

    def plain(self) -> dict[str, str]:
        """As chat templates take it; a developer is OpenAI's newer name of the system."""
        text = self.content if isinstance(self.content, str) else "".join(part.text for part in self.content)
        return {"role": "system" if self.role == "developer" else self.role, "content": text}


class StreamOptions(BaseModel):
    """What a stream has besides text."""

    include_usage: bool | None = None


Stop = Annotated[str, Field(min_length=1, max_length=LONGEST_STOP)]


class Asked(BaseModel):
    """A request for an answer to messages, or for a prompt's continuation. Unknown fields are let through."""

    model_config = ConfigDict(extra="ignore")

    model: str
    messages: list[Message] | None = Field(default=None, min_length=1)
    prompt: str | None = None
    max_tokens: int | None = Field(default=None, ge=1)
    max_completion_tokens: int | None = Field(default=None, ge=1)
    temperature: float | None = Field(default=None, ge=0, le=2)
    top_p: float | None = Field(default=None, gt=0, le=1)
    stop: Stop | Annotated[list[Stop], Field(max_length=MOST_STOPS)] | None = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None

    @property
    def stops(self) -> tuple[str, ...]:
        """Texts that end the answer and do not belong to it."""
        return (self.stop,) if isinstance(self.stop, str) else tuple(self.stop or ())

    @property
    def most_tokens(self) -> int | None:
        """Tokens of the answer, at most; None: as many as the context has left."""
        return self.max_completion_tokens or self.max_tokens

    @property
    def with_usage(self) -> bool:
        """Whether a stream ends with its token counts."""
        return bool(self.stream_options and self.stream_options.include_usage)


def parsed(text: str | bytes | bytearray) -> Any:
    r"""What JSON holds. Raises ValueError for what is none, and for half a character, which no text can have.

    >>> parsed(r'"\ud83d\udc3f"')
    '🐿'
    >>> parsed(r'"\ud83d"')
    Traceback (most recent call last):
    ValueError: \ud83d is half a character: send it whole, or leave it out
    """
    found = json.loads(text)
    try:
        json.dumps(found, ensure_ascii=False).encode()
    except UnicodeEncodeError as error:
        half = f"\\u{ord(error.object[error.start]):04x}"
        raise ValueError(f"{half} is half a character: send it whole, or leave it out") from None
    return found


def read(body: dict[str, Any], chat: bool) -> Asked:
    """A request's body, checked. Raises Refused (400) naming the field that is wrong or not served."""
    for name, neutral in NEUTRAL.items():
        value = body.get(name)
        if value is not None and value not in neutral:
            raise Refused(400, f"{name} is not served here: leave it out", "unsupported_parameter", name)
    wanted = "messages" if chat else "prompt"
    if body.get(wanted) is None:
        raise Refused(400, f"{wanted} is missing", "missing_required_parameter", wanted)
    try:
        return Asked.model_validate(body)
    except ValidationError as error:
        first = error.errors()[0]
        place = ".".join(str(part) for part in first["loc"] if not str(part).startswith(("list[", "constrained")))
        raise Refused(400, f"{place}: {first['msg']}", "invalid_value", place) from None
