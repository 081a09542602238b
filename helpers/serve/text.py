"""Tokens to text as they come: whole characters only, without the space before an answer, cut before a stop text.

>>> cut("He keeps a dog. And", (".",))
('He keeps a dog', True)
>>> cut("He keeps a dog.\\n", ("\\n\\n",))
('He keeps a dog.', False)
"""

from typing import Any


class Text:
    """One answer's text, given out piece by piece."""

    def __init__(self, tokenizer: Any, stops: tuple[str, ...] = (), strip: bool = True) -> None:
        from tokenizers.decoders import DecodeStream

        self.decoder, self.backend = DecodeStream(skip_special_tokens=True), tokenizer.backend_tokenizer
        self.stops, self.stripping = stops, strip
        self.held = ""
        self.stopped = False

    def add(self, tokens: list[int]) -> str:
        """The text that these tokens make certain; "" while a character or a stop text may still be half written."""
        for token in tokens:
            self.held += self.decoder.step(self.backend, token) or ""
        if self.stripping:  # templates leave a space before the answer
            self.held = self.held.lstrip()
            self.stripping = not self.held
        said, self.stopped = cut(self.held, self.stops)
        self.held = self.held[len(said) :]
        return said

    def rest(self) -> str:
        """What was held back, once no more tokens come."""
        return "" if self.stopped else self.held


def cut(text: str, stops: tuple[str, ...]) -> tuple[str, bool]:
    """The part of a text that may be shown, and whether a stop text ended it.

    Without one, the end that a stop text could begin with is held back.
    """
    found = [at for at in (text.find(stop) for stop in stops) if at >= 0]
    if found:
        return text[: min(found)], True
    begun = (n for stop in stops for n in range(1, len(stop)) if text.endswith(stop[:n]))
    return text[: len(text) - max(begun, default=0)], False
