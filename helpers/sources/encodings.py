"""Which charset bytes are in that are not UTF-8: charset-normalizer's guess, shown before it is believed.

>>> charset = Charset()
>>> charset.text("Wo ist das Café? Über der Straße.".encode("cp1252"))
'Wo ist das Café? Über der Straße.'
>>> charset.name
'cp1252'
"""

import re
from typing import Any

CANDIDATES = (
    "cp1252", "cp1250", "cp1251", "cp1253", "cp1254", "cp1255", "cp1256", "cp1257", "cp932", "euc_jp", "gb18030",
    "big5", "cp949", "koi8_r", "mac_roman",
)  # fmt: skip
"""What people's spreadsheets and old programs write, and nothing that only a short text could be taken for."""
USUAL = "cp1252"
SAMPLE_BYTES = 2**17
ENOUGH = 20
"""Bytes beyond ASCII under which a neighbour of the usual charset is not believed."""
HALF_WIDTH = re.compile("[\uff61-\uff9f]")
NOT_ASCII = re.compile(rb"[^\n]*[\x80-\xff][^\n]*")
MIXED = re.compile("(?:[\xc2-\xdf][\x80-\xbf]|[\xe0-\xef][\x80-\xbf]{2}|[\xf0-\xf4][\x80-\xbf]{3})+")
"""UTF-8 that was read as Latin-1."""
CONTROL = re.compile("[\x80-\x9f]")


class Charset:
    """The charset of one file, guessed when its first bytes that are not UTF-8 are met."""

    def __init__(self) -> None:
        self.name = ""

    def text(self, raw: bytes, more: bytes = b"") -> str:
        """Bytes as text. more: other bytes of the file, which make the guess surer."""
        if not self.name:
            self.name = guess(raw.replace(b"\0", b"\n") + b"\n" + more)  # no text holds a zero: a binary would
        return raw.decode(self.name, "replace")


def guess(raw: bytes) -> str:
    """The name of the likeliest charset; Windows-1252 where nothing tells it from its neighbours."""
    from charset_normalizer import from_bytes

    sample = b"\n".join(NOT_ASCII.findall(raw[:SAMPLE_BYTES])) or raw[:SAMPLE_BYTES]
    found = [match for match in from_bytes(sample, cp_isolation=list(CANDIDATES)) if not half_width(str(match))]
    if not found:
        return USUAL
    best = found[0]
    usual = next((match for match in found if USUAL in match.could_be_from_charset), None)
    few = sum(byte > 0x7F for byte in sample) < ENOUGH
    if usual is not None and usual.chaos <= best.chaos and (few or usual.coherence >= best.coherence):
        return USUAL
    return best.encoding


def half_width(text: str) -> bool:
    """Whether much of a text is half-width katakana: other charsets read as Japanese look so, and nobody writes it."""
    letters = sum(not letter.isascii() for letter in text)
    return len(HALF_WIDTH.findall(text)) > 0.3 * letters


def unmixed(text: str) -> str:
    """A text in which UTF-8 was read as Latin-1, read rightly; only where controls show that it was.

    >>> unmixed("Itâ\\x80\\x99s cafÃ©")
    'It’s cafÃ©'
    """
    return MIXED.sub(lambda run: decoded(run[0]) if CONTROL.search(run[0]) else run[0], text)


def decoded(run: str) -> Any:
    """A run of Latin-1 letters as the UTF-8 that it is, or as it stands where it is none."""
    try:
        return run.encode("latin-1").decode("utf-8")
    except UnicodeDecodeError:
        return run
