"""The workspace: nothing half-written under a finished name, every byte checked, stale inputs told, kept for good."""

import doctest
import fcntl
import json
import shutil
import subprocess
import sys
import tempfile
import types
import zipfile
from contextlib import suppress
from pathlib import Path

import faults
import kill_at
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from helpers import cli, models, workspace
from helpers.export import share
from helpers.workspace import building, checkpoints, files, open_run, require, run_config, run_models, versions, whole

CONFIG = models.profile("tiny")


@pytest.mark.parametrize(
    "module", [workspace, whole, checkpoints, files, versions], ids=lambda module: module.__name__.rpartition(".")[2]
)
def test_examples_in_docstrings(module):
    assert doctest.testmod(module, optionflags=doctest.ELLIPSIS).failed == 0


def make(
    folder: Path, stage: str, content: str = "weights", inputs: dict | None = None, config=CONFIG, run: str = ""
) -> Path:
    """A finished stage with a file of data, one in a folder, and a log."""
    with building(folder, stage, config, inputs) as work:
        (work.folder / "adapter").mkdir()
        (work.folder / "adapter" / "adapter_model.safetensors").write_text(content)
        (work.folder / "rows.arrow").write_text("rows")
        (work.folder / "log.json").write_text("[]")
        work.measurements |= {"loss": 1.5} | ({"run": run} if run else {})
    return folder


@settings(max_examples=80, deadline=None)
@given(
    name=st.sampled_from(
        ["adapter/adapter_model.safetensors", "rows.arrow", "log.json", "config.yaml", workspace.MANIFEST]
    ),
    place=st.floats(0, 1, exclude_max=True),
    bit=st.integers(0, 7),
)
def test_a_flipped_bit_is_noticed_by_the_next_stage_with_the_file_named(name, place, bit):
    with tempfile.TemporaryDirectory() as scratch:
        root = Path(scratch)
        make(root / "finetune", "finetune")
        file = root / "finetune" / name
        content = bytearray(file.read_bytes())
        content[int(place * len(content))] ^= 1 << bit
        file.write_bytes(content)
        with pytest.raises(workspace.DamagedArtifact, match=Path(name).name):
            require(root / "finetune", "finetune")
        with pytest.raises(workspace.DamagedArtifact, match=Path(name).name):
            make(root / "merge", "merge", inputs={"adapter": root / "finetune"})
        assert not (root / "merge").exists() and not (root / "merge.partial").exists()


@pytest.mark.parametrize("harm", ["missing", "longer", "no manifest", "not there", "leads outside"])
def test_what_is_not_whole_is_refused_with_a_remedy(tmp_path, harm):
    folder = make(tmp_path / "finetune", "finetune")
    if harm == "missing":
        (folder / "rows.arrow").unlink()
    elif harm == "longer":
        (folder / "rows.arrow").write_text("more rows")
    elif harm == "no manifest":
        (folder / workspace.MANIFEST).unlink()
    elif harm == "not there":
        shutil.rmtree(folder)
    else:
        manifest = workspace.read_manifest(folder)
        manifest["outputs"]["../../secret"] = manifest["outputs"]["rows.arrow"]
        text = json.dumps(manifest | {"sha256": workspace.text_checksum(manifest)})
        (folder / workspace.MANIFEST).write_text(text)
    with pytest.raises(workspace.MissingArtifact, match=r"run python -m helpers finetune|outside of") as caught:
        require(folder, "finetune")
    assert "\n" not in str(caught.value)


def test_a_failed_stage_leaves_the_former_one(tmp_path):
    folder = make(tmp_path / "finetune", "finetune", "old")
    with pytest.raises(RuntimeError), building(folder, "finetune", CONFIG) as work:
        (work.folder / "half").write_text("half")
        raise RuntimeError
    assert [path.name for path in tmp_path.iterdir()] == ["finetune"]
    require(folder, "finetune")
    make(folder, "finetune", "new")
    assert (folder / "adapter" / "adapter_model.safetensors").read_text() == "new"


def test_a_kill_between_two_renames_loses_nothing(tmp_path):
    folder = make(tmp_path / "finetune", "finetune")
    folder.rename(tmp_path / "finetune.former")
    assert require(folder, "finetune")["measurements"] == {"loss": 1.5}
    assert not (tmp_path / "finetune.former").exists()


def test_what_was_made_from_something_else_is_stale(tmp_path):
    make(tmp_path / "prepare", "prepare")
    make(tmp_path / "finetune", "finetune", inputs={"prepared": tmp_path / "prepare"})
    make(tmp_path / "merge", "merge", inputs={"adapter": tmp_path / "finetune"})
    make(tmp_path / "finetune", "finetune", inputs={"prepared": tmp_path / "prepare"})  # the same again
    make(tmp_path / "quantize", "quantize", inputs={"merged": tmp_path / "merge"})
    make(tmp_path / "finetune", "finetune", "another rank", inputs={"prepared": tmp_path / "prepare"})
    with pytest.raises(workspace.StaleArtifact, match=r"another finetune .* run python -m helpers merge again"):
        make(tmp_path / "quantize", "quantize", inputs={"merged": tmp_path / "merge"})
    make(tmp_path / "elsewhere" / "quantize", "quantize", inputs={"merged": tmp_path / "merge"})


@pytest.mark.parametrize(
    ("values", "message"), [({"seq_len": 64}, "seq_len = 192 and this run says 64"), ({"model": "x/y"}, "model")]
)
def test_settings_that_do_not_fit_the_prepared_data_are_explained(tmp_path, values, message):
    make(tmp_path / "prepare", "prepare")
    with pytest.raises(workspace.StaleArtifact, match=message):
        make(
            tmp_path / "finetune",
            "finetune",
            inputs={"prepared": tmp_path / "prepare"},
            config=CONFIG.with_values(**values),
        )
    with building(tmp_path / "prepare", "prepare", CONFIG) as work:
        work.measurements["cut_share"] = 0.2
        (work.folder / "rows.arrow").write_text("rows")
    with pytest.raises(workspace.StaleArtifact, match=r"cut to 192 tokens .* --seq-len 256"):
        made = {"prepared": tmp_path / "prepare"}
        make(tmp_path / "finetune", "finetune", inputs=made, config=CONFIG.with_values(seq_len=256))
    make(tmp_path / "prepare", "prepare")
    longer = CONFIG.with_values(seq_len=256, rank=4)
    make(tmp_path / "finetune", "finetune", inputs={"prepared": tmp_path / "prepare"}, config=longer)


def test_manifest_tells_configuration_versions_inputs_outputs(tmp_path):
    (tmp_path / "questions.jsonl").write_text("{}")
    make(tmp_path / "prepare", "prepare", inputs={"questions": tmp_path / "questions.jsonl"})
    manifest = require(tmp_path / "prepare", "prepare")
    assert manifest["finished"] and manifest["config"]["adapter"]["rank"] == 16
    assert manifest["versions"]["torch"] and manifest["versions"]["python"]
    assert manifest["inputs"]["questions"]["sha256"] == workspace.checksum(tmp_path / "questions.jsonl")
    assert manifest["outputs"]["rows.arrow"]["size_bytes"] == 4


# ---- a rented machine ------------------------------------------------------------------------------------------------


@pytest.fixture
def drive(tmp_path, monkeypatch) -> Path:
    """A mounted Drive."""
    store = tmp_path / "drive"
    store.mkdir()
    monkeypatch.setenv("RECIPES_LASTING", str(store))
    return store


def test_a_new_machine_finds_the_adapter_in_drive(tmp_path, drive, capsys):
    first = open_run(CONFIG, tmp_path / "one" / "run")
    make(first.folder("prepare"), "prepare")
    make(first.folder("finetune"), "finetune", inputs={"prepared": first.folder("prepare")})
    make(first.folder("merge"), "merge", inputs={"adapter": first.folder("finetune")})
    make(first.folder("quantize"), "quantize", inputs={"merged": first.folder("merge")})
    shutil.rmtree(tmp_path / "one")
    second = open_run(CONFIG, tmp_path / "two" / "run")
    assert run_config(second, "finetune") == CONFIG
    assert second.folder("prepare").is_dir(), "its calibration comes with it"
    models_there = run_models(second, CONFIG)
    assert set(models_there) == {"base", "finetuned", "gptq"}, "a merged 7B is too large for Drive"
    assert "merged is left out" in capsys.readouterr().out


def test_a_damaged_copy_in_drive_is_noticed(tmp_path, drive):
    first = open_run(CONFIG, tmp_path / "one" / "run")
    make(first.folder("finetune"), "finetune")
    shutil.rmtree(tmp_path / "one")
    (file,) = drive.rglob("adapter_model.safetensors")
    file.write_text("weightz")
    second = open_run(CONFIG, tmp_path / "two" / "run")
    with pytest.raises(workspace.DamagedArtifact, match=r"adapter_model\.safetensors"):
        run_config(second, "finetune")


def test_a_copy_that_broke_off_goes_on(tmp_path):
    stage, home = make(tmp_path / "finetune", "finetune"), tmp_path / "home"
    home.mkdir()
    with (
        faults.injecting(home, counted="create", match="*log.json", broken="write", broken_from=1, errno=5),
        pytest.raises(ValueError, match="Input/output error"),
    ):
        share.to_folder(stage, home)
    assert not (home / "finetune").exists()
    before = {path.name: path.stat().st_ino for path in (home / "finetune.sending").rglob("*.safetensors")}
    assert list(before) == ["adapter_model.safetensors"]
    with faults.injecting(home, log=tmp_path / "log"):
        share.to_folder(stage, home)
    written = {event.path for event in faults.moments(tmp_path / "log") if event.operation == "write"}
    assert not any("adapter_model" in path for path in written), "what was whole is not copied twice"
    require(home / "finetune", "finetune")


def test_a_full_drive_ends_nothing_and_is_told(tmp_path, drive, monkeypatch, capsys):
    run = open_run(CONFIG, tmp_path / "run")
    with monkeypatch.context() as full:
        full.setattr(shutil, "disk_usage", lambda path: shutil._ntuple_diskusage(15, 15, 0))
        make(run.folder("finetune"), "finetune")
    require(run.folder("finetune"), "finetune")
    said = capsys.readouterr().out
    assert "NOT KEPT" in said and "0.00 GiB is free" in said and "empty its bin too" in said
    assert not list(drive.rglob("manifest.json"))
    open_run(CONFIG, tmp_path / "run")
    (manifest,) = drive.rglob("manifest.json")
    assert require(manifest.parent, "finetune") and "NOT KEPT" not in capsys.readouterr().out
    assert not list((tmp_path / "run").glob("*.unkept"))


def test_an_adapter_that_did_not_reach_drive_leaves_the_checkpoints_there(tmp_path, drive):
    run = open_run(CONFIG, tmp_path / "run")
    lying = drive / "mistral-t4-recipes" / "run" / "finetune.partial" / "checkpoints"
    for name in ("own", "another"):
        step = {"own": 5, "another": 7}[name]
        with checkpoints.writing(lying, step, origin={"run": name, "supersedes": []}) as beside:
            (beside / "adapter.bytes").write_bytes(b"weights")
    with faults.injecting(drive, counted="mkdir", match="*/finetune.sending", broken="write", broken_from=1):
        make(run.folder("finetune"), "finetune", run="own")
    assert files.names(lying) == ["checkpoint-5", "checkpoint-7"]
    open_run(CONFIG, tmp_path / "run")
    assert files.names(lying) == ["checkpoint-7"], "another run's is not this one's to delete"


@pytest.mark.parametrize(
    "trouble", [{"seed": 1, "share": 1.0}, {"raise_at": 1, "counted": "open", "errno": 5}], ids=str
)
def test_a_drive_with_hiccups_gives_and_takes(trouble, tmp_path, drive, capsys):
    with faults.injecting(drive, log=tmp_path / "log", **trouble):
        for machine in ("one", "two"):
            run = open_run(CONFIG, tmp_path / machine / "run")
            if machine == "one":
                make(run.folder("finetune"), "finetune")
            assert run_config(run, "finetune") == CONFIG
    assert faults.injected(tmp_path / "log") and "NOT KEPT" not in capsys.readouterr().out


@pytest.mark.parametrize("operation", ["stat", "list", "open", "read"])
def test_a_drive_that_cannot_be_read_is_not_a_missing_stage(operation, tmp_path, drive):
    make(open_run(CONFIG, tmp_path / "one" / "run").folder("finetune"), "finetune")
    run, moment = open_run(CONFIG, tmp_path / "two" / "run"), 0
    while not (run.root / "finetune").exists():  # it goes away at the first, the second, … read
        moment += 1
        with faults.injecting(drive, broken="read,list", broken_from=moment, errno=107, counted=operation):
            try:
                require(run.folder("finetune"), "finetune")
            except workspace.StorageError as error:
                assert "Transport endpoint is not connected, also after a minute" in str(error)
                assert "nothing was changed" in str(error) or "nothing there or here was changed" in str(error)
                assert "\n" not in str(error) and "run this once more" in str(error)
    assert moment > 1


def test_a_drive_that_was_unmounted_is_not_an_empty_one(tmp_path, drive):
    run = open_run(CONFIG, tmp_path / "run")
    drive.rename(tmp_path / "elsewhere")
    with pytest.raises(workspace.StorageError, match="it is no longer mounted"):
        require(run.folder("finetune"), "finetune")


def test_a_full_disk_here_is_said_when_a_stage_is_fetched(tmp_path, drive):
    make(open_run(CONFIG, tmp_path / "one" / "run").folder("finetune"), "finetune")
    run = open_run(CONFIG, tmp_path / "two" / "run")
    with (
        faults.injecting(run.root, broken="write", errno=28),
        pytest.raises(workspace.StorageError, match=r"No space left on device; .* GiB free.*delete what is not needed"),
    ):
        require(run.folder("finetune"), "finetune")
    require(run.folder("finetune"), "finetune")


def test_killed_at_every_moment_a_stage_is_the_old_or_the_new_one(tmp_path, drive):
    """Here and in Drive; and the next run of it finishes, with nothing left over."""
    scene, before, moment, ended = tmp_path / "scene", tmp_path / "before", 0, False
    make(open_run(CONFIG, scene / "run").folder("finetune"), "finetune", "old")
    for folder in (scene, drive):
        shutil.copytree(folder, before / folder.name, dirs_exist_ok=True)
    output, twin = scene / "run" / "finetune", drive / "mistral-t4-recipes" / "run" / "finetune"

    def text(folder: Path) -> str:
        files.recover(folder)
        workspace.check_outputs(folder)
        return (folder / "adapter" / "adapter_model.safetensors").read_text()

    while not ended:
        moment += 1
        ended = not kill_at.is_killed(lambda: make(output, "finetune", "new"), tmp_path, moment, match=PLACES)
        assert text(output) in ("old", "new") and text(twin) in ("old", "new")
        open_run(CONFIG, scene / "run")
        assert text(twin) == text(output)
        make(output, "finetune", "new")
        assert text(twin) == text(output) == "new"
        assert files.names(twin.parent) == ["finetune"] and files.names(output.parent) == ["finetune", "lasting.txt"]
        for folder in (scene, drive):
            shutil.rmtree(folder)
            shutil.copytree(before / folder.name, folder)
    assert moment > 60


PLACES = "[sd][cr][ei][nv]*"  # scene and drive


def test_two_processes_do_not_make_the_same_stage(tmp_path):
    with building(tmp_path / "prepare", "prepare", CONFIG):
        other = "from helpers import models, workspace; from pathlib import Path; import sys\n"
        other += "with workspace.building(Path(sys.argv[1]), 'prepare', models.profile('tiny')): pass"
        command = [sys.executable, "-c", other, str(tmp_path / "prepare")]
        done = subprocess.run(command, cwd=models.ROOT, capture_output=True, text=True)
        assert done.returncode == 1 and "prepare.partial is in use by another process: wait for it" in done.stderr
    require(tmp_path / "prepare", "prepare")
    assert files.names(tmp_path) == ["prepare"]


def test_a_lock_on_what_has_its_finished_name_by_now_is_none(tmp_path, monkeypatch):
    """Between opening the folder and locking it the other process may be done."""
    partial, take = tmp_path / "prepare.partial", fcntl.flock

    def late(handle, how):
        if not (tmp_path / "prepare").exists():
            partial.rename(tmp_path / "prepare")
        take(handle, how)

    monkeypatch.setattr(fcntl, "flock", late)
    with workspace.exclusive(partial):
        assert partial.is_dir()
    assert files.names(tmp_path) == ["prepare"]


def test_a_folder_of_someone_elses_is_never_replaced(tmp_path, drive, capsys):
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.txt").write_text("do not lose this")
    for folder in (tmp_path / "mine", tmp_path / "mine" / "thesis.txt", make(tmp_path / "merge", "merge")):
        with pytest.raises(ValueError, match=r"in use by something else|is a file"):
            make(folder, "prepare")
    assert (tmp_path / "mine" / "thesis.txt").read_text() == "do not lose this"
    run = open_run(CONFIG, tmp_path / "run")
    twin = drive / "mistral-t4-recipes" / "run" / "prepare"
    twin.mkdir(parents=True)
    (twin / "thesis.txt").write_text("do not lose this")
    make(run.folder("prepare"), "prepare")
    assert (twin.parent / "prepare.damaged" / "thesis.txt").read_text() == "do not lose this"
    assert "thesis.txt. It is kept as prepare.damaged" in capsys.readouterr().out
    assert require(twin, "prepare")


@pytest.mark.parametrize("match", ["*/log.json", "*/config.yaml", "*/manifest.json.tmp"])
def test_a_full_disk_is_a_sentence_and_leaves_nothing_half_written(match, tmp_path):
    with (
        faults.injecting(tmp_path, counted="create", match=match, broken="write", broken_from=1, errno=28),
        pytest.raises(
            workspace.StorageError, match=r"No space left on device; .* GiB free\): delete what is not needed"
        ),
    ):
        make(tmp_path / "prepare", "prepare")
    assert files.names(tmp_path) == []


def test_a_workspace_inside_drive_has_no_twin(tmp_path, drive):
    run = open_run(CONFIG, drive / "runs" / "tiny")
    assert workspace.lasting_twin(run.folder("finetune")) is None


def test_a_note_from_another_machine_is_not_followed(tmp_path):
    (tmp_path / workspace.LASTING).write_text("/content/drive/MyDrive/mistral-t4-recipes/tiny")
    make(tmp_path / "finetune", "finetune")
    assert not Path("/content").exists()


@pytest.mark.parametrize(("asked", "leave"), [(True, True), (True, False), (False, True)])
def test_drive_is_mounted_where_the_form_asks_for_it_and_a_refusal_is_said(asked, leave, tmp_path, monkeypatch, capsys):
    google, colab, drive = (types.ModuleType(name) for name in ("google", "google.colab", "google.colab.drive"))
    places, store = [], tmp_path / "MyDrive"

    def mount(place):
        places.append(place)
        if not leave:
            raise ValueError("mount failed: no leave was given")
        store.mkdir()

    google.colab, colab.drive, drive.mount = colab, drive, mount
    for module in (google, colab, drive):
        monkeypatch.setitem(sys.modules, module.__name__, module)
    monkeypatch.setenv("COLAB_RELEASE_TAG", "release-colab")
    monkeypatch.setenv("RECIPES_LASTING", str(store))
    run = open_run(CONFIG, tmp_path / "run", use_drive=asked)
    assert places == (["/content/drive"] if asked else [])
    assert (run.root / "lasting.txt").is_file() == (asked and leave)
    said = capsys.readouterr().out
    assert ("no leave was given" in said) == (asked and not leave) and ("vanishes" in said) == (not (asked and leave))
    open_run(CONFIG, tmp_path / "run", use_drive=asked)
    assert len(places) == (0 if not asked else 1 if leave else 2), "what is mounted is not mounted again"


@pytest.mark.parametrize(
    ("variable", "place", "home"),
    [("COLAB_RELEASE_TAG", "colab", "/content"), ("KAGGLE_KERNEL_RUN_TYPE", "kaggle", "/kaggle/temp")],
)
def test_rented_machines_are_recognised(monkeypatch, variable, place, home):
    for name in ("COLAB_RELEASE_TAG", "KAGGLE_KERNEL_RUN_TYPE", "RECIPES_LASTING"):
        monkeypatch.delenv(name, raising=False)
    assert workspace.place() == "own" and workspace.home() == models.ROOT
    monkeypatch.setenv(variable, "1")
    assert workspace.place() == place and workspace.home() == Path(home)
    assert workspace.lasting_store() is None, "no Drive is mounted here"


# ---- taking it home --------------------------------------------------------------------------------------------------


def test_a_download_comes_back_whole_and_is_not_written_over(tmp_path, capsys):
    stage = make(tmp_path / "finetune", "finetune")
    archive = share.to_download(stage)
    assert "GiB" in capsys.readouterr().out.splitlines()[0], "the size is said before"
    shutil.rmtree(stage)
    with zipfile.ZipFile(archive) as packed:
        packed.extractall(tmp_path / "home")
    workspace.check_outputs(tmp_path / "home" / "finetune")
    assert "AutoPeftModelForCausalLM" in (tmp_path / "home" / "finetune" / "README.md").read_text()
    with pytest.raises(ValueError, match="is there already"):
        share.to_download(tmp_path / "home" / "finetune", archive)


def test_a_copy_may_be_repeated_but_covers_nothing_else(tmp_path):
    stage = make(tmp_path / "finetune", "finetune")
    for _ in range(2):
        assert share.to_folder(stage, tmp_path / "drive") == tmp_path / "drive" / "finetune"
    make(tmp_path / "other" / "finetune", "finetune", content="others")
    (tmp_path / "thesis" / "finetune").mkdir(parents=True)
    (tmp_path / "thesis" / "finetune" / "thesis.txt").write_text("years")
    for source, place in ((tmp_path / "other" / "finetune", "drive"), (stage, "thesis")):
        before = contents(tmp_path / place)
        with pytest.raises(ValueError, match="holds something else"):
            share.to_folder(source, tmp_path / place)
        assert contents(tmp_path / place) == before


def test_an_evaluations_card_goes_along(tmp_path):
    stage = make(tmp_path / "merge", "merge")
    assert "merged into its weights" in share.card_of(stage)
    (stage / "README.md").write_text("| perplexity | 1.14 |")
    assert share.card_of(stage) == "| perplexity | 1.14 |"


def test_the_hub_is_not_reached_without_a_token(tmp_path, monkeypatch):
    monkeypatch.setattr(share.tokens, "hub_token", lambda: None)
    with pytest.raises(ValueError, match="HF_TOKEN"):
        share.to_hub(make(tmp_path / "finetune", "finetune"), "me/mine")


def test_nothing_that_holds_a_token_leaves(tmp_path):
    with building(tmp_path / "finetune", "finetune", CONFIG) as work:
        (work.folder / "log.json").write_text('{"token": "hf_' + "a" * 34 + '"}')
    for leave in (share.to_download, lambda stage: share.to_folder(stage, tmp_path / "home")):
        with pytest.raises(ValueError, match=r"log\.json holds a Hugging Face token"):
            leave(tmp_path / "finetune")


def stage_of_rows(folder: Path, stage: str = "prepare") -> Path:
    with building(folder, stage, CONFIG) as work:
        (work.folder / "rows.arrow").write_text("rows")
    return folder


def contents(root: Path) -> dict[str, bytes | None]:
    return {str(path): path.read_bytes() if path.is_file() else None for path in sorted(root.rglob("*"))}


@pytest.mark.parametrize(
    "case", ["a file of the user's", "another stage", "a file", "working folder", "its parent", "holds the input",
             "inside the input", "cannot be written"],
)  # fmt: skip
def test_an_output_that_the_stage_did_not_make_is_refused_and_nothing_is_touched(case, tmp_path, monkeypatch):
    output, inputs = tmp_path / "out", {}
    if case == "a file":
        output.write_text("thesis")
    elif case == "cannot be written":
        output = Path("/proc/nothing/out")
    elif case in ("working folder", "its parent"):
        (output / "inner").mkdir(parents=True)
        monkeypatch.chdir(output if case == "working folder" else output / "inner")
        output = Path() if case == "working folder" else output
    elif case == "another stage":
        make(output, "finetune")
    else:
        output.mkdir()
        (output / "thesis.txt").write_text("thesis")
        inputs = {"source": output / "thesis.txt"} if case == "holds the input" else inputs
        inputs, output = ({"source": output}, output / "new") if case == "inside the input" else (inputs, output)
    before = contents(tmp_path)
    with pytest.raises(ValueError) as refusal, building(output, "prepare", CONFIG, inputs) as work:
        (work.folder / "rows.arrow").write_text("new rows")
    assert str(refusal.value).startswith("output ") and "\n" not in str(refusal.value)
    assert contents(tmp_path) == before


@pytest.mark.parametrize("place", ["out", "out.former", "out.partial"])
def test_no_file_that_a_stage_did_not_make_is_ever_deleted(place, tmp_path):
    make(tmp_path / "out", "prepare")
    (tmp_path / place).mkdir(exist_ok=True)
    (tmp_path / place / "thesis.txt").write_text("do not lose this")
    with suppress(ValueError):  # out is set aside, and what is called out.former or out.partial refused
        make(tmp_path / "out", "prepare", content="others")
    assert [file.read_text() for file in tmp_path.rglob("thesis.txt")] == ["do not lose this"]


def test_what_a_killed_stage_left_is_emptied_and_what_somebody_put_there_is_named(tmp_path):
    partial = tmp_path / "out.partial"
    with pytest.raises(KeyboardInterrupt), building(tmp_path / "out", "merge", CONFIG, keep=True) as work:
        (work.folder / "half.arrow").write_text("half")
        raise KeyboardInterrupt
    assert (partial / "half.arrow").is_file()
    make(tmp_path / "out", "merge")
    assert files.names(tmp_path) == ["out"] and not (tmp_path / "out" / workspace.SCRATCH).exists()
    partial.mkdir()
    (partial / "thesis.txt").write_text("mine")
    with pytest.raises(ValueError, match=r"out\.partial .*holds thesis\.txt, which no stage put there"):
        make(tmp_path / "out", "merge")
    assert files.names(partial) == ["thesis.txt"], "no mark either"


def test_an_error_names_the_notebook_in_a_notebook_and_the_command_elsewhere(tmp_path, monkeypatch):
    """Each stage's command is one, and its notebook is there."""
    with pytest.raises(workspace.MissingArtifact, match="run python -m helpers prepare first"):
        workspace.require(tmp_path / "prepare", "prepare")
    shell = types.SimpleNamespace(get_ipython=lambda: types.SimpleNamespace(kernel=object()))
    monkeypatch.setitem(sys.modules, "IPython", shell)
    with pytest.raises(workspace.MissingArtifact, match=r"run notebook 02_dataset_preparation\.ipynb first"):
        workspace.require(tmp_path / "prepare", "prepare")
    assert all((models.ROOT / "notebooks" / name).is_file() for name in workspace.NOTEBOOKS.values())
    assert set(workspace.NOTEBOOKS) <= set(cli.STAGES)
