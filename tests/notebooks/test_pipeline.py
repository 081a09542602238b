"""The seven notebooks, executed: the effect is real, the sizes are bytes on disk, everything is in its place."""

import json
import re

import nbformat
import pytest

from helpers.workspace import size_bytes

NOTEBOOKS = (
    "01_environment_setup.ipynb",
    "02_dataset_preparation.ipynb",
    "03_qlora_finetuning.ipynb",
    "04_gptq_quantization.ipynb",
    "05_evaluation.ipynb",
    "06_export.ipynb",
    "07_mixture.ipynb",
)


@pytest.mark.parametrize("name", NOTEBOOKS)
def test_every_code_cell_ran(executed_run, name):
    notebook = nbformat.read(executed_run / "notebooks" / name, as_version=4)
    codes = [cell for cell in notebook.cells if cell.cell_type == "code"]
    assert all(cell.execution_count for cell in codes)
    assert not [output for cell in codes for output in cell.outputs if output.output_type == "error"]


@pytest.mark.parametrize("name", NOTEBOOKS)
def test_no_warnings_are_left_for_the_reader(executed_run, name):
    notebook = nbformat.read(executed_run / "notebooks" / name, as_version=4)
    streams = [
        o for cell in notebook.cells if cell.cell_type == "code" for o in cell.outputs if o.get("name") == "stderr"
    ]
    noise = [o.text for o in streams if "Warning" in o.text or "Traceback" in o.text]
    assert not noise


def test_fine_tuning_teaches_what_the_base_cannot_do(report):
    assert report["base"]["exact_match"] <= 0.10
    assert report["finetuned"]["exact_match"] >= 0.70
    assert report["finetuned"]["perplexity"] <= 0.70 * report["base"]["perplexity"]


def test_merging_keeps_it(report):
    assert abs(report["merged"]["exact_match"] - report["finetuned"]["exact_match"]) <= 0.02


def test_four_bits_cost_little(report):
    assert report["gptq"]["exact_match"] >= report["merged"]["exact_match"] - 0.05
    assert report["gptq"]["perplexity"] <= 1.05 * report["merged"]["perplexity"]


@pytest.mark.parametrize(
    ("name", "stage"), [("finetuned", "finetune/adapter"), ("merged", "merge"), ("gptq", "quantize")]
)
def test_sizes_are_the_bytes_on_disk(executed_run, report, name, stage):
    assert report[name]["size_bytes"] == size_bytes(executed_run / stage)


def test_every_model_was_timed(report):
    assert all(report[name]["tokens_per_s"] > 0 for name in ("base", "finetuned", "merged", "gptq"))


def test_plots_are_pictures(executed_run):
    plots = list((executed_run / "plots").glob("*.png"))
    assert len(plots) >= 5
    assert all(plot.read_bytes().startswith(b"\x89PNG") for plot in plots)


def shown(executed_run, prefix, piece):
    """Text and HTML that the cell with this piece of code shows."""
    (path,) = (executed_run / "notebooks").glob(f"{prefix}*.ipynb")
    cells = [cell for cell in nbformat.read(path, as_version=4).cells if cell.cell_type == "code"]
    outputs = next(cell for cell in cells if piece in cell.source).outputs
    pictures = [data for output in outputs for data in [output.get("data", {})]]
    texts = [output.get("text", "") for output in outputs] + [data.get("text/plain", "") for data in pictures]
    return "\n".join(texts), "\n".join(data.get("text/html", "") for data in pictures)


def test_the_training_figure_has_a_point_a_step_and_looks_at_held_out_conversations(executed_run):
    words, html = shown(executed_run, "03", "finetune.finetune(")
    assert "step 180 of 180" in words
    curve = re.search(r"points='([^']+)'", html)[1].split()
    assert len(curve) == 180 and html.count("<circle") >= 6


def test_before_training_one_line_says_what_on_what(executed_run):
    words, _ = shown(executed_run, "03", "start.line(")
    assert "tiny-mistral (4 million weights) on the SAMPLE conversations.jsonl, 720 conversations · rank 16" in words


def test_the_chat_shows_its_question_and_every_models_answer(executed_run):
    words, _ = shown(executed_run, "05", "chat.chat(")
    assert words.lstrip().startswith("You: Who owns the pet Pip?")
    assert all(f"\n{name}: " in words for name in ("base", "finetuned", "gptq"))


def test_every_picture_is_said_in_words(executed_run):
    for name in NOTEBOOKS:
        for cell in nbformat.read(executed_run / "notebooks" / name, as_version=4).cells:
            for output in cell.get("outputs", []):
                if "image/png" in output.get("data", {}):
                    assert output.metadata["image/png"].get("alt"), cell.source


def test_the_mixture_learns_what_its_base_cannot_do(executed_run):
    found = json.loads((executed_run / "mixture" / "evaluate" / "report.json").read_text(encoding="utf-8"))
    assert found["finetuned"]["perplexity"] <= 1.5 < 5 <= found["base"]["perplexity"]
    assert found["finetuned"]["exact_match"] >= 0.4 and found["base"]["exact_match"] <= 0.1
