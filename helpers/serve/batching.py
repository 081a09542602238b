"""A model that answers many at once: transformers' continuous batching, a new request joins at the next token.

Its public interface alone is used (`init_continuous_batching`, one loop in a thread of its own). Keys and values lie in
blocks whose number is decided here: left alone it would take most of what memory is free.
"""

import asyncio
import contextlib
import itertools
import threading
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass
from typing import Any

from helpers import hardware
from helpers.budget import host, placement
from helpers.config import RunConfig
from helpers.hardware import Machine
from helpers.inference import Loaded, generation_config, kind, load, pinned, shape_of
from helpers.models import ModelShape
from helpers.serve.asked import Refused

GIB = 2**30
GREEDY = 1e-5
"""Temperature that stands for 0: one loop samples for all, and a gap of 0.001 in logits is then e^100 in odds."""
AT_ONCE = 16
"""Conversations as long as the context that get blocks, where memory has room for so many."""
CACHE_SHARE = {"cuda": 0.8, "cpu": 0.5}
"""Share of the memory free beside the weights that keys and values may take; the rest is for the layers' work."""
FEWEST_TOKENS = 512
"""Keys and values for fewer are not worth serving."""
BATCH_TOKENS = 512
"""Tokens that a step reads, prompts and answers of all together: bounds what the layers work in."""
STOP_S = 10.0


@dataclass(frozen=True)
class Wish:
    """What the loop needs of a request."""

    ids: list[int]
    max_tokens: int
    temperature: float = 0.0
    top_p: float = 1.0


class Engine:
    """An open model and its loop."""

    def __init__(self, loaded: Loaded, blocks: int | None = None, on_death: Callable[[], None] = lambda: None) -> None:
        """Start the loop, with so many blocks for keys and values (default: what memory has room for).

        on_death: called once if the loop ends by itself. Raises ValueError when memory has no room for a conversation,
        and RuntimeError when this model cannot be served so.
        """
        from transformers import ContinuousBatchingConfig

        self.loaded, self.on_death = loaded, on_death
        settings = ContinuousBatchingConfig(
            per_request_processors=True, max_batch_tokens=BATCH_TOKENS, auto_switch_to_flash=False
        )
        page = getattr(settings, "page_size", None) or settings.block_size
        settings.num_blocks = blocks or blocks_for(loaded, page)
        self.context = min(loaded.context, settings.num_blocks * page)
        # both values differ from 1, which would leave out the processors that requests then set their own values of
        sampling = generation_config(loaded, 1, temperature=0.7, top_p=0.9)
        self.ends = set(sampling.eos_token_id)
        use_paged_attention(loaded.model)
        self.manager = loaded.model.init_continuous_batching(sampling, settings)
        self.listeners: dict[str, Callable[[Any], None]] = {}
        self.numbers, self.closing = itertools.count(), False
        self.manager.start()
        self.reader = threading.Thread(target=self.deliver, daemon=True)
        self.reader.start()

    @property
    def running(self) -> bool:
        """Whether requests are taken."""
        return self.manager.is_running() and not self.closing

    def deliver(self) -> None:
        """Hand every output to whom it belongs, until the loop ends; then tell those who still wait."""
        for output in self.manager:
            self.listeners.get(output.request_id, lambda output: None)(output)
        for listener in list(self.listeners.values()):
            listener(None)
        if not self.closing:
            self.on_death()

    async def tokens(self, wish: Wish) -> AsyncIterator[list[int]]:
        """New tokens, a list whenever some come; who stops listening cancels the request.

        Raises Refused (503, 500) when the loop is gone or fails.
        """
        loop, outputs = asyncio.get_running_loop(), asyncio.Queue()
        name = f"request-{next(self.numbers)}"
        self.listeners[name] = lambda output: tell(loop, outputs, output)
        finished, seen = False, 0
        try:
            if not self.running:
                raise Refused(503, "the server is stopping", "stopping")
            self.manager.add_request(
                wish.ids,
                request_id=name,
                max_new_tokens=wish.max_tokens,
                streaming=True,
                temperature=max(float(wish.temperature), GREEDY),
                top_p=float(wish.top_p),
            )
            while not finished:
                output = await outputs.get()
                if output is None or output.error:
                    finished = output is None
                    raise Refused(500, f"generation failed: {output.error if output else 'the model stopped'}")
                finished = output.is_finished()
                new, seen = output.generated_tokens[seen:], len(output.generated_tokens)
                if new:
                    yield new
        finally:
            del self.listeners[name]
            if not finished:
                self.manager.cancel_request(name)

    def close(self) -> None:
        """Cancel what runs and end the loop."""
        self.closing = True
        for name in list(self.listeners):
            self.manager.cancel_request(name)
        self.manager.stop(block=True, timeout=STOP_S)
        self.reader.join(STOP_S)


def tell(loop: asyncio.AbstractEventLoop, outputs: asyncio.Queue, output: Any) -> None:
    """Put an output into a queue of the event loop, from another thread; nobody listens when that loop is closed."""
    with contextlib.suppress(RuntimeError):
        loop.call_soon_threadsafe(outputs.put_nowait, output)


def use_paged_attention(model: Any) -> None:
    """Attention as continuous batching knows it; a family whose attention is eager keeps that.

    The trainer's own repeats keys and values before SDPA, for lack of a mask; here there always is one, and
    transformers repeats them itself.
    """
    eager = "eager" in str(model.config._attn_implementation)
    model.set_attn_implementation("paged|eager" if eager else "sdpa")


def bytes_a_token(model: Any) -> int:
    """Bytes of one token's keys and values in all layers."""
    config = model.config.get_text_config()
    heads = getattr(config, "num_key_value_heads", None) or config.num_attention_heads
    width = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    return 2 * config.num_hidden_layers * heads * width * model.dtype.itemsize


def blocks_for(loaded: Loaded, page: int, machine: Machine | None = None) -> int:
    """Blocks of `page` tokens: AT_ONCE whole contexts, or as many as memory has room for.

    machine: as it is once the weights lie in it, default this one now. Raises ValueError when it has room for too few.
    """
    tokens, token_gib = room_tokens(loaded, machine or hardware.probe()), bytes_a_token(loaded.model) / GIB
    room = tokens // page
    fewest = -(-min(FEWEST_TOKENS, loaded.context) // page)
    if room < fewest:
        place = "card" if loaded.model.device.type == "cuda" else "memory"
        raise ValueError(
            f"{loaded.path} leaves {tokens * token_gib:.2f} GiB for keys and values and a conversation of "
            f"{fewest * page} tokens needs {fewest * page * token_gib:.2f}: end what else uses the {place}, or "
            "serve the model in 4 bits"
        )
    return min(room, AT_ONCE * -(-loaded.context // page))


def room_tokens(loaded: Loaded, machine: Machine) -> int:
    """Tokens whose keys and values have room beside the weights. machine: as it is once those lie in it."""
    on_card = loaded.model.device.type == "cuda"
    free_gib = machine.allocator_gib if on_card else machine.host.ram_gib
    return int(free_gib * CACHE_SHARE["cuda" if on_card else "cpu"] * GIB / bytes_a_token(loaded.model))


def opened(path: str, config: RunConfig, machine: Machine | None = None) -> Loaded:
    """A model folder opened for serving. Raises ValueError with one sentence when it is none, or does not fit."""
    machine = machine or hardware.probe()
    name = pinned(path, config)
    refuse_what_does_not_fit(path, kind(name), config, shape_of(name, config), machine)
    return load(path, config)


def refuse_what_does_not_fit(path: str, what: str, config: RunConfig, shape: ModelShape, machine: Machine) -> None:
    """Raises ValueError where the weights would not lie in memory whole: layers that wait elsewhere are too slow."""
    remedy = "serve its GPTQ folder, or a GGUF file of type q4_k_m"
    one = config.with_values(eval_batch_size=1)
    place = placement.place(what, one, shape, machine)
    if place.problem or place.away:
        why = place.problem or f"{placement.in_words(place, shape)} would be copied to the card for every token"
        raise ValueError(f"{path} cannot be served here: {why}; {remedy}")
    needed = sum(host.ram(one, shape, machine, "inference", placement.phases(place, one, shape)).values())
    if needed > machine.host.ram_gib:
        raise ValueError(
            f"{path} needs {needed:.1f} GiB of RAM to be served here and {machine.host.ram_gib:.1f} are free: "
            + (remedy if machine.gpu else f"take a machine with a GPU, or {remedy}")
        )
