"""The command line: its exit status, its JSON, and one sentence for what a newcomer gets wrong."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from helpers.cli import STAGES, main

ROOT = Path(__file__).resolve().parent.parent


def run(*arguments: str, **environment: str) -> subprocess.CompletedProcess:
    """The command in a process of its own, as people run it."""
    return subprocess.run(
        [sys.executable, "-m", "helpers", *arguments],
        cwd=ROOT,
        env=os.environ | environment,
        capture_output=True,
        text=True,
    )


def test_budget_json_has_the_promised_keys_and_nothing_else_on_standard_output():
    done = run("budget", "--profile", "mistral-7b", "--gpu", "t4", "--json")
    answer = json.loads(done.stdout)
    assert done.returncode == 0
    assert {"allocated_gib", "reserved_gib", "process_gib", "parts"} <= set(answer["vram"])
    assert answer["ram"]["peak_gib"] > 0
    assert answer["disk"]["peak_gib"] > 0
    assert answer["time"]["step_s"] > 0
    assert answer["time"]["total_h"] > 0
    assert answer["fits"] is True
    assert {"reasons", "plan"} <= set(answer)


def test_what_does_not_fit_exits_with_3_and_says_the_number(capfd):
    assert main(["budget", "--model", "mixtral-8x7b", "--targets", "attention", "--gpu", "t4"]) == 3
    assert "GiB" in capfd.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (["budget", "--rank", "0", "--gpu", "t4"], "rank must be a whole number from 1 to 1024, not 0"),
        (["budget", "--seq-len", "-5", "--gpu", "t4"], "seq_len must be"),
        (["budget", "--alpha", "nan", "--gpu", "t4"], "alpha must be"),
        (["budget", "--seq-len", "100000", "--gpu", "t4"], "seq_len"),
        (["budget", "--model", "no-such-model", "--gpu", "t4"], "model must be"),
        (["budget", "--gpu", "geforce-256"], "geforce-256"),
        (["finetune", "--profile", "tiny", "--workspace", "WORK"], "02_dataset_preparation.ipynb"),
        (["merge", "--profile", "tiny", "--workspace", "WORK"], "adapter"),
        (["quantize", "--profile", "tiny", "--workspace", "WORK"], "merge"),
        (["evaluate", "--profile", "tiny", "--models", "base"], "NAME=DIR"),
        (["prepare", "--profile", "tiny", "--input", "nowhere.jsonl", "--workspace", "WORK"], "nowhere.jsonl"),
        (["prepare", "--config", "nowhere.yaml"], "there is no configuration file"),
    ],
)
def test_a_wrong_request_exits_with_2_and_one_sentence(arguments, sentence, tmp_path, capfd):
    status = main([argument.replace("WORK", str(tmp_path / "run")) for argument in arguments])
    heard = capfd.readouterr()
    assert status == 2, heard
    assert sentence in heard.err
    assert "Traceback" not in heard.err
    assert not heard.out
    assert not list(tmp_path.glob("run/*/*"))


def test_no_network_is_one_sentence(tmp_path):
    done = run(
        *("prepare", "--profile", "tiny", "--input", "somebody/some-conversations", "--output", str(tmp_path / "out")),
        HF_HUB_OFFLINE="1",
    )
    assert done.returncode == 2
    assert "somebody/some-conversations" in done.stderr
    assert "Traceback" not in done.stderr


def test_a_7b_without_a_gpu_says_what_to_do_instead(tmp_path, capfd):
    status = main(["finetune", "--profile", "mistral-7b", "--gpu", "none", "--workspace", str(tmp_path / "run")])
    heard = capfd.readouterr()
    assert status == 3
    assert "GPU" in heard.out + heard.err


def test_a_runs_own_configuration_stands_for_the_profile(tmp_path, capfd):
    work = str(tmp_path / "run")
    assert main(["prepare", "--profile", "tiny", "--workspace", work, "--seq-len", "64", "--json"]) == 0
    made = json.loads(capfd.readouterr().out)
    assert made["context"] == 64
    assert main(["prepare", "--workspace", work, "--json"]) == 0
    assert json.loads(capfd.readouterr().out)["context"] == 64


@pytest.mark.parametrize("stage", STAGES)
def test_every_stage_explains_its_flags(stage, capsys):
    with pytest.raises(SystemExit) as stopped:
        main([stage, "--help"])
    assert stopped.value.code == 0
    told = capsys.readouterr().out
    assert ("--seq-len" if stage == "prepare" else "--rank") in told  # prepare shows the settings that it reads
