"""Checkpoints: whole or not there, newest first, broken ones skipped; and training killed again and again."""

import json
import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

import faults
import kill_at
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from helpers import models, workspace
from helpers.workspace import checkpoints, files

ROOT = Path(__file__).resolve().parents[2]


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
    fetched = checkpoints.fetch(drive, new, say=said.append).checkpoint
    assert fetched.name in ("checkpoint-5", "checkpoint-10") and fetched.parent == new
    assert checkpoints.problem(fetched) is None
    assert (drive / "checkpoint-15.damaged" / "adapter.bytes").read_bytes() == b"rotten", "set aside, not deleted"
    assert "checkpoint-15.damaged" in said[1]
    assert checkpoints.fetch(drive, here).checkpoint == here / "checkpoint-15", "what is newer here is kept"


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
    assert "0.00 GiB is free" in said[0]
    assert not (tmp_path / "drive").exists()


def test_deleted_files_are_emptied_first(tmp_path):
    """Drive's bin keeps what is deleted: an open handle shows how long the file was when it went."""
    write(tmp_path / "checkpoints", 5, origin=FIRST)
    with (tmp_path / "checkpoints" / "checkpoint-5" / "adapter.bytes").open("rb") as handle:
        checkpoints.clear(tmp_path / "checkpoints", "first")
        assert os.fstat(handle.fileno()).st_size == 0
    assert not (tmp_path / "checkpoints").exists()


# ---- whose they are --------------------------------------------------------------------------------------------------

FIRST, SECOND = {"run": "first", "supersedes": []}, {"run": "second", "supersedes": []}


def whole(folder: Path) -> dict[str, str]:
    """Name -> run of every checkpoint with all its bytes; looked at as they lie, nothing is mended."""
    found = {path: checkpoints.problem(path) for path in checkpoints.all_of(folder)}
    return {path.name: checkpoints.about(path)["run"] for path, harm in found.items() if harm is None}


def test_a_fresh_start_clears_the_old_ones_only_when_its_first_is_whole(tmp_path):
    here, drive = tmp_path / "here", tmp_path / "drive"
    for step in (5, 10):
        write(here, step, origin=FIRST, send=lambda path: checkpoints.send(path, drive, keep=2))
    new = checkpoints.origin(None, here, drive)
    assert set(whole(drive)) == set(whole(here)) == {"checkpoint-5", "checkpoint-10"}
    with checkpoints.writing(here, 5, keep=2, origin=new, say=lambda text: None):
        raise OSError(28, "No space left on device")
    assert set(whole(here)) == {"checkpoint-5", "checkpoint-10"}, "a write that failed supersedes nothing"
    write(here, 5, origin=new, keep=2)
    assert whole(here) == {"checkpoint-5": new["run"]} and len(whole(drive)) == 2
    assert checkpoints.fetch(drive, here, say=print).checkpoint == here / "checkpoint-5", (
        "the older, longer run is over"
    )
    checkpoints.send(here / "checkpoint-5", drive, keep=2)
    assert whole(drive) == {"checkpoint-5": new["run"]}


def test_another_machines_checkpoints_in_drive_are_never_cleared(tmp_path):
    one, other, drive = tmp_path / "one", tmp_path / "other", tmp_path / "drive"
    said = []
    write(one, 10, origin=FIRST)
    write(other, 10, origin=SECOND)
    write(other, 20, origin=SECOND)
    checkpoints.send(one / "checkpoint-10", drive, keep=1)
    assert checkpoints.send(other / "checkpoint-10", drive, keep=1, say=said.append) is None
    assert "Do two notebooks train in the same workspace?" in said[0]
    checkpoints.send(other / "checkpoint-20", drive, keep=1)
    checkpoints.clear(drive, "second")
    assert whole(drive) == {"checkpoint-10": "first"}


def test_settings_of_an_earlier_run_in_drive_do_not_hide_the_newer_one(tmp_path):
    config = models.profile("tiny", rank=16)
    write(tmp_path, 50, identity=checkpoints.identity(config.with_values(rank=8)), origin=FIRST)
    write(tmp_path, 5, identity=checkpoints.identity(config), origin=SECOND)
    assert checkpoints.newest(tmp_path, checkpoints.identity(config)).name == "checkpoint-5"


def test_the_split_of_a_step_is_no_other_run(tmp_path):
    config = models.profile("tiny", batch_size=2, accumulation=4)
    write(tmp_path, 5, identity=checkpoints.identity(config))
    other = config.with_values(batch_size=4, accumulation=2, keep_attention=False, checkpointing=1)
    assert checkpoints.split_of(checkpoints.newest(tmp_path, checkpoints.identity(other))) == {
        "batch_size": 2,
        "accumulation": 4,
    }
    with pytest.raises(checkpoints.ChangedRun, match="batch_size × accumulation was 8 and is now 16"):
        checkpoints.newest(tmp_path, checkpoints.identity(config.with_values(batch_size=4)))


def test_what_is_not_understood_is_renamed_aside_and_keeps_its_bytes(tmp_path):
    here, drive = tmp_path / "here", tmp_path / "drive"
    write(drive, 5)
    for number in range(2):
        (drive / "checkpoint-12").mkdir()
        (drive / "checkpoint-12" / "thesis.txt").write_text(f"do not lose this {number}")
        said = []
        assert checkpoints.fetch(drive, here, say=said.append).checkpoint == here / "checkpoint-5"
        assert "whole.json is missing" in said[0] and "kept as checkpoint-12.damaged" in said[0]
    texts = [(drive / f"checkpoint-12.damaged{end}" / "thesis.txt").read_text() for end in ("", "-2")]
    assert texts == ["do not lose this 0", "do not lose this 1"]


def test_the_best_one_comes_along(tmp_path):
    here, drive, new = tmp_path / "here", tmp_path / "drive", tmp_path / "new"
    for step in (5, 10, 15):
        write(here, step, spared=[5], send=lambda path: checkpoints.send(path, drive, keep=1))
    assert set(files.names(drive)) == {"checkpoint-5", "checkpoint-15"}
    checkpoints.fetch(drive, new)
    assert set(files.names(new)) == {"checkpoint-5", "checkpoint-15"}


# ---- a Drive that fails ----------------------------------------------------------------------------------------------


@pytest.fixture
def two_in_drive(tmp_path) -> Path:
    """Two whole checkpoints of a machine that is gone."""
    for step in (5, 10):
        write(tmp_path / "drive", step, origin=FIRST)
    return tmp_path / "drive"


def contents(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@pytest.mark.parametrize(
    "trouble",
    [{"counted": "open", "match": "*-10/whole.json", "raise_at": 1, "errno": 5}, {"seed": 1, "share": 1.0}],
    ids=["one read error", "every first try"],
)
def test_errors_that_pass_change_nothing(trouble, two_in_drive, tmp_path):
    with faults.injecting(two_in_drive, log=tmp_path / "log", **trouble):
        assert checkpoints.fetch(two_in_drive, tmp_path / "here").checkpoint == tmp_path / "here" / "checkpoint-10"
        write(tmp_path / "here", 15, keep=2, origin=FIRST)
        assert checkpoints.send(tmp_path / "here" / "checkpoint-15", two_in_drive, keep=2)
    assert faults.injected(tmp_path / "log")
    assert list(whole(two_in_drive)) == ["checkpoint-10", "checkpoint-15"]


@pytest.mark.parametrize("counted", ["list", "open", "read"])
def test_a_read_error_that_stays_is_not_taken_for_none(counted, two_in_drive, tmp_path):
    before, moment = contents(two_in_drive), 0
    while True:  # Drive goes away at the first, the second, … read
        moment += 1
        with faults.injecting(
            two_in_drive, broken="read,list", broken_from=moment, errno=5, counted=counted, log=tmp_path / "log"
        ):
            found = checkpoints.fetch(two_in_drive, tmp_path / "here")
        shutil.rmtree(tmp_path / "here", ignore_errors=True)
        if found.answer == "whole":
            break
        assert found.answer == "unreadable" and "\n" not in found.reason
        assert "Input/output error, also after a minute of trying" in found.reason
        assert "nothing was changed or deleted; mount Drive again" in found.reason
        with pytest.raises(files.StorageError, match="mount Drive again"):
            found.to_continue()
        assert contents(two_in_drive) == before
    assert moment > 2


def test_a_full_disk_here_is_another_answer(two_in_drive, tmp_path):
    here, before = tmp_path / "here", contents(two_in_drive)
    here.mkdir()
    with faults.injecting(here, broken="write", errno=28):
        found = checkpoints.fetch(two_in_drive, here)
    assert (
        found.answer == "not fetched" and "GiB free; delete what is not needed on this machine's disk" in found.reason
    )
    assert contents(two_in_drive) == before and checkpoints.newest(here) is None
    assert checkpoints.fetch(two_in_drive, here).checkpoint == here / "checkpoint-10"


def test_none_is_said_only_where_there_is_none(tmp_path):
    (tmp_path / "drive").mkdir()
    assert checkpoints.fetch(tmp_path / "drive", tmp_path / "here").to_continue() is None
    assert checkpoints.fetch(None, tmp_path / "here").to_continue() is None


# ---- killed at every moment ------------------------------------------------------------------------------------------


def send_all(here: Path, drive: Path) -> None:
    for path in checkpoints.all_of(here):
        assert checkpoints.send(path, drive, keep=2)


def start_anew(here: Path, drive: Path) -> None:
    origin = checkpoints.origin(None, here, drive)
    write(here, 5, keep=2, origin=origin, send=lambda path: checkpoints.send(path, drive, keep=2))


# What lies here and in Drive; what is done and killed; the least step whole in Drive after it, and all when it is done.
SCENES = {
    "write": ((5, 10), (5, 10), lambda here, drive: write(here, 15, keep=2, origin=FIRST), 10, (5, 10)),
    "send": ((10, 15), (5, 10), send_all, 10, (10, 15)),
    "fetch": ((), (5, 10), lambda here, drive: checkpoints.fetch(drive, here), 10, (5, 10)),
    "start anew": ((10,), (5, 10), start_anew, 5, (5,)),
    "clear": ((), (5, 10), lambda here, drive: checkpoints.clear(drive, "first"), 0, ()),
}


@pytest.mark.parametrize("name", SCENES)
def test_killed_at_every_moment_nothing_whole_is_lost(name, tmp_path):
    in_here, in_drive, act, least, done = SCENES[name]
    before, scene, moment, ended = tmp_path / "before", tmp_path / "scene", 0, False
    here, drive = scene / "here", scene / "drive"
    for folder, steps in ((before / "here", in_here), (before / "drive", in_drive)):
        for step in steps:
            write(folder, step, origin=FIRST)
    others = {} if name == "start anew" else {"checkpoint-7": "second"}  # another machine's, that came later
    if others:
        write(before / "drive", 7, origin=SECOND)
    while not ended:
        moment += 1
        shutil.copytree(before, scene)
        ended = not kill_at.is_killed(lambda: act(here, drive), scene, moment)
        for folder in (here, drive):
            checkpoints.readable(folder)  # as every look begins
        lying = whole(drive)
        assert others.items() <= lying.items()
        assert max((checkpoints.step_of(Path(path)) for path in lying.keys() - others.keys()), default=0) >= least
        assert whole(here) or not in_here
        act(here, drive)
        assert set(whole(drive)) == {f"checkpoint-{step}" for step in done} | others.keys()
        assert files.names(drive) == sorted(whole(drive)), "nothing half-written or half-deleted is left"
        shutil.rmtree(scene)
    assert moment > 8


# ---- training killed, and resumed ------------------------------------------------------------------------------------


def test_training_killed_and_resumed_is_the_same_training(tmp_path):
    command = [sys.executable, "tests/finetune/kill_and_resume.py", str(tmp_path)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-5000:]
    result = json.loads(done.stdout)
    assert result["loss_difference"] <= 1e-6 and result["adapter_difference"] <= 1e-6, result
    assert result["resumed_from"] == [0, 0, 0, 0, 2, 0, 2, 2, 6, 10, 10, 10, 10, 10], result
