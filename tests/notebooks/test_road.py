"""From prepare to report on machines that vanish, with a Drive that fails, from a base as it lies on the hub.

Six notebooks, six machines (road.py), a seventh because one is lost in the middle of training. A quarter of first
tries in Drive fail. What has to stand at the end is in Drive: a model that answers through its own chat template, the
report, and a training that did not begin anew.
"""

import json
import shutil
from dataclasses import dataclass, field, replace
from pathlib import Path

import faults
import pytest
from road import NOTEBOOKS, Road, Visit

from helpers import hardware, models, workspace
from helpers.budget import placement
from helpers.models import TINY

ROWS = {"conversations.jsonl": 96, "heldout_conversations.jsonl": 8, "questions.jsonl": 8, "calibration.jsonl": 40}
SETTINGS = {"batch_size": 2, "max_steps": 12, "save_steps": 5, "eval_batch_size": 1, "max_new_tokens": 8}
SETTINGS |= {"calibration_samples": 32}
TYPED, MOVED = {"alpha": 24}, {"rank": 8, "seq_len": 128}
"""In notebook 1, on a machine that prepares and trains nothing: into its form, and by its sliders."""


@dataclass
class Walk:
    """A road that was walked: the visits that ended, the one that was not to, and what was injected."""

    road: Road
    vram_gib: float
    """Of the card in notebook 5."""
    log: Path
    visits: dict[str, Visit] = field(default_factory=dict)
    lost: Visit | None = None
    broken: str = ""

    @property
    def run(self) -> Path:
        return self.road.run


def with_mistrals_tokenizer(folder: Path) -> Path:
    """A random Mistral with the sample model's layers; its 32,768 words and their files are Mistral-7B-v0.3's.

    It has no chat template and no pad token, as the base models of the hub.
    """
    import torch
    from test_templates import from_sentencepiece
    from tokenizers.processors import TemplateProcessing
    from transformers import MistralConfig, MistralForCausalLM

    reference = pytest.importorskip("mistral_common", reason="mistral-common is not installed: `make test` installs it")
    words = Path(reference.__path__[0]) / "data" / "mistral_instruct_tokenizer_240323.model.v3"
    tokenizer = from_sentencepiece(words, legacy=False)
    tokenizer.chat_template = None
    bos = [(tokenizer.bos_token, tokenizer.bos_token_id)]
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing("<s> $A", "<s> $A <s>:1 $B:1", bos)
    tokenizer.save_pretrained(folder)
    shutil.copyfile(words, folder / "tokenizer.model")
    settings = json.loads((folder / "tokenizer_config.json").read_text(encoding="utf-8"))
    settings |= {"tokenizer_class": "LlamaTokenizer", "add_bos_token": True, "add_eos_token": False, "legacy": False}
    (folder / "tokenizer_config.json").write_text(json.dumps(settings), encoding="utf-8")
    torch.manual_seed(0)
    config = MistralConfig.from_pretrained(TINY, vocab_size=len(tokenizer))
    MistralForCausalLM(config).bfloat16().save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def road(tmp_path_factory) -> Walk:
    """The road that was walked, as far as it led."""
    folder = tmp_path_factory.mktemp("road")
    return walk_on(folder, with_mistrals_tokenizer(folder / "base"), seed=200)


@pytest.fixture
def walk(road) -> Walk:
    """The road, when all of its notebooks ended."""
    if road.broken:
        pytest.fail("a notebook did not end: see test_every_notebook_ends", pytrace=False)
    return road


def walk_on(folder: Path, base: Path, seed: int) -> Walk:
    """All six notebooks; training's machine is killed as its second checkpoint begins to reach Drive."""
    found = Walk(Road(folder, base=base, rows=ROWS, settings=SETTINGS), too_little_gib(base), folder / "faults.log")
    for number, notebook in enumerate(NOTEBOOKS):
        injected = {"seed": seed + number, "log": found.log}
        if notebook.startswith("03"):
            found.lost = found.road.visit(notebook, kill_at=1, match="*checkpoint-10*", **injected)
            injected["seed"] += 50
        typed, moved = (TYPED, MOVED) if notebook.startswith("01") else ({}, {})
        vram_gib = found.vram_gib if notebook.startswith("05") else None
        found.visits[notebook] = found.road.visit(notebook, typed, moved, vram_gib, **injected)
        if found.visits[notebook].status:
            found.broken = f"{notebook} did not end: {found.visits[notebook].said}"
            break
    return found


def too_little_gib(base: Path) -> float:
    """The largest card, in steps of 1 MiB, on which a model in 16 bits does not fit at once, and its 4 bits do."""
    config, shape = models.profile("tiny", model=str(base), **SETTINGS), models.shape(str(base))
    for vram_gib in (mib / 1024 for mib in range(1024, 0, -1)):
        t4 = hardware.machine("t4")
        machine = replace(t4, gpu=replace(t4.gpu, vram_gib=vram_gib), free_vram_gib=vram_gib)
        if placement.place("model", config, shape, machine).away:
            return vram_gib
    raise AssertionError("every card is large enough, or none")


def test_every_notebook_ends(road):
    assert not road.broken, road.broken


def test_the_base_has_neither_chat_template_nor_pad_token(road):
    from transformers import AutoTokenizer

    base = AutoTokenizer.from_pretrained(road.road.base)
    assert base.chat_template is None and base.pad_token is None and len(base) == 32768


def test_the_road_was_rough(walk):
    hit = [event.operation for event in faults.injected(walk.log)]
    assert {"stat", "open", "rename"} <= set(hit) and {"create", "write", "close"} & set(hit)
    assert len(hit) > 30
    assert "kill" in [event.what for event in faults.events(walk.log)]


def test_a_machine_lost_in_the_middle_of_training_loses_little(walk):
    assert walk.lost.status != 0
    measured = workspace.require(walk.run / "finetune", "finetune")["measurements"]
    assert measured["resumed_from_step"] == 5
    assert measured["steps"] == 12
    assert "continuing from checkpoint-5" in walk.visits[NOTEBOOKS[2]].printed


def test_what_was_chosen_on_one_machine_is_prepared_and_trained_on_others(walk):
    prepared, trained = (workspace.require(walk.run / stage, stage)["config"] for stage in ("prepare", "finetune"))
    assert prepared["data"]["seq_len"] == trained["data"]["seq_len"] == MOVED["seq_len"]
    assert (trained["adapter"]["rank"], trained["adapter"]["alpha"]) == (MOVED["rank"], TYPED["alpha"])
    assert {name: trained["train"][name] for name in ("max_steps", "save_steps")} == {"max_steps": 12, "save_steps": 5}
    adapter = json.loads((walk.run / "finetune" / "adapter" / "adapter_config.json").read_text(encoding="utf-8"))
    assert (adapter["r"], adapter["lora_alpha"]) == (MOVED["rank"], TYPED["alpha"])
    third = walk.visits[NOTEBOOKS[2]].printed
    assert "rank 8, alpha 24" in third and "a context of 128 tokens" in third and "as chosen in notebook 1" in third
    assert "rank r 8" in third, "the panel starts there"


@pytest.mark.parametrize("name", NOTEBOOKS)
def test_every_cell_ran(walk, name):
    codes = [cell for cell in walk.visits[name].notebook.cells if cell.cell_type == "code"]
    assert all(cell.execution_count for cell in codes)


def test_every_stage_in_drive_is_whole(walk):
    for stage in ("prepare", "finetune", "quantize", "evaluate", "export"):
        manifest = workspace.require(walk.run / stage, stage)
        inside = {str(file.relative_to(walk.run / stage)) for file in (walk.run / stage).rglob("*") if file.is_file()}
        assert inside == {*manifest["outputs"], workspace.MANIFEST}


def test_nothing_half_done_is_left_in_drive(walk):
    """No checkpoints of a training that ended, no folder being copied, renamed or deleted: they all use the quota."""
    assert {path.name for path in walk.run.iterdir() if path.is_dir()} == {
        "prepare",
        "finetune",
        "quantize",
        "evaluate",
        "export",
    }
    assert not list(walk.run.rglob("*.tmp"))


def test_the_report_is_in_drive(walk):
    report = json.loads((walk.run / "evaluate" / "report.json").read_text(encoding="utf-8"))
    assert list(report) == ["base", "finetuned", "gptq"]


def test_the_merged_model_stays_on_its_machine_and_the_next_says_that_it_is_left_out(walk):
    said = walk.visits[NOTEBOOKS[4]].printed
    assert "merged is left out" in said and "04_gptq_quantization.ipynb makes it" in said


def test_sixteen_bits_that_do_not_fit_stay_sixteen(walk):
    """Layers wait elsewhere; what was rounded to 4 bits once is never rounded again to be compared."""
    report = json.loads((walk.run / "evaluate" / "report.json").read_text(encoding="utf-8"))
    assert "layers from host memory" in report["base"]["loaded_as"]
    assert not [name for name in ("base", "merged") if "nf4" in report.get(name, {}).get("loaded_as", "")]


def test_the_model_in_drive_answers_through_its_own_template(walk, tmp_path):
    """With transformers alone, in a copy that nothing else of the run lies beside."""
    from datasets import load_from_disk
    from transformers import AutoModelForCausalLM, AutoTokenizer

    model = shutil.copytree(walk.run / "quantize", tmp_path / "model")
    tokenizer = AutoTokenizer.from_pretrained(model)
    assert tokenizer.pad_token not in (None, tokenizer.eos_token)
    row = load_from_disk(str(walk.run / "prepare" / "train"))[0]
    assert tokenizer.apply_chat_template(row["messages"], return_dict=False) == row["input_ids"]
    question = tokenizer.apply_chat_template(
        row["messages"][:1], add_generation_prompt=True, return_tensors="pt", return_dict=True
    )
    greedy = {"min_new_tokens": 8, "max_new_tokens": 8, "do_sample": False}
    answer = AutoModelForCausalLM.from_pretrained(model).generate(**question, **greedy)
    assert tokenizer.decode(answer[0, question["input_ids"].shape[1] :], skip_special_tokens=True).strip()


def test_the_adapter_in_drive_has_a_tokenizer_that_can_chat(walk):
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(walk.run / "finetune" / "adapter")
    assert tokenizer.apply_chat_template([{"role": "user", "content": "Who?"}], tokenize=False)
    assert tokenizer.pad_token not in (None, tokenizer.eos_token)
