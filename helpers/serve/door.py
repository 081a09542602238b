"""The door: OpenAI's paths over HTTP, one error object for all, key, limits, and clients that hang up.

Paths: POST /v1/chat/completions and /v1/completions, GET /v1/models and /health; with a page, GET /.
"""

import asyncio
import contextlib
import hmac
from collections.abc import AsyncIterator, Mapping
from pathlib import Path
from typing import Any

from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import FileResponse, JSONResponse, Response, StreamingResponse
from starlette.routing import Route

from helpers.serve.asked import Refused, parsed
from helpers.serve.folder import Reply

PAGE = Path(__file__).with_name("page.html")
MOST_BODY_MIB = 4
"""Of a request: many times what the longest context holds."""
MOST_REQUESTS = 64
"""Answered or waiting at the same time; the next is told to come again (429)."""
MIB = 2**20
PAGE_HEADERS = {
    "Content-Security-Policy": "default-src 'none'; script-src 'unsafe-inline'; style-src 'unsafe-inline'; "
    "connect-src 'self'; base-uri 'none'; form-action 'none'",
    "X-Content-Type-Options": "nosniff",
}


class Places:
    """How many requests may be inside at once."""

    def __init__(self, most: int) -> None:
        self.most, self.taken, self.served = most, 0, 0

    def take(self) -> None:
        """Raises Refused (429) when all are taken."""
        if self.taken >= self.most:
            raise Refused(429, f"{self.most} requests are being answered: try again in a moment", "queue_full")
        self.taken += 1
        self.served += 1

    def free(self) -> None:
        """One went."""
        self.taken -= 1


class Streamed(StreamingResponse):
    """A stream of events that frees its place however it ends, also when it never began."""

    def __init__(self, chunks: AsyncIterator[bytes], places: Places) -> None:
        super().__init__(chunks, media_type="text/event-stream", headers={"Cache-Control": "no-cache"})
        self.chunks, self.places = chunks, places

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        try:
            await super().__call__(scope, receive, send)
        finally:
            with contextlib.suppress(Refused):
                await self.chunks.aclose()
            self.places.free()


def door(models: Mapping[str, Any], key: str | None = None, page: bool = False, most: int = MOST_REQUESTS) -> Starlette:
    """The application that answers for these models, by the names that requests give them.

    Its state's `places` counts the requests that are inside, and that were.
    """
    places = Places(most)

    async def health(request: Request) -> Response:
        down = [name for name, model in models.items() if not model.running]
        return JSONResponse({"status": f"{', '.join(down)} stopped" if down else "ok"}, 503 if down else 200)

    async def listed(request: Request) -> Response:
        admit(request, key)
        return JSONResponse({"object": "list", "data": [about(model) for model in models.values()]})

    async def one(request: Request) -> Response:
        admit(request, key)
        return JSONResponse(about(named(models, request.path_params["name"])))

    async def chat(request: Request) -> Response:
        return await answered(request, chat=True)

    async def completion(request: Request) -> Response:
        return await answered(request, chat=False)

    async def shown(request: Request) -> Response:
        return FileResponse(PAGE, headers=PAGE_HEADERS)

    async def answered(request: Request, chat: bool) -> Response:
        admit(request, key)
        body = await read_json(request)
        model = named(models, body.get("model"))
        if chat and not body.get("messages"):
            raise Refused(400, "messages is missing or empty", "missing_required_parameter", "messages")
        places.take()
        streamed = None
        try:
            reply = await unless_gone(request, model.reply(body, chat))
            if reply.streaming:
                streamed = Streamed(reply.chunks, places)
                return streamed
            return Response(await unless_gone(request, gathered(reply)), reply.status, media_type="application/json")
        finally:
            if streamed is None:
                places.free()

    routes = [
        Route("/health", health),
        Route("/v1/models", listed),
        Route("/v1/models/{name:path}", one),
        Route("/v1/chat/completions", chat, methods=["POST"]),
        Route("/v1/completions", completion, methods=["POST"]),
        *([Route("/", shown)] if page else []),
    ]
    api = Starlette(routes=routes, exception_handlers={Refused: refused, HTTPException: unknown, Exception: failed})
    api.state.places, api.state.models = places, models
    return api


def refused(request: Request, error: Refused) -> Response:
    """A refusal as OpenAI's error object."""
    headers = {429: {"Retry-After": "1"}, 401: {"WWW-Authenticate": "Bearer"}}.get(error.status, {})
    if error.status == 413:  # what is left of the body is not read
        headers = {"Connection": "close"}
    return JSONResponse(error.body(), error.status, headers)


def unknown(request: Request, error: HTTPException) -> Response:
    """A path or method that is not served."""
    sentence = f"{request.method} {request.url.path} is not served here"
    return JSONResponse(Refused(error.status_code, sentence, "unknown_url").body(), error.status_code)


def failed(request: Request, error: Exception) -> Response:
    """What nobody foresaw; the traceback is on the server's standard error."""
    return JSONResponse(Refused(500, f"{type(error).__name__}: {error}").body(), 500)


def about(model: Any) -> dict[str, Any]:
    """A model in OpenAI's list, and how it was opened."""
    return {
        "id": model.name,
        "object": "model",
        "created": model.created,
        "owned_by": "local",
        "context_length": model.context,
        "how": model.how,
    }


def named(models: Mapping[str, Any], name: object) -> Any:
    """The model of that name. Raises Refused (400, 404)."""
    if not isinstance(name, str):
        raise Refused(400, "model is missing", "missing_required_parameter", "model")
    if name not in models:
        sentence = f"there is no model {name!r} here: {', '.join(models)}"
        raise Refused(404, sentence, "model_not_found", "model")
    return models[name]


def admit(request: Request, key: str | None) -> None:
    """Raises Refused (401) without the key, where there is one."""
    if key is None:
        return
    given = request.headers.get("authorization", "").removeprefix("Bearer ").encode()
    if not hmac.compare_digest(given, key.encode()):
        raise Refused(401, "the API key is missing or wrong", "invalid_api_key")


async def read_json(request: Request) -> dict[str, Any]:
    """A request's body. Raises Refused: 413 above MOST_BODY_MIB, 415 of another kind, 400 when it is no JSON object.

    Only JSON by name: what any web page can make a browser send without asking comes as text.
    """
    if request.headers.get("content-type", "").partition(";")[0].strip().lower() != "application/json":
        raise Refused(415, "send JSON, with Content-Type: application/json", "unsupported_media_type")
    body = bytearray()
    async for chunk in request.stream():
        body += chunk
        if len(body) > MOST_BODY_MIB * MIB:
            raise Refused(413, f"a request may have {MOST_BODY_MIB} MiB: send less", "request_too_large")
    try:
        found = parsed(body)
    except (ValueError, RecursionError) as error:
        raise Refused(400, f"the body is not JSON: {error}", "invalid_json") from None
    if not isinstance(found, dict):
        raise Refused(400, "the body is not a JSON object", "invalid_json")
    return found


async def gathered(reply: Reply) -> bytes:
    """The body of an answer that is not streamed; who cancels this closes its source."""
    try:
        return b"".join([chunk async for chunk in reply.chunks])
    finally:
        await reply.chunks.aclose()


async def unless_gone(request: Request, work: Any) -> Any:
    """The result of a coroutine, which is cancelled when the client hangs up. Raises Refused then, for nobody."""
    working, gone = asyncio.ensure_future(work), asyncio.ensure_future(hung_up(request))
    try:
        await asyncio.wait({working, gone}, return_when=asyncio.FIRST_COMPLETED)
        if working.done():
            return working.result()
        raise Refused(499, "the client hung up")
    finally:
        for task in (working, gone):
            task.cancel()
        await asyncio.gather(working, gone, return_exceptions=True)


async def hung_up(request: Request) -> None:
    """Returns when the client is gone; its body has been read."""
    while (await request.receive())["type"] != "http.disconnect":
        pass
