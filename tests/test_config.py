"""RunConfig: what it accepts, what it says when it does not, and that YAML keeps it."""

import doctest

import pytest

import helpers.config
from helpers.config import AdapterConfig, RunConfig, load_yaml, save_yaml


def test_examples_in_docstrings():
    assert doctest.testmod(helpers.config).failed == 0


@pytest.mark.parametrize(
    ("field", "value", "range_in_words"),
    [
        ("rank", 0, "from 1 to 1024"),
        ("rank", 2.5, "a whole number"),
        ("alpha", float("nan"), "above 0"),
        ("learning_rate", float("inf"), "above 0 to 1"),
        ("seq_len", -1, "from 16"),
        ("batch_size", 0, "from 1"),
        ("dropout", 1.0, "to below 1"),
        ("checkpointing", "some", "all, auto, none, or a whole number"),
        ("bits", 5, "2, 3, 4 or 8"),
        ("group_size", 100, "32, 64 or 128"),
        ("weights", "fp8", "'nf4'"),
    ],
)
def test_nonsense_names_the_field_and_the_range(field, value, range_in_words):
    with pytest.raises(ValueError, match=field) as caught:
        RunConfig().with_values(**{field: value})
    message = str(caught.value)
    assert range_in_words in message
    assert repr(value) in message
    assert "\n" not in message


def test_unknown_setting_lists_the_known_ones():
    with pytest.raises(ValueError, match=r"no setting lora_rank; there are .*rank"):
        RunConfig().with_values(lora_rank=8)


def test_yaml_keeps_every_field(tmp_path):
    config = RunConfig().with_values(rank=64, checkpointing=12, patience=3, targets="q_proj,v_proj", seed=7)
    assert load_yaml(save_yaml(config, tmp_path / "run" / "config.yaml")) == config


def test_yaml_may_be_flat_and_partial(tmp_path):
    path = tmp_path / "mine.yaml"
    path.write_text("rank: 8\ntrain:\n  epochs: 2\n")
    config = load_yaml(path, start=RunConfig().with_values(alpha=8))
    assert (config.adapter.rank, config.adapter.alpha, config.train.epochs) == (8, 8, 2)


@pytest.mark.parametrize(
    ("text", "complaint"),
    [
        ("rank: 0", "rank must be"),
        ("- 1", "must hold settings"),
        ("a: [", "is not YAML"),
        ("train: 3", "no setting train"),
    ],
)
def test_bad_yaml_is_one_sentence_with_the_file(tmp_path, text, complaint):
    path = tmp_path / "bad.yaml"
    path.write_text(text)
    with pytest.raises(ValueError, match=complaint) as caught:
        load_yaml(path)
    assert "bad.yaml" in str(caught.value)


def test_missing_yaml(tmp_path):
    with pytest.raises(ValueError, match="there is no configuration file"):
        load_yaml(tmp_path / "none.yaml")


def test_scaling_with_and_without_rslora():
    assert AdapterConfig(rank=16, alpha=32).scaling == 2
    assert AdapterConfig(rank=16, alpha=32, rslora=True).scaling == 8
