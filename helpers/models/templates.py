"""From messages to token ids: the model's chat template, an end after every answer, and a mask exact to the token.

A conversation is cut into chunks where an answer begins and where it ends, and every chunk is tokenized by itself. So
no token straddles a border, the mask needs no guess about offsets, and an answer's tokens are those that the model
itself would have to write after the prompt. (mistral-common tokenizes piece by piece too.)

>>> from helpers.models import TINY
>>> template = Template(load_tokenizer(TINY))
>>> template.chunks([{"role": "user", "content": "Hi."}, {"role": "assistant", "content": "Hello!"}])
[('<s>[INST] Hi.[/INST]', False), (' Hello!</s>', True)]
"""

import hashlib
import json
import re
import shutil
from bisect import bisect
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

from helpers.models.hub import hub_sentence

MISTRAL_V1 = """\
{{- bos_token }}
{%- for message in messages %}
    {%- if message['role'] == 'user' %}
        {{- ' [INST] ' }}
        {%- if loop.index0 == 1 and messages[0]['role'] == 'system' %}
            {{- messages[0]['content'] + '\\n\\n' }}
        {%- endif %}
        {{- message['content'] + ' [/INST]' }}
    {%- elif message['role'] == 'assistant' %}
        {{- ' ' + message['content'] + eos_token }}
    {%- elif not loop.first %}
        {{- raise_exception('a system message comes first') }}
    {%- endif %}
{%- endfor %}"""
"""v0.1 and v0.2: [INST] is text, a space before it; a system prompt stands at the head of the first user turn."""

MISTRAL_V3 = """\
{{- bos_token }}
{%- set place = namespace(last_user=-1) %}
{%- for message in messages if message['role'] == 'user' %}
    {%- set place.last_user = loop.length - 1 %}
{%- endfor %}
{%- set place.users = 0 %}
{%- for message in messages %}
    {%- if message['role'] == 'user' %}
        {{- '[INST] ' }}
        {%- if messages[0]['role'] == 'system' and place.users == place.last_user %}
            {{- messages[0]['content'] + '\\n\\n' }}
        {%- endif %}
        {{- message['content'] + '[/INST]' }}
        {%- set place.users = place.users + 1 %}
    {%- elif message['role'] == 'assistant' %}
        {{- ' ' + message['content'] + eos_token }}
    {%- elif not loop.first %}
        {{- raise_exception('a system message comes first') }}
    {%- endif %}
{%- endfor %}"""
"""v0.3: [INST] and [/INST] are tokens of their own; a system prompt stands at the head of the *last* user turn."""

PAD_TOKENS = ("<pad>", "[PAD]", "<|pad|>", "<|finetune_right_pad_id|>", "<unk>")
EXCHANGE = [{"role": "user", "content": "…"}, {"role": "assistant", "content": "…"}]
TOKENIZER_FILES = (
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "tokenizer.model",
    "tokenizer.model.v3",
    "vocab.json",
    "merges.txt",
    "chat_template.jinja",
    "chat_template.json",
)
VOCABULARY_FILES = ("tokenizer.model", "tokenizer.model.v3")
NOT_NEEDED = {f"_raise_exceptions_for_{what}": False for what in ("missing_entries", "connection_errors", "gated_repo")}
MARK, MARKS = "\ue000{}\ue001", re.compile("\ue000([0-9]+)\ue001")  # private use characters: no template writes them


PART = 2**18
"""Letters of a text that the tokenizer gets at a time, at least."""
BEFORE_SPACE = re.compile(r"\w(?= \w)")


class Layout(NamedTuple):
    """What a template writes around the messages: pieces[k] comes before message order[k], pieces[-1] after all."""

    pieces: tuple[str, ...]
    order: tuple[int, ...]


class Encoded(NamedTuple):
    """One training sequence; the lists have the same length."""

    messages: list[dict[str, str]]
    input_ids: list[int]
    assistant_masks: list[int]
    full_tokens: int
    """Tokens before turns were left out to fit the context."""


def load_tokenizer(name: str | Path, revision: str | None = None) -> Any:
    """A model's tokenizer, ready for chat: a pad token that is not eos, a chat template, a padding side.

    Raises ValueError with the remedy when it cannot be had, or has no token that could pad.
    """
    from transformers import AutoTokenizer

    if str(name).startswith((".", "/")) and not Path(name).exists():
        raise ValueError(f"there is no model folder {name}")
    folder = Path(name)
    if (folder / "tekken.json").is_file() and not brings_tokenizer(folder):
        raise ValueError(
            f"{name} has its tokenizer as tekken.json alone, which transformers cannot train with: put the "
            "tokenizer.json and the chat_template.jinja of the same model in transformers' format beside it"
        )
    try:
        tokenizer = AutoTokenizer.from_pretrained(str(name), revision=revision, padding_side="right")
    except Exception as error:  # the hub's client raises many kinds for "not there" and "no network"
        if folder.is_dir():
            raise ValueError(
                f"the tokenizer in {name} cannot be read ({str(error).strip().splitlines()[-1]:.160}): a folder needs "
                "tokenizer.json, or tokenizer.model with pip install sentencepiece protobuf"
            ) from None
        raise ValueError(hub_sentence(error, "model", str(name))) from None
    if tokenizer.eos_token is None:
        raise ValueError(f"the tokenizer of {name} has no end-of-sequence token: a model could never learn to stop")
    tokenizer.pad_token = pad_token(tokenizer)
    mark_first_word_only(tokenizer)
    tokenizer.brought_template = bool(tokenizer.chat_template)
    if not tokenizer.brought_template:
        tokenizer.chat_template = MISTRAL_V3 if "[INST]" in added_tokens(tokenizer) else MISTRAL_V1
    tokenizer.vocabulary_files = vocabulary_files(str(name), revision)
    return tokenizer


def mark_first_word_only(tokenizer: Any) -> None:
    """Put ▁ before a text's first word and nowhere else, as SentencePiece, mistral-common and newer files do.

    Older files of Mistral v0.1, v0.2 and Llama 2 put it behind every special token too. `Template` tokenizes without
    those; so that `apply_chat_template` of the saved tokenizer gives the ids of training, they go here.
    """
    backend = getattr(tokenizer, "backend_tokenizer", None)
    normalizer = backend and json.loads(backend.to_str())["normalizer"]
    if normalizer and {"type": "Prepend", "prepend": "▁"} in normalizer.get("normalizers", []):
        from tokenizers.pre_tokenizers import Metaspace

        backend.normalizer = None
        backend.pre_tokenizer = Metaspace(replacement="▁", prepend_scheme="first", split=False)


def vocabulary_files(name: str, revision: str | None) -> list[Path]:
    """SentencePiece's own files beside a tokenizer, fetched where they are on the hub."""
    from transformers.utils import cached_file

    found = [cached_file(name, file, revision=revision, **NOT_NEEDED) for file in VOCABULARY_FILES]
    return [Path(file) for file in found if file]


def save_tokenizer(tokenizer: Any, folder: Path) -> None:
    """Write what `load_tokenizer` gave, so that transformers 4 and 5, vLLM and llama.cpp read the same ids from it.

    transformers 5 writes a class, a list and merges that version 4 does not know, keeps the template in a file that
    older readers do not look for, and leaves out tokenizer.model, from which llama.cpp takes the words' scores.
    """
    tokenizer.save_pretrained(str(folder))
    path = folder / "tokenizer_config.json"
    if (folder / "tokenizer.json").is_file():
        merges_as_text(folder / "tokenizer.json")
    settings = json.loads(path.read_text(encoding="utf-8"))
    for name in ("backend", "is_local", "local_files_only"):  # of this library and this machine
        settings.pop(name, None)
    if settings.get("tokenizer_class") == "TokenizersBackend":
        settings["tokenizer_class"] = "PreTrainedTokenizerFast"
    if isinstance(settings.get("extra_special_tokens"), list):
        settings["additional_special_tokens"] = settings.pop("extra_special_tokens")
    if isinstance(tokenizer.chat_template, str):
        settings["chat_template"] = tokenizer.chat_template
    path.write_text(json.dumps(settings, indent=2, sort_keys=True, ensure_ascii=False) + "\n", encoding="utf-8")
    for file in getattr(tokenizer, "vocabulary_files", ()):
        shutil.copyfile(file, folder / file.name)


def merges_as_text(path: Path) -> None:
    """Write BPE's merges as `a b`, which every version of tokenizers reads; not where a word holds a space."""
    state = json.loads(path.read_text(encoding="utf-8"))
    merges = state["model"].get("merges")
    if merges and all(isinstance(pair, list) and not any(" " in word for word in pair) for pair in merges):
        state["model"]["merges"] = [" ".join(pair) for pair in merges]
        path.write_text(json.dumps(state, indent=2, ensure_ascii=False), encoding="utf-8")


def brings_tokenizer(folder: Path) -> bool:
    """Whether a folder holds a tokenizer: adapters of PEFT's own come without."""
    return any((folder / name).is_file() for name in ("tokenizer.json", "tokenizer.model"))


def hand_on(source: Path, folder: Path, base: Path | None = None) -> Any:
    """Write the tokenizer of a model's folder into the one made of it, as `load_tokenizer` gives it; returns it.

    base: where SentencePiece's files lie that the source has lost. Says so where the template is not the source's own.
    None where there is no tokenizer, or one that no chat could use: then its files go on as they are.
    """
    if not brings_tokenizer(source):
        return None
    try:
        tokenizer = load_tokenizer(source)
    except ValueError:
        for file in (source / name for name in TOKENIZER_FILES):
            if file.is_file():
                shutil.copyfile(file, folder / file.name)
        return None
    tokenizer.vocabulary_files = tokenizer.vocabulary_files or (vocabulary_files(str(base), None) if base else [])
    if not tokenizer.brought_template:
        shown = Template(tokenizer).text(EXCHANGE)
        print(
            f"{source} has no chat template, so that training here would use Mistral's, and the result gets it: {shown}"
        )
    save_tokenizer(tokenizer, folder)
    return tokenizer


def tokenizer_identity(tokenizer: Any) -> str:
    """SHA-256 of what decides the ids of a conversation: words, template, pad token, and how a text is cut."""
    words = sorted(tokenizer.get_vocab().items())
    ids = tokenizer("Two  spaces, naïve 🙂\n\tand [INST] 1234.")["input_ids"]
    state = [words, ids, tokenizer.chat_template, tokenizer.pad_token_id, tokenizer.eos_token_id]
    return hashlib.sha256(json.dumps(state, sort_keys=True).encode()).hexdigest()


def pad_token(tokenizer: Any) -> str:
    """A token to pad with that is neither eos nor bos. <unk> will do: byte fallback never writes it."""
    taken = (tokenizer.eos_token, tokenizer.bos_token)
    words = tokenizer.get_vocab()
    for token in (tokenizer.pad_token, *PAD_TOKENS, tokenizer.unk_token):
        if token is not None and token not in taken and token in words:
            return token
    raise ValueError(
        f"the tokenizer of {tokenizer.name_or_path} has no token to pad with but {tokenizer.eos_token}, and a model "
        f"that is padded with its end token never learns to stop: set tokenizer.pad_token to an unused token"
    )


@cache
def added_tokens(tokenizer: Any) -> tuple[str, ...]:
    """Tokens that stand for no text, the longest first: <s>, </s>, [INST], <|im_end|> …"""
    added = {str(token) for token in tokenizer.added_tokens_decoder.values()} | set(tokenizer.all_special_tokens)
    return tuple(sorted((token for token in added if token.strip()), key=lambda token: (-len(token), token)))


@cache
def special_tokens(tokenizer: Any) -> tuple[str, ...]:
    """The added tokens that a text must not hold: tokenizers also add ordinary words, such as runs of spaces."""
    special = {str(token) for token in tokenizer.added_tokens_decoder.values() if token.special}
    return tuple(token for token in added_tokens(tokenizer) if token in special | set(tokenizer.all_special_tokens))


class Template:
    """A tokenizer's chat template, rendered once for each sequence of roles and filled in from then on."""

    def __init__(self, tokenizer: Any) -> None:
        self.tokenizer = tokenizer
        # A template writes the same around messages of the same roles, whatever they say, so Jinja runs once a sequence
        # of roles and not once a conversation.
        self.layouts: dict[tuple[str, ...], Layout | None] = {}
        either = "|".join(re.escape(token) for token in added_tokens(tokenizer))
        self.ending, self.added = re.compile(rf"\s*(?:{either})"), re.compile(f"({either})")
        # Tokenizers put ▁ before a text's first word. A chunk in the middle of a row must not get one, so it is
        # tokenized behind an anchor, whose tokens are taken off again. Mostly a special token will do; older files of
        # Mistral v0.1 and v0.2 put ▁ behind special tokens too, and there it takes a newline, and a call a text.
        self.anchor, self.marks_again = tokenizer.eos_token, False
        if self.first_token_after(self.anchor).startswith("▁"):
            self.anchor, self.marks_again = "\n", True
        self.anchor_tokens = len(tokenizer(self.anchor, add_special_tokens=False)["input_ids"])
        self.system_last = self.layout_order(("system", "user", "assistant", "user"))[-2:] == (0, 3)

    def first_token_after(self, anchor: str) -> str:
        """How the tokenizer writes a word that follows an anchor without a space."""
        ids = self.tokenizer(anchor + "Hi", add_special_tokens=False)["input_ids"]
        return self.tokenizer.convert_ids_to_tokens(ids)[1]

    def layout_order(self, roles: tuple[str, ...]) -> tuple[int, ...]:
        layout = self.layout(roles)
        return layout.order if layout else ()

    def layout(self, roles: tuple[str, ...]) -> Layout | None:
        """What the template writes around messages with these roles; None when it refuses them or leaves one out."""
        if roles not in self.layouts:
            # Each message is a mark; what stands between the marks is the template's. One that trims contents trims no
            # mark, and one that leaves a message out leaves its mark out, which is seen.
            marked = [{"role": role, "content": MARK.format(i)} for i, role in enumerate(roles)]
            try:
                pieces = MARKS.split(self.render(marked))
            except Exception:  # whatever a template raises, it does not want these roles
                pieces = []
            order = tuple(map(int, pieces[1::2]))
            whole = sorted(order) == list(range(len(roles)))
            self.layouts[roles] = Layout(tuple(pieces[::2]), order) if whole else None
        return self.layouts[roles]

    def render(self, messages: list[dict[str, str]]) -> str:
        """The text of a conversation as the template writes it, with bos where the tokenizer has one."""
        text = self.tokenizer.apply_chat_template(messages, tokenize=False)
        bos = self.tokenizer.bos_token or ""
        return text if text.startswith(bos) else bos + text

    def fold_system(self, messages: list[dict[str, str]]) -> list[dict[str, str]]:
        """Without a system message: its text stands at the head of a user turn, where mistral-common puts it.

        Templates that refuse a system message get it in the first user turn (v0.1, v0.2); those that put it into the
        last user turn only when no answer follows, as the official one of v0.3 does, in the last.
        """
        system, *turns = messages
        users = [i for i, message in enumerate(turns) if message["role"] == "user"]
        place = users[-1 if self.system_last else 0]
        text = system["content"] + "\n\n" + turns[place]["content"]
        return [*turns[:place], {"role": "user", "content": text}, *turns[place + 1 :]]

    def chunks(self, messages: list[dict[str, str]]) -> list[tuple[str, bool]]:
        """(text, trained) of a conversation, in order: prompts are not trained; answers and their ends are.

        Raises ValueError when the template cannot write this sequence of roles.
        """
        layout = self.layout(tuple([message["role"] for message in messages]))
        if layout is None and messages[0]["role"] == "system":
            messages = self.fold_system(messages)
            layout = self.layout(tuple([message["role"] for message in messages]))
        if layout is None:
            roles = ", ".join(message["role"] for message in messages)
            raise ValueError(f"the chat template of {self.tokenizer.name_or_path} does not take the roles {roles}")
        chunks, prompt = [], layout.pieces[0]
        for i, after in zip(layout.order, layout.pieces[1:], strict=True):
            content = messages[i]["content"]
            if messages[i]["role"] == "assistant":
                # What the model must write by itself is trained: from the answer's first token to its end. The rest of
                # what follows (a newline behind <|im_end|>) is the next prompt's.
                head = prompt.rstrip(" ")  # the space before an answer is part of its first token: ▁Hello
                if head:
                    chunks.append((head, False))
                end = self.ending.match(after)
                chunks.append((prompt[len(head) :] + content + (end[0] if end else self.tokenizer.eos_token), True))
                prompt = after[end.end() :] if end else after
            else:
                prompt += content + after
        if prompt:
            chunks.append((prompt, False))
        return chunks

    def text(self, messages: list[dict[str, str]]) -> str:
        """The whole text of a conversation."""
        return "".join(text for text, _ in self.chunks(messages))

    def prompt(self, messages: list[dict[str, str]]) -> list[int]:
        """Input ids that ask for an answer to messages that end with a user turn: as in training, up to the answer."""
        # An answer is added and taken off again, so that the prompt ends exactly where training's answers began.
        chunks = self.chunks([*messages, {"role": "assistant", "content": "?"}])
        while not chunks.pop()[1]:
            pass
        return [token for ids in self.tokens([chunks])[0] for token in ids]

    @property
    def end_id(self) -> int:
        """The token that ends an answer: eos, or the template's own, such as <|im_end|>."""
        ids, mask, _ = self.encode([EXCHANGE])[0]
        return [token for token, trained in zip(ids, mask, strict=True) if trained][-1]

    def served_otherwise(self) -> str:
        """What a server, which renders the template itself, asks otherwise than training showed it, in one sentence.

        "" where nothing differs: it never does for a template of this file.
        """
        question, answer = EXCHANGE
        asked = {
            "a question": [question],
            "a second question": [question, answer, question],
            "a system prompt": [{"role": "system", "content": "…"}, question],
        }
        differ = [what for what, messages in asked.items() if self.served(messages) != self.prompt(messages)]
        if not differ:
            return ""
        return (
            f"the model's own chat template, which servers use, writes {' and '.join(differ)} otherwise than training "
            "shows it: ask through helpers.inference, or give the model's folder another chat_template.jinja"
        )

    def served(self, messages: list[dict[str, str]]) -> list[int] | None:
        """Input ids that a server asks with; None when the template refuses these roles."""
        try:
            return self.tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_dict=False)
        except Exception:  # whatever a template raises
            return None

    def encode(self, conversations: list[list[dict[str, str]]]) -> list[tuple[list[int], list[int], list[int]]]:
        """(input ids, mask, ends of the answers) of each conversation; one call of the tokenizer for all."""
        chunked = [self.chunks(messages) for messages in conversations]
        rows = []
        for chunks, tokens in zip(chunked, self.tokens(chunked), strict=True):
            ids: list[int] = []
            mask: list[int] = []
            ends: list[int] = []
            for (_, trained), new in zip(chunks, tokens, strict=True):
                ids += new
                mask += [int(trained)] * len(new)
                if trained:
                    ends.append(len(ids))
            rows.append((ids, mask, ends))
        return rows

    def tokens(self, chunked: list[list[tuple[str, bool]]]) -> list[list[list[int]]]:
        """The token ids of each chunk of each conversation."""
        if self.marks_again:
            return [[self.pieces(text) for text, _ in chunks] for chunks in chunked]
        texts = [(self.anchor if k else "") + text for chunks in chunked for k, (text, _) in enumerate(chunks)]
        usual = [text for text in texts if len(text) <= 2 * PART]
        ids = iter(self.tokenizer(usual, add_special_tokens=False, verbose=False)["input_ids"] if usual else [])
        return [
            [
                next(ids)[self.anchor_tokens if k else 0 :] if len(text) <= room else self.long_ids(text, behind=k > 0)
                for k, (text, _) in enumerate(chunks)
                for room in [2 * PART - (len(self.anchor) if k else 0)]
            ]
            for chunks in chunked
        ]

    def pieces(self, text: str) -> list[int]:
        """Token ids of a chunk, its special tokens and the texts between them each by themselves."""
        ids = []
        for piece in filter(None, self.added.split(text)):
            if self.added.fullmatch(piece):
                ids.append(self.tokenizer.convert_tokens_to_ids(piece))
            else:
                behind = self.tokenizer(self.anchor + piece, add_special_tokens=False, verbose=False)["input_ids"]
                ids += behind[self.anchor_tokens :]
        return ids

    def fit(self, conversations: list[list[dict[str, str]]], seq_len: int) -> list[Encoded]:
        """Conversations of at most seq_len tokens: the last exchanges go first, whole; empty when not one fits."""
        fitted: list[Encoded] = []
        for messages, (ids, mask, ends) in zip(conversations, self.encode(conversations), strict=True):
            if len(ids) <= seq_len:
                fitted.append(Encoded(messages, ids, mask, len(ids)))
                continue
            # The system prompt may move to a turn that was not the last before, so a part is not as long as it was.
            answers = min(sum(end <= seq_len for end in ends), len(ends) - 1)
            if answers and len(self.encode([first_answers(messages, answers)])[0][0]) > seq_len:
                parts = range(1, answers)
                answers = bisect(parts, seq_len, key=lambda n: len(self.encode([first_answers(messages, n)])[0][0]))
            if answers:
                kept = first_answers(messages, answers)
                fitted.append(Encoded(kept, *self.encode([kept])[0][:2], len(ids)))
            else:
                fitted.append(Encoded([], [], [], len(ids)))
        return fitted

    def fit_text(self, text: str, seq_len: int) -> list[Encoded]:
        """Plain text without roles: bos, text, eos, all of it trained but bos; as many rows as it takes."""
        bos = [] if self.tokenizer.bos_token_id is None else [self.tokenizer.bos_token_id]
        ids = [*self.long_ids(text), self.tokenizer.eos_token_id]
        size = seq_len - len(bos)
        pieces = [ids[i : i + size] for i in range(0, len(ids), size)]
        if len(pieces) > 1 and len(pieces[-1]) == 1:  # an end without a text before it teaches nothing
            pieces.pop()
        return [
            Encoded(
                [{"role": "text", "content": text if len(pieces) == 1 else self.tokenizer.decode(piece)}],
                bos + piece,
                [0] * len(bos) + [1] * len(piece),
                len(bos) + len(piece),
            )
            for piece in pieces
        ]

    def long_ids(self, text: str, behind: bool = False) -> list[int]:
        """Token ids of a text of any length, a part at a time: the tokenizer takes 60 to 200 bytes a letter.

        Parts end before a space that follows a letter. No token of ours reaches over such a place, so the tokens are
        those of the whole text; a part behind the first is tokenized behind the anchor. behind: the first too.
        """
        ids: list[int] = []
        start = 0
        while start < len(text) or not start:
            end = len(text)
            if end - start > PART:
                end = next(
                    (cut.start() + 1 for cut in BEFORE_SPACE.finditer(text, start + PART, start + 2 * PART)), end
                )
                end = min(end, start + 2 * PART)
            part = (self.anchor if start or behind else "") + text[start:end]
            found = self.tokenizer(part, add_special_tokens=False, verbose=False)["input_ids"]
            ids += found[self.anchor_tokens if start or behind else 0 :]
            start = end or 1
        return ids


def ends(known: int | list[int] | None, tokenizer: Any) -> list[int]:
    """Every token that ends an answer: those that the model's files name, eos, and what the template wrote in training.

    >>> from helpers.models import TINY
    >>> ends(None, load_tokenizer(TINY))
    [2]
    """
    named = known if isinstance(known, list) else [known]
    return sorted({*named, tokenizer.eos_token_id, Template(tokenizer).end_id} - {None})


def first_answers(messages: list[dict[str, str]], answers: int) -> list[dict[str, str]]:
    """Messages up to the given number of assistant turns.

    >>> first_answers([{"role": "user"}, {"role": "assistant"}, {"role": "user"}, {"role": "assistant"}], 1)
    [{'role': 'user'}, {'role': 'assistant'}]
    """
    ends = [i + 1 for i, message in enumerate(messages) if message["role"] == "assistant"]
    return messages[: ends[answers - 1]] if answers else []
