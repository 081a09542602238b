"""What the tests of serving share: a server in this process, an answer that never ends, and waiting without a race.

with serving(["mine=data/tiny-mistral"]) as here:
    here.address, here.server, here.places, here.models
"""

import asyncio
import threading
import time
from contextlib import contextmanager
from types import SimpleNamespace

import helpers.serve
from helpers.models import profile

KEY = "a-key-of-the-tests"
PATIENCE_S = 60.0


def wait_for(met):
    """Until a condition holds; a test that never sees it fails instead of hanging."""
    end = time.monotonic() + PATIENCE_S
    while not met():
        assert time.monotonic() < end, "it never came"
        time.sleep(0.01)


def never_ending(engine, monkeypatch):
    """From here on an answer of this engine waits after its fifth piece, for ever: what comes then is not a race."""
    tokens = engine.tokens

    async def held(wish):
        pieces = tokens(wish)
        try:
            for _ in range(5):
                yield await anext(pieces)
            await asyncio.Event().wait()
        finally:
            await pieces.aclose()

    monkeypatch.setattr(engine, "tokens", held)


def saying(engine, words, monkeypatch):
    """From here on this engine says these words, token by token, whatever it is asked."""
    ids = engine.loaded.tokenizer(words, add_special_tokens=False)["input_ids"]

    async def told(wish):
        for one in ids:
            yield [one]
        yield [min(engine.ends)]

    monkeypatch.setattr(engine, "tokens", told)


@contextmanager
def serving(models, key=KEY, page=False):
    """A server in this process, on a port of its own: address, uvicorn's server, the places inside."""
    here, came = {}, threading.Event()

    def ready(server, address):
        here.update(server=server, address=address)
        came.set()

    def run():
        try:
            here["result"] = helpers.serve.serve(models, profile("tiny"), port=0, api_key=key, page=page, ready=ready)
        finally:
            came.set()

    thread = threading.Thread(target=run)
    thread.start()
    came.wait()
    state = here["server"].config.app.state
    try:
        yield SimpleNamespace(**here, places=state.places, models=state.models)
    finally:
        here["server"].should_exit = True
        thread.join()
    assert here["result"]["requests"] >= 0
