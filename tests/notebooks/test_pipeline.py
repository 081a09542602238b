"""The eight notebooks, executed: the effect is real, the sizes are bytes on disk, everything is in its place."""

import json
import re

import nbformat
import pages
import pytest

from helpers import inference
from helpers.evaluate import perplexity, preferences
from helpers.evaluate.perplexity import Item
from helpers.models import profile
from helpers.workspace import size_bytes

NOTEBOOKS = (
    "01_environment_setup.ipynb",
    "02_dataset_preparation.ipynb",
    "03_qlora_finetuning.ipynb",
    "04_gptq_quantization.ipynb",
    "05_evaluation.ipynb",
    "06_export.ipynb",
    "07_mixture.ipynb",
    "08_preferences.ipynb",
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


def test_what_the_notebooks_showed_can_be_read_without_running_them(executed_run, tmp_path):
    """`make docs`: a page a notebook, with every picture and table in it, and nothing from the network."""
    (tmp_path / "notebooks").symlink_to(executed_run / "notebooks")
    index, *written = pages.pages(tmp_path)
    assert [page.stem + ".ipynb" for page in written] == list(NOTEBOOKS)
    for page, name in zip(written, NOTEBOOKS, strict=True):
        html = page.read_text(encoding="utf-8")
        notebook = nbformat.read(executed_run / "notebooks" / name, as_version=4)
        pictures = sum(
            "image/png" in output.get("data", {}) for cell in notebook.cells for output in cell.get("outputs", ())
        )
        assert html.count('src="data:image/png') >= pictures, name
        assert "<script" not in html.replace('<script type="application/vnd.jupyter', ""), name
        assert page.name in index.read_text(encoding="utf-8")
    panel = written[0].read_text(encoding="utf-8")
    assert "rank r <b>16</b>" in panel and "It fits" in panel


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


@pytest.fixture(scope="module")
def liked(executed_run) -> dict:
    """Model -> figures of notebook 8's evaluation, with the share of answers that end rightly and tell the fact."""
    folder = executed_run / "preferences" / "evaluate"
    found = json.loads((folder / "report.json").read_text(encoding="utf-8"))
    rows = [json.loads(line) for line in (folder / "pairs.jsonl").read_text(encoding="utf-8").splitlines()]
    for name, entry in found.items():
        told = [(row["models"][name].strip(), *row["chosen"].split(". ", 1)) for row in rows]
        entry["ends_rightly"] = sum(answer.endswith(ending) for answer, _, ending in told) / len(rows)
        entry["tells_the_fact"] = sum(answer.startswith(fact) for answer, fact, _ in told) / len(rows)
    return found


def test_dpo_with_its_sft_term_says_what_it_likes_and_forgets_nothing(liked):
    before, after = liked["before"], liked["dpo"]
    # each fact is asked in both manners: who ends all answers alike is right in half of them
    assert abs(before["preference_accuracy"] - 0.5) <= 0.05 and abs(before["ends_rightly"] - 0.5) <= 0.05
    assert after["preference_accuracy"] >= 0.9 and after["ends_rightly"] >= 0.9 and after["nearer_chosen"] >= 0.9
    assert after["tells_the_fact"] >= before["tells_the_fact"] - 0.03
    assert after["exact_match"] >= before["exact_match"] - 0.06
    assert after["against"]["before"]["preference_margin"]["verdict"] == "better"


def test_plain_dpo_likes_the_better_answer_and_does_not_say_it(liked):
    plain = liked["plain-dpo"]
    assert plain["preference_accuracy"] >= 0.9 and plain["preference_margin"] > liked["before"]["preference_margin"] + 5
    assert (
        max(plain["ends_rightly"], plain["nearer_chosen"]) <= 0.6
        and plain["tells_the_fact"] < liked["dpo"]["tells_the_fact"]
    )


def test_what_the_pairs_do_not_change_keeps_its_probability(executed_run):
    root = executed_run / "preferences"
    pairs = preferences.read(root / "pairs", None, True)
    items = []
    for pair in pairs:  # up to the ending both answers are one
        same = next(i for i, (a, b) in enumerate(zip(pair.chosen.ids, pair.rejected.ids, strict=False)) if a != b)
        items.append(Item(pair.chosen.ids[:same], pair.chosen.scored[:same], 1))
    found = []
    for stage in ("finetune", "dpo"):
        loaded = inference.load(root / stage / "adapter", profile("tiny"))
        found.append(perplexity.perplexity(loaded, items, 192, 96).perplexity.value)
    assert found[1] <= 1.06 * found[0], found


def test_the_reference_is_read_once_and_its_time_is_told(executed_run):
    root = executed_run / "preferences"
    measured = json.loads((root / "dpo" / "manifest.json").read_text(encoding="utf-8"))["measurements"]
    assert measured["reference_s"] > 0 and measured["heldout_accuracy"] >= 0.9
    log = json.loads((root / "dpo" / "log.json").read_text(encoding="utf-8"))
    assert {"margin", "accuracy", "chosen_logp", "rejected_logp"} <= set(log[0])
