"""What was chosen last is where the next notebook starts: on one machine, on the next, on the command line."""

import doctest
import json

import faults
import pytest
import yaml

from helpers import budget, cli, hardware, models, workspace
from helpers.config import load_yaml
from helpers.models import profile
from helpers.show import panel
from helpers.workspace import StaleArtifact, StorageError, Workspace, choices

SHAPE = models.shape("mistral-7b-v0.3")
T4 = hardware.machine("t4")


@pytest.fixture
def run(tmp_path) -> Workspace:
    return Workspace(tmp_path / "run")


@pytest.fixture
def machine(tmp_path, monkeypatch):
    """Opens the same run as another machine would, which shares nothing but the lasting folder."""
    (tmp_path / "drive").mkdir()
    monkeypatch.setenv("RECIPES_LASTING", str(tmp_path / "drive"))
    return lambda name: workspace.open_run(profile("tiny"), tmp_path / name / "tiny")


def test_examples_in_docstrings():
    assert doctest.testmod(choices).failed == 0


def test_what_is_given_wins_over_what_was_chosen_and_that_over_the_profile(run, capsys):
    choices.keep(run, profile("tiny", rank=32, alpha=64, learning_rate=1e-3), "in notebook 1")
    config = choices.start(run, profile("tiny"), rank=8, alpha=None)
    assert config == profile("tiny", rank=8, alpha=64, learning_rate=1e-3)
    assert capsys.readouterr().out == (
        f"alpha 64 and a learning rate of 0.001, as chosen in notebook 1 ({run.root / 'plan.yaml'})\n"
    )


def test_nothing_is_said_where_nothing_was_chosen_and_a_choice_that_is_taken_back_is_gone(run, capsys):
    assert choices.start(run, profile("tiny")) == profile("tiny")
    choices.keep(run, profile("tiny", rank=32), "in notebook 1")
    choices.keep(run, profile("tiny"), "in notebook 3")
    assert choices.start(run, profile("tiny")) == profile("tiny")
    assert not capsys.readouterr().out


def test_who_chose_first_is_said_until_something_else_is_chosen(run, capsys):
    choices.keep(run, profile("tiny", rank=32), "in notebook 1")
    choices.keep(run, choices.start(run, profile("tiny")), "in notebook 2")
    choices.keep(run, choices.start(run, profile("tiny"), seq_len=64), "in notebook 3")
    choices.start(run, profile("tiny"))
    said = capsys.readouterr().out
    assert said.count("as chosen in notebook 1") == 2 and "a context of 64 tokens, as chosen in notebook 3" in said


def test_another_profile_in_the_same_folder_starts_afresh(run):
    choices.keep(run, profile("tiny", rank=32), "in notebook 1")
    assert choices.start(run, profile("mistral-7b")) == profile("mistral-7b")


def test_the_next_machine_starts_from_the_last_choice_wherever_it_was_made(machine):
    first = machine("one")
    choices.keep(first, profile("tiny", rank=32), "in notebook 1")
    second = machine("two")
    assert choices.start(second, profile("tiny")).adapter.rank == 32
    choices.keep(second, profile("tiny", rank=64), "in notebook 3")
    assert choices.start(machine("one"), profile("tiny")).adapter.rank == 64, "older here than there"


def test_moving_a_slider_is_a_choice_so_that_run_all_starts_there(run):
    config = profile("mistral-7b")
    sliders = panel.panel(config, SHAPE, T4, choices.keeper(run, "in notebook 1"))
    assert not choices.last(run), "looking is no choice"
    sliders.controls["rank"].value = 64
    sliders.controls["seq_len"].value = 2048
    again = choices.start(run, profile("mistral-7b"))
    assert again == panel.config_of(sliders) == config.with_values(rank=64, seq_len=2048)
    sliders.controls["checkpointing"].value = "all"
    sliders.button.click()
    assert choices.start(run, profile("mistral-7b")) == panel.config_of(sliders)


def test_a_slider_moved_over_a_typed_value_wins_until_another_is_typed(run):
    """Otherwise Run All snaps back to what the parameters cell says, and trains something else than was shown."""
    typed = {"rank": 32, "alpha": None}
    config = choices.start(run, profile("mistral-7b"), "in notebook 3", **typed)
    sliders = panel.panel(config, SHAPE, T4, choices.keeper(run, "in notebook 3", typed))
    sliders.controls["rank"].value = 4
    for _ in range(2):  # and again, after the cell below has kept it
        again = choices.start(run, profile("mistral-7b"), "in notebook 3", **typed)
        assert again == panel.config_of(sliders) and again.adapter.rank == 4
        choices.keep(run, again, "in notebook 3")
    assert choices.start(run, profile("mistral-7b"), "in notebook 3", rank=64).adapter.rank == 64
    assert choices.start(run, profile("mistral-7b"), "in notebook 1", rank=32).adapter.rank == 32, "another's form"


@pytest.mark.parametrize("asked", [{"seq_len": 32768}, {"rank": 1024, "seq_len": 16384}, {"optimizer": "adamw_torch"}])
def test_what_a_plan_cuts_is_prepared_and_trained_with(asked, run):
    """Planning again from what was kept must not cut again, or data that was prepared for it would be too long."""
    config = profile("mistral-7b", attention="eager", **asked)
    planned = budget.plan(config, SHAPE, T4).config
    kept = choices.keep(run, config, "in notebook 2", planned)
    assert (kept.data.seq_len, kept.adapter.rank) == (planned.data.seq_len, planned.adapter.rank)
    assert kept.train.checkpointing == "auto", "how it is computed is the next machine's to plan"
    trained = budget.plan(choices.start(run, profile("mistral-7b")), SHAPE, T4).config
    assert (trained.data.seq_len, trained.adapter.rank) == (kept.data.seq_len, kept.adapter.rank)


def test_data_that_is_too_long_is_said_with_what_to_do():
    manifest = {"config": {"data": {"seq_len": 1024}}}
    choices.check_prepared(manifest, profile("tiny", seq_len=1024))
    with pytest.raises(
        StaleArtifact, match=r"1,024 tokens and 768 will be trained: run python -m helpers prepare .* starts with 768"
    ):
        choices.check_prepared(manifest, profile("tiny", seq_len=768))


def test_data_that_a_shorter_context_cut_is_not_trained_in_a_longer_one():
    manifest = {"config": {"data": {"seq_len": 192}}, "measurements": {"cut_share": 0.25}}
    with pytest.raises(StaleArtifact, match=r"192 tokens, which cut 25.0% of the rows, and 384 will be trained"):
        choices.check_prepared(manifest, profile("tiny", seq_len=384))
    choices.check_prepared(manifest | {"measurements": {"cut_share": 0.0}}, profile("tiny", seq_len=384))


@pytest.mark.parametrize("text", ["rank: 0", "rank: [", "- 1", "colour: red"])
def test_a_file_that_cannot_be_used_is_named_with_what_to_do(text, run):
    run.root.mkdir()
    (run.root / "plan.yaml").write_text(text)
    with pytest.raises(ValueError, match=r"plan\.yaml.*mend it, or delete it to start from the profile"):
        choices.start(run, profile("tiny"))


@pytest.mark.parametrize("text", ["rank: 8", "chosen: me\nrank: 8", "chosen: {}\nrank: 8\nadapter: {alpha: 16}"])
def test_a_file_written_by_hand_is_read(text, run, capsys):
    run.root.mkdir()
    (run.root / "plan.yaml").write_text(text)
    assert choices.start(run, profile("tiny")).adapter.rank == 8
    assert "as chosen last" in capsys.readouterr().out


def test_a_lasting_folder_that_takes_nothing_is_said_and_stops_nothing(machine, tmp_path, capsys):
    opened = machine("one")
    (tmp_path / "drive" / "mistral-t4-recipes").write_text("a file where the folder should be")
    choices.keep(opened, profile("tiny", rank=32), "in notebook 1")
    assert "NOT KEPT" in capsys.readouterr().out
    assert load_yaml(opened.root / "plan.yaml", start=profile("tiny")).adapter.rank == 32


def test_a_drive_that_hiccups_loses_no_choice_and_one_that_is_gone_starts_nothing(machine, tmp_path, monkeypatch):
    monkeypatch.setenv("RECIPES_PATIENCE_S", "0")
    with faults.injecting(tmp_path / "drive", seed=1, share=1.0, log=tmp_path / "log"):
        choices.keep(machine("one"), profile("tiny", rank=32), "in notebook 1")
        second = machine("two")
        assert choices.start(second, profile("tiny")).adapter.rank == 32
    failed = {event.operation for event in faults.injected(tmp_path / "log") if event.path.endswith("/plan.yaml")}
    assert failed & {"stat", "open", "read"} and "rename" in failed
    with faults.injecting(tmp_path / "drive", broken="read"), pytest.raises(StorageError, match="cannot be reached"):
        choices.start(second, profile("tiny"))


def budget_config(capfd, *flags) -> dict:
    assert cli.main(["budget", "--gpu", "t4", "--json", *flags]) == 0
    return json.loads(capfd.readouterr().out)["plan"]


def test_the_command_line_starts_from_the_choice_then_config_then_flags(run, tmp_path, capfd):
    choices.keep(run, profile("mistral-7b", rank=32, alpha=64, seq_len=512), "in notebook 1")
    (tmp_path / "mine.yaml").write_text("alpha: 8\nseq_len: 256\n")
    common = ["--workspace", str(run.root), "--profile", "mistral-7b"]
    plan = budget_config(capfd, *common, "--config", str(tmp_path / "mine.yaml"), "--seq-len", "128")
    assert (plan["adapter"]["rank"], plan["adapter"]["alpha"], plan["data"]["seq_len"]) == (32, 8, 128)
    assert budget_config(capfd, "--profile", "mistral-7b")["adapter"]["rank"] == 16, "no workspace, no run"


def test_what_a_command_was_told_is_where_the_next_one_starts(run, capfd):
    common = ["--workspace", str(run.root), "--json"]
    assert cli.main(["prepare", "--profile", "tiny", "--seq-len", "64", "--max-conversations", "20", *common]) == 0
    assert yaml.safe_load((run.root / "plan.yaml").read_text())["seq_len"] == 64
    capfd.readouterr()
    assert cli.main(["prepare", "--max-conversations", "20", *common]) == 0  # what is said again is no news
    heard = capfd.readouterr()
    assert json.loads(heard.out)["context"] == 64
    assert "\na context of 64 tokens, as chosen by python -m helpers prepare" in f"\n{heard.err}"
