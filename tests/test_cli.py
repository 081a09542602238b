"""The command line: its exit status, its JSON, and one sentence for what a newcomer gets wrong."""

import argparse
import doctest
import json
import os
import re
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from helpers import cli, hardware
from helpers.cli import STAGES, flags, main, stages
from helpers.cli.flags import is_read, parser
from helpers.cli.stages import by_layer
from helpers.config import field_parts
from helpers.show import tables

ROOT = Path(__file__).resolve().parent.parent


@pytest.mark.parametrize("module", [cli, flags, stages])
def test_examples_in_docstrings(module):
    assert doctest.testmod(module).failed == 0


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


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["budget", "--rnak", "3"], "budget has no flag --rnak: did you mean --rank?"),
        (["merge", "--gpu=t4"], "merge has no flag --gpu: did you mean --gpus?"),
        (["export", "--nonsense"], "python -m helpers export --help lists what there is"),
        (["serve", "--port", "0", "model"], "serve takes flags only, and 'model' belongs to none"),
        (["budgett"], "invalid choice: 'budgett'"),
    ],
)
def test_a_mistyped_word_exits_with_2_and_says_what_may_have_been_meant(arguments, said, capsys):
    with pytest.raises(SystemExit) as ended:
        main(arguments)
    assert ended.value.code == cli.WRONG_REQUEST and said in capsys.readouterr().err


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
        (["finetune", "--profile", "tiny", "--workspace", "WORK"], "run python -m helpers prepare first"),
        (["merge", "--profile", "tiny", "--workspace", "WORK"], "run python -m helpers finetune first"),
        (["quantize", "--profile", "tiny", "--workspace", "WORK"], "run python -m helpers merge first"),
        (["export", "--adapter", "nowhere"], "nowhere is not an adapter: it has no adapter_config.json"),
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


@pytest.mark.skipif(torch.cuda.is_available(), reason="runs where there is no GPU")
def test_a_whole_run_of_a_7b_without_a_gpu_is_refused_before_anything_is_fetched(tmp_path, capfd):
    assert main(["run", "--profile", "mistral-7b", "--workspace", str(tmp_path / "run")]) == 2
    assert "this machine has no GPU that PyTorch sees" in capfd.readouterr().err
    assert not list(tmp_path.iterdir())


def test_a_whole_run_that_a_later_stage_could_not_end_is_refused_before_the_first(tmp_path, capfd, monkeypatch):
    full = replace(hardware.probe(), host=replace(hardware.probe().host, disk_gib=0.001))
    monkeypatch.setattr(hardware, "probe", lambda: full)
    assert main(["run", "--profile", "tiny", "--workspace", str(tmp_path / "run")]) == 3
    assert "disk" in capfd.readouterr().err
    assert not list(tmp_path.iterdir())


def test_a_runs_own_configuration_stands_for_the_profile(tmp_path, capfd):
    work = str(tmp_path / "run")
    assert main(["prepare", "--profile", "tiny", "--workspace", work, "--seq-len", "64", "--json"]) == 0
    made = json.loads(capfd.readouterr().out)
    assert made["context"] == 64
    assert main(["prepare", "--workspace", work, "--json"]) == 0
    assert json.loads(capfd.readouterr().out)["context"] == 64


@pytest.mark.parametrize("stage", STAGES)
def test_every_flag_of_every_stage_has_a_sentence_its_values_and_its_default(stage, capsys):
    with pytest.raises(SystemExit) as stopped:
        main([stage, "--help"])
    assert stopped.value.code == 0
    shown = capsys.readouterr().out
    flags = [action for action in stage_parser(stage)._actions if "--help" not in action.option_strings]
    for action in flags:
        flag = action.option_strings[0]
        if action.help == argparse.SUPPRESS:
            assert stage == "prepare" and not is_read(stage, action.dest), flag
            continue
        told = re.fullmatch(r"(?P<sentence>\w.{3,}) \((?P<values>.+); default (?P<default>.+)\)\.", action.help)
        assert told and flag in shown, f"{flag}: {action.help}"
        assert all(str(choice) in told["values"] for choice in action.choices or ()), flag
    named = {name for action in flags for name in action.option_strings}
    assert {"--" + name.replace("_", "-") for name in field_parts()} <= named


def stage_parser(stage):
    (stages,) = (action for action in parser()._actions if isinstance(action, argparse._SubParsersAction))
    return stages.choices[stage]


def test_a_stage_lists_its_own_settings_first_and_every_setting_is_read_by_some_stage():
    for stage in STAGES:
        *_, own, others = stage_parser(stage)._action_groups
        assert all(is_read(stage, action.dest) for action in own._group_actions)
        assert not any(is_read(stage, action.dest) for action in others._group_actions)
    single = set(STAGES) - {"run", "budget"}
    assert [name for name in field_parts() if not any(is_read(stage, name) for stage in single)] == ["profile"]


def test_figures_are_printed_as_lines_and_tables_not_as_pythons_own():
    figures = {
        "bits": 4,
        "peak_allocated_gib": None,
        "layer_errors": {"0": 2e-4, "1": 7e-5},
        "modules": [{"layer": n, "module": f"mlp.{m}_proj", "error": 1e-6} for n in (0, 1) for m in ("up", "down")],
        "standing_out": ["layer 0 mlp.down_proj"],
    }
    assert tables.text(by_layer(figures)).splitlines() == [
        "bits                4",
        "peak_allocated_gib  –",
        "standing_out        layer 0 mlp.down_proj",
        "",
        "errors",
        "layer  all     down_proj  up_proj",
        "0      0.0002  1e-06      1e-06",
        "1      7e-05   1e-06      1e-06",
    ]


def test_what_prepare_prints_is_lines_and_no_dict_of_python(tmp_path, capfd):
    source = tmp_path / "rows.jsonl"
    source.write_text(json.dumps({"prompt": "Who?", "completion": "I."}) + "\n", encoding="utf-8")
    arguments = ["--profile", "tiny", "--input", str(source), "--output", str(tmp_path / "out")]
    assert main(["prepare", *arguments, "--workspace", str(tmp_path / "run")]) == 0
    heard = capfd.readouterr().out.splitlines()
    assert heard[0] == f"prepare done: {tmp_path / 'out'}" and len(heard) > 8
    assert not [line for line in heard if re.search(r"\[\d|\{'|: \[", line)], heard
