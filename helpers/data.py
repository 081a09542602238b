"""Conversations in, training rows out: read, checked, written in the model's template, masked, split and saved.

>>> import tempfile
>>> from helpers.models import profile
>>> output = Path(tempfile.mkdtemp()) / "prepare"
>>> made = prepare(profile("tiny", max_conversations=20), output)
>>> made["in"] == made["kept"] + sum(made["dropped"].values())
True
"""

import hashlib
import itertools
from array import array
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import orjson
from tqdm import tqdm

from helpers.checks import DROP, REPAIR, Findings, actions, check, leaks
from helpers.config import RunConfig
from helpers.dataview import epoch, findings, lengths, summary, token_view
from helpers.duplicates import groups, sketches
from helpers.formats import BadRow, recognise, to_messages
from helpers.models import PROFILES
from helpers.outliers import far_lengths, language_name, languages, rare, scripts
from helpers.readers import ROW_LIMIT, read
from helpers.templates import Encoded, Template, load_tokenizer, special_tokens
from helpers.uploads import save_upload
from helpers.workspace import building, refuse_output, require

BATCH = 512
"""Conversations to a call of the tokenizer, which spreads them over all cores."""
MANY = 0.5
"""Share of rows from which a warning is due before training."""


class Conversation(NamedTuple):
    """One that passed the checks of a row."""

    place: str
    messages: list[dict[str, str]]
    text: str
    """All its turns, for what compares conversations."""


def prepare(config: RunConfig, output: Path, source: str | None = None) -> dict:
    """Write output/train and output/heldout, and return what was counted.

    They are Arrow datasets: id, messages, input_ids, assistant_masks (1: trained) and full_tokens (before the cut).
    source: a file, a folder, or a hub dataset, instead of config.data.source. Every row read is kept or dropped for a
    reason that is counted: in = kept + dropped. The same source and configuration give the same bytes.
    Raises ValueError with one sentence when the source cannot be read or nothing in it can be trained on.
    """
    source, heldout_source = str(source or config.data.source), config.data.heldout_source
    own = PROFILES.get(config.profile, {})
    if heldout_source == own.get("heldout_source") and Path(source).resolve() != Path(own.get("source", "")).resolve():
        heldout_source = None  # the profile's held-out conversations belong to the profile's own training data
    found = Findings(actions(config.data.on_finding))
    template = Template(load_tokenizer(config.model.model, config.model.revision))
    inputs = {"source": source, "heldout_source": heldout_source}
    refuse_output(Path(output), [Path(path).expanduser() for path in inputs.values() if path], "prepare")
    files = {name: Path(path) for name, path in inputs.items() if path and Path(path).is_file()}
    formats: Counter = Counter()
    with building(Path(output), "prepare", config, files) as work:
        with Rows(work.folder / "rows.arrow", template, config.data.seq_len, found) as rows:
            if heldout_source:
                rows.add(conversations(heldout_source, config, found, template, formats), from_heldout=True)
            rows.add(conversations(source, config, found, template, formats), from_heldout=False)
        kept, held_out = rows.decide(None if heldout_source else config.data.heldout_fraction)
        if not (kept & ~np.array(rows.from_heldout, dtype=bool)).any():
            reasons = "; ".join(found.sentences()) or "it has no rows"
            raise ValueError(f"{source} holds nothing that could be trained on: {reasons}")
        rows.save(work.folder / "train", kept & ~held_out)
        rows.save(work.folder / "heldout", kept & held_out)
        rows.path.unlink()
        work.measurements |= {"source": source, "heldout_source": heldout_source, "formats": dict(formats)}
        work.measurements |= {"template": template_name(template), "context": config.data.seq_len}
        work.measurements |= rows.measure(kept, held_out, sum(formats.values()))
    return work.measurements


def conversations(
    source: str, config: RunConfig, found: Findings, template: Template, formats: Counter
) -> Iterator[Conversation]:
    """Every conversation of a source that passes the checks; formats counts all rows, also those that fail."""
    leaked = leaks(*special_tokens(template.tokenizer))
    chosen = None if config.data.source_format == "auto" else config.data.source_format
    first = None
    for record in itertools.islice(read(source, config.data.source_split), config.data.max_conversations):
        place, row, problem, detail = record.place, record.row, record.problem, record.detail
        if problem and found.add(problem, place, detail) == REPAIR:
            row, problem = repaired(record.raw)
            if problem:
                found.undo("invalid-utf8")
                found.add(problem, place, detail)
        row_format = None if problem else chosen or recognise(row)
        formats[row_format or "none"] += 1
        if problem:
            continue
        if row_format is None:
            found.add("unknown-fields", place, (", ".join(map(str, row)) if isinstance(row, dict) else str(row))[:80])
            continue
        first = first or row_format
        if row_format != first and found.add("other-format", place, f"{row_format} after {first}") == DROP:
            continue
        try:
            messages = to_messages(row, row_format)
        except BadRow as error:
            found.add(error.kind, place, str(error))
            continue
        messages = check(messages, place, found, leaked)
        if messages is None:
            continue
        text = "\n".join([turn["content"] for turn in messages])
        if len(text) > ROW_LIMIT:  # only tables get this far: a line of JSON was stopped while it was read
            found.add("over-long-row", place, text[:40])
        else:
            yield Conversation(place, messages, text)


def repaired(raw: bytes) -> tuple[Any, str | None]:
    """A JSON line that is not UTF-8, read as Windows-1252, and what is wrong with it even so."""
    try:
        return orjson.loads(raw.decode("cp1252", "replace")), None
    except orjson.JSONDecodeError:
        return None, "broken-row"


class Rows:
    """Rows on their way to disk, and the few numbers a conversation and a row that split and figures need."""

    def __init__(self, path: Path, template: Template, seq_len: int, found: Findings) -> None:
        self.path, self.template, self.seq_len, self.found = path, template, seq_len, found
        # One number a conversation: 2 GB of short ones are millions, and Python's own lists would take the memory.
        self.hashes, self.from_heldout, self.letters, self.scripts = array("Q"), array("B"), array("Q"), array("B")
        self.languages = array("B")
        self.files: list[str] = []
        self.file, self.line = array("I"), array("Q")
        self.sketches: list[np.ndarray] = []
        # One number a row; plain text may take several.
        self.owner, self.tokens, self.trained, self.full = array("Q"), array("I"), array("I"), array("I")
        self.digest = hashlib.sha256()
        self.unfaithful: tuple[int, int, str] | None = None

    def __enter__(self) -> "Rows":
        import pyarrow as pa

        message = pa.struct([("role", pa.string()), ("content", pa.string())])
        fields = {"id": pa.string(), "messages": pa.list_(message), "input_ids": pa.list_(pa.int32())}
        fields |= {"assistant_masks": pa.list_(pa.int8()), "full_tokens": pa.int32()}
        self.schema = pa.schema(list(fields.items()))
        self.writer = pa.ipc.new_stream(str(self.path), self.schema)
        return self

    def __exit__(self, *error: object) -> None:
        self.writer.close()

    def add(self, source: Iterator[Conversation], from_heldout: bool) -> None:
        """Tokenize conversations in batches and append their rows, each content once."""
        seen: set[int] = set()
        with tqdm(desc="held-out" if from_heldout else "training", unit=" conversations", disable=None) as progress:
            while batch := list(itertools.islice(source, BATCH)):
                fresh = []
                for talk in batch:
                    content = int(hash_of(talk.messages)[:16], 16)
                    twice = content in seen
                    if twice and self.found.add("exact-duplicate", talk.place, talk.text[:40]) == DROP:
                        continue
                    seen.add(content)
                    fresh.append((talk, content))
                self.write(self.fitted(fresh), from_heldout)
                progress.update(len(batch))

    def fitted(self, fresh: list[tuple[Conversation, int]]) -> list[tuple[Conversation, int, list[Encoded]]]:
        """The rows of each conversation that fits the context."""
        by_turns = [talk.messages for talk, _ in fresh if talk.messages[0]["role"] != "text"]
        fitted = iter(self.template.fit(by_turns, self.seq_len))
        done = []
        for talk, content in fresh:
            if talk.messages[0]["role"] == "text":
                done.append((talk, content, self.template.fit_text(talk.text, self.seq_len)))
                continue
            row = next(fitted)
            if row is None:
                self.found.add("over-context", talk.place, talk.text[:40])
            elif len(row.input_ids) == row.full_tokens or self.found.add("cut-to-context", talk.place) != DROP:
                done.append((talk, content, [row]))
        if self.unfaithful is None and done:
            self.unfaithful = unfaithful(self.template, [row for _, _, rows in done for row in rows][:50])
        return done

    def write(self, batch: list[tuple[Conversation, int, list[Encoded]]], from_heldout: bool) -> None:
        """Append rows to the file, and their numbers to the arrays."""
        import pyarrow as pa

        if not batch:
            return
        columns: dict[str, list] = {name: [] for name in self.schema.names}
        for talk, content, rows in batch:
            for k, row in enumerate(rows):
                columns["id"].append(f"{content:016x}" if len(rows) == 1 else f"{content:016x}-{k}")
                columns["messages"].append(row.messages)
                columns["input_ids"].append(row.input_ids)
                columns["assistant_masks"].append(row.assistant_masks)
                columns["full_tokens"].append(row.full_tokens)
                self.owner.append(len(self.hashes))
                self.tokens.append(len(row.input_ids))
                self.trained.append(sum(row.assistant_masks))
                self.full.append(row.full_tokens)
            name, _, number = talk.place.rpartition(" ")
            if not self.files or self.files[-1] != name:
                self.files.append(name)
            self.file.append(len(self.files) - 1)
            self.line.append(int(number))
            self.hashes.append(content)
            self.from_heldout.append(from_heldout)
            self.letters.append(len(talk.text))
        texts = [talk.text for talk, _, _ in batch]
        self.scripts.extend(scripts(texts))
        self.languages.extend(languages(texts))
        self.sketches.append(sketches(texts))
        part = pa.RecordBatch.from_pydict(columns, schema=self.schema)
        for name in ("input_ids", "assistant_masks"):
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
        first = groups(np.concatenate(self.sketches))
        hashes = np.array(self.hashes)
        if fraction is None:
            with_heldout = np.isin(first, first[held_out])
            self.judge("also-held-out", with_heldout & ~held_out, kept)
        else:
            held_out = split(hashes[first], fraction)
        self.judge("near-duplicate", kept & (first != np.arange(len(first))), kept)
        self.judge("length-outlier", kept & far_lengths(np.array(self.letters)), kept)
        foreign = rare(np.array(self.scripts))
        self.judge("script-outlier", kept & foreign, kept)
        strange = kept & rare(np.array(self.languages)) & ~foreign
        self.judge("language-outlier", strange, kept, lambda i: language_name(self.languages[i]))
        return kept, held_out

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
        """What was counted: conversations, rows and tokens of both sides, lengths, findings, warnings."""
        owner = np.array(self.owner, dtype=np.int64)
        train, heldout = (kept & ~held_out)[owner], (kept & held_out)[owner]
        tokens, trained, full = (
            np.array(numbers, dtype=np.int64) for numbers in (self.tokens, self.trained, self.full)
        )
        counts, edges = np.histogram(full[kept[owner]], bins=40)
        made = {
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
        }
        return made | {"warnings": self.warnings(made, full[kept[owner]])}

    def warnings(self, made: dict[str, Any], full: np.ndarray) -> list[str]:
        """What to know before training, a sentence each."""
        said = []
        if made["cut_share"] > MANY:
            enough = int(np.quantile(full, 0.9))
            said.append(
                f"{made['cut_share']:.0%} of the rows are longer than the context of {self.seq_len:,} tokens and lose "
                f"their last turns: seq_len={enough} would hold nine in ten whole"
            )
        over = self.found.dropped().get("over-context", 0)
        if over > MANY * made["in"]:
            said.append(
                f"{over:,} of {made['in']:,} conversations do not fit {self.seq_len:,} tokens at all: raise seq_len"
            )
        elif sum(made["dropped"].values()) > MANY * made["in"]:
            worst = max(made["dropped"], key=made["dropped"].__getitem__)
            said.append(f"{made['in'] - made['kept']:,} of {made['in']:,} rows were dropped, most of them for {worst}")
        if made["train_tokens"] and made["trained_tokens"] < 0.05 * made["train_tokens"]:
            share = made["trained_tokens"] / made["train_tokens"]
            said.append(f"only {share:.1%} of the tokens are trained: the answers are far shorter than their prompts")
        if not made["heldout_rows"]:
            said.append("nothing is held out: there will be no held-out loss and no perplexity; set heldout_fraction")
        if not made["train_rows"]:
            said.append("everything is held out and nothing left to train on: lower heldout_fraction")
        if self.unfaithful and self.unfaithful[0]:
            wrong, of, example = self.unfaithful
            said.append(
                f"{wrong} of {of} answers do not come back from this tokenizer as they were written: {example!r}"
            )
        return said


def hash_of(messages: list[dict]) -> str:
    """SHA-256 of a conversation's roles and texts, in hexadecimal."""
    return hashlib.sha256(orjson.dumps([(turn["role"], turn["content"]) for turn in messages])).hexdigest()


def split(hashes: np.ndarray, fraction: float) -> np.ndarray:
    """Which conversations are held out, by their hashes (near duplicates: by that of their first): (conversations,).

    A hash stays where it is when conversations are added, so none wanders from one side to the other. Where no hash
    falls under a fraction that is not 0, the one nearest to it is held out, so that there is something to evaluate.

    >>> split(np.array([2**60, 2**63], dtype=np.uint64), 0.1).tolist()
    [True, False]
    """
    held_out = hashes < np.uint64(fraction * 2**64)
    if fraction and not held_out.any() and len(np.unique(hashes)) > 1:
        held_out = hashes == hashes.min()
    return held_out


def unfaithful(template: Template, rows: list[Encoded]) -> tuple[int, int, str]:
    """(wrong, all, an example): answers whose trained tokens do not decode to their text and end."""
    wrong, total, example = 0, 0, ""
    for row in rows:
        trained = [token for token, kept in zip(row.input_ids, row.assistant_masks, strict=True) if kept]
        text, at = template.tokenizer.decode(trained), 0
        for turn in row.messages:
            if turn["role"] in ("assistant", "text"):
                total += 1
                found = text.find(turn["content"], at)
                at = found + len(turn["content"]) if found >= 0 else at
                if found < 0:
                    wrong, example = wrong + 1, example or turn["content"][:40]
    return wrong, total, example


def template_name(template: Template) -> dict[str, str]:
    """The chat template by its checksum and by what it makes of one exchange."""
    jinja = template.tokenizer.get_chat_template()
    shown = template.text([{"role": "user", "content": "…"}, {"role": "assistant", "content": "…"}])
    return {"sha256": hashlib.sha256(jinja.encode()).hexdigest(), "shown": shown}


def load_prepared(folder: Path) -> dict[str, Any]:
    """The datasets train and heldout of a finished folder. Raises MissingArtifact naming the notebook that makes it."""
    from datasets import load_from_disk

    require(Path(folder), "prepare")
    return {side: load_from_disk(str(Path(folder) / side)) for side in ("train", "heldout")}


__all__ = [
    "epoch",
    "findings",
    "lengths",
    "load_prepared",
    "load_tokenizer",
    "prepare",
    "save_upload",
    "summary",
    "token_view",
]
