"""Checkpoints: whole or not there, newest first, broken ones skipped; and training killed again and again."""

import json
import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from helpers import checkpoints, models, workspace

ROOT = Path(__file__).resolve().parent.parent


def write(folder: Path, step: int, **options) -> None:
    with checkpoints.writing(folder, step, **options) as beside:
        (beside / "adapter.bytes").write_bytes(bytes(range(200)) + bytes([step]))
        (beside / "trainer_state.json").write_text(json.dumps({"global_step": step}))


def test_writes_beside_and_keeps_the_newest(tmp_path):
    for step in (5, 10, 15):
        write(tmp_path, step, keep=2, spared=[5])
    assert [path.name for path in checkpoints.all_of(tmp_path)] == ["checkpoint-5", "checkpoint-10", "checkpoint-15"]
    write(tmp_path, 20, keep=2)
    assert [path.name for path in sorted(tmp_path.iterdir())] == ["checkpoint-15", "checkpoint-20"]
    assert checkpoints.newest(tmp_path).name == "checkpoint-20"


@settings(max_examples=60, deadline=None)
@given(
    name=st.sampled_from(["adapter.bytes", "trainer_state.json", checkpoints.MARKER]),
    place=st.floats(0, 1, exclude_max=True),
    bit=st.integers(0, 7),
)
def test_one_flipped_bit_anywhere_is_noticed(name, place, bit):
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        write(folder, 5)
        write(folder, 10)
        file = folder / "checkpoint-10" / name
        content = bytearray(file.read_bytes())
        content[int(place * len(content))] ^= 1 << bit
        file.write_bytes(content)
        said = []
        assert checkpoints.newest(folder, say=said.append).name == "checkpoint-5"
        assert "checkpoint-10 is skipped" in said[0] and name in said[0]


@pytest.mark.parametrize("harm", ["truncated", "missing", "no marker", "listed outside"])
def test_broken_ones_are_skipped_with_a_word(tmp_path, harm):
    write(tmp_path, 5)
    write(tmp_path, 10)
    broken = tmp_path / "checkpoint-10"
    if harm == "truncated":
        os.truncate(broken / "adapter.bytes", 7)
    elif harm == "missing":
        (broken / "adapter.bytes").unlink()
    elif harm == "no marker":
        (broken / checkpoints.MARKER).unlink()
    else:
        marker = checkpoints.about(broken)
        marker["files"]["../checkpoint-5/adapter.bytes"] = marker["files"]["adapter.bytes"]
        marker["sha256"] = workspace.text_checksum(marker)
        (broken / checkpoints.MARKER).write_text(json.dumps(marker))
    said = []
    assert checkpoints.newest(tmp_path, say=said.append).name == "checkpoint-5"
    assert len(said) == 1 and said[0].startswith("checkpoint-10 is skipped: ")


def test_names_that_are_no_checkpoints_are_left_alone(tmp_path):
    (tmp_path / "checkpoint-best").mkdir()
    (tmp_path / "checkpoint-7").write_text("a file")
    assert checkpoints.newest(tmp_path) is None
    write(tmp_path, 3, keep=1)
    assert (tmp_path / "checkpoint-best").is_dir()


def test_a_failed_write_is_said_and_leaves_the_older_one(tmp_path):
    write(tmp_path, 5)
    said = []
    with checkpoints.writing(tmp_path, 10, keep=1, say=said.append) as beside:
        (beside / "half").write_bytes(b"half")
        raise OSError(28, "No space left on device")
    assert [path.name for path in tmp_path.iterdir()] == ["checkpoint-5"]
    assert "No space left on device" in said[0] and "stays checkpoint-5" in said[0]


def test_a_bug_while_writing_is_not_hidden(tmp_path):
    with pytest.raises(TypeError), checkpoints.writing(tmp_path, 10):
        raise TypeError("a bug")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("name", ["optimizer.pt", "adapter_model.safetensors"])
def test_a_torn_file_is_noticed_when_it_is_written(tmp_path, name):
    import torch
    from safetensors.torch import save_file

    tensors = {"weight": torch.arange(1000.0)}
    said = []
    with checkpoints.writing(tmp_path, 1, say=said.append) as beside:
        save_file(tensors, beside / name) if name.endswith("safetensors") else torch.save(tensors, beside / name)
        os.truncate(beside / name, 2000)
    assert checkpoints.newest(tmp_path) is None and f"{name} cannot be read back" in said[0]
    with checkpoints.writing(tmp_path, 2, say=said.append) as beside:
        save_file(tensors, beside / name) if name.endswith("safetensors") else torch.save(tensors, beside / name)
    assert checkpoints.newest(tmp_path).name == "checkpoint-2"


def test_other_settings_are_explained_and_harmless_ones_are_not(tmp_path):
    config = models.profile("tiny", rank=16)
    write(tmp_path, 5, identity=checkpoints.identity(config, data="abc"))
    same = config.with_values(save_steps=7, keep_checkpoints=3)
    assert checkpoints.newest(tmp_path, checkpoints.identity(same, data="abc")).name == "checkpoint-5"
    with pytest.raises(checkpoints.ChangedRun, match="rank was 16 and is now 8"):
        checkpoints.newest(tmp_path, checkpoints.identity(config.with_values(rank=8), data="abc"))
    with pytest.raises(checkpoints.ChangedRun, match="prepared data was abc"):
        checkpoints.newest(tmp_path, checkpoints.identity(config, data="other"))


def test_copies_go_to_the_lasting_place_and_come_back(tmp_path):
    here, drive, new = tmp_path / "here", tmp_path / "drive", tmp_path / "new"
    with checkpoints.sending(drive, keep=2) as send:
        for step in (5, 10, 15):
            write(here, step, keep=2, send=send)
    assert checkpoints.newest(drive).name == "checkpoint-15"
    assert len(checkpoints.all_of(drive)) <= 2
    (drive / "checkpoint-15" / "adapter.bytes").write_bytes(b"rotten")
    if len(checkpoints.all_of(drive)) == 1:  # the thread kept up with the newest only
        checkpoints.send(here / "checkpoint-10", drive, keep=2)
    said = []
    fetched = checkpoints.fetch(drive, new, say=said.append)
    assert fetched.name in ("checkpoint-5", "checkpoint-10") and fetched.parent == new
    assert checkpoints.problem(fetched) is None
    assert checkpoints.fetch(drive, here).name == "checkpoint-15", "what is newer here is kept"


def test_a_copy_that_fails_says_why_and_is_not_taken_for_whole(tmp_path, monkeypatch):
    write(tmp_path / "here", 5)

    def fails(source, target):
        Path(target).write_bytes(b"part")
        raise OSError(5, "Input/output error")

    monkeypatch.setattr(shutil, "copyfile", fails)
    said = []
    assert checkpoints.send(tmp_path / "here" / "checkpoint-5", tmp_path / "drive", keep=2, say=said.append) is None
    assert "Input/output error" in said[0] and "bin" in said[0]
    assert checkpoints.newest(tmp_path / "drive", say=said.append) is None


def test_a_full_drive_is_noticed_before_copying(tmp_path, monkeypatch):
    write(tmp_path / "here", 5)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: shutil._ntuple_diskusage(15, 15, 0))
    said = []
    assert checkpoints.send(tmp_path / "here" / "checkpoint-5", tmp_path / "drive", keep=2, say=said.append) is None
    assert "0.00 GiB free" in said[0]
    assert not (tmp_path / "drive").exists()


def test_deleted_files_are_emptied_first(tmp_path):
    """Drive's bin keeps what is deleted: an open handle shows how long the file was when it went."""
    write(tmp_path, 5)
    with (tmp_path / "checkpoint-5" / "adapter.bytes").open("rb") as handle:
        checkpoints.clear(tmp_path)
        assert os.fstat(handle.fileno()).st_size == 0
    assert list(tmp_path.iterdir()) == []


@pytest.fixture(scope="module")
def killed(tmp_path_factory) -> dict:
    """What tests/kill_and_resume.py printed."""
    command = [sys.executable, "tests/kill_and_resume.py", str(tmp_path_factory.mktemp("killed"))]
    done = subprocess.run(
        [*command, "none=20", "rot=6", "disk=8", "drive=8"], cwd=ROOT, capture_output=True, text=True, timeout=900
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(done.stdout)


@pytest.mark.parametrize("trouble", ["none", "rot", "disk", "drive"])
def test_killed_and_resumed_is_the_same_training(killed, trouble):
    result = killed[trouble]
    assert result["loss_difference"] <= 1e-6 and result["adapter_difference"] <= 1e-6, result
    assert result["kills"] == {"none": 20, "rot": 6, "disk": 8, "drive": 8}[trouble]


def test_kills_fell_inside_writes_and_trouble_was_met(killed):
    assert killed["none"]["inside_a_write"] >= 5 and max(killed["none"]["resumed_from"]) > 0
    assert killed["disk"]["not_written"] > 0
    assert killed["drive"]["not_sent"] > 0
