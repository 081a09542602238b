"""The injected faults themselves: a Drive that always answers would let every test on it pass."""

import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import faults
import pytest

COPY = "import pathlib, shutil, sys; shutil.copyfile(sys.argv[1], sys.argv[2])"


@pytest.fixture
def drive(tmp_path) -> Path:
    folder = tmp_path / "drive"
    folder.mkdir()
    for number in range(40):
        (folder / f"{number}.txt").write_text(f"row {number}")
    return folder


def tries(action, *paths) -> list[int]:
    """The errno of each path's first try, 0 where it worked; what failed works the second time."""
    found = []
    for path in paths:
        try:
            action(path)
            found.append(0)
        except OSError as error:
            found.append(error.errno)
            action(path)
    return found


def test_a_quarter_of_first_tries_fails_and_the_second_works(drive, tmp_path):
    files = [drive / f"{number}.txt" for number in range(40)]
    actions = (
        Path.read_text,
        lambda path: path.write_text("new"),
        lambda path: path.rename(path.with_suffix(".done")),
        lambda path: path.with_suffix(".done").unlink(),
        lambda path: path.with_suffix("").mkdir(exist_ok=True),
    )
    for seed in (1, 2):
        for file in files:
            file.write_text("old")
        with faults.injecting(drive, seed=seed, log=tmp_path / "log"):
            found = [tries(action, *files) for action in actions]
        assert all(3 <= sum(map(bool, one)) <= 28 for one in found)
        assert {error for one in found for error in one} == {0, 5, 107}
    assert not [file for file in files if file.exists()]
    assert len(faults.injected(tmp_path / "log")) > 60
    (drive / "outside of the block").write_text("nothing fails any more")


def test_the_same_seed_fails_the_same(drive, tmp_path):
    files = [drive / f"{number}.txt" for number in range(40)]
    seen = []
    for seed in (1, 1, 2):
        with faults.injecting(drive, seed=seed):
            seen.append(tries(Path.read_text, *files))
    assert seen[0] == seen[1] != seen[2]


def test_readers_in_rust_and_c_meet_faults_too(drive, tmp_path):
    import torch
    from safetensors import SafetensorError
    from safetensors.torch import load_file, save_file

    save_file({"row": torch.zeros(4)}, drive / "model.safetensors")
    torch.save({"row": torch.zeros(4)}, drive / "model.pt")
    with faults.injecting(drive, broken="open"):
        with pytest.raises((OSError, SafetensorError)):
            load_file(drive / "model.safetensors")
        with pytest.raises(OSError):
            torch.load(drive / "model.pt")
    with faults.injecting(drive, broken="write"), pytest.raises((OSError, SafetensorError)):
        save_file({"row": torch.zeros(4)}, drive / "other.safetensors")


def test_a_process_and_its_children_inherit_them(drive, tmp_path):
    log = tmp_path / "log"
    outer = "import subprocess, sys; sys.exit(subprocess.run([sys.executable, '-c', *sys.argv[1:]]).returncode)"
    inner = "import os, sys; os.listdir(sys.argv[1])"
    environment = os.environ | faults.environment(drive, broken="read", log=log)
    done = subprocess.run([sys.executable, "-c", outer, inner, drive], env=environment, capture_output=True, text=True)
    assert done.returncode == 1 and "[Errno" in done.stderr
    assert faults.injected(log)[0].operation == "list"


def test_every_moment_of_a_copy_can_be_its_last(drive, tmp_path):
    log, source = tmp_path / "log", tmp_path / "source"
    source.write_bytes(b"x" * 1000)
    with faults.injecting(drive, log=log):
        shutil.copyfile(source, drive / "copy")
    counted = faults.moments(log)
    assert [event.operation for event in counted] == ["create", "write", "write"]
    for number, left in ((1, None), (2, 500), (3, 1000)):
        (drive / "copy").unlink(missing_ok=True)
        environment = os.environ | faults.environment(drive, kill_at=number)
        done = subprocess.run([sys.executable, "-c", COPY, source, drive / "copy"], env=environment)
        assert done.returncode == -signal.SIGKILL
        assert (drive / "copy").exists() == (left is not None)
        assert left is None or (drive / "copy").stat().st_size == left


def test_a_moment_is_counted_under_the_names_that_were_asked_for(drive, tmp_path):
    log = tmp_path / "log"
    with faults.injecting(drive, match="run/*/whole.json", counted="rename", raise_at=2, errno=28, log=log):
        for step in (1, 2):
            folder = drive / "run" / str(step)
            folder.mkdir(parents=True)
            (folder / "tmp").write_text("{}")
            if step == 2:
                with pytest.raises(OSError, match="No space left"):
                    (folder / "tmp").rename(folder / "whole.json")
            (folder / "tmp").rename(folder / "whole.json")
    assert [event.value for event in faults.moments(log)] == [1, 2, 3]
    assert [(event.value, event.operation) for event in faults.injected(log)] == [(28, "rename")]
