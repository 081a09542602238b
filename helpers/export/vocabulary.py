"""A tokenizer in GGUF's words, such that llama.cpp reads the same tokens as training did.

llama.cpp merges by score, tokenizer.json by rank: so a token's score is the rank of its merge, negated. Converters that
find no tokenizer.model give every token the score -1000, which merges from left to right: about half of all strings
then become other tokens. And llama.cpp puts a space before each text behind a special token unless the file says no:
the chat templates here write their spaces themselves, so the file says no.

>>> from helpers.models import TINY
>>> found = read(TINY, 2048)
>>> found.tokens[:3], found.kinds[:3], found.bos
(['<unk>', '<s>', '</s>'], [2, 3, 3], 1)
"""

import json
import re
from dataclasses import dataclass
from pathlib import Path

from gguf import GGUFWriter, TokenType

UNMERGED = -1e6
"""Score of a token that no merge makes: below every rank."""
GENERATION_TAGS = re.compile(r"\{%-?\s*(?:end)?generation\s*-?%\}")
"""transformers' marks around what is trained; other Jinja engines do not know them."""


@dataclass(frozen=True)
class Vocabulary:
    """What a GGUF file says of its tokens; the lists are as long as the model's embedding."""

    tokens: list[str]
    scores: list[float]
    kinds: list[int]
    bos: int | None
    eos: int
    unknown: int | None
    pad: int | None
    template: str | None


def read(folder: Path, size: int) -> Vocabulary:
    """The vocabulary of a model folder's tokenizer, filled up to the embedding's size.

    Raises ValueError for a tokenizer that llama.cpp's own for Mistral and Llama 2 does not compute: anything but byte
    pair encoding with byte fallback.
    """
    path = Path(folder) / "tokenizer.json"
    if not path.is_file():
        raise ValueError(f"{folder} has no tokenizer.json: save its tokenizer with transformers first")
    content = json.loads(path.read_text(encoding="utf-8"))
    model = content["model"]
    if model.get("type") != "BPE" or not model.get("byte_fallback"):
        kind = f"{model.get('type')}{'' if model.get('byte_fallback') else ' without byte fallback'}"
        raise ValueError(
            f"the tokenizer of {folder} is {kind}, and only byte pair encoding with byte fallback (Mistral 7B, "
            "Llama 2) is written here: convert this model with llama.cpp's convert_hf_to_gguf.py"
        )
    words: dict[str, int] = dict(model["vocab"])
    added = {token["content"]: token for token in content["added_tokens"]}
    words |= {text: token["id"] for text, token in added.items()}
    if max(words.values()) >= size:
        raise ValueError(f"the tokenizer of {folder} has id {max(words.values())}, and the model {size} embeddings")
    ranks = merge_ranks(model["merges"])
    tokens = [f"[PAD{i}]" for i in range(size)]
    scores, kinds = [0.0] * size, [int(TokenType.UNUSED)] * size
    for text, i in words.items():
        tokens[i] = text
        kinds[i] = int(token_kind(text, added.get(text), model.get("unk_token")))
        if kinds[i] == TokenType.NORMAL:
            scores[i] = -float(ranks[text]) if text in ranks else UNMERGED
    special = special_tokens(folder)
    ids = {name: words.get(text) for name, text in special.items()}
    if ids.get("eos_token") is None:
        raise ValueError(f"the tokenizer of {folder} has no end-of-sequence token: a chat would never end")
    return Vocabulary(
        tokens, scores, kinds, ids.get("bos_token"), ids["eos_token"], ids.get("unk_token"), ids.get("pad_token"),
        chat_template(folder),
    )  # fmt: skip


def merge_ranks(merges: list) -> dict[str, int]:
    """Token -> rank of the first merge that makes it. Merges are pairs, in older files one string.

    >>> merge_ranks([["a", "b"], "ab c"])
    {'ab': 0, 'abc': 1}
    """
    ranks: dict[str, int] = {}
    for rank, pair in enumerate(merges):
        ranks.setdefault("".join(pair.split(" ") if isinstance(pair, str) else pair), rank)
    return ranks


def token_kind(text: str, added: dict | None, unknown: str | None) -> TokenType:
    """llama.cpp's kind of a token: only NORMAL ones are merged, CONTROL ones are not text."""
    if text == unknown:
        return TokenType.UNKNOWN
    if added is not None:
        return TokenType.CONTROL if added["special"] else TokenType.USER_DEFINED
    return TokenType.BYTE if re.fullmatch(r"<0x[0-9A-F]{2}>", text) else TokenType.NORMAL


def special_tokens(folder: Path) -> dict[str, str]:
    """bos_token, eos_token, unk_token and pad_token, those that tokenizer_config.json names."""
    path = Path(folder) / "tokenizer_config.json"
    settings = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
    named = {name: settings.get(name) for name in ("bos_token", "eos_token", "unk_token", "pad_token")}
    texts = {name: value.get("content") if isinstance(value, dict) else value for name, value in named.items()}
    return {name: text for name, text in texts.items() if text}


def chat_template(folder: Path) -> str | None:
    """The folder's chat template without transformers' generation tags; None where there is none."""
    file, settings = Path(folder) / "chat_template.jinja", Path(folder) / "tokenizer_config.json"
    template = file.read_text(encoding="utf-8") if file.is_file() else None
    if template is None and settings.is_file():
        template = json.loads(settings.read_text(encoding="utf-8")).get("chat_template")
    return None if template is None else GENERATION_TAGS.sub("", template)


def add_to(writer: GGUFWriter, found: Vocabulary) -> None:
    """Write the vocabulary into a file's header."""
    writer.add_tokenizer_model("llama")
    writer.add_tokenizer_pre("default")
    writer.add_token_list(found.tokens)
    writer.add_token_scores(found.scores)
    writer.add_token_types(found.kinds)
    for add, token in (
        (writer.add_bos_token_id, found.bos),
        (writer.add_eos_token_id, found.eos),
        (writer.add_unk_token_id, found.unknown),
        (writer.add_pad_token_id, found.pad),
    ):
        if token is not None:
            add(token)
    writer.add_add_bos_token(found.bos is not None)
    writer.add_add_eos_token(False)
    writer.add_add_space_prefix(False)
    if found.template is not None:
        writer.add_chat_template(found.template)
