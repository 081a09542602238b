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
import json
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import orjson

from helpers.checks import DROP, Findings, actions, check, leaks
from helpers.config import RunConfig
from helpers.formats import BadRow, recognise, to_messages
from helpers.models import PROFILES
from helpers.readers import read
from helpers.templates import Encoded, Template, load_tokenizer, special_tokens
from helpers.workspace import building

BATCH = 512
"""Conversations to a call of the tokenizer, which spreads them over all cores."""


def prepare(config: RunConfig, output: Path, source: str | None = None) -> dict:
    """Write output/train and output/heldout (Arrow: id, messages, input_ids, assistant_masks); return what was counted.

    source: a file, a folder, or a hub dataset, instead of config.data.source. Every row read is kept or dropped for a
    reason that is counted: in = kept + dropped. The same source and configuration give the same bytes.
    Raises ValueError with one sentence when the source cannot be read or nothing in it can be trained on.
    """
    heldout_source = config.data.heldout_source
    if source not in (None, config.data.source) and heldout_source == PROFILES[config.profile].get("heldout_source"):
        heldout_source = None  # the profile's held-out conversations belong to the profile's own training data
    source = source or config.data.source
    findings = Findings(actions(config.data.on_finding))
    template = Template(load_tokenizer(config.model.model, config.model.revision))
    inputs = {"source": source, "heldout_source": heldout_source}
    files = {name: Path(path) for name, path in inputs.items() if path and Path(path).is_file()}
    with building(Path(output), "prepare", config, files) as work:
        rows = Rows(work.folder / "rows.arrow")
        formats: Counter = Counter()
        with rows:
            if heldout_source:
                encode(
                    checked(heldout_source, config, findings, template, formats), True, rows, template, config, findings
                )
            encode(checked(source, config, findings, template, formats), False, rows, template, config, findings)
        if not rows.conversations:
            reasons = "; ".join(findings.sentences()) or "it has no rows"
            raise ValueError(f"{source} holds nothing that could be trained on: {reasons}")
        held_out = split(rows, config.data.heldout_fraction if heldout_source is None else None)
        rows.save(work.folder / "train", ~held_out)
        rows.save(work.folder / "heldout", held_out)
        rows.path.unlink()
        work.measurements |= measure(rows, held_out, formats, findings, config)
    return work.measurements


class Rows:
    """Rows on their way to disk, and the few numbers a row that the split and the figures need."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.conversations = 0
        self.from_heldout: list[bool] = []
        self.hashes: list[int] = []
        self.tokens: list[int] = []
        self.trained: list[int] = []
        self.full: list[int] = []
        self.digest = hashlib.sha256()

    def __enter__(self) -> "Rows":
        import pyarrow as pa

        message = pa.struct([("role", pa.string()), ("content", pa.string())])
        self.schema = pa.schema(
            [
                ("id", pa.string()),
                ("messages", pa.list_(message)),
                ("input_ids", pa.list_(pa.int32())),
                ("assistant_masks", pa.list_(pa.int8())),
            ]
        )
        self.writer = pa.ipc.new_stream(str(self.path), self.schema)
        return self

    def __exit__(self, *error: object) -> None:
        self.writer.close()

    def add(self, batch: list[tuple[str, list[Encoded]]], from_heldout: bool) -> None:
        """Append the rows of conversations: (hash, its rows)."""
        import pyarrow as pa

        columns: dict[str, list] = {name: [] for name in self.schema.names}
        for content_hash, pieces in batch:
            self.conversations += 1
            for k, row in enumerate(pieces):
                columns["id"].append(content_hash[:16] if len(pieces) == 1 else f"{content_hash[:16]}-{k}")
                columns["messages"].append(row.messages)
                columns["input_ids"].append(row.input_ids)
                columns["assistant_masks"].append(row.assistant_masks)
                self.from_heldout.append(from_heldout)
                self.hashes.append(int(content_hash[:16], 16))
                self.tokens.append(len(row.input_ids))
                self.trained.append(sum(row.assistant_masks))
                self.full.append(row.full_tokens)
                self.digest.update(np.array(row.input_ids, dtype=np.int32).tobytes() + bytes(row.assistant_masks))
        self.writer.write_batch(pa.RecordBatch.from_pydict(columns, schema=self.schema))

    def save(self, folder: Path, chosen: np.ndarray) -> None:
        """The chosen rows as a dataset on disk; equal rows give equal bytes."""
        from datasets import Dataset

        part = Dataset.from_file(str(self.path)).select(np.flatnonzero(chosen))
        # The default fingerprint holds the time; caches of later `map` calls must follow the content alone.
        part._fingerprint = hashlib.sha256(self.digest.digest() + np.packbits(chosen).tobytes()).hexdigest()[:16]
        part.save_to_disk(str(folder))


def checked(
    source: str, config: RunConfig, findings: Findings, template: Template, formats: Counter
) -> Iterator[tuple[str, list[dict]]]:
    """(place, messages) of every conversation that passes the checks; formats counts all rows, also those that fail."""
    leaked = leaks(*special_tokens(template.tokenizer))
    chosen = None if config.data.source_format == "auto" else config.data.source_format
    first = None
    for record in itertools.islice(read(source, config.data.source_split), config.data.max_conversations):
        formats["in"] += 1
        place, row = record.place, record.row
        if record.problem:
            if findings.add(record.problem, place, record.detail) == DROP:
                continue
            try:
                row = orjson.loads(record.raw.decode("cp1252", "replace"))
            except orjson.JSONDecodeError as error:
                findings.add("broken-row", place, error.msg)
                continue
        row_format = chosen or recognise(row)
        if row_format is None:
            fields = f"fields {', '.join(map(str, row))}" if isinstance(row, dict) else str(row)
            findings.add("unknown-fields", place, fields[:80])
            continue
        first = first or row_format
        if row_format != first and findings.add("other-format", place, f"{row_format} after {first}") == DROP:
            continue
        formats[row_format] += 1
        try:
            messages = to_messages(row, row_format)
        except BadRow as error:
            findings.add(error.kind, place, str(error))
            continue
        messages = check(messages, place, findings, leaked)
        if messages is not None:
            yield place, messages


def encode(
    conversations: Iterator[tuple[str, list[dict]]],
    from_heldout: bool,
    rows: Rows,
    template: Template,
    config: RunConfig,
    findings: Findings,
) -> None:
    """Tokenize conversations in batches and append their rows, each content once."""
    seen: set[str] = set()
    while batch := list(itertools.islice(conversations, BATCH)):
        fresh = []
        for place, messages in batch:
            content_hash = hash_of(messages)
            if content_hash in seen and findings.add("exact-duplicate", place, messages[0]["content"][:40]) == DROP:
                continue
            seen.add(content_hash)
            fresh.append((place, content_hash, messages))
        talks = [messages for _, _, messages in fresh if messages[0]["role"] != "text"]
        fitted = iter(template.fit(talks, config.data.seq_len))
        done = []
        for place, content_hash, messages in fresh:
            if messages[0]["role"] == "text":
                done.append((content_hash, template.fit_text(messages[0]["content"], config.data.seq_len)))
                continue
            row = next(fitted)
            if row is None:
                findings.add("over-context", place, messages[0]["content"][:40])
            elif row.full_tokens == len(row.input_ids) or findings.add("cut-to-context", place) != DROP:
                done.append((content_hash, [row]))
        rows.add(done, from_heldout)


def hash_of(messages: list[dict]) -> str:
    """SHA-256 of a conversation's roles and texts, in hexadecimal."""
    return hashlib.sha256(json.dumps([[turn["role"], turn["content"]] for turn in messages]).encode()).hexdigest()


def split(rows: Rows, fraction: float | None) -> np.ndarray:
    """Which rows are held out, (rows,): those of the held-out file, or those whose hash falls under the fraction.

    A hash stays where it is when rows are added, so no row wanders from one side to the other. Where no hash falls
    under a fraction that is not 0, the one nearest to it is held out, so that there is something to evaluate.
    """
    if fraction is None:
        return np.array(rows.from_heldout)
    hashes = np.array(rows.hashes, dtype=np.uint64)
    held_out = hashes < np.uint64(fraction * 2**64)
    if fraction and not held_out.any() and len(np.unique(hashes)) > 1:
        held_out = hashes == hashes.min()
    return held_out


def measure(
    rows: Rows, held_out: np.ndarray, formats: Counter, findings: Findings, config: RunConfig
) -> dict[str, Any]:
    """What prepare counted: conversations, rows and tokens of both sides, lengths, findings."""
    tokens, trained, full = (np.array(numbers) for numbers in (rows.tokens, rows.trained, rows.full))
    counts, edges = np.histogram(full, bins=40)
    total = formats.pop("in")
    return {
        "in": total,
        "kept": rows.conversations,
        "dropped": findings.dropped(),
        "formats": dict(formats.most_common()),
        "train_rows": int((~held_out).sum()),
        "heldout_rows": int(held_out.sum()),
        "train_tokens": int(tokens[~held_out].sum()),
        "heldout_tokens": int(tokens[held_out].sum()),
        "trained_tokens": int(trained[~held_out].sum()),
        "longest_tokens": int(full.max()),
        "context": config.data.seq_len,
        "cut_share": float((full > tokens).mean()),
        "cut_token_share": float(1 - tokens.sum() / full.sum()),
        "length_counts": counts.tolist(),
        "length_edges": edges.tolist(),
        "findings": findings.table(),
    }
