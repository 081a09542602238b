"""The buttons that take a model home: each does what it says, and says what came of it."""

import zipfile

import pytest

from helpers.export import buttons, share
from helpers.models import profile
from helpers.workspace import Workspace, building, check_outputs


@pytest.fixture
def run(tmp_path, monkeypatch):
    """A run with a finished adapter and a finished GPTQ folder."""
    monkeypatch.setenv("RECIPES_LASTING", str(tmp_path / "drive"))
    run = Workspace(tmp_path / "run")
    for stage in ("finetune", "quantize"):
        with building(run.folder(stage), stage, profile("tiny")) as making:
            (making.folder / "weights.safetensors").write_bytes(stage.encode() * 100)
    return run


def press(box, name):
    """Press a button; what is said then."""
    box.buttons[name].click()
    assert not any(button.disabled for button in box.buttons.values()), "free for the next press"
    return box.said.value


def test_a_model_is_downloaded_copied_and_not_overwritten(run, tmp_path):
    box = buttons.take_home(run)
    assert list(box.stages) == ["quantize", "finetune"]
    assert "opens in transformers, vLLM" in box.words and "MiB" in box.words
    assert "quantize.zip" in press(box, "Download")
    with zipfile.ZipFile(run.root / "quantize.zip") as packed:
        assert packed.read("quantize/weights.safetensors") == b"quantize" * 100
    assert "is there already" in press(box, "Download")
    assert "no Drive is mounted" in press(box, "To Drive")
    (tmp_path / "drive").mkdir()
    box.which.value = "finetune"
    assert "Done" in press(box, "To Drive")
    check_outputs(tmp_path / "drive" / "mistral-t4-recipes" / "exported" / "finetune")


def test_the_hub_gets_what_is_chosen_private_and_a_refusal_is_a_sentence(run, monkeypatch):
    box, sent = buttons.take_home(run), []
    monkeypatch.setattr(
        share, "to_hub", lambda stage, name, private=True: sent.append((stage, name, private)) or "there"
    )
    assert "OWNER/NAME" in press(box, "To the hub") and not sent
    box.name.value = " me/mine "
    assert "Done: there" in press(box, "To the hub") and sent == [(run.folder("quantize"), "me/mine", True)]

    def breaks(stage, name, private=True):
        raise ConnectionError("<gone>")

    monkeypatch.setattr(share, "to_hub", breaks)
    assert "ConnectionError: &lt;gone&gt;" in press(box, "To the hub")


def test_a_run_without_a_model_says_what_makes_one(tmp_path):
    with pytest.raises(ValueError, match="run python -m helpers finetune"):
        buttons.take_home(Workspace(tmp_path))
