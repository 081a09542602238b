"""What is read of a prepared folder, whether it holds conversations or preference pairs."""

import pytest
from datasets import Dataset

from helpers.models import TINY
from helpers.models.templates import Template, load_tokenizer
from helpers.quantize.calibration import chosen_texts, count_texts
from helpers.workspace import prepared

ASKED = [{"role": "user", "content": "Which animal does Edith keep?"}]
LIKED, DISLIKED = ([{"role": "assistant", "content": text}] for text in ("Edith keeps a squirrel.", "Guess."))


@pytest.fixture
def pairs(tmp_path):
    """A prepared folder of two pairs, in the columns that the preference method trains on."""
    template = Template(load_tokenizer(TINY))
    (liked, mask, _), (disliked, other, _) = (template.encode([ASKED + end])[0] for end in (LIKED, DISLIKED))
    row = {"id": "1", "prompt": ASKED, "chosen": LIKED, "rejected": DISLIKED, "full_tokens": len(liked)}
    row |= {"chosen_ids": liked, "chosen_masks": mask, "rejected_ids": disliked, "rejected_masks": other}
    for side in prepared.SIDES:
        Dataset.from_list([row, row]).save_to_disk(str(tmp_path / side))
    return tmp_path, liked


def test_pairs_are_read_as_the_conversation_that_was_chosen(pairs):
    folder, liked = pairs
    for row in (*prepared.conversations(folder / "train"), *prepared.scored(folder)):
        assert row["messages"] == ASKED + LIKED and row["input_ids"] == liked
        assert any(row["assistant_masks"]) and len(row["assistant_masks"]) == len(liked)


def test_quantization_calibrates_on_pairs(pairs):
    folder, liked = pairs
    assert count_texts(folder) == 2
    assert list(chosen_texts(folder, [0, 1])) == [(0, liked), (1, liked)]


def test_gguf_s_tokens_are_checked_on_a_whole_conversation_of_pairs(pairs):
    from helpers.export.check import prompts, whole

    template = Template(load_tokenizer(TINY))
    assert prompts(pairs[0]) == [ASKED, ASKED]
    ((*read, question),) = whole(pairs[0], template)
    assert read == ASKED + LIKED and question["role"] == "user"
    assert whole(None, template) == whole(pairs[0] / "train", template) == []
