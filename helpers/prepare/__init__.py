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
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from helpers.config import RunConfig
from helpers.models import PROFILES
from helpers.models.templates import Template, load_tokenizer, special_tokens, tokenizer_identity
from helpers.prepare import advice
from helpers.prepare.checks import DROP, REPAIR, Findings, actions, check, leaks
from helpers.prepare.rows import Conversation, Rows
from helpers.prepare.uploads import save_upload
from helpers.prepare.view import summary
from helpers.sources import columns, markers
from helpers.sources.folders import Split
from helpers.sources.formats import BadRow, as_row, asked_for, read_row, recognise
from helpers.sources.readers import ROW_LIMIT, Record, read
from helpers.workspace import building, refuse_output, require
from helpers.workspace.prepared import SIDES, side


@dataclass
class Reading:
    """What is learned of the sources while they are read."""

    found: Findings
    formats: Counter = field(default_factory=Counter)
    """Format -> rows, also those that failed."""
    fields: Counter = field(default_factory=Counter)
    """Field -> rows in which it was read."""
    marked: Counter = field(default_factory=Counter)
    """Marker of no known family -> plain texts that hold it."""
    notes: list[str] = field(default_factory=list)
    available: int = 0
    """Rows of the source where fewer are used, and it was counted."""


def prepare(config: RunConfig, output: Path, source: str | None = None) -> dict:
    """Write output/train and output/heldout, and return what was counted.

    They are Arrow datasets: id, messages, input_ids, assistant_masks (1: trained) and full_tokens (before the cut); of
    pairs these hold the better answer, and rejected, rejected_ids and rejected_masks the worse. source: a file, a
    folder, or a hub dataset, instead of config.data.source. Every row read is kept or dropped for a reason that is
    counted: in = kept + dropped. The same source and configuration give the same bytes.
    Raises ValueError with one sentence when the source cannot be read or nothing in it can be trained on.
    """
    source, heldout_source = str(source or config.data.source), config.data.heldout_source
    asked_for(config.data.source_format)
    own = PROFILES.get(config.profile, {})
    if heldout_source == own.get("heldout_source") and Path(source).resolve() != Path(own.get("source", "")).resolve():
        heldout_source = None  # the profile's held-out conversations belong to the profile's own training data
    template = Template(load_tokenizer(config.model.model, config.model.revision))
    reading = Reading(Findings(actions(config.data.on_finding)))
    inputs = {"source": source, "heldout_source": heldout_source}
    refuse_output(Path(output), [Path(path).expanduser() for path in inputs.values() if path], "prepare")
    files = {name: Path(path) for name, path in inputs.items() if path and Path(path).is_file()}
    asked = config.data
    with building(Path(output), "prepare", config, files) as work:
        with Rows(
            work.folder / "rows.arrow", template, asked.seq_len, reading.found, use_of(config) == "pairs"
        ) as rows:
            if asked.heldout_split:
                rows.add(conversations(source, config, reading, template, held_out=True), from_heldout=True)
            if heldout_source:
                rows.add(conversations(heldout_source, config, reading, template), from_heldout=True)
            rows.add(conversations(source, config, reading, template), from_heldout=False)
        refuse_markers(reading, source)
        fraction = None if heldout_source or asked.heldout_split else asked.heldout_fraction
        kept, held_out = rows.decide(fraction)
        if not (kept & ~np.array(rows.from_heldout, dtype=bool)).any():
            reasons = "; ".join(reading.found.sentences()) or "it has no rows"
            raise ValueError(f"{source} holds nothing that could be trained on: {reasons}")
        rows.save(work.folder / "train", kept & ~held_out)
        rows.save(work.folder / "heldout", kept & held_out)
        rows.path.unlink()
        work.measurements |= {"source": source, "heldout_source": heldout_source, "formats": dict(reading.formats)}
        work.measurements |= {"fields": [name for name, _ in reading.fields.most_common(12)], "use": use_of(config)}
        work.measurements |= {"available": reading.available} if reading.available else {}
        work.measurements |= {"template": template_name(template), "context": asked.seq_len}
        work.measurements["tokenizer"] = tokenizer_identity(template.tokenizer)
        work.measurements |= rows.measure(kept, held_out, sum(reading.formats.values()))
        work.measurements["warnings"] = advice.warnings(work.measurements, rows, kept, fraction, reading.notes)
    return work.measurements


def conversations(
    source: str, config: RunConfig, reading: Reading, template: Template, held_out: bool = False
) -> Iterator[Conversation]:
    """Every conversation of a source that passes the checks; held_out: those of the source's split to hold out."""
    found, asked = reading.found, config.data
    leaked = leaks(*special_tokens(template.tokenizer))
    chosen = asked_for(asked.source_format)
    named = columns.parse(asked.columns) if asked.columns else None
    first, use = None, use_of(config)
    for record in sampled(source, config, reading, config.data.heldout_split if held_out else None):
        place, value, problem = record.place, record.row, record.problem
        if problem and found.add(problem, place, record.detail) == REPAIR:
            value, problem = record.mended, None
        row = None if problem else as_row(value)
        row_format = None if row is None else "columns" if named else chosen or recognise(row)
        reading.formats[row_format or "none"] += 1
        if problem:
            continue
        if row_format is None:
            found.add("unknown-fields", place, columns.told(row.fields) if row else f"{value!s:.80}")
            continue
        first = first or row_format
        if row_format != first and found.add("other-format", place, f"{row_format} after {first}") == DROP:
            continue
        try:
            parsed = read_row(row, row_format, named, use)
        except BadRow as error:
            found.add(error.kind, place, str(error))
            continue
        if record.others:
            row.notes["other-branches"] = f"{record.others} beside the way"
        if noted(parsed, row_format, place, reading, named) == DROP:
            continue
        if row_format == "plain-text" and not chosen:
            reading.marked.update(markers.strange(parsed.messages[0]["content"]))
        messages = check(parsed.messages, place, found, leaked)
        rejected = check(parsed.rejected, place, found, leaked) if messages and parsed.rejected else None
        if messages is None or (parsed.rejected and rejected is None):
            continue
        if use == "pairs" and (problem := no_pair(messages, rejected)):
            found.add(problem, place, messages[-1]["content"][:40])
            continue
        if (
            messages[-1].get("weight") == 0  # the last turn is an answer; most rows weigh none
            and len(messages) > 1
            and all(turn.get("weight") == 0 for turn in messages if turn["role"] == "assistant")
        ):
            found.add("no-answer", place, "every answer has weight 0")
            continue
        text = "\n".join([turn["content"] for turn in messages])
        if len(text) > ROW_LIMIT:  # only tables get this far: a line of JSON was stopped while it was read
            found.add("over-long-row", place, text[:40])
        else:
            yield Conversation(place, messages, text, rejected)


def use_of(config: RunConfig) -> str:
    """What is kept of preference data: pairs where they are asked for, or where the method learns from them."""
    return "pairs" if config.data.use == "auto" and config.train.sides == 2 else config.data.use


def no_pair(better: list[dict], worse: list[dict] | None) -> str | None:
    """The check that two conversations fail as a pair: they must differ in their last answer and in nothing else."""
    if not worse:
        return "no-pair"
    if [turn["content"] for turn in better[:-1]] != [turn["content"] for turn in worse[:-1]]:
        return "other-prompt"
    return "same-answer" if better[-1]["content"] == worse[-1]["content"] else None


def noted(parsed: Any, row_format: str, place: str, reading: Reading, named: dict | None) -> str:
    """Count what a row holds beside its conversation; drop where a finding says so.

    A field that only repeats a turn (UltraChat's `prompt`) is no loss; where columns were named, the others were left
    out on purpose.
    """
    row = parsed.row
    for name in row.fields:
        if name in row.used:
            reading.fields[name] += 1
    for kind, example in row.notes.items():
        if reading.found.add(kind, place, example) == DROP:
            return DROP
    unused = () if named else row.unused().items()
    lost = {name: value for name, value in unused if not repeats(value, parsed.messages)}
    return reading.found.unused(place, lost) if lost else ""


def repeats(value: Any, messages: list[dict]) -> bool:
    """Whether a field's value is the text of a turn."""
    if not isinstance(value, str):
        return False
    text = value.strip()
    return text in [turn["content"].strip() for turn in messages]


def sampled(source: str, config: RunConfig, reading: Reading, split_name: str | None = None) -> Iterator[Record]:
    """Records of a source, or as many as config allows: of a file at random by the seed, of a hub set the first.

    split_name: the split that is held out, all of it; None: the one that is trained.
    """
    notes = reading.notes
    if split_name is not None:
        yield from read(source, Split(split_name, strictly=True), notes)
        return
    split, cap = Split(config.data.source_split, beside=config.data.heldout_split), config.data.cap(source)
    if cap is None:
        yield from read(source, split, notes)
        return
    if not Path(source).expanduser().exists():
        yield from itertools.islice(read(source, split, notes), cap)
        notes.append(f"the first {cap:,} conversations of {source} are read: max_conversations=all reads it whole")
        return
    total = sum(1 for _ in read(source, split))
    if total <= cap:
        yield from read(source, split, notes)
        return
    reading.available = total
    taken = np.zeros(total, dtype=bool)
    taken[np.random.default_rng(config.seed).choice(total, cap, replace=False)] = True
    yield from itertools.compress(read(source, split, notes), taken.tolist())
    notes.append(
        f"{cap:,} of the {total:,} rows of {source} are used, at random by seed {config.seed}: max_conversations"
    )


def refuse_markers(reading: Reading, source: str) -> None:
    """Raise ValueError when most texts without roles hold markers of a chat that no format here reads."""
    texts = reading.formats["plain-text"]
    if found := markers.refused(reading.marked, texts):
        marker, count = found
        raise ValueError(
            f"{source} holds chats with markers that are not known here ({count:,} of {texts:,} texts hold {marker}): "
            "give messages of role and content, or say --source-format plain-text to learn the markers as text"
        )


def template_name(template: Template) -> dict[str, str]:
    """The chat template by its checksum and by what it makes of one exchange."""
    jinja = template.tokenizer.get_chat_template()
    shown = template.text([{"role": "user", "content": "…"}, {"role": "assistant", "content": "…"}])
    return {"sha256": hashlib.sha256(jinja.encode()).hexdigest(), "shown": shown}


def load_prepared(folder: Path) -> dict[str, Any]:
    """The datasets train and heldout of a finished folder. Raises MissingArtifact naming the notebook that makes it."""
    require(Path(folder), "prepare")
    return {name: side(folder, name) for name in SIDES}


__all__ = ["load_prepared", "prepare", "save_upload", "summary"]
