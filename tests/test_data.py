"""prepare: counts, masks, split and bytes of the whole stage."""

import filecmp
from pathlib import Path

import pytest
from datasets import load_from_disk

from helpers.data import prepare
from helpers.models import profile
from helpers.templates import load_tokenizer


@pytest.fixture(scope="module")
def prepared(tmp_path_factory):
    output = tmp_path_factory.mktemp("run") / "prepare"
    return output, prepare(profile("tiny"), output)


def test_the_sample_is_read_whole(prepared):
    _, made = prepared
    assert made["in"] == made["kept"] + sum(made["dropped"].values())
    assert made["dropped"] == {}
    assert (made["train_rows"], made["heldout_rows"]) == (720, 80)


def test_masks_hold_the_answers_and_their_ends(prepared):
    output, _ = prepared
    config = profile("tiny")
    tokenizer = load_tokenizer(config.model.model)
    for row in load_from_disk(str(output / "train")):
        assert row["input_ids"][0] == tokenizer.bos_token_id
        assert len(row["input_ids"]) == len(row["assistant_masks"]) <= config.data.seq_len
        trained = [token for token, kept in zip(row["input_ids"], row["assistant_masks"], strict=True) if kept]
        answers = [turn["content"] for turn in row["messages"] if turn["role"] == "assistant"]
        assert tokenizer.decode(trained) == "".join(f" {answer}</s>" for answer in answers)


def test_twice_gives_the_same_bytes(prepared, tmp_path):
    output, _ = prepared
    prepare(profile("tiny"), tmp_path / "again")
    files = [file.relative_to(output) for file in output.rglob("*") if file.is_file()]
    assert len(files) == 8
    assert filecmp.cmpfiles(output, tmp_path / "again", map(str, files), shallow=False)[0] == list(map(str, files))


def test_pad_is_not_the_end(prepared):
    tokenizer = load_tokenizer(Path(profile("tiny").model.model))
    assert tokenizer.pad_token_id not in (tokenizer.eos_token_id, tokenizer.bos_token_id)
