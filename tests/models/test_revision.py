"""A revision of a hub model: from the budget to the evaluation, everything takes the one that was asked for.

A cache of the hub with two revisions of one id stands for it. What `main` holds there is of no use, so that whatever
takes it by mistake fails.
"""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from safetensors.torch import load_file
from transformers import AutoTokenizer, MistralConfig, MistralForCausalLM

from helpers.models import ROOT, TINY

HUB_ID, WANTED = "somebody/pony-base", "v2"
WIDTH = 192
WHOLE_WAY = """
import json, sys
from helpers.cli import main
work, small = sys.argv[1], sys.argv[2:]
common = ["--profile", "tiny", "--workspace", work, "--json", *small]
evaluated = ["--models", f"base={small[1]}", f"finetuned={work}/finetune/adapter", f"merged={work}/merge"]
stages = {
    "budget": [],
    "prepare": ["--max-conversations", "12"],
    "finetune": ["--max-steps", "1", "--batch-size", "2"],
    "merge": [],
    "evaluate": [*evaluated, "--max-heldout", "2", "--max-new-tokens", "2", "--max-questions", "1"],
    "quantize": ["--model", small[1], "--group-size", "32", "--calibration-samples", "1", "--calibration-tokens", "8"],
}
for stage, flags in stages.items():
    print(f"== {stage}", flush=True)
    print(f"status {main([stage, *common, *flags])}", flush=True)
print("== no such revision", flush=True)
sys.stderr.write("== no such revision\\n")
none = ["--profile", "tiny", "--model", small[1], "--revision", "v3", "--output", f"{work}/none"]
print(f"status {main(['prepare', *none])}", flush=True)
"""


@pytest.fixture(scope="module")
def hub(tmp_path_factory) -> Path:
    """A home of the hub's client in which an id has the revisions main and v2."""
    home = tmp_path_factory.mktemp("hub")
    model = home / "hub" / f"models--{HUB_ID.replace('/', '--')}"
    commits = {"main": "1" * 40, WANTED: "2" * 40}
    for name, commit in commits.items():
        (model / "snapshots" / commit).mkdir(parents=True)
        (model / "refs").mkdir(exist_ok=True)
        (model / "refs" / name).write_text(commit)
    (model / "snapshots" / commits["main"] / "config.json").write_text('{"model_type": "mistral"}')
    folder = model / "snapshots" / commits[WANTED]
    sizes = {"hidden_size": 64, "intermediate_size": WIDTH, "num_hidden_layers": 1, "max_position_embeddings": 512}
    heads = {"num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 32}
    MistralForCausalLM(MistralConfig(vocab_size=2048, sliding_window=None, **sizes, **heads)).half().save_pretrained(
        folder
    )
    AutoTokenizer.from_pretrained(TINY).save_pretrained(folder)
    (folder / "chat_template.jinja").unlink()
    (folder / "tokenizer.model").write_bytes(b"scores of the words")
    return home


@pytest.fixture(scope="module")
def way(hub, tmp_path_factory) -> tuple[Path, dict[str, str], str]:
    """(workspace, standard output by stage, standard error) of every stage with --revision, without a network."""
    work = tmp_path_factory.mktemp("work") / "run"
    command = [sys.executable, "-c", WHOLE_WAY, str(work), "--model", HUB_ID, "--revision", WANTED]
    cache = {"HF_HOME": str(hub), "HF_HUB_CACHE": str(hub / "hub")}  # a library may have set the latter by now
    environment = os.environ | cache | {"HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    stages = dict(part.split("\n", 1) for part in done.stdout.split("== ")[1:])
    return work, stages, done.stderr


@pytest.mark.parametrize("stage", ["budget", "prepare", "finetune", "merge", "evaluate"])
def test_a_stage_takes_the_revision(way, stage):
    _, stages, errors = way
    assert stages[stage].endswith("status 0\n"), errors[-3000:]


def test_the_adapter_says_its_revision_and_plain_peft_would_take_it(way):
    work, _, _ = way
    settings = json.loads((work / "finetune" / "adapter" / "adapter_config.json").read_text())
    assert (settings["base_model_name_or_path"], settings["revision"]) == (HUB_ID, WANTED)


def test_the_merge_holds_that_revision_and_its_tokenizer_files(way):
    work, _, _ = way
    assert load_file(work / "merge" / "model.safetensors")["model.layers.0.mlp.up_proj.weight"].shape == (WIDTH, 64)
    for folder in (work / "finetune" / "adapter", work / "merge"):
        assert (folder / "tokenizer.model").read_bytes() == b"scores of the words"


def test_a_hub_model_is_quantized_at_that_revision(way):
    """8 tokens are too few, and the number that would do is the width of this revision's widest layer."""
    _, stages, errors = way
    assert stages["quantize"].endswith("status 2\n")
    assert f"needs at least {WIDTH}" in errors


def test_a_revision_that_is_none_is_one_sentence(way):
    work, stages, errors = way
    said = errors.rpartition("== no such revision\n")[2]
    assert stages["no such revision"].endswith("status 2\n") and HUB_ID in said and "Traceback" not in said
    assert not (work / "none").exists()
