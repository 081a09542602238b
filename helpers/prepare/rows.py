"""Training rows on their way to disk: tokenized, cut, each once, and split by what is left of them.

>>> split(np.array([2**60, 2**63], dtype=np.uint64), 0.1).tolist()
[True, False]
"""

import hashlib
from array import array
from collections.abc import Callable, Iterator
from functools import lru_cache
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import orjson
from tqdm import tqdm

from helpers.models.templates import Encoded, Template
from helpers.prepare.checks import DROP, Findings
from helpers.prepare.duplicates import groups, jaccard, sketches, windows
from helpers.prepare.outliers import far_lengths, language_name, languages, rare, scripts

BATCH = 512
"""Conversations to a call of the tokenizer, which spreads them over all cores."""
BATCH_LETTERS = 2**21
"""And letters: a tokenizer takes some 60 bytes for each, and books are a megabyte."""


class Conversation(NamedTuple):
    """One that passed the checks of a row."""

    place: str
    messages: list[dict[str, Any]]
    text: str
    """All its turns, for what compares conversations."""
    rejected: list[dict[str, Any]] | None = None
    """The conversation with the worse answer, of preference data that is kept in pairs."""


class Made(NamedTuple):
    """A conversation's rows: several only for plain text. `worse` is the rejected side of a pair."""

    talk: Conversation
    rows: list[Encoded]
    worse: Encoded | None = None


class Rows:
    """Rows on their way to disk, and the few numbers a conversation and a row that split and figures need."""

    def __init__(self, path: Path, template: Template, seq_len: int, found: Findings, pairs: bool = False) -> None:
        self.path, self.template, self.seq_len, self.found, self.pairs = path, template, seq_len, found, pairs
        # One number a conversation: 2 GB of short ones are millions, and Python's own lists would take the memory.
        self.hashes, self.from_heldout = array("Q"), array("B")
        self.letters, self.scripts, self.languages = array("Q"), array("B"), array("B")
        self.files: list[str] = []
        self.file, self.line = array("I"), array("Q")
        self.sketches: list[np.ndarray] = []
        # One number a row; plain text may take several.
        self.numbers = array("Q")
        self.owner, self.tokens, self.trained, self.full = array("Q"), array("I"), array("I"), array("I")
        self.worse = array("I")
        """Trained tokens of a pair's rejected side."""
        self.misfits = array("I")
        """Tokens of the conversations that do not fit the context at all."""
        self.digest = hashlib.sha256()
        self.unfaithful: tuple[int, int, str] | None = None

    def __enter__(self) -> "Rows":
        import pyarrow as pa

        messages = pa.list_(pa.struct([("role", pa.string()), ("content", pa.string())]))
        ids, masks = pa.list_(pa.int32()), pa.list_(pa.int8())
        fields = {"id": pa.string(), "messages": messages, "input_ids": ids, "assistant_masks": masks}
        if self.pairs:
            fields |= {"rejected": messages, "rejected_ids": ids, "rejected_masks": masks}
        self.schema = pa.schema(list((fields | {"full_tokens": pa.int32()}).items()))
        self.writer = pa.ipc.new_stream(str(self.path), self.schema)
        return self

    def __exit__(self, *error: object) -> None:
        self.writer.close()

    def add(self, source: Iterator[Conversation], from_heldout: bool) -> None:
        """Tokenize conversations in batches and append their rows, each content once."""
        seen: set[int] = set()
        with tqdm(desc="held-out" if from_heldout else "training", unit=" conversations", disable=None) as progress:
            for batch in batches(source):
                self.write(self.fresh(self.fitted(batch), seen), from_heldout)
                progress.update(len(batch))

    def fitted(self, batch: list[Conversation]) -> list[Made]:
        """The rows of each conversation that fits the context."""
        by_turns = [talk for talk in batch if talk.messages[0]["role"] != "text"]
        if self.pairs:
            return list(self.fitted_pairs(by_turns))
        done = []
        fitted = iter(self.template.fit([talk.messages for talk in by_turns], self.seq_len))
        for talk in batch:
            if talk.messages[0]["role"] == "text":
                made = Made(talk, self.template.fit_text(talk.text, self.seq_len))
            else:
                made = Made(talk, [weighted(next(fitted))])
            row = made.rows[0]
            if not row.input_ids or not any(row.assistant_masks):
                self.misfits.append(row.full_tokens)
                self.found.add("over-context", talk.place, talk.text[:40])
            elif len(row.input_ids) == row.full_tokens or self.found.add("cut-to-context", talk.place) != DROP:
                done.append(made)
        if self.unfaithful is None and done:
            self.unfaithful = unfaithful(self.template, [row for made in done for row in made.rows][:50])
        return done

    def fitted_pairs(self, batch: list[Conversation]) -> Iterator[Made]:
        """Both sides of each pair, only their last answers trained; a pair is never cut."""
        better = self.template.encode([talk.messages for talk in batch])
        worse = self.template.encode([talk.rejected for talk in batch])
        for talk, (ids, mask, _), (other_ids, other_mask, _) in zip(batch, better, worse, strict=True):
            full = max(len(ids), len(other_ids))
            if full > self.seq_len:
                self.misfits.append(full)
                self.found.add("over-context", talk.place, talk.text[:40])
                continue
            chosen = Encoded(talk.messages, ids, last_answer(mask), len(ids))
            yield Made(talk, [chosen], Encoded(talk.rejected, other_ids, last_answer(other_mask), len(other_ids)))

    def fresh(self, made: list[Made], seen: set[int]) -> list[Made]:
        """What was not there already, after the cut: whole conversations, and of long texts each piece."""
        kept = []
        for one in made:
            numbers = [number_of(row, one.worse) for row in one.rows]
            whole = numbers[0] if len(numbers) == 1 else hash(tuple(numbers)) % 2**64
            if whole in seen:
                if self.found.add("exact-duplicate", one.talk.place, one.talk.text[:40]) == DROP:
                    continue
            elif len(numbers) > 1:
                rows = [row for row, number in zip(one.rows, numbers, strict=True) if number not in seen]
                if not rows:
                    self.found.add("exact-duplicate", one.talk.place, one.talk.text[:40])
                    if self.found.actions["exact-duplicate"] == DROP:
                        continue
                elif len(rows) < len(one.rows):
                    if self.found.add("repeated-piece", one.talk.place, one.talk.text[:40]) == DROP:
                        continue
                    one = one._replace(rows=rows)
            seen.add(whole)
            seen.update(numbers)
            kept.append(one)
        return kept

    def write(self, batch: list[Made], from_heldout: bool) -> None:
        """Append rows to the file, and their numbers to the arrays."""
        import pyarrow as pa

        if not batch:
            return
        columns: dict[str, list] = {name: [] for name in self.schema.names}
        texts = []
        for talk, rows, worse in batch:
            content = int(hash_of([turn for row in rows for turn in row.messages])[:16], 16)
            for k, row in enumerate(rows):
                values = pair_columns(row, worse) if worse else row_columns(row)
                values |= {"id": f"{content:016x}" if len(rows) == 1 else f"{content:016x}-{k}"}
                for name, column in columns.items():
                    column.append(values[name])
                self.numbers.append(number_of(row, worse))
                self.owner.append(len(self.hashes))
                self.tokens.append(len(row.input_ids))
                self.trained.append(sum(row.assistant_masks))
                if worse:
                    self.worse.append(sum(worse.assistant_masks))
                self.full.append(row.full_tokens)
            name, _, number = talk.place.rpartition(" ")
            if not self.files or self.files[-1] != name:
                self.files.append(name)
            self.file.append(len(self.files) - 1)
            self.line.append(int(number))
            self.hashes.append(content)
            self.from_heldout.append(from_heldout)
            # What is left after the cut is what can be alike; a whole conversation is its own text already.
            texts.append(talk.text if whole(talk, rows) else text_of(rows))
            self.letters.append(len(texts[-1]))
        self.scripts.extend(scripts(texts))
        self.languages.extend(languages(texts))
        self.sketches.append(sketches(texts))
        part = pa.RecordBatch.from_pydict(columns, schema=self.schema)
        for name in columns:
            if name.endswith(("ids", "masks")):
                self.digest.update(part.column(name).flatten().to_numpy())
        self.writer.write_batch(part)

    def decide(self, fraction: float | None) -> tuple[np.ndarray, np.ndarray]:
        """Which conversations are kept and which of them held out: (conversations,) each.

        fraction: of conversations to hold out by their hash; None when a file of its own holds them.
        """
        held_out = np.array(self.from_heldout, dtype=bool)
        kept = np.ones(len(self.hashes), dtype=bool)
        if not kept.any():
            return kept, held_out
        first = groups(np.concatenate(self.sketches), self.share())
        # Duplicates that are kept on purpose, and texts that share a piece, are on one side with each other.
        together = joined(first, np.array(self.numbers), np.array(self.owner, dtype=np.int64))
        hashes = np.array(self.hashes)
        if fraction is None:
            with_heldout = np.isin(together, together[held_out])
            self.judge("also-held-out", with_heldout & ~held_out, kept)
        else:
            held_out = split(hashes[together], fraction)
        self.judge("near-duplicate", kept & (first != np.arange(len(first))), kept)
        self.judge("length-outlier", kept & far_lengths(np.array(self.letters)), kept)
        foreign = rare(np.array(self.scripts))
        self.judge("script-outlier", kept & foreign, kept)
        strange = kept & rare(np.array(self.languages)) & ~foreign
        self.judge("language-outlier", strange, kept, lambda i: language_name(self.languages[i]))
        return kept, held_out

    def share(self) -> Callable[[int, int], float]:
        """The share of text that two conversations have in common, read back from the file, which is not in memory."""
        import pyarrow as pa

        table = pa.ipc.open_stream(pa.memory_map(str(self.path))).read_all()
        owner = np.array(self.owner, dtype=np.int64)

        @lru_cache(256)
        def windows_of(i: int) -> np.ndarray:
            start, end = np.searchsorted(owner, [i, i + 1]).tolist()
            rows = table.slice(start, end - start)
            turns = [turn for row in rows.select(["messages"]).to_pylist() for turn in row["messages"]]
            return windows("\n".join(turn["content"] for turn in turns))

        return lambda i, k: jaccard(windows_of(i), windows_of(k))

    def judge(
        self, kind: str, which: np.ndarray, kept: np.ndarray, example: Callable[[int], str] = lambda i: ""
    ) -> None:
        """Count a finding about whole conversations and take them out of kept where it says so."""
        for i in np.flatnonzero(which).tolist():
            if self.found.add(kind, f"{self.files[self.file[i]]} {self.line[i]}", example(i)) == DROP:
                kept[i] = False

    def save(self, folder: Path, chosen: np.ndarray) -> None:
        """The rows of the chosen conversations as a dataset on disk; equal rows give equal bytes."""
        from datasets import Dataset
        from datasets.utils import are_progress_bars_disabled, disable_progress_bars, enable_progress_bars

        rows = chosen[np.array(self.owner, dtype=np.int64)]
        part = Dataset.from_file(str(self.path)).select(np.flatnonzero(rows))
        # The default fingerprint holds the time; caches of later `map` calls must follow the content alone.
        part._fingerprint = hashlib.sha256(self.digest.digest() + np.packbits(rows).tobytes()).hexdigest()[:16]
        quiet = are_progress_bars_disabled()
        disable_progress_bars()
        part.save_to_disk(str(folder))
        if not quiet:
            enable_progress_bars()

    def measure(self, kept: np.ndarray, held_out: np.ndarray, total: int) -> dict[str, Any]:
        """What was counted: conversations, rows and tokens of both sides, lengths, findings."""
        owner = np.array(self.owner, dtype=np.int64)
        train, heldout = (kept & ~held_out)[owner], (kept & held_out)[owner]
        tokens, trained, full = (
            np.array(numbers, dtype=np.int64) for numbers in (self.tokens, self.trained, self.full)
        )
        counts, edges = np.histogram(full[kept[owner]], bins=40)
        return {
            "in": total,
            "kept": int(kept.sum()),
            "dropped": self.found.dropped(),
            "train_conversations": int((kept & ~held_out).sum()),
            "heldout_conversations": int((kept & held_out).sum()),
            "train_rows": int(train.sum()),
            "heldout_rows": int(heldout.sum()),
            "train_tokens": int(tokens[train].sum()),
            "heldout_tokens": int(tokens[heldout].sum()),
            "trained_tokens": int(trained[train].sum()),
            "longest_tokens": int(full[kept[owner]].max()),
            "cut_share": float((full > tokens)[kept[owner]].mean()),
            "cut_token_share": float(1 - tokens[kept[owner]].sum() / full[kept[owner]].sum()),
            "length_counts": counts.tolist(),
            "length_edges": edges.tolist(),
            "findings": self.found.table(),
        } | (self.lengths(kept[owner]) if self.pairs else {})

    def lengths(self, kept: np.ndarray) -> dict[str, float]:
        """Of the pairs kept: mean tokens of both answers, and the share whose better one is the longer."""
        chosen, rejected = (np.array(numbers, dtype=np.int64)[kept] for numbers in (self.trained, self.worse))
        return {
            "chosen_answer_tokens": float(chosen.mean()),
            "rejected_answer_tokens": float(rejected.mean()),
            "chosen_longer_share": float((chosen > rejected).mean()),
        }


def batches(source: Iterator[Conversation]) -> Iterator[list[Conversation]]:
    """Conversations a batch at a time, so many or of so many letters: a batch of books is a few books."""
    batch: list[Conversation] = []
    letters = 0
    for talk in source:
        batch.append(talk)
        letters += len(talk.text)
        if len(batch) == BATCH or letters >= BATCH_LETTERS:
            yield batch
            batch, letters = [], 0
    if batch:
        yield batch


def weighted(row: Encoded) -> Encoded:
    """A row in which answers of weight 0 are read and not trained: its mask has one run of ones an answer."""
    answers = [turn for turn in row.messages if turn["role"] == "assistant"]
    if all(turn.get("weight") != 0 for turn in answers):
        return row
    mask = np.array(row.assistant_masks, dtype=np.int8)
    starts = np.flatnonzero(np.diff(mask, prepend=0) == 1)
    if len(starts) != len(answers):
        raise ValueError(f"the chat template puts nothing between two answers: {len(starts)} for {len(answers)}")
    run = np.cumsum(np.isin(np.arange(len(mask)), starts)) - 1
    silent = np.array([turn.get("weight") == 0 for turn in answers])
    mask[(mask == 1) & silent[run]] = 0
    return row._replace(assistant_masks=mask.tolist())


def last_answer(mask: list[int]) -> list[int]:
    """A mask of the last answer alone.

    >>> last_answer([0, 1, 1, 0, 1])
    [0, 0, 0, 0, 1]
    """
    start = len(mask)
    while start and mask[start - 1]:
        start -= 1
    return [0] * start + mask[start:]


def row_columns(row: Encoded) -> dict[str, Any]:
    """A row's cells."""
    return row._asdict()


def pair_columns(row: Encoded, worse: Encoded) -> dict[str, Any]:
    """A pair's cells: the conversation with the better answer as any row has it, and the worse answer beside it."""
    return row_columns(row) | {
        "rejected": worse.messages[-1:],
        "rejected_ids": worse.input_ids,
        "rejected_masks": worse.assistant_masks,
        "full_tokens": max(row.full_tokens, worse.full_tokens),
    }


def whole(talk: Conversation, rows: list[Encoded]) -> bool:
    """Whether nothing of a conversation was cut."""
    return len(rows) == 1 and rows[0].full_tokens == len(rows[0].input_ids)


def text_of(rows: list[Encoded]) -> str:
    """All turns that are left in a conversation's rows."""
    return "\n".join(turn["content"] for row in rows for turn in row.messages)


def number_of(row: Encoded, worse: Encoded | None = None) -> int:
    """A number for a row's tokens and mask, and those of the worse side: what a model would learn from."""
    digest = hashlib.blake2b(np.array(row.input_ids, dtype=np.int32).tobytes(), digest_size=8)
    digest.update(bytes(row.assistant_masks))
    if worse is not None:
        digest.update(np.array(worse.input_ids, dtype=np.int32).tobytes())
    return int.from_bytes(digest.digest(), "little")


def hash_of(messages: list[dict]) -> str:
    """SHA-256 of a conversation's roles and texts, in hexadecimal."""
    turns = [(turn["role"], turn["content"], *([0] if turn.get("weight") == 0 else [])) for turn in messages]
    return hashlib.sha256(orjson.dumps(turns)).hexdigest()


def split(hashes: np.ndarray, fraction: float) -> np.ndarray:
    """Which conversations are held out, by their hashes (near duplicates: by that of their first): (conversations,).

    A hash stays where it is when conversations are added, so none wanders from one side to the other. Where no hash
    falls under a fraction that is not 0, or all do, the lowest is held out, so that each side has something; a hash
    that is alone is trained.
    """
    held_out = hashes < np.uint64(fraction * 2**64)
    if fraction and (held_out.all() or not held_out.any()):
        held_out = (hashes == hashes.min()) & (hashes.min() != hashes.max())
    return held_out


def joined(first: np.ndarray, numbers: np.ndarray, owner: np.ndarray) -> np.ndarray:
    """The first member of the group of each conversation, where a row in common also makes a group: (conversations,).

    first: (conversations,) the groups that there are. numbers, owner: (rows,) a row's content and its conversation.

    >>> joined(np.array([0, 1, 1, 3]), np.array([7, 8, 9, 5, 7], dtype=np.uint64), np.array([0, 1, 2, 3, 3])).tolist()
    [0, 1, 1, 0]
    """
    _, content = np.unique(numbers, return_inverse=True)
    together = first
    while True:
        lowest = np.full(content.max() + 1, len(first))
        np.minimum.at(lowest, content, together[owner])
        lower = together.copy()
        np.minimum.at(lower, owner, lowest[content])  # a conversation follows its rows,
        np.minimum.at(lower, together, lower.copy())  # its group's first member follows it,
        lower = lower[lower]  # and the group follows its first member
        if (lower == together).all():
            return together
        together = lower


def unfaithful(template: Template, rows: list[Encoded]) -> tuple[int, int, str]:
    """(wrong, all, an example): answers whose trained tokens do not decode to their text and end."""
    wrong, total, example = 0, 0, ""
    for row in rows:
        trained = [token for token, kept in zip(row.input_ids, row.assistant_masks, strict=True) if kept]
        text, at = template.tokenizer.decode(trained), 0
        for turn in row.messages:
            if turn["role"] in ("assistant", "text") and turn.get("weight") != 0:
                total += 1
                found = text.find(turn["content"], at)
                at = found + len(turn["content"]) if found >= 0 else at
                if found < 0:
                    wrong, example = wrong + 1, example or turn["content"][:40]
    return wrong, total, example
